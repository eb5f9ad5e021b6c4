"""Subspaces that are given for κ, in the place of those of ΔW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from lorakit._checks import preview
from lorakit._distributed.fsdp import unwrapped
from lorakit.adapters.keys import without_prefix

if TYPE_CHECKING:
    from lorakit.adapters.in_model import LiveModule

_SLACK = 1e-3  # of UᵀU against the identity: what rounding to bfloat16 leaves


class Subspaces(Protocol):
    """A pilot's report with subspaces: `GradientSubspaces` and `UpdateSpectra` of `lorakit.experiments.pilot`."""

    @property
    def bases(self) -> Mapping[str, tuple[Tensor, Tensor]]: ...
    @property
    def description(self) -> str: ...


Basis = Subspaces | Mapping[str, tuple[Tensor, Tensor]]


class FixedBasis:
    """U (d_out, q) and V (d_in, q) by module, with orthonormal columns.

    Raises: TypeError for anything but a report with `bases` or a mapping to pairs of tensors; ValueError, naming the
    modules, for matrices of different numbers of columns, and for columns that are not orthonormal within 1e-3.
    """

    def __init__(self, basis: Basis) -> None:
        bases = basis if isinstance(basis, Mapping) else getattr(basis, "bases", None)
        if not isinstance(bases, Mapping):
            raise TypeError(
                f"`basis` must be a report of lorakit.experiments.pilot.gradient_subspaces or update_spectra, or map "
                f"module names to pairs (U, V); got {type(basis).__name__}."
            )
        if not bases:
            raise ValueError("`basis` must have at least one module; got none.")
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}
        self._grams: dict[str, tuple[Tensor, Tensor]] = {}
        for name, pair in bases.items():
            U, V = _pair(name, pair)
            self.bases[without_prefix(name)] = U, V
            self._grams[without_prefix(name)] = _gram(name, "U", U), _gram(name, "V", V)
        self.description: str = getattr(basis, "description", None) or _described(self.bases)
        self._moved: dict[Any, Tensor] = {}

    def check(self, model: nn.Module, modules: Sequence[LiveModule]) -> None:
        """Raise ValueError, with names, unless the basis fits each linear one of `modules` and names no other model's.

        Modules of the model that have no adapter may have a basis, which is not used.
        """
        from lorakit.adapters.in_model import strip_wrappers

        linear = [module for module in modules if module.is_linear()]
        known = {without_prefix(strip_wrappers(name)) for name, _ in unwrapped(model).named_modules()}
        unknown = [name for name in self.bases if name not in known]
        if unknown:
            raise ValueError(
                f"`basis` must be of the model's own modules; it has none of the name {preview(unknown)}. The adapter "
                f"is on {preview([module.name for module in linear])}."
            )
        missing = [module.name for module in linear if module.name not in self.bases]
        if missing:
            raise ValueError(
                f"`basis` must have U and V for each linear module of the adapter; {len(missing)} of {len(linear)} are "
                f"missing: {preview(missing)}. Name them in the pilot's `modules`."
            )
        for module in linear:
            needed = int(cast(nn.Linear, module.up).out_features), int(cast(nn.Linear, module.down).in_features)
            found = tuple(len(part) for part in self.bases[module.name])
            if found != needed:
                raise ValueError(
                    f"`basis` of {module.name!r} must have U with {needed[0]} rows (d_out) and V with {needed[1]} "
                    f"(d_in); got {found[0]} and {found[1]}."
                )

    def left(self, name: str, like: Tensor) -> Tensor:
        """U (d_out, q) on the device and in the dtype of `like`."""
        return self._like(name, 0, like)

    def right(self, name: str, like: Tensor) -> Tensor:
        """V (d_in, q) on the device and in the dtype of `like`."""
        return self._like(name, 1, like)

    def grams(self, name: str) -> tuple[Tensor, Tensor]:
        """UᵀU and VᵀV (q, q), float64: the identity, but for rounding."""
        return self._grams[name]

    def _like(self, name: str, half: int, like: Tensor) -> Tensor:
        key = (name, half, like.device, like.dtype)
        if key not in self._moved:  # once for all steps: as much memory as an adapter of rank q
            self._moved[key] = self.bases[name][half].to(like.device, like.dtype)
        return self._moved[key]


def _pair(name: Any, pair: Any) -> tuple[Tensor, Tensor]:
    fits = isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(part, Tensor) for part in pair)
    if not (isinstance(name, str) and fits):
        raise TypeError(
            f"`basis` must map module names to pairs of tensors (U, V); got {type(pair).__name__} for {name!r}."
        )
    U, V = (part.detach() for part in pair)
    shaped = U.ndim == V.ndim == 2 and U.shape[1] == V.shape[1] > 0
    if not (shaped and U.is_floating_point() and V.is_floating_point()):
        raise ValueError(
            f"`basis` of {name!r} must be real matrices U (d_out, q) and V (d_in, q); got shapes {tuple(U.shape)} and "
            f"{tuple(V.shape)}, {U.dtype} and {V.dtype}."
        )
    return U, V


@torch.no_grad()
def _gram(name: str, half: str, matrix: Tensor) -> Tensor:
    gram = matrix.double().mT @ matrix.double()
    worst = float((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).abs().max())
    if not worst <= _SLACK:  # also for NaN
        raise ValueError(
            f"`basis` must have orthonormal columns: {half}ᵀ{half} of {name!r} is {worst:.2g} off the identity. "
            f"torch.linalg.qr({half}).Q has the same span."
        )
    return gram


def _described(bases: Mapping[str, tuple[Tensor, Tensor]]) -> str:
    ranks = sorted({U.shape[1] for U, _ in bases.values()})
    return f"given subspaces of dimension {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
