"""What other feature maps would make of the tokens that leave exact memory, by held-out error of every layer.

    PYTHONPATH=tests python -m study.rest_maps CONVERTED --fit FILE --text FILE [--output FILE]

A calibrated folder says which tokens each head keeps exactly. What it lets go of is approximated, in the base itself,
by several states; everything they have is fitted on rows of one text and judged on rows of another: the squared error
at each layer's output, behind its output projection, relative to the output's own square. `learned` is trained by Adam
on the same error of a head's output, the others are fitted in closed form.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from liger_cli.calibration.fits import FLOOR, solve_mass
from liger_cli.calibration.layerwise import visit
from liger_cli.calibration.memories import MEAN_LOG, draw_queries, ranks
from liger_cli.evaluation.scoring import make_rows, read_texts
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import guarded
from liger_cli.system.outputs import write_whole
from liger_cli.system.tables import Table
from liger_cli.templates.liger_kept import keep_scores

LENGTH = 2048
QUERIES = 512  # of a row, drawn from all that have something beyond the window
DIRECTIONS = 10  # which with their 55 products are about as many features as a head has dimensions
STEPS = 150  # of a learned map
# What a state is: its numbers, as multiples of D x D.
MAPS = {
    "none": "0",
    "mean value": "1 / D",
    "degree 1": "1",
    "degree 2 in 10 directions": "1",
    "degree 1, and 2 in 10 directions": "2",
    "degree 2": "D / 2",
    "softmax": "1",
    "learned": "2",
}


def main(arguments: list[str] | None = None) -> int:
    """Exit code, as of every command of liger."""
    parser = parser_of("rest_maps", __doc__, "calibrated, with rest states", rows=2)
    parser.add_argument("--learned-every", type=int, default=5, metavar="N", help="train maps of every Nth layer (5)")
    options = parser.parse_args(arguments)
    return guarded(lambda: _run(options))


def parser_of(name: str, description: str, folder: str, rows: int) -> argparse.ArgumentParser:
    """What every study of a layer's memories is given. folder: which one is wanted. rows: by default."""
    parser = argparse.ArgumentParser(prog=f"python -m study.{name}", description=description.splitlines()[0])
    parser.add_argument("folder", type=Path, help=folder)
    parser.add_argument("--fit", required=True, type=Path, metavar="FILE", help="text that everything is fitted on")
    parser.add_argument("--text", required=True, type=Path, metavar="FILE", help="text of another kind, to judge on")
    parser.add_argument("--rows", type=int, default=rows, help=f"rows of 2,048 tokens of each ({rows})")
    parser.add_argument("--output", type=Path, metavar="FILE", help="each layer's figures, as JSON")
    return parser


def whole_rows(tokenizer, path: Path, count: int) -> torch.Tensor:
    """The first rows of a text, [count, LENGTH + 1] token ids."""
    rows = make_rows(tokenizer, read_texts(path), LENGTH)
    return rows.ids[rows.lengths == LENGTH][:count]


def _run(options: argparse.Namespace) -> None:
    subject = open_subject(options.folder)
    found: dict[int, dict[str, float]] = {}
    with subject.column("model") as model:
        rows = [whole_rows(subject.tokenizer, path, options.rows) for path in (options.fit, options.text)]
        attentions = [one for one in model.get_decoder().liger_attentions() if one.keeps_state and one.liger_rest]

        def measure(layer):
            index = layer.attention.layer_idx
            found[index] = errors(layer, options.rows, index % options.learned_every == 0)
            if options.output:
                write_whole(options.output, json.dumps(found, indent=1) + "\n")

        visit(model, attentions, torch.cat(rows), measure, "maps")
    print(table(found).markdown())


def errors(layer, fitted: int, learned: bool) -> dict[str, float]:
    """Relative squared error at a layer's output, for each map. The first `fitted` rows are fitted on."""
    attention = layer.attention
    spec, kv_heads = attention.liger_spec, layer.k.shape[1]
    queries = draw_queries(LENGTH, attention.liger_window, QUERIES, torch.Generator().manual_seed(0))
    scores = keep_scores(layer.k, attention.keep_score).squeeze(-1)
    missing = dict.fromkeys(MAPS, 0.0)
    others = [head for head in range(kv_heads) if head not in spec.softmax_kv_heads]
    for head, count in zip(others, spec.kept_by_head(kv_heads), strict=True):
        parts = []
        for row in range(len(layer.k)):
            rank = ranks(scores[row, head : head + 1], queries, attention.liger_window, spec.sinks)[0]
            parts.append(_Part(layer, row, head, queries, rank, count))
        own = slice(head * layer.groups, (head + 1) * layer.groups)
        weight = layer.output_weight()[own]
        for name in MAPS:
            if name == "learned" and not learned:
                continue
            outputs = approximated(name, parts[:fitted], parts[fitted:])
            errors_of = torch.stack([found - part.wanted for found, part in zip(outputs, parts[fitted:], strict=True)])
            missing[name] = missing[name] + torch.einsum("rgnd,gdm->rnm", errors_of, weight)
    wanted = torch.einsum("rhnd,hdm->rnm", layer.heads[fitted:][:, :, queries], layer.output_weight())
    square = wanted.square().sum().item()
    return {name: one.square().sum().item() / square for name, one in missing.items() if isinstance(one, torch.Tensor)}


