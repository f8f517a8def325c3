"""``gradrank report``: one HTML page from the records of runs."""

from collections.abc import Sequence
from pathlib import Path

import click

from gradrank.cli.console import Console
from gradrank.cli.options import COMMON, extra, flags
from gradrank.cli.verb import Verb
from gradrank.core.errors import DataError

EXAMPLES = """\
gradrank report run-a run-b run-c/record.json --out comparison.html
gradrank report gradrank-demo --out demo.html --png"""
_MOST = 1000


@click.command(cls=Verb, examples=EXAMPLES)
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@extra(
    "Running",
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE",
    default=Path("report.html"),
    help="The page.",
)
@extra(
    "Running",
    "--png",
    is_flag=True,
    default=False,
    show_default=False,
    help="Also write each figure as PNG and SVG, into a folder beside the page.",
)
@flags("overwrite", *COMMON)
def command(
    paths: tuple[Path, ...], out: Path, png: bool, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Draw one self-contained HTML page from the records of one or several runs.

    PATH is a record.json, the folder of a run, or a folder of such folders.
    """
    console = Console(as_json, quiet)
    files = find_records(paths)
    with console.working():
        from gradrank.record import RunRecord
        from gradrank.report import write

        records = [RunRecord.load(file) for file in files]
        figures = out.parent / f"{out.stem}-figures" if png else None
        written = write(
            records, out, overwrite=overwrite, figures_dir=figures, formats=("png", "svg")
        )
    console.show(
        f"{len(records)} {'record' if len(records) == 1 else 'records'}: "
        + ", ".join(record.name for record in records[:8]),
        f"written: {out}"
        + (f" and {len(written) - 1} figure files in {figures}" if figures else ""),
    )
    console.result({"out": str(out), "records": len(records), "files": [str(f) for f in written]})


def find_records(paths: Sequence[Path]) -> list[Path]:
    """Find the records that paths stand for.

    Args:
        paths: Records, folders of runs, or folders of such folders.

    Returns:
        The files, each once, in the order given.

    Raises:
        DataError: If a path holds no record.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            own = path / "record.json"
            # What begins with a dot is a run whose writing was cut off, or one put aside.
            below = [file for file in path.glob("*/record.json") if file.parent.name[0] != "."]
            here = [own] if own.is_file() else sorted(below)
        else:
            here = [path] if path.is_file() else []
        if not here:
            what = "holds no record.json" if path.exists() else "does not exist"
            raise DataError(f"'{path}' {what}. Give a record.json or the folder of a run.")
        found += here
    if len(found) > _MOST:
        raise DataError(f"{len(found)} records were found, more than {_MOST}. Name fewer.")
    return list(dict.fromkeys(found))
