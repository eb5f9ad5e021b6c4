"""The report's forms: rows, CSV, Parquet, SARIF, HTML, and the command."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from lorakit import fleet, lens
from lorakit.cli.app import app
from lorakit.errors import MissingExtraError
from lorakit.fleet._written import to_sarif


@pytest.fixture
def home(tmp_path, factors, write):
    home = tmp_path / "a fleet"
    for seed in range(2):
        write(home / f"a{seed}", factors(seed), alpha_pattern={"q_proj": 32})
    shutil.copytree(home / "a0", home / "copy")
    shutil.copytree(home / "a0", home / "zbroken <b>")
    (home / "zbroken <b>" / "adapter_config.json").write_text("{")
    return home


def test_rows_and_frame(home):
    report = fleet.audit(home)
    frame = report.to_frame()
    assert len(frame) == 4
    assert frame["warnings"].iloc[0] == ["served_wrong"]
    assert frame["error_type"].isna().tolist() == [True, True, True, False]
    assert frame["error_type"].iloc[3] == "AdapterFileError"
    assert frame["max_rank"].iloc[0] == 4
    assert "frobenius_norm_percentile" in frame
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.next_steps[0].startswith("lorakit audit ")


def test_csv_and_parquet(home, tmp_path):
    import pandas

    report = fleet.audit(home)
    fleet.write_csv(report, tmp_path / "out" / "f.csv")
    frame = pandas.read_csv(tmp_path / "out" / "f.csv")
    assert frame["path"].tolist() == [row.path for row in report.adapters]
    assert frame["frobenius_norm"].iloc[0] == pytest.approx(report.adapters[0].frobenius_norm, rel=1e-12)
    assert "sglang" in frame["served_wrong"].iloc[0].split()
    pytest.importorskip("pyarrow")
    fleet.write_parquet(report, tmp_path / "f.parquet")
    frame = pandas.read_parquet(tmp_path / "f.parquet")
    assert list(frame["served_wrong"].iloc[0]) == list(report.adapters[0].served_wrong)


def test_without_pyarrow(home, tmp_path, monkeypatch):
    import pandas

    def missing(*args, **options):
        raise ImportError("no pyarrow")

    monkeypatch.setattr(pandas.DataFrame, "to_parquet", missing)
    with pytest.raises(MissingExtraError, match="pip install pyarrow"):
        fleet.write_parquet(fleet.audit(home), tmp_path / "f.parquet")
    assert not (tmp_path / "f.parquet").exists()


def test_sarif_has_what_the_standard_requires(home, tmp_path):
    """The required properties of OASIS SARIF 2.1.0, sections 3.13, 3.14, 3.19, 3.27, 3.28 and 3.49."""
    report = fleet.audit(home)
    fleet.write_sarif(report, tmp_path / "f.sarif")
    log = json.loads((tmp_path / "f.sarif").read_text())
    assert log == to_sarif(report)
    assert log["version"] == "2.1.0"
    [run] = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "lorakit"
    assert len({rule["id"] for rule in driver["rules"]}) == len(driver["rules"])
    base = run["originalUriBaseIds"]["FLEET"]["uri"]
    assert base == home.as_uri() + "/"
    for result in run["results"]:
        assert result["message"]["text"]
        assert result["level"] in ("error", "warning", "note")
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        [location] = result["locations"]
        artifact = location["physicalLocation"]["artifactLocation"]
        assert artifact["uriBaseId"] in run["originalUriBaseIds"]
        assert not set(artifact["uri"]) & set(' <>"')
    found = {(result["ruleId"], result["level"]) for result in run["results"]}
    assert found == {("served_wrong", "warning"), ("unreadable", "error"), ("duplicate", "note")}
    uris = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]}
    assert uris == {f"{name}/adapter_config.json" for name in ("a0", "a1", "copy", "zbroken%20%3Cb%3E")}
    prints = [result["partialFingerprints"]["adapterAndCode/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints)


def test_sarif_of_a_list(home):
    [run] = to_sarif(fleet.audit([home / "a0", "owner/name"]))["runs"]
    uris = [r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in run["results"]]
    assert uris == [(home / "a0" / "adapter_config.json").as_uri(), "hf://owner/name"]
    assert "originalUriBaseIds" not in run


def test_html_escapes_names(home, tmp_path):
    lens.write_html(fleet.audit(home), tmp_path / "f.html")
    page = (tmp_path / "f.html").read_text()
    assert "zbroken &lt;b&gt;" in page
    assert "<b>/" not in page
    assert "Cannot be read" in page


def test_the_command(home, tmp_path):
    run = CliRunner()
    cache = str(tmp_path / "cache")
    files = {name: str(tmp_path / f"f.{name}") for name in ("csv", "sarif", "html")}
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    done = run.invoke(app, ["fleet", str(home), "--json", "--cache", cache, *options])
    assert done.exit_code == 1  # one cannot be read
    assert [row["path"] for row in json.loads(done.stdout)["adapters"]] == [
        str(home / name) for name in ("a0", "a1", "copy", "zbroken <b>")
    ]
    assert all((tmp_path / f"f.{name}").stat().st_size for name in files)
    shutil.rmtree(home / "zbroken <b>")
    done = run.invoke(app, ["fleet", str(home), "--cache", cache])
    assert done.exit_code == 0
    assert "Duplicates" in done.stdout
    done = run.invoke(app, ["fleet", str(home / "a0"), str(home / "a1"), "--json", "--shard", "2/2"])
    assert [row["path"] for row in json.loads(done.stdout)["adapters"]] == [str(home / "a1")]


@pytest.mark.parametrize("words", [["nothing-here/x/y"], ["."], [".", "--shard", "3/2"], [".", "--near", "0.2"]])
def test_bad_input_exits_with_2(words, tmp_path, monkeypatch):
    from lorakit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lorakit", "fleet", *words])
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == (1 if words == ["nothing-here/x/y"] else 2)
