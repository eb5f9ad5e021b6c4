"""Comparing a weight before and after fine-tuning: leading triplets from a Krylov space against three full SVDs.

    python benchmarks/weights.py [--size 4096] [--rounds 3] [--json]

The weight has singular values i^-0.5, roughly as trained weights do. It is changed by a merged LoRA of rank 16 in one
case and in all directions in the other. In every round both ways take turns and must agree on every figure; seconds are
of CPU time, ratios of the same round, medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from audit import spread
from torch import Tensor

from lorakit.lens.static.weight_vectors import update_numbers, vector_numbers

RANK, TOP_K, BELOW, ENERGY = 64, 10, 0.5, 0.9
AGREES = 1e-3


def compare(W: Tensor, tuned: Tensor, rank: int | None) -> dict[str, Any]:
    """What `compare_weights` computes of one weight."""
    return vector_numbers(W, tuned, rank=rank, top_k=TOP_K, intruder_below=BELOW) | update_numbers(
        tuned - W, W, ENERGY, rank=rank
    )


def check(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Every figure of the leading triplets against that of the full SVDs."""
    for key, value in expected.items():
        if key.endswith("cosine_mean"):
            continue  # over all indices there, over the leading ones here
        if key == "spectrum_shift":
            continue
        pairs = zip(found[key], value, strict=False) if isinstance(value, tuple) else [(found[key], value)]
        for a, b in pairs:
            if abs(a - b) > AGREES * max(1.0, abs(b)):
                raise SystemExit(f"{key}: {a} where full SVDs give {b}")


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    started = time.process_time()
    result = run()
    return result, time.process_time() - started


def one_round(W: Tensor, tuned: Tensor) -> tuple[float, float]:
    """Seconds of the full SVDs and of the leading triplets, whose figures agree."""
    expected, full = timed(lambda: compare(W, tuned, None))
    found, leading = timed(lambda: compare(W, tuned, RANK))
    check(found, expected)
    return full, leading


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    d = options.size
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(d, d)).Q for _ in range(2))
    W = (U * torch.arange(1, d + 1) ** -0.5) @ V
    changes = {
        "merged LoRA of rank 16": 0.01 * torch.randn(d, 16) @ torch.randn(16, d) / d**0.5,
        "all directions": 0.001 * torch.randn(d, d) / d**0.5,
    }
    results = []
    for name, change in changes.items():
        tuned = W + change
        rounds = [one_round(W, tuned) for _ in range(options.rounds)]
        results.append(
            {
                "change": name,
                "full": statistics.median(full for full, _ in rounds),
                "leading": statistics.median(leading for _, leading in rounds),
                "ratio": spread([full / leading for full, leading in rounds]),
            }
        )
    if options.json:
        print(json.dumps({"size": d, "threads": torch.get_num_threads(), "results": results}, indent=1))
        return
    for row in results:
        print(f"{row['change']}: full {row['full']:.2f} s, leading {row['leading']:.2f} s, ratio {row['ratio']}")


if __name__ == "__main__":
    main()
