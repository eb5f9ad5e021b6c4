"""What an adapter costs, counted on a model without memory: parameters, bytes and FLOPs of training.

Everything runs on torch's meta device, which has shapes and dtypes but no storage: the model that is counted is the one
PEFT makes, and its forward and backward are torch's own, so there are no formulas but those of `OPTIMIZERS`.
Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026: r (d_in + d_out) parameters against
d_in d_out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import extent
from lorakit.adapters.tuner_layers import AdaptedLayer, adapted_layers, trained_in_full
from lorakit.cost._meta import Counted, attached, count_step, meta_inputs, meta_twin
from lorakit.naming.roles import Role, group_of, layer_of, role_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK, _SMALLEST = 256, 4096  # of bitsandbytes' 8-bit states


def _adamw_8bit(n: int, itemsize: int) -> int:
    return 8 * n if n < _SMALLEST else 2 * (n + 4 * math.ceil(n / _BLOCK))


# Bytes of an optimizer's states for a tensor of n entries of some size, and what they are.
OPTIMIZERS: dict[str, tuple[Callable[[int, int], int], str]] = {
    "adamw": (
        lambda n, itemsize: 2 * n * itemsize + 4,
        "two moments an entry, as torch keeps them, in the dtype of the parameter, and a step a tensor",
    ),
    "adamw_8bit": (
        _adamw_8bit,
        f"two 8-bit moments an entry and fp32 scales for each {_BLOCK} of them; two fp32 moments in tensors of less "
        f"than {_SMALLEST} entries",
    ),
    "sgd": (lambda n, itemsize: 0, "none"),
    "sgd_momentum": (lambda n, itemsize: n * itemsize, "one momentum an entry, in the dtype of the parameter"),
}


@dataclass(frozen=True)
class AccountedModule:
    """One adapted module, or one trained in full beside them (`in_full`: modules_to_save, trainable tokens).

    `params` are what training it adds to the model; tied modules share theirs, which are counted in the first.
    `multiply_adds` is what a forward pass does more in it than without adapter, by torch's FlopCounterMode, a token (an
    example, for inputs without tokens); None where nothing was run.
    """

    module_name: str
    role: Role | None
    layer: int | None
    in_full: bool
    d_out: int | None
    d_in: int | None
    rank: int | None
    params: int
    multiply_adds: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes in training: the base model's parameters, what the adapter adds, gradients, optimizer states, and what
    autograd saves between forward and backward (None where nothing was run)."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int | None

    @property
    def total(self) -> int:
        """Their sum, of what is known; what else a step needs for a moment is not in it."""
        return self.weights + self.adapter + self.gradients + self.optimizer + (self.activations or 0)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one batch: a forward pass, and a forward and backward together."""

    forward: int
    step: int


