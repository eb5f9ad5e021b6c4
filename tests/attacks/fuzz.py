"""A coverage-guided fuzz target for reading adapters and their configs; `make fuzz` runs it for a minute.

    python tests/attacks/fuzz.py CORPUS_DIRECTORY -max_total_time=60

The first byte of an input says what the rest is: a config, a weights file, a pattern and a name, or which fields of a
good config get which values (mutated text is seldom JSON, so that it says little of what comes after the parser). The
only errors that may be raised are lorakit's own. The corpus directory is filled with the cases of this directory first.
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
FIELDS = sorted(
    {field for case in json.loads((HERE / "configs.json").read_text()) for field in case.get("changes", {})}
)
GOOD = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def weights() -> bytes:
    shapes = {"q_proj.lora_A.weight": [2, 3], "q_proj.lora_B.weight": [3, 2]}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + 24]}
        end += 24
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(end)


def value_of(data: atheris.FuzzedDataProvider, depth: int = 0) -> object:
    """Anything that JSON can say."""
    kind = data.ConsumeIntInRange(0, 4 if depth > 3 else 6)
    if kind < 5:
        text = data.ConsumeUnicode(12)
        return (text, data.ConsumeInt(9), data.ConsumeFloat(), data.PickValueInList([None, True, False]), "q_proj")[
            kind
        ]
    values = [value_of(data, depth + 1) for _ in range(data.ConsumeIntInRange(0, 3))]
    return values if kind == 5 else {data.ConsumeUnicode(8): value for value in values}


def changed_config(content: bytes) -> dict[str, object]:
    data = atheris.FuzzedDataProvider(content)
    count = data.ConsumeIntInRange(1, 3)
    return {**GOOD, **{data.PickValueInList(FIELDS): value_of(data) for _ in range(count)}}


def write_corpus(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    inputs = [b"\1" + weights()]
    for case in json.loads((HERE / "configs.json").read_text()):
        if case.get("times", 1) == 1:
            text = case["text"] if "text" in case else json.dumps({**GOOD, **case["changes"]})
            inputs.append(b"\0" + text.encode(errors="surrogatepass"))
    inputs += [b"\2" + name.encode() + b"\0q_proj" for name in json.loads((HERE / "names.json").read_text())]
    inputs += [b"\3" + bytes([field, kind]) * 24 for field in range(len(FIELDS)) for kind in range(7)]
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
            if kind == b"\3":
                content = json.dumps(changed_config(content)).encode(errors="surrogatepass")
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
