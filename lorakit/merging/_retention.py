"""What a merge keeps of each adapter's task, measured."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from lorakit._checks import check_number
from lorakit.adapters import open_adapter
from lorakit.adapters.atomic import WEIGHTS_NAME, replaced_directory
from lorakit.adapters.companions import CERTIFICATE_NAME
from lorakit.adapters.edit_log import RECORD_NAME
from lorakit.evaluation import LoadOptions, Scores, compare, load_base
from lorakit.evaluation._attach import adapted
from lorakit.evaluation._digests import adapter_digest, base_digest, digest
from lorakit.evaluation._evaluate import scored, tasks_of
from lorakit.evaluation._models import label_of, load_tokenizer
from lorakit.evaluation._task_kinds import Task


@dataclass(frozen=True)
class ScoreDifference:
    """A difference in mean score on the same documents, with one-sided bounds."""

    difference: float
    lower: float
    upper: float

    @classmethod
    def of(cls, reference: Scores, candidate: Scores, alpha: float) -> ScoreDifference:
        """Candidate − reference, each bound at level `alpha`."""
        found = compare(reference, candidate, alpha=alpha)
        return cls(found.difference, found.lower, found.upper)

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}]"


@dataclass(frozen=True)
class TaskRetention:
    """What the merge keeps of one adapter's task; scores are means over `n` documents.

    `gain` is adapter − base, `against_adapter` merge − adapter, `against_base` merge − base, and `against_random`
    merge − random, each paired by document. The random adapter has Gaussian factors and, in every module, the merge's
    ‖ΔW‖_F: it says what a change of this size does by itself. `retention` is (merge − base) / (adapter − base); None
    where the adapter is not shown to gain (the lower bound of `gain` is not above 0).
    """

    adapter: str
    task: str
    n: int
    base: float
    single: float
    merged: float
    random: float
    retention: float | None
    gain: ScoreDifference
    against_adapter: ScoreDifference
    against_base: ScoreDifference
    against_random: ScoreDifference

    @property
    def line(self) -> str:
        """The result in a line."""
        kept = "its adapter shows no gain" if self.retention is None else f"{self.retention:.0%} of the gain kept"
        return (
            f"{self.task} of {self.adapter}: {kept}; base {self.base:.4f}, adapter {self.single:.4f}, merge "
            f"{self.merged:.4f}, random {self.random:.4f}; merge − adapter {self.against_adapter}, merge − random "
            f"{self.against_random} on {self.n} documents"
        )


@dataclass(frozen=True)
class Retaining:
    """The tasks of a merge's adapters, by the adapters' places, and how they are scored."""

    tasks: Mapping[int, tuple[Task, ...]]
    adapters: Sequence[Any]
    base: Any
    alpha: float
    limit: int | None
    cache: str | os.PathLike[str] | None
    options: LoadOptions | None
    tokenizer: Any
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        """Raises: TypeError, ValueError."""
        if self.base is None:
            raise TypeError("`tasks` needs `base`: the base model that the adapters and their merge are scored on.")
        if check_number("alpha", self.alpha, above=0, most=0.5) >= 0.5:
            raise ValueError(f"`alpha` must be below 0.5; got {self.alpha!r}.")
        tasks_of([task for each in self.tasks.values() for task in each])  # refuses two tasks of one name

    def measure(self, merged: Path, random: Path) -> tuple[TaskRetention, ...]:
        """The retention of every task in the merge that is written in `merged`; `random` is made for the control.

        Raises: EvaluationError.
        """
        write_random(merged, random, self.seed)
        model = load_base(self.base, self.options)
        tokenizer = self.tokenizer
        if tokenizer is None:
            tokenizer = load_tokenizer(self.base, self.adapters[0], self.options)
        weights = "" if self.cache is None else base_digest(model)

        def scores_of(adapter: Any, tasks: Sequence[Task]) -> dict[str, Scores]:
            settings: dict[str, Any] = {"limit": self.limit, "cache": self.cache, "progress": self.progress}
            if adapter is None:
                return scored(model, tasks, tokenizer, weights=digest([weights, "base"]), **settings)
            with adapted(model, adapter) as with_adapter:
                if with_adapter is adapter and base_digest(with_adapter) != base_digest(model):
                    raise ValueError(f"{label_of(adapter)}: its base model has other weights than `base`.")
                depends = "" if self.cache is None else digest([weights, adapter_digest(adapter)])
                return scored(with_adapter, tasks, tokenizer, weights=depends, **settings)

        everything = [task for tasks in self.tasks.values() for task in tasks]
        base, merge, control = (scores_of(one, everything) for one in (None, merged, random))
        found = []
        for place, tasks in self.tasks.items():
            single = scores_of(self.adapters[place], tasks)
            name = label_of(self.adapters[place])
            for task in single:
                found.append(_retention(name, base[task], single[task], merge[task], control[task], self.alpha))
        return tuple(found)


def _retention(
    adapter: str, base: Scores, single: Scores, merge: Scores, random: Scores, alpha: float
) -> TaskRetention:
    gain = ScoreDifference.of(base, single, alpha)
    return TaskRetention(
        adapter=adapter,
        task=base.task,
        n=len(base.documents),
        base=base.mean,
        single=single.mean,
        merged=merge.mean,
        random=random.mean,
        retention=(merge.mean - base.mean) / (single.mean - base.mean) if gain.lower > 0 else None,
        gain=gain,
        against_adapter=ScoreDifference.of(single, merge, alpha),
        against_base=ScoreDifference.of(base, merge, alpha),
        against_random=ScoreDifference.of(random, merge, alpha),
    )


def places_of(tasks: Mapping[Any, Any], adapters: Sequence[Any]) -> dict[int, tuple[Task, ...]]:
    """The tasks by the place of their adapter. Raises: TypeError, ValueError for keys that are no adapter of these."""
    if not isinstance(tasks, Mapping) or not tasks:
        raise TypeError("`tasks` must be a mapping from adapters to their tasks, with at least one entry.")
    found = {}
    for key, wanted in tasks.items():
        places = [place for place, adapter in enumerate(adapters) if adapter is key or _path(adapter) == _path(key)]
        if not places:
            names = ", ".join(map(label_of, adapters))
            raise ValueError(f"`tasks` names {label_of(key)!r}, which is not merged here; the adapters are {names}.")
        found[places[0]] = tuple(tasks_of(wanted))
    return found


def _path(adapter: Any) -> Any:
    return os.path.normpath(adapter) if isinstance(adapter, str | os.PathLike) else id(adapter)


@torch.no_grad()
def write_random(adapter: Path, out: Path, seed: int) -> None:
    """An adapter like one on disk with Gaussian factors instead: the same layout, and ‖ΔW‖_F of every module."""
    shutil.copytree(adapter, out)
    generator = torch.Generator().manual_seed(seed)
    file = out / WEIGHTS_NAME
    tensors = load_file(file)
    view = open_adapter(adapter)
    norms = dict(_norms(view))
    for module in view.modules:
        for key in (module.stored.A.key, module.stored.B.key):
            tensors[key] = torch.randn(tensors[key].shape, generator=generator).to(tensors[key].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    random = dict(_norms(open_adapter(out)))
    for module in view.modules:
        key = module.stored.B.key
        tensors[key] = (tensors[key].double() * (norms[module.name] / random[module.name])).to(tensors[key].dtype)
    save_file(tensors, file, metadata={"format": "pt"})


def _norms(view: Any) -> Iterator[tuple[str, float]]:
    with view.source.reader() as read:
        for module in view.modules:
            yield module.name, float(torch.linalg.vector_norm(module.update(read).frobenius_norm().double()))


def place(merged: Path, out: str | os.PathLike[str]) -> None:
    """Put a written merge into `out`, in one step. Raises: OSError; `out` is then as it was."""
    with replaced_directory(out, remove=[RECORD_NAME, CERTIFICATE_NAME]) as new:
        shutil.copytree(merged, new, dirs_exist_ok=True)
