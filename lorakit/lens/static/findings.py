"""From spectra to findings: what stands out about an adapter's modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorakit.adapters import Adapter
from lorakit.errors import Finding
from lorakit.lens.static.spectra import AuditedModule
from lorakit.serving._check import ServerCheck, check_all
from lorakit.serving._profiles import PROFILES

UNUSED_BELOW = 0.25  # utilization
DOMINANT_ABOVE = 0.5  # share of Σ ‖ΔW‖_F²
_MANY = 4  # with fewer modules, one of them may well dominate
SERVED_WRONG = "served_wrong"


def find(rows: Sequence[AuditedModule]) -> Iterator[Finding]:
    """Findings about ranks, parts that are not measured, a dominant module, and unused capacity."""
    yield from _ranks(rows)
    yield from _low_rank_part(rows)
    trained = [row for row in rows if row.frobenius_norm]
    if trained:
        yield from _dominance(trained)
        yield from _unused(trained)


def _ranks(rows: Sequence[AuditedModule]) -> Iterator[Finding]:
    for row in rows:
        largest = min(row.d_out, row.d_in)
        if row.rank > largest:
            message = (
                f"{row.module_name}: rank {row.rank} exceeds min(d_out, d_in) = {largest}, the largest rank that an "
                "update of this shape can have."
            )
            yield Finding("warning", "rank_above_dimension", row.module_name, message)


def _low_rank_part(rows: Sequence[AuditedModule]) -> Iterator[Finding]:
    partial = [row for row in rows if row.low_rank_part_only]
    if partial:
        kinds = sorted({label for row in partial for label in row.beside if label != "lora_bias"})
        beside = f" and statistics of {' and '.join(kinds)}" if kinds else ""
        message = (
            f"In {len(partial)} modules only the low-rank part{beside} is measured; for the whole update, give the "
            "base weights (`base`, --base)."
        )
        yield Finding("info", "low_rank_part_only", None, message)


def _dominance(trained: Sequence[AuditedModule]) -> Iterator[Finding]:
    largest = max(trained, key=lambda row: row.frobenius_norm or 0.0)
    peak = largest.frobenius_norm or 1.0
    share = 1 / sum(((row.frobenius_norm or 0.0) / peak) ** 2 for row in trained)
    if share > DOMINANT_ABOVE and len(trained) >= _MANY:
        message = f"{largest.module_name} has {share:.0%} of the energy Σ ‖ΔW‖_F² of all {len(trained)} modules."
        yield Finding("warning", "dominant_module", largest.module_name, message)


def _unused(trained: Sequence[AuditedModule]) -> Iterator[Finding]:
    unused = [row for row in trained if (row.utilization or 0.0) < UNUSED_BELOW]
    if 2 * len(unused) > len(trained):
        message = (
            f"{len(unused)} of {len(trained)} modules use less than {UNUSED_BELOW:.0%} of their rank (stable rank / r)."
        )
        yield Finding("info", "unused_capacity", None, message)


def find_served_wrong(adapter: Adapter) -> Iterator[Finding]:
    """One finding that names the servers that would scale updates wrongly, or refuse them for their different ranks.

    Older versions of a server and kernels that are right for some ranks only are named beside others, but alone they
    are no finding: they concern plain adapters of one rank too.
    """
    if any(finding.severity == "error" for finding in adapter.findings):
        return
    checks = check_all(adapter)
    wrong = [check for check in checks if check.verdict == "wrong"]
    refusing = [check for check in checks if check.verdict == "refused" and check.only_ranks_differ]
    if not any(_concerns_the_adapter(check) for check in (*wrong, *refusing)):
        return
    named = [f"{each.server} ({each.factors} in {len(each.wrong)} of {len(each.modules)} modules)" for each in wrong]
    message = f"These servers would scale updates wrongly: {', '.join(named)}." if named else ""
    if refusing:
        ranks = sorted({row.rank for row in refusing[0].modules})
        names = ", ".join(check.server for check in refusing)
        message += f" Modules have ranks from {ranks[0]} to {ranks[-1]}, which these servers refuse: {names}."
    yield Finding("warning", SERVED_WRONG, None, f"{message.strip()} `lorakit export` writes one rank and one alpha.")


def _concerns_the_adapter(check: ServerCheck) -> bool:
    profile = PROFILES[check.server]
    return not profile.superseded and (profile.kernel_multiple == 1 or check.only_ranks_differ)
