"""Study of how the cost of measuring, allocating and moving capacity grows.

Usage: python -m benchmarks.study_growth [--only PART] [--again] [--quick] [--redraw]

Parts: ``error`` (what a sketch size costs in accuracy, real text), ``memory``, ``time`` (of
measuring), ``allocation``, ``training``. Every cell that is done is written at once to
results/studies/growth.json and is not done again without --again: a stopped command is finished by
the same one. Then the figures in docs/figures and the tables of docs/studies/growth.md are made.
About 15 minutes on two idle cores; times are worth something only if nothing else runs. --quick
takes tiny sizes and is no evidence of anything.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks.frame import OthersTime
from benchmarks.growth_figures import figures
from benchmarks.growth_tables import tables
from benchmarks.pages import fill

from benchmarks import (
    growth_allocation,
    growth_error,
    growth_measuring,
    growth_memory,
    growth_training,
)
from gradrank.core.files import read_json, write_json

# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")

Row = dict[str, Any]
Found = dict[str, Any]
Cells = Iterable[tuple[str, Callable[[], Row]]]
PARTS: Mapping[str, Any] = {
    "error": growth_error,
    "memory": growth_memory,
    "time": growth_measuring,
    "allocation": growth_allocation,
    "training": growth_training,
}
"""Modules with ``FULL``, ``QUICK`` and ``cells(size)``."""
ABOUT = (
    "How cost grows: relative errors and shares, bytes, seconds. Each cell says which share of the "
    "processors' time went to other programs while it was measured (others_share)."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study, or one part of it; write results, figures and tables."""
    parser = argparse.ArgumentParser(description="Study of how cost grows")
    parser.add_argument("--only", choices=list(PARTS), help="one part; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds")
    parser.add_argument("--again", action="store_true", help="forget what the results hold of it")
    parser.add_argument("--redraw", action="store_true", help="figures and tables from the results")
    parser.add_argument("--out", type=Path, default=Path("results/studies/growth.json"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/growth.md"))
    parser.add_argument("--memory-cell", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.memory_cell:
        print(json.dumps(growth_memory.measured(**json.loads(args.memory_cell))))
        return
    if args.quick:
        args.out = args.out.with_name(f"{args.out.stem}-quick{args.out.suffix}")
    if not args.redraw:
        for part in [args.only] if args.only else PARTS:
            size = PARTS[part].QUICK if args.quick else PARTS[part].FULL
            if args.again:
                forget(args.out, part)
            collect(args.out, part, PARTS[part].cells(size))
    if not args.quick:
        found = known(args.out)["parts"]
        for figure in figures(found):
            figure.save(args.figures / f"{figure.name}.svg", overwrite=True)
        fill(args.page, tables(found))


def collect(out: Path, part: str, cells: Cells) -> None:
    """Do the cells of a part that the results do not have yet, and write each at once."""
    for name, work in cells:
        found = known(out)
        done = found["parts"].setdefault(part, {})
        if name in done:
            continue
        started, others = time.perf_counter(), OthersTime()
        row = work()
        seconds = time.perf_counter() - started
        settings = {"seconds": round(seconds, 1), "others_share": round(others.share(), 3)}
        done[name] = row | settings | {"threads": torch.get_num_threads()}
        write_json(out, found, overwrite=True)
        print(f"{part:10} {seconds:7.1f} s  {name}", flush=True)


def forget(out: Path, part: str) -> None:
    """Take the rows of a part out of the results."""
    found = known(out)
    found["parts"][part] = {}
    write_json(out, found, overwrite=True)


def known(out: Path) -> Found:
    """Return the results so far."""
    if out.exists():
        return read_json(out, "study")
    return {"about": ABOUT, "torch": torch.__version__, "parts": {}}


if __name__ == "__main__":
    main()
