"""compress, merge, export and surgery in a shell: what they write, print, and refuse."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from closeness import assert_close_outputs, assert_close_reports
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from shell import run

from lorakit import FisherLoRAConfig, SpecLoRAConfig
from lorakit.adapters import open_adapter
from lorakit.adapters.edit_log import read_edits
from lorakit.compress import truncate
from lorakit.export import to_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def run_apart(*arguments):
    command = [sys.executable, "-W", "ignore", "-m", "lorakit", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.fixture
def adapter(tiny_llama, randomize, tmp_path):
    def make(config=None, name="adapter", seed=2):
        config = config or LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear")
        model = randomize(get_peft_model(tiny_llama(), config), seed=seed)
        model.save_pretrained(tmp_path / name)
        return model.eval()

    return make


@pytest.mark.slow
def test_compress(adapter, tmp_path):
    adapter()
    done = run_apart("compress", tmp_path / "adapter", tmp_path / "out", "--ranks", "q_proj=1,v_proj=2", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    expected = truncate(tmp_path / "adapter", tmp_path / "again", ranks={"q_proj": 1, "v_proj": 2}).to_dict()
    assert_close_reports(results["modules"], json.loads(json.dumps(expected["modules"])))
    new, again = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    for key in again:
        assert_close_outputs(new[key], again[key])
    done = run("compress", tmp_path / "adapter", tmp_path / "out", "--energy", "0.5")
    assert done.returncode == 0
    first = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert {"query", "down", "all"} < first
    assert "of the energy kept" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_compress_imports_neither_peft_nor_transformers(adapter, tmp_path, run_python):
    adapter()
    code = f"""
        import sys
        from lorakit.compress import truncate
        from lorakit.merging import merge
        truncate({str(tmp_path / "adapter")!r}, {str(tmp_path / "out")!r}, ranks=2)
        merge([{str(tmp_path / "adapter")!r}] * 2, {str(tmp_path / "merged")!r}, rank=2)
        print(sorted({{"peft", "transformers"}} & set(sys.modules)))
    """
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_merge(adapter, tmp_path):
    adapter()
    adapter(LoraConfig(r=2, target_modules=["q_proj"]), "other", seed=3)
    paths = (tmp_path / "adapter", tmp_path / "other", tmp_path / "out")
    done = run_apart("merge", *paths, "--weights", "1,-0.5", "--method", "svd", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    summary = json.loads(done.stdout)["summary"]
    assert (summary["weights"], summary["method"], summary["r"]) == ([1.0, -0.5], "svd", 4)
    done = run("merge", *paths, "--method", "dare", "--density", "0.5", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert f"dare of 0.5 · {paths[0]} + 0.5 · {paths[1]}" in " ".join(done.stdout.split())
    assert "partial_modules" in done.stdout


@pytest.mark.slow
def test_export_from_a_path(adapter, tiny_llama, token_ids, tmp_path):
    model = adapter(FisherLoRAConfig(r=4, r_q=2, use_rslora=True, task_type="CAUSAL_LM"))
    done = run("export", tmp_path / "adapter", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["r"] == 4
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert torch.allclose(loaded(token_ids).logits, model(token_ids).logits, atol=1e-5)
    to_lora(model, tmp_path / "live")
    one, two = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "live"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    done = run("export", tmp_path / "adapter", tmp_path / "out", "--rank", "1")
    assert done.returncode == 0
    assert "of the energy left out" in " ".join(done.stdout.split())
    assert {module.rank for module in open_adapter(tmp_path / "out").modules} == {1}


@pytest.mark.slow
def test_servers_compact_files_and_served_ranks(adapter, tmp_path):
    adapter(FisherLoRAConfig(r=10, r_q=2, task_type="CAUSAL_LM"))
    source, out = tmp_path / "adapter", tmp_path / "out"

    def ranks(*arguments):
        done = run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["summary"]["path"] == str(out)
        return {module.rank for module in open_adapter(out).modules}

    assert ranks("export", source, out) == {10}
    assert ranks("export", source, out, "--compact") == {2, 10}
    assert ranks("export", source, out, "--for", "lorax,ollama") == {16}
    assert ranks("export", source, out, "--rank", "auto", "--energy", "0.5") == {8}
    assert ranks("compress", source, out, "--max-rank", "9", "--for", "tgi") == {16}
    assert max(ranks("compress", source, out, "--energy", "0.9", "--energy-of", "total")) < 10
    assert len(ranks("compress", source, out, "--energy", "0.9", "--per-module")) > 1
    assert ranks("merge", source, source, out, "--compact") == {4, 16}  # 16 is the smaller side of v_proj
    assert ranks("merge", source, source, out, "--rank", "3", "--for", "lorax") == {8}
    done = run("export", source, out, "--for", "mlx")
    assert (done.returncode, done.stdout) == (2, "")
    assert "mlx reads no PEFT directory" in done.stderr
    done = run("export", source, source)
    assert "`out` is the directory of the adapter itself" in done.stderr
    assert run("export", source, source, "--overwrite").returncode == 0


@pytest.mark.slow
def test_the_table_ends_with_what_to_do_next(adapter, tmp_path):
    adapter()
    done = run("compress", tmp_path / "adapter", tmp_path / "out", "--max-rank", "2")
    lines = done.stdout.splitlines()
    assert "vLLM: --max-lora-rank 8 → 8" in done.stdout
    steps = " ".join("".join(lines[lines.index("What to do next:") :]).split())
    assert "lorakit compare" in steps
    assert "lorakit servable" in steps


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kohya", "mlx", "diffusers"])
def test_export_to_other_formats(adapter, tmp_path, name):
    adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    out = tmp_path / ("out" if name == "mlx" else "out.safetensors")
    done = run("export", tmp_path / "adapter", out, "--format", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["path"] == str(out)
    assert "read back" in run("export", tmp_path / "adapter", out, "--format", name).stdout
    assert run("export", tmp_path / "adapter", out, "--format", name, "--base", "b").returncode == 2
    assert run("export", tmp_path / "adapter", out, "--format", name, "--rank", "2").returncode == 2
    written = out / "adapters.safetensors" if name == "mlx" else out
    written.write_bytes(b"another program's")
    done = run("export", tmp_path / "adapter", out, "--format", name)
    assert (done.returncode, written.read_bytes()) == (2, b"another program's")
    assert "lorakit did not write" in done.stderr
    assert run("export", tmp_path / "adapter", out, "--format", name, "--overwrite").returncode == 0


def test_export_of_speclora_needs_its_base(adapter, base_model, tiny_llama, token_ids, tmp_path):
    model = adapter(SpecLoRAConfig(r=2, k=6, task_type="CAUSAL_LM", target_modules=["q_proj", "o_proj"]))
    done = run("export", tmp_path / "adapter", tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "lorakit export --base MODEL" in done.stderr
    assert not (tmp_path / "out").exists()
    done = run("export", tmp_path / "adapter", tmp_path / "out", "--base", base_model, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["summary"]["r"] == 8
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    assert torch.allclose(loaded(token_ids).logits, model(token_ids).logits, atol=1e-5)


@pytest.fixture
def data(tmp_path):
    rows = [{"text": f"w{i} w{i + 1} w{2 * i} w3"} for i in range(6)]
    rows += [{"prompt": "w1 w2", "completion": "w5 w6 w7"}]
    path = tmp_path / "calib.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.slow
def test_surgery_edits_the_layers_asked_for(adapter, base_model, data, tmp_path):
    adapter()
    common = ("--base", base_model, "--adapter", tmp_path / "adapter", "--data", data, "--out", tmp_path / "out")
    done = run_apart("surgery", *common, "--policy", "abs_select", "--layers", "1", "--batch-size", "3", "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert (results["policy"], results["num_examples"]) == ("abs_select", 7)
    edited = {row["module_name"] for row in results["modules"]}
    assert edited == {"model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"}
    old, new = (load_file(tmp_path / name / WEIGHTS) for name in ("adapter", "out"))
    changed = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in old if not old[key].equal(new[key])}
    assert changed == edited
    record = json.loads((tmp_path / "out" / "lorakit_surgery.json").read_text())
    assert [edit["policy"] for edit in record["edits"]] == ["abs_select"]
    done = run("surgery", *common, "--modules", "q_proj,k_proj", "--aggregate", "mean", "--num-examples", "2")
    assert done.returncode == 0, done.stderr
    assert "smooth_abs edited 4 modules, 2 examples gates from" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_second_edit_keeps_the_record_of_the_first(adapter, base_model, data, tmp_path):
    adapter()
    (tmp_path / "adapter" / "added_tokens.json").write_text("{}")
    common = ("--base", base_model, "--data", data, "--num-examples", "2")
    edited, again = tmp_path / "edited", tmp_path / "again"
    done = run("surgery", *common, "--adapter", tmp_path / "adapter", "--out", edited, "--policy", "abs_select")
    assert done.returncode == 0, done.stderr
    assert f"next: lorakit compare {tmp_path / 'adapter'} {edited}\n" in done.stdout
    for source, out in ((edited, again), (edited, edited)):  # another directory, and the adapter's own
        arguments = ("surgery", *common, "--adapter", source, "--out", out, "--policy", "random_index")
        if out == edited:
            done = run(*arguments)
            assert (done.returncode, done.stdout) == (2, "")
            assert "is the directory of the adapter itself" in done.stderr
        done = run(*arguments, *(["--overwrite"] if out == edited else []))
        assert done.returncode == 0, done.stderr
        card = (out / "README.md").read_text()
        assert card.startswith((tmp_path / "adapter" / "README.md").read_text().rstrip())
        assert card.count("* `surgery` (") == 2
        assert (out / "added_tokens.json").read_text() == "{}"
        assert [edit["policy"] for edit in read_edits(out)] == ["abs_select", "random_index"]


@pytest.mark.slow
def test_the_seed_of_surgery_is_the_control_s(adapter, base_model, data, tmp_path):
    adapter()
    common = ("--base", base_model, "--adapter", tmp_path / "adapter", "--data", data, "--policy", "random_index")
    gates = []
    for seed in (1, 1, 2):
        done = run("surgery", *common, "--out", tmp_path / "out", "--seed", seed, "--json")
        gates.append([np.round(row["gate"], 6).tolist() for row in json.loads(done.stdout)["modules"]])
    assert gates[0] == gates[1] != gates[2]


@pytest.mark.parametrize(
    "arguments",
    [
        ("compress", "a", "out"),
        ("compress", "a", "out", "--energy", "0.5", "--max-rank", "2"),
        ("compress", "a", "out", "--energy", "1.5"),
        ("compress", "a", "out", "--ranks", "many"),
        ("compress", "a", "out", "--ranks", "q_proj=many"),
        ("compress", "a", "out", "--max-rank", "0"),
        ("merge", "a"),
        ("merge", "a", "b", "out", "--weights", "1,x"),
        ("merge", "a", "b", "out", "--method", "mean"),
        ("merge", "a", "b", "out", "--method", "ties"),
        ("merge", "a", "b", "out", "--density", "0.5"),
        ("merge", "a", "b", "out", "--method", "ties", "--density", "0"),
        ("merge", "a", "b", "out", "--rank", "2", "--energy", "0.5"),
        ("export", "a", "out", "--rank", "0"),
        ("export", "a", "out", "--rank", "most"),
        ("compress", "a", "out", "--max-rank", "2", "--energy-of", "total"),
        ("compress", "a", "out", "--ranks", "2", "--per-module"),
        ("surgery", "--adapter", "a", "--data", "d", "--out", "out"),
        ("surgery", "--base", "b", "--adapter", "a", "--data", "d", "--out", "out", "--layers", "5-2"),
        ("surgery", "--base", "b", "--adapter", "a", "--data", "d", "--out", "out", "--policy", "best"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_bad_input_is_exit_code_2_and_the_target_is_untouched(adapter, base_model, data, tmp_path):
    adapter()
    adapter(name="out", seed=3)
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for command in ("compress", "export"):
        done = run(command, tmp_path / "adapter", out, *(["--max-rank", "2"] if command == "compress" else []))
        assert done.returncode == 2
        assert "an adapter that lorakit did not write. Pass `overwrite=True` (--overwrite)" in done.stderr
    (tmp_path / "file").write_text("mine")
    operate = ("surgery", "--base", base_model, "--data", data, "--out", out, "--adapter", tmp_path / "adapter")
    bad = {
        ("compress", tmp_path / "nowhere" / "x", out, "--energy", "0.5"): "neither a directory nor a file",
        ("compress", tmp_path / "adapter", tmp_path / "file", "--energy", "0.5"): "is a file",
        ("compress", tmp_path / "adapter", out, "--ranks", "9"): "must not exceed a module's own rank",
        ("compress", tmp_path / "adapter", out, "--budget", "7"): "must cover rank 1",
        ("merge", tmp_path / "adapter", tmp_path / "adapter", out, "--weights", "1"): "one weight for each",
        ("merge", tmp_path / "adapter", tmp_path / "nowhere" / "x", out): "neither a directory nor a file",
        ("export", tmp_path / "file", out): "must end in",
        (*operate, "--layers", "7-9"): "they are in [0, 1]",
        (*operate, "--modules", "nothing"): "no module that matches",
        (*operate[:3], "--data", tmp_path / "no.jsonl", *operate[5:]): "No such file",
    }
    for arguments, message in bad.items():
        done = run(*arguments, "--overwrite")
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
