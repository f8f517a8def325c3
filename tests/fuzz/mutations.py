"""Structured damage: plain data with a few edits, and bytes with a few more."""

import copy
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from gradrank.core.errors import GradrankError

SEEDS = st.integers(0, 2**32 - 1)
SECONDS = 20
DEEP: list[Any] = []
for _ in range(300):
    DEEP = [DEEP]
ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**300, 0.5, -0.0, 1e308, 5e-324, "", "x",
    "0", "../../../etc/passwd", "/dev/zero", "a" * 5000, "\x00", "\u202e\u0661", "<script>", [],
    {}, [[]], [None], {"": ""}, {"a": {"b": 1}}, DEEP, [1, "a", None], "NaN", "é" * 40,
)  # fmt: skip
# What plain data cannot hold but a file can.
RAW = (
    b"NaN", b"Infinity", b"-1e999", b"1e999", b'"\\ud800"', b'"\\udc00x"', b"1" * 5000,
    b"[" * 3000, b'{"a":' * 3000, b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"", b'"', b"{}", b"[]",
    b"&a [*a]", b"!!python/object/apply:os.system [x]", b"? {}", b"<<: {}", b"- -", b"2020-99-99",
    b"0x", b"1:2:3", b"=", b".nan", b"-.inf", b"{a: 1, a: 2}", b'"a": 1, "a": 2,', b"\t", b"%",
)  # fmt: skip


def fuzzed(examples: int) -> Any:
    """So many seeds; a smaller seed would be no simpler example, so none is looked for."""
    return settings(
        max_examples=examples,
        phases=(Phase.explicit, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )


class TooSlowError(BaseException):
    """An example took longer than any file may."""


@contextmanager
def in_time(seconds: int = SECONDS) -> Iterator[None]:
    def stop(*_args: Any) -> None:
        raise TooSlowError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(data: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in plain data."""
    found: list[tuple[Any, Any]] = []
    waiting = [data]
    while waiting:
        node = waiting.pop()
        keys = list(node) if isinstance(node, dict) else range(len(node))
        for key in keys:
            found.append((node, key))
            if isinstance(node[key], dict | list):
                waiting.append(node[key])
    return found


def damaged(data: Any, seed: int, most: int = 3) -> Any:
    """Plain data with one to ``most`` edits: other values, keys that go, come or move."""
    chance = random.Random(seed)
    data = copy.deepcopy(data)
    for _ in range(chance.randint(1, most)):
        found = places(data)
        if not found:
            return data
        node, key = chance.choice(found)
        kind = chance.choice(("set", "set", "set", "drop", "swap", "add", "number"))
        if kind == "drop":
            del node[key]
        elif kind == "swap":
            other, there = chance.choice(found)
            try:
                node[key], other[there] = copy.deepcopy(other[there]), copy.deepcopy(node[key])
            except (KeyError, IndexError):
                continue
        elif kind == "add" and isinstance(node, dict):
            node[chance.choice(("", "x", "schema", "__class__", "../y", "rank", "\x00"))] = node[
                key
            ]
        elif kind == "add":
            node.insert(0, copy.deepcopy(node[key]))
        elif kind == "number" and isinstance(node[key], int | float):
            node[key] = chance.choice((-node[key], node[key] * 1000, node[key] + 1, str(node[key])))
        else:
            node[key] = copy.deepcopy(chance.choice(ODD))
    return data


def spoilt(text: bytes, seed: int, most: int = 3) -> bytes:
    """Bytes with one to ``most`` edits: cut off, flipped, replaced, said twice."""
    chance = random.Random(seed)
    data = bytearray(text)
    for _ in range(chance.randint(1, most)):
        at = chance.randint(0, max(len(data) - 1, 0))
        kind = chance.choice(("cut", "flip", "put", "put", "over", "twice", "gone"))
        if kind == "cut":
            del data[at:]
        elif kind == "flip" and data:
            data[at] ^= 1 << chance.randint(0, 7)
        elif kind == "put":
            data[at:at] = chance.choice(RAW)
        elif kind == "over":
            # Where a value stands, as far as a colon tells.
            colon = data.find(b":", at)
            end = min((i for i in (data.find(b, colon) for b in b",\n}") if i > 0), default=-1)
            if 0 < colon < end:
                data[colon + 1 : end] = b" " + chance.choice(RAW)
        elif kind == "twice":
            data[at:at] = data[at : at + chance.randint(1, 40)]
        else:
            del data[at : at + chance.randint(1, 20)]
    return bytes(data)


def read_or_refused(work: Callable[[], Any]) -> Any:
    """Return what was read, or None where it was refused in words; anything else is a defect."""
    started = time.monotonic()
    try:
        with in_time():
            return work()
    except GradrankError as error:
        text = str(error)
        assert text.strip()
        assert len(text) < 20_000, text[:300]
        assert time.monotonic() - started < SECONDS
        return None
