"""PEFT's name patterns, which are regular expressions from a file that nobody vouches for."""

import time
from collections.abc import Mapping
from typing import Any

import regex

from gradrank.core.errors import DataError

# Seconds for all patterns of one adapter. Honest ones take milliseconds; one that explodes is
# stopped in the middle of a match, which Python's own engine cannot be.
_SECONDS = 3.0
_LONGEST = 2_000


class Patterns:
    """Values by pattern, looked up as PEFT does: the first pattern that a name ends in.

    Attributes:
        values: Value by pattern.
    """

    def __init__(
        self,
        values: Mapping[str, Any],
        what: str,
        seconds: float = _SECONDS,
        longest: int = _LONGEST,
    ) -> None:
        """Compile the patterns.

        Args:
            values: Value by pattern, a regular expression for the end of a module's name.
            what: Name of the configuration's field, for messages.
            seconds: Time for all look-ups together.
            longest: Longest pattern, characters.

        Raises:
            DataError: If a pattern is too long or no expression.
        """
        self.values, self._what, self._left = dict(values), what, seconds
        self._longest = longest
        self._compiled = {pattern: self._compile(pattern) for pattern in values}
        # What gradrank writes, and most of what others do, needs no expression at all.
        self._exact = {
            _plain(pattern) or "": pattern for pattern in reversed(list(values)) if _plain(pattern)
        }
        self._all_exact = len(self._exact) == len(self.values)

    def _compile(self, pattern: str) -> Any:
        if len(pattern) > self._longest:
            raise DataError(
                f"a pattern in '{self._what}' is {len(pattern):,} characters long; at most "
                f"{self._longest:,} are read."
            )
        try:
            # The same expression that PEFT puts around a key.
            return regex.compile(rf"(.*\.)?({pattern})$")
        except (regex.error, RecursionError, OverflowError, ValueError) as error:
            raise DataError(
                f"the pattern {pattern[:60]!r} in '{self._what}' is no expression: {error}."
            ) from error

    def find(self, name: str, default: Any) -> Any:
        """Return the value for a module.

        Args:
            name: Full name of the module.
            default: What to return if no pattern fits.

        Raises:
            DataError: If the patterns take too long.
        """
        if self._all_exact:
            key = self._exact.get(name)
            return default if key is None else self.values[key]
        started = time.monotonic()
        try:
            for pattern, compiled in self._compiled.items():
                left = max(self._left - (time.monotonic() - started), 1e-9)
                if compiled.match(name, timeout=left):
                    return self.values[pattern]
        except TimeoutError as error:
            raise DataError(
                f"the patterns in '{self._what}' take longer than {_SECONDS:g} s to compare with "
                "the names of the modules, as expressions do that are meant to hang a reader. "
                "Write the names out in full."
            ) from error
        finally:
            self._left -= time.monotonic() - started
        return default


def _plain(pattern: str) -> str | None:
    """Return the one name that an anchored, escaped pattern means, or None."""
    if not pattern.startswith("^"):
        return None
    found, escaped = [], False
    for sign in pattern[1:].removesuffix("$"):
        if escaped or sign.isalnum() or sign in "_-":
            if escaped and sign.isalnum():
                return None  # a class such as \d
            found.append(sign)
            escaped = False
        elif sign == "\\":
            escaped = True
        else:
            return None
    return None if escaped else "".join(found)
