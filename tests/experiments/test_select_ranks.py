"""Rank selection: the whole chain where the right answer is known, resuming, the cheap mode, controls, and patterns."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from torch import nn

from lorakit import evaluation, experiments
from lorakit.allocation.redistribution import (
    allowed_parameters,
    matched,
    redistribute,
    shuffled_at_equal_cost,
)
from lorakit.errors import AllocationError, EvaluationError, PlanError, TrialError
from lorakit.experiments import _select_plan
from lorakit.experiments._patterns import pattern_of
from lorakit.experiments._select_advice import advice_of

WIDTH, NEEDED = 16, 6


class Linears(nn.Module):
    """Queries and values side by side, without a bias."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.q_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        for linear in (self.q_proj, self.v_proj):
            linear.weight.data = torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5

    @property
    def device(self):
        return self.q_proj.weight.device

    def forward(self, x, y=None):
        out = torch.cat([self.q_proj(x), self.v_proj(x)], -1)
        return SimpleNamespace(out=out, loss=None if y is None else (out - y).square().mean())


def examples(n, seed):
    """Targets of a model whose values differ from `Linears` by an update of rank NEEDED, and whose queries do not."""
    generator = torch.Generator().manual_seed(99)
    left, right = torch.randn(WIDTH, NEEDED, generator=generator), torch.randn(NEEDED, WIDTH, generator=generator)
    x = torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        y = Linears()(x).out
    y[:, WIDTH:] += x @ (left @ right).T / WIDTH**0.5
    return x, y


def held_out(seed, scale=1.0):
    x, y = examples(40, seed)

    def score(model):
        return (-(model(x=scale * x).out - scale * y).square().mean(1)).tolist()

    return score


def loss_fn(model, batch):
    return (model(x=batch["x"]).out - batch["y"]).square().mean(1)


TEMPLATE = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
SETTINGS = {
    "steps": 150, "batch_size": 16, "learning_rate": 3e-2, "ranks": (2, 6, 8), "seeds": (0, 1, 2), "loss_fn": loss_fn,
    "progress": False, "tolerance": 0.05,
}  # fmt: skip


