"""Capacity utilization before training, at random, and after training.

Reference: LoRA-Lens, section 2.1 and Figure 1.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, ordered
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.errors import Finding
from lorakit.lens._rows import grouped, mean
from lorakit.lens._sources import Source, about_bases, about_low_rank_part, of_adapter, open_all
from lorakit.lens.diagnostics.random_adapter import random_adapter
from lorakit.lens.static.spectra import AuditedModule, measure
from lorakit.naming.roles import Role, group_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of PEFT's inits those that see neither the base weight, nor data, nor gradients in what they make of ΔW.
DATA_FREE = ("gaussian", "orthogonal", "eva")
_CANCELLED = 1e-5  # of ‖B‖ ‖A‖: an orthogonal start is 0 but for the rounding of its float32 factors
CONDITIONS = ("init", "random", "trained")


@dataclass(frozen=True)
class ConditionedModule:
    """One module's capacity utilization r̂ / r under the three conditions; times `rank` it is the effective rank.

    `init` is None where the init cannot be made without the base weight or data. `random` is the mean over draws, with
    its standard deviation over them (n − 1 below), None for a single draw.
    """

    module_name: str
    role: Role | None
    layer: int | None
    rank: int
    low_rank_part_only: bool
    init: float | None
    random: float
    random_std: float | None
    trained: float

    @property
    def group(self) -> str:
        return group_of(self.module_name)


@dataclass(frozen=True)
class ConditionedGroup:
    """Modules of one role, or all: means of their capacity utilization.

    `trained_std`: over modules (n − 1 below). `random_std`: of the group's mean over draws. None where there is one.
    """

    name: str
    modules: int
    init: float | None
    random: float
    random_std: float | None
    trained: float
    trained_std: float | None


@dataclass(frozen=True)
class AdapterConditions:
    """One adapter. `init_reason` says why there is no init condition, where there is none.

    `total` is None where no module is finite. `qv_gap`: the mean capacity utilization of the query projections less
    that of the value projections, by condition; None where one of them is missing.
    """

    path: str
    peft_type: str
    ranks: tuple[int, int] | None
    init_reason: str | None
    modules: tuple[ConditionedModule, ...]
    total: ConditionedGroup | None
    roles: tuple[ConditionedGroup, ...]
    qv_gap: dict[str, float | None]

    @property
    def mean_rank(self) -> float:
        return statistics.fmean(module.rank for module in self.modules)


@dataclass(frozen=True)
class ConditionsReport(Report):
    """What `lorakit.lens.conditions` found, one entry an adapter, in the order given."""

    seed: int
    draws: int
    adapters: tuple[AdapterConditions, ...]
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """`adapters`, `seed`, `draws` and `findings` as JSON has them: no NaN, no infinity."""
        return asdict(self)

    def plot(self, adapter: int | None = None) -> Figure:
        """LoRA-Lens's Figure 1. Left: CU under the conditions against rank, a point an adapter. Right: effective rank
        by layer and role of one adapter, trained against random (dashed).

        Args:
            adapter: the index in `adapters` of the one on the right; that of the middle rank unless given.
        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed;
            IndexError for an adapter that is not there.
        """
        shown = sorted((one for one in self.adapters if one.modules), key=lambda one: one.mean_rank)
        chosen = self.adapters[adapter] if adapter is not None else shown[len(shown) // 2] if shown else None
        figure = new_figure(11, 4.5)
        left, right = figure.subplots(1, 2)
        _draw_utilization(left, shown)
        if chosen is not None:
            _draw_layers(right, chosen)
        return figure


def _draw_utilization(axes: Any, adapters: Sequence[AdapterConditions]) -> None:
    for condition, colour in zip(CONDITIONS, ("C7", "C0", "C3"), strict=True):
        points = [
            (one.mean_rank, value, getattr(one.total, f"{condition}_std", None) or 0.0)
            for one in adapters
            if (value := getattr(one.total, condition)) is not None
        ]
        if points:
            x, y, spread = zip(*points, strict=True)
            axes.errorbar(x, y, yerr=spread, fmt="o-", ms=5, capsize=2, color=colour, label=condition)
    ranks = sorted({one.mean_rank for one in adapters})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    axes.set(xlabel="rank r", ylabel="capacity utilization r̂ / r", ylim=(-0.03, 1.08))
    axes.set_title("Mean over modules")
    if adapters:
        axes.legend(fontsize=8)


def _draw_layers(axes: Any, adapter: AdapterConditions) -> None:
    groups, _ = grouped(module for module in adapter.modules if module.layer is not None)
    for i, (name, modules) in enumerate(groups.items()):
        layers = sorted({module.layer for module in modules if module.layer is not None})
        at = [[module for module in modules if module.layer == layer] for layer in layers]
        trained = [mean(module.trained * module.rank for module in each) for each in at]
        random = [mean(module.random * module.rank for module in each) for each in at]
        axes.plot(layers, trained, "o-", ms=3, color=f"C{i}", label=escape_mathtext(name))
        axes.plot(layers, random, "--", lw=1, color=f"C{i}")
    axes.locator_params(axis="x", integer=True)
    low, high = adapter.ranks or (0, 0)
    title = f"r = {low}" if low == high else f"r from {low} to {high}"
    axes.set(xlabel="layer", ylabel="effective rank r̂", ylim=(0, (high or 1) * 1.05), title=f"By layer, {title}")
    if groups:
        axes.plot([], [], "--", lw=1, color="k", label="random")
        axes.legend(fontsize=8, ncols=2)


def conditions(adapters: Source | Sequence[Source], *, seed: int = 0, draws: int = 4) -> ConditionsReport:
    """Capacity utilization CU = r̂ / r of trained adapters beside what it was before training and is at random.

    "init": ΔW as PEFT initializes it, made anew with PEFT's own layers under the adapter's `init_lora_weights`, one
    draw; 0 for PEFT's default, B = 0. None for inits that need the base weight, data or gradients (PiSSA, OLoRA, …).
    "random": entries of B and A independent and normal, in the factors' own shapes; their standard deviation, 1/√r in
    the paper, does not matter to CU. "trained": the adapter as it is; 0 where ΔW = 0. Modules that are not finite are
    left out of all conditions, and among the findings. Of DoRA and SPECLORA it is the low-rank part.

    Args:
        adapters: directories, files, Hub ids, PeftModels or open adapters; of several adapters in one model
            ``[lorakit.adapters.open_adapter(model, adapter_name=name) for name in names]``.
        seed: of what is drawn, anew for each adapter; torch's own generators stay as they are.
        draws: how many random adapters.
    Raises: AdapterFileError, UnsupportedModelError for what cannot be read; ValueError for no adapters, or `draws`
        below 1.
    """
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"`draws` must be a positive integer; got {draws!r}.")
    views = open_all(adapters)
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
        findings.append(Finding("info", "no_init", None, f"There is no condition before training: {reason}."))
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
    """Capacity utilization by module as PEFT initializes the adapter; or none, and the reason."""
    init = view.settings.raw.get("init_lora_weights", True)
    if view.settings.r is None:
        return {}, "without its config the adapter's init is not known"
    if view.settings.peft_type == "ADALORA":
        return {}, "AdaLoRA's own start, at other ranks, is not made here"
    if not isinstance(init, bool) and str(init).lower() not in DATA_FREE:
        return {}, f"init_lora_weights={init!r} needs the base weight, data or gradients"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(seed)
        try:
            start = _initialized(view.modules, init)
        except ValueError as error:  # PEFT's: an init that these modules cannot have
            return {}, f"init_lora_weights={init!r}: {error}"
    found = _utilization(measure(start, {}, [], description="init"))
    places = {str(i): module.name for i, module in enumerate(view.modules)}
    return {places[m.name]: _unless_cancelled(start, m, found[m.name]) for m in start.modules}, None


def _initialized(modules: Sequence[AdapterModule], init: bool | str) -> Adapter:
    """PEFT's fresh LoRA over layers of the modules' shapes, which are named by their places."""
    from peft import LoraConfig, get_peft_model

    layers = nn.ModuleDict({str(i): _layer(module) for i, module in enumerate(modules)})
    r = statistics.mode(module.rank for module in modules)  # PEFT tries all of a pattern's keys for each module
    others = {str(i): module.rank for i, module in enumerate(modules) if module.rank != r}
    config = LoraConfig(r=r, lora_alpha=r, rank_pattern=others, target_modules=r"\d+", init_lora_weights=init)
    return open_adapter(get_peft_model(layers, config))


def _layer(module: AdapterModule) -> Any:
    """A layer of the module's kind and shape whose weight takes no memory."""
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
