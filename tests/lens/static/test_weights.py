"""Weights before and after fine-tuning, against numpy's float64 SVDs."""

from __future__ import annotations

import copy
import json
import math

import numpy
import peft
import pytest
import torch
from closeness import assert_close_reports
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from lorakit import SpecLoRAConfig
from lorakit.errors import AdapterFileError, UnsupportedModelError
from lorakit.lens import compare_weights

D_OUT, D_IN = 20, 14
NAME = "model.layers.0.self_attn.q_proj"
KEY = f"{NAME}.weight"


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthonormal(d, n, seed):
    return torch.linalg.qr(random(d, n, seed=seed)).Q


@pytest.fixture
def checkpoint(tmp_path):
    def write(name, tensors):
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}, path)
        return path

    return write


@pytest.fixture
def compared(checkpoint):
    """The row of one weight, in float64 unless it is of another dtype."""

    def compare(W, tuned, **options):
        report = compare_weights(checkpoint("a", {KEY: W}), checkpoint("b", {KEY: tuned}), **options)
        (row,) = report.modules
        return row

    return compare


def reference(W, tuned, top_k=10, below=0.5):
    """The quantities of one weight, written out in numpy float64; singular values are distinct."""
    W, tuned = W.double().numpy(), tuned.double().numpy()
    U, s, Vh = numpy.linalg.svd(W, full_matrices=False)
    U_t, s_t, Vh_t = numpy.linalg.svd(tuned, full_matrices=False)
    out, into = abs(U.T @ U_t), abs(Vh @ Vh_t.T)
    update = numpy.linalg.svd(tuned - W, compute_uv=False)
    p = update / update.sum()
    p = p[p > 0]
    norm = numpy.linalg.norm(tuned - W)
    return {
        "frobenius_norm": numpy.linalg.norm(W),
        "spectrum_shift": numpy.linalg.norm(s_t - s) / numpy.linalg.norm(s),
        "update_frobenius_norm": norm,
        "relative_change": norm / numpy.linalg.norm(W),
        "update_spectral_norm": update[0],
        "update_effective_rank": math.exp(-(p * numpy.log(p)).sum()),
        "update_stable_rank": (update**2).sum() / update[0] ** 2,
        "update_energy_rank": int(numpy.argmax(numpy.cumsum(update**2) >= 0.9 * norm**2)) + 1,
        "output_cosine_mean": out.diagonal().mean(),
        "input_cosine_mean": into.diagonal().mean(),
        "intruders": tuple(numpy.flatnonzero(out.max(0)[:top_k] < below)),
        "input_intruders": tuple(numpy.flatnonzero(into.max(0)[:top_k] < below)),
        "singular_values": tuple(s),
        "tuned_singular_values": tuple(s_t),
        "output_cosines": tuple(out.diagonal()),
        "input_cosines": tuple(into.diagonal()),
    }


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("shape", [(D_OUT, D_IN), (D_IN, D_OUT), (9, 9)])
@pytest.mark.parametrize("size", [0.05, 1.0])
def test_every_number_is_numpy_s(compared, dtype, rel, shape, size):
    W = random(*shape, dtype=dtype)
    tuned = (W.double() + size * random(*shape, seed=1)).to(dtype)
    row = compared(W, tuned, intruder_below=0.6)
    for key, expected in reference(W, tuned, below=0.6).items():
        assert getattr(row, key) == pytest.approx(expected, rel=rel, abs=rel), key
    assert (row.module_name, row.role, row.layer, row.d_out, row.d_in) == (NAME, "query", 0, *shape)


def test_the_leading_singular_values_alone_are_kept(compared):
    W, tuned = random(D_OUT, D_IN), random(D_OUT, D_IN, seed=1)
    row = compared(W, tuned, rank=3)
    expected = reference(W, tuned)
    assert row.singular_values == pytest.approx(expected["singular_values"][:3])
    assert row.output_cosine_mean == pytest.approx(numpy.mean(expected["output_cosines"][:3]))
    assert len(compared(W, tuned, rank=None).input_cosines) == D_IN


