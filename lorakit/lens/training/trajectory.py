"""How an adapter's spectra change while it trains: snapshots in a JSONL file, and a figure of them.

Reference: "LoRA-Lens: Training Induces Spectral Compression in Low-Rank Adapters", section 2.2, Fig. 3.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import escape_mathtext, new_figure
from lorakit._files import write_file
from lorakit._format import number
from lorakit._report import Report
from lorakit.lens.training.snapshot import Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


FILE_NAME = "spectra.jsonl"


@dataclass(frozen=True)
class LoggedStep:
    """What the trainer logged at a step: `loss`, `learning_rate`, `grad_norm`, `eval_loss`, …; None for NaN."""

    step: int
    values: Mapping[str, float | None]


@dataclass(frozen=True, repr=False)
class Trajectory(Report):
    """The snapshots of one training, in the order of their steps, and the file that holds them, if any.

    `logs` are what the trainer logged meanwhile, and `config` the adapter's config with a few of the trainer's
    arguments; empty in files that have only snapshots. `cut_off` says whether the file's last line is incomplete, as
    that of a training that was killed may be; what it held is not in here.
    """

    snapshots: tuple[Snapshot, ...]
    path: str | None = field(default=None, compare=False)
    logs: tuple[LoggedStep, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    cut_off: bool = False

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Trajectory:
        """The snapshots and logs of a JSONL file that `SpectralCallback` wrote, or that lies in a directory.

        Steps that were trained twice, before and after an interruption, count as they were trained last.
        Raises: FileNotFoundError; ValueError for a file with other content.
        """
        file = Path(path)
        if file.is_dir():
            file = file / FILE_NAME
        if file.exists() and not file.is_file():
            raise ValueError(f"{os.fspath(path)!r} is no file; give a trainer's output directory or its {FILE_NAME}.")
        lines = file.read_text(encoding="utf-8").splitlines()
        snapshots: dict[int | None, Snapshot] = {}
        logs: list[LoggedStep] = []
        config: Mapping[str, Any] = {}
        cut_off = False
        for line_number, line in enumerate(lines, 1):
            try:
                plain = json.loads(line)
                if isinstance(plain, dict) and "config" in plain:
                    config = _mapping(plain["config"])
                elif isinstance(plain, dict) and "log" in plain:
                    logs.append(LoggedStep(int(plain["step"]), _mapping(plain["log"])))
                else:
                    seen = Snapshot.from_dict(plain)
                    snapshots[seen.step] = seen
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                if line_number == len(lines) and isinstance(error, json.JSONDecodeError):
                    cut_off = True
                    break
                raise ValueError(f"{file}, line {line_number}: {_why(error)}") from None
        return cls(
            tuple(sorted(snapshots.values(), key=lambda one: -1 if one.step is None else one.step)),
            os.fspath(file),
            together(logs),
            config,
            cut_off,
        )

    @property
    def headline(self) -> str:
        if not self.snapshots:
            return "no snapshots"
        first, last = self.snapshots[0], self.snapshots[-1]
        return f"{len(self.snapshots)} snapshots, steps {first.step} to {last.step}"

    @property
    def details(self) -> tuple[str, ...]:
        names = {"spectral/cu": "CU", "spectral/qv_gap": "Q–V gap", "spectral/kappa": "κ"}
        lines = []
        for metric, label in names.items():
            values = [found[metric] for one in self.snapshots if metric in (found := one.metrics())]
            if values:
                lines.append(f"{label}: {number(values[0])} at first, {number(values[-1])} at last")
        return (*lines, *(f"κ in {basis}" for basis in self.kappa_bases if basis is not None))

    @property
    def kappa_bases(self) -> tuple[str | None, ...]:
        """In which subspaces κ was measured, as `Snapshot.kappa_basis`: each once, in order of appearance."""
        return tuple(dict.fromkeys(one.kappa_basis for one in self.snapshots if one.total.kappa is not None))

    @property
    def next_steps(self) -> tuple[str, ...]:
        if self.path is None or not self.snapshots:
            return ()
        return (f'lorakit.lens.Trajectory.read({self.path!r}).plot().savefig("spectra.png")',)

    def rows(self) -> list[dict[str, Any]]:
        """One row a step: the metrics by role."""
        return [{"step": one.step, **one.metrics("roles")} for one in self.snapshots]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric of `Snapshot.metrics`, such as ``spectral/cu_query``.

        Snapshots without the metric are skipped. What the trainer logged has its own names, such as ``loss``.
        Raises: ValueError for a metric that no snapshot and no log has.
        """
        found = [
            (one.step or 0, values[metric]) for one in self.snapshots if metric in (values := one.metrics("modules"))
        ]
        found = found or [(one.step, value) for one in self.logs if (value := one.values.get(metric)) is not None]
        if not found:
            known = sorted({name for one in self.snapshots for name in one.metrics("roles")})
            known += sorted({name for one in self.logs for name in one.values})
            raise ValueError(
                f"`metric` must be one of {', '.join(known)}, or one of these for a module, such as "
                f"spectral/cu/MODULE; got {metric!r}."
            )
        return [step for step, _ in found], [value for _, value in found]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "path": self.path,
            "snapshots": [one.to_dict() for one in self.snapshots],
            "logs": [{"step": one.step, "values": dict(one.values)} for one in self.logs],
            "config": dict(self.config),
            "cut_off": self.cut_off,
        }

    def plot(self) -> Figure:
        """Capacity utilization by role, the Q–V gap and, if gradients were watched, κ, each against steps.

        Roles have the same colours in all panels. The grey band is the 10th to 90th percentile over all modules; the
        dotted lines are κ by chance.
        Raises: ValueError if there is no snapshot.
        """
        if not self.snapshots:
            raise ValueError("There is no snapshot to plot.")
        watched = any(one.total.kappa is not None for one in self.snapshots)
        panels = 3 if watched else 2
        figure = new_figure(4.6 * panels, 4)
        axes = figure.subplots(1, panels)
        self._draw_utilization(axes[0])
        self._draw_gap(axes[1])
        if watched:
            self._draw_kappa(axes[2])
        for panel in axes:
            panel.set_xlabel("step")
            panel.locator_params(axis="x", integer=True, min_n_ticks=1)
        name = "" if self.path is None else f" of {Path(self.path).parent.name or self.path}"
        figure.suptitle(escape_mathtext(f"Spectra during the training{name}"))
        return figure

    def _draw_utilization(self, axes: Axes) -> None:
        steps, low, high = self._band()
        axes.fill_between(steps, low, high, color="0.9", linewidth=0, label="10–90 % of modules")
        for name in self._roles():
            axes.plot(*self.series(f"spectral/cu_{name}"), "o-", ms=3, label=escape_mathtext(name))
        axes.set(ylabel="capacity utilization (effective rank / r)", ylim=(0, 1.02), title="Capacity utilization")
        axes.legend(fontsize=8)

    def _draw_gap(self, axes: Axes) -> None:
        gaps = [(one.step or 0, one.qv_gap) for one in self.snapshots if one.qv_gap is not None]
        axes.axhline(0, color="0.7", lw=1)
        axes.plot([step for step, _ in gaps], [gap for _, gap in gaps], "o-", ms=3, color="C3")
        title = "Q–V gap" if gaps else "Q–V gap: the adapter lacks Q or V"
        axes.set(ylabel="utilization of query − that of value", title=title)

    def _draw_kappa(self, axes: Axes) -> None:
        for i, name in enumerate(self._roles()):
            seen = [(one.step or 0, group) for one in self.snapshots if (group := one.role(name)) and group.kappa]
            steps = [step for step, _ in seen]
            axes.plot(steps, [group.kappa or 0.0 for _, group in seen], "o-", ms=3, color=f"C{i}")
            chance = [math.nan if group.kappa_chance is None else group.kappa_chance for _, group in seen]
            axes.plot(steps, chance, ":", lw=1, color=f"C{i}")
        axes.plot([], [], ":", lw=1, color="k", label="chance, by role")
        only = self.kappa_bases[0] if len(self.kappa_bases) == 1 else "different"
        whose = {None: "the adapter's", "different": "different"}.get(only, "given")
        axes.set(ylabel="κ = ‖UᵀGV‖ / ‖G‖", title=f"Gradient in {whose} subspaces")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)

    def _roles(self) -> list[str]:
        """Roles that have a finite utilization in some snapshot, in order of appearance."""
        found = (group for one in self.snapshots for group in one.roles)
        return list(dict.fromkeys(group.name for group in found if group.capacity_utilization is not None))

    def _band(self) -> tuple[list[int], list[float], list[float]]:
        steps, low, high = [], [], []
        for one in self.snapshots:
            found = (module.capacity_utilization for module in one.modules)
            values = sorted(value for value in found if value is not None)
            if values:
                steps.append(one.step or 0)
                low.append(values[round(0.1 * (len(values) - 1))])
                high.append(values[round(0.9 * (len(values) - 1))])
        return steps, low, high


