"""The demo's results: a table with verdicts, and what to do with one's own model."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit._figures import new_figure
from lorakit._format import count, number, share, size
from lorakit._report import Report, Table
from lorakit.demo._settings import DemoSettings
from lorakit.demo._stages import COMPRESSED, DIRECTORIES, Verdicts, Written
from lorakit.demo._training import LORA, OTHER_SEED
from lorakit.errors import Finding
from lorakit.evaluation import Certificate
from lorakit.statistics import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_ADAPTER = "no adapter"
# A file computes what was trained if no logit differs by more than this share of the largest; rounding is 1e-6.
EXPORT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class DemoRow:
    """One line of the table. Losses are means over held-out documents, in nats a token.

    `against_lora` is the loss less that of the trained LoRA, document by document, with one-sided bounds. `parameters`
    are those trained; of the compressed LoRA, those of its file. `file_rank` is the rank of the plain LoRA as written,
    and `file_error` the largest difference of a logit of the file, loaded by PEFT, relative to the largest logit.
    """

    method: str
    directory: str | None
    parameters: int
    loss: float
    against_lora: float | None = None
    lower: float | None = None
    upper: float | None = None
    verdict: Verdict | None = None
    documents_needed: int | None = None
    file_rank: int | None = None
    file_error: float | None = None
    training_loss: tuple[float, ...] = ()
    seconds_per_step: float | None = None
    utilization_q: float | None = None
    utilization_v: float | None = None

    @property
    def bounds(self) -> tuple[float, float, float] | None:
        """The difference from the LoRA and its bounds; None for the LoRA."""
        if self.against_lora is None or self.lower is None or self.upper is None:
            return None
        return self.against_lora, self.lower, self.upper


@dataclass(frozen=True, repr=False)
class DemoReport(Report):
    """What the demo found. `documents` are numbers of training passages and of calibration and held-out documents."""

    lorakit: str
    settings: DemoSettings
    base: str
    threads: int
    seconds: float
    documents: Mapping[str, int]
    recommended_rank: int
    size_bytes: tuple[int, int]
    energy_kept: float
    methods: tuple[DemoRow, ...]
    findings: tuple[Finding, ...]

    @property
    def title(self) -> str:
        """What was run."""
        settings = self.settings
        steps = f"{settings.steps} steps of {settings.batch_size} × {settings.length} tokens"
        return f"lorakit demo on {settings.model_name}: {steps}"

    @property
    def headline(self) -> str:
        """How many files PASS."""
        return _headline([row.verdict for row in self._files], self.settings.margin, self.documents["held_out"])

    @property
    def details(self) -> tuple[str, ...]:
        """What to compare the differences with."""
        rows = {row.method: row for row in self.methods}
        control = rows[NO_ADAPTER]
        before, after = self.size_bytes
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return (
            f"The model without an adapter, as a control: {control.verdict}.",
            f"Another seed changes the LoRA's loss by {rows[OTHER_SEED].against_lora:+.4f}.",
            f"The audit recommends rank {self.recommended_rank} of {self.settings.r}: {size(before)} → {size(after)}, "
            f"{self.energy_kept:.1%} of the energy kept.",
            f"{self.documents['train']} training passages, {self.documents['calibration']} calibration and "
            f"{self.documents['held_out']} held-out documents, none in two parts; {threads}, "
            f"{self.seconds / 60:.1f} minutes.",
            "One text and few steps: the demo shows that the methods work, not which is better.",
        )

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Commands on what the demo wrote, which are those for one's own adapter."""
        out = Path(self.settings.out)
        lora, small = (shlex.quote(str(out / DIRECTORIES[method])) for method in (LORA, COMPRESSED))
        base, held_out = shlex.quote(self.base), shlex.quote(str(out / "held-out.jsonl"))
        margin, width = f"{self.settings.margin:g}", max(map(len, (lora, base, held_out)))
        return (
            f"lorakit audit {lora} --suggest-ranks",
            f"lorakit compress {lora} {small} --max-rank {self.recommended_rank}",
            f"lorakit certify --base {base} {lora} {small} --task {held_out} --margin {margin}",
            f"lorakit servable {small}",
            "# With your own model, put in place of",
            f"#   {lora:<{width}}  your adapter, a directory or a Hub id",
            f"#   {base:<{width}}  the model that it was trained on",
            f"#   {held_out:<{width}}  texts or questions that it has not seen",
        )

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> DemoReport:
        """The report from a results.json."""
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        rows = [DemoRow(**{**row, "training_loss": tuple(row["training_loss"])}) for row in data["methods"]]
        data |= {"settings": DemoSettings(**data["settings"]), "size_bytes": tuple(data["size_bytes"])}
        findings = tuple(Finding(**finding) for finding in data["findings"])
        return cls(**{**data, "methods": tuple(rows), "findings": findings})

    def rows(self) -> list[dict[str, Any]]:
        """One row a method."""
        rows: list[dict[str, Any]] = self.to_dict()["methods"]
        return rows

    def tables(self) -> list[Table]:
        """The verdicts; and, on the page only, what came of the trainings."""
        confidence = f"{1 - self.settings.alpha:.0%}"
        verdicts: list[tuple[str, Any]] = [
            ("method", lambda row: row.method),
            ("params", lambda row: count(row.parameters)),
            (" loss", lambda row: f"{row.loss:.4f}"),
            (" against LoRA", _difference),
            (" verdict", lambda row: row.verdict or "reference"),
            (" rank", lambda row: "" if row.file_rank is None else str(row.file_rank)),
            (" error", lambda row: "" if row.file_error is None else f"{row.file_error:.0e}"),
        ]
        training: list[tuple[str, Any]] = [
            ("method", lambda row: row.method),
            ("first loss", lambda row: f"{row.training_loss[0]:.4f}"),
            ("last loss", lambda row: f"{row.training_loss[-1]:.4f}"),
            ("seconds a step", lambda row: number(row.seconds_per_step)),
            ("utilization of query", lambda row: share(row.utilization_q)),
            ("utilization of value", lambda row: share(row.utilization_v)),
        ]
        note = (
            f"Losses are means over held-out documents, in nats a token; differences are document by document, ± their "
            f"one-sided {confidence} bound. PASS: less than {self.settings.margin:g} above the LoRA's loss, with "
            f"{confidence} confidence; FAIL: more, likewise. rank and error are those of the file, a plain LoRA: the "
            f"largest difference of its logits from those of the model that was trained or edited, relative."
        )
        trained = [row for row in self.methods if row.training_loss]
        return [
            Table.of("", verdicts, self.methods, note=note),
            Table.of("Trainings, on the same passages in the same order", training, trained, long=True),
        ]

    def figures(self) -> dict[str, Figure]:
        """The figures "verdicts" and "training"."""
        figure = new_figure(7, 4)
        self._draw_training(figure.subplots())
        return {"verdicts": self.plot(), "training": figure}

    def plot(self) -> Figure:
        """Each file's difference from the LoRA with its bounds, beside the margin."""
        figure = new_figure(7, 3.6)
        axes = figure.subplots()
        rows = self._files
        for place, row in enumerate(rows):
            if row.bounds is not None:
                difference, lower, upper = row.bounds
                error = [[difference - lower], [upper - difference]]
                axes.errorbar([difference], [place], xerr=error, fmt="o", capsize=4, color=f"C{place}")
        axes.axvline(0, color="gray", linewidth=1)
        axes.axvline(self.settings.margin, color="black", linestyle="--", linewidth=1, label="margin")
        axes.set_yticks(range(len(rows)), [f"{row.method}: {row.verdict}" for row in rows])
        axes.invert_yaxis()
        axes.set(xlabel="held-out loss less the LoRA's (nats a token), with one-sided bounds")
        axes.legend(loc="best")
        return figure

    def _draw_training(self, axes: Axes) -> None:
        trained = {row.method: row.training_loss for row in self.methods if row.training_loss}
        for method, losses in trained.items():
            differences = [loss - reference for loss, reference in zip(losses, trained[LORA], strict=True)]
            axes.plot(range(1, len(losses) + 1), differences, label=method)
        axes.set(xlabel="step", ylabel="training loss less the LoRA's (nats a token)")
        axes.locator_params(axis="x", integer=True)
        axes.legend()

    @property
    def _files(self) -> list[DemoRow]:
        return [row for row in self.methods if row.method not in (NO_ADAPTER, LORA)]