def test_an_intruder_is_found_where_it_was_put(compared):
    U, V = orthonormal(30, 30, 0), orthonormal(24, 24, 1)
    sigma = torch.linspace(5, 1, 24, dtype=torch.float64)
    W = U[:, :24] * sigma @ V.mT
    within = W + 0.5 * torch.outer(U[:, 0], V[:, 0])
    assert compared(W, within).intruders == ()
    spread = torch.full((24,), 24**-0.5, dtype=torch.float64)  # |cos| with every singular vector is 24^-½
    tuned = W + 50 * torch.outer(U[:, :24] @ spread, V @ spread)
    row = compared(W, tuned)
    assert row.intruders == row.input_intruders == (0,)
    assert compared(W, tuned, intruder_below=0.2).intruders == ()
    outside = compared(W, W + 50 * torch.outer(U[:, 29], V @ spread))  # orthogonal to all of W's outputs
    assert (outside.intruders, outside.input_intruders) == ((0,), (0,))


def test_intruders_are_those_of_peft_s_own_tool(randomize, tiny_llama):
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    model = randomize(get_peft_model(tiny_llama(), config), std=0.15)
    lines = []
    merged = copy.deepcopy(model).merge_and_unload()
    reduce_intruder_dimension(model, logging_sink=lines.append)
    expected = {}
    for line in lines:
        name, _, found = line.partition(": ")
        if "proj" in name:
            expected[name.removeprefix("base_model.model.")] = int(
                found.removeprefix("Intruders: ").replace("No intruders", "0")
            )
    report = compare_weights(tiny_llama(), merged)
    assert {row.module_name: len(row.intruders) for row in report.modules} == expected
    assert len(set(expected.values())) > 2
    assert report.total.intruders == sum(expected.values())


def test_the_top_k_alone_are_looked_at(compared):
    W, tuned = random(D_OUT, D_IN), random(D_OUT, D_IN, seed=1)
    every = compared(W, tuned, top_k=D_IN, intruder_below=0.7).intruders
    assert compared(W, tuned, top_k=3, intruder_below=0.7).intruders == tuple(i for i in every if i < 3)
    assert len(every) > 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_signs_and_equal_singular_values_are_no_change(compared, dtype):
    """A weight whose singular values come in equal groups, whose vectors nothing determines but for their span."""
    every, V = orthonormal(D_OUT, D_OUT, 0), orthonormal(D_IN, 9, 1)
    U = every[:, :9]
    sigma = torch.tensor([4.0, 4, 4, 4, 2, 2, 2, 2, 2], dtype=torch.float64)
    W = (U * sigma @ V.mT).to(dtype)
    row = compared(W, (U * (1.5 * sigma) @ V.mT).to(dtype))
    assert row.output_cosines[:9] == pytest.approx([1] * 9, abs=1e-4)
    assert row.input_cosines[:9] == pytest.approx([1] * 9, abs=1e-4)
    assert row.intruders == row.input_intruders == ()
    other = torch.cat((U[:, :4], every[:, 9:14]), 1)  # the second group is elsewhere
    moved = compared(W, (other * sigma @ V.mT).to(dtype))
    assert moved.output_cosines[:9] == pytest.approx([1] * 4 + [0] * 5, abs=1e-3)
    assert moved.input_cosines[:9] == pytest.approx([1] * 9, abs=1e-3)
    assert moved.intruders == tuple(range(4, 9))


def test_a_direction_in_the_null_space_of_the_base_is_an_intruder(compared):
    U, V = orthonormal(D_OUT, D_OUT, 0), orthonormal(D_IN, D_IN, 1)
    W = U[:, :5] * torch.linspace(3, 1, 5, dtype=torch.float64) @ V[:, :5].mT
    tuned = W + 9 * torch.outer(U[:, 7], V[:, 7])
    row = compared(W, tuned, top_k=6)
    assert row.intruders == row.input_intruders == (0,)
    assert compared(torch.zeros_like(W), W, top_k=5).intruders == (0, 1, 2, 3, 4)
    assert compared(W, torch.zeros_like(W)).tuned_singular_values == (0,) * D_IN


