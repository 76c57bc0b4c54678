"""Fine-tuning recipes: YAML files in templates/recipes or of the user's own, checked, and overridden by flags."""

from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path

from liger_cli.errors import UsageError

OBJECTIVES = ("ce", "distill", "transfer")
ATTENTIONS = ("liger", "window")
SCHEDULES = ("plateau", "constant", "cosine", "linear")


@dataclass(frozen=True)
class Stage:
    """A share of the training steps with one objective.

    Attributes:
        objective: `ce` (next-token cross-entropy), `distill` (KL to the original model), `transfer` (each Liger
            attention's output matched to the original attention's on the same input).
        share: of all steps; the shares are normalised.
        lr: peak learning rate.
        ce_weight: weight of cross-entropy added to `distill`.
        temperature: of both distributions in `distill`.
        window_dropout: probability, per Liger layer and micro-batch, of training on the recurrent branch alone.
    """

    objective: str = "ce"
    share: float = 1.0
    lr: float = 1e-3
    ce_weight: float = 0.0
    temperature: float = 1.0
    window_dropout: float = 0.0

    def __post_init__(self):
        _require(self.objective in OBJECTIVES, "objective", self.objective, f"one of {', '.join(OBJECTIVES)}")
        _require(_number(self.share) and self.share > 0, "share", self.share, "a positive number")
        _require(_number(self.lr) and 0 < self.lr < 10, "lr", self.lr, "a positive number below 10")
        _require(_number(self.ce_weight) and self.ce_weight >= 0, "ce_weight", self.ce_weight, "0 or more")
        _require(_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "positive")
        ok = _number(self.window_dropout) and 0 <= self.window_dropout < 1
        _require(ok, "window_dropout", self.window_dropout, "from 0 up to, not including, 1")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a fine-tuning run, apart from the model and the data.

    Attributes:
        differs: sentences on where it departs from the publication it follows.
        data: the default of `--data`.
        held_out: examples kept for evaluation, but never more than a tenth of them.
        epochs: passes over the training examples. max_steps: ends the run there instead, where it is set.
        seq_len: tokens of a row; batch_size: rows of a global batch; micro_batch_size: rows run at once.
        packing: several short documents share a row; they are padded apart and never see one another.
        lora_rank, lora_alpha, lora_dropout, target_modules: of LoRA; by default on Liger layers only.
        train_softmax_layers: LoRA on the other layers, too.
        attention: `liger`, or `window`: the recurrent branch is off while training, and off (mix 0) once merged.
        schedule: of the learning rate: `plateau` (ReduceLROnPlateau on the held-out loss), `constant`, `cosine`,
            `linear`; within each stage. warmup: share of a stage's steps with a rising rate (not for `plateau`).
        plateau_factor, plateau_patience, min_lr: of `plateau`; patience counts evaluations.
        eval_steps, save_steps: optimizer steps between evaluations and between checkpoints.
        early_stop: evaluations without improvement after which the run ends; 0 never does.
    """

    name: str = "paper"
    description: str = ""
    differs: tuple[str, ...] = ()
    data: str = "yahma/alpaca-cleaned"
    held_out: int = 200
    epochs: float = 2
    max_steps: int | None = None
    seq_len: int = 1024
    batch_size: int = 8
    micro_batch_size: int = 1
    packing: bool = True
    lora_rank: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    train_softmax_layers: bool = False
    attention: str = "liger"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    schedule: str = "plateau"
    warmup: float = 0.0
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    min_lr: float = 1e-5
    eval_steps: int = 200
    save_steps: int = 100
    early_stop: int = 0
    seed: int = 0
    gradient_checkpointing: bool = False
    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(),))

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "micro_batch_size", "lora_rank", "eval_steps", "save_steps"):
            value = getattr(self, name)
            _require(type(value) is int and value > 0, name, value, "a positive whole number")
        ok = self.max_steps is None or (type(self.max_steps) is int and self.max_steps > 0)
        _require(ok, "max_steps", self.max_steps, "a positive whole number")
        for name in ("held_out", "seed", "plateau_patience", "early_stop"):
            value = getattr(self, name)
            _require(type(value) is int and value >= 0, name, value, "a whole number, 0 or more")
        for name in ("epochs", "lora_alpha"):
            value = getattr(self, name)
            _require(_number(value) and value > 0, name, value, "a positive number")
        for name in ("weight_decay", "max_grad_norm", "min_lr"):
            value = getattr(self, name)
            _require(_number(value) and value >= 0, name, value, "a number, 0 or more")
        for name in ("lora_dropout", "warmup", "plateau_factor"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value < 1, name, value, "from 0 up to, not including, 1")
        _require(self.attention in ATTENTIONS, "attention", self.attention, f"one of {', '.join(ATTENTIONS)}")
        if any(stage.window_dropout for stage in self.stages):
            ok = self.attention == "liger" and not self.gradient_checkpointing
            _require(ok, "window_dropout", "on", "0 with attention: window or with gradient checkpointing")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(bool(self.target_modules), "target_modules", self.target_modules, "one name or more")
        _require(bool(self.stages), "stages", self.stages, "one stage or more")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of micro_batch_size ({self.micro_batch_size})",
        )
        if self.schedule == "plateau":
            ok = len({stage.lr for stage in self.stages}) == 1
            _require(ok, "schedule", "plateau", "constant, cosine or linear where stages differ in lr")

    def to_dict(self) -> dict:
        """Plain lists and numbers, as in the YAML file."""
        value = asdict(self)
        for name in ("differs", "target_modules", "stages"):
            value[name] = list(value[name])
        return value

    def stage_ends(self, max_steps: int) -> list[int]:
        """For each stage the step at which it ends; the last is `max_steps`."""
        total, ends, passed = sum(stage.share for stage in self.stages), [], 0.0
        for stage in self.stages:
            passed += stage.share
            ends.append(round(max_steps * passed / total))
        return ends[:-1] + [max_steps]


def recipe_names() -> list[str]:
    """The recipes that liger ships."""
    folder = files("liger_cli.templates").joinpath("recipes")
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by its name, or one from a YAML file.

    Raises:
        UsageError: no such recipe, no YAML, an unknown field or a value that cannot be used.
    """
    import yaml

    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--recipe is {name!r}, which is not a file")
        text = path.read_text(encoding="utf-8")
    elif name in recipe_names():
        text = files("liger_cli.templates").joinpath("recipes", f"{name}.yaml").read_text(encoding="utf-8")
    else:
        near = get_close_matches(name, recipe_names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"--recipe is {name!r}, but has to be one of {', '.join(recipe_names())} or a .yaml file{hint}"
        )
    try:
        return recipe_from(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"the recipe {name} is not valid YAML: {error}") from None


