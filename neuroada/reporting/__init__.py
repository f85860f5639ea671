"""What a finished run or comparison tells: report.html and the adapter's model card, from the run's files alone."""

from neuroada.reporting.facts import write_facts
from neuroada.reporting.run_report import write_report

__all__ = ["write_facts", "write_report"]
