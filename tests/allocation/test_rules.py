"""Ranks under a budget."""

from __future__ import annotations

import itertools
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import lorakit
from lorakit.allocation import RULES, allocate, read_budget
from lorakit.errors import AllocationError

ROLE_NAMES = ("query", "value", "output", None)
SPECTRA = st.lists(
    st.tuples(st.lists(st.floats(0, 1e3), min_size=1, max_size=5), st.integers(1, 9)), min_size=1, max_size=6
)


def energy(spectra, ranks):
    return sum(sum(v**2 for v in sorted(s, reverse=True)[: ranks[name]]) for name, s in spectra.items())


@st.composite
def problems(draw):
    """Arguments that fit any rule, with a budget that covers the smallest ranks."""
    rule = draw(st.sampled_from(RULES))
    names = [f"layers.{i}" for i in range(draw(st.integers(2, 6)))]
    roles = ["query", "value", *(draw(st.sampled_from(ROLE_NAMES)) for _ in names[2:])]
    score = st.floats(0, 1e6)
    if rule == "energy":
        score = st.lists(score, min_size=1, max_size=6)
    d_out = {name: draw(st.integers(1, 30)) for name in names}
    costs = {name: d_out[name] + draw(st.integers(1, 30)) for name in names}
    min_rank = draw(st.integers(1, 2))
    return {
        "scores": {name: draw(score) for name in names},
        "costs": costs,
        "budget": min_rank * sum(costs.values()) + draw(st.integers(0, 1000)),
        "rule": rule,
        "min_rank": min_rank,
        "max_rank": draw(st.integers(min_rank, 12)),
        "per": draw(st.sampled_from(["module", "role"])),
        "roles": dict(zip(names, roles, strict=True)),
        "d_out": d_out,
    }


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=300, deadline=None)
def test_every_rule_keeps_within_budget_and_bounds(problem):
    result = allocate(**problem)
    assert result.cost == sum(rank * problem["costs"][name] for name, rank in result.ranks.items()) <= result.budget
    assert all(problem["min_rank"] <= rank <= problem["max_rank"] for rank in result.ranks.values())
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.mark.slow
@given(problem=problems(), order=st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_order_of_the_modules_does_not_matter(problem, order):
    names = list(problem["costs"])
    order.shuffle(names)
    shuffled = {k: {n: v[n] for n in names} if isinstance(v, dict) else v for k, v in problem.items()}
    assert allocate(**shuffled).ranks == allocate(**problem).ranks


@pytest.mark.slow
@given(problem=problems())
@settings(max_examples=200, deadline=None)
def test_ranks_per_role_are_the_same_in_a_role(problem):
    result = allocate(**problem | {"per": "role"})
    by_role = {}
    for row in result.modules:
        by_role.setdefault(row.role or row.module_name, set()).add(row.rank)
    assert all(len(ranks) == 1 for ranks in by_role.values())


@pytest.mark.slow
@given(modules=SPECTRA, extra=st.integers(0, 100), max_rank=st.none() | st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_nothing_worth_taking_that_fits_is_left(modules, extra, max_rank):
    spectra = {str(i): s for i, (s, _) in enumerate(modules)}
    costs = {str(i): cost for i, (_, cost) in enumerate(modules)}
    budget = sum(costs.values()) + extra
    result = allocate(spectra, costs, budget, max_rank=max_rank)
    for name, rank in result.ranks.items():
        limit = len(spectra[name]) if max_rank is None else min(len(spectra[name]), max_rank)
        left = sorted(spectra[name], reverse=True)[rank:limit]
        peak = max(map(max, spectra.values())) or 1.0
        assert not left or (left[0] / peak) ** 2 == 0 or result.cost + costs[name] > budget


@pytest.mark.slow
@given(modules=SPECTRA, extra=st.integers(0, 60), more=st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_a_larger_budget_never_keeps_less_energy(modules, extra, more):
    spectra = {str(i): s for i, (s, _) in enumerate(modules)}
    costs = {str(i): cost for i, (_, cost) in enumerate(modules)}
    least = sum(costs.values())
    small, large = (allocate(spectra, costs, least + e).ranks for e in (extra, extra + more))
    assert energy(spectra, large) >= energy(spectra, small) * (1 - 1e-12)


@pytest.mark.slow
@given(
    modules=st.lists(
        st.tuples(st.lists(st.integers(0, 20), min_size=1, max_size=3), st.integers(1, 5)), min_size=1, max_size=3
    ),
    extra=st.integers(0, 15),
)
@settings(max_examples=150, deadline=None)
def test_energy_against_the_best_of_all_choices(modules, extra):
    """Greedy is optimal at equal costs, and elsewhere short of the best by less than one unit's energy."""
    spectra = {str(i): s for i, (s, _) in enumerate(modules)}
    for costs in ({str(i): c for i, (_, c) in enumerate(modules)}, dict.fromkeys(spectra, 7)):
        budget = sum(costs.values()) + extra
        choices = [
            dict(zip(spectra, choice, strict=True))
            for choice in itertools.product(*(range(1, len(s) + 1) for s in spectra.values()))
        ]
        best = max(
            energy(spectra, choice)
            for choice in choices
            if sum(costs[name] * rank for name, rank in choice.items()) <= budget
        )
        found = energy(spectra, allocate(spectra, costs, budget).ranks)
        if len(set(costs.values())) == 1:
            assert found == pytest.approx(best)
        else:
            assert found <= best * (1 + 1e-12)
            assert best - found <= max(v**2 for s in spectra.values() for v in s)


def test_the_fisher_rule_is_the_formula_taken_greedily():
    scores, d_out, costs = {"q": 1.0, "v": 40.0, "o": 9.0}, {"q": 8, "v": 4, "o": 8}, {"q": 16, "v": 12, "o": 16}
    ranks, left = dict.fromkeys(scores, 1), 400 - 44
    while True:
        gains = {
            n: scores[n] * d_out[n] * (1 / r - 1 / (r + 1)) / costs[n] for n, r in ranks.items() if costs[n] <= left
        }
        if not gains:
            break
        best = max(gains, key=gains.get)
        ranks[best] += 1
        left -= costs[best]
    result = allocate(scores, costs, 400, rule="fisher", d_out=d_out)
    assert result.ranks == ranks
    assert result.cost == 400 - left


def test_fisherlora_is_the_papers_rule_and_spectral_its_opposite():
    """At equal widths 0.625 of uniform rank 16 is r_Q = 4 and r_V = 16."""
    roles = {f"layers.{i}.{name}": role for i in range(3) for name, role in (("q", "query"), ("v", "value"))}
    costs = dict.fromkeys(roles, 128)
    scores = dict.fromkeys(roles, 1.0)
    budget = int(0.625 * 16 * sum(costs.values()))
    for rule, kept in (("fisherlora", "value"), ("spectral", "query")):
        result = allocate(scores, costs, budget, rule=rule, max_rank=16, roles=roles)
        assert result.ranks == {name: 16 if role == kept else 4 for name, role in roles.items()}
        assert result.cost == budget


def test_the_prior_is_a_proportion():
    costs = {"a": 100, "b": 400, "c": 100}
    scores = {"a": 1.0, "b": 1.0, "c": 3.0}
    ranks = allocate(scores, costs, 100_000, rule="prior").ranks
    scale = ranks["a"] / (scores["a"] * math.sqrt(costs["a"]))
    for name, rank in ranks.items():
        assert rank == pytest.approx(scale * scores[name] * math.sqrt(costs[name]), abs=2)
    assert allocate(scores, costs, 99_000, rule="uniform").ranks == dict.fromkeys(costs, 165)


def test_ties_go_to_the_first_layer_and_what_does_not_fit_is_skipped():
    costs = {"layers.10": 1, "layers.2": 1}
    assert allocate({name: [2, 1] for name in costs}, costs, 3).ranks == {"layers.10": 1, "layers.2": 2}
    assert allocate({"a": [9, 9], "b": [1, 1]}, {"a": 10, "b": 2}, 16).ranks == {"a": 1, "b": 2}
    assert allocate({"a": [3, 0, 0], "b": [1]}, {"a": 1, "b": 1}, 100).ranks == {"a": 1, "b": 1}
    assert allocate({"a": [0.0]}, {"a": 1}, 5, min_rank=0).ranks == {"a": 0}
    assert allocate({"a": [1.0, 2.0, 3.0]}, {"a": 1}, 5, max_rank=2).ranks == {"a": 2}
    assert allocate({"a": [3, 2, 1], "b": [3, 2, 1]}, {"a": 1, "b": 1}, 6, max_rank={"a": 1, "b": 3}).ranks == {
        "a": 1,
        "b": 3,
    }
    assert allocate({}, {}, 0).ranks == {}


def test_it_explains_itself():
    result = allocate({"a": [9, 9, 0], "b": [1, 1], "c": [5]}, {"a": 10, "b": 200, "c": 1}, 250)
    by_role, by_module, spent = result.explain().split("\n\n")
    assert by_role.splitlines()[0].split() == ["role", "modules", "mean", "score", "rank", "cost"]
    assert [line.split() for line in by_role.splitlines()[1:]] == [
        ["a", "1", "162", "2", "20"],
        ["b", "1", "2", "1", "200"],
        ["c", "1", "25", "1", "1"],
    ]
    text = by_module.splitlines()
    assert [line.split()[0] for line in text[1:4]] == ["a", "b", "c"]
    assert "another unit gains nothing" in text[1]
    assert "costs 200 with 29 left" in text[2]
    assert "the largest rank allowed is 1" in text[3]
    assert spent == "rule energy, per module: 221 of 250 (88.4%) spent"
    assert [(row.score, row.cost, row.rank) for row in result.modules] == [(162, 10, 2), (2, 200, 1), (25, 1, 1)]


def test_the_ranks_as_a_plain_lora():
    result = allocate({"x.a": [9, 9, 0], "x.b": [1, 1], "x.c": [5]}, {"x.a": 10, "x.b": 200, "x.c": 1}, 250)
    config = result.to_config(r=2, lora_alpha=6, lora_dropout=0.1)
    assert (type(config), config.lora_dropout) == (LoraConfig, 0.1)
    base = nn.ModuleDict({"x": nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcd"})})
    model = get_peft_model(base, config)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if isinstance(layer, LoraLayer)}
    assert {name: layer.r["default"] for name, layer in layers.items()} == result.ranks
    assert {layer.scaling["default"] for layer in layers.values()} == {3.0}
    model.add_adapter("other", result.to_config(r=2, lora_alpha=6, use_rslora=True))
    scalings = {layer.scaling["other"] for layer in layers.values()}
    assert sorted(scalings) == pytest.approx([6 / 2**0.5] * len(scalings))
    assert result.to_config().r == 1  # the commonest
    with pytest.raises(ValueError, match="must not have rank_pattern"):
        result.to_config(rank_pattern={})
    none = allocate({"a": [0.0]}, {"a": 1}, 3, min_rank=0)
    with pytest.raises(AllocationError, match="all ranks are 0"):
        none.to_config()


def allocated(**changes):
    roles = {f"layers.{i}.{name}": role for i in range(2) for name, role in (("q_proj", "query"), ("v_proj", "value"))}
    settings = {"rule": "fisherlora", "max_rank": 16, "roles": roles} | changes
    return allocate(dict.fromkeys(roles, 1.0), dict.fromkeys(roles, 128), 5120, **settings)


@pytest.mark.slow
def test_it_is_a_report():
    report = allocated()
    assert report.headline == "4 modules, rank 4–16, 5.12k of 5.12k spent (rule fisherlora, per module)"
    assert report.details == ("query: rank 4 in 2 modules", "value: rank 16 in 2 modules")
    assert [row["rank"] for row in report.rows()] == list(report.ranks.values()) == [4, 16, 4, 16]
    assert report.to_dict()["summary"] == {"rule": "fisherlora", "per": "module", "budget": 5120, "cost": 5120}
    assert "rank 4–16" in repr(report)
    assert "q_proj" in report._repr_html_()
    empty = allocate({}, {}, 0)
    assert (empty.headline, empty.next_steps) == ("0 modules, rank none, 0 of 0 spent (rule energy, per module)", ())
    assert empty.plot().axes == []


@pytest.mark.slow
@pytest.mark.parametrize("dropped", [(), ("layers.1.q_proj",)])
def test_its_next_step_makes_a_model_with_its_ranks(dropped):
    names = [f"layers.{i}.{name}" for i in range(9) for name in ("q_proj", "v_proj")]
    for count in (2, 9):  # the pattern written out, and taken from `allocation`
        kept = names[: 2 * count]
        spectra = {name: [0.0] if name in dropped else [1.0] * (1 + i % 5) for i, name in enumerate(kept)}
        allocation = allocate(spectra, dict.fromkeys(kept, 64), 10**6, min_rank=0)
        (step,) = allocation.next_steps
        config = eval(step, {"lorakit": lorakit, "allocation": allocation})
        layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "v_proj")}) for _ in range(count)
        )
        model = get_peft_model(nn.ModuleDict({"layers": layers}), config).base_model.model
        found = {name: layer.r["default"] for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        assert found == {name: rank for name, rank in allocation.ranks.items() if rank}


def test_its_figure_has_a_panel_for_each_role_and_a_bar_for_each_layer():
    figure = allocated().plot()
    assert figure.get_suptitle() == "Ranks by rule fisherlora, per module"
    assert [axes.get_title() for axes in figure.axes] == ["query", "value"]
    assert [[bar.get_height() for bar in axes.patches] for axes in figure.axes] == [[4, 4], [16, 16]]
    outside = allocate({"layers.3.fc1": [1, 1], "lm_head": [1]}, {"layers.3.fc1": 1, "lm_head": 1}, 9).plot()
    assert [[bar.get_height() for bar in axes.patches] for axes in outside.axes] == [[2, 0], [0, 1]]
    assert [text.get_text() for text in outside.axes[-1].get_xticklabels()] == ["3", "–"]


GOOD = {"scores": {"a": 1.0, "b": 2.0}, "costs": {"a": 10, "b": 1}, "budget": 20, "rule": "uniform"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_rank": 2}, r"`budget` must cover rank 2 in all 2 modules \(at least 22\); got 20"),
        ({"rule": "other"}, "`rule` must be one of fisher, fisherlora, spectral, energy, prior, uniform; got 'other'"),
        ({"per": "layer"}, "`per` must be one of module, role"),
        ({"costs": {"a": 1}}, r"`scores` and `costs` must have the same modules; they differ in \['b'\]"),
        ({"costs": {"a": 1, "b": 0}}, r"`costs\['b'\]` must be a positive integer; got 0"),
        ({"costs": {"a": 1, "b": 1.5}}, r"`costs\['b'\]` must be a positive integer; got 1.5"),
        ({"budget": 20.5}, "`budget` must be an integer"),
        ({"min_rank": 3, "max_rank": 2}, r"`min_rank` must be an integer in \[0, `max_rank`\]"),
        ({"max_rank": {"a": 2, "b": 0}}, r"`min_rank` must be an integer in \[0, `max_rank`\]"),
        ({"scores": {"a": -1.0, "b": 0}}, "`scores` must be finite and not negative; got -1.0 for 'a'"),
        ({"scores": {"a": math.nan, "b": 0}}, "`scores` must be finite"),
        ({"rule": "energy"}, "`scores` must be sequences of singular values"),
        ({"rule": "energy", "scores": {"a": [1], "b": [math.inf]}}, "`scores` must be finite"),
        ({"rule": "fisher"}, "`d_out`, each module's output width, is required by the rule 'fisher'"),
        ({"rule": "fisher", "d_out": {"a": 1, "b": 1}, "min_rank": 0}, "`min_rank` must be at least 1"),
        ({"rule": "fisherlora", "max_rank": 4}, "`roles` is required by the rule 'fisherlora'"),
        ({"rule": "spectral", "roles": {"a": "query", "b": "value"}}, "`max_rank` is required by the rule 'spectral'"),
        (
            {"rule": "spectral", "roles": {"a": "query", "b": None}, "max_rank": 4},
            "must include query and value projections for the rule 'spectral'",
        ),
        ({"per": "role"}, "`roles` is required by per='role'"),
    ],
)
def test_bad_arguments_say_what_is_needed(changes, message):
    with pytest.raises(AllocationError, match=message):
        allocate(**GOOD | changes)


@pytest.mark.parametrize(
    ("given_", "meant"),
    [
        (5, (5, "parameters")),
        ("2M", (2_000_000, "parameters")),
        ("1.5k", (1500, "parameters")),
        ("4MB", (4_000_000, "bytes")),
        ("4 MiB", (4 * 2**20, "bytes")),
        ("10b", (10, "bytes")),
    ],
)
def test_budgets_as_people_write_them(given_, meant):
    assert read_budget(given_) == meant


@pytest.mark.parametrize("given_", [0, -1, "", "M", "1e400", "many", "0.2", True, 2.5, None, "5 TB"])
def test_budgets_that_are_none(given_):
    with pytest.raises(ValueError, match="`budget` must be a positive number of parameters"):
        read_budget(given_)
