"""Writing an adapter as a plain LoRA that means the same ΔW to every program that reads it.

Programs disagree on the scaling where ranks differ (alpha over the config's r, over the tensor's own rank, or by PEFT's
patterns), so one rank and one alpha are written by default: shorter factors are padded with zeros.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.adapters.adapter import AdapterModule, Read
from lorakit.adapters.atomic import WEIGHTS_NAME, replaced_directory, write_config
from lorakit.adapters.companions import CERTIFICATE_NAME, Companions
from lorakit.adapters.edit_log import RECORD_NAME, write_edits
from lorakit.adapters.experts import stacked
from lorakit.adapters.keys import tensor_name
from lorakit.adapters.read import open_file_or_hub
from lorakit.adapters.stream import SafetensorsWriter
from lorakit.errors import AdapterFileError
from lorakit.naming.patterns import compact_pattern
from lorakit.spectral import LowRank


@dataclass(frozen=True, eq=False)
class StoredUpdate:
    """One module's update in the layout in which PEFT stores it, before padding, in any dtype.

    ΔW = `scaling` · B A. `A` is (rank, …) and `B` (d_out, rank / groups, …); `A_dtype` and `B_dtype` are what they are
    written in. A `lora_bias` is scaled as B A is. Of experts in one parameter, B is (experts, d_out, rank) and A
    (experts, rank, d_in); they are stacked when they are written.
    """

    name: str
    A: Tensor
    B: Tensor
    scaling: float
    A_dtype: torch.dtype
    B_dtype: torch.dtype
    A_key: str
    B_key: str
    groups: int = 1
    bias: Tensor | None = None
    experts: int | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0 if self.experts is None else 1]

    @property
    def parameters_of_a_rank(self) -> int:
        """Parameters of A and B for each unit of rank."""
        return (self.A.numel() + self.B.numel()) // self.rank


@dataclass(frozen=True, eq=False)
class PlainLora:
    """A LoRA ready to be written: its tensors by key, and what its config says of ranks and scaling.

    `tensors` are on the device "meta", where the updates that it was planned with are: `written` gives those to write.
    """

    tensors: dict[str, Tensor]
    factor_keys: frozenset[str]
    r: int
    lora_alpha: float
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    scaling: float
    ranks: Mapping[str, int]  # as written, by module

    def written(self, update: StoredUpdate) -> dict[str, Tensor]:
        """A module's tensors, by key, as they are written: rescaled, padded, and in their dtypes."""
        return _tensors(update, self.scaling, self.ranks[update.name])

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of a LoraConfig that belong to these tensors."""
        return {
            "peft_type": "LORA",
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
            "use_rslora": False,
            "init_lora_weights": True,
            "inference_mode": True,
        }


def stored_update(module: AdapterModule, update: LowRank, *, bias: Tensor | None = None) -> StoredUpdate:
    """`update` in the layout and the dtypes of a module that PEFT saved."""
    embedding = module.kind == "embedding"
    A_dtype, B_dtype = module.stored.A.dtype, module.stored.B.dtype
    assert A_dtype is not None
    assert B_dtype is not None
    return StoredUpdate(
        name=module.name,
        A=update.A.reshape(*update.A.shape[:-1], *module.A.shape[1:]),
        B=update.B.reshape(*update.B.shape, *[1] * (len(module.B.shape) - 2)),
        scaling=float(update.scaling),
        A_dtype=A_dtype,
        B_dtype=B_dtype,
        A_key=tensor_name(module.path, "A", embedding),
        B_key=tensor_name(module.path, "B", embedding),
        bias=bias,
        experts=module.experts,
    )


def planned_update(module: AdapterModule, rank: int, scaling: float, *, bias: Tensor | None = None) -> StoredUpdate:
    """`stored_update` of an update of that rank that is not computed yet: its factors are on the device "meta"."""
    stack = () if module.experts is None else (module.experts,)
    B = torch.empty(*stack, module.d_out, rank, device="meta")
    A = torch.empty(*stack, rank, module.d_in, device="meta")
    return stored_update(module, LowRank(B, A, scaling), bias=bias)


def plain_lora(
    updates: Sequence[StoredUpdate],
    *,
    pad: bool = True,
    fitting_rank: Callable[[int], int] = lambda rank: rank,
    integer_alpha: bool = False,
    computed: Callable[[], Iterable[StoredUpdate]] | None = None,
) -> PlainLora:
    """One scaling for all updates and, with `pad`, one rank, filled up with zeros; the updates are unchanged.

    Factors that have that scaling already keep their entries bit for bit; of the others B is rescaled. The scaling is
    the most frequent one, unless `lora_alpha` would be fractional: where nothing is stored in half precision, or with
    `integer_alpha`, it is then folded into B, and `lora_alpha` = r.

    Args:
        pad: False keeps each module's own rank, and says so in `rank_pattern` and `alpha_pattern`.
        fitting_rank: gives the rank to pad to, at least the largest one.
        computed: gives the updates with their entries, where those of `updates` are on the device "meta". It is called
            only where the choice of the scaling depends on them, and memory holds one at a time.
    """
    groups = math.lcm(*(update.groups for update in updates))
    r = max(update.rank for update in updates)
    if pad:
        r = fitting_rank(r)
        while r % groups or fitting_rank(r) != r:
            r += 1
    ranks = {update.name: r if pad else update.rank for update in updates}
    scaling = _written_scaling(updates, r, integer_alpha, computed or (lambda: updates))
    alphas = {name: integral(scaling * rank) for name, rank in ranks.items()}
    largest = {name for name, rank in ranks.items() if rank == r}
    tensors: dict[str, Tensor] = {}
    for update in updates:
        tensors |= _tensors(update, scaling, ranks[update.name])
    return PlainLora(
        tensors=tensors,
        factor_keys=frozenset(key for update in updates for key in (update.A_key, update.B_key)),
        r=r,
        lora_alpha=integral(scaling * r),
        rank_pattern=compact_pattern(ranks, largest),
        alpha_pattern=compact_pattern(alphas, largest),
        scaling=scaling,
        ranks=ranks,
    )


def _written_scaling(
    updates: Sequence[StoredUpdate], r: int, integer_alpha: bool, computed: Callable[[], Iterable[StoredUpdate]]
) -> float:
    scalings = [update.scaling for update in updates if update.scaling != 0]
    if not scalings:
        return 1.0  # an alpha of 0 means "none given" to some readers; B is 0 instead
    common = Counter(scalings).most_common(1)[0][0]  # of several the first
    if isinstance(integral(common * r), int):
        return common
    wide = all(update.B_dtype.itemsize >= 4 for update in updates)
    return 1.0 if integer_alpha or (wide and all(map(_folds, computed()))) else common


def _folds(update: StoredUpdate) -> bool:
    """Whether scaling · B keeps its precision in the dtype that it is written in."""
    size = float(update.B.abs().max()) * abs(update.scaling) if update.B.numel() else 0.0
    limits = torch.finfo(update.B_dtype)
    return size == 0 or limits.tiny / limits.eps <= size <= limits.max


def integral(value: float) -> float:
    """`value` as an integer where it is one up to rounding; never 0 for another number."""
    nearest = round(value)
    return nearest if abs(value - nearest) <= 1e-12 * abs(value) else value


def _tensors(update: StoredUpdate, scaling: float, rank: int) -> dict[str, Tensor]:
    """The module's tensors at `scaling`, padded to `rank`, in the dtypes that they are written in."""
    A, B, bias = update.A, update.B, update.bias
    ratio = update.scaling / scaling
    if ratio != 1:
        B = B.double() * ratio
        bias = None if bias is None else (bias.double() * ratio).to(bias.dtype)
    A, B = A.to(update.A_dtype), B.to(update.B_dtype)
    missing = (rank - update.rank) // update.groups
    if update.experts is not None:
        B, A = stacked(F.pad(B, (0, missing)), F.pad(A, (0, 0, 0, missing)))
    elif missing:
        rows = A.reshape(update.groups, -1, *A.shape[1:])
        A = torch.cat([rows, rows.new_zeros(update.groups, missing, *A.shape[1:])], dim=1).flatten(0, 1)
        B = torch.cat([B, B.new_zeros(B.shape[0], missing, *B.shape[2:])], dim=1)
    tensors = {update.A_key: A, update.B_key: B}
    return tensors if bias is None else {**tensors, tensor_name(update.name, "bias"): bias}


