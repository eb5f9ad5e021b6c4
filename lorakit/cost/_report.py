"""The report of `lorakit.cost.accounting`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import count, extent
from lorakit._report import Report
from lorakit.naming.roles import Role, group_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class AccountedModule:
    """One adapted module, or one that is trained in full (`in_full`: modules_to_save, trainable tokens).

    `params` are the parameters that training it adds to the model. Tied modules share theirs, which count in the first.
    `multiply_adds` is what a forward pass computes more in it than without the adapter, per token (per example if the
    inputs have no tokens), by torch's FlopCounterMode; None if nothing was run.
    """

    module_name: str
    role: Role | None
    layer: int | None
    in_full: bool
    d_out: int | None
    d_in: int | None
    rank: int | None
    params: int
    multiply_adds: float | None

    @property
    def group(self) -> str:
        """The role, or the last component of the name; marked if the module is trained in full."""
        label = group_of(self.module_name)
        return f"{label} (in full)" if self.in_full else label


@dataclass(frozen=True)
class Memory:
    """Bytes during training: the base model's parameters, the adapter, gradients, optimizer states and activations.

    `master` are fp32 copies of trained half-precision weights; 0 unless they were asked for.
    `activations` is what autograd saves between forward and backward; None if nothing was run.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None
    master: int = 0

    @property
    def total(self) -> int:
        """The sum of what is known. Temporary memory of a step is not included."""
        return self.weights + self.adapter + self.gradients + self.master + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations for one batch: of a forward pass, and of forward and backward together."""

    forward: int
    step: int


@dataclass(frozen=True, repr=False)
class Accounting(Report):
    """The cost of training `model` with an adapter, and in full.

    `trainable_params` are those with the adapter. `ratio` is their fraction of `base_params`, which full fine-tuning
    trains. FLOPs are None if the model could not run on the meta device; `not_run` says why. `assumptions` says what
    the numbers assume.
    """

    model: str
    peft_type: str
    batch_size: int
    sequence_length: int | None
    optimizer: str
    base_params: int
    adapter_params: int
    trainable_params: int
    modules: tuple[AccountedModule, ...]
    memory: Memory
    memory_full: Memory
    base_flops: Flops | None
    flops: Flops | None
    not_run: str | None
    assumptions: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """Trainable parameters over those of the base model."""
        return self.trainable_params / self.base_params

    @property
    def adapter_flops(self) -> int | None:
        """What the adapter adds to a forward pass."""
        return None if self.flops is None or self.base_flops is None else self.flops.forward - self.base_flops.forward

    @property
    def headline(self) -> str:
        return (
            f"{self.peft_type} on {self.model}: {count(self.trainable_params)} trainable of {count(self.base_params)} "
            f"parameters ({self.ratio:.3%}), {_size(self.memory.total)} against {_size(self.memory_full.total)} in full"
        )

    @property
    def details(self) -> tuple[str, ...]:
        lines = [f"batch of {self._batch}, {self.optimizer}"]
        if self.memory.activations is not None:
            full = _size(self.memory_full.activations)
            lines.append(f"activations {_size(self.memory.activations)}, in full {full}")
        if self.flops is not None and self.base_flops is not None:
            lines.append(f"FLOPs of a step {count(self.flops.step)}, in full {count(self.base_flops.step)}")
        if self.not_run is not None:
            lines.append(f"not run: {self.not_run}")
        return tuple(lines)

    @property
    def _batch(self) -> str:
        return f"{self.batch_size}" + (f" × {self.sequence_length}" if self.sequence_length else "")

    def explain(self) -> str:
        """Tables of the adapted modules, of memory and of FLOPs, and the assumptions, as text."""
        rows: list[tuple[str, ...]] = [("modules", "number", "rank", "params", "multiply-adds")]
        for label, group in self._groups().items():
            ranks = sorted({row.rank for row in group if row.rank is not None})
            span = extent((ranks[0], ranks[-1])) if ranks else "-"
            known = [row.multiply_adds for row in group if row.multiply_adds is not None]
            params = sum(row.params for row in group)
            rows.append((label, str(len(group)), span, f"{params:,}", f"{sum(known):,.0f}" if known else "-"))
        lines = _table(rows)
        lines.append(
            f"{self.peft_type} on {self.model}: {self.trainable_params:,} trainable parameters, {self.base_params:,} "
            f"in the base model ({self.ratio:.4%})"
        )
        memory: list[tuple[str, ...]] = [("memory", "adapter", "full fine-tuning")]
        for name in ("weights", "adapter", "gradients", "master", "optimizer", "activations", "total"):
            memory.append((name, *(_size(getattr(side, name)) for side in (self.memory, self.memory_full))))
        lines += ["", *_table(memory)]
        flops: list[tuple[str, ...]] = [("FLOPs", "adapter", "full fine-tuning")]
        for name in ("forward", "step"):
            sides = (self.flops, self.base_flops)
            flops.append((name, *("-" if side is None else f"{getattr(side, name):.4g}" for side in sides)))
        lines += ["", *_table(flops)]
        if self.not_run is not None:
            lines += ["", f"not run: {self.not_run}"]
        return "\n".join([*lines, "", *(f"* {line}" for line in self.assumptions)])

    def to_dict(self) -> dict[str, Any]:
        """All fields and the sums, as plain data for JSON."""
        return asdict(self) | {
            "modules": [asdict(module) for module in self.modules],
            "assumptions": list(self.assumptions),
            "ratio": self.ratio,
            "adapter_flops": self.adapter_flops,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "memory_full": asdict(self.memory_full) | {"total": self.memory_full.total},
        }

    def plot(self) -> Figure:
        """Memory with the adapter and in full, and the trainable parameters by role."""
        figure = new_figure(10, 4.2)
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        self._draw_memory(left)
        groups = {label: sum(row.params for row in group) for label, group in self._groups().items()}
        bars = right.barh([escape_mathtext(label) for label in groups], list(groups.values()))
        right.bar_label(bars, [count(params) for params in groups.values()], padding=2, fontsize=8)
        right.margins(x=0.15)
        right.invert_yaxis()
        right.xaxis.set_major_formatter(lambda value, _: count(value))
        right.set(xlabel="trainable parameters", title=f"{self.ratio:.3%} of the base model's parameters")
        figure.suptitle(escape_mathtext(f"{self.peft_type} on {self.model}"))
        return figure

    def _draw_memory(self, axes: Axes) -> None:
        unit, name_of_unit = next(
            (unit, name) for unit, name in _UNITS if max(self.memory.total, self.memory_full.total) >= unit
        )
        starts = [0.0, 0.0]
        for name in ("weights", "adapter", "gradients", "master", "optimizer", "activations"):
            sizes = [(getattr(side, name) or 0) / unit for side in (self.memory, self.memory_full)]
            if not any(sizes):
                continue
            axes.barh(["adapter", "full"], sizes, left=starts, label=name)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel=name_of_unit, title=f"Memory during training, {self.optimizer}, batch of {self._batch}")
        axes.legend(fontsize=8)

    def _groups(self) -> dict[str, list[AccountedModule]]:
        groups: dict[str, list[AccountedModule]] = {}
        for row in self.modules:
            groups.setdefault(row.group, []).append(row)
        return groups


_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def _size(value: int | None) -> str:
    if value is None:
        return "-"
    unit, name = next(((unit, name) for unit, name in _UNITS if value >= unit), (1, "B"))
    return f"{value} B" if unit == 1 else f"{value / unit:.2f} {name}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
