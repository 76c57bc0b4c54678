"""`liger gates`: the gated recurrent structures, their formulas and the size of their state."""

import json

from liger_cli.system.console import say
from liger_cli.system.tables import Table, print_tables
from liger_cli.templates.liger_config import LayerSpec
from liger_cli.templates.liger_gates import GATES


def gate_rows(head_dim: int = 128) -> list[dict]:
    """One row a gate: name, formula, recurrence, divisor of the log gate, float32 state shapes of a key/value head."""
    rows = []
    for gate in GATES.values():
        shapes = gate.state_shapes(LayerSpec(gate=gate.name), head_dim)
        rows.append(
            {
                "gate": gate.name,
                "recurrence": gate.rule.name,
                "formula": gate.formula,
                "gate_normalizer": gate.normalizer,
                "state_shapes": [list(shape) for shape in shapes],
                "state_bytes": sum(4 * rows * columns for rows, columns in shapes),
            }
        )
    return rows


def run(as_json: bool, head_dim: int) -> None:
    """Print the table, or one JSON object."""
    rows = gate_rows(head_dim)
    if as_json:
        print(json.dumps({"head_dim": head_dim, "gates": rows}, indent=2))
        return
    title = f"state a head, head dim {head_dim}"
    table = Table(title, ["gate", "formula", "state", "KiB"], words=3)
    for row in rows:
        state = " + ".join(f"{a} x {b}" for a, b in row["state_shapes"])
        table.rows.append([row["gate"], row["formula"], state, f"{row['state_bytes'] / 1024:.1f}"])
    note = (
        "States are float32, one a key/value head, of retnet and lightning one a query head. p is the gate's source "
        "(--gate-source, keys by default) before RoPE; phi is --feature-map."
    )
    print_tables([table], notes=(note,), wrap=True)
    say("next: liger convert BASE --gate NAME")
