"""Errors of gradrank: one root, a few leaves, each with what, why and what to do."""

import difflib
from collections.abc import Iterable


class GradrankError(Exception):
    """Root of every error that gradrank raises on purpose.

    The text has three parts: what happened (with names and values), why it is refused, and what
    to do about it. The command line prints it without a traceback and exits with status 2.
    """


class BudgetError(GradrankError, ValueError):
    """A budget that cannot be read, met or spent."""


class TargetError(GradrankError, ValueError):
    """Targets that match nothing, or a module that cannot carry a LoRA adapter."""


class MeasurementError(GradrankError, ValueError):
    """A measurement that cannot be taken, merged or trusted (for example a NaN gradient)."""


class OptionError(GradrankError, ValueError):
    """An unknown name or a value outside its range."""


class PlanError(GradrankError, ValueError):
    """A plan that is malformed or does not fit the model it is applied to."""


class SurgeryError(GradrankError, RuntimeError):
    """An edit of live LoRA layers that is refused, or a controller that could not do its work."""


class DataError(GradrankError, ValueError):
    """Data that is missing, empty, or not in the expected form."""


class OutputError(GradrankError, OSError):
    """Output that cannot be written, or that would overwrite something."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a suggestion for a mistyped name.

    Args:
        name: What was given.
        known: The valid names.

    Returns:
        ``"Did you mean 'x'? "`` when some valid name is close, else an empty string; in both
        cases followed by the list of valid names.

    Examples:
        >>> nearest("unifrom", ["uniform", "gard"])
        "Did you mean 'uniform'? Known: gard, uniform."
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    hint = f"Did you mean '{close[0]}'? " if close else ""
    listed = ", ".join(names) if len(names) <= 40 else ", ".join(names[:40]) + ", ..."
    return f"{hint}Known: {listed}."
