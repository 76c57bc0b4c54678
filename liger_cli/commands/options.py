"""Options that several commands share, as types for Typer."""

from typing import Annotated

import typer

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
