"""What ``gradrank doctor`` found: one line each, and what to do where something is wrong."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OK, NOTE, NO = "ok", "note", "no"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        section: Heading under which it stands.
        name: What was looked at.
        status: ``ok``, ``note`` (works, or is not needed, but good to know) or ``no``.
        text: What was found.
        remedy: What to do about it; "" where nothing needs doing.
        vital: Whether the main job (plan, then train) fails without it.
    """

    section: str
    name: str
    status: str
    text: str
    remedy: str = ""
    vital: bool = False

    @property
    def breaks(self) -> bool:
        """Whether the main job does not work because of it."""
        return self.vital and self.status == NO

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def guarded(section: str, name: str, probe: Callable[[], Sequence[Finding]]) -> list[Finding]:
    """Run a probe; one that fails becomes a finding that says how.

    Args:
        section: Heading of the finding, if the probe fails.
        name: Its name, if the probe fails.
        probe: Looks at one thing.

    Returns:
        What was found.
    """
    try:
        return list(probe())
    except Exception as error:  # whatever a broken installation raises
        return [Finding(section, name, NO, reason(error))]


def reason(error: BaseException, limit: int = 300) -> str:
    """Return what an error says, on one line.

    Args:
        error: The error.
        limit: Longest result, in characters.

    Returns:
        Its message, after its type if that is not one of gradrank's.
    """
    text = " ".join(str(error).split()) or "no message"
    if not type(error).__module__.startswith("gradrank."):
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def homely(path: Path | str) -> str:
    """Return a path with the home folder written as ``~``: what doctor prints is often shared.

    Args:
        path: The path.
    """
    text, home = str(path), str(Path.home())
    return "~" + text[len(home) :] if home != os.sep and text.startswith(home) else text
