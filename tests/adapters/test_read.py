"""Adapters at rest: what PEFT saved, as the view reads it; and what nobody should have saved."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.adapters.read import SafetensorsFile
from lorakit.errors import AdapterFileError, UnsupportedModelError

LAYERS = ["embedding", "conv1d", "conv2d", "pointwise", "conv3d", "q_proj", "v_proj"]
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def layers_of(model, adapter_name="default"):
    """PEFT's layers by their names in the base model."""
    return {name: model.base_model.model.get_submodule(name) for name in model.base_model.targeted_module_names}


def check_against_peft(adapter, model):
    layers = layers_of(model)
    assert {module.name for module in adapter.modules} == set(layers)
    for module in adapter.modules:
        expected = layers[module.name].get_delta_weight("default")
        assert torch.allclose(module.in_base_layout(adapter.factors(module).dense()), expected, atol=1e-6), module.name
        assert expected.abs().max() > 0
        assert expected.numel() == module.d_in * module.d_out


def codes(adapter):
    return [(finding.severity, finding.code, finding.module_name) for finding in adapter.findings]


CONFIGS = {
    "plain": LoraConfig(r=3, lora_alpha=5, target_modules=LAYERS),
    "rslora": LoraConfig(r=4, lora_alpha=5, use_rslora=True, target_modules=LAYERS),
    "patterns": LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=LAYERS,
        rank_pattern={r"blocks\.0\.q_proj": 2, "conv.d": 5, "v_proj": 4},
        alpha_pattern={"v_proj": 7, r"^blocks\.1\.q_proj": 1},
    ),
    "rslora and patterns": LoraConfig(
        r=3, use_rslora=True, target_modules=LAYERS, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 9}
    ),
    "Conv1D": LoraConfig(r=3, target_modules=["gpt"], fan_in_fan_out=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_and_scaling_is_read_as_peft_applies_it(saved, name):
    model, directory = saved(CONFIGS[name])
    for source in (directory, directory / WEIGHTS, str(directory), model):
        adapter = open_adapter(source)
        check_against_peft(adapter, model)
        assert not [finding for finding in adapter.findings if finding.severity == "error"]
        adapter.check()
    kinds = {module.name: module.kind for module in open_adapter(directory).modules}
    assert all(kind == {"e": "embedding", "c": "conv", "p": "conv"}.get(n[0], "linear") for n, kind in kinds.items())


def test_a_pickle_of_tensors_is_read_without_trusting_it(saved):
    model, directory = saved(CONFIGS["plain"], safe_serialization=False)
    assert not (directory / WEIGHTS).exists()
    check_against_peft(open_adapter(directory), model)


def test_a_grouped_convolution_is_that_of_its_forward(saved):
    base = nn.Sequential(nn.Conv1d(4, 6, 3, groups=2, bias=False))
    model, directory = saved(LoraConfig(r=4, lora_alpha=3, target_modules=["0"]), base)
    (module,) = (adapter := open_adapter(directory)).modules
    assert module.groups == 2
    kernel = adapter.factors(module).dense().reshape(6, 4, 3)
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        difference = model(x) - model.get_base_model()[0].base_layer(x)
    assert torch.allclose(nn.functional.conv1d(x, kernel), difference, atol=1e-5)


def test_roles_layers_and_natural_order(tiny_llama, saved):
    _, directory = saved(LoraConfig(r=2, target_modules="all-linear"), tiny_llama(num_hidden_layers=11))
    modules = open_adapter(directory).modules
    assert [module.layer for module in modules] == [i for i in range(11) for _ in range(7)]
    assert {m.role for m in modules} == {"query", "key", "value", "output", "gate", "up", "down"}


@pytest.mark.parametrize("source", ["disk", "model"])
def test_dora_bias_and_mask_lie_beside_the_update(tiny_llama, saved, source):
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, lora_bias=False)
    model, directory = saved(config, tiny_llama())
    module = open_adapter(directory if source == "disk" else model).modules[0]
    assert module.magnitude.shape == (32,)
    model, directory = saved(
        LoraConfig(r=2, target_modules=["dense"], lora_bias=True), nn.ModuleDict({"dense": nn.Linear(3, 4)})
    )
    module = open_adapter(directory if source == "disk" else model).modules[0]
    assert module.bias.shape == (4,)
    model, directory = saved(SpecLoRAConfig(r=2, k=5, target_modules=["q_proj"]), tiny_llama())
    adapter = open_adapter(directory if source == "disk" else model)
    module = adapter.modules[0]
    assert adapter.settings.peft_type == "SPECLORA"
    assert torch.equal(
        adapter.tensor(module.mask), model.base_model.model.model.layers[0].self_attn.q_proj.lora_spec["default"].weight
    )
    assert [info.shape for info in module.extras] == [(5,)]


