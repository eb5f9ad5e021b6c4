"""What the writers of formats that are not PEFT's have in common: factors at one rank, refusals, reading back."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import make_file
from lorakit._format import count
from lorakit._report import Report
from lorakit.adapters import Adapter, AdapterModule, ExtraTensor
from lorakit.errors import ExportError
from lorakit.spectral import LowRank

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MERGE_INSTEAD = "Merge the adapter into its model, and convert that."
_EXTRAS = {
    "modules_to_save": "fully trained modules (`modules_to_save`)",
    "bias": "trained biases (`bias`)",
    "embedding": "embeddings saved whole (`save_embedding_layers`)",
    "trainable_tokens": "trained tokens (`trainable_token_indices`)",
    "orphan": "tensors that belong to no module",
}


@dataclass(frozen=True)
class FormatModule:
    """One module as it was written. `error` is ‖written − meant‖_F / ‖meant‖_F of its update, read back."""

    module_name: str
    written_name: str
    rank: int
    error: float


@dataclass(frozen=True, repr=False)
class FormatReport(Report):
    """What was written for a program that does not read PEFT's directories.

    `scaling` is the factor of B A that the program applies to every module, or None where each has its own.
    `parameters` counts padding.
    """

    path: str
    format: str
    scaling: float | None
    parameters: int
    bytes: int
    error: float
    modules: tuple[FormatModule, ...]

    @property
    def headline(self) -> str:
        """What was written, in a line."""
        return (
            f"{self.path}: {len(self.modules)} modules for {self.format}, {count(self.parameters)} parameters, "
            f"{count(self.bytes)}B; read back with a largest error of {self.error:.1g}."
        )

    def plot(self) -> Figure:
        """The relative error of each module's update, read back."""
        figure = new_figure(8, 4)
        axes = figure.subplots()
        axes.semilogy([max(row.error, 1e-18) for row in self.modules], "o", markersize=4)
        axes.set(xlabel="module, in the adapter's order", ylabel="relative error of the update")
        axes.set_title(escape_mathtext(f"{self.path}, written for {self.format}"))
        return figure


def check_plain(
    adapter: Adapter,
    program: str,
    *,
    embeddings: bool,
    convolutions: bool,
    ignore: Callable[[ExtraTensor], bool] = lambda _: False,
) -> None:
    """Refuse an adapter that is more than low-rank factors, which `program` would not load or would misread.

    `ignore` says which tensors beside the updates may be left out.
    Raises: ExportError that names what is refused; AdapterFileError for a broken adapter.
    """
    adapter.check()
    path, settings = adapter.path, adapter.settings
    if settings.r is None:
        raise ExportError(f"{path}: there is no adapter_config.json beside it, so its scaling is unknown.")
    if settings.peft_type == "SPECLORA":
        raise ExportError(
            f"{path} is a SPECLORA adapter, whose mask is an update of the base weight. Write it as a plain LoRA with "
            f"lorakit.export.to_lora(model, out) first."
        )
    if settings.changes_base:
        raise ExportError(
            f"{path} was made with init_lora_weights={settings.init!r}, which changed the base weights. Save it with "
            f"`path_initial_model_for_weight_conversion` first."
        )
    # A model that is open has these in its config, not among the adapter's tensors.
    configured = [name for name in ("modules_to_save", "target_parameters") if getattr(settings, name)]
    configured += ["trainable_token_indices"] if settings.raw.get("trainable_token_indices") else []
    configured += ["bias"] if settings.raw.get("bias", "none") != "none" else []
    if configured:
        raise ExportError(f"{path} was made with `{configured[0]}`, which {program} does not load. {MERGE_INSTEAD}")
    for extra in adapter.extras:
        if not ignore(extra):
            raise ExportError(
                f"{path} has {_EXTRAS[extra.kind]}: {extra.info.key}. {program} loads none. {MERGE_INSTEAD}"
            )
    for module in adapter.modules:
        if module.magnitude is not None:
            raise ExportError(
                f"{path}: {module.name!r} has a DoRA magnitude, which {program} does not load. {MERGE_INSTEAD}"
            )
        if module.bias is not None:
            raise ExportError(
                f"{path}: {module.name!r} has a `lora_bias`, which {program} does not load. {MERGE_INSTEAD}"
            )
        if module.kind == "conv" and not convolutions:
            raise ExportError(f"{path}: {module.name!r} is a convolution, which {program}'s adapters cannot update.")
        if module.kind == "embedding" and not embeddings:
            raise ExportError(f"{path}: {module.name!r} is an embedding, which {program}'s adapters cannot update.")
    if not adapter.modules:
        raise ExportError(f"{path}: no module has an update.")


def padded(adapter: Adapter) -> Iterator[tuple[AdapterModule, Tensor, Tensor]]:
    """Each module with B (d_out, R) and A (R, d_in) on the CPU, R the largest rank, shorter factors padded with zeros.

    The scaling is part of B, so the update is B A; both are float32.
    Raises: ExportError for entries that are not finite.
    """
    rank = max(module.rank for module in adapter.modules)
    for module in adapter.modules:
        update = adapter.factors(module).to(dtype=torch.float64, device="cpu")
        padding = rank - update.rank
        A = F.pad(update.A, (0, 0, 0, padding)).float()
        B = F.pad(update.B * update.scaling, (0, padding)).float()
        for half, factor in (("A", A), ("B", B)):
            if not bool(factor.isfinite().all()):
                raise ExportError(f"{adapter.path}: {module.name}: lora_{half} has entries that float32 cannot hold.")
        yield module, B, A


def errors_of(adapter: Adapter, read: Mapping[str, LowRank]) -> dict[str, float]:
    """The relative error of each module's update as it was read back, by module name.

    Raises: ExportError where one is more than rounding to float32.
    """
    found = {}
    for module in adapter.modules:
        meant = adapter.factors(module).to(dtype=torch.float64, device="cpu")
        error, norm = _norm(read[module.name] - meant), _norm(meant)
        # Rounding moves each factor by eps/2 of its norm; the rest is for the cancellation in `error` itself.
        factors = torch.linalg.matrix_norm(meant.B) * torch.linalg.matrix_norm(meant.A)
        if not error <= 4 * torch.finfo(torch.float32).eps * abs(float(meant.scaling)) * float(factors):
            raise ExportError(
                f"{module.name}: the update was read back with an error of {error:.2g}, at a norm of {norm:.2g}. "
                f"Nothing was written."
            )
        found[module.name] = error / norm if norm > 0 else 0.0
    return found


def replace_file(out: str | os.PathLike[str], write: Callable[[Path], None], check: Callable[[Path], None]) -> int:
    """Have `write` make a file beside `out`, `check` it, and put it in the place of `out`; its size in bytes.

    Raises: ExportError where `out` is a directory; whatever `write` and `check` raise, with `out` as it was.
    """
    if os.path.isdir(out):
        raise ExportError(f"`out` must be a file; {os.fspath(out)!r} is a directory. Add a file's name.")

    def make(staging: Path) -> int:
        write(staging)
        check(staging)
        return staging.stat().st_size

    return make_file(out, make)


def _norm(update: LowRank) -> float:
    return float(update.inner(update).clamp(min=0).sqrt())
