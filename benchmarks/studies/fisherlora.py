"""Study 2, FisherLoRA: where should the ranks be? And study 1's SpecLoRA on the same. ARC-Easy and OpenBookQA.

    python benchmarks/studies/fisherlora.py ARM... --data DIR --out DIR

Each arm is trained at every learning rate of the grid with seed 0; the rate with the lowest validation loss, on others
of the training questions, is the arm's, and the other seeds are trained at it. Then each adapter is
scored on the test documents. Every training and every scoring is a record in `records/fisherlora`; what has one is not
done again. Several processes may work on different arms.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import tools
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftConfig
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

from lorakit import FisherLoRAConfig, SpecLoRAConfig, evaluation, fisher
from lorakit.allocation.masks import shuffled
from lorakit.data import loader
from lorakit.naming.patterns import values_of

STUDY = "fisherlora"
STEPS = 120  # one epoch of 960 questions, 8 a step
RANK = 16
REDUCED = {"r": RANK, "task_type": "CAUSAL_LM"}
PROBED = 64  # examples of the Fisher probe, after 50 steps of training as in the paper
FRACTIONS = {"half": (0.5, 60), "tenth": (0.1, 12)}
# `uniform_reduced` has rank 8, 9 % below the budget; `uniform_equal` has 9, and 8 in every third layer's queries.
REDUCED_ARMS = ("uniform_reduced", "uniform_equal", "fisherlora", "fisher", "spectral", "shuffled", "adalora", "eva")
SPECLORA_ARMS = {"speclora": "hadamard", "speclora_bottom": "hadamard_bottom"}  # 0.9 % more parameters than all_linear
ARMS = ("all_linear", "uniform", *REDUCED_ARMS, *SPECLORA_ARMS)
FRACTION_ARMS = ("uniform", "uniform_equal", "fisherlora")
STAGES = (
    *ARMS,
    *(f"{arm}_{part}" for part in FRACTIONS for arm in FRACTION_ARMS),
    "base",
    "ratios",
)


def probe(out: Path, adapter: Path | None = None, trained: int = 0) -> dict[str, Any]:
    """The Fisher information of queries and values: of a new adapter, after some steps, or of a trained adapter."""
    base = str(out / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = evaluation.load_base(base) if adapter is None else evaluation.load_adapted(base, str(adapter))
    read = functools.partial(loader, tokenizer=tokenizer, length=tools.LENGTH, progress=False)
    report = fisher.probe(
        model,
        read(out / "calibration.jsonl", batch_size=tools.BATCH_SIZE, num_examples=PROBED),
        num_examples=PROBED,
        train_loader=read(out / "train.jsonl", batch_size=tools.BATCH_SIZE) if trained else None,
        train_steps=trained or 50,
        progress=False,
    )
    return {
        "vq_ratio": None if report.vq_ratio is None else report.vq_ratio.value,
        "vq_interval": report.vq_interval,
        "target_modules": report.target_modules,
        "modules": [
            {name: getattr(row, name) for name in ("module_name", "role", "d_out", "d_in", "fisher", "stderr")}
            for row in report.modules
        ],
    }


def config_of(arm: str, out: Path, seed: int) -> PeftConfig:
    """An arm's config; only the shuffled ranks depend on the seed."""
    plain = functools.partial(LoraConfig, lora_alpha=2 * RANK, task_type="CAUSAL_LM")
    if arm == "all_linear":
        return plain(r=RANK, target_modules="all-linear")
    if arm in SPECLORA_ARMS:
        return SpecLoRAConfig(
            r=RANK,
            lora_alpha=2 * RANK,
            k=200,
            mode=SPECLORA_ARMS[arm],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    if arm == "uniform":
        return plain(r=RANK, target_modules=["q_proj", "v_proj"])
    if arm == "adalora":
        return AdaLoraConfig(
            total_step=STEPS,
            init_r=12,
            target_r=9,
            lora_alpha=2 * 12,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
    if arm == "eva":
        return LoraConfig(
            r=9,
            lora_alpha=18,
            target_modules=["q_proj", "v_proj"],
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=2.0, use_label_mask=False),
            task_type="CAUSAL_LM",
        )
    return reduced(arm, out, seed)


def reduced(arm: str, out: Path, seed: int) -> PeftConfig:
    """The allocations from one probe, at the parameters of FisherLoRA's r_q = 4 and r_v = 16."""
    report = _probe_report(out)
    rule = {"uniform_reduced": "uniform", "shuffled": "fisher"}.get(arm, arm)
    costs = {row.module_name: row.d_out + row.d_in for row in report.modules}
    roles = {row.module_name: row.role for row in report.modules}
    budget = sum(cost * (4 if roles[name] == "query" else 16) for name, cost in costs.items())
    if arm == "uniform_equal":
        smaller = [name for name in costs if roles[name] == "query" and int(name.split(".")[2]) % 3 == 0]
        ranks = dict.fromkeys(costs, 9) | dict.fromkeys(smaller, 8)
        assert sum(costs[name] * rank for name, rank in ranks.items()) == budget
        return FisherLoRAConfig(rank_pattern=ranks, target_modules=list(ranks), **REDUCED)
    config = FisherLoRAConfig.from_probe(report, rule=rule, params=budget, **REDUCED)
    if arm != "shuffled":
        return config
    moved = shuffled(values_of(config.rank_pattern, dict.fromkeys(costs, RANK)), costs=costs, seed=seed)
    return FisherLoRAConfig(rank_pattern=moved, target_modules=list(moved), **REDUCED)


@functools.lru_cache(maxsize=1)
def _probe_report(out: Path) -> Any:
    found = tools.recorded(STUDY, "probe after 50 steps", probe, {"examples": PROBED, "steps": 50}, out=out, trained=50)
    rows = [SimpleNamespace(**row) for row in found["modules"]]
    return SimpleNamespace(**found | {"modules": rows})


def initialize_eva(out: Path, model: Any, examples: Any) -> None:
    """EVA's start and ranks, from the training data; they are computed once and kept in `out`."""
    file = out / "eva.safetensors"
    if not file.exists():
        batches = DataLoader(examples.dataset, tools.BATCH_SIZE, collate_fn=examples.collate_fn)
        save_file({k: v.contiguous() for k, v in peft.get_eva_state_dict(model, batches).items()}, file)
    peft.initialize_lora_eva_weights(model, eva_state_dict=load_file(file))


@dataclass(frozen=True)
class Cell:
    """One arm on one part of the data."""

    out: Path
    arm: str
    name: str
    steps: int = STEPS
    data: str = "train.jsonl"

    def title(self, rate: float, seed: int) -> str:
        return f"{self.name} lr {rate:g} seed {seed}"

    def adapter(self, rate: float, seed: int) -> Path:
        """The trained adapter's directory; trained again if its record is of another machine."""
        target = self.out / "adapters" / self.title(rate, seed).replace(" ", "-")
        if not target.exists():
            self.train(rate, seed)
        return target

    def train(self, rate: float, seed: int) -> dict[str, Any]:
        """See `tools.train`."""
        return tools.train(
            self.out,
            config_of(self.arm, self.out, seed),
            self.out / "adapters" / self.title(rate, seed).replace(" ", "-"),
            seed=seed,
            learning_rate=rate,
            steps=self.steps,
            data=self.data,
            initialize=functools.partial(initialize_eva, self.out) if self.arm == "eva" else None,
        )

    def trained(self, rate: float, seed: int) -> dict[str, Any]:
        """The record of a training."""
        settings = {
            "arm": self.arm,
            "data": self.data,
            "steps": self.steps,
            "learning_rate": rate,
            "seed": seed,
            "group_by_length": True,
        }
        return tools.recorded(STUDY, self.title(rate, seed), self.train, settings, rate=rate, seed=seed)

    def scored(self, rate: float, seed: int) -> dict[str, Any]:
        """The record of an adapter's scores."""

        def score() -> dict[str, Any]:
            return tools.score(self.out, self.adapter(rate, seed))

        title = self.title(rate, seed)
        return tools.recorded(STUDY, f"scores of {title}", score, {"adapter": title, "dtype": tools.DTYPE})

    def rate(self) -> float:
        """The learning rate of the grid with the lowest validation loss."""
        return tools.best_rate({rate: self.trained(rate, tools.SEEDS[0]) for rate in tools.GRID})

    def run(self) -> None:
        """Choose the learning rate, train all seeds, score them."""
        rate = self.rate()
        for seed in tools.SEEDS:
            self.trained(rate, seed)
            self.scored(rate, seed)


def ratios(out: Path) -> None:
    """The V/Q ratio of a new adapter, after 50 steps, and of the trained adapters of the arm `uniform`."""
    tools.recorded(STUDY, "probe at the start", probe, {"examples": PROBED, "steps": 0}, out=out)
    _probe_report(out)
    cell = Cell(out, "uniform", "uniform")
    rate = cell.rate()
    for seed in tools.SEEDS:

        def of_trained(seed: int) -> dict[str, Any]:
            return probe(out, cell.adapter(rate, seed))

        title = cell.title(rate, seed)
        tools.recorded(STUDY, f"probe of {title}", of_trained, {"adapter": title}, seed=seed)


def main() -> None:
    options = tools.arguments(__doc__, STAGES)
    out = options.out.resolve()
    for stage in options.stage:
        arm, _, part = stage.rpartition("_")
        if stage == "base":
            settings = {"adapter": None, "dtype": tools.DTYPE}
            tools.recorded(STUDY, "scores of the base model", tools.score, settings, out=out, adapter=None)
        elif stage == "ratios":
            ratios(out)
        elif part in FRACTIONS:
            share, steps = FRACTIONS[part]
            Cell(out, arm, stage, steps, f"train_{share}.jsonl").run()
        else:
            Cell(out, stage, stage).run()


if __name__ == "__main__":
    main()
