"""`liger families`: the table of model families, for people and as JSON."""

import json

from liger_cli.checkpoint.families import FAMILIES


def run(as_json: bool = False) -> None:
    """Print every supported family with what is special about it."""
    rows = [
        {
            "model_type": family.model_type,
            "architecture": f"{family.prefix}ForCausalLM",
            "special": family.note,
            "lora_targets": list(family.lora_targets),
            "identity_tolerance": family.identity_tolerance,
        }
        for family in FAMILIES.values()
    ]
    if as_json:
        print(json.dumps({"families": rows}, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    from liger_cli.system.console import print_table

    table = Table(title=f"{len(rows)} model families", title_justify="left")
    for name in ("model_type", "architecture", "special"):
        table.add_column(name)
    for row in rows:
        table.add_row(row["model_type"], row["architecture"], row["special"])
    console = Console(highlight=False, markup=False)
    print_table(console, table)
    console.print(
        "Each passes the identity check: mix 0 and a window over the whole text give the base's logits bit for bit."
    )
