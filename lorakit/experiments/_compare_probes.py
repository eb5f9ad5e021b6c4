"""Methods whose ks or ranks come from a probe of the model, and their controls with the same values shuffled."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig, get_peft_model
from torch.utils.data import DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import set_seed

from lorakit._checks import check_integer, check_number
from lorakit.allocation import masks_from_probe, ranks_from_probe, shuffled
from lorakit.calibration.state import preserved_rng, preserved_state
from lorakit.evaluation import LoadOptions
from lorakit.experiments._compare_kinds import inputs_of, loaded, with_head
from lorakit.experiments._preserve import preserved_base
from lorakit.experiments._settings import TrainSettings
from lorakit.experiments._training import batches_of, train_adapter
from lorakit.fisher import probe
from lorakit.naming.patterns import compact_pattern

_PROBE = ("num_examples", "train_steps", "learning_rate")
_ALLOCATION = {
    "SPECLORA": ("budget", "params", "ladder"),
    "FISHERLORA": ("budget", "params", "rule", "min_rank", "max_rank", "per"),
}
_DEFAULTS: dict[str, Any] = {"num_examples": 64, "train_steps": 50}


@dataclass(frozen=True)
class FromProbe:
    """Where a method's ks or ranks come from: the probe of the method `of`, which has the `settings`.

    With a `shuffle_seed` they are on random modules, another permutation for each seed of the trainings.
    """

    of: str
    settings: Mapping[str, Any]
    shuffle_seed: int | None = None


def check_probe_settings(where: str, given: Any, config: PeftConfig, learning_rate: float) -> dict[str, Any]:
    """A probe's settings with the defaults: 64 examples, after 50 steps at the method's smallest learning rate.

    Raises: ValueError.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _ALLOCATION:
        raise ValueError(f"`{where}`: `from_probe` is for {' and '.join(_ALLOCATION)}; got {kind}.")
    known = (*_PROBE, *_ALLOCATION[kind])
    if not isinstance(given, Mapping) or not set(given) <= set(known):
        raise ValueError(
            f"`{where}.from_probe` must be the name of another method, or a mapping with any of {', '.join(known)}; "
            f"got {given!r}."
        )
    settings = {**_DEFAULTS, "learning_rate": learning_rate, **given}
    check_integer(f"{where}.from_probe.num_examples", settings["num_examples"])
    check_integer(f"{where}.from_probe.train_steps", settings["train_steps"], least=0)
    check_number(f"{where}.from_probe.learning_rate", settings["learning_rate"], above=0)
    return settings


def probed_values(
    *,
    base: str,
    options: LoadOptions,
    data: Mapping[str, Any],
    config: Any,
    settings: Mapping[str, Any],
    training: Mapping[str, Any],
    seed: int,
) -> dict[str, Any]:
    """Train the method with its uniform config for a few steps, probe it, and allocate: each module's k or rank.

    Returns `values`, the largest value (`limits`) and the parameters of one unit (`costs`) by module.
    """
    found = loaded(data["kind"], base, options, data["num_labels"], seed if data["num_labels"] else 0)
    inputs, _ = inputs_of(
        data["kind"], base, options, json.dumps(data["train"]), tuple(data["left_out"]), data["validation"]
    )
    masks = _has_masks(config)
    steps = settings["train_steps"]
    given = {name: settings[name] for name in settings if name not in (*_PROBE, "ladder")}
    config = with_head(config, found.head)
    with preserved_rng(found.model), preserved_state(found.model), preserved_base(found.model, config):
        set_seed(seed % 2**32)
        adapted = get_peft_model(found.model, copy.deepcopy(config))
        if steps:
            own = {**training, "steps": steps, "warmup_steps": 0, "learning_rate": settings["learning_rate"]}
            train = TrainSettings(**own, collate_fn=inputs.collate_fn, train=None)
            bar = tqdm(disable=True)
            train_adapter(adapted, batches_of(inputs.examples, train, seed, bar), train, seed, "the probe")
        adapted.eval()
        sampler = RandomSampler(inputs.examples, num_samples=settings["num_examples"])
        batches: Any = DataLoader(inputs.examples, 8, sampler=sampler, collate_fn=inputs.collate_fn)  # type: ignore[arg-type]
        more = {"method": "speclora", "mode": config.mode} if masks else {}
        more |= {name: settings[name] for name in ("ladder",) if name in settings}
        report = probe(adapted, batches, num_examples=settings["num_examples"], progress=False, **more)
    costs = {row.module_name: 1 if masks else row.d_out + row.d_in for row in report.modules}
    values = masks_from_probe(report, k=config.k, **given).ks if masks else _ranks(report, config, given)
    limits = {row.module_name: min(row.d_out, row.d_in) for row in report.modules}
    return {"values": values, "limits": limits, "costs": costs, "num_examples": report.num_examples}


def with_values(config: Any, found: Mapping[str, Any], shuffle_seed: int | None) -> Any:
    """A copy of a method's config with the probe's ks or ranks, shuffled if a seed is given.

    Ranks move between modules of equal cost only, so that both have the same number of parameters.
    """
    values = dict(found["values"])
    if shuffle_seed is not None:
        values = shuffled(values, limits=found["limits"], costs=found["costs"], seed=shuffle_seed)
    config = copy.deepcopy(config)
    if _has_masks(config):
        config.k_pattern = compact_pattern(values, {name for name, value in values.items() if value == config.k})
    else:
        config.r_q = config.r_v = config.r
        config.rank_pattern = compact_pattern(values, {name for name, rank in values.items() if rank == config.r})
    return config


def _has_masks(config: Any) -> bool:
    return hasattr(config, "k_pattern")


def _ranks(report: Any, config: Any, given: Mapping[str, Any]) -> dict[str, int]:
    return dict(ranks_from_probe(report, r=config.r, **given).ranks)
