"""Files of other programs' formats, loaded by those programs' own code where it is installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from closeness import assert_close_outputs
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from lorakit import FisherLoRAConfig, SpecLoRAConfig, serving
from lorakit.adapters import open_adapter
from lorakit.errors import ExportError


def _randomized(model):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def fisherlora(tiny_llama, tmp_path):
    """A saved adapter of mixed ranks, and its ΔW by module in float64."""
    config = FisherLoRAConfig(r=8, r_q=2, lora_alpha=20, target_modules=["q_proj", "v_proj", "down_proj"])
    model = _randomized(get_peft_model(tiny_llama(), config))
    model.save_pretrained(tmp_path / "adapter")
    layers = dict(model.get_base_model().named_modules())
    updates = {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in layers.items()
        if hasattr(layer, "lora_A")
    }
    return tmp_path / "adapter", updates


@pytest.fixture
def unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


INPUTS = {
    "sample": torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(1)),
    "timestep": torch.tensor([3]),
    "encoder_hidden_states": torch.randn(1, 5, 12, generator=torch.Generator().manual_seed(2)),
}


@pytest.fixture
def adapted_unet(unet, tmp_path):
    """The saved adapter of a U-Net with two ranks, convolutions among its modules, and its output."""
    config = LoraConfig(
        r=4, lora_alpha=9, target_modules=["to_q", "to_v", "conv1", "to_out.0"], rank_pattern={"to_v": 6}
    )
    model = _randomized(get_peft_model(unet, config)).eval()
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        output = model(**INPUTS).sample
    return tmp_path / "adapter", model.unload(), output


@pytest.mark.slow
def test_diffusers_loads_its_file_at_the_right_scale(adapted_unet, tmp_path):
    adapter, unet, expected = adapted_unet
    with torch.no_grad():
        plain = unet(**INPUTS).sample
    report = serving.write_diffusers(adapter, tmp_path / "lora.safetensors")
    assert report.error < 1e-6
    unet.load_lora_adapter(str(tmp_path / "lora.safetensors"), prefix="unet")
    with torch.no_grad():
        found = unet(**INPUTS).sample
    assert_close_outputs(found, expected)
    assert (plain - expected).abs().max() > 1e-2  # the adapter does something


@pytest.mark.slow
def test_diffusers_reads_kohya_s_file_at_the_right_scale(adapted_unet, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    adapter, unet, expected = adapted_unet
    serving.write_kohya(adapter, tmp_path / "lora.safetensors")
    tensors = load_file(tmp_path / "lora.safetensors")
    # Its names are compared by what ComfyUI has: lora_unet_ and the module's name, with underscores for dots.
    layers = dict(unet.named_modules())
    names = {name.replace(".", "_"): name for name in layers}
    for module in open_adapter(adapter).modules:
        key = f"lora_unet_{module.name.replace('.', '_')}"
        down, up = (tensors[f"{key}.lora_{half}.weight"].double().flatten(1) for half in ("down", "up"))
        layer = layers[names[module.name.replace(".", "_")]]
        with torch.no_grad():  # ComfyUI, comfy/weight_adapter/lora.py: alpha / rank · up @ down
            update = float(tensors[f"{key}.alpha"]) / down.shape[0] * up @ down
            layer.weight += update.reshape(layer.weight.shape).to(layer.weight)
    with torch.no_grad():
        assert_close_outputs(unet(**INPUTS).sample, expected)
    attention = {key: value for key, value in tensors.items() if "attentions" in key}
    state_dict, alphas = _convert_non_diffusers_lora_to_diffusers(attention)
    assert state_dict
    assert alphas


@pytest.mark.parametrize("write", [serving.write_kohya, serving.write_diffusers])
def test_prefixes(write, adapted_unet, tmp_path):
    adapter, _, _ = adapted_unet
    write(adapter, tmp_path / "out.safetensors", prefix="transformer")
    assert all("transformer" in key for key in load_file(tmp_path / "out.safetensors"))
    with pytest.raises(ExportError, match=r"`prefix` must be one of unet, transformer, .*; got 'vae'\."):
        write(adapter, tmp_path / "other.safetensors", prefix="vae")
    assert not (tmp_path / "other.safetensors").exists()


def test_kohya_keeps_ranks_dtypes_and_entries(write_adapter, tmp_path):
    factors = {
        "blocks.0.to_q": (torch.randn(6, 2).bfloat16(), torch.randn(2, 5).bfloat16()),
        "blocks.0.to_v": (torch.randn(6, 4).bfloat16(), torch.randn(4, 5).bfloat16()),
    }
    directory = write_adapter("adapter", factors, r=4, lora_alpha=6, rank_pattern={"to_q": 2})
    report = serving.write_kohya(directory, tmp_path / "out.safetensors")
    tensors = load_file(tmp_path / "out.safetensors")
    for name, (B, A) in factors.items():
        key = f"lora_transformer_{name.replace('.', '_')}"
        assert torch.equal(tensors[f"{key}.lora_up.weight"], B)
        assert torch.equal(tensors[f"{key}.lora_down.weight"], A)
    assert float(tensors["lora_transformer_blocks_0_to_q.alpha"]) == 6.0  # scaling 3 (of alpha 6, rank 2), rank 2
    assert float(tensors["lora_transformer_blocks_0_to_v.alpha"]) == 6.0
    assert [row.rank for row in report.modules] == [2, 4]


def test_two_modules_that_would_share_a_name(write_adapter, tmp_path):
    factors = {name: (torch.randn(3, 2), torch.randn(2, 3)) for name in ("a.to_q", "a_to.q")}
    directory = write_adapter("adapter", factors, r=2)
    with pytest.raises(ExportError, match="have the same name when dots are underscores"):
        serving.write_kohya(directory, tmp_path / "out.safetensors")


def test_mlx_s_layers_compute_the_same_update(fisherlora, tmp_path):
    adapter, updates = fisherlora
    report = serving.write_mlx(adapter, tmp_path / "mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "mlx" / "adapters.safetensors")
    parameters = config["lora_parameters"]
    assert config["fine_tune_type"] == "lora"
    assert set(parameters["keys"]) == set(updates)
    for name, update in updates.items():
        a, b = tensors[f"{name}.lora_a"].double(), tensors[f"{name}.lora_b"].double()
        assert a.shape[1] == b.shape[0] == parameters["rank"] == 8
        # mlx_lm/tuner/lora.py, LoRALinear.fuse
        delta = (parameters["scale"] * b.T) @ a.T
        assert (delta - update).norm() <= 1e-6 * update.norm()
    assert report.error < 1e-6


MLX = """
import mlx.core as mx, numpy as np, sys
from pathlib import Path
from mlx_lm.utils import load_model
from mlx_lm.tuner.utils import load_adapters
model, _ = load_model(Path(sys.argv[1]))
ids = mx.array([[1, 5, 9, 2, 40, 3]])
load_adapters(model, sys.argv[2])
np.save(sys.argv[3], np.array(model(ids).astype(mx.float32)))
"""


@pytest.mark.slow
def test_mlx_lm_itself_gives_the_logits_of_peft(tiny_llama, fisherlora, tmp_path):
    import numpy as np
    from peft import PeftModel

    pytest.importorskip("mlx_lm")
    adapter, _ = fisherlora
    tiny_llama().save_pretrained(tmp_path / "base")
    serving.write_mlx(adapter, tmp_path / "mlx")
    arguments = [str(tmp_path / "base"), str(tmp_path / "mlx"), str(tmp_path / "logits.npy")]
    done = subprocess.run([sys.executable, "-c", MLX, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(tiny_llama(), adapter).eval()
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([[1, 5, 9, 2, 40, 3]])).logits.float()
    found = torch.from_numpy(np.load(tmp_path / "logits.npy"))
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA magnitude"),
    "bias": ({"bias": "lora_only"}, "was made with `bias`"),
    "saved": ({"modules_to_save": ["lm_head"]}, "was made with `modules_to_save`"),
}


@pytest.mark.parametrize("write", [serving.write_kohya, serving.write_diffusers, serving.write_mlx])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_more_than_factors_is_refused(write, name, tiny_llama, tmp_path):
    options, message = REFUSED[name]
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], **options))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ExportError, match=message):
        write(tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", [serving.write_kohya, serving.write_diffusers, serving.write_mlx])
def test_a_mask_and_factors_that_are_not_finite_are_refused(write, tiny_llama, write_adapter, tmp_path):
    get_peft_model(tiny_llama(), SpecLoRAConfig(r=2, k=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "spec")
    with pytest.raises(ExportError, match="is a SPECLORA adapter"):
        write(tmp_path / "spec", tmp_path / "out")
    directory = write_adapter("broken", {"q_proj": (torch.full((3, 2), torch.inf), torch.randn(2, 3))}, r=2)
    with pytest.raises(ExportError, match=r"q_proj: lora_B has"):
        write(directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_read_back_wrongly_is_not_kept(write_adapter, tmp_path, monkeypatch):
    from lorakit.serving import _image_models

    directory = write_adapter("adapter", {"q_proj": (torch.randn(3, 2), torch.randn(2, 3))}, r=2)
    (tmp_path / "out.safetensors").write_bytes(b"what was there")

    def spoiled(tensors, *arguments, **options):
        save_file({key: value * 1.01 for key, value in tensors.items()}, *arguments, **options)

    monkeypatch.setattr(_image_models, "save_file", spoiled)
    with pytest.raises(ExportError, match="was read back with an error of"):
        serving.write_kohya(directory, tmp_path / "out.safetensors", overwrite=True)
    assert (tmp_path / "out.safetensors").read_bytes() == b"what was there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out.safetensors"]
