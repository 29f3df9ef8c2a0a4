"""An evaluation as one HTML page that needs no network."""

from spn4cir.report.report import is_report, write_report

__all__ = ["is_report", "write_report"]
