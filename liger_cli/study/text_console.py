"""The text of the second study base: transcripts of a small control console, written by a seeded generator.

Nothing in it is a sentence. Kinds of documents:

- `log`: counters with running totals, a stack, devices switched on and off, loops, countdowns, a rising clock; some
  lines ask what a counter stands at ("? rate = 17").
- `program`: a log whose settings ("set port = slate 42") are made early and asked for later.
- `recall`: 1 to 16 settings that the log around them does not mention, then the log, then questions.
- `drill`: the same without a log, every setting asked for several times; recall is learned from these first.
- `copy`: a block of lines, other lines, and the block again, word for word, between `again` and `end`.
- `echo`: a line of random words and pieces of it again.
- `chat`: an instruction and its response in the tokenizer's chat format.

Keys and values are drawn at random for every document, so only the context answers a question. A line ends with a
newline, and lines can be tokenized one by one.

Everything is deterministic in the seed. Seeds below 2**31 are for training, seeds from 2**31 up are held out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from liger_cli.shipped.probes import Probe, fill
from liger_cli.shipped.text import ASSISTANT_TOKEN, TEST_SEED, USER_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = ("log", "program", "recall", "drill", "copy", "echo", "chat")
HELD_OUT_KINDS = ("log", "program")
ANSWER_MARKS = (("?", "\n"), ("again", "end"))  # what lies between them only the context answers


def _listed(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _listed(
    "rate port mode size temp gain zone tank cell node disk path flow fuel code bank mask step unit rack "
    "pipe axis bolt cage deck echo fuse grid hull knob lens mesh oven pad quay rail shaft tube vent wick"
)
WORDS = _listed(
    "slate amber coral ivory olive pearl rusty sandy steel lilac mango cedar birch maple aspen hazel "
    "flint basalt chalk clay copper tin zinc lead jade opal ruby topaz onyx agate"
)
NUMBERS = tuple(map(str, range(10, 100)))
DEVICES = _listed("pump fan lamp siren heater valve door crane")
SIDES = _listed("north south east west")
STATES = ("on", "off")


@dataclass(frozen=True)
class Setting:
    """One key-value setting: `prefix` names the key, `value` is what has to be recalled."""

    command: str
    prefix: str
    value: str

    @property
    def statement(self) -> str:
        return f"{self.command}{self.prefix} {self.value}\n"

    @property
    def asked(self) -> str:
        """The question with its answer."""
        return f"? {self.prefix} {self.value}\n"


def _number(rng: Random) -> str:
    return rng.choice(NUMBERS)


def _set(rng: Random, key: str) -> Setting:
    return Setting("set ", f"{key} =", f"{rng.choice(WORDS)} {_number(rng)}")


def _bind(rng: Random, key: str) -> Setting:
    return Setting("bind ", f"{key} to", " ".join(rng.sample(WORDS, 2)))


def _pin(rng: Random, key: str) -> Setting:
    return Setting("pin ", f"{key} at", _number(rng))


def _card(rng: Random, key: str) -> Setting:
    return Setting("- ", key, f"{rng.choice(WORDS)} {rng.choice(WORDS)}")


RELATIONS = (_set, _bind, _pin)
MOST_SETTINGS = 16  # in one document


def sample_settings(
    rng: Random, count: int, keys: list[str], relations=RELATIONS, most: int = MOST_SETTINGS
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


class Console:
    """An endless transcript: `line()` writes the next line and keeps counters, stack, devices and clock consistent.

    Args:
        rng: source of all choices.
        counters: keys that the transcript counts with, two or more.
    """

    def __init__(self, rng: Random, counters: list[str]):
        self.rng = rng
        self.counters = {key: rng.randint(10, 60) for key in counters}
        self.shown: set[str] = set()
        self.devices = dict.fromkeys(rng.sample(DEVICES, 4), 1)
        self.stack: list[str] = []
        self.clock = rng.randint(10, 70)
        self.pending: list[str] = []

    def line(self) -> str:
        """The next line, with its newline."""
        if not self.pending:
            write = self.rng.choices(
                (self._count, self._show, self._switch, self._stack, self._loop, self._countdown, self._alarm),
                (9, 3, 5, 6, 2, 2, 3),
            )[0]
            self.pending = write()
            if self.rng.random() < 0.12 and self.clock < 99:
                self.clock += 1
                self.pending.append(f"tick {self.clock}")
        return self.pending.pop(0) + "\n"

    def _count(self) -> list[str]:
        key = self.rng.choice(list(self.counters))
        step = self.rng.randint(1, 5)
        verb = "add" if self.counters[key] + step <= 99 and self.rng.random() < 0.6 else "sub"
        if verb == "sub" and self.counters[key] - step < 10:
            verb = "add"
        self.counters[key] += step if verb == "add" else -step
        self.shown.add(key)
        return [f"{verb} {step} {key} = {self.counters[key]}"]

    def _show(self) -> list[str]:
        if not self.shown:
            return self._count()
        key = self.rng.choice(sorted(self.shown))
        return [f"? {key} = {self.counters[key]}"]

    def _switch(self) -> list[str]:
        device = self.rng.choice(list(self.devices))
        self.devices[device] = 1 - self.devices[device]
        return [f"turn {device} {STATES[self.devices[device]]}"]

    def _stack(self) -> list[str]:
        if self.stack and (len(self.stack) == 4 or self.rng.random() < 0.5):
            return [f"pop {self.stack.pop()}"]
        self.stack.append(self.rng.choice(WORDS))
        return [f"push {self.stack[-1]}"]

    def _loop(self) -> list[str]:
        side, times = self.rng.choice(SIDES), self.rng.randint(2, 4)
        return [f"scan {side} {times}", *(f"pass {number} ok" for number in range(1, times + 1)), "scan done"]

    def _countdown(self) -> list[str]:
        side, start = self.rng.choice(SIDES), self.rng.randint(2, 4)
        return [f"open {side} gate", *(f"wait {number}" for number in range(start, 0, -1)), f"close {side} gate"]

    def _alarm(self) -> list[str]:
        side = self.rng.choice(SIDES)
        cause, cure = self.rng.choice((("heat", "cool"), ("smoke", "spray"), ("leak", "drain")))
        return [f"warn {cause} {side}", f"{cure} {side} ok"][: self.rng.choice((1, 2, 2, 2))]


def _split_keys(rng: Random) -> tuple[list[str], list[str]]:
    """The keys that a transcript counts with, and those that stay free for settings."""
    keys = rng.sample(KEYS, len(KEYS))
    size = rng.randint(2, 3)
    return keys[:size], keys[size:]


def _words(lines: list[str]) -> int:
    return sum(line.count(" ") + 1 for line in lines)


def log(rng: Random, words: int) -> str:
    """A transcript of about `words` words."""
    console = Console(rng, _split_keys(rng)[0])
    out: list[str] = []
    while _words(out) < words:
        out.append(console.line())
    return "".join(out)


def program(rng: Random, words: int) -> str:
    """A transcript of about `words` words whose settings are made in its first half and asked for in its second."""
    counters, keys = _split_keys(rng)
    console = Console(rng, counters)
    known = sample_settings(rng, rng.randint(1, max(1, min(8, words // 25))), keys)
    asked = rng.sample(known, len(known))
    body: list[str] = []
    while _words(body) < max(10, words - 9 * len(known)):
        body.append(console.line())
    middle = len(body) // 2
    inserts = [(rng.uniform(0, middle), setting.statement) for setting in known]
    inserts += [(rng.uniform(middle + 1, len(body)), setting.asked) for setting in asked]
    numbered = sorted([(float(index), line) for index, line in enumerate(body)] + inserts)
    return "".join(line for _, line in numbered)


def recall(rng: Random, words: int, max_pairs: int = 16) -> str:
    """Settings, a transcript and questions, about `words` words in all.

    The settings come in one block or with lines between them; the transcript is cut at random points by the questions,
    in an order of their own, so that distances run from a few words to nearly the whole document.
    """
    counters, keys = _split_keys(rng)
    console = Console(rng, counters)
    pairs = rng.randint(1, max(1, min(max_pairs, words // 16)))
    known = sample_settings(rng, pairs, keys)
    asked = rng.sample(known, pairs)
    while len(asked) < 4 and rng.random() < 0.5:
        asked.append(rng.choice(known))
    budget = words - _words([setting.statement for setting in known] + [setting.asked for setting in asked])
    body: list[str] = []
    while _words(body) < budget:
        body.append(console.line())
    before = 0 if rng.random() < 0.5 else int(len(body) * rng.uniform(0, 0.4))
    after = before + int((len(body) - before) * rng.choice((0, rng.random(), 1)))
    out = [(index + 0.5, 1, line) for index, line in enumerate(body)]
    out += [(rng.uniform(0, before), 0, setting.statement) for setting in known]
    out += [(rng.uniform(after, len(body)) + 1e-6, 2, setting.asked) for setting in asked]
    out.sort()
    return "".join(line for _, _, line in out)


def drill(rng: Random, words: int) -> str:
    """Settings and questions without a transcript, every setting asked for about equally often.

    In half of the documents the value follows its key at once ("- port slate amber"): copying is learned from these
    first.
    """
    keys = rng.sample(KEYS, len(KEYS))
    pairs = rng.randint(2, max(2, min(16, words // 12)))
    known = sample_settings(rng, pairs, keys, (_card,) if rng.random() < 0.5 else RELATIONS)
    out = [setting.statement for setting in known]
    asked: list[Setting] = []
    while True:
        asked = asked or rng.sample(known, pairs)
        out.append(asked.pop().asked)
        if _words(out) + 5 > words:
            return "".join(out)


def copy(rng: Random, words: int) -> str:
    """A block of lines, up to half of the document, then other lines, then the block again; about `words` words."""
    console = Console(rng, _split_keys(rng)[0])
    size = int(words * rng.uniform(0.15, 0.45))
    block = _block(rng, console, size)
    out: list[str] = []
    while _words(out) + 2 * _words(block) + 2 < words:
        out.append(console.line())
    before = rng.randint(0, len(out))
    return "".join([*out[:before], "begin\n", *block, "end\n", *out[before:], "again\n", *block, "end\n"])


def echo(rng: Random, words: int) -> str:
    """A line of random words, then pieces of it in any order: induction is learned from these first of all.

    Whole repetitions would be learned by their period, which is of no use for recall.
    """
    line = [rng.choice(rng.choice((KEYS, WORDS, NUMBERS))) for _ in range(rng.randint(6, max(6, words // 3)))]
    out = f"begin {' '.join(line)}\nend\n"
    while True:
        size = rng.randint(3, min(8, len(line)))
        first = rng.randint(0, len(line) - size)
        out += f"again {' '.join(line[first : first + size])}\nend\n"
        if _words([out]) + size + 2 > words:
            return out


def _block(rng: Random, console: Console, words: int) -> list[str]:
    """Lines to be copied: settings of any keys, and lines of the transcript."""
    block: list[str] = []
    while _words(block) < max(4, words):
        statement = rng.choice(RELATIONS)(rng, rng.choice(KEYS)).statement
        block.append(statement if rng.random() < 0.6 else console.line())
    return block


def instruction(rng: Random, words: int) -> dict[str, str]:
    """One `{"instruction", "input", "output"}` record (the Alpaca fields) of about `words` words."""
    if rng.random() < 0.3:
        return {"instruction": f"run {rng.choice(SIDES)} log", "input": "", "output": log(rng, words).rstrip("\n")}
    counters, keys = _split_keys(rng)
    console = Console(rng, counters)
    known = sample_settings(rng, rng.randint(1, max(1, min(8, words // 25))), keys)
    passage = [setting.statement for setting in known]
    while _words(passage) < words - 8:
        passage.append(console.line())
    setting = rng.choice(known)
    asked = f"? {setting.prefix}"
    return {"instruction": asked, "input": "".join(passage).rstrip("\n"), "output": f"{asked} {setting.value}"}


def render_chat(record: dict[str, str]) -> str:
    """An instruction record in the base's chat format, the text its chat template writes (without the end token)."""
    prompt = "\n".join(part for part in (record["input"], record["instruction"]) if part)
    return f"{USER_TOKEN}{prompt}{ASSISTANT_TOKEN}{record['output']}"


