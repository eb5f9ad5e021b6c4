"""Writing an adapter together with its certificate, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from lorakit.adapters.atomic import replaced_directory
from lorakit.adapters.companions import CARD_NAME, CERTIFICATE_NAME, check_overwrite, without_certificate
from lorakit.adapters.edit_log import RECORD_NAME
from lorakit.evaluation._certificate import Certificate
from lorakit.evaluation._digests import adapter_digest
from lorakit.evaluation._models import LoadOptions, label_of
from lorakit.evaluation.comparison import Comparison, Question

Result = TypeVar("Result")


def write_certified(
    write: Callable[[str], Result],
    out: str | os.PathLike[str],
    *,
    base: Any,
    references: Any,
    tasks: Any,
    margin: float,
    alpha: float = 0.05,
    guards: Any = (),
    groups: Mapping[str, Sequence[Any]] | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    used_documents: Sequence[str] = (),
    cache: str | os.PathLike[str] | None = None,
    options: LoadOptions | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> tuple[Result, Certificate]:
    """Write an adapter with its certificate: whether it is as good as those that it was made from.

    `write` writes the adapter into the directory that it is given. It is scored there, and then takes its place in
    `out`, whatever the verdict, with the certificate beside it and in its model card: all of it in one step.

    Args:
        write: such as ``lambda directory: lorakit.compress.truncate("adapter/", directory, energy=0.9)``.
        out: a directory, made if need be; its adapter is replaced, and only if all goes well.
        references: what it was made from: one adapter, or several, as for a merge. The candidate must be as good as
            each of them on every task: a merge PASSes if it keeps what its inputs could do.
        base, tasks, margin, alpha, guards, groups, tokenizer, limit, used_documents, cache, options, progress: as in
            `lorakit.evaluation.certify`; tokenizer and chat template are those of the first reference.
        overwrite: allow `out` to be one of the references, or to hold an adapter that lorakit did not write.
    Returns: what `write` returned, a report's `path` being `out`; and the certificate.
    Raises: as `write` and `lorakit.evaluation.certify`; OverwriteError (a FileExistsError). `out` is then as it was.

    Example:
        >>> import lorakit
        >>> report, certificate = lorakit.evaluation.write_certified(  # doctest: +SKIP
        ...     lambda directory: lorakit.compress.truncate("adapter/", directory, max_rank=8),
        ...     "small/", base="base/", references="adapter/", tasks="test.jsonl", margin=0.02,
        ... )
    """
    several = isinstance(references, Sequence) and not isinstance(references, str | os.PathLike)
    adapters = list(references) if several else [references]
    check_overwrite(out, adapters, overwrite=overwrite)
    question = Question(
        tasks=tasks,
        margin=margin,
        alpha=alpha,
        guards=guards,
        groups=groups,
        tokenizer=tokenizer,
        limit=limit,
        used_documents=used_documents,
        cache=cache,
        options=options,
        progress=progress,
    )
    with tempfile.TemporaryDirectory() as directory:
        written = Path(directory, "written")
        result = write(os.fspath(written))
        comparison = Comparison(base, question, reference=adapters[0])
        sides = [comparison.score([adapter], [name]) for name, adapter in _named(adapters).items()]
        certificate = comparison.certificate(sides, comparison.score([written], [os.fspath(out)]))
        place(written, out, certificate)
    return _with_path(result, os.fspath(written), os.fspath(out)), certificate


def place(written: str | os.PathLike[str], out: str | os.PathLike[str], certificate: Certificate) -> None:
    """Put the adapter in `written` into `out`, with its certificate beside it and in its model card, in one step.

    Raises: EvaluationError where the certificate is of another adapter; OSError. `out` is then as it was.
    """
    certificate.check_candidate(written)
    with replaced_directory(out, remove=[RECORD_NAME, CERTIFICATE_NAME]) as new:
        shutil.copytree(written, new, dirs_exist_ok=True)
        certificate.save(new / CERTIFICATE_NAME)
        card = new / CARD_NAME
        text = card.read_text(encoding="utf-8") if card.exists() else ""
        card.write_text(without_certificate(text) + "\n" + certificate.to_model_card(), encoding="utf-8")


def _named(adapters: Sequence[Any]) -> dict[str, Any]:
    """The adapters by their names, each once; numbered where several of one name differ."""
    labels = [label_of(adapter) for adapter in adapters]
    different = {(label, adapter_digest(adapter)): adapter for label, adapter in zip(labels, adapters, strict=True)}
    counts = Counter(label for label, _ in different)
    names = [f"{label} ({i})" if counts[label] > 1 else label for i, (label, _) in enumerate(different, 1)]
    return dict(zip(names, different.values(), strict=True))


def _with_path(result: Result, written: str, out: str) -> Result:
    """A report with `out` for the directory that it was written to first."""
    named = is_dataclass(result) and not isinstance(result, type) and any(f.name == "path" for f in fields(result))
    if named and getattr(result, "path", None) == written:
        return replace(result, path=out)  # type: ignore[type-var]
    return result
