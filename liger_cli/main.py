"""The `liger` command line: options and help text. Each command hands over to its module at once.

Heavy packages are imported inside those modules' functions, never here: `liger --help` has to answer at once.
"""

from typing import Annotated

import typer
import typer.core

from liger_cli import __version__, interrupts
from liger_cli.errors import flush_stdout, guarded
from liger_cli.templates.liger_config import FEATURE_MAPS, GATE_POOLINGS, GATE_SOURCES, NORMALIZERS, LayerSpec
from liger_cli.templates.liger_gates import GATES

DEFAULT = LayerSpec()
Push = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload the result to this repository of the hub; a new one is private."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
# What eval and bench share.
Measured = Annotated[
    str | None, typer.Argument(metavar="MODEL", help="A folder liger made; the newest here by default.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")]
Format = Annotated[str, typer.Option("--format", help="table, md, json or csv.")]
Save = Annotated[bool, typer.Option(help="Keep results.json, plots and card section in the folder.")]
CLICK_EXCEPTION = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


class Commands(typer.core.TyperGroup):
    """Runs a command inside the error boundary, so that a failure is one sentence and an exit code."""

    def invoke(self, ctx):
        if code := guarded(lambda: self._run(ctx), (typer.Exit, typer.Abort, CLICK_EXCEPTION)):
            raise typer.Exit(code)

    def _run(self, ctx) -> None:
        # Outside of this, where nothing is written, signals end the process; Typer would make them an exit code of 130.
        with interrupts.unwinding():
            try:
                super().invoke(ctx)
            finally:
                flush_stdout()


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line. Ctrl-C and termination unwind a command, so that half-written folders are removed."""
    app(prog_name="liger")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"liger {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained softmax-attention language model into a gated linear recurrent one (arXiv 2503.01496)."""


