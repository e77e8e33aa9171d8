"""Reports: a run on one HTML page that needs no network and no other file. See :func:`write_report`."""

from genkit.evaluation.report.page import write_report

__all__ = ["write_report"]
