"""What a comparison of methods reports: each method's scores, its difference from the reference, and what it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import message_figure
from lorakit._format import count
from lorakit._report import Table
from lorakit.errors import EvaluationError, Finding
from lorakit.experiments._compare_verdicts import MethodScores, MethodTask, MethodVerdict, compared, overall, verdicts
from lorakit.experiments._signed_report import (
    DrawnDifference,
    SignedReport,
    difference_panels,
    draw_differences,
    read_signed,
    same_figures,
    tuples_of,
)
from lorakit.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JSON_NAME = "methods.json"


@dataclass(frozen=True)
class TriedRate:
    """A learning rate that was tried with the first seed, and the mean losses that the choice rests on."""

    learning_rate: float
    validation_loss: float
    train_loss: float | None


@dataclass(frozen=True)
class ComparedMethod:
    """One method of a comparison, trained with every seed at one learning rate.

    `parameters` are those that the method trains, without the `head_parameters` of new modules that every method trains
    in full. `tried` are the learning rates that it was chosen from, empty where it was given. `train_loss` and
    `train_seconds` are means over seeds. `verdict` is None without margins, and of the reference.
    """

    name: str
    peft_type: str
    parameters: int
    head_parameters: int
    learning_rate: float
    tried: tuple[TriedRate, ...]
    train_loss: float
    train_seconds: float
    adapters: tuple[str, ...]
    verdict: MethodVerdict | None
    tasks: tuple[MethodTask, ...]

    @property
    def at_edge(self) -> bool:
        """Whether the chosen learning rate is the smallest or the largest of those that were tried."""
        rates = [one.learning_rate for one in self.tried]
        return bool(rates) and self.learning_rate in (min(rates), max(rates))


@dataclass(frozen=True, repr=False)
class MethodsReport(SignedReport):
    """What `lorakit.experiments.compare_methods` found.

    `verdict` is None without margins; else PASS where a method PASSes against the reference, FAIL where all of them
    FAIL, else INCONCLUSIVE. `data` says what was trained on. `sha256` is of everything else.
    """

    _kind = "comparison"
    _format = "lorakit-methods-1"
    _file = JSON_NAME

    verdict: Verdict | None
    base: str
    model: str
    reference: str
    seeds: tuple[int, ...]
    alpha: float
    methods: tuple[ComparedMethod, ...]
    findings: tuple[Finding, ...]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    hashes: Mapping[str, Any]
    environment: Mapping[str, Any]
    created: str
    scores: MethodScores
    sha256: str = ""

    @property
    def title(self) -> str:
        return f"Methods on {self.base}"

    @property
    def headline(self) -> str:
        """The result on the first task, in one line."""
        task = self.methods[0].tasks[0].name
        if len(self.methods) == 1:
            return (
                f"{self.reference} scores {self.methods[0].tasks[0].mean:.4f} on {task}, over {len(self.seeds)} seeds."
            )
        rows = {method.name: method.tasks[0] for method in self.methods if method.name != self.reference}
        better = [name for name, row in rows.items() if row.outcome == "better"]
        worse = [name for name, row in rows.items() if row.outcome == "worse"]
        return (
            f"On {task}, of {len(rows)} methods {len(better)} are shown to be better than {self.reference}"
            f"{_listed(better)}, {len(worse)} to be worse{_listed(worse)}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        """What was trained on, and how the bounds are made."""
        lines = [
            f"trained on {self.data['documents']} documents, {self.data['steps']} steps, seeds "
            f"{', '.join(map(str, self.seeds))}"
        ]
        if any(method.tried for method in self.methods):
            lines.append(
                f"learning rates: by the loss on {self.data['validation']} other documents, with seed {self.seeds[0]}"
            )
        lines.append(f"bounds: one-sided, each at level {self.alpha:g}, over seeds and documents; outcomes: Holm's")
        return tuple(lines)

    def rows(self) -> list[dict[str, Any]]:
        """One row a method and task."""
        return [
            {
                "method": method.name,
                "peft_type": method.peft_type,
                "parameters": method.parameters,
                "head_parameters": method.head_parameters,
                "learning_rate": method.learning_rate,
                "at_edge": method.at_edge,
                "train_loss": method.train_loss,
                "train_seconds": method.train_seconds,
                "task": task.name,
                **{key: value for key, value in asdict(task).items() if key != "name"},
                "verdict": None if method.verdict is None else method.verdict.verdict,
            }
            for method in self.methods
            for task in method.tasks
        ]

    def tables(self) -> list[Table]:
        """One row a method for every task; then the learning rates, and what each seed scored."""
        names = [task.name for task in self.methods[0].tasks]
        note = f"diff: method − {self.reference}, paired by seed and document, with one-sided bounds. outcome: after "
        note += f"Holm's adjustment over {len(self.methods) - 1} methods, so stricter than these bounds."
        columns = _COLUMNS if self.verdict is None else [*_COLUMNS, _VERDICT]
        found = [
            Table.of(name, columns, [(method, method.tasks[i]) for method in self.methods], note=note)
            for i, name in enumerate(names)
        ]
        tried = [(method, one) for method in self.methods for one in method.tried]
        found.append(Table.of("Learning rates", _RATE_COLUMNS, tried, long=True))
        each = [(method, task) for method in self.methods for task in method.tasks]
        columns = [_COLUMNS[0], ("task", lambda cell: cell[1].name)]
        columns += [(f"seed {seed}", _seed(place)) for place, seed in enumerate(self.seeds)]
        found.append(Table.of("Seeds", columns, each, long=True))
        return [table for table in found if table.rows]

    def plot(self) -> Figure:
        """Each method's difference from the reference with its bounds and seeds: one panel a task."""
        if len(self.methods) == 1:
            return message_figure("Methods", "one method: there is nothing to compare it with")
        figure, panels = difference_panels(len(self.methods[0].tasks), len(self.methods))
        others = [method for method in self.methods if method.name != self.reference]
        for place, (axes, first) in enumerate(zip(panels, self.methods[0].tasks, strict=True)):
            rows = [_drawn(method, method.tasks[place]) for method in others]
            margin = self.settings["margins"].get(first.name)
            draw_differences(axes, rows, margin, title=first.name, of=f"method − {self.reference}")
        return figure

    def verify(self) -> None:
        """Compute the hash and every figure anew from the scores.

        Raises: EvaluationError where one of them is not what the report says.
        """
        self._check_signature()
        rows = compared(self.scores, self.reference, self.alpha)
        margins = self.settings["margins"]
        judged = verdicts(self.scores, self.reference, margins, self.alpha) if margins else {}
        for method in self.methods:
            verdict = judged.get(method.name)
            stated = [[asdict(task) for task in method.tasks], method.verdict and asdict(method.verdict)]
            if not same_figures(stated, [[asdict(row) for row in rows[method.name]], verdict and asdict(verdict)]):
                raise EvaluationError(
                    f"The comparison does not verify: the figures of {method.name} are not those of its scores."
                )
        if self.verdict != overall([one.verdict for one in judged.values()]):
            raise EvaluationError("The comparison does not verify: its verdict is not that of its scores.")


