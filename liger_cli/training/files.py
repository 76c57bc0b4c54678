"""Rows of a local data file, read one after the other by the standard library (Parquet by pyarrow).

Not by `datasets`, whose JSON reader is C++ that a deeply nested line can crash, with the whole process.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from liger_cli.system.errors import LigerError
from liger_cli.system.untrusted import refuse_pointer
from liger_cli.training.layouts import CHATS

END_OF_TEXT = "<|endoftext|>"
TEXT_BLOCK = 1 << 24  # characters of a text file read at once
MAX_CELL = 1 << 30  # characters of a CSV field


def local_rows(path: Path) -> Iterator[dict]:
    """The rows of a .json, .jsonl, .csv, .parquet or .txt file, by its suffix.

    Raises:
        LigerError: broken; the sentence names the line where there are lines. OSError: it cannot be read.
    """
    suffix = path.suffix.lower()
    with open(path, "rb") as file:
        refuse_pointer(file.read(100), path, LigerError)
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
    """A list of objects, an object that holds one such list, or one object a line."""
    with open(path, encoding="utf-8-sig") as file:
        line = next((line for line in file if line.strip()), "")
        more = any(other.strip() for other in file)
        file.seek(0)
        if not _is_whole(line, more):
            yield from _json_lines(path)
            return
        rows = _parsed(path, file.read(), "it")
    if isinstance(rows, dict):
        rows = _held(path, rows)
    for number, row in enumerate(rows, 1):
        yield _object(path, row, f"entry {number}")


def _is_whole(line: str, more: bool) -> bool:
    """Whether a file is one value, by its first line: a list, an object over several lines, or one that holds rows."""
    if line.lstrip()[:1] == "[" or line.strip() == "{":
        return True
    if more:
        return False
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and len(_lists(value)) == 1


def _lists(value: dict) -> list[list[dict]]:
    """The lists of rows among an object's fields; a conversation is part of a row."""
    lists = [one for name, one in value.items() if isinstance(one, list) and name not in CHATS]
    return [one for one in lists if one and all(isinstance(row, dict) for row in one)]


def _held(path: Path, value: dict) -> list[dict]:
    if len(found := _lists(value)) != 1:
        fields = ", ".join(map(str, value))[:200]
        raise LigerError(f"{path} holds one object ({fields}) with {len(found)} lists of rows; give a list of rows")
    return found[0]


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
