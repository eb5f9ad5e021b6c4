"""The record of an edit that is written beside an edited adapter when it is saved.

PEFT saves an adapter's config through the config's own `save_pretrained`, in the adapter's own directory and on the
main process alone: that is where the record belongs, so the config of an edited adapter is of a class that writes it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel

from lorakit.tuners.fisherlora import FisherLoRAConfig
from lorakit.tuners.speclora import SpecLoRAConfig

if TYPE_CHECKING:
    from lorakit.surgery._reweight import SurgeryReport

RECORD_NAME = "lorakit_surgery.json"


class _WritesRecord(LoraConfig):
    """The part that an edited adapter's config adds to its class."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        edits = self.__dict__.get("_lorakit_edits", [])
        path = Path(save_directory, RECORD_NAME)
        if not edits:
            path.unlink(missing_ok=True)
            return
        partial = path.with_name(f".{RECORD_NAME}.{os.getpid()}")
        partial.write_text(json.dumps({"edits": edits}))
        partial.replace(path)


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
    edits = [*config.__dict__.get("_lorakit_edits", []), _record(report)]
    if type(config) in _EDITED:
        config.__class__ = _EDITED[type(config)]
    config.__dict__["_lorakit_edits"] = edits


def remove_record(adapter: PeftModel, adapter_name: str, report: SurgeryReport) -> None:
    """Forget an edit that has been undone."""
    config = adapter.peft_config.get(adapter_name)
    if config is not None:
        edits = config.__dict__.get("_lorakit_edits", [])
        config.__dict__["_lorakit_edits"] = [edit for edit in edits if edit["edit_id"] != report.edit_id]


def _record(report: SurgeryReport) -> dict[str, Any]:
    """The report with its numbers rounded to six digits, which keeps the file small."""
    record = report.to_dict()
    for row in record["modules"]:
        for key, value in row.items():
            if isinstance(value, list):
                row[key] = [float(f"{number:.6g}") for number in value]
    return record
