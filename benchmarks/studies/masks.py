"""How far SpecLoRA's masks moved in training: a record from the adapters of a bench.

    python benchmarks/studies/masks.py BENCH_DIRECTORY NAME

BENCH_DIRECTORY holds the `adapters` of `lorakit bench`; the record is `records/speclora/NAME_masks.json`, which keeps
the rows of adapters that are no longer there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

RECORDS = Path(__file__).resolve().parent / "records" / "speclora"


def main() -> None:
    record = RECORDS / f"{sys.argv[2]}_masks.json"
    found = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    for adapter in sorted(Path(sys.argv[1], "adapters").iterdir()):
        tensors = load_file(adapter / "adapter_model.safetensors")
        masks = [values for name, values in tensors.items() if re.search(r"weight_(hadamard|svd)(_bottom)?$", name)]
        if masks:  # they are saved as d − 1
            moved = torch.cat(masks).abs()
            found[adapter.name] = {"mean": float(moved.mean()), "largest": float(moved.max()), "entries": moved.numel()}
    record.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
