"""Structure-aware mutations: from something valid to something near it that no honest program wrote."""

import json
import math
import random
import struct

STRINGS = (
    "", "/etc/passwd", "../../secret", "..", ".", "/dev/zero", "a\0b", "\ud800", "\u202egpj.exe", "x" * 5000,
    "{{ 7*7 }}", "{% for i in range(9999999) %}x{% endfor %}", "---\nlicense: x", "<script>alert(1)</script>",
    "\x1b]0;owned\x07",
    "[red]", "$\\frac{$", "=1+1", "nan", "1e999", "é\u0301ﬁ", "con", "file:///etc/passwd", "hf://x/y", "kernels/evil",
    "(a+)+$", "liger_", "liger_qwen3", "model.safetensors", "-1", "true", "\n", "`", "|", "torch", "os.system",
)  # fmt: skip
NUMBERS = (
    0, 1, -1, 2, 3, 7, 255, 65535, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30,
    10**300, 0.0, -0.0, 0.5, 1.5, 1e-320, 1e308, math.inf, -math.inf, math.nan, True, False,
)  # fmt: skip

INSERTED = (b"[" * 5000, b"\0" * 64, b"9" * 6000, b'{"a":' * 2000, b"\xff\xfe", b"\r\n")


def nested(rng: random.Random):
    """Lists in lists, deeper than a parser in Python can follow, or than one in C++ should."""
    value = 1
    for _ in range(rng.choice((3, 50, 900))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def atom(rng: random.Random):
    """A value of any kind, most of them at an edge."""
    kind = rng.randrange(8)
    if kind < 3:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(STRINGS)
    return rng.choice((None, [], {}, [None], [[]], {"": None}, [1, "a", None], ["x"] * 300, nested(rng)))


def mutate_json(rng: random.Random, value, rounds: int | None = None):
    """A deep copy of plain data with one to four changes: values, types, keys, order, repetition."""
    value = json.loads(json.dumps(value))
    for _ in range(rounds or rng.choice((1, 1, 1, 2, 4))):
        value = _change(rng, value)
    return value


def _change(rng: random.Random, value):
    places = list(_places(value))
    if not places or rng.random() < 0.02:
        return atom(rng)
    holder, key = rng.choice(places)
    way = rng.randrange(8)
    if way < 4:
        holder[key] = atom(rng)
    elif way == 4:
        del holder[key]
    elif way == 5 and isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = holder.pop(key)
    elif way == 6:
        _, other = rng.choice(places)
        source, name = rng.choice(places)
        holder[key] = json.loads(json.dumps(source.get(name) if isinstance(source, dict) else source[name]))
        if isinstance(holder, list):
            holder *= 1 + rng.randrange(3)
    elif isinstance(holder, dict):
        holder[rng.choice(STRINGS)] = atom(rng)
    else:
        holder.insert(rng.randrange(len(holder) + 1), atom(rng))
    return value


def _places(value):
    """Every (holder, key) in nested data, to a bounded depth."""
    stack = [(value, 0)]
    while stack:
        holder, depth = stack.pop()
        if depth > 12:
            continue
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, inner in items:
            yield holder, key
            if isinstance(inner, (dict, list)):
                stack.append((inner, depth + 1))


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Bytes flipped, cut, doubled or replaced; the lengths in front of a structure get edge values."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(len(data) + 1)
        way = rng.randrange(8)
        if way == 0 and data:
            data[place % len(data)] ^= 1 << rng.randrange(8)
        elif way == 1:
            del data[place:]
        elif way == 2:
            del data[place : place + rng.choice((1, 4, 100))]
        elif way == 3:
            data[place:place] = rng.randbytes(rng.choice((1, 8, 100)))
        elif way == 4:
            data[place:place] = data[: rng.choice((1, 16, 1000))]
        elif way == 5:
            data[:8] = struct.pack("<Q", rng.choice((0, 1, 7, len(data), len(data) - 8 & 2**64 - 1, 2**63, 2**64 - 1)))
        elif way == 6:
            text = rng.choice(STRINGS).encode("utf-8", "surrogatepass")
            data[place : place + len(text)] = text
        else:
            data[place:place] = rng.choice(
                (b"[" * 5000, b"\0" * 64, b"9" * 6000, b'{"a":' * 2000, b"\xff\xfe", b"\r\n")
            )
    return bytes(data)


def dump(rng: random.Random, value) -> bytes:
    """JSON as some program may write it; sometimes the bytes are broken on top."""
    raw = json.dumps(value, ensure_ascii=rng.random() < 0.7).encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, raw) if rng.random() < 0.1 else raw
