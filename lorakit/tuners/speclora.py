"""SpecLoRA: LoRA plus a learnable rescaling of the top-left k × k block of the frozen weight.

W' = Γ ⊙ W + scaling · B A, where Γ is all ones but for that block, every column of which is the learnable d ∈ R^k.
The mask is never formed: with P = W[:k, :k] and d stored as d − 1,

    y = W x + scaling · B (A x) + pad((d − 1) ⊙ (P x[:k])),

which costs k² multiply-adds a token and k parameters a module.

Reference: Si et al., "Weight Spectra Induced Efficient Model Adaptation", 2025, section 4 (Eq. 4–8, Table 4).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from accelerate.utils import align_module_device
from peft import LoraConfig
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import transpose
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from lorakit._registration import register_tuner
from lorakit.errors import UnsupportedModelError
from lorakit.tuners.base import ResolvingLoraModel
from lorakit.tuners.patterns import lookup, targeted_modules, warn_of_unmatched

Mode = Literal["hadamard", "hadamard_bottom", "svd", "svd_bottom"]
MODES: tuple[Mode, ...] = get_args(Mode)

# What LoraConfig can switch on beside LoRA proper, and changes the update or the base weight in a way that the mask's
# definition leaves open.
_EXCLUDED_FLAGS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
    "megatron_config",
)
_EXCLUDED_INITS = ("pissa", "olora", "corda", "loftq", "mica", "lora_ga")

# Elements of the weights that one batched SVD takes at a time.
_SVD_CHUNK = 1 << 26


@dataclass
class SpecLoRAConfig(LoraConfig):
    """LoRA with a learnable rescaling d of k rows of each targeted weight.

    All that `peft.LoraConfig` takes is taken here, and means the same. What is new:

    Args:
        k: the size of the rescaled block; in modules with a smaller side it is clipped to that side, with one warning.
            The paper uses 200 for language and 32 for vision models.
        k_pattern: a k for the modules whose names match, by the same rules as `rank_pattern`.
        mode: ``hadamard`` (Eq. 7–8) rescales the top-left block of the weight; ``svd`` (Eq. 4–6) the first k rows of
            its rank-k part; ``svd_bottom`` the first k rows of the part of its k smallest singular values and
            ``hadamard_bottom`` the bottom-right block: two readings of the control in Table 4. The svd modes compute
            one full SVD a module when the adapter is made or loaded; if the k-th and next singular values are equal,
            what they rescale is not unique.

    Raises: ValueError for bad values, and for options of LoRA that the method does not define.
    """

    k: int = field(default=200, metadata={"help": "Size of the rescaled block of the frozen weight."})
    k_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module names (or regular expressions) with a k of their own."}
    )
    mode: Mode = field(default="hadamard", metadata={"help": f"What is rescaled: one of {', '.join(MODES)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.SPECLORA
        self.k_pattern = dict(self.k_pattern or {})
        wrong = [
            f"`{name}` must be a positive integer; got {value!r}."
            for name, value in [("k", self.k), *((f"k_pattern[{key!r}]", k) for key, k in self.k_pattern.items())]
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]
        if self.mode not in MODES:
            wrong.append(f"`mode` must be one of {', '.join(MODES)}; got {self.mode!r}.")
        wrong += [
            f"SpecLoRA does not support `{flag}`; leave it out, or use LoraConfig."
            for flag in _EXCLUDED_FLAGS
            if getattr(self, flag, None)
        ]
        if isinstance(self.init_lora_weights, str) and self.init_lora_weights.lower().startswith(_EXCLUDED_INITS):
            wrong.append(
                f"SpecLoRA does not support init_lora_weights={self.init_lora_weights!r}, which changes the weight "
                f"that d rescales; use True, False, 'gaussian', 'orthogonal' or 'eva'."
            )
        if wrong:
            prefix = "" if wrong[0].startswith("SpecLoRA") else "SpecLoRA: "
            raise ValueError(prefix + " ".join(wrong))


class SpectralMask(nn.Module):
    """The learnable part of one module's mask.

    `weight` (k,) is d − 1, so that zero means no change: weight decay pulls towards the identity, and half precision
    keeps its resolution there. `block` is the frozen P that d rescales, k × k or (svd modes) k × d_in, where it is not
    read off the base weight; it is never saved.
    """

    block: Tensor | None

    def __init__(self, k: int, mode: Mode) -> None:
        super().__init__()
        self.mode = mode
        self.weight = nn.Parameter(torch.zeros(k))
        self.register_buffer("block", None, persistent=False)

    def forward(self, projected: Tensor, factor: float) -> Tensor:
        """(d − 1) ⊙ `projected`, times `factor`; a call, so that accelerate's hooks bring an offloaded d in."""
        return projected * (self.weight if factor == 1.0 else self.weight * factor)

    @property
    def k(self) -> int:
        return self.weight.shape[0]

    @property
    def reads_base_weight(self) -> bool:
        return self.mode.startswith("hadamard")

    def region(self, d_out: int, d_in: int) -> tuple[int, int, int]:
        """First row, first column and number of columns of what d rescales."""
        if self.mode == "hadamard":
            return 0, 0, self.k
        if self.mode == "hadamard_bottom":
            return d_out - self.k, d_in - self.k, self.k
        return 0, 0, d_in

    def extra_repr(self) -> str:
        return f"k={self.k}, mode={self.mode}"


