"""The whole process `lorakit audit DIR --json` on Llama-3.1-8B-shaped adapters, beside `import torch` and its peers.

    python benchmarks/audit.py [--ranks 16 64] [--dtypes bf16 fp32] [--repeats 7] [--threads 1] [--peers BIN] [--json]

Makes synthetic adapters (32 layers × 7 modules). Correctness comes first: norms and singular values against float64 QR.
Then processes take turns; medians with minimum and maximum of wall time, and peak memory. BIN is a directory with the
commands `gradience` and `adaptersentry` (by default those on the path; left out where there are none).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from lorakit.adapters import open_adapter
from lorakit.lens import audit

LAYERS = 32
SHAPES = {  # (d_out, d_in)
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def make(directory: Path, rank: int, dtype: torch.dtype, seed: int = 0) -> Path:
    """An adapter whose spectra decay faster in later layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        decay = torch.logspace(0, -1 - layer / LAYERS, rank)
        for name, (d_out, d_in) in SHAPES.items():
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = (torch.randn(rank, d_in, generator=generator) / d_in**0.5).to(dtype)
            tensors[f"{key}.lora_B.weight"] = (torch.randn(d_out, rank, generator=generator) * 0.02 * decay).to(dtype)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(SHAPES)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def check(directory: Path) -> float:
    """The worst error of a singular value in a layer's modules, relative to the largest, against QR in float64."""
    adapter = open_adapter(directory)
    rows = {row.module_name: row for row in audit(adapter).modules}
    worst = 0.0
    for module in adapter.modules:
        if module.layer not in (0, LAYERS - 1):
            continue
        update = adapter.factors(module)
        R, T = (torch.linalg.qr(factor.double()).R for factor in (update.B, update.A.mT))
        exact = torch.linalg.svdvals(R @ T.mT) * update.scaling
        got = torch.tensor(rows[module.name].singular_values, dtype=torch.float64)
        norm = abs(rows[module.name].frobenius_norm / exact.square().sum().sqrt() - 1)
        worst = max(worst, float((got - exact).abs().max() / exact[0]), float(norm))
    if worst > 1e-6:
        raise SystemExit(f"wrong singular values in {directory}: error {worst:.1e} of the largest")
    return worst


def commands(directory: Path, peers: Path | None) -> dict[str, list[str]]:
    found = {
        "import torch": [sys.executable, "-c", "import torch"],
        "lorakit": [sys.executable, "-m", "lorakit", "audit", str(directory), "--json"],
    }
    peer = {
        "gradience": ["audit", "--peft-dir", str(directory), "--json"],
        "adaptersentry": ["scan", str(directory / "adapter_model.safetensors"), "--format", "json"],
    }
    for name, arguments in peer.items():
        path = shutil.which(name, path=None if peers is None else str(peers))
        if path is not None:
            found[name] = [path, *arguments]
    return found


# A small process starts the one that is measured: Linux counts a parent's memory as its child's peak.
LAUNCHER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
seconds = time.perf_counter() - start
print(json.dumps([os.waitstatus_to_exitcode(status), seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024]))
"""


def run(command: list[str], threads: int) -> tuple[float, float, float]:
    """Seconds of wall time, seconds of CPU time and peak MB of one process."""
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        capture_output=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    code, *measured = json.loads(done.stdout)
    if code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    wall, cpu, megabytes = measured
    return wall, cpu, megabytes


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def measure(directory: Path, repeats: int, threads: int, peers: Path | None) -> dict:
    error = check(directory)
    them = commands(directory, peers)
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in them}
    for command in them.values():
        run(command, threads)
    for _ in range(repeats):
        for name, command in them.items():
            runs[name].append(run(command, threads))
    seconds, cpu, memory = ({name: spread([one[i] for one in taken]) for name, taken in runs.items()} for i in range(3))
    base = seconds["import torch"]["median"]
    return {
        "adapter": directory.name,
        "error": error,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "megabytes": memory,
        "allowed_seconds": 1.25 * base + 0.5,
        "memory_over_torch": memory["lorakit"]["median"] / memory["import torch"]["median"],
    }


def table(result: dict) -> str:
    lines = [f"{result['adapter']}: worst error {result['error']:.1e} of σ_max"]
    for name, seconds in result["seconds"].items():
        lines.append(
            f"  {name:14} {seconds['median']:6.2f} s ({seconds['min']:.2f}–{seconds['max']:.2f})"
            f"  CPU {result['cpu_seconds'][name]['median']:5.2f} s"
            f"  {result['megabytes'][name]['median']:5.0f} MB"
        )
    lines.append(f"  1.25 × import torch + 0.5 s = {result['allowed_seconds']:.2f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="threads of every process (OMP_NUM_THREADS)")
    parser.add_argument("--peers", type=Path, help="directory with the peers' commands")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for rank in options.ranks:
            for name in options.dtypes:
                directory = make(Path(scratch, f"r{rank}-{name}"), rank, DTYPES[name])
                results.append(measure(directory, options.repeats, options.threads, options.peers))
                shutil.rmtree(directory)
    if options.json:
        print(json.dumps({"threads": options.threads, "torch": torch.__version__, "results": results}))
        return
    print(
        f"torch {torch.__version__}, {options.threads} threads a process; medians (min–max) of {options.repeats} runs"
    )
    for result in results:
        print(table(result))


if __name__ == "__main__":
    main()
