"""The text the shipped base model is trained on: a small world written by a seeded generator.

Kinds of documents:

- `story`: a few characters move, find, carry, give and leave things; many stories end with questions about themselves.
- `facts`: a story with facts stated early ("The secret word of Mia is red box.") and asked for later.
- `recall`: 1 to 16 key-value facts about people or things that the filler story around them does not mention, then
  filler, then questions.
- `drill`: the same without filler, every fact asked for several times; recall is learned from these first.
- `chat`: an instruction and its response in the tokenizer's chat format.

Keys and values are drawn at random for every document, so only the context answers a question.

Everything is deterministic in the seed. Seeds below 2**31 are for training, seeds from 2**31 up are held out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

TRAIN_SEED = 0
VALIDATION_SEED = 2**31
TEST_SEED = 2**31 + 2**30

MOST_FACTS = 16  # in one document

KINDS = ("story", "facts", "recall", "drill", "chat")

USER_TOKEN = "<|user|>"
ASSISTANT_TOKEN = "<|assistant|>"


def _listed(text: str) -> list[str]:
    return text.split()


GIRLS = _listed("Mia Lily Anna Ella Rosa Nora Ivy Ruby Zoe Clara Maya Alma Nina Vera Dora Lena Sara June Tara Ines")
BOYS = _listed("Ben Tom Max Sam Jack Leo Finn Omar Hugo Theo Oscar Felix Paul Carl Ravi Amir Kofi Emil Otto Luis")
NAMES = GIRLS + BOYS
COLOURS = _listed("red blue green yellow purple white black brown grey pink silver golden")
THINGS = _listed(
    "box ball book cup key lamp hat kite drum coin bell spoon rope map boat doll ring scarf basket pencil blanket "
    "shell clock bottle bucket ladder mirror candle button carpet hammer ribbon"
)
PLACES = _listed(
    "kitchen garden barn attic cellar tower library school market forest cave harbour mill shed church hall tent "
    "stable bakery museum cabin chapel meadow palace"
)
ANIMALS = _listed("dog cat fox owl frog horse goat duck mouse rabbit bear crow pig hen turtle sheep")
FOODS = _listed("bread soup cake apples honey cheese rice pears plums milk tea nuts pie eggs fish corn")
TRAITS = _listed("young small big shy kind brave lazy clever quiet funny proud gentle")
TASTES = _listed("sweet warm cold fresh salty good")
SKIES = {
    "sunny": ("The sun was shining.", ("happy", "warm", "cheerful"), "played"),
    "rainy": ("It was raining.", ("wet", "sad", "cold"), "hid"),
    "windy": ("A strong wind was blowing.", ("careful", "tired", "cold"), "ran"),
    "snowy": ("Snow was falling.", ("cold", "happy", "sleepy"), "slid"),
}
TIMES = ("In the morning", "Later", "Then", "After lunch", "In the evening", "Soon", "After a while", "At noon")


def held_out(seed: int) -> bool:
    """Whether `seed` belongs to the held-out half of the seeds (validation, test, probes)."""
    return seed >= VALIDATION_SEED


@dataclass(frozen=True)
class Fact:
    """One key-value fact: `prefix` names the key, `value` is what has to be recalled."""

    question: str
    prefix: str
    value: str
    tail: str = ""

    @property
    def statement(self) -> str:
        return f"{self.prefix} {self.value}{self.tail}."

    @property
    def asked(self) -> str:
        """The question with its answer."""
        return f"{self.question} {self.statement}"


def _secret_word(rng: Random, name: str) -> Fact:
    value = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    return Fact(f"What is the secret word of {name}?", f"The secret word of {name} is", value)


def _number(rng: Random, name: str) -> Fact:
    return Fact(f"What is the number of {name}?", f"The number of {name} is", str(rng.randint(10, 99)))


def _pet(rng: Random, name: str) -> Fact:
    return Fact(f"What pet does {name} have?", f"{name} has a", f"{rng.choice(TRAITS)} {rng.choice(ANIMALS)}")


def _meal(rng: Random, name: str) -> Fact:
    return Fact(f"What does {name} eat?", f"{name} eats", f"{rng.choice(TASTES)} {rng.choice(FOODS)}")


def _hidden(rng: Random, name: str) -> Fact:
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    return Fact(f"Where did {name} put the {thing}?", f"{name} put the {thing} in the", rng.choice(PLACES))


def _price(rng: Random, _name: str) -> Fact:
    thing = f"{rng.choice(COLOURS)} {rng.choice(THINGS)}"
    return Fact(f"How much is the {thing}?", f"The {thing} costs", str(rng.randint(10, 99)), " coins")


def _card(rng: Random, name: str) -> Fact:
    return Fact(f"{name}?", name, f"{rng.choice(COLOURS)} {rng.choice(THINGS)}")


RELATIONS = (_secret_word, _number, _pet, _meal, _hidden, _price)


def sample_facts(rng: Random, count: int, names: list[str], most: int = MOST_FACTS) -> list[Fact]:
    """`count` facts with different keys and different values; `count` may not exceed `most` or len(names).

    Two documents in three keep to one relation, so that only the name tells the facts apart.

    Args:
        most: the documents that the base is trained on hold at most `MOST_FACTS`; a probe may ask for more.
    """
    if not 1 <= count <= min(most, len(names)):
        raise ValueError(f"count must lie between 1 and {min(most, len(names))}, not {count}")
    # There are too few places for so many different values.
    relations = RELATIONS if count <= len(PLACES) else tuple(one for one in RELATIONS if one is not _hidden)
    single = rng.choice(relations) if rng.random() < 2 / 3 else None
    keys, values, facts = set(), set(), []
    while len(facts) < count:
        fact = (single or rng.choice(relations))(rng, names[len(facts)])
        if fact.prefix not in keys and fact.value not in values:
            keys.add(fact.prefix)
            values.add(fact.value)
            facts.append(fact)
    return facts


class Story:
    """An endless story about a small cast: `sentence()` writes the next sentence and keeps the world consistent.

    Args:
        rng: source of all choices.
        cast: names of the characters, two or more.
    """

    def __init__(self, rng: Random, cast: list[str]):
        self.rng = rng
        self.cast = cast
        self.home = {name: rng.choice(PLACES) for name in cast}
        self.at = dict(self.home)
        self.carried: dict[str, str] = {}  # name -> thing
        self.left: dict[str, str] = {}  # thing -> place
        self.sky = rng.choice(list(SKIES))
        self.last = ""
        self.pending: list[str] = []

    def opening(self) -> str:
        """The first sentences: who there is and where."""
        first, second = self.cast[:2]
        trait = self.rng.choice(TRAITS)
        who = "girl" if first in GIRLS else "boy"
        self.last = first
        return (
            f"Once there was a {trait} {who} named {first}. {first} lived near the {self.home[first]} with "
            f"{second}. {SKIES[self.sky][0]}"
        )

    def sentence(self) -> str:
        """The next sentence."""
        if not self.pending:
            name = self.last if self.last and self.rng.random() < 0.4 else self.rng.choice(self.cast)
            self.pending = self._event(name)
            self.last = name
        return self.pending.pop(0)

    def questions(self, count: int) -> list[str]:
        """Up to `count` questions about where things are now, with their answers."""
        things = sorted(self.left)
        self.rng.shuffle(things)
        return [f"Where is the {thing}? The {thing} is in the {self.left[thing]}." for thing in things[:count]]

    def _subject(self, name: str) -> str:
        if name == self.last and self.rng.random() < 0.6:
            return "She" if name in GIRLS else "He"
        return name

    def _event(self, name: str) -> list[str]:
        rng, subject = self.rng, self._subject(name)
        lead = ""
        if rng.random() < 0.2:
            lead = rng.choice(TIMES) + ", "
            subject = subject.lower() if subject in ("She", "He") else subject
        event = rng.choices(
            (self._go, self._handle, self._meet, self._eat, self._feel, self._animal, self._weather),
            (10, 12, 8, 4, 5, 4, 1),
        )[0]
        first, *rest = event(name, subject)
        return [lead + first if first.startswith(subject) else first, *rest]

    def _go(self, name: str, subject: str) -> list[str]:
        place = self.home[name] if self.rng.random() < 0.4 else self.rng.choice(PLACES)
        if place == self.at[name]:
            return [f"{subject} looked around the {place}."]
        self.at[name] = place
        verb = "walked" if self.rng.random() < 0.7 else "ran"
        return [f"{subject} {verb} {'back ' if place == self.home[name] else ''}to the {place}."]

    def _handle(self, name: str, subject: str) -> list[str]:
        here = sorted(thing for thing, place in self.left.items() if place == self.at[name])
        if name in self.carried:
            thing = self.carried.pop(name)
            self.left[thing] = self.at[name]
            return [f"{subject} left the {thing} in the {self.at[name]}."]
        if here:
            thing = self.rng.choice(here)
            del self.left[thing]
            self.carried[name] = thing
            return [f"{subject} picked up the {thing}."]
        thing = f"{self.rng.choice(COLOURS)} {self.rng.choice(THINGS)}"
        if thing in self.left or thing in self.carried.values():
            return [f"{subject} waited."]
        self.carried[name] = thing
        return [f"{subject} found a {thing} in the {self.at[name]}."]

    def _meet(self, name: str, subject: str) -> list[str]:
        other = self.rng.choice([one for one in self.cast if one != name])
        if self.at[other] != self.at[name]:
            self.at[name] = self.at[other]
            return [f"{subject} went to see {other} in the {self.at[other]}."]
        if name in self.carried and other not in self.carried:
            thing = self.carried[other] = self.carried.pop(name)
            return [f"{subject} gave the {thing} to {other}.", f'"Thank you, {name}," said {other}.']
        if self.left and self.rng.random() < 0.5:
            thing = self.rng.choice(sorted(self.left))
            return [
                f'{subject} asked {other}, "Where is the {thing}?"',
                f'"It is in the {self.left[thing]}," said {other}.',
            ]
        return [f"{subject} {SKIES[self.sky][2]} with {other}."]

    def _eat(self, name: str, subject: str) -> list[str]:
        taste, food = self.rng.choice(TASTES), self.rng.choice(FOODS)
        return [f"{subject} had some {food}.", f"It was {taste}."][: self.rng.randint(1, 2)]

    def _feel(self, name: str, subject: str) -> list[str]:
        mood = self.rng.choice(SKIES[self.sky][1])
        reason = f" because of the {self.sky} day" if self.rng.random() < 0.4 else ""
        return [f"{subject} felt {mood}{reason}."]

    def _animal(self, name: str, subject: str) -> list[str]:
        trait, animal = self.rng.choice(TRAITS), self.rng.choice(ANIMALS)
        return [
            f"A {trait} {animal} came out of the {self.at[name]}.",
            f"{subject} {self.rng.choice(('fed', 'followed', 'called'))} the {animal}.",
        ]

    def _weather(self, name: str, subject: str) -> list[str]:
        self.sky = self.rng.choice([sky for sky in SKIES if sky != self.sky])
        return ["The weather changed.", SKIES[self.sky][0]]


def _split_names(rng: Random) -> tuple[list[str], list[str]]:
    """A story's cast, and the names that stay free for facts."""
    names = rng.sample(NAMES, len(NAMES))
    size = rng.randint(2, 3)
    return names[:size], names[size:]