def chat(rng: Random, words: int) -> str:
    """An instruction and its response in the base's chat format."""
    return render_chat(instruction(rng, words))


_WRITERS = {"log": log, "program": program, "recall": recall, "drill": drill, "copy": copy, "echo": echo, "chat": chat}


def document(rng: Random, kinds: dict[str, float], words: int) -> str:
    """One document of about `words` words, of a kind drawn with the weights of `kinds`.

    Raises:
        ValueError: an unknown kind.
    """
    if unknown := set(kinds) - set(_WRITERS):
        raise ValueError(f"unknown kind of document {min(unknown)!r}; choose from {', '.join(KINDS)}")
    kind = rng.choices(list(kinds), list(kinds.values()))[0]
    return _WRITERS[kind](rng, words)


def documents(
    seed: int,
    kinds: tuple[str, ...] | dict[str, float] = KINDS,
    min_words: int = 30,
    max_words: int = 260,
) -> Iterator[str]:
    """An endless stream of documents, the same for the same arguments.

    Args:
        seed: below 2**31 for training, from 2**31 up for held-out text.
        kinds: kinds to mix, evenly, or with the given weights.
        min_words, max_words: bounds of the target length in space-separated words.
    """
    weights = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
    rng = Random(seed)
    while True:
        yield document(rng, weights, rng.randint(min_words, max_words))


