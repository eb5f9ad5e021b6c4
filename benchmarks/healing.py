"""What healing gains on the ladder of docs/evidence/arc-easy.md: held-out loss of each rank, cut alone and healed.

    python benchmarks/healing.py DIR

DIR is the `--out` of benchmarks/arc_easy.py after its stage `train`. The texts are the prompts of the training
questions, without their answers. Each rank is one record in DIR/healing/; what is there is not measured again. The page
docs/evidence/healing.md is written from the records when all are there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

STEPS, LEARNING_RATE, RANKS, DOCUMENTS, LENGTH = 40, 1e-4, (16, 8, 4, 2, 1), 300, 128


def measure(rank: int, questions: Path) -> dict[str, Any]:
    """The scores of the adapter, of it cut to a rank, and of that healed, on the same documents; and the KL."""
    from lorakit import evaluation
    from lorakit.compress import truncate
    from lorakit.compress._heal import HealSettings, prepare
    from lorakit.data import tokenizer_for

    base = evaluation.load_base("base")
    task = evaluation.loss("test_loss.jsonl", name="answers", length=LENGTH)
    settings = HealSettings(steps=STEPS, learning_rate=LEARNING_RATE, length=LENGTH, seed=0)
    healing = prepare(base, "adapter", str(questions), tokenizer_for("base"), settings, progress=True)
    scores: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        cut = str(Path(directory, "cut"))
        energy = truncate("adapter", cut, max_rank=rank).energy_kept
        for name in ("adapter", "cut", "healed"):
            healed = healing.heal(base, cut) if name == "healed" else None
            with evaluation._attach.adapted(base, "adapter" if name == "adapter" else cut) as model:
                found = evaluation.evaluate(
                    model, task, limit=DOCUMENTS, tokenizer=tokenizer_for("base"), cache="cache"
                )
            scores[name] = list(found["answers"].scores)
        agreement = None if healed is None else {"before": healed.kl_before, "after": healed.kl_after}
    return {"rank": rank, "energy_kept": energy, "scores": scores, "kl": agreement}


def page(records: list[dict[str, Any]]) -> str:
    """docs/evidence/healing.md."""
    from lorakit.evaluation import paired_interval

    lines = [
        "| rank | energy kept | KL on its texts | cut − adapter | healed − adapter | healed − cut |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    gains, shares = [], []
    for record in records:
        scores = record["scores"]
        pairs = [("adapter", "cut"), ("adapter", "healed"), ("cut", "healed")]
        intervals = [paired_interval(scores[one], scores[other]) for one, other in pairs]
        gains.append((record["rank"], intervals[-1]))
        shares.append(intervals[-1].difference / -intervals[0].difference)
        cells = [f"{i.difference:+.4f} [{i.lower:+.4f}, {i.upper:+.4f}]" for i in intervals]
        kl = f"{record['kl']['before']:.4f} → {record['kl']['after']:.4f}"
        lines.append(f"| {record['rank']} | {record['energy_kept']:.1%} | {kl} | " + " | ".join(cells) + " |")
    better = [str(rank) for rank, gain in gains if gain.lower > 0]
    worse = [str(rank) for rank, gain in gains if gain.upper < 0]
    return TEMPLATE.format(
        steps=STEPS,
        rate=LEARNING_RATE,
        documents=len(records[0]["scores"]["cut"]),
        better=", ".join(better) or "no rank",
        worse=", ".join(worse) or "no rank",
        least=f"{min(shares):.0%}",
        most=f"{max(shares):.0%}",
        table="\n".join(lines),
    )


TEMPLATE = """# What healing gains

Healing made the held-out loss better at rank {better}, and worse at {worse} (both bounds of healed − cut on one side of
0). It gave back {least} to {most} of what the cut had lost: a higher rank helps more. It is off unless asked for.

The adapter of [ARC-Easy](arc-easy.md), rank 64, was cut to each rank of the ladder and healed in {steps} steps of 8
texts at a learning rate of {rate:g}: the questions that it was trained on, without their answers. Scores are minus the
loss of the right answer, in nats a token, on {documents} test questions; differences have one-sided bounds, each at
level 0.05. Written by `benchmarks/healing.py`.

{table}

The KL divergence is that from the original's predictions, in nats a token, in the first and the last tenth of the
steps.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    docs = Path(__file__).resolve().parents[1] / "docs" / "evidence"
    os.chdir(options.out)
    Path("healing").mkdir(exist_ok=True)
    questions = Path("healing/questions.jsonl")
    rows = [json.loads(line) for line in Path("train.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [json.dumps({"text": row["prompt"]}) for row in rows[: 8 * STEPS]]
    questions.write_text("\n".join(texts) + "\n", encoding="utf-8")
    records = []
    for rank in RANKS:
        path = Path(f"healing/rank-{rank}.json")
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(measure(rank, questions)), encoding="utf-8")
            partial.replace(path)
        records.append(json.loads(path.read_text(encoding="utf-8")))
    (docs / "healing.md").write_text(page(records), encoding="utf-8")
    (docs / "healing.json").write_text(json.dumps(records), encoding="utf-8")


if __name__ == "__main__":
    main()
