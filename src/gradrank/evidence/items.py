"""The ``items`` of a record as arrays: what was predicted for each item of the reported split.

Records are files that anybody may have written, so nothing in them is trusted: every list is
checked, and a number that is none (JSON has no NaN, records write null) becomes NaN.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradrank.core.errors import DataError, nearest

KINDS = {
    "tokens": ("nll", "count"),
    "classes": ("expected", "predicted"),
    "answers": ("expected", "predicted"),
}
_SINGLE = ("kind", "digest")
_MOST_CLASSES = 4096
_MOST_GROUPS = 256
"""Metrics are sums per class and per part; a table of items by items would fill the memory."""


@dataclass(frozen=True, eq=False)
class Items:
    """Predictions of one run, one entry per item.

    Attributes:
        kind: ``tokens``, ``classes`` or ``answers``.
        size: Items, n.
        right: 1 where the prediction is the expected one, ``[n]``; None for ``tokens``. An answer
            that was not found is never right.
        expected: Class indices, ``[n]``; None for other kinds.
        predicted: Class indices, ``[n]``; None for other kinds.
        nll: Negative log-likelihood in nats, ``[n]``, NaN where the record has no number; None
            where nothing was recorded.
        count: Predicted tokens that ``nll`` is the sum of, ``[n]``; 1 for classes.
        group: Index of the part of the task, ``[n]``; zeros where a task has no parts.
        fingerprint: Equal for runs that were evaluated on the same items in the same order.
    """

    kind: str
    size: int
    right: np.ndarray | None
    expected: np.ndarray | None
    predicted: np.ndarray | None
    nll: np.ndarray | None
    count: np.ndarray
    group: np.ndarray
    fingerprint: str

    @property
    def diverged(self) -> int:
        """Items whose negative log-likelihood is no finite number."""
        return 0 if self.nll is None else int((~np.isfinite(self.nll)).sum())


def read_items(data: Any) -> Items:
    """Read and check a record's ``items``.

    Args:
        data: Plain data; see :class:`gradrank.record.run.RunRecord`.

    Returns:
        The same as arrays.

    Raises:
        DataError: If a list is missing, has another length or holds what it must not.
    """
    if isinstance(data, Items):
        return data
    if not isinstance(data, Mapping):
        raise DataError(f"items must be an object, not {type(data).__name__}.")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in KINDS:
        raise DataError(f"items of kind {kind!r} are unknown. {nearest(str(kind), KINDS)}")
    digest = data.get("digest", "")
    if not isinstance(digest, str):
        raise DataError(f"'digest' of the items is {digest!r}; it must be a text.")
    lists = {key: data[key] for key in data if key not in _SINGLE and data[key] is not None}
    missing = [name for name in KINDS[kind] if name not in lists]
    if missing:
        raise DataError(f"items of kind '{kind}' lack '{missing[0]}'.")
    wrong = [name for name, value in lists.items() if not isinstance(value, list)]
    if wrong:
        raise DataError(f"'{wrong[0]}' of the items must be a list.")
    sizes = {name: len(value) for name, value in lists.items()}
    size = sizes[KINDS[kind][0]]
    if size == 0 or len(set(sizes.values())) > 1:
        raise DataError(f"lists of the items must be of one length, at least 1; found {sizes}.")
    return _arrays(kind, size, lists, digest)


def _arrays(kind: str, size: int, lists: Mapping[str, list[Any]], digest: str) -> Items:
    expected = predicted = right = None
    if kind == "classes":
        expected, predicted = _classes(lists, "expected"), _classes(lists, "predicted")
        right = (expected == predicted).astype(float)
    elif kind == "answers":
        pairs = zip(_texts(lists, "expected"), _texts(lists, "predicted"), strict=True)
        right = np.array([bool(found) and found == wanted for wanted, found in pairs], dtype=float)
    count = _counts(lists["count"]) if "count" in lists else np.ones(size)
    groups = _texts(lists, "group") if "group" in lists else [""] * size
    if len(set(groups)) > _MOST_GROUPS:
        raise DataError(f"items have {len(set(groups))} groups; at most {_MOST_GROUPS} can be.")
    names = {name: place for place, name in enumerate(sorted(set(groups)))}
    return Items(
        kind=kind,
        size=size,
        right=right,
        expected=expected,
        predicted=predicted,
        nll=_numbers(lists["nll"], "nll") if "nll" in lists else None,
        count=count,
        group=np.array([names[name] for name in groups]),
        fingerprint=_fingerprint(kind, lists, groups, digest),
    )


def _fingerprint(kind: str, lists: Mapping[str, list[Any]], groups: list[str], digest: str) -> str:
    # Blocks of tokens are all of one size, so only their content tells one split from another.
    given = [lists["count"], digest] if kind == "tokens" else lists["expected"]
    text = json.dumps([kind, given, groups], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checked(values: list[Any], name: str, good: Callable[[Any], bool], what: str) -> list[Any]:
    wrong = next((place for place, value in enumerate(values) if not good(value)), None)
    if wrong is not None:
        raise DataError(f"'{name}' of item {wrong + 1} is {values[wrong]!r}; it must be {what}.")
    return values


def _classes(lists: Mapping[str, list[Any]], name: str) -> np.ndarray:
    def good(value: Any) -> bool:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return whole and 0 <= value < _MOST_CLASSES

    return np.array(
        _checked(lists[name], name, good, f"a class index from 0 to {_MOST_CLASSES - 1}")
    )


def _texts(lists: Mapping[str, list[Any]], name: str) -> list[str]:
    return _checked(lists[name], name, lambda value: isinstance(value, str), "a text")


def _counts(values: list[Any]) -> np.ndarray:
    def good(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53

    found = np.array(_checked(values, "count", good, "a whole number, 0 or more"), dtype=float)
    if found.sum() <= 0:
        raise DataError("'count' of the items is 0 throughout: nothing was predicted.")
    return found


def _numbers(values: list[Any], name: str) -> np.ndarray:
    def good(value: Any) -> bool:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool))

    _checked(values, name, good, "a number or null")
    return np.array([_float(value) for value in values])


def _float(value: float | None) -> float:
    if value is None:
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf
