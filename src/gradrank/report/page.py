"""One self-contained HTML page from records: nothing is fetched, everything is escaped."""

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jinja2

from gradrank.core.errors import OutputError
from gradrank.core.files import write_text
from gradrank.record import RunRecord
from gradrank.report.blocks import Gallery, Section
from gradrank.report.reading import read_runs
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

    Raises:
        OutputError: If a file exists and may not be replaced.
    """
    kinds = [known_format(name) for name in dict.fromkeys(formats)]
    runs = read_runs(records)
    sections = all_sections(gather(runs))
    page = Path(path)
    files: list[tuple[Path, Figure]] = []
    if figures_dir is not None:
        folder = Path(figures_dir)
        drawn = _figures_of(sections)
        files = [(folder / f"{figure.name}.{kind}", figure) for figure in drawn for kind in kinds]
    taken = [str(each) for each in (page, *(file for file, _ in files)) if each.exists()]
    if taken and not overwrite:
        raise OutputError(
            f"{listed(taken[:3])} exists already. Choose another name or pass --overwrite."
        )
    write_text(page, _render(runs, sections, title), overwrite)
    for file, figure in files:
        figure.save(file, overwrite)
    return [page, *(file for file, _ in files)]


def _figures_of(sections: Sequence[Section]) -> list[Figure]:
    return [
        figure
        for section in sections
        for block in section.blocks
        if isinstance(block, Gallery)
        for figure in block.figures
    ]


def _render(runs: Sequence[Run], sections: Sequence[Section], title: str | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gradrank.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    script = _asset(environment, "table.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return environment.get_template("report.html").render(
        title=clean(title) if title else _title(runs),
        sections=sections,
        style=_asset(environment, "style.css"),
        script=script,
        script_digest=digest,
    )


def _asset(environment: jinja2.Environment, name: str) -> str:
    # Read through the loader but not rendered: only files of this package are ever trusted.
    loader = environment.loader
    assert loader is not None
    return loader.get_source(environment, name)[0]


def _title(runs: Sequence[Run]) -> str:
    methods = list(dict.fromkeys(run.method for run in runs))
    models = dict.fromkeys(clean(m, 80) for run in runs if (m := run.fact("model")) is not None)
    what = "Plan" if all(run.kind == "plan" for run in runs) else "Training"
    on = f" on {listed(models)}" if models else ""
    return f"{what}: {listed(methods)}{on}"
