"""How much each layer's adapter does: one group of modules switched off, or on, at a time.

Here of an adapter that is trained already, so that nothing is trained and the groups are those of one and the same
adapter; `_gains` trains an adapter on each layer alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from peft.functional import set_adapter
from torch import nn
from tqdm.auto import tqdm

from lorakit._distributed.fsdp import unwrapped
from lorakit._figures import escape_mathtext, new_figure
from lorakit.adapters.in_model import chosen_name
from lorakit.adapters.tuner_layers import AdaptedLayer, adapted_layers, trained_in_full
from lorakit.calibration.state import preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._losses import Evaluate, MeanLoss, check_arguments, difference, losses_of, mean_of
from lorakit.naming.roles import Role, group_of, layer_prefix

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Mode = Literal["ablate", "adapt"]
By = Literal["layer", "module", "role"]
Place = tuple[Role | None, int | None, tuple[str, ...]]


@dataclass(frozen=True)
class SensitivityGroup:
    """Modules that were switched together.

    `loss` is that with the group alone off (ablate) or on (adapt); `delta` what that is above the loss of the whole
    adapter (ablate: positive where the group helps) or of no adapter at all (adapt: negative where it helps).
    `share` is delta as a part of what the whole adapter does, so positive where the group does the same; None where
    the whole adapter changes nothing. Shares need not add up to 1. `params` are the adapter's parameters in the group.
    """

    name: str
    role: Role | None
    layer: int | None
    modules: tuple[str, ...]
    params: int
    loss: MeanLoss
    delta: MeanLoss
    share: float | None


@dataclass(frozen=True)
class LayerSensitivity:
    """What switching each group of an adapter's modules off or on does to the loss of `num_examples` examples.

    `whole` is the loss with all of the adapter on, `without` with all of it off, and `effect` whole − without.
    Standard errors are over examples, of differences paired by example; None where `evaluate` returned one number.
    `always_on` are the modules trained in full (modules_to_save, trainable tokens), which stayed on throughout.
    """

    mode: Mode
    by: By
    adapter_name: str
    num_examples: int
    whole: MeanLoss
    without: MeanLoss
    effect: MeanLoss
    groups: tuple[SensitivityGroup, ...]
    always_on: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data that JSON takes."""
        return asdict(self)

    def plot(self) -> Figure:
        """The change of the loss with standard errors: bars by layer or role, of single modules one line a role.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        draw(axes, self.by, [(group, group.delta.value, group.delta.stderr) for group in self.groups])
        done = "off" if self.mode == "ablate" else "alone on"
        against = "the whole adapter" if self.mode == "ablate" else "no adapter"
        axes.set(ylabel=f"loss − that of {against}", title=f"Each {self.by} {done}, {self.num_examples} losses")
        return figure


class Placed(Protocol):
    """What a value is drawn for."""

    @property
    def name(self) -> str: ...
    @property
    def layer(self) -> int | None: ...


def draw(axes: Axes, by: By, rows: Sequence[tuple[Placed, float, float | None]]) -> None:
    """Values with standard errors: bars by layer or role, of single modules one line a role."""
    axes.axhline(0, color="0.6", lw=0.8)
    if by == "module" and any(group.layer is not None for group, _, _ in rows):
        _lines(axes, rows)
    else:
        _bars(axes, by, rows)


def _bars(axes: Axes, by: By, rows: Sequence[tuple[Placed, float, float | None]]) -> None:
    layers = [group.layer for group, _, _ in rows]
    numbered = by == "layer" and len({layer for layer in layers if layer is not None}) == len(layers)
    labels = [str(group.layer) if numbered else escape_mathtext(group.name) for group, _, _ in rows]
    axes.bar(range(len(rows)), [value for _, value, _ in rows], yerr=[e or 0.0 for _, _, e in rows], capsize=2)
    every = max(1, len(rows) // 40)
    long = max(map(len, labels)) * len(labels) / every > 80
    axes.set_xticks(range(0, len(rows), every), labels[::every], rotation=90 if long else 0)
    axes.set_xlabel("layer" if numbered else by)


def _lines(axes: Axes, rows: Sequence[tuple[Placed, float, float | None]]) -> None:
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, list[tuple[Placed, float, float | None]]] = {}
    for row in rows:
        lines.setdefault(group_of(row[0].name), []).append(row)
    for label, members in lines.items():
        places = [-1 if group.layer is None else group.layer for group, _, _ in members]
        values, errors = [value for _, value, _ in members], [error or 0.0 for _, _, error in members]
        axes.errorbar(places, values, yerr=errors, fmt="o-", ms=4, capsize=2, label=escape_mathtext(label))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    outside = any(group.layer is None for group, _, _ in rows)
    axes.set_xlabel("layer (−1: in none)" if outside else "layer")
    axes.legend(fontsize=8)


def layer_sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    mode: Mode = "ablate",
    by: By = "layer",
    adapter_name: str | None = None,
    progress: bool = True,
) -> LayerSensitivity:
    """Measure what each layer's, module's or role's adapter does to a loss, one at a time.

    Args:
        model: one with adapters of any PEFT method that adapts layers, unmerged; a PeftModel or not.
        evaluate: ``evaluate(model)`` returns a loss, or the losses of the examples (n,), a tensor or a sequence, always
            of the same examples in the same order: then differences are paired and have standard errors. Lower is
            better; of a score the signs are the other way round. Called once for each group and twice more, without
            gradients and in eval mode, each time with the same state of the random number generators.
        mode: "ablate" switches one group off and compares with the whole adapter; "adapt" switches one group alone on
            and compares with no adapter at all.
        by: what makes a group: "layer" (modules in no layer each stand for themselves), "module", or "role" (query,
            value, …; modules that have none go by the last component of their name).
        adapter_name: which adapter; needed where not exactly one is active. Others are off meanwhile.
        progress: show a progress bar on stderr.

    Layers are switched by PEFT's own flag. What an adapter trains in full (modules_to_save, trainable tokens, biases of
    the base model) stays on in every measurement, `without` included.

    Raises: UnsupportedModelError (a ValueError) for a model without adapted layers and for merged adapters; ValueError
    for an unknown adapter, mode or grouping; TypeError for what is no model or function; CalibrationError (a
    ValueError) for losses that are not finite numbers. What `evaluate` raises passes through. Either way the model, its
    flags and adapters and the random number generators are as they were.
    """
    for argument, given, choices in (("mode", mode, get_args(Mode)), ("by", by, get_args(By))):
        if given not in choices:
            raise ValueError(f"`{argument}` must be one of {', '.join(choices)}; got {given!r}.")
    check_arguments(model, evaluate)
    inner: nn.Module = unwrapped(model)
    every = adapted_layers(inner)
    name, switched = _resolve(every, adapter_name)
    always_on = [path for path, module in trained_in_full(inner) if name in module._get_available_adapters()]
    groups = groups_of(switched, by)
    with preserved_state(inner), _preserved_switches(every):
        inner.eval()
        if adapter_name is not None and any(layer.active_adapters != [name] for one in every for layer in one.layers):
            set_adapter(inner, name)
        _switch(switched, on=True)
        on = losses_of(model, evaluate, "the whole adapter")
        _switch(switched, on=False)
        off = losses_of(model, evaluate, "the model without the adapter", len(on))
        effect = difference(on, off)
        ablate = mode == "ablate"
        reference, total = (on, -effect.value) if ablate else (off, effect.value)
        rows = []
        for key, members in tqdm(groups.items(), desc="sensitivity", unit="group", disable=not progress, delay=1.0):
            _switch(switched, on=ablate)
            _switch(members, on=not ablate)
            losses = losses_of(model, evaluate, f"{key!r} {'off' if ablate else 'alone on'}", len(on))
            delta = difference(losses, reference)
            params = sum(p.numel() for member in members for p in member.parameters(name))
            share = delta.value / total if total else None
            rows.append(SensitivityGroup(key, *place_of(members, by), params, mean_of(losses), delta, share))
    return LayerSensitivity(
        mode, by, name, len(on), mean_of(on), mean_of(off), effect, tuple(rows), always_on=tuple(always_on)
    )


def _resolve(layers: Sequence[AdaptedLayer], adapter_name: str | None) -> tuple[str, list[AdaptedLayer]]:
    """The adapter meant, and the layers that have it."""
    if not layers:
        raise UnsupportedModelError(
            "The model has no adapted layers to switch: pass one with a LoRA or another adapter of PEFT's that changes "
            "layers."
        )
    merged = [one.name for one in layers if any(layer.merged for layer in one.layers)]
    if merged:
        raise UnsupportedModelError(
            f"Adapters are merged into {len(merged)} modules (such as {merged[0]!r}), so that they cannot be switched "
            f"off one by one. Call unmerge_adapter() first."
        )
    known = list(dict.fromkeys(n for one in layers for part in one.layers for n in part._all_available_adapter_names()))
    active = [name for name in known if any(name in part.active_adapters for one in layers for part in one.layers)]
    adapter_name = chosen_name(adapter_name, active, known)
    return adapter_name, [one for one in layers if one.has(adapter_name)]


def groups_of(layers: Sequence[AdaptedLayer], by: By) -> dict[str, list[AdaptedLayer]]:
    """Layers, modules or roles, by name, in the model's order."""
    groups: dict[str, list[AdaptedLayer]] = {}
    for one in layers:
        if by == "layer":
            key = layer_prefix(one.name) or one.name
        elif by == "role":
            key = one.group
        else:
            key = one.name
        groups.setdefault(key, []).append(one)
    return groups


def place_of(members: Sequence[AdaptedLayer], by: By) -> Place:
    """The role and the layer of a group, where all its modules have the same, and its modules."""
    role = None if by == "layer" else members[0].role
    layer = None if by == "role" else members[0].layer
    return role, layer, tuple(member.name for member in members)


def _switch(layers: Iterable[AdaptedLayer], *, on: bool) -> None:
    for one in layers:
        for layer in one.layers:
            layer.enable_adapters(on)


@contextlib.contextmanager
def _preserved_switches(layers: Sequence[AdaptedLayer]) -> Iterator[None]:
    states = [(layer, layer._disable_adapters) for one in layers for layer in one.layers]
    try:
        yield
    finally:
        for layer, disabled in states:
            layer._disable_adapters = disabled
