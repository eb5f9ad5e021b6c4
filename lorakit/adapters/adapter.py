"""One view over adapters, wherever they are: modules with their factors, and whatever tensors lie beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from lorakit.adapters.config import AdapterSettings
from lorakit.errors import AdapterFileError, Finding
from lorakit.naming.roles import Role
from lorakit.spectral import LowRank

Kind = Literal["linear", "embedding", "conv"]
ExtraKind = Literal["modules_to_save", "bias", "embedding", "trainable_tokens", "expert_parameters", "orphan"]
Read = Callable[[str], Tensor]

_BATCH = 1 << 16  # entries of stacked factors: past this, stacking costs a CPU more than it gains
_OPEN = 1 << 20  # entries read before what was read is let go


@dataclass(frozen=True)
class TensorInfo:
    """A tensor that has not been read: its key in the adapter's source, shape and dtype (None: one torch lacks)."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class TensorSource(Protocol):
    """Where an adapter's tensors are."""

    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors, by key, none of them read."""

    def reader(self) -> AbstractContextManager[Read]:
        """Reads tensors by key; what is read stays valid after the block, and is not to be written to.

        Close it soon: while it is open, what was read may stay in memory. Raises: AdapterFileError.
        """

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        """A tensor in slices of at most `step` of its rows."""


def row_slices(value: Tensor, step: int) -> Iterator[Tensor]:
    """A tensor in slices of at most `step` of its rows; one without rows as it is."""
    if value.ndim == 0:
        yield value
        return
    for start in range(0, len(value), step):
        yield value[start : start + step]


@dataclass(frozen=True, eq=False)
class AdapterModule:
    """One module's update ΔW = scaling · B A, whose factors can be read: B (d_out, rank), A (rank, d_in).

    Whatever the layout they are stored in: of an embedding, d_in is the number of ids; of a convolution, d_in is the
    input channels times the kernel's size, as in the base weight with its kernel flattened.
    DoRA's magnitude, and SpecLoRA's `mask` (k,), which is d − 1, are beside the update and not in it.
    """

    name: str  # in the base model
    kind: Kind
    scaling: float
    role: Role | None
    layer: int | None
    A: TensorInfo
    B: TensorInfo
    bias: TensorInfo | None = None  # of B, where the adapter was made with `lora_bias`
    magnitude: TensorInfo | None = None
    mask: TensorInfo | None = None
    E: TensorInfo | None = None  # AdaLoRA's singular values, (rank, 1); part of the A that is read
    fan_in_fan_out: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return math.prod(self.A.shape[1:])

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    @property
    def groups(self) -> int:
        """Of a convolution: B has rank / groups columns for each output channel."""
        return self.rank // self.B.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The wider of the two factors' dtypes: the one that they are read in."""
        assert self.A.dtype is not None
        assert self.B.dtype is not None
        return torch.promote_types(self.A.dtype, self.B.dtype)

    @property
    def group(self) -> str:
        """The role, or the last component of the name if there is none."""
        return self.role or self.name.rpartition(".")[2]

    @property
    def parameters(self) -> int:
        """Parameters of A and B as they are stored, and of E."""
        return self.A.numel + self.B.numel + (0 if self.E is None else self.E.numel)

    @property
    def entries(self) -> int:
        """Entries of B and A as they are read."""
        return self.rank * (self.d_out + self.d_in)

    @property
    def extras(self) -> tuple[TensorInfo, ...]:
        """The module's tensors beside its low-rank update."""
        return tuple(info for info in (self.bias, self.magnitude, self.mask) if info is not None)

    def read(self, read: Read) -> tuple[Tensor, Tensor]:
        """B (d_out, rank) and A (rank, d_in) in one dtype, from an open reader."""
        A, B = read(self.A.key).to(self.dtype).flatten(1), read(self.B.key).to(self.dtype).flatten(1)
        if self.E is not None:
            A = A * read(self.E.key).to(self.dtype)
        if self.groups > 1:
            B = torch.block_diag(*B.chunk(self.groups))  # type: ignore[no-untyped-call]
        return B, A

    def in_base_layout(self, update: Tensor) -> Tensor:
        """A dense (d_out, d_in) update in the layout of the base layer's weight."""
        if self.kind == "embedding" or self.fan_in_fan_out:
            return update.mT
        return update.reshape(self.d_out, *self.A.shape[1:])


@dataclass(frozen=True)
class ExtraTensor:
    """A tensor of the adapter that belongs to no low-rank update."""

    info: TensorInfo
    kind: ExtraKind


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter: its settings, its modules in the order of their names, the tensors beside them.

    `findings` say what of it could not be understood: modules with a half missing or with shapes that do not fit are
    there and not among `modules`. Whoever makes another adapter of this one calls `check` first.
    """

    path: str
    settings: AdapterSettings
    modules: tuple[AdapterModule, ...]
    extras: tuple[ExtraTensor, ...]
    findings: tuple[Finding, ...]
    source: TensorSource

    def check(self) -> None:
        """Raise AdapterFileError where `findings` has errors."""
        errors = [finding for finding in self.findings if finding.severity == "error"]
        if errors:
            more = f" ({len(errors) - 1} more errors.)" if len(errors) > 1 else ""
            raise AdapterFileError(f"{self.path}: {errors[0].message}{more}")

    def factors(self, module: AdapterModule) -> LowRank:
        """The update of one module of this adapter. Raises: AdapterFileError."""
        with self.source.reader() as read:
            return LowRank(*module.read(read), module.scaling)

    def tensor(self, info: TensorInfo) -> Tensor:
        """One tensor as it is stored. Raises: AdapterFileError."""
        with self.source.reader() as read:
            return read(info.key)

    def batches(
        self, modules: Iterable[AdapterModule] | None = None, *, numel: int = _BATCH
    ) -> Iterator[tuple[list[AdapterModule], LowRank]]:
        """Modules of one shape and dtype, stacked, with their updates; all modules unless some are given.

        A batch has at most `numel` entries, or one module. Not much more is in memory at a time, if the caller lets go
        of each batch. Raises: AdapterFileError.
        """
        groups: dict[tuple[object, ...], list[AdapterModule]] = {}
        for module in self.modules if modules is None else modules:
            groups.setdefault((module.d_out, module.rank, module.d_in, module.dtype), []).append(module)
        batches = []
        for group in groups.values():
            step = max(1, numel // group[0].entries)
            batches += [group[start : start + step] for start in range(0, len(group), step)]
        while batches:
            entries = 0
            with self.source.reader() as read:
                while batches and entries < _OPEN:
                    batch = batches.pop(0)
                    entries += len(batch) * batch[0].entries
                    yield batch, _stacked(batch, read)


def _stacked(batch: list[AdapterModule], read: Read) -> LowRank:
    Bs, As = zip(*(module.read(read) for module in batch), strict=True)
    B, A = (torch.stack(Bs), torch.stack(As)) if len(batch) > 1 else (Bs[0][None], As[0][None])
    return LowRank(B, A, torch.tensor([module.scaling for module in batch], dtype=torch.float64, device=B.device))
