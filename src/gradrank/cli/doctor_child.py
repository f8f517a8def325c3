"""Run the trials in a child process, and say so if it dies."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from gradrank.cli.doctor_findings import NO, Finding
from gradrank.cli.doctor_trials import SECTION, TRIALS, VITAL

SECONDS = 600
_MODULE = "gradrank.cli.doctor_trials"


def try_out(
    names: Sequence[str] = tuple(TRIALS),
    say: Callable[[str], None] | None = None,
    module: str = _MODULE,
    limit: float = SECONDS,
) -> list[Finding]:
    """Try what works here; a trial that kills its process costs itself and nothing else.

    Args:
        names: Names in ``TRIALS``.
        say: Receives the name of each trial as it begins.
        module: What the child runs.
        limit: Seconds until a child that does not end is stopped.

    Returns:
        What was found.
    """
    found: list[Finding] = []
    left = list(names)
    while left:
        ended, begun, status = _child(module, left, found, say, limit)
        left = [name for name in left if name not in ended]
        if not left:
            break
        broken = begun if begun in left else left[0]
        found.append(
            Finding(SECTION, broken, NO, _cause(status, limit), _remedy(broken), broken in VITAL)
        )
        left.remove(broken)
        if begun is None:  # it did not even start, and would not for the others
            break
    return found


def _child(
    module: str,
    names: Sequence[str],
    found: list[Finding],
    say: Callable[[str], None] | None,
    limit: float,
) -> tuple[set[str], str | None, int | None]:
    """Run one child; return the trials that ended, the last one begun, and its exit status."""
    ended: set[str] = set()
    begun = None
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with subprocess.Popen(
        [sys.executable, "-m", module, *names],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        text=True,
        errors="replace",
        env=quiet,
    ) as child:
        stopped = threading.Event()
        timer = threading.Timer(limit, lambda: (stopped.set(), child.kill()))
        timer.start()
        try:
            for line in child.stdout or ():
                message = _message(line)
                if "begun" in message:
                    begun = str(message["begun"])
                    if say is not None:
                        say(begun)
                elif "ended" in message:
                    ended.add(str(message["ended"]))
                    found += [Finding(**one) for one in message["findings"]]
            status = child.wait()
        finally:
            timer.cancel()
            child.kill()
    return ended, begun, None if stopped.is_set() else status


def _message(line: str) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except ValueError:
        return {}  # something that a library printed
    return message if isinstance(message, dict) else {}


def _cause(status: int | None, limit: float) -> str:
    if status is None:
        return f"did not end within {limit:.0f} s"
    if status < 0:
        return f"the process was killed by signal {-status} while it was tried"
    return f"the process ended with status {status} while it was tried"


def _remedy(name: str) -> str:
    return f'python -m {_MODULE} "{name}" shows what it says'
