"""How the results of the lower floors reach what draws them in a notebook."""

import importlib
from typing import Any


def notebook_html(drawing: str, *parts: Any) -> str:
    """Return what a notebook shows of an object.

    Drawing lies floors above the objects that are drawn, so it is found at run time; nobody who
    does not look at an object in a notebook pays for the drawing.

    Args:
        drawing: Name of the function of :mod:`gradrank.report.notebook`.
        *parts: Its arguments.

    Returns:
        A fragment of HTML.
    """
    return getattr(importlib.import_module("gradrank.report.notebook"), drawing)(*parts)