@dataclass(frozen=True)
class Accounting:
    """The cost of training `model` with an adapter, and in full.

    `trainable_params` are those with the adapter, `ratio` what they are of `base_params`, which full fine-tuning
    trains. FLOPs are None where the model could not be run on the meta device, `not_run` says why. `assumptions` says
    what the numbers take for granted.
    """

    model: str
    peft_type: str
    batch_size: int
    sequence_length: int | None
    optimizer: str
    base_params: int
    adapter_params: int
    trainable_params: int
    modules: tuple[AccountedModule, ...]
    memory: Memory
    memory_full: Memory
    base_flops: Flops | None
    flops: Flops | None
    not_run: str | None
    assumptions: tuple[str, ...]

    @property
    def ratio(self) -> float:
        return self.trainable_params / self.base_params

    @property
    def adapter_flops(self) -> int | None:
        """What the adapter adds to a forward pass."""
        return None if self.flops is None or self.base_flops is None else self.flops.forward - self.base_flops.forward

    def explain(self) -> str:
        """Tables of what is adapted, of memory and of FLOPs, and the assumptions, as text."""
        rows: list[tuple[str, ...]] = [("modules", "number", "rank", "params", "multiply-adds")]
        for label, group in self._by_role().items():
            ranks = sorted({row.rank for row in group if row.rank is not None})
            span = extent((ranks[0], ranks[-1])) if ranks else "-"
            known = [row.multiply_adds for row in group if row.multiply_adds is not None]
            params = sum(row.params for row in group)
            rows.append((label, str(len(group)), span, f"{params:,}", f"{sum(known):,.0f}" if known else "-"))
        lines = _table(rows)
        lines.append(
            f"{self.peft_type} on {self.model}: {self.trainable_params:,} trainable of {self.base_params:,} parameters "
            f"in the base ({self.ratio:.4%})"
        )
        memory: list[tuple[str, ...]] = [("memory", "adapter", "full fine-tuning")]
        for name in ("weights", "adapter", "gradients", "optimizer", "activations", "total"):
            memory.append((name, *(_size(getattr(side, name)) for side in (self.memory, self.memory_full))))
        lines += ["", *_table(memory)]
        flops: list[tuple[str, ...]] = [("FLOPs", "adapter", "full fine-tuning")]
        for name in ("forward", "step"):
            sides = (self.flops, self.base_flops)
            flops.append((name, *("-" if side is None else f"{getattr(side, name):.4g}" for side in sides)))
        lines += ["", *_table(flops)]
        if self.not_run is not None:
            lines += ["", f"not run: {self.not_run}"]
        return "\n".join([*lines, "", *(f"* {line}" for line in self.assumptions)])

    def to_dict(self) -> dict[str, Any]:
        """All of it, and the sums, as plain data that JSON takes."""
        return asdict(self) | {
            "ratio": self.ratio,
            "adapter_flops": self.adapter_flops,
            "memory": asdict(self.memory) | {"total": self.memory.total},
            "memory_full": asdict(self.memory_full) | {"total": self.memory_full.total},
        }

    def plot(self) -> Figure:
        """Memory with the adapter and in full, and the adapter's parameters by role.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(10, 4)
        left, right = figure.subplots(1, 2, width_ratios=[3, 2])
        starts = [0.0, 0.0]
        for name in ("weights", "adapter", "gradients", "optimizer", "activations"):
            sizes = [(getattr(side, name) or 0) / 2**30 for side in (self.memory, self.memory_full)]
            left.barh(["adapter", "full"], sizes, left=starts, label=name)
            starts = [start + size for start, size in zip(starts, sizes, strict=True)]
        left.invert_yaxis()
        size = f"{self.batch_size}" + (f" × {self.sequence_length}" if self.sequence_length else "")
        left.set(xlabel="GiB", title=f"Memory of training, {self.optimizer}, batch of {size}")
        left.legend(fontsize=8)
        groups = {label: sum(row.params for row in group) for label, group in self._by_role().items()}
        right.barh([escape_mathtext(label) for label in groups], [params / 1e6 for params in groups.values()])
        right.invert_yaxis()
        right.set(xlabel="trainable parameters (millions)", title=f"{self.ratio:.3%} of the base model's")
        return figure

    def _by_role(self) -> dict[str, list[AccountedModule]]:
        groups: dict[str, list[AccountedModule]] = {}
        for row in self.modules:
            label = group_of(row.module_name)
            groups.setdefault(f"{label} (in full)" if row.in_full else label, []).append(row)
        return groups


def accounting(
    model: Any,
    config: PeftConfig,
    *,
    batch_size: int = 1,
    sequence_length: int = 1024,
    inputs: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    optimizer: str = "adamw",
) -> Accounting:
    """Count what training an adapter costs, without allocating or changing the model.

    Args:
        model: a transformers config; the path of a model's directory or config.json; or a model without adapters, on
            the meta device or a real one.
        config: a PEFT config; PEFT adapts a twin of the model on the meta device by it.
        batch_size, sequence_length: of the token ids that the twin is run on.
        inputs: for a model that takes other inputs: its keyword arguments, tensors of which shapes and dtypes count.
            With labels among them the loss is counted too. `batch_size` and `sequence_length` are then not used.
        dtype: the base model's; if not given that of the model or of its config, or bfloat16 where that says none.
        optimizer: "adamw", "adamw_8bit" (bitsandbytes'), "sgd" or "sgd_momentum".

    A model that takes token ids is run on them, with labels where it is a language model or a token or sequence
    classifier, in train mode. Attention by torch's scaled_dot_product_attention without a mask is counted as its flash
    kernel, that of other implementations as it is written.

    Raises: UnsupportedModelError (a ValueError) for a quantized model, one that has adapters, one that PEFT cannot
    adapt on the meta device, a path without a model's config and a config that does not say its model's class;
    ValueError for an unknown optimizer or sizes below 1; TypeError for what is no model, config or dtype. What PEFT
    raises for targets that it does not find passes through.
    """
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}; got {optimizer!r}.")
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a positive integer; got {value!r}.")
    if not isinstance(config, PeftConfig):
        raise TypeError(f"`config` must be a PEFT config; got {type(config).__name__}.")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch dtype, such as torch.bfloat16; got {dtype!r}.")
    state_bytes, states = OPTIMIZERS[optimizer]
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
    not_run = next((found for found in (full, lora) if isinstance(found, str)), not_run)
    (adapter_name,) = adapted.peft_config
    units = _units(batch)
    rows = [_row(one, adapter_name, lora, units) for one in adapted_layers(adapted)]
    counted: set[nn.Parameter] = set()  # tied modules share theirs
    for name, module in trained_in_full(adapted):
        new = {parameter for parameter in module.parameters() if parameter.requires_grad} - counted
        counted |= new
        params = sum(parameter.numel() for parameter in new)
        rows.append(AccountedModule(name, role_of(name), layer_of(name), True, None, None, None, params, None))

    def memory(weights: list[nn.Parameter], new: list[Tensor], trained: list[nn.Parameter], run: Any) -> Memory:
        return Memory(
            weights=_bytes(weights),
            adapter=_bytes(new),
            gradients=_bytes(trained),
            optimizer=sum(state_bytes(parameter.numel(), parameter.element_size()) for parameter in trained),
            activations=run.saved_bytes if isinstance(run, Counted) else None,
        )

    dtypes = {kind: _dtypes(tensors) for kind, tensors in (("base", base), ("adapter", added), ("trained", trainable))}
    return Accounting(
        model=type(twin).__name__,
        peft_type=getattr(config.peft_type, "value", str(config.peft_type)),
        batch_size=batch_size if inputs is None else next(iter(inputs.values())).shape[0],
        sequence_length=sequence_length if inputs is None and batch is not None else None,
        optimizer=optimizer,
        base_params=sum(parameter.numel() for parameter in base),
        adapter_params=sum(parameter.numel() for parameter in adapted.parameters() if id(parameter) not in own),
        trainable_params=sum(parameter.numel() for parameter in trainable),
        modules=tuple(rows),
        memory=memory(base, added, trainable, lora),
        memory_full=memory(base, [], base, full),
        base_flops=Flops(full.forward, full.step) if isinstance(full, Counted) else None,
        flops=Flops(lora.forward, lora.step) if isinstance(lora, Counted) else None,
        not_run=not_run,
        assumptions=(
            f"weights of the base model in {dtypes['base']}, of the adapter in {dtypes['adapter']}; gradients in the "
            f"dtype of what they are of; no fp32 copies of half-precision weights, in full fine-tuning neither",
            f"optimizer states ({optimizer}): {states}",
            "activations: all that autograd saves between forward and backward, each storage once, without autocast "
            "and gradient checkpointing; temporary memory and the allocator's overhead are not counted",
            "FLOPs by torch's FlopCounterMode: matrix products, convolutions and attention, 2 for a multiply-add, "
            "causal attention as if it were full; the optimizer's own are not counted",
        ),
    )


def _row(one: AdaptedLayer, adapter_name: str, run: Any, units: int | None) -> AccountedModule:
    layer: Any = one.layers[0]
    flops = None
    if isinstance(run, Counted) and units is not None:
        flops = sum(run.of(part) - run.of(getattr(part, "base_layer", None)) for part in one.layers)
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
    """How many tokens, or without them examples, there are."""
    if not batch:
        return None
    ids = batch.get("input_ids")
    return int(next(iter(batch.values())).shape[0] if ids is None else ids.numel())


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _dtypes(tensors: list[Any]) -> str:
    return " and ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})) or "none"


def _size(value: int | None) -> str:
    if value is None:
        return "-"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.2f} {name}"
    return f"{value} B"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
