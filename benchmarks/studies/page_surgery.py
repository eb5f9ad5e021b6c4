"""docs/studies/surgery.md, from the reports that `surgery.py` keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pages
import tools
from pages import Claim, Row

from lorakit._figures import new_figure
from lorakit.statistics import control_p_value

POLICIES = ("grad_direction", "smooth_abs", "abs_select", "double_smooth", "z_score", "robust_z")
LINK = "[Spectral Surgery](surgery.md)"


def reports(stage: str) -> list[Row]:
    """The reports of one stage, an adapter each."""
    found = pages.records("surgery")
    return [found[f"{stage} {seed}"] for seed in tools.SEEDS if f"{stage} {seed}" in found]


def edits_of(report: Row, policy: str, **where: Any) -> list[Row]:
    """A policy's edits with these settings."""
    wanted = {"policy": policy, **where}
    return [edit for edit in report["edits"] if all(edit[key] == value for key, value in wanted.items())]


def controls_of(report: Row, edit: Row) -> list[Row]:
    """The random controls with an edit's modules and energy, by seed."""
    like = [c for c in report["controls"] if (c["modules"], c["energy"]) == (edit["modules"], edit["energy"])]
    return sorted(like, key=lambda control: control["seed"])


def build() -> list[Claim]:
    """Write the page; the rows of the index."""
    centre = reports("centre")
    if not centre:
        return []
    sections = [centre_section(centre)]
    claims = centre_claims(centre) if len(centre) == len(tools.SEEDS) else []  # fewer adapters make no claim
    for stage, write in (
        ("accuracy", accuracy_section),
        ("modules", factor_section("modules", "Which modules are edited", ("smooth_abs", "grad_direction"))),
        ("energies", factor_section("energy", "What is preserved", ("smooth_abs", "grad_direction"))),
        ("sizes", sizes_section),
    ):
        found = reports(stage)
        if found:
            sections.append(write(found[0]))
    decided = reports("refine")
    if decided:
        sections.append(refine_section(decided))
        claims.append(refine_claim(decided))
    plot(centre)
    text = pages.template("surgery")
    for name, value in (
        ("sections", "\n\n".join(sections)),
        ("gain", f"{summed(centre, 'grad_direction')[0]:.3f}"),
        ("seeds", ", ".join(str(seed) for seed, _ in zip(tools.SEEDS, centre, strict=False))),
        ("left", left_out(len(centre))),
    ):
        text = text.replace(f"<{name}>", value)
    pages.save("surgery", text)
    return claims


def left_out(adapters: int) -> str:
    """What has no record yet."""
    named = {
        "accuracy": "the same edits by accuracy",
        "sizes": "32 to 256 calibration examples",
        "modules": "the attention's inputs, and all modules",
        "energies": "other constraints on the energy",
        "refine": "what `refine` decides",
    }
    lines = [line for stage, line in named.items() if not reports(stage)]
    missing = len(tools.SEEDS) - adapters
    lines = [f"{missing} more adapters"] * (missing > 0) + lines
    return "\n".join(f"* {line}" for line in lines) or "Nothing."


def summed(centre: Sequence[Row], policy: str) -> tuple[float, float]:
    """The mean gain over the adapters, and its p beside as many means of random controls, one a seed."""
    edits = [edits_of(report, policy)[0] for report in centre]
    controls = [controls_of(report, edit) for report, edit in zip(centre, edits, strict=True)]
    draws = [sum(c["gain"] for c in same) / len(centre) for same in zip(*controls, strict=True)]
    gain = sum(edit["gain"] for edit in edits) / len(centre)
    return gain, control_p_value(gain, draws)


def verdict_of(centre: Sequence[Row], policy: str) -> str:
    """Whether a policy's edit is better than the adapter: every adapter's bound says so, or the other bound."""
    edits = [edits_of(report, policy)[0] for report in centre]
    if all(edit["lower"] > 0 for edit in edits):
        return "held"
    return "not held" if all(edit["upper"] < 0 for edit in edits) else "not decided"


