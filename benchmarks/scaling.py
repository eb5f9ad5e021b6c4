"""CPU time of each command against the number of modules, with the exponent of a power law fitted to it.

    python benchmarks/scaling.py [--sizes 500 1000 2000 5000 10000 20000] [--only audit compress] [--repeats 1]
        [--threads 1] [--limit 1.1] [--json]

Adapters of small modules (16 × 16), so that what is counted is the work for a module and not its arithmetic: of one
rank, and with a rank and an alpha of its own for every module, which its config says by name. Correctness comes first:
on the smallest size, what each command wrote or reports is compared with dense float64 arithmetic. The exponent is the
slope of log time over log modules in the upper half of the sizes; above `--limit` the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file

from lorakit.adapters import open_adapter
from lorakit.compress import truncate
from lorakit.export import to_lora
from lorakit.lens import audit, compare
from lorakit.lens.render.html import write_html
from lorakit.lens.render.table import print_report
from lorakit.merging import merge
from lorakit.serving import check_all

SIZES = (500, 1000, 2000, 5000, 10000, 20000)
SIDE = 16
NAMES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj")


def make(directory: Path, modules: int, *, mixed: bool, seed: int) -> Path:
    """An adapter of rank 4, or `mixed`: each module with a rank from 2 to 6 and a scaling of its own."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{i // len(NAMES)}.{NAMES[i % len(NAMES)]}" for i in range(modules)]
    ranks = {name: 2 + (7 * i) % 5 if mixed else 4 for i, name in enumerate(names)}
    tensors = {}
    for name, rank in ranks.items():
        key = f"base_model.model.{name}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, SIDE, generator=generator)
        tensors[f"{key}.lora_B.weight"] = torch.randn(SIDE, rank, generator=generator)
    config: dict[str, Any] = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in names})
    if mixed:
        config["rank_pattern"] = ranks
        config["alpha_pattern"] = {name: 2 * rank + i / modules for i, (name, rank) in enumerate(ranks.items())}
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


class Workplace:
    """Adapters of one number of modules, and a directory for what is written."""

    def __init__(self, directory: Path, modules: int) -> None:
        self.directory = directory
        directory.mkdir()
        self.modules = modules
        self.one, self.other = (make(directory / f"even{seed}", modules, mixed=False, seed=seed) for seed in (0, 1))
        self.mixed = make(directory / "mixed", modules, mixed=True, seed=2)

    @property
    def out(self) -> Path:
        return self.directory / "out"


COMMANDS: dict[str, Callable[[Workplace], Any]] = {
    "audit": lambda at: audit(at.one),
    "audit, mixed": lambda at: audit(at.mixed, suggest_ranks=True),
    "audit, budget": lambda at: audit(at.one, budget=2 * 2 * SIDE * at.modules),
    "audit to JSON": lambda at: json.dumps(audit(at.one).to_dict()),
    "audit to HTML": lambda at: write_html(audit(at.one), at.directory / "audit.html"),
    "audit to a table": lambda at: print_report(audit(at.one), Console(file=io.StringIO(), width=120)),
    "compress max_rank": lambda at: truncate(at.one, at.out, max_rank=2),
    "compress energy": lambda at: truncate(at.one, at.out, energy=0.9),
    "compress per module": lambda at: truncate(at.one, at.out, budget=2 * 2 * SIDE * at.modules, per_module=True),
    "compress mixed": lambda at: truncate(at.mixed, at.out, max_rank=3, pad=False),
    "compress names": lambda at: truncate(at.mixed, at.out, ranks=dict.fromkeys(names_of(at.mixed), 2)),
    "merge linear": lambda at: merge([at.one, at.other], at.out),
    "merge svd": lambda at: merge([at.one, at.mixed], at.out, method="svd"),
    "merge energy": lambda at: merge([at.one, at.mixed], at.out, energy=0.9, pad=False),
    "merge ties": lambda at: merge([at.one, at.other], at.out, method="ties", density=0.5),
    "merge dare": lambda at: merge([at.one, at.other], at.out, method="dare", density=0.5),
    "compare": lambda at: compare(at.one, at.other),
    "compare to HTML": lambda at: write_html(compare(at.one, at.mixed), at.directory / "compare.html"),
    "export": lambda at: to_lora(at.mixed, at.out),
    "export auto": lambda at: to_lora(at.mixed, at.out, rank="auto"),
    "servers": lambda at: check_all(at.mixed),
}


