"""``lorakit compress``, ``merge`` and ``export``: from an adapter on disk to another."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from lorakit import evaluation, serving
from lorakit.cli._certified import (
    Alpha,
    Cache,
    Certification,
    Guard,
    Limit,
    Margin,
    Task,
    finish,
    loading,
    refuse_without_base,
    with_certificate,
)
from lorakit.cli._merging import MethodName, Retain, merge_options, retained
from lorakit.cli._models import Device, Dtype, FourBit, Revision, Trust, load_options
from lorakit.cli._output import (
    EXIT_CODES,
    Column,
    Overwrite,
    check_share,
    fail_if_errors,
    print_folded,
    print_json,
    print_lines,
    show,
)

if TYPE_CHECKING:
    from lorakit._report import Report
    from lorakit.compress import SmallestReport
    from lorakit.evaluation import Certificate

Adapter = Annotated[str, typer.Argument(help="A directory, a file with its config beside it, or a Hub id.")]
Out = Annotated[str, typer.Argument(help="Directory to write.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Verify = Annotated[bool, typer.Option(help="Read back what was written before it takes its place.")]
Compact = Annotated[
    bool, typer.Option("--compact", help="Each module at its own rank, for PEFT >= 0.15 and vLLM >= 0.33 only.")
]
TaskBase = Annotated[
    str | None,
    typer.Option(help="The base model: a path or, for --task alone, a Hub id. DoRA and SPECLORA by whole updates."),
]
For = Annotated[
    str | None, typer.Option("--for", help="Servers that the file is for, with commas between: lorax,tgi,ollama.")
]


class FormatName(StrEnum):
    """The formats of adapters: PEFT's, and those of programs that read others."""

    peft = "peft"
    gguf = "gguf"
    mlx = "mlx"
    diffusers = "diffusers"
    kohya = "kohya"


class EnergyOf(StrEnum):
    """What `--energy` is a share of."""

    module = "module"
    total = "total"


Ranks = Annotated[
    str | None, typer.Option(help="One rank, or ranks by name or pattern: q_proj=4,v_proj=16; others keep theirs.")
]
Energy = Annotated[float | None, typer.Option(help="Share of the updates' energy to keep, in (0, 1].")]
Budget = Annotated[str | None, typer.Option(help="For all factors as written: 2000000, 2M (parameters), 4MB (bytes).")]
EnergyOfOption = Annotated[EnergyOf, typer.Option("--energy-of", help="Keep the energy in every module, or in total.")]
HealSteps = Annotated[
    int, typer.Option(min=0, help="With --smallest: steps in which each cut adapter learns the original's predictions.")
]
HealText = Annotated[str | None, typer.Option(help="Texts that it learns from, without labels: a file or dataset id.")]
PerModule = Annotated[bool, typer.Option("--per-module", help="Choose ranks module by module; the file is compact.")]


