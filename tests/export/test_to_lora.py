"""Exports are plain LoRAs: for PEFT without lorakit, and for servers that read `r` and `lora_alpha` alone."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import KasaConfig, MontecloraConfig
from safetensors.torch import load_file

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters.in_model import live_modules
from lorakit.adapters.stream import SafetensorsWriter
from lorakit.export import to_lora
from lorakit.tuners.speclora import MODES

TASK = {"task_type": "CAUSAL_LM"}
CONFIGS = {
    "fisherlora": lambda: FisherLoRAConfig(r=6, r_q=2, **TASK),
    "fisherlora-rslora": lambda: FisherLoRAConfig(r=6, r_q=2, use_rslora=True, target_modules="all-linear", **TASK),
    "fisherlora-alphas": lambda: FisherLoRAConfig(r=6, r_q=2, alpha_pattern={"v_proj": 5}, **TASK),
    "lora-patterns": lambda: LoraConfig(
        r=4,
        lora_alpha=7,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 3},
        target_modules="all-linear",
        **TASK,
    ),
    "fisherlora-bias": lambda: FisherLoRAConfig(r=6, modules_to_save=["lm_head"], **TASK),
    **{
        f"speclora-{mode}": lambda mode=mode: SpecLoRAConfig(r=3, k=12, mode=mode, target_modules="all-linear", **TASK)
        for mode in MODES
    },
    "speclora-large-k": lambda: SpecLoRAConfig(
        r=3, k=32, use_rslora=True, lora_alpha=5, target_modules="all-linear", **TASK
    ),
}


@pytest.fixture(params=CONFIGS)
def trained(request, tiny_llama, randomize):
    clips = request.param == "speclora-large-k"
    with pytest.warns(UserWarning, match="`k` is clipped") if clips else contextlib.nullcontext():
        return randomize(get_peft_model(tiny_llama(), CONFIGS[request.param]())).eval()


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.slow
def test_peft_loads_it_in_a_process_that_cannot_import_lorakit(trained, tiny_llama, token_ids, tmp_path, run_python):
    tiny_llama().save_pretrained(tmp_path / "base")
    to_lora(trained, tmp_path / "plain")
    torch.save({"ids": token_ids, "logits": trained(input_ids=token_ids).logits.detach()}, tmp_path / "expected.pt")
    code = f"""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "lorakit":
                    raise ImportError("lorakit is not installed here")
        sys.meta_path.insert(0, Refuse())
        try:
            import lorakit
        except ImportError:
            pass
        else:
            raise SystemExit("lorakit can be imported")
        import torch
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM
        root = {str(tmp_path)!r}
        expected = torch.load(root + "/expected.pt", weights_only=True)
        assert PeftConfig.from_pretrained(root + "/plain").peft_type == "LORA"
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root + "/base"), root + "/plain").eval()
        logits = model(input_ids=expected["ids"]).logits
        print(float((logits - expected["logits"]).abs().max() / expected["logits"].abs().max()))
        print("lorakit" in sys.modules)
    """
    error, imported = run_python(code).stdout.split()
    assert float(error) <= 1e-5
    assert imported == "False"


def served_logits(directory, base, ids):
    """As a server does that reads `r` and `lora_alpha`, and of each module its two tensors: W + α/r B A."""
    config = json.loads((directory / "adapter_config.json").read_text())
    assert "use_rslora" not in config
    tensors = load_file(directory / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    modules = dict(base.named_modules())
    with torch.no_grad():
        for key, B in tensors.items():
            if key.endswith(".lora_B.weight"):
                A = tensors[key.replace("lora_B", "lora_A")]
                assert A.shape[0] == config["r"]
                modules[key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")].weight += scaling * B @ A
            elif ".lora_" not in key:
                modules[key.removeprefix("base_model.model.").removesuffix(".weight")].weight.copy_(B)
    return base(input_ids=ids).logits


def test_a_loader_that_ignores_patterns_gets_the_right_update(trained, tiny_llama, token_ids, tmp_path):
    to_lora(trained, tmp_path / "plain")
    assert (
        relative(served_logits(tmp_path / "plain", tiny_llama(), token_ids), trained(input_ids=token_ids).logits)
        <= 1e-5
    )


def test_fisherlora_keeps_its_entries(tiny_llama, randomize, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["fisherlora"]()))
    model.save_pretrained(tmp_path / "own")
    report = to_lora(model, tmp_path / "plain")
    compact = to_lora(model, tmp_path / "compact", pad=False)
    own, plain, small = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("own", "plain", "compact"))
    assert own.keys() == plain.keys() == small.keys()
    for key, tensor in own.items():
        assert torch.equal(small[key], tensor)
        rank = tensor.shape["lora_B" in key]
        kept = plain[key][:, :rank] if "lora_B" in key else plain[key][:rank]
        assert torch.equal(kept, tensor)
        assert plain[key].count_nonzero() == tensor.count_nonzero()
    config = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": 6,
        "lora_alpha": 12,
        "target_modules": ["q_proj", "v_proj"],
        "inference_mode": True,
    }
    config = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"q_proj": 2}, {"q_proj": 4})
    assert report.discarded_energy == compact.discarded_energy == 0
    assert report.parameters_before == compact.parameters == sum(tensor.numel() for tensor in own.values())
    assert report.parameters == sum(tensor.numel() for tensor in plain.values())
    assert {module.rank for module in report.modules} == {2, 6}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_speclora_is_exact_at_rank_r_plus_k_and_optimal_below(tiny_llama, randomize, tmp_path, mode):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS[f"speclora-{mode}"]()), std=0.3)
    deltas = {m.name: m.layer.get_delta_weight("default").detach().double() for m in live_modules(model, "default")}
    exact = to_lora(model, tmp_path / "exact")
    assert all(module.rank <= min(3 + 12, *deltas[module.module_name].shape) for module in exact.modules)
    assert exact.discarded_energy == 0
    cut = to_lora(model, tmp_path / "cut", rank=5)
    assert all(module.rank <= 5 for module in cut.modules)
    assert cut.r == 5
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "cut")
    discarded = total = 0.0
    for exported, written in zip(cut.modules, live_modules(plain, "default"), strict=True):
        delta = deltas[exported.module_name]
        sigma = torch.linalg.svdvals(delta)
        optimal = float((sigma[5:] ** 2).sum())
        energy = float((sigma**2).sum())
        error = float((written.factors().dense().double() - delta).norm() ** 2)
        assert error == pytest.approx(optimal, rel=1e-3, abs=1e-9 * energy)
        assert exported.discarded_energy == pytest.approx(optimal / energy, rel=1e-4, abs=1e-7)
        discarded, total = discarded + optimal, total + energy
    assert cut.discarded_energy == pytest.approx(discarded / total, rel=1e-4)
    assert cut.discarded_energy > 0


def test_any_adapter_can_be_truncated(tiny_llama, randomize, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["fisherlora"]()))
    report = to_lora(model, tmp_path / "plain", rank=3)
    assert {(m.source_rank, m.rank) for m in report.modules} == {(2, 2), (6, 3)}
    assert 0 < report.discarded_energy < 1
    assert json.loads(json.dumps(report.to_dict()))["modules"][0]["module_name"] == "model.layers.0.self_attn.q_proj"


def test_bfloat16_adapters_stay_bfloat16(tiny_llama, randomize, token_ids, tmp_path):
    config = SpecLoRAConfig(r=2, k=6, target_modules=["q_proj"], **TASK)
    model = randomize(get_peft_model(tiny_llama(torch.bfloat16), config, autocast_adapter_dtype=False)).eval()
    to_lora(model, tmp_path / "plain")
    assert {t.dtype for t in load_file(tmp_path / "plain" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    plain = PeftModel.from_pretrained(tiny_llama(torch.bfloat16), tmp_path / "plain").eval()
    assert relative(plain(input_ids=token_ids).logits.float(), model(input_ids=token_ids).logits.float()) < 0.05


def test_conv1d(tiny_gpt2, randomize, token_ids, tmp_path):
    config = SpecLoRAConfig(r=2, k=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, **TASK)
    model = randomize(get_peft_model(tiny_gpt2(), config)).eval()
    to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_gpt2(), tmp_path / "plain").eval()
    assert relative(plain(input_ids=token_ids).logits, model(input_ids=token_ids).logits) <= 1e-5


def test_a_merged_or_scaled_adapter_exports_what_it_does(tiny_llama, randomize, token_ids, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["speclora-hadamard"]())).eval()
    for module in live_modules(model, "default"):
        module.layer.set_scale("default", 0.5)
    expected = model(input_ids=token_ids).logits
    model.merge_adapter()
    to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert relative(plain(input_ids=token_ids).logits, expected) <= 1e-5


@pytest.mark.parametrize("config", [SpecLoRAConfig, FisherLoRAConfig])
def test_an_embedding_s_base_weight_is_not_written_merged(config, tiny_llama, randomize, token_ids, tmp_path):
    model = randomize(get_peft_model(tiny_llama(), config(r=3, target_modules=["embed_tokens"], **TASK))).eval()
    expected = model(input_ids=token_ids).logits
    model.merge_adapter()
    with pytest.raises(ValueError, match="'model.embed_tokens' is an adapted embedding, .* call unmerge_adapter"):
        to_lora(model, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    model.unmerge_adapter()
    to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert relative(plain(input_ids=token_ids).logits, expected) <= 1e-5


def test_the_model_and_one_of_several_adapters(tiny_llama, randomize, token_ids, tmp_path):
    model = get_peft_model(tiny_llama(), CONFIGS["fisherlora"]())
    model.add_adapter("b", FisherLoRAConfig(r=3, r_q=1, **TASK))
    model.set_adapter("b")
    randomize(model)
    expected = model.eval()(input_ids=token_ids).logits
    model.set_adapter("default")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    report = to_lora(model, tmp_path / "b", adapter_name="b")
    assert report.r == 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "b").eval()
    assert relative(plain(input_ids=token_ids).logits, expected) <= 1e-5


def test_lora_bias_survives(randomize, token_ids, tmp_path):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def base():
        torch.manual_seed(0)
        return Qwen2ForCausalLM(
            Qwen2Config(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=64,
            )
        ).eval()

    for config in (
        FisherLoRAConfig(r=4, lora_bias=True, alpha_pattern={"v_proj": 3}, **TASK),
        SpecLoRAConfig(r=4, k=8, lora_bias=True, target_modules=["q_proj", "v_proj"], **TASK),
    ):
        model = randomize(get_peft_model(base(), config)).eval()
        to_lora(model, tmp_path / "plain")
        plain = PeftModel.from_pretrained(base(), tmp_path / "plain").eval()
        assert relative(plain(input_ids=token_ids).logits, model(input_ids=token_ids).logits) <= 1e-5


@pytest.mark.parametrize("alpha", [0, -3, 2.5])
@pytest.mark.parametrize("config", [FisherLoRAConfig, SpecLoRAConfig, LoraConfig])
def test_any_alpha(tiny_llama, randomize, token_ids, tmp_path, config, alpha):
    more = {"k": 4} if config is SpecLoRAConfig else {}
    model = randomize(
        get_peft_model(tiny_llama(), config(r=3, lora_alpha=alpha, target_modules=["q_proj"], **more, **TASK))
    )
    expected = model.eval()(input_ids=token_ids).logits
    to_lora(model, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    assert relative(plain(input_ids=token_ids).logits, expected) <= 1e-5


def test_an_existing_directory_keeps_other_files_and_a_failure_keeps_the_old_ones(
    tiny_llama, randomize, tmp_path, monkeypatch
):
    model = randomize(get_peft_model(tiny_llama(), CONFIGS["fisherlora"]()))
    out = tmp_path / "plain"
    to_lora(model, out)
    (out / "notes.txt").write_text("mine")
    old = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(SafetensorsWriter, "write", fail)
    with pytest.raises(OSError, match="No space left"):
        to_lora(model, out, rank=1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == old
    with pytest.raises(OSError, match="No space left"):
        to_lora(model, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]
    monkeypatch.undo()
    to_lora(model, out, rank=1)
    assert json.loads((out / "adapter_config.json").read_text())["r"] == 1
    assert (out / "notes.txt").read_text() == "mine"


def test_bad_input_is_a_typed_error_and_writes_nothing(tiny_llama, tmp_path):
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    for rank in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="`rank` must be a positive integer, 'auto' or None"):
            to_lora(model, tmp_path / "x", rank=rank)
    with pytest.raises(TypeError, match="`adapter` must be a peft.PeftModel"):
        to_lora(tiny_llama(), tmp_path / "x")
    with pytest.raises(ValueError, match="`adapter_name` must be one of"):
        to_lora(model, tmp_path / "x", adapter_name="y")
    embedding = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with pytest.raises(ValueError, match="'model.embed_tokens' is a Embedding layer, which `rank` cannot truncate"):
        to_lora(embedding, tmp_path / "x", rank=1)
    pissa = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa', which changed the base weights"):
        to_lora(pissa, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        to_lora(model, tmp_path / "file")


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = torch.nn.Embedding(11, 8)
        self.lin = torch.nn.Linear(8, 6)
        self.conv = torch.nn.Conv1d(6, 5, 3, padding=1, stride=2)
        self.deep = torch.nn.Conv2d(1, 4, (2, 3))

    def forward(self, ids):
        return self.deep(self.conv(self.lin(self.emb(ids)).mT)[:, None])


MIXED = {
    "SpecLoRA": lambda **o: SpecLoRAConfig(r=2, lora_alpha=3, k=3, **o),
    "SpecLoRA, alphas": lambda **o: SpecLoRAConfig(
        r=2, k=3, alpha_pattern={"emb": 5, "conv": 3}, rank_pattern={"deep": 1}, **o
    ),
    "SpecLoRA, bottom": lambda **o: SpecLoRAConfig(r=2, k=3, mode="hadamard_bottom", **o),
    "SpecLoRA, svd": lambda **o: SpecLoRAConfig(r=2, k=3, mode="svd", **o),
    "SpecLoRA with DoRA": lambda **o: SpecLoRAConfig(r=2, k=3, use_dora=True, **o),
    "FisherLoRA, alphas": lambda **o: FisherLoRAConfig(r=4, alpha_pattern={"emb": 5, "conv": 3}, **o),
}


def mixed(config, randomize, **options):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="SpecLoRA: `k` is clipped")
        config = MIXED[config](target_modules=["emb", "lin", "conv", "deep"], **options)
        model = get_peft_model(Mixed().double(), config, autocast_adapter_dtype=False)
    return randomize(model, std=0.5).eval()


@pytest.mark.parametrize("config", MIXED)
def test_embeddings_and_convolutions(config, randomize, tmp_path):
    """The mask becomes ranks of every kind of layer; DoRA's magnitudes are of the whole."""
    model, ids = mixed(config, randomize), torch.tensor([[0, 1, 10, 4, 2, 3]])
    report = to_lora(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Mixed().double(), tmp_path, autocast_adapter_dtype=False).eval()
    assert relative(loaded(ids), model(ids)) < 1e-12
    assert relative(loaded.merge_and_unload()(ids), model(ids)) < 1e-12
    for module in report.modules:
        layer = model.base_model.model.get_submodule(module.module_name)
        masks = getattr(layer, "lora_spec", None)
        assert module.rank == layer.r["default"] + (masks["default"].k if masks else 0)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (lambda: torch.nn.MultiheadAttention(8, 2), {}, "'0' is an attention layer"),
        (lambda: torch.nn.Conv1d(6, 6, 3, dilation=2), {}, "'0' pads or dilates"),
        (lambda: torch.nn.Conv1d(6, 6, 3, padding_mode="circular"), {}, "'0' pads or dilates"),
        (lambda: torch.nn.Linear(6, 8), {"kasa_config": KasaConfig()}, "'0' uses Kasa, whose"),
        (lambda: torch.nn.Linear(6, 8), {"monteclora_config": MontecloraConfig()}, "'0' uses Monteclora, whose"),
        (lambda: torch.nn.Linear(6, 8), {"init_lora_weights": "olora"}, "'olora', which changed the base weights"),
    ],
)
def test_masks_that_no_plain_lora_can_say_are_refused(base, options, message, randomize, tmp_path):
    model = get_peft_model(torch.nn.Sequential(base()), SpecLoRAConfig(r=2, k=3, target_modules=["0"], **options))
    with pytest.raises(ValueError, match=message):
        to_lora(randomize(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()
