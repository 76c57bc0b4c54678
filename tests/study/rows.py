"""The rows of the study's table, as data: what is converted how, trained by what, and held against which control."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from liger_cli.checkpoint.reader import read_checkpoint
from liger_cli.conversion.plan import make_plan, with_defaults
from liger_cli.conversion.plan_edits import constant_bytes
from liger_cli.system.errors import UsageError
from liger_cli.templates.liger_gates import GATES
from liger_cli.training.recipes import load_recipe
from study.base_folders import StudyBase
from study.subjects import layers

WINDOW = KEPT = 64
CALIBRATED_KEPT = 2 * WINDOW  # a layer, on average, of `liger convert --calibrate` by default
WINDOW_ONLY = "window-only"
DOCUMENTS, INSTRUCTIONS = "documents", "instructions"
# The same for every recipe: what a step sees, how often it is interrupted.
COMMON = {
    "seq_len": 512,
    "batch_size": 8,
    "micro_batch_size": 4,
    "held_out": 16,
    "eval_steps": 1 << 20,
    "save_steps": 1 << 20,
    "early_stop": 0,
    "streaming": False,
}


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        characters: of text.
        seq_len: tokens of its rows.
        probes: at each distance.
        inside, beyond: distances of the probes in tokens, of those that a window of `WINDOW` reaches and does not.
    """

    characters: int = 80_000
    seq_len: int = 512
    probes: int = 64
    inside: tuple[int, ...] = (32, 48)
    beyond: tuple[int, ...] = (96, 192, 384)


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: what it is called there.
        convert: options of `liger convert`.
        recipe: of `liger finetune`; None for an untrained row.
        changes: fields of the recipe that differ from the shipped one's.
        column: what is measured: `base`, `model` or `window_only` (see `columns`).
        control: the row that is trained identically but for its recurrent branch, which is off; None for controls.
        group: what the row is about. Rows of the group `rates` are trained as the row that they vary, at other rates.
    """

    name: str
    convert: tuple[str, ...] = ()
    recipe: str | None = None
    changes: dict = field(default_factory=dict)
    column: str = "model"
    control: str | None = WINDOW_ONLY
    group: str = "untrained"

    @property
    def needs_data(self) -> bool:
        """Whether its conversion measures something on a text."""
        return "--calibrate" in self.convert or any(part.startswith("auto:") for part in self.convert)


@dataclass(frozen=True)
class Unit:
    """A row on one base with one budget and seed: what is computed at once and kept in a file of its own.

    Attributes:
        budget: training tokens; 0 for an untrained row.
        seed: of the training, and of the text that its conversion measures something on.
        mixture: kind of training data.
    """

    row: Row
    base: str
    budget: int = 0
    seed: int = 0
    mixture: str = DOCUMENTS

    @property
    def name(self) -> str:
        """Its file's name, without the folder of the base."""
        if not self.budget:
            return self.row.name if not self.seed else f"{self.row.name}-seed{self.seed}"
        other = "" if self.mixture == DOCUMENTS else f"-{self.mixture}"
        return f"{self.row.name}-{show_tokens(self.budget)}{other}-seed{self.seed}"


# The same number of kept tokens in every layer, where a calibration shares as many out.
UNIFORM = ("--calibrate", "--kept", str(CALIBRATED_KEPT))

