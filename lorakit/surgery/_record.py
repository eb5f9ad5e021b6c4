"""The record of an edit that is written beside an edited adapter when it is saved.

PEFT saves an adapter's config through the config's own `save_pretrained`, in the adapter's own directory and on the
main process alone: that is where the record belongs, so the config of an edited adapter is of a class that writes it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel

from lorakit.adapters.edit_log import edits_of, set_edits, write_record
from lorakit.tuners.fisherlora import FisherLoRAConfig
from lorakit.tuners.speclora import SpecLoRAConfig

if TYPE_CHECKING:
    from lorakit.surgery._reweight import SurgeryReport


class _WritesRecord(LoraConfig):
    """The part that an edited adapter's config adds to its class."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        write_record(save_directory, self)


class EditedLoraConfig(_WritesRecord):
    pass


class EditedFisherLoRAConfig(_WritesRecord, FisherLoRAConfig):
    pass


class EditedSpecLoRAConfig(_WritesRecord, SpecLoRAConfig):
    pass


_EDITED: dict[type, type] = {
    LoraConfig: EditedLoraConfig,
    FisherLoRAConfig: EditedFisherLoRAConfig,
    SpecLoRAConfig: EditedSpecLoRAConfig,
}


def add_record(adapter: PeftModel, adapter_name: str, report: SurgeryReport) -> None:
    """Have `report` written beside the adapter whenever it is saved."""
    config = adapter.peft_config[adapter_name]
    record = json.loads(json.dumps(_rounded(report.to_dict()), default=repr))
    if type(config) in _EDITED:
        config.__class__ = _EDITED[type(config)]
    set_edits(config, [*edits_of(config), record])


def remove_record(adapter: PeftModel, adapter_name: str, report: SurgeryReport) -> None:
    """Forget an edit that has been undone."""
    config = adapter.peft_config.get(adapter_name)
    if config is not None:
        set_edits(config, [edit for edit in edits_of(config) if edit["edit_id"] != report.edit_id])


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    """With six digits a number, which keeps the file small."""
    for row in record["modules"]:
        for key, value in row.items():
            if isinstance(value, list):
                row[key] = [float(f"{number:.6g}") for number in value]
    return record
