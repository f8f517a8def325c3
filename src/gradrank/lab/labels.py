"""Turn label values into class indices; refuse what is no small fixed set of classes."""

from collections.abc import Hashable, Sequence
from typing import Any

from gradrank.core.errors import DataError

MOST_CLASSES = 1000


def index_labels(
    train: Sequence[Any],
    held: Sequence[Any] | None,
    where: str,
    classes: Sequence[str] = (),
) -> tuple[tuple[str, ...], list[int], list[int] | None]:
    """Number the classes: integers by value, anything else in alphabetical order.

    Args:
        train: Label values of the training data.
        held: Label values of the evaluation data, if it is separate.
        where: Name of the data, for messages.
        classes: Names of the classes in their order, if it is known beforehand.

    Returns:
        Names of the classes by index, and the indices of both sequences.

    Raises:
        DataError: If labels are missing, are not classes, or the evaluation data has others.
    """
    keys = _keys(train, where)
    names = list(classes) or sorted(set(keys), key=_order)
    if not classes:
        check_classes(names, len(keys), where)
    index = {name: number for number, name in enumerate(names)}
    strange = sorted(set(keys) - set(names))
    if strange:
        raise DataError(
            f"data '{where}' has the unknown label '{strange[0]}'. Known: {', '.join(names)}."
        )
    held_keys = None if held is None else _keys(held, "evaluation data")
    unknown = sorted(set(held_keys or ()) - set(names))
    if unknown:
        raise DataError(
            f"the evaluation data has labels that '{where}' has not: {', '.join(unknown[:5])}. "
            f"Known: {', '.join(names[:20])}."
        )
    held_indices = None if held_keys is None else [index[key] for key in held_keys]
    return tuple(names), [index[key] for key in keys], held_indices


def check_classes(names: Sequence[str], count: int, where: str) -> None:
    """Refuse labels that are no classes.

    Args:
        names: Distinct label values.
        count: Number of examples.
        where: Name of the data, for messages.

    Raises:
        DataError: If there is one class only, or too many for the examples.
    """
    if len(names) < 2:
        raise DataError(
            f"data '{where}' has a single class ('{names[0]}') in {count} rows; there is nothing "
            f"to learn. At least 2 classes are needed."
        )
    if len(names) > MOST_CLASSES or len(names) * 2 > max(count, 4):
        raise DataError(
            f"the labels of '{where}' are not a small fixed set: {len(names)} different values in "
            f"{count} rows, for example '{names[0]}' and '{names[-1]}'. Name the column that holds "
            f"the class with --label-column."
        )


def _keys(labels: Sequence[Any], where: str) -> list[str]:
    missing = [
        number
        for number, label in enumerate(labels, start=1)
        if label is None or (isinstance(label, str) and not label.strip())
    ]
    if missing:
        raise DataError(
            f"data '{where}': {len(missing)} of {len(labels)} rows have no label, the first is row "
            f"{missing[0]}. Fill or remove them."
        )
    return [_key(label, where) for label in labels]


def _key(label: Any, where: str) -> str:
    if isinstance(label, float) and not label.is_integer():
        raise DataError(
            f"the labels of '{where}' are real numbers (for example {label}), not classes. Name "
            f"the column that holds the class with --label-column."
        )
    if isinstance(label, float):
        return str(int(label))
    if not isinstance(label, Hashable):
        raise DataError(
            f"the labels of '{where}' are {type(label).__name__} values; each must be one class."
        )
    return str(label).strip()


def _order(name: str) -> tuple[int, int, str]:
    number = name.removeprefix("-")
    whole = number.isascii() and number.isdigit() and len(number) < 19
    return (0, int(name), "") if whole else (1, 0, name)
