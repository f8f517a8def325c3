"""Sizes in bytes, as people write and read them."""

import re

from gradrank.core.errors import OptionError

# Powers of 1024, as memory is counted, with and without the "i"; and powers of 1000 nowhere.
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", re.IGNORECASE)


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes.

    Args:
        value: Bytes, or a text such as ``8GiB``, ``512M`` or ``1.5 gb``: powers of 1024 in every
            spelling.

    Returns:
        Bytes, at least 1.

    Raises:
        OptionError: If it cannot be read, or is below 1.

    Examples:
        >>> parse_bytes("1.5GiB"), parse_bytes("512M"), parse_bytes(100)
        (1610612736, 536870912, 100)
    """
    found = _TEXT.fullmatch(str(value).strip())
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size < 1:
        raise OptionError(
            f"memory '{value}' is not understood. Give bytes, or a number with a unit: 8GiB, "
            "512MiB."
        )
    return size


def spoken_bytes(count: float) -> str:
    """Return bytes for people, in powers of 1024.

    Args:
        count: Bytes.

    Returns:
        A number with a unit, GiB at most.

    Examples:
        >>> spoken_bytes(1536)
        '1.5 KiB'
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
