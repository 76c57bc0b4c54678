"""Texts from strangers on their way out, to a terminal, Markdown, YAML or CSV: they stay text whatever they hold."""

import json
import unicodedata

# Controls, format characters (which can turn the direction of a line), surrogates, unassigned, line separators.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
MARKDOWN = frozenset("\\`*_[]<>&|~$#!")
FORMULA = ("=", "+", "-", "@")


def printable(text, keep: str = "") -> str:
    """The text with every character that a terminal would obey, or not show, as its Python escape.

    Args:
        keep: characters that stay, such as line breaks.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char in keep or unicodedata.category(char) not in UNPRINTABLE else _escaped(char) for char in text
    )


def markdown(text) -> str:
    """Plain text in Markdown, on one line: no link, no emphasis, no table border, no HTML."""
    return "".join(f"\\{char}" if char in MARKDOWN else char for char in printable(text))


def code_span(text) -> str:
    """A string as Markdown code, on one line and within one cell whatever it holds."""
    return "`" + printable(text).replace("`", "'").replace("|", "\\|") + "`"


def yaml_string(text) -> str:
    """A quoted YAML string on one line; JSON's escapes are YAML's, but for pairs of surrogates."""
    return '"' + "".join(_yaml_char(char) for char in str(text)) + '"'


def csv_cell(text: str) -> str:
    """A cell that a spreadsheet shows instead of computing it: anything but a number gets an apostrophe before a sign.

    See OWASP, "CSV injection".
    """
    text = printable(text)
    if not text.lstrip().startswith(FORMULA):
        return text
    try:
        float(text.replace(",", "").removesuffix("%"))
    except ValueError:
        return text if text == "-" else f"'{text}"
    return text


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "surrogatepass").decode("ascii")


def _yaml_char(char: str) -> str:
    if unicodedata.category(char) not in UNPRINTABLE and char not in '"\\':
        return char
    return json.dumps(char)[1:-1] if ord(char) <= 0xFFFF else f"\\U{ord(char):08X}"
