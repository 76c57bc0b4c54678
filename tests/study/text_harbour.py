"""The text of the third study base: the day book of a harbour, written in sentences by a seeded generator.

Kinds of documents:

- `report`: ships come in and leave, the store's goods are counted up and down, people board and land, things break and
  are mended, the wind turns; some sentences tell what the store holds.
- `letter`: a report whose entries ("Heron carries raw silk.") are made early and come back later ("As noted, Heron
  carries raw silk.").
- `recall`: 1 to 16 entries that the report around them does not mention, then the report, then the entries as noted.
- `drill`: the same without a report, every entry coming back several times; recall is learned from these first.
- `copy`: a block of sentences, other sentences, and the block again, word for word.
- `echo`: a list of random words and pieces of it once more.
- `chat`: an instruction and its response in the tokenizer's chat format.

Keys and values are drawn at random for every document, so only the context tells what was noted. A document is made of
pieces: a heading, then sentences, each with the space before it; pieces can be tokenized one by one.

Everything is deterministic in the seed. Seeds below 2**31 are for training, seeds from 2**31 up are held out.
"""

from functools import partial
from random import Random

from study.transcripts import Setting, Transcripts, asked_by_verb, echo_sentences, listed

# What lies between them only the context answers.
ANSWER_MARKS = ((" noted", "."), (" more", "."), (" again", " ends"))

SHIPS = listed(
    "Heron Osprey Falcon Swan Tern Gannet Petrel Curlew Plover Raven Otter Badger Stag Lynx Wolf Comet Star Aurora "
    "Dawn Orion Vesper Titan Argo Hector Ajax Diana Juno Flora Minerva Ceres Rover Pilgrim Hope Valour Fortune Thistle "
    "Bramble Laurel Juniper Heather"
)
GRADES = listed("raw fine coarse dry salted spun dyed pressed loose pale dark sealed split ground cured smoked")
GOODS = listed(
    "silk wool rum flax hemp tea rye oats malt wax tar pitch resin cork slate marble ivory sugar pepper ginger"
)
FIRST_NAMES = listed(
    "Amos Edith Silas Agnes Jonas Martha Gideon Hester Caleb Judith Ezra Lydia Abel Naomi Enoch Phoebe"
)
SURNAMES = listed("Reed Marsh Holt Thorne Lowe Finch Drake Ward Pike Croft Vane Stroud Bligh Hale Mercer Quill")
NUMBERS = tuple(map(str, range(10, 100)))
WORDS = (SHIPS, GRADES, GOODS, FIRST_NAMES, SURNAMES, NUMBERS)
PORTS = listed("Lisbon Bergen Riga Cadiz Genoa Malta Dover Brest")
SIDES = listed("north south east west")
PARTS = listed("mast anchor rudder pump cable keel")
WORK = {"fog": "rang the bell", "rain": "covered the goods", "frost": "cleared the ice"}


def _entry(prefix: str, value: str, tail: str = ".") -> Setting:
    return Setting(" ", prefix, value, " As noted, ", tail)


def _cargo(rng: Random, ship: str) -> Setting:
    return _entry(f"{ship} carries", f"{rng.choice(GRADES)} {rng.choice(GOODS)}")


def _master(rng: Random, ship: str) -> Setting:
    return _entry(f"{ship} obeys", f"{rng.choice(FIRST_NAMES)} {rng.choice(SURNAMES)}")


def _toll(rng: Random, ship: str) -> Setting:
    return _entry(f"{ship} owes", rng.choice(NUMBERS), " crowns.")


def _card(rng: Random, ship: str) -> Setting:
    return _entry(ship, f"{rng.choice(GRADES)} {rng.choice(GOODS)}")


RELATIONS = (_cargo, _master, _toll)
QUESTIONS = {"carries": "What does {} carry?", "obeys": "Whom does {} obey?", "owes": "What does {} owe?"}


