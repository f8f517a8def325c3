"""Small checks of values from a file, and how a wrong one is shown."""

import math
from typing import Any


def shown(value: Any) -> str:
    """Return a wrong value for a message, shortened.

    Args:
        value: The value.

    Returns:
        The text, at most 60 characters.
    """
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def is_count(value: Any) -> bool:
    """Check for a whole number of at least 0, or None.

    Args:
        value: The value.

    Returns:
        Whether it is one.
    """
    return value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0)


def is_number(value: Any) -> bool:
    """Check for a finite number; None stands for one that JSON could not hold.

    Args:
        value: The value.

    Returns:
        Whether it is one.
    """
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return True
    return isinstance(value, float) and math.isfinite(value)


def is_curve(value: Any) -> bool:
    """Check for a list of ``[step, loss]``; a loss of None could not be held by JSON.

    Args:
        value: The value.

    Returns:
        Whether it is one.
    """
    return isinstance(value, list) and all(
        isinstance(point, list)
        and len(point) == 2
        and isinstance(point[0], int | float)
        and isinstance(point[1], int | float | None)
        for point in value
    )
