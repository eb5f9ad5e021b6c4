"""How many adapters a second one core audits, and whether memory grows with their number.

    python benchmarks/fleet.py [--small 1000] [--large 50] [--in DIRECTORY] [--ray] [--json]

Makes adapters with the shapes of SmolLM2-135M (r = 8 on query and value projections and r = 16 on all linear modules,
by turns, bfloat16) and of Llama-3.1-8B (r = 16 on all linear modules, bfloat16), and removes them at the end. Among
them are copies under a random gauge, near copies, and broken files. Correctness comes first: norms against float64
products, and the duplicates and broken files must be those that were made. Each fleet is audited in a fresh process:
adapters a second of CPU time, one thread, and the peak of memory, for a tenth of the fleet and for all of it, with and
without a cache. With --ray, two workers must give the same report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]
LLAMA = {  # (d_out, d_in)
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}
SMOL = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.gate_proj": (1536, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
EVERY = 25  # of so many adapters one is a copy under a gauge, one a near copy, and one broken
AUDIT = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
from lorakit import fleet
started = time.process_time()
report = fleet.audit(sys.argv[1], cache=sys.argv[2] or None, progress=False)
seconds = time.process_time() - started
print(json.dumps({"seconds": seconds, "adapters": len(report.adapters), "report": report.to_dict(),
                  "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def shapes_of(kind: str, i: int) -> tuple[dict[str, tuple[int, int]], int, int]:
    """The modules of a layer, the number of layers, and the rank."""
    if kind == "large":
        return LLAMA, 32, 16
    if i % 2:
        return SMOL, 30, 16
    return {name: SMOL[name] for name in ("self_attn.q_proj", "self_attn.v_proj")}, 30, 8


def draw(kind: str, i: int) -> Factors:
    """Random factors whose singular values fall off, as trained ones do."""
    shapes, layers, rank = shapes_of(kind, i)
    generator = torch.Generator().manual_seed(i)
    decay = torch.arange(1, rank + 1) ** -1.0
    return {
        f"model.layers.{layer}.{name}": (
            0.01 * decay * torch.randn(d_out, rank, generator=generator),
            torch.randn(rank, d_in, generator=generator),
        )
        for layer in range(layers)
        for name, (d_out, d_in) in shapes.items()
    }


def gauged(factors: Factors, seed: int, noise: float) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, (B, A) in factors.items():
        G = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator)).Q
        found[name] = ((B + noise * 0.01 * torch.randn(B.shape, generator=generator)) @ G, G.mT @ A)
    return found


def write(directory: Path, factors: Factors, base: str) -> None:
    directory.mkdir(parents=True)
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.bfloat16().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.bfloat16().contiguous()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    rank = len(next(iter(factors.values()))[1])
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "base_model_name_or_path": base}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def make(root: Path, kind: str, count: int) -> dict[str, str]:
    """Write a fleet; what is special in it, by name."""
    special = {}
    for i in range(count):
        name, turn = f"{i:05}", i % EVERY
        if turn == 5:  # each of these is about the adapter four before, which has the same shapes
            write(root / name, gauged(draw(kind, i - 4), i, 0.0), kind)
            special[name] = "same_update"
        elif turn == 10:
            write(root / name, gauged(draw(kind, i - 4), i, 0.03), kind)
            special[name] = "near"
        else:
            write(root / name, draw(kind, i), kind)
        if turn == 15:
            weights = root / name / "adapter_model.safetensors"
            os.truncate(weights, weights.stat().st_size - 1000)
            special[name] = "broken"
    return special


def check(report: dict[str, object], special: dict[str, str], kind: str) -> None:
    """What the report says, against what was made and against dense float64 products."""
    rows: list[dict[str, object]] = report["adapters"]  # type: ignore[assignment]
    said = {Path(str(row["path"])).name: "broken" for row in rows if row["error_type"]}
    for group in report["duplicates"]:  # type: ignore[attr-defined]
        for each in group["duplicates"]:
            said[Path(each["path"]).name] = each["kind"]
            if int(Path(each["path"]).name) - 4 != int(Path(group["path"]).name):
                raise SystemExit(f"{each['path']} is no duplicate of {group['path']}")
    made = {name: what for name, what in special.items() if int(name) < len(rows)}
    if said != made:
        raise SystemExit(f"found {set(said.items()) ^ set(made.items())}")
    squared = 0.0
    for B, A in draw(kind, 0).values():
        B64, A64 = B.bfloat16().double(), A.bfloat16().double()
        squared += float(((B64.mT @ B64) * (A64 @ A64.mT)).sum())
    norm = 2 * squared**0.5
    if abs(float(rows[0]["frobenius_norm"]) - norm) > 1e-5 * norm:  # type: ignore[arg-type]
        raise SystemExit(f"norm {rows[0]['frobenius_norm']} where float64 gives {norm}")


def audited(root: Path, cache: str = "") -> dict[str, object]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", AUDIT, str(root), cache], capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def same_on_ray(root: Path, expected: object) -> None:
    import ray

    from lorakit import fleet
    from lorakit.experiments import RayExecutor

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    with RayExecutor() as executor:
        found = fleet.audit(root, executor=executor, progress=False)
    ray.shutdown()
    if found.to_dict() != expected:
        raise SystemExit("two workers of Ray gave another report")


def measure(parent: Path, kind: str, count: int, on_ray: bool) -> list[dict[str, object]]:
    root, part = parent / kind, parent / f"{kind}-part"
    special = make(root, kind, count)
    part.mkdir()
    for path in sorted(root.iterdir())[: max(1, count // 10)]:
        (part / path.name).symlink_to(path)
    results = []
    cache = str(parent / f"{kind}-cache")
    for what, where, records in (
        ("a tenth", part, ""),
        ("all", root, cache),
        ("all, from the cache", root, cache),
    ):
        found = audited(where, records)
        check(found["report"], special, kind)  # type: ignore[arg-type]
        report: dict[str, object] = found.pop("report")  # type: ignore[assignment]
        rate = float(found["adapters"]) / float(found["seconds"])  # type: ignore[arg-type]
        size = report["summary"]["size_bytes"]  # type: ignore[index]
        results.append({"kind": kind, "what": what, "rate": rate, "size_bytes": size, **found})
    if on_ray:
        same_on_ray(root, report)
        results[-1]["same_on_ray"] = True
    stored = [path.stat().st_size for path in Path(cache).rglob("*.json")]
    results[-1]["cache_bytes_per_adapter"] = sum(stored) / count
    shutil.rmtree(root)
    return results


def seconds_a_pair(count: int = 20_000) -> float:
    """CPU seconds in which one thread compares two sketches, as the search for duplicates does, beyond any cache."""
    torch.set_num_threads(1)
    sketches = torch.nn.functional.normalize(torch.randn(count, 64), dim=1)
    found = []
    for _ in range(3):
        started = time.process_time()
        for start in range(0, count, 800):
            block = sketches[start : start + 800] @ sketches[: start + 800].mT
            for row in block:
                (row >= 0.99).nonzero()
        found.append((time.process_time() - started) / (count * (count - 1) / 2))
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", type=int, default=1000)
    parser.add_argument("--large", type=int, default=50)
    parser.add_argument("--in", dest="where", help="where the adapters are made; by default the temporary directory")
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.where) as parent:
        results = []
        for kind, count in (("small", options.small), ("large", options.large)):
            if count:
                results += measure(Path(parent), kind, count, options.ray)
    pair = seconds_a_pair()
    if options.json:
        print(json.dumps({"fleets": results, "seconds_a_pair": pair}))
        return
    for row in results:
        stored = row.get("cache_bytes_per_adapter")
        print(
            f"{row['kind']:5} {row['what']:20} {row['adapters']:6} adapters ({float(row['size_bytes']) / 1e9:.2f} GB): "
            f"{row['rate']:8.2f} a second of CPU time, peak {float(row['peak']) / 1024:.0f} MiB"
            + ("" if stored is None else f", cache {stored:.0f} bytes an adapter")
        )
    print(f"duplicates: {pair * 1e9:.1f} ns of CPU time for each pair of sketches")


if __name__ == "__main__":
    main()
