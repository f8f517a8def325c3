"""The report of a comparison: one page, its figures as files and the table as CSV."""

from gradrank.report.comparison.page import build_comparison, write_comparison

__all__ = ["build_comparison", "write_comparison"]
