"""What travels with an adapter's weights: tokenizer, chat template and model card; and whose files may be replaced."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit._version import __version__
from lorakit.adapters.adapter import Adapter
from lorakit.adapters.atomic import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from lorakit.adapters.edit_log import RECORD_NAME, weights_hash
from lorakit.errors import Finding, OverwriteError

CARD_NAME = "README.md"
CERTIFICATE_NAME = "lorakit_certificate.json"
CERTIFICATE_END = "<!-- end of lorakit's certificate -->"
# Files of tokenizers, processors and chat templates, as transformers names them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "processor_config.json",
    "preprocessor_config.json",
)

_HEADING = "## Changes made by lorakit"
_MARK = re.compile(rf"<!-- lorakit wrote {re.escape(WEIGHTS_NAME)} with sha256 ([0-9a-f]{{64}}) -->")
_CERTIFICATE = re.compile(
    rf"\n*<!-- lorakit certificate [0-9a-f]{{64}} -->.*?{re.escape(CERTIFICATE_END)}\n*", re.DOTALL
)


def certificate_start(sha256: str) -> str:
    """The mark in a model card before the section of the certificate with this hash."""
    return f"<!-- lorakit certificate {sha256} -->"


def without_certificate(card: str) -> str:
    """A model card without the sections of certificates, which say nothing of an adapter with other weights."""
    return _CERTIFICATE.sub("\n\n", card).rstrip("\n") + "\n" if _CERTIFICATE.search(card) else card


@dataclass(frozen=True)
class Companions:
    """The files that lie beside the sources of an adapter, by their names; `card` is the text of the model card."""

    files: Mapping[str, Path] = field(default_factory=dict)
    card: str | None = None
    findings: tuple[Finding, ...] = ()

    def write(self, directory: Path, config: Mapping[str, Any], change: str) -> None:
        """Copy the files into `directory`, where the weights are, and write the card with `change`, one line, added.

        Without a card of the source it is the one that PEFT wrote into `directory`, or a new one. The source's
        certificate stays behind, with its section of the card: it is of other weights.
        """
        for name, path in self.files.items():
            if path.is_dir():
                shutil.copytree(path, directory / name)
            else:
                shutil.copyfile(path, directory / name)
        path = directory / CARD_NAME
        card = self.card or (path.read_text(encoding="utf-8") if path.exists() else _new_card(config))
        path.write_text(_with_change(without_certificate(card), change, weights_hash(directory)), encoding="utf-8")


def label_of(path: str) -> str:
    """What a model card calls an adapter: its Hub id, or the name of its directory without the path to it."""
    return Path(path).resolve().name if Path(path).exists() else path


def companions_of(sources: Sequence[object]) -> Companions:
    """What lies beside the sources: paths, files or Hub ids; a model in memory has nothing beside it.

    Of several sources the first that has a file gives it, and a finding names the files that differ.
    """
    files: dict[str, Path] = {}
    differing: list[str] = []
    card = None
    for source in sources:
        directory = _directory_of(source)
        if directory is None:
            continue
        for name in COMPANIONS:
            path = directory / name
            if not path.exists():
                continue
            if name in files and not _same(files[name], path):
                differing.append(name)
            files.setdefault(name, path)
        if card is None and (directory / CARD_NAME).is_file():
            card = (directory / CARD_NAME).read_text(encoding="utf-8", errors="replace")
    findings = []
    if differing:
        message = (
            f"The adapters have different files beside them: {', '.join(dict.fromkeys(differing))}. Those of the "
            f"first adapter that has them were kept."
        )
        findings.append(Finding("warning", "companions_differ", None, message))
    return Companions(files, card, tuple(findings))


def check_overwrite(out: str | os.PathLike[str], sources: Sequence[object], *, overwrite: bool) -> None:
    """Raise OverwriteError where `out` is one of the sources, or has an adapter that lorakit did not write.

    With `overwrite` it may be either. An adapter that lorakit wrote may always be replaced, so that the same command
    can run again.
    """
    target = Path(out)
    weights = [target / name for name in (WEIGHTS_NAME, PICKLE_NAME) if (target / name).exists()]
    if overwrite or not weights:
        return
    ways_out = "Pass `overwrite=True` (--overwrite) to replace it, or name another directory."
    for source in sources:
        directory = local_directory(source)
        if directory is not None and directory.exists() and os.path.samefile(directory, target):
            raise OverwriteError(f"`out` is the directory of the adapter itself, {os.fspath(out)!r}. {ways_out}")
    if not written_by_lorakit(target):
        raise OverwriteError(f"`out` {os.fspath(out)!r} has an adapter that lorakit did not write. {ways_out}")


def written_by_lorakit(directory: str | os.PathLike[str]) -> bool:
    """Whether lorakit wrote the weights in `directory`: their hash is in the model card, or in the record of surgery.

    The hash is of the weights, so the answer is no once another program has written them, though the card remains.
    """
    digest = weights_hash(Path(directory))
    return digest is not None and digest in (
        _digest_in_card(Path(directory, CARD_NAME)),
        _digest_in_record(Path(directory, RECORD_NAME)),
    )


def _digest_in_card(path: Path) -> str | None:
    try:
        match = _MARK.search(path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return None if match is None else match[1]


def _digest_in_record(path: Path) -> str | None:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return record.get("weights_sha256") if isinstance(record, dict) else None


def local_directory(source: object) -> Path | None:
    """The directory of a source that is a path here; None for models in memory and Hub ids."""
    source = source.path if isinstance(source, Adapter) else source
    if not isinstance(source, str | os.PathLike):
        return None
    path = Path(source)
    return path if path.is_dir() else path.parent if path.exists() else None


def _directory_of(source: object) -> Path | None:
    """The directory of a source; of a Hub id the one that its companions are downloaded to."""
    directory = local_directory(source)
    source = source.path if isinstance(source, Adapter) else source
    if directory is not None or not isinstance(source, str):
        return directory
    from huggingface_hub import snapshot_download

    patterns = [*COMPANIONS, "additional_chat_templates/*", CARD_NAME, CONFIG_NAME]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception:  # of many kinds, as no network; the weights are there, and the rest can do without
        return None


def _same(one: Path, other: Path) -> bool:
    if one.is_dir() or other.is_dir():
        names = [sorted(path.name for path in each.iterdir()) for each in (one, other) if each.is_dir()]
        return len(names) == 2 and names[0] == names[1] and all(_same(one / name, other / name) for name in names[0])
    return one.read_bytes() == other.read_bytes()


def _new_card(config: Mapping[str, Any]) -> str:
    base = config.get("base_model_name_or_path")
    lines = ["---", *([f"base_model: {json.dumps(base)}"] if base else []), "library_name: peft", "tags:", "- lora"]
    return "\n".join([*lines, "---", "", "# A LoRA adapter" + (f" of {base}" if base else ""), ""])


def _with_change(card: str, change: str, digest: str | None) -> str:
    """`card` with one more line in the section about lorakit's changes, and with the hash of the weights after it."""
    line = f"* {change} (lorakit {__version__})"
    before, heading, after = _MARK.sub("", card).partition(_HEADING)
    next_heading = re.search(r"^#", after, re.MULTILINE)
    end = len(after) if next_heading is None else next_heading.start()
    lines, rest = after[:end].strip(), after[end:].strip()
    section = "\n".join([lines, line] if lines else [line])
    parts = [before.rstrip(), heading or _HEADING, section, _mark(digest), rest]
    return "\n\n".join(part for part in parts if part) + "\n"


def _mark(digest: str | None) -> str:
    return f"<!-- lorakit wrote {WEIGHTS_NAME} with sha256 {digest} -->"