class SpecLoRALayer:
    """What SpecLoRA adds to a LoRA layer of PEFT's.

    Not derived from LoraLayer: a layer that PEFT has made becomes a SpecLoRA layer by a change of its class, which
    Python allows only where the memory layouts agree.
    """

    lora_spec: nn.ModuleDict

    def add_mask(self: Any, adapter_name: str, k: int, mode: Mode) -> None:
        """Give an adapter that the layer already has a mask, with d = 1."""
        if "lora_spec" not in self._modules:
            self.lora_spec = nn.ModuleDict()
            self.adapter_layer_names = (*self.adapter_layer_names, "lora_spec")
        self.lora_spec[adapter_name] = SpectralMask(k, mode)
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def base_weight(self: Any) -> Tensor:
        """The frozen weight as d_out × d_in: a view."""
        return transpose(self.get_base_layer().weight, self.fan_in_fan_out)

    def block_of(self: Any, adapter_name: str) -> Tensor:
        """The P that the adapter's d rescales; where it is part of the base weight, a view of that."""
        mask = self.lora_spec[adapter_name]
        if mask.block is not None:
            return mask.block
        weight = self.base_weight()
        if weight.is_meta:  # offloaded: bring it in once and keep what is needed
            with align_module_device(self.get_base_layer()):
                weight = self.base_weight()
                if not weight.is_meta:
                    mask.block = _block(weight, mask).detach().clone()
                    return mask.block
        if not mask.reads_base_weight:
            mask.block = _block(weight, mask)
            return mask.block
        return _block(weight, mask)

    def mask_factor(self: Any, adapter_name: str) -> float:
        """What `set_scale` and the like have made of the adapter's scaling: the mask follows it."""
        rank = self.r[adapter_name]
        initial = self.lora_alpha[adapter_name] / (math.sqrt(rank) if self.use_rslora[adapter_name] else rank)
        return 1.0 if initial == 0 else self.scaling[adapter_name] / initial

    def mask_rows(self: Any, adapter_name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of the mask's update, (d − 1)[:, None] ⊙ P, scaled as the adapter is."""
        mask = self.lora_spec[adapter_name]
        block = self.block_of(adapter_name).detach()
        dtype = dtype or torch.promote_types(block.dtype, mask.weight.dtype)
        with align_module_device(mask):
            d_minus_1 = mask.weight.to(dtype)
        return (d_minus_1 * self.mask_factor(adapter_name))[:, None] * block.to(dtype)

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        delta = super().get_delta_weight(adapter)  # type: ignore[misc]
        if adapter in self.lora_spec:
            mask = self.lora_spec[adapter]
            oriented = transpose(delta, self.fan_in_fan_out)
            row, column, width = mask.region(*oriented.shape)
            target = oriented[row : row + mask.k, column : column + width]
            target += self.mask_rows(adapter).to(delta.dtype)
        return delta

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not self.merged:
            self._keep_blocks()
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)  # type: ignore[misc]
        finally:
            self._release_blocks()

    def unmerge(self: Any) -> None:
        try:
            super().unmerge()  # type: ignore[misc]
        finally:
            self._release_blocks()

    def _keep_blocks(self: Any) -> None:
        # Merging changes the weight that Γ multiplies, so the blocks are kept from before the first merge.
        for name, mask in self.lora_spec.items():
            if mask.reads_base_weight:
                mask.block = self.block_of(name).detach().clone()

    def _release_blocks(self: Any) -> None:
        if not self.merged:
            for mask in self.lora_spec.values():
                if mask.reads_base_weight:
                    mask.block = None

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        adapter_names = kwargs.get("adapter_names")
        result: Tensor = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if self.disable_adapters or self.merged:
            return result
        if adapter_names is not None:
            for name in set(adapter_names) & self.lora_spec.keys():
                rows = [i for i, other in enumerate(adapter_names) if other == name]
                result[rows] = self._add_mask_term(name, x[rows], result[rows])
            return result
        for name in self.active_adapters:
            if name in self.lora_spec:
                result = self._add_mask_term(name, x, result)
        return result

    def _add_mask_term(self: Any, adapter_name: str, x: Tensor, result: Tensor) -> Tensor:
        mask = self.lora_spec[adapter_name]
        block = self.block_of(adapter_name)
        row, column, width = mask.region(result.shape[-1], x.shape[-1])
        projected = F.linear(x.narrow(-1, column, width).to(block.dtype), block)
        result.narrow(-1, row, mask.k).add_(mask(projected, self.mask_factor(adapter_name)))
        return result


class SpecLoRALinear(SpecLoRALayer, LoraLinear):
    """SpecLoRA on `nn.Linear` and on transformers' `Conv1D`."""


