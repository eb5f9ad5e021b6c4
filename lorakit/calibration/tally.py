"""What a pass has found so far, and how the parts of several processes are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lorakit._distributed.shards import LoaderShard
from lorakit.calibration.losses import IGNORED_LABEL
from lorakit.errors import CalibrationError


@dataclass
class Collected:
    """What a pass found: per probe one row for each example used, in the loader's order."""

    statistics: list[Tensor]
    num_examples: int
    num_without_labels: int


@dataclass
class Tally:
    """What this process found; examples are numbered in the order in which it saw them.

    `parts` holds per probe the statistics of the examples in `used`, batch by batch.
    """

    parts: list[list[Tensor]]
    used: list[int] = field(default_factory=list)
    without_labels: list[int] = field(default_factory=list)
    batch_sizes: list[int] = field(default_factory=list)

    def add(self, statistics: Sequence[Tensor], used: Sequence[bool], weights: Tensor, first: int) -> None:
        """Add a batch's statistics (n, ...), each example's times its weight, for the examples that were `used`."""
        keep = torch.tensor(used)
        for parts, statistic in zip(self.parts, statistics, strict=True):
            scale = weights.to(statistic).reshape(-1, *[1] * (statistic.ndim - 1))
            parts.append((statistic * scale)[keep.to(statistic.device)])
        for number, is_used in enumerate(used, first):
            (self.used if is_used else self.without_labels).append(number)

    def collected(self, shard: LoaderShard | None, num_examples: int, device: torch.device | None) -> Collected:
        """The first `num_examples` examples of all processes, in the order in which one process would see them.

        Raises: CalibrationError if there are none, or if their statistics are not finite or all 0.
        """
        used, without_labels = self.used, self.without_labels
        statistics = [torch.cat(parts) for parts in self.parts] if used else []
        if shard is not None:
            used, without_labels, statistics = self._merged(shard, statistics, device)
        if not used and not without_labels:
            raise CalibrationError("`loader` yielded no batch. Give it at least one example.")
        if not used:
            raise CalibrationError(
                f"None of the {len(without_labels)} examples looked at has a label: all their labels are "
                f"{IGNORED_LABEL}, or nothing remains after the shift to the next token. Check how labels are made."
            )
        statistics = [statistic[:num_examples] for statistic in statistics]
        _check(statistics, min(len(used), num_examples))
        if len(used) >= num_examples:  # do not count beyond the last example used: that depends on the batch size
            without_labels = [place for place in without_labels if place < used[num_examples - 1]]
        return Collected(statistics, min(len(used), num_examples), len(without_labels))

    def _merged(
        self, shard: LoaderShard, statistics: list[Tensor], device: torch.device | None
    ) -> tuple[list[int], list[int], list[Tensor]]:
        """The positions of all processes' examples, with and without labels, and the statistics in that order."""
        places = shard.places(self.batch_sizes)
        own = [places[i] for i in self.used], [places[i] for i in self.without_labels], [s.cpu() for s in statistics]
        everyone = shard.gather(own)
        rows = [place for used, _, _ in everyone for place in used]
        order = sorted((place, row) for row, place in enumerate(rows) if place is not None)
        without_labels = [place for _, unlabelled, _ in everyone for place in unlabelled if place is not None]
        index = torch.tensor([row for _, row in order], dtype=torch.long)
        together = zip(*(parts for used, _, parts in everyone if used), strict=True)
        return [place for place, _ in order], without_labels, [torch.cat(parts)[index].to(device) for parts in together]


def _check(statistics: Sequence[Tensor], num_examples: int) -> None:
    if not all(bool(torch.isfinite(statistic).all()) for statistic in statistics):
        raise CalibrationError(
            "The losses are finite, but their gradients are not. Try a wider dtype than the model's."
        )
    if statistics and not any(bool(statistic.any()) for statistic in statistics):
        raise CalibrationError(
            f"The loss of all {num_examples} examples has a gradient of exactly 0 at each of the {len(statistics)} "
            f"measured modules. Likely causes: `loss_fn` does not use the model it is given, or detaches its outputs; "
            f"the forward pass does not run these modules; the adapter's scaling or lora_A is 0; or gradients "
            f"underflow in the model's dtype."
        )