def test_fisherlora_has_its_ranks_and_one_scaling(tiny_llama, saved):
    model, directory = saved(FisherLoRAConfig(r=6, r_q=2, use_rslora=True), tiny_llama())
    adapter = open_adapter(directory)
    check_against_peft(adapter, model)
    assert {(m.role, m.rank) for m in adapter.modules} == {("query", 2), ("value", 6)}
    assert len({round(m.scaling, 6) for m in adapter.modules}) == 1


@pytest.mark.parametrize("masked", [False, True])
def test_adalora_s_own_scaling_and_masks(tiny_llama, saved, tmp_path, masked):
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=3, total_step=10, target_modules=["q_proj", "v_proj"])
    model, directory = saved(config, tiny_llama())
    if masked:
        names = [f"{name}.lora_E" for name in layers_of(model)]
        masks = [[True, False, True, True], [False] * 4, [True] * 4, [False, True, False, False]]
        model.peft_config["default"].rank_pattern = dict(zip(names, masks, strict=True))
        directory = tmp_path / "masked"
        model.save_pretrained(directory)
    loaded = layers_of(PeftModel.from_pretrained(tiny_llama(), directory))
    adapter = open_adapter(directory)
    adapter.check()
    assert [m.rank for m in adapter.modules] == ([3, 4, 1] if masked else [4] * 4)
    assert sum(code == "pruned" for _, code, _ in codes(adapter)) == masked
    for module in adapter.modules:
        expected = loaded[module.name].get_delta_weight("default")
        assert torch.allclose(adapter.factors(module).dense(), expected, atol=1e-6)
        assert expected.abs().max() > 0
    with pytest.raises(UnsupportedModelError, match="ADALORA"):
        open_adapter(model)


def test_tensors_beside_the_updates_are_sorted_by_what_they_are(tiny_llama, saved):
    config = LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head", "norm"], bias="all")
    base = tiny_llama(attention_bias=True)
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        _, directory = saved(config, base)
    kinds = {}
    for extra in open_adapter(directory).extras:
        kinds.setdefault(extra.kind, []).append(extra.info.key)
    assert set(kinds) == {"modules_to_save", "bias", "embedding"}
    assert all(key.endswith("bias") for key in kinds["bias"])
    assert len(kinds["bias"]) == 8
    assert any("lm_head" in key for key in kinds["modules_to_save"])
    assert any("embed_tokens" in key for key in kinds["embedding"])


def test_batches_are_the_modules_stacked_in_bounded_memory(saved):
    model, directory = saved(CONFIGS["patterns"])
    adapter = open_adapter(directory)
    for numel, most in ((1, 1), (10**6, 2)):
        seen = []
        for modules, update in adapter.batches(numel=numel):
            assert len(modules) <= most
            for i, module in enumerate(modules):
                assert torch.allclose(update.dense()[i], adapter.factors(module).dense())
            seen += [module.name for module in modules]
        assert sorted(seen) == sorted(module.name for module in adapter.modules)


