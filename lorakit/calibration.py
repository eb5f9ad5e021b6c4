"""One pass of a loader through a model that collects statistics per example at chosen modules.

The pass is forward and backward in eval mode with every parameter frozen: only what the probes ask for gets a gradient.
However the examples are batched and padded, what is collected belongs to one example's own mean loss.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn, Protocol

import numpy as np
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from lorakit._cross_entropy import lean_loss
from lorakit._distributed import Share, gathered, share_of, unwrapped
from lorakit.errors import CalibrationError

LossFn = Callable[[Any, Any], Tensor]
IGNORED_LABEL = -100

# Where PEFT keeps which adapters are active.
_ACTIVE_ADAPTER: dict[type, str] = {
    BaseTunerLayer: "_active_adapter",
    AuxiliaryTrainingWrapper: "_active_adapter",
    BaseTuner: "active_adapter",
    PeftModel: "active_adapter",
}


class Probe(Protocol):
    """Something in a model's forward pass that learns a statistic of each example from forward and backward."""

    def begin(self, *, one_example: bool) -> None:
        """Forget the last batch; `one_example` says that all of the next forward pass belongs to one example."""

    def collect(self, num_examples: int) -> Tensor | None:
        """The statistic (num_examples, ...) after backward; None where the examples could not be told apart."""


@dataclass
class Collected:
    """What a pass has found: per probe one row for each example used, in the loader's order."""

    statistics: list[Tensor]
    num_examples: int
    num_without_labels: int


@dataclass
class _Losses:
    """A batch's loss to differentiate, and what turns an example's part of its gradient into its own gradient."""

    loss: Tensor
    weights: Tensor  # (n,)
    used: list[bool]


@dataclass
class _Tally:
    """What this process's part of a pass has found; examples are numbered as they come."""

    parts: list[list[Tensor]] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    without_labels: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)


def collect(
    model: nn.Module,
    loader: Iterable[Any],
    probes: Sequence[Probe],
    *,
    num_examples: int,
    loss_fn: LossFn | None = None,
    progress: bool = True,
    description: str = "calibration",
    max_tokens: float | None = None,
) -> Collected:
    """Run up to `num_examples` examples of `loader` through `model` and collect each probe's statistic of each.

    `loader` yields mappings for ``model(**batch)`` with labels, or with `loss_fn` anything for which
    ``loss_fn(model, batch)`` returns the examples' losses (n,). Examples without a label are left out and counted.
    With `max_tokens`, and without `loss_fn`, a batch of more tokens is run in parts, where it is one that can be cut.

    Among several processes a loader that is shared out (prepared by accelerate, or with torch's DistributedSampler) is
    run through in step, `num_examples` being those of all processes; each gets what one process would from the whole
    loader: examples repeated to fill up the last batches count once. Any other loader is taken to give every process
    the same. A model in DistributedDataParallel is taken out of it; the weights of one sharded by fully_shard (FSDP2)
    are gathered in every process for the time of the pass, by all of them together.

    Raises: CalibrationError for an empty loader, no labels at all, losses or gradients that are not finite, a loss that
    is not the mean of the examples' own losses as far as logits and labels show, FSDP1, and, of a loader that is shared
    out, in all processes where one of them failed. In one process what `loader`, `model` and `loss_fn` raise passes
    through. Either way the model, its flags and the random number generators are as they were.
    """
    if isinstance(num_examples, bool) or not isinstance(num_examples, int) or num_examples < 1:
        raise ValueError(f"`num_examples` must be a positive integer; got {num_examples!r}.")
    model = unwrapped(model)
    share = share_of(loader)
    tally = _Tally(parts=[[] for _ in probes])
    scheme = _LossScheme(model)
    mixing = 0  # batches in a row whose examples could not be told apart

    def run_part(part: Any, first: int) -> int:
        nonlocal mixing
        n = _run(model, part, probes, tally, scheme, loss_fn, first, one_example=False) if mixing < 2 else None
        mixing = 0 if n is not None else mixing + 1
        if n is not None:
            return n
        examples = _examples_of(part)
        for number, example in enumerate(examples, first):
            if len(tally.used) >= num_examples:
                break
            _run(model, example, probes, tally, scheme, loss_fn, number, one_example=True)
        return len(examples)

    def step(batch: Any) -> int:
        if device is not None:
            batch = send_to_device(batch, device)
        first, n = sum(tally.batch_sizes), 0
        for part in [batch] if max_tokens is None or loss_fn is not None else _parts(batch, max_tokens):
            enough = n > 0 and len(tally.used) >= num_examples
            n += _batch_size(part) if enough else run_part(part, first + n)
        tally.batch_sizes.append(n)
        if share is not None:
            share.check(tally.batch_sizes)
        return len(tally.used)

    quiet = not progress or (share is not None and share.rank > 0)
    with (
        gathered(model),
        preserved_state(model),
        preserved_rng(model),
        lean_loss(_base_of(model)),
        tqdm(total=num_examples, desc=description, unit="example", disable=quiet, delay=1.0) as bar,
    ):
        device = _input_device(model)
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for used in (step(batch) for batch in loader) if share is None else share.steps(step):
            bar.update(min(used, num_examples) - bar.n)
            if used >= num_examples:
                break
    return _collected(tally, share, num_examples, device)


