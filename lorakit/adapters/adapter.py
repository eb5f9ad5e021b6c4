"""The view of an adapter, on disk or in a model: its modules with their factors, and the tensors beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorakit.adapters.config import AdapterSettings
from lorakit.adapters.experts import unstacked
from lorakit.adapters.keys import module_path
from lorakit.errors import AdapterFileError, Finding
from lorakit.naming.roles import Role
from lorakit.spectral import LowRank

Kind = Literal["linear", "embedding", "conv", "experts"]
ExtraKind = Literal["modules_to_save", "bias", "embedding", "trainable_tokens", "orphan"]
Read = Callable[[str], Tensor]

_BATCH = 1 << 16  # entries of stacked factors; on a CPU, stacking more costs more than it gains


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read. `key` is its name in the adapter; `dtype` is None for one that torch lacks."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """What an adapter's tensors are read from."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by key, without reading them."""

    def reader(self) -> AbstractContextManager[Read]:
        """A function that reads a tensor by its key. Tensors stay valid after the block; do not write to them.

        Raises: AdapterFileError.
        """

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        """A tensor in slices of at most `step` rows."""


def row_slices(value: Tensor, step: int) -> Iterator[Tensor]:
    """A tensor in slices of at most `step` rows; a scalar as it is."""
    if value.ndim == 0:
        yield value
        return
    for start in range(0, len(value), step):
        yield value[start : start + step]


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """The update ΔW = scaling · B A of one module, with factors B (d_out, rank) and A (rank, d_in) that can be read.

    For an embedding, d_in is the number of tokens. For a convolution, d_in is the number of input channels times the
    size of the kernel, as if the kernel of the base weight were flattened. For experts stacked in one parameter, there
    is one update of shape (d_out, d_in) for each of the `experts`, and all have one rank and scaling.
    DoRA's `magnitude` and SpecLoRA's `mask` (k,), which holds d − 1, are not part of this update.
    """

    name: str  # in the base model
    kind: Kind
    scaling: float
    role: Role | None
    layer: int | None
    A: TensorInfo
    B: TensorInfo
    bias: TensorInfo | None = None  # of `lora_bias`
    magnitude: TensorInfo | None = None
    mask: TensorInfo | None = None
    E: TensorInfo | None = None  # AdaLoRA's singular values, (rank, 1); `read` multiplies A by them
    fan_in_fan_out: bool = False
    experts: int | None = None  # stacked in one parameter
    whole_of: AdapterModule | None = None  # the module as it is stored, where A and B are its whole update

    @property
    def stored(self) -> AdapterModule:
        """The module as it is stored: itself, unless A and B are its whole update."""
        return self if self.whole_of is None else self.whole_of

    @property
    def path(self) -> str:
        """The name of PEFT's layer, under which the factors are saved; a parameter's is not its own name."""
        return module_path(self.stored.A.key)

    @property
    def rank(self) -> int:
        return self.A.shape[0] // (self.experts or 1)

    @property
    def d_in(self) -> int:
        return math.prod(self.A.shape[1:])

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    @property
    def groups(self) -> int:
        """The groups of a convolution: B is stored with rank / groups columns."""
        return self.A.shape[0] // self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that both factors are read in: the wider of their own."""
        assert self.A.dtype is not None
        assert self.B.dtype is not None
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def group(self) -> str:
        """The role, or the last component of the name if there is none."""
        return self.role or self.name.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        """The number of parameters of A, B and E as they are stored."""
        if self.whole_of is not None:
            return self.whole_of.parameters
        return self.A.numel + self.B.numel + (0 if self.E is None else self.E.numel)

    @property
    def entries(self) -> int:
        """The number of entries of B and A as they are read."""
        return (self.experts or 1) * self.rank * (self.d_out + self.d_in)

    @property
    def extras(self) -> tuple[TensorInfo, ...]:
        """The module's tensors that are not part of the low-rank update."""
        if self.whole_of is not None:
            return self.whole_of.extras
        return tuple(info for info in (self.bias, self.magnitude, self.mask) if info is not None)

    def read(self, read: Read) -> tuple[Tensor, Tensor]:
        """B (d_out, rank) and A (rank, d_in) in one dtype, from an open reader; of experts (experts, …) each."""
        A, B = read(self.A.key).to(self.dtype).flatten(1), read(self.B.key).to(self.dtype).flatten(1)
        if self.E is not None:
            A = A * read(self.E.key).to(self.dtype)
        if self.experts is not None:
            return unstacked(B, A, self.experts)
        if self.groups > 1:
            B = torch.block_diag(*B.chunk(self.groups))  # type: ignore[no-untyped-call]
        return B, A

    def update(self, read: Read) -> LowRank:
        """ΔW, from an open reader."""
        return LowRank(*self.read(read), self.scaling)

    def in_base_layout(self, update: Tensor) -> Tensor:
        """A dense update (d_out, d_in) in the shape of the base layer's weight."""
        if self.kind == "embedding" or self.fan_in_fan_out:
            return update.mT
        return update.reshape(self.d_out, *self.A.shape[1:])


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor of the adapter that belongs to no low-rank update, and what it is."""

    info: TensorInfo
    kind: ExtraKind


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter: its config, its modules sorted by name, and its other tensors.

    `findings` tell what is wrong with it. A module that lacks a factor, or whose shapes do not fit, is a finding and
    not in `modules`; call `check` before writing a new adapter from this one.

    Example:
        >>> from lorakit.adapters.config import AdapterSettings
        >>> from lorakit.adapters.parse import assemble
        >>> from lorakit.adapters.read import TensorDict
        >>> A, B = torch.ones(2, 3), torch.ones(4, 2)
        >>> tensors = {"layers.0.q_proj.lora_A.weight": A, "layers.0.q_proj.lora_B.weight": B}
        >>> config = AdapterSettings.from_config({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
        >>> adapter = assemble("example", config, TensorDict(tensors))
        >>> [(module.name, module.role, module.layer, module.rank) for module in adapter.modules]
        [('layers.0.q_proj', 'query', 0, 2)]
        >>> adapter.factors(adapter.modules[0]).dense().shape
        torch.Size([4, 3])
    """

    path: str
    settings: AdapterSettings
    modules: tuple[AdapterModule, ...]
    extras: tuple[ExtraTensor, ...]
    findings: tuple[Finding, ...]
    source: TensorSource

    def check(self) -> None:
        """Raise AdapterFileError if there are findings of severity error."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            more = f" ({len(errors) - 1} more errors.)" if len(errors) > 1 else ""
            raise AdapterFileError(f"{self.path}: {errors[0].message}{more}")

    def factors(self, module: AdapterModule) -> LowRank:
        """The update of one module of this adapter. Raises: AdapterFileError."""
        with self.source.reader() as read:
            return module.update(read)

    def tensor(self, info: TensorInfo) -> Tensor:
        """One tensor as it is stored. Raises: AdapterFileError."""
        with self.source.reader() as read:
            return read(info.key)

    def batches(
        self, modules: Iterable[AdapterModule] | None = None, *, numel: int = _BATCH
    ) -> Iterator[tuple[list[AdapterModule], LowRank]]:
        """The modules, or those given, in batches of one shape and dtype, with their stacked updates (n, …).

        A batch has at most `numel` entries, or one module. If you drop each batch before the next, memory holds little
        more than one. Raises: AdapterFileError.
        """
        groups: dict[tuple[object, ...], list[AdapterModule]] = {}
        for module in self.modules if modules is None else modules:
            shape = (module.d_out, module.rank, module.d_in, module.experts)
            groups.setdefault((*shape, module.dtype), []).append(module)
        with self.source.reader() as read:
            for group in groups.values():
                step = max(1, numel // group[0].entries)
                for batch in (group[start : start + step] for start in range(0, len(group), step)):
                    yield batch, _stacked(batch, read)


def _stacked(batch: list[AdapterModule], read: Read) -> LowRank:
    Bs, As = zip(*(module.read(read) for module in batch), strict=True)
    B, A = (torch.stack(Bs), torch.stack(As)) if len(batch) > 1 else (Bs[0][None], As[0][None])
    scaling = torch.tensor([module.scaling for module in batch], dtype=torch.float64, device=B.device)
    return LowRank(B, A, scaling.reshape(-1, *[1] * (B.ndim - 3)).expand(B.shape[:-2]))
