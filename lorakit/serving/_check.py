"""What a server will compute for an adapter, module by module, beside what the adapter means."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lorakit._checks import preview
from lorakit._figures import escape_mathtext, new_figure
from lorakit._report import Report
from lorakit.adapters import Adapter, AdapterModule, open_adapter
from lorakit.serving._profiles import PROFILES, Content, ServerProfile, profile_of, profiles_of, vllm_max_lora_rank

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn

Verdict = Literal["right", "wrong", "refused", "own format"]
# Rounding of an alpha that a config stores is below this; a wrong rule is far above.
_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ServedModule:
    """One module. `applied_over_true` is the factor by which the served update is off: 1 where it is right, None where
    the server refuses the adapter or the module's scaling is 0."""

    module_name: str
    rank: int
    scaling: float
    applied_scaling: float | None
    applied_over_true: float | None


@dataclass(frozen=True, repr=False)
class ServerCheck(Report):
    """What one server makes of an adapter: `verdict`, and for each module what it applies.

    `refused` says what the server cannot load; `flags` are options that it has to be started with; `notes` is what else
    to know. `evidence` and `source` say how the rule is known.
    """

    adapter: str
    server: str
    version: str
    evidence: str
    source: str
    verdict: Verdict
    refused: tuple[str, ...]
    flags: tuple[str, ...]
    notes: tuple[str, ...]
    modules: tuple[ServedModule, ...]

    @property
    def has_errors(self) -> bool:
        """Whether the server would compute something else than the adapter means, or would not load it."""
        return self.verdict != "right"

    @property
    def wrong(self) -> tuple[ServedModule, ...]:
        """The modules whose update the server would scale wrongly."""
        return tuple(row for row in self.modules if not _is_one(row.applied_over_true))

    @property
    def factors(self) -> str:
        """The factors by which modules would be off, such as "× 0.25 to × 4"; empty where all are right."""
        factors = sorted({round(row.applied_over_true or 0.0, 4) for row in self.wrong})
        if not factors:
            return ""
        return f"× {factors[0]:g}" if len(factors) == 1 else f"× {factors[0]:g} to × {factors[-1]:g}"

    @property
    def only_ranks_differ(self) -> bool:
        """Whether the server refuses the adapter for nothing but the different ranks of its modules."""
        ranks = {row.rank for row in self.modules}
        return len(ranks) > 1 and not PROFILES[self.server].mixed_ranks and len(self.refused) == 1

    @property
    def headline(self) -> str:
        """What the server does, in a line."""
        if self.verdict == "right":
            return f"{self.server} applies the adapter's update in all {len(self.modules)} modules" + (
                f", started with {' '.join(self.flags)}." if self.flags else "."
            )
        if self.verdict == "wrong":
            return (
                f"{self.server} would scale {len(self.wrong)} of {len(self.modules)} modules wrongly: {self.factors}."
            )
        if self.verdict == "own format":
            return f"{self.server} reads no PEFT directory: {self.refused[0]}"
        return f"{self.server} does not load the adapter: {'; '.join(self.refused)}."

    @property
    def details(self) -> tuple[str, ...]:
        """How it is known, and what else to know."""
        return (f"{self.server} {self.version} ({self.evidence}): {self.source}", *self.notes)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """What to do so that the server is right."""
        if self.verdict == "right":
            return ()
        path = shlex.quote(self.adapter)
        profile = PROFILES[self.server]
        if profile.own_format is not None:
            return (f"lorakit export {path} served/ --format {profile.own_format}",)
        return (
            (f"lorakit export {path} served/ --for {self.server}",)
            if self.verdict == "wrong" or self._mended_by_export
            else ()
        )

    @property
    def _mended_by_export(self) -> bool:
        words = ("rank", "SPECLORA", "lora_alpha", "pattern", "fields")
        return all(any(word in reason for word in words) for reason in self.refused)

    def plot(self) -> Figure:
        """The factor by which each module's update is off, by module."""
        figure = new_figure(8, 4)
        axes = figure.subplots()
        factors = [row.applied_over_true for row in self.modules]
        axes.plot([math.nan if factor is None else factor for factor in factors], "o", markersize=4)
        axes.axhline(1, color="gray", linewidth=1, label="right")
        axes.set(xlabel="module, in the adapter's order", ylabel="applied scaling over true scaling")
        axes.set_title(escape_mathtext(f"{self.adapter} in {self.server} {self.version}"))
        axes.legend()
        return figure


def check(adapter: str | os.PathLike[str] | nn.Module | Adapter, server: str) -> ServerCheck:
    """What `server` will compute for an adapter, from the rules in `PROFILES`; neither of them is run.

    Args:
        adapter: what `lorakit.adapters.open_adapter` takes; adapters that lorakit did not write are its main use.
        server: a name in `PROFILES`, such as "vllm", "llama.cpp" or "lorax".
    Raises: ValueError for an unknown server; AdapterFileError and UnsupportedModelError as `open_adapter`.

    Example:
        >>> import lorakit
        >>> lorakit.serving.check("adapter/", "llama.cpp").verdict  # doctest: +SKIP
        'right'
    """
    return _checked(open_adapter(adapter), profile_of(server))


