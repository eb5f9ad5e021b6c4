"""Whole updates: what DoRA and SPECLORA change in a weight W, which B A alone does not say and W is needed for.

DoRA's update is m ⊙ (W + s B A) / ‖W + s B A‖ − W, with row norms, and is dense. SPECLORA's is s B A plus the rescaled
block of W, so its rank is r + k at most.
References: Liu et al., "DoRA", ICML 2024; METHODS of SpecLoRA in `lorakit.tuners`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lorakit._checks import preview
from lorakit.adapters.adapter import Adapter, AdapterModule, Read, TensorInfo, row_slices
from lorakit.adapters.base_weights import ModuleWeights, open_module_weights
from lorakit.adapters.keys import tensor_name
from lorakit.errors import AdapterFileError, Finding, UnsupportedModelError

if TYPE_CHECKING:
    from torch import nn

    Base = str | os.PathLike[str] | nn.Module


def has_more(module: AdapterModule) -> bool:
    """Whether a module's update is more than B A: it has a DoRA magnitude or a SpecLoRA mask."""
    return module.magnitude is not None or module.mask is not None


def with_whole_updates(adapter: Adapter, base: Base | None) -> Adapter:
    """The adapter with the whole update of each DoRA and SPECLORA module, as factors of a plain LoRA of scaling 1.

    Each is computed when it is read, in float64, from the base weight. Other modules, and an adapter without a `base`,
    stay as they are.

    Args:
        base: what `lorakit.adapters.base_weights.open_module_weights` takes.
    Raises: AdapterFileError for a base that cannot be read, or that lacks a weight or has it in another shape;
        UnsupportedModelError for quantized weights, grouped convolutions, stacks of experts and inits that changed the
        base weights.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> from lorakit.adapters import open_adapter
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], use_dora=True))
        >>> whole = with_whole_updates(open_adapter(model), model)
        >>> whole.modules[0].rank, bool(whole.factors(whole.modules[0]).dense().abs().max() < 1e-6)  # untrained
        (3, True)
    """
    if base is None:
        return adapter
    partial = [module for module in adapter.modules if has_more(module)]
    if not partial:
        return adapter
    _check(adapter, partial)
    weights = open_module_weights(base, partial)
    missing = [module.name for module in partial if module.name not in weights.read]
    if missing:
        raise AdapterFileError(
            f"{weights.path!r} lacks {len(missing)} weights that {adapter.path} adapts: {preview(missing)}. Pass the "
            f"model that the adapter was trained on as `base`."
        )
    source = _WholeUpdates(adapter, weights, {})
    modules = []
    for module in adapter.modules:
        modules.append(source.whole(module) if has_more(module) else module)
    raw = {**adapter.settings.raw, "use_dora": False}
    settings = replace(adapter.settings, peft_type="LORA", use_dora=False, raw=raw)
    message = (
        f"In {len(partial)} modules the update is the whole one, computed from the weights of {weights.path!r}: DoRA "
        f"magnitudes and SpecLoRA masks are part of it."
    )
    findings = (*adapter.findings, Finding("info", "whole_update", None, message))
    return replace(adapter, settings=settings, modules=tuple(modules), findings=findings, source=source)


def _check(adapter: Adapter, modules: Sequence[AdapterModule]) -> None:
    if adapter.settings.changes_base:
        raise UnsupportedModelError(
            f"{adapter.path} was made with init_lora_weights={adapter.settings.init!r}, which changed the base "
            f"weights, so that its whole updates do not follow from the original ones."
        )
    for kind, names in (
        ("grouped convolutions", [module.name for module in modules if module.groups > 1]),
        ("stacks of experts", [module.name for module in modules if module.experts is not None]),
    ):
        if names:
            raise UnsupportedModelError(
                f"{adapter.path}: whole updates of {kind} are not covered: {preview(names)}. Export the adapter from "
                f"its model (lorakit.export.to_lora), or leave `base` out."
            )