def append(path: Path, snapshot: Snapshot) -> None:
    """Append one snapshot to the file."""
    _append(path, snapshot.to_dict())


def logged(step: int, logs: Mapping[str, Any]) -> LoggedStep | None:
    """What a trainer logged at a step, without the spectra; None where nothing is left but the epoch."""
    values = {key: _number(value) for key, value in logs.items() if not key.startswith("spectral/")}
    numbers = {key: value for key, value in values.items() if not isinstance(value, str)}
    return LoggedStep(step, numbers) if set(numbers) - {"epoch"} else None


def together(logs: Iterable[LoggedStep]) -> tuple[LoggedStep, ...]:
    """One log a step, with all that was logged at it, the later value where there are two."""
    found: dict[int, dict[str, float | None]] = {}
    for one in logs:
        found.setdefault(one.step, {}).update(one.values)
    return tuple(LoggedStep(step, values) for step, values in sorted(found.items()))


def append_log(path: Path, log: LoggedStep) -> None:
    """Append what a trainer logged."""
    _append(path, {"step": log.step, "log": dict(log.values)})


def append_config(path: Path, config: Mapping[str, Any]) -> None:
    """Append the run's config, JSON data."""
    _append(path, {"config": dict(config)})


def _append(path: Path, plain: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(plain))