def _collected(tally: _Tally, share: Share | None, num_examples: int, device: torch.device | None) -> Collected:
    """The first `num_examples` of all processes' examples, in the order in which one process would see them."""
    used, without_labels = tally.used, tally.without_labels
    statistics = [torch.cat(parts) for parts in tally.parts] if used else []
    if share is not None:
        used, without_labels, statistics = _merged(tally, share, statistics, device)
    if not used and not without_labels:
        raise CalibrationError("`calib_loader` yielded no batch; pass one with at least one example.")
    if not used:
        raise CalibrationError(
            f"No example has a label: all labels of the {len(without_labels)} examples are {IGNORED_LABEL}, or "
            f"nothing remains of them after the shift to the next token. Check how the labels are made."
        )
    statistics = [statistic[:num_examples] for statistic in statistics]
    if not all(bool(torch.isfinite(statistic).all()) for statistic in statistics):
        raise CalibrationError(
            "The losses are finite, but their gradients are not. A wider dtype than the model's may help."
        )
    if len(used) >= num_examples:  # how far the pass had to go to find them does not depend on the batches
        without_labels = [place for place in without_labels if place < used[num_examples - 1]]
    return Collected(statistics, min(len(used), num_examples), len(without_labels))


def _merged(
    tally: _Tally, share: Share, statistics: list[Tensor], device: torch.device | None
) -> tuple[list[int], list[int], list[Tensor]]:
    """The places of all processes' examples, with labels and without, and their statistics in that order."""
    places = share.places(tally.batch_sizes)
    mine = [places[i] for i in tally.used], [places[i] for i in tally.without_labels], [s.cpu() for s in statistics]
    everyone = share.gather(mine)
    rows = [place for used, _, _ in everyone for place in used]
    order = sorted((place, row) for row, place in enumerate(rows) if place is not None)
    without_labels = [place for _, places, _ in everyone for place in places if place is not None]
    index = torch.tensor([row for _, row in order], dtype=torch.long)
    together = zip(*(parts for used, _, parts in everyone if used), strict=True)
    return [place for place, _ in order], without_labels, [torch.cat(parts)[index].to(device) for parts in together]


def _run(
    model: nn.Module,
    batch: Any,
    probes: Sequence[Probe],
    tally: _Tally,
    scheme: _LossScheme,
    loss_fn: LossFn | None,
    first: int,
    *,
    one_example: bool,
) -> int | None:
    """Forward, backward and collect one batch, whose examples are numbered from `first` on: how many it has.

    None, and nothing tallied, where its examples cannot be told apart.
    """
    for probe in probes:
        probe.begin(one_example=one_example)
    with torch.enable_grad():
        losses = scheme(batch) if loss_fn is None else _given_losses(loss_fn(model, batch), needs_grad=bool(probes))
        if any(losses.used) and losses.loss.requires_grad:
            torch.autograd.backward(losses.loss)
    n = len(losses.used)
    if one_example and n != 1:
        raise CalibrationError(
            f"This model mixes the examples of a batch, so they are run one at a time, but for one example the loss "
            f"came for {n}. Pass batches of one example."
        )
    collected = []
    for probe in probes:
        statistic = probe.collect(n)
        if statistic is None:
            return None
        collected.append(statistic)
    keep = torch.tensor(losses.used)
    for parts, statistic in zip(tally.parts, collected, strict=True):
        weights = losses.weights.to(statistic).reshape(-1, *[1] * (statistic.ndim - 1))
        parts.append((statistic * weights)[keep.to(statistic.device)])
    for number, used in enumerate(losses.used, first):
        (tally.used if used else tally.without_labels).append(number)
    return n


def _given_losses(losses: Any, *, needs_grad: bool) -> _Losses:
    if not isinstance(losses, Tensor) or losses.ndim != 1 or losses.shape[0] == 0:
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise CalibrationError(f"`loss_fn` must return one loss per example, a tensor of shape (n,); got {got}.")
    if not torch.isfinite(losses).all():
        raise CalibrationError(f"`loss_fn` returned losses that are not finite: {losses.detach().tolist()}.")
    if needs_grad and not losses.requires_grad:
        raise CalibrationError("`loss_fn` returned losses without gradients; do not detach them, nor use no_grad.")
    return _Losses(losses.sum(), torch.ones(losses.shape[0]), [True] * losses.shape[0])


