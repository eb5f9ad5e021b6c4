"""What an audit reports."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import message_figure, new_figure, title_name
from lorakit._format import count, extent, number
from lorakit._report import Report, Table, counted, plain, shell_argument
from lorakit.errors import Finding
from lorakit.lens._curvature import Curvature
from lorakit.lens.render.figures import heatmaps_figure
from lorakit.lens.static import audit_figures
from lorakit.lens.static.audit_tables import (
    least_used_table,
    loss_gap_table,
    module_table,
    role_table,
    suggestion_table,
)
from lorakit.lens.static.experts import expert_table
from lorakit.lens.static.findings import SERVED_WRONG
from lorakit.lens.static.groups import GroupSummary
from lorakit.lens.static.recommendation import Recommendation
from lorakit.lens.static.spectra import AuditedModule
from lorakit.lens.static.suggestions import RankSuggestion

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class AuditReport(Report):
    """What `lorakit.lens.audit` found.

    `energy` is the share of ‖ΔW‖_F² that suggested ranks keep, `base` the path of the base weights, if one was given,
    and `curvature` what the suggestions' `loss_gaps` follow from.
    """

    path: str
    peft_type: str
    base_model: str | None
    base: str | None
    energy: float
    modules: tuple[AuditedModule, ...]
    total: GroupSummary
    roles: tuple[GroupSummary, ...]
    layers: tuple[GroupSummary, ...]
    parameters_beside: int
    suggestions: tuple[RankSuggestion, ...]
    recommendation: Recommendation | None
    findings: tuple[Finding, ...]
    curvature: tuple[Curvature, ...] = ()

    @property
    def title(self) -> str:
        return f"Audit of {self.path}"

    @property
    def headline(self) -> str:
        if not self.total.frobenius_norm:
            return f"{self.total.modules} modules, none with a finite update other than zero; {counted(self.findings)}."
        return (
            f"Rank {self._needed_rank} keeps {self.energy:.0%} of the energy in nine tenths of the "
            f"{self.total.modules} modules (r = {extent(self.total.ranks)}); {counted(self.findings)}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        dtypes = ", ".join(sorted({module.dtype for module in self.modules}))
        partial = sum(module.low_rank_part_only for module in self.modules)
        beside = f", and {count(self.parameters_beside)} beside the updates" if self.parameters_beside else ""
        lines = [
            f"type: {self.peft_type}" + (f" (only the low-rank part in {partial} modules)" if partial else ""),
            f"base model: {self.base_model}" if self.base_model else "",
            f"updates: {self.total.modules} modules, {count(self.total.parameters)} parameters ({dtypes}){beside}",
            self._relative_norm,
        ]
        if self.recommendation is not None:
            lines.append(f"★ {self.recommendation.policy.replace('_', ' ')}: {self.recommendation.reason}")
        if self.recommended is not None:
            ranks = f"a cut to {self.recommended.label}"
            lines += [
                f"{ranks}, {gap.where}: at most {number(gap.upper)} more loss, a local estimate"
                for gap in self.recommended.loss_gaps
            ]
        return tuple(line for line in lines if line)

    @property
    def _relative_norm(self) -> str:
        ratio = self.total.relative_norm
        return "" if ratio is None else f"norm: {ratio:.2%} of the base weights'"

    @property
    def recommended(self) -> RankSuggestion | None:
        """The suggestion that `next_steps` follows, one rank that is enough for nine tenths of the modules.

        None if no ranks were suggested.
        """
        return next((suggestion for suggestion in self.suggestions if suggestion.policy == "global_p90"), None)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Commands that compress the adapter, compare the result with it, and export it as a plain LoRA."""
        source = shell_argument(self.path)
        if source is None or self.has_errors or not self.total.frobenius_norm:
            return ()
        if self.peft_type == "SPECLORA" and self.base is None:
            base = "" if self.base_model is None else shell_argument(self.base_model)
            return (f"lorakit export {source} {self._beside('-lora')} --base {base}",) if base else ()
        steps = []
        given = "" if self.base is None else f" --base {shell_argument(self.base)}"
        _, high = self.total.ranks or (0, 0)
        if self._needed_rank < high:
            recommended = self.recommended
            criterion = f"--energy {self.energy:g}" if recommended is None else f"--max-rank {recommended.rank}"
            smaller = self._beside("-compressed")
            steps += [
                f"lorakit compress {source} {smaller} {criterion}{given}",
                f"lorakit compare {source} {smaller}{given}",
            ]
        if self.peft_type not in ("LORA", "SPECLORA") or any(finding.code == SERVED_WRONG for finding in self.findings):
            steps.append(f"lorakit export {source} {self._beside('-lora')}")
        return tuple(steps)

    def to_dict(self) -> dict[str, Any]:
        """`modules` (with their singular values), `summary` and `findings` as JSON data."""
        summary = {
            "path": self.path,
            "peft_type": self.peft_type,
            "base_model": self.base_model,
            "base": self.base,
            "energy": self.energy,
            "parameters_beside": self.parameters_beside,
            **{key: value for key, value in asdict(self.total).items() if key not in ("name", "energy_share")},
            "roles": [asdict(group) for group in self.roles],
            "layers": [asdict(group) for group in self.layers],
            "suggestions": [asdict(suggestion) for suggestion in self.suggestions],
            "recommendation": None if self.recommendation is None else asdict(self.recommendation),
            "curvature": [asdict(one) for one in self.curvature],
        }
        modules = [asdict(module) for module in self.modules]
        data = {"modules": modules, "summary": summary, "findings": [asdict(finding) for finding in self.findings]}
        return {key: plain(value) for key, value in data.items()}

    def tables(self) -> list[Table]:
        tables = [
            role_table(self.roles, self.total, self.energy),
            least_used_table(self.modules),
            expert_table(self.modules),
            suggestion_table(self.suggestions, self.energy, self.recommendation),
            loss_gap_table(self.suggestions),
            module_table(self.modules),
        ]
        return [table for table in tables if table.rows and self.modules]

    def plot(self) -> Figure:
        """Heatmaps by role and layer above spectra by role and energy against parameters."""
        if not self._drawable:
            return self._nothing()
        return audit_figures.overview(self._name, self.modules, self.energy, self.suggestions)

    def figures(self) -> dict[str, Figure]:
        """The parts of `plot()` as figures: "heatmaps", "spectra" and "energy"."""
        if not self._drawable:
            return {"audit": self._nothing()}
        found = {"heatmaps": heatmaps_figure(self._name, audit_figures.heatmaps(self.modules, self.energy))}
        if self.total.frobenius_norm:
            spectra, curves = audit_figures.spectra(self.modules), audit_figures.energy_curves(self.modules)
            for name in ("spectra", "energy"):
                found[name] = new_figure(7, 4.5)
                found[name].suptitle(self._name, fontsize=10)
            everything = audit_figures.spectrum_of_all(self.modules)
            audit_figures.draw_spectra(found["spectra"].subplots(), spectra, everything)
            audit_figures.draw_energy(found["energy"].subplots(), curves, self.suggestions)
        return found

    @property
    def _drawable(self) -> bool:
        return self.total.frobenius_norm is not None

    def _nothing(self) -> Figure:
        return message_figure(self._name, "no module has a finite update")

    @property
    def _name(self) -> str:
        return f"{title_name(self.path)} ({self.peft_type})"

    @property
    def _needed_rank(self) -> int:
        return (self.total.energy_rank_p90 or {}).get(str(float(self.energy)), 0)

    def _beside(self, suffix: str) -> str | None:
        return shell_argument(self.path, suffix)
