"""Tokens a second of llama.cpp: SmolLM2-135M with an adapter at its own ranks, padded to one rank, and cut to a lower.

    python benchmarks/serving.py [--rank 16] [--rank-of-queries 4] [--cut 8] [--rounds 5] [--prompt 128]
        [--generated 32] [--json]

Needs what `make test-servers` installs. The adapter is a FisherLoRA, whose queries and values have another rank; the
base model is in float32. Correctness comes first: llama.cpp's next-token probabilities with each file against PEFT's.
Then the files take turns in one process of one thread, each first in turn, after a round that is not counted. Seconds
are of CPU time. Ratios are of the same round; medians with minimum and maximum. "again" is the file at its own ranks
once more, which says what a ratio is worth.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from audit import spread
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorakit import FisherLoRAConfig
from lorakit.compress import truncate
from lorakit.export import to_lora
from lorakit.serving import write_gguf

ROOT = Path(__file__).resolve().parents[1]
SERVERS = ROOT / "build" / "servers"
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from smollm2_float32 import save_transformers_base, write_gguf_base  # noqa: E402 - it is beside the tests

TEXT = "The library opens at nine every morning, and by ten the reading room is full. "
TOLERANCE = 5e-4
CHECKED = 32  # positions


def node(script: Path, request: Mapping[str, Any]) -> Any:
    """Run a script beside node_modules, and return what it prints."""
    path = shutil.copy(script, SERVERS)
    done = subprocess.run(["node", path], input=json.dumps(request), capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"llama.cpp: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def make_adapter(base: Path, out: Path, options: argparse.Namespace) -> Path:
    """A FisherLoRA with random values, as large as a trained one's."""
    torch.manual_seed(0)
    config = FisherLoRAConfig(
        r=options.rank,
        r_q=options.rank_of_queries,
        lora_alpha=2 * options.rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    model.save_pretrained(out)
    return out


def without_padding(padded: Path, out: Path) -> Path:
    """The same updates at their own ranks. llama.cpp scales by alpha over a tensor's rank, so B has the rest of it."""
    reader = gguf.GGUFReader(padded)
    alpha = reader.get_field(gguf.Keys.Adapter.LORA_ALPHA).contents()
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    tensors = {tensor.name: tensor.data.copy() for tensor in reader.tensors}
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        rank = int(np.flatnonzero(B.any(axis=0)).max()) + 1
        writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(A[:rank]))
        writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(B[:, :rank] * np.float32(rank / B.shape[1])))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@torch.no_grad()
def check(base_gguf: Path, base: Path, directories: Mapping[str, Path], files: Mapping[str, Path], tokens: list[int]):
    """The largest difference of a next-token probability from PEFT's, for each file."""
    ids, vocabulary = tokens[:CHECKED], 49152
    request = {"base": str(base_gguf), "adapters": [[str(path)] for path in files.values()], "tokens": ids}
    encoded = node(ROOT / "tests" / "servers" / "next_token.mjs", request | {"vocabulary": vocabulary})["probabilities"]
    differences = {}
    for name, data in zip(files, encoded, strict=True):
        found = np.frombuffer(base64.b64decode(data), dtype="<f4").reshape(-1, vocabulary)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, directories[name]).eval()
        expected = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1).numpy()
        differences[name] = float(np.abs(found - expected).max())
        if differences[name] > TOLERANCE:
            raise SystemExit(f"{name}: llama.cpp's probabilities differ from PEFT's by {differences[name]:.1e}")
    return differences


def ratios(times: Sequence[float], reference: Sequence[float]) -> dict[str, float]:
    """Tokens a second over those of the reference, round by round."""
    return spread([other / own for own, other in zip(times, reference, strict=True)])


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    base_gguf = write_gguf_base(SERVERS / "smollm2-f32.gguf")
    base = save_transformers_base(SERVERS / "smollm2-f32", base_gguf)
    source = make_adapter(base, scratch / "source", options)
    to_lora(source, scratch / "padded")
    truncate(source, scratch / "cut", max_rank=options.cut)
    directories = {"own ranks": source, "padded": scratch / "padded", "cut": scratch / "cut"}
    files = {name: scratch / f"{name}.gguf" for name in directories}
    for name in ("padded", "cut"):
        write_gguf(directories[name], files[name], base_config=base)
    without_padding(files["padded"], files["own ranks"])
    tokenizer = AutoTokenizer.from_pretrained(base_gguf.parent, gguf_file=base_gguf.name)
    tokens = tokenizer(TEXT * (options.prompt // 16 + 2))["input_ids"][: options.prompt]
    differences = check(base_gguf, base, directories, files, tokens)
    timed: dict[str, Path | None] = {**files, "again": files["own ranks"], "no adapter": None}
    request = {
        "base": str(base_gguf),
        "adapters": [None if path is None else str(path) for path in timed.values()],
        "tokens": tokens,
        "generated": options.generated,
        "rounds": options.rounds,
    }
    times = node(ROOT / "benchmarks" / "serving.mjs", request)
    counts = {"prompt": options.prompt - 1, "generation": options.generated}
    return {
        name: {
            "megabytes": None if path is None else path.stat().st_size / 1e6,
            "difference": differences.get(name),
            **{
                phase: {
                    "tokens_a_second": spread([count / seconds for seconds in times[phase][i]]),
                    "over_own_ranks": ratios(times[phase][i], times[phase][0]),
                }
                for phase, count in counts.items()
            },
        }
        for i, (name, path) in enumerate(timed.items())
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rank-of-queries", type=int, default=4, help="of queries and values")
    parser.add_argument("--cut", type=int, default=8, help="the lower rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--generated", type=int, default=32, help="tokens that are generated")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if not (SERVERS / "node_modules").exists():
        raise SystemExit("node-llama-cpp is not installed; use `make test-servers`")
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(options, Path(scratch))
    if options.json:
        print(json.dumps(vars(options) | {"results": result}))
        return
    for name, row in result.items():
        size = "" if row["megabytes"] is None else f"{row['megabytes']:.1f} MB"
        error = "" if row["difference"] is None else f"|Δp| ≤ {row['difference']:.1e}"
        print(f"{name:10} {size:8} {error}")
        for phase in ("prompt", "generation"):
            rate, ratio = row[phase]["tokens_a_second"], row[phase]["over_own_ranks"]
            print(
                f"  {phase:10} {rate['median']:6.1f} tokens a second ({rate['min']:.1f}–{rate['max']:.1f}),"
                f" × {ratio['median']:.3f} ({ratio['min']:.3f}–{ratio['max']:.3f})"
            )


if __name__ == "__main__":
    main()
