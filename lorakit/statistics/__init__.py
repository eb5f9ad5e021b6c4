"""Did the task survive? Paired intervals, verdicts at a margin, and how many documents one needs. On numpy and scipy.

A score belongs to one document, and higher is better. A difference is candidate − reference on the same document. The
bounds `lower` and `upper` are one-sided, each at level `alpha`: together they are an interval at level 1 − 2·alpha.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.statistics._corpus import CorpusInterval as CorpusInterval
    from lorakit.statistics._corpus import jackknife_interval as jackknife_interval
    from lorakit.statistics._interval import Interval as Interval
    from lorakit.statistics._multiple import CandidateVerdicts as CandidateVerdicts
    from lorakit.statistics._multiple import FixedSequence as FixedSequence
    from lorakit.statistics._multiple import TaskVerdicts as TaskVerdicts
    from lorakit.statistics._multiple import combine_tasks as combine_tasks
    from lorakit.statistics._multiple import compare_candidates as compare_candidates
    from lorakit.statistics._multiple import fixed_sequence as fixed_sequence
    from lorakit.statistics._multiple import holm as holm
    from lorakit.statistics._paired import PairedInterval as PairedInterval
    from lorakit.statistics._paired import paired_interval as paired_interval
    from lorakit.statistics._seeds import SeedsInterval as SeedsInterval
    from lorakit.statistics._seeds import seeds_interval as seeds_interval
    from lorakit.statistics._verdict import Verdict as Verdict
    from lorakit.statistics._verdict import control_p_value as control_p_value
    from lorakit.statistics._verdict import documents_needed as documents_needed
    from lorakit.statistics._verdict import verdict as verdict
else:
    __getattr__, __dir__, __all__ = attach(__name__)
