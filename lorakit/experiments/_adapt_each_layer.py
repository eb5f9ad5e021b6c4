"""What adapting one layer alone gains: an adapter trained in each, for a short budget, on the same data.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, layerwise sensitivity analysis: insert
LoRA in one layer, train for a short budget, measure the improvement of the validation loss; this orders layers for rank
allocation.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, get_args

from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn

from lorakit._checks import preview
from lorakit._figures import new_figure
from lorakit.adapters.tuner_layers import adapted_layers
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import UnsupportedModelError
from lorakit.experiments._configs import preserved_base
from lorakit.experiments._layer_sensitivity import By, Place, draw, groups_of, place_of
from lorakit.experiments._losses import Evaluate, MeanLoss, check_arguments
from lorakit.experiments._rank_sweep import PairedDifference, Train, paired, rank_sweep
from lorakit.naming.roles import Role

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class LayerGain:
    """A group of modules adapted alone: its held-out loss over seeds, and what that is below the base model's."""

    name: str
    role: Role | None
    layer: int | None
    modules: tuple[str, ...]
    params: int
    loss: MeanLoss
    gain: PairedDifference


@dataclass(frozen=True)
class LayerGains:
    """What adapting each layer, module or role alone gains. `base` is the loss without adapter."""

    by: By
    base: MeanLoss
    num_examples: int
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    groups: tuple[LayerGain, ...]

    @property
    def ordered(self) -> tuple[LayerGain, ...]:
        """The largest gain first."""
        return tuple(sorted(self.groups, key=lambda group: -group.gain.value))

    @property
    def scores(self) -> dict[str, float]:
        """Each group's gain, or 0 where there is none, as `lorakit.allocation.allocate` takes them."""
        return {group.name: max(0.0, group.gain.value) for group in self.groups}

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data that JSON takes."""
        return asdict(self)

    def plot(self) -> Figure:
        """The gains with standard errors: bars by layer or role, of single modules one line a role.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(8, 4.5)
        axes = figure.subplots()
        draw(axes, self.by, [(group, group.gain.value, group.gain.stderr) for group in self.groups])
        title = f"Each {self.by} adapted alone: {self.settings['steps']} steps, {len(self.seeds)} seeds"
        axes.set(ylabel="held-out loss below the base model's", title=title)
        return figure


def adapt_each_layer(
    model: nn.Module,
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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    train: Train | None = None,
    path: Any = None,
    progress: bool = True,
) -> LayerGains:
    """Train an adapter in one layer at a time, on the same data in the same order, and compare held-out losses.

    One short training for each layer and seed: `lorakit.experiments.layer_sensitivity` asks a trained adapter instead.

    Args:
        model: a base model without adapters; given back as it was.
        config: a LORA, FISHERLORA or SPECLORA config; of the modules that it targets each run has those of one group.
        by: what makes a group, as in `lorakit.experiments.layer_sensitivity`.
    All others are those of `lorakit.experiments.rank_sweep`, which does the trainings; so is what is raised, and
    besides ValueError for a config that trains more than its adapters (`modules_to_save`, `bias`, trainable tokens,
    `target_parameters`), which would be in every run, and UnsupportedModelError where PEFT cannot adapt a group alone.
    """
    if by not in get_args(By):
        raise ValueError(f"`by` must be one of {', '.join(get_args(By))}; got {by!r}.")
    check_arguments(model, evaluate)
    groups = _groups(model, config, by)
    sweep = rank_sweep(
        model,
        {name: only for name, (only, _) in groups.items()},
        train_data,
        evaluate,
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seeds=seeds,
        weight_decay=weight_decay,
        warmup_steps=warmup_steps,
        collate_fn=collate_fn,
        train=train,
        path=path,
        progress=progress,
    )
    rows = []
    for row in sweep.ranks:
        losses = [run.losses for run in sweep.runs if run.name == row.name]
        gain = paired([sweep.base_losses] * len(losses), losses)
        _, (role, layer, modules) = groups[row.name]
        rows.append(LayerGain(row.name, role, layer, modules, row.params, row.loss, gain))
    return LayerGains(by, sweep.base, sweep.num_examples, sweep.seeds, sweep.settings, tuple(rows))


def _groups(model: nn.Module, config: Any, by: By) -> dict[str, tuple[PeftConfig, Place]]:
    """For each group a config that targets its modules alone, and what the group is."""
    if not isinstance(config, LoraConfig):
        raise ValueError(f"`config` must be a LORA, FISHERLORA or SPECLORA config; got {type(config).__name__}.")
    more = ("modules_to_save", "trainable_token_indices", "target_parameters")
    named = [name for name in more if getattr(config, name, None)] + (["bias"] if config.bias != "none" else [])
    if named:
        raise ValueError(
            f"`config` must train adapters alone, or every run would train the rest; it has {', '.join(named)}."
        )
    with preserved_rng(model), preserved_state(model), preserved_base(model, config):
        get_peft_model(model, copy.deepcopy(config))
        places = {name: place_of(members, by) for name, members in groups_of(adapted_layers(model), by).items()}
    return {name: (_only(model, config, name, place[2]), place) for name, place in places.items()}


def _only(model: nn.Module, config: LoraConfig, name: str, modules: Sequence[str]) -> PeftConfig:
    """The config for these modules alone. Raises: UnsupportedModelError where PEFT adapts other ones by it."""
    only = copy.deepcopy(config)
    only.exclude_modules = only.layers_to_transform = only.layers_pattern = None
    # PEFT takes a list's names as endings of longer ones too, and a pattern for a model of experts as bare leaf names
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
            f"{name!r} cannot be adapted alone: PEFT adapts {len(adapted)} modules ({preview(adapted)}) in place of "
            f"its {len(modules)} ({preview(modules)}). Target other modules; experts' parameters are not covered."
        )
    return only
