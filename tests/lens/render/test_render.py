"""How an audit is shown: on the screen, as HTML, as plots; and the command."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy
import pytest
import torch
from closeness import assert_close_reports
from rich.console import Console
from safetensors.torch import save_file

from lorakit.lens import audit, write_html, write_plots
from lorakit.lens.render.html import to_html
from lorakit.lens.render.table import print_report
from lorakit.lens.static.audit_figures import energy_curves, heatmaps, spectra

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def write(directory, layers=32, r=4, prefix="model.layers", tensors=(), names=NAMES, **config):
    generator = torch.Generator().manual_seed(0)
    files = dict(tensors)
    for i in range(layers):
        for name in names:
            key = f"base_model.model.{prefix}.{i}.self_attn.{name}"
            decay = torch.logspace(0, -1, r)
            files[f"{key}.lora_A.weight"] = torch.randn(r, 12, generator=generator)
            files[f"{key}.lora_B.weight"] = torch.randn(10, r, generator=generator) * decay
    directory.mkdir(exist_ok=True)
    save_file(files, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": r, "lora_alpha": 8} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture
def adapter(tmp_path):
    return write(tmp_path / "adapter")


def screen(report, width=80):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    print_report(report, console)
    return console.export_text()


def test_the_table_folds_the_layers(adapter):
    report = audit(adapter, suggest_ranks=True, budget="3k")
    text = screen(report)
    tables, _, steps = text.partition("next steps\n")
    assert max(map(len, tables.replace(str(adapter), "").splitlines())) <= 80
    assert steps.splitlines() == [f"  {step}" for step in report.next_steps]
    for role in ("query", "key", "value", "output"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"{role} ")]
        assert line.split()[1:4] == ["32", "0–31", "4"]
    assert len(text.splitlines()) < 55
    for policy in ("global median", "global p90", "per module", "knee", "entropy", "hard threshold", "budget"):
        assert policy in text
    worst = min(report.modules, key=lambda m: m.utilization)
    assert worst.module_name in text


def test_many_findings_of_a_kind_are_folded(tmp_path):
    directory = write(tmp_path / "a", tensors={f"orphan.{i}": torch.ones(1) for i in range(9)})
    text = screen(audit(directory))
    assert text.count("orphan_tensor: ") == 3
    assert "… and 6 more orphan_tensor" in text


class Checker(HTMLParser):
    """Collects tags and attributes, and sees that tags are closed."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


NASTY = '</title><script>alert("1")</script><img src=x onerror=alert(1)>&"\''


@pytest.mark.slow
def test_the_page_is_self_contained_and_names_are_escaped(tmp_path):
    directory = write(
        tmp_path / "a", layers=3, names=[NASTY, "q_proj"], base_model_name_or_path=NASTY, tensors={NASTY: torch.ones(1)}
    )
    report = audit(directory, suggest_ranks=True)
    assert NASTY in report.modules[-1].module_name + report.modules[0].module_name
    page = to_html(report)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    tags = {tag for tag, _ in checker.seen}
    assert not tags & {
        "script",
        "svg",
        "link",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "video",
        "image",
        "use",
    }
    for _, attributes in checker.seen:
        assert not {key for key in attributes if key.startswith("on") or key in ("href", "xlink:href", "style")}
        assert attributes.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import|https?://", page)
    assert NASTY in "".join(checker.text)
    assert "<script" not in page


@pytest.mark.slow
def test_the_page_has_the_figures_of_the_report_its_tables_and_next_steps(adapter):
    report = audit(adapter, suggest_ranks=True)
    page = to_html(report)
    checker = Checker()
    checker.feed(page)
    pictures = [attributes for tag, attributes in checker.seen if tag == "img"]
    assert [picture["alt"] for picture in pictures] == list(report.figures()) == ["heatmaps", "spectra", "energy"]
    for picture in pictures:
        png = base64.b64decode(picture["src"].partition(",")[2], validate=True)
        assert png.startswith(b"\x89PNG")
    text = "".join(checker.text)
    assert all(step in text for step in report.next_steps)
    assert all(module.module_name in text for module in report.modules)
    assert f"Modules ({len(report.modules)} rows)" in text


