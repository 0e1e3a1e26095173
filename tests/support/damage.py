"""Damage to files: bytes anywhere, and values inside JSON and YAML."""

import json
import random
from typing import Any

# What a stranger, a broken disk or a wrong program might put in place of a value.
VALUES: list[Any] = [
    None, True, 0, -1, 1, 3, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, float("nan"), float("inf"),
    "", " ", "x", "../../etc/passwd", "/etc/passwd", "\x00", "é\ud800", "a" * 5000, "[]", "1e9",
    "2-1", "0-999999999999", "float32", "llama", [], {}, [[]], [None], ["x", "y"], [1] * 2000,
    {"a": 1},
]  # fmt: skip
INTEGERS = [0, 1, -1, 2**15, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1]


def damage(content: bytes, chance: random.Random) -> bytes:
    """Change some bytes: flips, cuts, insertions, copies, extreme integers."""
    data = bytearray(content)
    for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
        if not data:
            return bytes(chance.randbytes(chance.randrange(64)))
        # Headers are where it hurts.
        end = len(data) if chance.random() < 0.5 else min(len(data), 128)
        at, length = chance.randrange(end), chance.choice((1, 1, 2, 4, 8, 64))
        kind = chance.randrange(7)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + length] = chance.randbytes(length)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = chance.randbytes(length)
        elif kind == 4:
            del data[at:]
        elif kind == 5:
            data[at:at] = data[at : at + 64]
        else:
            size = chance.choice((4, 8))
            number = chance.choice(INTEGERS) % 2 ** (8 * size)
            data[at : at + size] = number.to_bytes(size, "little")
    return bytes(data)


def change(value: Any, chance: random.Random) -> Any:
    """Replace, remove or add a value somewhere inside."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        if chance.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        if chance.random() < 0.1:
            return {**value, chance.choice(("x", "", *value)): chance.choice(VALUES)}
        return {**value, key: change(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], change(value[at], chance), *value[at + 1 :]]
    return chance.choice(VALUES)


def damage_json(content: bytes, chance: random.Random) -> bytes:
    """Change the values of one JSON document, or of one line of several; or some bytes."""
    if chance.random() < 0.3:
        return damage(content, chance)
    if chance.random() < 0.01:
        return b"[" * 100_000
    lines = content.splitlines() if content.count(b"\n{") else [content]
    at = chance.randrange(len(lines))
    document = json.loads(lines[at])
    for _ in range(chance.choice((1, 1, 2, 4))):
        document = change(document, chance)
    lines[at] = json.dumps(document).encode("utf-8", "surrogatepass")
    return b"\n".join(lines)
