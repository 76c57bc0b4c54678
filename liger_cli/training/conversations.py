"""Conversations through a tokenizer's chat template, and which part of the outcome the assistant says.

The template itself tells: by its own marks (`{% generation %}`), else by the prompt that it writes for the messages
before a turn. A turn is never found by comparing renderings for where they begin to differ.
"""

import inspect
import json
import re
from dataclasses import dataclass, field
from functools import cache

from liger_cli.system.errors import ModelError

MAX_TURNS = 1000
ROLE_KEYS = ("role", "from", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message")
ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "person", "customer", "question", "input", "prompt"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "chatgpt", "gpt4", "gpt35", "model", "bot", "chatbot", "ai", "aiassistant", "agent", "llm",
         "bard", "bing", "claude", "answer", "output", "response", "functioncall", "toolcall"),
        "assistant",
    ),
    **dict.fromkeys(("system", "systemprompt", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "toolresponse", "functionresponse", "toolresult"), "tool"
    ),
}  # fmt: skip
# Whether a turn is trained on: OpenAI's and Mistral's `weight`, axolotl's `train` and `training`, ms-swift's `loss`.
FLAGS = ("weight", "train", "training", "trainable", "loss")
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
MARK = "\N{DOUBLE DAGGER}answer\N{DOUBLE DAGGER}"  # stands for an answer where its place is looked for


@dataclass(frozen=True)
class Document:
    """A text to be tokenized whole, and what of it is trained on.

    Attributes:
        text: all of it.
        trained: (first, end) of the characters that are trained on, ascending.
        plain: everything is trained on, and what is too long is cut into pieces and not cut off.
        starts: whether the tokenizer's own start token belongs before it; a chat template writes its own.
        ends: whether an end token follows where there is none.
        tokens: ids, and for each whether it is trained on, where the tokenizer told both.
    """

    text: str
    trained: list[tuple[int, int]]
    plain: bool = False
    starts: bool = True
    ends: bool = True
    tokens: tuple[list[int], list[int]] | None = None


@dataclass
class Conversation:
    """Messages as a chat template takes them.

    Attributes:
        messages: role, content and whatever else the template may know.
        trained: for each message whether it is an answer to be learned.
        options: `tools` and further arguments of the template.
        unused: names of fields that neither the template nor training takes note of.
    """

    messages: list[dict]
    trained: list[bool]
    options: dict = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)


def read_conversation(turns, template: str, context: int = 0) -> Conversation:
    """A list of messages in any usual layout, or its JSON.

    Args:
        template: the tokenizer's, to tell which fields it knows.
        context: so many turns belong to a prompt and are not learned.
    Raises:
        ValueError: no list of messages, an unknown role, content that is no text; the sentence says which.
    """
    turns = parsed(turns)
    if not isinstance(turns, list) or not turns:
        raise ValueError("no list of messages")
    if len(turns) > MAX_TURNS:  # every answer is rendered after all those before it
        raise ValueError(f"more than {MAX_TURNS} turns")
    found = Conversation([], [])
    for number, turn in enumerate(turns):
        for one in _by_role(turn):
            message, trained = _message(one, template, found.unused)
            found.messages.append(message)
            found.trained.append(trained and number >= context)
    return found


def _role(name) -> str | None:
    return ROLES.get(re.sub(r"[\W_]", "", str(name)).casefold())


def _by_role(turn) -> list:
    """A turn whose fields are named after roles, {"human": ..., "assistant": ...}, as messages; any other as it is."""
    if not isinstance(turn, dict) or any(isinstance(turn.get(key), str) and _role(turn[key]) for key in ROLE_KEYS):
        return [turn]
    if turn and all(_role(name) and isinstance(text, str) for name, text in turn.items()):
        return [{"role": name, "content": text} for name, text in turn.items()]
    return [turn]