def names_of(path: Path) -> list[str]:
    return [module.name for module in open_adapter(path).modules]


def dense(path: Path) -> dict[str, torch.Tensor]:
    adapter = open_adapter(path)
    return {m.name: adapter.factors(m).to(dtype=torch.float64).dense() for m in adapter.modules}


def require(what: str, actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    if actual.keys() != expected.keys():
        raise SystemExit(f"{what}: other modules")
    for name, meant in expected.items():
        error = float((actual[name] - meant).norm() / meant.norm())
        if not error < 1e-5:
            raise SystemExit(f"{what}: wrong update of {name}: error {error:.1e}")


def best(update: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(update)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def check(at: Workplace) -> None:
    """What the commands write and report, beside dense float64 arithmetic."""
    one, other, mixed = dense(at.one), dense(at.other), dense(at.mixed)
    norms = {row.module_name: torch.tensor([row.frobenius_norm]).double() for row in audit(at.one).modules}
    require("audit", norms, {name: update.norm()[None] for name, update in one.items()})
    cosines = {row.module_name: torch.tensor([row.cosine]).double() for row in compare(at.one, at.other).modules}
    exact = {name: (one[name] * other[name]).sum()[None] / one[name].norm() / other[name].norm() for name in one}
    require("compare", cosines, exact)
    for command, meant in (
        ("compress max_rank", {name: best(update, 2) for name, update in one.items()}),
        ("compress mixed", {name: best(update, 3) for name, update in mixed.items()}),
        ("compress names", {name: best(update, 2) for name, update in mixed.items()}),
        ("merge linear", {name: (one[name] + other[name]) / 2 for name in one}),
        ("merge svd", {name: best((one[name] + mixed[name]) / 2, 6) for name in one}),
        ("export", mixed),
    ):
        COMMANDS[command](at)
        require(command, dense(at.out), meant)


def exponent(times: dict[int, float]) -> float:
    """The slope of log time over log modules, by least squares over the upper half of the sizes."""
    sizes = sorted(times)[len(times) // 2 - (len(times) < 4) :]
    x, y = ([math.log(value) for value in values] for values in (sizes, [times[size] for size in sizes]))
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--repeats", type=int, default=1, help="of which the fastest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1.1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if len(set(options.sizes)) < 2:
        parser.error("--sizes needs two sizes at least")
    torch.set_num_threads(options.threads)
    times: dict[str, dict[int, float]] = {name: {} for name in options.only}
    with tempfile.TemporaryDirectory() as directory:
        small = Workplace(Path(directory) / "check", 25)
        check(small)
        for command in options.only:
            COMMANDS[command](small)  # imports
    for size in sorted(set(options.sizes)):
        with tempfile.TemporaryDirectory() as directory:
            at = Workplace(Path(directory) / "work", size)
            for name in options.only:
                runs = []
                for _ in range(options.repeats):
                    gc.collect()
                    start = time.process_time()
                    COMMANDS[name](at)
                    runs.append(time.process_time() - start)
                times[name][size] = min(runs)
                if not options.json:
                    print(f"{size:>6} modules: {name}: {times[name][size]:.2f} s", file=sys.stderr)
    slopes = {name: exponent(found) for name, found in times.items()}
    if options.json:
        print(json.dumps({"torch": torch.__version__, **vars(options), "seconds": times, "exponents": slopes}))
    else:
        print(f"CPU seconds, torch {torch.__version__}, torch.set_num_threads({options.threads}); exponent")
        for name, found in times.items():
            row = "  ".join(f"{found[size]:7.2f}" for size in sorted(found))
            print(f"  {name:<20} {row}   {slopes[name]:.2f}")
    steep = [name for name, slope in slopes.items() if slope > options.limit]
    if steep:
        raise SystemExit(f"above {options.limit}: {', '.join(steep)}")


if __name__ == "__main__":
    main()