@pytest.fixture
def plain(saved):
    """A small plain adapter: its directory, its tensors and its config."""
    _, directory = saved(LoraConfig(r=2, target_modules=["q_proj"]))
    return directory, load_file(directory / WEIGHTS), json.loads((directory / CONFIG).read_text())


A0 = "base_model.model.blocks.0.q_proj.lora_A.weight"
B0 = "base_model.model.blocks.0.q_proj.lora_B.weight"
NAME = "blocks.0.q_proj"

BROKEN_TENSORS = {
    "missing A": (lambda t: t.pop(A0), "missing_half"),
    "missing B": (lambda t: t.pop(B0), "missing_half"),
    "shapes that do not chain": (lambda t: t.update({A0: torch.ones(3, 6)}), "shape_mismatch"),
    "one dimension": (lambda t: t.update({A0: torch.ones(6)}), "shape_mismatch"),
    "no dimension": (lambda t: t.update({B0: torch.tensor(1.0)}), "shape_mismatch"),
    "nothing to multiply": (lambda t: t.update({A0: torch.ones(2, 0)}), "shape_mismatch"),
    "B of a grouped linear layer": (lambda t: t.update({B0: torch.ones(8, 1)}), "shape_mismatch"),
    "too many dimensions": (lambda t: t.update({A0: torch.ones(2, 1, 1, 1, 1, 6)}), "shape_mismatch"),
    "bias": (lambda t: t.update({B0.replace("weight", "bias"): torch.ones(3)}), "shape_mismatch"),
    "int8": (lambda t: t.update({A0: torch.ones(2, 6, dtype=torch.int8)}), "unsupported_dtype"),
    "float8": (lambda t: t.update({A0: torch.ones(2, 6).to(torch.float8_e4m3fn)}), "unsupported_dtype"),
    "rank 0": (lambda t: t.update({A0: torch.ones(0, 6), B0: torch.ones(8, 0)}), "rank_zero"),
    "another rank": (lambda t: t.update({A0: torch.ones(3, 6), B0: torch.ones(8, 3)}), "rank_mismatch"),
    "two prefixes": (lambda t: t.update({"blocks.0.q_proj.lora_A.weight": torch.ones(2, 6)}), "duplicate_tensor"),
    "two adapter names": (
        lambda t: t.update({A0.replace("weight", "other.weight"): torch.ones(2, 6)}),
        "duplicate_tensor",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_tensors_that_do_not_fit_are_findings(plain, case):
    directory, tensors, _ = plain
    change, code = BROKEN_TENSORS[case]
    change(tensors)
    save_file(tensors, directory / WEIGHTS)
    adapter = open_adapter(directory)
    assert codes(adapter) == [("error", code, NAME)]
    assert "blocks.1.q_proj" in [module.name for module in adapter.modules]
    assert (NAME in [module.name for module in adapter.modules]) == (code == "rank_mismatch")
    with pytest.raises(AdapterFileError, match=NAME):
        adapter.check()


def test_other_prefixes_and_infixes_are_understood(plain):
    directory, tensors, _ = plain
    expected = {m.name: open_adapter(directory).factors(m).dense() for m in open_adapter(directory).modules}
    for rename in (
        lambda key: key.removeprefix("base_model.model."),
        lambda key: key.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."),
    ):
        save_file({rename(key): value for key, value in tensors.items()}, directory / WEIGHTS)
        adapter = open_adapter(directory)
        assert adapter.findings == ()
        assert {m.name: adapter.factors(m).dense().tolist() for m in adapter.modules} == {
            name: value.tolist() for name, value in expected.items()
        }


def test_an_orphan_is_a_finding(plain):
    directory, tensors, _ = plain
    save_file(tensors | {"something.else": torch.ones(2)}, directory / WEIGHTS)
    assert codes(open_adapter(directory)) == [("warning", "orphan_tensor", "something.else")]


def header(payload: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(payload) if claimed is None else claimed) + payload


BROKEN_FILES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "truncated by one byte": lambda data: data[:-1],
    "garbage header": lambda data: header(b"\xff" * 50),
    "huge claimed header": lambda data: header(b"{}", 2**62),
    "large claimed header": lambda data: header(b"{}", 10**8),
    "no tensors": lambda data: header(b"{}"),
    "overlapping tensors": lambda data: header(
        json.dumps({k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}).encode()
    ) + b"\0" * 8,
    "a pickle by the wrong name": lambda data: pickle.dumps({}),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_broken_files_are_typed_errors(plain, case):
    path = plain[0] / WEIGHTS
    path.write_bytes(BROKEN_FILES[case](path.read_bytes()))
    with pytest.raises(AdapterFileError, match="adapter_model.safetensors|named like a LoRA"):
        open_adapter(plain[0])


BROKEN_CONFIGS = {
    "not JSON": (b"{", "is not JSON"),
    "not text": (b"\xff\xfe\x00\xd8", "is not JSON"),
    "nested too deeply": (b"[" * 100_000, "is not JSON"),
    "a number too long": (b'{"r": ' + b"9" * 10_000 + b"}", "is not JSON"),
    "no object": (b"[]", "must be a JSON object"),
    "no type": (b"{}", "`peft_type` is None; supported are LORA"),
    "unknown type": (b'{"peft_type": "LOHA"}', "`peft_type` is 'LOHA'; supported are LORA"),
    "a type that is a list": (b'{"peft_type": ["LORA"]}', "`peft_type` is"),
    "r = 0": (b'{"peft_type": "LORA", "r": 0, "lora_alpha": 1}', "`r` .* must be a positive integer; got 0"),
    "r true": (b'{"peft_type": "LORA", "r": true, "lora_alpha": 1}', "`r` .* must be a positive integer; got True"),
    "no alpha": (b'{"peft_type": "LORA", "r": 2}', "`lora_alpha` .* must be a finite number; got None"),
    "alpha NaN": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}', "finite number; got nan"),
    "alpha beyond floats": (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1' + b"0" * 400 + b"}", "finite number; got 10000"
    ),
    "pattern no object": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": [1]}', "must be an object"),
    "pattern no rank": (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {"q": 1.5}}', "rank_pattern.*positive integer"
    ),
    "pattern no expression": (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {"(": 1}}', "no regular expression"
    ),
    "pattern no expression for PEFT": (  # which puts a group before it
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "alpha_pattern": {"(?i)q": 1}}', "no regular expression"
    ),
    "variant": (b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "use_qalora": true}', "use_qalora"),
    "adalora ranks": (
        b'{"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 1, "rank_pattern": {"q": 1}}', "lists of true and false"
    ),
    "names that are none": (
        b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "modules_to_save": [1]}', "list of names"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_CONFIGS)