@dataclass(frozen=True, repr=False)
class CertificatesReport(Report):
    """The certificates of all files, by method."""

    certificates: Mapping[str, Certificate]

    @property
    def title(self) -> str:
        """The heading."""
        return "Certificates"

    @property
    def headline(self) -> str:
        """How many files PASS."""
        found = list(self.certificates.values())
        return _headline([one.verdict for one in found], found[0].margin, found[0].tasks[0].n)

    @property
    def details(self) -> tuple[str, ...]:
        """How to read and verify them."""
        return (
            "A score is minus a document's loss: higher is better, and PASS is a lower bound above −margin.",
            "Each is bound to the hashes of weights, data and settings: lorakit certify --verify FILE verifies it.",
        )

    def rows(self) -> list[dict[str, Any]]:
        """One row a certificate."""
        return [{"method": method, **row} for method, one in self.certificates.items() for row in one.rows()]

    def tables(self) -> list[Table]:
        """One row a certificate."""
        columns: list[tuple[str, Any]] = [
            ("file", lambda one: f"certificates/{Path(one.candidate[0]).name}.json"),
            ("difference", lambda one: f"{one.difference:+.4f}"),
            ("lower", lambda one: f"{one.lower:+.4f}"),
            ("upper", lambda one: f"{one.upper:+.4f}"),
            ("margin", lambda one: f"{one.margin:g}"),
            ("documents", lambda one: str(one.tasks[0].n)),
            ("needed", lambda one: str(one.documents_needed)),
            ("verdict", lambda one: one.verdict),
            ("SHA-256", lambda one: one.sha256[:16]),
        ]
        note = "needed: documents with which an adapter as good as the LoRA would PASS with probability 0.8."
        return [Table.of("", columns, self.certificates.values(), note=note)]

    def figures(self) -> dict[str, Figure]:
        """None: the table has all of it."""
        return {}


