"""`liger convert` on the command line: its options and their help text."""

from typing import Annotated

import typer

from liger_cli.commands.options import Json, Push
from liger_cli.templates.liger_config import FEATURE_MAPS, GATE_POOLINGS, GATE_SOURCES, NORMALIZERS, LayerSpec
from liger_cli.templates.liger_gates import GATES

DEFAULT = LayerSpec()


def convert(
    ctx: typer.Context,
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model's folder, or a hub id.")],
    output: Annotated[
        str | None, typer.Argument(metavar="OUTPUT", help="Folder to write; ./<name>-liger-<gate> by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings of the models that this recipe of `liger finetune` is for, such as lolcats."),
    ] = None,
    gate: Annotated[str, typer.Option(help=f"One of {', '.join(GATES)}.")] = DEFAULT.gate,
    window: Annotated[
        str,
        typer.Option(
            metavar="N|auto:BYTES",
            help="Tokens of the softmax window, the token itself included; auto:2MiB gives each layer its own, "
            "measured on the base, within so many bytes of constant cache in all.",
        ),
    ] = str(DEFAULT.window),
    mix: Annotated[
        str,
        typer.Option(help="Share of the recurrent branch, the window's is 1 - mix; window-only is 0, the control."),
    ] = str(DEFAULT.mix),
    softmax_layers: Annotated[
        str,
        typer.Option(
            help="Layers kept as softmax: none, every:N (the last of every N), auto:N (the N that matter, measured on "
            "the base), or a list such as 3,11."
        ),
    ] = "none",
    softmax_heads: Annotated[
        str,
        typer.Option(
            help="Key/value heads kept as softmax inside Liger layers: none, auto:N or auto:2% (those that matter, "
            "measured on the base), or layer:head such as 4:0,5:1."
        ),
    ] = "none",
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate", help="Fit scores, shares of kept tokens and branch coefficients to the base, untrained."
        ),
    ] = False,
    calibration_data: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text or .jsonl file to measure and calibrate on; a shipped text by default."
        ),
    ] = None,
    linearize_local: Annotated[
        bool, typer.Option("--linearize-local", help="Linearize layers that are local in the base, too.")
    ] = False,
    experimental: Annotated[
        bool,
        typer.Option("--experimental", help="Try a model type that `liger families` does not list; a gate decides."),
    ] = False,
    sinks: Annotated[int, typer.Option(help="First tokens that stay visible to the window.")] = DEFAULT.sinks,
    kept: Annotated[
        str | None,
        typer.Option(
            metavar="N|share:N|auto:BYTES",
            help="Tokens that stay visible to the window, chosen by a learned score for each head. With --calibrate, "
            "share:128 shares out 128 a layer by what each layer needs, in seconds, and auto:2MiB measures for that.",
            show_default="0; with --calibrate share: and twice --window",
        ),
    ] = None,
    normalizer: Annotated[
        str | None,
        typer.Option(
            help=f"Denominator of the recurrent branch: {', '.join(NORMALIZERS)}.",
            show_default="none; with --calibrate running",
        ),
    ] = None,
    branch_scales: Annotated[
        bool,
        typer.Option("--branch-scales", help="Two coefficients a head in place of --mix, which can be calibrated."),
    ] = DEFAULT.branch_scales,
    feature_map: Annotated[
        str, typer.Option(help=f"Map of queries and keys in the recurrent branch: {', '.join(FEATURE_MAPS)}.")
    ] = DEFAULT.feature_map,
    feature_params: Annotated[
        str,
        typer.Option(help="Before the feature map: fixed, learned (a map for each head), dense (one across heads)."),
    ] = DEFAULT.feature_params,
    feature_dim: Annotated[
        int | None, typer.Option(help="Outputs of a learned map for each head; the head dimension by default.")
    ] = DEFAULT.feature_dim,
    positions: Annotated[
        str,
        typer.Option(help="RoPE in the recurrent branch: none, rope (before the feature map), after (behind it)."),
    ] = DEFAULT.positions,
    delayed: Annotated[
        bool, typer.Option("--delayed", help="Tokens enter the recurrence when they leave the window.")
    ] = DEFAULT.delayed,
    gate_params: Annotated[
        str | None,
        typer.Option(
            help="pooled (no parameters), or learned: a low-rank gate beside the pooled one.", show_default="pooled"
        ),
    ] = None,
    gate_init: Annotated[
        str, typer.Option(help="Start of a learned gate: pooled, or random, which is learned without the pooled one.")
    ] = DEFAULT.gate_init,
    gate_rank: Annotated[int, typer.Option(help="Rank of a learned gate.")] = DEFAULT.gate_rank,
    gate_source: Annotated[
        str, typer.Option(help=f"Projection that the gate is pooled from: {', '.join(GATE_SOURCES)}.")
    ] = DEFAULT.gate_source,
    gate_pooling: Annotated[
        str, typer.Option(help=f"Pooling of a projection to one number a head: {', '.join(GATE_POOLINGS)}.")
    ] = DEFAULT.gate_pooling,
    gate_normalizer: Annotated[
        float | None, typer.Option(help="Divisor of the log gate; the gate's own by default.")
    ] = DEFAULT.gate_normalizer,
    gate_lower_bound: Annotated[float, typer.Option(help="Lower bound of hgrn2's decay.")] = DEFAULT.gate_lower_bound,
    slots: Annotated[int, typer.Option(help="Memory slots of gsa.")] = DEFAULT.slots,
    layer: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS:NAME=VALUE,...",
            help="Other settings for some layers, such as 0,4-7:gate=gdn,window=128; can be repeated.",
        ),
    ] = None,
    link: Annotated[
        str, typer.Option(help="How the weights get there: auto (reflink, else hard link, else copy), hard, copy.")
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that liger made.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="BASE is a folder liger made: only renew its model code.")
    ] = False,
    push_to_hub: Push = None,
    as_json: Json = False,
) -> None:
    """Make a Liger model's folder out of BASE: its weights linked, its config and the model code beside them."""
    from liger_cli.commands import convert as module
    from liger_cli.training import recipes

    if refresh:
        return module.run_refresh(base, dry_run=dry_run, as_json=as_json)
    settings = {
        "gate": gate,
        "window": window,
        "mix": mix,
        "sinks": sinks,
        "kept": kept,
        "normalizer": normalizer,
        "branch_scales": branch_scales,
        "feature_map": feature_map,
        "feature_params": feature_params,
        "feature_dim": feature_dim,
        "positions": positions,
        "delayed": delayed,
        "gate_params": gate_params or ("learned" if gate_init == "random" else "pooled"),
        "gate_init": gate_init,
        "gate_rank": gate_rank,
        "gate_source": gate_source,
        "gate_pooling": gate_pooling,
        "gate_normalizer": gate_normalizer,
        "gate_lower_bound": gate_lower_bound,
        "slots": slots,
        "layers": layer or [],
    }
    if recipe is not None:
        # What was given on the command line stands, the default value of an option, too.
        given = {name for name in settings if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"}
        settings |= {name: value for name, value in recipes.model_settings(recipe).items() if name not in given}
    module.run(
        base,
        output,
        settings=settings,
        softmax_layers=softmax_layers,
        softmax_heads=softmax_heads,
        calibrate=calibrate,
        calibration_data=calibration_data,
        linearize_local=linearize_local,
        experimental=experimental,
        revision=revision,
        link=link,
        dry_run=dry_run,
        force=force,
        push_to_hub=push_to_hub,
        as_json=as_json,
    )