def test_notebooks_show_the_tables_and_escape_names(tmp_path):
    report = audit(write(tmp_path / "a", layers=2, names=[NASTY, "q_proj"]))
    shown = report._repr_html_()
    checker = Checker()
    checker.feed(shown)
    assert checker.open == []
    assert "script" not in {tag for tag, _ in checker.seen}
    assert report.headline in "".join(checker.text)
    assert "query" in checker.text


def test_heatmaps_spectra_and_curves_are_those_of_the_modules(adapter):
    report = audit(adapter)
    by_place = {(m.group, m.layer): m for m in report.modules}
    utilization, norms, ranks = heatmaps(report.modules, report.energy)
    for j, group in enumerate(norms.groups):
        for i, layer in enumerate(norms.layers):
            module = by_place[group, layer]
            assert norms.values[j][i] == pytest.approx(module.frobenius_norm)
            assert utilization.values[j][i] == pytest.approx(module.capacity_utilization)
            assert ranks.values[j][i] == module.energy_rank["0.9"]
    for spectrum in spectra(report.modules):
        third = [m.singular_values[2] / m.singular_values[0] for m in report.modules if m.group == spectrum.group]
        assert (spectrum.low[2], spectrum.median[2], spectrum.high[2]) == pytest.approx(
            tuple(numpy.quantile(third, (0.1, 0.5, 0.9)))
        )
        assert spectrum.median[0] == 1
    greedy, uniform = energy_curves(report.modules)
    everything = sum(m.rank * 22 for m in report.modules)
    assert greedy.parameters[-1] == uniform.parameters[-1] == everything
    assert greedy.energy[-1] == pytest.approx(1)
    assert uniform.energy[1] == pytest.approx(
        sum(m.spectral_norm**2 for m in report.modules) / report.total.frobenius_norm**2
    )
    at = dict(zip(greedy.parameters, greedy.energy, strict=True))
    assert all(
        at[count] >= kept - 1e-9 for count, kept in zip(uniform.parameters, uniform.energy, strict=True) if count in at
    )


@pytest.mark.slow
def test_adapters_with_nothing_to_draw_are_shown(tmp_path):
    nowhere = write(tmp_path / "a", layers=1, prefix="x", names=["y"])
    zero = write(tmp_path / "b", layers=1)
    save_file(
        {"model.layers.0.q.lora_A.weight": torch.ones(4, 3), "model.layers.0.q.lora_B.weight": torch.zeros(2, 4)},
        zero / "adapter_model.safetensors",
    )
    broken = write(tmp_path / "c", layers=1)
    save_file({"model.layers.0.q.lora_A.weight": torch.ones(4, 3)}, broken / "adapter_model.safetensors")
    for directory in (nowhere, zero, broken):
        report = audit(directory, suggest_ranks=True)
        assert to_html(report)
        assert screen(report)
        write_plots(report, tmp_path / "plots")
    assert report.modules == ()


