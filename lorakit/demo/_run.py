"""The demo from beginning to end."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from lorakit._files import write_file
from lorakit._report import Report
from lorakit._version import __version__
from lorakit.adapters.atomic import replaced_directory
from lorakit.demo._data import prepare
from lorakit.demo._model import load_model, save_base
from lorakit.demo._report import CertificatesReport, DemoReport, findings_of, rows_of
from lorakit.demo._settings import DemoSettings
from lorakit.demo._stages import Context, audit_and_compress, certify, operate, save
from lorakit.demo._training import FISHERLORA, LORA, OTHER_SEED, SPECLORA, train
from lorakit.lens.render.html import write_html


def run_demo(settings: DemoSettings, say: Callable[[str], None]) -> DemoReport:
    """Run the demo and return its results; `say` is called with a line about each stage.

    Written into ``settings.out``, all of it or nothing: the adapters, ``certificates/``, ``results.json``, one page of
    HTML, ``demo.html``, and the documents, ``calibration.jsonl`` and ``held-out.jsonl``, on which nothing was trained.
    Before that, and for the default model only, ``base/``, the base model that the adapters' configs name.
    Raises: DemoError, and what the functions raise that it calls.
    """
    started = time.perf_counter()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    say(f"lorakit {__version__} on {settings.model_name}; margin, fixed now: {settings.margin:g} nats a token")
    base, tokenizer = load_model(settings.model)
    if settings.model is None:
        save_base(base, tokenizer, Path(settings.out) / "base")
    with replaced_directory(settings.out) as work, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT and transformers
        context = Context(settings, say, work, prepare(tokenizer, settings, work), tokenizer)
        report, parts = _run(base, context, started)
        write_file(work / "results.json", json.dumps(report.to_dict(), indent=1, allow_nan=False))
        write_html(report, work / "demo.html", sections=parts)
    context.tell("page", f"all of it: {Path(settings.out) / 'demo.html'}")
    return report


def _run(base: torch.nn.Module, context: Context, started: float) -> tuple[DemoReport, dict[str, Report]]:
    """All stages; the report, and the reports that are sections of its page, by heading."""
    settings, counts = context.settings, context.data.counts
    context.tell(
        "data",
        f"{counts['train']} passages to train on, {counts['calibration']} documents to calibrate on, "
        f"{counts['held_out']} held out",
    )
    model, trained = train(base, LORA, context.data.train, settings)
    context.tell("train", trained.line)
    files = [save(model, trained, context)]
    audited, compressed, smaller = audit_and_compress(context)
    edit, edited = operate(model, trained, context)
    files += [smaller, *edited]
    base = model.unload()
    for method in (OTHER_SEED, FISHERLORA, SPECLORA):
        model, trained = train(base, method, context.data.train, settings)
        context.tell("train", trained.line)
        files.append(save(model, trained, context))
        base = model.unload()
    verdicts = certify(base, files, context)
    certificates = CertificatesReport(verdicts.certificates)
    context.tell("certify", certificates.headline)
    rows = rows_of(files, verdicts, settings.margin)
    report = DemoReport(
        lorakit=__version__,
        settings=settings,
        base=str(getattr(base, "name_or_path", "")) if settings.model else str(Path(settings.out) / "base"),
        threads=torch.get_num_threads(),
        seconds=round(time.perf_counter() - started, 1),
        documents=counts,
        recommended_rank=compressed.r,
        size_bytes=(compressed.size_bytes_before, compressed.size_bytes),
        energy_kept=compressed.energy_kept,
        methods=rows,
        findings=findings_of(rows),
    )
    return report, {
        "Audit: what the LoRA learned": audited,
        "Compression to the recommended ranks": compressed,
        "Surgery": edit,
        "Certificates": certificates,
    }
