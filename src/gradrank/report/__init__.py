"""Reports: figures and one self-contained HTML page, drawn from run records alone.

Loading this package loads no matplotlib: its words (:mod:`gradrank.report.text`) serve the command
line too, which must speak where drawing is broken.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gradrank.report.page import build, figures, write
    from gradrank.report.svg import Figure

__all__ = ["Figure", "build", "figures", "write"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'gradrank.report' has no attribute '{name}'")
    where = "gradrank.report.svg" if name == "Figure" else "gradrank.report.page"
    return getattr(importlib.import_module(where), name)
