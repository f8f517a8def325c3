"""Exit statuses, and the error of a run that began and did not end well."""

from gradrank.core.errors import GradrankError

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


class RunFailedError(GradrankError):
    """A run that began and failed, in contrast to input that was refused."""