def shards(directory, tensors, parts=2):
    directory.mkdir()
    names = [f"model-{i + 1:05}-of-{parts:05}.safetensors" for i in range(parts)]
    where = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        save_file({key: tensors[key].contiguous() for key in where if where[key] == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return directory


def test_directories_shards_files_and_models_are_the_same(tmp_path, tiny_llama):
    base, tuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for i, layer in enumerate(tuned.model.layers):
            layer.mlp.up_proj.weight += 0.1 * random(48, 32, seed=i, dtype=torch.float32)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    expected = compare_weights(base, tuned)
    assert [row.module_name for row in expected.modules] == [f"model.layers.{i}.mlp.up_proj" for i in range(2)]
    assert len(expected.unchanged) == 14 + 2 - 2
    assert [(group.name, group.weights) for group in expected.roles] == [("up", 2)]
    sources = [
        (tmp_path / "base", tmp_path / "sharded"),
        (tmp_path / "base" / "model.safetensors", tuned),
        (base, str(tmp_path / "sharded")),
    ]
    for pair in sources:
        report = compare_weights(*pair)
        assert_close_reports(report.modules, expected.modules)
        assert set(report.unchanged) == set(expected.unchanged)
        assert report.findings == ()
        json.dumps(report.to_dict(), allow_nan=False)
    total = expected.total
    change = math.hypot(*(row.update_frobenius_norm for row in expected.modules))
    assert total.relative_change == pytest.approx(change / math.hypot(*(r.frobenius_norm for r in expected.modules)))


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embedding = nn.Embedding(17, 14)
        self.gpt = Conv1D(11, 14)
        self.q_proj = nn.Linear(12, 10)
        self.norm = nn.LayerNorm(10)
        self.conv = nn.Conv1d(3, 5, 3)


@pytest.mark.parametrize("live", [False, True])
def test_the_residual_of_an_adapter(tmp_path, randomize, live):
    base = Layers()
    targets = ["embedding", "gpt", "q_proj"]
    model = randomize(get_peft_model(copy.deepcopy(base), LoraConfig(r=3, lora_alpha=5, target_modules=targets)))
    updates = {
        name: layer.get_delta_weight("default").detach().clone()
        for name, layer in model.base_model.model.named_modules()
        if name in targets
    }
    model.save_pretrained(tmp_path)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for i, name in enumerate(targets):
            weight = tuned.get_submodule(name).weight
            weight += updates[name] + 0.02 * i * random(*weight.shape, seed=i, dtype=torch.float32)
    report = compare_weights(base, tuned, adapter=model if live else tmp_path)
    missed = total = 0.0
    for row in report.modules:
        full = (tuned.get_submodule(row.module_name).weight - base.get_submodule(row.module_name).weight).detach()
        rest = (full - updates[row.module_name]).double().norm()
        assert row.residual == pytest.approx(float(rest / full.double().norm()), abs=1e-5)
        missed, total = missed + float(rest) ** 2, total + float(full.double().norm()) ** 2
    assert [row.module_name for row in report.modules] == targets
    assert report.modules[0].residual < 1e-6 < report.modules[1].residual
    assert (report.total.adapted, report.total.residual) == (3, pytest.approx(math.sqrt(missed / total), abs=1e-6))
    assert report.findings == ()


def test_of_speclora_the_low_rank_part_is_taken_and_said(tmp_path, randomize, tiny_llama):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=["q_proj"])))
    model.save_pretrained(tmp_path)
    report = compare_weights(tiny_llama(), model.merge_and_unload(), adapter=tmp_path)
    assert len(report.modules) == 2
    assert all(row.low_rank_part_only and row.residual > 0.01 for row in report.modules)


def test_modules_can_be_chosen(tiny_llama):
    base, tuned = tiny_llama(), tiny_llama()
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1
    names = {
        row.module_name for row in compare_weights(base, tuned, modules=["q_proj", "layers.1.mlp.up_proj"]).modules
    }
    assert names == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)} | {"model.layers.1.mlp.up_proj"}
    names = {row.module_name for row in compare_weights(base, tuned, modules=r".*layers\.0\..*_proj").modules}
    assert len(names) == 7
    assert ("error", "nothing_in_common") in codes(compare_weights(base, tuned, modules=["nothing"]))
    with pytest.raises(ValueError, match="`modules` must be a regular expression"):
        compare_weights(base, tuned, modules="(")


