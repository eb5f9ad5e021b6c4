"""The audit against numpy's float64 SVD of the dense update, and its findings."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
from dataclasses import replace

import numpy
import pytest
import torch
from closeness import assert_close_reports
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save_file

from lorakit import SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.errors import AdapterFileError, LorakitError
from lorakit.lens import audit

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEYS = {
    "module_name", "role", "layer", "rank", "scaling", "frobenius_norm", "spectral_norm", "stable_rank",
    "effective_rank", "capacity_utilization", "utilization", "energy_rank", "knee",
}  # fmt: skip


def write(directory, tensors, **config):
    """An adapter of q_proj and v_proj modules: `tensors` has (B, A) by name."""
    directory.mkdir(exist_ok=True)
    files = {}
    for name, (B, A) in tensors.items():
        files[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        files[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
    save_file(files, directory / WEIGHTS)
    ranks = {name: A.shape[0] for name, (_, A) in tensors.items()}
    settings_ = {"peft_type": "LORA", "r": next(iter(ranks.values())), "lora_alpha": 4, "rank_pattern": ranks} | config
    (directory / CONFIG).write_text(json.dumps(settings_))
    return directory


def layer(i, name="q_proj"):
    return f"model.layers.{i}.self_attn.{name}"


def of_spectrum(spectrum, d_out=12, d_in=9, rank=None, seed=0):
    """Factors whose product has these singular values; `rank` columns, the later ones zero."""
    generator = torch.Generator().manual_seed(seed)
    n = len(spectrum)
    U = torch.linalg.qr(torch.randn(d_out, n, generator=generator, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, n, generator=generator, dtype=torch.float64)).Q
    B, A = U * torch.tensor(spectrum, dtype=torch.float64), V.T
    if rank is not None:
        B, A = torch.nn.functional.pad(B, (0, rank - n)), torch.nn.functional.pad(A, (0, 0, 0, rank - n))
    return B.float(), A.float()


def reference(update, rank):
    """The quantities of one module, written out in numpy float64."""
    s = numpy.linalg.svd(update.double().numpy(), compute_uv=False)[: min(rank, *update.shape)]
    p = s / s.sum()
    p = p[p > 0]
    effective = math.exp(-(p * numpy.log(p)).sum())
    share = numpy.cumsum(s**2) / (s**2).sum()
    return {
        "frobenius_norm": numpy.linalg.norm(update.double().numpy()),
        "spectral_norm": s[0],
        "stable_rank": (s**2).sum() / s[0] ** 2,
        "effective_rank": effective,
        "capacity_utilization": effective / rank,
        "utilization": (s**2).sum() / s[0] ** 2 / rank,
        "energy_rank": {str(q): int(numpy.argmax(share >= q - 1e-9)) + 1 for q in (0.9, 0.95, 0.99)},
    }


@pytest.mark.slow
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_every_number_is_numpy_s(tmp_path, randomize, tiny_llama, rslora, dtype):
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=rslora,
        target_modules="all-linear",
        rank_pattern={"q_proj": 7},
        alpha_pattern={"v_proj": 5},
    )
    model = randomize(get_peft_model(tiny_llama(dtype), config, autocast_adapter_dtype=False))
    model.save_pretrained(tmp_path)
    for source in (tmp_path, tmp_path / WEIGHTS, model):
        report = audit(source)
        assert len(report.modules) == 14
        for row in report.modules:
            peft_layer = model.base_model.model.get_submodule(row.module_name)
            A, B = (getattr(peft_layer, half)["default"].weight.detach().double() for half in ("lora_A", "lora_B"))
            update = B @ A * peft_layer.scaling["default"]
            assert row.dtype == str(dtype).removeprefix("torch.")
            for key, expected in reference(update, row.rank).items():
                assert getattr(row, key) == pytest.approx(expected, rel=2e-5), key
            assert row.scaling == pytest.approx(peft_layer.scaling["default"])
        assert report.total.frobenius_norm == pytest.approx(math.hypot(*(m.frobenius_norm for m in report.modules)))
        assert sum(group.energy_share for group in report.roles) == pytest.approx(1)
        assert [group.modules for group in report.layers] == [7, 7]


def test_rescaling_changes_norms_only(tmp_path):
    spectra = {layer(i): of_spectrum([5.0, 3.0, 1.0 / (i + 1)], seed=i) for i in range(3)}
    one = audit(write(tmp_path / "a", spectra))
    for factor in (1e-18, 1e15):
        other = audit(write(tmp_path / "b", {name: (B * factor, A) for name, (B, A) in spectra.items()}))
        for a, b in zip(one.modules, other.modules, strict=True):
            assert b.frobenius_norm == pytest.approx(a.frobenius_norm * factor, rel=1e-5)
            assert (b.energy_rank, b.knee) == (a.energy_rank, a.knee)
            assert b.effective_rank == pytest.approx(a.effective_rank, rel=1e-5)
            assert b.stable_rank == pytest.approx(a.stable_rank, rel=1e-5)


def test_the_shape_of_the_report(tmp_path):
    report = audit(write(tmp_path / "a", {layer(0): of_spectrum([2.0, 1.0])}, energy=0.5), energy=0.5).to_dict()
    assert list(report) == ["modules", "summary", "findings"]
    (row,) = report["modules"]
    assert row.keys() >= KEYS
    assert row["energy_rank"] == {"0.5": 1, "0.9": 2, "0.95": 2, "0.99": 2}
    assert (row["module_name"], row["role"], row["layer"], row["rank"]) == (layer(0), "query", 0, 2)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert row["singular_values"] == pytest.approx([4.0, 2.0], rel=1e-5)  # the scaling is 4 / 2


def test_the_repr_and_the_headline_are_short(known):
    report = audit(known)
    assert repr(report).splitlines()[0] == (
        "AuditReport: Rank 2 keeps 90% of the energy in nine tenths of the 10 modules (r = 6); no errors or warnings."
    )
    assert len(repr(report)) < 600


def run_steps(steps):
    for step in steps:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", *shlex.split(step)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (step, done.stderr)


@pytest.mark.slow
def test_the_next_steps_can_be_pasted(known):
    compress, compare = audit(known).next_steps
    assert compress == f"lorakit compress {known} {known}-compressed --energy 0.9"
    assert compare == f"lorakit compare {known} {known}-compressed"
    assert audit(known, suggest_ranks=True).next_steps[0] == f"lorakit compress {known} {known}-compressed --max-rank 2"
    run_steps(audit(known, suggest_ranks=True).next_steps)


@pytest.mark.slow
def test_mixed_ranks_and_other_types_are_exported(tmp_path, known):
    tensors = {layer(0): of_spectrum([2.0, 1.9]), layer(1): of_spectrum([2.0, 1.9, 1.8])}
    mixed = write(tmp_path / "mixed", tensors)
    assert audit(mixed).next_steps == (f"lorakit export {mixed} {mixed}-lora",)
    run_steps(audit(mixed).next_steps)
    settings_ = json.loads((known / CONFIG).read_text())
    (known / CONFIG).write_text(json.dumps(settings_ | {"peft_type": "FISHERLORA"}))
    assert audit(known / WEIGHTS).next_steps[-1] == f"lorakit export {known / WEIGHTS} {known}-lora"
    (known / CONFIG).write_text(json.dumps(settings_ | {"peft_type": "SPECLORA", "base_model_name_or_path": "a/b"}))
    assert audit(known).next_steps == (f"lorakit export {known} {known}-lora --base a/b",)


def test_nothing_to_do_gives_no_next_steps(tmp_path, known):
    broken = good()
    broken[layer(0)][0][0, 0] = math.nan
    assert audit(write(tmp_path / "a", broken)).next_steps == ()
    assert audit(write(tmp_path / "b", {name: (B * 0, A) for name, (B, A) in good().items()})).next_steps == ()
    assert audit(write(tmp_path / "c", good())).next_steps == ()  # every rank is needed
    view = open_adapter(known)
    assert audit(replace(view, path="a model, adapter 'default'")).next_steps == ()


# 10 modules, whose k@.9 is 1 in six, 2 in three and 4 in one.
KNOWN = [[10.0, 1.0, 1.0, 1.0]] * 6 + [[10.0, 9.0, 1.0, 1.0]] * 3 + [[5.0, 5.0, 5.0, 5.0]]


@pytest.fixture
def known(tmp_path):
    tensors = {layer(i): of_spectrum(spectrum, seed=i, rank=6) for i, spectrum in enumerate(KNOWN)}
    return write(tmp_path / "known", tensors)


def test_suggestions_cover_what_they_say(known):
    report = audit(known, suggest_ranks=True)
    by_policy = {s.policy: s for s in report.suggestions}
    assert set(by_policy) == {"global_median", "global_p90", "per_module", "knee", "entropy", "hard_threshold"}
    assert by_policy["global_median"].rank == 1
    assert by_policy["global_p90"].rank == 2
    assert by_policy["global_median"].modules_covered == 6
    assert by_policy["global_p90"].modules_covered == 9
    assert by_policy["per_module"].modules_covered == 10
    assert sorted(by_policy["per_module"].ranks.values()) == [1] * 6 + [2] * 3 + [4]
    assert by_policy["per_module"].parameters == (6 + 6 + 4) * 21
    assert by_policy["per_module"].served_rank == 8
    assert by_policy["per_module"].served_parameters == 10 * 8 * 21
    kept = sum(sum(v**2 for v in spectrum[:2]) for spectrum in KNOWN)
    assert by_policy["global_p90"].energy_kept == pytest.approx(kept / sum(v**2 for s in KNOWN for v in s), rel=1e-5)
    assert audit(known).suggestions == ()
    assert report.recommended == by_policy["global_p90"]
    assert any(f"--max-rank {report.recommended.rank}" in step for step in report.next_steps)
    assert audit(known).recommended is None


@pytest.mark.parametrize("budget", [210, 300, 419, 10**6, "840B", "1.2kB"])
def test_a_budget_is_kept_and_spent_on_the_largest_gains(known, budget):
    suggestion = audit(known, budget=budget).suggestions[-1]
    limit = {"840B": 210, "1.2kB": 300}.get(budget, budget)
    assert suggestion.policy == "budget"
    assert suggestion.parameters <= limit
    assert suggestion.parameters + 21 > limit or suggestion.energy_kept == pytest.approx(1)
    units = suggestion.parameters // 21
    gains = sorted((v**2 for s in KNOWN for v in s[1:]), reverse=True)[: units - 10]
    first = sum(s[0] ** 2 for s in KNOWN)
    assert suggestion.energy_kept == pytest.approx((first + sum(gains)) / sum(v**2 for s in KNOWN for v in s), rel=1e-5)


@pytest.mark.slow
@given(
    spectra=st.lists(st.lists(st.floats(1e-3, 10), min_size=1, max_size=5), min_size=1, max_size=8),
    energy=st.floats(0.1, 1),
)
@settings(max_examples=60, deadline=None)
def test_global_ranks_are_never_below_what_they_claim(tmp_path_factory, spectra, energy):
    tensors = {layer(i): of_spectrum(spectrum, seed=i) for i, spectrum in enumerate(spectra)}
    report = audit(write(tmp_path_factory.mktemp("a"), tensors), energy=energy, suggest_ranks=True)
    ks = [row.energy_rank[str(energy)] for row in report.modules]
    for suggestion in report.suggestions:
        assert all(1 <= k <= row.rank for k, row in zip(suggestion.ranks.values(), report.modules, strict=True))
        assert suggestion.served_rank >= max(suggestion.ranks.values())
        assert suggestion.served_parameters >= suggestion.parameters
        share = {"global_median": 0.5, "global_p90": 0.9, "per_module": 1.0}.get(suggestion.policy)
        if share is not None:
            assert suggestion.modules_covered == sum(k <= suggestion.ranks[layer(i)] for i, k in enumerate(ks))
            assert suggestion.modules_covered >= share * len(ks) - 1e-9


def codes(report):
    return [(finding.severity, finding.code, finding.module_name) for finding in report.findings]


def good(count=4):
    return {layer(i): of_spectrum([2.0, 1.9], seed=i) for i in range(count)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [0, 1])
def test_values_that_are_not_finite(tmp_path, value, half):
    tensors = good()
    tensors[layer(1)][half][0, 1] = value
    report = audit(write(tmp_path / "a", tensors), suggest_ranks=True)
    assert codes(report) == [("error", "non_finite", layer(1))]
    assert report.has_errors
    assert "lora_" + "BA"[half] in report.findings[0].message
    bad = report.modules[1]
    assert (bad.frobenius_norm, bad.energy_rank, bad.singular_values) == (None, None, ())
    assert [row.frobenius_norm is None for row in report.modules] == [False, True, False, False]
    assert set(report.suggestions[0].ranks) == {layer(0), layer(2), layer(3)}
    json.dumps(report.to_dict(), allow_nan=False)


def test_an_update_that_overflows(tmp_path):
    tensors = good()
    tensors[layer(2)] = tuple(part * 1e30 for part in tensors[layer(2)])
    report = audit(write(tmp_path / "a", tensors))
    assert codes(report) == [("error", "non_finite", layer(2))]
    assert "overflows" in report.findings[0].message
    json.dumps(report.to_dict(), allow_nan=False)


def test_half_precision_and_tiny_values_are_no_zeros(tmp_path):
    tensors = {layer(i): of_spectrum([2.0, 1.9], seed=i) for i in range(4)}
    tensors[layer(0)] = tensors[layer(0)][0] * 1e-30, tensors[layer(0)][1]
    report = audit(write(tmp_path / "a", tensors))
    assert codes(report) == []
    assert report.modules[0].stable_rank == pytest.approx(1 + (1.9 / 2) ** 2, rel=1e-5)


@pytest.mark.parametrize(("half", "code"), [(0, "untrained"), (1, "zero_update")])
def test_zero_updates(tmp_path, half, code):
    tensors = good()
    tensors[layer(1)][half].zero_()
    report = audit(write(tmp_path / "a", tensors), suggest_ranks=True)
    assert codes(report) == [("warning", code, layer(1))]
    assert not report.has_errors
    row = report.modules[1]
    assert (row.frobenius_norm, row.effective_rank, row.knee, row.energy_rank["0.9"]) == (0, 0, 0, 0)
    assert all(
        s.ranks[layer(1)] == 1 for s in report.suggestions if s.policy != "global_median" and s.policy != "global_p90"
    )


def test_an_untrained_adapter(tmp_path, tiny_llama):
    get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    report = audit(tmp_path, budget=100_000)
    assert {(f.severity, f.code) for f in report.findings} == {("warning", "untrained")}
    assert report.total.energy_share == 0
    assert report.suggestions == ()


def test_a_scaling_of_zero(tmp_path):
    report = audit(write(tmp_path / "a", good(), lora_alpha=0))
    assert {f.code for f in report.findings} == {"zero_update"}


def test_dominance_unused_capacity_and_ranks_above_the_dimension(tmp_path):
    tensors = good()
    tensors[layer(3)] = of_spectrum([9.0, 8.0])
    assert codes(audit(write(tmp_path / "a", tensors))) == [("warning", "dominant_module", layer(3))]
    flat = {layer(i): of_spectrum([1.0], rank=8, seed=i) for i in range(5)}
    assert codes(audit(write(tmp_path / "b", flat))) == [("info", "unused_capacity", None)]
    wide = good() | {layer(4): (torch.eye(3, 5), torch.eye(5, 9))}
    found = codes(audit(write(tmp_path / "c", wide)))
    assert found == [("warning", "rank_above_dimension", layer(4)), ("warning", "served_wrong", None)]


@pytest.mark.parametrize("value", [0.5, math.nan])
def test_masks_magnitudes_biases_and_what_lies_beside(tmp_path, tiny_llama, randomize, value):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=2, k=5, target_modules=["q_proj"])))
    for module in model.modules():
        if hasattr(module, "lora_spec"):
            module.lora_spec["default"].weight.data[:] = torch.tensor([-1.0, 0, 0, 0, value])
    model.save_pretrained(tmp_path / "spec")
    report = audit(tmp_path / "spec")
    assert all(row.low_rank_part_only for row in report.modules)
    if value == 0.5:
        assert ("info", "low_rank_part_only", None) in codes(report)
        assert report.modules[0].beside["d"] == pytest.approx(
            {"size": 5, "min": 0, "max": 1.5, "mean": 0.9, "std": numpy.std([0, 1, 1, 1, 1.5])}
        )
    else:
        assert [c[:2] for c in codes(report)][:2] == [("error", "non_finite")] * 2
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["lm_head"])
    model = randomize(get_peft_model(tiny_llama(), config))
    model.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.data[3, 3] = value
    model.save_pretrained(tmp_path / "dora")
    report = audit(tmp_path / "dora")
    assert set(report.modules[0].beside) == {"magnitude"}
    assert report.parameters_beside == 64 * 32 + 2 * 32
    expected = [("info", "beside_modules_to_save"), ("info", "low_rank_part_only")]
    found = [("error", "non_finite")] * (value != 0.5) + expected
    assert [(severity, code) for severity, code, _ in codes(report)] == found


def test_errors_come_first(tmp_path):
    tensors = good()
    tensors[layer(0)][0].zero_()
    tensors[layer(1)][0][0, 0] = math.nan
    assert [f.severity for f in audit(write(tmp_path / "a", tensors)).findings] == ["error", "warning"]


@pytest.mark.parametrize("energy", [0, -1, 1.01, math.nan])
def test_energy_is_a_share(tmp_path, energy):
    with pytest.raises(ValueError, match=r"`energy` must be a number in \(0, 1\]; got "):
        audit(tmp_path, energy=energy)


def test_budgets_too_small(known):
    with pytest.raises(ValueError, match=r"must cover rank 1 in all 10 modules \(at least 210\); got 209"):
        audit(known, budget=209)


def test_an_open_adapter_and_a_single_file(known):
    view = open_adapter(known)
    assert_close_reports(audit(view).modules, audit(known).modules)
    assert_close_reports(audit(known / WEIGHTS).modules, audit(known).modules)


# --- no mutation of a valid adapter gives anything but a report or a LorakitError


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    directory = write(
        tmp_path_factory.mktemp("valid"), {layer(i): of_spectrum([2.0, 1.0], d_out=40, d_in=30) for i in range(2)}
    )
    return (directory / WEIGHTS).read_bytes(), (directory / CONFIG).read_bytes()


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["set", "delete", "insert", "truncate"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=4,
)


def mutate(data, edits):
    for kind, place, value in edits:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "delete":
            data = data[:at] + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        else:
            data = data[:at]
    return data


def audit_of(directory, weights, config, name=WEIGHTS):
    (directory / name).write_bytes(weights)
    (directory / CONFIG).write_bytes(config)
    try:
        report = audit(directory, suggest_ranks=True)
    except LorakitError:
        return None
    json.dumps(report.to_dict(), allow_nan=False)
    return report


FUZZ = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


BYTES = st.lists(
    st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=1)), min_size=1, max_size=3
)  # which most often leave a file that can be read


@pytest.mark.slow
@given(edits=EDITS | BYTES)
@FUZZ
def test_mutated_weights_give_a_report_or_a_typed_error(tmp_path, valid, edits):
    audit_of(tmp_path, mutate(valid[0], edits), valid[1])


@pytest.mark.slow
@given(edits=EDITS | BYTES, legacy=st.booleans())
@FUZZ
def test_mutated_pickles_give_a_report_or_a_typed_error(tmp_path, valid, edits, legacy):
    tensors = load(valid[0])
    buffer = io.BytesIO()
    torch.save(tensors, buffer, _use_new_zipfile_serialization=not legacy)
    (tmp_path / WEIGHTS).unlink(missing_ok=True)
    audit_of(tmp_path, mutate(buffer.getvalue(), edits), valid[1], "adapter_model.bin")


@pytest.mark.slow
@given(edits=EDITS | BYTES)
@FUZZ
def test_mutated_configs_give_a_report_or_a_typed_error(tmp_path, valid, edits):
    audit_of(tmp_path, valid[0], mutate(valid[1], edits))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["LORA", "ADALORA"]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=4,
)
FIELDS = [
    "peft_type", "r", "init_r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "bias",
    "modules_to_save", "target_parameters", "init_lora_weights", "base_model_name_or_path", "fan_in_fan_out",
]  # fmt: skip


@pytest.mark.slow
@given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4))
@FUZZ
def test_configs_with_other_values_give_a_report_or_a_typed_error(tmp_path, valid, changes):
    audit_of(tmp_path, valid[0], json.dumps(json.loads(valid[1]) | changes).encode())


DTYPES = ["F64", "F32", "F16", "BF16", "F8_E4M3", "I8", "U8", "BOOL", "I64", "C64", "F4", "nonsense"]
SHAPES = st.sampled_from([[2, 3], [3, 2], [2, 2], [2], [2, 1], [2, 3, 1, 1]])
SPEC = st.tuples(
    st.just("F32") | st.sampled_from(["F32", "BF16"]) | st.sampled_from(DTYPES),
    SHAPES | SHAPES | st.lists(st.integers(0, 4), max_size=5),
)
OTHERS = [
    "lora_B.bias", "lora_E", "lora_magnitude_vector", "lora_spec.weight_svd", "lora_embedding_A", "lora_embedding_B",
    "lora_A.default.weight", "weight",
]  # fmt: skip
MODULE = st.fixed_dictionaries({"lora_A.weight": SPEC, "lora_B.weight": SPEC}) | st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("lora_A.weight", "lora_B.weight", *OTHERS), SPEC)
)
HEADERS = st.dictionaries(st.sampled_from([layer(0), layer(1), "x"]), MODULE, min_size=1).map(
    lambda modules: {
        f"base_model.model.{name}.{end}": spec for name, ends in modules.items() for end, spec in ends.items()
    }
)


@pytest.mark.slow
@given(header=HEADERS, fill=st.binary(min_size=1, max_size=8))
@FUZZ
def test_well_formed_files_of_anything_give_a_report_or_a_typed_error(tmp_path, valid, header, fill):
    sizes = {"F64": 8, "I64": 8, "C64": 8, "F32": 4, "F16": 2, "BF16": 2}
    entries, at = {}, 0
    for key, (dtype, shape) in header.items():
        size = math.prod(shape) * sizes.get(dtype, 1)
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries).encode()
    data = len(text).to_bytes(8, "little") + text + (fill * at)[:at]
    audit_of(tmp_path, data, valid[1])


def test_the_fuzz_s_valid_adapter_is_valid(tmp_path, valid):
    assert audit_of(tmp_path, *valid).findings == ()
    with pytest.raises(AdapterFileError):
        audit(tmp_path / "nothing here")