def select(**changes):
    x, y = examples(64, 1)
    arguments = SETTINGS | changes
    return experiments.select_ranks(
        Linears(), TEMPLATE, [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        tasks=evaluation.function(held_out(2), name="held-out"),
        **{"budget": 8 * 64, "shifted": evaluation.function(held_out(3, 1.5), name="shifted")} | arguments,
    )  # fmt: skip


def trained_keys(monkeypatch):
    """The names of what is trained from now on."""
    keys, trial = [], _select_plan.selection_trial

    def counting(work, name, config, seed):
        keys.append((name, seed))
        return trial(work, name, config, seed)

    monkeypatch.setattr(_select_plan, "selection_trial", counting)
    return keys


@pytest.mark.slow
def test_ranks_go_where_they_are_needed(tmp_path, monkeypatch):
    keys = trained_keys(monkeypatch)
    found = select(budget=4 * 64, ranks=(2, 4, 8), records=tmp_path)
    assert len(keys) == len(set(keys)) <= found.estimate.trainings + 1
    # Uniform rank 4 is what the budget allows, and values need 6: 2 for queries and 6 for values.
    assert (found.verdict, found.rank, found.budget) == ("FAIL", 4, 256)
    assert [(row.rank, row.verdict) for row in found.sweep] == [(2, "FAIL"), (4, "FAIL"), (8, "PASS")]
    by_group = {group.name: group for group in found.gains.groups}
    assert by_group["value"].gain > 10 * abs(by_group["query"].gain)
    assert by_group["value"].by_set["held-out"].lower > 0
    assert found.redistribution == "confirmed"
    assert found.ranks == {"q_proj": 2, "v_proj": 6}
    assert {arm.name for arm in found.confirmation} == {"uniform", "redistributed", "shuffled", "prior"}
    assert len({arm.params for arm in found.confirmation}) == 1
    scores = {arm.name: arm.scores["held-out"] for arm in found.confirmation}
    assert scores["redistributed"] > scores["uniform"] > scores["shuffled"]
    config = found.to_config()
    assert {n: config.rank_pattern.get(n, config.r) for n in ("q_proj", "v_proj")} == found.ranks
    assert {n: config.alpha_pattern.get(n, config.lora_alpha) for n in found.ranks} == {"q_proj": 4, "v_proj": 12}
    assert found.advice[0].called_for
    assert "value gains" in found.next_steps[0]
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["summary"]["redistribution"] == "confirmed"
    assert data["modules"][1]["rank"] == 6
    assert found.to_frame()["rank"].tolist() == [2, 6]
    assert "redistributed" in found._repr_html_()
    assert found.plot().axes
    # The same call trains nothing.
    before = len(keys)
    assert select(budget=4 * 64, ranks=(2, 4, 8), records=tmp_path).to_dict() == found.to_dict()
    assert len(keys) == before


@pytest.mark.slow
def test_the_smallest_rank_within_tolerance_is_chosen():
    found = select(tolerance=0.3)
    assert (found.verdict, found.rank) == ("PASS", 6)
    assert found.sweep[0].verdict == "FAIL"
    assert found.patterns == {"held-out": "saturating", "shifted": "saturating"}
    assert len({arm.params for arm in found.confirmation}) == 1
    assert [one.called_for for one in found.advice[1:]] == [False] * 3  # more rank for values comes first


@pytest.mark.slow
def test_an_interrupted_selection_goes_on(tmp_path, monkeypatch):
    short = {"steps": 3, "seeds": (0,), "ranks": (2, 4, 8), "records": tmp_path}
    whole = select(**short | {"records": tmp_path / "other"})
    keys, trial = [], _select_plan.selection_trial

    def failing(work, name, config, seed):
        if len(keys) == 5:
            raise KeyboardInterrupt
        keys.append((name, seed))
        return trial(work, name, config, seed)

    monkeypatch.setattr(_select_plan, "selection_trial", failing)
    with pytest.raises(KeyboardInterrupt):
        select(**short)
    monkeypatch.setattr(_select_plan, "selection_trial", trial)
    more = trained_keys(monkeypatch)
    again = select(**short)
    assert not set(keys) & set(more)
    assert [row.scores for row in again.sweep] == [row.scores for row in whole.sweep]
    assert again.ranks == whole.ranks


@pytest.mark.slow
def test_shards_share_the_trainings(tmp_path):
    short = {"steps": 2, "seeds": (0,), "ranks": (2, 4), "records": tmp_path}
    for shard in itertools.islice(itertools.cycle(["1/2", "2/2"]), 10):
        found = select(shard=shard, **short)
        if not isinstance(found, experiments.PlanResults):
            break
        assert found.missing
    assert isinstance(found, experiments.RankSelection)


def test_the_cheap_mode_trains_nothing_and_says_so(monkeypatch):
    keys = trained_keys(monkeypatch)
    found = select(cheap=True, budget=0.5)
    assert keys == []
    assert (found.verdict, found.rank, found.budget) == ("INCONCLUSIVE", None, 128)
    assert found.params <= 128
    assert found.ranks["v_proj"] > found.ranks["q_proj"]  # queries have no gradient
    assert any("no sweep" in line for line in found.not_checked)
    assert sum("not checked" in line for line in found.details) == 3
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot().axes


@pytest.mark.slow
def test_early_stopping_keeps_the_best_parameters():
    calls = []
    x, y = examples(40, 3)

    def rising_then_falling(model):
        loss = (model(x=x).out - y).square().mean(1)
        calls.append(loss.mean().item())
        return (-(loss - 1.0).abs()).tolist()  # the best is a loss of 1, not of 0

    shifted = evaluation.function(rising_then_falling, name="shifted")
    found = select(shifted=shifted, stop_every=5, patience=2, seeds=(0,), ranks=(4, 8))
    stopped = {row.name: row.steps[0] for row in found.sweep}
    assert all(0 < steps < 150 and steps % 5 == 0 for steps in stopped.values())
    with pytest.raises(ValueError, match="`stop_every` needs `shifted`"):
        select(stop_every=5, shifted=())


def test_marginal_gains_count_their_trainings(monkeypatch, capsys):
    keys = trained_keys(monkeypatch)
    x, y = examples(8, 1)
    found = experiments.marginal_gains(
        Linears(), TEMPLATE, [{"x": a, "y": b} for a, b in zip(x, y, strict=True)],
        tasks=evaluation.function(held_out(2), name="held-out"), r=2, delta=2, by="module", seeds=(0,), steps=2,
        batch_size=4, learning_rate=1e-2,
    )  # fmt: skip
    assert len(keys) == 3
    assert "3 trainings (2 modules)" in capsys.readouterr().err
    assert [group.params for group in found.groups] == [64, 64]
    assert found.groups[0].per_parameter == found.groups[0].gain / 64
    json.dumps(found.to_dict(), allow_nan=False)
    assert found.plot().axes
    assert len(found.to_frame()) == 2


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"seeds": (0, 1)}, EvaluationError, "`seeds` must be one, or at least 3"),
        ({"budget": 10}, AllocationError, "`budget` must cover rank 1 in all 2 modules .at least 64 parameters"),
        ({"budget": "much"}, ValueError, "`budget` must be a positive number of parameters"),
        ({"by": "head"}, ValueError, "`by` must be one of role, layer, module; got 'head'"),
        ({"tolerance": 0}, ValueError, "`tolerance` must be a finite number above 0"),
        ({"shifted": evaluation.function(len, name="held-out")}, EvaluationError, "must have different names"),
    ],
)
def test_invalid_arguments(changes, error, message):
    with pytest.raises(error, match=message):
        select(**changes)


