"""``lorakit probe``: the Fisher information of a model's modules, and ranks for them under a budget."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit import evaluation, fisher
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
from lorakit.cli._output import print_json, print_lines
from lorakit.data import tokenizer_for

if TYPE_CHECKING:
    from lorakit.data import DataReport


class RuleName(StrEnum):
    """The rules that a probe can serve; "energy" needs a trained adapter's spectra."""

    fisher = "fisher"
    fisherlora = "fisherlora"
    spectral = "spectral"
    prior = "prior"
    uniform = "uniform"


def probe(
    model: Annotated[str, typer.Argument(help="A causal language model: a path or Hub id.")],
    data: Annotated[str, typer.Argument(help=DATA_HELP)],
    target_modules: Annotated[
        str | None, typer.Option(help="Names with commas between, or all-linear; default: query and value.")
    ] = None,
    num_examples: NumExamples = 16,
    start: Start = 0,
    shuffle_seed: ShuffleSeed = None,
    length: Length = 256,
    batch_size: BatchSize = 8,
    columns: Columns = None,
    split: Split = None,
    rule: Annotated[RuleName, typer.Option(help="How ranks follow from the measurements.")] = RuleName.fisher,
    budget: Annotated[
        float | None, typer.Option(help="Fraction of uniform rank's parameters; default 0.625.", show_default=False)
    ] = None,
    params: Annotated[int | None, typer.Option(min=1, help="The budget as a number of parameters instead.")] = None,
    rank: Annotated[int, typer.Option(min=1, help="The uniform rank that the budget is a fraction of.")] = 16,
    min_rank: Annotated[int, typer.Option(min=1, help="The smallest rank of a module.")] = 1,
    max_rank: Annotated[int | None, typer.Option(min=1, help="The largest rank of a module.")] = None,
    per_role: Annotated[bool, typer.Option("--per-role", help="One rank for all modules of a role.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the temporary adapter.")] = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    out: Annotated[Path | None, typer.Option(help="Write adapter_config.json into this directory.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print report and ranks as JSON on stdout.")] = False,
) -> None:
    """Measure the Fisher information of a model's modules, and give them ranks under a budget."""
    settings = _settings(budget, params, rule.value, rank, min_rank, max_rank, per_role)
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    batches = read_examples(
        data,
        tokenizer_for(model, revision=revision, trust_remote_code=trust_remote_code),
        columns,
        length=length,
        batch_size=batch_size,
        num_examples=num_examples,
        shuffle_seed=shuffle_seed,
        start=start,
        split=split,
    )
    report = fisher.probe(
        evaluation.load_base(model, options),
        batches,
        target_modules=named_targets(target_modules),
        num_examples=num_examples,
        seed=seed,
    )
    allocation = _allocate(report, settings, model, out)
    if as_json:
        found = {"report": report, "allocation": allocation, "data": batches.report}
        print_json({name: value.to_dict() for name, value in found.items()})
    else:
        print_lines(*_lines(report, allocation, batches.report, out))


def _settings(
    budget: float | None,
    params: int | None,
    rule: str,
    rank: int,
    min_rank: int,
    max_rank: int | None,
    per_role: bool,
) -> dict[str, Any]:
    """The options of `allocation_of`."""
    if budget is not None and params is not None:
        raise typer.BadParameter(
            "give a fraction or a number of parameters, not both.", param_hint="--budget, --params"
        )
    if budget is not None and not 0 < budget <= 1:
        raise typer.BadParameter("must be a fraction in (0, 1].", param_hint="--budget")
    return {
        "budget": budget,
        "params": params,
        "rule": rule,
        "r": rank,
        "min_rank": min_rank,
        "max_rank": max_rank,
        "per": "role" if per_role else "module",
    }


def _allocate(report: Any, settings: dict[str, Any], model_name: str, out: Path | None) -> Any:
    """The ranks under the budget; with `out`, the config that has them is written there."""
    from lorakit.adapters.atomic import replaced_directory
    from lorakit.tuners.fisherlora import FisherLoRAConfig, allocation_of

    allocation = allocation_of(report, **settings)
    if out is not None:
        config = FisherLoRAConfig.from_probe(
            report, **settings, task_type="CAUSAL_LM", base_model_name_or_path=model_name
        )
        with replaced_directory(out) as directory:
            config.save_pretrained(str(directory))
    return allocation


def _lines(report: Any, allocation: Any, data: DataReport, out: Path | None) -> list[str]:
    lines = [
        *allocation.explain().splitlines(),
        f"score: mean squared gradient of lora_B's entries, {report.num_examples} examples",
    ]
    ratio = report.vq_ratio
    if ratio is not None:
        error = "" if ratio.stderr is None else f" ± {ratio.stderr:.2g}"
        lines.append(f"V/Q ratio: {ratio.value:.3g}{error}")
    lines += [f"data: {data.headline}", *data.details]
    if out is not None:
        lines.append(f"written: {out / 'adapter_config.json'}")
    return lines
