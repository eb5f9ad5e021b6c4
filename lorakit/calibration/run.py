"""One pass of a loader through a model that collects statistics per example at chosen modules.

The pass is forward and backward in eval mode with every parameter frozen: only what the probes ask for gets a gradient.
However the examples are batched and padded, what is collected belongs to one example's own mean loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorakit._distributed.fsdp import gathered, unwrapped
from lorakit._distributed.shards import LoaderShard, shard_of
from lorakit.calibration._cross_entropy import low_memory_cross_entropy
from lorakit.calibration.batches import batch_size, examples_of, token_parts
from lorakit.calibration.losses import IGNORED_LABEL, LossFn, LossScheme, given_losses
from lorakit.calibration.state import base_model_of, input_device, preserved_rng, preserved_state
from lorakit.errors import CalibrationError


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
    share = shard_of(loader)
    tally = _Tally(parts=[[] for _ in probes])
    scheme = LossScheme(model)
    mixing = 0  # batches in a row whose examples could not be told apart

    def run_part(part: Any, first: int) -> int:
        nonlocal mixing
        n = _run(model, part, probes, tally, scheme, loss_fn, first, one_example=False) if mixing < 2 else None
        mixing = 0 if n is not None else mixing + 1
        if n is not None:
            return n
        examples = examples_of(part)
        for number, example in enumerate(examples, first):
            if len(tally.used) >= num_examples:
                break
            _run(model, example, probes, tally, scheme, loss_fn, number, one_example=True)
        return len(examples)

    def step(batch: Any) -> int:
        if device is not None:
            batch = send_to_device(batch, device)
        first, n = sum(tally.batch_sizes), 0
        for part in [batch] if max_tokens is None or loss_fn is not None else token_parts(batch, max_tokens):
            enough = n > 0 and len(tally.used) >= num_examples
            n += batch_size(part) if enough else run_part(part, first + n)
        tally.batch_sizes.append(n)
        if share is not None:
            share.check(tally.batch_sizes)
        return len(tally.used)

    quiet = not progress or (share is not None and share.rank > 0)
    with (
        gathered(model),
        preserved_state(model),
        preserved_rng(model),
        low_memory_cross_entropy(base_model_of(model)),
        tqdm(total=num_examples, desc=description, unit="example", disable=quiet, delay=1.0) as bar,
    ):
        device = input_device(model)
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for used in (step(batch) for batch in loader) if share is None else share.steps(step):
            bar.update(min(used, num_examples) - bar.n)
            if used >= num_examples:
                break
    return _collected(tally, share, num_examples, device)


def _collected(tally: _Tally, share: LoaderShard | None, num_examples: int, device: torch.device | None) -> Collected:
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
    tally: _Tally, share: LoaderShard, statistics: list[Tensor], device: torch.device | None
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
    scheme: LossScheme,
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
        losses = scheme(batch) if loss_fn is None else given_losses(loss_fn(model, batch), needs_grad=bool(probes))
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
