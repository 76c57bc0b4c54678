"""The kinds of text that the study's bases are trained and probed on, behind one interface. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from random import Random
from types import ModuleType

from liger_cli.shipped import probes, text
from liger_cli.system.errors import UsageError
from study import text_console, text_harbour, text_play


@dataclass(frozen=True)
class Source:
    """A generator of text with its held-out probes.

    Attributes:
        name: as `source` looks it up.
        kinds: kinds of documents.
        single_tokens: keys and values that are single tokens in the base's vocabulary.
        answer_marks: (start, stop, ...) tokens; from a start to the next of its stops only the context answers.
        tokens_per_word: of the base's tokenizer, roughly; a document's length is asked for in words.
        document: (rng, kinds with weights, words) -> one document.
        documents: (seed, kinds, min_words, max_words) -> an endless stream of documents.
        instructions: (seed, min_words, max_words) -> an endless stream of Alpaca records.
        recall_probe: (tokenizer, distance, count, seed, pairs) -> (prompt, answer) token ids, as
            `liger_cli.shipped.probes.recall_probe`.
        held_out_text: (characters, seed, kinds, max_words) -> documents.

    Seeds below 2**31 are for training, those from 2**31 up are held out.
    """

    name: str
    kinds: tuple[str, ...]
    single_tokens: tuple[str, ...]
    answer_marks: tuple[tuple[str, ...], ...]
    tokens_per_word: float
    document: Callable[[Random, dict[str, float], int], str]
    documents: Callable[..., Iterator[str]]
    instructions: Callable[..., Iterator[dict[str, str]]]
    recall_probe: Callable[..., list[probes.Probe]]
    held_out_text: Callable[..., list[str]]


STORIES = Source(
    name="stories",
    kinds=text.KINDS,
    single_tokens=tuple(text.NAMES),
    answer_marks=(("?", "."),),
    tokens_per_word=1.3,
    document=text.document,
    documents=text.documents,
    instructions=text.instructions,
    recall_probe=probes.recall_probe,
    held_out_text=probes.held_out_text,
)


def _source(name: str, module: ModuleType, words: tuple[tuple[str, ...], ...], tokens_per_word: float) -> Source:
    """The source of a text's module; words: its keys and values, by kind."""
    text = module.TEXT
    return Source(
        name=name,
        kinds=text.kinds,
        single_tokens=tuple(chain.from_iterable(words)),
        answer_marks=module.ANSWER_MARKS,
        tokens_per_word=tokens_per_word,
        document=text.document,
        documents=text.documents,
        instructions=text.instructions,
        recall_probe=text.recall_probe,
        held_out_text=text.held_out_text,
    )


CONSOLE = _source("console", text_console, (text_console.KEYS, text_console.WORDS, text_console.NUMBERS), 1.35)
HARBOUR = _source("harbour", text_harbour, text_harbour.WORDS, 1.25)
PLAY = _source("play", text_play, text_play.WORDS, 1.45)

SOURCES = {source.name: source for source in (STORIES, CONSOLE, HARBOUR, PLAY)}


def source(name: str) -> Source:
    """The source of that name. Raises UsageError: unknown."""
    if name not in SOURCES:
        raise UsageError(f"no text is called {name!r}; choose from {', '.join(SOURCES)}")
    return SOURCES[name]