def test_templates_whose_ranks_cannot_be_chosen():
    for template, message in (
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "must be a LORA or SPECLORA config"),
        (LoraConfig(r=2, target_modules=["q_proj"], rank_pattern={"q_proj": 1}), "must not have `rank_pattern`"),
    ):
        with pytest.raises(ValueError, match=message):
            _select_plan.target_modules(Linears(), template)


def test_a_task_that_fails_shows_before_any_training(monkeypatch):
    keys = trained_keys(monkeypatch)
    with pytest.raises(TrialError, match="without adapter"):
        select(shifted=evaluation.function(lambda model: [float("nan")], name="shifted"))
    assert keys == [("without adapter", 0)]


COSTS = st.lists(st.sampled_from([32, 48, 64, 96]), min_size=4, max_size=12)


@given(COSTS, st.data())
def test_redistribution_and_its_control_have_equal_parameters(costs, data):
    named = {f"layers.{i}.{'qv'[i % 2]}": cost for i, cost in enumerate(costs)}
    groups = {name: name[-1] for name in named}
    gains = {g: data.draw(st.floats(-1, 1)) for g in "qv"}
    rank = data.draw(st.integers(12, 24))
    params = rank * sum(costs)
    found = redistribute(gains, groups, named, r=rank // 2, delta=rank, budget=params)
    total = sum(found[name] * cost for name, cost in named.items())
    assert abs(total - params) <= 0.01 * params
    assert all(1 <= value <= rank // 2 + rank for value in found.values())
    assert gains["q"] <= 0 or found == redistribute(
        {g: 8 * value for g, value in gains.items()}, groups, named, r=rank // 2, delta=rank, budget=params
    )
    if len(set(found.values())) == 1:
        with pytest.raises(AllocationError, match="all are equal"):
            shuffled_at_equal_cost(found, named, largest=2 * rank, seed=0)
        return
    moved = shuffled_at_equal_cost(found, named, largest=2 * rank, seed=data.draw(st.integers(0, 9)))
    assert moved != found
    assert abs(sum(moved[name] * cost for name, cost in named.items()) - total) <= 0.01 * total


def test_shuffled_ranks_are_a_permutation_where_all_costs_are_equal():
    ranks, costs = {"a": 1, "b": 5, "c": 9}, {"a": 10, "b": 10, "c": 10}
    seen = {tuple(shuffled_at_equal_cost(ranks, costs, largest=9, seed=seed).values()) for seed in range(40)}
    assert seen == set(itertools.permutations((1, 5, 9))) - {(1, 5, 9)}


@pytest.mark.parametrize("rank", [4, 8, 16])
@pytest.mark.parametrize("gains", [{"q": 0.0, "v": 1.0}, {"q": 1.0, "v": 3.0}, {"q": 3.0, "v": 1.0}])
def test_shuffled_ranks_move_between_modules_of_unequal_cost(rank, gains):
    # Queries and values of a model with grouped-query attention: what either role gets must not survive.
    costs = {f"layers.{i}.{role}": cost for i in range(30) for role, cost in (("q", 1152), ("v", 768))}
    groups = {name: name[-1] for name in costs}
    params = rank * sum(costs.values())
    found = redistribute(gains, groups, costs, r=rank // 2, delta=rank, budget=params)
    for seed in range(3):
        moved = shuffled_at_equal_cost(found, costs, largest=2 * rank, seed=seed, params=params)
        assert abs(np.corrcoef(list(found.values()), [moved[name] for name in found])[0, 1]) < 0.5
        assert abs(sum(moved[name] * cost for name, cost in costs.items()) - params) <= 0.01 * params


def test_shuffled_ranks_have_the_parameters_of_uniform_ones():
    costs, ranks, params = {"a": 96, "b": 48, "c": 64}, {"a": 6, "b": 7, "c": 12}, 1664
    for seed in range(10):
        moved = shuffled_at_equal_cost(ranks, costs, largest=12, seed=seed, params=params)
        assert abs(sum(moved[name] * cost for name, cost in costs.items()) - params) <= 0.01 * params


def test_the_unit_of_gains_changes_nothing():
    costs = {f"layers.{i}.{'qv'[i % 2]}": cost for i, cost in enumerate([96, 32, 32, 32, 32, 32])}
    groups = {name: name[-1] for name in costs}
    arguments = {"groups": groups, "costs": costs, "r": 6, "delta": 12, "budget": 12 * sum(costs.values())}
    assert len({str(redistribute({"q": q, "v": 0.0}, **arguments)) for q in (5e-324, 2.3e-313, 1e-9, 1.0, 1e300)}) == 1


def test_parameters_that_cannot_be_matched():
    with pytest.raises(AllocationError, match="cannot be matched within 1 %: the nearest have 100"):
        matched({"a": 1}, {"a": 100}, 140, largest=9)
    with pytest.raises(AllocationError, match="must have the modules"):
        redistribute({"q": 1.0}, {"a": "q"}, {"b": 8}, r=1, delta=1, budget=9)


def test_budgets_have_the_form_that_they_have_everywhere():
    forms = [(1000, 1000), ("1k", 1000), ("4kB", 1000), (0.5, 400), ("0.5", 400), ("2.5k", 2500)]
    assert [allowed_parameters(budget, 800, 4) for budget, _ in forms] == [amount for _, amount in forms]


def flat(i, j):
    return 0.01


@given(st.lists(st.floats(0.2, 1), min_size=3, max_size=6), st.floats(0.1, 10), st.floats(-5, 5))
def test_falling_curves_are_gradual_or_saturating(steps, scale, level):
    losses = [level - scale * total for total in itertools.accumulate([0.0, *steps])]
    found = pattern_of(losses, flat)
    assert found == ("saturating" if steps[-1] <= 0.1 * sum(steps) * (1 - 1e-9) else "gradual") or (
        abs(steps[-1] - 0.1 * sum(steps)) < 1e-6
    )
    assert pattern_of([*losses, losses[-1]], flat) == "saturating"
    assert pattern_of([*losses, losses[-1] + 0.03], flat) == "unstable"
    assert pattern_of([*losses, losses[-1] + 0.01], flat) == "saturating"  # within the noise


def test_patterns_need_three_ranks_and_errors():
    assert pattern_of([2.0, 1.0], flat) is None
    assert pattern_of([3.0, 2.0, 1.0], lambda i, j: None) is None
    assert pattern_of([1.0, 1.0, 1.0], lambda i, j: 0.0) == "saturating"
    assert pattern_of([3.0, 1.0, 1.1], flat) == "unstable"
    assert pattern_of([3.0, 1.0, 1.1], flat, least=0.2) == "saturating"


@pytest.mark.slow
def test_other_processes_find_the_same(tiny_llama, data, tmp_path):
    ids = torch.randint(1, 64, (4, 6), generator=torch.Generator().manual_seed(7))
    template = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    settings = {
        "budget": 1.0, "tolerance": 1.0, "ranks": (2, 4), "seeds": (0,), "steps": 2, "batch_size": 2,
        "learning_rate": 1e-2, "progress": False,
    }  # fmt: skip

    def chosen(**where):
        task = evaluation.loss([{"input_ids": ids, "labels": ids}], name="held-out")
        return experiments.select_ranks(tiny_llama(), template, data, tasks=task, **settings, **where)

    here = chosen()
    with experiments.process_pool(1) as executor:
        there = chosen(executor=executor, records=tmp_path)
    assert there.ranks == here.ranks
    for ours, theirs in zip(here.confirmation, there.confirmation, strict=True):
        assert theirs.scores == pytest.approx(ours.scores, rel=1e-5)
    assert here.estimate.memory_bytes > 0
    changed = evaluation.loss([{"input_ids": ids + 0, "labels": ids.flip(0)}], name="held-out")
    with pytest.raises(PlanError, match="other settings: tasks.held-out"):
        experiments.select_ranks(tiny_llama(), template, data, tasks=changed, **settings, records=tmp_path)


@pytest.mark.parametrize(
    ("pattern", "targets", "bias", "called"),
    [
        ("gradual", ["q_proj"], "none", "more modules"),
        ("gradual", ["q_proj", "v_proj"], "none", "train biases and norms"),
        ("gradual", ["q_proj", "v_proj"], "lora_only", "full fine-tuning"),
        ("saturating", ["q_proj"], "none", None),
        ("unstable", ["q_proj"], "none", None),
    ],
)
def test_what_escalates_is_a_sweep_that_still_gains(pattern, targets, bias, called):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8) for name in ("q_proj", "v_proj")})
    template = LoraConfig(target_modules=targets, bias=bias)
    found = advice_of(model, template, targets, {"held-out": "saturating", "shifted": pattern}, None)
    assert [one.step for one in found if one.called_for] == ([] if called is None else [called])
