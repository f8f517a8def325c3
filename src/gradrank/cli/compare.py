"""``gradrank compare``: methods x budgets x tasks x seeds, resumable, with paired statistics."""

from pathlib import Path

import click

from gradrank.cli.options import COMMON, extra, flags
from gradrank.cli.verb import Verb

EXAMPLES = """\
gradrank compare recipes/small/encoder.yaml --out runs/encoder --workers 2
gradrank compare recipes/igu-glue.yaml --dry-run
gradrank compare runs/encoder/recipe.yaml --out runs/encoder --report-only"""
_RUNNING = "Running"


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument("recipe", type=click.Path(path_type=Path), metavar="RECIPE")
@extra(
    _RUNNING,
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The grid's folder: one record per run, the report, the table. A grid that was broken off "
    "goes on where it was.",
)
@extra(
    _RUNNING,
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    metavar="COUNT",
    help="Runs at a time; cores and GPUs are shared out among them.",
)
@extra(
    "Model and data",
    "--data-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder with public data (glue/, commonsense/, gsm8k/, ...); default: GRADRANK_DATA, then "
    "the hub (commonsense: only from a folder).",
)
@extra(
    _RUNNING,
    "--retry-failed",
    is_flag=True,
    default=False,
    show_default=False,
    help="Try runs again that failed; otherwise they are kept and shown as failed.",
)
@extra(
    _RUNNING,
    "--dry-run",
    is_flag=True,
    default=False,
    show_default=False,
    help="Only check the recipe on the models' shapes: targets, parameters, ranks, number of runs. "
    "No weights, no data.",
)
@extra(
    _RUNNING,
    "--report-only",
    is_flag=True,
    default=False,
    show_default=False,
    help="Only draw the report of what is there.",
)
@extra(
    "Method",
    "--reference",
    metavar="LABEL",
    help="Compare with this line of the recipe instead of the recipe's own reference; no run "
    "depends on it.",
)
@extra(
    "Method",
    "--metric",
    metavar="NAME",
    help="Report this metric instead of each task's own, where runs have it: eval_loss often "
    "tells more than accuracy. Rates are chosen by the task's own all the same.",
)
@extra(
    _RUNNING,
    "--png",
    is_flag=True,
    default=False,
    show_default=False,
    help="Also write each figure as PNG and SVG.",
)
@flags(*COMMON)
def command(
    recipe: Path,
    out: Path | None,
    workers: int,
    data_dir: Path | None,
    retry_failed: bool,
    dry_run: bool,
    report_only: bool,
    reference: str | None,
    metric: str | None,
    png: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compare methods at equal budgets, over tasks and seeds, and say what is evidence of what.

    RECIPE is a YAML file that names the grid. Learning rates are chosen on a validation split, with
    equal trials for every method; the reported split is looked at once. Every run leaves a record,
    failed ones too. Seeds and items are paired, and intervals cover both.
    """
    from gradrank.cli import compare_run
    from gradrank.cli.console import Console

    console = Console(as_json, quiet)
    if dry_run:
        compare_run.rehearse(recipe, console)
        return
    asked = compare_run.Asked(
        recipe=recipe,
        out=out,
        workers=workers,
        data_dir=None if data_dir is None else str(data_dir),
        retry=retry_failed,
        report_only=report_only,
        reference=reference,
        metric=metric,
        png=png,
    )
    compare_run.run(asked, console)