def _message(turn, template: str, unused: set[str]) -> tuple[dict, bool]:
    if not isinstance(turn, dict):
        raise ValueError("a message that is no object")
    given = {key: value for key, value in turn.items() if value is not None}
    role_key = next((key for key in ROLE_KEYS if isinstance(given.get(key), str)), None)
    content_key = next((key for key in CONTENT_KEYS if key in given), None)
    if role_key is None:
        raise ValueError(f"a message without a role (its fields are {', '.join(map(str, turn))[:100]})")
    role = _role(given[role_key])
    if role is None:
        raise ValueError(f"the role {given[role_key][:50]!r} is not known")
    message = {"role": role, "content": _content(given.get(content_key, ""))}
    for key, value in given.items():
        if key in (role_key, content_key, *FLAGS):
            continue
        message[key] = _calls(value) if key == "tool_calls" else value
        if value not in ("", [], {}) and not knows(template, key):
            unused.add(f"{key} of messages")
    trained = _flag(given)
    if role != "assistant":
        if trained and any(given.get(flag) for flag in FLAGS):
            unused.add(f"{next(flag for flag in FLAGS if given.get(flag))} of messages that are no answers")
        return message, False
    fields = [key for key, value in message.items() if value and key not in ("role", "content")]
    says = message["content"].strip() or any(knows(template, key) for key in fields)
    return message, trained and bool(says)


def _flag(message: dict) -> bool:
    """Whether a message's own flags let it be trained on."""
    for flag in FLAGS:
        value = message.get(flag, True)
        if value not in (0, 1):
            raise ValueError(f"a message whose {flag} is {str(value)[:50]}, not 0 or 1")
        if not value:
            return False
    return True


def _content(value) -> str:
    """A message's text; parts of text are joined."""
    if isinstance(value, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in value):
        return "".join(part["text"] for part in value)
    if isinstance(value, list):
        raise ValueError("a message with a part that is no text")
    if not isinstance(value, str):
        raise ValueError(f"a message whose content is {type(value).__name__}, not text")
    return value


def _calls(calls):
    """Tool calls with their arguments as objects, as templates expect them, where they are given as JSON."""
    calls = parsed(calls)
    if not isinstance(calls, list):
        return calls
    plain = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            call = {**call, "function": {**function, "arguments": parsed(function["arguments"])}}
        plain.append(call)
    return plain


def parsed(value):
    """What a text that is JSON of a list or an object holds; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def template_of(tokenizer) -> str:
    """The text of the tokenizer's chat template, or of all of them. Raises ModelError: it has none."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ModelError("the tokenizer has no chat template, which chat data needs; use Alpaca or plain-text data")
    return "\n".join(map(str, template.values())) if isinstance(template, dict) else template


@cache
def knows(template: str, name: str) -> bool:
    """Whether a chat template reads a field or an argument of this name."""
    return re.search(rf"\b{re.escape(str(name))}\b", template) is not None


@cache
def reserved() -> frozenset[str]:
    """Arguments of `apply_chat_template` itself, which data may not set."""
    from transformers import PreTrainedTokenizerBase

    return frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def conversation_documents(found: Conversation, tokenizer) -> list[Document]:
    """A conversation as the template writes it, trained on the assistant's answers and what ends them.

    One document, unless the template writes a turn differently once others follow (it drops earlier reasoning, or puts
    the system text before the last question): then one for each answer, which begins with the prompt at generation.

    Raises:
        ValueError: no answer to learn, or the template fails or does not show where an answer begins. ModelError: no
            chat template.
    """
    template = template_of(tokenizer)
    found = _without_opening(found, tokenizer)
    answers = [index for index, trained in enumerate(found.trained) if trained]
    if not answers:
        said = any(message["role"] == "assistant" for message in found.messages)
        raise ValueError("no answer to learn" if said else "no assistant turn")
    messages = found.messages[: answers[-1] + 1]
    if GENERATION.search(template) and getattr(tokenizer, "is_fast", False):
        return [_marked(messages, found, tokenizer)]
    whole = _render(messages, found, tokenizer)
    spans = []
    for index in answers:
        prompt, after = _prompt(messages, index, found, tokenizer), _render(messages[: index + 1], found, tokenizer)
        if not (whole.startswith(prompt) and whole.startswith(after) and len(prompt) < len(after)):
            break
        spans.append(_span(whole, len(prompt), len(after), messages[index]))
    else:
        return [_document(whole, spans, messages[-1])]
    return [_alone(messages[: index + 1], found, tokenizer) for index in answers]


