"""What adapting one layer alone gains: a short training in each layer, on the same data.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, layerwise sensitivity analysis: insert
LoRA in one layer, train for a short budget, measure the improvement of the validation loss; this orders layers for rank
allocation.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args, overload

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from lorakit._checks import preview
from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report
from lorakit.adapters.tuner_layers import adapted_layers
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._groups import By, Place, draw, groups_of, place_of
from lorakit.experiments._losses import Evaluate, MeanLoss, PairedDifference, mean_of, paired
from lorakit.experiments._methods import method_of
from lorakit.experiments._plan import PlanResults, Shard
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._settings import RunSettings, Schedule, Train, TrainSettings, check_data
from lorakit.experiments._training import Trained, train_each
from lorakit.experiments._work import Source, Work, check_source, model_of
from lorakit.naming.roles import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 5  # groups in a report's text


@dataclass(frozen=True)
class LayerGain:
    """A group of modules adapted alone: its held-out loss over seeds, and how far that is below the base model's."""

    name: str
    role: Role | None
    layer: int | None
    modules: tuple[str, ...]
    params: int
    loss: MeanLoss
    gain: PairedDifference


@dataclass(frozen=True, repr=False)
class LayerGains(Report):
    """What adapting each layer, module or role alone gains. `base` is the loss without an adapter."""

    by: By
    base: MeanLoss
    num_examples: int
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    groups: tuple[LayerGain, ...]

    @property
    def ordered(self) -> tuple[LayerGain, ...]:
        """The groups, largest gain first."""
        return tuple(sorted(self.groups, key=lambda group: -group.gain.value))

    @property
    def scores(self) -> dict[str, float]:
        """Each group's gain, 0 instead of a loss, as `lorakit.allocation.allocate` takes them."""
        return {group.name: max(0.0, group.gain.value) for group in self.groups}

    @property
    def headline(self) -> str:
        best = self.ordered[0]
        return (
            f"{best.name} gains most alone: {best.gain} below the base model's loss of {self.base} "
            f"({len(self.groups)} groups, seeds {', '.join(map(str, self.seeds))})"
        )

    @property
    def details(self) -> tuple[str, ...]:
        lines = [f"{group.name}: {group.gain}" for group in self.ordered[:_SHOWN]]
        if len(self.groups) > _SHOWN:
            lines.append(f"{len(self.groups) - _SHOWN} more, with smaller gains")
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
                "gain": group.gain.value,
                "gain_stderr": group.gain.stderr,
            }
            for group in self.groups
        ]

    def plot(self) -> Figure:
        """The gains with standard errors: bars by layer or role; for single modules one line a role."""
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        draw(axes, self.by, [(group, group.gain.value, group.gain.stderr) for group in self.groups])
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        title = f"{self.settings['model']}: each {self.by} adapted alone, {self.settings['steps']} steps, {seeds}"
        axes.set(ylabel="base model's held-out loss − loss", title=escape_mathtext(title))
        return figure


@overload
def adapt_each_layer(
    model: Source,
    config: PeftConfig,
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    by: By = ...,
    seeds: Sequence[int] = ...,
    weight_decay: float = ...,
    warmup_steps: int | None = ...,
    schedule: Schedule = ...,
    group_by_length: bool = ...,
    collate_fn: Callable[[list[Any]], Any] | None = ...,
    train: Train | None = ...,
    records: str | os.PathLike[str] | None = ...,
    executor: Executor | None = ...,
    shard: None = ...,
    progress: bool = ...,
) -> LayerGains: ...


@overload
def adapt_each_layer(
    model: Source,
    config: PeftConfig,
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    by: By = ...,
    seeds: Sequence[int] = ...,
    weight_decay: float = ...,
    warmup_steps: int | None = ...,
    schedule: Schedule = ...,
    group_by_length: bool = ...,
    collate_fn: Callable[[list[Any]], Any] | None = ...,
    train: Train | None = ...,
    records: str | os.PathLike[str] | None = ...,
    executor: Executor | None = ...,
    shard: Shard,
    progress: bool = ...,
) -> PlanResults: ...


