"""A twin of a model on the meta device, adapted by PEFT and run there: shapes and operations without memory."""

from __future__ import annotations

import copy
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from lorakit.cost._private import attention_of, flash_attention, grouped_matmul, set_attention, storage_of
from lorakit.errors import UnsupportedModelError

_META = torch.device("meta")
_PER_TOKEN = (
    "ForCausalLM",
    "LMHead",
    "ForMaskedLM",
    "ForConditionalGeneration",
    "ForTokenClassification",
    "ForPreTraining",
)


@dataclass(frozen=True, eq=False)
class Counted:
    """A forward and backward pass: their FLOPs, each module's forward FLOPs, and the bytes that autograd saved."""

    forward: int
    step: int
    saved_bytes: int
    by_name: dict[str, int]
    names: dict[nn.Module, str]

    def of(self, module: nn.Module | None) -> int:
        """The forward FLOPs of a module and its children; 0 if it was not called."""
        return 0 if module is None else self.by_name.get(self.names.get(module, ""), 0)


def meta_twin(model: Any, dtype: torch.dtype | None) -> nn.Module:
    """A model of the same shapes on the meta device, in train mode.

    Raises: UnsupportedModelError for quantized models and models with adapters; TypeError for other objects.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        try:
            model = AutoConfig.from_pretrained(path.parent if path.name == "config.json" else model)
        except (OSError, ValueError) as error:
            raise UnsupportedModelError(
                f"`model` {os.fspath(model)!r} has no config of a transformers model that can be read: {error}"
            ) from error
    if isinstance(model, PretrainedConfig):
        twin = _from_config(model)
        named = dtype or getattr(model, "dtype", None) or torch.bfloat16
        dtype = getattr(torch, named) if isinstance(named, str) else named
    elif isinstance(model, nn.Module):
        if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise UnsupportedModelError(
                "`model` must be a base model; this one has adapters already. Pass the base model, or its config."
            )
        if getattr(model, "is_quantized", False) or not all(p.is_floating_point() for p in model.parameters()):
            raise UnsupportedModelError(_QUANTIZED)
        twin = copy.deepcopy(model, _stand_ins(model))
    else:
        raise TypeError(f"`model` must be a transformers config, a path or a model; got {type(model).__name__}.")
    if dtype is not None:
        twin = twin.to(dtype)
    config: Any = getattr(twin, "config", None)
    if getattr(config, "use_cache", None) is False and not getattr(config, "is_encoder_decoder", False):
        config.use_cache = True  # without a cache transformers looks for packed sequences, by values
    return twin.train()


_QUANTIZED = (
    "`model` must not be quantized: packed weights cannot run on the meta device. Pass its config without "
    "`quantization_config`; the weights then count in `dtype`."
)


def _from_config(config: PretrainedConfig) -> nn.Module:
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModelError(_QUANTIZED)
    config = copy.deepcopy(config)
    if attention_of(config) not in (None, "eager", "sdpa"):
        set_attention(config, "sdpa")  # which saves and computes what the flash kernel does
    for name in config.architectures or ():
        if hasattr(transformers, name):
            with _META:
                made: nn.Module = getattr(transformers, name)(config)
                return made
    try:
        with _META:
            made = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UnsupportedModelError(
            f"The model class of a {type(config).__name__} is not known. Set its `architectures` to the class's name, "
            "or pass the model itself, made under `torch.device('meta')`."
        ) from error
    return made


def _stand_ins(model: nn.Module) -> dict[int, Any]:
    """The `memo` of a deep copy that replaces each tensor by an empty one on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device=_META), parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device=_META)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = torch.empty_like(value, device=_META)
    return memo


def attached(twin: nn.Module, config: PeftConfig) -> PeftModel:
    """The twin adapted by a copy of `config`."""
    try:
        with _META:
            return get_peft_model(twin, copy.deepcopy(config)).train()
    except (NotImplementedError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"PEFT cannot make this adapter on the meta device: {error}. If its initialization needs the weights, pass "
            f"the config with `init_lora_weights=True`; the counts are the same."
        ) from error


