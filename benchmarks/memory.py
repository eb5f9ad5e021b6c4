"""Peak memory of compress and merge on Llama-3-70B-shaped adapters, beside the size of the files.

    python benchmarks/memory.py [--layers 80] [--rank 16] [--dtype bf16] [--json]

All linear modules (80 layers, d = 8192, 1024 keys and values, 28672 in the MLP); `--layers` makes them fewer. Each
command is a process of its own, and its peak is the largest resident set that the system has seen. The limit is 1.3
times all modules of the largest shape, as they are stored, plus 400 MB; above it the exit status is 1. The commands
verify what they wrote, so a wrong file is an error. Needs about four times the adapter's size on disk, for a while.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from audit import DTYPES

from lorakit.adapters.atomic import WEIGHTS_NAME, write_config
from lorakit.adapters.stream import SafetensorsWriter

SHAPES = {  # (d_out, d_in)
    "self_attn.q_proj": (8192, 8192),
    "self_attn.k_proj": (1024, 8192),
    "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192),
    "mlp.gate_proj": (28672, 8192),
    "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}
COMMANDS = {
    "import": "",
    "compress": "lorakit.compress.truncate(one, out, energy=0.9)",
    "compress, per module": "lorakit.compress.truncate(one, out, budget=budget, per_module=True)",
    "merge": "lorakit.merging.merge([one, other], out)",
    "merge, svd": "lorakit.merging.merge([one, other], out, method='svd')",
}
CODE = """
import resource, sys
import torch
import lorakit.compress, lorakit.merging
torch.set_num_threads(1)
one, other, out, budget = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
{command}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def make(directory: Path, layers: int, rank: int, dtype: torch.dtype, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    names = [(f"model.layers.{layer}.{name}", name) for layer in range(layers) for name in SHAPES]
    layout = {}
    for module, name in names:
        d_out, d_in = SHAPES[name]
        for half, shape in (("A", (rank, d_in)), ("B", (d_out, rank))):
            key = f"base_model.model.{module}.lora_{half}.weight"
            layout[key] = torch.empty(shape, dtype=dtype, device="meta")
    directory.mkdir()
    with SafetensorsWriter(directory / WEIGHTS_NAME, layout) as writer:
        for key, tensor in layout.items():
            writer.write(key, (0.02 * torch.randn(tensor.shape, generator=generator)).to(dtype))
    leaves = [name.rpartition(".")[2] for name in SHAPES]
    write_config(directory, {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": leaves})
    return directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=80)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--only", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtype = DTYPES[options.dtype]
    of_a_shape: dict[tuple[int, int], int] = {}
    for d_out, d_in in SHAPES.values():
        stored = options.layers * options.rank * (d_out + d_in) * dtype.itemsize
        of_a_shape[d_out, d_in] = of_a_shape.get((d_out, d_in), 0) + stored
    budget = options.layers * options.rank // 2 * sum(map(sum, SHAPES.values()))
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as place:
        adapters = [make(Path(place, f"a{i}"), options.layers, options.rank, dtype, i) for i in (0, 1)]
        size = (adapters[0] / WEIGHTS_NAME).stat().st_size
        for name in options.only:
            arguments = [*map(str, adapters), str(Path(place, "out")), str(budget)]
            command = [sys.executable, "-W", "ignore", "-c", CODE.format(command=COMMANDS[name]), *arguments]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            peaks[name] = int(done.stdout)
    limit = 1.3 * max(of_a_shape.values()) + 400e6
    result: dict[str, Any] = {"file": size, "limit": limit, "peaks": peaks}
    if options.json:
        print(json.dumps({"torch": torch.__version__, **vars(options), **result}))
    else:
        print(f"{options.layers} layers, r = {options.rank}, {options.dtype}: file {size / 1e6:.0f} MB")
        for name, peak in peaks.items():
            print(f"  {name:<22} {peak / 1e6:6.0f} MB at most (limit {limit / 1e6:.0f} MB)")
    above = [name for name, peak in peaks.items() if peak > limit]
    if above:
        raise SystemExit(f"above the limit: {', '.join(above)}")


if __name__ == "__main__":
    main()
