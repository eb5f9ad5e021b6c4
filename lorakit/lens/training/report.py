"""A training told in one page, from the file of `SpectralCallback`; or several, side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorakit._figures import escape_mathtext, new_figure, title_name
from lorakit._format import number
from lorakit._report import Report, Table
from lorakit.lens.training.trajectory import FILE_NAME, Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Trend = Literal["rising", "falling", "level"]

_WATCHED = {"loss": "loss", "eval_loss": "eval_loss", "cu": "spectral/cu", "kappa": "spectral/kappa"}
_FEWEST = 4  # points of a trend
_FULL, _IDLE, _BLIND = 0.8, 0.4, 2.0  # CU above which rank is short and below which it is idle; κ over its chance


@dataclass(frozen=True)
class TrainingRun:
    """One training, in numbers. None for what its file does not have.

    `loss` is the mean of the last tenth of the logged losses, `cu`, `qv_gap`, `kappa` and `kappa_chance` are those of
    the last measurement, and `kappa_basis` says in which given subspaces κ is, None for those of ΔW. `trends` says of
    loss, eval_loss, cu and kappa how they were going in the last third of their points: rising or falling where the
    95 % interval of the Theil–Sen slope excludes 0, else level; nothing with fewer than four points. `advice` follows
    from these by stated rules, see `training_report`.
    """

    path: str
    method: str | None
    rank: int | None
    modules: int
    steps: int
    first_loss: float | None
    loss: float | None
    eval_loss: float | None
    best_eval_loss: float | None
    best_eval_step: int | None
    learning_rate: float | None
    grad_norm: float | None
    cu: float | None
    qv_gap: float | None
    kappa: float | None
    kappa_chance: float | None
    kappa_basis: str | None
    trends: dict[str, Trend]
    advice: tuple[str, ...]
    cut_off: bool


@dataclass(frozen=True, repr=False)
class TrainingReport(Report):
    """What `training_report` found; `trajectories` hold all measurements and logs."""

    runs: tuple[TrainingRun, ...]
    trajectories: tuple[Trajectory, ...] = field(repr=False, compare=False, metadata={"in_memory": True})

    @property
    def headline(self) -> str:
        """The run's losses and utilization, or which of several has the lowest loss."""
        if len(self.runs) == 1:
            run = self.runs[0]
            return f"{run.path}: {run.steps} steps, {_losses(run)}, CU {number(run.cu)}"
        scored = [run for run in self.runs if _score(run) is not None]
        if not scored:
            return f"{len(self.runs)} trainings without a logged loss"
        best = min(scored, key=lambda run: _score(run) or 0.0)
        kind = "evaluation loss" if best.eval_loss is not None else "training loss"
        return f"{len(self.runs)} trainings; the lowest {kind} at the end is {number(_score(best))}, of {best.path}"

    @property
    def details(self) -> tuple[str, ...]:
        """What was still changing at the end, and what to try."""
        lines = []
        for run in self.runs:
            name = "" if len(self.runs) == 1 else f"{run.path}: "
            changing = [f"{what} {trend}" for what, trend in run.trends.items() if trend != "level"]
            lines.append(f"{name}at the end: {', '.join(changing) if changing else 'nothing was changing'}")
            lines += [f"{name}{one}" for one in run.advice]
            if run.kappa_basis is not None:
                lines.append(f"{name}κ in {run.kappa_basis}")
            if run.cut_off:
                lines.append(f"{name}the file's last line is cut off: the training was killed while it was written")
        return tuple(lines)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """The page."""
        paths = " ".join(run.path for run in self.runs)
        return (f"lorakit report {paths} --html report.html",)

    def tables(self) -> list[Table]:
        """One row a run."""
        columns = [
            ("run", lambda run: run.path),
            ("r", lambda run: "" if run.rank is None else str(run.rank)),
            ("steps", lambda run: str(run.steps)),
            ("loss", lambda run: number(run.loss)),
            ("eval loss", lambda run: number(run.eval_loss)),
            ("rate", lambda run: "" if run.learning_rate is None else f"{run.learning_rate:g}"),
            ("CU", lambda run: number(run.cu)),
            ("Q–V gap", lambda run: number(run.qv_gap)),
            ("κ", lambda run: number(run.kappa)),
            ("chance", lambda run: number(run.kappa_chance)),
        ]
        return [
            Table.of(
                "",
                columns,
                self.runs,
                note="Losses and spectra at the end of the training; the learning rate, and κ by chance.",
            )
        ]

    def rows(self) -> list[dict[str, Any]]:
        """One row a run."""
        rows: list[dict[str, Any]] = self.to_dict()["runs"]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """The runs, and every step of them, as JSON data."""
        return {
            "runs": [{**vars(run), "advice": list(run.advice), "trends": dict(run.trends)} for run in self.runs],
            "trajectories": [one.to_dict() for one in self.trajectories],
        }

    def plot(self) -> Figure:
        """Loss, capacity utilization, Q–V gap and κ against steps; one colour a run, κ by chance dotted."""
        figure = new_figure(10, 7)
        panels = figure.subplots(2, 2)
        for i, (run, one) in enumerate(zip(self.runs, self.trajectories, strict=True)):
            style = {"color": f"C{i}", "label": title_name(run.path)}
            _draw(panels[0, 0], one, "loss", "-", style)
            _draw(panels[0, 0], one, "eval_loss", "o--", {"color": f"C{i}", "ms": 3})
            _draw(panels[0, 1], one, "spectral/cu", "o-", style | {"ms": 3})
            _draw(panels[1, 0], one, "spectral/qv_gap", "o-", style | {"ms": 3})
            _draw(panels[1, 1], one, "spectral/kappa", "o-", style | {"ms": 3})
            chance = [(s.step or 0, s.total.kappa_chance) for s in one.snapshots if s.total.kappa_chance is not None]
            panels[1, 1].plot([x for x, _ in chance], [y for _, y in chance], ":", color=f"C{i}")
        titles = ("Loss (evaluation dashed)", "Capacity utilization", "Q–V gap", "κ (chance dotted)")
        for panel, title in zip(panels.flat, titles, strict=True):
            panel.set(title=title, xlabel="step")
        if len(self.runs) > 1:
            panels[0, 1].legend(fontsize=8)
        figure.suptitle(escape_mathtext("Training" if len(self.runs) > 1 else f"Training of {self.runs[0].path}"))
        return figure

    def figures(self) -> dict[str, Figure]:
        """All runs in one figure, and each one's spectra by role."""
        found = {"training": self.plot()}
        for i, one in enumerate(self.trajectories, 1):
            if one.snapshots:
                found[f"spectra_{i}"] = one.plot()
        return found


