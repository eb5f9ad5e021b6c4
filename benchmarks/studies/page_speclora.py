"""docs/studies/speclora.md, from the reports of `lorakit bench` on the recipes of the SpecLoRA study."""

from __future__ import annotations

import json

import pages
from pages import Claim, Row

from lorakit.experiments import MethodsReport, read_methods
from lorakit.experiments._compare_verdicts import interval_between

REPORTS = {"cola": "speclora_cola_minilm", "rte": "speclora_rte_minilm"}
# What the papers' tables say of DeBERTaV3-base on CoLA, in points of Matthews' correlation.
PAIRS: tuple[tuple[str, str, str, float | None], ...] = (
    ("SpecLoRA is better than LoRA", "SpecLoRA", "LoRA", 1.91),
    ("and not because it has more parameters", "SpecLoRA", "LoRA, equal parameters", None),
    ("the top block is better than the bottom block", "SpecLoRA", "hadamard_bottom", 0.46),
    ("the bottom block too is better than LoRA", "hadamard_bottom", "LoRA", 1.45),
    ("SpecLoRA is better than DoRA", "SpecLoRA", "DoRA", 1.73),
    ("rescaling a block does what rescaling singular directions does", "SpecLoRA", "svd", None),
    ("of the singular directions the top ones are better", "svd", "svd_bottom", None),
    ("ks from a probe are better than one k", "k from a probe", "SpecLoRA", None),
    ("it matters which module has which k", "k from a probe", "shuffled k", None),
)


def build() -> list[Claim]:
    """Write the page; the rows of the index."""
    found = {
        name: read_methods(pages.HERE / "records" / "speclora" / f"{file}.json")
        for name, file in REPORTS.items()
        if (pages.HERE / "records" / "speclora" / f"{file}.json").exists()
    }
    if "cola" not in found:
        return []
    claims, sections = [], []
    for name, report in found.items():
        report.verify()
        rows = comparisons(report)
        pages.forest(
            pages.DOCS / "speclora" / f"{name}.png",
            [(f"{row['candidate']} − {row['reference']}", row["loss"]) for row in rows],
            "difference of minus the held-out loss, nats a document",
        )
        sections.append(section(name, report, rows))
        claims += [claim(name, report, row) for row in rows]
    text = pages.template("speclora").replace("<sections>", "\n\n".join(sections))
    for name, value in numbers(found["cola"]).items():
        text = text.replace(f"<{name}>", value)
    pages.save("speclora", text)
    return claims


def numbers(report: MethodsReport) -> dict[str, str]:
    """What the page's text says in numbers."""
    file = pages.HERE / "records" / "speclora" / f"{REPORTS['cola']}_masks.json"
    masks = json.loads(file.read_text(encoding="utf-8"))
    rates = {method.name: method.learning_rate for method in report.methods}
    used = [
        row
        for name, row in masks.items()
        for method in report.methods
        if method.peft_type == "SPECLORA"
        and name.startswith(f"{method.name.replace(' ', '-')}-learning-rate-{method.learning_rate:g}-")
    ]
    losses = [-method.tasks[1].mean for method in report.methods]
    edge = [method for method in report.methods if method.at_edge]
    rate = rates["SpecLoRA"]
    return {
        "count": {9: "Nine"}.get(len(report.methods), str(len(report.methods))),
        "seeds": str(len(report.seeds)),
        "edge": f"For {len(edge)} of them the chosen learning rate is at the edge of the grid." if edge else "",
        "spread": f"{max(abs(loss - losses[0]) for loss in losses):.4f}",
        "moved": f"{sum(row['mean'] for row in used) / len(used):.3f}",
        "largest": f"{max(row['largest'] for row in used):.2f}",
        "steps": str(report.data["steps"]),
        "allowed": f"{rate * report.data['steps'] / 2:.2f}",
    }


def comparisons(report: MethodsReport) -> list[Row]:
    """Each pair of methods that is there, on the first task and on the loss."""
    first, loss = (task.name for task in report.methods[0].tasks)
    names = {method.name for method in report.methods}
    return [
        {
            "claim": claim,
            "candidate": candidate,
            "reference": reference,
            "paper": paper,
            "score": interval_between(report.scores, reference, candidate, first, report.alpha),
            "loss": interval_between(report.scores, reference, candidate, loss, report.alpha),
        }
        for claim, candidate, reference, paper in PAIRS
        if {candidate, reference} <= names
    ]


def section(name: str, report: MethodsReport, rows: list[Row]) -> str:
    """The tables of one data set."""
    metric = {"cola": "Matthews' correlation", "rte": "accuracy"}[name]
    methods = pages.table(
        ("method", "parameters", "learning rate", f"{metric} × 100", "by seed", "held-out loss"),
        [
            (
                method.name,
                f"{method.parameters:,}",
                f"{method.learning_rate:g}" + (" (edge)" if method.at_edge else ""),
                f"{100 * method.tasks[0].mean:.1f}",
                ", ".join(f"{100 * value:.1f}" for value in method.tasks[0].seed_means),
                f"{-method.tasks[1].mean:.4f}",
            )
            for method in report.methods
        ],
    )
    pairs = pages.table(
        ("claim", "in the paper", f"{metric} × 100", "minus the loss", "verdict by score", "by loss", "for 1 point"),
        [
            (
                row["claim"],
                in_paper(row),
                pages.shown(row["score"], 100),
                pages.shown(row["loss"]),
                by_score(row),
                pages.better(row["loss"]),
                pages.needed(row["score"], 0.01),
            )
            for row in rows
        ],
    )
    documents = report.methods[0].tasks[0].documents
    return (
        f"## {name.upper() if name == 'rte' else 'CoLA'}\n\n{methods}\n\n{documents} test documents, seeds "
        f"{', '.join(map(str, report.seeds))}, {report.data['steps']} steps on {report.data['documents']} documents; "
        f"learning rates by the loss on {report.data['validation']} others, with seed {report.seeds[0]}. Head "
        f"parameters, the same for all, are not counted.\n\n{pairs}\n\n*Less than the paper's*: the bounds exclude a "
        f"difference as large as that. *For 1 point*: the test documents that it would take, with as many seeds, to "
        f"tell such a difference from none.\n\n![Differences](speclora/{name}.png)"
    )


def claim(name: str, report: MethodsReport, row: Row) -> Claim:
    """A row of the index."""
    metric = {"cola": "Matthews' correlation × 100", "rte": "points of accuracy"}[name]
    return Claim(
        claim=f"{row['claim']} ({'CoLA' if name == 'cola' else 'RTE'})",
        paper=in_paper(row) if name == "cola" else "–",
        ours=f"{pages.shown(row['score'], 100)} ({metric}); −loss {pages.shown(row['loss'])}",
        verdict=pages.both(by_score(row), pages.better(row["loss"])),
        documents=str(report.methods[0].tasks[0].documents),
        seeds=str(len(report.seeds)),
        link="[SpecLoRA](speclora.md)",
    )


def in_paper(row: Row) -> str:
    return "–" if row["paper"] is None else f"{row['paper']:+.2f}"


def by_score(row: Row) -> str:
    """The verdict, and whether a difference as large as the paper's is excluded."""
    word = pages.better(row["score"])
    excluded = row["paper"] is not None and 100 * row["score"].upper < row["paper"]
    return f"{word}; less than the paper's" if excluded and word != "not held" else word
