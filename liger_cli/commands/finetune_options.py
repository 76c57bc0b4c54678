"""The options of `liger finetune`, and of its Python function."""

from dataclasses import dataclass, fields

from liger_cli.commands.options import OUTPUT, argument, option

LORA, BATCHES, MACHINE = "What is trained", "Rows and steps", "Machine"


def of_recipe(help: str, shown: str, *flags: str, **settings):
    """A field of the recipe that the option changes. shown: what the recipes `best` and `paper` have."""
    return option(None, help, *flags, recipe=True, shown=shown, **settings)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions:
    """Train a LoRA adapter on MODEL by a recipe.

    The default calibrates a plain conversion first, into a folder of its own; --recipe paper is the published one."""

    model: str | None = argument("A converted folder; the newest one here by default.", None, metavar="MODEL")
    data: str | None = option(
        None,
        "Hub id, .json/.jsonl/.parquet/.csv/.txt files, or demo; several as a.jsonl:0.7,b.parquet:0.3.",
        shown="the recipe's: yahma/alpaca-cleaned",
    )
    long_data: str | None = of_recipe(
        "Long documents, streamed, as half of the rows beside --data; named as --data is, or none. A recipe's own go "
        "with its own data alone.",
        "best emozilla/pg19, paper none",
    )
    calibration_data: str | None = option(
        None,
        "Text or .jsonl file to calibrate on, where that comes first, or self: text that the base writes.",
        shown="the training data and shipped prose, half of each",
        metavar="FILE|self",
    )
    recipe: str | None = option(
        None,
        "A name that `liger recipes` prints, or a YAML file.",
        shown="that of convert --recipe, else best, which calibrates first; paper where that is not possible",
    )
    output: str | None = option(None, "The adapter's folder.", shown="./<model>-lora")
    epochs: float | None = of_recipe("Passes over the data.", "best 2, paper 2")
    max_steps: int | None = of_recipe("Optimizer steps, instead of epochs.", "none")
    seq_len: int | None = of_recipe("Tokens of a row.", "best 2048, paper 1024")
    dry_run: bool = option(False, "Print the plan and train nothing.")
    resume: bool = option(False, "Go on with the unfinished run.")
    force: bool = option(False, "Replace an adapter, discard an unfinished run.")
    objective: str | None = of_recipe(
        "ce, distill (KL to the original model), transfer or transfer-heads.",
        "best transfer then distill, paper ce",
        panel=LORA,
    )
    lr: float | None = of_recipe("Peak learning rate of every stage.", "best 0.002 then 0.001, paper 0.001", panel=LORA)
    lora_rank: int | None = of_recipe("Rank of the update.", "best 8, paper 8", panel=LORA)
    lora_alpha: float | None = of_recipe("The update counts alpha / rank.", "best 16, paper 8", panel=LORA)
    target_modules: str | None = of_recipe(
        "Linear layers that get LoRA.", "best q_proj,k_proj,v_proj, paper q_proj,k_proj,v_proj", panel=LORA
    )
    train_softmax_layers: bool = option(False, "LoRA on layers that are not Liger's, too.", panel=LORA)
    batch_size: int | None = of_recipe("Rows of a global batch.", "best 2, paper 8", panel=BATCHES)
    micro_batch_size: int | None = of_recipe("Rows run at once.", "best 1, paper 1", panel=BATCHES)
    packing: bool | None = of_recipe(
        "Short documents share a row; see `joined` of `liger recipes NAME`.", "best yes, paper yes", panel=BATCHES
    )
    streaming: bool | None = of_recipe(
        "Read the data during the run, in constant memory; needs --max-steps.",
        "for local files of more than 2 GiB",
        panel=BATCHES,
    )
    held_out: int | None = of_recipe("Examples kept for evaluation.", "best 200, paper 200", panel=BATCHES)
    eval_steps: int | None = of_recipe("Steps between evaluations.", "best 200, paper 200", panel=BATCHES)
    save_steps: int | None = of_recipe("Steps between checkpoints.", "best 100, paper 100", panel=BATCHES)
    early_stop: int | None = of_recipe(
        "Evaluations without improvement that end the run, and the best is kept; 0 never ends it.",
        "best 0, paper 0",
        panel=BATCHES,
    )
    beyond_context: bool = option(False, "Rows longer than the context that the base was made for.", panel=BATCHES)
    seed: int | None = of_recipe("Of LoRA's start and the order of the data.", "best 0, paper 0", panel=BATCHES)
    dtype: str = option(
        "auto", "Of the frozen weights in training; auto is bfloat16 on CUDA, float32 elsewhere.", panel=MACHINE
    )
    gradient_checkpointing: bool | None = of_recipe(
        "Less memory for more time.", "best no, paper no", "--gradient-checkpointing", panel=MACHINE
    )
    load_in_4bit: bool | None = of_recipe(
        "Frozen weights in 4 bits, on CUDA with bitsandbytes.", "best no, paper no", "--load-in-4bit", panel=MACHINE
    )
    processes: int = option(1, "Data-parallel processes on this machine.", panel=MACHINE)
    fsdp: bool = option(False, "Shard the weights over the processes (FSDP2), on CUDA devices.", panel=MACHINE)
    report_to: str = option("none", "none, tensorboard or wandb.", panel=OUTPUT)

    def changes(self) -> dict:
        """Fields of the recipe, and of its stages (`lr`, `objective`), that were given."""
        names = [one.name for one in fields(self) if one.metadata.get("recipe")]
        found = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if isinstance(self.target_modules, str):
            found["target_modules"] = tuple(self.target_modules.split(","))
        return found | ({"train_softmax_layers": True} if self.train_softmax_layers else {})
