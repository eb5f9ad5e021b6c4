"""SpecLoRA: LoRA plus a learnable rescaling of the top-left k × k block of the frozen weight.

W' = Γ ⊙ W + scaling · B A. The mask Γ is 1 everywhere except in that block, whose columns all equal the learnable
d ∈ R^k. The mask is never formed. With P = W[:k, :k], and d stored as d − 1,

    y = W x + scaling · B (A x) + pad((d − 1) ⊙ (P x[:k])),

which costs k² multiply-adds per token and k parameters per module.

Reference: Si et al., "Weight Spectra Induced Efficient Model Adaptation", 2025, section 4 (Eq. 4–8, Table 4).
"""

from __future__ import annotations

import re
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import merge_utils
from peft.utils.peft_types import PeftType
from torch import Tensor, nn

from lorakit._registration import register_tuner
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.naming.patterns import compact_pattern, lookup, targeted_modules, targeted_parameters, warn_unmatched
from lorakit.tuners import _private
from lorakit.tuners._base import InitWeightsAlias, ResolvingLoraModel, integer_errors
from lorakit.tuners._blocks import compute_blocks
from lorakit.tuners._layer import SpecLoRALayer
from lorakit.tuners._layers import (
    SpecLoRAConv1d,
    SpecLoRAConv2d,
    SpecLoRAConv3d,
    SpecLoRAEmbedding,
    SpecLoRALinear,
    SpecLoRAMultiheadAttention,
    SpecLoRAOutProjection,
    SpecLoRAParamWrapper,
    masked_class,
    quantized_class,
)
from lorakit.tuners._mask import MODES, Mode, SpectralMask, is_of_other_mode, wrong_mode

if TYPE_CHECKING:
    from lorakit.allocation.probed import MaskProbeReport

__all__ = [
    "MODES",
    "Mode",
    "SpecLoRAConfig",
    "SpecLoRAConv1d",
    "SpecLoRAConv2d",
    "SpecLoRAConv3d",
    "SpecLoRAEmbedding",
    "SpecLoRALayer",
    "SpecLoRALinear",
    "SpecLoRAModel",
    "SpecLoRAMultiheadAttention",
    "SpecLoRAOutProjection",
    "SpecLoRAParamWrapper",
    "SpectralMask",
]

# Options of LoraConfig that cannot be combined with a mask.
_EXCLUDED = {
    "use_qalora": "its update has one value for each quantization group, so that it can be merged into the zero points",
    "arrow_config": "it routes between low-rank factors and ignores masks",
    "megatron_config": "the weight is sharded over processes",
}