def _number(value: Any) -> float | str | None:
    """A finite number; None for NaN and infinity, and "" for what is no number."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        return ""
    return found if math.isfinite(found) else None


def begin(path: Path, step: int) -> Trajectory:
    """Prepare the file for snapshots after `step`, and return what it holds up to there.

    Snapshots of later steps are dropped, since training repeats these steps. At step 0 a file that exists is renamed,
    with a number added to its name, and a new one is started.
    Raises: OSError if the file cannot be written; ValueError as in `Trajectory.read`.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(f"`path` must be a file, new or existing; {path} is not a file.")
    before = Trajectory(())
    if path.exists() and step == 0:
        suffix = 1
        while (kept := path.with_name(f"{path.stem}-{suffix}{path.suffix}")).exists():
            suffix += 1
        path.rename(kept)
    elif path.exists():
        before = Trajectory.read(path)
    kept_so_far = replace(
        before,
        snapshots=tuple(one for one in before.snapshots if one.step is not None and one.step <= step),
        logs=tuple(one for one in before.logs if one.step <= step),
        cut_off=False,
    )
    lines: list[Mapping[str, Any]] = [{"config": dict(before.config)}] if before.config else []
    lines += [one.to_dict() for one in kept_so_far.snapshots]
    lines += [{"step": one.step, "log": dict(one.values)} for one in kept_so_far.logs]
    write_file(path, "".join(map(_line, lines)))
    return kept_so_far


def _line(plain: Mapping[str, Any]) -> str:
    return json.dumps(plain, allow_nan=False) + "\n"


def _why(error: Exception) -> str:
    return f"it has no {error}" if isinstance(error, KeyError) else str(error)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a JSON object is needed here; got {type(value).__name__}")
    return value
