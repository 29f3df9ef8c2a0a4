"""An evaluation as one HTML page that needs no network."""

from spn4cir.report.report import write_report

__all__ = ["write_report"]
