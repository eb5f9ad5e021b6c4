"""A coverage-guided fuzz target for reading adapters and their configs; `make fuzz` runs it for a minute.

    python tests/attacks/fuzz.py CORPUS_DIRECTORY -max_total_time=60

The first byte of an input says what the rest is: a config, a weights file, or a pattern and a name. The only errors
that may be raised are lorakit's own. The corpus directory is filled with the cases of this directory first.
"""

from __future__ import annotations

import json
import struct
import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["lorakit.adapters", "lorakit.naming"]):
    from lorakit.adapters import open_adapter
    from lorakit.adapters.config import AdapterSettings
    from lorakit.naming import matching

from lorakit.errors import LorakitError

HERE = Path(__file__).parent
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def weights() -> bytes:
    shapes = {"q_proj.lora_A.weight": [2, 3], "q_proj.lora_B.weight": [3, 2]}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 24]}
        end += 24
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def write_corpus(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    inputs = [b"\1" + weights()]
    for case in json.loads((HERE / "configs.json").read_text()):
        if case.get("times", 1) == 1:
            text = case["text"] if "text" in case else json.dumps({**GOOD, **case["changes"]})
            inputs.append(b"\0" + text.encode(errors="surrogatepass"))
    inputs += [b"\2" + name.encode() + b"\0q_proj" for name in json.loads((HERE / "names.json").read_text())]
    for number, content in enumerate(inputs):
        (directory / f"case-{number}").write_bytes(content)


def main() -> None:
    write_corpus(Path(sys.argv[1]))
    matching._SECONDS = 0.1
    home = Path(tempfile.mkdtemp())
    (home / CONFIG).write_text(json.dumps(GOOD))
    (home / WEIGHTS).write_bytes(weights())

    def one_input(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        try:
            if kind == b"\2":
                key, _, name = content.decode(errors="replace").partition("\0")
                AdapterSettings.from_config({**GOOD, "rank_pattern": {key: 1}}).resolve([name])
                return
            changed, good = (home / WEIGHTS, weights()) if kind == b"\1" else (home / CONFIG, json.dumps(GOOD).encode())
            changed.write_bytes(content)
            try:
                adapter = open_adapter(home)
                for module in adapter.modules:
                    adapter.factors(module)
            finally:
                changed.write_bytes(good)
        except LorakitError:
            pass

    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
