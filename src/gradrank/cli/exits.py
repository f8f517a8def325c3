"""Exit statuses, and the error of a run that began and did not end well."""

from gradrank.core.errors import GradrankError
from gradrank.core.files import system_error
from gradrank.core.shortage import is_out_of_memory

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130


class RunFailedError(GradrankError):
    """A run that began and failed, in contrast to input that was refused."""


def explain_shortage(error: BaseException) -> str | None:
    """Return what to say instead of a library's error, where memory or disk ran out.

    Args:
        error: The error.

    Returns:
        The message, with what to lower or to free; None for any other error.
    """
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    told = told[:160].rstrip(".")
    if is_out_of_memory(error):
        return (
            f"out of memory{f' ({told})' if told else ''}. Lower --batch-size (with a higher "
            "--accumulate the mini-batches stay as large) or --max-length, take a smaller --dtype "
            "such as bfloat16, give 'plan' a --max-memory, switch --gradient-checkpointing on for "
            "training, and lower --workers for 'compare'."
        )
    cause = None if isinstance(error, OSError) else system_error(error)
    if cause is None:
        return None
    return (
        f"a file could not be read or written: {told}. If the disk is full, free some space in "
        "--out, or name another folder for temporary files in the variable TMPDIR."
    )
