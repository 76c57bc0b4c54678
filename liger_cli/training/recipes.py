"""Fine-tuning recipes: YAML files in templates/recipes or of the user's own, checked, and overridden by flags."""

import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from functools import wraps
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from liger_cli.system.console import say
from liger_cli.system.errors import UsageError
from liger_cli.system.tables import Table, print_tables
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


Real = int | float


def checked(default, wanted: str, test: Callable[[Any], bool] = lambda value: True) -> Any:
    """A field of a `strict` dataclass: of the type it is annotated with, and passing `test`.

    Args:
        default: or what makes it. wanted: what the field has to be, in words.
    """

    def validator(value) -> None:
        if not test(value):
            raise ValueError(wanted)

    how = {"default_factory": default} if callable(default) else {"default": default}
    return field(**how, metadata={"validator": validator, "wanted": wanted})


def one_of(names: tuple[str, ...], default: str) -> Any:
    return checked(default, f"one of {', '.join(names)}", lambda value: value in names)


def number(default: Real, wanted: str, test: Callable[[Real], bool]) -> Any:
    """A finite number that a float can hold."""
    return checked(default, wanted, lambda value: abs(value) <= sys.float_info.max and test(value))


def at_least_0(default: Real) -> Any:
    return number(default, "a number, 0 or more", lambda value: value >= 0)


def share(default: Real) -> Any:
    return number(default, "from 0 up to, not including, 1", lambda value: 0 <= value < 1)


def count(default: int | None) -> Any:
    """None where that is the default, too."""
    wanted = f"a positive whole number up to {LIMIT:,}"
    return checked(default, wanted, lambda value: value is default is None or 0 < value <= LIMIT)


def whole(default: int, limit: int = LIMIT) -> Any:
    return checked(default, f"a whole number from 0 to {limit:,}", lambda value: 0 <= value <= limit)


def flag(default: bool | None) -> Any:
    return checked(default, "true or false" if default is not None else "true, false, or null")


def text(default: str) -> Any:
    return checked(default, "a text")


def in_sentences(kind: type) -> type:
    """`huggingface_hub.dataclasses.strict`, whose errors then say which field is what, and what it has to be."""
    init, order = strict(kind).__init__, fields(kind)

    @wraps(init)
    def __init__(self, *values, **named) -> None:
        try:
            init(self, *values, **named)
        except StrictDataclassFieldValidationError:
            wrong = next(one for one in order if one.name not in vars(self))  # they are set one after another
            given = dict(zip((one.name for one in order), values, strict=False)) | named
            _refuse(wrong.name, given[wrong.name], wrong.metadata["wanted"])

    kind.__init__ = __init__
    return kind


def _refuse(name: str, value, wanted: str) -> NoReturn:
    raise UsageError(f"{name.replace('_', '-')} is {value!r:.100}, but has to be {wanted}") from None


@in_sentences
@dataclass
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

    objective: str = one_of(OBJECTIVES, "ce")
    share: Real = number(1.0, "a positive number", lambda value: value > 0)
    lr: Real = number(1e-3, "a positive number below 10", lambda value: 0 < value < 10)
    ce_weight: Real = at_least_0(0.0)
    temperature: Real = number(1.0, "a positive number", lambda value: value > 0)
    window_dropout: Real | list[Real] | tuple[Real, ...] = checked(
        0.0,
        "from 0 up to, not including, 1, or a list of such",
        lambda value: value not in ([], ()) and all(0 <= one < 1 for one in _listed(value)),
    )
    train: str = one_of(TRAINED, "both")

    def __post_init__(self):
        if isinstance(self.window_dropout, list):
            self.window_dropout = tuple(self.window_dropout)

    def window_dropout_at(self, done: float) -> float:
        """The probability when the share `done` of the stage, 0 to 1, has passed."""
        if not isinstance(self.window_dropout, tuple):
            return self.window_dropout
        place = done * (len(self.window_dropout) - 1)
        before = min(int(place), max(len(self.window_dropout) - 2, 0))
        first, second = self.window_dropout[before], self.window_dropout[min(before + 1, len(self.window_dropout) - 1)]
        return first + (second - first) * (place - before)