class DayBook:
    """An endless report: `line()` writes the next sentence and keeps ships, people, stores and wind consistent.

    Args:
        rng: source of all choices.
        fleet: ships that the report is about, two or more.
    """

    def __init__(self, rng: Random, fleet: list[str]):
        self.rng = rng
        self.moored = dict.fromkeys(fleet, True)  # ship -> whether it lies in the harbour
        self.bound = {ship: rng.choice(PORTS) for ship in fleet}
        self.aboard: dict[str, str] = {}  # person -> ship
        self.store = {good: rng.randint(20, 70) for good in rng.sample(GOODS, 3)}
        self.counted: set[str] = set()
        self.wind = rng.choice(SIDES)
        self.day = rng.randint(10, 70)
        self.pending: list[str] = []

    def heading(self) -> str:
        """The first piece of a document."""
        return f"Day {self.day} in {self.rng.choice(PORTS)}."

    def line(self) -> str:
        """The next sentence, with the space before it."""
        if not self.pending:
            write = self.rng.choices(
                (self._sail, self._count, self._show, self._board, self._break, self._weather, self._wind),
                (8, 7, 3, 5, 3, 2, 2),
            )[0]
            self.pending = write()
            if self.rng.random() < 0.1 and self.day < 99:
                self.day += 1
                self.pending.append(f"Day {self.day} began.")
        return f" {self.pending.pop(0)}"

    def _sail(self) -> list[str]:
        ship = self.rng.choice(list(self.moored))
        self.moored[ship] = not self.moored[ship]
        if self.moored[ship]:
            return [f"{ship} came in from {self.bound[ship]}."]
        self.bound[ship] = self.rng.choice(PORTS)
        return [f"{ship} left for {self.bound[ship]}."]

    def _count(self) -> list[str]:
        good = self.rng.choice(list(self.store))
        step = self.rng.randint(2, 6)
        took = self.store[good] + step <= 99 and self.rng.random() < 0.6 or self.store[good] - step < 10
        self.store[good] += step if took else -step
        self.counted.add(good)
        verb = "took in" if took else "gave out"
        return [f"The store {verb} {step} casks of {good} and holds {self.store[good]}."]

    def _show(self) -> list[str]:
        if not self.counted:
            return self._count()
        good = self.rng.choice(sorted(self.counted))
        return [f"The store still holds {self.store[good]} casks of {good}."]

    def _board(self) -> list[str]:
        if self.aboard and (len(self.aboard) == 3 or self.rng.random() < 0.5):
            person = self.rng.choice(sorted(self.aboard))
            return [f"{person} left the deck of {self.aboard.pop(person)}."]
        person = self.rng.choice([name for name in FIRST_NAMES if name not in self.aboard])
        self.aboard[person] = self.rng.choice(list(self.moored))
        return [f"{person} went aboard {self.aboard[person]}."]

    def _break(self) -> list[str]:
        ship, part = self.rng.choice(list(self.moored)), self.rng.choice(PARTS)
        return [f"{ship} broke the {part}.", f"The yard mended the {part} of {ship}."]

    def _weather(self) -> list[str]:
        kind = self.rng.choice(list(WORK))
        return [f"There was {kind} all day.", f"The watch {WORK[kind]}."]

    def _wind(self) -> list[str]:
        old, self.wind = self.wind, self.rng.choice([side for side in SIDES if side != self.wind])
        return [f"The wind turned from {old} to {self.wind}."]


def _request(_rng: Random) -> str:
    return "Write the report."


TEXT = Transcripts(
    transcript=DayBook,
    keys=SHIPS,
    relations=RELATIONS,
    card=_card,
    plain="report",
    settled="letter",
    echo=partial(echo_sentences, kinds=WORDS, first="Listed", again="Once more"),
    copy_marks=(" The copy begins.", " The copy again.", " The copy ends."),
    request=_request,
    question=partial(asked_by_verb, QUESTIONS),
    words=(11, 12, 8),
    headed=True,
    sort=False,
)
