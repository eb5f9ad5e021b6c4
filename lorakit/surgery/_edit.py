"""An edit that was made: what it did, undoing it, and saving the adapter with a record of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor

from lorakit._distributed.fsdp import is_sharded
from lorakit._report import Report
from lorakit._signals import uninterrupted
from lorakit.adapters.atomic import replaced_directory
from lorakit.adapters.companions import CERTIFICATE_NAME, check_overwrite, companions_of
from lorakit.adapters.edit_log import read_edits, write_edits
from lorakit.adapters.in_model import LiveModule, read_weight, write_weight
from lorakit.calibration.state import no_inference_mode
from lorakit.errors import SurgeryError
from lorakit.surgery._plots import Quantity, component_maps
from lorakit.surgery._report import EditedRow, SensitivityReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Backup:
    """A module's factors (B, A) before and after an edit."""

    module: LiveModule
    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]


class Edit(Report):
    """Base class of the reports of an edit, which can be undone and saved while the factors are as it left them."""

    adapter_name: str
    policy: str
    modules: Sequence[Any]
    _backups: list[Backup]
    _model: PeftModel
    _source: str | None

    @no_inference_mode()
    def undo(self) -> None:
        """Restore the factors that the edited modules had before, bit for bit.

        Raises: SurgeryError, and changes nothing, if the factors are no longer those that the edit wrote: they were
        trained, edited again or loaded since, or the edit is undone already.
        """
        self._check_unchanged("it cannot be undone: undo later edits first; later training would be lost")
        exchange(self._backups, undo=True)

    def record(self) -> dict[str, Any]:
        """The edit as JSON data for the record of edits, with six digits a number to keep the file small."""
        record = self.to_dict()
        for row in record["modules"]:
            for key, value in row.items():
                if isinstance(value, list):
                    row[key] = [float(f"{number:.6g}") for number in value]
        return record

    def save(
        self,
        directory: str | os.PathLike[str],
        *,
        previous: Sequence[Edit | Mapping[str, Any]] | None = None,
        source: str | os.PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Save the edited adapter in `directory`, with a record of the edit (``lorakit_surgery.json``) beside it.

        Args:
            directory: gets the adapter's files, whatever the adapter's name; replaced whole or not at all.
            previous: reports of older edits of this adapter, oldest first, which the record keeps. None: those that are
                recorded beside `source`.
            source: where the adapter was loaded from: tokenizer, chat template and model card beside it are copied.
                None: the path that was edited; a model does not know it.
            overwrite: allow `directory` to be `source`, or to hold an adapter that lorakit did not write.

        On several processes call it in one of them.

        Raises: SurgeryError if the factors are no longer those that the edit wrote, or are sharded; OverwriteError (a
        FileExistsError); OSError if the files cannot be written.
        """
        source = self._source if source is None else source
        check_overwrite(directory, [source], overwrite=overwrite)
        self._check_unchanged("this record would not describe them: save the last edit, with the others as `previous`")
        if any(is_sharded(tensor) for tensor in self._model.parameters()):
            raise SurgeryError(
                "The model is sharded, so one process cannot save the adapter. Save it from a full state dict, then "
                "call lorakit.adapters.edit_log.write_edits(directory, [edit.record()])."
            )
        if previous is None:
            previous = [] if source is None else read_edits(source)
        edits = [edit.record() if isinstance(edit, Edit) else edit for edit in previous]
        with replaced_directory(directory, remove=[CERTIFICATE_NAME]) as beside:
            self._model.save_pretrained(str(beside), selected_adapters=[self.adapter_name])
            own = beside / self.adapter_name  # where PEFT puts an adapter that is not called "default"
            if own.is_dir():
                _move_up(own)
            config = self._model.peft_config[self.adapter_name].to_dict()
            change = f"`surgery` ({self.policy}): {len(self.modules)} modules edited."
            companions_of([source]).write(beside, config, change)
            write_edits(beside, [*edits, self.record()])

    def _check_unchanged(self, consequence: str) -> None:
        for backup in self._backups:
            layer = backup.module.layer
            if self.adapter_name not in layer.lora_A:
                raise SurgeryError(f"Adapter {self.adapter_name!r} is no longer in {backup.module.name!r}.")
            if layer.merged:
                raise SurgeryError(
                    f"Adapters {layer.merged_adapters} are merged into {backup.module.name!r}. Call unmerge_adapter() "
                    f"first: once the factors change, unmerging would no longer restore the weight."
                )
            if not all(map(_same, factors_of(backup.module), backup.after)):
                raise SurgeryError(
                    f"The factors of {backup.module.name!r} are no longer those that this edit wrote, so {consequence}."
                )


@dataclass(frozen=True, repr=False)
class SurgeryReport(SensitivityReport, Edit):
    """What an edit measured and did. It can be undone and saved while the factors are as the edit left them."""

    modules: Sequence[EditedRow]
    edit_id: str
    policy: str
    policy_parameters: dict[str, Any]
    preserve_energy: str
    seed: int
    lorakit_version: str
    _backups: list[Backup] = field(repr=False, compare=False, metadata={"in_memory": True})
    _model: PeftModel = field(repr=False, compare=False, metadata={"in_memory": True})
    _source: str | None = field(default=None, repr=False, compare=False, metadata={"in_memory": True})

    @property
    def headline(self) -> str:
        """Which policy edited how many modules."""
        return f"{self.title}: {self.policy} edited {len(self.modules)} modules, {self.num_examples} examples"

    @property
    def details(self) -> tuple[str, ...]:
        """The range of the gates, what was preserved, and what was left out."""
        gates = [gate for row in self.modules for gate in row.gate]
        lines = [f"gates from {min(gates):.3f} to {max(gates):.3f}"] if gates else []
        energy = "not preserved" if self.preserve_energy == "none" else f"{self.preserve_energy} norm preserved"
        return (*lines, f"energy: {energy}; sensitivity: {self.aggregate}; seed: {self.seed}", *super().details)

    @property
    def next_steps(self) -> tuple[str, ...]:
        """Python code that saves the edit, undoes it, and makes its control."""
        if not self.modules:
            return ()
        steps = ['edit.save("edited-adapter/")', "edit.undo()"]
        if self.policy != "random_index":
            steps.append('import lorakit; control = lorakit.surgery.reweight(model, loader, policy="random_index")')
        return tuple(steps)

    def plot(self) -> Figure:
        """Maps of each component's relative sensitivity and gate, with one panel for each role."""
        gates = Quantity("gate", lambda row: row.gate, center=1.0)
        return component_maps(self.headline, self.modules, [self.sensitivity_map, gates])


def factors_of(module: LiveModule) -> tuple[Tensor, Tensor]:
    """Copies of a module's factors (B, A)."""
    return read_weight(module.up).clone(), read_weight(module.down).clone()


@uninterrupted
def exchange(backups: Sequence[Backup], *, undo: bool = False) -> None:
    """Write every module's factors of after the edit, or with `undo` of before it; if that fails, write none."""
    try:
        for backup in backups:
            _write(backup.module, backup.before if undo else backup.after)
    except BaseException:
        for backup in backups:
            _write(backup.module, backup.after if undo else backup.before)
        raise


def _write(module: LiveModule, factors: tuple[Tensor, Tensor]) -> None:
    write_weight(module.up, factors[0])
    write_weight(module.down, factors[1])


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.to(b.device), b)


def _move_up(directory: Path) -> None:
    """Move a directory's files into its parent, and remove it."""
    for path in directory.iterdir():
        path.replace(directory.parent / path.name)
    directory.rmdir()
