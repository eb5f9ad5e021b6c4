"""``lorakit surgery``: spectral surgery on an adapter on disk."""

from __future__ import annotations

import re
import shlex
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from lorakit import evaluation
from lorakit.adapters.edit_log import read_edits
from lorakit.cli._certified import (
    Alpha,
    Cache,
    Certification,
    Guard,
    Limit,
    Margin,
    Task,
    finish,
    with_certificate,
)
from lorakit.cli._data import (
    DATA_HELP,
    BatchSize,
    Columns,
    Length,
    NumExamples,
    ShuffleSeed,
    Split,
    Start,
    named_targets,
    read_examples,
)
from lorakit.cli._models import Device, Dtype, FourBit, Revision, Trust, load_options
from lorakit.cli._output import EXIT_CODES, Column, Overwrite, print_folded, print_json, print_lines, show
from lorakit.data import tokenizer_for
from lorakit.errors import SurgeryError
from lorakit.naming.roles import layer_of

if TYPE_CHECKING:
    from lorakit.data import DataReport
    from lorakit.evaluation import Certificate
    from lorakit.surgery import SurgeryReport


class PolicyName(StrEnum):
    smooth_abs = "smooth_abs"
    abs_select = "abs_select"
    grad_direction = "grad_direction"
    double_smooth = "double_smooth"
    z_score = "z_score"
    robust_z = "robust_z"
    random_index = "random_index"


class AggregateName(StrEnum):
    mean_abs = "mean_abs"
    mean = "mean"
    abs_mean = "abs_mean"


class EnergyName(StrEnum):
    l1 = "l1"
    l2 = "l2"
    none = "none"


Aggregate = Annotated[
    AggregateName | None, typer.Option(help="Over examples; default: what the policy needs.", show_default=False)
]


Refine = Annotated[
    bool, typer.Option("--refine", help="Try several policies; write the best only if it passes --task.")
]
Modules = Annotated[
    str | None, typer.Option(help="Names with commas between, or all-linear; default: what writes the residual.")
]


