"""What other scores would keep, of as many tokens: does a key say enough of whether it will be looked back at?

    PYTHONPATH=tests python -m study.scores CONVERTED --fit FILE --text FILE [--output FILE]

Each key/value head of the base keeps the same number of tokens, chosen by several scores; those that are fitted are
fitted as the model's own, on rows of one text, and all are judged on rows of another. Two measures of what a layer
lacks without a state: the squared error at its output relative to the output's own square, and the KL divergence that
this error is expected to make (see `calibration.costs`). The last scores of the table know more than any token does
when it leaves the window: they bound what a better score could be worth.
"""

import argparse
import json
import sys

import torch

from liger_cli.calibration.fits import fitted_score, received_attention
from liger_cli.calibration.layerwise import visit, visit_backward
from liger_cli.calibration.memories import draw_queries
from liger_cli.evaluation.subject import open_subject
from liger_cli.system.errors import guarded
from liger_cli.system.outputs import write_whole
from liger_cli.system.tables import Table
from study.rest_maps import LENGTH, parser_of, whole_rows

QUERIES = 256  # of a row that stand for all
DIRECTIONS = 24  # of the keys' largest variance, whose products are the squares
LATEST = 128  # queries
FITTED = ("key", "key and value", "key and its squares", "hidden state", "key and the attention it got in the window")
OTHERS = (
    "attention got in the window",
    "mean attention so far, lost with the token",
    "mean attention so far, of all tokens",
    f"attention of the last {LATEST} queries, of all tokens",
    "all attention to come",
)
STEP = 16  # tokens that leave at a time, where what was kept matters