class _Part:
    """One key/value head on one row: attention weights split into exact and left out. Shapes as `memories.Parts`."""

    def __init__(self, layer, row: int, head: int, queries, rank, count: int):
        own = slice(head * layer.groups, (head + 1) * layer.groups)
        scaling = layer.attention.scaling
        self.v = layer.v[row, head].float()
        self.k, self.q = layer.rotated_k[row, head].float(), layer.rotated_q[row, own][:, queries].float() * scaling
        self.plain_k, self.plain_q = layer.k[row, head].float(), layer.q[row, own][:, queries].float()
        self.hint = self.plain_q * scaling**0.5  # as the model reads it
        self.wanted = layer.heads[row, own][:, queries].float()
        self.left = (rank >= count) & (rank < len(self.v))  # [N, T]
        logits = self.q @ self.k.T
        self.logits = logits
        exact = logits.masked_fill(~(rank < count), -torch.inf)
        self.exact_lse, self.exact = exact.logsumexp(-1), exact.softmax(-1) @ self.v
        self.count = self.left.sum(-1)
        gone = logits.masked_fill(~self.left, -torch.inf)
        self.lse = gone.logsumexp(-1)
        self.gone = gone.softmax(-1).nan_to_num(0.0) @ self.v
        self.there = self.count > 0
        self.share = torch.where(self.there, (self.lse - self.exact_lse).sigmoid(), 0.0)

    def mixed(self, lse, read):
        """One softmax over exact memory and a state. lse [G, N], read [G, N, D]"""
        share = torch.where(self.there, (lse - self.exact_lse).sigmoid(), 0.0)
        return torch.lerp(self.exact, read, share.unsqueeze(-1))


def approximated(name: str, fit: list[_Part], judged: list[_Part]) -> list[torch.Tensor]:
    """The outputs of the judged parts, [G, N, D] each."""
    if name == "none":
        return [part.exact for part in judged]
    if name == "learned":
        weights = _learn(fit)
        read = lambda part: _by_weights(part, _hedgehog(part, weights))  # noqa: E731
    elif name == "softmax":
        read = lambda part: _by_weights(part, part.plain_q.softmax(-1) @ part.plain_k.softmax(-1).T)  # noqa: E731
    else:
        axes = _directions(fit) if "directions" in name else None
        alone = name.startswith("degree 2 in")
        degree = 0 if name == "mean value" else 2 if "2" in name else 1
        read = lambda part: _by_moments(part, degree, axes, alone)  # noqa: E731
    mass, slopes = _fitted(fit, [read(part) for part in fit])
    outputs = []
    for part in judged:
        features, values = read(part)
        lse = part.count.clamp_min(1).log() + (features @ mass.unsqueeze(-1)).squeeze(-1)
        outputs.append(
            part.mixed(lse, values[0] + sum(s[:, None, None] * x for s, x in zip(slopes, values[1:], strict=True)))
        )
    return outputs


def _by_moments(part: _Part, degree: int, axes=None, alone: bool = False):
    """Features of the mass [G, N, F], and the terms of what is read: the mean value, and its covariance with powers of
    the logit around its mean. axes: of `_directions`, which the quadratic term sees; alone: the linear one, too."""
    left, count = part.left.float(), part.count.clamp_min(1).float()

    def centred(logits):
        mean = (logits * left).sum(-1) / count
        return mean, (logits - mean.unsqueeze(-1)) * left

    some = part.logits if axes is None else (part.q @ axes[0]) @ (part.k @ axes[1]).T
    mean, first = centred(some if alone else part.logits)
    values, ones = [(left @ part.v / count[:, None]).expand_as(part.exact)], torch.ones_like(part.lse)
    features = [ones, mean if degree else torch.zeros_like(mean), (count.log() - MEAN_LOG).expand_as(ones)]
    if degree:
        values.append(first @ part.v / count[:, None])
    if degree == 2:
        square = centred(some)[1].square()
        spread = square.sum(-1) / count
        features.append(spread)
        values.append((square - spread.unsqueeze(-1)) * left @ part.v / count[:, None])
    return torch.cat([torch.stack(features, dim=-1), part.hint], dim=-1), values


