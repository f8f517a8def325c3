"""One self-contained page for a comparison, with its figures and its table as files."""

from collections.abc import Sequence
from pathlib import Path

from gradrank.evidence.comparison import Comparison
from gradrank.report.comparison.blocks import Part
from gradrank.report.comparison.breakdown import parts_csv
from gradrank.report.comparison.export import to_csv
from gradrank.report.comparison.sections import Grown, all_parts, figures_of
from gradrank.report.comparison.view import View, label, read_comparison
from gradrank.report.rendering import render, write_files
from gradrank.report.svg import Figure, known_format


def build_comparison(
    comparison: Comparison, finished: int | None = None, planned: int | None = None
) -> str:
    """Draw the report of a comparison as one HTML page.

    Args:
        comparison: The comparison.
        finished: Finished runs of the grid, of all phases; None if unknown.
        planned: Runs that the grid has in all; None if unknown.

    Returns:
        HTML text that needs no network and no other file. The same comparison gives the same text.
    """
    view = read_comparison(comparison)
    return _render(view, all_parts(view, Grown(finished, planned)))


def write_comparison(
    comparison: Comparison,
    out: str | Path,
    overwrite: bool = False,
    figures_dir: str | Path | None = None,
    formats: Sequence[str] = ("png", "svg"),
    csv: str | Path | None = None,
    finished: int | None = None,
    planned: int | None = None,
) -> list[Path]:
    """Write the report of a comparison, and if wanted its figures and its table as files.

    Nothing is written if any of the files exists and may not be replaced.

    Args:
        comparison: The comparison.
        out: The HTML file.
        overwrite: Whether existing files may be replaced.
        figures_dir: Folder for the figures; None writes none.
        formats: File formats of the figures: ``svg``, ``png``, ``pdf``.
        csv: File for the table as CSV; None writes none. Where tasks have parts, theirs stand in
            a second file, whose name ends in ``-parts``.
        finished: Finished runs of the grid, of all phases; None if unknown.
        planned: Runs that the grid has in all; None if unknown.

    Returns:
        What was written: the page, the tables, the figures.
    """
    kinds = [known_format(name) for name in dict.fromkeys(formats)]
    view = read_comparison(comparison)
    parts = all_parts(view, Grown(finished, planned))
    texts = {Path(out): _render(view, parts)}
    if csv is not None:
        texts[Path(csv)] = to_csv(view)
        parts_text = parts_csv(view)
        if parts_text:
            texts[Path(csv).with_stem(f"{Path(csv).stem}-parts")] = parts_text
    drawn: dict[Path, Figure] = {}
    if figures_dir is not None:
        figures = [figure for part in parts for figure in figures_of(part.blocks)]
        folder = Path(figures_dir)
        drawn = {folder / f"{figure.name}.{kind}": figure for figure in figures for kind in kinds}
    return write_files(texts, drawn, overwrite)


def _render(view: View, parts: Sequence[Part]) -> str:
    return render(
        "comparison.html",
        packages=["gradrank.report.comparison", "gradrank.report"],
        styles=["style.css", "comparison.css"],
        scripts=["table.js", "filter.js"],
        brand="comparison",
        title=f"Comparison: {label(view.source.name, 100)}",
        sections=parts,
    )
