"""The evidence of a run as one HTML page that opens offline, and its figures as SVG and PNG."""

from raysae.report.page import write_report

__all__ = ["write_report"]
