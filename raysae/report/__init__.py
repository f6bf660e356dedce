"""The evidence of a run as one HTML page that opens offline, and its figures as SVG and PNG."""

from raysae.report.page import Part, page
from raysae.report.sweep import write_report

__all__ = ["Part", "page", "write_report"]