@pytest.mark.slow
def test_writing_html_replaces_whole_files(adapter, tmp_path, monkeypatch):
    report = audit(adapter)
    out = tmp_path / "report.html"
    out.write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda path, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_html(report, out)
    assert out.read_text() == "old"
    monkeypatch.undo()
    write_html(report, out)
    assert out.read_text().startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "report.html"]
    write_html(report, tmp_path / "new" / "parents" / "report.html")
    assert (tmp_path / "new" / "parents" / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_plots_are_pictures(adapter, tmp_path):
    written = write_plots(audit(adapter, suggest_ranks=True), tmp_path / "new" / "plots")
    assert [path.name for path in written] == ["heatmaps.png", "spectra.png", "energy.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    assert sorted(path.name for path in (tmp_path / "new" / "plots").iterdir()) == sorted(p.name for p in written)
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.slow
def test_one_figure_has_all_parts_with_the_names_of_the_tables(adapter):
    report = audit(adapter, suggest_ranks=True)
    figure = report.plot()
    assert figure.get_suptitle().endswith("adapter (LORA)")
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    parts = [axes.get_title() for one in report.figures().values() for axes in one.axes if axes.get_title()]
    assert titles == parts
    spectra_axes, energy_axes = (axes for axes in figure.axes if axes.get_legend())
    roles = [group.name for group in report.roles]
    assert [text.get_text() for text in spectra_axes.get_legend().get_texts()] == ["all, 10–90%", *roles]
    assert len(spectra_axes.collections) == 1  # one band
    policies = [row[0].removeprefix("★ ") for row in report.tables()[2].rows]
    assert [text.get_text() for text in energy_axes.get_legend().get_texts()] == [
        "greedy",
        "one rank for all",
        *policies,
    ]
    assert energy_axes.xaxis.get_major_formatter()(999_552, 0) == "1M"


@pytest.mark.slow
def test_of_many_roles_the_ones_with_the_most_energy_are_drawn(tmp_path):
    names = [f"block{i}" for i in range(12)]
    report = audit(write(tmp_path / "a", layers=2, names=names))
    axes = report.figures()["spectra"].axes[0]
    assert axes.get_title() == "spectra, medians over modules (8 of 12 roles, by energy)"
    strongest = sorted(report.roles, key=lambda group: -group.frobenius_norm)[:8]
    shown = {text.get_text() for text in axes.get_legend().get_texts()}
    assert shown == {"all, 10–90%", *(group.name for group in strongest)}


@pytest.mark.slow
def test_dollar_signs_in_names_are_not_mathematics(tmp_path):
    report = audit(write(tmp_path / "a$x_y$", layers=2, names=["$q_$"]))
    (tmp_path / "plots").mkdir()
    assert len(write_plots(report, tmp_path / "plots")) == 3
    assert r"a\$x_y\$ (LORA)" in report.plot().get_suptitle()


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "lorakit", "audit", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_json_alone_on_stdout(adapter, tmp_path):
    done = run(adapter, "--json", "--suggest-ranks", "--energy", "0.8", "--budget", "3k", "--html", tmp_path / "r.html")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    expected = audit(adapter, suggest_ranks=True, energy=0.8, budget="3k")
    assert_close_reports(report, json.loads(json.dumps(expected.to_dict())))
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_findings_decide_the_exit_code(tmp_path):
    zero = write(tmp_path / "a", layers=1, tensors={"orphan": torch.ones(1)})
    done = run(zero)
    assert done.returncode == 0
    assert "warning orphan_tensor" in done.stdout
    bad = write(tmp_path / "b", layers=1, tensors={"x.lora_A.weight": torch.ones(2, 2)})
    done = run(bad, "--json")
    assert done.returncode == 1
    assert [f["code"] for f in json.loads(done.stdout)["findings"] if f["severity"] == "error"] == ["missing_half"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("nowhere",),
        ("no/such",),
        ("{}", "--budget", "1"),
        ("{}", "--budget", "x"),
        ("{}", "--html", "{}/adapter_config.json/x.html"),
    ],
)
def test_bad_input_is_exit_code_2(adapter, arguments):
    done = run(*(argument.format(adapter) for argument in arguments), "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("lorakit: ")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [(), ("x", "y"), ("x", "--energy", "1.5"), ("x", "--energy", "much"), ("x", "--no")]
)
def test_wrong_usage_is_exit_code_2(arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_the_command_imports_neither_transformers_nor_peft_and_matplotlib_only_for_figures(adapter, run_python):
    for options, loaded in (([], []), (["--json"], []), (["--html", str(adapter / "r.html")], ["matplotlib"])):
        code = f"""
            import io, sys
            from lorakit.cli.app import app
            out, sys.stdout = sys.stdout, io.StringIO()
            app(["audit", {str(adapter)!r}, *{options!r}], standalone_mode=False)
            heavy = {{"transformers", "peft", "accelerate", "matplotlib", "huggingface_hub", "scipy"}}
            print(sorted(heavy & set(sys.modules)), file=out)
        """
        assert run_python(code).stdout.strip() == str(loaded)
