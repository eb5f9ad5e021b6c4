"""The report of measured sensitivities: one row per module, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorakit._report import Report
from lorakit.naming.roles import Role
from lorakit.surgery._plots import Quantity, component_maps

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class SensitivityRow:
    """One module's singular values of ΔW (descending, scaling included) and their sensitivities, in that order."""

    module_name: str
    role: Role | None
    rank: int
    scaling: float
    singular_values: list[float]
    sensitivity: list[float]
    per_example: Tensor = field(repr=False, compare=False, metadata={"in_memory": True})  # (n, m), signed

    @property
    def relative_sensitivity(self) -> list[float]:
        """The sensitivities divided by their mean magnitude."""
        mean = sum(map(abs, self.sensitivity)) / len(self.sensitivity)
        return [value / mean if mean > 0 else 0.0 for value in self.sensitivity]


@dataclass(frozen=True)
class EditedRow(SensitivityRow):
    """A row of an edit: singular values times `gate` times `energy_scale` are the `edited_singular_values`.

    `gate` is the policy's factor for each component, and `energy_scale` the one factor that restores the energy.
    """

    gate: list[float]
    energy_scale: float
    edited_singular_values: list[float]


@dataclass(frozen=True, repr=False)
class SensitivityReport(Report):
    """Sensitivities of an adapter's singular components.

    `num_examples` were used; `num_without_labels` more had no label that counts and were left out. `zero_modules` have
    ΔW = 0 and no components. `idle_modules` did not affect the loss of any example: they did not run, or their output
    does not reach the loss. Both are left alone.
    """

    model_name: str
    adapter_name: str
    aggregate: str
    num_examples: int
    num_without_labels: int
    zero_modules: list[str]
    idle_modules: list[str]
    modules: Sequence[SensitivityRow]

    @property
    def title(self) -> str:
        """The model and its adapter."""
        return f"{self.model_name}, adapter {self.adapter_name!r}"

    @property
    def headline(self) -> str:
        """How many modules were measured on how many examples."""
        return (
            f"{self.title}: {self.aggregate} sensitivity of {len(self.modules)} modules, {self.num_examples} examples"
        )

    @property
    def details(self) -> tuple[str, ...]:
        """What was left out."""
        left_out = (
            (len(self.zero_modules), "modules have no update and were left alone"),
            (len(self.idle_modules), "modules do not affect the loss and were left alone"),
            (self.num_without_labels, "examples without labels were left out"),
        )
        return tuple(f"{count} {what}" for count, what in left_out if count)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Python code that edits the adapter."""
        return ('import lorakit; edit = lorakit.surgery.reweight(model, loader, policy="smooth_abs")',)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-example tensors, as JSON data."""
        data: dict[str, Any] = as_plain(self)
        return data

    def rows(self) -> list[dict[str, Any]]:
        """One row for each singular component."""
        per_component = {
            "singular_values": "singular_value",
            "sensitivity": "sensitivity",
            "gate": "gate",
            "edited_singular_values": "edited_singular_value",
        }
        rows = []
        for module in map(as_plain, self.modules):
            columns = {name: module[key] for key, name in per_component.items() if key in module}
            for component, values in enumerate(zip(*columns.values(), strict=True), 1):
                names = {"module_name": module["module_name"], "role": module["role"], "component": component}
                rows.append(names | dict(zip(columns, values, strict=True)))
        return rows

    def plot(self) -> Figure:
        """A map of each component's sensitivity relative to its module's mean, with one panel for each role."""
        return component_maps(self.headline, self.modules, [self.sensitivity_map])

    @property
    def sensitivity_map(self) -> Quantity:
        """The relative sensitivities, as a figure shows them."""
        signed = self.aggregate == "mean"
        label = "sensitivity / mean |sensitivity|"
        return Quantity(label, lambda row: row.relative_sensitivity, center=0.0 if signed else None)


def as_plain(value: Any) -> Any:
    """Dataclasses, tuples and lists as dicts and lists that JSON takes; in-memory fields are left out."""
    if hasattr(value, "__dataclass_fields__"):
        shown = [f.name for f in fields(value) if not f.metadata.get("in_memory")]
        return {name: as_plain(getattr(value, name)) for name in shown}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return value
