"""The layouts of training data: which columns of a row are read, and what documents come out of it."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from liger_cli.system.errors import UsageError
from liger_cli.training.conversations import (
    Conversation,
    Document,
    conversation_documents,
    knows,
    parsed,
    read_conversation,
    reserved,
    template_of,
)

CHATS = ("messages", "conversations", "conversation", "dialogue", "dialog", "turns", "items")
INSTRUCTIONS, INPUTS = ("instruction", "question", "query"), ("input", "context")
PROMPTS = ("prompt", "inputs")
ANSWERS = ("output", "completion", "response", "answer", "target", "targets")
TEXTS = ("text", "content")
SYSTEMS = ("system", "system_prompt")
SIDES = {"prompt": "user", "output": "assistant"}
EMPTY = (None, "", [], {})
REASONS = 20  # told apart; what more there are is counted together
INPUT_PROMPT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)


@dataclass(frozen=True)
class Layout:
    """How the rows of a source are read.

    Attributes:
        name: `messages` (a conversation), `alpaca` (instruction, input, output), `prompt` (a prompt and its completion,
            as text or as messages) or `text`.
        columns: those that are read: what each is for -> its name.
    """

    name: str
    columns: dict[str, str]


@dataclass
class Tally:
    """What of a source was not used.

    Attributes:
        rows: how many were read.
        skipped: why a row could not be used -> how many.
        unused: columns and fields of messages that hold something and change nothing.
    """

    rows: int = 0
    skipped: Counter = field(default_factory=Counter)
    unused: set[str] = field(default_factory=set)

    def skip(self, reason: str) -> None:
        self.skipped[reason if reason in self.skipped or len(self.skipped) < REASONS else "for other reasons"] += 1

    def words(self) -> str:
        """`no assistant turn: 3, the role 'x' is not known: 1`."""
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.skipped.most_common())


def find_layout(row: dict, name: str) -> Layout:
    """The layout of a source by a row of it. Raises UsageError: no columns that are known, or no values in them."""

    def first(names, kinds=str):
        return next((one for one in names if isinstance(row.get(one), kinds)), None)

    chat = next((one for one in CHATS if isinstance(parsed(row.get(one)), list)), None)
    if chat:
        return Layout("messages", {"messages": chat})
    answer, prompt = first(ANSWERS, (str, list, dict)), first(PROMPTS, (str, list))
    if answer and (instruction := first(INSTRUCTIONS) or (None if prompt else first(("input",)))):
        return Layout("alpaca", {"instruction": instruction, "output": answer})
    if answer and prompt:
        return Layout("prompt", {"prompt": prompt, "output": answer})
    if text := first(TEXTS):
        return Layout("text", {"text": text})
    raise UsageError(
        f"{name} has the columns {', '.join(map(str, row))[:300]}; liger knows messages, conversations, "
        "instruction + output, question + answer, prompt + completion, and text, with something in them"
    )


def documents(rows: Iterator[dict], layout: Layout, tokenizer, tally: Tally) -> Iterator[Document]:
    """The documents of every row that can be used; the others are counted. Raises ModelError: no chat template."""
    for row in rows:
        tally.rows += 1
        try:
            found = documents_of(row, layout, tokenizer, tally)
            for document in found:
                document.text.encode("utf-8")  # half a surrogate pair is no text
        except UnicodeEncodeError:
            tally.skip("no text (half a surrogate pair)")
        except ValueError as error:
            tally.skip(re.sub(r"\s+", " ", str(error))[:300])
        else:
            yield from found


def documents_of(row: dict, layout: Layout, tokenizer, tally: Tally) -> list[Document]:
    """One row as documents. Only answers are trained on; of plain text everything is.

    Raises:
        ValueError: the row cannot be used; the sentence says why. ModelError: no chat template.
    """
    read = set(layout.columns.values())
    if layout.name == "text":
        text = _text(row, layout.columns["text"])
        made = [Document(text, [(0, len(text))], plain=True)]
    elif layout.name == "alpaca":
        made = [_pair(_instruction(row, layout.columns, read), _text(row, layout.columns["output"], True))]
    elif layout.name == "prompt" and all(isinstance(parsed(row.get(one)), str) for one in read):
        made = [_pair(_text(row, layout.columns["prompt"]), _text(row, layout.columns["output"], True))]
    else:
        found = _conversation(row, layout, template_of(tokenizer), read)
        made = conversation_documents(found, tokenizer)
        tally.unused |= found.unused
    tally.unused |= {str(name) for name, value in row.items() if name not in read and value not in EMPTY}
    return made


def _pair(prompt: str, answer: str) -> Document:
    return Document(prompt + answer, [(len(prompt), len(prompt) + len(answer))])


def _instruction(row: dict, columns: dict[str, str], read: set[str]) -> str:
    fields = {"input": _optional(row, [one for one in INPUTS if one not in read], read)}
    fields["instruction"] = _text(row, columns["instruction"], may_be_empty=bool(fields["input"]))
    if row.get("history") not in EMPTY:
        raise ValueError("earlier turns in history, which this layout has no place for; give messages")
    system = _optional(row, SYSTEMS, read)
    prompt = (INPUT_PROMPT if fields["input"] else PROMPT).format(**fields)
    return f"{system}\n\n{prompt}" if system else prompt


def _optional(row: dict, names, read: set[str]) -> str:
    """The first of these columns that holds something, which counts as read; "" where none does."""
    name = next((one for one in names if row.get(one) not in EMPTY), None)
    read |= {name} - {None}
    return _text(row, name) if name else ""


def _conversation(row: dict, layout: Layout, template: str, read: set[str]) -> Conversation:
    """The messages of a row, with what stands beside them: the system text, tools, arguments of the template."""
    if layout.name == "prompt":
        prompt, answer = (_turns(row.get(layout.columns[one]), role) for one, role in SIDES.items())
        found = read_conversation([*prompt, *answer], template, len(prompt))
    else:
        found = read_conversation(row.get(layout.columns["messages"]), template)
    if found.messages[0]["role"] != "system" and (system := _optional(row, SYSTEMS, read)):
        found.messages.insert(0, {"role": "system", "content": system})
        found.trained.insert(0, False)
    options = parsed(row.get("chat_template_kwargs"))
    if isinstance(options, dict):
        read.add("chat_template_kwargs")
        known = {name for name in options if name not in reserved() and knows(template, name)}
        found.options |= {name: options[name] for name in known}
        found.unused |= {f"{name} of chat_template_kwargs" for name in set(options) - known}
    tools = parsed(row.get("tools"))
    if isinstance(tools, list) and tools and knows(template, "tools"):
        read.add("tools")
        found.options["tools"] = [parsed(tool) for tool in tools]
    return found


def _turns(value, role: str) -> list:
    """The messages of one side of a pair: a list of them, one of them, or a text."""
    value = parsed(value)
    if isinstance(value, (list, dict)):
        return value if isinstance(value, list) else [value]
    return [{"role": role, "content": value}]


def _text(row: dict, column: str, may_be_empty: bool = False) -> str:
    value = row.get(column)
    if value is None:
        raise ValueError(f"{column} is null" if column in row else f"no {column}")
    if not isinstance(value, str):
        raise ValueError(f"{column} is {type(value).__name__}, not text")
    if not value and not may_be_empty:
        raise ValueError(f"{column} is empty")
    return value