def rows_of(files: Sequence[Written], verdicts: Verdicts, margin: float) -> tuple[DemoRow, ...]:
    """The table's rows: the model alone, the LoRA, and every other file against it."""
    alone = verdicts.no_adapter
    rows = [
        DemoRow(
            method=NO_ADAPTER,
            directory=None,
            parameters=0,
            loss=verdicts.no_adapter_loss,
            against_lora=-alone.difference,
            lower=-alone.upper,
            upper=-alone.lower,
            verdict=alone.verdict(margin),
            documents_needed=alone.documents_needed(margin),
        )
    ]
    order = list(DIRECTORIES)
    for one in sorted(files, key=lambda one: order.index(one.method)):
        found, trained = verdicts.certificates.get(one.method), one.trained
        row: dict[str, Any] = {"loss": verdicts.loss}
        if found is not None:
            row = {"loss": -found.tasks[0].candidate_mean, "against_lora": -found.difference, "lower": -found.upper}
            row |= {"upper": -found.lower, "verdict": found.verdict, "documents_needed": found.documents_needed}
        if trained is not None:
            row |= {"training_loss": trained.losses, "seconds_per_step": trained.seconds_per_step}
            row |= {"utilization_q": trained.utilization_q, "utilization_v": trained.utilization_v}
        row |= {"file_rank": one.rank, "file_error": verdicts.errors.get(one.method)}
        rows.append(DemoRow(one.method, DIRECTORIES[one.method], one.parameters, **row))
    return tuple(rows)


def findings_of(rows: Sequence[DemoRow]) -> tuple[Finding, ...]:
    """An error for each file whose logits are not those of the model that it was written from."""
    return tuple(
        Finding(
            "error",
            "file_differs",
            None,
            f"{row.method}: the logits of {row.directory} differ from those of the model it was written from by "
            f"{row.file_error:.1e} of the largest; {EXPORT_TOLERANCE:g} is allowed.",
        )
        for row in rows
        if row.file_error is not None and not row.file_error <= EXPORT_TOLERANCE
    )


def _headline(verdicts: Sequence[str | None], margin: float, documents: int) -> str:
    found = Counter(verdicts)
    words = ", ".join(f"{found[verdict]} {verdict}" for verdict in ("PASS", "FAIL", "INCONCLUSIVE") if found[verdict])
    return f"{words} against the LoRA, on {documents} held-out documents, at a margin of {margin:g} nats a token."


def _difference(row: DemoRow) -> str:
    """The difference and how far its bounds reach, which t bounds do on both sides alike."""
    if row.bounds is None:
        return ""
    difference, lower, upper = row.bounds
    return f"{difference:+.4f} ±" + f"{(upper - lower) / 2:.4f}".lstrip("0")
