"""docs/studies/compression.md, from the records of `compression.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pages
import tools
from compression import LADDER, MARGIN, RANK
from pages import Claim, Row

from lorakit._figures import new_figure
from lorakit.experiments import BenchReport, read_bench

LINK = "[compression](compression.md)"
# What a layer's audit says before the cut; the mean over its modules, weighted energy: the squared norm that the cut
# takes off all of them.
NUMBERS: dict[str, Callable[[Sequence[Row]], float]] = {
    "capacity utilization": lambda modules: _mean([m["capacity_utilization"] for m in modules]),
    "stable rank": lambda modules: _mean([m["stable_rank"] for m in modules]),
    "k@90": lambda modules: _mean([m["energy_rank"]["0.9"] for m in modules]),
    "energy lost, share": lambda modules: _mean([1 - m["top1_share"] for m in modules]),
    "weighted energy lost": lambda modules: sum(m["frobenius_norm"] ** 2 * (1 - m["top1_share"]) for m in modules),
}


def build() -> list[Claim]:
    """Write the page; the rows of the index."""
    file = pages.HERE / "records" / "compression" / "bench" / "bench.json"
    if not file.exists():
        return []
    report = read_bench(file)
    report.verify()
    found = pages.records("compression")
    sections, claims = [bench_section(report)], bench_claims(report)
    if f"rank {LADDER[0]} seed {tools.SEEDS[0]}" in found:
        sections.append(ladder_section(report, found))
    if f"audit seed {tools.SEEDS[0]}" in found:
        rows = correlations(found)
        sections.append(correlation_section(rows))
        claims.append(correlation_claim(rows))
    pages.save("compression", pages.template("compression").replace("<sections>", "\n\n".join(sections)))
    return claims


def bench_section(report: BenchReport) -> str:
    """Every variant on both tasks."""
    rows = [
        (
            row["name"],
            f"{row['parameters']:,}",
            row["task"],
            pages.bounds(row["difference"], row["lower"], row["upper"]),
            ", ".join(f"{value:+.4f}" for value in row["seed_differences"]),
            pages.WORDS[row["task_verdict"]],
            "yes" if row["within_tolerance"] else "no",
            "more seeds" if row["documents_needed"] is None else f"{row['documents_needed']:,}",
        )
        for row in report.rows()
    ]
    headings = ("variant", "parameters", "task", "difference", "by seed", "nothing lost", "tolerance", "documents")
    return (
        f"## Half the rank\n\nDifferences from the adapters of rank {RANK}, which have {report.probe.parameters:,} "
        f"parameters. *Nothing lost*: at a margin of {MARGIN:g} of accuracy, or 0.05 nats. *Tolerance*: Gradience's "
        f"policy, no seed worse by more than 0.025. *Documents*: how many it would take to show that nothing is lost."
        f"\n\n{pages.table(headings, rows)}"
    )


def bench_claims(report: BenchReport) -> list[Claim]:
    """Half the rank, trained anew and cut."""
    wanted = {
        "retrained": ("half the rank, trained anew, costs nothing", "+0.2 points, worst seed −2.5"),
        "truncated": ("cut to half the rank without retraining, an adapter loses nothing", "–"),
    }
    claims = []
    for kind, (claim, paper) in wanted.items():
        rows = {
            row["task"]: row
            for row in report.rows()
            if row["method"] == kind and str(RANK // 2) in row["policies"].split(", ")
        }
        if not rows:
            continue
        accuracy, loss = rows["arc_easy"], rows["arc_easy_loss"]
        points, nats = (
            pages.bounds(row["difference"], row["lower"], row["upper"], scale)
            for row, scale in ((accuracy, 100), (loss, 1))
        )
        verdicts = [pages.WORDS[row["task_verdict"]] for row in (accuracy, loss)]
        claims.append(
            Claim(
                claim=claim,
                paper=paper,
                ours=f"{points} points; −loss {nats}",
                verdict=pages.both(*verdicts),
                documents=str(accuracy["documents"]),
                seeds=str(len(report.seeds)),
                link=LINK,
            )
        )
    return claims


def ladder_section(report: BenchReport, found: dict[str, Row]) -> str:
    """Energy kept beside what is lost, rank by rank."""
    probes = [probe_scores(report, task) for task in ("arc_easy", "arc_easy_loss")]
    rows, points = [], []
    for rank in LADDER:
        cuts = [found[f"rank {rank} seed {seed}"] for seed in tools.SEEDS]
        differences = [
            pages.difference(probe, cuts, [task])
            for probe, task in zip(probes, ("arc_easy", "arc_easy_loss"), strict=True)
        ]
        kept = [cut["energy_kept"] for cut in cuts]
        points.append((_mean(kept), differences))
        rows.append(
            (
                rank,
                ", ".join(f"{100 * share:.1f} %" for share in kept),
                pages.shown(differences[0], 100),
                pages.shown(differences[1]),
                pages.WORDS[differences[0].verdict(MARGIN)],
                pages.WORDS[differences[1].verdict(0.05)],
            )
        )
    figure = new_figure(9, 3.4)
    for axes, which, scale, label in zip(
        figure.subplots(1, 2), (0, 1), (100, 1), ("accuracy, points", "minus the loss, nats"), strict=True
    ):
        shares = [100 * share for share, _ in points]
        values = [scale * differences[which].difference for _, differences in points]
        low = [scale * (differences[which].difference - differences[which].lower) for _, differences in points]
        high = [scale * (differences[which].upper - differences[which].difference) for _, differences in points]
        axes.errorbar(shares, values, [low, high], fmt="o-")
        for share, value, rank in zip(shares, values, LADDER, strict=True):
            axes.annotate(str(rank), (share, value), xytext=(4, 4), textcoords="offset points")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(xlabel="energy kept, %", ylabel=f"cut − whole, {label}")
    (pages.DOCS / "compression").mkdir(parents=True, exist_ok=True)
    figure.savefig(pages.DOCS / "compression" / "ladder.png", dpi=110)
    headings = ("rank", "energy kept, by seed", "accuracy, points", "minus the loss", "by accuracy", "by loss")
    return (
        f"## Energy kept, and what it costs\n\nThe adapters of rank {RANK}, cut without retraining.\n\n"
        f"{pages.table(headings, rows)}\n\n![Energy kept against the difference](compression/ladder.png)"
    )


def probe_scores(report: BenchReport, task: str) -> list[Row]:
    """The uncut adapters' scores, as the records of the cuts have them."""
    return [
        {task: {"documents": report.scores["documents"][task], "scores": scores}}
        for scores in report.scores["probe"][task]
    ]


