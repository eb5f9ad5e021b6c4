"""Writing an adapter as a plain LoRA: names, layouts and config of what is written, and that it reads back as meant."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.adapters.adapter import Adapter, AdapterModule
from lorakit.adapters.atomic import CONFIG_NAME, replaced_directory, write_adapter
from lorakit.adapters.edit_log import RECORD_NAME, set_edits, write_record
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.read import open_file_or_hub
from lorakit.errors import AdapterFileError, Finding, UnsupportedModelError
from lorakit.naming.patterns import compact_pattern
from lorakit.spectral import LowRank

# Fields of FisherLoRA's and AdaLoRA's configs that LoRA's has not.
_FOREIGN = {"r_q", "r_v", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"}
_FOREIGN.add("total_step")


class WrittenReport:
    """A report, frozen, of what was written: `modules`, `findings`, and what is said of all of it."""

    modules: tuple[Any, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `modules`, `summary` and `findings`."""
        summary = {key: value for key, value in vars(self).items() if key not in ("modules", "findings")}
        return {
            "modules": [asdict(module) for module in self.modules],
            "summary": summary,
            "findings": [asdict(finding) for finding in self.findings],
        }


def check_rewritable(adapter: Adapter) -> None:
    """Raise where no plain LoRA with other factors can be made of `adapter`'s own.

    Raises: AdapterFileError for one that is broken, or has no config; UnsupportedModelError for kinds, by name.
    """
    adapter.check()
    path, settings = adapter.path, adapter.settings
    if settings.r is None:
        raise AdapterFileError(f"{path}: there is no {CONFIG_NAME} beside it, so what its factors mean is unknown.")
    if settings.peft_type == "SPECLORA":
        raise UnsupportedModelError(
            f"{path} is a SPECLORA adapter, whose mask is an update of the base weight: its low-rank part cannot be "
            f"rewritten alone. Use lorakit.export.to_lora(model, out, rank=…), or `lorakit export --base MODEL`, first."
        )
    if settings.changes_base:
        raise UnsupportedModelError(
            f"{path} was made with init_lora_weights={settings.init!r}, which changed the base weights; its factors "
            f"mean nothing to the original ones. Save it with `path_initial_model_for_weight_conversion` first."
        )
    parameters = [extra.info.key for extra in adapter.extras if extra.kind == "expert_parameters"]
    if parameters:
        raise UnsupportedModelError(f"{path} adapts parameters (`target_parameters`), as {parameters[0]!r}: not yet.")
    grouped = [module.name for module in adapter.modules if module.groups > 1]
    if grouped:
        raise UnsupportedModelError(f"{path}: {grouped[0]!r} is a grouped convolution, which is not covered yet.")
    if not adapter.modules:
        raise AdapterFileError(f"{path}: no module has an update.")


def check_finite(adapter: Adapter, module: AdapterModule, update: LowRank) -> None:
    """Raise AdapterFileError where the factors are not finite, or their product is not."""
    for half, factor in (("lora_B", update.B), ("lora_A", update.A)):
        if not bool(factor.isfinite().all()):
            raise AdapterFileError(f"{adapter.path}: {module.name}: {half} has NaN or infinite entries.")


def carried_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors beside the updates, by their keys. Raises: AdapterFileError where one is not finite."""
    tensors = {extra.info.key: adapter.tensor(extra.info) for extra in adapter.extras}
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.element_size() > 1 and not bool(tensor.isfinite().all()):
            raise AdapterFileError(f"{adapter.path}: {key} has NaN or infinite entries.")
    return tensors


def factor_tensors(module: AdapterModule, update: LowRank) -> dict[str, Tensor]:
    """The factors of `update` as PEFT stores them for a module of this kind, in the dtypes of the module's own."""
    embedding = module.kind == "embedding"
    A = update.A.reshape(update.rank, *module.A.shape[1:]).to(module.A.dtype)
    B = update.B.reshape(*update.B.shape, *[1] * (len(module.B.shape) - 2)).to(module.B.dtype)
    return {tensor_name(module.name, "A", embedding): A, tensor_name(module.name, "B", embedding): B}


def common_scaling(scalings: Iterable[float]) -> float:
    """The scaling of most modules, to which the others' factors are rescaled; 1 if there is none but 0."""
    some = [scaling for scaling in scalings if scaling != 0]
    return max(some, key=some.count) if some else 1.0


