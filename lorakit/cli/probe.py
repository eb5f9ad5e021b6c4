"""``lorakit probe``: the Fisher information of a model's modules, and ranks for them under a budget."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorakit import evaluation, fisher
from lorakit._format import visible
from lorakit.adapters.atomic import replaced_directory
from lorakit.allocation import masks_from_probe, ranks_from_probe
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


class MethodName(StrEnum):
    """What the probe decides: ranks, or the ks of SpecLoRA's masks."""

    fisherlora = "fisherlora"
    speclora = "speclora"


class ModeName(StrEnum):
    """What a mask of SpecLoRA's rescales."""

    hadamard = "hadamard"
    hadamard_bottom = "hadamard_bottom"
    svd = "svd"
    svd_bottom = "svd_bottom"


class TypeName(StrEnum):
    """The type of the config that is written."""

    fisherlora = "fisherlora"
    lora = "lora"


class RuleName(StrEnum):
    """The rules that a probe can serve; "energy" needs a trained adapter's spectra."""

    fisher = "fisher"
    fisherlora = "fisherlora"
    spectral = "spectral"
    prior = "prior"
    uniform = "uniform"


Model = Annotated[str, typer.Argument(help="A causal language model: a path or Hub id.")]
DataSource = Annotated[str, typer.Argument(help=DATA_HELP)]
TargetModules = Annotated[
    str | None, typer.Option(help="Names with commas between, or all-linear; default: query and value.")
]
Method = Annotated[MethodName, typer.Option(help="Decide ranks (fisherlora), or the ks of masks (speclora).")]
Mode = Annotated[ModeName, typer.Option(help="What SpecLoRA's masks rescale.")]
Rule = Annotated[
    RuleName | None,
    typer.Option(
        help="How ranks follow from the measurements; default fisherlora where query and value projections are "
        "probed, else fisher.",
        show_default=False,
    ),
]
Budget = Annotated[
    float | None,
    typer.Option(
        help="Fraction of a uniform rank's parameters (default 0.625), or of a uniform k's (default 1).",
        show_default=False,
    ),
]
Params = Annotated[int | None, typer.Option(min=1, help="The budget as a number of parameters instead.")]
Rank = Annotated[int, typer.Option(min=1, help="The uniform rank that the budget is a fraction of.")]
MaskSize = Annotated[int, typer.Option(min=1, help="The uniform k that the budget of masks is a fraction of.")]
MinRank = Annotated[int, typer.Option(min=1, help="The smallest rank of a module.")]
MaxRank = Annotated[int | None, typer.Option(min=1, help="The largest rank of a module.", show_default=False)]
PerRole = Annotated[bool, typer.Option("--per-role", help="One rank for all modules of a role.")]
ConfigType = Annotated[TypeName, typer.Option("--type", help="The type of the written config of ranks.")]
Seed = Annotated[int, typer.Option(help="Seed of the temporary adapter.")]
Out = Annotated[Path | None, typer.Option(help="Write adapter_config.json into this directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print report and ranks as JSON on stdout.")]


