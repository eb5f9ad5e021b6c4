"""Looking at adapters. Importing this imports torch and safetensors, not PEFT or transformers."""

from lorakit.lens._alignment import AlignedGroup, AlignedPair, AlignmentReport, alignment
from lorakit.lens._audit import audit
from lorakit.lens._compare import ComparedGroup, ComparedModule, ComparisonReport, compare
from lorakit.lens._html import write_html
from lorakit.lens._plots import write_plots
from lorakit.lens._report import AuditedModule, AuditReport, GroupSummary
from lorakit.lens._suggestions import RankSuggestion
from lorakit.lens._weights import ComparedWeight, ComparedWeights, WeightsReport, compare_weights

__all__ = [
    "AlignedGroup",
    "AlignedPair",
    "AlignmentReport",
    "AuditReport",
    "AuditedModule",
    "ComparedGroup",
    "ComparedModule",
    "ComparedWeight",
    "ComparedWeights",
    "ComparisonReport",
    "GroupSummary",
    "RankSuggestion",
    "WeightsReport",
    "alignment",
    "audit",
    "compare",
    "compare_weights",
    "write_html",
    "write_plots",
]
