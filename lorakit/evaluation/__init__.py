"""Did the task survive? Tasks, scores, paired verdicts and certificates."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorakit._lazy import attach  # not `from lorakit import`, which waits for a thread that imports lorakit

if TYPE_CHECKING:
    from lorakit.evaluation._agreement import Agreement as Agreement
    from lorakit.evaluation._agreement import DocumentAgreement as DocumentAgreement
    from lorakit.evaluation._agreement import Estimate as Estimate
    from lorakit.evaluation._agreement import agreement as agreement
    from lorakit.evaluation._agreement import agreement_task as agreement_task
    from lorakit.evaluation._attach import load_adapted as load_adapted
    from lorakit.evaluation._certificate import Certificate as Certificate
    from lorakit.evaluation._certificate import read_certificate as read_certificate
    from lorakit.evaluation._certified_task import CertifiedTask as CertifiedTask
    from lorakit.evaluation._certify import CertificationPlan as CertificationPlan
    from lorakit.evaluation._certify import certify as certify
    from lorakit.evaluation._certify import evaluate_adapters as evaluate_adapters
    from lorakit.evaluation._classification import classification as classification
    from lorakit.evaluation._digests import document_hashes as document_hashes
    from lorakit.evaluation._evaluate import evaluate as evaluate
    from lorakit.evaluation._hub import push_to_hub as push_to_hub
    from lorakit.evaluation._models import LoadOptions as LoadOptions
    from lorakit.evaluation._models import load_base as load_base
    from lorakit.evaluation._scores import Scores as Scores
    from lorakit.evaluation._scores import compare as compare
    from lorakit.evaluation._scores import paired_interval as paired_interval
    from lorakit.evaluation._task_kinds import Task as Task
    from lorakit.evaluation._tasks import choices as choices
    from lorakit.evaluation._tasks import exact_match as exact_match
    from lorakit.evaluation._tasks import function as function
    from lorakit.evaluation._tasks import lm_eval as lm_eval
    from lorakit.evaluation._tasks import loss as loss
    from lorakit.evaluation._written import write_certified as write_certified
else:
    __getattr__, __dir__, __all__ = attach(__name__)
