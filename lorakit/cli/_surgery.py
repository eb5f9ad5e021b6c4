"""What ``lorakit surgery`` does: one edit, refining, restoring or a study; and which options go with which."""

from __future__ import annotations

import re
import shlex
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from lorakit import evaluation, lens
from lorakit.cli._certified import Certification, finish, with_certificate
from lorakit.cli._data import named_targets, read_examples
from lorakit.cli._models import load_options
from lorakit.cli._output import EXIT_CODES, Column, numbers_of, print_folded, print_json, print_lines, show
from lorakit.data import tokenizer_for
from lorakit.errors import SurgeryError
from lorakit.naming.roles import layer_of

if TYPE_CHECKING:
    from lorakit._report import Report
    from lorakit.evaluation import Certificate, LoadOptions
    from lorakit.surgery import SurgeryReport

REWEIGHT, IMPROVE, RESTORE, STUDY = "", "--refine", "--refine --objective restore", "--study"
_CALIBRATED = (REWEIGHT, IMPROVE, STUDY)
_WRITTEN = (REWEIGHT, IMPROVE, RESTORE)

# Options by the modes in which they do something. Those that are not here do so in every mode.
_MODES = {
    "policy": (REWEIGHT,),
    "aggregate": (REWEIGHT,),
    "cache": (REWEIGHT,),
    "layers": _WRITTEN,
    "modules": _WRITTEN,
    "out": _WRITTEN,
    "overwrite": _WRITTEN,
    "margin": _WRITTEN,
    "seed": _WRITTEN,
    "preserve_energy": (REWEIGHT, IMPROVE),
    "num_examples": (REWEIGHT, IMPROVE),
    **dict.fromkeys(("data", "start", "shuffle_seed", "length", "batch_size", "columns", "split"), _CALIBRATED),
    "objective": (IMPROVE, RESTORE),
    "controls": (IMPROVE, RESTORE, STUDY),
    "num_selection": (IMPROVE,),
    "policies": (IMPROVE, STUDY),
    **dict.fromkeys(("base_text", "scales"), (RESTORE,)),
    **dict.fromkeys(("seeds", "sizes", "module_set", "energies", "records"), (STUDY,)),
}
_NEEDED = {"data": _CALIBRATED, "out": _WRITTEN, "task": (IMPROVE, RESTORE, STUDY), "base_text": (RESTORE,)}


def mode_of(context: typer.Context, given: SimpleNamespace) -> str:
    """What is asked for. Raises: typer.BadParameter for options that are missing, or do nothing in that mode."""
    if given.refine and given.study:
        raise typer.BadParameter("do not go together.", param_hint="--refine, --study")
    restoring = given.refine and given.objective.value == "restore"
    mode = STUDY if given.study else RESTORE if restoring else IMPROVE if given.refine else REWEIGHT
    for name, modes in _MODES.items():
        source = context.get_parameter_source(name)
        if mode not in modes and source is not None and source.name != "DEFAULT":
            when = f"without {' or '.join(modes)}" if mode == REWEIGHT else f"with {mode}"
            raise typer.BadParameter(f"does nothing {when}.", param_hint=_option(name))
    missing = [_option(name) for name, modes in _NEEDED.items() if mode in modes and not getattr(given, name)]
    if missing:
        when = "" if mode == REWEIGHT else f" with {mode}"
        raise typer.BadParameter(f"is needed{when}.", param_hint=", ".join(missing))
    if mode != REWEIGHT and len(given.task) != 1:
        raise typer.BadParameter(f"must be given once with {mode}; give others as --guard.", param_hint="--task")
    return mode


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def run(given: SimpleNamespace, mode: str) -> None:
    """Do it, print the report and exit as its verdict says."""
    bounds = None if given.layers is None else _bounds(given.layers)
    certification = Certification(given.task, given.margin, given.alpha, given.guard, given.limit, given.cache)
    asked = mode == REWEIGHT and certification.asked(given.base)
    if mode in _WRITTEN:
        from lorakit.adapters.companions import check_overwrite

        check_overwrite(given.out, [given.adapter], overwrite=given.overwrite)  # before a model is loaded
    how = _arguments(given, mode)
    options = load_options(given.device, given.dtype, given.load_in_4bit, given.revision, given.trust_remote_code)
    trusted = {"revision": given.revision, "trust_remote_code": given.trust_remote_code}
    tokenizer = tokenizer_for(given.adapter, given.base, **trusted)
    batches = None if mode == RESTORE else _examples(given, mode, tokenizer)
    model = evaluation.load_adapted(given.base, given.adapter, options)
    if mode == REWEIGHT:
        how["target_modules"] = _targets(model, given.modules, bounds)
        _reweight(model, batches, given, how, certification, options, asked=asked)
        return
    how |= {"task": given.task[0], "guards": given.guard or (), "tokenizer": tokenizer}
    how |= {"alpha": 0.05 if given.alpha is None else given.alpha, "limit": given.limit}
    if mode == STUDY:
        from lorakit.surgery import study

        _show(study(model, batches, **how), given)
        return
    how |= {"target_modules": _targets(model, given.modules, bounds), "seed": given.seed}
    how |= {} if given.margin is None else {"margin": given.margin}
    _refine(model, batches, given, how)


