"""The geometry of output directions, against numpy's float64 SVD of the dense updates."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys

import numpy
import pytest
import torch
from closeness import assert_close_reports
from peft import LoraConfig, get_peft_model
from rich.console import Console

from lorakit import SpecLoRAConfig
from lorakit.errors import AdapterFileError
from lorakit.lens import alignment, write_plots
from lorakit.lens.render.table import print_report
from lorakit.lens.static.chance import random_similarity

ROLES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output"} | {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def name_of(layer, leaf):
    block = "self_attn" if leaf in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
    return f"model.layers.{layer}.{block}.{leaf}"


def factors(r, d_out=12, d_in=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, r, generator=generator), torch.randn(r, d_in, generator=generator)


def bases(model, k):
    """The leading left singular vectors of PEFT's own updates, by module."""
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            update = layer.get_delta_weight("default").detach().double().numpy()
            found[name] = numpy.linalg.svd(update)[0][:, :k]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("k", [1, 3, 4])
def test_every_number_is_numpy_s_for_every_role(tmp_path, randomize, tiny_llama, k):
    config = LoraConfig(r=5, target_modules="all-linear", rank_pattern={"down_proj": 8}, use_rslora=True)
    model = randomize(get_peft_model(tiny_llama(num_hidden_layers=3), config))
    model.save_pretrained(tmp_path)
    U = bases(model, k)
    for source in (tmp_path, tmp_path / "adapter_model.safetensors", model):
        report = alignment(source, k=k)
        assert {group.name for group in report.roles} == set(ROLES.values())
        for group in report.roles:
            assert (len(group.modules), group.layers, group.k) == (3, (0, 1, 2), k)
            assert all(ROLES[name.rpartition(".")[2]] == group.name for name in group.modules)
            pairs = []
            for i, one in enumerate(group.modules):
                for j, other in enumerate(group.modules):
                    cosine = abs(U[one][:, 0] @ U[other][:, 0])
                    overlap = (numpy.linalg.norm(U[one].T @ U[other]) ** 2) / k
                    assert group.similarity[i][j] == pytest.approx(cosine, abs=1e-4)
                    assert group.overlap[i][j] == pytest.approx(overlap, abs=1e-4)
                    pairs += [(cosine, overlap)] if i != j else []
            assert group.similarity_mean == pytest.approx(numpy.mean([p[0] for p in pairs]), abs=1e-4)
            assert group.overlap_mean == pytest.approx(numpy.mean([p[1] for p in pairs]), abs=1e-4)
            assert group.random_overlap == k / group.d_out
        assert [pair.layer for pair in report.within_layer] == [0, 1, 2]
        for pair in report.within_layer:
            assert (pair.output, pair.down) == (name_of(pair.layer, "o_proj"), name_of(pair.layer, "down_proj"))
            overlap = (numpy.linalg.norm(U[pair.output].T @ U[pair.down]) ** 2) / k
            assert pair.overlap == pytest.approx(overlap, abs=1e-4)
            assert pair.similarity == pytest.approx(abs(U[pair.output][:, 0] @ U[pair.down][:, 0]), abs=1e-4)
            assert pair.random_overlap == k / 32


