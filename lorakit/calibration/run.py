"""One pass of a loader through a model that collects statistics per example at chosen modules.

The pass runs forward and backward in eval mode with every parameter frozen: only what probes ask for gets a gradient.
Each example's statistics belong to its own mean loss, however examples are batched and padded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from lorakit._checks import check_integer
from lorakit._distributed.fsdp import gathered, unwrapped
from lorakit._distributed.shards import LoaderShard, shard_of
from lorakit.calibration.batches import batch_size, differentiable, examples_of, token_parts
from lorakit.calibration.losses import BatchLosses, LossFn, LossScheme, given_losses
from lorakit.calibration.state import (
    check_can_differentiate,
    input_device,
    no_inference_mode,
    preserved_rng,
    preserved_state,
)
from lorakit.calibration.tally import Collected, Tally
from lorakit.errors import CalibrationError

# A loader may never end. After this many examples in a row without a label, no more labels are expected.
MAX_WITHOUT_LABELS = 10_000


class Probe(Protocol):
    """Something in a model's forward pass that measures a statistic of each example in forward and backward."""

    def begin(self, *, one_example: bool) -> None:
        """Forget the last batch; `one_example` says that the next forward pass has only one example."""

    def collect(self, num_examples: int) -> Tensor | None:
        """The statistic (num_examples, ...) after backward; None if examples could not be told apart.

        It must be proportional to the example's gradient: the pass scales it to the example's own mean loss.
        """


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

    `loader` yields mappings for ``model(**batch)`` with labels. With `loss_fn` it may yield anything for which
    ``loss_fn(model, batch)`` returns one loss per example, (n,). Examples without labels are left out and counted;
    after 10,000 of them in a row the loader counts as exhausted. With `max_tokens`, and without `loss_fn`, a batch of
    more tokens runs in parts if it can be cut. `torch.inference_mode` is left during the pass.

    Several processes: a sharded loader (prepared by accelerate, or with torch's DistributedSampler) runs in step, and
    `num_examples` counts the examples of all processes. Each process gets what one process would get from the whole
    loader; padding duplicates count once. Any other loader is assumed to give every process the same examples. A
    DistributedDataParallel wrapper is removed. Weights sharded by fully_shard (FSDP2) are gathered during the pass.

    Raises: CalibrationError for an empty loader; no labels at all; losses or gradients that are not finite; gradients
    that are all exactly 0; a loss that is not the mean of the examples' losses, as far as logits and labels show; a
    model made under inference mode; FSDP1; and, with a sharded loader, in all processes if one of them failed. In one
    process, errors of `loader`, `model` and `loss_fn` pass through. The model, its flags and the random number
    generators are always restored.
    """
    check_integer("num_examples", num_examples)
    model = unwrapped(model)
    check_can_differentiate(model)
    shard = shard_of(loader)
    with (
        no_inference_mode(),
        gathered(model),
        preserved_state(model),
        preserved_rng(model),
        tqdm(
            total=num_examples,
            desc=description,
            unit="example",
            disable=not progress or (shard is not None and shard.rank > 0),
            delay=1.0,
        ) as bar,
    ):
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        calibration = _Pass(model, probes, loss_fn, num_examples, max_tokens, shard)
        last_used, before = 0, 0  # examples with labels so far, and those without labels before the last of them
        for used, without_labels in calibration.batches(loader):
            bar.update(min(used, num_examples) - bar.n)
            if used > last_used:
                last_used, before = used, without_labels
            if used >= num_examples or without_labels - before >= MAX_WITHOUT_LABELS:
                break
        return calibration.tally.collected(shard, num_examples, calibration.device)


@dataclass
class _Pass:
    """A pass under way: what it runs, and what it has found."""

    model: nn.Module
    probes: Sequence[Probe]
    loss_fn: LossFn | None
    num_examples: int
    max_tokens: float | None
    shard: LoaderShard | None

    def __post_init__(self) -> None:
        self.tally = Tally(parts=[[] for _ in self.probes])
        self.scheme = LossScheme(self.model)
        self.device = input_device(self.model)
        self.mixed_in_a_row = 0  # batches whose examples could not be told apart

    def batches(self, loader: Iterable[Any]) -> Iterator[tuple[int, ...]]:
        """Run the loader's batches; after each, how many examples had labels so far, and how many had none."""
        return map(self._run_batch, loader) if self.shard is None else self.shard.steps(self._run_batch)

    def _run_batch(self, batch: Any) -> tuple[int, int]:
        batch = differentiable(batch)
        if self.device is not None:
            batch = send_to_device(batch, self.device)
        whole = self.max_tokens is None or self.loss_fn is not None
        first, n = sum(self.tally.batch_sizes), 0
        for part in [batch] if whole else token_parts(batch, self.max_tokens or 0):
            enough = n > 0 and len(self.tally.used) >= self.num_examples
            n += batch_size(part) if enough else self._run_part(part, first + n)
        self.tally.batch_sizes.append(n)
        if self.shard is not None:
            self.shard.check(self.tally.batch_sizes)
        return len(self.tally.used), len(self.tally.without_labels)

    def _run_part(self, part: Any, first: int) -> int:
        """Run a part as a whole, or one example at a time if its examples cannot be told apart; return its size."""
        if self.mixed_in_a_row < 2:
            n = self._run(part, first, one_example=False)
            if n is not None:
                self.mixed_in_a_row = 0
                return n
        self.mixed_in_a_row += 1
        examples = examples_of(part)
        for number, example in enumerate(examples, first):
            if len(self.tally.used) >= self.num_examples:
                break
            self._run(example, number, one_example=True)
        return len(examples)

    def _run(self, batch: Any, first: int, *, one_example: bool) -> int | None:
        """Run one batch, whose examples are numbered from `first` on, forward and backward; return its size.

        Returns None, and adds nothing to the tally, if its examples cannot be told apart.
        """
        for probe in self.probes:
            probe.begin(one_example=one_example)
        losses = self._differentiated(batch)
        n = len(losses.used)
        if one_example and n != 1:
            raise CalibrationError(
                f"The model mixes the examples of a batch, so they run one at a time, but for one example there were "
                f"{n} losses. Give `loader` a batch size of 1."
            )
        statistics = []
        for probe in self.probes:
            statistic = probe.collect(n)
            if statistic is None:
                return None
            statistics.append(statistic)
        self.tally.add(statistics, losses.used, losses.weights, first)
        return n

    def _differentiated(self, batch: Any) -> BatchLosses:
        with torch.enable_grad():
            if self.loss_fn is None:
                losses = self.scheme(batch)
            else:
                losses = given_losses(self.loss_fn(self.model, batch), needs_grad=bool(self.probes))
            if any(losses.used) and losses.loss.requires_grad:
                torch.autograd.backward(losses.loss)
        return losses