def compress(
    adapter: Adapter,
    out: Out,
    ranks: Ranks = None,
    energy: Energy = None,
    budget: Budget = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="No module has a higher rank.")] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="The smallest rank that PASSes --task.")] = False,
    energy_of: EnergyOfOption = EnergyOf.module,
    per_module: PerModule = False,
    compact: Compact = False,
    for_server: For = None,
    base: TaskBase = None,
    task: Task = None,
    margin: Margin = None,
    alpha: Alpha = None,
    guard: Guard = None,
    limit: Limit = None,
    cache: Cache = None,
    heal_steps: HealSteps = 0,
    heal_text: HealText = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write the best adapter of lower rank; give one of --ranks, --energy, --budget, --max-rank, --smallest."""
    given = {"ranks": ranks, "energy": energy, "budget": budget, "max_rank": max_rank}
    _check_criterion({**given, "smallest": smallest or None}, energy_of, per_module)
    if bool(heal_steps) != (heal_text is not None) or (heal_steps and not smallest):
        raise typer.BadParameter("go together, and with --smallest.", param_hint="--heal-steps, --heal-text")
    certification = Certification(task, margin, alpha, guard, limit, cache)
    loaded = (device, dtype, load_in_4bit, revision, trust_remote_code)
    option = "--smallest" if smallest else None
    asked = certification.asked(base, only=loading(*loaded), smallest=option)
    settings = certification.settings(load_options(*loaded), base=base, overwrite=overwrite)
    from lorakit.compress import smallest as write_smallest
    from lorakit.compress import truncate

    if smallest:
        if compact or for_server is not None:
            raise typer.BadParameter("do not go with --smallest.", param_hint="--compact, --for")
        healing: dict[str, Any] = {"heal_steps": heal_steps, "heal_text": heal_text}
        _show_smallest(write_smallest(adapter, out, verify=verify, **healing, **settings), as_json)
    criterion: dict[str, Any] = given if ranks is None else {"ranks": _ranks(ranks)}
    criterion |= {"energy_of": energy_of.value, "per_module": per_module, "pad": not compact}
    criterion |= {"for_server": for_server, "base": base, "verify": verify}
    _write(
        lambda directory, **safety: truncate(adapter, directory, **criterion, **safety),
        out,
        overwrite,
        {**settings, "references": adapter} if asked else None,
        as_json,
        _columns("rank"),
    )


def _write(
    write: Callable[..., Report],
    out: str,
    overwrite: bool,
    certified: dict[str, Any] | None,
    as_json: bool,
    columns: list[Column],
) -> None:
    """Write an adapter, print the report, and with `certified`, the arguments for it, print and exit as the verdict."""
    certificate = None
    if certified is None:
        report = write(out, overwrite=overwrite)
    else:
        report, certificate = evaluation.write_certified(write, out, **certified)
    _show(report, as_json, columns, certificate)
    finish(certificate, as_json=as_json)


def _check_criterion(given: dict[str, Any], energy_of: EnergyOf, per_module: bool) -> None:
    if sum(value is not None for value in given.values()) != 1:
        raise typer.BadParameter("give exactly one.", param_hint="--ranks, --energy, --budget, --max-rank, --smallest")
    check_share("--energy", given["energy"])
    if energy_of is EnergyOf.total and (given["energy"] is None or per_module):
        raise typer.BadParameter("is for --energy without --per-module.", param_hint="--energy-of")
    if per_module and given["ranks"] is not None:
        raise typer.BadParameter("does not go with --ranks; use --compact.", param_hint="--per-module")
    if per_module and given["smallest"]:
        raise typer.BadParameter("does not go with --smallest.", param_hint="--per-module")


def _show_smallest(report: SmallestReport, as_json: bool) -> None:
    """Print the report, and exit: 0 where an adapter was written, else as the first rank's verdict says."""
    show(report, as_json)
    raise typer.Exit(0 if report.rank is not None else EXIT_CODES[report.certificate.verdict])


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Directories, files or Hub ids of adapters of one base model.")],
    out: Out,
    weights: Annotated[str | None, typer.Option(help="One each, with commas between; default: 1/n each.")] = None,
    method: Annotated[MethodName, typer.Option(help="How; ties and dare form each ΔW: slow.")] = MethodName.linear,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the merge.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the merge's energy to keep, instead.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare.")] = 0,
    compact: Compact = False,
    for_server: For = None,
    base: TaskBase = None,
    retain: Retain = None,
    task: Task = None,
    margin: Margin = None,
    alpha: Alpha = None,
    guard: Guard = None,
    limit: Limit = None,
    cache: Cache = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    overwrite: Overwrite = False,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Merge adapters into one plain LoRA; with --task, each of them is a reference for the merge."""
    options = merge_options(weights, method, rank, energy, density)
    certification = Certification(task, margin, alpha, guard, limit, cache)
    loaded = (device, dtype, load_in_4bit, revision, trust_remote_code)
    measured = retained(retain, certification, base, load_options(*loaded)) if retain else {}
    asked = not measured and certification.asked(base, only=loading(*loaded))
    settings = certification.settings(load_options(*loaded), base=base, overwrite=overwrite)
    options |= {"seed": seed, "base": base, "pad": not compact, "for_server": for_server, "verify": verify}
    options |= measured
    from lorakit.merging import merge as merge_adapters

    _write(
        lambda directory, **safety: merge_adapters(adapters, directory, **options, **safety),
        out,
        overwrite,
        {**settings, "references": adapters} if asked else None,
        as_json,
        _columns("merged"),
    )


def export(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="Directory to write; for gguf, diffusers and kohya a file.")],
    rank: Annotated[
        str | None,
        typer.Option(help="Cut to this rank, optimally; auto: the smallest served; smallest: that PASSes --task."),
    ] = None,
    energy: Annotated[float, typer.Option(help="Share of every update's energy that --rank auto keeps.")] = 0.99,
    base: Annotated[
        str | None, typer.Option(help="The base model, which SPECLORA and --task need; for gguf a path.")
    ] = None,
    task: Task = None,
    margin: Margin = None,
    alpha: Alpha = None,
    guard: Guard = None,
    limit: Limit = None,
    cache: Cache = None,
    format_: Annotated[
        FormatName, typer.Option("--format", help="gguf for llama.cpp and Ollama, mlx for mlx-lm, kohya for ComfyUI.")
    ] = FormatName.peft,
    compact: Compact = False,
    for_server: For = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Write an adapter as a plain LoRA that needs no lorakit: LORA, FISHERLORA, and SPECLORA with its base model."""
    check_share("--energy", energy)
    chosen = _rank(rank)
    certification = Certification(task, margin, alpha, guard, limit, cache)
    loaded = (device, dtype, load_in_4bit, revision, trust_remote_code)
    if format_ is not FormatName.peft:
        _check_format(rank is not None or compact or for_server is not None or bool(task))
        certification.asked(None, only=loading(*loaded))
        return _show(_export_as(format_, adapter, out, base, overwrite), as_json, None)
    asked = certification.asked(base, smallest=_asks_for_smallest(chosen, compact))
    refuse_without_base(base, loading(*loaded))
    options = load_options(*loaded)
    settings = certification.settings(options, overwrite=overwrite)
    from lorakit.adapters.companions import check_overwrite
    from lorakit.export import to_lora

    check_overwrite(out, [adapter], overwrite=overwrite)  # before a model is loaded
    if chosen == "smallest":
        report = to_lora(adapter, out, rank="smallest", base=base, for_server=for_server, **settings)
        _show_smallest(report, as_json)
    model = None if base is None else evaluation.load_adapted(base, adapter, options)
    how: dict[str, Any] = {"rank": chosen, "energy": energy, "pad": not compact, "for_server": for_server}
    _write(
        lambda directory, **safety: to_lora(model or adapter, directory, source=adapter, **how, **safety),
        out,
        overwrite,
        {**settings, "base": model.get_base_model(), "references": adapter} if asked and model is not None else None,
        as_json,
        _EXPORT_COLUMNS,
    )