def _span(text: str, begin: int, end: int, message: dict) -> tuple[int, int]:
    """An answer's characters: its words and what ends them, without the blanks that the template writes after that."""
    answer = text[begin:end].rstrip()
    return begin, end if answer.endswith(message["content"].strip()) else begin + len(answer)


def _document(text: str, spans: list[tuple[int, int]], last: dict) -> Document:
    """An end token follows only where the template ends with the answer's own words."""
    ends = bool(last["content"].strip()) and text.rstrip().endswith(last["content"].strip())
    return Document(text, spans, starts=False, ends=ends)


def _without_opening(found: Conversation, tokenizer) -> Conversation:
    """The conversation without an assistant's greeting before the first question, where the template refuses that."""
    first = next((index for index, message in enumerate(found.messages) if message["role"] != "system"), 0)
    if found.messages[first]["role"] != "assistant":
        return found
    try:
        _render(found.messages, found, tokenizer)
    except ValueError:
        others = [index for index in range(len(found.messages)) if index != first]
        messages, trained = ([values[index] for index in others] for values in (found.messages, found.trained))
        if not messages:
            raise
        unused = found.unused | {"the assistant's turn before the first question, which the chat template refuses"}
        return _without_opening(Conversation(messages, trained, found.options, unused), tokenizer)
    return found


def _alone(messages: list[dict], found: Conversation, tokenizer) -> Document:
    """The last answer behind the prompt that the template gives for what comes before it."""
    after, prompt = _render(messages, found, tokenizer), _prompt(messages, len(messages) - 1, found, tokenizer)
    if after.startswith(prompt) and len(prompt) < len(after):
        return _document(after, [_span(after, len(prompt), len(after), messages[-1])], messages[-1])
    before = _before(messages, after, found, tokenizer)
    # What the template writes between its prompt and the answer, a space perhaps, is the answer's.
    question = messages[-2]["content"].strip()
    tail = prompt[prompt.rfind(question) + len(question) :] if question and question in prompt else ""
    at = before.rfind(tail) + len(tail) if tail and tail in before else len(before)
    text = prompt + after[at if not before[at:].strip() else len(before) :]
    return _document(text, [_span(text, len(prompt), len(text), messages[-1])], messages[-1])


def _marked(messages: list[dict], found: Conversation, tokenizer) -> Document:
    """By the template's own marks, as the tokenizer reads them."""
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    out = _applied(tokenizer, messages, found.options, **how)
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    wanted = [found.trained[index] for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not all(wanted):
        runs = [index for index, one in enumerate(mask) if one and not (index and mask[index - 1])]
        if len(runs) != len(wanted):
            raise ValueError("the chat template does not mark each answer by itself, and some are not to be learned")
        for run, trained in zip(runs, wanted, strict=True):
            while not trained and run < len(mask) and mask[run]:
                mask[run], run = 0, run + 1
    if not any(mask):
        raise ValueError("the chat template marks no answer")
    document = _document(_render(messages, found, tokenizer), [], messages[-1])
    return Document(document.text, [], starts=False, ends=document.ends, tokens=(ids, mask))


def _prompt(messages: list[dict], index: int, found: Conversation, tokenizer) -> str:
    """What the template gives to be answered by message `index`."""
    if all(message["role"] == "system" for message in messages[:index]):  # no question: nothing to prompt with
        asked = messages[: index + 1]
        return _before(asked, _render(asked, found, tokenizer), found, tokenizer)
    return _render(messages[:index], found, tokenizer, True)


def _before(messages: list[dict], text: str, found: Conversation, tokenizer) -> str:
    """What stands before the words of the last message in `text`, where the template has written all of them."""
    marked = _render([*messages[:-1], {**messages[-1], "content": MARK}], found, tokenizer)
    before, mark, behind = marked.partition(MARK)
    if not (mark and text.startswith(before) and text.endswith(behind) and len(before) + len(behind) < len(text)):
        raise ValueError("the chat template does not show where an answer begins")
    return before


def _render(messages: list[dict], found: Conversation, tokenizer, prompt: bool = False) -> str:
    return _applied(tokenizer, messages, found.options, tokenize=False, add_generation_prompt=prompt)


def _applied(tokenizer, messages, options: dict, **how):
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, **options, **how)
    except (TemplateError, RecursionError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the chat template fails on it ({str(error)[:200]})") from None
