"""Held-out loss against rank, everything else equal: the same examples in the same order, the same hyperparameters.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, validation loss rank sweep: "controlled
experiments for r in {4, 8, 16, 32, 64}, fixed data order and hyperparameters", then the smallest rank within tolerance
of the best.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from peft import PeftConfig

from lorakit._figures import escape_mathtext, new_figure
from lorakit._format import count
from lorakit._report import Report
from lorakit.experiments._configs import named_configs
from lorakit.experiments._losses import Evaluate, MeanLoss, PairedDifference, mean_of, paired
from lorakit.experiments._patterns import Pattern, pattern_of
from lorakit.experiments._plan import PlanResults, Shard
from lorakit.experiments._settings import RunSettings, Schedule, Train, TrainSettings, check_data
from lorakit.experiments._training import SweepRun, Trained, train_each
from lorakit.experiments._work import Source, Work, check_source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RANKS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class SweptRank:
    """One config of a sweep.

    `rank` is its number on the axis, None if it only has a name. `loss` is the mean over seeds, with its standard error
    over seeds. `difference` is the paired difference to the reference.
    """

    name: str
    rank: int | None
    params: int
    loss: MeanLoss
    difference: PairedDifference


@dataclass(frozen=True, repr=False)
class RankSweep(Report):
    """Held-out loss by rank.

    `base` is the loss without an adapter, the mean of `base_losses`. `settings` are those that all runs share.
    """

    reference: str
    base: MeanLoss
    base_losses: tuple[float, ...]
    num_examples: int
    seeds: tuple[int, ...]
    settings: dict[str, Any]
    runs: tuple[SweepRun, ...]
    ranks: tuple[SweptRank, ...]

    @property
    def best(self) -> SweptRank:
        """The config with the lowest mean loss; if several share it, the one with the fewest parameters."""
        return min(self.ranks, key=lambda row: (row.loss.value, row.params))

    @property
    def smallest(self) -> SweptRank | None:
        """The config with the fewest parameters whose paired difference to the best is within one standard error.

        None if there is no standard error: one seed, and an `evaluate` that returns one number.
        """
        best = self.best
        within = []
        for row in self.ranks:
            apart = self.difference(row.name, best.name)
            if apart.stderr is None:
                return None
            if apart.value <= apart.stderr:
                within.append(row)
        return min(within, key=lambda row: (row.params, row.loss.value))

    @property
    def pattern(self) -> Pattern | None:
        """Whether the loss over rank is "saturating", "gradual" or "unstable".

        Unstable: a larger rank is worse than a smaller one by more than 2 paired standard errors. Saturating: else, if
        the last step adds at most a tenth of the improvement from the first rank to the best, or nothing improves.
        Gradual: else. None for fewer than three ranks, configs that are not ranks, and without standard errors.
        """
        if any(row.rank is None for row in self.ranks):
            return None
        rows = sorted(self.ranks, key=lambda row: row.rank or 0)
        return pattern_of(
            [row.loss.value for row in rows], lambda i, j: self.difference(rows[i].name, rows[j].name).stderr
        )

    @property
    def headline(self) -> str:
        best, smallest = self.best, self.smallest
        text = f"lowest loss at {best.name}: {best.loss}, without adapter {self.base}"
        if self.pattern is not None:
            text += f"; {self.pattern}"
        if smallest is None:
            return f"{text}; no standard error, so that no smaller config can be compared with it"
        if smallest is best:
            return f"{text}; no smaller config is within one standard error"
        return f"{text}; smallest within one standard error: {smallest.name}"

    @property
    def details(self) -> tuple[str, ...]:
        return tuple(
            f"{row.name}: {count(row.params)} parameters, loss {row.loss}"
            + ("" if row.name == self.reference else f", {row.difference} against {self.reference}")
            for row in self.ranks
        )

    def difference(self, first: str | int, second: str | int) -> PairedDifference:
        """Loss of the first config minus loss of the second, by name or rank. Raises: ValueError for unknown ones."""
        names = [row.name for row in self.ranks]
        for name in (first, second):
            if str(name) not in names:
                raise ValueError(f"`first` and `second` must be among {', '.join(names)}; got {name!r}.")
        return _difference(self.runs, str(first), str(second), self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain data for JSON, with `best` and `smallest` by name, and the `pattern`."""
        smallest = self.smallest
        return super().to_dict() | {
            "best": self.best.name,
            "smallest": None if smallest is None else smallest.name,
            "pattern": self.pattern,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row a config."""
        return [
            {
                "name": row.name,
                "rank": row.rank,
                "params": row.params,
                "loss": row.loss.value,
                "loss_stderr": row.loss.stderr,
                "difference": row.difference.value,
                "difference_stderr": row.difference.stderr,
            }
            for row in self.ranks
        ]

    def plot(self) -> Figure:
        """Mean losses by rank with standard errors over seeds, each seed as a dot; beside it the paired differences."""
        figure = new_figure(10, 4.4)
        left, right = figure.subplots(1, 2)
        numbered = all(row.rank is not None for row in self.ranks)
        rows = sorted(self.ranks, key=lambda row: row.rank or 0) if numbered else list(self.ranks)
        places: list[float] = [row.rank if numbered and row.rank else i for i, row in enumerate(rows)]
        self._draw_losses(left, places, rows, "o-" if numbered else "o")
        errors = [row.difference.stderr or 0.0 for row in rows]
        differences = [row.difference.value for row in rows]
        right.axhline(0, color="0.6", lw=0.8)
        right.errorbar(places, differences, yerr=errors, fmt="o-" if numbered else "o", ms=4, capsize=3)
        right.set(ylabel=f"loss − loss of {escape_mathtext(self.reference)}", title="Paired by seed and example")
        for axes in (left, right):
            if numbered:
                axes.set_xscale("log", base=2)
            axes.set_xticks(places, [escape_mathtext(row.name) for row in rows])
            axes.minorticks_off()
            axes.set_xlabel("rank" if numbered else "config")
        figure.suptitle(escape_mathtext(f"{self.settings['model']}, {self.settings['steps']} steps"))
        return figure

    def _draw_losses(self, axes: Axes, places: Sequence[float], rows: Sequence[SweptRank], marks: str) -> None:
        for place, row in zip(places, rows, strict=True):
            of_seeds = [mean_of(run.losses).value for run in self.runs if run.name == row.name]
            axes.plot([place] * len(of_seeds), of_seeds, ".", color="0.6", ms=5)
        errors = [row.loss.stderr or 0.0 for row in rows]
        axes.errorbar(places, [row.loss.value for row in rows], yerr=errors, fmt=marks, ms=4, capsize=3)
        best, smallest = self.best, self.smallest
        marked = [(best, "lowest", "C1"), (smallest, "smallest within 1 s.e.", "C2")]
        if best is smallest:
            marked = [(best, "lowest and smallest within 1 s.e.", "C2")]
        for chosen, label, colour in marked:
            if chosen is not None:
                axes.axvline(places[rows.index(chosen)], color=colour, lw=1, ls="--", label=label)
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        axes.set(ylabel="held-out loss", title=f"{seeds}; without adapter {self.base.value:.4g}")
        axes.legend(fontsize=8)


@overload
def rank_sweep(
    model: Source,
    configs: PeftConfig | Mapping[Any, PeftConfig],
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    ranks: Sequence[int] | None = ...,
    seeds: Sequence[int] = ...,
    reference: str | int | None = ...,
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
) -> RankSweep: ...


@overload
def rank_sweep(
    model: Source,
    configs: PeftConfig | Mapping[Any, PeftConfig],
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    ranks: Sequence[int] | None = ...,
    seeds: Sequence[int] = ...,
    reference: str | int | None = ...,
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


def rank_sweep(
    model: Source,
    configs: PeftConfig | Mapping[Any, PeftConfig],
    train_data: Any,
    evaluate: Evaluate,
    *,
    steps: int,
    batch_size: int | None,
    learning_rate: float,
    ranks: Sequence[int] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    reference: str | int | None = None,
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
) -> RankSweep | PlanResults:
    """Train an adapter at each rank and seed on the same data in the same order, and compare held-out losses.

    Args:
        model: a base model without adapters; each run adapts it anew, and it is given back as it was. Or a path or Hub
            id, or a function that returns the model: this process, or each worker of `executor`, then builds it once.
        configs: a LORA, FISHERLORA or SPECLORA config as a template for `ranks`; or a mapping from names to configs of
            any PEFT method. Integer names are ranks on the figure's axis:
            ``{r: FisherLoRAConfig(r=16, r_q=r) for r in (16, 4, 2)}`` sweeps query ranks alone.
        train_data: a map-style dataset (a list will do) of examples for `collate_fn`.
        evaluate: ``evaluate(model)`` returns the held-out loss, or the losses of the examples (n,), of the same
            examples in the same order each time. Called after each training and once without an adapter, in eval mode.
        steps, batch_size, learning_rate: of every run. If `batch_size` is None, the items of `train_data` are batches.
        ranks: only for a template; (4, 8, 16, 32, 64) by default. All of the template's ranks (`r`, `rank_pattern`,
            FisherLoRA's `r_q` and `r_v`) are multiplied by rank / r, which must give integers. Its alphas are scaled so
            that every module keeps its scaling: by rank / r, or under rsLoRA by the square root of that.
        seeds: each seed determines the order of the data, dropout and the initial factors.
        reference: the name or rank that differences are taken to; by default the config with the most parameters.
        weight_decay: of AdamW. Gradients are clipped to norm 1.
        warmup_steps, schedule: the learning rate's linear warm-up, by default a twentieth of `steps`, and what follows:
            a decay to 0 by half a cosine ("cosine") or a line ("linear"), or none ("constant").
        group_by_length: whether batches are of examples of similar length (of their `input_ids`), which saves padding.
        collate_fn: as in torch's DataLoader, whose default is used if it is None.
        train: ``train(model, batches, seed)`` replaces the training loop; `batches` is an iterator over `steps`
            batches. `learning_rate` and the like are then only recorded.
        records: a directory with one file for each finished run, made if it does not exist. Runs with a record are not
            repeated, so an interrupted sweep continues, and ranks and seeds can be added. The base model's weights, the
            data and `evaluate` are not compared: use another directory if they change.
        executor: any `concurrent.futures.Executor` of other processes, such as a ProcessPoolExecutor or
            `lorakit.experiments.RayExecutor`. `model` (up to 256 MB), `train_data`, `evaluate`, `collate_fn` and
            `train` are then pickled. At the same number of threads, the CPU's results are the same to the bit.
        shard: (i, n) or "i/n" runs only each n-th training, from the i-th on, and returns what `records` has by then, a
            `PlanResults`. When no run is missing, the same call without `shard` makes the report.
        progress: show a progress bar on stderr.

    Before each batch all random generators are seeded from the seed and the batch's number, so that neither the data
    (also if `collate_fn` draws) nor the base model's dropout depends on the rank. Initial factors of different ranks
    are different draws. Every PEFT method is trained as it needs: after each step AdaLoRA and AdaMSS reallocate, and
    AdaLoRA's `total_step` is `steps`, with a tenth of them at the initial ranks and half at the final ones unless
    `tinit` or `tfinal` is set; KaSA and MonteCLoRA add their terms to the loss.

    Raises: TypeError if `model` cannot be a model or `evaluate` is not a function; ValueError for invalid configs,
    ranks and settings; UnsupportedModelError (a ValueError) for a model with adapters, and for configs that this loop
    would not train as their method needs; PlanError (a ValueError) for records of other settings, and arguments that
    cannot be pickled; TrialError (a RuntimeError), after all other runs, for runs that failed, from what the first one
    raised: errors of PEFT, the data, `evaluate` and `train`, or CalibrationError for losses that are not finite. In
    every case the model is left without adapters and as it was, and so are the random generators.

    Example:
        >>> import torch
        >>> from lorakit import experiments
        >>> from peft import LoraConfig
        >>> base = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> x, y = torch.randn(8, 4), torch.randn(8, 2)
        >>> def train(model, batches, seed):
        ...     optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        ...     for inputs, targets in batches:
        ...         (model(inputs) - targets).square().mean().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> sweep = experiments.rank_sweep(
        ...     base, LoraConfig(r=2, target_modules=["0"]), list(zip(x, y)), lambda m: (m(x) - y).square().mean(1),
        ...     ranks=(1, 2), steps=5, batch_size=4, learning_rate=0.1, train=train, progress=False,
        ... )
        >>> [row.params for row in sweep.ranks]
        [6, 12]
    """
    check_source(model, evaluate)
    wanted = named_configs(configs, RANKS if ranks is None and not isinstance(configs, Mapping) else ranks)
    settings = TrainSettings(
        steps, batch_size, learning_rate, weight_decay, warmup_steps, schedule, collate_fn, train, group_by_length
    )
    where = RunSettings(seeds, records, executor, shard, progress)
    if reference is not None and str(reference) not in wanted:
        raise ValueError(f"`reference` must be one of {', '.join(wanted)}; got {reference!r}.")
    check_data(train_data)
    work = Work(model, train_data, evaluate, settings, progress)
    trained = train_each(work, {name: config for name, (_, config) in wanted.items()}, where)
    if not isinstance(trained, Trained):
        return trained
    params = {run.name: run.params for run in trained.runs}
    chosen = max(wanted, key=lambda name: params[name]) if reference is None else str(reference)
    rows = tuple(
        SweptRank(
            name=name,
            rank=rank,
            params=params[name],
            loss=mean_of([mean_of(run.losses).value for run in trained.runs if run.name == name]),
            difference=_difference(trained.runs, name, chosen, where.seeds),
        )
        for name, (rank, _) in wanted.items()
    )
    return RankSweep(
        reference=chosen,
        base=mean_of(trained.base),
        base_losses=tuple(trained.base),
        num_examples=len(trained.base),
        seeds=tuple(where.seeds),
        settings=trained.settings,
        runs=trained.runs,
        ranks=rows,
    )


def _difference(runs: Sequence[SweepRun], first: str, second: str, seeds: Sequence[int]) -> PairedDifference:
    losses = {(run.name, run.seed): run.losses for run in runs}
    return paired([losses[first, seed] for seed in seeds], [losses[second, seed] for seed in seeds])
