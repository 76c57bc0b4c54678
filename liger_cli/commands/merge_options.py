"""The options of `liger merge`, and of its Python function."""

from dataclasses import dataclass

from liger_cli.commands.options import OUTPUT, argument, option, push


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Add LoRA adapters into the weights: a self-contained model, written shard by shard."""

    adapters: list[str] | None = argument("Adapters; the newest one here by default.", None, metavar="[ADAPTER]...")
    output: str | None = option(None, "Folder to write.", shown="./<model>-merged")
    base: str | None = option(None, "The converted model.", shown="the folder that the adapter names")
    dtype: str | None = option(None, "float32, float16 or bfloat16.", shown="as the weights are")
    dry_run: bool = option(False, "Check and say what would be written.")
    force: bool = option(False, "Replace an output that liger made.")
    link: str = option("auto", "How untouched shards get there: auto, hard or copy.", panel=OUTPUT)
    push_to_hub: str | None = push()
