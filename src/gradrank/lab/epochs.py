"""Lengths in passes over the training data, as steps."""

import math
import re
from collections.abc import Mapping
from typing import Any

_EPOCHS = re.compile(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*epochs?\s*")


def steps_in(epochs: float, examples: int, step_size: int) -> int:
    """Return how many optimizer steps some passes over the data take, rounded up.

    Args:
        epochs: Passes, possibly a part of one.
        examples: Training examples.
        step_size: Examples in a step, ``batch_size * accumulation``.

    Returns:
        Steps, at least 1.

    Examples:
        >>> steps_in(3, 1000, 64), steps_in(0.5, 10, 64)
        (47, 1)
    """
    # 0.1 * 30 is a little more than 3 in binary, and no step of its own.
    return max(1, math.ceil(epochs * examples / step_size - 1e-9))


def options_in_steps(options: Mapping[str, Any], examples: int, step_size: int) -> dict[str, Any]:
    """Return a method's options with lengths like ``"1 epoch"`` as whole numbers of steps.

    Args:
        options: Options by name.
        examples: Training examples.
        step_size: Examples in a step.

    Returns:
        The options; all others as they were.

    Examples:
        >>> options_in_steps({"initial_steps": "1 epoch", "rule": "mean"}, 1000, 64)
        {'initial_steps': '16', 'rule': 'mean'}
    """
    found = {name: _EPOCHS.fullmatch(str(value)) for name, value in options.items()}
    return {
        name: str(steps_in(float(match[1]), examples, step_size)) if match else options[name]
        for name, match in found.items()
    }
