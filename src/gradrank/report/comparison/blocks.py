"""What this page has beyond the blocks of a report: rich tables, lists, and blocks that fold."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradrank.report.blocks import Block


@dataclass(frozen=True)
class Entry:
    """One cell of a grid.

    Attributes:
        text: What is shown.
        sort: What it is sorted by; None sorts last.
        numeric: Whether it is set flush right.
        small: A second line, in small print.
        tone: ``better``, ``worse`` or ""; never the only sign.
        flag: A warning shown as a badge.
    """

    text: str
    sort: float | str | None = None
    numeric: bool = False
    small: str = ""
    tone: str = ""
    flag: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a grid; ``keys`` are the positions of its options, one for each filter."""

    cells: Sequence[Entry]
    keys: Sequence[int] = ()


@dataclass(frozen=True)
class Filter:
    """One choice above a grid: its name and its options."""

    name: str
    options: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """One table that can be sorted, and filtered where it has filters; both need scripts."""

    kind: ClassVar[str] = "grid"
    name: str
    caption: str
    head: Sequence[Entry]
    lines: Sequence[Line]
    filters: Sequence[Filter] = ()


@dataclass(frozen=True)
class Points:
    """A list of sentences."""

    kind: ClassVar[str] = "points"
    items: Sequence[str]


@dataclass(frozen=True)
class Fold:
    """Blocks behind a heading that opens and closes without scripts."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: "Sequence[Piece]"
    open: bool = False
    note: str = ""


Piece = Block | Grid | Points | Fold


@dataclass(frozen=True)
class Part:
    """One section of the page."""

    name: str
    title: str
    blocks: Sequence[Piece]