def recipe_from(value) -> Recipe:
    """A checked recipe from plain data. Raises UsageError."""
    try:
        stages = [_build(Stage, stage) for stage in value.get("stages", [{}])]
        lists = {name: tuple(value[name]) for name in ("differs", "target_modules") if name in value}
    except (AttributeError, TypeError):
        raise UsageError("a recipe has to be a mapping whose stages, differs and target_modules are lists") from None
    return _build(Recipe, {**value, **lists, "stages": tuple(stages)})


def override(recipe: Recipe, **flags) -> Recipe:
    """The recipe with the flags that are not None. `lr` and `objective` apply to all stages. Raises UsageError."""
    given = {name: value for name, value in flags.items() if value is not None}
    stage_flags = {name: given.pop(name) for name in ("lr", "objective") if name in given}
    stages = recipe.stages
    if "objective" in stage_flags and len(stages) > 1:
        stages = (stages[-1],)
    if stage_flags:
        stages = tuple(replace(stage, **stage_flags) for stage in stages)
    return replace(recipe, stages=stages, **given)


def run(name: str | None = None, *, as_json: bool = False) -> None:
    """Print the shipped recipes, or one of them whole."""
    import json

    import yaml

    recipes = [load_recipe(one) for one in ([name] if name else recipe_names())]
    if as_json:
        print(json.dumps([recipe.to_dict() for recipe in recipes] if name is None else recipes[0].to_dict(), indent=2))
    elif name is None:
        for recipe in recipes:
            print(f"{recipe.name:<16}{' '.join(recipe.description.split())}")
    else:
        print(yaml.safe_dump(recipes[0].to_dict(), sort_keys=False, width=110), end="")


def _build(kind: type, value):
    if not isinstance(value, dict):
        raise UsageError(f"a recipe's {kind.__name__.lower()} has to be a mapping, not {value!r}")
    known = {one.name for one in fields(kind)}
    if unknown := sorted(map(str, set(value) - known)):
        near = get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"a recipe's {kind.__name__.lower()} has no field {unknown[0]!r}{hint}")
    return kind(**value)


def _number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _require(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise UsageError(f"{name.replace('_', '-')} is {value!r}, but has to be {wanted}")