def training_report(*runs: str | os.PathLike[str] | Trajectory) -> TrainingReport:
    """What one training did, or several beside each other, from the files of `SpectralCallback`.

    Advice follows from the last third of the training:

    * the loss was falling: train longer; the evaluation loss was rising: stop earlier, or take a lower rank;
    * CU at 0.8 or more: the adapter uses all of its rank, so try twice as much; below 0.4 and not rising: half of it
      holds this update;
    * κ below twice its chance value: the loss asks for directions that the adapter does not have; or, with a given
      `basis`, the gradient has left it.

    Args:
        runs: ``spectra.jsonl`` files, directories that hold one (a trainer's output directory), or trajectories.
    Raises: FileNotFoundError; ValueError for a file with other content, or one without a measurement.

    Example:
        >>> lorakit.lens.training_report("out/")  # doctest: +SKIP
    """
    if not runs:
        raise ValueError("`runs` must have at least one training; got none.")
    trajectories = [one if isinstance(one, Trajectory) else Trajectory.read(one) for one in runs]
    for one in trajectories:
        if not one.snapshots:
            raise ValueError(f"{one.path} has no measurement: was the training ended before the first step?")
    names = [_name(one, i) for i, one in enumerate(trajectories, 1)]
    return TrainingReport(
        tuple(_run(name, one) for name, one in zip(names, trajectories, strict=True)), tuple(trajectories)
    )


