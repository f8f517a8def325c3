"""Figures as inline SVG: one look, unique ids, a text alternative, the same bytes every time.

The only place that renders. No pyplot: nothing global is kept between figures.
"""

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.figure import Figure as Canvas

from gradrank.core.errors import OptionError, nearest
from gradrank.core.files import write_atomic, write_text

FORMATS = ("svg", "png", "pdf")
_SVG = "http://www.w3.org/2000/svg"
# An upright rectangle as matplotlib spells it, from any corner, either way round.
_BOX = re.compile(
    r"M (\S+) (\S+) L (?:(\S+) \2 L \3 (\S+) L \1 \4|\1 (\S+) L (\S+) \5 L \6 \2)"
    r"(?: L \1 \2)? z"
)
_FONTS = "'DejaVu Sans',Verdana,system-ui,sans-serif"
_LOOK: dict[str, Any] = {
    "svg.fonttype": "none",
    # Names are untrusted: a dollar sign in one must not start math markup.
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 12,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 12,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "legend.fontsize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "hatch.linewidth": 0.9,
    "figure.dpi": 72,
    "savefig.dpi": 72,
    "figure.facecolor": "white",
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: Identifier, lower-case letters, digits and hyphens; also its file name.
        title: Heading, and first sentence of the text alternative.
        caption: How to read it and what it shows.
        svg: Self-contained ``<svg>`` element.
        data: Exactly what was drawn, as plain data.
        width: Natural width in CSS pixels.
        headline: What the figure shows, in one sentence; "" if the caption says it all.
        tall: Whether there is room for two other figures beside it.
    """

    name: str
    title: str
    caption: str
    svg: str = field(repr=False)
    data: Mapping[str, Any] = field(repr=False)
    width: int
    _canvas: Canvas = field(repr=False, compare=False)
    headline: str = ""
    tall: bool = False

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the figure as a file, atomically.

        Args:
            path: The file; its ending (``.svg``, ``.png``, ``.pdf``) chooses the format.
            overwrite: Whether an existing file may be replaced.
        """
        path = Path(path)
        kind = known_format(path.suffix.lstrip("."))
        if kind == "svg":
            write_text(path, self.svg + "\n", overwrite)
            return
        dates = {"Software": None} if kind == "png" else {"CreationDate": None}
        with look():
            content = _print(self._canvas, kind, dpi=180, metadata=dates)
        write_atomic(path, lambda temporary: _write_bytes(temporary, content), overwrite)


def known_format(name: str) -> str:
    """Check the name of a figure format.

    Args:
        name: The name.

    Returns:
        The name in lower case.

    Raises:
        OptionError: If it is not one of ``FORMATS``.
    """
    if name.lower() not in FORMATS:
        raise OptionError(
            f"figure format '{name}' is unknown, so no figure was written. {nearest(name, FORMATS)}"
        )
    return name.lower()


@contextmanager
def look() -> Iterator[None]:
    """Draw in the report's style, whatever the user's matplotlib settings are.

    Usable as a decorator too (``@look()``).

    Yields:
        Nothing; the settings are back as they were afterwards.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        # A script that the drawing font lacks is still text in the SVG, shown by the browser.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        settings: dict[Any, Any] = {**mpl.rcParamsDefault, **_LOOK}
        for key, value in settings.items():
            # The backend is the caller's business, and no figure here has dates.
            if not key.startswith(("backend", "webagg", "date.epoch")):
                mpl.rcParams[key] = value
        yield


def canvas(width: float, height: float) -> Canvas:
    """Return an empty canvas.

    Args:
        width: In CSS pixels.
        height: In CSS pixels.

    Returns:
        The canvas; one unit of length in it is one CSS pixel.
    """
    return Canvas(figsize=(width / 72, height / 72), dpi=72)


def finish(
    drawn: Canvas,
    name: str,
    title: str,
    caption: str,
    data: Mapping[str, Any],
    headline: str = "",
    tall: bool | None = None,
) -> Figure:
    """Turn a canvas into a figure.

    Args:
        drawn: The canvas.
        name: Identifier; prefix of all ids inside the SVG.
        title: Heading.
        caption: Caption.
        data: What was drawn.
        headline: What it shows, in one sentence.
        tall: Whether there is room for two other figures beside it; None: where it is higher than
            wide.

    Returns:
        The figure.
    """
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    raw = _print(drawn, "svg", metadata=metadata).decode("utf-8")
    width = round(drawn.get_figwidth() * 72)
    svg = _embeddable(raw, name, title)
    high = drawn.get_figheight() > drawn.get_figwidth() if tall is None else tall
    return Figure(name, title, caption, svg, data, width, drawn, headline, high)


def _short_box(match: re.Match[str]) -> str:
    """Spell a rectangle in half the bytes: heat maps have thousands."""
    x, y, right, down, below, across = match.groups()
    return f"M{x} {y}H{right}V{down}H{x}z" if right else f"M{x} {y}V{below}H{across}V{y}z"


def _print(drawn: Canvas, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    drawn.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def _write_bytes(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _embeddable(raw: str, name: str, title: str) -> str:
    """Return an ``<svg>`` that can stand beside others in one page."""
    root = ElementTree.fromstring(raw)
    ids: dict[str, str] = {}
    for element in root.iter():
        if "id" in element.attrib:
            ids.setdefault(element.attrib["id"], f"{name}-{len(ids)}")
    used: set[str] = set()
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: text for key, text in element.attrib.items()}
        element.attrib.clear()
        element.attrib.update({k: _rewrite(k, v, ids, used) for k, v in attributes.items()})
        if element.get("transform", "").startswith("rotate(-0 "):
            del element.attrib["transform"]
    view = root.get("viewBox", "0 0 100 100")
    root.attrib.clear()
    root.attrib.update(
        {
            "xmlns": _SVG,
            "viewBox": view,
            "role": "img",
            "aria-label": title,
            "font-family": _FONTS,
            "style": "stroke-linejoin:round;stroke-linecap:butt",
        }
    )
    _slim(root, used)
    label = ElementTree.Element("title")
    label.text = title
    root.insert(0, label)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _slim(parent: ElementTree.Element, used: set[str]) -> None:
    """Drop what only costs bytes: unused ids, bare groups, indentation, style and metadata."""
    children = []
    for child in list(parent):
        if child.tag in {"style", "metadata"}:
            continue
        _slim(child, used)
        if child.get("id") not in used:
            child.attrib.pop("id", None)
        bare = child.tag in {"g", "defs"} and not len(child)
        if child.tag == "g" and not child.attrib:
            children.extend(child)
        elif not bare:
            children.append(child)
    parent[:] = children
    if parent.tag not in {"text", "tspan"}:
        parent.text = None
    for child in children:
        child.tail = "\n"


def _rewrite(key: str, text: str, ids: Mapping[str, str], used: set[str]) -> str:
    """Return an attribute with renamed ids and without needless digits."""

    def renamed(match: re.Match[str]) -> str:
        used.add(ids[match[1]])
        return match[0].replace(match[1], ids[match[1]])

    if key == "id":
        return ids[text]
    if key == "href":
        return re.sub(r"^#(.+)$", renamed, text)
    if key in {"d", "x", "y", "width", "height", "transform"}:
        text = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), text)
        text = " ".join(text.split())
        return _BOX.sub(_short_box, text) if key == "d" else text
    if key == "style":
        text = re.sub(r"font-family:[^;]*(;\s*|$)", "", text)
        text = re.sub(r"([:;])\s+", r"\1", text)
    return re.sub(r"url\(#([^)]+)\)", renamed, text)