class SpecLoRAModel(ResolvingLoraModel):
    """PEFT's LoRA model, whose layers get a mask each."""

    def resolve(self, config: Any, model: nn.Module) -> None:
        if config.peft_type == PeftType.SPECLORA:
            self._prepare_adapter_config(config, self.get_model_config(model))
            _check_targets(targeted_modules(self, config, model), config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
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
        super()._create_and_replace(
            lora_config, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        if lora_config.peft_type != PeftType.SPECLORA:
            return
        layer = getattr(parent, target_name)
        if type(layer) is LoraLinear:
            layer.__class__ = SpecLoRALinear
        if not isinstance(layer, SpecLoRALayer):
            raise UnsupportedModelError(_unsupported(current_key, layer))
        k = min(lookup(lora_config.k_pattern, current_key, lora_config.k), *layer.base_weight().shape)
        layer.add_mask(adapter_name, k, lora_config.mode)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused: PEFT combines the low-rank factors alone, and would silently drop the masks."""
        raise NotImplementedError(
            "SpecLoRA does not support add_weighted_adapter yet. Export each adapter as a plain LoRA with "
            "lorakit.export.to_lora and combine those."
        )


def compute_blocks(model: nn.Module, adapter_name: str) -> None:
    """Compute what the svd modes rescale, for all modules of an adapter: one full SVD each, batched by shape."""
    waiting: dict[Any, list[tuple[Any, SpectralMask]]] = {}
    layers: list[Any] = list(model.modules())
    for layer in layers:
        if isinstance(layer, SpecLoRALayer) and adapter_name in layer.lora_spec:
            mask: Any = layer.lora_spec[adapter_name]
            weight = layer.base_weight()
            if mask.reads_base_weight or mask.block is not None or weight.is_meta:
                continue
            key = (weight.shape, weight.dtype, weight.device, mask.k, mask.mode)
            waiting.setdefault(key, []).append((layer, mask))
    if not waiting:
        return
    total = sum(map(len, waiting.values()))
    with tqdm(total=total, desc="SpecLoRA: SVD of the base weights", delay=1.0, unit="module") as progress:
        for (shape, *_), group in waiting.items():
            step = max(1, _SVD_CHUNK // math.prod(shape))
            for start in range(0, len(group), step):
                chunk = group[start : start + step]
                blocks = _svd_blocks(torch.stack([layer.base_weight().detach() for layer, _ in chunk]), chunk[0][1])
                for (_, mask), block in zip(chunk, blocks, strict=True):
                    mask.block = block.clone()
                progress.update(len(chunk))


@torch.no_grad()
def _svd_blocks(weights: Tensor, mask: SpectralMask) -> Tensor:
    """U_{1:k, K} Σ_K V_Kᵀ for K the k largest (svd) or smallest (svd_bottom) singular values: (n, k, d_in)."""
    dtype = torch.promote_types(weights.dtype, torch.float32)
    U, S, Vh = torch.linalg.svd(weights.to(dtype), full_matrices=False)
    chosen = slice(0, mask.k) if mask.mode == "svd" else slice(S.shape[-1] - mask.k, None)
    block: Tensor = (U[..., : mask.k, chosen] * S[..., None, chosen]) @ Vh[..., chosen, :]
    return block.to(weights.dtype)


def _block(weight: Tensor, mask: SpectralMask) -> Tensor:
    if not mask.reads_base_weight:
        return _svd_blocks(weight.detach()[None], mask)[0]
    row, column, width = mask.region(*weight.shape)
    return weight[row : row + mask.k, column : column + width]


def _check_targets(modules: dict[str, nn.Module], config: SpecLoRAConfig) -> None:
    """Refuse what cannot be adapted before anything is changed; say once what is clipped or matches nothing."""
    clipped = []
    for name, module in modules.items():
        base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = getattr(base, "weight", None)
        if not isinstance(base, nn.Linear | Conv1D) or type(weight) is not nn.Parameter:
            raise UnsupportedModelError(_unsupported(name, base))
        if not weight.is_floating_point():
            raise UnsupportedModelError(_unsupported(name, base))
        if isinstance(module, LoraLayer) and module.merged:
            raise ValueError(
                f"SpecLoRA cannot add an adapter to {name!r} while {module.merged_adapters} are merged into its "
                f"weight; call unmerge_adapter() first."
            )
        k = lookup(config.k_pattern, name, config.k)
        if k > min(weight.shape):
            clipped.append(f"{name} ({k} to {min(weight.shape)})")
    if clipped:
        warnings.warn(
            f"SpecLoRA: `k` is clipped to the smaller side of the weight in {len(clipped)} of {len(modules)} modules, "
            f"the first of them {clipped[0]}.",
            stacklevel=2,
        )
    warn_of_unmatched("SpecLoRA", "k_pattern", config.k_pattern, modules)


def _unsupported(name: str, module: nn.Module) -> str:
    return (
        f"SpecLoRA does not support {type(module).__name__} layers such as {name!r}: it adapts nn.Linear and Conv1D "
        f"with floating-point weights. Leave such modules out of `target_modules`, or use LoraConfig for this model."
    )


register_tuner(
    "speclora",
    SpecLoRAConfig,
    SpecLoRAModel,
    # PEFT's hotswap sets a layer's scaling but not its alpha, by which the mask would be scaled.
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