Kind = Literal["shifted", "tokens", "values"]


class _LossScheme:
    """Finds out, from logits and labels, how a model's loss is made of its examples' losses; never guesses.

    That is a property of the model and of the kind of batch, so it is checked on the first batch of each kind.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        inner = _base_of(model)
        name = str(getattr(inner, "loss_type", None) or type(inner).__name__)
        self.shifts = "CausalLM" in name or "LMHead" in name
        self.known: dict[Any, Kind] = {}

    def __call__(self, batch: Any) -> _Losses:
        if not isinstance(batch, Mapping) or batch.get("labels") is None:
            got = f"keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
            raise CalibrationError(
                f"`calib_loader` must yield mappings with labels for model(**batch), or `loss_fn` be given; got {got}."
            )
        given = batch
        if self.shifts:
            batch = _without_first_labels(batch)
        labels = batch["labels"]
        if not isinstance(labels, Tensor):
            raise CalibrationError(f"A batch's `labels` must be a tensor; got {type(labels).__name__}. Collate them.")
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
            if kind != "values" and (kind == "shifted") != self.shifts:  # the model's name misled: first labels count
                self.shifts = not self.shifts
                return self(given)
            self.known[structure] = kind
        if not torch.isfinite(total):
            self._refuse(total)
        counts = _counts(labels, kind)
        return _Losses(loss, counts.sum() / counts.clamp(min=1), (counts > 0).tolist())

    @torch.no_grad()
    def _find_kind(self, total: Tensor, logits: Tensor, labels: Tensor) -> Kind | None:
        """The kind of loss that gives `total`; None for one that no label of the batch enters."""
        # Where the model computes its loss in half precision, so is what it is compared with, to the last bit but one.
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
                f"The model's loss on a calibration batch is {float(total)}, although the batch has labels. Check the "
                f"weights, the data and the dtype."
            )
        raise CalibrationError(
            f"The model's loss ({float(total):.6g}) is not the mean of its examples' losses as its logits and labels "
            f"give them (an auxiliary loss, label smoothing or another reduction?), so that per-example gradients "
            f"cannot be read off it. Pass `loss_fn(model, batch)` that returns the loss of each example."
        )

    def _candidates(self, logits: Tensor, labels: Tensor) -> Iterator[tuple[Kind, Tensor]]:
        """The losses that the batch may have, the likelier first, in the dtype of `logits`."""
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
    """F.cross_entropy over the tokens of all examples, without another tensor as large as the logits."""
    losses = [F.cross_entropy(*example, reduction="none") for example in zip(logits, labels, strict=True)]
    # Their mean as cross_entropy takes it, to the bit in any dtype: there is one class left, the true one.
    return F.nll_loss(-torch.cat(losses).unsqueeze(1), labels.flatten().clamp(max=0))


def _counts(labels: Tensor, kind: Kind) -> Tensor:
    """How many terms of each example enter the mean that is the batch's loss, (n,)."""
    if kind == "values":
        return torch.ones(labels.shape[0], device=labels.device)
    if kind == "shifted":
        labels = labels[:, 1:]
    return (labels.reshape(labels.shape[0], -1) != IGNORED_LABEL).sum(1).float()


