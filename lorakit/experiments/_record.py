"""The runs of a rank sweep in a JSON file, so that an interrupted sweep goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftConfig

# What PEFT writes into a config when it meets a model, or what says nothing of the training.
_INCIDENTAL = ("base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode", "revision")


@dataclass
class SweepRecord:
    """Finished runs by (name, seed), the losses without an adapter, and where they are kept, if anywhere."""

    path: Path | None
    settings: dict[str, Any]
    configs: dict[str, Any]
    base: list[float] | None
    runs: dict[tuple[str, int], dict[str, Any]]

    @classmethod
    def open(cls, path: Any, settings: dict[str, Any], configs: Mapping[str, PeftConfig]) -> SweepRecord:
        """What `path` holds already. Raises: ValueError for other settings or configs, and for another kind of file."""
        plain = {name: _plain(config) for name, config in configs.items()}
        if path is None or not Path(path).exists():
            record = cls(None if path is None else Path(path), settings, plain, None, {})
            if record.path is not None and not record.path.parent.is_dir():
                raise ValueError(
                    f"`path` must lie in a directory that exists; {os.fspath(record.path.parent)!r} does not."
                )
            return record
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            kept_settings, kept_configs, base = dict(kept["settings"]), dict(kept["configs"]), list(kept["base"])
            runs = {(str(run["name"]), int(run["seed"])): dict(run) for run in kept["runs"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"`path` must be a file that a rank sweep wrote; {os.fspath(path)!r} is none.") from error
        differing = [
            f"{key} {kept_settings.get(key)!r}, now {settings.get(key)!r}"
            for key in {**settings, **kept_settings}
            if kept_settings.get(key) != settings.get(key)
        ]
        for name, config in plain.items():
            before = kept_configs.get(name, config)
            differing += [
                f"{key} of {name!r} {before.get(key)!r}, now {config.get(key)!r}"
                for key in {**config, **before}
                if before.get(key) != config.get(key)
            ]
        if differing:
            raise ValueError(
                f"`path` holds runs with other settings: {'; '.join(differing)}. Use another file, or the same "
                f"settings."
            )
        return cls(Path(path), settings, kept_configs | plain, base, runs)

    def set_base(self, losses: list[float]) -> None:
        self.base = losses
        self._write()

    def add(self, run: dict[str, Any]) -> None:
        self.runs[run["name"], run["seed"]] = run
        self._write()

    def _write(self) -> None:
        """Whole or not at all."""
        if self.path is None:
            return
        kept = {
            "settings": self.settings,
            "configs": self.configs,
            "base": self.base,
            "runs": list(self.runs.values()),
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(kept, indent=1, allow_nan=False), encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _plain(config: PeftConfig) -> dict[str, Any]:
    """A config as JSON gives it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, set | frozenset):
            return sorted(value)
        if isinstance(value, Enum):
            return value.value
        return vars(value) if hasattr(value, "__dict__") else str(value)

    kept = {key: value for key, value in config.to_dict().items() if key not in _INCIDENTAL}
    found: dict[str, Any] = json.loads(json.dumps(kept, default=plain, sort_keys=True))
    return found
