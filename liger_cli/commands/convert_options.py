"""The options of `liger convert`, and of its Python function."""

from dataclasses import dataclass, fields

from liger_cli.commands.options import EXPERT, OUTPUT, argument, option, push
from liger_cli.templates.liger_config import FEATURE_MAPS, GATE_POOLINGS, GATE_SOURCES, NORMALIZERS, LayerSpec
from liger_cli.templates.liger_gates import GATES

BASE, LAYERS = "The base", "Layers"


def setting(name: str, help: str, **settings):
    """An option that is a field of `LayerSpec`: None where it is not given, and then the field's own default."""
    return option(None, help, **{"shown": str(getattr(LayerSpec, name)), **settings})


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """Make a Liger model's folder out of BASE: its weights linked, its config and the model code beside them."""

    base: str = argument("A model's folder, a hub id, or a GGUF file.", metavar="BASE")
    output: str | None = argument(
        "Folder to write; ./<name>-liger-<gate> by default, ./<name>-liger-calibrated if that is asked for.",
        None,
        metavar="OUTPUT",
    )
    calibrate: bool = option(
        False,
        "Fit to the base what needs no training: which tokens each head keeps, how many, and what the state of the "
        "others stands for.",
    )
    calibration_data: str | None = option(
        None,
        "Text or .jsonl file to calibrate on, or self: text that the base writes, which takes it a while; shipped "
        "prose by default.",
        metavar="FILE|self",
    )
    recipe: str | None = option(
        None, "Settings of the models that this recipe of `liger finetune` is for, such as lolcats.", panel=LAYERS
    )
    gate: str | None = setting(
        "gate",
        f"Gate of the recurrence: {', '.join(GATES)}.",
        shown=f"{LayerSpec.gate}; where --calibrate is given: none, a plain sum",
    )
    window: int | None = setting("window", "Tokens of the softmax window, the token itself included.")
    kept: str | None = setting(
        "kept",
        "Tokens of each key/value head that stay visible to the window, chosen by a fitted score; share:128 gives each "
        "head its own number, 128 on average.",
        metavar="N|share:N",
        shown="0; where --calibrate is given: share: and twice the window",
    )
    budget: str | None = option(
        None,
        "With --calibrate: bytes of a sequence's cache after so many tokens, such as 12MiB@32K, spent on kept tokens, "
        "states and softmax heads where they are worth most.",
        metavar="BYTES@TOKENS",
    )
    softmax_layers: str = option(
        "none",
        "Layers that stay softmax: none, every:N (the last of every N), auto:N (the N whose heads look back most to "
        "some effect, measured on the base), or a list such as 3,11.",
    )
    softmax_heads: str = option(
        "none",
        "Key/value heads that stay softmax inside Liger layers: none, auto:N or auto:10% (those that look back most to "
        "some effect, measured on the base), or layer:head such as 4:0,5:1.",
    )
    dry_run: bool = option(False, "Print the plan and write nothing.")
    force: bool = option(False, "Replace an output that liger made.")
    refresh: bool = option(False, "BASE is a folder liger made: only renew its model code.")
    revision: str | None = option(None, "Branch, tag or commit of a hub id.", panel=BASE)
    dtype: str | None = option(
        None,
        "Of the whole weights that are made of a GGUF file: bfloat16, float16 or float32.",
        shown="bfloat16",
        panel=BASE,
    )
    experimental: bool = option(
        False, "Try a model type that `liger families` does not list; an identity check decides.", panel=BASE
    )
    mix: str | None = setting(
        "mix", "Share of the recurrent branch, the window's is 1 - mix; window-only is 0, the control.", panel=LAYERS
    )
    sinks: int | None = setting(
        "sinks", "First tokens that stay visible to the window.", shown="0; where --calibrate is given: 4", panel=LAYERS
    )
    rest: bool | None = setting(
        "rest",
        "Tokens that are neither in the window nor kept enter a state that shares the window's softmax.",
        shown="no; where --calibrate is given: where it pays",
        panel=EXPERT,
    )
    calibration_seq_len: int = option(
        2048, "Tokens of a row that is calibrated on, at most the base's context.", panel=EXPERT
    )
    normalizer: str | None = setting(
        "normalizer",
        f"Denominator of the recurrent branch: {', '.join(NORMALIZERS)}.",
        shown="none; where --calibrate keeps a recurrence over all tokens: running",
        panel=LAYERS,
    )
    linearize_local: bool = option(False, "Linearize layers that are local in the base, too.", panel=LAYERS)
    layer: list[str] | None = option(
        None,
        "Other settings for some layers, such as 0,4-7:gate=gdn,window=128; can be repeated.",
        metavar="LAYERS:NAME=VALUE,...",
        panel=LAYERS,
    )
    link: str = option(
        "auto", "How the weights get there: auto (reflink, else hard link, else copy), hard, copy.", panel=OUTPUT
    )
    push_to_hub: str | None = push()
    branch_scales: bool = option(
        LayerSpec.branch_scales, "Two coefficients a head in place of --mix, which can be calibrated.", panel=EXPERT
    )
    delayed: bool = option(LayerSpec.delayed, "Tokens enter the recurrence when they leave the window.", panel=EXPERT)
    positions: str | None = setting(
        "positions",
        "RoPE in the recurrent branch: none, rope (before the feature map), after (behind it).",
        panel=EXPERT,
    )
    feature_map: str | None = setting(
        "feature_map", f"Map of queries and keys in the recurrent branch: {', '.join(FEATURE_MAPS)}.", panel=EXPERT
    )
    feature_params: str | None = setting(
        "feature_params",
        "Before the feature map: fixed, learned (a map for each head), dense (one across heads).",
        panel=EXPERT,
    )
    feature_dim: int | None = setting(
        "feature_dim",
        "Outputs of a learned map for each head.",
        shown="the head dimension",
        panel=EXPERT,
    )
    gate_params: str | None = setting(
        "gate_params", "pooled (no parameters), or learned: a low-rank gate beside the pooled one.", panel=EXPERT
    )
    gate_init: str | None = setting(
        "gate_init",
        "Start of a learned gate: pooled, or random, which is learned without the pooled one.",
        panel=EXPERT,
    )
    gate_rank: int | None = setting("gate_rank", "Rank of a learned gate.", panel=EXPERT)
    gate_source: str | None = setting(
        "gate_source", f"Projection that the gate is pooled from: {', '.join(GATE_SOURCES)}.", panel=EXPERT
    )
    gate_pooling: str | None = setting(
        "gate_pooling", f"Pooling of a projection to one number a head: {', '.join(GATE_POOLINGS)}.", panel=EXPERT
    )
    gate_normalizer: float | None = setting(
        "gate_normalizer",
        "Divisor of the log gate.",
        shown="the gate's own",
        panel=EXPERT,
    )
    gate_lower_bound: float | None = setting("gate_lower_bound", "Lower bound of hgrn2's decay.", panel=EXPERT)
    slots: int | None = setting("slots", "Memory slots of gsa.", panel=EXPERT)

    def settings(self) -> dict:
        """The fields of `LayerSpec` that were given, and under `layers` what differs in some."""
        names = [one.name for one in fields(LayerSpec) if hasattr(self, one.name)]
        defaults = {one.name: one.default for one in fields(self)}
        values = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in values.items() if value is not None and value is not defaults[name]}
        if given.get("gate_init") == "random":
            given = {"gate_params": "learned", **given}  # a random gate is learned in any case
        return {**given, "layers": self.layer or []}