def adapt_each_layer(
    model: Source,
    config: PeftConfig,
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    by: By = "layer",
    seeds: Sequence[int] = (0,),
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    train: Train | None = None,
    records: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> LayerGains | PlanResults:
    """Train an adapter in one layer at a time, on the same data in the same order, and compare held-out losses.

    This is one short training for each layer and seed. `lorakit.experiments.layer_sensitivity` needs none: it measures
    an adapter that is already trained.

    Args:
        model: as in `rank_sweep`. A path, or a function, is also loaded in this process, to find the groups.
        config: a LORA, FISHERLORA or SPECLORA config. Each run adapts one group of its target modules.
        by: what forms a group, as in `lorakit.experiments.layer_sensitivity`.

    All other arguments are those of `lorakit.experiments.rank_sweep`.

    Raises: what `rank_sweep` raises; ValueError for a config that also trains what would be in every run
    (`modules_to_save`, `bias`, trainable tokens, `target_parameters`); UnsupportedModelError if PEFT cannot adapt a
    group alone.
    """
    if by not in get_args(By):
        raise ValueError(f"`by` must be one of {', '.join(get_args(By))}; got {by!r}.")
    check_source(model, evaluate)
    check_data(train_data)
    settings = TrainSettings(
        steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule, collate_fn, train, group_by_length
    )
    where = RunSettings(seeds, records, executor, shard, progress)
    built = model_of(model)
    groups = _groups(built, config, by)
    model = built if executor is None else model
    work = Work(model, train_data, evaluate, settings, progress)
    trained = train_each(work, {name: only for name, (only, _) in groups.items()}, where)
    if not isinstance(trained, Trained):
        return trained
    rows = []
    for name, (_, (role, layer, modules)) in groups.items():
        runs = [run for run in trained.runs if run.name == name]
        loss = mean_of([mean_of(run.losses).value for run in runs])
        gain = paired([trained.base] * len(runs), [run.losses for run in runs])
        rows.append(LayerGain(name, role, layer, modules, runs[0].params, loss, gain))
    return LayerGains(by, mean_of(trained.base), len(trained.base), tuple(where.seeds), trained.settings, tuple(rows))


def _groups(model: nn.Module, config: Any, by: By) -> dict[str, tuple[PeftConfig, Place]]:
    """For each group, a config that targets its modules alone, and its role, layer and modules."""
    if not isinstance(config, LoraConfig) or method_of(config) == "ADALORA":
        raise ValueError(f"`config` must be a LORA, FISHERLORA or SPECLORA config; got {type(config).__name__}.")
    more = ("modules_to_save", "trainable_token_indices", "target_parameters")
    named = [name for name in more if getattr(config, name, None)] + (["bias"] if config.bias != "none" else [])
    if named:
        raise ValueError(
            f"`config` must train adapters of target modules only, since every run would train the rest too; it has "
            f"{', '.join(named)}."
        )
    with preserved_rng(model), preserved_state(model), preserved_base(model, config):
        get_peft_model(model, copy.deepcopy(config))
        places = {name: place_of(members, by) for name, members in groups_of(adapted_layers(model), by).items()}
    return {name: (_only(model, config, name, place[2]), place) for name, place in places.items()}


def _only(model: nn.Module, config: LoraConfig, name: str, modules: Sequence[str]) -> PeftConfig:
    """The config for these modules alone. Raises: UnsupportedModelError if PEFT adapts others with it."""
    only = copy.deepcopy(config)
    only.exclude_modules = only.layers_to_transform = only.layers_pattern = None
    # PEFT matches a list's names as endings of longer names, too, and turns a pattern for a model of experts into bare
    # leaf names
    longer = any(path.endswith(tuple(f".{module}" for module in modules)) for path, _ in model.named_modules())
    only.target_modules = "|".join(map(re.escape, modules)) if longer else list(modules)
    with preserved_rng(model), preserved_state(model), preserved_base(model, config):
        try:
            get_peft_model(model, copy.deepcopy(only))
            adapted = [layer.name for layer in adapted_layers(model)]
        except ValueError as error:
            raise UnsupportedModelError(f"{name!r} cannot be adapted alone: {error}") from error
    if set(adapted) != set(modules):
        raise UnsupportedModelError(
            f"{name!r} cannot be adapted alone: PEFT adapts {len(adapted)} modules ({preview(adapted)}) instead of "
            f"its {len(modules)} ({preview(modules)}). Target other modules; experts' parameters are not supported."
        )
    return only
