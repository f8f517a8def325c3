"""Words and numbers as a report shows them; everything from a record passes through here."""

import math
from collections.abc import Iterable
from typing import Any

NOTHING = "–"
# A no-break space: a unit never starts a line.
_GLUE = "\u00a0"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def clean(value: Any, limit: int = 400) -> str:
    """Return untrusted text without control, invisible or unpaired characters.

    Such characters would break the SVG, reorder the text around them or fail to encode. Markup is
    not touched: the template and the SVG writer escape it.

    Args:
        value: Anything; ``str`` is applied.
        limit: Longest result, in characters.

    Returns:
        The text, with each refused character replaced by a replacement character.

    Examples:
        >>> clean("layer" + chr(0) + "q")
        'layer\ufffdq'
    """
    text = "".join(c if c.isprintable() else "\ufffd" for c in str(value)[: limit + 1])
    return text if len(text) <= limit else text[: limit - 1] + "…"


def shorten(text: str, limit: int = 26) -> str:
    """Return a label of bounded length; the middle is left out, because both ends tell more.

    Args:
        text: The label.
        limit: Longest result, in characters.

    Returns:
        The label.

    Examples:
        >>> shorten("model.layers.0.self_attn.q_proj", 13)
        'model.…q_proj'
    """
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return text[:head] + "…" + text[len(text) - (limit - 1 - head) :]


def count(value: float | None) -> str:
    """Return a whole number with thousands separators.

    Args:
        value: The number, or None.

    Returns:
        The text; a dash for None.

    Examples:
        >>> count(2442240)
        '2,442,240'
    """
    return NOTHING if value is None else f"{round(value):,}"


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with a fixed count of significant digits.

    Args:
        value: The number, or None.
        digits: Significant digits.

    Returns:
        The text; a dash for None.

    Examples:
        >>> number(0.000012345), number(17.55291)
        ('1.234×10⁻⁵', '17.55')
    """
    if value is None:
        return NOTHING
    text = f"{value:.{digits}g}"
    if "e" not in text:
        return text.replace("-", "−")
    mantissa, exponent = text.split("e")
    return mantissa.replace("-", "−") + "×" + power_of_ten(int(exponent))


def power_of_ten(exponent: int) -> str:
    """Return a power of ten in superscript characters, so that no math markup is needed.

    Args:
        exponent: The exponent.

    Returns:
        The text.

    Examples:
        >>> power_of_ten(-3)
        '10⁻³'
    """
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def signed(value: float, digits: int = 4) -> str:
    """Return a difference with its sign.

    Args:
        value: The difference.
        digits: Decimals.

    Returns:
        The text, with a real minus sign.

    Examples:
        >>> signed(-0.0123)
        '−0.0123'
    """
    if round(value, digits) == 0:
        return f"±{0:.{digits}f}"
    return f"{value:+.{digits}f}".replace("-", "−")


def percent(fraction: float | None) -> str:
    r"""Return a fraction as a percentage with about three significant digits.

    Args:
        fraction: The fraction (0.005 is 0.5 %), or None.

    Returns:
        The text; a dash for None.

    Examples:
        >>> percent(0.01815), percent(0.5), percent(0.00002), percent(0)
        ('1.81\xa0%', '50\xa0%', '0.002\xa0%', '0\xa0%')
    """
    if fraction is None:
        return NOTHING
    value = 100 * fraction
    digits = 0 if abs(value) >= 10 or value == 0 else 2 if abs(value) >= 0.01 else 4
    if 0 < abs(value) < 1e-4:
        return f"<{_GLUE}0.0001{_GLUE}%"
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if digits == 4 else text).replace("-", "−") + f"{_GLUE}%"


def seconds(value: float | None) -> str:
    r"""Return a duration in the unit that a person would use.

    Args:
        value: Seconds, or None.

    Returns:
        The text; a dash for None.

    Examples:
        >>> seconds(0.421), seconds(185), seconds(3725)
        ('0.42\xa0s', '3\xa0min\xa005\xa0s', '1\xa0h\xa002\xa0min')
    """
    if value is None:
        return NOTHING
    if value < 10:
        return f"{value:.2f}{_GLUE}s" if value else f"0{_GLUE}s"
    if value < 100:
        return f"{value:.1f}{_GLUE}s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60}{_GLUE}min{_GLUE}{whole % 60:02d}{_GLUE}s"
    return f"{whole // 3600}{_GLUE}h{_GLUE}{whole % 3600 // 60:02d}{_GLUE}min"


def memory(value: float | None) -> str:
    r"""Return a size in MiB or GiB.

    Args:
        value: Bytes, or None.

    Returns:
        The text; a dash for None.

    Examples:
        >>> memory(1_073_741_824), memory(314_572_800)
        ('1.00\xa0GiB', '300\xa0MiB')
    """
    if value is None:
        return NOTHING
    gib, mib = f"{value / 2**30:.2f}{_GLUE}GiB", f"{value / 2**20:.0f}{_GLUE}MiB"
    return gib if value >= 2**30 else mib


def listed(words: Iterable[str]) -> str:
    """Return words as a sentence lists them.

    Args:
        words: The words.

    Returns:
        The text.

    Examples:
        >>> listed(["gard", "uniform", "waterfill"])
        'gard, uniform and waterfill'
    """
    items = list(words)
    return " and ".join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else "".join(items)


def plural(amount: int, word: str) -> str:
    """Return a count with its noun.

    Args:
        amount: How many.
        word: The noun in the singular.

    Returns:
        The text.

    Examples:
        >>> plural(1, "seed"), plural(3, "seed")
        ('1 seed', '3 seeds')
    """
    return f"{count(amount)} {word}" + ("" if amount == 1 else "s")


def as_float(value: Any) -> float | None:
    """Return a finite number, or None for anything else.

    Args:
        value: Anything that a JSON file can hold.

    Returns:
        The number. True and False are no numbers here, and neither is what no measurement can
        give: beyond 1e100 sums and axes overflow.

    Examples:
        >>> as_float(3), as_float("3"), as_float(float("nan")), as_float(10**400)
        (3.0, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        result = float(value)
    except OverflowError:
        return None
    return result if math.isfinite(result) and abs(result) <= 1e100 else None


def as_count(value: Any) -> int | None:
    """Return a number of things (0 or more), or None for anything else.

    Args:
        value: Anything that a JSON file can hold.

    Returns:
        The number.

    Examples:
        >>> as_count(8.0), as_count(-1), as_count(None)
        (8, None, None)
    """
    result = as_float(value)
    return int(result) if result is not None and 0 <= result <= 1e15 and result % 1 == 0 else None
