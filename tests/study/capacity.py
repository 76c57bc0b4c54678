"""How much fits: exact recall beyond the window against the number of pairs, for untrained conversions of many kinds.

    python -m study.capacity --output DIR

Conversions are made once and stay in DIR; what DIR knows already is not measured again.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from liger_cli.checkpoint.reader import fingerprint, read_weights
from liger_cli.evaluation.report import Table, percent
from liger_cli.system.errors import UsageError, guarded
from liger_cli.system.outputs import write_whole
from liger_cli.templates.liger_config import LayerSpec
from study.associations import SIZES, curves
from study.base_folders import StudyBase
from study.subjects import study_base

FORMAT = 1  # raised when what is measured changes
NAME = "capacity"
PAIRS, DISTANCE, COUNT = (1, 2, 4, 8, 16, 32), 256, 64
WINDOW = LayerSpec.window
KEPT = (32, 64, 128, 256)
SOFTMAX_HEADS = {"stories": "4:0"}  # what auto:1 finds; not measured again here
BATCH = 16
MEMORY_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#009e73", "#cc79a7")  # Okabe and Ito's palette
CONTROL, STATE, TOKENS, HEADS = "control", "state", "kept tokens", "softmax head"


@dataclass(frozen=True)
class Kind:
    """A curve: one column of one conversion.

    Attributes:
        name: what table and plot call it.
        group: what remembers beyond the window.
        column: of `columns.COLUMNS`.
        options: of `convert.convert`.
    """

    name: str
    group: str
    column: str = "model"
    options: dict = field(default_factory=dict)


def kinds(base: StudyBase) -> list[Kind]:
    """The curves of a base; the first three share one conversion."""

    def calibrated(kept: int, **settings) -> dict:
        return {"settings": {"kept": kept, **settings}, "calibrate": True}

    heads = SOFTMAX_HEADS.get(base.name, "auto:1")
    return [
        Kind("base", CONTROL, "base"),
        Kind("window only", CONTROL, "window_only"),
        Kind("paper: gla, not calibrated", STATE),
        Kind("state: gla, phi = softmax", STATE, options=calibrated(0, gate="gla")),
        Kind("state: gla, phi = identity", STATE, options=calibrated(0, gate="gla", feature_map="none")),
        Kind("state: no decay, phi = softmax", STATE, options=calibrated(0, gate="none")),
        Kind("state: gdn, keys of length 1", STATE, options=calibrated(0, gate="gdn")),
        *(Kind(f"{kept} kept tokens", TOKENS, options=calibrated(kept)) for kept in KEPT),
        Kind(f"softmax head {heads}", HEADS, "window_only", {"settings": {"mix": 0.0}, "softmax_heads": heads}),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Exit code, as of every command of liger."""
    options = _parser().parse_args(arguments)
    return guarded(lambda: _run(options))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m study.capacity",
        description="Measure exact recall beyond the window against the number of pairs, nothing trained; go on where "
        "an earlier run stopped. Writes capacity.json, .md, .png and .svg.",
    )
    parser.add_argument("--output", required=True, metavar="DIR", type=Path, help="keeps the conversions, too")
    parser.add_argument("--base", default="stories", help="of the study, or FOLDER@TEXT (stories)")
    parser.add_argument("--pairs", default=",".join(map(str, PAIRS)), help=f"by commas ({','.join(map(str, PAIRS))})")
    parser.add_argument(
        "--distance", type=int, default=DISTANCE, help=f"tokens from the value to its answer ({DISTANCE})"
    )
    parser.add_argument("--count", type=int, default=COUNT, help=f"probes for each number of pairs ({COUNT})")
    parser.add_argument("--only", default="", metavar="NAMES", help="curves whose names hold one of these, by commas")
    return parser


def _run(options: argparse.Namespace) -> None:
    try:
        pairs = tuple(sorted({int(part) for part in options.pairs.split(",")}))
    except ValueError:
        raise UsageError(f"--pairs is {options.pairs!r}, but has to be whole numbers with commas") from None
    if pairs[0] < 1:
        raise UsageError(f"--pairs is {options.pairs!r}, but has to be 1 or more each")
    if options.count < 1:
        raise UsageError(f"--count is {options.count}, but has to be 1 or more")
    if options.distance < WINDOW:
        raise UsageError(f"--distance is {options.distance}, but has to be {WINDOW}, the window, or more")
    base = study_base(options.base)
    only = [part.strip() for part in options.only.split(",") if part.strip()]
    chosen = [kind for kind in kinds(base) if not only or any(part in kind.name for part in only)]
    if not chosen:
        raise UsageError(f"--only {options.only!r} fits no curve")
    home = options.output.resolve()
    home.mkdir(parents=True, exist_ok=True)
    result = measure(base, chosen, home, pairs, options.distance, options.count)
    for path in write(result, home):
        print(path)