FIRST = (
    Row("base", column="base", control=None, group="control"),
    Row(WINDOW_ONLY, ("--mix", "0"), control=None, group="control"),
    Row("window-only-sinks4", ("--mix", "0", "--sinks", "4"), control=None, group="control"),
    # As much memory as the window and the kept tokens of a calibrated model.
    Row("window-only-192", ("--mix", "0", "--window", "192"), control=None, group="control"),
    Row("gla", ("--gate", "gla")),
    Row("gla-running", ("--gate", "gla", "--normalizer", "running")),
    Row("gla-running-mix0.1", ("--gate", "gla", "--normalizer", "running", "--mix", "0.1")),
    Row("gla-joint", ("--gate", "gla", "--normalizer", "joint")),
    Row("calibrated", ("--calibrate",)),
    Row("calibrated-uniform", UNIFORM),
    Row("calibrated-kept0", ("--calibrate", "--kept", "0")),
    Row("calibrated-kept0-joint", ("--calibrate", "--kept", "0", "--normalizer", "joint")),
    Row("calibrated-gdn", ("--calibrate", "--gate", "gdn")),
    Row("calibrated-kept32", ("--calibrate", "--kept", "32")),
    Row("calibrated-kept64", ("--calibrate", "--kept", "64")),
    Row("calibrated-heads-auto1", ("--calibrate", "--softmax-heads", "auto:1"), group="softmax kept"),
    Row("kept-alone", ("--calibrate", "--mix", "0")),
    Row("layers-auto1", ("--mix", "0", "--softmax-layers", "auto:1"), group="softmax kept"),
    Row("layers-auto2", ("--mix", "0", "--softmax-layers", "auto:2"), group="softmax kept"),
    Row("heads-auto1", ("--mix", "0", "--softmax-heads", "auto:1"), group="softmax kept"),
    Row("heads-auto2", ("--mix", "0", "--softmax-heads", "auto:2"), group="softmax kept"),
)
GATE_ROWS = tuple(Row(gate, ("--gate", gate)) for gate in GATES if gate not in ("gla", "retnet", "lightning"))


def _window(recipe: str, name: str, changes: dict | None = None, convert: tuple[str, ...] = ()) -> Row:
    changes = {**(changes or {}), "attention": "window"}
    return Row(name, convert, recipe, changes, column="window_only", control=None, group="trained control")


# KL alone, as the demo trains: enough for a few hundred thousand tokens.
KL = {"stages": [{"objective": "distill", "lr": 3e-3}], "schedule": "cosine", "warmup": 0.05}
TRAINED = (
    _window("window-only", "window-only-trained"),
    _window("window-only", "window-only-sinks4-trained", convert=("--sinks", "4")),
    Row("paper", ("--gate", "gla"), "paper", control="window-only-trained", group="trained"),
    _window("distill", "window-only-kl", KL),
    Row("kl", ("--gate", "gla"), "distill", KL, control="window-only-kl", group="trained"),
    _window("best", "window-only-best"),
    _window("best", "window-only-192-best", convert=("--window", "192")),
    Row("best", ("--calibrate",), "best", control="window-only-best", group="trained"),
    Row("best-uniform", UNIFORM, "best", control="window-only-best", group="trained"),
    Row("best-kept0", ("--calibrate", "--kept", "0"), "best", control="window-only-best", group="trained"),
    Row(
        "best-heads-auto1", ("--calibrate", "--softmax-heads", "auto:1"), "best", control="window-only-best",
        group="trained",
    ),
    Row("lolcats", ("--recipe", "lolcats"), "lolcats", control="window-only-trained", group="trained"),
    Row("supra", ("--recipe", "supra"), "supra", control="window-only-trained", group="trained"),
    Row("paper-code", ("--recipe", "paper-code"), "paper-code", control="window-only-trained", group="trained"),
    Row("distill", ("--gate", "gla"), "distill", control="window-only-kl", group="trained"),
    Row(
        "kl-running", ("--gate", "gla", "--normalizer", "running", "--branch-scales"), "distill", KL,
        control="window-only-kl", group="trained",
    ),
    Row("paper-layers-auto1", ("--softmax-layers", "auto:1"), "paper", control="window-only-trained", group="trained"),
    Row("kl-heads-auto1", ("--softmax-heads", "auto:1"), "distill", KL, control="window-only-kl", group="trained"),
)  # fmt: skip


def _variant(name: str, changes: dict, *convert: str, **stage) -> Row:
    """The recipe `best` with one thing changed, on a calibrated model."""
    stages = {"stages": [{**BEST_STAGE, **stage}]} if stage else {}
    return Row(name, ("--calibrate", *convert), "best", {**stages, **changes}, "model", "window-only-best", "variants")


