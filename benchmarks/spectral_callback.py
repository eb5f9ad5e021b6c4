"""What lorakit.lens.SpectralCallback costs while SmolLM2-135M-Instruct trains: per measured step, and on average.

    python benchmarks/spectral_callback.py [--targets q_proj,v_proj | all-linear] [--every 10] [--pairs 12]
                                           [--batch 4] [--length 128] [--basis 16] [--threads 2] [--json]

`--basis` measures κ in given (random) subspaces of this dimension, in the place of the adapter's own.

First it checks that a few steps with the callback give the same parameters, bit for bit, as without it. Then, after a
warm-up, measured steps (hooks in the passes, spectra of all modules, logging, a line of JSONL) alternate with plain
ones. The overhead is the mean of the paired differences, divided by the time of `every` plain steps. Its standard
error, and the difference between two plain steps, show the noise. Wall time and the process's CPU time are reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import TrainerControl, TrainerState, TrainingArguments, set_seed

from lorakit.demo import load_model
from lorakit.lens import SpectralCallback


class Loop:
    """Training steps in the form of Trainer's, with the callback's events around them."""

    def __init__(self, model: Any, ids: torch.Tensor, out: Path, basis: int) -> None:
        self.model, self.ids = model, ids
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        given = random_basis(model, basis) if basis else None
        self.callback = SpectralCallback(every=1, path=out / f"{time.monotonic_ns()}.jsonl", basis=given)
        self.state = TrainerState(max_steps=10**9)
        self.arguments = TrainingArguments(output_dir=str(out), report_to=[])
        self.control = TrainerControl()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*attach")  # no trainer here
            self.event("on_train_begin")

    def event(self, name: str) -> None:
        getattr(self.callback, name)(self.arguments, self.state, self.control, model=self.model)

    def step(self, *, measures: bool) -> tuple[float, float]:
        """Wall and CPU seconds of one step."""
        wall, cpu = time.perf_counter(), time.process_time()
        if measures:
            self.event("on_step_begin")
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        if measures:
            self.event("on_pre_optimizer_step")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        if measures:
            self.event("on_step_end")
        return time.perf_counter() - wall, time.process_time() - cpu


def random_basis(model: Any, dimension: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Orthonormal U and V of each adapted module."""

    def columns(d: int) -> torch.Tensor:
        return torch.linalg.qr(torch.randn(d, dimension)).Q

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {name: (columns(layer.out_features), columns(layer.in_features)) for name, layer in layers}


def check(base: Any, config: LoraConfig, ids: torch.Tensor, out: Path, basis: int) -> None:
    """Training with the callback must equal training without it."""
    trained = []
    for measures in (True, False):
        set_seed(0)
        model = get_peft_model(base, config)
        loop = Loop(model, ids[:1, :16], out, basis)
        for _ in range(3):
            loop.step(measures=measures)
        trained.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        base = model.unload()
    if not all(torch.equal(a, b) for a, b in zip(*trained, strict=True)):
        raise SystemExit("Training with the callback differs from training without it.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", default="q_proj,v_proj", help="or all-linear")
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--basis", type=int, default=0, help="0: the adapter's own subspaces")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base, _ = load_model(None)
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    config = LoraConfig(r=16, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    ids = torch.randint(0, 49152, (options.batch, options.length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as directory:
        check(base, config, ids, Path(directory), options.basis)
        loop = Loop(get_peft_model(base, config), ids, Path(directory), options.basis)
        for measures in (False, True, False):
            loop.step(measures=measures)
        rounds = []
        for turn in range(options.pairs):
            order = ("plain", "measured", "again") if turn % 2 else ("again", "measured", "plain")
            rounds.append({name: loop.step(measures=name == "measured") for name in order})
        rows = len(loop.callback.trajectory.snapshots[-1].modules)
    result: dict[str, Any] = {"modules": rows, **vars(options)}
    for place, clock in enumerate(("wall", "cpu")):
        plain = [(one["plain"][place] + one["again"][place]) / 2 for one in rounds]
        step = statistics.median(plain)
        measured = [one["measured"][place] - base for one, base in zip(rounds, plain, strict=True)]
        noise = [one["again"][place] - one["plain"][place] for one in rounds]
        result[clock] = {"step": step} | {
            name: {
                "seconds": statistics.median(values),
                "percent": 100 * statistics.mean(values) / options.every / step,
                "stderr_percent": 100 * statistics.stdev(values) / len(values) ** 0.5 / options.every / step,
            }
            for name, values in (("measuring", measured), ("noise", noise))
        }
    if options.json:
        print(json.dumps(result))
        return
    print(
        f"{rows} modules ({options.targets}), {options.batch} × {options.length} tokens, torch {torch.__version__}, "
        f"torch.set_num_threads({options.threads}), {options.pairs} rounds"
    )
    for clock in ("wall", "cpu"):
        found = result[clock]
        for name, label in (("measuring", "measuring"), ("noise", "a plain step against another")):
            part = found[name]
            print(
                f"  {clock}: {label}: {part['seconds'] * 1e3:+.0f} ms, at every={options.every} {part['percent']:+.2f} "
                f"± {part['stderr_percent']:.2f} % of a step of {found['step']:.2f} s"
            )


if __name__ == "__main__":
    main()