def test_broken_configs_are_typed_errors(plain, case):
    content, message = BROKEN_CONFIGS[case]
    (plain[0] / CONFIG).write_bytes(content)
    with pytest.raises((AdapterFileError, UnsupportedModelError), match=f"(?s)adapter_config.json.*{message}"):
        open_adapter(plain[0])


def test_patterns_that_match_nothing_are_errors(plain):
    directory, _, config = plain
    config |= {"rank_pattern": {"q_proj": 2, "k_proj": 4}, "alpha_pattern": {"layers.7.q_proj": 4}}
    (directory / CONFIG).write_text(json.dumps(config))
    adapter = open_adapter(directory)
    assert codes(adapter) == [("error", "pattern_unmatched", None)] * 2
    assert [next(p for p in ("rank_pattern", "alpha_pattern") if p in f.message) for f in adapter.findings] == [
        "rank_pattern",
        "alpha_pattern",
    ]


def test_a_base_changed_by_the_init_is_said(plain):
    directory, _, config = plain
    (directory / CONFIG).write_text(json.dumps(config | {"init_lora_weights": "pissa_niter_4"}))
    assert codes(open_adapter(directory)) == [("warning", "base_changed", None)]


def test_no_config_is_an_error_of_a_directory_and_a_warning_of_a_file(plain):
    directory, _, _ = plain
    (directory / CONFIG).unlink()
    with pytest.raises(AdapterFileError, match="has no adapter_config.json.*pass the .safetensors file"):
        open_adapter(directory)
    with pytest.raises(AdapterFileError, match="has no adapter_config.json"):
        open_adapter(directory.parent)
    adapter = open_adapter(directory / WEIGHTS)
    assert codes(adapter) == [("warning", "no_config", None)]
    assert {module.scaling for module in adapter.modules} == {1.0}