BEST_STAGE = {"objective": "distill", "lr": 1e-3, "train": "lora"}
VARIANTS = (
    _variant("best-rank32", {"lora_rank": 32, "lora_alpha": 32}),
    _variant("best-qkvo", {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    _variant("best-lr3e-3", {}, lr=3e-3),
    _variant("best-staged", {"stages": [{"objective": "transfer", "share": 0.3}, BEST_STAGE]}),
    _variant("best-dropout", {}, window_dropout=[0.5, 0.0]),
    _variant("best-scales", {}, train="both"),
    _variant("best-gates", {}, "--gate-params", "learned", train="both"),
)
TRAINED_GATES = tuple(
    Row(f"paper-{gate}", ("--gate", gate), "paper", control="window-only-trained", group="gates")
    for gate in GATES
    if gate not in ("gla", "lightning")
)
# The published methods at other learning rates than theirs, all stages alike. The best of a row and its own is found by
# the held-out loss of training, so that no figure of the table is chosen by.
RATED = ("paper", "lolcats", "supra")
RATES = (0.3, 3.0, 10.0)
EQUAL = ("gla", "lolcats", "supra")  # methods beside which a window alone of as many bytes stands


def at_rate(row: Row, factor: float) -> Row:
    """The row at other learning rates."""
    stages = [{**stage, "lr": stage["lr"] * factor} for stage in load_recipe(row.recipe).to_dict()["stages"]]
    return replace(row, name=f"{row.name}-lr{factor:g}x", changes={**row.changes, "stages": stages}, group="rates")


SWEEP = tuple(at_rate(row, factor) for row in TRAINED if row.name in RATED for factor in RATES)


# Rows between which a difference is claimed.
REPEATED = ("window-only-trained", "paper", "window-only-kl", "window-only-best", "best", "lolcats", "supra")
REPEATED_UNTRAINED = (
    "calibrated", "calibrated-uniform", "calibrated-kept0", "kept-alone", "calibrated-heads-auto1", "layers-auto1",
    "heads-auto1", "calibrated-kept-auto",
)  # fmt: skip
FEW = ("window-only-kl", "kl", "window-only-best", "best")  # longer runs, and the second mixture


def base_rows(base: StudyBase) -> tuple[Row, ...]:
    """Rows that depend on the layers: sizes by layer, every place of one softmax layer, and every spacing."""
    count = layers(base)
    window, alone = ("--mix", "0"), {"window": WINDOW, "mix": 0.0}
    calibrated = with_defaults({"window": WINDOW}, calibrate=True)
    kept = _cache_bytes(base.folder, {**alone, "kept": KEPT})
    spaced = [every for every in (2, 3, 4, count) if every <= count]
    return (
        Row("window-auto", (*window, "--window", f"auto:{_cache_bytes(base.folder, alone)}")),
        Row("kept-alone64", (*window, "--calibrate", "--kept", str(KEPT))),
        Row("kept-share64", (*window, "--calibrate", "--kept", f"share:{KEPT}")),
        Row("kept-auto64", (*window, "--calibrate", "--kept", f"auto:{kept}")),
        # At the bytes of `calibrated`.
        Row("calibrated-kept-auto", ("--calibrate", "--kept", f"auto:{_cache_bytes(base.folder, calibrated)}")),
        *(
            Row(f"layers-every{every}", (*window, "--softmax-layers", f"every:{every}"), group="softmax kept")
            for every in sorted(set(spaced), reverse=True)
        ),
        *(
            Row(f"layer-{layer}", (*window, "--softmax-layers", str(layer)), group="softmax kept")
            for layer in range(count)
        ),
    )


def windows_of_equal_bytes(folder: Path, sinks: int) -> tuple[Row, ...]:
    """For every published method the window alone with as many bytes (and sinks), untrained and trained."""
    rows = []
    for name in EQUAL:
        settings = {} if name == "gla" else load_recipe(name).model
        kept = 0 if settings.get("window") == 0 else sinks
        whole = _cache_bytes(folder, {**settings, "sinks": kept})
        alone = [_cache_bytes(folder, {"window": window, "mix": 0.0, "sinks": sinks}) for window in (1, 2)]
        window = 1 + max(0, whole - alone[0]) // (alone[1] - alone[0])
        options = ("--window", str(window))
        rows.append(Row(f"window-only-as-{name}", ("--mix", "0", *options), control=None, group="control"))
        rows.append(_window("window-only", f"window-only-as-{name}-trained", convert=options))
    return tuple(rows)


def with_sinks(row: Row, sinks: int) -> Row:
    """The row with as many sinks as every other, where it has a window that sees them."""
    if not sinks or row.column == "base" or "--sinks" in row.convert or row.recipe == "supra":
        return row
    return replace(row, convert=(*row.convert, "--sinks", str(sinks)))


def _cache_bytes(folder: Path, settings: dict) -> int:
    """Bytes of one sequence's constant cache where every layer of a base has these settings."""
    return constant_bytes(make_plan(read_checkpoint(folder), settings))


def planned(
    bases: list[StudyBase],
    budgets: list[int],
    seeds: int,
    only: tuple[str, ...] = (),
    large: int | None = None,
    sinks: int = 0,
) -> list[Unit]:
    """Every unit of the study, the most telling first.

    Args:
        budgets: training tokens of the trained rows.
        seeds: repetitions of a trained row.
        only: patterns of row names or groups; their controls come with them.
        large: training tokens of one more run of `FEW`.
        sinks: first tokens that stay visible to the window, in every row.
    Raises:
        UsageError: `only` fits no row.
    """
    units = [replace(unit, row=with_sinks(unit.row, sinks)) for unit in _ordered(bases, budgets, seeds, large, sinks)]
    if not only:
        return units
    wanted = {unit.row.name for unit in units if any(fnmatch(text, one) for one in only for text in _texts(unit.row))}
    if not wanted:
        names = dict.fromkeys(unit.row.name for unit in units)
        raise UsageError(f"--only {','.join(only)} fits no row; the rows are {', '.join(names)}")
    wanted |= {unit.row.control for unit in units if unit.row.name in wanted} | {"base", WINDOW_ONLY}
    return [unit for unit in units if unit.row.name in wanted]


def _texts(row: Row) -> tuple[str, str]:
    return row.name, row.group


def _ordered(bases: list[StudyBase], budgets: list[int], seeds: int, large: int | None, sinks: int) -> Iterator[Unit]:
    yield from (Unit(row, base.name) for row in FIRST for base in bases)
    for seed in range(seeds):
        for budget in budgets:
            rows = [row for row in TRAINED if seed == 0 or budget == min(budgets) or row.name in REPEATED]
            yield from (Unit(row, base.name, budget, seed) for row in rows for base in bases)
        more = {base.name: (*GATE_ROWS, *base_rows(base)) for base in bases}
        if seed == 0:
            yield from (Unit(row, base.name) for base in bases for row in more[base.name])
            equal = {base.name: windows_of_equal_bytes(base.folder, sinks) for base in bases}
            yield from (Unit(row, base.name) for base in bases for row in equal[base.name] if row.recipe is None)
            for budget in budgets:
                rows = {base.name: (*SWEEP, *(row for row in equal[base.name] if row.recipe)) for base in bases}
                yield from (Unit(row, base.name, budget) for base in bases for row in rows[base.name])
            if budgets:
                rows = (*VARIANTS, *TRAINED_GATES)
                yield from (Unit(row, base.name, min(budgets), 0) for row in rows for base in bases)
        else:
            yield from (
                Unit(row, base.name, 0, seed)
                for base in bases
                for row in (*FIRST, *more[base.name])
                if row.name in REPEATED_UNTRAINED
            )
    few = [row for row in TRAINED if row.name in FEW]
    if budgets:
        yield from (Unit(row, base.name, max(budgets), 0, INSTRUCTIONS) for row in few for base in bases)
    if large:
        yield from (Unit(row, base.name, large, 0) for row in few for base in bases)


def parse_tokens(text: str) -> int:
    """`0.5M` or `100k` or `4096` as tokens. Raises UsageError."""
    units = {"k": 1_000, "m": 1_000_000}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        tokens = round(float(number) * unit)
    except (ValueError, OverflowError):
        tokens = 0
    if tokens < 1:
        raise UsageError(f"{text!r} is no number of tokens; write 0.5M, 100k or 4096")
    return tokens


def show_tokens(tokens: int) -> str:
    """As `parse_tokens` reads it."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if tokens >= size / 10 and tokens * 10 % size == 0:
            return f"{tokens / size:g}{unit}"
    return str(tokens)
