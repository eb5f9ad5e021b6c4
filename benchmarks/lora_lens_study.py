"""LoRA-Lens's experiments on SmolLM2-135M-Instruct and English text: what training does to spectra, and what it says.

    python benchmarks/lora_lens_study.py DIR [--only REGEX] [--threads 2]    # goes on where it was interrupted
    python benchmarks/lora_lens_report.py DIR [--docs docs]    # tables and figures of docs/lora-lens-study.md

Every run trains an adapter on query and value projections (one on all linear modules), with alpha = 2 r, AdamW and a
cosine schedule, and measures the mean loss of held-out sequences. The sweeps change r_q or r_v alone, over three seeds;
runs of one seed see the same batches in the same order and start from the same lora_A where the shapes agree.
Interrupted runs resume from their last Trainer checkpoint; finished ones have a result.json and are left alone.

Reference: "LoRA-Lens: Training Induces Spectral Compression in Low-Rank Adapters", sections 2 and 3.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import lorakit
from lorakit import FisherLoRAConfig
from lorakit.demo import load_model, passages, split_documents

STEPS, BATCH, LENGTH, LEARNING_RATE = 100, 4, 96, 1e-3
HELD_OUT, PROBED = 128, 16
PROBE_AT = (0, STEPS // 2, STEPS)
SEEDS = (0, 1, 2)
RANK = 16
RANKS = (4, 8, 16, 32, 64)  # of the uniform adapters of seed 0


@dataclass(frozen=True)
class Run:
    """One training: ranks of the query and value projections (of all linear modules, where `all_linear`)."""

    r_q: int
    r_v: int
    seed: int
    all_linear: bool = False

    @property
    def name(self) -> str:
        return f"{'all' if self.all_linear else f'q{self.r_q}-v{self.r_v}'}-seed{self.seed}"

    @property
    def probed(self) -> bool:
        return (self.r_q, self.r_v) == (RANK, RANK) and not self.all_linear

    def config(self) -> LoraConfig:
        shared: dict[str, Any] = {"task_type": "CAUSAL_LM"}
        if self.all_linear:
            return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **shared)
        targets = ["q_proj", "v_proj"]
        if self.r_q == self.r_v:
            return LoraConfig(r=self.r_q, lora_alpha=2 * self.r_q, target_modules=targets, **shared)
        return FisherLoRAConfig(r=RANK, r_q=self.r_q, r_v=self.r_v, target_modules=targets, **shared)


def runs() -> list[Run]:
    """The sweeps (the uniform rank is in both), uniform ranks, and one adapter on all linear modules."""
    sweeps = [(4, RANK), (2, RANK), (RANK, 4), (RANK, 2), (RANK, RANK)]
    return [
        *(Run(r_q, r_v, seed) for seed in SEEDS for r_q, r_v in sweeps),
        *(Run(r, r, 0) for r in RANKS if r != RANK),
        Run(RANK, RANK, 0, all_linear=True),
    ]


class Probing(TrainerCallback):
    """The Fisher probe of the adapter as it is, at steps PROBE_AT."""

    def __init__(self, batches: list[dict[str, Tensor]], path: Path) -> None:
        self.batches, self.path = batches, path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._probe(state.global_step, kwargs["model"])

    def _probe(self, step: int, model: Any) -> None:
        found = json.loads(self.path.read_text()) if self.path.exists() else {}
        if step not in PROBE_AT or str(step) in found:
            return
        found[str(step)] = lorakit.fisher.probe(model, self.batches, num_examples=PROBED, progress=False).to_dict()
        write(self.path, found)


def write(path: Path, value: Any) -> None:
    """As JSON, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    temporary.replace(path)


def as_batches(ids: Tensor) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in torch.split(ids, BATCH)]


def train(run: Run, base: Any, data: dict[str, Tensor], out: Path) -> Any:
    """Train one adapter, write what came of it, and give the base model back."""
    directory = out / run.name
    directory.mkdir(parents=True, exist_ok=True)
    set_seed(run.seed)
    model = get_peft_model(base, run.config())
    arguments = TrainingArguments(
        output_dir=str(directory / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        logging_steps=10,
        save_steps=25,
        save_total_limit=1,
        seed=run.seed,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    examples = [{"input_ids": ids, "labels": ids} for ids in data["train"]]
    callbacks: list[TrainerCallback] = []
    if run.probed:
        callbacks.append(Probing(as_batches(data["calibration"][:PROBED]), directory / "fisher.json"))
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, callbacks=callbacks)
    if run.r_q == run.r_v:
        lorakit.lens.SpectralCallback(every=5, also=range(16), path=directory / "spectra.jsonl").attach(trainer)
    started = time.perf_counter()
    trainer.train(
        resume_from_checkpoint=get_last_checkpoint(arguments.output_dir)
        if directory.joinpath("checkpoints").exists()
        else None
    )
    losses = held_out_losses(model, torch.split(data["held_out"], BATCH))
    model.save_pretrained(str(directory / "adapter"))
    write(
        directory / "result.json",
        {
            **asdict(run),
            "parameters": model.get_nb_trainable_parameters()[0],
            "held_out_losses": losses.tolist(),
            "log": trainer.state.log_history,
            "seconds": time.perf_counter() - started,
            "threads": torch.get_num_threads(),
            "settings": {"steps": STEPS, "batch": BATCH, "length": LENGTH, "learning_rate": LEARNING_RATE},
        },
    )
    return model.unload()


@torch.no_grad()
def held_out_losses(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Each sequence's mean loss, (n,)."""
    training = model.training
    model.eval()
    losses = []
    for ids in batches:
        logits = model(input_ids=ids, use_cache=False).logits.float()
        loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        losses.append(loss.mean(1).double().cpu())
    model.train(training)
    return torch.cat(losses)


def train_all(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    out = Path(options.directory)
    todo = [
        run for run in runs() if re.search(options.only, run.name) and not (out / run.name / "result.json").exists()
    ]
    if not todo:
        return
    base, tokenizer = load_model(None)
    counts = {"train": STEPS * BATCH, "calibration": PROBED, "held_out": HELD_OUT}
    data = {
        part: passages(tokenizer, documents, counts[part], length=LENGTH)
        for part, documents in split_documents().items()
    }
    path = out / "base.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        write(path, {"held_out_losses": held_out_losses(base, torch.split(data["held_out"], BATCH)).tolist()})
    for number, run in enumerate(todo, 1):
        print(f"{time.strftime('%H:%M:%S')} {number}/{len(todo)} {run.name}", flush=True)
        base = train(run, base, data, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--only", default="", help="a regular expression that the runs' names must contain")
    parser.add_argument("--threads", type=int, default=2)
    train_all(parser.parse_args())


if __name__ == "__main__":
    main()
