"""Spoil a small file, as bytes or by its structure: JSON, lines of JSON, tables, safetensors.  The seed decides how."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

BYTES = (
    b"", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r\n", b"\r", b"\n\n", b"\t", b" ", b"\x1b[2J", b"\xc3\x28",
    b'"\\ud800"', b"\xed\xa0\x80", "\u2028".encode(), "𝕏".encode(), b"NaN", b"-Infinity", b"1e999", b"-1", b"9" * 40,
    b"9" * 5000, b"[" * 2000, b'{"a":' * 2000, b'"', b"'", b"{", b"}", b"]", b",", b":", b"null", b"\\", b"[/x]",
)  # fmt: skip
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(2**70), 0.5, 1e308, float("nan"), float("inf"),
    "", " ", "0", "x" * 5000, "\0", "\n", "\ud800", "\u202e", "../x", "/", ".", "[/red]", "é", [], {}, [[]], [None],
    [0], ["a"], {"a": 1}, {"": None}, DEEP, ["label"], [1, 2, 3],
)  # fmt: skip


def mutated(data: bytes, kind: str, seed: int, times: int = 1) -> bytes:
    """`data`, a file of `kind` (json, lines, safetensors, or anything else), spoilt `times` times."""
    chance = random.Random(seed)
    for _ in range(times):
        spoil = SPOILERS.get(kind, _bytes)
        try:
            data = (spoil if chance.random() < 0.7 else _bytes)(data, chance)
        except (ValueError, RecursionError, OverflowError):  # spoilt before: it is no JSON any more
            data = _bytes(data, chance)
    return data


def _bytes(data: bytes, chance: random.Random) -> bytes:
    a = chance.randint(0, len(data))
    b = min(len(data), a + chance.choice((0, 1, 1, 2, 8, 30)))
    match chance.randrange(6):
        case 0:
            return data[:a]
        case 1 if a < len(data):
            return data[:a] + bytes([data[a] ^ 1 << chance.randrange(8)]) + data[a + 1 :]
        case 2:
            return data[:a] + data[b:]
        case 3:
            return data[:b] + data[a:]
        case 4:
            return chance.choice(BYTES) + data
        case _:
            return data[:a] + chance.choice(BYTES) + data[b:]


def _json(data: bytes, chance: random.Random) -> bytes:
    found = _changed(json.loads(data), chance)
    if chance.random() < 0.1 and isinstance(found, dict) and found:  # a key twice
        name = chance.choice(list(found))
        return dumped(found)[:-1] + b", " + dumped(name) + b": " + dumped(chance.choice(VALUES)) + b"}"
    return dumped(found)


def _changed(value: Any, chance: random.Random) -> Any:
    """One leaf, key or part of `value` is another, is gone, or is there twice."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        name = chance.choice(list(value))
        match chance.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                return value | {chance.choice((name + " ", name.upper(), "", "\n", "x")): value[name]}
            case _:
                return value | {name: _changed(value[name], chance)}
    if isinstance(value, list) and value and chance.random() < 0.85:
        i = chance.randrange(len(value))
        match chance.randrange(6):
            case 0:
                return value[:i] + value[i + 1 :]
            case 1:
                return [*value, value[i]]
            case _:
                return [*value[:i], _changed(value[i], chance), *value[i + 1 :]]
    if type(value) in (int, float) and chance.random() < 0.3:
        return chance.choice((-value, value + 1, value - 1, value * 2, value * 10**9, float(value), str(value)))
    if isinstance(value, str) and chance.random() < 0.3:
        return chance.choice((value + "\n", value[:1], value * 2, value.upper(), f"../{value}"))
    return chance.choice(VALUES)


def dumped(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _lines(data: bytes, chance: random.Random) -> bytes:
    lines = data.split(b"\n")
    i = chance.randrange(len(lines))
    lines[i : i + 1] = chance.choice(
        (lambda: [_json(lines[i], chance)], lambda: [lines[i]] * 2, list, lambda: [lines[i] + b"\r"])
    )()
    return b"\n".join(lines)


def _table(data: bytes, chance: random.Random) -> bytes:
    lines = [line.split(b"\t") for line in data.split(b"\n")]
    row = chance.choice(lines)
    row[chance.randrange(len(row))] = chance.choice((*BYTES, b"label", b"sentence", b"prompt", b"answer", b"0", b"2"))
    return b"\n".join(b"\t".join(row) for row in lines)


def _safetensors(data: bytes, chance: random.Random) -> bytes:
    length = int.from_bytes(data[:8], "little")
    if length > len(data):
        raise ValueError
    header, values = data[8 : 8 + length], data[8 + length :]
    if chance.random() < 0.8:
        header = _json(header, chance)
        length = len(header)
    else:
        length = chance.choice((0, 1, length - 1, length + 1, len(data), 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + header + values


SPOILERS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "json": _json, "lines": _lines, "safetensors": _safetensors, "table": _table,
}  # fmt: skip
