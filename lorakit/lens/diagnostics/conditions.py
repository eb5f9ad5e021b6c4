"""Capacity utilization before training, of random factors, and after training.

Reference: LoRA-Lens, section 2.1 and Figure 1.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from lorakit._checks import check_integer
from lorakit._report import ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.lens._sources import Source, about_bases, about_low_rank_part, matrices_of, of_adapter, open_all
from lorakit.lens.diagnostics.conditions_report import (
    CONDITIONS,
    AdapterConditions,
    ConditionedGroup,
    ConditionedModule,
    ConditionsReport,
)
from lorakit.lens.diagnostics.random_adapter import random_adapter
from lorakit.lens.static.spectra import AuditedModule, measure

# PEFT's initializations for which ΔW depends neither on the base weight, nor on data, nor on gradients.
DATA_FREE = ("gaussian", "orthogonal", "eva")
_CANCELLED = 1e-5  # relative to ‖B‖ ‖A‖: an orthogonal start is 0 up to the rounding of its float32 factors


def conditions(adapters: Source | Sequence[Source], *, seed: int = 0, draws: int = 4) -> ConditionsReport:
    """Capacity utilization CU = r̂ / r of trained adapters, compared with before training and with random factors.

    "init" is ΔW as PEFT initializes it: PEFT's own layers are made once under the adapter's `init_lora_weights`. It is
    0 for PEFT's default, B = 0, and None for initializations that need the base weight, data or gradients (PiSSA,
    OLoRA, …). "random" has independent normal entries in factors of the same shapes; their standard deviation, 1/√r in
    the paper, does not affect CU. "trained" is the adapter as it is, 0 if ΔW = 0. Modules that are not finite are left
    out of all conditions, with a finding. For DoRA and SPECLORA the low-rank part is measured.

    Args:
        adapters: directories, files, Hub ids, PeftModels or open adapters. For several adapters in one model:
            ``[lorakit.adapters.open_adapter(model, adapter_name=name) for name in names]``.
        seed: of the random draws, the same for each adapter. torch's own generators are not used.
        draws: the number of random adapters.
    Raises: AdapterFileError, UnsupportedModelError for an adapter that cannot be read; ValueError for no adapters, or
        `draws` below 1.

    Example:
        >>> import torch
        >>> from lorakit import lens
        >>> from peft import LoraConfig, get_peft_model
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64))
        >>> report = lens.conditions(get_peft_model(model, LoraConfig(r=2, target_modules=["0"])))
        >>> total = report.adapters[0].total
        >>> total.init, total.random > 0.9, total.trained  # B = 0 before training
        (0.0, True, 0.0)
    """
    check_integer("draws", draws)
    views = [matrices_of(view) for view in open_all(adapters)]
    findings = list(about_bases(views))
    found = []
    steps = len(views) * (2 + draws)
    with tqdm(total=steps, desc="conditions", delay=1.0, unit="pass", leave=False, disable=None) as progress:
        for view in views:
            own = list(view.findings)
            found.append(_conditions(view, seed, draws, own, progress.update))
            findings += of_adapter(view, [*own, *about_low_rank_part(view)])
    return ConditionsReport(seed, draws, tuple(found), ordered(findings))


def _conditions(
    view: Adapter, seed: int, draws: int, findings: list[Finding], advance: Callable[[], object]
) -> AdapterConditions:
    measured = measure(view, {}, findings, description="trained")
    rows = [row for row in measured if row.capacity_utilization is not None]
    advance()
    init, reason = _initial(view, seed)
    advance()
    if reason is not None:
        findings.append(Finding("info", "no_init", None, f"The init condition is missing: {reason}."))
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = []
    for _ in range(draws):
        drawn.append(_utilization(measure(random_adapter(view, generator), {}, [], description="random")))
        advance()
    places = {module.name: module for module in view.modules}
    modules = tuple(
        ConditionedModule(
            module_name=row.module_name,
            role=row.role,
            layer=row.layer,
            rank=row.rank,
            low_rank_part_only=row.low_rank_part_only,
            init=init.get(row.module_name),
            random=statistics.fmean(values := [each[row.module_name] for each in drawn]),
            random_std=_std(values),
            trained=_unless_cancelled(view, places[row.module_name], row.capacity_utilization or 0.0),
        )
        for row in rows
    )
    groups, _ = grouped(modules)
    roles = {name: _group(name, group, drawn) for name, group in groups.items()}
    ranks = [module.rank for module in modules]
    return AdapterConditions(
        path=view.path,
        peft_type=view.settings.peft_type,
        ranks=(min(ranks), max(ranks)) if ranks else None,
        init_reason=reason,
        modules=modules,
        total=_group("all", modules, drawn) if modules else None,
        roles=tuple(roles.values()),
        qv_gap={condition: _gap(roles, condition) for condition in CONDITIONS},
    )


def _group(name: str, modules: Sequence[ConditionedModule], drawn: Sequence[Mapping[str, float]]) -> ConditionedGroup:
    means = [statistics.fmean(each[module.module_name] for module in modules) for each in drawn]
    return ConditionedGroup(
        name=name,
        modules=len(modules),
        init=mean(module.init for module in modules),
        random=statistics.fmean(means),
        random_std=_std(means),
        trained=statistics.fmean(module.trained for module in modules),
        trained_std=_std([module.trained for module in modules]),
    )


def _gap(roles: Mapping[str, ConditionedGroup], condition: str) -> float | None:
    query, value = (getattr(roles.get(role), condition, None) for role in ("query", "value"))
    return None if query is None or value is None else query - value


def _std(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _utilization(rows: Sequence[AuditedModule]) -> dict[str, float]:
    return {row.module_name: row.capacity_utilization for row in rows if row.capacity_utilization is not None}


def _initial(view: Adapter, seed: int) -> tuple[dict[str, float], str | None]:
    """Capacity utilization by module as PEFT initializes the adapter, or an empty dict and the reason."""
    init = view.settings.raw.get("init_lora_weights", True)
    if view.settings.r is None:
        return {}, "the adapter has no config, so its initialization is not known"
    if view.settings.peft_type == "ADALORA":
        return {}, "AdaLoRA's initialization, at other ranks, is not reproduced"
    if not isinstance(init, bool) and str(init).lower() not in DATA_FREE:
        return {}, f"init_lora_weights={init!r} needs the base weight, data or gradients"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        try:
            start = _initialized(view.modules, init)
        except ValueError as error:  # PEFT refuses this initialization for these modules
            return {}, f"init_lora_weights={init!r}: {error}"
    found = _utilization(measure(start, {}, [], description="init"))
    places = {str(i): module.name for i, module in enumerate(view.modules)}
    return {places[m.name]: _unless_cancelled(start, m, found[m.name]) for m in start.modules}, None


def _initialized(modules: Sequence[AdapterModule], init: bool | str) -> Adapter:
    """A fresh LoRA by PEFT on layers of the modules' shapes, named by their index."""
    from peft import LoraConfig, get_peft_model

    layers = nn.ModuleDict({str(i): _layer(module) for i, module in enumerate(modules)})
    r = statistics.mode(
        module.rank for module in modules
    )  # PEFT tries every key of a pattern for each module, so the pattern should be short
    others = {str(i): module.rank for i, module in enumerate(modules) if module.rank != r}
    config = LoraConfig(r=r, lora_alpha=r, rank_pattern=others, target_modules=r"\d+", init_lora_weights=init)
    return open_adapter(get_peft_model(layers, config))


def _layer(module: AdapterModule) -> Any:
    """A layer of the module's kind and shape; its weight takes no memory."""
    kernel = module.A.shape[2:]
    layer: Any
    if module.kind == "embedding":
        layer = nn.Embedding(module.d_in, module.d_out, device="meta")
    elif module.kind == "conv":
        conv: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(kernel)]
        layer = conv(module.A.shape[1], module.d_out, kernel, groups=module.groups, bias=False, device="meta")
    else:
        layer = nn.Linear(module.d_in, module.d_out, bias=False, device="meta")
    layer.weight = nn.Parameter(torch.zeros(()).expand(layer.weight.shape), requires_grad=False)
    return layer


def _unless_cancelled(start: Adapter, module: AdapterModule, utilization: float) -> float:
    if not utilization:
        return 0.0
    update = start.factors(module)
    size = math.prod(float(torch.linalg.matrix_norm(half)) for half in (update.B, update.A)) * abs(module.scaling)
    return 0.0 if float(update.frobenius_norm()) <= _CANCELLED * size else utilization