def surgery(
    base: Annotated[str, typer.Option(help="The base model: a path or Hub id, with its tokenizer.")],
    adapter: Annotated[str, typer.Option(help="The adapter: a directory or Hub id.")],
    data: Annotated[str, typer.Option(help=DATA_HELP)],
    out: Annotated[str, typer.Option(help="Directory to write; may be that of the adapter.")],
    policy: Annotated[PolicyName, typer.Option(help="random_index is the control.")] = PolicyName.smooth_abs,
    layers: Annotated[str | None, typer.Option(help="A layer or a range of them: 12, 8-15, 8-; default: all.")] = None,
    modules: Modules = None,
    aggregate: Aggregate = None,
    preserve_energy: Annotated[EnergyName, typer.Option(help="Norm of the spectrum that is kept.")] = EnergyName.l1,
    num_examples: NumExamples = 128,
    start: Start = 0,
    shuffle_seed: ShuffleSeed = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    columns: Columns = None,
    split: Split = None,
    seed: Annotated[int, typer.Option(help="Seed of policies that draw.")] = 0,
    refine: Refine = False,
    controls: Annotated[int, typer.Option(min=19, help="With --refine: random edits that it must beat.")] = 19,
    num_selection: Annotated[int, typer.Option(min=1, help="With --refine: examples that choose among edits.")] = 128,
    task: Task = None,
    margin: Margin = None,
    alpha: Alpha = None,
    guard: Guard = None,
    limit: Limit = None,
    cache: Cache = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Reweight the singular values of an adapter's updates by what calibration data says of them."""
    bounds = None if layers is None else _bounds(layers)
    certification = Certification(task, margin, alpha, guard, limit, cache)
    asked = certification.asked(base) if not refine else _asked_to_refine(task, aggregate, policy)
    from lorakit.adapters.companions import check_overwrite

    check_overwrite(out, [adapter], overwrite=overwrite)  # before a model is loaded
    tokenizer = tokenizer_for(adapter, base, revision=revision, trust_remote_code=trust_remote_code)
    used = num_examples + (num_selection if refine else 0)
    reading: dict[str, Any] = {"length": length, "batch_size": batch_size, "num_examples": used, "split": split}
    batches = read_examples(data, tokenizer, columns, shuffle_seed=shuffle_seed, start=start, **reading)
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    model = evaluation.load_adapted(base, adapter, options)
    settings = certification.settings(options, base=model.get_base_model(), references=adapter, overwrite=overwrite)
    meant = {"target_modules": _targets(model, modules, bounds), "num_examples": num_examples}
    meant |= {"preserve_energy": preserve_energy.value, "seed": seed}
    if refine:
        how = meant | {"controls": controls, "num_selection": num_selection, "tokenizer": tokenizer}
        _refine(model, batches, adapter, out, how, settings, as_json)
    how = meant | {"policy": policy.value, "aggregate": None if aggregate is None else aggregate.value}
    settings["used_documents"] = evaluation.document_hashes(batches) if asked else ()
    report, certificate = _reweight(model, batches, adapter, out, how, settings, asked)
    _show(adapter, out, report, batches.report, certificate, as_json)
    finish(certificate, as_json=as_json)


def _reweight(
    model: Any, batches: Any, adapter: str, out: str, how: dict[str, Any], settings: dict[str, Any], asked: bool
) -> tuple[SurgeryReport, Certificate | None]:
    """Reweight and write the adapter, with a certificate if one is asked for."""
    from lorakit.surgery import reweight

    def write(directory: str) -> SurgeryReport:
        report = reweight(model, batches, **how)
        report.save(directory, previous=read_edits(adapter), source=adapter, overwrite=settings["overwrite"])
        return report

    return evaluation.write_certified(write, out, **settings) if asked else (write(out), None)


def _refine(
    model: Any, batches: Any, adapter: str, out: str, how: dict[str, Any], settings: dict[str, Any], as_json: bool
) -> NoReturn:
    """Refine, write the adapter if the edit is kept, print the report, and exit as its verdict says."""
    from lorakit.surgery import refine

    margin = 0.01 if settings["margin"] is None else settings["margin"]
    asked = {key: settings[key] for key in ("guards", "alpha", "limit")}
    report = refine(model, batches, task=settings["tasks"][0], margin=margin, **asked, **how)
    if report.kept:
        report.save(out, previous=read_edits(adapter), source=adapter, overwrite=settings["overwrite"])
    show(report, as_json)
    raise typer.Exit(EXIT_CODES[report.verdict])


def _asked_to_refine(task: list[str] | None, aggregate: AggregateName | None, policy: PolicyName) -> bool:
    """True, for options that go with --refine."""
    if task is None or len(task) != 1:
        raise typer.BadParameter("must be given once with --refine.", param_hint="--task")
    if aggregate is not None or policy is not PolicyName.smooth_abs:
        raise typer.BadParameter("do not go with --refine, which tries several.", param_hint="--policy, --aggregate")
    return True


def _show(
    adapter: str, out: str, report: SurgeryReport, data: DataReport, certificate: Certificate | None, as_json: bool
) -> None:
    if as_json:
        print_json({**with_certificate(report, certificate), "data": data.to_dict(), "path": out})
        return
    headings: list[Column] = [
        ("modules", lambda rows: str(len(rows))),
        ("gate, least", lambda rows: f"{min(min(row.gate, default=1.0) for row in rows):.3f}"),
        ("gate, largest", lambda rows: f"{max(max(row.gate, default=1.0) for row in rows):.3f}"),
    ]
    print_folded(f"{adapter} → {out}", report.modules, headings)
    compared = f"next: lorakit compare {shlex.quote(adapter)} {shlex.quote(out)}"
    print_lines(report.headline, *report.details, f"Data: {data.headline}.", *data.details, compared)


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
