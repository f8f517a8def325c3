"""One self-contained HTML page from records: nothing is fetched, everything is escaped."""

from collections.abc import Sequence
from pathlib import Path

from gradrank.record import RunRecord
from gradrank.report.blocks import Gallery, Section
from gradrank.report.reading import read_runs
from gradrank.report.rendering import render, write_files
from gradrank.report.sections import all_sections, gather
from gradrank.report.svg import Figure, known_format
from gradrank.report.text import clean, listed
from gradrank.report.view import Run


def build(records: Sequence[RunRecord], title: str | None = None) -> str:
    """Draw the report of one or several runs as one HTML page.

    Args:
        records: The records, in the order in which they shall appear; several of one budget are
            compared with each other.
        title: Heading of the page; None makes one from model and methods.

    Returns:
        HTML text that needs no network and no other file. The same records give the same text.
    """
    runs = read_runs(records)
    return _render(runs, all_sections(gather(runs)), title)


def figures(records: Sequence[RunRecord]) -> list[Figure]:
    """Draw the figures of the report alone, for a notebook or a paper.

    Args:
        records: The records.

    Returns:
        The figures, in the order of the page; their names are distinct.
    """
    return _figures_of(all_sections(gather(read_runs(records))))


def write(
    records: Sequence[RunRecord],
    path: str | Path,
    overwrite: bool = False,
    figures_dir: str | Path | None = None,
    formats: Sequence[str] = ("svg",),
    title: str | None = None,
) -> list[Path]:
    """Write the report, and if wanted each figure as files of its own.

    Nothing is written if any of the files exists and may not be replaced.

    Args:
        records: The records.
        path: The HTML file.
        overwrite: Whether existing files may be replaced.
        figures_dir: Folder for the figures; None writes none.
        formats: File formats of the figures: ``svg``, ``png``, ``pdf``.
        title: Heading of the page.

    Returns:
        What was written, the page first.
    """
    kinds = [known_format(name) for name in dict.fromkeys(formats)]
    runs = read_runs(records)
    sections = all_sections(gather(runs))
    files: dict[Path, Figure] = {}
    if figures_dir is not None:
        folder = Path(figures_dir)
        drawn = _figures_of(sections)
        files = {folder / f"{figure.name}.{kind}": figure for figure in drawn for kind in kinds}
    return write_files({Path(path): _render(runs, sections, title)}, files, overwrite)


def _figures_of(sections: Sequence[Section]) -> list[Figure]:
    return [
        figure
        for section in sections
        for block in section.blocks
        if isinstance(block, Gallery)
        for figure in block.figures
    ]


def _render(runs: Sequence[Run], sections: Sequence[Section], title: str | None) -> str:
    return render(
        "report.html",
        packages=["gradrank.report"],
        styles=["style.css"],
        scripts=["table.js"],
        brand="report",
        title=clean(title) if title else _title(runs),
        sections=sections,
    )


def _title(runs: Sequence[Run]) -> str:
    methods = list(dict.fromkeys(run.method for run in runs))
    models = dict.fromkeys(clean(m, 80) for run in runs if (m := run.fact("model")) is not None)
    what = "Plan" if all(run.kind == "plan" for run in runs) else "Training"
    on = f" on {listed(models)}" if models else ""
    return f"{what}: {listed(methods)}{on}"