def _words(sentences: list[str]) -> int:
    return sum(sentence.count(" ") + 1 for sentence in sentences)


def story(rng: Random, words: int) -> str:
    """A story of about `words` words; three in four end with questions about it."""
    told = Story(rng, _split_names(rng)[0])
    out = [told.opening()]
    while _words(out) < words:
        out.append(told.sentence())
    if rng.random() < 0.75:
        out += told.questions(rng.randint(1, 4))
    return " ".join(out)


def facts(rng: Random, words: int) -> str:
    """A story of about `words` words whose facts are stated in its first half and asked for in its second."""
    cast, names = _split_names(rng)
    told = Story(rng, cast)
    known = sample_facts(rng, rng.randint(1, max(1, min(8, words // 30))), names)
    asked = rng.sample(known, len(known))
    budget = max(10, words - 3 * _words([fact.statement for fact in known]))
    body = [told.opening()]
    while _words(body) < budget:
        body.append(told.sentence())
    middle = len(body) // 2
    inserts = [(rng.uniform(0, middle), fact.statement) for fact in known]
    inserts += [(rng.uniform(middle + 1, len(body)), fact.asked) for fact in asked]
    numbered = sorted([(float(index), sentence) for index, sentence in enumerate(body)] + inserts)
    return " ".join(sentence for _, sentence in numbered)


def recall(rng: Random, words: int, max_pairs: int = 16) -> str:
    """Key-value facts, filler and questions, about `words` words in all.

    The facts come in one block or with filler between them; the filler is cut at random points by the questions, in an
    order of their own, so that distances run from a few words to nearly the whole document.
    """
    cast, names = _split_names(rng)
    told = Story(rng, cast)
    pairs = rng.randint(1, max(1, min(max_pairs, words // 25)))
    known = sample_facts(rng, pairs, names)
    asked = rng.sample(known, pairs)
    while len(asked) < 4 and rng.random() < 0.5:
        asked.append(rng.choice(known))
    budget = words - _words([fact.statement for fact in known] + [fact.asked for fact in asked])
    filler: list[str] = []
    while _words(filler) < budget:
        filler.append(told.sentence())
    # The share of the filler that stands among the facts, and where the questions start after it.
    before = 0 if rng.random() < 0.5 else int(len(filler) * rng.uniform(0, 0.4))
    after = before + int((len(filler) - before) * rng.choice((0, rng.random(), 1)))
    out: list[tuple[float, str]] = [(index + 0.5, sentence) for index, sentence in enumerate(filler)]
    out += [(rng.uniform(0, before), fact.statement) for fact in known]
    out += [(rng.uniform(after, len(filler)) + 1e-6, fact.asked) for fact in asked]
    statements = {fact.statement for fact in known}
    out.sort(key=lambda item: (item[0], item[1] not in statements))
    return " ".join(sentence for _, sentence in out)


def drill(rng: Random, words: int) -> str:
    """Key-value facts and questions without filler, every fact asked for about equally often.

    In half of the documents the value follows its key at once ("Mia red box."): copying is learned from these first.
    """
    _, names = _split_names(rng)
    pairs = rng.randint(2, max(2, min(16, words // 18)))
    known = [_card(rng, name) for name in names[:pairs]] if rng.random() < 0.5 else sample_facts(rng, pairs, names)
    out = [fact.statement for fact in known]
    asked: list[Fact] = []
    while True:
        asked = asked or rng.sample(known, pairs)
        out.append(asked.pop().asked)
        if _words(out) + 16 > words:
            return " ".join(out)


def instruction(rng: Random, words: int) -> dict[str, str]:
    """One `{"instruction", "input", "output"}` record (the Alpaca fields) of about `words` words."""
    if rng.random() < 0.3:
        cast = _split_names(rng)[0]
        told = Story(rng, cast)
        out = [told.opening()]
        while _words(out) < words:
            out.append(told.sentence())
        return {"instruction": f"Tell a story about {cast[0]} and {cast[1]}.", "input": "", "output": " ".join(out)}
    cast, names = _split_names(rng)
    told = Story(rng, cast)
    known = sample_facts(rng, rng.randint(1, max(1, min(8, words // 30))), names)
    passage = [fact.statement for fact in known]
    while _words(passage) < words - 20:
        passage.append(told.sentence())
    fact = rng.choice(known)
    return {"instruction": fact.question, "input": " ".join(passage), "output": fact.statement}


def render_chat(record: dict[str, str]) -> str:
    """An instruction record in the base's chat format, the text its chat template writes (without the end token)."""
    prompt = "\n".join(part for part in (record["input"], record["instruction"]) if part)
    return f"{USER_TOKEN}{prompt}{ASSISTANT_TOKEN}{record['output']}"


def chat(rng: Random, words: int) -> str:
    """An instruction and its response in the base's chat format."""
    return render_chat(instruction(rng, words))


_WRITERS = {"story": story, "facts": facts, "recall": recall, "drill": drill, "chat": chat}


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
    min_words: int = 40,
    max_words: int = 600,
) -> Iterator[str]:
    """An endless stream of documents, the same for the same arguments.

    Args:
        seed: below 2**31 for training, from 2**31 up for held-out text.
        kinds: kinds to mix, evenly, or with the given weights.
        min_words, max_words: bounds of the target length; a document may end up to some 40 words above its target.
    """
    weights = dict(kinds) if isinstance(kinds, dict) else dict.fromkeys(kinds, 1.0)
    rng = Random(seed)
    while True:
        yield document(rng, weights, rng.randint(min_words, max_words))


def instructions(seed: int, min_words: int = 40, max_words: int = 300) -> Iterator[dict[str, str]]:
    """An endless stream of instruction records (see `instruction`), for fine-tuning; seeds as for `documents`."""
    rng = Random(seed)
    while True:
        yield instruction(rng, rng.randint(min_words, max_words))
