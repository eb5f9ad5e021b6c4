"""Merging a pair of Llama-3.1-8B-shaped adapters: all 224 modules in factor space, beside a dense merge of a few.

    python benchmarks/merge.py [--rank 16] [--dtype fp32] [--dense 3] [--repeats 3] [--threads 1] [--json]

Correctness first: the merge on disk against the dense float64 sum, and its cut against that sum's SVD, on the smallest
module. Then `lorakit.merging.merge` as a whole, from files to verified files, and a dense merge (sum of the ΔW, thin
SVD, cut) of one module of each of `--dense` shapes; the dense time for all modules is their sum, each times the number
of modules of its shape. Medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from audit import DTYPES, make, spread

from lorakit.adapters import Adapter, open_adapter
from lorakit.merging import merge

WEIGHTS = (0.6, 0.4)


def dense_sum(adapters: list[Adapter], name: str, dtype: torch.dtype) -> torch.Tensor:
    total = 0.0
    for adapter, weight in zip(adapters, WEIGHTS, strict=True):
        (module,) = (module for module in adapter.modules if module.name == name)
        total = total + weight * adapter.factors(module).to(dtype=dtype).dense()
    return total


def dense_merge(adapters: list[Adapter], name: str, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    U, S, Vh = torch.linalg.svd(dense_sum(adapters, name, torch.float32), full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def check(adapters: list[Adapter], merged: Adapter, rank: int) -> float:
    """The merge's error relative to the norm of what it should be, on the smallest module."""
    module = min(merged.modules, key=lambda module: module.d_out * module.d_in)
    exact = dense_sum(adapters, module.name, torch.float64)
    U, S, Vh = torch.linalg.svd(exact, full_matrices=False)
    best = U[:, :rank] * S[:rank] @ Vh[:rank]
    error = float((merged.factors(module).to(dtype=torch.float64).dense() - best).norm() / best.norm())
    eps = torch.finfo(module.dtype).eps
    if error > max(1e-5, 2 * eps):
        raise SystemExit(f"wrong merge of {module.name}: error {error:.1e}")
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--dense", type=int, default=3, help="shapes, from the smallest, that are merged densely")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        paths = [make(root / name, arguments.rank, DTYPES[arguments.dtype], seed) for seed, name in enumerate("ab")]
        adapters = [open_adapter(path) for path in paths]
        results: dict[str, object] = {"rank": arguments.rank, "dtype": arguments.dtype, "threads": arguments.threads}
        for label, options in {"exact": {}, "cut": {"rank": arguments.rank}}.items():
            seconds = []
            for _ in range(arguments.repeats):
                started = time.perf_counter()
                merge(paths, root / label, weights=WEIGHTS, **options)
                seconds.append(time.perf_counter() - started)
            error = check(adapters, open_adapter(root / label), arguments.rank * (1 if options else 2))
            results[label] = {"seconds": spread(seconds), "error": error}
        shapes = Counter((module.d_out, module.d_in) for module in adapters[0].modules)
        total = 0.0
        dense: dict[str, object] = {}
        for shape in sorted(shapes, key=lambda shape: shape[0] * shape[1])[: arguments.dense]:
            name = next(m.name for m in adapters[0].modules if (m.d_out, m.d_in) == shape)
            seconds = []
            for _ in range(arguments.repeats if shape[0] < 4096 else 1):
                started = time.perf_counter()
                dense_merge(adapters, name, arguments.rank)
                seconds.append(time.perf_counter() - started)
            dense[f"{shape[0]} x {shape[1]}"] = {"seconds": spread(seconds), "modules": shapes[shape]}
            total += statistics.median(seconds) * shapes[shape]
        results["dense"] = {"shapes": dense, "seconds_for_all_of_these_shapes": total}
    if arguments.json:
        print(json.dumps(results))
        return
    for label in ("exact", "cut"):
        row = results[label]
        print(f"{label:6} all 224 modules {row['seconds']['median']:8.2f} s   error {row['error']:.1e}")
    for shape, row in dense.items():
        print(f"dense  one {shape:14} {row['seconds']['median']:8.2f} s   of {row['modules']}")
    print(f"dense  all of these shapes {total:8.1f} s")


if __name__ == "__main__":
    main()
