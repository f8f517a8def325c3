"""Run a recipe, one ``gradrank train`` after the other: ``python benchmarks/run_recipe.py RECIPE``.

A run whose record says that it finished is not repeated, so a broken-off recipe can be called
again. The table shows mean and range over the seeds; with one seed it is no evidence of anything.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from gradrank.lab.recipes import Recipe, read


def main() -> int:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the runs (default: runs/NAME)")
    parser.add_argument("--results", type=Path, help="also write the table as JSON")
    arguments = parser.parse_args()
    recipe = read(arguments.recipe)
    folder = arguments.out or Path("runs") / recipe.name
    for name, settings in recipe.runs().items():
        place = folder / name
        if finished(place) is None:
            place.parent.mkdir(parents=True, exist_ok=True)
            config = folder / f"{name}.yaml"
            config.write_text(yaml.safe_dump(settings), encoding="utf-8")
            command = ["train", "--config", str(config), "--out", str(place), "--overwrite"]
            program = str(Path(sys.executable).with_name("gradrank"))
            done = subprocess.run([program, *command], check=False)
            if done.returncode:
                print(f"{name}: failed with exit code {done.returncode}", file=sys.stderr)
    rows = table(recipe, folder)
    show(rows)
    if arguments.results:
        text = json.dumps({"recipe": recipe.name, "rows": rows}, indent=1)
        arguments.results.write_text(text + "\n", encoding="utf-8")
    return int(any(row["failed"] for row in rows))


def finished(place: Path) -> dict[str, Any] | None:
    """Return the record of a finished run, or None."""
    path = place / "record.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record if record.get("status") == "finished" else None


def table(recipe: Recipe, folder: Path) -> list[dict[str, Any]]:
    """Return one row per method and budget."""
    rows = []
    names = iter(recipe.runs())
    for variant in recipe.variants:
        for budget in recipe.budgets:
            records = [finished(folder / next(names)) for _ in recipe.seeds]
            whole = [record for record in records if record is not None]
            losses = [record["metrics"]["eval_loss"] for record in whole]
            rows.append(
                {
                    "label": variant.label,
                    "budget": budget,
                    "seeds": len(whole),
                    "failed": len(records) - len(whole),
                    "eval_loss": statistics.fmean(losses) if losses else None,
                    "range": [min(losses), max(losses)] if losses else None,
                    "peak": max((r["trainable_parameters"]["peak"] for r in whole), default=None),
                    "final": max((r["trainable_parameters"]["final"] for r in whole), default=None),
                    "train_seconds": statistics.fmean(r["cost"]["train_seconds"] for r in whole)
                    if whole
                    else None,
                }
            )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    heads = ("method", "budget", "seeds", "eval loss", "peak", "final", "s")
    print("{:16} {:12} {:>5} {:>9} {:>10} {:>10} {:>6}".format(*heads))
    for row in rows:
        if row["eval_loss"] is None:
            print(f"{row['label']:16} {row['budget']:12} failed")
            continue
        print(
            f"{row['label']:16} {row['budget']:12} {row['seeds']:5} {row['eval_loss']:9.4f} "
            f"{row['peak']:10,} {row['final']:10,} {row['train_seconds']:6.0f}"
        )


if __name__ == "__main__":
    sys.exit(main())
