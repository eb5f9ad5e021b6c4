"""What surgery reports: one row per module, and what holds for all of them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from lorakit.naming.roles import Role


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


@dataclass(frozen=True)
class EditedRow(SensitivityRow):
    """A row of an edit: `gate` is the policy's factor for each component, before the energy was restored by
    `energy_scale`; `edited_singular_values` come after that."""

    gate: list[float]
    energy_scale: float
    edited_singular_values: list[float]


@dataclass(frozen=True)
class SensitivityReport:
    """Sensitivities of an adapter's singular components.

    `num_examples` were used; `num_without_labels` had no label that enters the loss and were left out; `zero_modules`
    have ΔW = 0 and no components, and `idle_modules` none that matters to any of the examples (they did not run, or
    nothing of them reached the loss): both are left alone.
    """

    adapter_name: str
    aggregate: str
    num_examples: int
    num_without_labels: int
    zero_modules: list[str]
    idle_modules: list[str]
    modules: list[SensitivityRow]

    def to_dict(self) -> dict[str, Any]:
        """All but the per-example tensors, as plain lists, numbers and strings."""
        return as_plain(self)


def as_plain(value: Any) -> Any:
    """Dataclasses, tuples and lists of them as dicts and lists that JSON takes; in-memory fields are left out."""
    if hasattr(value, "__dataclass_fields__"):
        shown = [f.name for f in fields(value) if not f.metadata.get("in_memory")]
        return {name: as_plain(getattr(value, name)) for name in shown}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    return value
