"""What a finished run shows: report.html and the model card, from the run's files alone."""

from neuroada.reporting.run_report import write_report

__all__ = ["write_report"]
