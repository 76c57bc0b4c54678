"""Fine-tuning recipes: YAML files in templates/recipes or of the user's own, checked, and overridden by flags."""

import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path

from liger_cli.system.errors import UsageError
from liger_cli.system.untrusted import read_bytes
from liger_cli.system.wording import did_you_mean
from liger_cli.templates.liger_config import LayerSpec, LigerConfigError

OBJECTIVES = ("ce", "distill", "transfer", "transfer-heads")
TRAINED = ("lora", "extra", "both")
ATTENTIONS = ("liger", "window")
MAX_BYTES = 64 << 10  # of a recipe's file
LIMIT = 1 << 20  # of every number that decides how much is computed or kept
MAX_EPOCHS, MAX_SEED = 10_000, (1 << 32) - 1
LOSS_MEANS = ("tokens", "rows")
SCHEDULES = ("plateau", "constant", "cosine", "linear")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Stage:
    """A share of the training steps with one objective.

    Attributes:
        objective: `ce` (next-token cross-entropy), `distill` (KL to the original model), `transfer` (each Liger
            attention's output matched to the original attention's on the same input), `transfer-heads` (as LoLCATs
            has it: each head's output, before the output projection, and 1000 times the mean squared error).
        share: of all steps; the shares are normalised.
        lr: peak learning rate.
        ce_weight: weight of cross-entropy added to `distill`.
        temperature: of both distributions in `distill`.
        window_dropout: probability, per Liger layer and micro-batch, of training on the recurrent branch alone: a
            number, or several that it passes through at even distances, linearly from the stage's first step to its
            last (`[0.9, 0.5, 0]`).
        train: `lora`, `extra` (the parameters that liger added: learned gates, feature maps, branch coefficients), or
            `both`, which is LoRA alone where the model has no others.
    """

    objective: str = "ce"
    share: float = 1.0
    lr: float = 1e-3
    ce_weight: float = 0.0
    temperature: float = 1.0
    window_dropout: float | tuple[float, ...] = 0.0
    train: str = "both"

    def __post_init__(self):
        _require(self.objective in OBJECTIVES, "objective", self.objective, f"one of {', '.join(OBJECTIVES)}")
        _require(_number(self.share) and self.share > 0, "share", self.share, "a positive number")
        _require(_number(self.lr) and 0 < self.lr < 10, "lr", self.lr, "a positive number below 10")
        _require(_number(self.ce_weight) and self.ce_weight >= 0, "ce_weight", self.ce_weight, "0 or more")
        _require(_number(self.temperature) and self.temperature > 0, "temperature", self.temperature, "positive")
        _require(self.train in TRAINED, "train", self.train, f"one of {', '.join(TRAINED)}")
        if isinstance(self.window_dropout, list):
            object.__setattr__(self, "window_dropout", tuple(self.window_dropout))
        values = self.window_dropout if isinstance(self.window_dropout, tuple) else (self.window_dropout,)
        ok = values and all(_number(value) and 0 <= value < 1 for value in values)
        _require(ok, "window_dropout", self.window_dropout, "from 0 up to, not including, 1, or a list of such")

    def window_dropout_at(self, done: float) -> float:
        """The probability when the share `done` of the stage, 0 to 1, has passed."""
        if not isinstance(self.window_dropout, tuple):
            return self.window_dropout
        place = done * (len(self.window_dropout) - 1)
        before = min(int(place), max(len(self.window_dropout) - 2, 0))
        first, second = self.window_dropout[before], self.window_dropout[min(before + 1, len(self.window_dropout) - 1)]
        return first + (second - first) * (place - before)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a fine-tuning run, apart from the model and the data.

    Attributes:
        differs: sentences on where it departs from the publication it follows.
        model: settings (fields of `LayerSpec`) that the Liger layers have to have, as `liger convert --recipe` makes
            them; others are left open.
        calibrate: begin with a calibration (`liger convert --calibrate`) where the model has none and can have one.
        data: the default of `--data`. long_data: long documents, streamed, that are trained on beside it, as far as
            `--data` is not named; `--long-data` names others. long_share: of the rows.
        held_out: examples kept for evaluation, but never more than a tenth of them.
        epochs: passes over the training examples. max_steps: ends the run there instead, where it is set.
        seq_len: tokens of a row; batch_size: rows of a global batch; micro_batch_size: rows run at once.
        packing: several short documents share a row, where none sees another; else each has a row of its own.
        streaming: read and tokenize the data during the run, in constant memory; needs max_steps. None streams local
            files that are large together.
        lora_rank, lora_alpha, lora_dropout, target_modules: of LoRA; by default on Liger layers only.
        train_softmax_layers: LoRA on the other layers, too.
        attention: `liger`, or `window`: the recurrent branch is off while training, and off (mix 0) once merged.
        loss_mean: what cross-entropy is a mean over: the `tokens` of a global batch that are predicted, or its `rows`
            of `seq_len` tokens, each of them the mean over its own predicted tokens.
        adam_beta2: AdamW's second decay rate. max_grad_norm: 0 never clips.
        schedule: of the learning rate: `plateau` (ReduceLROnPlateau on the held-out examples, by the stage's
            objective), `constant`, `cosine`, `linear`; within each stage. warmup: share of a stage's steps with a
            rising rate (not for `plateau`).
        plateau_factor, plateau_patience, min_lr: of `plateau`; patience counts evaluations. min_lr also bounds `cosine`
            and `linear`.
        eval_steps, save_steps: optimizer steps between evaluations and between checkpoints.
        early_stop: evaluations without improvement after which the run ends, and the best evaluation's adapter is
            kept; 0 never ends early and keeps the last, or with keep_best the best.
        load_in_4bit: frozen weights in 4 bits (NF4, by bitsandbytes), on CUDA only.
    """

    name: str = "paper"
    description: str = ""
    differs: tuple[str, ...] = ()
    model: dict = field(default_factory=dict)
    calibrate: bool = False
    data: str = "yahma/alpaca-cleaned"
    long_data: str | None = None
    long_share: float = 0.5
    held_out: int = 200
    epochs: float = 2
    max_steps: int | None = None
    seq_len: int = 1024
    batch_size: int = 8
    micro_batch_size: int = 1
    packing: bool = True
    streaming: bool | None = None
    lora_rank: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    train_softmax_layers: bool = False
    attention: str = "liger"
    loss_mean: str = "tokens"
    weight_decay: float = 0.01
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    schedule: str = "plateau"
    warmup: float = 0.0
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    min_lr: float = 1e-5
    eval_steps: int = 200
    save_steps: int = 100
    early_stop: int = 0
    keep_best: bool = False
    load_in_4bit: bool = False
    seed: int = 0
    gradient_checkpointing: bool = False
    stages: tuple[Stage, ...] = field(default_factory=lambda: (Stage(),))

    def __post_init__(self):
        for name in ("seq_len", "batch_size", "micro_batch_size", "lora_rank", "eval_steps", "save_steps"):
            value = getattr(self, name)
            _require(_whole(value) and value > 0, name, value, f"a positive whole number up to {LIMIT:,}")
        ok = self.max_steps is None or (_whole(self.max_steps) and self.max_steps > 0)
        _require(ok, "max_steps", self.max_steps, f"a positive whole number up to {LIMIT:,}")
        for name in ("held_out", "seed", "plateau_patience", "early_stop"):
            value = getattr(self, name)
            limit = MAX_SEED if name == "seed" else LIMIT
            _require(_whole(value, limit), name, value, f"a whole number from 0 to {limit:,}")
        for name in (
            "calibrate",
            "packing",
            "train_softmax_layers",
            "load_in_4bit",
            "gradient_checkpointing",
            "keep_best",
        ):
            _require(type(getattr(self, name)) is bool, name, getattr(self, name), "true or false")
        ok = self.long_data is None or (isinstance(self.long_data, str) and self.long_data.strip())
        _require(ok, "long_data", self.long_data, "a text, or null")
        ok = _number(self.long_share) and 0 < self.long_share < 1
        _require(ok, "long_share", self.long_share, "between 0 and 1")
        ok = self.streaming is None or type(self.streaming) is bool
        _require(ok, "streaming", self.streaming, "true, false, or null")
        for name in ("epochs", "lora_alpha"):
            value = getattr(self, name)
            _require(_number(value) and value > 0, name, value, "a positive number")
        _require(self.epochs <= MAX_EPOCHS, "epochs", self.epochs, f"at most {MAX_EPOCHS:,}")
        for name in ("name", "description", "data"):
            value = getattr(self, name)
            _require(isinstance(value, str), name, value, "a text")
        for name in ("differs", "target_modules"):
            value = getattr(self, name)
            _require(all(isinstance(one, str) for one in value), name, value, "a list of texts")
        for name in ("weight_decay", "max_grad_norm", "min_lr"):
            value = getattr(self, name)
            _require(_number(value) and value >= 0, name, value, "a number, 0 or more")
        for name in ("lora_dropout", "warmup", "plateau_factor", "adam_beta2"):
            value = getattr(self, name)
            _require(_number(value) and 0 <= value < 1, name, value, "from 0 up to, not including, 1")
        _require(self.attention in ATTENTIONS, "attention", self.attention, f"one of {', '.join(ATTENTIONS)}")
        if any(stage.window_dropout for stage in self.stages):
            _require(self.attention == "liger", "window_dropout", "on", "0 with attention: window")
        _require(self.loss_mean in LOSS_MEANS, "loss_mean", self.loss_mean, f"one of {', '.join(LOSS_MEANS)}")
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(bool(self.target_modules), "target_modules", self.target_modules, "one name or more")
        _require(bool(self.stages), "stages", self.stages, "one stage or more")
        _require(
            self.batch_size % self.micro_batch_size == 0,
            "batch_size",
            self.batch_size,
            f"a multiple of micro_batch_size ({self.micro_batch_size})",
        )
        _require(isinstance(self.model, dict), "model", self.model, "a mapping of a layer's settings")
        try:
            LayerSpec(**self.model)
        except (LigerConfigError, TypeError) as error:
            raise UsageError(f"a recipe's model: {error}") from None

    def to_dict(self) -> dict:
        """Plain lists and numbers, as in the YAML file."""
        value = asdict(self)
        for holder in (value, *value["stages"]):
            holder |= {name: list(one) for name, one in holder.items() if isinstance(one, tuple)}
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
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"--recipe is {name!r}, which is not a file")
        text = read_bytes(path, MAX_BYTES, UsageError)
    elif name in recipe_names():
        text = files("liger_cli.templates").joinpath("recipes", f"{name}.yaml").read_bytes()
    else:
        hint = did_you_mean(name, recipe_names())
        raise UsageError(
            f"--recipe is {name!r}, but has to be one of {', '.join(recipe_names())} or a .yaml file{hint}"
        )
    return recipe_from(_load_yaml(text, name))


def model_settings(name: str) -> dict:
    """Settings of the Liger layers that a recipe is for. Raises UsageError where it is for any."""
    recipe = load_recipe(name)
    if not recipe.model:
        raise UsageError(f"the recipe {recipe.name} is for models of any settings; leave --recipe out")
    return recipe.model


def _load_yaml(content: bytes, name: str):
    """Plain data from YAML without anchors, which can make a small file a huge value. Raises UsageError."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            if self.check_event(yaml.AliasEvent):
                raise UsageError(f"the recipe {name} uses a YAML alias (*), which recipes may not; write the value out")
            return super().compose_node(parent, index)

    try:
        return yaml.load(content.decode("utf-8"), Loader)
    except UsageError:
        raise
    except Exception as error:  # its constructors raise whatever int(), float() and date() raise
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"the recipe {name} is not valid YAML: {reason}") from None


