"""What the functions of `lorakit.lens` accept as adapters, and findings that several of them share."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from torch import nn

from lorakit._checks import preview
from lorakit.adapters import Adapter, open_adapter
from lorakit.errors import Finding

Source = str | os.PathLike[str] | nn.Module | Adapter


def open_all(adapters: Source | Sequence[Source]) -> list[Adapter]:
    """Open one or several adapters.

    Raises: ValueError for an empty list; TypeError for anything that is not an adapter.
    """
    if isinstance(adapters, str | os.PathLike | nn.Module | Adapter):
        adapters = [adapters]
    if not isinstance(adapters, Iterable):
        raise TypeError(
            f"`adapters` must be an adapter or several: paths, PeftModels or open adapters; got "
            f"{type(adapters).__name__}."
        )
    views = [open_adapter(adapter) for adapter in adapters]
    if not views:
        raise ValueError("`adapters` must have at least one adapter; got none.")
    return views


def about_bases(views: Sequence[Adapter]) -> Iterator[Finding]:
    """A warning if the adapters were made for different base models."""
    bases = sorted({view.settings.base_model for view in views if view.settings.base_model is not None})
    if len(bases) > 1:
        message = f"The adapters were made for different base models, so do not compare them: {preview(bases)}"
        yield Finding("warning", "different_base", None, message)


def about_low_rank_part(view: Adapter) -> Iterator[Finding]:
    """Information if modules have a DoRA magnitude or a SpecLoRA mask, which B A does not include."""
    partial = sum(module.magnitude is not None or module.mask is not None for module in view.modules)
    if partial:
        message = f"In {partial} modules only the low-rank part is measured; the whole update needs the base weight."
        yield Finding("info", "low_rank_part_only", None, message)


def matrices_of(view: Adapter) -> Adapter:
    """The adapter without stacks of experts, for measures of single matrices; information names what is left out."""
    left_out = [module.name for module in view.modules if module.experts is not None]
    if not left_out:
        return view
    message = f"{len(left_out)} stacks of experts are not measured here: {preview(left_out)}"
    finding = Finding("info", "experts_left_out", None, message)
    modules = tuple(module for module in view.modules if module.experts is None)
    return replace(view, modules=modules, findings=(*view.findings, finding))


def of_adapter(view: Adapter, findings: Iterable[Finding]) -> list[Finding]:
    """Findings whose messages begin with the adapter's path."""
    return [replace(finding, message=f"{view.path}: {finding.message}") for finding in findings]
