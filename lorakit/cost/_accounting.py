"""What an adapter costs to train: parameters, bytes and FLOPs, counted without allocating the model.

Everything runs on torch's meta device, which has shapes and dtypes but no storage. PEFT adapts the model, and torch
runs forward and backward, so the only formulas are those of `OPTIMIZERS`.
Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: r (d_in + d_out) parameters against
d_in d_out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from lorakit._checks import check_integer
from lorakit.adapters.tuner_layers import AdaptedLayer, adapted_layers, trained_in_full
from lorakit.cost._meta import Counted, attached, count_step, meta_inputs, meta_twin
from lorakit.cost._optimizers import OPTIMIZERS
from lorakit.cost._report import AccountedModule, Accounting, Flops, Memory
from lorakit.naming.roles import layer_of, role_of

_FP32 = 4  # bytes
_MASTER = {
    False: "no fp32 copies of half-precision weights, in full fine-tuning neither",
    True: "an fp32 copy of every trained half-precision weight, with optimizer states in fp32",
}


def accounting(
    model: Any,
    config: PeftConfig,
    *,
    batch_size: int = 1,
    sequence_length: int = 1024,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
    fp32_master: bool = False,
) -> Accounting:
    """Count what training an adapter costs, without allocating or changing the model.

    Args:
        model: a transformers config; the path of a model's directory or config.json; or a model without adapters, on
            the meta device or a real one.
        config: a PEFT config, by which PEFT adapts a twin of the model on the meta device.
        batch_size, sequence_length: of the token ids that the twin is run on.
        inputs: the keyword arguments of a model that takes other inputs: tensors whose shapes and dtypes count. With
            labels among them the loss is counted too. `batch_size` and `sequence_length` are then not used.
        dtype: of the base model. By default that of the model or of its config, or bfloat16 if the config names none.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes), "sgd" or "sgd_momentum".
        fp32_master: count an fp32 copy of every trained half-precision weight, and its optimizer states in fp32, as
            mixed-precision training keeps them.

    A model that takes token ids is run on them in train mode, with labels if it is a language model or a token or
    sequence classifier. Attention by torch's scaled_dot_product_attention without a mask counts as its flash kernel.
    Other implementations count as they are written.

    Raises: UnsupportedModelError (a ValueError) for a quantized model, a model with adapters, a model that PEFT cannot
    adapt on the meta device, a path without a model's config, and a config that does not name its model's class;
    ValueError for an unknown optimizer or sizes below 1; TypeError for a wrong type of model, config or dtype. PEFT's
    error for target modules that it does not find is passed on.

    Example:
        >>> import torch
        >>> from lorakit import cost
        >>> from peft import LoraConfig
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4, bias=False))
        >>> found = cost.accounting(model, LoraConfig(r=2, target_modules=["0"]), inputs={"input": torch.ones(3, 6)})
        >>> found.trainable_params, found.base_flops.forward, found.adapter_flops
        (20, 144, 120)
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}.")
    check_integer("batch_size", batch_size)
    check_integer("sequence_length", sequence_length)
    if not isinstance(config, PeftConfig):
        raise TypeError(f"`config` must be a PEFT config; got {type(config).__name__}.")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch dtype, such as torch.bfloat16; got {dtype!r}.")
    twin = meta_twin(model, dtype)
    batch, not_run = meta_inputs(twin, inputs, batch_size, sequence_length)
    base = list(twin.parameters())
    own = {id(tensor) for tensor in (*base, *twin.buffers())}
    for parameter in base:
        parameter.requires_grad_(True)
    full = count_step(twin, batch) if batch is not None else None
    adapted = attached(twin, config)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    added = [tensor for tensor in (*adapted.parameters(), *adapted.buffers()) if id(tensor) not in own]
    lora = count_step(adapted, batch) if batch is not None else None
    states, description = OPTIMIZERS[optimizer]
    return Accounting(
        model=type(twin).__name__,
        peft_type=getattr(config.peft_type, "value", str(config.peft_type)),
        batch_size=batch_size if inputs is None else next(iter(inputs.values())).shape[0],
        sequence_length=sequence_length if inputs is None and batch is not None else None,
        optimizer=optimizer,
        base_params=sum(parameter.numel() for parameter in base),
        adapter_params=sum(parameter.numel() for parameter in adapted.parameters() if id(parameter) not in own),
        trainable_params=sum(parameter.numel() for parameter in trainable),
        modules=_modules(adapted, lora, _units(batch)),
        memory=_memory(base, added, trainable, states, lora, fp32_master),
        memory_full=_memory(base, [], base, states, full, fp32_master),
        base_flops=Flops(full.forward, full.step) if isinstance(full, Counted) else None,
        flops=Flops(lora.forward, lora.step) if isinstance(lora, Counted) else None,
        not_run=next((found for found in (full, lora) if isinstance(found, str)), not_run),
        assumptions=(
            f"weights of the base model in {_dtypes(base)}, of the adapter in {_dtypes(added)}; gradients in the dtype "
            f"of their parameters; {_MASTER[fp32_master]}",
            f"optimizer states ({optimizer}): {description}",
            "activations: everything that autograd saves between forward and backward, each storage once, without "
            "autocast and gradient checkpointing; temporary memory and the allocator's overhead are not counted",
            "FLOPs by torch's FlopCounterMode: matrix products, convolutions and attention, 2 for a multiply-add, "
            "causal attention as if it were full; those of the optimizer are not counted",
        ),
    )