@pytest.mark.parametrize("d", [1, 2, 3, 16, 100])
def test_the_random_similarity_is_that_of_random_directions(d):
    x = torch.randn(200_000 // d + 20_000, 2, d, generator=torch.Generator().manual_seed(0))
    x = x / x.norm(dim=-1, keepdim=True)
    assert random_similarity(d) == pytest.approx(float((x[:, 0] * x[:, 1]).sum(-1).abs().mean()), rel=0.02)
    assert random_similarity(4096) == pytest.approx(math.sqrt(2 / math.pi / 4096), rel=1e-3)


def test_the_gauge_and_the_scaling_do_not_matter(write_adapter):
    plain = {name_of(i, "o_proj"): factors(3, seed=i) for i in range(3)}
    R = torch.tensor([[2.0, 1, 0], [0, 0.5, 3], [1, 0, 1]])
    changed = {name: (B @ R, torch.linalg.solve(R, A)) for name, (B, A) in plain.items()}
    one = alignment(write_adapter("a", plain), k=2).roles[0]
    other = alignment(write_adapter("b", changed, lora_alpha=50), k=2).roles[0]
    for key in ("similarity", "overlap"):
        assert numpy.array(getattr(one, key)) == pytest.approx(numpy.array(getattr(other, key)), abs=1e-4)


def test_k_is_no_more_than_the_smallest_rank_of_a_group(write_adapter):
    B, A = factors(3)
    deficient = B.clone()
    deficient[:, 2] = deficient[:, 1]
    modules = {name_of(0, "q_proj"): (deficient, A), name_of(1, "q_proj"): factors(6), name_of(0, "v_proj"): (B, A)}
    report = alignment(write_adapter("a", modules | {name_of(1, "v_proj"): factors(6)}))
    assert {group.name: group.k for group in report.roles} == {"query": 2, "value": 3}
    assert report.roles[0].random_overlap == 2 / 12


def test_layers_that_are_not_there_and_modules_without_one(write_adapter):
    modules = {name_of(i, "q_proj"): factors(2, seed=i) for i in (1, 5)}
    modules |= {name_of(0, "k_proj"): factors(2), name_of(1, "k_proj"): factors(2, d_out=7), "head": factors(2)}
    report = alignment(write_adapter("a", modules))
    groups = {group.name: group for group in report.roles}
    assert set(groups) == {"query", "key (12)", "key (7)", "head"}
    assert (groups["query"].labels, groups["head"].labels) == (["1", "5"], ["head"])
    assert groups["head"].similarity_mean is None
    assert report.within_layer == ()
    json.dumps(report.to_dict(), allow_nan=False)


def test_the_stacks_of_an_encoder_and_a_decoder_are_kept_apart(write_adapter):
    names = ["encoder.block.0.layer.0.SelfAttention.o", "decoder.block.0.layer.1.EncDecAttention.o"]
    names += [f"{stack}.block.0.layer.1.DenseReluDense.wo" for stack in ("encoder", "decoder")]
    report = alignment(write_adapter("a", {name: factors(2, seed=i) for i, name in enumerate(names)}))
    assert {(pair.output, pair.down) for pair in report.within_layer} == {(names[0], names[2]), (names[1], names[3])}
    assert {tuple(group.labels) for group in report.roles} == {
        ("decoder.block.0.layer.1.EncDecAttention", "encoder.block.0.layer.0.SelfAttention"),
        ("decoder", "encoder"),
    }


def test_updates_that_are_zero_or_not_finite_are_left_out(write_adapter):
    modules = {name_of(i, "q_proj"): factors(2, seed=i) for i in range(4)}
    modules[name_of(1, "q_proj")][0].zero_()
    modules[name_of(2, "q_proj")][1][0, 0] = math.nan
    modules |= {name_of(0, "v_proj"): tuple(part * 1e30 for part in factors(2))}
    report = alignment(write_adapter("a", modules))
    assert [(f.severity, f.code, f.module_name) for f in report.findings] == [
        ("error", "non_finite", name_of(2, "q_proj")),
        ("error", "non_finite", name_of(0, "v_proj")),
        ("warning", "zero_update", name_of(1, "q_proj")),
    ]
    assert [group.layers for group in report.roles] == [(0, 3)]


def test_of_speclora_it_is_said_to_be_the_low_rank_part(tmp_path, randomize, tiny_llama):
    model = randomize(get_peft_model(tiny_llama(), SpecLoRAConfig(r=4, k=8, target_modules=["o_proj", "down_proj"])))
    model.save_pretrained(tmp_path)
    report = alignment(tmp_path)
    assert [finding.code for finding in report.findings] == ["low_rank_part_only"]
    assert len(report.within_layer) == 2


def test_bad_input(write_adapter, tmp_path):
    with pytest.raises(ValueError, match="`k` must be a positive integer; got 0"):
        alignment(write_adapter("a", {"x": factors(2)}), k=0)
    with pytest.raises(AdapterFileError):
        alignment(tmp_path / "nowhere")


@pytest.fixture
def adapter(write_adapter):
    names = [name_of(i, leaf) for i in range(12) for leaf in ROLES]
    return write_adapter("adapter", {name: factors(4, seed=i) for i, name in enumerate(names)})


@pytest.mark.slow
def test_it_is_shown_in_80_columns(adapter):
    console = Console(width=80, record=True, file=io.StringIO())
    print_report(alignment(adapter), console)
    text = console.export_text()
    table, _, steps = text.partition("next steps\n")
    assert max(map(len, table.replace(str(adapter), "").splitlines())) <= 80
    assert steps == f"  lorakit audit {adapter} --suggest-ranks\n"
    for role in ROLES.values():
        assert any(line.split()[:2] == [role, "12"] for line in text.splitlines())
    assert any(line.startswith("output–down 12") for line in text.splitlines())


@pytest.mark.slow
def test_the_figure_is_written_as_a_png_file(adapter, tmp_path):
    (written,) = write_plots(alignment(adapter), tmp_path / "plots")
    assert written == tmp_path / "plots" / "alignment.png"
    assert written.read_bytes().startswith(b"\x89PNG")


def test_an_adapter_without_pairs_has_a_figure_that_says_so(write_adapter):
    figure = alignment(write_adapter("b", {"x": factors(2)})).plot()
    assert [text.get_text() for text in figure.texts][-1] == "no role has two modules to compare"


@pytest.mark.slow
def test_the_figure_has_a_matrix_for_each_role_and_quantity(adapter):
    report = alignment(adapter)
    matrices = [axes for axes in report.plot().axes if axes.images]
    expected = [(group, quantity) for quantity in ("similarity", "overlap") for group in report.roles]
    for axes, (group, quantity) in zip(matrices, expected, strict=True):
        drawn = axes.images[0].get_array()
        assert float(drawn[3, 7]) == pytest.approx(getattr(group, quantity)[3][7])
        name, numbers = axes.get_title().split("\n")
        assert name.partition(",")[0] == group.name
        assert numbers.endswith(f"chance {getattr(group, f'random_{quantity}'):.3f}")


@pytest.mark.slow
def test_the_figure_shows_chance_within_layers_and_names_the_adapter(adapter):
    report = alignment(adapter)
    figure = report.plot()
    assert figure.get_suptitle().endswith(f"{adapter.name} (LORA)")
    panels = [axes for axes in figure.axes if axes.lines]
    assert len(panels) == 2
    for axes, quantity in zip(panels, ("similarity", "overlap"), strict=True):
        points, chance = axes.lines
        assert list(points.get_ydata()) == [getattr(pair, quantity) for pair in report.within_layer]
        assert list(chance.get_ydata()) == [getattr(pair, f"random_{quantity}") for pair in report.within_layer]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["output against down", "by chance"]


def test_the_report_names_the_role_that_shares_most(adapter):
    report = alignment(adapter)
    most = max(report.roles, key=lambda group: group.overlap_mean / group.random_overlap)
    assert report.headline.startswith(f"Most shared across layers: {most.name}, ")
    assert len(repr(report)) < 500
    assert report.next_steps == (f"lorakit audit {adapter} --suggest-ranks",)
    assert [row["name"] for row in report.rows()] == [group.name for group in report.roles]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorakit", "alignment", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_command(adapter, write_adapter, tmp_path):
    done = run(adapter, "--json", "--k", "2", "--plots", tmp_path / "plots")
    assert (done.returncode, done.stderr) == (0, "")
    assert_close_reports(json.loads(done.stdout), json.loads(json.dumps(alignment(adapter, k=2).to_dict())))
    assert (tmp_path / "plots" / "alignment.png").exists()
    bad = write_adapter("bad", {"x": (torch.full((3, 2), math.nan), torch.ones(2, 3))})
    done = run(bad)
    assert done.returncode == 1
    assert "error non_finite" in done.stdout
    done = run(tmp_path / "nowhere", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    for arguments in ((), (adapter, "--k", "0"), (adapter, "--no")):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
