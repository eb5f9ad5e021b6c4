"""The report of a fleet's audit."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lorakit._figures import message_figure, new_figure, title_name
from lorakit._format import count, extent, number, share, size
from lorakit._report import Report, Table, ordered, plain, shell_argument
from lorakit.errors import Finding
from lorakit.fleet._duplicates import DuplicateGroup
from lorakit.fleet._rows import METRICS, WASTE_ENERGY, FleetAdapter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = 10  # rows of a table
_COLORED = 9  # families with a color of their own
_COPIES = ("same_files", "same_update")


@dataclass(frozen=True, repr=False)
class FleetReport(Report):
    """Every adapter of a fleet, in the order of their paths, and the groups of duplicates among them.

    `directory` is None for a list of adapters; `shard` names the part of the fleet that this report is about.
    """

    directory: str | None
    shard: str | None
    near: float
    adapters: tuple[FleetAdapter, ...]
    duplicates: tuple[DuplicateGroup, ...]

    @property
    def title(self) -> str:
        where = f"{len(self.adapters)} adapters" if self.directory is None else self.directory
        return f"Fleet of {where}" + (f", shard {self.shard}" if self.shard else "")

    @property
    def headline(self) -> str:
        broken = len(self.broken)
        return (
            f"{_plural(len(self.adapters), 'adapter')}, {size(self.size_bytes)}: {size(self.waste_bytes)} saved by "
            f"keeping {WASTE_ENERGY:.0%} of each update's energy; {_plural(self._copies, 'copy', 'copies')} "
            f"({size(self.copied_bytes)}); {f'{broken} cannot be read' if broken else 'all can be read'}."
        )

    @property
    def details(self) -> tuple[str, ...]:
        kinds: Counter[str] = Counter(each.kind for group in self.duplicates for each in group.duplicates)
        copies = ", ".join(
            f"{kinds[kind]} {words}"
            for kind, words in (
                ("same_files", "with the same files as another"),
                ("same_update", "with the same update as another"),
                ("near", f"near another (cosine ≥ {self.near:g})"),
            )
            if kinds[kind]
        )
        wrong = Counter(server for row in self.adapters for server in row.served_wrong)
        served = ", ".join(f"{server} ({n})" for server, n in wrong.most_common(4))
        lines = [
            f"families: {len(self.families)} (one base model, the same modules and ranks)",
            f"duplicates: {copies}" if copies else "",
            f"unusual in their family: {len(self.unusual)}" if self.unusual else "",
            f"adapters that servers would scale wrongly: {served}" if served else "",
        ]
        return tuple(line for line in lines if line)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Look at a broken adapter and at a near duplicate, and compress the adapter with the largest waste."""
        steps = []
        if self.broken and (path := shell_argument(self.broken[0].path)):
            steps.append(f"lorakit audit {path}")
        near = [(group, each) for group in self.duplicates for each in group.duplicates if each.kind == "near"]
        if near:
            paths = [shell_argument(near[0][0].path), shell_argument(near[0][1].path)]
            if all(paths):
                steps.append(f"lorakit compare {paths[0]} {paths[1]}")
        wasteful = [row for row in self._by_waste if row.waste_bytes and row.peft_type == "LORA" and not row.has_errors]
        if wasteful and (path := shell_argument(wasteful[0].path)):
            beside = shell_argument(wasteful[0].path, "-compressed")
            steps.append(f"lorakit compress {path} {beside} --energy {WASTE_ENERGY:g}")
        return tuple(steps)

    @property
    def has_errors(self) -> bool:
        """Whether an adapter cannot be read, or has a finding of severity error."""
        return any(row.has_errors for row in self.adapters)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """One finding for each kind that adapters have: how many have it, and the first of them."""
        having: dict[tuple[Any, str], list[str]] = {}
        for row in self.adapters:
            if row.error_type is not None:
                having.setdefault(("error", "unreadable"), []).append(f"{row.path}: {row.error_type}: {row.error}")
            for each in row.findings:
                having.setdefault((each.severity, each.code), []).append(f"{row.path}: {each.message}")
        return ordered(
            Finding(severity, code, None, f"in {_plural(len(found), 'adapter')}, such as {found[0]}")
            for (severity, code), found in having.items()
        )

    @property
    def broken(self) -> tuple[FleetAdapter, ...]:
        """The adapters that cannot be read."""
        return tuple(row for row in self.adapters if row.broken)

    @property
    def unusual(self) -> tuple[FleetAdapter, ...]:
        """The adapters that are outliers in their family."""
        return tuple(row for row in self.adapters if row.unusual)

    @property
    def families(self) -> dict[str, tuple[FleetAdapter, ...]]:
        """The adapters by family, the largest family first."""
        found: dict[str, list[FleetAdapter]] = {}
        for row in self.adapters:
            if row.family is not None:
                found.setdefault(row.family, []).append(row)
        return {name: tuple(found[name]) for name in sorted(found, key=lambda name: (-len(found[name]), name))}

    @property
    def size_bytes(self) -> int:
        """The size of all adapters that can be read."""
        return sum(row.size_bytes or 0 for row in self.adapters)

    @property
    def waste_bytes(self) -> int:
        """What cuts that keep 99 % of each update's energy would save in all adapters."""
        return sum(row.waste_bytes or 0 for row in self.adapters)

    @property
    def copied_bytes(self) -> int:
        """The size of the adapters that have the files or the update of another one."""
        sizes = {row.path: row.size_bytes or 0 for row in self.adapters}
        return sum(sizes[each.path] for group in self.duplicates for each in group.duplicates if each.kind in _COPIES)

    def to_dict(self) -> dict[str, Any]:
        """`adapters`, `duplicates`, `summary` and `findings` as JSON data."""
        summary = {
            "directory": self.directory,
            "shard": self.shard,
            "near": self.near,
            "adapters": len(self.adapters),
            "broken": len(self.broken),
            "size_bytes": self.size_bytes,
            "waste_bytes": self.waste_bytes,
            "copied_bytes": self.copied_bytes,
            "families": {name: len(rows) for name, rows in self.families.items()},
        }
        data: dict[str, Any] = plain(
            {
                "adapters": [asdict(row) for row in self.adapters],
                "duplicates": [asdict(group) for group in self.duplicates],
                "summary": summary,
                "findings": [asdict(finding) for finding in self.findings],
            }
        )
        return data

    def rows(self) -> list[dict[str, Any]]:
        """One row for each adapter; percentiles have columns of their own, findings are their codes."""
        return [_flat(row) for row in self.adapters]

    def tables(self) -> list[Table]:
        tables = [
            Table.of("Families", _FAMILY, [*self.families.items()][:_SHOWN], note=_more(len(self.families))),
            self._table("Largest waste first", _WASTE, [row for row in self._by_waste if row.waste_bytes]),
            self._table("Unusual in their family", _UNUSUAL, self.unusual),
            self._duplicates(),
            self._table("Cannot be read", _BROKEN, self.broken),
        ]
        return [table for table in tables if table.rows]

    def plot(self) -> Figure:
        """Norm and utilization of each adapter by family, unusual ones circled, beside the share that is waste."""
        rows = [row for row in self.adapters if row.frobenius_norm and row.utilization is not None]
        if not rows:
            return message_figure(title_name(self.title), "no adapter has a finite update")
        figure = new_figure(11, 4.5)
        figure.suptitle(title_name(self.title), fontsize=10)
        left, right = figure.subplots(1, 2)
        families = list(self.families)
        for i, name in enumerate([*families[:_COLORED], None]):
            mine = [row for row in rows if (row.family if row.family in families[:_COLORED] else None) == name]
            if mine:
                label = title_name(name or "other families")
                left.scatter(
                    [row.utilization for row in mine],
                    [row.frobenius_norm for row in mine],
                    s=12,
                    color=f"C{i}",
                    label=label,
                )
        outliers = [row for row in rows if row.unusual]
        left.scatter(
            [row.utilization for row in outliers],
            [row.frobenius_norm for row in outliers],
            s=60,
            facecolors="none",
            edgecolors="black",
            label="unusual",
        )
        left.set(xlabel="mean utilization (stable rank / r)", ylabel=r"$\|\Delta W\|_F$ of all modules", yscale="log")
        left.legend(fontsize=7)
        right.hist([100 * (row.waste_share or 0.0) for row in rows], bins=20, range=(0, 100))
        right.set(xlabel=f"% of bytes that a cut at {WASTE_ENERGY:.0%} energy saves", ylabel="adapters")
        return figure

    @property
    def _by_waste(self) -> list[FleetAdapter]:
        return sorted(self.adapters, key=lambda row: -(row.waste_bytes or 0))

    @property
    def _copies(self) -> int:
        return sum(each.kind in _COPIES for group in self.duplicates for each in group.duplicates)

    def _name(self, path: str) -> str:
        return path if self.directory is None else os.path.relpath(path, self.directory)

    def _table(
        self, title: str, columns: Sequence[tuple[str, Callable[[FleetAdapter], str]]], rows: Sequence[FleetAdapter]
    ) -> Table:
        named = [("adapter", lambda row: self._name(row.path)), *columns]
        return Table.of(title, named, rows[:_SHOWN], note=_more(len(rows)))

    def _duplicates(self) -> Table:
        pairs = [(group.path, each) for group in self.duplicates for each in group.duplicates]
        rows = tuple(
            (
                self._name(each.path),
                self._name(path),
                each.kind.replace("_", " "),
                "" if each.cosine is None else f"{each.cosine:.4f}",
                number(each.norm_ratio),
            )
            for path, each in pairs[:_SHOWN]
        )
        return Table("Duplicates", ("adapter", "of", "what", "cosine", "norm ratio"), rows, _more(len(pairs)))


