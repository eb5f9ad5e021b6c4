"""What more rank in one group of modules gains: g(r → r + δ), trained on the same data in the same order.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, marginal-gain diagnostics.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from tqdm.auto import tqdm

from lorakit._checks import check_integer
from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report, Table
from lorakit.experiments._plan import PlanResults, Shard
from lorakit.experiments._select_plan import Arm, MissingTrainingsError, Stages, gain
from lorakit.experiments._select_setup import SetOptions, stages_of
from lorakit.experiments._settings import RunSettings, Schedule
from lorakit.experiments._work import Source
from lorakit.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from peft import PeftConfig

GroupBy = Literal["role", "layer", "module"]


@dataclass(frozen=True)
class GroupGain:
    """The gain of one group: `gain` is the mean over the named sets, `by_set` has each one's interval.

    Gains are in the units of the scores, higher is better. `params` are the parameters that were added.
    """

    name: str
    modules: tuple[str, ...]
    params: int
    gain: float
    by_set: dict[str, Interval]

    @property
    def per_parameter(self) -> float:
        """The gain for each parameter that was added."""
        return self.gain / self.params


@dataclass(frozen=True, repr=False)
class MarginalGains(Report):
    """Gains g(r → r + delta) of each group, all other modules at rank r. Bounds are one-sided, each at `alpha`."""

    by: GroupBy
    r: int
    delta: int
    alpha: float
    seeds: tuple[int, ...]
    groups: tuple[GroupGain, ...]

    @property
    def headline(self) -> str:
        best = max(self.groups, key=lambda group: group.per_parameter)
        return f"from rank {self.r} to {self.r + self.delta}, most for each parameter: {best.name} ({best.gain:+.4g})"

    def rows(self) -> list[dict[str, Any]]:
        """One row a group and set."""
        return [
            {"group": g.name, "set": name, "params": g.params, "gain": one.difference}
            | {"lower": one.lower, "upper": one.upper}
            for g in self.groups
            for name, one in g.by_set.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data for JSON, with each group's gain for each parameter."""
        data = super().to_dict()
        for row, group in zip(data["groups"], self.groups, strict=True):
            row["per_parameter"] = group.per_parameter
            row["by_set"] = {name: one.to_dict() for name, one in group.by_set.items()}
        return data

    def tables(self) -> list[Table]:
        """One row a group and set."""
        columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
            (self.by, lambda row: row["group"]),
            ("set", lambda row: row["set"]),
            ("parameters", lambda row: str(row["params"])),
            ("gain", lambda row: f"{row['gain']:.4g}"),
            ("lower", lambda row: f"{row['lower']:.4g}"),
            ("upper", lambda row: f"{row['upper']:.4g}"),
        ]
        return [Table.of("Marginal gains", columns, self.rows())]

    def plot(self) -> Figure:
        """Bars of each group's mean gain for each parameter."""
        figure = new_figure(7, 4)
        axes = figure.subplots()
        axes.barh([escape_mathtext(g.name) for g in self.groups], [g.per_parameter for g in self.groups])
        axes.axvline(0, color="0.6", lw=0.8)
        axes.set(xlabel="gain for each parameter", title=f"rank {self.r} to {self.r + self.delta}")
        return figure


def marginal_gains(
    base: Source,
    template: PeftConfig,
    train: Any,
    *,
    tasks: Any,
    r: int,
    delta: int,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    shifted: Any = (),
    by: GroupBy = "role",
    seeds: Sequence[int] = (0, 1, 2),
    alpha: float = 0.05,
    weight_decay: float = 0.0,
    warmup_steps: int | None = None,
    schedule: Schedule = "cosine",
    group_by_length: bool = False,
    stop_every: int | None = None,
    patience: int = 2,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    tokenizer: Any = None,
    records: str | os.PathLike[str] | None = None,
    executor: Executor | None = None,
    shard: Shard | None = None,
    progress: bool = True,
) -> MarginalGains | PlanResults:
    """Train with rank r everywhere, then with r + delta in one group at a time, and compare paired held-out scores.

    It takes (groups + 1) × seeds trainings. `by="module"` has as many groups as modules, 210 of 30 layers of seven; it
    says on stderr how many trainings that is.

    Args:
        r, delta: the rank of all modules, and what one group gets more. Every module keeps the template's scaling.
        by: "role", "layer" or "module".

    All other arguments, and what is raised, are those of `select_ranks`. With `shard`, returns a `PlanResults` where
    other shards have not finished.
    """
    check_grouping(by)
    check_integer("r", r)
    check_integer("delta", delta)
    training = {
        "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "group_by_length": group_by_length,
        "weight_decay": weight_decay, "warmup_steps": warmup_steps, "schedule": schedule, "collate_fn": collate_fn,
    }  # fmt: skip
    options = SetOptions(tasks, shifted, tokenizer, stop_every, patience)
    where = RunSettings(seeds, records, executor, shard, progress)
    with stages_of(base, template, train, options, training, where) as stages:
        try:
            return measured_gains(stages, by, r, delta, alpha)
        except MissingTrainingsError as waiting:
            return waiting.results


def check_grouping(by: str) -> None:
    """Raises: ValueError for an unknown grouping."""
    if by not in get_args(GroupBy):
        raise ValueError(f"`by` must be one of {', '.join(get_args(GroupBy))}; got {by!r}.")


def groups_by(stages: Stages, by: str) -> dict[str, list[str]]:
    """The names of each group's modules."""
    groups: dict[str, list[str]] = {}
    for module in stages.modules:
        groups.setdefault(module.group(by), []).append(module.name)
    return groups


def measured_gains(stages: Stages, by: GroupBy, r: int, delta: int, alpha: float) -> MarginalGains:
    """The trainings of `marginal_gains`, and what they found."""
    groups = groups_by(stages, by)
    if by == "module" and stages.where.progress:
        count = (len(groups) + 1) * len(stages.where.seeds)
        tqdm.write(f"gains by module: {count} trainings ({len(groups)} modules)", file=sys.stderr)
    uniform = stages.uniform(r)
    raised = {name: uniform | dict.fromkeys(members, r + delta) for name, members in groups.items()}
    # Groups' names come after a prefix, so that none is the reference's.
    arms = stages.train({"uniform": uniform, **{f"+{name}": ranks for name, ranks in raised.items()}})
    rows = [_group_gain(name, members, arms, alpha) for name, members in groups.items()]
    return MarginalGains(by, r, delta, alpha, tuple(stages.where.seeds), tuple(rows))


def _group_gain(name: str, members: Sequence[str], arms: dict[str, Arm], alpha: float) -> GroupGain:
    arm, reference = arms[f"+{name}"], arms["uniform"]
    by_set = {one: gain(arm, reference, one, alpha) for one in arm.sets}
    mean = sum(found.difference for found in by_set.values()) / len(by_set)
    return GroupGain(name, tuple(members), arm.params - reference.params, mean, by_set)