def codes(report):
    return [(finding.severity, finding.code) for finding in report.findings]


def test_what_does_not_fit_is_among_the_findings(checkpoint, tmp_path):
    W = random(6, 5, dtype=torch.float32)
    good = {"a.weight": W, "b.weight": W, "c.weight": W, "d.weight": W, "norm.weight": W[0]}
    bad = {
        "a.weight": W + 1,
        "b.weight": random(7, 5),
        "c.weight": W.to(torch.int8),
        "e.weight": W,
        "norm.weight": W[1],
    }
    report = compare_weights(checkpoint("a", good), checkpoint("b", bad))
    assert codes(report) == [
        ("error", "shape_mismatch"),
        ("error", "unsupported_dtype"),
        ("warning", "only_in_one"),
        ("warning", "only_in_one"),
    ]
    assert (report.only_base, report.only_fine_tuned) == (("d",), ("e",))
    assert [row.module_name for row in report.modules] == ["a"]
    assert report.has_errors
    broken = good | {"a.weight": W * math.nan}
    report = compare_weights(checkpoint("a", good), checkpoint("c", broken))
    assert codes(report) == [("error", "non_finite")]
    assert report.modules[0].update_frobenius_norm is None
    assert report.total.relative_change is None
    json.dumps(report.to_dict(), allow_nan=False)


def test_what_does_not_fit_the_adapter(checkpoint, write_adapter):
    W = random(6, 5, dtype=torch.float32)
    base = checkpoint("base", {f"{name}.weight": W for name in "abc"})
    tuned = checkpoint("tuned", {"a.weight": W + 1, "b.weight": W, "c.weight": W * 2})
    B, A = random(6, 2), random(2, 5)
    adapter = write_adapter("x", {"a": (random(7, 2), A), "b": (B, A), "c": (B * math.inf, A), "d": (B, A)})
    report = compare_weights(base, tuned, adapter=adapter)
    assert codes(report) == [
        ("error", "shape_mismatch"),
        ("error", "non_finite"),
        ("warning", "adapted_unchanged"),
        ("warning", "adapted_missing"),
    ]
    assert [row.residual for row in report.modules] == [None, None]


def test_what_cannot_be_read(tmp_path, tiny_llama, checkpoint):
    good = checkpoint("good", {"a.weight": torch.ones(2, 2)})
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-3])
    (tmp_path / "empty").mkdir()
    pickle = tmp_path / "model.bin"
    torch.save({"a.weight": torch.ones(2, 2)}, pickle)
    for path in (tmp_path / "nowhere", cut, tmp_path / "empty", pickle):
        for pair in ((good, path), (path, good)):
            with pytest.raises(AdapterFileError):
                compare_weights(*pair)
    indices = [
        b"{",
        b"[]",
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": 1}}',
        b'{"weight_map": {"a": "gone.safetensors"}}',
    ]
    indices.append(b'{"weight_map": {"a": "../good.safetensors"}}')
    for i, text in enumerate(indices):
        directory = tmp_path / f"sharded{i}"
        directory.mkdir()
        (directory / "model.safetensors.index.json").write_bytes(text)
        with pytest.raises(AdapterFileError, match="index.json"):
            compare_weights(good, directory)
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("one", "two"):
        (twice / f"{name}.safetensors").write_bytes(good.read_bytes())
    with pytest.raises(AdapterFileError, match="two of its files"):
        compare_weights(good, twice)
    with pytest.raises(TypeError, match="must be a path or an nn.Module"):
        compare_weights(good, {"a": 1})
    with pytest.raises(UnsupportedModelError, match="merge_and_unload"):
        compare_weights(good, get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be a positive integer"),
        ({"top_k": 0}, "`top_k` must be a positive integer"),
        ({"intruder_below": 0}, "`intruder_below` must be a number in"),
        ({"energy": 1.5}, "`energy` must be a number in"),
    ],
)
def test_options_out_of_range(checkpoint, options, message):
    good = checkpoint("good", {"a.weight": torch.ones(2, 2)})
    with pytest.raises(ValueError, match=message):
        compare_weights(good, good, **options)


