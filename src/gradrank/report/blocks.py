"""What a page is made of: sections of paragraphs, tables, figures and quoted text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gradrank.report.svg import Figure


@dataclass(frozen=True)
class Paragraph:
    """One paragraph; ``tone`` is ``plain``, ``note`` (set off) or ``warn`` (a warning)."""

    kind: ClassVar[str] = "paragraph"
    text: str
    tone: str = "plain"
    lead: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: What is shown.
        sort: What it is sorted by; None sorts last.
        numeric: Whether it is set flush right.
        flag: A warning shown as a badge beside the text.
    """

    text: str
    sort: float | str | None = None
    numeric: bool = False
    flag: str = ""


@dataclass(frozen=True)
class Table:
    """One table; an ``interactive`` one can be sorted and searched, and starts folded.

    ``hint`` stands in the empty search field.
    """

    kind: ClassVar[str] = "table"
    name: str
    caption: str
    head: Sequence[Cell]
    rows: Sequence[Sequence[Cell]]
    interactive: bool = False
    hint: str = "name or type"


@dataclass(frozen=True)
class Gallery:
    """Figures, side by side where there is room for it, and notes that belong beside them."""

    kind: ClassVar[str] = "gallery"
    figures: Sequence[Figure]
    notes: Sequence[Paragraph] = ()


@dataclass(frozen=True)
class Quote:
    """Text to copy, shown as it is; long ones start folded."""

    kind: ClassVar[str] = "quote"
    title: str
    text: str
    folded: bool = False


@dataclass(frozen=True)
class Facts:
    """Names and values, as a description list."""

    kind: ClassVar[str] = "facts"
    title: str
    pairs: Sequence[tuple[str, str]]
    folded: bool = False


Block = Paragraph | Table | Gallery | Quote | Facts


@dataclass(frozen=True)
class Section:
    """One section of the page."""

    name: str
    title: str
    blocks: Sequence[Block]


def num(text: str, sort: Any = None) -> Cell:
    """Return a numeric cell.

    Args:
        text: What is shown.
        sort: The number behind it.

    Returns:
        The cell.
    """
    return Cell(text, sort, numeric=True)
