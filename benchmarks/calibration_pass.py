"""The cost of surgery's calibration pass, relative to a LoRA forward and backward pass over the same batches.

    python benchmarks/calibration_pass.py [--layers 10] [--repeats 7] [--threads 2] [--json]

The model has SmolLM2-135M's widths and vocabulary with random weights, and a LoRA of rank 16 on all linear modules.
First the batched pass must agree with one example at a time. Then, after a warm-up, the runs alternate. The table has
medians with minimum and maximum. A pass is timed as a whole: decomposition, forward, backward, report.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit.surgery import sensitivity

Batch = dict[str, Tensor]


def make_model(layers: int) -> PeftModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    model = get_peft_model(
        LlamaForCausalLM(config), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def make_batches(size: int, length: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (count, size, length), generator=generator)
    return [{"input_ids": i, "labels": i, "attention_mask": torch.ones_like(i)} for i in ids]


def lora_step(model: PeftModel, batches: list[Batch]) -> None:
    """A training step without its optimizer: forward and backward."""
    model.train()
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad()


def check(model: PeftModel, batches: list[Batch]) -> float:
    """The largest difference of batched from single-example sensitivities, relative to each module's largest."""
    single = [{key: value[i : i + 1] for key, value in b.items()} for b in batches for i in range(len(b["labels"]))]
    one, many = (sensitivity(model, data, progress=False) for data in (single, batches))
    worst = 0.0
    for a, b in zip(one.modules, many.modules, strict=True):
        worst = max(worst, float((a.per_example - b.per_example).abs().max() / a.per_example.abs().max()))
    if worst > 1e-5:
        raise SystemExit(f"The batched pass deviates by {worst:.1e} from one example at a time.")
    return worst


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(options.layers)
    results = []
    for size, length in ((4, 96), (8, 32), (2, 256)):
        batches = make_batches(size, length, options.batches)
        worst = check(model, batches[:2])
        runs: dict[str, Callable[[], object]] = {
            "LoRA forward + backward": lambda batches=batches: lora_step(model, batches),
            "default (o_proj, down_proj)": lambda batches=batches: sensitivity(model, batches, progress=False),
            "all linear modules": lambda batches=batches: sensitivity(
                model, batches, target_modules="all-linear", progress=False
            ),
        }
        for run in runs.values():
            run()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                seconds[name].append(timed(run))
        base = seconds["LoRA forward + backward"]
        for name, values in seconds.items():
            ratios = [value / reference for value, reference in zip(values, base, strict=True)]
            results.append(
                {
                    "batch": f"{size} x {length}",
                    "run": name,
                    "median_seconds": statistics.median(values),
                    "range_seconds": [min(values), max(values)],
                    "ratio": statistics.median(ratios),
                    "ratio_range": [min(ratios), max(ratios)],
                    "worst_deviation": worst,
                }
            )
    if options.json:
        print(json.dumps(results))
        return
    setting = f"{options.layers} layers, {options.batches} batches"
    print(f"torch {torch.__version__}, torch.set_num_threads({options.threads}), {setting}")
    print(f"{'batch':>9}  {'run':<28} {'median':>8}  {'(min–max)':<15} {'ratio':>6}  (min–max)")
    for row in results:
        low, high = row["range_seconds"]
        print(
            f"{row['batch']:>9}  {row['run']:<28} {row['median_seconds']:7.2f}s  {f'({low:.2f}–{high:.2f})':<15} "
            f"{row['ratio']:5.2f}x  ({row['ratio_range'][0]:.2f}–{row['ratio_range'][1]:.2f})"
        )
    worst = max(row["worst_deviation"] for row in results)
    print(f"largest deviation of the batched pass from one example at a time: {worst:.1e}")


if __name__ == "__main__":
    main()