def _without_first_labels(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Without the labels of first tokens, which a causal model would predict from the padding on their left.

    Padded on the right a first token's label enters no loss, since nothing precedes it; so it must not here.
    """
    mask, labels = batch.get("attention_mask"), batch["labels"]
    if not isinstance(mask, Tensor) or not isinstance(labels, Tensor) or mask.ndim != 2 or mask.shape != labels.shape:
        return batch
    first = (mask != 0) & ((mask != 0).cumsum(1) == 1)
    return {**batch, "labels": labels.masked_fill(first, IGNORED_LABEL)}


def _nothing_used(labels: Tensor) -> _Losses:
    n = labels.shape[0]
    return _Losses(torch.zeros(()), torch.ones(n), [False] * n)


def _loss_and_logits(outputs: Any) -> tuple[Tensor | None, Tensor | None]:
    if isinstance(outputs, Mapping):
        loss, logits = outputs.get("loss"), outputs.get("logits")
    elif isinstance(outputs, tuple):
        loss, logits = (*outputs, None, None)[:2]
    else:
        loss, logits = getattr(outputs, "loss", None), getattr(outputs, "logits", None)
    loss = loss if isinstance(loss, Tensor) and loss.ndim == 0 else None
    return loss, logits if isinstance(logits, Tensor) else None


def _examples_of(batch: Any) -> list[Any]:
    """The batch, one example at a time: everything in it whose first dimension is the batch's is sliced."""
    n = _batch_size(batch)

    def pick(value: Any, i: int) -> Any:
        if isinstance(value, Tensor):
            return value[i : i + 1] if value.ndim and value.shape[0] == n else value
        if isinstance(value, MutableMapping):
            picked = copy.copy(value)  # of its own kind: a loss function may use more of it than its items
            for key, item in value.items():
                picked[key] = pick(item, i)
            return picked
        if isinstance(value, tuple):
            items = [pick(item, i) for item in value]
            return type(value)._make(items) if hasattr(value, "_make") else tuple(items)
        if isinstance(value, list):
            return value[i : i + 1] if len(value) == n and not _has_tensors(value) else [pick(v, i) for v in value]
        return value

    return [pick(batch, i) for i in range(n)]


def _parts(batch: Any, max_tokens: float) -> list[Any]:
    """The batch in parts of about equal size and at most `max_tokens` tokens (or one example), in its order.

    Only where it is a mapping of nothing but tensors (n,) and (n, length), so that what belongs to whom is certain. No
    part has as many examples as tokens, so that these can be told apart.
    """
    values = list(batch.values()) if isinstance(batch, Mapping) else []
    if not all(isinstance(v, Tensor) and 1 <= v.ndim <= 2 for v in values) or len({len(v) for v in values}) != 1:
        return [batch]
    n, length = len(values[0]), max((v.shape[1] for v in values if v.ndim == 2), default=1)
    count = math.ceil(n / max(1, max_tokens // max(1, length)))
    while 1 < length in (n // max(1, count), math.ceil(n / max(1, count))):
        count += 1
    if count <= 1:
        return [batch]
    split = {key: torch.tensor_split(value, count) for key, value in batch.items()}
    return [{key: parts[i] for key, parts in split.items()} for i in range(count)]


def _batch_size(batch: Any) -> int:
    values = list(batch.values()) if isinstance(batch, Mapping) else batch
    if isinstance(values, Tensor):
        return values.shape[0]
    if isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor):
        return int(batch["labels"].shape[0])
    sizes = {v.shape[0] for v in values if isinstance(v, Tensor) and v.ndim} if isinstance(values, list | tuple) else ()
    if len(sizes) != 1:
        raise CalibrationError(
            "This model mixes the examples of a batch before an adapted module, so they must be run one at a time, and "
            "how to split this batch is not clear. Pass batches of one example."
        )
    return next(iter(sizes))


def _has_tensors(values: list[Any]) -> bool:
    return any(isinstance(value, Tensor) for value in values)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _input_device(model: Any) -> torch.device | None:
    """Where the model wants its inputs; None where its weights are offloaded and accelerate's hooks move them."""
    embeddings = None
    with contextlib.suppress(AttributeError, NotImplementedError):  # not every model has them, or says so
        embeddings = model.get_input_embeddings()
    parameter = next((embeddings or model).parameters(), None)
    return None if parameter is None or parameter.is_meta else parameter.device


@contextlib.contextmanager
def preserved_state(model: nn.Module) -> Iterator[None]:
    """Give a model back as it was: gradient flags, train or eval mode of each module, active adapters, `use_cache`.

    A key-value cache is of no use to a pass with gradients, so it is switched off inside.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    adapters = [
        (module, name, copy.copy(getattr(module, name)))
        for module in model.modules()
        for kind, name in _ACTIVE_ADAPTER.items()
        if isinstance(module, kind)
    ]
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        if use_cache:
            config.use_cache = False
        yield
    finally:
        if use_cache:
            config.use_cache = use_cache
        for module, name, active in adapters:
            setattr(module, name, active)
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def activated(adapter: PeftModel, adapter_name: str) -> Iterator[None]:
    """Make the adapter take part in the forward pass, alone if it does not already."""
    if adapter_name in adapter.active_adapters:
        yield
        return
    with preserved_state(adapter):
        adapter.set_adapter(adapter_name)
        yield


@contextlib.contextmanager
def preserved_rng(model: nn.Module) -> Iterator[None]:
    """Give torch's (on the CPU and the model's devices), numpy's and Python's generators back as they were."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    used = {parameter.device for parameter in model.parameters()} - {torch.device("cpu"), torch.device("meta")}
    device_type = next(iter(used)).type if used else "cuda"
    try:
        with torch.random.fork_rng(devices=[device.index for device in used], device_type=device_type):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