def read_methods(path: str | os.PathLike[str]) -> MethodsReport:
    """A report from its `methods.json`; not verified.

    Raises: EvaluationError where the file is none.
    """
    return read_signed(path, MethodsReport, _report)


def _report(content: dict[str, Any]) -> MethodsReport:
    methods = tuple(_method(row) for row in content["methods"])
    return MethodsReport(**content | {"methods": methods, "scores": MethodScores(**content["scores"])})


def _method(row: dict[str, Any]) -> ComparedMethod:
    verdict = row["verdict"]
    return ComparedMethod(
        **row
        | {
            "tried": tuple(TriedRate(**one) for one in row["tried"]),
            "adapters": tuple(row["adapters"]),
            "verdict": None if verdict is None else MethodVerdict(**verdict),
            "tasks": tuple(MethodTask(**tuples_of(task)) for task in row["tasks"]),
        }
    )


def _drawn(method: ComparedMethod, task: MethodTask) -> DrawnDifference:
    difference, lower, upper = (number or 0.0 for number in (task.difference, task.lower, task.upper))
    color = _COLORS[task.outcome or "not shown"]
    return DrawnDifference(method.name, color, difference, lower, upper, task.seed_differences or ())


def _listed(names: list[str]) -> str:
    return f" ({', '.join(names)})" if names else ""


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.4f}"


def _seed(place: int) -> Any:
    return lambda cell: f"{cell[1].seed_means[place]:.4f}"


_COLORS = {"better": "#2a7f3f", "worse": "#b00020", "not shown": "#8a5a00"}
_VERDICT: tuple[str, Any] = ("verdict", lambda cell: "" if cell[0].verdict is None else cell[0].verdict.verdict)
_COLUMNS: list[tuple[str, Any]] = [
    ("method", lambda cell: cell[0].name),
    ("params", lambda cell: count(cell[0].parameters)),
    ("rate", lambda cell: f"{cell[0].learning_rate:g}"),
    ("mean", lambda cell: f"{cell[1].mean:.4f}"),
    ("diff", lambda cell: _signed(cell[1].difference)),
    ("lower", lambda cell: _signed(cell[1].lower)),
    ("upper", lambda cell: _signed(cell[1].upper)),
    ("outcome", lambda cell: cell[1].outcome or "reference"),
]
_RATE_COLUMNS: list[tuple[str, Any]] = [
    ("method", lambda cell: cell[0].name),
    ("rate", lambda cell: f"{cell[1].learning_rate:g}"),
    ("validation loss", lambda cell: f"{cell[1].validation_loss:.4f}"),
    ("train loss", lambda cell: "" if cell[1].train_loss is None else f"{cell[1].train_loss:.4f}"),
    ("chosen", lambda cell: "yes" if cell[1].learning_rate == cell[0].learning_rate else ""),
]