@app.command()
def convert(
    base: Annotated[str, typer.Argument(metavar="BASE", help="A model's folder, or a hub id.")],
    output: Annotated[
        str | None, typer.Argument(metavar="OUTPUT", help="Folder to write; ./<name>-liger-<gate> by default.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    gate: Annotated[str, typer.Option(help=f"One of {', '.join(GATES)}.")] = DEFAULT.gate,
    window: Annotated[int, typer.Option(help="Tokens of the softmax window, the token itself included.")] = (
        DEFAULT.window
    ),
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
        typer.Option("--calibrate", help="Fit scores and branch coefficients to the base's softmax layers, untrained."),
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
        int | None,
        typer.Option(
            help="Tokens that stay visible to the window, chosen by a learned score for each head.",
            show_default="0; with --calibrate twice --window",
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
        str, typer.Option(help="fixed, or learned: a linear map for each head before the feature map.")
    ] = DEFAULT.feature_params,
    feature_dim: Annotated[
        int | None, typer.Option(help="Outputs of the learned feature map; the head dimension by default.")
    ] = DEFAULT.feature_dim,
    positions: Annotated[
        str, typer.Option(help="Queries and keys of the recurrent branch before (none) or after (rope) RoPE.")
    ] = DEFAULT.positions,
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
    from liger_cli import convert as module

    if refresh:
        return module.run_refresh(base, dry_run=dry_run, as_json=as_json)
    module.run(
        base,
        output,
        settings={
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
            "gate_params": gate_params or ("learned" if gate_init == "random" else "pooled"),
            "gate_init": gate_init,
            "gate_rank": gate_rank,
            "gate_source": gate_source,
            "gate_pooling": gate_pooling,
            "gate_normalizer": gate_normalizer,
            "gate_lower_bound": gate_lower_bound,
            "slots": slots,
            "layers": layer or [],
        },
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


@app.command()
def inspect(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A base, or any folder that liger made.")],
    full: Annotated[
        bool, typer.Option("--full", help="Hash the weights whole and compare them with the base's, byte by byte.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what FOLDER is, what made it, whether code and weights are as recorded (exit 1 if not)."""
    from liger_cli import inspection as module

    if code := module.run(folder, full=full, as_json=as_json):
        raise typer.Exit(code)


@app.command()
def families(
    as_json: Json = False,
) -> None:
    """List the supported model families and what is special about each."""
    from liger_cli import family_table

    family_table.run(as_json)


@app.command()
def gates(
    head_dim: Annotated[int, typer.Option(min=1, help="Head dimension to give the state's size for.")] = 128,
    as_json: Json = False,
) -> None:
    """List the gates with their formulas and the size of their states."""
    from liger_cli import gate_table

    gate_table.run(as_json, head_dim)


@app.command()
def doctor(
    as_json: Json = False,
) -> None:
    """Show versions and devices and what runs on what; exit 4 where liger cannot run."""
    from liger_cli import doctor

    doctor.run(as_json)


@app.command()
def finetune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A converted folder; the newest one here by default.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Hub id, .json/.jsonl/.parquet/.csv/.txt files, or demo; several as a.jsonl:0.7,b.parquet:0.3. "
            "(default: the recipe's, yahma/alpaca-cleaned)"
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A name that `liger recipes` prints, or a YAML file. (default: best once calibrated, else paper)"
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The adapter's folder. (default: ./<model>-lora)")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. (paper: 2)")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="ce, distill (KL to the original model) or transfer. (paper: ce)")
    ] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the update. (paper: 8)")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="The update counts alpha / rank. (paper: 8)")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Linear layers that get LoRA. (paper: q_proj,k_proj,v_proj)")
    ] = None,
    train_softmax_layers: Annotated[
        bool, typer.Option("--train-softmax-layers", help="LoRA on layers that are not Liger's, too.")
    ] = False,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate of every stage. (paper: 0.001)")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a row. (paper: 1024)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a global batch. (paper: 8)")] = None,
    micro_batch_size: Annotated[int | None, typer.Option(help="Rows run at once. (paper: 1)")] = None,
    packing: Annotated[
        bool | None, typer.Option(help="Short documents share a row, unseen by one another. (paper: packing)")
    ] = None,
    streaming: Annotated[
        bool | None,
        typer.Option(
            help="Read the data during the run, in constant memory; needs --max-steps. "
            "(default: for local files of more than 2 GiB)"
        ),
    ] = None,
    held_out: Annotated[int | None, typer.Option(help="Examples kept for evaluation. (paper: 200)")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Steps between evaluations. (paper: 200)")] = None,
    save_steps: Annotated[int | None, typer.Option(help="Steps between checkpoints. (paper: 100)")] = None,
    early_stop: Annotated[
        int | None,
        typer.Option(help="Evaluations without improvement that end the run; the best is kept. (paper: 0, never)"),
    ] = None,
    gradient_checkpointing: Annotated[bool | None, typer.Option(help="Less memory for more time. (paper: no)")] = None,
    load_in_4bit: Annotated[
        bool | None, typer.Option(help="Frozen weights in 4 bits, on CUDA with bitsandbytes. (paper: no)")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of LoRA's start and the order of the data. (paper: 0)")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the frozen weights in training; auto is bfloat16 on CUDA, float32 elsewhere.")
    ] = "auto",
    processes: Annotated[int, typer.Option(help="Data-parallel processes on this machine.")] = 1,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Shard the weights over the processes (FSDP2), on CUDA devices.")
    ] = False,
    report_to: Annotated[str, typer.Option(help="none, tensorboard or wandb.")] = "none",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter, discard an unfinished run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and train nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on MODEL by a recipe, the published one by default."""
    from liger_cli import finetune as module

    module.run(
        model,
        data=data,
        recipe=recipe,
        output=output,
        resume=resume,
        force=force,
        dry_run=dry_run,
        as_json=as_json,
        processes=processes,
        fsdp=fsdp,
        dtype=dtype,
        report_to=report_to,
        epochs=epochs,
        max_steps=max_steps,
        objective=objective,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        target_modules=tuple(target_modules.split(",")) if target_modules else None,
        train_softmax_layers=train_softmax_layers or None,
        lr=lr,
        seq_len=seq_len,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        packing=packing,
        streaming=streaming,
        load_in_4bit=load_in_4bit,
        held_out=held_out,
        eval_steps=eval_steps,
        save_steps=save_steps,
        early_stop=early_stop,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )


@app.command()
def merge(
    adapters: Annotated[
        list[str] | None, typer.Argument(metavar="[ADAPTER]...", help="Adapters; the newest one here by default.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The converted model. (default: the folder that the adapter names)")
    ] = None,
    output: Annotated[str | None, typer.Option(help="Folder to write. (default: ./<model>-merged)")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, float16 or bfloat16. (default: as the weights are)")
    ] = None,
    link: Annotated[str, typer.Option(help="How untouched shards get there: auto, hard or copy.")] = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an output that liger made.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and say what would be written.")] = False,
    push_to_hub: Push = None,
    as_json: Json = False,
) -> None:
    """Add LoRA adapters into the weights: a self-contained model, written shard by shard."""
    from liger_cli import merge as module

    module.run(
        adapters or None,
        base=base,
        output=output,
        dtype=dtype,
        link=link,
        force=force,
        dry_run=dry_run,
        push_to_hub=push_to_hub,
        as_json=as_json,
    )


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe whole.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the fine-tuning recipes, or print one."""
    from liger_cli import recipes as module

    module.run(name, as_json=as_json)


@app.command("eval")
def evaluate(
    model: Measured = None,
    against: Annotated[str | None, typer.Option(help="Base to compare with; the folder's own by default.")] = None,
    perplexity: Annotated[
        str | None, typer.Option(metavar="FILE", help="Perplexity of a text or .jsonl file (also for --agreement).")
    ] = None,
    recall: Annotated[bool, typer.Option("--recall", help="Recall probes by distance.")] = False,
    agreement: Annotated[
        bool, typer.Option("--agreement", help="KL divergence from the base, same top token.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-evaluation-harness, by commas; paper and long are suites.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in a task's prompt; its own by default.")] = None,
    limit: Annotated[float | None, typer.Option(help="Examples of each task, or a share below 1.")] = None,
    include_path: Annotated[str | None, typer.Option(help="Folder with task YAML files of your own.")] = None,
    metadata: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="For the tasks: '{\"max_seq_lengths\": [4096, 8192]}' for RULER's lengths."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Generations of base and model to show side by side.")] = 0,
    compare: Annotated[
        list[str] | None, typer.Option("--from", help="Results of a model to compare, a file or folder; repeat it.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens a row of the text.")] = 1024,
    recall_distances: Annotated[str, typer.Option(help="Distances of the probes in tokens.")] = (
        "16,32,64,128,256,512,768"
    ),
    recall_count: Annotated[int, typer.Option(help="Probes of each kind and distance.")] = 32,
    seed: Annotated[int | None, typer.Option(help="Seed of the probes; a held-out one by default.")] = None,
    batch_size: Annotated[str, typer.Option(help="Sequences a pass, or auto: as many as fit.")] = "auto",
    device: Device = "auto",
    dtype: Dtype = "auto",
    output_format: Format = "table",
    save: Save = True,
    as_json: Json = False,
) -> None:
    """Measure MODEL beside its base and its window alone: perplexity, agreement, recall (all three by default)."""
    from liger_cli import evaluate as module
    from liger_cli.harness import parse_metadata

    module.run(
        model,
        against=against,
        perplexity=perplexity,
        recall=recall,
        agreement=agreement,
        tasks=tasks,
        num_fewshot=num_fewshot,
        limit=limit,
        include_path=include_path,
        metadata=parse_metadata(metadata),
        samples=samples,
        compare=tuple(compare or ()),
        seq_len=seq_len,
        distances=module.parse_distances(recall_distances),
        count=recall_count,
        seed=seed,
        batch_size=module.parse_batch_size(batch_size),
        device=device,
        dtype=dtype,
        output_format="json" if as_json else output_format,
        save=save,
    )


@app.command()
def bench(
    model: Measured = None,
    seq_len: Annotated[
        int, typer.Option(help="Longest text in tokens; 1024, 2048 ... are measured on the way.")
    ] = 32768,
    batch_size: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    new_tokens: Annotated[int, typer.Option(help="Decoding steps of a repetition, whose median counts.")] = 16,
    repetitions: Annotated[int, typer.Option(help="Repetitions that mean and spread are taken from.")] = 5,
    base_limit: Annotated[float, typer.Option(help="Seconds after which a run is stopped and shown as such.")] = 60.0,
    batch_sweep: Annotated[
        bool, typer.Option("--batch-sweep", help="Find the largest batch that fits at --seq-len, too.")
    ] = False,
    shapes_only: Annotated[
        bool,
        typer.Option("--shapes-only", help="MODEL is a config.json, folder or hub id: random weights, no download."),
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    output_format: Format = "table",
    save: Save = True,
    as_json: Json = False,
) -> None:
    """Time and memory of MODEL and of its softmax base at growing lengths, in the same run."""
    from liger_cli import bench as module

    module.run(
        model,
        seq_len=seq_len,
        batch_size=batch_size,
        new_tokens=new_tokens,
        repetitions=repetitions,
        base_limit=base_limit,
        batch_sweep=batch_sweep,
        shapes_only=shapes_only,
        device=device,
        dtype=dtype,
        output_format="json" if as_json else output_format,
        save=save,
    )


@app.command()
def demo(
    folder: Annotated[
        str | None, typer.Argument(metavar="FOLDER", help="Folder to work in; ./liger-demo by default.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier demo.")] = False,
    as_json: Json = False,
) -> None:
    """Convert, fine-tune, merge, evaluate and time the small model that liger ships: minutes on a CPU."""
    from liger_cli import demo as module

    module.run(folder, force=force, as_json=as_json)
