"""What all benchmarks share: flags, fresh processes, goals, tables, and the file of results."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.timing import Ratio

from gradrank.core.files import write_json
from gradrank.lab.environment import environment, resolve_device

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "benchmarks"
SCHEMA = "gradrank.bench/2"
# A share of the processors' time that went to others, above which times say little.
_BUSY = 0.1
# glibc keeps freed blocks of up to 32 MB for later, which counts as resident. Told to hand every
# block of 64 KiB back, what is resident is what tensors hold. It costs time, so nothing is timed.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted.

    Attributes:
        what: What is measured, in words.
        row: Name of the row that has it.
        key: Its key in the row.
        limit: The most that it may be.
        against: What it is a ratio to, in words; "" for seconds.
        interval: Key of its interval in the row.
    """

    what: str
    row: str
    key: str
    limit: float
    against: str = ""
    interval: str = "interval"


@dataclass
class Found:
    """What a benchmark found.

    Attributes:
        rows: Figures by name of the row, in the order of tables.
        skipped: Why a row is missing, by name.
        notes: What a reader must know.
        more: Further plain data for the file of results.
    """

    rows: dict[str, Row]
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        name: The module is ``benchmarks.bench_NAME``.
        about: One line.
        minutes: About how long the default takes on two idle cores.
        run: Does it.
        flags: Adds its own flags.
        quick: What ``--quick`` sets, by flag.
        part: What a fresh process does for it: ``(args, name of the part) -> plain data``.
        profile: Prints where the time goes.
        goals: What is wanted.
        columns: Keys of a row in the printed table, in order.
    """

    name: str
    about: str
    minutes: float
    run: Callable[[argparse.Namespace], Found]
    flags: Callable[[argparse.ArgumentParser], None] = lambda _parser: None
    quick: Mapping[str, Any] = field(default_factory=dict)
    part: Callable[[argparse.Namespace, str], Row] | None = None
    profile: Callable[[argparse.Namespace], None] | None = None
    goals: Sequence[Goal] = ()
    columns: Sequence[str] = ("seconds", "ratio", "interval")


def main(bench: Bench) -> None:
    """Run a benchmark from the command line.

    Args:
        bench: The benchmark.
    """
    args = parse(bench, sys.argv[1:])
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.part is not None:
        wanted = json.loads(args.part)
        assert bench.part is not None
        print(json.dumps(bench.part(argparse.Namespace(**wanted["args"]), wanted["part"])))
    elif args.profile:
        if bench.profile is None:
            raise SystemExit(f"benchmark '{bench.name}' has no profile.")
        bench.profile(args)
    else:
        _report(bench, args)


def parse(bench: Bench, argv: Sequence[str]) -> argparse.Namespace:
    """Return the flags of a benchmark.

    Args:
        bench: The benchmark.
        argv: What stands on the command line.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.bench_{bench.name}",
        description=f"{bench.about} About {bench.minutes:g} min on two idle cores.",
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, default=8, help="texts per batch")
    parser.add_argument("--length", type=int, default=48, help="tokens per text")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as PyTorch likes")
    parser.add_argument("--quick", action="store_true", help="a tiny model, few rounds: a smoke")
    parser.add_argument("--profile", action="store_true", help="show where the time goes instead")
    parser.add_argument("--no-memory", action="store_true", help="leave out fresh processes")
    parser.add_argument(
        "--out", type=Path, help="folder; default: results/benchmarks, not if quick"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)
    bench.flags(parser)
    if "--quick" in argv:
        small = {"model": "tiny-llama", "batch": 2, "length": 16}
        parser.set_defaults(**(small | dict(bench.quick)))
    return parser.parse_args(argv)


def fresh(bench: str, args: argparse.Namespace, part: str, exact: bool = False) -> Row:
    """Do a part of a benchmark in a process of its own.

    Args:
        bench: Name of the benchmark.
        args: Its flags.
        part: Name of the part.
        exact: Whether freed memory is handed back at once, so that peaks are those of tensors;
            times are then not to be used.

    Returns:
        What the part returned.
    """
    plain = {k: v for k, v in vars(args).items() if k not in {"out", "part"}}
    wanted = json.dumps({"part": part, "args": plain})
    command = [sys.executable, "-m", f"benchmarks.bench_{bench}", "--part", wanted]
    extra = EXACT if exact else {}
    done = subprocess.run(
        [*command, f"--threads={args.threads}"],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **extra},
    )
    return json.loads(done.stdout.splitlines()[-1])


