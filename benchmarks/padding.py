"""What padding to one rank costs: file size and load time of padded and compact adapters with SmolLM2's shapes.

    python benchmarks/padding.py [--rank 16] [--rank-of-queries 4] [--repeats 7] [--json]

A FisherLoRA whose queries and values have another rank, and the merge of it with a LoRA of half the rank. Correctness
comes first: both files of each have the same ΔW, in float64. Then `lorakit.adapters.open_adapter`, with all factors
read, and PEFT's `load_adapter`, into a model that has an adapter, take turns. Seconds are of CPU time, ratios of the
same round; medians with minimum and maximum.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from audit import spread
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import FisherLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.export import to_lora
from lorakit.merging import merge

SHAPES = {  # of SmolLM2-135M
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 1024,
}


def save_adapter(config: LoraConfig, out: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SHAPES)), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(out)
    return out


def make(scratch: Path, options: argparse.Namespace) -> dict[str, dict[str, Path]]:
    """The directories, by adapter and layout."""
    shared = {"lora_alpha": 2 * options.rank, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    fisher = FisherLoRAConfig(**shared, r=options.rank, r_q=options.rank_of_queries)
    one = save_adapter(fisher, scratch / "one", 0)
    two = save_adapter(LoraConfig(**shared, r=options.rank // 2), scratch / "two", 1)
    found: dict[str, dict[str, Path]] = {"FisherLoRA": {}, "merged": {}}
    for layout in ("compact", "padded"):
        found["FisherLoRA"][layout] = scratch / f"fisherlora-{layout}"
        to_lora(one, found["FisherLoRA"][layout], pad=layout == "padded")
        found["merged"][layout] = scratch / f"merged-{layout}"
        merge([one, two], found["merged"][layout], weights=[0.6, 0.4], pad=layout == "padded")
    return found


def check(compact: Path, padded: Path) -> float:
    """The largest relative difference of a module's update between two directories."""
    one, other = open_adapter(compact), open_adapter(padded)
    updates = {module.name: other.factors(module).to(dtype=torch.float64).dense() for module in other.modules}
    worst = 0.0
    for module in one.modules:
        update = one.factors(module).to(dtype=torch.float64).dense()
        worst = max(worst, float((updates.pop(module.name) - update).norm() / update.norm()))
    if updates or worst > 1e-6:
        raise SystemExit(f"{padded.name} and {compact.name} differ: {worst:.1e}, {len(updates)} modules")
    return worst


def time_lorakit(directory: Path) -> float:
    start = time.process_time()
    for _ in open_adapter(directory).batches():
        pass
    return time.process_time() - start


def peft_timer(base: Path) -> Callable[[Path], float]:
    """Times `load_adapter` into one model, from which the adapter is deleted afterwards."""
    model = PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**SHAPES)), base)

    def timed(directory: Path) -> float:
        start = time.process_time()
        model.load_adapter(directory, "measured")
        taken = time.process_time() - start
        model.delete_adapter("measured")
        return taken

    return timed


def measure(layouts: dict[str, Path], repeats: int) -> dict[str, Any]:
    error = check(layouts["compact"], layouts["padded"])
    timers = {"lorakit": time_lorakit, "PEFT": peft_timer(layouts["padded"])}
    times: dict[str, dict[str, list[float]]] = {name: {layout: [] for layout in layouts} for name in timers}
    for round_ in range(-1, repeats):  # round -1 warms up
        for name, timer in timers.items():
            for layout in sorted(layouts, reverse=bool(round_ % 2)):
                taken = timer(layouts[layout])
                if round_ >= 0:
                    times[name][layout].append(taken)
    size = {layout: (path / "adapter_model.safetensors").stat().st_size for layout, path in layouts.items()}
    return {
        "error": error,
        "bytes": size,
        "size_ratio": size["padded"] / size["compact"],
        "seconds": {name: {layout: spread(taken[layout]) for layout in layouts} for name, taken in times.items()},
        "ratio": {
            name: spread([p / c for p, c in zip(taken["padded"], taken["compact"], strict=True)])
            for name, taken in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rank-of-queries", type=int, default=4, help="of queries and values")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        made = make(Path(scratch), options)
        result = {name: measure(layouts, options.repeats) for name, layouts in made.items()}
    if options.json:
        print(json.dumps(vars(options) | {"results": result}))
        return
    for name, row in result.items():
        small, large = (row["bytes"][layout] / 1e6 for layout in ("compact", "padded"))
        print(
            f"{name}: {small:.1f} MB compact, {large:.1f} MB padded (× {row['size_ratio']:.2f}); ΔW {row['error']:.0e}"
        )
        for program, ratio in row["ratio"].items():
            compact, padded = (row["seconds"][program][layout]["median"] for layout in ("compact", "padded"))
            print(
                f"  {program:8} {compact * 1e3:6.0f} ms compact, {padded * 1e3:6.0f} ms padded"
                f" × {ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})"
            )


if __name__ == "__main__":
    main()
