"""Rows of a local data file, read one after the other by the standard library (Parquet by pyarrow).

Not by `datasets`, whose JSON reader is C++ that a deeply nested line can crash, with the whole process.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from liger_cli.errors import LigerError

END_OF_TEXT = "<|endoftext|>"
TEXT_BLOCK = 1 << 24  # characters of a text file read at once
MAX_CELL = 1 << 30  # characters of a CSV field


def local_rows(path: Path) -> Iterator[dict]:
    """The rows of a .json, .jsonl, .csv, .parquet or .txt file, by its suffix.

    Raises:
        LigerError: broken; the sentence names the line where there are lines. OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    try:
        yield from READERS[suffix](path)
    except UnicodeDecodeError as error:
        raise LigerError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _text(path: Path) -> Iterator[dict]:
    """The documents of a text file, read block by block; of a very long one pieces that end with a line."""
    rest = ""
    with open(path, encoding="utf-8", errors="replace") as file:
        while block := file.read(TEXT_BLOCK):
            *whole, rest = (rest + block).split(END_OF_TEXT)
            yield from _documents(whole)
            if len(rest) > 4 * TEXT_BLOCK and (line := rest.rfind("\n")) > 0:
                yield from _documents([rest[:line]])
                rest = rest[line:]
    yield from _documents([rest])


def _documents(texts: list[str]) -> Iterator[dict]:
    return ({"text": text.strip("\n")} for text in texts if text.strip())


def _json(path: Path) -> Iterator[dict]:
    """A list of objects, or one object a line."""
    with open(path, encoding="utf-8-sig") as file:
        start = file.read(1 << 16).lstrip()[:1]
        file.seek(0)
        if start != "[":
            yield from _json_lines(path)
            return
        rows = _parsed(path, file.read(), "it")
    for number, row in enumerate(rows, 1):
        yield _object(path, row, f"entry {number}")


def _json_lines(path: Path) -> Iterator[dict]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _object(path, _parsed(path, line, f"line {number}"), f"line {number}")


def _parsed(path: Path, text: str, where: str):
    try:
        return json.loads(text)
    except RecursionError:
        raise LigerError(f"{path}: {where} is nested too deeply to be read") from None
    except ValueError as error:
        raise LigerError(f"{path}: {where} is not JSON ({error})") from None


def _object(path: Path, row, where: str) -> dict:
    if not isinstance(row, dict):
        raise LigerError(f"{path}: {where} is {type(row).__name__}, not a JSON object")
    return row


def _csv(path: Path) -> Iterator[dict]:
    """Every cell is text; a row has to have as many as the header."""
    csv.field_size_limit(MAX_CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        try:
            header = next(reader, [])
            if len(set(header)) < len(header):
                raise LigerError(f"{path}: its first line names a column twice")
            for cells in reader:
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise LigerError(f"{path}: line {reader.line_num} has {len(cells)} cells for {len(header)} columns")
                yield dict(zip(header, cells, strict=True))
        except csv.Error as error:
            raise LigerError(f"{path}: line {reader.line_num} is not CSV ({error})") from None


def _parquet(path: Path) -> Iterator[dict]:
    from pyarrow import ArrowException, parquet

    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (ArrowException, OSError, ValueError, TypeError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise LigerError(f"{path} cannot be read as Parquet ({reason})") from None


READERS = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".csv": _csv, ".txt": _text}