@dataclass(frozen=True, eq=False)
class Piece:
    """Tensors to write, by key; of a module also its name and the update that they are meant to be."""

    tensors: Mapping[str, Tensor]
    module_name: str | None = None
    intended: LowRank | None = None


def write_lora(
    out: str | os.PathLike[str],
    layout: Mapping[str, Tensor],
    config: Mapping[str, Any],
    pieces: Generator[Piece],
    *,
    companions: Companions,
    change: Callable[[], str],
    verify: bool = False,
    edits: list[dict[str, Any]] | None = None,
) -> dict[str, float]:
    """Write an adapter, whole or not at all; with `verify` only if every module is read back as it was meant.

    Memory holds one piece at a time, as far as `pieces` lets go of them.

    Args:
        layout: all tensors by key, of which shapes and dtypes are used.
        pieces: the same tensors with their entries, in any order.
        change: gives the line that the model card gets, after the last piece.
        edits: the record of surgery, which replaces an older one.
    Returns: the relative errors ‖written − intended‖_F / ‖intended‖_F by module; none without `verify`.
    Raises: OSError; AdapterFileError where what was written is not what was meant, such as for a dtype too narrow.
    """
    errors: dict[str, float] = {}
    with replaced_directory(out, remove=[RECORD_NAME, CERTIFICATE_NAME]) as directory, torch.no_grad():
        write_config(directory, config)
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(SafetensorsWriter(directory / WEIGHTS_NAME, layout))
            verified = stack.enter_context(_verification(directory)) if verify else None
            for piece in stack.enter_context(contextlib.closing(pieces)):
                for key, tensor in piece.tensors.items():
                    writer.write(key, tensor)
                if verified is not None and piece.module_name is not None and piece.intended is not None:
                    errors[piece.module_name] = verified.error(piece.module_name, piece.intended)
        if verified is not None and errors.keys() != verified.modules.keys():
            other = sorted(errors.keys() ^ verified.modules.keys())[0]
            raise AdapterFileError(f"What was written has other modules: {other!r}.")
        companions.write(directory, config, change())
        write_edits(directory, edits or [])
    return errors


