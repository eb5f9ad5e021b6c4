"""Without labels: how far a candidate's next tokens are those of the reference, on prompts of one's own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lorakit._checks import check_number
from lorakit._figures import new_figure
from lorakit._report import Report
from lorakit._signals import restoring
from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.data import loader
from lorakit.errors import EvaluationError
from lorakit.evaluation._attach import AttachedAdapter, check_applied, without_adapters
from lorakit.evaluation._digests import (
    adapter_digest,
    data_digest,
    digest,
    document_digests,
    document_hashes,
    tokenizer_digest,
)
from lorakit.evaluation._models import AdapterSource, LoadOptions, label_of, load_base, load_tokenizer
from lorakit.evaluation._scores import scores_of
from lorakit.evaluation._task_kinds import Scored
from lorakit.statistics import PairedInterval, Verdict, paired_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import PeftModel

    Side = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Estimate:
    """A mean over documents, with one-sided bounds."""

    mean: float
    lower: float
    upper: float


@dataclass(frozen=True)
class DocumentAgreement:
    """One document: its hash, its number of predicted tokens, and means over them.

    `kl` is KL(reference ‖ candidate) in nats a token, `top1` the share of tokens for which the likeliest prediction is
    the same; `adapter_kl` and `adapter_top1` are those of reference and base model.
    """

    document: str
    tokens: int
    kl: float
    top1: float
    adapter_kl: float
    adapter_top1: float


@dataclass(frozen=True, repr=False)
class Agreement(Report):
    """How far the candidate predicts what the reference predicts, beside what the reference changes in the base model.

    Means over documents, with one-sided bounds, each at `alpha`. `verdict` is that of −KL at `margin`, where one is
    given: PASS where the upper bound of `kl` lies below it.
    """

    base: str
    reference: str
    candidate: str
    alpha: float
    margin: float | None
    verdict: Verdict | None
    method: str
    tokens: int
    kl: Estimate
    top1: Estimate
    adapter_kl: Estimate
    adapter_top1: Estimate
    documents: tuple[DocumentAgreement, ...]

    @property
    def headline(self) -> str:
        """Both shares of agreement in one line, since neither means much alone."""
        verdict = "" if self.verdict is None else f"{self.verdict} at margin {self.margin:g} nats: "
        return (
            f"{verdict}{self.candidate} has the likeliest next token of {self.reference} in {self.top1.mean:.2%} of "
            f"{self.tokens} places; {self.base} without an adapter in {self.adapter_top1.mean:.2%}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """The figures with their bounds."""
        level = f"one-sided {100 * (1 - self.alpha):g} % bounds over {len(self.documents)} documents, {self.method}"
        lost = "" if self.adapter_kl.mean == 0 else f", {self.kl.mean / self.adapter_kl.mean:.2%} of it"
        return (
            f"KL from the reference: candidate {_nats(self.kl)}{lost}; base model {_nats(self.adapter_kl)}",
            f"same likeliest token: candidate {_share(self.top1)}; base model {_share(self.adapter_top1)}",
            level,
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row a document."""
        rows: list[dict[str, Any]] = self.to_dict()["documents"]
        return rows

    def plot(self) -> Figure:
        """Each document's KL from the reference: the candidate's against the base model's."""
        figure = new_figure(5, 5)
        axes = figure.subplots()
        axes.scatter([row.adapter_kl for row in self.documents], [row.kl for row in self.documents], s=10)
        axes.set(xlabel="KL(reference ‖ base), nats a token", ylabel="KL(reference ‖ candidate), nats a token")
        return figure


