"""The cost of a training step with SpecLoRA and FisherLoRA, compared with PEFT's LoRA, the literal mask, and DoRA.

    python benchmarks/training_step.py [--repeats 40] [--tokens 256] [--threads 2] [--json]

SpecLoRA: one linear layer of width d, rank 16, k = 200. A step is forward, backward to the input (as in the middle of
a model) and AdamW. FisherLoRA: a query and a value projection with r_q 4 and r_v 16, against both at 16. First the
outputs and gradients of SpecLoRA are checked against the mask formed in full. Then, after a warm-up, the alternatives
take turns. Reported are medians, and quartiles of the ratio to the LoRA step beside it. Memory is what autograd keeps
between forward and backward, without parameters. SpecLoRA's may exceed LoRA's by one tokens × k tensor.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.cost._meta import saved_bytes

R, K = 16, 200
SHARED: dict[str, Any] = {"r": R, "lora_alpha": 2 * R}


class MaskAsWritten(nn.Module):
    """y = (Γ ⊙ W) x + scaling · B A x, with Γ formed in every forward (Si et al. 2025, Eq. 7-8)."""

    def __init__(self, base: nn.Linear, layer: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.d = nn.Parameter(1 + layer.lora_spec["default"].weight.detach())
        self.A = nn.Parameter(layer.lora_A["default"].weight.detach().clone())
        self.B = nn.Parameter(layer.lora_B["default"].weight.detach().clone())
        self.scaling = layer.scaling["default"]

    def forward(self, x: Tensor) -> Tensor:
        gamma = torch.ones_like(self.base.weight)
        gamma[: len(self.d), : len(self.d)] = self.d[:, None]
        return F.linear(x, gamma * self.base.weight) + F.linear(F.linear(x, self.A), self.B) * self.scaling


class Projections(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.q_proj, self.v_proj = (nn.Linear(d, d, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.v_proj(x)


def one_layer(d: int, config: LoraConfig) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(d, d, bias=False)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_spec" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def projections(d: int, config: LoraConfig) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(Projections(d), config)


def alternatives(d: int) -> dict[str, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = one_layer(d, SpecLoRAConfig(**SHARED, k=K, target_modules=["0"]))
        layer = spec.base_model.model[0]
        return {
            "LoRA": one_layer(d, LoraConfig(**SHARED, target_modules=["0"])),
            "SpecLoRA": spec,
            "mask as written": MaskAsWritten(layer.get_base_layer(), layer),
            "DoRA": one_layer(d, LoraConfig(**SHARED, use_dora=True, target_modules=["0"])),
        }


def pair(d: int) -> dict[str, nn.Module]:
    targets = {"target_modules": ["q_proj", "v_proj"]}
    return {
        "LoRA": projections(d, LoraConfig(**SHARED, **targets)),
        "FisherLoRA": projections(d, FisherLoRAConfig(**SHARED, r_q=4, **targets)),
        "LoRA again": projections(d, LoraConfig(**SHARED, **targets)),
    }


def check(models: dict[str, nn.Module], x: Tensor, upstream: Tensor) -> float:
    """The largest deviation of SpecLoRA from the mask formed in full: output, gradients of x, d, A and B."""
    spec, literal = models["SpecLoRA"], models["mask as written"]
    layer = spec.base_model.model[0]
    leaves = [layer.lora_spec["default"].weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    results = []
    for model, parameters in ((spec, leaves), (literal, [literal.d, literal.A, literal.B])):
        y = model(x)
        results.append([y.detach(), *torch.autograd.grad(y, [x, *parameters], upstream)])
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True))
    if worst > 1e-4:
        raise SystemExit(f"SpecLoRA deviates from the formula by {worst:.1e}.")
    return worst


def stepper(model: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        x.grad = None
        model(x).backward(upstream)
        optimizer.step()
        optimizer.zero_grad()

    return step


def compare(models: dict[str, nn.Module], x: Tensor, upstream: Tensor, repeats: int) -> list[dict[str, Any]]:
    steps = {name: stepper(model, x, upstream) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(repeats + 3):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn >= 3:
                seconds[name].append(time.perf_counter() - started)
    rows = []
    for name, values in seconds.items():
        model = models[name]
        ratios = [value / base for value, base in zip(values, seconds["LoRA"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "method": name,
                "median_seconds": statistics.median(values),
                "ratio_of_medians": statistics.median(values) / statistics.median(seconds["LoRA"]),
                "ratio": statistics.median(ratios),
                "ratio_quartiles": [low, high],
                "saved_bytes": saved_bytes(functools.partial(model, x), [*model.parameters(), *model.buffers(), x]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, worst = [], 0.0
    for d in (2048, 4096):
        torch.manual_seed(1)
        x, upstream = torch.randn(1, options.tokens, d, requires_grad=True), torch.randn(1, options.tokens, d)
        models = alternatives(d)
        worst = max(worst, check(models, x, upstream))
        for row in compare(models, x, upstream, options.repeats):
            results.append({"d": d, "layers": "one"} | row)
        for row in compare(pair(d), x, upstream, options.repeats):
            results.append({"d": d, "layers": "q and v"} | row)
    if options.json:
        print(json.dumps({"worst_deviation": worst, "rows": results}))
        return
    print(f"torch {torch.__version__}, torch.set_num_threads({options.threads}), {options.tokens} tokens, r {R}, k {K}")
    print(f"{'d':>5} {'layers':<8} {'method':<16} {'median':>9} {'of medians':>11} {'paired':>7} (quartiles)     saved")
    for row in results:
        low, high = row["ratio_quartiles"]
        saved = row["saved_bytes"] / 2**20
        print(
            f"{row['d']:>5} {row['layers']:<8} {row['method']:<16} {row['median_seconds'] * 1e3:7.1f}ms "
            f"{row['ratio_of_medians']:10.3f}x {row['ratio']:6.3f}x ({low:.3f}–{high:.3f})  {saved:6.2f} MiB"
        )
    print(f"largest deviation of SpecLoRA from the mask formed in full: {worst:.1e}")


if __name__ == "__main__":
    main()
