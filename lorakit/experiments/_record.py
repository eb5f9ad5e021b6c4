"""Finished runs in a JSON file, so that an interrupted experiment continues where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from peft import PeftConfig

# Fields that PEFT fills in when it meets a model, or that say nothing about the training.
_INCIDENTAL = ("base_model_name_or_path", "peft_version", "auto_mapping", "inference_mode", "revision")


@dataclass(frozen=True)
class SweepRun:
    """One training: the held-out losses of the examples afterwards.

    `train_loss` is the mean training loss of the last tenth of the steps; None if the caller's function trained.
    """

    name: str
    seed: int
    params: int
    losses: tuple[float, ...]
    train_loss: float | None


@dataclass
class RunRecord:
    """Finished runs by (name, seed), the losses without an adapter, and the file that keeps them, if any."""

    path: Path | None
    settings: dict[str, Any]
    configs: dict[str, Any]
    base: list[float] | None
    runs: dict[tuple[str, int], SweepRun]

    @classmethod
    def open(cls, path: Any, settings: dict[str, Any], configs: Mapping[str, PeftConfig]) -> RunRecord:
        """The record in `path`, or a new one. Raises: ValueError for other settings or configs, and for other files."""
        plain = {name: _plain(config) for name, config in configs.items()}
        if path is None or not Path(path).exists():
            record = cls(None if path is None else Path(path), settings, plain, None, {})
            if record.path is not None and not record.path.parent.is_dir():
                raise ValueError(
                    f"`path` must be in a directory that exists; {os.fspath(record.path.parent)!r} does not."
                )
            return record
        try:
            kept = json.loads(Path(path).read_text(encoding="utf-8"))
            kept_settings, kept_configs, base = dict(kept["settings"]), dict(kept["configs"]), list(kept["base"])
            runs = [SweepRun(**run | {"losses": tuple(run["losses"])}) for run in kept["runs"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"`path` must be a new file, or one that an earlier sweep wrote; {os.fspath(path)!r} is neither."
            ) from error
        differing = _differences(kept_settings, settings)
        for name, config in plain.items():
            differing += _differences(kept_configs.get(name, config), config, f" of {name!r}")
        if differing:
            raise ValueError(
                f"`path` holds runs with other settings: {'; '.join(differing)}. Use another file, or the same "
                f"settings."
            )
        return cls(Path(path), settings, kept_configs | plain, base, {(run.name, run.seed): run for run in runs})

    def set_base(self, losses: list[float]) -> None:
        self.base = losses
        self._write()

    def add(self, run: SweepRun) -> None:
        self.runs[run.name, run.seed] = run
        self._write()

    def _write(self) -> None:
        """Write beside the file, then exchange the two, so that the file is never half-written."""
        if self.path is None:
            return
        kept = {
            "settings": self.settings,
            "configs": self.configs,
            "base": self.base,
            "runs": [asdict(run) for run in self.runs.values()],
        }
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            temporary.write_text(json.dumps(kept, indent=1, allow_nan=False), encoding="utf-8")
            temporary.replace(self.path)
        finally:
            temporary.unlink(missing_ok=True)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    return [
        f"{key}{where} {before.get(key)!r}, now {now.get(key)!r}"
        for key in {**now, **before}
        if before.get(key) != now.get(key)
    ]


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
