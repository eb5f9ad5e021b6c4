"""``lorakit surgery``: spectral surgery on an adapter on disk."""

from __future__ import annotations

from enum import StrEnum
from types import SimpleNamespace
from typing import Annotated

import typer

from lorakit.cli._certified import Alpha, Cache, Guard, Limit, Margin, Task
from lorakit.cli._data import (
    DATA_HELP,
    BatchSize,
    Columns,
    Length,
    NumExamples,
    ShuffleSeed,
    Split,
    Start,
)
from lorakit.cli._models import Base, Device, Dtype, FourBit, Revision, Trust
from lorakit.cli._output import Overwrite
from lorakit.cli._surgery import mode_of, run


class PolicyName(StrEnum):
    smooth_abs = "smooth_abs"
    abs_select = "abs_select"
    grad_direction = "grad_direction"
    double_smooth = "double_smooth"
    z_score = "z_score"
    robust_z = "robust_z"
    random_index = "random_index"


class AggregateName(StrEnum):
    mean_abs = "mean_abs"
    mean = "mean"
    abs_mean = "abs_mean"


class EnergyName(StrEnum):
    l1 = "l1"
    l2 = "l2"
    none = "none"


class ObjectiveName(StrEnum):
    improve = "improve"
    restore = "restore"


Aggregate = Annotated[
    AggregateName | None, typer.Option(help="Over examples; default: what the policy needs.", show_default=False)
]


Refine = Annotated[
    bool, typer.Option("--refine", help="Try several policies; write the best only if it passes --task.")
]
Study = Annotated[
    bool, typer.Option("--study", help="Score many edits on --task and the guards beside random ones; write none.")
]
Modules = Annotated[
    str | None, typer.Option(help="Names with commas between, or all-linear; default: what writes the residual.")
]
Objective = Annotated[ObjectiveName, typer.Option(help="restore: shrink intruder directions as far as --task allows.")]
Controls = Annotated[
    int | None,
    typer.Option(min=19, help="Random edits that it must beat; default: 19, and 20 with --study.", show_default=False),
]
NumSelection = Annotated[int, typer.Option(min=1, help="Examples that choose among edits.")]
BaseText = Annotated[
    str | None, typer.Option(help="With restore: a file of text that the base model is good at.", show_default=False)
]
Scales = Annotated[str, typer.Option(help="With restore: what the directions are multiplied by.")]
Policies = Annotated[str, typer.Option(help="With --refine or --study: names with commas between.")]
Seeds = Annotated[str, typer.Option(help="With --study: seeds of policies, and of which examples a size uses.")]
Sizes = Annotated[str, typer.Option(help="With --study: numbers of calibration examples.")]
ModuleSets = Annotated[
    list[str] | None,
    typer.Option(
        "--module-set",
        metavar="NAME=MODULES",
        help="With --study: a set as all=all-linear, attention=q_proj,v_proj or residual=default; may be repeated.",
    ),
]
Energies = Annotated[str, typer.Option(help="With --study: norms that are preserved.")]
Records = Annotated[
    str | None, typer.Option(help="With --study: a directory that keeps every score, so that the same command goes on.")
]
DataPath = Annotated[str | None, typer.Option(help=DATA_HELP)]
Out = Annotated[str | None, typer.Option(help="Directory to write; may be that of the adapter.")]
PlotsDirectory = Annotated[str | None, typer.Option(help="Also write figures into this directory.")]


def surgery(
    context: typer.Context,
    base: Base,
    adapter: Annotated[str, typer.Option(help="The adapter: a directory or Hub id.")],
    data: DataPath = None,
    out: Out = None,
    policy: Annotated[PolicyName, typer.Option(help="random_index is the control.")] = PolicyName.smooth_abs,
    layers: Annotated[str | None, typer.Option(help="A layer or a range of them: 12, 8-15, 8-; default: all.")] = None,
    modules: Modules = None,
    aggregate: Aggregate = None,
    preserve_energy: Annotated[EnergyName, typer.Option(help="Norm of the spectrum that is kept.")] = EnergyName.l1,
    num_examples: NumExamples = 128,
    start: Start = 0,
    shuffle_seed: ShuffleSeed = None,
    length: Length = 512,
    batch_size: BatchSize = 8,
    columns: Columns = None,
    split: Split = None,
    seed: Annotated[int, typer.Option(help="Seed of policies that draw, and of controls.")] = 0,
    refine: Refine = False,
    objective: Objective = ObjectiveName.improve,
    policies: Policies = "smooth_abs,abs_select,grad_direction",
    controls: Controls = None,
    num_selection: NumSelection = 128,
    base_text: BaseText = None,
    scales: Scales = "0.75,0.5,0.25,0",
    study: Study = False,
    seeds: Seeds = "0",
    sizes: Sizes = "128",
    module_set: ModuleSets = None,
    energies: Energies = "l1",
    records: Records = None,
    task: Task = None,
    margin: Margin = None,
    alpha: Alpha = None,
    guard: Guard = None,
    limit: Limit = None,
    cache: Cache = None,
    overwrite: Overwrite = False,
    device: Device = None,
    dtype: Dtype = "auto",
    load_in_4bit: FourBit = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    html: Annotated[str | None, typer.Option(help="Also write the report as one HTML file.")] = None,
    plots: PlotsDirectory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Reweight the singular values of an adapter's updates by what calibration data says of them.

    With --refine, the exit code is 0 where an edit is kept, 1 where it makes something worse, and 3 where that cannot
    be told.
    """
    given = SimpleNamespace(**{name: value for name, value in locals().items() if name != "context"})
    run(given, mode_of(context, given))
