"""The report of an allocation: every module's rank, and why it is not larger."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from lorakit._figures import new_figure
from lorakit._format import count, extent, visible
from lorakit._report import Report
from lorakit.naming.patterns import compact_pattern
from lorakit.naming.roles import group_of, layer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rule = Literal["fisher", "fisherlora", "spectral", "energy", "prior", "uniform"]
Per = Literal["module", "role"]
RULES: tuple[Rule, ...] = get_args(Rule)

_SHOWN = 12  # entries of a rank pattern in a next step


@dataclass(frozen=True)
class AllocatedModule:
    """One module's score (Σ σ² for the energy rule), its cost per unit of rank, its rank, and why it is not larger."""

    module_name: str
    role: str | None
    score: float
    cost: int
    rank: int
    why: str

    @property
    def group(self) -> str:
        """The role, or what the module's name says where no role was given."""
        return self.role or group_of(self.module_name)


@dataclass(frozen=True, repr=False)
class Allocation(Report):
    """Ranks whose cost, Σ rank · cost, does not exceed the budget. `modules` has the order of `costs`."""

    rule: Rule
    per: Per
    budget: int
    cost: int
    modules: tuple[AllocatedModule, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Each module's rank."""
        return {row.module_name: row.rank for row in self.modules}

    @property
    def headline(self) -> str:
        ranks = list(self.ranks.values())
        span = extent((min(ranks), max(ranks))) if ranks else "none"
        spent, budget = count(self.cost), count(self.budget)
        return f"{len(ranks)} modules, rank {span}, {spent} of {budget} spent (rule {self.rule}, per {self.per})"

    @property
    def details(self) -> tuple[str, ...]:
        """The ranks of each role."""
        groups: dict[str, list[int]] = {}
        for row in self.modules:
            groups.setdefault(row.group, []).append(row.rank)
        return tuple(
            f"{group}: rank {extent((min(ranks), max(ranks)))} in {len(ranks)} modules"
            for group, ranks in groups.items()
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        """The config with these ranks; a long pattern is taken from a variable named `allocation`."""
        ranks = {name: rank for name, rank in self.ranks.items() if rank}
        if not ranks:
            return ()
        r = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        pattern = compact_pattern(ranks, {name for name, rank in ranks.items() if rank == r})
        leaves = sorted({name.rpartition(".")[2] for name in ranks})
        targets, rank_pattern = repr(leaves if len(ranks) == len(self.modules) else sorted(ranks)), repr(pattern)
        if len(pattern) > _SHOWN or len(ranks) < len(self.modules):
            targets = "[name for name, rank in allocation.ranks.items() if rank]"
        if len(pattern) > _SHOWN:
            rank_pattern = "{name: rank for name, rank in allocation.ranks.items() if rank}"
        ranks_of_roles = f"r={r}, r_q={r}, r_v={r}"
        return (f"lorakit.FisherLoRAConfig({ranks_of_roles}, target_modules={targets}, rank_pattern={rank_pattern})",)

    def explain(self) -> str:
        """A table of every module's score, cost and rank, and why the rank is not larger."""
        heading = ("module", "role", "score", "cost", "rank", "why not one more")
        lines = [heading] + [
            (visible(row.module_name), row.role or "-", f"{row.score:.3g}", str(row.cost), str(row.rank), row.why)
            for row in self.modules
        ]
        widths = [max(len(line[i]) for line in lines) for i in range(len(heading) - 1)]
        text = [
            "  ".join(
                [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
                + [cell.rjust(width) for cell, width in zip(line[2:5], widths[2:], strict=True)]
                + [line[5]]
            )
            for line in lines
        ]
        share = f" ({self.cost / self.budget:.1%})" if self.budget else ""
        text.append(f"rule {self.rule}, per {self.per}: {self.cost} of {self.budget}{share} spent")
        return "\n".join(text)

    def plot(self) -> Figure:
        """Bars of the ranks by layer, one panel for each role. Modules outside the layers are at "–"."""
        groups: dict[str, dict[int | None, list[int]]] = {}
        for row in self.modules:
            groups.setdefault(row.group, {}).setdefault(layer_of(row.module_name), []).append(row.rank)
        layers: list[int | None] = [*sorted({n for ranks in groups.values() for n in ranks if n is not None})]
        layers += [None] if any(None in ranks for ranks in groups.values()) else []
        figure = new_figure(max(4.0, 1.5 + 0.22 * len(layers)), 0.6 + 1.3 * max(1, len(groups)))
        figure.suptitle(f"Ranks by rule {self.rule}, per {self.per}")
        if not groups:
            return figure
        step = max(1, len(layers) // 12)
        panels = figure.subplots(len(groups), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, (group, ranks) in zip(panels, groups.items(), strict=True):
            axes.bar(range(len(layers)), [_mean(ranks.get(layer, [])) for layer in layers])
            axes.set_title(group, fontsize="small")
            axes.set_ylabel("rank")
            axes.set_xticks(range(0, len(layers), step), ["–" if n is None else str(n) for n in layers[::step]])
        panels[-1].set_xlabel("layer")
        return figure


def _mean(values: list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
