"""Every command over hostile files, names and numbers: an exit code and a message, and nothing else.

What each run must be like is in `conftest.py`; the cases are in the JSON files.
"""

from __future__ import annotations

import html
import json
import os
import re

import pytest
from attacks import CONFIG, GOOD, MODULES, WEIGHTS, cases, content_of

ON_DISK = [
    ["audit", "{a}", "--json"],
    ["audit", "{a}", "--suggest-ranks"],
    ["compare", "{a}", "{good}", "--json"],
    ["compare", "{a}", "{a}"],
    ["alignment", "{a}"],
    ["compress", "{a}", "{out}", "--max-rank", "2", "--json"],
    ["compress", "{a}", "{out}", "--energy", "0.5", "--overwrite"],
    ["merge", "{a}", "{good}", "{merged}"],
    ["export", "{a}", "{exported}", "--json"],
    ["export", "{a}", "{mlx}", "--format", "mlx"],
    ["export", "{a}", "{out}/a.safetensors", "--format", "kohya"],
    ["export", "{a}", "{out}/b.safetensors", "--format", "diffusers"],
    ["export", "{a}", "{out}/a.gguf", "--format", "gguf"],
    ["servable", "{a}"],
    ["servable", "{a}", "--json"],
    ["compare", "{a}", "{good}", "--weights", "0.6,0.4", "--methods", "linear,svd,ties,dare", "--json"],
    ["fleet", "{a}", "{good}", "--json"],
    ["fleet", "{a}", "--csv", "{out}.csv", "--sarif", "{out}.sarif", "--html", "{out}.html", "--cache", "{out}"],
]
WITH_BASE = [
    ["probe", "{base}", "{data}", "--num-examples", "2", "--json"],
    [
        "surgery",
        "--base",
        "{base}",
        "--adapter",
        "{a}",
        "--data",
        "{data}",
        "--out",
        "{out}",
        "--num-examples",
        "2",
        "--modules",
        "all-linear",
    ],
    ["agree", "{a}", "{good}", "--base", "{base}", "--data", "{data}", "--json"],
    ["evaluate", "{a}", "--base", "{base}", "--task", "{data}", "--json"],
    ["export", "{a}", "{exported}", "--base", "{base}"],
    ["export", "{a}", "{out}/a.gguf", "--format", "gguf", "--base", "{base}"],
    [
        "select",
        "{base}",
        "{data}",
        "--task",
        "{data}",
        "--budget",
        "0.5",
        "--tolerance",
        "1",
        "--steps",
        "1",
        "--cheap",
        "--json",
    ],
    ["merge", "{a}", "{good}", "{merged}", "--base", "{base}", "--retain", "{good}={data}"],
    ["certify", "{a}", "{good}", "--base", "{base}", "--task", "{data}", "--margin", "1", "--json"],
    ["merge", "{a}", "{good}", "{merged}", "--base", "{base}", "--task", "{data}", "--margin", "1"],
    ["audit", "{a}", "--base", "{base}", "--json"],
    ["weights", "{base}", "{base}", "--adapter", "{a}", "--json"],
    ["probe", "{base}", "{data}", "--method", "speclora", "--num-examples", "2", "--json"],
]


@pytest.fixture
def fill(tmp_path, write):
    """Puts paths into a command's words."""
    good = write("good")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "w1 w2 w3 w4"}\n{"text": "w5 w6 w7"}\n')
    places = {name: tmp_path / name for name in ("out", "merged", "exported", "mlx", "base")}
    places |= {"good": good, "data": data, "a": tmp_path / "adapter"}

    def words(command, **changes):
        return [re.sub(r"\{(\w+)\}", lambda found: str({**places, **changes}[found[1]]), word) for word in command]

    return words


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("configs"), ids=lambda case: case["id"])
def test_configs(run, write, fill, case, monkeypatch):
    monkeypatch.setattr("lorakit.naming.matching._SECONDS", 0.1)
    write(config=content_of(case, GOOD))
    for command in (ON_DISK[0], ON_DISK[5], ON_DISK[8], ON_DISK[13]):
        run(*fill(command))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("configs"), ids=lambda case: case["id"])
