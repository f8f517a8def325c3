"""How long it takes until something can be typed: ``import gradrank`` and ``gradrank --help``.

Usage: python -m benchmarks.bench_start [--repeats 15] [--quick]

Each is a process of its own, in turns with a Python that does nothing. *Cold* means that no
compiled files of Python are found (the system's file cache stays warm).
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial

from benchmarks.frame import ROOT, Bench, Found, Goal, Row, main, ratio_row
from benchmarks.timing import ratio, take_turns

CODE = {
    "python": "pass",
    "import gradrank": "import gradrank",
    "gradrank --help": "import sys; sys.argv = ['gradrank', '--help']; "
    "from gradrank.cli.main import main; main()",
}
GOALS = (
    Goal("import gradrank", "import gradrank", "seconds", 0.3, interval=""),
    Goal("gradrank --help", "gradrank --help", "seconds", 0.3, interval=""),
)
_ASK = (
    "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr)); "
)


def start(code: str, cold: bool, _number: int = 0) -> None:
    """Run a piece of code in a new Python."""
    with tempfile.TemporaryDirectory() as empty:
        extra = {"PYTHONPYCACHEPREFIX": empty, "PYTHONDONTWRITEBYTECODE": "1"} if cold else {}
        subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **extra},
            cwd=ROOT,
        )


def loads_torch(code: str) -> bool:
    """Tell whether a piece of code ends with torch loaded."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK + code], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return done.stderr.splitlines()[-1] == "True"


def run(args: argparse.Namespace) -> Found:
    """Start everything in turns, warm and cold."""
    turns: dict[str, Callable[[int], None]] = {
        f"{name}, cold" if cold else name: partial(start, code, cold)
        for cold in (False, True)
        for name, code in CODE.items()
    }
    seconds = take_turns(turns, args.repeats, warmup=1)
    rows: dict[str, Row] = {}
    for name, taken in seconds.items():
        base = "python, cold" if name.endswith("cold") else "python"
        rows[name] = ratio_row(ratio(taken, seconds[base]), statistics.median(taken), base)
    for name, code in CODE.items():
        rows[name]["loads_torch"] = str(loads_torch(code))
    return Found(rows, notes=["Seconds are those of the whole process, medians."])


def flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of this benchmark."""
    parser.add_argument("--repeats", type=int, default=15)


BENCH = Bench(
    name="start",
    about="Time until `import gradrank` and `gradrank --help` are done.",
    minutes=0.6,
    run=run,
    flags=flags,
    quick={"repeats": 1},
    goals=GOALS,
    columns=("seconds", "ratio", "interval", "loads_torch"),
)

if __name__ == "__main__":
    main(BENCH)
