"""The loss of each example of a batch: from the model's own loss, logits and labels, or from the user's function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.calibration.state import base_model_of
from lorakit.errors import CalibrationError

LossFn = Callable[[Any, Any], Tensor]
IGNORED_LABEL = -100


@dataclass
class BatchLosses:
    """A batch's loss to differentiate, and the factors from an example's part of its gradient to its own gradient."""

    loss: Tensor
    weights: Tensor  # (n,)
    used: list[bool]  # False for examples without a label


def given_losses(losses: Any, *, needs_grad: bool) -> BatchLosses:
    """The losses (n,) that the user's `loss_fn` returned.

    Raises: CalibrationError if they are anything else, not finite, or do not depend on the model.
    """
    if not isinstance(losses, Tensor) or losses.ndim != 1 or losses.shape[0] == 0:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise CalibrationError(f"`loss_fn` must return one loss per example, a tensor of shape (n,); got {got}.")
    if not torch.isfinite(losses).all():
        raise CalibrationError(f"`loss_fn` returned losses that are not finite: {losses.detach().tolist()}.")
    if needs_grad and not losses.requires_grad:
        raise CalibrationError(
            "`loss_fn` returned losses without gradients. They must depend on the model, not be detached from it."
        )
    return BatchLosses(losses.sum(), torch.ones(losses.shape[0]), [True] * losses.shape[0])


Kind = Literal["shifted", "tokens", "values"]


class LossScheme:
    """Determines from logits and labels how a model averages its examples' losses; never guesses.

    This depends on the model and on the kind of batch, so it is checked on the first batch of each kind.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = base_model_of(model)
        name = str(getattr(inner, "loss_type", None) or type(inner).__name__)
        self.shifts = "CausalLM" in name or "LMHead" in name
        self.known: dict[Any, Kind] = {}

    def __call__(self, batch: Any) -> BatchLosses:
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            got = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise CalibrationError(
                f"`loader` must yield mappings with labels for model(**batch); got {got}. For any other kind of batch, "
                f"pass `loss_fn`."
            )
        given = batch
        if self.shifts:
            batch = _without_first_labels(batch)
        labels = batch["labels"]
        if not isinstance(labels, Tensor):
            raise CalibrationError(f"A batch's `labels` must be a tensor; got {type(labels).__name__}. Collate them.")
        if labels.numel() == 0:
            raise CalibrationError(
                f"`loader` yielded a batch without examples: `labels` of shape {tuple(labels.shape)}."
            )
        if not labels.is_floating_point() and not (labels != IGNORED_LABEL).any():
            return _nothing_used(labels)
        structure = (frozenset(batch), labels.ndim, labels.dtype)
        kind = self.known.get(structure)
        if kind is not None and not _counts(labels, kind).any():
            return _nothing_used(labels)
        loss, logits = _loss_and_logits(self.model(**batch))
        if loss is None or logits is None:
            raise CalibrationError("The model returned no loss and logits for this batch; pass `loss_fn`.")
        total = loss.detach()
        if kind is None:
            kind = self._find_kind(total, logits.detach(), labels)
            if kind is None:
                return _nothing_used(labels)
            if kind != "values" and (kind == "shifted") != self.shifts:  # the name was misleading: first labels count
                self.shifts = not self.shifts
                return self(given)
            self.known[structure] = kind
        if not torch.isfinite(total):
            self._refuse(total)
        counts = _counts(labels, kind)
        return BatchLosses(loss, counts.sum() / counts.clamp(min=1), (counts > 0).tolist())

    @torch.no_grad()
    def _find_kind(self, total: Tensor, logits: Tensor, labels: Tensor) -> Kind | None:
        """The kind of loss whose value is `total`; None if no label of the batch counts."""
        # A loss in half precision is compared with one computed in half precision, to the last bit but one.
        dtype = total.dtype
        half = torch.finfo(dtype).bits < 32
        tolerance = torch.finfo(dtype).eps if half else 2e-5
        for kind, value in self._candidates(logits if half else logits.float(), labels):
            nothing = not _counts(labels, kind).any()
            if nothing and (torch.isnan(total) or total == 0):
                return None
            if torch.isclose(value.to(dtype), total, rtol=1.01 * tolerance, atol=0 if half else 1e-6):
                return kind
        self._refuse(total)

    def _refuse(self, total: Tensor) -> NoReturn:
        if not torch.isfinite(total):
            raise CalibrationError(
                f"The model's loss on a calibration batch is {float(total)}, although the batch has labels. Check "
                f"weights, data and dtype."
            )
        raise CalibrationError(
            f"The model's loss ({float(total):.6g}) is not the mean of its examples' losses, computed from logits and "
            f"labels (an auxiliary loss, label smoothing or another reduction?), so per-example gradients cannot be "
            f"derived from it. Pass `loss_fn(model, batch)` that returns the loss of each example."
        )

    def _candidates(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[Kind, Tensor]]:
        """The losses that the model may compute for the batch, the likeliest first, in the dtype of `logits`."""
        n = labels.shape[0] if labels.ndim else 0
        if labels.is_floating_point() or (logits.ndim == 2 and logits.shape[1] == 1 and labels.numel() == n):
            if n and logits.numel() == labels.numel():
                given, wanted = logits.reshape(-1), labels.reshape(-1).to(logits.dtype)
                yield "values", F.mse_loss(given, wanted)
                if labels.is_floating_point():
                    yield "values", F.binary_cross_entropy_with_logits(given, wanted)
        elif labels.ndim == 2 and logits.ndim == 3 and logits.shape[:2] == labels.shape:
            for shifted in (self.shifts, not self.shifts):
                given, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
                yield "shifted" if shifted else "tokens", _mean_over_tokens(given, wanted)
        elif labels.numel() == n and logits.ndim == 2 and logits.shape[0] == n:
            yield "tokens", F.cross_entropy(logits, labels.reshape(n))


def _mean_over_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """F.cross_entropy over the tokens of all examples, without a copy of all logits."""
    losses = [F.cross_entropy(*example, reduction="none") for example in zip(logits, labels, strict=True)]
    # nll_loss over one class, the true one, averages as F.cross_entropy does: bit for bit, in any dtype.
    return F.nll_loss(-torch.cat(losses).unsqueeze(1), labels.flatten().clamp(max=0))


def _counts(labels: Tensor, kind: Kind) -> Tensor:
    """How many terms each example adds to the batch's mean loss, (n,)."""
    if kind == "values":
        return torch.ones(labels.shape[0], device=labels.device)
    if kind == "shifted":
        labels = labels[:, 1:]
    return (labels.reshape(labels.shape[0], -1) != IGNORED_LABEL).sum(1).float()


def _without_first_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """The batch without the labels of first tokens.

    With padding on the right they do not count, since nothing precedes them. With padding on the left a causal model
    would predict them from the padding.
    """
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.ndim != 2 or mask.shape != labels.shape:
        return batch
    first = (mask != 0) & ((mask != 0).cumsum(1) == 1)
    return {**batch, "labels": labels.masked_fill(first, IGNORED_LABEL)}


def _nothing_used(labels: Tensor) -> BatchLosses:
    n = labels.shape[0]
    return BatchLosses(torch.zeros(()), torch.ones(n), [False] * n)


def _loss_and_logits(outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(outputs, Mapping):
        loss, logits = outputs.get("loss"), outputs.get("logits")
    elif isinstance(outputs, tuple):
        loss, logits = (*outputs, None, None)[:2]
    else:
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
    loss = loss if isinstance(loss, Tensor) and loss.ndim == 0 else None
    return loss, logits if isinstance(logits, Tensor) else None