def agreement(
    base: Any,
    reference: AdapterSource | PeftModel,
    candidate: AdapterSource | PeftModel,
    prompts: Any,
    *,
    margin: float | None = None,
    alpha: float = 0.05,
    groups: Sequence[Any] | None = None,
    length: int = 512,
    batch_size: int = 1,
    num_examples: int | None = None,
    tokenizer: Any = None,
    options: LoadOptions | None = None,
    progress: bool = True,
    **data: Any,
) -> Agreement:
    """How far the candidate's predictions are the reference's, on prompts without labels.

    Every token of a text (of a prompt with a completion: every token of the completion) is predicted from those before
    it by the reference, the candidate and the base model: KL(reference ‖ ·) in nats a token, and whether the likeliest
    token is the same. Means over a document's tokens are its scores; bounds are t bounds over documents.

    Args:
        base: the base model: a path, a Hub id or a model.
        reference, candidate: an adapter each: a path, a Hub id or a PeftModel.
        prompts: a list of texts, or a source of `lorakit.data.loader`, or batches with `labels`.
        margin: how many nats a token the candidate may differ, for a verdict; chosen beforehand.
        alpha: the level of each one-sided bound.
        groups: which passage each document belongs to, where several share one.
        length: the longest document in tokens.
        batch_size: documents a batch; the log-probabilities of three models for one batch are held at once.
        num_examples: how many documents at most.
        tokenizer: None: from beside the reference, else the base model's; that of the candidate must make the same
            tokens of the prompts.
        options: how the base model is loaded.
        progress: show progress bars on stderr.
        data: more options of `lorakit.data.loader`, such as `columns` and `split`.
    Raises: EvaluationError for adapters that do not fit or are not applied, documents that are there twice, and a
        candidate whose own tokenizer or chat template makes other tokens of the prompts; DataError for prompts that
        cannot be read.

    Example:
        >>> import torch
        >>> from peft import LoraConfig, get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        >>> base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **size))
        >>> adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        >>> ids = torch.arange(32).view(8, 4)
        >>> agreement(base, adapter, adapter, [{"input_ids": ids, "labels": ids}], progress=False).top1.mean
        1.0
    """
    if margin is not None:
        check_number("margin", margin, above=0)
    model = load_base(base, options)
    source = Prompts(prompts, length, batch_size, num_examples, data)
    if tokenizer is None:
        tokenizer = load_tokenizer(base, reference, options)
        _check_same_tokens(source, tokenizer, load_tokenizer(base, candidate, options), [reference, candidate])
    attached = [AttachedAdapter(model, adapter) for adapter in (reference, candidate)]
    for one in attached:
        with one.applied() as with_adapter:
            check_applied(with_adapter, one.name)

    @restoring
    def plain() -> Iterator[Any]:
        with without_adapters(model):
            yield model

    sides: list[Side] = [attached[0].applied, attached[1].applied, plain]
    found = list(_compared(sides, source.batches(tokenizer, progress=progress), progress))
    rows = tuple(
        DocumentAgreement(one.document, one.tokens, one.kl[0], one.top1[0], one.kl[1], one.top1[1]) for one in found
    )
    scores_of("agreement", label_of(candidate), [row.document for row in rows], [row.kl for row in rows], {})
    kl = _interval([-row.kl for row in rows], alpha, groups, zero=0.5)
    shares = {name: _interval([getattr(row, name) for row in rows], alpha, groups) for name in ("top1", "adapter_top1")}
    adapter_kl = _interval([-row.adapter_kl for row in rows], alpha, groups, zero=0.5)
    return Agreement(
        base=label_of(base),
        reference=attached[0].name,
        candidate=attached[1].name,
        alpha=alpha,
        margin=margin,
        verdict=None if margin is None else kl.verdict(margin),
        method=kl.method,
        tokens=sum(row.tokens for row in rows),
        kl=_negated(kl),
        adapter_kl=_negated(adapter_kl),
        documents=rows,
        **{name: Estimate(i.difference, max(i.lower, 0.0), min(i.upper, 1.0)) for name, i in shares.items()},
    )


@dataclass(frozen=True)
class Prompts:
    """Texts, a source of `lorakit.data.loader`, or batches."""

    source: Any
    length: int
    batch_size: int
    num_examples: int | None
    options: Mapping[str, Any]

    def batches(self, tokenizer: Any, *, limit: int | None = None, progress: bool = False) -> Any:
        """Batches of tokens with labels. Raises: EvaluationError without a tokenizer; as `lorakit.data.loader`."""
        source = self.source
        limits = [number for number in (self.num_examples, limit) if number is not None]
        if isinstance(source, Sequence) and not isinstance(source, str) and all(isinstance(s, str) for s in source):
            from datasets import Dataset

            source = Dataset.from_dict({"text": list(source)})
        if not isinstance(source, str | os.PathLike) and not hasattr(source, "column_names"):
            if limits or self.options:
                raise TypeError("Options of the data are for texts, paths and Datasets; these prompts are batches.")
            return source
        if tokenizer is None:
            raise EvaluationError("Prompts need the model's tokenizer; pass `tokenizer`.")
        return loader(
            source,
            tokenizer,
            length=self.length,
            batch_size=self.batch_size,
            num_examples=min(limits) if limits else None,
            progress=progress,
            **self.options,
        )


def _check_same_tokens(source: Prompts, reference: Any, candidate: Any, adapters: Sequence[Any]) -> None:
    """Raise EvaluationError where two tokenizers make different tokens of the prompts."""
    if reference is None or candidate is None or tokenizer_digest(reference) == tokenizer_digest(candidate):
        return
    sides = [source.batches(tokenizer) for tokenizer in (reference, candidate)]
    if document_hashes(sides[0]) != document_hashes(sides[1]):
        names = " and ".join(repr(label_of(adapter)) for adapter in adapters)
        raise EvaluationError(
            f"The tokenizers and chat templates of {names} make different tokens of the prompts. Pass the `tokenizer` "
            f"that both are served with."
        )


