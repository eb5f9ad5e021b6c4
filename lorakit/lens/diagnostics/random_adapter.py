"""Adapters with random factors, as a control for trained ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lorakit.adapters import Adapter, TensorInfo
from lorakit.adapters.adapter import row_slices


def random_adapter(view: Adapter, generator: torch.Generator) -> Adapter:
    """An adapter of the same shapes with independent standard normal entries in its factors, drawn when they are read.

    It has no other tensors, and its scaling is 1. The variance of the entries does not affect effective ranks.
    """
    modules = tuple(
        replace(
            module,
            A=replace(module.A, dtype=torch.float32),
            B=replace(module.B, dtype=torch.float32),
            scaling=1.0,
            bias=None,
            magnitude=None,
            mask=None,
            E=None,
        )
        for module in view.modules
    )
    tensors = {info.key: info for module in modules for info in (module.A, module.B)}
    return replace(view, modules=modules, extras=(), findings=(), source=_Drawn(tensors, generator))


@dataclass(frozen=True, eq=False)
class _Drawn:
    tensors: Mapping[str, TensorInfo]
    generator: torch.Generator

    def infos(self) -> Mapping[str, TensorInfo]:
        return self.tensors

    @contextlib.contextmanager
    def reader(self) -> Iterator[Callable[[str], Tensor]]:
        yield self._draw

    def rows(self, key: str, step: int) -> Iterator[Tensor]:
        yield from row_slices(self._draw(key), step)

    def _draw(self, key: str) -> Tensor:
        return torch.randn(self.tensors[key].shape, generator=self.generator, device=self.generator.device)
