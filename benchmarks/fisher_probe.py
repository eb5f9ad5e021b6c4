"""The speed of the Fisher probe, relative to one forward and backward pass per example.

    python benchmarks/fisher_probe.py [--model llama|smollm2|narrow] [--lengths 16,48,128] [--threads 1]
                                      [--method fisherlora|speclora [--mode svd]] [--json]

`llama` has SmolLM2-135M's widths and vocabulary with random weights and few layers. `smollm2` is the demo's model.
`narrow` is so narrow that launching operations takes longer than computing them, as on a GPU with short batches. All
have a LoRA of rank 16 at initialization. The reference runs each example alone, forward and backward, with gradients of
lora_B only, and squares them. First both must give the same F to 1e-5. Then, after a warm-up, the probe, the reference
and the reference again alternate. The table has medians with minimum and maximum of wall time and of the process's CPU
time, which other work on the machine disturbs less, and quartiles of the speed-ups. The speed-up of the reference over
itself shows the noise. The probe is timed as a whole, from the call to the report.

With ``--method speclora`` the probe also measures S(k) of SpecLoRA's masks for its whole ladder of k. It is then first
compared, at k = 25 and 200, with one backward per example through SpecLoRA's own layers. The reference that it is timed
against stays the same, so the figures say what the masks add.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import SpecLoRAConfig
from lorakit.fisher import probe
from lorakit.tuners.speclora import MODES

Batch = dict[str, Tensor]
REFERENCE = "one backward each"


def make_model(name: str, layers: int, targets: str | list[str]) -> PeftModel:
    torch.manual_seed(0)
    if name == "smollm2":
        from lorakit.demo import load_model

        base = load_model(None)[0]
    else:
        width, vocabulary = (64, 512) if name == "narrow" else (576, 49152)
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=width,
                intermediate_size=width * 8 // 3,
                num_hidden_layers=layers,
                num_attention_heads=width // 64,
                num_key_value_heads=width // 64 // 3 or 1,
                vocab_size=vocabulary,
                tie_word_embeddings=True,
            )
        )
    return get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=targets)).eval()


def one_backward_each(model: PeftModel, batch: Batch) -> list[float]:
    """The mean F of each lora_B, from the gradient of each example's own loss."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    weights = []
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_B" in name)
        if "lora_B" in name:
            weights.append(parameter)
    sums = [torch.zeros_like(weight) for weight in weights]
    examples = len(batch["input_ids"])
    for i in range(examples):
        loss = model(**{key: value[i : i + 1] for key, value in batch.items()}, use_cache=False).loss
        for total, gradient in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += gradient**2
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    return [float(total.mean()) / examples for total in sums]


def check_masks(model: PeftModel, batch: Batch, mode: str) -> float:
    """The largest relative deviation of S(k) from one backward per example through a SpecLoRA of that k."""
    report = probe(model, [batch], num_examples=len(batch["input_ids"]), progress=False, method="speclora", mode=mode)
    worst = 0.0
    for k in (25, 200):
        config = SpecLoRAConfig(r=1, k=k, mode=mode, target_modules=list(report.target_modules))
        masked = get_peft_model(copy.deepcopy(model).unload(), config).eval()  # a LoRA at zero changes nothing
        layers = dict(masked.get_base_model().named_modules())
        ds = [layers[row.module_name].lora_spec["default"].weight for row in report.modules]
        sums = [0.0] * len(ds)
        for i in range(len(batch["input_ids"])):
            loss = masked(**{key: value[i : i + 1] for key, value in batch.items()}, use_cache=False).loss
            for j, gradient in enumerate(torch.autograd.grad(loss, ds)):
                sums[j] += float(gradient.square().sum())
        for row, total, d in zip(report.modules, sums, ds, strict=True):
            found = next(step.sensitivity for step in row.mask if step.k == min(k, len(d)))
            worst = max(worst, abs(found * len(batch["input_ids"]) / total - 1))
    return worst


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def quartiles(values: list[float]) -> list[float]:
    return statistics.quantiles(values, n=4, method="inclusive")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["llama", "smollm2", "narrow"], default="llama")
    parser.add_argument("--layers", type=int, default=6, help="of llama and narrow")
    parser.add_argument("--targets", default="q_proj,v_proj", help="or all-linear")
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--lengths", default="16,48,128,256,512")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--method", choices=["fisherlora", "speclora"], default="fisherlora")
    parser.add_argument("--mode", choices=MODES, default="hadamard", help="of SpecLoRA's masks")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model(
        options.model, options.layers, options.targets if "linear" in options.targets else options.targets.split(",")
    )
    results = []
    for length in map(int, options.lengths.split(",")):
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(0, model.config.vocab_size, (options.examples, length), generator=generator)
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
        runs: dict[str, Callable[[], list[float]]] = {
            REFERENCE: lambda batch=batch: one_backward_each(model, batch),
            "probe": lambda batch=batch: [
                row.fisher
                for row in probe(
                    model,
                    [batch],
                    num_examples=options.examples,
                    progress=False,
                    method=options.method,
                    mode=options.mode,
                ).modules
            ],
        }
        runs["itself again"] = runs[REFERENCE]
        each, probed, _ = (run() for run in runs.values())
        worst = max(abs(a - b) / a for a, b in zip(each, probed, strict=True))
        if worst > 1e-5:
            raise SystemExit(f"The probe deviates from one backward per example by {worst:.1e} at {length} tokens.")
        if options.method == "speclora":
            deviation = check_masks(model, batch, options.mode)
            if deviation > 1e-3:
                raise SystemExit(f"S(k) deviates from one backward per example by {deviation:.1e} at {length} tokens.")
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(options.repeats):
            for name, run in runs.items():
                times[name].append(timed(run))
        row: dict[str, object] = {"length": length, "worst_deviation": worst}
        for i, kind in enumerate(("wall", "cpu")):
            values = {name: [pair[i] for pair in pairs] for name, pairs in times.items()}
            reference = values[REFERENCE]
            row[kind] = {
                name: {
                    "seconds": [statistics.median(v), min(v), max(v)],
                    "speed_up": quartiles([a / b for a, b in zip(reference, v, strict=True)]),
                }
                for name, v in values.items()
            }
        results.append(row)
        if not options.json:
            print_row(row, options)
    if options.json:
        print(json.dumps(results))


def print_row(row: dict[str, object], options: argparse.Namespace) -> None:
    kinds = {"smollm2": "SmolLM2-135M", "llama": f"{options.layers} layers of SmolLM2's widths"}
    what = kinds.get(options.model, f"{options.layers} layers of width 64")
    print(
        f"{what}, {options.targets}, {options.method}, {options.examples} × {row['length']} tokens, "
        f"torch {torch.__version__}, torch.set_num_threads({options.threads}), {options.repeats} repeats, "
        f"largest deviation {row['worst_deviation']:.0e}"
    )
    for kind in ("wall", "cpu"):
        for name, found in row[kind].items():
            (seconds, least, most), (first, median, third) = found["seconds"], found["speed_up"]
            speed_up = "" if name == REFERENCE else f"{median:5.2f}x ({first:.2f}–{third:.2f})"
            print(f"  {kind:>4}  {name:<17} {seconds:6.2f} s ({least:.2f}–{most:.2f})  {speed_up}", flush=True)


if __name__ == "__main__":
    main()