def _arguments(given: SimpleNamespace, mode: str) -> dict[str, Any]:
    """The arguments that only one mode or two have, by name."""
    if mode == REWEIGHT:
        aggregate = None if given.aggregate is None else given.aggregate.value
        chosen = {"policy": given.policy.value, "aggregate": aggregate, "seed": given.seed}
        return chosen | {"num_examples": given.num_examples, "preserve_energy": given.preserve_energy.value}
    how: dict[str, Any] = {} if given.controls is None else {"controls": given.controls}
    if mode == RESTORE:
        how |= {"objective": "restore", "base_text": evaluation.loss(given.base_text)}
        return how | {"scales": numbers_of("--scales", given.scales)}
    how["policies"] = _names(given.policies)
    if mode == IMPROVE:
        how |= {"num_examples": given.num_examples, "num_selection": given.num_selection}
        return how | {"preserve_energy": given.preserve_energy.value}
    how |= {"seeds": _integers("--seeds", given.seeds), "sizes": _integers("--sizes", given.sizes)}
    how |= {"module_sets": _module_sets(given.module_set), "energies": _names(given.energies)}
    return how | {"records": given.records}


def _examples(given: SimpleNamespace, mode: str, tokenizer: Any) -> Any:
    counts = {REWEIGHT: given.num_examples, IMPROVE: given.num_examples + given.num_selection}
    used = counts[mode] if mode in counts else max(_integers("--sizes", given.sizes))
    reading: dict[str, Any] = {"length": given.length, "batch_size": given.batch_size, "split": given.split}
    reading |= {"shuffle_seed": given.shuffle_seed, "start": given.start, "num_examples": used}
    return read_examples(given.data, tokenizer, given.columns, **reading)


def _reweight(
    model: Any,
    batches: Any,
    given: SimpleNamespace,
    how: dict[str, Any],
    certification: Certification,
    options: LoadOptions,
    *,
    asked: bool,
) -> None:
    """Reweight and write the adapter, with a certificate if one is asked for."""
    from lorakit.surgery import reweight

    def write(directory: str) -> SurgeryReport:
        report = reweight(model, batches, **how)
        report.save(directory, source=given.adapter, overwrite=given.overwrite)
        return report

    certificate = None
    if asked:
        settings = certification.settings(
            options, base=model.get_base_model(), references=given.adapter, overwrite=given.overwrite
        )
        used = evaluation.document_hashes(batches)
        report, certificate = evaluation.write_certified(write, given.out, used_documents=used, **settings)
    else:
        report = write(given.out)
    _write_pages(report, given)
    _show_edit(report, batches.report, certificate, given)
    finish(certificate, as_json=given.as_json)


def _refine(model: Any, batches: Any, given: SimpleNamespace, how: dict[str, Any]) -> NoReturn:
    """Refine or restore, write the adapter if the edit is kept, print the report, and exit as its verdict says."""
    from lorakit.surgery import refine

    report = refine(model, batches, **how)
    if report.kept:
        report.save(given.out, source=given.adapter, overwrite=given.overwrite)
    _show(report, given)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _write_pages(report: Report, given: SimpleNamespace) -> None:
    if given.html is not None:
        lens.write_html(report, given.html)
    if given.plots is not None:
        lens.write_plots(report, given.plots)


def _show(report: Report, given: SimpleNamespace) -> None:
    _write_pages(report, given)
    show(report, given.as_json)


def _show_edit(report: SurgeryReport, data: Any, certificate: Certificate | None, given: SimpleNamespace) -> None:
    if given.as_json:
        print_json({**with_certificate(report, certificate), "data": data.to_dict(), "path": given.out})
        return
    headings: list[Column] = [
        ("modules", lambda rows: str(len(rows))),
        ("gate, least", lambda rows: f"{min(min(row.gate, default=1.0) for row in rows):.3f}"),
        ("gate, largest", lambda rows: f"{max(max(row.gate, default=1.0) for row in rows):.3f}"),
    ]
    print_folded(f"{given.adapter} → {given.out}", report.modules, headings)
    compared = f"next: lorakit compare {shlex.quote(given.adapter)} {shlex.quote(given.out)}"
    print_lines(report.headline, *report.details, f"Data: {data.headline}.", *data.details, compared)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _integers(option: str, text: str) -> list[int]:
    try:
        found = [int(number) for number in _names(text)]
    except ValueError:
        found = []
    if not found:
        raise typer.BadParameter("must be whole numbers with commas between.", param_hint=option)
    return found


def _module_sets(given: list[str] | None) -> dict[str, Any] | None:
    """Sets of modules by name, as `study` takes them; None where none is given."""
    if not given:
        return None
    sets = {}
    for text in given:
        name, equals, modules = (part.strip() for part in text.partition("="))
        if not (name and equals and modules):
            raise typer.BadParameter("must be NAME=MODULES, such as all=all-linear.", param_hint="--module-set")
        sets[name] = named_targets(None if modules == "default" else modules)
    return sets


def _bounds(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d+)(?:(-)(\d*))?", text.strip())
    first = int(match[1]) if match else 0
    last = first if match and not match[2] else float(match[3] or "inf") if match else 0
    if match is None or last < first:
        raise typer.BadParameter("must be a layer, or first-last: 12, 8-15, 8-.", param_hint="--layers")
    return first, last


def _targets(model: Any, modules: str | None, bounds: tuple[int, float] | None) -> str | list[str] | None:
    """The modules meant, by name where layers are asked for. Raises: SurgeryError where there are none."""
    from lorakit.adapters.in_model import resolve_adapter_name
    from lorakit.surgery import select_modules

    targets = named_targets(modules)
    if bounds is None:
        return targets
    first, last = bounds
    meant = [module.name for module in select_modules(model, resolve_adapter_name(model, None), targets)]
    names = [name for name in meant if first <= (-1 if (layer := layer_of(name)) is None else layer) <= last]
    if not names:
        there = sorted({layer for layer in map(layer_of, meant) if layer is not None})
        raise SurgeryError(f"None of the {len(meant)} modules meant is in layers {first}-{last}; they are in {there}.")
    return names