@dataclass
class SpecLoRAConfig(InitWeightsAlias, LoraConfig):
    """LoRA with a learnable rescaling d of k rows of each targeted weight.

    Takes every argument of `peft.LoraConfig`, with the same meaning. New are:

    Args:
        k: the size of the rescaled block. In modules with a smaller side it is clipped to that side, with one warning.
            The paper uses 200 for language models and 32 for vision models.
        k_pattern: a different k for some modules, by the same rules as `rank_pattern`.
        mode: what is rescaled.

            * ``hadamard`` (Eq. 7–8): the top-left k × k block of the weight.
            * ``svd`` (Eq. 4–6): the first k rows of the weight's best rank-k approximation.
            * ``hadamard_bottom``: the bottom-right block, and ``svd_bottom``: the first k rows of the part with the k
              smallest singular values. Both are controls (Table 4 of the paper can be read either way).

            The svd modes compute one full SVD per module when the adapter is made or loaded. Their block is not unique
            if the k-th and the next singular value are equal.

    Raises: ValueError for invalid values, and for LoRA options that cannot be combined with a mask.

    Example:
        >>> import torch
        >>> from peft import get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(32, 32))
        >>> model = get_peft_model(base, SpecLoRAConfig(r=4, k=8, target_modules=["0"]))
        >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad][-1]
        'base_model.model.0.lora_spec.default.weight'
        >>> model.get_nb_trainable_parameters()[0]  # 4 · (32 + 32) for B and A, and k
        264
    """

    k: int = field(default=200, metadata={"help": "Size of the rescaled block of the frozen weight."})
    k_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "A different k for some modules: name or regular expression → k."}
    )
    mode: Mode = field(default="hadamard", metadata={"help": f"What is rescaled: one of {', '.join(MODES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPECLORA
        self.k_pattern = dict(self.k_pattern or {})
        wrong = integer_errors({"k": self.k} | {f"k_pattern[{key!r}]": k for key, k in self.k_pattern.items()})
        if self.mode not in MODES:
            wrong.append(f"`mode` must be one of {', '.join(MODES)}; got {self.mode!r}.")
        wrong += [
            f"SpecLoRA does not support `{flag}`: {reason}. Leave it out, or use LoraConfig."
            for flag, reason in _EXCLUDED.items()
            if getattr(self, flag, None)
        ]
        if wrong:
            prefix = "" if wrong[0].startswith("SpecLoRA") else "SpecLoRA: "
            raise ValueError(prefix + " ".join(wrong))

    @classmethod
    def from_probe(
        cls,
        report: MaskProbeReport,
        *,
        budget: float | None = None,
        params: int | None = None,
        k: int = 200,
        **settings: Any,
    ) -> SpecLoRAConfig:
        """A config with ks under a budget, for the modules that `lorakit.fisher.probe` measured with method="speclora".

        The budget of the masks is their own: Σ k. It is spent along the upper concave envelope of each module's S(k);
        see `lorakit.allocation.allocate_masks`. A module's k is one of the ladder that was measured.

        Args:
            report: what the probe returned. `mode` is the one that it measured.
            budget: a fraction in (0, 1] of the uniform `k`'s Σ k, clipped as SpecLoRA clips it; 1 by default.
            params: the budget as a number of parameters, Σ k.
            k: the uniform k that `budget` refers to, and the `k` of the config.
            settings: other fields of the config, such as `r` and `task_type`.

        Raises: AllocationError (a ValueError) if the budget does not cover the smallest ks, or no masks were measured;
        ValueError for an invalid budget or k.
        """
        from lorakit.allocation.probed import masks_from_probe

        ks = masks_from_probe(report, budget=budget, params=params, k=k).ks
        pattern = compact_pattern(ks, {name for name, value in ks.items() if value == k})
        fixed: dict[str, Any] = {"k": k, "k_pattern": pattern, "mode": report.mode}
        taken = sorted(set(fixed) & set(settings))
        if taken:
            raise ValueError(f"SpecLoRA: `from_probe` sets {taken} itself; leave them out.")
        return cls(**({"target_modules": list(report.target_modules)} | settings | fixed))


class SpecLoRAModel(ResolvingLoraModel):
    """PEFT's LoRA model, with a mask in every adapted layer."""

    tuner_name = "SpecLoRA"
    completes_configs = False  # PEFT fills default target modules in itself, in the config that was passed

    def resolve(self, config: Any, model: nn.Module, state_dict: dict[str, Tensor] | None) -> None:
        if config.peft_type != PeftType.SPECLORA:
            return
        self._prepare_adapter_config(config, self.get_model_config(model))
        modules = {} if config.target_modules is None else targeted_modules(self, config, model, state_dict)
        _check_targets(modules, config)
        names = [*modules, *targeted_parameters(config, model)]
        warn_unmatched("SpecLoRA", "k_pattern", config.k_pattern, names)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if self.combination is not None:
            self.peft_config[adapter_name].k_pattern = {
                "^" + re.escape(name): mask.k
                for name, layer in model.named_modules()
                if isinstance(layer, SpecLoRALayer) and ".base_layer." not in name
                for other, mask in layer.lora_spec.items()
                if other in self.combination.adapters
            }
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def complete(self, model: nn.Module, adapter_name: str) -> None:
        compute_blocks(model, adapter_name)

    def _create_and_replace(
        self,
        lora_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        # If a parameter wrapper already has this adapter, it wraps another parameter: PEFT wraps it once more.
        wrapped_again = isinstance(target, ParamWrapper) and adapter_name in target.lora_A
        extended = isinstance(target, LoraLayer) and not wrapped_again
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        if lora_config.peft_type != PeftType.SPECLORA:
            return
        if target_name in (getattr(lora_config, "target_modules_to_tie", None) or []):
            raise UnsupportedModelError(
                f"SpecLoRA does not support ensure_weight_tying=True for adapted embeddings: the mask on "
                f"{current_key!r} cannot be tied to the embedding's. Leave one of the two out of `target_modules`, or "
                f"use LoraConfig."
            )
        layer: Any = target if extended else getattr(parent, target_name)
        cls = masked_class(type(layer))
        if cls is None:
            raise UnsupportedModelError(_unsupported(current_key, layer))
        layer.__class__ = cls
        layer.add_mask(adapter_name, lookup(lora_config.k_pattern, current_key, lora_config.k), lora_config.mode)

    def _check_add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> tuple[str, int, Any]:
        """PEFT's check, and that the masks can be combined.

        Raises: NotImplementedError if the masks differ in k or mode, because no single mask is their combination.
        """
        masks = [[layer.lora_spec[name] for name in adapters if name in layer.lora_spec] for layer in self._layers()]
        if any(len({mask.k for mask in of_one}) > 1 for of_one in masks) or len({m.mode for o in masks for m in o}) > 1:
            raise NotImplementedError(
                "SpecLoRA does not support add_weighted_adapter for adapters that differ in k or mode. Export each as "
                "a plain LoRA with lorakit.export.to_lora and combine those."
            )
        return super()._check_add_weighted_adapter(adapters, *args, **kwargs)

    def _svd_generalized_task_arithmetic_weighted_adapter(
        self,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        with target.mask_off() if isinstance(target, SpecLoRALayer) else nullcontext():
            return super()._svd_generalized_task_arithmetic_weighted_adapter(
                combination_type, adapters, weights, new_rank, target, *args, **kwargs
            )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's method. Raises: AdapterFileError for a checkpoint of another mode, which PEFT would leave out."""
        for key in state_dict:
            before, found, _ = key.rpartition(".lora_spec.")
            if found and is_of_other_mode(key, before + found, config.mode):
                raise AdapterFileError(wrong_mode(key, config.mode))
        remapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        return remapped

    def combine_more(
        self, adapters: list[str], weights: list[float], adapter_name: str, kind: str, **settings: Any
    ) -> None:
        """Combine the masks' d − 1: a weighted sum for "linear", "cat" and "svd", PEFT's rules for other types."""
        density, election = settings.get("density"), settings.get("majority_sign_method", "total")
        for layer in self._layers():
            if adapter_name in layer.lora_spec:
                _combine_masks(layer, adapters, weights, adapter_name, kind, density, election)

    def _layers(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, SpecLoRALayer)]

    def subtract_mutated_init(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            "SpecLoRA does not support `path_initial_model_for_weight_conversion`: d rescales the base weight that the "
            "initialization changed, and no adapter of the original weight can express that. Save without it: loading "
            "the adapter changes the base weight in the same way again."
        )


@torch.no_grad()
def _combine_masks(
    layer: Any,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
    majority_sign_method: Any,
) -> None:
    """Set an adapter's d − 1 to the combination of the others'."""
    present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if name in layer.lora_spec]
    target = layer.lora_spec[adapter_name].weight
    deltas = [layer.lora_spec[name].weight.to(target) * layer.mask_factor(name) for name, _ in present]
    shares = torch.tensor([weight for _, weight in present], dtype=target.dtype, device=target.device)
    kind = combination_type.removesuffix("_svd")
    if kind in ("linear", "cat", "svd"):
        combined = merge_utils.task_arithmetic(deltas, shares)
    elif kind in ("ties", "dare_ties"):
        combined = getattr(merge_utils, kind)(deltas, shares, density, majority_sign_method)
    else:
        combined = getattr(merge_utils, kind)(deltas, shares, density)
    target.copy_(combined)


def _check_targets(modules: dict[str, nn.Module], config: SpecLoRAConfig) -> None:
    """Refuse modules that cannot be adapted, and warn once if `k` is clipped. Changes nothing."""
    clipped = []
    for name, module in modules.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if getattr(base, "groups", 1) != 1:
            raise UnsupportedModelError(
                f"SpecLoRA does not support grouped convolutions such as {name!r} (groups={base.groups}), because "
                f"their weight is not one matrix. Leave them out of `target_modules`, or use LoraConfig."
            )
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(
                f"SpecLoRA does not support adding an adapter to {name!r} while {module.merged_adapters} are merged "
                f"into its weight. Call unmerge_adapter() first."
            )
        k = lookup(config.k_pattern, name, config.k)
        side = _smaller_side(base)
        if side is not None and k > side:
            clipped.append(f"{name} ({k} to {side})")
    if clipped:
        warnings.warn(
            f"SpecLoRA: `k` is clipped to the smaller side of the weight in {len(clipped)} of {len(modules)} modules, "
            f"first in {clipped[0]}.",
            stacklevel=2,
        )


def _smaller_side(module: nn.Module) -> int | None:
    """The smaller of a module's numbers of inputs and outputs; None if PEFT does not know them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            d_in, d_out = _private.in_and_out_features(module)
        except (AttributeError, ValueError):
            return None
    return None if d_in is None or d_out is None else min(d_in, d_out)


def _unsupported(name: str, module: nn.Module) -> str:
    return (
        f"SpecLoRA does not support {type(module).__name__} layers such as {name!r}. Leave them out of "
        f"`target_modules`, or use LoraConfig."
    )


def __getattr__(name: str) -> Any:
    """The classes over PEFT's quantized layers, so that pickles load before such a class has been made."""
    cls = quantized_class(name)
    if cls is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return cls


register_tuner(
    "speclora",
    SpecLoRAConfig,
    SpecLoRAModel,
    # PEFT's hotswap sets a layer's scaling but not its alpha, and the mask is scaled by both.
    hotswap_keys=[
        "r",
        "lora_alpha",
        "use_rslora",
        "lora_dropout",
        "rank_pattern",
        "alpha_pattern",
        "k",
        "k_pattern",
        "mode",
    ],
)