@pytest.mark.slow
def test_the_figure_shows_spectra_and_cosines_by_role_with_chance(checkpoint):
    names = [f"model.layers.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("q_proj", "v_proj")]
    before = {f"{name}.weight": random(D_OUT, D_IN, seed=i) for i, name in enumerate(names)}
    after = {key: W + 0.1 * random(D_OUT, D_IN, seed=9 + i) for i, (key, W) in enumerate(before.items())}
    report = compare_weights(checkpoint("a", before), checkpoint("b", after))
    figure = report.plot()
    assert "a.safetensors → …" in figure.get_suptitle()
    assert "b.safetensors (medians over weights)" in figure.get_suptitle()
    spectra, outputs, inputs = figure.axes
    query = [row for row in report.modules if row.role == "query"]
    value = [row for row in report.modules if row.role == "value"]
    lines = [line.get_ydata() for line in spectra.lines]
    for (rows, quantity), drawn in zip(
        [(rows, q) for q in ("singular_values", "tuned_singular_values") for rows in (query, value)],
        lines,
        strict=False,
    ):
        expected = numpy.median([getattr(row, quantity) for row in rows], axis=0)
        assert numpy.sort(drawn)[::-1] == pytest.approx(numpy.sort(expected)[::-1])
    for axes, side, d in ((outputs, "output", D_OUT), (inputs, "input", D_IN)):
        *roles, chance = axes.lines
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            *(line.get_label() for line in roles),
            "by chance",
        ]
        assert {line.get_label() for line in roles} == {"query", "value"}
        (line,) = [line for line in roles if line.get_label() == "query"]
        expected = numpy.median([getattr(row, f"{side}_cosines") for row in query], axis=0)
        assert line.get_ydata() == pytest.approx(expected)
        x = torch.randn(100_000, 2, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        cosine = torch.nn.functional.cosine_similarity(x[:, 0], x[:, 1]).abs().mean()
        assert chance.get_ydata()[0] == pytest.approx(float(cosine), rel=0.02)


def test_the_report_is_short_and_says_what_to_do(checkpoint, write_adapter):
    W = random(D_OUT, D_IN)
    update = torch.outer(W[:, 0], W[0])
    base, tuned = checkpoint("a", {KEY: W}), checkpoint("b", {KEY: W + 0.01 * update})
    report = compare_weights(base, tuned)
    assert report.next_steps == ("peft.LoraConfig(r=1, target_modules=['q_proj'])",)
    assert eval(report.next_steps[0], {"peft": peft}).r == 1
    assert len(repr(report)) < 600
    adapter = write_adapter("x", {NAME: (W[:, :1] * 0.01, W[:1])})
    report = compare_weights(base, tuned, adapter=adapter)
    assert report.next_steps == (f"lorakit audit {adapter} --suggest-ranks",)
    (table,) = report.tables()
    assert [row[0] for row in table.rows] == ["query", "all"]
    same = compare_weights(base, base)
    assert (same.next_steps, same.tables()) == ((), [])
    assert [text.get_text() for text in same.plot().texts][-1] == "no weight changed"


def test_one_weight_is_read_at_a_time(checkpoint, monkeypatch):
    from lorakit.lens.static import weights as _weights

    held = []
    opened = _weights.open_base_weights

    def counted(model):
        found = opened(model)

        def read(key):
            held.append(key)
            return found.read(key)

        return type(found)(found.path, found.infos, read)

    monkeypatch.setattr(_weights, "open_base_weights", counted)
    tensors = {f"{i}.weight": random(4, 3, seed=i) for i in range(3)}
    one, other = checkpoint("a", tensors), checkpoint("b", {key: value + 1 for key, value in tensors.items()})
    compare_weights(one, other)
    assert held == [key for key in sorted(tensors) for _ in range(2)]