def meta_inputs(
    twin: nn.Module, inputs: Mapping[str, Tensor] | None, batch_size: int, sequence_length: int
) -> tuple[dict[str, Any] | None, str | None]:
    """The arguments to call the twin with; or None, and the reason."""
    if inputs is not None:
        if not (isinstance(inputs, Mapping) and inputs) or not all(
            isinstance(value, Tensor) and value.ndim for value in inputs.values()
        ):
            raise ValueError("`inputs` must map argument names to tensors with the batch as their first dimension.")
        return {name: torch.empty_like(value, device=_META) for name, value in inputs.items()}, None
    if getattr(twin, "main_input_name", None) != "input_ids":
        return None, f"{type(twin).__name__} does not take token ids; pass `inputs`."
    ids = torch.empty(batch_size, sequence_length, dtype=torch.long, device=_META)
    name = type(twin).__name__
    if name.endswith("ForSequenceClassification"):
        return {"input_ids": ids, "labels": torch.empty(batch_size, dtype=torch.long, device=_META)}, None
    return {"input_ids": ids, "labels": ids} if any(kind in name for kind in _PER_TOKEN) else {"input_ids": ids}, None


def count_step(model: nn.Module, inputs: Mapping[str, Any]) -> Counted | str:
    """Run a forward and a backward pass; a string if that fails on the meta device, with the reason."""
    names = {module: f"{type(model).__name__}.{name}" for name, module in model.named_modules() if name}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    try:
        with warnings.catch_warnings(), _META, torch.enable_grad(), _Flash():
            warnings.simplefilter("ignore")
            own = [*model.parameters(), *model.buffers()]
            # in a pass of its own, since the counter keeps tensors that autograd would not
            saved = saved_bytes(lambda: _result(model(**inputs)), own)
            with counter:
                output = _result(model(**inputs))
                forward = counter.get_total_flops()
                by_name = {name: sum(found.values()) for name, found in counter.get_flop_counts().items()}
                torch.autograd.backward(output, torch.empty_like(output))
    except Exception as error:  # from the model's own code, which may need values
        return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"
    finally:
        for parameter in model.parameters():
            parameter.grad = None
    return Counted(forward, counter.get_total_flops(), saved, by_name, names)


def saved_bytes(forward: Callable[[], Tensor], own: Iterable[Tensor]) -> int:
    """The bytes that autograd holds after a forward pass, each storage once, without those of `own`."""
    others = {storage_of(tensor) for tensor in own}
    graph: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def keep(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        graph.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda saved: saved.tensor):
        output = forward()
    kept = {storage_of(saved.tensor): saved.tensor.untyped_storage().nbytes() for saved in graph}
    del output
    return sum(size for storage, size in kept.items() if storage not in others)


def _grouped_mm(a: Sequence[int], b: Sequence[int], *_: Any, out_shape: Any = None, **__: Any) -> int:
    """FLOPs of the experts' products: each row of a 2-dimensional factor is multiplied by one group of the other."""
    if len(a) == 2:
        return 2 * a[0] * a[1] * b[-1]
    return 2 * a[1] * a[2] * b[1] if len(b) == 2 else 2 * a[0] * a[1] * a[2] * b[2]


# Operators for which torch has no formula.
_FORMULAS = {} if grouped_matmul() is None else {grouped_matmul(): _grouped_mm}


def _result(output: Any) -> Tensor:
    """The loss if there is one, otherwise the first output with a gradient."""
    if isinstance(output, Tensor):
        return output
    loss = output.get("loss") if isinstance(output, Mapping) else None
    values = list(output.values()) if isinstance(output, Mapping) else list(output)
    found = [value for value in (loss, *values) if isinstance(value, Tensor) and value.requires_grad]
    if not found:
        raise TypeError("the model's output has no tensor with a gradient")
    return found[0]


class _Saved:
    """A tensor that autograd holds. It is freed with the part of the graph that holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Flash(TorchFunctionMode):
    """Attention as an accelerator computes it: without a mask by the flash kernel, which saves no scores.

    Otherwise the meta device, and for some dtypes the CPU, would use the implementation by matrix products.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value, mask, dropout, causal = (*args, None, 0.0, False)[:6] if len(args) == 3 else (*args[:6],)
            mask, dropout = kwargs.get("attn_mask", mask), kwargs.get("dropout_p", dropout)
            if mask is None:
                causal = kwargs.get("is_causal", causal)
                scale = kwargs.get("scale")
                return flash_attention(query, key, value, dropout=dropout, causal=causal, scale=scale)
        return func(*args, **kwargs)