@dataclass(frozen=True, eq=False)
class _Verification:
    """The modules of a file that is being written, and a reader of what is there already."""

    modules: Mapping[str, AdapterModule]
    read: Read

    def error(self, name: str, intended: LowRank) -> float:
        """The relative error of a module that was written. Raises: AdapterFileError where it is not what was meant."""
        if name not in self.modules:
            raise AdapterFileError(f"What was written has other modules: {name!r}.")
        module = self.modules[name]
        exact = intended.to(dtype=torch.float64, device="cpu")
        B, A = (factor.double() for factor in module.read(self.read))
        error, norm = _difference(B, A, module.scaling, exact), _norm(exact)
        # Rounding moves each factor by eps/2 of its norm.
        factors = (torch.linalg.matrix_norm(exact.B) * torch.linalg.matrix_norm(exact.A)).norm()
        allowed = 2 * torch.finfo(_narrower(module)).eps * abs(float(exact.scaling)) * float(factors)
        if not error <= allowed + 1e-12 * norm:
            raise AdapterFileError(
                f"{name}: the update would be written as {_narrower(module)} with an error of {error:.2g}, at a "
                f"norm of {norm:.2g}. Nothing was written."
            )
        return error / norm if norm > 0 else 0.0


@contextlib.contextmanager
def _verification(directory: Path) -> Iterator[_Verification]:
    """Open an adapter of which the config and the weights' header are written."""
    written = open_file_or_hub(directory)
    written.check()
    with written.source.reader() as read:
        yield _Verification({module.name: module for module in written.modules}, read)


def _difference(B: Tensor, A: Tensor, scaling: float, exact: LowRank) -> float:
    """‖scaling · B A − exact‖_F, as (B − B₀) A + B₀ (A − A₀): without the cancellation of the two updates."""
    own, rank = float(exact.scaling), exact.rank
    padded = not bool(B[..., rank:].any()) and not bool(A[..., rank:, :].any())
    B, A = (B[..., :rank], A[..., :rank, :]) if padded else (B, A)
    if B.shape != exact.B.shape or A.shape != exact.A.shape or own == 0:
        return _norm(LowRank(B, A, scaling) - exact)
    moved = torch.cat([B * (scaling / own) - exact.B, exact.B], dim=-1)
    return _norm(LowRank(moved, torch.cat([A, A - exact.A], dim=-2), own))


def _norm(update: LowRank) -> float:
    return float(update.inner(update).clamp(min=0).sum().sqrt())  # over experts, where there are any


def _narrower(module: AdapterModule) -> torch.dtype:
    assert module.A.dtype is not None
    assert module.B.dtype is not None
    return max(module.A.dtype, module.B.dtype, key=lambda dtype: torch.finfo(dtype).eps)
