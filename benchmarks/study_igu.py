"""Study of Theorem 1 of IGU-LoRA, and of how reliable the scores of directions are.

Usage: python -m benchmarks.study_igu [--quick] [--cache FOLDER] [--out FOLDER] [--redraw]

Trains an adapter in SVD form, measures its gradients along the path (kept in a folder, so that a
second run is arithmetic only), and writes results/studies/igu-quadrature.json, the figures in
docs/figures and the tables in docs/studies/igu-quadrature.md. About 40 minutes on two busy cores,
a quarter of it arithmetic. --quick takes a tiny random model and seconds, and is no evidence of
anything.
"""

import argparse
import time
import warnings
from pathlib import Path
from typing import Any

from benchmarks.igu_quadrature.collect import QUICK, StudySize
from benchmarks.igu_quadrature.figures import study_figures
from benchmarks.igu_quadrature.measure import PathSettings
from benchmarks.igu_quadrature.results import study
from benchmarks.igu_quadrature.tables import refresh

from gradrank.core.files import read_json, write_json
from gradrank.lab.cache import cache_root

# peft 0.21.2 reads a property that transformers 5.23 has renamed.
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")


def main() -> None:
    """Run the study; write its results, its figures and the tables of its page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny random model, seconds")
    parser.add_argument("--cache", type=Path, default=None, help="folder of the measurements")
    parser.add_argument("--out", type=Path, default=Path("results/studies"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--page", type=Path, default=Path("docs/studies/igu-quadrature.md"))
    parser.add_argument("--redraw", action="store_true", help="figures and tables from the results")
    args = parser.parse_args()
    results = args.out / f"igu-quadrature{'-quick' if args.quick else ''}.json"
    if not args.redraw:
        write_json(results, measure(args))
    if not args.quick:
        found = read_json(results, "study")
        for figure in study_figures(found):
            figure.save(args.figures / f"{figure.name}.svg", overwrite=True)
        refresh(args.page, found)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Return what the study finds, with a line for each piece of work."""
    settings, size = QUICK if args.quick else (PathSettings(), StudySize())
    started = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - started:8.1f} s  {text}", flush=True)

    return study(settings, size, args.cache or cache_root() / "studies", say)


if __name__ == "__main__":
    main()
