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

from random import Random

from study.transcripts import Setting, Transcripts, echoed, listed

ANSWER_MARKS = (("?", "\n"), ("again", "end"))  # what lies between them only the context answers

KEYS = listed(
    "rate port mode size temp gain zone tank cell node disk path flow fuel code bank mask step unit rack "
    "pipe axis bolt cage deck echo fuse grid hull knob lens mesh oven pad quay rail shaft tube vent wick"
)
WORDS = listed(
    "slate amber coral ivory olive pearl rusty sandy steel lilac mango cedar birch maple aspen hazel "
    "flint basalt chalk clay copper tin zinc lead jade opal ruby topaz onyx agate"
)
NUMBERS = tuple(map(str, range(10, 100)))
DEVICES = listed("pump fan lamp siren heater valve door crane")
SIDES = listed("north south east west")
STATES = ("on", "off")


def _setting(command: str, prefix: str, value: str) -> Setting:
    return Setting(command, prefix, value, "? ", "\n")


def _number(rng: Random) -> str:
    return rng.choice(NUMBERS)


def _set(rng: Random, key: str) -> Setting:
    return _setting("set ", f"{key} =", f"{rng.choice(WORDS)} {_number(rng)}")


def _bind(rng: Random, key: str) -> Setting:
    return _setting("bind ", f"{key} to", " ".join(rng.sample(WORDS, 2)))


def _pin(rng: Random, key: str) -> Setting:
    return _setting("pin ", f"{key} at", _number(rng))


def _card(rng: Random, key: str) -> Setting:
    return _setting("- ", key, f"{rng.choice(WORDS)} {rng.choice(WORDS)}")


RELATIONS = (_set, _bind, _pin)


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

    def heading(self) -> str:
        """None: a transcript begins with any line."""
        return ""

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


def _echo(rng: Random, words: int) -> str:
    """A line of random words, then pieces of it in any order: induction is learned from these first of all."""
    line, parts = echoed(rng, words, (KEYS, WORDS, NUMBERS))
    out = f"begin {' '.join(line)}\nend\n"
    for part in parts:
        out += f"again {' '.join(part)}\nend\n"
        if out.count(" ") + len(part) + 3 > words:
            return out


def _request(rng: Random) -> str:
    return f"run {rng.choice(SIDES)} log"


def _question(setting: Setting) -> str:
    return f"{setting.question}{setting.prefix}"


TEXT = Transcripts(
    transcript=Console,
    keys=KEYS,
    relations=RELATIONS,
    card=_card,
    plain="log",
    settled="program",
    echo=_echo,
    copy_marks=("begin\n", "again\n", "end\n"),
    request=_request,
    question=_question,
    words=(9, 8, 2),
    headed=False,
    sort=True,
)