def _by_weights(part: _Part, weights):
    """The same of positive weights [G, N, T], products of features."""
    weights = weights * part.left
    total = weights.sum(-1).clamp_min(1e-20)
    ones = torch.ones_like(part.lse)
    count = part.count.clamp_min(1).float()
    features = torch.stack(
        [ones, (total / count).clamp_min(1e-12).log(), (count.log() - MEAN_LOG).expand_as(ones)], dim=-1
    )
    return torch.cat([features, part.hint], dim=-1), [weights @ part.v / total.unsqueeze(-1)]


def _directions(fit: list[_Part]):
    """The directions that carry the most of the logits' variance: maps of queries and of keys, [D, DIRECTIONS] each,
    whose products are the logits without the other directions."""
    keys = torch.cat([part.k - part.k.mean(0) for part in fit])
    queries = torch.cat([part.q.flatten(0, 1) for part in fit])
    spread = keys.T @ keys / len(keys)
    values, vectors = torch.linalg.eigh(spread + 1e-6 * spread.diagonal().mean() * torch.eye(len(spread)))
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    _, vectors = torch.linalg.eigh(root @ (queries.T @ queries) @ root)
    top = vectors[:, -DIRECTIONS:]
    return root @ top, inverse @ top


def _fitted(fit: list[_Part], reads):
    """Weights of the log mass [G, F] and of each term of what is read [G], as `calibration.fits` finds them."""
    gram = target = 0.0
    terms, wanted = [], []
    for part, (features, values) in zip(fit, reads, strict=True):
        there = part.there.double()
        share = part.share.double()
        weight = (share * (1 - share)).square()
        weight = (weight / weight.mean(-1, keepdim=True).clamp_min(1e-30) + FLOOR) * there
        features = features.double()
        goal = torch.where(part.there, part.lse - part.count.clamp_min(1).log(), 0.0).double()
        gram = gram + (features * weight.unsqueeze(-1)).mT @ features
        target = target + ((features * weight.unsqueeze(-1)) * goal.unsqueeze(-1)).sum(1)
        root = (share * there).unsqueeze(-1)
        terms.append(torch.stack([(root * one.double()).flatten(1) for one in values[1:]], dim=-1)
                     if len(values) > 1 else None)  # fmt: skip
        wanted.append((root * (part.gone - values[0]).double()).flatten(1))
    mass = solve_mass(gram, target)
    if terms[0] is None:
        return mass.float(), []
    left, right = torch.cat(terms, dim=1), torch.cat(wanted, dim=1).unsqueeze(-1)
    normal = left.mT @ left
    normal = normal + torch.diag_embed(1e-6 * normal.diagonal(dim1=-2, dim2=-1) + 1e-12)
    slopes = torch.linalg.solve(normal, left.mT @ right).squeeze(-1).float()
    return mass.float(), list(slopes.T)


def _hedgehog(part: _Part, weights):
    """[softmax(Wx), softmax(-Wx)] of rotated queries and keys (arXiv 2402.04347; as LoLCATs has it)."""
    both = []
    for x, weight in ((part.q, weights[0]), (part.k, weights[1])):
        y = x @ weight
        both.append(torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1))
    return both[0] @ both[1].mT


def _learn(fit: list[_Part]):
    """Maps of queries [G, D, D] and of keys [D, D] that lower the error of what is read, weighted by its share."""
    groups, dim = len(fit[0].q), fit[0].q.shape[-1]
    with torch.enable_grad():
        weights = [torch.eye(dim).repeat(groups, 1, 1) * dim**0.25, torch.eye(dim) * dim**-0.25]
        weights = [one.clone().requires_grad_() for one in weights]
        optimizer = torch.optim.Adam(weights, lr=1e-2)
        for step in range(STEPS):
            part = fit[step % len(fit)]
            _, (read, *_) = _by_weights(part, _hedgehog(part, weights))
            loss = (part.share.unsqueeze(-1) * (read - part.gone)).square().sum() / part.wanted.square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [one.detach() for one in weights]


def table(found: dict[int, dict[str, float]]) -> Table:
    """The mean over layers of each map's error relative to that of no state, and in how many layers it is lower."""
    shown = Table("", ["state", "numbers, D x D", "error left, mean", "lowest", "highest", "layers"])
    for name, size in MAPS.items():
        ratios = [one[name] / one["none"] for one in found.values() if name in one]
        if ratios:
            cells = [sum(ratios) / len(ratios), min(ratios), max(ratios)]
            shown.rows.append([name, size, *(f"{cell:.0%}" for cell in cells), str(len(ratios))])
    return shown


if __name__ == "__main__":
    sys.exit(main())