def plain_fields(ranks: Mapping[str, int], scaling: float) -> dict[str, Any]:
    """What a plain LoRA's config says of its ranks, by module, all with the same scaling.

    `r` is the largest; a server that reads only `r` and `lora_alpha` and ignores the patterns applies the same update.
    """
    r = max(ranks.values())
    alphas = {name: _integral(scaling * rank) for name, rank in ranks.items()}
    largest = {name for name in ranks if ranks[name] == r}
    return {
        "r": r,
        "lora_alpha": _integral(scaling * r),
        "use_rslora": False,
        "rank_pattern": compact_pattern(ranks, largest),
        "alpha_pattern": compact_pattern(alphas, largest),
        "init_lora_weights": True,
        "inference_mode": True,
    }


def plain_config(
    raw: Mapping[str, Any], ranks: Mapping[str, int], scaling: float, *, spell_out: bool = False
) -> dict[str, Any]:
    """`raw`, an adapter's config, as that of a plain LoRA with these ranks.

    With `spell_out` its targets are these modules by name, whatever `raw` says of them.
    """
    config = {key: value for key, value in raw.items() if key not in _FOREIGN}
    config |= {"peft_type": "LORA", **plain_fields(ranks, scaling)}
    if spell_out:
        config |= {"target_modules": sorted(ranks), "exclude_modules": None}
        config |= {"layers_to_transform": None, "layers_pattern": None}
    return config


def write_plain(
    out: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    intended: Mapping[str, LowRank],
    *,
    edits: list[dict[str, Any]] | None = None,
    verify: bool = True,
) -> dict[str, float]:
    """Write an adapter, whole or not at all; with `verify`, only if what is read back is `intended`, by module.

    `edits` is its record of surgery. Returns the relative errors ‖written − intended‖_F / ‖intended‖_F by module.
    Raises: OSError; AdapterFileError where what was written is not what was meant, such as for a dtype too narrow.
    """
    errors = {}
    with replaced_directory(out) as directory:
        write_adapter(directory, tensors, config)
        if verify:
            errors = _verified(directory, intended)
        if edits:
            record = _Record()
            set_edits(record, edits)
            write_record(directory, record)
    if not edits:
        Path(out, RECORD_NAME).unlink(missing_ok=True)  # an old one is not of this adapter
    return errors


class _Record:
    """Carries edits, as a config does."""


@torch.no_grad()
def _verified(directory: Path, intended: Mapping[str, LowRank]) -> dict[str, float]:
    written = open_file_or_hub(directory)
    written.check()
    modules = {module.name: module for module in written.modules}
    if modules.keys() != intended.keys():
        raise AdapterFileError(f"What was written has other modules: {sorted(modules.keys() ^ intended.keys())[0]!r}.")
    errors = {}
    with written.source.reader() as read:
        for name, update in intended.items():
            module = modules[name]
            exact = update.to(dtype=torch.float64, device="cpu")
            B, A = (factor.double() for factor in module.read(read))
            error, norm = _difference(B, A, module.scaling, exact), _norm(exact)
            # Rounding moves each factor by eps/2 of its norm.
            factors = torch.linalg.matrix_norm(exact.B) * torch.linalg.matrix_norm(exact.A)
            allowed = 2 * torch.finfo(_narrower(module)).eps * abs(float(exact.scaling)) * float(factors)
            if not error <= allowed + 1e-12 * norm:
                raise AdapterFileError(
                    f"{name}: the update would be written as {_narrower(module)} with an error of {error:.2g}, at a "
                    f"norm of {norm:.2g}. Nothing was written."
                )
            errors[name] = error / norm if norm > 0 else 0.0
    return errors


def _difference(B: Tensor, A: Tensor, scaling: float, exact: LowRank) -> float:
    """‖scaling · B A − exact‖_F, as (B − B₀) A + B₀ (A − A₀): without the cancellation of the two updates."""
    own = float(exact.scaling)
    if B.shape != exact.B.shape or A.shape != exact.A.shape or own == 0:
        return _norm(LowRank(B, A, scaling) - exact)
    moved = torch.cat([B * (scaling / own) - exact.B, exact.B], dim=1)
    return _norm(LowRank(moved, torch.cat([A, A - exact.A]), own))


def _norm(update: LowRank) -> float:
    return float(update.inner(update).clamp(min=0).sqrt())


def _narrower(module: AdapterModule) -> torch.dtype:
    assert module.A.dtype is not None
    assert module.B.dtype is not None
    return max(module.A.dtype, module.B.dtype, key=lambda dtype: torch.finfo(dtype).eps)


def _integral(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 * max(1.0, abs(value)) else value