@dataclass(frozen=True, eq=False)
class _WholeUpdates:
    """The tensors of an adapter, and those of its whole updates, which are computed when they are read."""

    adapter: Adapter
    weights: ModuleWeights
    computed: dict[str, AdapterModule]  # by the key of either of the factors

    def whole(self, module: AdapterModule) -> AdapterModule:
        """The module whose factors are the whole update."""
        rank = min(module.d_out, module.d_in)
        if module.magnitude is None:
            assert module.mask is not None
            rank = min(rank, module.rank + module.mask.numel)
        dtype = torch.promote_types(module.dtype, torch.float32)
        path = f"whole.{module.path}"
        A = TensorInfo(tensor_name(path, "A"), (rank, *module.A.shape[1:]), dtype)
        B = TensorInfo(tensor_name(path, "B"), (module.d_out, rank, *[1] * (len(module.B.shape) - 2)), dtype)
        self.computed.update(dict.fromkeys((A.key, B.key), module))
        return replace(module, A=A, B=B, scaling=1.0, magnitude=None, mask=None, whole_of=module)

    def infos(self) -> Mapping[str, TensorInfo]:
        return self.adapter.source.infos()

    @contextlib.contextmanager
    def reader(self) -> Iterator[Read]:
        with self.adapter.source.reader() as read:
            last: tuple[str, tuple[Tensor, Tensor]] | None = None

            def read_any(key: str) -> Tensor:
                nonlocal last
                module = self.computed.get(key)
                if module is None:
                    return read(key)
                if last is None or last[0] != module.name:
                    last = module.name, self._factors(module, read)
                return last[1][".lora_B." in key]

            yield read_any

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        if key not in self.computed:
            yield from self.adapter.source.rows(key, step)
            return
        with self.reader() as read:
            yield from row_slices(read(key), step)

    @torch.no_grad()
    def _factors(self, module: AdapterModule, read: Read) -> tuple[Tensor, Tensor]:
        """A (rank, d_in) and B (d_out, rank) of the whole update, in float64."""
        weight = self.weights.read[module.name]()
        W = _oriented(weight, module)
        if W is None:
            raise AdapterFileError(
                f"{module.name}: the update is {module.d_out} × {module.d_in}, but the weight in {self.weights.path!r} "
                f"has the shape {tuple(weight.shape)}. Pass the model that the adapter was trained on as `base`."
            )
        B, A = (factor.to(W.device, torch.float64) for factor in module.read(read))
        B = B * module.scaling
        if module.mask is not None:
            mask_B, mask_A = self._mask(module, read(module.mask.key).to(W), weight, W)
            B, A = torch.cat([B, mask_B], 1), torch.cat([A, mask_A])
        rank = min(module.d_out, module.d_in)
        if module.magnitude is None and B.shape[1] <= rank:
            return A, B
        update = B @ A
        if module.magnitude is not None:
            m = read(module.magnitude.key).to(W).flatten()
            changed = W + update
            norm = torch.linalg.vector_norm(changed, dim=1)
            update = (m / norm)[:, None] * changed - W
        unit = torch.eye(rank, dtype=update.dtype, device=update.device)
        return (update, unit) if module.d_out <= module.d_in else (unit, update)

    def _mask(self, module: AdapterModule, d_minus_1: Tensor, weight: Tensor, W: Tensor) -> tuple[Tensor, Tensor]:
        """The mask's update as factors B (d_out, k), which selects rows, and A (k, d_in)."""
        from lorakit.tuners._mask import SpectralMask, rescaled_block

        settings = self.adapter.settings
        mask = SpectralMask(d_minus_1.numel(), settings.raw.get("mode", "hadamard"))
        shaped = W.reshape(module.d_out, *module.A.shape[1:])
        block = rescaled_block(shaped.to(weight.dtype) if mask.mode.startswith("svd") else shaped, mask)
        row, column, width = mask.region(module.d_out, module.A.shape[1])
        initial = settings.resolve([module.name]).modules[module.name].scaling
        d_minus_1 = d_minus_1 * (module.scaling / initial if initial else 1.0)  # as `set_scale` changes it
        A = torch.zeros(mask.k, *module.A.shape[1:], dtype=W.dtype, device=W.device)
        A[:, column : column + width] = d_minus_1.reshape(-1, *[1] * (block.ndim - 1)) * block.to(W.dtype)
        B = torch.eye(module.d_out, dtype=W.dtype, device=W.device)[:, row : row + mask.k]
        return B, A.flatten(1)


def _oriented(weight: Tensor, module: AdapterModule) -> Tensor | None:
    """The base weight as a matrix (d_out, d_in), in float64; None where it has another shape."""
    W: Any = weight.detach().flatten(1).double()
    shape = (module.d_out, module.d_in)
    # A config has one fan_in_fan_out for all modules, so trust the shape where it settles the layout.
    if W.shape == shape[::-1] and (W.shape != shape or module.kind == "embedding" or module.fan_in_fan_out):
        W = W.mT
    return W if W.shape == shape else None
