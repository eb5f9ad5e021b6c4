"""What the reports of compress, merge and export have in common: sizes, ranks and vLLM's rank before and after."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import count, size
from lorakit._report import Report
from lorakit.adapters.rewritable import stored_bytes
from lorakit.errors import Finding
from lorakit.naming.roles import group_of
from lorakit.serving._profiles import vllm_max_lora_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from lorakit.adapters import Adapter
    from lorakit.adapters.write_lora import PlainLora

COMPACT_READERS = "PEFT ≥ 0.15 and vLLM ≥ 0.33 only"


@dataclass(frozen=True)
class Before:
    """What there was before: the factors' parameters, the tensors' bytes, the largest rank, whether vLLM serves it."""

    parameters: int
    size_bytes: int
    rank: int
    served: bool = True

    @classmethod
    def of(cls, adapters: Sequence[Adapter]) -> Before:
        """Of several adapters the sums, and the largest rank."""
        modules = [module for adapter in adapters for module in adapter.modules]
        return cls(
            parameters=sum(module.parameters for module in modules),
            size_bytes=sum(stored_bytes(adapter) for adapter in adapters),
            rank=max(module.stored.rank for module in modules),
        )


@dataclass(frozen=True, repr=False)
class WrittenReport(Report):
    """What a writer wrote.

    `r` and `lora_alpha` are those of the config. `parameters` are those of the factors as written, with their padding,
    `parameters_beside` those of all else in the file; sizes are of all tensors. `vllm_max_lora_rank` is the smallest
    `--max-lora-rank` with which vLLM serves the file (None above 512). `compact`: modules have ranks of their own.
    """

    path: str
    base_model: str | None
    r: int
    lora_alpha: float
    compact: bool
    rank_before: int
    parameters_before: int
    parameters: int
    parameters_beside: int
    size_bytes_before: int
    size_bytes: int
    vllm_max_lora_rank_before: int | None
    vllm_max_lora_rank: int | None
    modules: tuple[Any, ...]
    findings: tuple[Finding, ...]

    @property
    def details(self) -> tuple[str, ...]:
        beside = f", and {count(self.parameters_beside)} beside them" if self.parameters_beside else ""
        before, after = self.vllm_max_lora_rank_before, self.vllm_max_lora_rank
        lines = [
            f"r {self.r}, lora_alpha {self.lora_alpha:.6g}; {count(self.parameters_before)} → {count(self.parameters)} "
            f"parameters in the factors{beside}",
            f"{size(self.size_bytes_before)} → {size(self.size_bytes)}; vLLM: --max-lora-rank "
            f"{before or 'not served'} → {after or 'not served: above 512'}",
        ]
        return (*lines, *(f"{finding.severity} {finding.code}: {finding.message}" for finding in self.findings))

    @property
    def next_steps(self) -> tuple[str, ...]:
        steps = [f"lorakit servable {shlex.quote(self.path)}"]
        if self.base_model is not None and self.vllm_max_lora_rank is not None:
            base, adapter = shlex.quote(self.base_model), shlex.quote(f"adapter={self.path}")
            steps.append(
                f"vllm serve {base} --enable-lora --max-lora-rank {self.vllm_max_lora_rank} --lora-modules {adapter}"
            )
        return tuple(steps)


def summary(
    path: str, config: Mapping[str, Any], plain: PlainLora, before: Before, beside: Mapping[str, Tensor]
) -> Any:
    """The fields of a WrittenReport but `modules` and `findings`; `beside` are the tensors beside the factors."""
    return {
        "path": path,
        "base_model": config["base_model_name_or_path"],
        "r": plain.r,
        "lora_alpha": plain.lora_alpha,
        "compact": bool(plain.rank_pattern),
        "rank_before": before.rank,
        "parameters_before": before.parameters,
        "parameters": sum(plain.tensors[key].numel() for key in plain.factor_keys),
        "parameters_beside": sum(tensor.numel() for tensor in beside.values())
        + sum(tensor.numel() for key, tensor in plain.tensors.items() if key not in plain.factor_keys),
        "size_bytes_before": before.size_bytes,
        "size_bytes": sum(tensor.nbytes for tensor in (*plain.tensors.values(), *beside.values())),
        "vllm_max_lora_rank_before": vllm_max_lora_rank(before.rank) if before.served else None,
        "vllm_max_lora_rank": vllm_max_lora_rank(plain.r),
    }


def compact_finding(plain: PlainLora) -> list[Finding]:
    """Who can read the file, where modules have ranks of their own."""
    if not plain.rank_pattern:
        return []
    message = f"Ranks differ from module to module: the file is right in {COMPACT_READERS}."
    return [Finding("info", "compact", None, message)]


def plot_energy(report: WrittenReport, energies: Mapping[str, float]) -> Figure:
    """The share of each module's energy that was kept, module by module in their order, coloured by role."""
    figure = new_figure(7.0, 3.6)
    axes = figure.subplots()
    groups: dict[str, list[tuple[int, float]]] = {}
    for place, (name, energy) in enumerate(energies.items()):
        groups.setdefault(group_of(name), []).append((place, energy))
    for group, points in groups.items():
        axes.plot(*zip(*points, strict=True), ".", label=escape_mathtext(group))
    axes.set_xlabel("module, in the order of the report's table")
    axes.set_ylabel("share of ‖ΔW‖² kept")
    axes.set_ylim(min(0.0, *energies.values()), 1.02)
    axes.set_title(escape_mathtext(f"{report.path}: r {report.r}"))
    axes.legend(fontsize=7, ncols=2)
    return figure
