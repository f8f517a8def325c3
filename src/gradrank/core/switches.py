"""Environment variables that are on or off, read as the Hugging Face libraries read them."""

import os
from collections.abc import Mapping

_ON = {"1", "true", "yes", "on"}


def switched_on(name: str, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a variable is set to a word for yes.

    Args:
        name: The variable.
        environment: Where it stands; None: the process's own.

    Returns:
        Whether it is ``1``, ``true``, ``yes`` or ``on``, in any case.
    """
    given = os.environ if environment is None else environment
    return given.get(name, "").lower() in _ON