_EXPORT_COLUMNS: list[Column] = [
    ("modules", lambda rows: str(len(rows))),
    ("rank", lambda rows: _range(row.source_rank for row in rows)),
    ("written", lambda rows: _range(row.rank for row in rows)),
    ("parameters", lambda rows: f"{sum(row.parameters for row in rows):,}"),
    ("energy, least", lambda rows: f"{min(1 - row.discarded_energy for row in rows):.1%}"),
]


def _asks_for_smallest(rank: object, compact: bool) -> str | None:
    """The option, where it is given."""
    if rank != "smallest":
        return None
    if compact:
        raise typer.BadParameter("does not go with --rank smallest.", param_hint="--compact")
    return "--rank smallest"


def _check_format(others: bool) -> None:
    if others:
        raise typer.BadParameter(
            "takes no --rank, --compact, --for or --task; export to PEFT first.", param_hint="--format"
        )


def _export_as(format_: FormatName, adapter: str, out: str, base: str | None, overwrite: bool) -> Report:
    if format_ is FormatName.gguf:
        return serving.write_gguf(adapter, out, base_config=base, overwrite=overwrite)
    if base is not None:
        raise typer.BadParameter("is for --format peft and gguf.", param_hint="--base")
    write = {
        FormatName.mlx: serving.write_mlx,
        FormatName.diffusers: serving.write_diffusers,
        FormatName.kohya: serving.write_kohya,
    }[format_]
    return write(adapter, out, overwrite=overwrite)


def _ranks(text: str) -> int | dict[str, int]:
    try:
        if "=" not in text:
            return int(text)
        pairs = [item.rpartition("=") for item in text.split(",")]
        return {name.strip(): int(rank) for name, _, rank in pairs}
    except ValueError:
        raise typer.BadParameter("must be a rank, or name=rank,name=rank.", param_hint="--ranks") from None


def _rank(text: str | None) -> int | Literal["auto", "smallest"] | None:
    if text is None:
        return None
    if text == "auto":
        return "auto"
    if text == "smallest":
        return "smallest"
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter("must be a positive integer, auto or smallest.", param_hint="--rank")
    return int(text)


def _columns(before: str) -> list[Column]:
    return [
        ("modules", lambda rows: str(len(rows))),
        (before, lambda rows: _range(row.rank for row in rows)),
        ("kept", lambda rows: _range(row.kept_rank for row in rows)),
        ("parameters", lambda rows: f"{sum(row.parameters for row in rows):,}"),
        ("energy, least", lambda rows: f"{min(row.energy_kept for row in rows):.1%}"),
    ]


def _range(values: Any) -> str:
    found = list(values)
    return str(min(found)) if min(found) == max(found) else f"{min(found)}–{max(found)}"


def _show(report: Report, as_json: bool, columns: list[Column] | None, certificate: Certificate | None = None) -> None:
    """Print a report: as JSON with its certificate, or with a table of its modules where there are columns."""
    if as_json:
        print_json(with_certificate(report, certificate))
        fail_if_errors(report)
        return
    if columns is None:
        print_lines(report.headline)
    else:
        print_folded(report.headline, getattr(report, "modules", ()), columns)
    steps = ("What to do next:", *(f"  {step}" for step in report.next_steps)) if report.next_steps else ()
    print_lines(*report.details, *steps)
    fail_if_errors(report)