def trend(values: Sequence[float]) -> Trend | None:
    """How values were going in the last third of them, at least four; None for fewer.

    Rising or falling where the 95 % interval of the Theil–Sen slope (Sen 1968) excludes 0.
    """
    if len(values) < _FEWEST:
        return None
    from scipy.stats import theilslopes

    last = list(values)[-max(_FEWEST, -(-len(values) // 3)) :]
    low, high = theilslopes(last, range(len(last)), 0.95)[2:]
    return "rising" if low > 0 else "falling" if high < 0 else "level"


def _run(name: str, one: Trajectory) -> TrainingRun:
    last = one.snapshots[-1]
    losses, evaluations = _series(one, "loss")[1], _series(one, "eval_loss")
    trends = {what: found for what, metric in _WATCHED.items() if (found := trend(_series(one, metric)[1]))}
    adapter = one.config.get("adapter", {})
    part = losses[-max(1, len(losses) // 10) :]
    best = min(range(len(evaluations[1])), key=lambda i: evaluations[1][i]) if evaluations[1] else None
    measured = [seen for seen in one.snapshots if seen.total.kappa is not None]
    steps = max([last.step or 0, *(log.step for log in one.logs)])
    return TrainingRun(
        path=name,
        method=adapter.get("peft_type"),
        rank=adapter.get("r"),
        modules=last.total.modules,
        steps=steps,
        first_loss=losses[0] if losses else None,
        loss=sum(part) / len(part) if part else None,
        eval_loss=evaluations[1][-1] if evaluations[1] else None,
        best_eval_loss=None if best is None else evaluations[1][best],
        best_eval_step=None if best is None else evaluations[0][best],
        learning_rate=one.config.get("trainer", {}).get("learning_rate"),
        grad_norm=_last(_series(one, "grad_norm")[1]),
        cu=last.total.capacity_utilization,
        qv_gap=last.qv_gap,
        kappa=measured[-1].total.kappa if measured else None,
        kappa_chance=measured[-1].total.kappa_chance if measured else None,
        kappa_basis=measured[-1].kappa_basis if measured else None,
        trends=trends,
        advice=tuple(_advice(one, trends, evaluations)),
        cut_off=one.cut_off,
    )


def _advice(one: Trajectory, trends: dict[str, Trend], evaluations: tuple[list[int], list[float]]) -> list[str]:
    last = one.snapshots[-1].total
    found = []
    if trends.get("eval_loss") == "rising":
        best = min(range(len(evaluations[1])), key=lambda i: evaluations[1][i])
        found.append(
            f"the evaluation loss was lowest at step {evaluations[0][best]} and rising at the end: stop there, or try "
            f"a lower rank"
        )
    elif trends.get("loss") == "falling":
        found.append("the loss was still falling: train longer")
    cu = last.capacity_utilization
    if cu is not None and cu >= _FULL:
        found.append(f"CU is {cu:.2f}: the adapter uses all of its rank; try twice the rank")
    elif cu is not None and cu < _IDLE and trends.get("cu") != "rising":
        found.append(f"CU is {cu:.2f}: half the rank would hold this update; try it, or lorakit compress")
    measured = [seen for seen in one.snapshots if seen.total.kappa is not None]
    if measured and (measured[-1].total.kappa or 0) < _BLIND * (measured[-1].total.kappa_chance or 0):
        found.append(
            "κ is near chance: the loss asks for directions that the adapter lacks; try more modules or rank"
            if measured[-1].kappa_basis is None
            else "κ is near chance: the gradient has left the given subspaces; repeat the pilot before you rely on it"
        )
    return found


def _series(one: Trajectory, metric: str) -> tuple[list[int], list[float]]:
    try:
        return one.series(metric)
    except ValueError:
        return [], []


def _draw(axes: Axes, one: Trajectory, metric: str, line: str, style: dict[str, Any]) -> None:
    steps, values = _series(one, metric)
    if values:
        axes.plot(steps, values, line, **style)


def _name(one: Trajectory, place: int) -> str:
    if one.path is None:
        return f"training {place}"
    return os.fspath(Path(one.path).parent) if Path(one.path).name == FILE_NAME else one.path


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _score(run: TrainingRun) -> float | None:
    return run.loss if run.eval_loss is None else run.eval_loss


def _losses(run: TrainingRun) -> str:
    evaluated = "" if run.eval_loss is None else f", evaluation loss {number(run.eval_loss)}"
    return f"loss {number(run.first_loss)} → {number(run.loss)}{evaluated}"
