"""Rank sweeps: the order of the data, training against a plain loop, resuming, and that the base model is restored."""

from __future__ import annotations

import itertools
import json
import math
import random
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from closeness import assert_close_outputs, assert_close_reports
from peft import IA3Config, LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from lorakit import FisherLoRAConfig, SpecLoRAConfig, experiments
from lorakit.errors import CalibrationError, PlanError, TrialError, UnsupportedModelError
from lorakit.experiments._configs import at_rank

TARGETS = ["q_proj", "v_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)
SETTINGS = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "progress": False}


class Watched:
    """A `train` that trains nothing and records its batches and the random numbers."""

    def __init__(self):
        self.batches = {}
        self.draws = {}

    def __call__(self, model, batches, seed):
        (config,) = model.peft_config.values()
        assert model.training
        seen, draws = self.batches.setdefault((config.r, seed), []), self.draws.setdefault((config.r, seed), [])
        for batch in batches:
            seen.append(batch["input_ids"].tolist())
            draws.append((torch.rand(()).item(), random.random(), np.random.rand()))
            torch.rand(config.r)  # dropout draws numbers, too, as many as the rank needs


def test_batches_of_similar_length_are_the_same_for_all_ranks_and_need_lengths(tiny_llama, evaluate, data):
    short_and_long = [{"input_ids": torch.arange(2 + 20 * (i % 2)) % 7, "labels": torch.zeros(1)} for i in range(40)]
    settings = SETTINGS | {"steps": 10, "batch_size": 4, "ranks": (2, 4), "seeds": (0,)}

    def padded(examples):
        return {"input_ids": nn.utils.rnn.pad_sequence([e["input_ids"] for e in examples], True, -1)}

    def padding(group_by_length):
        watched = Watched()
        given = {"train": watched, "collate_fn": padded, "group_by_length": group_by_length}
        experiments.rank_sweep(tiny_llama(), LORA, short_and_long, evaluate, **settings, **given)
        assert watched.batches[2, 0] == watched.batches[4, 0]
        return sum(token == -1 for batch in watched.batches[2, 0] for row in batch for token in row)

    assert padding(True) < 0.6 * padding(False)
    settings["group_by_length"] = True
    with pytest.raises(ValueError, match="`group_by_length` needs a `batch_size`"):
        experiments.rank_sweep(tiny_llama(), LORA, data, evaluate, **settings | {"batch_size": None})
    with pytest.raises(TrialError, match="needs examples that are mappings with `input_ids`") as failed:
        experiments.rank_sweep(tiny_llama(), LORA, [(1, 2)] * 8, evaluate, **settings)
    assert isinstance(failed.value.__cause__, ValueError)


def test_all_ranks_see_the_same_batches_and_random_numbers(tiny_llama, data, evaluate):
    def masking(examples):  # as a masked language model needs
        ids = torch.stack([example["input_ids"] for example in examples])
        return {"input_ids": ids.masked_fill(torch.rand(ids.shape) < 0.3, 0)}

    watched = Watched()
    experiments.rank_sweep(
        tiny_llama(), LORA, data, evaluate, ranks=(2, 8), seeds=(0, 1), train=watched, collate_fn=masking,
        **SETTINGS | {"steps": 5},
    )  # fmt: skip
    assert set(watched.batches) == {(r, seed) for r in (2, 8) for seed in (0, 1)}
    for seed in (0, 1):
        assert watched.batches[2, seed] == watched.batches[8, seed]
        assert watched.draws[2, seed] == watched.draws[8, seed]
        assert len(set(watched.draws[2, seed])) == 5
    assert watched.batches[2, 0] != watched.batches[2, 1]
    assert watched.draws[2, 0] != watched.draws[2, 1]


def test_an_epoch_has_each_example_once(tiny_llama, data, evaluate):
    watched = Watched()
    experiments.rank_sweep(
        tiny_llama(), LORA, data, evaluate, ranks=(2,), seeds=(0,), train=watched, **SETTINGS | {"steps": 5}
    )
    seen = [tuple(row) for batch in watched.batches[2, 0] for row in batch]
    examples = {tuple(example["input_ids"].tolist()) for example in data}
    assert set(seen[:5]) == set(seen[5:]) == examples