def bounds(edit: Row, scale: float = 1.0) -> str:
    """A gain with its bounds."""
    return pages.bounds(edit["gain"], edit["lower"], edit["upper"], scale)


def centre_section(centre: Sequence[Row]) -> str:
    """Every policy on every adapter, and the controls."""
    guards = centre[0]["guards"]
    rows = []
    for policy in POLICIES:
        edits = [edits_of(report, policy)[0] for report in centre]
        gain, p = summed(centre, policy)
        changes = [sum(edit["guard_changes"][guard] for edit in edits) / len(edits) for guard in guards]
        rows.append((policy, *map(bounds, edits), f"{gain:+.4f}", f"{p:.3f}", *(f"{c:+.4f}" for c in changes)))
    controls = [[c["gain"] for c in report["controls"]] for report in centre]
    everything = [c for report in centre for c in report["controls"]]
    rows.append(
        (
            f"{len(controls[0])} random controls, least and largest",
            *(f"{min(gains):+.4f}, {max(gains):+.4f}" for gains in controls),
            f"{sum(c['gain'] for c in everything) / len(everything):+.4f}",
            "–",
            *(f"{sum(c['guard_changes'][guard] for c in everything) / len(everything):+.4f}" for guard in guards),
        )
    )
    adapters = [f"gain, adapter {i}" for i in range(len(centre))]
    headings = ("policy", *adapters, "mean", "p", *(f"change on {guard}" for guard in guards))
    return f"## Policies beside random controls\n\n{pages.table(headings, rows)}\n\n![Policies](surgery/centre.png)"


def centre_claims(centre: Sequence[Row]) -> list[Claim]:
    """Is a policy better than the adapter, and than chance; what does it cost on the guards?"""
    n = str(len(centre))
    claims = []
    for policy, paper in (
        ("grad_direction", "CSQA +0.044; seven of eight pairs gain by some policy"),
        ("smooth_abs", "between −0.038 and +0.018 of accuracy"),
    ):
        gain, p = summed(centre, policy)
        rows = [edits_of(report, policy)[0] for report in centre]
        each = ", ".join(f"{row['gain']:+.4f}" for row in rows)
        claims.append(
            Claim(
                claim=f"{policy} improves a trained adapter on the task that it is calibrated on",
                paper=paper,
                ours=f"−loss {gain:+.4f} on average ({each}); p against random edits {p:.2f}",
                verdict=verdict_of(centre, policy),
                documents="500",
                seeds=n,
                link=LINK,
            )
        )
    guards = centre[0]["guards"]
    edits = [edits_of(report, "grad_direction")[0] for report in centre]
    safe = [edits_of(report, "smooth_abs")[0] for report in centre]
    drops = [[-edit["guard_changes"][guard] for edit in side for guard in guards] for side in (edits, safe)]
    claims.append(
        Claim(
            claim="grad_direction costs more on other tasks than smooth_abs",
            paper="risk 0.42 against −0.01 to 0.04",
            ours=f"largest drop on a guard {max(drops[0]):+.4f} against {max(drops[1]):+.4f} nats",
            verdict="held" if all(a > b for a, b in zip(*drops, strict=True)) else "not on every guard and adapter",
            documents="250, 78",
            seeds=n,
            link=LINK,
        )
    )
    return claims


def plot(centre: Sequence[Row]) -> None:
    """The gains of every policy, an adapter a panel, over the controls."""
    figure = new_figure(4 * len(centre), 3.4)
    axes = figure.subplots(1, len(centre), sharey=True, squeeze=False)[0]
    for i, (panel, report) in enumerate(zip(axes, centre, strict=True)):
        gains = [control["gain"] for control in report["controls"]]
        panel.scatter([0] * len(gains), gains, color="0.75", label="random controls")
        for x, policy in enumerate(POLICIES, 1):
            edit = edits_of(report, policy)[0]
            panel.errorbar(
                x,
                edit["gain"],
                [[edit["gain"] - edit["lower"]], [edit["upper"] - edit["gain"]]],
                fmt="o",
                color="tab:blue",
            )
        panel.axhline(0, color="0.6", linewidth=0.8)
        panel.set_xticks(range(len(POLICIES) + 1), ["controls", *POLICIES], rotation=30, ha="right")
        panel.set_title(f"adapter {i}")
    axes[0].set_ylabel("gain on ARC-Easy: minus the loss")
    (pages.DOCS / "surgery").mkdir(parents=True, exist_ok=True)
    figure.savefig(pages.DOCS / "surgery" / "centre.png", dpi=110)


def accuracy_section(report: Row) -> str:
    """The centre's edits by accuracy."""
    (guard,) = report["guards"]
    rows = [
        (
            edit["policy"],
            bounds(edit, 100),
            f"{control_p_value(edit['gain'], [c['gain'] for c in controls_of(report, edit)]):.2f}",
            f"{100 * edit['guard_changes'][guard]:+.1f}",
        )
        for edit in report["edits"]
    ]
    gains = [100 * control["gain"] for control in report["controls"]]
    rows.append(("random controls, least and largest", f"{min(gains):+.1f}, {max(gains):+.1f}", "–", "–"))
    return "## By accuracy\n\nThe first adapter, in points.\n\n" + pages.table(
        ("policy", "gain on ARC-Easy", "p", "change on OpenBookQA"), rows
    )


def factor_section(factor: str, title: str, policies: Sequence[str]) -> Callable[[Row], str]:
    """One factor at a time on the first adapter, with the controls that share its setting."""

    def section(report: Row) -> str:
        rows = []
        for policy in policies:
            for edit in edits_of(report, policy):
                gains = [control["gain"] for control in controls_of(report, edit)]
                changes = (edit["guard_changes"][guard] for guard in report["guards"])
                rows.append(
                    (
                        policy,
                        edit[factor],
                        bounds(edit),
                        f"{control_p_value(edit['gain'], gains):.2f}",
                        f"{min(gains):+.4f}, {max(gains):+.4f}",
                        *(f"{change:+.4f}" for change in changes),
                    )
                )
        headings = ("policy", factor, "gain", "p", "controls", *(f"change on {guard}" for guard in report["guards"]))
        return f"## {title}\n\nThe first adapter.\n\n{pages.table(headings, rows)}"

    return section


def sizes_section(report: Row) -> str:
    """Calibration sizes: each draw's gain."""
    sizes = sorted({edit["num_examples"] for edit in report["edits"]})
    policies = list(dict.fromkeys(edit["policy"] for edit in report["edits"]))
    rows = [
        (
            policy,
            *(
                ", ".join(f"{edit['gain']:+.4f}" for edit in edits_of(report, policy, num_examples=size))
                for size in sizes
            ),
        )
        for policy in policies
    ]
    return "## How many examples\n\nThe first adapter; a gain for each draw of examples.\n\n" + pages.table(
        ("policy", *(f"{size} examples" for size in sizes)), rows
    )


def refine_section(decided: Sequence[Row]) -> str:
    """What `refine` decided on each adapter."""
    rows = []
    for i, report in enumerate(decided):
        gain = "–" if report["task"] is None else f"{report['task']['difference']:+.4f}"
        p = "–" if report["p_value"] is None else f"{report['p_value']:.2f}"
        chosen = f"{report['policy']} × {report['strength']:g}" if report["policy"] else "–"
        rows.append((i, chosen, gain, p, report["verdict"], "kept" if report["kept"] else "given back"))
    return (
        "## What `refine` decides\n\nIt chooses a policy and a strength on 128 examples, and decides on the test "
        "documents, which chose nothing, with both guards and 19 random controls.\n\n"
        + pages.table(("adapter", "edit", "gain", "p", "verdict", "decision"), rows)
    )


def refine_claim(decided: Sequence[Row]) -> Claim:
    """How often an edit that was chosen by measurement is kept."""
    kept = sum(report["kept"] for report in decided)
    return Claim(
        claim="an edit that is chosen on other documents stands on the test documents, its guards and its controls",
        paper="–",
        ours=f"kept on {kept} of {len(decided)} adapters",
        verdict="held" if kept == len(decided) else "not held" if not kept else "not decided",
        documents="500",
        seeds=str(len(decided)),
        link=LINK,
    )
