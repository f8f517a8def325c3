"""Growth study, part ``memory``: peak of a process of its own, and bytes of what is saved."""

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.frame import EXACT
from benchmarks.growth_points import QUICK_AXES, VARIANTS, Axes, Point, batches_of, do, model_of
from benchmarks.setting import peak_over, resident

Row = dict[str, Any]
FULL = Axes(
    Point(),
    {
        "batches": (4, 8, 32, 128),
        "tokens": (64, 256, 1024),
        "width": (128, 256, 512, 1024),
        "layers": (2, 4, 8, 16),
        "k": (32, 128, 512),
    },
)
QUICK = QUICK_AXES
_WARM = Point(width=64, layers=1, tokens=16, batches=2)


def cells(axes: Axes) -> Iterable[tuple[str, Callable[[], Row]]]:
    """Yield the points by name, each with the work that gives its row."""
    for point in axes.points():
        yield point.name, lambda point=point: row_of(point)


def row_of(point: Point) -> Row:
    """Return what a process finds that has libraries loaded and has computed nothing."""
    command = [sys.executable, "-m", "benchmarks.study_growth"]
    done = subprocess.run(
        [*command, "--memory-cell", json.dumps(asdict(point))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | EXACT,
        cwd=Path(__file__).parents[1],
    )
    return json.loads(done.stdout.splitlines()[-1])


def measured(**sizes: int) -> Row:
    """Measure every variant of a point in a fork, which starts from the same memory."""
    point = Point(**sizes)
    row: Row = asdict(point)
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for part in pool.starmap(
            variant_row, [(variant, point) for variant in VARIANTS], chunksize=1
        ):
            row |= part
    return row


def variant_row(variant: str, point: Point) -> Row:
    """Return what one variant adds to this process at most, and bytes of what it saves."""
    # What libraries allocate when they are first used is none of the point's.
    do(variant, _WARM, model_of(_WARM), batches_of(_WARM))
    saved: list[int] = []

    def work() -> None:
        found = do(variant, point, model_of(point), batches_of(point))
        if found is not None:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "measurement.safetensors"
                found.save(path)
                saved.append(path.stat().st_size)

    row = {variant: peak_over(work, resident())["peak_bytes"]}
    return row | {f"{variant}_saved": size for size in saved}