def _memory(
    weights: Sequence[nn.Parameter],
    new: Sequence[Tensor],
    trained: Sequence[nn.Parameter],
    states: Callable[[int, int], int],
    run: Counted | str | None,
    fp32_master: bool,
) -> Memory:
    half = [parameter for parameter in trained if fp32_master and parameter.element_size() < _FP32]
    widest = _FP32 if fp32_master else 1
    return Memory(
        weights=_bytes(weights),
        adapter=_bytes(new),
        gradients=_bytes(trained),
        optimizer=sum(states(parameter.numel(), max(widest, parameter.element_size())) for parameter in trained),
        activations=run.saved_bytes if isinstance(run, Counted) else None,
        master=sum(_FP32 * parameter.numel() for parameter in half),
    )


def _modules(adapted: PeftModel, run: Counted | str | None, units: int | None) -> tuple[AccountedModule, ...]:
    (adapter_name,) = adapted.peft_config
    rows = [_row(one, adapter_name, run, units) for one in adapted_layers(adapted)]
    counted: set[nn.Parameter] = set()  # tied modules share theirs
    for name, module in trained_in_full(adapted):
        new = {parameter for parameter in module.parameters() if parameter.requires_grad} - counted
        counted |= new
        params = sum(parameter.numel() for parameter in new)
        rows.append(AccountedModule(name, role_of(name), layer_of(name), True, None, None, None, params, None))
    return tuple(rows)


def _row(one: AdaptedLayer, adapter_name: str, run: Counted | str | None, units: int | None) -> AccountedModule:
    layer: Any = one.layers[0]
    flops = None
    if isinstance(run, Counted) and units is not None:
        parts: Sequence[Any] = one.layers
        flops = sum(run.of(part) - run.of(getattr(part, "base_layer", None)) for part in parts)
    return AccountedModule(
        module_name=one.name,
        role=one.role,
        layer=one.layer,
        in_full=False,
        d_out=getattr(layer, "out_features", None),
        d_in=getattr(layer, "in_features", None),
        rank=getattr(layer, "r", {}).get(adapter_name),
        params=sum(parameter.numel() for parameter in one.parameters(adapter_name)),
        multiply_adds=None if flops is None or units is None else flops / 2 / units,
    )


def _units(batch: Mapping[str, Any] | None) -> int | None:
    """The number of tokens, or of examples if there are no tokens."""
    if not batch:
        return None
    ids = batch.get("input_ids")
    return int(next(iter(batch.values())).shape[0] if ids is None else ids.numel())


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dtypes(tensors: Sequence[Tensor]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "none"
