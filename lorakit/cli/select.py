"""``lorakit select``: ranks by measurement, under a budget."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lorakit import evaluation, experiments
from lorakit.adapters.atomic import replaced_directory
from lorakit.cli._data import DATA_HELP, BatchSize, Length, NumExamples, named_targets, read_examples
from lorakit.cli._executors import Backend, ShardOf, Workers, executor_of
from lorakit.cli._models import Device, Dtype, FourBit, Revision, Trust, load_options
from lorakit.cli._output import EXIT_CODES, print_json, print_lines, show
from lorakit.evaluation._models import training_tokenizer
from lorakit.lens.render.html import write_html

Model = Annotated[str, typer.Argument(help="A causal language model: a path or Hub id, with its tokenizer.")]
DataSource = Annotated[str, typer.Argument(help=DATA_HELP)]
Tasks = Annotated[list[str], typer.Option("--task", help="An in-domain set, as in `lorakit evaluate`.")]
Shifted = Annotated[list[str] | None, typer.Option("--shifted", help="A set under shift, as in `lorakit evaluate`.")]
Budget = Annotated[str, typer.Option(help="Parameters (2M), bytes (4MB), or a fraction of rank --rank (0.625).")]
Tolerance = Annotated[float, typer.Option(help="How much worse than the best a rank may be, in the scores' units.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of each training.")]
LearningRate = Annotated[float, typer.Option(help="Of each training.")]
TargetModules = Annotated[str, typer.Option(help="Names with commas between, or all-linear.")]
Seeds = Annotated[int, typer.Option(min=1, help="Trainings of each config: 1, or at least 3.")]
StopEvery = Annotated[
    int | None, typer.Option(min=1, help="Early stopping: compare on the shifted sets every so many steps.")
]
Cheap = Annotated[bool, typer.Option("--cheap", help="Probe and prior only: nothing is trained.")]
Records = Annotated[
    str | None, typer.Option(help="A directory that keeps every training, so that the same command goes on.")
]
Out = Annotated[Path | None, typer.Option(help="Write adapter_config.json into this directory.")]


def select(
    model: Model,
    data: DataSource,
    task: Tasks,
    budget: Budget,
    tolerance: Tolerance,
    steps: Steps,
    learning_rate: LearningRate = 2e-4,
    shifted: Shifted = None,
    ranks: Annotated[str, typer.Option(help="Ranks of the sweep, with commas between.")] = "4,8,16,64",
    by: Annotated[Literal["role", "layer", "module"], typer.Option(help="What shares a marginal gain.")] = "role",
    target_modules: TargetModules = "all-linear",
    rank: Annotated[int, typer.Option(min=1, help="The template's rank.")] = 16,
    lora_alpha: Annotated[
        int | None, typer.Option(min=1, help="The template's alpha; default: twice the rank.")
    ] = None,
    seeds: Seeds = 3,
    alpha: Annotated[float, typer.Option(help="Level of each one-sided bound.")] = 0.05,
    num_examples: NumExamples = 16,
    length: Length = 256,
    batch_size: BatchSize = 8,
    columns: Annotated[str | None, typer.Option(help="As in `lorakit probe`.")] = None,
    stop_every: StopEvery = None,
    cheap: Cheap = False,
    records: Records = None,
    backend: Backend = "local",
    workers: Workers = None,
    shard: ShardOf = None,
    out: Out = None,
    html: Annotated[str | None, typer.Option(help="Write the report as an HTML page.")] = None,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Choose ranks by training: exit code 0 a rank is enough, 1 none in the budget, 2 bad input, 3 else."""
    options = load_options(device, dtype, load_in_4bit, revision, trust_remote_code)
    elsewhere = _elsewhere(backend, workers, options)
    sweep = _ranks(ranks)
    base: Any = model if elsewhere else evaluation.load_base(model, options)
    tokenizer = training_tokenizer(model, options)
    examples = read_examples(data, tokenizer, columns, length=length, batch_size=batch_size)
    with executor_of(backend, workers) as executor:
        found = experiments.select_ranks(
            base, _template(rank, lora_alpha, target_modules), examples, tasks=task, shifted=shifted or (),
            budget=budget, tolerance=tolerance, steps=steps, batch_size=batch_size, learning_rate=learning_rate,
            ranks=sweep, by=by, cheap=cheap, seeds=tuple(range(seeds)), alpha=alpha, num_examples=num_examples,
            stop_every=stop_every, tokenizer=tokenizer, records=records, executor=executor, shard=shard,
        )  # fmt: skip
    if not isinstance(found, experiments.RankSelection):
        if as_json:
            print_json({"verdict": "INCONCLUSIVE", "missing": list(found.missing)})
        else:
            print_lines(f"{len(found.missing)} trainings are missing: run the other shards, then this one again.")
        raise typer.Exit(EXIT_CODES["INCONCLUSIVE"])
    _write(found, model, out, html)
    show(found, as_json)
    raise typer.Exit(EXIT_CODES[found.verdict])


def _elsewhere(backend: str, workers: int | None, options: evaluation.LoadOptions) -> bool:
    """Whether other processes train, which load the model as it is stored."""
    elsewhere = backend == "ray" or (workers or 1) > 1
    if elsewhere and options != evaluation.LoadOptions():
        raise typer.BadParameter(
            "other processes load the model as it is stored: leave out the model's options, or this one.",
            param_hint="--backend, --workers",
        )
    return elsewhere


def _template(rank: int, lora_alpha: int | None, targets: str) -> Any:
    from peft import LoraConfig

    alpha = 2 * rank if lora_alpha is None else lora_alpha
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=named_targets(targets), task_type="CAUSAL_LM")


def _write(found: experiments.RankSelection, model: str, out: Path | None, html: str | None) -> None:
    if out is not None:
        config = found.to_config()
        config.base_model_name_or_path = model
        with replaced_directory(out) as directory:
            config.save_pretrained(str(directory))
    if html is not None:
        write_html(found, html)


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise typer.BadParameter("must be ranks with commas between, such as 4,8,16.", param_hint="--ranks") from None
