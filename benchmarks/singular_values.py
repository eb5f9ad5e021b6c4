"""Singular values of every adapted module of Llama-3.1-8B, one module a call: `LowRank` against QR + SVD in float32.

    python benchmarks/singular_values.py [--ranks 16 64] [--repeats 7] [--cpu-time] [--json]

First both are checked against float64. Then, after a warm-up, passes over all 224 modules alternate between the two.
Reported are medians, with minimum and maximum. The calls take turns with a few copies of each shape.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lorakit.spectral import LowRank

LAYERS = 32
SHAPES = {  # (d_out, d_in)
    "q_proj": (4096, 4096),
    "k_proj": (1024, 4096),
    "v_proj": (1024, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096),
    "up_proj": (14336, 4096),
    "down_proj": (4096, 14336),
}
COPIES = 4
Factors = tuple[Tensor, Tensor]
Clock = Callable[[], float]


def qr_svd(B: Tensor, A: Tensor) -> Tensor:
    return torch.linalg.svdvals(torch.linalg.qr(B).R @ torch.linalg.qr(A.mT).R.mT)


def lorakit(B: Tensor, A: Tensor) -> Tensor:
    return LowRank(B, A).singular_values()


METHODS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"qr_svd": qr_svd, "lorakit": lorakit}


def modules(rank: int, *, graded: bool) -> dict[str, list[Factors]]:
    """Gaussian factors. If `graded`, their condition number is 1e6, and no scaling of columns reduces it."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator)).Q
    mix = torch.logspace(0, -6, rank)[:, None] * mix if graded else torch.eye(rank)
    return {
        name: [
            (torch.randn(d_out, rank, generator=generator) @ mix, torch.randn(rank, d_in, generator=generator))
            for _ in range(COPIES)
        ]
        for name, (d_out, d_in) in SHAPES.items()
    }


def worst_error(data: dict[str, list[Factors]], method: Callable[[Tensor, Tensor], Tensor]) -> float:
    """Largest error of a singular value, relative to the largest, against QR + SVD in float64."""
    errors = []
    for copies in data.values():
        for B, A in copies:
            exact = qr_svd(B.double(), A.double())
            errors.append(float((method(B, A).double() - exact).abs().max() / exact[0]))
    return max(errors)


def one_pass(
    data: dict[str, list[Factors]], method: Callable[[Tensor, Tensor], Tensor], clock: Clock
) -> dict[str, float]:
    """Seconds per module type, over all layers."""
    spent = dict.fromkeys(data, 0.0)
    for layer in range(LAYERS):
        for name, copies in data.items():
            B, A = copies[layer % COPIES]
            start = clock()
            method(B, A)
            spent[name] += clock() - start
    return spent


def measure(rank: int, repeats: int, clock: Clock, *, graded: bool) -> dict[str, object]:
    data = modules(rank, graded=graded)
    errors = {name: worst_error(data, method) for name, method in METHODS.items()}
    if errors["lorakit"] > 1e-6:
        raise SystemExit(f"wrong singular values: error {errors['lorakit']:.1e} of the largest, at rank {rank}")
    for method in METHODS.values():
        one_pass(data, method, clock)
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    for _ in range(repeats):
        for name, method in METHODS.items():
            passes[name].append(one_pass(data, method, clock))
    totals = {name: [sum(spent.values()) for spent in runs] for name, runs in passes.items()}
    median = {name: statistics.median(times) for name, times in totals.items()}
    by_module = {name: {m: statistics.median(run[m] for run in runs) for m in SHAPES} for name, runs in passes.items()}
    return {
        "rank": rank,
        "factors": "graded" if graded else "random",
        "error": errors,
        "seconds": {n: {"median": median[n], "min": min(t), "max": max(t)} for n, t in totals.items()},
        "ratio": median["qr_svd"] / median["lorakit"],
        "ratio_by_module": {m: by_module["qr_svd"][m] / by_module["lorakit"][m] for m in SHAPES},
    }


def table(result: dict) -> str:
    lines = [f"rank {result['rank']}, {result['factors']} factors, {LAYERS * len(SHAPES)} modules"]
    for name, seconds in result["seconds"].items():
        spread = f"{1e3 * seconds['min']:.0f}–{1e3 * seconds['max']:.0f}"
        error = result["error"][name]
        lines.append(f"  {name:8} {1e3 * seconds['median']:8.1f} ms  ({spread}), worst error {error:.1e} σ_max")
    lines.append(f"  ratio    {result['ratio']:8.2f}×")
    lines.append("  " + "  ".join(f"{name} {ratio:.2f}×" for name, ratio in result["ratio_by_module"].items()))
    return "\n".join(lines)


def processor() -> str:
    """The processor's name, where the system says it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cpu-time", action="store_true", help="instead of wall time: of all threads, on a busy machine"
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    cases = [(rank, graded) for graded in (False, True) for rank in options.ranks]
    results = [measure(rank, options.repeats, clock, graded=graded) for rank, graded in cases]
    if options.json:
        print(
            json.dumps(
                {
                    "threads": torch.get_num_threads(),
                    "torch": torch.__version__,
                    "processor": processor(),
                    "results": results,
                }
            )
        )
        return
    which = "CPU" if options.cpu_time else "wall"
    print(f"{processor()}, torch {torch.__version__}, torch.set_num_threads({torch.get_num_threads()}), {which} time")
    print("median (min–max) of passes")
    for result in results:
        print(table(result))


if __name__ == "__main__":
    main()