def test_configs_with_a_base_model(run, write, fill, case, base_model, monkeypatch):
    monkeypatch.setattr("lorakit.naming.matching._SECONDS", 0.1)
    monkeypatch.setattr("lorakit.naming._config_expressions._SECONDS", 0.5)
    write(config=content_of(case, GOOD))
    done = run(*fill(WITH_BASE[1]))
    assert done.code == 2 or not case["id"].endswith("-endless")


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("models"), ids=lambda case: case["id"])
def test_base_models(run, write, fill, case, base_model):
    write()
    good = json.loads((base_model / "config.json").read_text())
    text = content_of(case, good)
    (base_model / "config.json").unlink()
    if text is not None:
        (base_model / "config.json").write_text(text)
    for command in (WITH_BASE[0], WITH_BASE[1], WITH_BASE[5], WITH_BASE[6]):
        run(*fill(command))


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "model.safetensors", "generation_config.json"]
)
@pytest.mark.parametrize(
    "content", ["", "{", "[" * 100_000, "[]", "null", '{"added_tokens": 7, "model": {"type": "\\u001b[31m"}}']
)
def test_files_beside_a_base_model(run, write, fill, file, content, base_model):
    write()
    (base_model / file).write_text(content)
    for command in WITH_BASE[:2]:
        run(*fill(command))


@pytest.mark.slow
@pytest.mark.parametrize("words", cases("arguments"), ids=lambda words: repr(" ".join(words))[1:60])
def test_arguments(run, write, fill, words):
    write()
    run(*fill(words))


@pytest.mark.slow
@pytest.mark.parametrize("case", cases("factors"), ids=lambda case: case["id"])
def test_factors(run, write, fill, case, base_model):
    write(fill=case["values"])
    for command in [*ON_DISK, *WITH_BASE[1:3]]:
        done = run(*fill(command))
        if case["id"] in ("nan", "infinite") and command[0] in ("compress", "merge", "surgery", "agree"):
            assert done.code == 2, command
            assert "q_proj" in done.err, f"the module is not named: {done.err}"


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_DISK, ids=" ".join)
def test_names(run, write, fill, command):
    write(modules=[*MODULES, *(f"model.layers.{i}.{name}" for name in cases("names") for i in range(2))])
    run(*fill(command))


@pytest.mark.slow
@pytest.mark.parametrize("command", WITH_BASE, ids=" ".join)
def test_names_with_a_base_model(run, write, fill, command, base_model):
    write(modules=[*MODULES, *(f"model.layers.0.{name}" for name in cases("names"))])
    run(*fill(command))


@pytest.mark.slow
def test_names_in_the_html_of_a_fleet(run, write, tmp_path):
    names = [name for name in cases("names") if "<" in name]
    directory = write("".join(names).replace("/", "|")[:100], modules=[*MODULES, *(f"model.{name}" for name in names)])
    assert run("fleet", directory, "--html", tmp_path / "page.html").code in (0, 1)
    text = (tmp_path / "page.html").read_text()
    assert "<script>" not in text
    assert "<img src=x" not in text


@pytest.mark.slow
def test_names_in_html_and_figures(run, write, tmp_path):
    names = cases("names")
    directory = write(modules=[*MODULES, *(f"model.layers.0.{name}" for name in names)])
    page = tmp_path / "page.html"
    assert run("audit", directory, "--html", page, "--plots", tmp_path / "plots").code in (0, 1)
    text = page.read_text()
    assert all(html.escape(name) in text for name in names if "<" in name)
    assert "<script" not in text
    assert "<img src=x" not in text


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_DISK[::3], ids=" ".join)
def test_directories_with_such_names(run, write, fill, command, tmp_path):
    name = "".join(cases("names")).replace("\0", "").replace("/", "|").replace("\u202e", "")[:100]
    write(name)
    run(*fill(command, a=tmp_path / name))


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 8,
        b"\xff" * 64,
        (2**63).to_bytes(8, "little") + b"{}",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
    ],
)
def test_weights(run, write, fill, content, tmp_path):
    (write() / WEIGHTS).write_bytes(content)
    for command in ON_DISK:
        expected = {"compare": (1, 2), "fleet": (1,)}  # in a fleet it is a row
        assert run(*fill(command)).code in expected.get(command[0], (2,))


@pytest.mark.slow
def test_what_is_no_file(run, write, fill, tmp_path):
    directory = write()
    (directory / WEIGHTS).unlink()
    os.mkfifo(directory / WEIGHTS)
    assert run("audit", directory).code == 2
    (directory / CONFIG).unlink()
    (directory / CONFIG).symlink_to("/dev/zero")
    assert run("audit", directory).code == 2
    (directory / CONFIG).unlink()
    (directory / CONFIG).symlink_to(CONFIG)
    assert run("audit", directory).code == 2
