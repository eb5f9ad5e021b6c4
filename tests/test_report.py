"""The base class of reports, its tables, and numbers and names as text."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

import pytest

from lorakit._figures import message_figure, new_figure, png_bytes, title_name
from lorakit._format import count, extent, number, share
from lorakit._report import Report, Table, counted, html_table, ordered, shell_argument
from lorakit.errors import Finding


@dataclass(frozen=True)
class Row:
    module_name: str
    rank: int
    spectrum: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class RankReport(Report):
    path: str
    modules: tuple[Row, ...]
    findings: tuple[Finding, ...] = ()

    @property
    def headline(self):
        return f"{len(self.modules)} modules."

    @property
    def next_steps(self):
        return ("lorakit audit <adapter>",)

    def plot(self):
        return message_figure(self.path, "nothing")


@pytest.fixture
def report():
    return RankReport("a", tuple(Row(f"<m{i}>", i, (2.0, 1.0)) for i in range(30)))


def test_the_data_of_a_report(report):
    data = report.to_dict()
    assert list(data) == ["modules", "summary", "findings"]
    assert data["modules"][1] == {"module_name": "<m1>", "rank": 1, "spectrum": [2.0, 1.0]}
    assert data["summary"] == {"path": "a"}
    assert list(report.to_frame()["rank"]) == list(range(30))


def test_the_repr_has_the_headline_and_the_first_step(report):
    assert repr(report) == "RankReport: 30 modules.\n  next: lorakit audit <adapter>"


def test_notebooks_show_the_first_rows_escaped_and_without_lists(report):
    shown = report._repr_html_()
    assert shown.count("<tr>") == 1 + 20
    assert "… and 10 more rows" in shown
    assert "<td>&lt;m0&gt;</td><td>0</td></tr>" in shown
    assert "<m0>" not in shown
    assert "<th>spectrum</th>" not in shown
    assert "lorakit audit &lt;adapter&gt;" in shown


def test_a_report_has_one_figure_named_for_its_type(report):
    assert list(report.figures()) == ["rank"]


def test_a_table_of_columns():
    table = Table.of("t", [("name", str), ("double", lambda x: str(2 * x))], [1, 2], note="n & m", total=True)
    assert table.headings == ("name", "double")
    assert table.rows == (("1", "2"), ("2", "4"))
    shown = html_table(table)
    assert "<caption>t</caption>" in shown
    assert "n &amp; m" in shown


def test_findings_are_ordered_and_counted():
    kinds = ["info", "warning", "error", "warning"]
    findings = ordered(Finding(kind, "code", None, "message") for kind in kinds)
    assert [finding.severity for finding in findings] == ["error", "warning", "warning", "info"]
    assert counted(findings) == "1 error, 2 warnings"
    assert counted(findings[3:]) == "no errors or warnings"


def test_paths_as_shell_arguments(tmp_path):
    directory = tmp_path / "my adapter"
    directory.mkdir()
    (directory / "adapter_model.safetensors").touch()
    assert shlex.split(shell_argument(str(directory))) == [str(directory)]
    assert shlex.split(shell_argument(f"{directory}/", "-lora")) == [f"{directory}-lora"]
    assert shlex.split(shell_argument(str(directory / "adapter_model.safetensors"), "-lora")) == [f"{directory}-lora"]
    assert shell_argument("user/name") == "user/name"
    assert shell_argument("user/name", "-lora") == "name-lora"
    assert shell_argument("LlamaForCausalLM, adapter 'default'") is None
    assert shell_argument(str(tmp_path / "gone")) is None


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (999, "999"), (999.6, "1k"), (999_552, "1M"), (2_488_320, "2.49M"), (7e9, "7G")]
)
def test_counts(value, text):
    assert count(value) == text


def test_numbers_shares_and_ranges():
    assert (number(None), number(0.00123456)) == ("", "0.00123")
    assert (share(None), share(0.625)) == ("", "62%")
    assert (extent(None), extent((4, 4)), extent((4, 8))) == ("", "4", "4–8")


def test_titles_show_the_end_of_a_long_path_and_no_mathematics():
    assert title_name("a$b$") == r"a\$b\$"
    assert title_name("x" * 100 + "/adapter").endswith("/adapter")
    assert len(title_name("x" * 100)) == 60


def test_figures_are_png_files():
    assert png_bytes(new_figure(1, 1)).startswith(b"\x89PNG")
