"""Did the task survive? Paired intervals, verdicts at a margin, and how many documents one needs. On numpy and scipy.

A score belongs to one document, and higher is better. A difference is candidate − reference on the same document. The
bounds `lower` and `upper` are one-sided, each at level `alpha`: together they are an interval at level 1 − 2·alpha.
"""

from __future__ import annotations

from lorakit.statistics._corpus import CorpusInterval, jackknife_interval
from lorakit.statistics._interval import Interval
from lorakit.statistics._multiple import (
    CandidateVerdicts,
    FixedSequence,
    TaskVerdicts,
    combine_tasks,
    compare_candidates,
    fixed_sequence,
    holm,
)
from lorakit.statistics._paired import PairedInterval, paired_interval
from lorakit.statistics._seeds import SeedsInterval, seeds_interval
from lorakit.statistics._verdict import Verdict, control_p_value, documents_needed, verdict

__all__ = [
    "CandidateVerdicts",
    "CorpusInterval",
    "FixedSequence",
    "Interval",
    "PairedInterval",
    "SeedsInterval",
    "TaskVerdicts",
    "Verdict",
    "combine_tasks",
    "compare_candidates",
    "control_p_value",
    "documents_needed",
    "fixed_sequence",
    "holm",
    "jackknife_interval",
    "paired_interval",
    "seeds_interval",
    "verdict",
]
