"""JSON as text: strict, so that what was read can always be written again."""

import json
import math
import re
from typing import Any

# Far more than any file of ours has; what nests deeper could be read but not be worked on.
DEEPEST = 100
_HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")


def json_text(data: Any) -> str:
    """Return plain data as indented JSON with a final line break.

    Args:
        data: Plain data without NaN and infinity, which JSON lacks.
    """
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def parse_json(text: str) -> Any:
    """Read JSON of unknown origin.

    Args:
        text: The text.

    Returns:
        The parsed data.

    Raises:
        ValueError: If it is no JSON, names a key twice, nests too deeply, or holds NaN, infinity,
            a number that is too large, or half a character (a lone surrogate).
    """
    data = json.loads(
        text,
        object_pairs_hook=_unique_keys,
        parse_constant=_no_constant,
        parse_float=_finite,
    )
    refuse_unwritable(data, text)
    return data


def refuse_unwritable(data: Any, text: str) -> None:
    """Refuse parsed data that could be read but not be written or worked on.

    Args:
        data: What was parsed.
        text: What it was parsed from.

    Raises:
        ValueError: If it nests too deeply or holds half a character.
    """
    layer = [data]
    for _ in range(DEEPEST):
        layer = [
            child for node in layer for child in _inside(node) if isinstance(child, dict | list)
        ]
        if not layer:
            break
    else:
        raise ValueError(f"it nests deeper than {DEEPEST} levels")
    if _HALF_CHARACTER.search(text):
        # Two halves make a character, one alone fits no file and no terminal.
        json.dumps(data, ensure_ascii=False).encode("utf-8")


def _inside(node: Any) -> Any:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:24]} is too large for a number")
    return value