def measure(base: StudyBase, chosen: list[Kind], home: Path, pairs: tuple[int, ...], distance: int, count: int) -> dict:
    """The recall of every curve at every number of pairs, and of single states.

    Args:
        home: keeps conversions and `capacity.json`, which is written after every figure.
        pairs: facts in a document. distance: tokens between the end of the value and the start of its answer.
        count: probes for each number of pairs.
    Returns:
        `question` (what was measured), `kinds` (per name: group, options, state_bytes, calibration, `recall` {pairs:
        share}), `tokens` {pairs: mean length of a document} and `states` (see `associations.curves`).
    Raises:
        UsageError: a number of pairs or a distance that the base's probes cannot hold.
    """
    from liger_cli.evaluation.recall import teacher_forced
    from liger_cli.evaluation.subject import open_subject
    from study.measure import SEED, state_bytes

    geometry = _geometry(base)
    question = {
        "format": FORMAT,
        "base": base.name,
        "weights": fingerprint(read_weights(base.folder))["digest"],
        "window": WINDOW,
        "distance": distance,
        "count": count,
        "seed": SEED,
        **geometry,
    }
    path = home / f"{NAME}.json"
    result = _known(path, question)
    probes: dict[int, list] = {}
    for kind in chosen:
        about = {"group": kind.group, "column": kind.column, "options": kind.options}
        entry = result["kinds"].get(kind.name)
        if entry is None or any(entry[name] != value for name, value in about.items()):
            entry = result["kinds"][kind.name] = {**about, "recall": {}}
        missing = [number for number in pairs if str(number) not in entry["recall"]]
        if not missing:
            continue
        folder = converted(base, kind, home, question["weights"])
        subject = open_subject(folder)
        calibration = json.loads((folder / "liger.json").read_text(encoding="utf-8")).get("calibration")
        names = ("kl", "window_only_kl", "recurrent_layers")
        entry["calibration"] = {name: calibration[name] for name in names} if calibration else None
        entry["state_bytes"] = state_bytes(subject, kind.column)
        for number in missing:
            if number not in probes:
                probes[number] = _probes(base, subject.tokenizer, distance, count, number, SEED)
                lengths = [len(probe.tokens) for probe in probes[number]]
                result["tokens"][str(number)] = sum(lengths) / len(lengths)
            with subject.column(kind.column) as model:
                right = sum(
                    teacher_forced(model, probes[number][first : first + BATCH], subject.tokenizer)
                    for first in range(0, count, BATCH)
                )
            entry["recall"][str(number)] = right / count
            _keep(path, result)
        shown = ", ".join(f"{number}: {percent(entry['recall'][str(number)])}" for number in pairs)
        print(f"{kind.name}: {shown}", file=sys.stderr, flush=True)
    if not result["states"]:
        result["states"] = curves(geometry["head_dim"])
    _keep(path, result)
    return result


def converted(base: StudyBase, kind: Kind, home: Path, digest: str) -> Path:
    """The folder of a kind's conversion, made where it is not there."""
    from liger_cli.commands.convert import convert

    asked = json.dumps([FORMAT, digest, kind.options], sort_keys=True)
    folder = home / "models" / f"{base.name}-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"
    if not (folder / "liger.json").exists():
        folder.parent.mkdir(exist_ok=True)
        convert(str(base.folder), str(folder), **kind.options)
    return folder


def _geometry(base: StudyBase) -> dict:
    from liger_cli.checkpoint.reader import Geometry, read_config

    geometry = Geometry.of(read_config(base.folder))
    return {
        "head_dim": geometry.head_dim,
        "layers": geometry.num_hidden_layers,
        "kv_heads": geometry.num_key_value_heads,
    }


