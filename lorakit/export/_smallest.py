"""The smallest plain LoRA at which an adapter's tasks survive."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from peft import PeftModel

from lorakit.adapters import open_adapter
from lorakit.adapters.in_model import live_modules, resolve_adapter_name
from lorakit.compress.ladder import LADDER, Rung, SmallestReport, descend
from lorakit.errors import ExportError
from lorakit.evaluation.comparison import Comparison, Question
from lorakit.export._live import own_rank
from lorakit.export._masks import has_mask
from lorakit.export._report import ExportReport
from lorakit.serving._needs import Needs

Exportable: TypeAlias = PeftModel | str | os.PathLike[str]


def smallest_export(
    adapter: Exportable,
    out: str | os.PathLike[str],
    write: Callable[[Exportable, str, int], ExportReport],
    question: Question,
    *,
    base: Any,
    needs: Needs,
    adapter_name: str | None,
) -> SmallestReport:
    """`to_lora` with rank="smallest", its arguments checked; `write` exports to a directory at a rank."""
    in_memory = isinstance(adapter, PeftModel)
    if isinstance(adapter, PeftModel):
        name = resolve_adapter_name(adapter, adapter_name)
        if name not in adapter.active_adapters:
            raise ExportError(
                f"Adapter {name!r} must be the active one to be the reference; call set_adapter({name!r})."
            )
        source = f"{type(adapter.get_base_model()).__name__}, adapter {name!r}"
        base = adapter.get_base_model() if base is None else base
    else:
        source = os.fspath(adapter)
        if base is None:
            raise TypeError("`base` must be given for an adapter at rest with `rank='smallest'`; got None.")
    comparison = Comparison(base, question, reference=None if in_memory else adapter)
    with _exportable(comparison, adapter) as (exportable, largest):
        ladder = [rank for rank in LADDER if rank < largest and needs.takes(rank)]
        if not ladder:
            raise ExportError(f"{source} has rank {largest}, and no lower rank is served. Leave `rank` out.")

        def rung(directory: str, rank: int) -> Rung:
            report = write(exportable, directory, rank)
            return Rung(report, 1 - report.discarded_energy)

        return descend(adapter, out, ladder, rung, comparison, source)


@contextlib.contextmanager
def _exportable(comparison: Comparison, adapter: Exportable) -> Iterator[tuple[Exportable, int]]:
    """The adapter as `to_lora` takes it, and its rank with a mask: SPECLORA at rest is put into its base model."""
    if isinstance(adapter, PeftModel):
        yield adapter, _exact_rank(adapter)
        return
    view = open_adapter(adapter)
    if view.settings.peft_type != "SPECLORA":
        view.check()
        yield adapter, max((module.rank for module in view.modules), default=0)
        return
    with comparison.attached(adapter) as model:
        yield model, _exact_rank(model)


def _exact_rank(model: PeftModel) -> int:
    """The largest rank of the adapter's updates, masks included."""
    ranks = [0]
    for module in live_modules(model, resolve_adapter_name(model, None)):
        layer: Any = module.layer
        k = layer.lora_spec[module.adapter_name].k if has_mask(module) else 0
        sides = [] if module.layer.get_base_layer().weight.dim() != 2 else module.layer.get_base_layer().weight.shape
        ranks.append(min(own_rank(module) + k, *sides) if sides else own_rank(module) + k)
    return max(ranks)