def instructions(seed: int, min_words: int = 30, max_words: int = 200) -> Iterator[dict[str, str]]:
    """An endless stream of instruction records (see `instruction`), for fine-tuning; seeds as for `documents`."""
    rng = Random(seed)
    while True:
        yield instruction(rng, rng.randint(min_words, max_words))


def held_out_text(
    characters: int, seed: int = TEST_SEED, kinds: tuple[str, ...] = HELD_OUT_KINDS, max_words: int = 260
) -> list[str]:
    """Documents the base never saw, `characters` characters or a little more in all."""
    texts: list[str] = []
    total = 0
    for text in documents(seed, kinds, max_words=max_words):
        if total >= characters:
            return texts
        texts.append(text)
        total += len(text)


def recall_probe(
    tokenizer: "PreTrainedTokenizerBase", distance: int, count: int, seed: int = TEST_SEED, pairs: int = 4
) -> list[Probe]:
    """Transcripts that make `pairs` settings, go on with other lines and ask for one of the settings.

    Args, returns and raises as `liger_cli.shipped.probes.recall_probe`: `distance` tokens lie between the end of the
    stated value and the start of the answer, exactly.
    """
    rng = Random(seed * 1009 + distance)
    start = _start(tokenizer)
    return [_probe(tokenizer, distance, pairs, rng, start) for _ in range(count)]


