"""How much each group of an adapter's modules contributes: one group switched off, or on, at a time.

The adapter is already trained, and nothing is trained here. `adapt_each_layer` trains an adapter in each layer alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from peft.functional import set_adapter
from torch import nn
from tqdm.auto import tqdm

from lorakit._distributed.fsdp import unwrapped
from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import share
from lorakit._report import Report
from lorakit.adapters.in_model import chosen_name
from lorakit.adapters.tuner_layers import AdaptedLayer, adapted_layers, trained_in_full
from lorakit.calibration.state import preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._groups import By, draw, groups_of, place_of
from lorakit.experiments._losses import Evaluate, MeanLoss, check_arguments, difference, losses_of, mean_of
from lorakit.experiments._private import adapter_names, preserved_switches, trained_copies
from lorakit.naming.roles import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Mode = Literal["ablate", "adapt"]
_SHOWN = 5  # groups in a report's text


@dataclass(frozen=True)
class SensitivityGroup:
    """Modules that were switched together.

    `loss`: with the group alone off (ablate) or alone on (adapt). `delta`: that loss minus the loss of the whole
    adapter (ablate: positive if the group helps) or minus the loss without the adapter (adapt: negative if it helps).
    `share`: delta as a fraction of the whole adapter's effect, positive if the group acts in the same direction; None
    if the adapter has no effect. Shares need not add up to 1. `params`: the adapter's parameters in the group.
    """

    name: str
    role: Role | None
    layer: int | None
    modules: tuple[str, ...]
    params: int
    loss: MeanLoss
    delta: MeanLoss
    share: float | None


@dataclass(frozen=True, repr=False)
class LayerSensitivity(Report):
    """How the loss of `num_examples` examples changes when each group of an adapter's modules is switched.

    `whole` is the loss with the whole adapter, `without` the loss without it, and `effect` is whole − without. Standard
    errors are over examples, of differences paired by example; None if `evaluate` returned one number. `always_on`
    names the modules that are trained in full (modules_to_save, trainable tokens); they stayed on throughout.
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

    @property
    def headline(self) -> str:
        return (
            f"adapter {self.adapter_name!r} changes the loss by {self.effect}, from {self.without} to {self.whole} "
            f"({self.num_examples} losses)"
        )

    @property
    def details(self) -> tuple[str, ...]:
        done = "off" if self.mode == "ablate" else "alone on"
        ordered = sorted(self.groups, key=lambda group: -abs(group.delta.value))
        lines = [
            f"{group.name} {done}: {group.delta}"
            + ("" if group.share is None else f", {share(group.share)} of the effect")
            for group in ordered[:_SHOWN]
        ]
        if len(ordered) > _SHOWN:
            lines.append(f"{len(ordered) - _SHOWN} more, with smaller changes")
        return tuple(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row a group."""
        return [
            {
                "name": group.name,
                "role": group.role,
                "layer": group.layer,
                "modules": len(group.modules),
                "params": group.params,
                "loss": group.loss.value,
                "delta": group.delta.value,
                "delta_stderr": group.delta.stderr,
                "share": group.share,
            }
            for group in self.groups
        ]

    def plot(self) -> Figure:
        """The change of the loss with standard errors: bars by layer or role; for single modules one line a role."""
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        draw(axes, self.by, [(group, group.delta.value, group.delta.stderr) for group in self.groups])
        done = "switched off" if self.mode == "ablate" else "alone switched on"
        against = "the whole adapter" if self.mode == "ablate" else "no adapter"
        title = f"Adapter {self.adapter_name!r}: each {self.by} {done}, {self.num_examples} losses"
        axes.set(ylabel=f"loss − loss of {against}", title=escape_mathtext(title))
        return figure


def layer_sensitivity(
    model: nn.Module,
    evaluate: Evaluate,
    *,
    mode: Mode = "ablate",
    by: By = "layer",
    adapter_name: str | None = None,
    progress: bool = True,
) -> LayerSensitivity:
    """Measure how much each layer's, module's or role's adapter changes a loss, one group at a time.

    Args:
        model: a model with adapters of any PEFT method that adapts layers, unmerged; a PeftModel or not.
        evaluate: ``evaluate(model)`` returns a loss, or the losses of the examples (n,) as a tensor or sequence. They
            must be the same examples in the same order each time, so that differences can be paired and have standard
            errors. Lower is better; for a score, read the signs the other way round. It is called once a group and
            twice more, without gradients, in eval mode, each time with the same state of the random generators.
        mode: "ablate" switches one group off and compares with the whole adapter. "adapt" switches one group alone on
            and compares with no adapter.
        by: what forms a group: "layer" (a module outside the layers is a group of its own), "module", or "role"
            (query, value, …; other modules go by the last component of their name).
        adapter_name: which adapter. Needed unless exactly one is active. Others are off during the measurement.
        progress: show a progress bar on stderr.

    Layers are switched by PEFT's own flag. Whatever the adapter trains in full (modules_to_save, trainable tokens,
    biases of the base model) stays on in every measurement, also in `without`.

    Raises: UnsupportedModelError (a ValueError) for a model without adapted layers and for merged adapters; ValueError
    for an unknown adapter, mode or grouping; TypeError if `model` is not a model or `evaluate` not a function;
    CalibrationError (a ValueError) for losses that are not finite numbers. Errors of `evaluate` are passed on. In every
    case the model, its flags and adapters, and the random generators are left as they were.

    Example:
        >>> import torch
        >>> from lorakit import experiments
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
        >>> x = torch.ones(3, 4)
        >>> found = experiments.layer_sensitivity(model, lambda m: m(x).square().mean(1), by="module", progress=False)
        >>> [group.name for group in found.groups], found.num_examples
        (['0', '1'], 3)
    """
    for argument, given, choices in (("mode", mode, get_args(Mode)), ("by", by, get_args(By))):
        if given not in choices:
            raise ValueError(f"`{argument}` must be one of {', '.join(choices)}; got {given!r}.")
    check_arguments(model, evaluate)
    inner: nn.Module = unwrapped(model)
    every = adapted_layers(inner)
    name, switched = _resolve(every, adapter_name)
    always_on = [path for path, module in trained_in_full(inner) if name in trained_copies(module)]
    groups = groups_of(switched, by)
    with preserved_state(inner), preserved_switches(layer for one in every for layer in one.layers):
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
            fraction = delta.value / total if total else None
            rows.append(SensitivityGroup(key, *place_of(members, by), params, mean_of(losses), delta, fraction))
    return LayerSensitivity(
        mode, by, name, len(on), mean_of(on), mean_of(off), effect, tuple(rows), always_on=tuple(always_on)
    )


def _resolve(layers: Sequence[AdaptedLayer], adapter_name: str | None) -> tuple[str, list[AdaptedLayer]]:
    """The adapter to switch, and the layers that have it."""
    if not layers:
        raise UnsupportedModelError(
            "`model` must have adapted layers to switch; it has none. Pass a model with LoRA or another PEFT method "
            "that adapts layers."
        )
    merged = [one.name for one in layers if any(layer.merged for layer in one.layers)]
    if merged:
        raise UnsupportedModelError(
            f"Adapters are merged into {len(merged)} modules (such as {merged[0]!r}) and cannot be switched off one by "
            f"one. Call unmerge_adapter() first."
        )
    known = list(dict.fromkeys(name for one in layers for part in one.layers for name in adapter_names(part)))
    active = [name for name in known if any(name in part.active_adapters for one in layers for part in one.layers)]
    adapter_name = chosen_name(adapter_name, active, known)
    return adapter_name, [one for one in layers if one.has(adapter_name)]


def _switch(layers: Iterable[AdaptedLayer], *, on: bool) -> None:
    for one in layers:
        for layer in one.layers:
            layer.enable_adapters(on)
