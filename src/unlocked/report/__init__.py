"""A report one can open in a browser, made from the files of a run or of a comparison."""

from .page import write_report

__all__ = ["write_report"]
