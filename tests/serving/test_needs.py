"""What servers need of a file, and what is refused for them by name."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit.compress import truncate
from lorakit.errors import UnsupportedModelError
from lorakit.export import to_lora
from lorakit.merging import merge
from lorakit.serving._needs import SERVED_RANKS, Needs, needs_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def make(randomize, tmp_path):
    def saved(name="adapter", dtype=torch.float32, size=64, **config):
        base = nn.Sequential(nn.Linear(size, size), nn.Linear(size, size))
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["0"]} | config
        model = randomize(get_peft_model(base, LoraConfig(**settings)))
        model.save_pretrained(tmp_path / name)
        tensors = load_file(tmp_path / name / WEIGHTS)
        save_file({key: tensor.to(dtype) for key, tensor in tensors.items()}, tmp_path / name / WEIGHTS)
        return model, tmp_path / name

    return saved


def written(out):
    return json.loads((out / CONFIG).read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "padded"), [(3, 8), (8, 8), (9, 16), (14, 16), (24, 32), (48, 48), (72, 80)])
def test_lorax_and_tgi_get_eight_or_a_multiple_of_sixteen(make, tmp_path, rank, padded):
    model, path = make(r=rank, size=80)
    for server in ("lorax", "TGI", ["tgi", "lorax"], "sglang, lorax"):
        assert to_lora(path, tmp_path / "out", for_server=server).r == padded
    assert to_lora(model, tmp_path / "live", for_server="lorax").r == padded
    assert truncate(path, tmp_path / "cut", max_rank=rank, for_server="lorax").r == padded
    assert merge([path], tmp_path / "merged", for_server="lorax", weights=[1]).r == padded
    assert to_lora(path, tmp_path / "plain", for_server="llama.cpp,vllm").r == rank


def test_ollama_gets_an_integer_alpha_also_in_half_precision(make, tmp_path):
    _, path = make(dtype=torch.bfloat16, lora_alpha=7.5)
    assert to_lora(path, tmp_path / "out").lora_alpha == 7.5
    report = to_lora(path, tmp_path / "out", for_server="ollama")
    assert (report.lora_alpha, report.r) == (4, 4)
    assert isinstance(written(tmp_path / "out")["lora_alpha"], int)


@pytest.mark.parametrize(
    ("config", "content"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["1"]}, "modules_to_save"),
    ],
)
def test_contents_that_a_server_refuses_are_refused_by_its_name(make, tmp_path, config, content):
    model, path = make(**config)
    for source in (model, path):
        with pytest.raises(UnsupportedModelError, match=rf"llama\.cpp does not serve adapters with {content}"):
            to_lora(source, tmp_path / "out", for_server="peft,llama.cpp")
        to_lora(source, tmp_path / "fine", for_server="peft")
    with pytest.raises(UnsupportedModelError, match=f"vllm does not serve adapters with {content}"):
        truncate(path, tmp_path / "out", max_rank=2, for_server="vllm")
    assert not (tmp_path / "out").exists()


def test_ranks_above_what_a_server_takes_are_refused(make, tmp_path):
    model, path = make(r=520, size=16)
    with pytest.raises(UnsupportedModelError, match="vllm serves ranks up to 512; the adapter would have rank 520"):
        to_lora(model, tmp_path / "out", for_server="vllm")
    report = to_lora(path, tmp_path / "out")
    assert report.vllm_max_lora_rank is None
    assert "not served: above 512" in report.details[1]
    with pytest.raises(UnsupportedModelError, match=r"No rank that is served everywhere \(8, .*\) is as large as 520"):
        Needs((), SERVED_RANKS).rank_at_least(520)


@pytest.mark.parametrize("kind", ["model", "path"])
@pytest.mark.parametrize(("energy", "expected"), [(0.3, 8), (0.9, 32), (1.0, 64)])
def test_auto_is_the_smallest_served_rank_that_keeps_the_energy(make, tmp_path, kind, energy, expected):
    model, path = make(r=40)
    report = to_lora({"model": model, "path": path}[kind], tmp_path / "out", rank="auto", energy=energy)
    layer = model.base_model.model[0]
    squares = torch.linalg.svdvals(layer.get_delta_weight("default").detach().double()) ** 2
    kept = torch.cumsum(squares, 0) / squares.sum()
    smallest = next(rank for rank in SERVED_RANKS if kept[min(rank, 64) - 1] >= energy - 1e-12)
    assert report.r == smallest == expected
    assert report.vllm_max_lora_rank == expected
    assert report.discarded_energy == pytest.approx(1 - float(kept[expected - 1]), abs=1e-6)
    assert f"→ {expected}" in report.details[1]


def test_needs_of_no_server_are_none():
    needs = needs_of(None)
    assert [needs.rank_at_least(rank) for rank in (1, 7, 600)] == [1, 7, 600]
    needs.check({"DoRA"})
    needs.check_rank(10**6)
    assert not needs.integer_alpha