def recipe_from(value) -> Recipe:
    """A checked recipe from plain data. Raises UsageError."""
    try:
        for name in ("stages", "differs", "target_modules"):
            if not isinstance(value.get(name, []), (list, tuple)):
                raise TypeError(name)
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
        raise UsageError(f"a recipe's {kind.__name__.lower()} has to be a mapping, not {value!r:.100}")
    known = {one.name for one in fields(kind)}
    if unknown := sorted(map(str, set(value) - known)):
        hint = did_you_mean(unknown[0], known)
        raise UsageError(f"a recipe's {kind.__name__.lower()} has no field {unknown[0][:100]!r}{hint}")
    real = {one.name for one in fields(kind) if one.type in (float, float | tuple[float, ...])}
    return kind(**{name: _read_number(one) if name in real else one for name, one in value.items()})


def _read_number(value):
    """A number that YAML 1.1 took for a text, such as 1e-4, which it reads only as 1.0e-4; all else as it is."""
    if isinstance(value, (list, tuple)):
        return [_read_number(one) for one in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value


def _number(value) -> bool:
    """Whether it is a finite number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _whole(value, limit: int = LIMIT) -> bool:
    return type(value) is int and 0 <= value <= limit


def _require(condition: bool, name: str, value, wanted: str) -> None:
    if not condition:
        raise UsageError(f"{name.replace('_', '-')} is {value!r:.100}, but has to be {wanted}")
