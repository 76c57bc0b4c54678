"""`liger finetune` on the command line: its options and their help text."""

from typing import Annotated

import typer

from liger_cli.commands.options import Json


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
            help="A name that `liger recipes` prints, or a YAML file. (default: best, which calibrates first; paper "
            "where that is not possible)"
        ),
    ] = None,
    output: Annotated[str | None, typer.Option(help="The adapter's folder. (default: ./<model>-lora)")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data. (paper: 2)")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of epochs.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="ce, distill (KL to the original model), transfer or transfer-heads. (paper: ce)")
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
    """Train a LoRA adapter on MODEL by a recipe.

    The default calibrates a plain conversion first, into a folder of its own; --recipe paper is the published one."""
    from liger_cli.commands import finetune as module

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