def _start(tokenizer) -> list[int]:
    start = tokenizer("a")["input_ids"][:1]
    return start if start == [tokenizer.bos_token_id] else []


def _probe(tokenizer, distance: int, pairs: int, rng: Random, start: list[int]) -> Probe:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for _ in range(500):
        counters, keys = _split_keys(rng)
        console = Console(rng, counters)
        settings = sample_settings(rng, pairs, keys, most=len(keys))
        asked = rng.randrange(pairs)
        setting = settings[asked]
        later = encode("\n" + "".join(other.statement for other in settings[asked + 1 :]))
        question = encode(f"? {setting.prefix}")
        filler = fill(lambda console=console: encode(console.line()), distance - len(later) - len(question))
        if filler is None:
            continue
        before = "".join(other.statement for other in settings[:asked])
        prompt = encode(f"{console.line()}{before}{setting.command}{setting.prefix}")
        answer = encode(f" {setting.value}")
        return start + prompt + answer + later + filler + question, answer
    raise ValueError(f"no probe with {pairs} settings fits into a distance of {distance} tokens")


def copy_probe(
    tokenizer: "PreTrainedTokenizerBase", distance: int, count: int, seed: int = TEST_SEED, scored: int = 8
) -> list[Probe]:
    """A block of about `distance` tokens and the block once more, up to its last `scored` tokens, the answer.

    The answer starts exactly `distance` tokens after the end of its first occurrence.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    rng = Random(seed * 1013 + distance)
    start, head, again = _start(tokenizer), encode("begin\n"), encode("end\nagain\n")
    scored = min(scored, distance // 2)
    out: list[Probe] = []
    while len(out) < count:
        console = Console(rng, _split_keys(rng)[0])
        block = fill(lambda console=console: encode(_block(rng, console, 4)[0]), distance + scored - len(again))
        if block is not None:
            out.append((start + head + block + again + block[:-scored], block[-scored:]))
    return out
