"""The shell: its exit codes, and that stdout is for results."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from peft import PeftConfig, get_peft_model

import lorakit


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorakit", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_version_and_help():
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"lorakit {lorakit.__version__}\n")
    done = run("demo", "--help")
    assert done.returncode == 0
    assert "--model" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("demo", "--steps", "0"), ("demo", "--nothing"), ("nothing",)])
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""


@pytest.mark.slow
def test_bad_input_is_exit_code_2_with_a_message_and_no_traceback(tmp_path):
    done = run("demo", "--model", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "lorakit: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_command_starts_without_torch(run_python):
    code = """
        import sys
        import lorakit.cli
        print(sorted({"torch", "peft", "transformers"} & set(sys.modules)))
    """
    assert run_python(code).stdout.strip() == "[]"


@pytest.mark.slow
def test_probe_writes_a_config_that_peft_takes(base_model, tmp_path, tiny_llama):
    data = tmp_path / "data.jsonl"
    rows = [{"text": f"w{i} w{i + 1} w{2 * i} w3"} for i in range(3)] + [{"prompt": "w1 w2", "completion": "w5 w6 w7"}]
    data.write_text("\n".join(map(json.dumps, rows)) + "\n")
    out = tmp_path / "out"
    done = run("probe", str(base_model), str(data), "--rank", "8", "--budget", "0.5", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["report"]["num_examples"] == 4
    model = get_peft_model(tiny_llama(), PeftConfig.from_pretrained(str(out)))
    ranks = {row["module_name"]: row["rank"] for row in results["allocation"]["modules"]}
    found = {name: layer.r["default"] for name, layer in model.get_base_model().named_modules() if hasattr(layer, "r")}
    assert found == ranks
    assert results["allocation"]["summary"]["budget"] == 0.5 * 8 * sum(
        row["cost"] for row in results["allocation"]["modules"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "speclora"])
def test_probe_writes_a_plain_lora_or_a_speclora_on_request(base_model, tmp_path, tiny_llama, method):
    data, out = tmp_path / "data.txt", tmp_path / "out"
    data.write_text("w1 w2 w3\n\nw4 w5\nw6\n\n\n\nw7 w8 w9 w1\n")
    options = (
        ("--type", "lora", "--num-examples", "1")
        if method == "lora"
        else ("--method", "speclora", "--mode", "svd", "--k", "30")
    )
    done = run("probe", str(base_model), str(data), "--rank", "8", *options, "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    config = PeftConfig.from_pretrained(str(out))
    assert config.peft_type.value == method.upper()
    assert config.r == 8
    model = get_peft_model(tiny_llama(), config)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    modules = results["allocation"]["modules"]
    if method == "speclora":
        assert config.mode == results["report"]["mode"] == "svd"
        assert {name: layer.lora_spec["default"].k for name, layer in layers.items()} == {
            row["module_name"]: row["k"] for row in modules
        }
    else:
        assert {name: layer.r["default"] for name, layer in layers.items()} == {
            row["module_name"]: row["rank"] for row in modules
        }
        assert results["allocation"]["summary"]["rule"] == "fisherlora"
        assert "lorakit: warning: The rule 'fisherlora' gives" in done.stderr  # one example has no interval
        assert {layer.scaling["default"] for layer in layers.values()} == {2.0}


@pytest.mark.slow
def test_options_of_ranks_do_not_apply_to_masks(base_model, tmp_path):
    (tmp_path / "data.txt").write_text("w1 w2 w3")
    done = run("probe", str(base_model), str(tmp_path / "data.txt"), "--method", "speclora", "--rule", "uniform")
    assert (done.returncode, done.stdout) == (2, "")
    assert "which decides ks" in done.stderr


@pytest.mark.slow
def test_probe_prints_a_table_of_text_s_paragraphs(base_model, tmp_path):
    data = tmp_path / "data.txt"
    data.write_text("w1 w2 w3\n\nw4 w5\nw6\n\n\n\nw7 w8 w9 w1\n")
    done = run(
        "probe",
        str(base_model),
        str(data),
        "--target-modules",
        "q_proj, o_proj",
        "--rule",
        "uniform",
        "--params",
        "900",
    )
    assert done.returncode == 0, done.stderr
    by_role, by_module, *_ = done.stdout.split("\n\n")
    assert [line.split()[0] for line in by_role.splitlines()] == ["role", "query", "output"]
    lines = by_module.splitlines()
    assert lines[0].split()[:5] == ["module", "role", "score", "cost", "rank"]
    assert [line.split()[0].rpartition(".")[2] for line in lines[1:5]] == ["q_proj", "o_proj"] * 2
    assert [line.split()[4] for line in lines[1:5]] == ["3"] * 4
    assert "768 of 900" in done.stdout
    assert "3 examples" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "arguments", "message"),
    [
        ("a.jsonl", '{"words": "w1"}', (), "must have the columns `prompt` and `completion` or"),
        ("a.jsonl", '{"text": "w1"}\nw1 w2', (), "line 2 is no JSON"),
        ("a.txt", "\n\n", (), "has no example"),
        ("a.xml", "w1", (), "must be a file that ends in .jsonl"),
        ("a.txt", "w1 w2 w3", ("--columns", "text=words"), "`columns` names 'words'"),
        ("a.txt", "w1 w2 w3", ("--start", "1"), "`start` must be below the number of rows, 1"),
        ("a.txt", "w1 w2 w3", ("--params", "10"), "`budget` must cover rank 1 in all 4 modules"),
    ],
)
def test_probe_says_what_is_wrong_with_its_input(base_model, tmp_path, name, text, arguments, message):
    data = tmp_path / name
    data.write_text(text)
    done = run("probe", str(base_model), str(data), "--out", str(tmp_path / "out"), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [("--budget", "2"), ("--budget", "0.5", "--params", "9"), ("--rule", "energy"), ("--columns", "a")]
)
def test_probe_used_wrongly_is_exit_code_2(tmp_path, arguments):
    done = run("probe", str(tmp_path), str(tmp_path / "a.txt"), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