def ratio_row(found: Ratio, seconds: float, against: str) -> Row:
    """Return a row with a ratio.

    Args:
        found: The ratio.
        seconds: Seconds per turn, on average.
        against: Name of the row that it is a ratio to.
    """
    return {
        "seconds": seconds,
        "ratio": found.value,
        "interval": list(found.interval) if found.interval else None,
        "pairs": found.pairs,
        "range": [found.least, found.most],
        "against": against,
    }


def reached(goals: Sequence[Goal], rows: Mapping[str, Row]) -> list[dict[str, Any]]:
    """Compare rows with what is wanted of them.

    Args:
        goals: The goals; those without a row are left out.
        rows: The rows.

    Returns:
        Per goal its words, limit, value, interval, ``met``, and ``sure``: whether the whole
        interval lies on the same side of the limit (None without an interval).
    """
    found = []
    for goal in goals:
        row = rows.get(goal.row, {})
        if goal.key not in row:
            continue
        value, interval = row[goal.key], row.get(goal.interval)
        sure = None
        if interval is not None:
            sure = interval[1] <= goal.limit or interval[0] > goal.limit
        found.append(
            {
                "what": goal.what,
                "row": goal.row,
                "against": goal.against,
                "limit": goal.limit,
                "value": value,
                "interval": interval,
                "met": value <= goal.limit,
                "sure": sure,
            }
        )
    return found


def _report(bench: Bench, args: argparse.Namespace) -> None:
    others = OthersTime()
    started = time.perf_counter()
    found = bench.run(args)
    minutes = (time.perf_counter() - started) / 60
    busy = others.share()
    internal = {"out", "part", "profile"}
    goals = reached(bench.goals, found.rows)
    device = resolve_device()
    result = {
        "schema": SCHEMA,
        "name": bench.name,
        "about": bench.about,
        "quick": args.quick,
        "settings": {k: v for k, v in vars(args).items() if k not in internal},
        "environment": environment(device, torch.float32),
        "minutes": minutes,
        "others_share": busy,
        "rows": found.rows,
        "goals": goals,
        "skipped": found.skipped,
        "notes": found.notes,
        **found.more,
    }
    print(table(found.rows, bench.columns))
    for name, why in found.skipped.items():
        print(f"{name}: left out. {why}")
    for goal in goals:
        print(sentence(goal))
    print(f"{minutes:.1f} min; others used {busy:.0%} of the processors meanwhile")
    if busy > _BUSY:
        print("The machine was busy with other work: these times are not to be relied on.")
    folder = args.out or (None if args.quick else RESULTS)
    if folder is not None:
        write_json(folder / f"{bench.name}.json", result)


def sentence(goal: Mapping[str, Any]) -> str:
    """Return what came of a goal, in one line.

    Args:
        goal: From :func:`reached`.
    """
    ends = "" if goal["interval"] is None else " ({:.3f} to {:.3f})".format(*goal["interval"])
    unit = f" of {goal['against']}" if goal["against"] else " s"
    word = "met" if goal["met"] else "MISSED"
    doubt = ", but the interval holds the limit" if goal["sure"] is False else ""
    limit = f"at most {goal['limit']:g}{unit}"
    return f"{goal['what']}: {goal['value']:.3f}{ends}, wanted {limit}: {word}{doubt}"


def table(rows: Mapping[str, Row], columns: Sequence[str]) -> str:
    """Return rows as a table for a terminal.

    Args:
        rows: The rows.
        columns: Keys, in order; those that no row has are left out.
    """
    used = [key for key in columns if any(row.get(key) is not None for row in rows.values())]
    lines = [["", *(key.replace("_", " ") for key in used)]]
    lines += [[name, *(cell(row.get(key)) for key in used)] for name, row in rows.items()]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used) + 1)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def cell(value: Any) -> str:
    """Return a value as a cell: three places for fractions, commas in counts.

    Args:
        value: A number, a pair of numbers, text, or None.
    """
    if value is None:
        return "-"
    if isinstance(value, list | tuple):
        return "..".join(f"{end:.3f}" for end in value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


class OthersTime:
    """How much of the processors' time goes to other programs."""

    def __init__(self) -> None:
        self._start = self._read()

    def share(self) -> float:
        """Return the share since the start, 0 to 1; children that have ended are our own."""
        busy, whole, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        return min(1.0, max(0.0, busy - own) / whole) if whole > 0 else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        own = sum(os.times()[:4])
        return sum(times[:8]) - idle, sum(times[:8]), own