def check_all(
    adapter: str | os.PathLike[str] | nn.Module | Adapter, servers: str | Iterable[str] | None = None
) -> tuple[ServerCheck, ...]:
    """`check` for several servers, or for all that `PROFILES` has; the adapter is read once.

    Raises: as `check`.
    """
    view = open_adapter(adapter)
    return tuple(_checked(view, profile) for profile in (profiles_of(servers) or PROFILES.values()))


def _checked(view: Adapter, profile: ServerProfile) -> ServerCheck:
    view.check()
    refused = list(_refusals(view, profile))
    rank = max((module.rank for module in view.modules), default=0)
    if profile.max_rank is not None and rank > profile.max_rank:
        refused.append(f"rank {rank} is above its limit of {profile.max_rank}")
    loads = not refused and profile.own_format is None
    rows = tuple(_row(module, _applied(view, module, profile, rank) if loads else None) for module in view.modules)
    verdict: Verdict = "right"
    if profile.own_format is not None:
        verdict = "own format"
        refused.insert(0, f"write its own with `--format {profile.own_format}`.")
    elif refused:
        verdict = "refused"
    elif not all(_is_one(row.applied_over_true) for row in rows):
        verdict = "wrong"
    return ServerCheck(
        adapter=view.path,
        server=profile.name,
        version=profile.version,
        evidence=profile.evidence,
        source=profile.source,
        verdict=verdict,
        refused=tuple(refused),
        flags=_flags(profile, rank) if loads else (),
        notes=tuple(_notes(view, profile)),
        modules=rows,
    )


def _row(module: AdapterModule, applied: float | None) -> ServedModule:
    ratio = None if applied is None or module.scaling == 0 else applied / module.scaling
    return ServedModule(module.name, module.rank, module.scaling, applied, ratio)


def _is_one(ratio: float | None) -> bool:
    return ratio is None or math.isclose(ratio, 1.0, rel_tol=_TOLERANCE)


def _applied(view: Adapter, module: AdapterModule, profile: ServerProfile, largest: int) -> float:
    """The scaling that the server applies to a module."""
    settings = view.settings
    if profile.scaling == "patterns" or settings.r is None:
        return module.scaling
    if profile.scaling == "one":
        return 1.0
    rank = {"config": settings.r, "own rank": module.rank, "padded rank": largest}[profile.scaling]
    divisor = math.sqrt(rank) if settings.use_rslora and profile.reads_rslora else float(rank)
    return settings.alpha / divisor * module.rank / profile.kernel_rank(module.rank)


def _contents(view: Adapter) -> dict[Content, str]:
    """What of the adapter is more than low-rank factors, with a name for messages."""
    settings = view.settings
    kinds = {extra.kind for extra in view.extras}
    found: dict[Content, str] = {}
    if settings.peft_type == "SPECLORA" or any(module.mask is not None for module in view.modules):
        found["SPECLORA"] = "a SPECLORA mask (export it as a plain LoRA first)"
    if settings.use_dora or any(module.magnitude is not None for module in view.modules):
        found["DoRA"] = "DoRA magnitudes"
    if any(module.bias is not None for module in view.modules):
        found["lora_bias"] = "`lora_bias`"
    if any(module.experts is not None for module in view.modules):
        found["stacked experts"] = "experts stacked in parameters (`target_parameters`)"
    if settings.modules_to_save or kinds & {"modules_to_save", "trainable_tokens", "bias"}:
        found["modules_to_save"] = "`modules_to_save`, trained tokens or biases"
    return found


def _refusals(view: Adapter, profile: ServerProfile) -> Iterable[str]:
    for content, description in _contents(view).items():
        if content in profile.refuses:
            yield f"it has {description}"
    ranks = sorted({module.rank for module in view.modules})
    if len(ranks) > 1 and not profile.mixed_ranks:
        yield f"its modules have different ranks ({_listed(ranks)})"
    patterns = (*view.settings.rank_pattern, *view.settings.alpha_pattern)
    anchored = [key for key in patterns if key.startswith("^")]
    if anchored and not profile.anchored_patterns:
        yield f"it ignores pattern keys that begin with ^, such as {anchored[0]!r}"
    unknown = sorted(set(view.settings.raw) - (profile.config_fields or set(view.settings.raw)))
    if unknown:
        yield f"its config has fields that it does not know: {preview(unknown)}"
    alpha = view.settings.alpha
    if profile.integer_alpha and not float(alpha).is_integer():
        yield f"`lora_alpha` is {alpha:g}, and it reads integers only"


def _flags(profile: ServerProfile, rank: int) -> tuple[str, ...]:
    if profile.flag is None or (profile.default_max_rank is not None and rank <= profile.default_max_rank):
        return ()
    served = vllm_max_lora_rank(rank) if profile.name.startswith("vllm") else rank
    return (f"{profile.flag} {served}",)


def _notes(view: Adapter, profile: ServerProfile) -> Iterable[str]:
    if profile.note is not None:
        yield profile.note
    if profile.experts_note is not None and any(module.experts is not None for module in view.modules):
        yield profile.experts_note
    peft_type = view.settings.peft_type
    if peft_type in ("FISHERLORA", "SPECLORA"):
        yield (
            f"The config's `peft_type` is {peft_type}: "
            + ("`import lorakit` before loading it." if profile.name == "peft" else "export it as a plain LoRA first.")
        )


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:4])) + (", …" if len(ranks) > 4 else "")
