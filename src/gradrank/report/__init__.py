"""Reports: figures and one self-contained HTML page, drawn from run records alone."""

from gradrank.report.page import build, figures, write
from gradrank.report.svg import Figure

__all__ = ["Figure", "build", "figures", "write"]
