"""Writes training documents of the study's texts to a file that `liger finetune --data` reads.

    python -m study.text_files console FILE.jsonl [--documents 1500] [--instructions]

The documents are of every kind but `chat`, of 80 to 260 words, from a training seed that no base was trained on.
"""

import argparse
import json
from itertools import islice
from pathlib import Path

from liger_cli.shipped.text import TRAIN_SEED, VALIDATION_SEED
from study.sources import SOURCES, Source

DATA_SEED = TRAIN_SEED + 2**30  # away from the bases' own training documents, which count up from TRAIN_SEED


def training_rows(source: Source, documents: int, instructions: bool = False, seed: int = DATA_SEED) -> list[dict]:
    """`documents` rows: `{"text"}` of every kind but `chat`, or Alpaca records (`instruction`, `input`, `output`).

    Raises:
        ValueError: a held-out seed.
    """
    if not 0 <= seed < VALIDATION_SEED:
        raise ValueError(f"seed {seed} is held out; training seeds lie below {VALIDATION_SEED}")
    if instructions:
        return list(islice(source.instructions(seed), documents))
    kinds = tuple(kind for kind in source.kinds if kind != "chat")
    return [{"text": text} for text in islice(source.documents(seed, kinds, 80, 260), documents)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", choices=SOURCES, help="which text")
    parser.add_argument("file", type=Path, help="the .jsonl file to write")
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--instructions", action="store_true", help="Alpaca records instead of plain text")
    parser.add_argument("--seed", type=int, default=DATA_SEED, help="below 2**31")
    args = parser.parse_args()
    if args.file.suffix != ".jsonl":
        parser.error(f"{args.file} does not end in .jsonl, by which liger finetune knows the format")
    try:
        rows = training_rows(SOURCES[args.source], args.documents, args.instructions, args.seed)
    except ValueError as error:
        parser.error(str(error))
    args.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