def test_a_directory_above_the_adapter_names_it(plain):
    with pytest.raises(AdapterFileError, match=f"Do you mean {str(plain[0])!r}"):
        open_adapter(plain[0].parent)


def test_no_weights(plain):
    (plain[0] / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        open_adapter(plain[0])


STORED = {
    "a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4, dtype=torch.float16),
    "half": torch.arange(12.0).reshape(4, 3).bfloat16(),
    "byte": torch.arange(7, dtype=torch.uint8),
    "eight bits": torch.arange(6.0).to(torch.float8_e4m3fn),
    "unsigned": torch.arange(6, dtype=torch.int32).to(torch.uint16),
    "truth": torch.tensor([[True], [False]]),
}


def test_every_tensor_of_a_file_is_read_as_safetensors_reads_it(tmp_path):
    save_file(STORED, tmp_path / "x.safetensors", metadata={"a": "b"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    expected = load_file(tmp_path / "x.safetensors")
    with file.reader() as read:
        values = {key: read(key) for key in file.infos()}
    assert values.keys() == expected.keys()
    for key, value in values.items():
        assert (value.dtype, value.shape) == (expected[key].dtype, expected[key].shape)
        assert value.shape == file.infos()[key].shape
        as_bytes = [one.reshape(-1).view(torch.uint8).tolist() for one in (value, expected[key])]
        assert as_bytes[0] == as_bytes[1]
        rows = list(file.rows(key, 2))
        assert all(len(one) <= 2 for one in rows if one.ndim)
        joined = b"".join(bytes(one.reshape(-1).view(torch.uint8).tolist()) for one in rows)
        assert list(joined) == as_bytes[0]


def test_a_file_that_changes_after_it_was_opened_is_an_error(plain):
    directory, tensors, _ = plain
    adapter = open_adapter(directory)
    save_file({key: value * 2 for key, value in tensors.items()}, directory / "other")
    (directory / "other").replace(directory / WEIGHTS)
    with pytest.raises(AdapterFileError, match="was changed after it had been opened. Open it again"):
        adapter.factors(adapter.modules[0])
    (directory / WEIGHTS).unlink()
    with pytest.raises(AdapterFileError, match="cannot be read"):
        adapter.factors(adapter.modules[0])


def test_errors_of_a_reader_s_block_are_not_the_file_s(plain):
    adapter = open_adapter(plain[0])
    with pytest.raises(OSError, match="^No space left$"), adapter.source.reader():
        raise OSError("No space left")


@pytest.mark.slow
def test_the_time_to_read_modules_one_by_one_grows_linearly(tmp_path):
    def seconds(count):
        names = [f"layers.{i}.q_proj" for i in range(count)]
        path = tmp_path / f"{count}.safetensors"
        save_file({f"{name}.lora_{half}.weight": torch.ones(2, 2) for name in names for half in "AB"}, path)
        start = time.process_time()
        adapter = open_adapter(path)
        for module in adapter.modules:
            adapter.factors(module)
        return time.process_time() - start

    small = min(seconds(250) for _ in range(3))
    assert seconds(4000) < 64 * small  # 16 at best, 256 if quadratic


class Malicious:
    """Its pickle makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_malicious_pickle_is_never_run(plain, tmp_path, protocol):
    directory, tensors, _ = plain
    (directory / WEIGHTS).unlink()
    mark = tmp_path / "executed"
    torch.save(tensors | {"x": Malicious(mark)}, directory / "adapter_model.bin", pickle_protocol=protocol)
    with pytest.raises(AdapterFileError, match="adapter_model.bin.*the only safe way"):
        open_adapter(directory)
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(mark), protocol=protocol))
    with pytest.raises(AdapterFileError, match="adapter_model.bin"):
        open_adapter(directory)
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {1: torch.ones(2)}, {"a": torch.ones(2, 2).to_sparse()}])
def test_a_pickle_of_something_else(plain, content):
    (plain[0] / WEIGHTS).unlink()
    torch.save(content, plain[0] / "adapter_model.bin")
    with pytest.raises(AdapterFileError, match="must hold a dict of tensors by name"):
        open_adapter(plain[0])


def test_links_are_followed_to_regular_files_only(plain, tmp_path):
    directory, _, _ = plain
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / CONFIG).symlink_to(directory / CONFIG)
    (linked / WEIGHTS).symlink_to(os.path.join("..", directory.name, WEIGHTS))  # as the Hub's cache does
    assert len(open_adapter(linked).modules) == 2
    assert len(open_adapter(linked / ".." / directory.name).modules) == 2
    for target in ("nowhere", WEIGHTS, directory):
        (linked / WEIGHTS).unlink()
        (linked / WEIGHTS).symlink_to(target)
        with pytest.raises(AdapterFileError, match="is a link to nothing|is not a regular file|cannot be read"):
            open_adapter(linked)
    (linked / WEIGHTS).unlink()
    os.mkfifo(linked / WEIGHTS)
    with pytest.raises(AdapterFileError, match="is not a regular file"):
        open_adapter(linked)


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "a\nb", "<script>", ".", "..", "a..b", " "])
def test_names_of_tensors_are_names_only(plain, name):
    directory, tensors, _ = plain
    save_file({f"{name}.lora_A.weight": tensors[A0], f"{name}.lora_B.weight": tensors[B0]}, directory / WEIGHTS)
    before = sorted(directory.parent.rglob("*"))
    adapter = open_adapter(directory)
    assert [module.name for module in adapter.modules] == [name]
    assert sorted(directory.parent.rglob("*")) == before


@pytest.mark.parametrize(
    "name", ["no/such-adapter", "nowhere", "/no/where", "a/b/c", "../x", "file.txt", "a\0b", "x" * 5000]
)
def test_what_is_nowhere(name):
    with pytest.raises(
        AdapterFileError, match="neither a directory nor a file|could not be downloaded from the Hub|cannot be read"
    ):
        open_adapter(name)


def test_a_hub_id_goes_through_the_hub_s_cache(plain, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo_id, **options: asked.append((repo_id, options)) or plain[0]
    )
    assert len(open_adapter("someone/an-adapter").modules) == 2
    assert asked == [
        ("someone/an-adapter", {"allow_patterns": [CONFIG, WEIGHTS, "adapter_model.bin"]}),
    ]


def test_other_arguments():
    with pytest.raises(TypeError, match="PeftModel"):
        open_adapter(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="no name"):
        open_adapter("x", adapter_name="default")


def test_the_model_s_present_scaling_counts(saved):
    model, _ = saved(CONFIGS["plain"])
    for layer in layers_of(model).values():
        layer.set_scale("default", 3.0)
    check_against_peft(open_adapter(model), model)


@pytest.mark.slow
def test_the_view_imports_neither_peft_nor_transformers(plain, run_python):
    code = f"""
        import sys
        from lorakit.adapters import open_adapter
        for _, update in open_adapter({str(plain[0])!r}).batches():
            update.singular_values()
        print(sorted({{"transformers", "peft", "accelerate", "huggingface_hub"}} & set(sys.modules)))
    """
    assert run_python(code).stdout.strip() == "[]"