@dataclass(frozen=True)
class AgreementTask:
    """A task whose score is minus the cross-entropy of the model's next tokens under the reference's, in nats a token.

    The reference's own score is minus its entropy, and so the difference of the two is −KL(reference ‖ model).
    """

    name: str
    reference: AdapterSource | PeftModel
    prompts: Prompts
    margin: float | None = None
    cacheable: bool = field(default=True, init=False)

    def fingerprint(self) -> str:
        """A hash of the reference and of the prompts."""
        prompts = self.prompts
        options = sorted(map(str, prompts.options.items()))
        parts = [data_digest(prompts.source), prompts.length, prompts.num_examples, options]
        return digest([adapter_digest(self.reference), parts])

    def score(self, model: Any, tokenizer: Any, *, limit: int | None, progress: bool) -> Scored:
        """Run the reference and the model on every document."""
        inner: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
        configs = getattr(model, "peft_config", None) or {}
        if any(getattr(config, "bias", "none") != "none" for config in configs.values()):
            raise EvaluationError(f"Task {self.name!r} is not for adapters that change the base model's biases.")
        reference = AttachedAdapter(inner, self.reference)
        sides: list[Side] = [reference.applied, lambda: nullcontext(model)]
        found = list(_compared(sides, self.prompts.batches(tokenizer, limit=limit, progress=progress), progress))
        settings = {"length": self.prompts.length, "score": "minus the cross-entropy under the reference"}
        return Scored([one.document for one in found], [-one.cross_entropies[0] for one in found], settings)


def agreement_task(
    reference: AdapterSource | PeftModel,
    prompts: Any,
    *,
    name: str = "agreement",
    length: int = 512,
    batch_size: int = 1,
    num_examples: int | None = None,
    margin: float | None = None,
    **data: Any,
) -> AgreementTask:
    """A task for `certify` on which a candidate's difference from the reference is −KL(reference ‖ candidate).

    A document's score is minus the cross-entropy of the model's next tokens under the reference's, in nats a token.
    Arguments as in `agreement`; `margin` is how many nats a token the candidate may differ.
    """
    if margin is not None:
        check_number("margin", margin, above=0)
    return AgreementTask(name, reference, Prompts(prompts, length, batch_size, num_examples, data), margin)


@dataclass(frozen=True)
class _Compared:
    """One document: means over its tokens, for each side after the first."""

    document: str
    tokens: int
    kl: tuple[float, ...]
    cross_entropies: tuple[float, ...]
    top1: tuple[float, ...]


@torch.no_grad()
def _compared(sides: Sequence[Side], batches: Any, progress: bool) -> Iterator[_Compared]:
    for batch in tqdm(batches, desc="agreement", unit="batch", disable=not progress, delay=1.0):
        predictions = [log_probabilities(side, batch) for side in sides]
        for i, document in enumerate(document_digests(batch)):
            first, *others = (rows[i] for rows in predictions)
            if len(first) == 0:
                continue
            if any(bool(rows.isnan().any()) for rows in (first, *others)):
                raise EvaluationError(
                    f"A model's predictions for document {document[:12]}… are NaN. Is its adapter finite?"
                )
            yield _Compared(
                document,
                len(first),
                tuple(max(0.0, _expected(first, first - other)) for other in others),
                tuple(-_expected(first, other) for other in others),
                tuple(float((first.argmax(-1) == other.argmax(-1)).double().mean()) for other in others),
            )


def log_probabilities(side: Side, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """For each document the log-probabilities (places, vocabulary) in float32, where the next token has a label."""
    with side() as model:
        device = model.get_input_embeddings().weight.device
        inputs = {key: value.to(device) for key, value in batch.items() if key != "labels"}
        logits = model(**inputs, use_cache=False).logits
    labelled = (batch["labels"][:, 1:] != IGNORED_LABEL).to(logits.device)
    return [F.log_softmax(row[:-1][places].float(), dim=-1) for row, places in zip(logits, labelled, strict=True)]


def _expected(log_probabilities: Tensor, values: Tensor) -> float:
    """Mean over places of Σ p · value; tokens of probability 0 do not count."""
    terms = torch.where(log_probabilities == -torch.inf, 0, log_probabilities.exp() * values)
    return float(terms.sum(-1, dtype=torch.float64).mean())


def _interval(values: list[float], alpha: float, groups: Sequence[Any] | None, *, zero: float = 0.0) -> PairedInterval:
    """The mean of values; a `zero` other than 0 keeps `paired_interval` from reading values of 0 as wrong answers."""
    return paired_interval([zero] * len(values), [zero + value for value in values], alpha=alpha, groups=groups)


def _negated(interval: PairedInterval) -> Estimate:
    return Estimate(-interval.difference + 0.0, max(-interval.upper, 0.0), -interval.lower)


def _nats(estimate: Estimate) -> str:
    return f"{estimate.mean:.4g} [{estimate.lower:.4g}, {estimate.upper:.4g}] nats a token"


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.2%} [{estimate.lower:.2%}, {estimate.upper:.2%}]"