def test_items_may_be_batches(tiny_llama, data, evaluate):
    watched = Watched()
    batches = [{"input_ids": torch.stack([a["input_ids"], b["input_ids"]])} for a, b in itertools.pairwise(data)]
    experiments.rank_sweep(
        tiny_llama(), LORA, batches, evaluate, ranks=(2,), seeds=(0,), train=watched, **SETTINGS | {"batch_size": None}
    )
    given = [batch["input_ids"].tolist() for batch in batches]
    assert len(watched.batches[2, 0]) == 3
    assert all(batch in given for batch in watched.batches[2, 0])


def plain_loop(model, config, data, evaluate, seed, steps, size, rate, warmup, decay):
    """The training of `rank_sweep`, spelled out: held-out losses, and the training losses."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    adapted = get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(seed)
    torch.empty((), dtype=torch.int64).random_(generator=generator)  # the loader's own seed
    order = []
    while len(order) < steps * size:
        order += torch.randperm(len(data), generator=generator).tolist()
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses = []
    for step in range(steps):
        torch.manual_seed(seed * 1_000_003 + step)
        rows = [data[i] for i in order[step * size : (step + 1) * size]]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss = adapted(**batch).loss
        gradients = torch.autograd.grad(loss, parameters)
        losses.append(loss.item())
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        lr = rate * (
            step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        )
        with torch.no_grad():
            for p, g, (m, v) in zip(parameters, gradients, moments, strict=True):
                g = g * min(1.0, 1.0 / (norm + 1e-6))
                m.mul_(0.9).add_(0.1 * g)
                v.mul_(0.999).add_(0.001 * g * g)
                p.mul_(1 - lr * decay)
                p.sub_(lr * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8))
    adapted.eval()
    with torch.no_grad():
        return evaluate(adapted).tolist(), losses


@pytest.mark.slow
def test_training_against_a_plain_loop(tiny_llama, data, evaluate):
    dropped = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_dropout=0.2)
    found = experiments.rank_sweep(
        tiny_llama(), {"one": dropped}, data, evaluate, steps=12, batch_size=2, learning_rate=3e-2, seeds=(5,),
        warmup_steps=2, weight_decay=0.1, progress=False,
    )  # fmt: skip
    expected, trained = plain_loop(tiny_llama(), dropped, data, evaluate, 5, 12, 2, 3e-2, 2, 0.1)
    (run,) = found.runs
    assert run.losses == pytest.approx(expected, rel=1e-5)
    assert run.train_loss == pytest.approx(trained[-1], rel=1e-5)
    assert run.params == 2 * 4 * (32 + 32 + 32 + 16)
    assert found.base.value == pytest.approx(evaluate(tiny_llama()).mean().item(), rel=1e-6)
    assert abs(found.ranks[0].loss.value - found.base.value) > 1e-3


LOSSES = {  # by rank and seed
    ("2", 0): [3.0, 2.0, 4.0], ("2", 1): [3.2, 2.2, 4.1],
    ("4", 0): [2.1, 1.6, 3.1], ("4", 1): [2.0, 1.7, 2.9],
    ("8", 0): [2.0, 1.5, 3.0], ("8", 1): [2.1, 1.6, 3.1],
}  # fmt: skip


class Table:
    """A `train` and an `evaluate` that return the losses of a table."""

    def __init__(self, table):
        self.table, self.now, self.calls = table, None, 0

    def train(self, model, batches, seed):
        (config,) = model.peft_config.values()
        self.now = (str(config.r), seed)

    def evaluate(self, model):
        self.calls += 1
        return [9.0] * len(next(iter(self.table.values()))) if self.now is None else self.table[self.now]


def test_statistics(tiny_llama, data):
    table = Table(LOSSES)
    found = experiments.rank_sweep(
        tiny_llama(), LORA, data, table.evaluate, ranks=(4, 2, 8), seeds=(0, 1), train=table.train, **SETTINGS
    )
    losses_by_rank = np.array([[LOSSES[name, seed] for seed in (0, 1)] for name in ("4", "2", "8")])
    assert (found.base.value, found.reference, found.num_examples) == (9.0, "8", 3)
    assert [row.rank for row in found.ranks] == [4, 2, 8]
    for row, losses in zip(found.ranks, losses_by_rank, strict=True):
        means = losses.mean(1)
        assert row.loss.value == pytest.approx(means.mean())
        assert row.loss.stderr == pytest.approx(means.std(ddof=1) / math.sqrt(2))
        apart = losses - losses_by_rank[2]
        seeds = apart.mean(1).std(ddof=1) / math.sqrt(2)
        examples = apart.mean(0).std(ddof=1) / math.sqrt(3)
        assert row.difference.value == pytest.approx(apart.mean(), abs=1e-12)
        assert row.difference.stderr_seeds == pytest.approx(seeds, abs=1e-12)
        assert row.difference.stderr_examples == pytest.approx(examples, abs=1e-12)
        assert row.difference.stderr == pytest.approx(math.hypot(seeds, examples), abs=1e-12)
        assert row.params == 2 * row.rank * (32 + 32 + 32 + 16)
    assert found.best.name == "8"
    assert found.smallest.name == "4"  # 0.0167 above the best, with a standard error of 0.094
    assert found.difference(2, 4).value == pytest.approx((losses_by_rank[1] - losses_by_rank[0]).mean())
    with pytest.raises(ValueError, match="`first` and `second` must be among 4, 2, 8; got 16"):
        found.difference(16, 4)
    read = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (read["best"], read["smallest"]) == ("8", "4")
    assert found.pattern == read["pattern"] == "saturating"  # the last step is 0.017 of 0.87
    assert read["runs"][0] == {"name": "4", "seed": 0, "params": 896, "losses": LOSSES["4", 0], "train_loss": None}
    assert found.headline.startswith("lowest loss at 8: 2.217 ± 0.050, without adapter 9 ± 0;")
    assert found.headline.endswith("smallest within one standard error: 4")
    assert found.details[0].startswith("4: 896 parameters, loss 2.233 ± 0.033, 0.017 ± 0.094 against 8")
    assert found.to_frame()["difference"].tolist() == [row.difference.value for row in found.ranks]
    assert len(repr(found).splitlines()) == 4
    figure = found.plot()
    left, right = figure.axes
    assert figure.get_suptitle() == "LlamaForCausalLM, 3 steps"
    assert [tick.get_text() for tick in left.get_xticklabels()] == ["2", "4", "8"]
    assert right.containers[0][0].get_ydata() == pytest.approx([found.ranks[i].difference.value for i in (1, 0, 2)])


def test_one_number_and_one_seed_have_no_standard_error(tiny_llama, data):
    table = Table({("2", 0): [2.0], ("4", 0): [1.0]})
    found = experiments.rank_sweep(
        tiny_llama(), LORA, data, lambda m: table.evaluate(m)[0], ranks=(2, 4), seeds=(0,), train=table.train,
        reference=2, **SETTINGS,
    )  # fmt: skip
    assert [row.difference.value for row in found.ranks] == [0.0, -1.0]
    assert found.ranks[1].difference.stderr is None
    assert found.best.name == "4"
    assert found.smallest is None
    assert "no standard error" in found.headline
    assert found.pattern is None
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot().axes


@pytest.mark.slow
def test_query_ranks_alone(tiny_llama, data, evaluate):
    configs = {r_q: FisherLoRAConfig(r=8, r_q=r_q) for r_q in (8, 2)}
    found = experiments.rank_sweep(tiny_llama(), configs, data, evaluate, seeds=(0,), **SETTINGS)
    assert [(row.rank, row.params) for row in found.ranks] == [(8, 2 * 8 * 112), (2, 2 * (2 * 64 + 8 * 48))]
    named = {"ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), "lora": LORA}
    found = experiments.rank_sweep(tiny_llama(), named, data, evaluate, seeds=(0,), reference="ia3", **SETTINGS)
    assert [row.rank for row in found.ranks] == [None, None]
    assert found.ranks[0].difference.value == 0
    assert found.plot().axes[0].get_xlabel() == "config"


@pytest.mark.slow
def test_interrupted_sweeps_continue(tiny_llama, data, evaluate, tmp_path):
    records = tmp_path / "new" / "sweep"
    whole = experiments.rank_sweep(tiny_llama(), LORA, data, evaluate, ranks=(2, 4), seeds=(0, 1), **SETTINGS)
    calls = []

    def failing(model):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(model)

    model = tiny_llama()
    with pytest.raises(KeyboardInterrupt):
        experiments.rank_sweep(model, LORA, data, failing, ranks=(2, 4), seeds=(0, 1), records=records, **SETTINGS)
    kept = [json.loads(path.read_text()) for path in records.iterdir()]
    assert {record["key"] for record in kept} == {"without adapter", "2 with seed 0", "4 with seed 0"}
    again = experiments.rank_sweep(model, LORA, data, failing, ranks=(2, 4), seeds=(0, 1), records=records, **SETTINGS)
    assert_close_reports(again, whole)
    assert len(calls) == 6
    more = experiments.rank_sweep(model, LORA, data, failing, ranks=(2, 4, 8), seeds=(0,), records=records, **SETTINGS)
    assert len(calls) == 7
    assert [row.name for row in more.ranks] == ["2", "4", "8"]
    assert (
        experiments.rank_sweep(model, LORA, data, failing, ranks=(2, 4), seeds=(0, 1), records=records, **SETTINGS)
        == again
    )
    assert len(calls) == 7
    assert len(list(records.iterdir())) == 6


@pytest.mark.slow
def test_records_of_other_settings_are_refused(tiny_llama, data, evaluate, tmp_path):
    settings = {"ranks": (2,), "seeds": (0,), "records": tmp_path, **SETTINGS}
    experiments.rank_sweep(tiny_llama(), LORA, data, evaluate, **settings)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(PlanError, match="record of '2 with seed 0' in .* other settings: steps 3, now 4. Use another"):
        experiments.rank_sweep(tiny_llama(), LORA, data, evaluate, **settings | {"steps": 4, "warmup_steps": 1})
    with pytest.raises(PlanError, match=r"settings: config.lora_alpha 4, now 8"):
        experiments.rank_sweep(
            tiny_llama(), LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS), data, evaluate, **settings
        )
    with pytest.raises(PlanError, match="train_examples 5, now 4"):
        experiments.rank_sweep(tiny_llama(), LORA, data[:4], evaluate, **settings)
    with pytest.raises(PlanError, match="schedule 'cosine', now 'linear'"):
        experiments.rank_sweep(tiny_llama(), LORA, data, evaluate, schedule="linear", **settings)
    with pytest.raises(TrialError, match="4 with seed 0 it returned 2, before 4"):
        experiments.rank_sweep(tiny_llama(), LORA, data, lambda m: evaluate(m)[:2], **settings | {"ranks": (2, 4)})
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def snapshot(model):
    config = getattr(model, "config", None)
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(id(p), p.requires_grad, p.grad) for p in model.parameters()],
        [(id(module), module.training, sorted(vars(module))) for module in model.modules()],
        None if config is None else dict(vars(config)),
        (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
    )


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(value, after[0][name]) for name, value in before[0].items())


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["fc", "attn.out"], bias="all", modules_to_save=["head"], lora_dropout=0.1),
        LoraConfig(r=2, target_modules=["fc"], bias="lora_only"),
        LoraConfig(r=2, target_modules=["fc"], init_lora_weights="pissa"),
        LoraConfig(r=2, target_modules=["fc"], init_lora_weights="olora"),
        SpecLoRAConfig(r=2, target_modules=["fc"], k=4),
        LoraConfig(r=2, target_modules=["mha", "fc"]),
    ],
    ids=["biases", "lora_only", "pissa", "olora", "speclora", "attention"],
)
@pytest.mark.parametrize("fails", [None, "train", "evaluate", "data"])
def test_the_base_model_is_restored(config, fails):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
            self.attn = nn.ModuleDict({"out": nn.Linear(8, 8)})
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, labels=None):
            h = self.attn["out"](self.norm(self.fc(x)))
            out = self.head(self.mha(h[None], h[None], h[None])[0][0])
            return type("Out", (), {"logits": out, "loss": None if labels is None else F.cross_entropy(out, labels)})

    model = Net()
    model.fc.weight.requires_grad_(False)
    model.fc.bias.grad = torch.ones(8)
    model.norm.eval()
    x = torch.randn(6, 8)
    data = [{"x": row, "labels": torch.tensor(i % 3)} for i, row in enumerate(x)]
    evaluated = []

    def evaluate(m):
        evaluated.append(m(x=x).logits)
        if fails == "evaluate" and len(evaluated) == 2:
            raise KeyError("evaluate")
        return evaluated[-1].square().mean(1)

    def collate(examples):
        if fails == "data":
            raise KeyError("data")
        return torch.utils.data.default_collate(examples)

    def failing(m, batches, seed):
        next(batches)
        with torch.no_grad():
            for parameter in m.parameters():
                if parameter.requires_grad:
                    parameter.add_(1)
        raise KeyError("train")

    before = snapshot(model)
    arguments = {"collate_fn": collate, "train": failing if fails == "train" else None, "seeds": (0, 1), **SETTINGS}
    if fails is None:
        experiments.rank_sweep(model, {"a": config}, data, evaluate, **arguments)
        assert not torch.equal(evaluated[0], evaluated[1])  # something was trained
    else:
        with pytest.raises(TrialError, match=f"KeyError: '{fails}'"):
            experiments.rank_sweep(model, {"a": config}, data, evaluate, **arguments)
    assert_same(before, snapshot(model))
    assert_close_outputs(model.eval()(x=x).logits, evaluated[0])


def test_a_transformers_model_is_restored_and_configs_do_not_change(tiny_gpt2, data, evaluate):
    model = tiny_gpt2()
    config = LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    before, settings = snapshot(model), config.to_dict()
    experiments.rank_sweep(model, config, data, evaluate, ranks=(2, 4), seeds=(0,), **SETTINGS)
    assert_same(before, snapshot(model))
    assert config.to_dict() == settings


def test_each_run_has_a_config_of_its_own(data, evaluate):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForSequenceClassification(LlamaConfig(**small, vocab_size=64, pad_token_id=0)).eval()
    seen = []

    def train(adapted, batches, seed):
        (config,) = adapted.peft_config.values()
        seen.append(list(config.modules_to_save))  # PEFT adds the head
        assert next(batches)["input_ids"].shape == (2, 6)
        assert all(parameter.grad is None for parameter in adapted.parameters())

    config = LoraConfig(r=4, target_modules=TARGETS, task_type="SEQ_CLS")
    ids = data[0]["input_ids"][None]
    model.score.weight.grad = torch.ones_like(model.score.weight)
    experiments.rank_sweep(
        model, config, data, lambda m: float(m(input_ids=ids).logits.sum()), ranks=(2,), train=train, **SETTINGS
    )
    assert seen == [seen[0]] * 3
    assert config.modules_to_save is None


@pytest.mark.slow
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("rank", [4, 8, 64])
def test_a_template_keeps_every_scaling(use_rslora, rank, tiny_llama):
    patterns = {"rank_pattern": {"v_proj": 4, "layers.1.mlp.up_proj": 16}, "alpha_pattern": {"k_proj": 12, "v_proj": 5}}
    targets = {"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj"], "use_rslora": use_rslora}
    for config in (
        LoraConfig(r=8, lora_alpha=24, **targets, **patterns),
        FisherLoRAConfig(r=8, r_q=2, r_v=6, **targets),
        SpecLoRAConfig(r=8, lora_alpha=24, k=7, **targets),
    ):
        layers = {}
        for variant in (config, at_rank(config, rank)):
            model = get_peft_model(tiny_llama(), variant)
            layers[variant.r] = [
                (m.r["default"], m.scaling["default"]) for m in model.modules() if isinstance(m, LoraLayer)
            ]
        assert len(layers[8]) == 8
        for (r, scaling), (scaled_r, same) in zip(layers[8], layers[rank], strict=True):
            assert scaled_r == r * rank // 8
            assert same == pytest.approx(scaling, rel=1e-6)


def test_templates_that_cannot_be_scaled_to_a_rank():
    with pytest.raises(ValueError, match="`r_q` 4 at r = 16 would be 0.5 at rank 2, which is not an integer"):
        at_rank(FisherLoRAConfig(r=16, r_q=4), 2)
    with pytest.raises(ValueError, match=r"`rank_pattern\['q_proj'\]` 3 at r = 4 would be 1.5 at rank 2"):
        at_rank(LoraConfig(r=4, rank_pattern={"q_proj": 3}), 2)
    with pytest.raises(ValueError, match="must be one of LORA, FISHERLORA, SPECLORA; got IA3"):
        at_rank(IA3Config(), 2)


@pytest.mark.slow
def test_invalid_arguments_are_refused(tiny_llama, data, evaluate):
    def sweep(configs=LORA, examples=data, model=None, **changes):
        experiments.rank_sweep(model or tiny_llama(), configs, examples, evaluate, **SETTINGS | changes)

    for changes, message in (
        ({"ranks": ()}, "`ranks` must be distinct positive integers"),
        ({"ranks": (4, 4)}, "`ranks` must be distinct positive integers"),
        ({"ranks": (0,)}, "`ranks` must be distinct positive integers"),
        ({"ranks": 8}, "`ranks` must be distinct positive integers, at least one; got 8"),
        ({"seeds": 3}, "`seeds` must be distinct integers, at least one; got 3"),
        ({"seeds": ()}, "`seeds` must be distinct integers"),
        ({"seeds": (1, 1)}, "`seeds` must be distinct integers"),
        ({"steps": 0}, "`steps` must be a positive integer; got 0"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer; got 0"),
        ({"schedule": "step"}, "`schedule` must be one of cosine, linear, constant; got 'step'"),
        ({"shard": "1/2"}, "`shard` needs `records`: the directory where all shards keep their results"),
        ({"executor": 2}, "`executor` must be a concurrent.futures.Executor, or None; got int"),
        ({"executor": ThreadPoolExecutor(1)}, "`executor` must run trainings in other processes: threads share"),
        ({"warmup_steps": -1}, "`warmup_steps` must be a non-negative integer; got -1"),
        ({"learning_rate": 0}, "`learning_rate` must be a finite number above 0; got 0"),
        ({"reference": 5}, "`reference` must be one of 4, 8, 16, 32, 64; got 5"),
        ({"examples": []}, "`train_data` must be a non-empty dataset with a length"),
        ({"examples": iter(data)}, "`train_data` must be a non-empty dataset with a length"),
        ({"configs": {}}, "`configs` must map names to PEFT configs"),
        ({"configs": {"a": 4}}, r"`configs` must map names to PEFT configs, at least one; got \['a'\]"),
        ({"configs": {2: LORA, "2": LORA}}, "`configs` must have different names"),
        ({"configs": 4}, "must be a PEFT config or a mapping of them; got int"),
        ({"configs": {"a": LORA}, "ranks": (2,)}, "`ranks` scale a template config"),
        ({"model": get_peft_model(tiny_llama(), LORA)}, "`model` must be a base model, since each run attaches"),
    ):
        with pytest.raises((ValueError, UnsupportedModelError), match=message):
            sweep(**changes)


def test_arguments_of_the_wrong_type_are_refused(tiny_llama, data, evaluate):
    settings = {"steps": 1, "batch_size": 1, "learning_rate": 1e-3, "ranks": (2,)}
    with pytest.raises(TypeError, match="`model` must be a model .* got NoneType"):
        experiments.rank_sweep(None, LoraConfig(r=2), data, evaluate, **settings)
    with pytest.raises(TypeError, match="`evaluate` must be a function of the model; got str"):
        experiments.rank_sweep(tiny_llama(), LoraConfig(r=2), data, "loss", **settings)


def test_non_finite_losses_are_refused(tiny_llama, data, evaluate):
    model = tiny_llama()
    before = snapshot(model)
    calls = []

    def collate(examples):
        calls.append(1)
        embeddings = torch.full((2, 6, 32), math.inf if len(calls) == 3 else 0.1)
        return {"inputs_embeds": embeddings, "labels": torch.stack([example["labels"] for example in examples])}

    with pytest.raises(
        TrialError, match="of 4 with seed 0 is not finite from step 2 on: lower the learning rate or check"
    ) as raised:
        experiments.rank_sweep(model, LORA, data, evaluate, ranks=(4,), collate_fn=collate, **SETTINGS | {"steps": 8})
    assert_same(before, snapshot(model))
    unlabelled = [{"input_ids": example["input_ids"]} for example in data]
    assert isinstance(raised.value.__cause__, CalibrationError)
    with pytest.raises(TrialError, match="no loss for a training batch. Give the examples labels"):
        experiments.rank_sweep(model, LORA, unlabelled, evaluate, ranks=(4,), **SETTINGS)
