"""The text of the last study base: the script of a play, speech and stage directions, written by a seeded generator.

Kinds of documents:

- `scene`: players enter, leave and greet each other, props change hands, debts are paid from purses that run down and
  fill up, candles are lit and put out, someone knocks and is let in; some directions tell who has what.
- `act`: a scene in which asides ("Aside: Viola loves dark velvet.") are made early and sung by the chorus later
  ("Chorus: Viola loves dark velvet.").
- `recall`: 1 to 16 asides about people whom the scene does not mention, then the scene, then the chorus.
- `drill`: the same without a scene, every aside sung several times; recall is learned from these first.
- `copy`: a song of pieces, other pieces, and the song again, word for word.
- `echo`: a list of random words and pieces of it as a refrain.
- `chat`: an instruction and its response in the tokenizer's chat format.

Keys and values are drawn at random for every document, so only the context tells what the chorus sings. A document is
made of pieces: a heading, then sentences, each with the space before it; pieces can be tokenized one by one.

Everything is deterministic in the seed. Seeds below 2**31 are for training, seeds from 2**31 up are held out.
"""

from functools import partial
from random import Random

from study.transcripts import Setting, Transcripts, asked_by_verb, echo_sentences, listed

# What lies between them only the context answers.
ANSWER_MARKS = ((" Chorus", "."), (" Refrain", "."), (" again", " ends"))

PLAYERS = listed(
    "Viola Orsino Portia Rosalind Celia Hermia Helena Lysander Imogen Miranda Prospero Ariel Benedick Beatrice Hero "
    "Claudio Antonio Sebastian Olivia Feste Malvolio Toby Maria Duncan Banquo Edgar Edmund Kent Regan Cordelia Juliet "
    "Paris Tybalt Romeo Bianca Petra Lucentio Gremio Tranio Bruno"
)
LOOKS = listed("dark plain torn gilded faded bright heavy thin new worn striped soft stiff grey broken rich")
THINGS = listed(
    "velvet lace satin leather brocade feathers pearls ribbons candles mirrors masks trumpets drums lutes swords "
    "crowns roses lilies ivy apples"
)
TITLES = listed("Lord Lady Captain Doctor Friar Widow Squire Baron Count Dame Page Judge Nurse Bishop Abbot Mayor")
HOUSES = listed("Arden Vernon Talbot Percy Clifford Neville Warwick Bourbon Salis Orlean Mowbray Ross Lennox Angus Ely")
NUMBERS = tuple(map(str, range(10, 100)))
WORDS = (PLAYERS, LOOKS, THINGS, TITLES, HOUSES, NUMBERS)
PLACES = listed("garden cellar tavern chapel forest courtyard tent street")
PROPS = listed("letter lantern dagger key ring cup")
TIMES = listed("morrow evening night day")


def _aside(prefix: str, value: str, tail: str = ".") -> Setting:
    return Setting(" Aside: ", prefix, value, " Chorus: ", tail)


def _loves(rng: Random, player: str) -> Setting:
    return _aside(f"{player} loves", f"{rng.choice(LOOKS)} {rng.choice(THINGS)}")


def _serves(rng: Random, player: str) -> Setting:
    return _aside(f"{player} serves", f"{rng.choice(TITLES)} {rng.choice(HOUSES)}")


def _sleeps(rng: Random, player: str) -> Setting:
    return _aside(f"{player} sleeps", rng.choice(NUMBERS), " hours.")


def _card(rng: Random, player: str) -> Setting:
    return _aside(player, f"{rng.choice(LOOKS)} {rng.choice(THINGS)}")


RELATIONS = (_loves, _serves, _sleeps)
QUESTIONS = {"loves": "What does {} love?", "serves": "Whom does {} serve?", "sleeps": "How long does {} sleep?"}


class Scene:
    """An endless scene: `line()` writes the next sentence and keeps players, props, purses and candles consistent.

    Args:
        rng: source of all choices.
        cast: players of the scene, two or more.
    """

    def __init__(self, rng: Random, cast: list[str]):
        self.rng = rng
        self.cast = cast
        self.on_stage = dict.fromkeys(cast, True)
        self.holders = {prop: rng.choice(cast) for prop in rng.sample(PROPS, 3)}
        self.given: set[str] = set()
        self.purses = {player: rng.randint(30, 70) for player in cast}
        self.candles = rng.randint(10, 40)
        self.number = rng.randint(10, 70)
        self.pending: list[str] = []

    def heading(self) -> str:
        """The first piece of a document."""
        return f"Scene {self.number}, the {self.rng.choice(PLACES)}."

    def line(self) -> str:
        """The next sentence, with the space before it."""
        if not self.pending:
            write = self.rng.choices(
                (self._walk, self._give, self._show, self._pay, self._greet, self._light, self._knock, self._scene),
                (5, 5, 3, 7, 3, 4, 2, 1),
            )[0]
            self.pending = write()
        return f" {self.pending.pop(0)}"

    def _other(self, player: str) -> str:
        return self.rng.choice([other for other in self.cast if other != player])

    def _walk(self) -> list[str]:
        player = self.rng.choice(self.cast)
        self.on_stage[player] = not self.on_stage[player]
        return [f"{'Enter' if self.on_stage[player] else 'Exit'} {player}."]

    def _give(self) -> list[str]:
        prop = self.rng.choice(list(self.holders))
        giver = self.holders[prop]
        self.holders[prop] = self._other(giver)
        self.given.add(prop)
        return [f"{giver} hands the {prop} to {self.holders[prop]}."]

    def _show(self) -> list[str]:
        if not self.given:
            return self._give()
        prop = self.rng.choice(sorted(self.given))
        return [f"{self.holders[prop]} lifts the {prop}."]

    def _pay(self) -> list[str]:
        player = self.rng.choice(self.cast)
        coins = self.rng.randint(2, 6)
        wins = self.purses[player] - coins < 10 or self.purses[player] + coins <= 99 and self.rng.random() < 0.5
        self.purses[player] += coins if wins else -coins
        return [f"{player} {'wins' if wins else 'loses'} {coins} coins and counts {self.purses[player]}."]

    def _greet(self) -> list[str]:
        player = self.rng.choice(self.cast)
        other, time = self._other(player), self.rng.choice(TIMES)
        return [f"{player}: Good {time}, {other}.", f"{other}: Good {time}, {player}."]

    def _light(self) -> list[str]:
        lit = self.candles <= 10 or self.candles < 99 and self.rng.random() < 0.5
        self.candles += 1 if lit else -1
        return [f"One light {'more' if lit else 'less'}, {self.candles} burn."]

    def _knock(self) -> list[str]:
        player = self.rng.choice(self.cast)
        return ["A knock.", f"{player}: Who is there?", "The door opens.", "Nobody is there."][
            : self.rng.choice((2, 4))
        ]

    def _scene(self) -> list[str]:
        if self.number == 99:
            return self._light()
        self.number += 1
        return [f"Scene {self.number}, the {self.rng.choice(PLACES)}."]


def _request(_rng: Random) -> str:
    return "Write the scene."


TEXT = Transcripts(
    transcript=Scene,
    keys=PLAYERS,
    relations=RELATIONS,
    card=_card,
    plain="scene",
    settled="act",
    echo=partial(echo_sentences, kinds=WORDS, first="Sung", again="Refrain"),
    copy_marks=(" The song begins.", " The song again.", " The song ends."),
    request=_request,
    question=partial(asked_by_verb, QUESTIONS),
    words=(10, 11, 9),
    headed=True,
    sort=False,
)