def main(arguments: list[str] | None = None) -> int:
    """Exit code, as of every command of liger."""
    parser = parser_of("scores", __doc__, "with kept tokens", rows=4)
    parser.add_argument("--kept", type=int, default=128, help="tokens of a key/value head (128)")
    options = parser.parse_args(arguments)
    return guarded(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    subject = open_subject(options.folder)
    with subject.column("model") as model:
        fit, judged = (whole_rows(subject.tokenizer, path, options.rows) for path in (options.fit, options.text))
        attentions = [one for one in model.get_decoder().liger_attentions() if hasattr(one, "keep_score")]
        hidden: dict[int, torch.Tensor] = {}
        for attention in attentions:
            attention.register_forward_pre_hook(_remember(hidden), with_kwargs=True)
        weights, found = {}, {}

        def fitting(layer):
            index = layer.attention.layer_idx
            weights[index] = fitted_scores(layer, hidden[index])

        def judging(layer):
            index = layer.attention.layer_idx
            one = lacking(layer, hidden[index].detach(), weights[index], options.kept)
            before = found.setdefault(index, {name: [0.0, 0.0] for name in one})
            found[index] = {name: [x + y for x, y in zip(before[name], one[name], strict=True)] for name in one}

        visit(model, attentions, fit, fitting, "fitting")
        visit_backward(model, attentions, judged, judging, "judging")
    found = {
        layer: {name: [x / len(judged) for x in pair] for name, pair in found[layer].items()} for layer in sorted(found)
    }
    if options.output:
        write_whole(options.output, json.dumps(found, indent=1) + "\n")
    print(table(found).markdown())


def _remember(hidden: dict):
    def hook(module, args, kwargs):
        hidden[module.layer_idx] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    return hook


class Features:
    """What the fitted scores of one head are linear in, [B, T, F] each, by name.

    Attributes:
        attention: [B, T, T], of all the head's query heads together: of each query to each key.
    """

    def __init__(self, layer, hidden, head: int):
        own = slice(head * layer.groups, (head + 1) * layer.groups)
        window, length = layer.attention.liger_window, layer.k.shape[2]
        age = torch.arange(length)[:, None] - torch.arange(length)
        logits = layer.rotated_q[:, own].float() @ layer.rotated_k[:, head, None].float().mT * layer.attention.scaling
        self.attention = logits.masked_fill(age < 0, -torch.inf).softmax(-1).sum(1)
        self.far = self.attention.masked_fill(age < window, 0.0)
        self.near = self.attention.masked_fill((age >= window) | (age < 1), 0.0).sum(1)
        self.key, self.value, self.hidden = layer.k[:, head].float(), layer.v[:, head].float(), hidden.float()

    def directions(self) -> torch.Tensor:
        return torch.linalg.eigh(self.key.flatten(0, 1).T.cov())[1][:, -DIRECTIONS:]

    def of(self, name: str, directions) -> torch.Tensor:
        if name == "key and value":
            return torch.cat([self.key, self.value], dim=-1)
        if name == "key and its squares":
            some = self.key @ directions
            first, second = torch.triu_indices(some.shape[-1], some.shape[-1])
            return torch.cat([self.key, some[..., first] * some[..., second]], dim=-1)
        if name == "hidden state":
            return self.hidden
        if name == "key and the attention it got in the window":
            near = torch.stack([(self.near + 1e-3).log(), self.near / (1 + self.near)], dim=-1)
            return torch.cat([self.key, near], dim=-1)
        return self.key


def fitted_scores(layer, hidden) -> list[dict]:
    """For each key/value head the weights of each fitted score, and the directions that its squares are taken in."""
    attention, window = layer.attention, layer.attention.liger_window
    queries = draw_queries(LENGTH, 0, QUERIES, torch.Generator().manual_seed(0))
    received = received_attention(layer, queries)
    usable = slice(attention.liger_spec.sinks, LENGTH - window)
    found = []
    for head in range(layer.k.shape[1]):
        features = Features(layer, hidden, head)
        directions = features.directions()
        one = {"directions": directions}
        for name in FITTED:
            x = features.of(name, directions)[:, usable]
            one[name] = fitted_score(x.flatten(0, 1), received[:, head, usable].flatten())
        found.append(one)
    return found


def lacking(layer, hidden, weights: list[dict], kept: int) -> dict[str, list[float]]:
    """Of one row: for each score the relative squared error at the layer's output, and the expected KL divergence."""
    attention, window = layer.attention, layer.attention.liger_window
    queries = draw_queries(LENGTH, window, QUERIES, torch.Generator().manual_seed(1))
    projection, error = layer.output_weight(), {}
    for head, weight in enumerate(weights):
        if head in attention.liger_spec.softmax_kv_heads:
            continue
        own = slice(head * layer.groups, (head + 1) * layer.groups)
        features = Features(layer, hidden, head)
        scores = {name: (features.of(name, weight["directions"])[0] @ weight[name]).expand(len(queries), -1)
                  for name in FITTED}  # fmt: skip
        scores |= _others(features, queries, window, kept)
        logits = layer.rotated_q[0, own][:, queries].float() @ layer.rotated_k[0, head].float().T * attention.scaling
        gradient = layer.gradient[0, own][:, queries]
        for name, score in scores.items():
            seen = visible(score, queries, window, attention.liger_spec.sinks, kept)
            output = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ features.value[0]
            difference = output - layer.heads[0, own][:, queries]
            made = torch.einsum("gnd,gdm->nm", difference, projection[own])
            nats = (gradient * difference).sum((0, 2))
            before = error.get(name, (0.0, 0.0))
            error[name] = (before[0] + made, before[1] + nats)
    whole = torch.einsum("hnd,hdm->nm", layer.heads[0][:, queries], projection).square().sum()
    return {name: [(made.square().sum() / whole).item(), (nats.square().mean() / 2).item()]
            for name, (made, nats) in error.items()}  # fmt: skip


def visible(scores, queries, window: int, sinks: int, kept: int) -> torch.Tensor:
    """Which keys each query sees: those near to it, and of those that left the window the `kept` best. [N, T]"""
    places = torch.arange(scores.shape[-1])
    age = queries[:, None] - places
    near = (age >= 0) & ((age < window) | (places < sinks))
    left = (age >= window) & ~near
    best = scores.masked_fill(~left, -torch.inf).topk(min(kept, len(places)), dim=-1).indices
    return near | (torch.zeros_like(left).scatter(-1, best, True) & left)


def _others(features: Features, queries, window: int, kept: int) -> dict[str, torch.Tensor]:
    """Scores [N, T] at each query that are not linear in anything of the token."""
    attention, far = features.attention[0].cumsum(0), features.far[0]
    several = (queries[:, None] - torch.arange(far.shape[1]) - window).clamp_min(1)
    latest = attention[queries - 1] - attention[(queries - 1 - LATEST).clamp_min(0)]
    so_far = far.cumsum(0)[queries - 1] / several
    to_come = far.flip(0).cumsum(0).flip(0)[queries]
    near = features.near.expand(len(queries), -1)
    lost = _while_kept(attention, queries, window, kept)
    return dict(zip(OTHERS, (near, lost, so_far, latest, to_come), strict=True))


def _while_kept(attention, queries, window: int, kept: int) -> torch.Tensor:
    """The mean attention that a token got since it came, as H2O (arXiv 2306.14048); what was evicted stays away.

    Args:
        attention: [T, T], that each key got up to each query.
    """
    places = torch.arange(len(attention))
    alive, found = torch.zeros(len(places), dtype=torch.bool), torch.full((len(queries), len(places)), -torch.inf)
    for start in range(window, len(places), STEP):
        new = (places > start - window - STEP) & (places < start - window + STEP)
        alive |= new
        mean = attention[start - 1] / (start - places).clamp_min(1)
        old = mean.masked_fill(~alive | new, -torch.inf)
        if (alive & ~new).sum() > kept:
            alive = new.scatter(0, old.topk(kept).indices, True)
        now = (queries >= start) & (queries < start + STEP)
        found[now] = mean.masked_fill(~alive, -torch.inf)
    return found


def table(found: dict[int, dict[str, list[float]]]) -> Table:
    """The mean of the layers' relative errors and the sum of their expected divergences."""
    shown = Table("", ["tokens kept by", "error at a layer's output", "expected KL, nats a token"])
    for name in (*FITTED, *OTHERS):
        pairs = [one[name] for one in found.values()]
        error, nats = sum(pair[0] for pair in pairs) / len(pairs), sum(pair[1] for pair in pairs)
        shown.rows.append([name, f"{error:.1%}", f"{nats:.3f}"])
    return shown


if __name__ == "__main__":
    sys.exit(main())
