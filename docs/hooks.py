"""What `mkdocs build` adds to the pages: the API reference, a page for each package, and the command line."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from lorakit import _lazy

_TOP = "lorakit"
_COMMANDS = "reference/cli.md"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the reference at the end of the navigation."""
    pages: list[Any] = [{"Command line": _COMMANDS}]
    pages += [{package: path} for package, path in _pages().items()]
    config.nav = [*(config.nav or []), {"Reference": pages}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Generate the pages of the reference."""
    for package, path in _pages().items():
        files.append(File.generated(config, path, content=_reference(package)))
    files.append(File.generated(config, _COMMANDS, content=_command_line()))
    return files


def _pages() -> dict[str, str]:
    """The page of every public package, and of every public file that belongs to no package."""
    public = {_TOP, *_lazy._FILES}
    public |= {f"{_TOP}.{file}" for file, names in _lazy._FILES[_TOP].items() if not names}
    return {name: f"reference/{name}.md" for name in sorted(public)}


def _reference(package: str) -> str:
    names = [
        name for file, listed in _lazy._FILES.get(package, {}).items() for name in listed if not name.startswith("__")
    ]
    lines = [f"# {package}", "", f"::: {package}"]
    if package in _lazy._FILES:
        lines += [
            "    options:",
            "      members: []",
            "      show_root_heading: false",
            "      show_root_toc_entry: false",
        ]
    for name in names:
        lines += ["", f"::: {package}.{name}"]
    return "\n".join(lines) + "\n"


def _command_line() -> str:
    """Every command with its arguments and options, as `lorakit COMMAND --help` has them."""
    import typer
    from typer.core import TyperGroup

    from lorakit.cli.app import app

    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    lines = ["# Command line", "", root.help or "", ""]
    context = root.make_context("lorakit", [], resilient_parsing=True)
    for name, command in root.commands.items():
        lines += [f"## lorakit {name}", "", command.help or "", "", "| | |", "|---|---|"]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True)
        for parameter in command.params:
            record = parameter.get_help_record(inner)
            if record is not None:
                lines.append(f"| `{record[0].replace('|', chr(92) + '|')}` | {_escaped(record[1])} |")
        lines.append("")
    return "\n".join(lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