def correlations(found: dict[str, Row]) -> list[tuple[str, float, float, float]]:
    """Spearman's correlation of each number with the loss that the layer's cut costs, over layers and seeds."""
    seeds = [seed for seed in tools.SEEDS if f"audit seed {seed}" in found]
    audits = {seed: by_layer(found[f"audit seed {seed}"]["modules"]) for seed in seeds}
    layers = sorted(audits[seeds[0]], key=int)
    losses = [
        [-_mean(found[f"layer {layer} seed {seed}"]["arc_easy_loss"]["scores"]) for layer in layers] for seed in seeds
    ]
    return [
        (name, *pages.rank_correlation([[number(audits[seed][layer]) for layer in layers] for seed in seeds], losses))
        for name, number in NUMBERS.items()
    ]


def by_layer(modules: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each layer's modules."""
    layers: dict[str, list[Row]] = {}
    for module in modules:
        layers.setdefault(str(module["layer"]), []).append(module)
    return layers


def correlation_section(rows: Sequence[tuple[str, float, float, float]]) -> str:
    """Which number foretells the loss of a cut."""
    return (
        "## Which number foretells the loss\n\nOne layer's modules at a time are cut to rank 1, the others stay whole. "
        "Spearman's correlation, over the layers, of what the audit says of the layer with the loss after its cut; the "
        "mean over seeds, with a bootstrap over layers.\n\n"
        + pages.table(
            ("number", "correlation", "90 % interval"),
            [(name, f"{rho:+.2f}", f"{low:+.2f} to {high:+.2f}") for name, rho, low, high in rows],
        )
    )


def correlation_claim(rows: Sequence[tuple[str, float, float, float]]) -> Claim:
    """The best of the numbers, and whether its interval excludes 0."""
    shown = "; ".join(f"{name} {rho:+.2f} [{low:+.2f}, {high:+.2f}]" for name, rho, low, high in rows)
    told = [name for name, _, low, _ in rows if low > 0]
    return Claim(
        claim="an audit's numbers foretell what a cut costs",
        paper="said, not measured",
        ours=f"rank correlation over 30 layers: {shown}",
        verdict=f"held for {', '.join(told)}" if told else "not decided",
        documents="500",
        seeds=str(len(tools.SEEDS)),
        link=LINK,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
