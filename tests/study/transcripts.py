"""What the study's own texts have in common: documents in which an endless transcript runs on around settings.

A text (`Transcripts`) brings its words, its transcript and the form of its settings. Its documents are made of pieces,
each with the spaces or newlines that part it from the others; pieces can be tokenized one by one. Everything is
deterministic in the seed. Seeds below 2**31 are for training, seeds from 2**31 up are held out.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Protocol

from liger_cli.shipped.probes import Probe, fill
from liger_cli.shipped.text import TEST_SEED, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST_SETTINGS = 16  # in one document


@dataclass(frozen=True)
class Setting:
    """One key-value setting: `prefix` names the key, `value` is what has to be recalled.

    statement: command + prefix + value + tail; asked, the question with its answer: question + prefix + value + tail.
    """

    command: str
    prefix: str
    value: str
    question: str
    tail: str

    @property
    def statement(self) -> str:
        return f"{self.command}{self.prefix} {self.value}{self.tail}"

    @property
    def asked(self) -> str:
        return f"{self.question}{self.prefix} {self.value}{self.tail}"


class Transcript(Protocol):
    """An endless transcript about some keys, consistent in itself."""

    def heading(self) -> str:
        """The first piece of a document; may be empty."""

    def line(self) -> str:
        """The next piece."""


Relation = Callable[[Random, str], Setting]


def listed(text: str) -> tuple[str, ...]:
    """The words of `text`."""
    return tuple(text.split())


def count_words(pieces: list[str]) -> int:
    """Space-separated words in all."""
    return sum(len(piece.split()) for piece in pieces)


def sample_settings(
    rng: Random, count: int, keys: list[str], relations: tuple[Relation, ...], most: int = MOST_SETTINGS
) -> list[Setting]:
    """`count` settings with different keys and different values; `count` may not exceed `most` or len(keys).

    Two documents in three keep to one relation. Those that a base is trained on hold at most `MOST_SETTINGS`.
    """
    if not 1 <= count <= min(most, len(keys)):
        raise ValueError(f"count must lie between 1 and {min(most, len(keys))}, not {count}")
    single = rng.choice(relations) if rng.random() < 2 / 3 else None
    values, settings = set(), []
    while len(settings) < count:
        setting = (single or rng.choice(relations))(rng, keys[len(settings)])
        if setting.value not in values:
            values.add(setting.value)
            settings.append(setting)
    return settings


def echoed(rng: Random, words: int, kinds: tuple[tuple[str, ...], ...]) -> tuple[list[str], Iterator[list[str]]]:
    """Random words of the `kinds`, up to a third of `words`, and 3 to 8 of them in a row at a time, without end.

    Whole repetitions would be learned by their period, which is of no use for recall.
    """
    line = [rng.choice(rng.choice(kinds)) for _ in range(rng.randint(6, max(6, words // 3)))]

    def parts() -> Iterator[list[str]]:
        while True:
            size = rng.randint(3, min(8, len(line)))
            first = rng.randint(0, len(line) - size)
            yield line[first : first + size]

    return line, parts()


def echo_sentences(rng: Random, words: int, kinds: tuple[tuple[str, ...], ...], first: str, again: str) -> str:
    """A document of a sentence with a list of random words, then pieces of it in any order: `first` and `again` begin
    the sentences. Induction is learned from these first of all.
    """
    line, parts = echoed(rng, words, kinds)
    out = [f"{first} {' '.join(line)}."]
    for part in parts:
        out.append(f" {again} {' '.join(part)}.")
        if count_words(out) + len(part) + 2 > words:
            return "".join(out)


def asked_by_verb(questions: dict[str, str], setting: Setting) -> str:
    """The instruction that asks for a setting whose prefix is a key and a verb; `questions` has one for each verb."""
    key, verb = setting.prefix.split()
    return questions[verb].format(key)


@dataclass(frozen=True)
class Transcripts:
    """A text.

    Attributes:
        transcript: (rng, keys) -> a transcript that mentions these keys and none of the others.
        keys: of settings and of the transcript.
        relations: forms of a setting; `card`, in which the value follows its key at once, is for drill alone.
        plain, settled: names of the kinds of documents that are a transcript alone, and one with settings.
        echo: (rng, words) -> a document of random words and pieces of it again.
        copy_marks: pieces before a block, before its repetition, and after either.
        request: (rng) -> the instruction that asks for a transcript.
        question: (setting) -> the instruction that asks for it.
        words: of a setting with its question, of an answered instruction, and of the copy marks, roughly.
        headed: whether documents without a transcript begin with its heading, too.
        sort: whether pieces that fall on the same place of a `recall` document stand in alphabetical order; otherwise
            settings and questions stay in the order they were drawn in.
    """

    transcript: Callable[[Random, list[str]], Transcript]
    keys: tuple[str, ...]
    relations: tuple[Relation, ...]
    card: Relation
    plain: str
    settled: str
    echo: Callable[[Random, int], str]
    copy_marks: tuple[str, str, str]
    request: Callable[[Random], str]
    question: Callable[[Setting], str]
    words: tuple[int, int, int]
    headed: bool
    sort: bool

    @property
    def writers(self) -> dict[str, Callable[[Random, int], str]]:
        """The kinds of documents: (rng, words) -> a document of about `words` words."""
        return {
            self.plain: self.unsettled_document,
            self.settled: self.settled_document,
            "recall": self.recall,
            "drill": self.drill,
            "copy": self.copy,
            "echo": self.echo,
            "chat": self.chat,
        }

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the kinds of documents."""
        return tuple(self.writers)

    def begin(self, rng: Random) -> tuple[Transcript, list[str]]:
        """A transcript, and the keys that it leaves free for settings."""
        keys = rng.sample(self.keys, len(self.keys))
        size = rng.randint(2, 3)
        return self.transcript(rng, keys[:size]), keys[size:]

    def unsettled_document(self, rng: Random, words: int) -> str:
        """A transcript alone."""
        transcript, _ = self.begin(rng)
        return "".join(_continued(transcript, [transcript.heading()], words))

    def settled_document(self, rng: Random, words: int) -> str:
        """A transcript whose settings are made in its first half and asked for in its second."""
        transcript, keys = self.begin(rng)
        heading = transcript.heading()
        known = sample_settings(rng, rng.randint(1, max(1, min(8, words // 25))), keys, self.relations)
        asked = rng.sample(known, len(known))
        body = _continued(transcript, [], max(10, words - self.words[0] * len(known)))
        middle = len(body) // 2
        inserts = [(rng.uniform(0, middle), setting.statement) for setting in known]
        inserts += [(rng.uniform(middle + 1, len(body)), setting.asked) for setting in asked]
        numbered = sorted([(float(index), line) for index, line in enumerate(body)] + inserts)
        return heading + "".join(line for _, line in numbered)

    def recall(self, rng: Random, words: int) -> str:
        """Settings, a transcript that does not mention them, and questions.

        The settings come in one block or with pieces between them; the transcript is cut at random points by the
        questions, in an order of their own, so that distances run from a few words to nearly the whole document.
        """
        transcript, keys = self.begin(rng)
        heading = transcript.heading()
        pairs = rng.randint(1, max(1, min(MOST_SETTINGS, words // 16)))
        known = sample_settings(rng, pairs, keys, self.relations)
        asked = rng.sample(known, pairs)
        while len(asked) < 4 and rng.random() < 0.5:
            asked.append(rng.choice(known))
        stated = [setting.statement for setting in known] + [setting.asked for setting in asked]
        body = _continued(transcript, [], words - count_words(stated))
        before = 0 if rng.random() < 0.5 else int(len(body) * rng.uniform(0, 0.4))
        after = before + int((len(body) - before) * rng.choice((0, rng.random(), 1)))
        out = [(index + 0.5, 1, line) for index, line in enumerate(body)]
        out += [(rng.uniform(0, before), 0, setting.statement) for setting in known]
        out += [(rng.uniform(after, len(body)) + 1e-6, 2, setting.asked) for setting in asked]
        out.sort(key=None if self.sort else lambda piece: piece[:2])
        return heading + "".join(line for _, _, line in out)

    def drill(self, rng: Random, words: int) -> str:
        """Settings and questions without a transcript, every setting asked for about equally often.

        In half of the documents the value follows its key at once (`card`): copying is learned from these first.
        """
        if self.headed:
            transcript, keys = self.begin(rng)
            out = [transcript.heading()]
        else:
            keys, out = rng.sample(self.keys, len(self.keys)), []
        pairs = rng.randint(2, max(2, min(MOST_SETTINGS, words // 12)))
        known = sample_settings(rng, pairs, keys, (self.card,) if rng.random() < 0.5 else self.relations)
        out += [setting.statement for setting in known]
        asked: list[Setting] = []
        while True:
            asked = asked or rng.sample(known, pairs)
            out.append(asked.pop().asked)
            if count_words(out) + 5 > words:
                return "".join(out)

    def copy(self, rng: Random, words: int) -> str:
        """A block of pieces, up to half of the document, then other pieces, then the block again."""
        transcript, _ = self.begin(rng)
        heading = transcript.heading()
        block = self.block(rng, transcript, int(words * rng.uniform(0.15, 0.45)))
        out = _continued(transcript, [], words - 2 * count_words(block) - self.words[2])
        before = rng.randint(0, len(out))
        begin, again, end = self.copy_marks
        return "".join([heading, *out[:before], begin, *block, end, *out[before:], again, *block, end])

    def block(self, rng: Random, transcript: Transcript, words: int) -> list[str]:
        """Pieces to be copied: settings of any keys, and pieces of the transcript."""
        block: list[str] = []
        while count_words(block) < max(4, words):
            statement = rng.choice(self.relations)(rng, rng.choice(self.keys)).statement
            block.append(statement if rng.random() < 0.6 else transcript.line())
        return block

    def instruction(self, rng: Random, words: int) -> dict[str, str]:
        """One `{"instruction", "input", "output"}` record (the Alpaca fields) of about `words` words."""
        if rng.random() < 0.3:
            request = self.request(rng)
            return {"instruction": request, "input": "", "output": self.unsettled_document(rng, words).strip()}
        transcript, keys = self.begin(rng)
        heading = transcript.heading()
        known = sample_settings(rng, rng.randint(1, max(1, min(8, words // 25))), keys, self.relations)
        passage = [heading, *(setting.statement for setting in known)]
        passage = _continued(transcript, passage, words - self.words[1])
        setting = rng.choice(known)
        return {
            "instruction": self.question(setting),
            "input": "".join(passage).strip(),
            "output": setting.asked.strip(),
        }

    def chat(self, rng: Random, words: int) -> str:
        """An instruction and its response in the base's chat format."""
        return render_chat(self.instruction(rng, words))

    def document(self, rng: Random, kinds: dict[str, float], words: int) -> str:
        """One document of about `words` words, of a kind drawn with the weights of `kinds`.

        Raises:
            ValueError: an unknown kind.
        """
        if unknown := set(kinds) - set(self.kinds):
            raise ValueError(f"unknown kind of document {min(unknown)!r}; choose from {', '.join(self.kinds)}")
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        return self.writers[kind](rng, words)

    def documents(
        self,
        seed: int,
        kinds: tuple[str, ...] | dict[str, float] | None = None,
        min_words: int = 30,
        max_words: int = 260,
    ) -> Iterator[str]:
        """An endless stream of documents, the same for the same arguments.

        Args:
            seed: below 2**31 for training, from 2**31 up for held-out text.
            kinds: kinds to mix, evenly, or with the given weights; None for all.
            min_words, max_words: bounds of the target length in space-separated words.
        """
        kinds = self.kinds if kinds is None else kinds
        weights = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
        rng = Random(seed)
        while True:
            yield self.document(rng, weights, rng.randint(min_words, max_words))

    def instructions(self, seed: int, min_words: int = 30, max_words: int = 200) -> Iterator[dict[str, str]]:
        """An endless stream of instruction records (see `instruction`), for fine-tuning; seeds as for `documents`."""
        rng = Random(seed)
        while True:
            yield self.instruction(rng, rng.randint(min_words, max_words))

    def held_out_text(
        self, characters: int, seed: int = TEST_SEED, kinds: tuple[str, ...] | None = None, max_words: int = 260
    ) -> list[str]:
        """Documents the base never saw, `characters` characters or a little more in all; by default, of the kinds that
        read like transcripts.
        """
        kinds = (self.plain, self.settled) if kinds is None else kinds
        texts: list[str] = []
        total = 0
        for text in self.documents(seed, kinds, max_words=max_words):
            if total >= characters:
                return texts
            texts.append(text)
            total += len(text)

    def recall_probe(
        self, tokenizer: "PreTrainedTokenizerBase", distance: int, count: int, seed: int = TEST_SEED, pairs: int = 4
    ) -> list[Probe]:
        """Transcripts that make `pairs` settings, go on with other pieces and ask for one of the settings.

        Args, returns and raises as `liger_cli.shipped.probes.recall_probe`: `distance` tokens lie between the end of
        the stated value and the start of the answer, exactly.
        """
        rng = Random(seed * 1009 + distance)
        start = _start(tokenizer)
        return [self._probe(tokenizer, distance, pairs, rng, start) for _ in range(count)]

    def _probe(self, tokenizer, distance: int, pairs: int, rng: Random, start: list[int]) -> Probe:
        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        for _ in range(500):
            transcript, keys = self.begin(rng)
            settings = sample_settings(rng, pairs, keys, self.relations, most=len(keys))
            asked = rng.randrange(pairs)
            setting = settings[asked]
            later = encode(setting.tail + "".join(other.statement for other in settings[asked + 1 :]))
            question = encode(f"{setting.question}{setting.prefix}")
            filler = fill(
                lambda transcript=transcript: encode(transcript.line()), distance - len(later) - len(question)
            )
            if filler is None:
                continue
            before = "".join(other.statement for other in settings[:asked])
            opening = f"{transcript.heading()}{transcript.line()}{before}"
            prompt = encode(f"{opening}{setting.command}{setting.prefix}")
            answer = encode(f" {setting.value}")
            return start + prompt + answer + later + filler + question, answer
        raise ValueError(f"no probe with {pairs} settings fits into a distance of {distance} tokens")


def _continued(transcript: Transcript, pieces: list[str], words: int) -> list[str]:
    """`pieces` and the transcript after them, `words` words or a little more in all."""
    while count_words(pieces) < words:
        pieces.append(transcript.line())
    return pieces


def _start(tokenizer) -> list[int]:
    start = tokenizer("a")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []
