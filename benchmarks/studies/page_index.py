"""docs/studies/index.md: one table, a row a claim, from the records of the studies and of the pages before them."""

from __future__ import annotations

import json
from typing import Any

import pages
from pages import DOCS, Claim

from lorakit.experiments import read_bench


def earlier() -> list[Claim]:
    """The rows whose records are in docs/: LoRA-Lens's experiments, the bench on ARC-Easy, merges."""
    return [*_lora_lens(), *_gradience(), *_merges()]


def _json(path: str) -> Any:
    return json.loads((DOCS.parent / path).read_text(encoding="utf-8"))


def _lora_lens() -> list[Claim]:
    found, link = _json("lora-lens-study/results.json"), "[experiments](../lora-lens-study.md)"
    common = {"documents": "128", "seeds": "3", "link": link}
    trained = {row["rank"]: row["groups"] for row in found["conditions"]}
    all_cu = [trained[rank]["all"]["trained"] for rank in sorted(trained)]
    gaps = [groups["query"]["trained"] - groups["value"]["trained"] for groups in trained.values()]
    query = {row["rank"]: row for row in found["sweeps"]["Q"]}
    value = {row["rank"]: row for row in found["sweeps"]["V"]}
    start, *later = found["fisher"]
    ratios = [ratio["value"] for stage in later for ratio in stage["ratios"]]
    return [
        Claim(
            claim="training compresses an adapter's spectra: capacity utilization far below random factors'",
            paper="0.43 to 0.83",
            ours=f"{min(all_cu):.2f} to {max(all_cu):.2f}; random factors {trained[64]['all']['random']:.2f} and more",
            verdict="held",
            **common | {"documents": "–", "seeds": "1 (3 at r = 16)"},
        ),
        Claim(
            claim="values are compressed more than queries",
            paper="by a factor of 2 to 3",
            ours=f"CU of Q − V {min(gaps):.2f} to {max(gaps):.2f}; random factors at most 0.03",
            verdict="held",
            **common | {"documents": "–", "seeds": "1 (3 at r = 16)"},
        ),
        Claim(
            claim="values are more Fisher-sensitive than queries at every stage",
            paper="30 to 350 times",
            ours=f"{_range([ratio['value'] for ratio in start['ratios']])} times at step 0, {_range(ratios)} later",
            verdict="held; later in training the number is unsteady",
            **common | {"documents": "16"},
        ),
        Claim(
            claim="reducing the query rank to 4 costs nothing",
            paper="no significant change of accuracy",
            ours=f"loss {_rise(query[4])} nats a token",
            verdict="not held, though the cost is small",
            **common,
        ),
        Claim(
            claim="keeping V and shrinking Q is better than the opposite",
            paper="0.006 against 0.067 of accuracy lost at worst",
            ours=f"loss {_rise(query[4])} against {_rise(value[4])}, at 55 % and 70 % of the parameters",
            verdict="held",
            **common,
        ),
    ]


def _rise(row: dict[str, Any]) -> str:
    """A rise of the loss, with the larger of its standard errors over seeds and over sequences."""
    error = max(row["rise_se_over_seeds"], row["rise_se_over_sequences"])
    return f"+{row['rise']:.4f} ± {error:.4f}"


def _range(values: list[float]) -> str:
    return f"{min(values):.0f} to {max(values):.0f}"


def _gradience() -> list[Claim]:
    bench = read_bench(DOCS.parent / "evidence" / "arc-easy" / "bench.json")
    rows = {row["name"]: row for row in bench.rows()}
    link = "[one adapter on ARC-Easy](../evidence/arc-easy.md)"
    claims = []
    for kind, claim in (
        ("truncated", "cut to the rank that an audit suggests, without retraining, an adapter loses nothing"),
        ("retrained", "retrained at that rank, it loses nothing, or is better"),
    ):
        row = rows[f"global_median, {kind}"]
        bounds = pages.bounds(row["difference"], row["lower"], row["upper"])
        claims.append(
            Claim(
                claim=claim,
                paper="half the rank: +0.2 points, worst seed −2.5" if kind == "retrained" else "–",
                ours=f"a quarter of the rank: −loss {bounds}",
                verdict=f"{pages.WORDS[row['verdict']]} at 0.05 nats"
                + (" (a training of 40 steps, in which a lower rank learns less far)" if kind == "retrained" else ""),
                documents="200",
                seeds="3",
                link=link,
            )
        )
    return claims


def _merges() -> list[Claim]:
    found = _json("evidence/merges/records.json")["correlations"]["all merges"]["strength"]
    return [
        Claim(
            claim="the overlap of two adapters foretells what a merge keeps of each",
            paper="said, not measured",
            ours=f"Spearman {found['rho']:+.2f} [{found['lower']:+.2f}, {found['upper']:+.2f}] over "
            f"{found['merges']} merges",
            verdict="held over all recipes; not shown within two of four",
            documents="40",
            seeds="1",
            link="[merges](../evidence/merges.md)",
        )
    ]


def build(claims: list[Claim], left: list[str]) -> None:
    """Write the page; `left` says what has not been run."""
    rows = [
        (one.claim, one.paper, one.ours, one.verdict, one.documents, one.seeds, one.link)
        for one in [*claims, *earlier()]
    ]
    text = pages.template("index")
    text = text.replace(
        "<table>", pages.table(("claim", "in the paper", "here", "verdict", "documents", "seeds", "page"), rows)
    )
    pages.save("index", text.replace("<open>", "\n".join(f"* {line}" for line in left)))
