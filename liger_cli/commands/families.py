"""`liger families`: the table of model families, for people and as JSON."""

import json

from liger_cli.checkpoint.families import FAMILIES
from liger_cli.system.console import say
from liger_cli.system.tables import Table, print_tables


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
    cells = [[row["model_type"], row["architecture"], row["special"]] for row in rows]
    table = Table(f"{len(rows)} model families", ["model_type", "architecture", "special"], cells, words=3)
    note = "Each passes the identity check: mix 0 and a window over the whole text give the base's logits bit for bit."
    print_tables([table], notes=(note,), wrap=True)
    say("next: liger convert BASE")