def probe(
    model: Model,
    data: DataSource,
    target_modules: TargetModules = None,
    num_examples: NumExamples = 16,
    start: Start = 0,
    shuffle_seed: ShuffleSeed = None,
    length: Length = 256,
    batch_size: BatchSize = 8,
    columns: Columns = None,
    split: Split = None,
    method: Method = MethodName.fisherlora,
    mode: Mode = ModeName.hadamard,
    rule: Rule = None,
    budget: Budget = None,
    params: Params = None,
    rank: Rank = 16,
    k: MaskSize = 200,
    min_rank: MinRank = 1,
    max_rank: MaxRank = None,
    per_role: PerRole = False,
    config_type: ConfigType = TypeName.fisherlora,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Measure the Fisher information of a model's modules, and give them ranks or ks under a budget."""
    masks = method is MethodName.speclora
    if masks and (rule or max_rank or min_rank > 1 or per_role or config_type is TypeName.lora):
        raise typer.BadParameter(
            "do not apply to --method speclora, which decides ks.",
            param_hint="--rule, --min-rank, --max-rank, --per-role, --type",
        )
    ranks = {"r": rank, "min_rank": min_rank, "max_rank": max_rank, "per": "role" if per_role else "module"}
    settings = {"k": k} if masks else {"rule": rule and rule.value, **ranks}
    plan = _Plan(model, masks, _budget(budget, params) | settings, rank, config_type is TypeName.lora, out)
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    tokenizer = tokenizer_for(model, revision=revision, trust_remote_code=trust_remote_code)
    chosen = {"num_examples": num_examples, "shuffle_seed": shuffle_seed, "start": start, "split": split}
    batches = read_examples(data, tokenizer, columns, length=length, batch_size=batch_size, **chosen)
    report = fisher.probe(
        evaluation.load_base(model, options),
        batches,
        target_modules=named_targets(target_modules),
        num_examples=num_examples,
        seed=seed,
        method=method.value,
        mode=mode.value,
    )
    allocation, warned = plan.carried_out(report)
    if as_json:
        print_json({"report": report.to_dict(), "allocation": allocation.to_dict(), "data": batches.report.to_dict()})
    else:
        print_lines(*_lines(report, allocation, batches.report, out))
    for text in warned:
        sys.stderr.write(f"lorakit: warning: {visible(text)}\n")


@dataclass(frozen=True)
class _Plan:
    """What becomes of a probe's report. `settings` are the arguments of `ranks_from_probe` or `masks_from_probe`."""

    model: str
    masks: bool
    settings: dict[str, Any]
    rank: int
    plain: bool
    out: Path | None

    def carried_out(self, report: Any) -> tuple[Any, list[str]]:
        """The allocation and the warnings about it; with `out`, the config is written there."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            decide: Any = masks_from_probe if self.masks else ranks_from_probe
            allocation = decide(report, **self.settings)
        if self.out is not None:
            config = self._config(report, allocation)
            with replaced_directory(self.out) as directory:
                config.save_pretrained(str(directory))
        return allocation, [str(warning.message) for warning in caught]

    def _config(self, report: Any, allocation: Any) -> Any:
        fields: dict[str, Any] = {
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self.model,
            "target_modules": list(report.target_modules),
        }
        if self.plain:
            return allocation.to_config(r=self.rank, **fields)
        from lorakit import FisherLoRAConfig, SpecLoRAConfig

        if self.masks:
            shape = {"r": self.rank, "lora_alpha": 2 * self.rank}
            return SpecLoRAConfig.from_probe(report, **self.settings, **shape, **fields)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `carried_out` has caught them already
            return FisherLoRAConfig.from_probe(report, **self.settings, **fields)


def _budget(budget: float | None, params: int | None) -> dict[str, Any]:
    if budget is not None and params is not None:
        raise typer.BadParameter(
            "give a fraction or a number of parameters, not both.", param_hint="--budget, --params"
        )
    if budget is not None and not 0 < budget <= 1:
        raise typer.BadParameter("must be a fraction in (0, 1].", param_hint="--budget")
    return {"budget": budget, "params": params}


def _lines(report: Any, allocation: Any, data: DataReport, out: Path | None) -> list[str]:
    scored = "mean squared gradient of lora_B's entries"
    if report.mode is not None:
        scored = f"S(k), the summed squared gradient of d ({report.mode})"
    lines = [*allocation.explain().splitlines(), f"score: {scored}, {report.num_examples} examples"]
    ratio, interval = report.vq_ratio, report.vq_interval
    if ratio is not None:
        bounds = "" if interval is None else f" (90 % interval {interval[0]:.3g} to {interval[1]:.3g})"
        lines.append(f"V/Q ratio: {ratio.value:.3g}{bounds}")
    lines += [f"data: {data.headline}", *data.details]
    if out is not None:
        lines.append(f"written: {out / 'adapter_config.json'}")
    return lines