def _plural(n: int, word: str, several: str = "") -> str:
    return f"{n:,} {word if n == 1 else several or f'{word}s'}"


def _more(n: int) -> str:
    return f"… and {n - _SHOWN} more: see `to_frame()` or `to_dict()`." if n > _SHOWN else ""


def _flat(row: FleetAdapter) -> dict[str, Any]:
    flat = asdict(row)
    low, high = flat.pop("ranks") or (None, None)
    findings = flat.pop("findings")
    percentiles = flat.pop("percentiles")
    flat |= {"min_rank": low, "max_rank": high}
    for severity in ("error", "warning", "info"):
        flat[f"{severity}s"] = [finding["code"] for finding in findings if finding["severity"] == severity]
    flat |= {f"{metric}_percentile": percentiles.get(metric) for metric in METRICS}
    return {key: plain(value) for key, value in flat.items()}


def _outlier(row: FleetAdapter) -> str:
    return ", ".join(f"{metric} {number(getattr(row, metric))}" for metric in row.unusual)


_FAMILY: list[tuple[str, Callable[[tuple[str, tuple[FleetAdapter, ...]]], str]]] = [
    ("family", lambda item: item[0]),
    ("adapters", lambda item: f"{len(item[1])}"),
    ("size", lambda item: size(sum(row.size_bytes or 0 for row in item[1]))),
    ("waste", lambda item: size(sum(row.waste_bytes or 0 for row in item[1]))),
    ("unusual", lambda item: f"{sum(bool(row.unusual) for row in item[1])}"),
]
_WASTE: list[tuple[str, Callable[[FleetAdapter], str]]] = [
    ("size", lambda row: size(row.size_bytes or 0)),
    ("waste", lambda row: size(row.waste_bytes or 0)),
    ("share", lambda row: share(row.waste_share)),
    ("r", lambda row: extent(row.ranks)),
    ("parameters", lambda row: count(row.parameters or 0)),
]
_UNUSUAL: list[tuple[str, Callable[[FleetAdapter], str]]] = [
    ("what", _outlier),
    ("percentile", lambda row: ", ".join(f"{row.percentiles[metric]:.0f}" for metric in row.unusual)),
]
_BROKEN: list[tuple[str, Callable[[FleetAdapter], str]]] = [
    ("error", lambda row: row.error_type or ""),
    ("message", lambda row: (row.error or "")[:200]),
]
