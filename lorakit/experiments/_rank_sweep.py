"""Held-out loss against rank, all else equal: the same examples in the same order, the same hyperparameters.

Reference: "LoRA's Low-Rank Assumption: When It Holds, When It Breaks", 2026, validation loss rank sweep: "controlled
experiments for r in {4, 8, 16, 32, 64}, fixed data order and hyperparameters", then the smallest rank within tolerance
of the best.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from lorakit._figures import escape_mathtext, new_figure
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.errors import CalibrationError
from lorakit.experiments._configs import distinct_integers, named_configs, preserved_base
from lorakit.experiments._losses import Evaluate, MeanLoss, check_arguments, losses_of, mean_of
from lorakit.experiments._record import SweepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Train = Callable[[Any, Iterator[Any], int], Any]
RANKS = (4, 8, 16, 32, 64)
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class SweepRun:
    """One training: the held-out losses of its examples, and the mean training loss of its last tenth of steps (None
    where the caller's own function trained)."""

    name: str
    seed: int
    params: int
    losses: tuple[float, ...]
    train_loss: float | None


@dataclass(frozen=True)
class PairedDifference:
    """A mean difference of losses, over seeds and examples, each paired.

    `stderr_seeds` is over the seeds' means, `stderr_examples` over the examples' means; None where there is one only.
    `stderr` is the root of the sum of their squares, which errs on the large side; None where both are.
    """

    value: float
    stderr: float | None
    stderr_seeds: float | None
    stderr_examples: float | None


@dataclass(frozen=True)
class SweptRank:
    """One config of a sweep. `rank` is its number on the axis, None where it has a name only; `loss` the mean over
    seeds with its standard error over them; `difference` that to the reference."""

    name: str
    rank: int | None
    params: int
    loss: MeanLoss
    difference: PairedDifference


@dataclass(frozen=True)
class RankSweep:
    """Held-out loss by rank. `base` is the loss without adapter, mean of `base_losses`; `settings` are those of every
    run."""

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
        """The lowest mean loss; of equal ones the one with fewest parameters."""
        return min(self.ranks, key=lambda row: (row.loss.value, row.params))

    @property
    def smallest(self) -> SweptRank | None:
        """The one with fewest parameters whose paired difference to the best is within one standard error of it.

        None where nothing has a standard error: with one seed and an `evaluate` that returns one number.
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

    def difference(self, first: str | int, second: str | int) -> PairedDifference:
        """Loss of the first minus loss of the second, by their names or ranks. Raises: ValueError for unknown ones."""
        names = [row.name for row in self.ranks]
        for name in (first, second):
            if str(name) not in names:
                raise ValueError(f"The sweep has {', '.join(names)}; got {name!r}.")
        return _difference(self.runs, str(first), str(second), self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """All of it, `best` and `smallest` by name, as plain data that JSON takes."""
        smallest = self.smallest
        return asdict(self) | {
            "best": self.best.name,
            "smallest": None if smallest is None else smallest.name,
        }

    def plot(self) -> Figure:
        """Mean loss with standard errors over seeds by rank, each seed as a dot, and beside it the paired differences
        to the reference.

        Raises: MissingExtraError (an ImportError) where matplotlib, lorakit's extra `plots`, is not installed.
        """
        figure = new_figure(10, 4.2)
        left, right = figure.subplots(1, 2)
        ranks = [row.rank for row in self.ranks if row.rank is not None]
        numbered = len(ranks) == len(self.ranks)
        rows = sorted(self.ranks, key=lambda row: row.rank or 0) if numbered else list(self.ranks)
        places: list[float] = [row.rank if numbered and row.rank else i for i, row in enumerate(rows)]
        for place, row in zip(places, rows, strict=True):
            of_seeds = [math.fsum(run.losses) / len(run.losses) for run in self.runs if run.name == row.name]
            left.plot([place] * len(of_seeds), of_seeds, ".", color="0.6", ms=5)
        marks = "o-" if numbered else "o"
        errors = [row.loss.stderr or 0.0 for row in rows]
        left.errorbar(places, [row.loss.value for row in rows], yerr=errors, fmt=marks, ms=4, capsize=3)
        best, smallest = self.best, self.smallest
        marked = [(best, "lowest", "C1"), (smallest, "smallest within 1 s.e.", "C2")]
        if best is smallest:
            marked = [(best, "lowest and smallest within 1 s.e.", "C2")]
        for chosen, label, colour in marked:
            if chosen is not None:
                left.axvline(places[rows.index(chosen)], color=colour, lw=1, ls="--", label=label)
        left.set(ylabel="held-out loss", title=f"{len(self.seeds)} seeds; without adapter {self.base.value:.4g}")
        left.legend(fontsize=8)
        errors = [row.difference.stderr or 0.0 for row in rows]
        right.axhline(0, color="0.6", lw=0.8)
        right.errorbar(places, [row.difference.value for row in rows], yerr=errors, fmt=marks, ms=4, capsize=3)
        right.set(ylabel=f"loss − that of {escape_mathtext(self.reference)}", title="Paired by seed and example")
        for axes in (left, right):
            if numbered:
                axes.set_xscale("log", base=2)
            axes.set_xticks(places, [escape_mathtext(row.name) for row in rows])
            axes.minorticks_off()
            axes.set_xlabel("rank" if numbered else "config")
        return figure


def rank_sweep(
    model: nn.Module,
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
    collate_fn: Callable[[list[Any]], Any] | None = None,
    train: Train | None = None,
    path: Any = None,
    progress: bool = True,
) -> RankSweep:
    """Train an adapter at each rank and seed on the same data in the same order, and compare their held-out losses.

    Args:
        model: a base model without adapters. Each run adapts it anew; it is given back as it was.
        configs: a LORA, FISHERLORA or SPECLORA config as a template for `ranks`; or a mapping from names to configs of
            any PEFT method. Names that are integers are the ranks of the plot:
            ``{r: FisherLoRAConfig(r=16, r_q=r) for r in (16, 4, 2)}`` sweeps query ranks alone.
        train_data: a map-style dataset (a list will do) of examples for `collate_fn`.
        evaluate: ``evaluate(model)`` returns the held-out loss, or those of the examples (n,), always of the same
            examples in the same order. Called after each training and once without an adapter, in eval mode.
        steps, batch_size, learning_rate: of every run. With `batch_size` None the items of `train_data` are batches.
        ranks: of a template only; (4, 8, 16, 32, 64) if not given. All of the template's ranks (`r`, `rank_pattern`,
            FisherLoRA's `r_q` and `r_v`) are multiplied by rank / r, which must give integers, and all alphas such that
            every module keeps its scaling: by rank / r, or by its square root under rsLoRA.
        seeds: each seed decides the order of the data, dropout and the initial factors.
        reference: what to take differences to, a name or a rank; if not given the one with most parameters.
        weight_decay, warmup_steps: of AdamW, and of the linear warm-up (a twentieth of `steps` if not given) before the
            cosine decay to 0. Gradients are clipped to norm 1.
        collate_fn: as in torch's DataLoader, the default of which is used where it is None.
        train: ``train(model, batches, seed)`` trains the adapter itself instead, on an iterator over `steps` batches;
            `learning_rate` and the like are then only recorded.
        path: a JSON file to which each finished run is added, in one step; runs that it has are not repeated, so that a
            sweep that was interrupted goes on, and may get more ranks and seeds. The base model's weights, the data and
            `evaluate` are not compared: another file for others.
        progress: show a progress bar on stderr.

    All random number generators are set before each batch from the seed and its number, so that neither the data (also
    where `collate_fn` draws) nor the base model's dropout depends on the rank. Initial factors of different ranks are
    different draws.

    Raises: TypeError for what is no model or function; ValueError for configs, ranks and settings that make no sense,
    and for a `path` with other settings; UnsupportedModelError (a ValueError) for a model with adapters;
    CalibrationError (a ValueError) for losses that are not finite. What PEFT, the data, `evaluate` and `train` raise
    passes through. Either way the model is without adapters and as it was, and so are the random number generators.
    """
    check_arguments(model, evaluate)
    wanted = named_configs(configs, RANKS if ranks is None and not isinstance(configs, Mapping) else ranks)
    warmup_steps = math.ceil(steps / 20) if warmup_steps is None and isinstance(steps, int) else warmup_steps
    _check(steps=(steps, 1), batch_size=(batch_size, 1), warmup_steps=(warmup_steps, 0))
    if isinstance(learning_rate, bool) or not isinstance(learning_rate, int | float) or not learning_rate > 0:
        raise ValueError(f"`learning_rate` must be a positive number; got {learning_rate!r}.")
    seeds = distinct_integers("seeds", seeds)
    if reference is not None and str(reference) not in wanted:
        raise ValueError(f"`reference` must be one of {', '.join(wanted)}; got {reference!r}.")
    if not hasattr(train_data, "__len__") or not hasattr(train_data, "__getitem__") or len(train_data) == 0:
        raise ValueError(
            f"`train_data` must be a dataset with a length and an index, and not empty, so that its order can be "
            f"fixed; got {type(train_data).__name__}."
        )
    settings = {
        "model": type(model).__name__,
        "model_params": sum(parameter.numel() for parameter in model.parameters()),
        "train_examples": len(train_data),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "warmup_steps": warmup_steps,
        "max_grad_norm": MAX_GRAD_NORM,
        "train": None if train is None else getattr(train, "__qualname__", type(train).__name__),
    }
    record = SweepRecord.open(path, settings, {name: config for name, (_, config) in wanted.items()})
    if train is None:
        train = _Plain(steps, learning_rate, weight_decay, warmup_steps or 0)
    todo = [(name, seed) for seed in seeds for name in wanted if (name, seed) not in record.runs]
    with preserved_rng(model), preserved_state(model):
        if record.base is None:
            with preserved_base(model, None):
                model.eval()
                record.set_base(losses_of(model, evaluate, "the model without an adapter"))
        with tqdm(total=len(todo) * steps, desc="rank sweep", unit="step", disable=not progress, delay=1.0) as bar:
            for name, seed in todo:
                bar.set_postfix_str(f"{name}, seed {seed}")
                batches = _batches(train_data, steps, batch_size, collate_fn, seed, bar)
                with preserved_base(model, wanted[name][1]):
                    run = _run(model, name, wanted[name][1], seed, batches, train, evaluate, len(record.base or ()))
                record.add(run)
    runs = tuple(SweepRun(**record.runs[name, seed]) for seed in seeds for name in wanted)
    params = {run.name: run.params for run in runs}
    chosen = max(wanted, key=lambda name: params[name]) if reference is None else str(reference)
    rows = tuple(
        SweptRank(
            name=name,
            rank=rank,
            params=params[name],
            loss=mean_of([math.fsum(run.losses) / len(run.losses) for run in runs if run.name == name]),
            difference=_difference(runs, name, chosen, seeds),
        )
        for name, (rank, _) in wanted.items()
    )
    base = record.base or []
    return RankSweep(chosen, mean_of(base), tuple(base), len(base), seeds, settings, runs, rows)


def _check(**values: tuple[Any, int]) -> None:
    for name, (value, least) in values.items():
        if value is None and name == "batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be an integer of at least {least}; got {value!r}.")


def _difference(runs: Sequence[SweepRun], first: str, second: str, seeds: Sequence[int]) -> PairedDifference:
    losses = {(run.name, run.seed): run.losses for run in runs}
    return paired([losses[first, seed] for seed in seeds], [losses[second, seed] for seed in seeds])


def paired(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> PairedDifference:
    """first − second, each the losses of the examples for each seed."""
    apart = torch.tensor(
        [[a - b for a, b in zip(*losses, strict=True)] for losses in zip(first, second, strict=True)],
        dtype=torch.float64,
    )
    over_seeds, over_examples = mean_of(apart.mean(1).tolist()), mean_of(apart.mean(0).tolist())
    errors = [error for error in (over_seeds.stderr, over_examples.stderr) if error is not None]
    return PairedDifference(
        over_seeds.value, math.hypot(*errors) if errors else None, over_seeds.stderr, over_examples.stderr
    )


def _batches(data: Any, steps: int, batch_size: int | None, collate_fn: Any, seed: int, bar: Any) -> Iterator[Any]:
    """`steps` batches in an order that the seed alone decides; before each all generators are set anew."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data, num_samples=steps * (batch_size or 1), generator=generator)
    loader = iter(DataLoader(data, batch_size, sampler=sampler, collate_fn=collate_fn, generator=generator))
    for step in range(steps):
        set_seed((seed * 1_000_003 + step) % 2**32)
        yield next(loader)
        bar.update()


def _run(
    model: nn.Module,
    name: str,
    config: PeftConfig,
    seed: int,
    batches: Iterator[Any],
    train: Train,
    evaluate: Evaluate,
    count: int,
) -> dict[str, Any]:
    set_seed(seed % 2**32)
    adapted = get_peft_model(model, copy.deepcopy(config))
    params = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    adapted.train()
    with torch.enable_grad():
        returned = train(adapted, batches, seed)
    train_loss = None
    if isinstance(train, _Plain):
        if not bool(torch.isfinite(returned).all()):
            step = int((~torch.isfinite(returned)).nonzero()[0, 0])
            raise CalibrationError(
                f"The training loss of {name} with seed {seed} is not finite from step {step} on: lower the learning "
                f"rate, or look at the data."
            )
        train_loss = float(returned[-max(1, len(returned) // 10) :].mean())
    adapted.eval()
    losses = losses_of(adapted, evaluate, f"{name} with seed {seed}", count)
    return {
        "name": name,
        "seed": seed,
        "params": params,
        "losses": losses,
        "train_loss": train_loss,
    }


@dataclass(frozen=True)
class _Plain:
    """AdamW, linear warm-up and cosine decay, gradients clipped to norm 1; returns the training losses (steps,)."""

    steps: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int

    def __call__(self, model: Any, batches: Iterator[Any], seed: int) -> Tensor:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = get_cosine_schedule_with_warmup(optimizer, self.warmup_steps, self.steps)
        device = parameters[0].device
        losses: list[Tensor] = []
        for batch in batches:
            loss = model(**send_to_device(batch, device)).loss
            if loss is None:
                raise CalibrationError("The model returned no loss for a training batch; give the examples labels.")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses).double()
