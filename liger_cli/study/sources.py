"""The kinds of text that the study's bases are trained and probed on, behind one interface. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from liger_cli.errors import UsageError
from liger_cli.shipped import probes, text
from liger_cli.study import text_console


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

CONSOLE = Source(
    name="console",
    kinds=text_console.KINDS,
    single_tokens=(*text_console.KEYS, *text_console.WORDS, *text_console.NUMBERS),
    answer_marks=text_console.ANSWER_MARKS,
    tokens_per_word=1.35,
    document=text_console.document,
    documents=text_console.documents,
    instructions=text_console.instructions,
    recall_probe=text_console.recall_probe,
    held_out_text=text_console.held_out_text,
)


def mixed(name: str, parts: tuple[Source, ...], answer_marks: tuple[tuple[str, ...], ...]) -> Source:
    """A source whose documents, records, probes and held-out texts come from every part equally often.

    A kind that several parts have is drawn from any of them; other kinds from the part that has them. A part that has
    none of the kinds asked for is left out.
    """

    def having(kinds) -> list[tuple[Source, tuple[str, ...]]]:
        shares = [(part, tuple(kind for kind in kinds if kind in part.kinds)) for part in parts]
        return [(part, own) for part, own in shares if own]

    def document(rng: Random, kinds: dict[str, float], words: int) -> str:
        if unknown := {kind for kind in kinds if not having((kind,))}:
            raise ValueError(f"unknown kind of document {min(unknown)!r}; choose from {', '.join(every)}")
        part, own = rng.choice(having(kinds))
        return part.document(rng, {kind: kinds[kind] for kind in own}, words)

    def documents(seed: int, kinds=None, min_words: int = 40, max_words: int = 260) -> Iterator[str]:
        kinds = every if kinds is None else kinds
        weights = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
        rng = Random(seed)
        while True:
            yield document(rng, weights, rng.randint(min_words, max_words))

    def instructions(seed: int, min_words: int = 40, max_words: int = 200) -> Iterator[dict[str, str]]:
        streams = [part.instructions(seed, min_words, max_words) for part in parts]
        while True:
            yield from (next(stream) for stream in streams)

    def recall_probe(tokenizer, distance: int, count: int, seed: int = text.TEST_SEED, pairs: int = 4):
        share = -(-count // len(parts))
        found = [part.recall_probe(tokenizer, distance, share, seed, pairs) for part in parts]
        return [probe for turn in zip(*found, strict=True) for probe in turn][:count]

    def held_out_text(characters: int, seed: int = text.TEST_SEED, kinds=None, max_words: int = 260) -> list[str]:
        wanted = [(part, {} if kinds is None else {"kinds": own}) for part, own in having(kinds or every)]
        share = characters // len(wanted)
        return [line for part, own in wanted for line in part.held_out_text(share, seed, max_words=max_words, **own)]

    every = tuple(dict.fromkeys(kind for part in parts for kind in part.kinds))
    return Source(
        name=name,
        kinds=every,
        single_tokens=tuple(word for part in parts for word in part.single_tokens),
        answer_marks=answer_marks,
        tokens_per_word=max(part.tokens_per_word for part in parts),
        document=document,
        documents=documents,
        instructions=instructions,
        recall_probe=recall_probe,
        held_out_text=held_out_text,
    )


# A story has no newline and a transcript no full stop, so either ends an answer.
MIXED = mixed("mixed", (STORIES, CONSOLE), (("?", "\n", "."), ("again", "end")))

SOURCES = {source.name: source for source in (STORIES, CONSOLE, MIXED)}


def source(name: str) -> Source:
    """The source of that name. Raises UsageError: unknown."""
    if name not in SOURCES:
        raise UsageError(f"no text is called {name!r}; choose from {', '.join(SOURCES)}")
    return SOURCES[name]
