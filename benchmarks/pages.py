"""Tables on the pages of studies, each between two comments, so that none is typed by hand."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from gradrank.core.errors import DataError
from gradrank.core.files import write_text


def fill(page: Path, tables: Mapping[str, str]) -> None:
    """Write tables into a page, each between ``<!-- NAME -->`` and ``<!-- /NAME -->``.

    Args:
        page: The page.
        tables: Tables in Markdown by name.

    Raises:
        DataError: If the page is missing, or has no place for a table.
    """
    if not page.exists():
        raise DataError(f"page '{page}' does not exist, so no table was written.")
    text = page.read_text(encoding="utf-8")
    for name, table in tables.items():
        place = re.compile(rf"<!-- {name} -->\n.*?<!-- /{name} -->", re.DOTALL)
        if not place.search(text):
            raise DataError(
                f"page '{page}' has no place for table '{name}'. Put <!-- {name} --> and "
                f"<!-- /{name} --> on lines of their own."
            )
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = place.sub(lambda _, block=block: block, text)
    write_text(page, text, overwrite=True)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table.

    Args:
        head: Column titles.
        rows: Cells.
    """
    lines = [head, ["---"] * len(head), *rows]
    shown = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in shown)
