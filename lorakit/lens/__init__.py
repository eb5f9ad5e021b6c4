"""Looking at adapters. Importing this imports torch and safetensors, not PEFT or transformers."""

from lorakit.lens._audit import audit
from lorakit.lens._html import write_html
from lorakit.lens._plots import write_plots
from lorakit.lens._report import AuditedModule, AuditReport, GroupSummary
from lorakit.lens._suggestions import RankSuggestion

__all__ = ["AuditReport", "AuditedModule", "GroupSummary", "RankSuggestion", "audit", "write_html", "write_plots"]