def _known(path: Path, question: dict) -> dict:
    """What an earlier run found for the same question; empty for another one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("question") == question:
        return found
    return {"question": question, "kinds": {}, "tokens": {}, "states": {}}


def _keep(path: Path, result: dict) -> None:
    write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _probes(base: StudyBase, tokenizer, distance: int, count: int, pairs: int, seed: int) -> list:
    from liger_cli.evaluation.recall import Probe

    try:
        found = base.source.recall_probe(tokenizer, distance, count, seed, pairs)
    except ValueError as error:
        raise UsageError(f"{pairs} pairs at {distance} tokens cannot be probed: {error}") from None
    return [Probe(prompt + answer, ((len(prompt), len(prompt) + len(answer)),)) for prompt, answer in found]


def write(result: dict, home: Path) -> list[Path]:
    """Write the tables and the plot of a result beside its JSON; return all files."""
    text = "\n\n".join(table.markdown() for table in (recall_table(result), states_table(result)))
    write_whole(home / f"{NAME}.md", text + "\n")
    return [home / f"{NAME}.json", home / f"{NAME}.md", *(home / name for name in plot(result, home))]


def recall_table(result: dict) -> Table:
    """Exact recall by kind and number of pairs."""
    question = result["question"]
    numbers = _numbers(result)
    table = Table(
        f"Exact recall of one fact, {question['distance']} tokens back, by the number of facts in the document; "
        f"nothing trained, window {question['window']}, {question['count']} probes each",
        ["beyond the window", "cache after 1,024 tokens", *map(str, numbers)],
    )
    for name, entry in result["kinds"].items():
        cells = [percent(entry["recall"][str(n)]) if str(n) in entry["recall"] else "" for n in numbers]
        table.rows.append([name, f"{entry['state_bytes'] / 1024:,.0f} KiB", *cells])
    return table


def states_table(result: dict) -> Table:
    """Associations read back from single states."""
    width = result["question"]["head_dim"]
    title = f"Random associations read back from one {width} x {width} state, by how many were written"
    table = Table(title, ["state", *map(str, SIZES)])
    for name, shares in result["states"].items():
        table.rows.append([name, *(percent(shares[str(size)]) for size in SIZES)])
    return table


def _numbers(result: dict) -> list[int]:
    return sorted({int(number) for entry in result["kinds"].values() for number in entry["recall"]})


def plot(result: dict, home: Path) -> list[str]:
    """Recall against pairs, and associations read back from a state alone; PNG and SVG. Returns the files' names."""
    from liger_cli.system.figures import new_figure, save_figure

    question, numbers = result["question"], _numbers(result)
    figure, axes = new_figure(1, 2, (9.5, 4.6), sharey=True)
    left, right = axes[0]
    seen: dict[str, int] = {}
    for name, entry in result["kinds"].items():
        place = seen[entry["group"]] = seen.get(entry["group"], -1) + 1
        points = sorted((int(number), 100 * share) for number, share in entry["recall"].items())
        left.plot(*zip(*points, strict=True), label=name, **_style(entry["group"], place))
    left.plot(
        numbers,
        [100 / number for number in numbers],
        color="black",
        linewidth=0.8,
        linestyle=":",
        label="a guess among them",
    )
    left.set(
        xlabel="facts in the document", ylabel="exact, %", title=f"one fact asked, {question['distance']} tokens back"
    )
    for index, (name, shares) in enumerate(result["states"].items()):
        style = {"color": MEMORY_COLOURS[index], "marker": "osvD^P"[index], "markersize": 4, "linewidth": 1.4}
        right.plot([int(size) for size in shares], [100 * share for share in shares.values()], label=name, **style)
    width = question["head_dim"]
    right.axvline(width, color="black", linewidth=0.8, linestyle=":")
    right.set(xlabel="random associations written", title=f"one {width} x {width} state alone")
    for axis, ticks in ((left, numbers), (right, SIZES)):
        axis.set_xscale("log")
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=8)
    return save_figure(figure, home, NAME)


def _style(group: str, place: int) -> dict:
    """Colour by what remembers, shade and marker by the place in its group."""
    from matplotlib import colormaps

    if group == CONTROL:
        return {"color": "black", "linestyle": ("-", "--")[place % 2], "linewidth": 1.2}
    shades = {STATE: "Oranges", TOKENS: "Blues", HEADS: "Greens"}[group]
    colour = colormaps[shades](0.95 - 0.12 * place)
    return {"color": colour, "marker": "osvD^P"[place % 6], "markersize": 4, "linewidth": 1.4}


if __name__ == "__main__":
    sys.exit(main())
