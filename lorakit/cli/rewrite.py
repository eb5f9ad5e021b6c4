"""``lorakit compress``, ``merge`` and ``export``: from an adapter on disk to another."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit.cli._output import Column, check_share, print_folded, print_json, print_lines

if TYPE_CHECKING:
    from lorakit.errors import Finding

Adapter = Annotated[str, typer.Argument(help="A directory, a file with its config beside it, or a Hub id.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]
Verify = Annotated[bool, typer.Option(help="Read back what was written before it takes its place.")]


class MethodName(StrEnum):
    linear = "linear"
    svd = "svd"
    ties = "ties"
    dare = "dare"


def compress(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="Directory to write; may be that of the adapter.")],
    ranks: Annotated[
        str | None, typer.Option(help="One rank, or ranks by name or pattern: q_proj=4,v_proj=16; others keep theirs.")
    ] = None,
    energy: Annotated[float | None, typer.Option(help="Share of each update's energy to keep, in (0, 1].")] = None,
    budget: Annotated[
        str | None, typer.Option(help="For all modules: 2000000, 2M (parameters), 4MB (bytes as stored).")
    ] = None,
    max_rank: Annotated[int | None, typer.Option(min=1, help="No module has a higher rank.")] = None,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Write the best adapter of lower rank as a plain LoRA; give one of --ranks, --energy, --budget, --max-rank."""
    given = {"ranks": ranks, "energy": energy, "budget": budget, "max_rank": max_rank}
    if sum(value is not None for value in given.values()) != 1:
        raise typer.BadParameter("give exactly one.", param_hint="--ranks, --energy, --budget, --max-rank")
    check_share("--energy", energy)
    if ranks is not None:
        given["ranks"] = _ranks(ranks)  # type: ignore[assignment]
    from lorakit.compress import truncate

    options: dict[str, Any] = given
    report = truncate(adapter, out, **options, verify=verify)
    if as_json:
        print_json(report.to_dict())
        return
    columns = _columns("rank")
    print_folded(f"{report.source} → {report.path}", report.modules, columns)
    print_lines(
        f"r {report.r}, lora_alpha {report.lora_alpha:.6g}; {report.parameters:,} of {report.parameters_before:,} "
        f"parameters, {report.parameters_beside:,} beside them; {report.energy_kept:.2%} of the energy kept.",
        *_findings(report.findings),
    )


def merge(
    adapters: Annotated[list[str], typer.Argument(help="Directories, files or Hub ids of adapters of one base model.")],
    out: Annotated[str, typer.Argument(help="Directory to write.")],
    weights: Annotated[str | None, typer.Option(help="One each, with commas between; default: 1/n each.")] = None,
    method: Annotated[MethodName, typer.Option(help="How; ties and dare form each ΔW: slow.")] = MethodName.linear,
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of the merge.")] = None,
    energy: Annotated[float | None, typer.Option(help="Share of the merge's energy to keep, instead.")] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that ties and dare keep.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of dare.")] = 0,
    verify: Verify = True,
    as_json: Json = False,
) -> None:
    """Merge adapters into one plain LoRA."""
    if rank is not None and energy is not None:
        raise typer.BadParameter("give one of them.", param_hint="--rank, --energy")
    dense = method in (MethodName.ties, MethodName.dare)
    if dense != (density is not None):
        raise typer.BadParameter("is for ties and dare, which need it.", param_hint="--density")
    check_share("--energy", energy)
    check_share("--density", density)
    try:
        chosen = None if weights is None else [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise typer.BadParameter("must be numbers with commas between.", param_hint="--weights") from None
    from lorakit.merging import merge as merge_adapters

    report = merge_adapters(
        adapters,
        out,
        weights=chosen,
        method=method.value,
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        verify=verify,
    )
    if as_json:
        print_json(report.to_dict())
        return
    print_folded(f"{' + '.join(report.sources)} → {report.path}", report.modules, _columns("merged"))
    print_lines(
        f"{report.method} of weights {', '.join(f'{weight:g}' for weight in report.weights)}; r {report.r}; "
        f"{report.parameters:,} parameters; {report.energy_kept:.2%} of the merge's energy kept.",
        *_findings(report.findings),
    )


def export(
    adapter: Adapter,
    out: Annotated[str, typer.Argument(help="Directory to write.")],
    rank: Annotated[int | None, typer.Option(min=1, help="Cut every module to this rank, optimally.")] = None,
    base: Annotated[str | None, typer.Option(help="Path or Hub id of the base model, which SPECLORA needs.")] = None,
    as_json: Json = False,
) -> None:
    """Write an adapter as a plain LoRA that needs no lorakit: LORA, FISHERLORA, and SPECLORA with its base model."""
    from lorakit.cli._models import load_adapted
    from lorakit.export import to_lora

    report = to_lora(adapter if base is None else load_adapted(base, adapter), out, rank=rank)
    if as_json:
        print_json(report.to_dict())
        return
    columns: list[Column] = [
        ("modules", lambda rows: str(len(rows))),
        ("rank", lambda rows: _range(row.source_rank for row in rows)),
        ("written", lambda rows: _range(row.rank for row in rows)),
    ]
    print_folded(f"{adapter} → {report.path}", report.modules, columns)
    print_lines(
        f"r {report.r}, lora_alpha {report.lora_alpha:.6g}; {report.parameters:,} parameters; "
        f"{report.discarded_energy:.2%} of the energy left out."
    )


def _ranks(text: str) -> int | dict[str, int]:
    try:
        if "=" not in text:
            return int(text)
        pairs = [item.rpartition("=") for item in text.split(",")]
        return {name.strip(): int(rank) for name, _, rank in pairs}
    except ValueError:
        raise typer.BadParameter("must be a rank, or name=rank,name=rank.", param_hint="--ranks") from None


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


def _findings(findings: tuple[Finding, ...]) -> list[str]:
    return [f"{finding.severity} {finding.code}: {finding.message}" for finding in findings]