@in_sentences
@dataclass
class Recipe:
    """Everything that decides a fine-tuning run, apart from the model and the data.

    Attributes:
        differs: sentences on where it departs from the publication it follows.
        model: settings (fields of `LayerSpec`) that the Liger layers have to have, as `liger convert --recipe` makes
            them; others are left open.
        calibrate: begin with a calibration (`liger convert --calibrate`) where the model has none and can have one.
        data: the default of `--data`. long_data: long documents, streamed, that are trained on beside it, as far as
            `--data` is not named; `--long-data` names others. long_share: of the rows.
        held_out: examples left for evaluation, but never more than a tenth of them.
        epochs: passes over the training examples. max_steps: ends the run there instead, where it is set.
        seq_len: tokens of a row; batch_size: rows of a global batch; micro_batch_size: rows run at once.
        packing: several short documents share a row, where none sees another; else each has a row of its own.
        joined: the documents of a packed row are one text, and see one another: for objectives that compare with the
            original model, which reads the same row, so that short examples, too, teach what lies far back.
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
            the result; 0 never ends early, and the result is the last, or with keep_best the best.
        load_in_4bit: frozen weights in 4 bits (NF4, by bitsandbytes), on CUDA only.
    """

    name: str = text("paper")
    description: str = text("")
    differs: tuple[str, ...] = checked((), "a list of texts")
    model: dict = checked(dict, "a mapping of a layer's settings")
    calibrate: bool = flag(False)
    data: str = text("yahma/alpaca-cleaned")
    long_data: str | None = checked(None, "a text, or null", lambda value: value is None or bool(value.strip()))
    long_share: Real = number(0.5, "between 0 and 1", lambda value: 0 < value < 1)
    held_out: int = whole(200)
    epochs: Real = number(2, f"a positive number up to {MAX_EPOCHS:,}", lambda value: 0 < value <= MAX_EPOCHS)
    max_steps: int | None = count(None)
    seq_len: int = count(1024)
    batch_size: int = count(8)
    micro_batch_size: int = count(1)
    packing: bool = flag(True)
    joined: bool = flag(False)
    streaming: bool | None = flag(None)
    lora_rank: int = count(8)
    lora_alpha: Real = number(8, "a positive number", lambda value: value > 0)
    lora_dropout: Real = share(0.0)
    target_modules: tuple[str, ...] = checked(("q_proj", "k_proj", "v_proj"), "a list of one name or more", bool)
    train_softmax_layers: bool = flag(False)
    attention: str = one_of(ATTENTIONS, "liger")
    loss_mean: str = one_of(LOSS_MEANS, "tokens")
    weight_decay: Real = at_least_0(0.01)
    adam_beta2: Real = share(0.999)
    max_grad_norm: Real = at_least_0(1.0)
    schedule: str = one_of(SCHEDULES, "plateau")
    warmup: Real = share(0.0)
    plateau_factor: Real = share(0.1)
    plateau_patience: int = whole(10)
    min_lr: Real = at_least_0(1e-5)
    eval_steps: int = count(200)
    save_steps: int = count(100)
    early_stop: int = whole(0)
    keep_best: bool = flag(False)
    load_in_4bit: bool = flag(False)
    seed: int = whole(0, MAX_SEED)
    gradient_checkpointing: bool = flag(False)
    stages: tuple[Stage, ...] = checked(lambda: (Stage(),), "one stage or more", bool)

    def __post_init__(self):
        if self.attention != "liger" and any(stage.window_dropout for stage in self.stages):
            _refuse("window_dropout", "on", "0 with attention: window")
        if self.joined and any(stage.objective == "ce" or stage.ce_weight for stage in self.stages):
            _refuse("joined", True, "false where a stage trains on labels (ce, ce_weight)")
        if self.batch_size % self.micro_batch_size:
            _refuse("batch_size", self.batch_size, f"a multiple of micro_batch_size ({self.micro_batch_size})")
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


def made_for(manifest: dict) -> str | None:
    """The shipped recipe that a folder was converted for, by its liger.json."""
    name = manifest.get("recipe")
    return name if isinstance(name, str) and name in recipe_names() else None


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
    if stage_flags.get("objective") == "ce":
        given["joined"] = False
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
        rows = [[recipe.name, " ".join(recipe.description.split())] for recipe in recipes]
        print_tables([Table(f"{len(rows)} recipes", ["recipe", "what it does"], rows, words=2)])
        say("next: liger recipes NAME shows one whole, liger finetune --recipe NAME trains with it")
    else:
        print(yaml.safe_dump(recipes[0].to_dict(), sort_keys=False, width=110), end="")
        say(f"next: liger finetune --recipe {shlex.quote(name)}")


def _build(kind: type, value):
    if not isinstance(value, dict):
        raise UsageError(f"a recipe's {kind.__name__.lower()} has to be a mapping, not {value!r:.100}")
    known = {one.name for one in fields(kind)}
    if unknown := sorted(map(str, set(value) - known)):
        hint = did_you_mean(unknown[0], known)
        raise UsageError(f"a recipe's {kind.__name__.lower()} has no field {unknown[0][:100]!r}{hint}")
    real = {one.name for one in fields(kind) if one.type == Real or one.name == "window_dropout"}
    return kind(**{name: _read_number(one) if name in real else one for name, one in value.items()})


def _listed(value) -> list | tuple:
    return value if isinstance(value, (list, tuple)) else (value,)


def _read_number(value):
    """A number that YAML 1.1 took for a text, such as 1e-4, which it reads only as 1.0e-4; all else as it is."""
    if isinstance(value, (list, tuple)):
        return [_read_number(one) for one in value]
    return float(value) if isinstance(value, str) and NUMBER.fullmatch(value) else value
