"""`kvcompile inspect --html`: an artifact as one self-contained page."""

from kvcompile.report.data import report_data
from kvcompile.report.page import page

__all__ = ["page", "report_data"]
