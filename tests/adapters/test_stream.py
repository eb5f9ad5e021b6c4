"""Files written tensor by tensor are those that safetensors writes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorakit.adapters.stream import _DTYPES, SafetensorsWriter

KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda key: key[0] != "_")
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def tensor(shape, dtype, seed):
    size = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(2, (size,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return data.view(dtype).reshape(shape)


@pytest.mark.slow
@given(st.dictionaries(KEYS, st.tuples(SHAPES, st.sampled_from(list(_DTYPES))), max_size=6), st.randoms())
def test_the_file_is_the_one_that_safetensors_writes(tmp_path_factory, layout, order):
    directory = tmp_path_factory.mktemp("stream")
    tensors = {key: tensor(shape, dtype, seed) for seed, (key, (shape, dtype)) in enumerate(layout.items())}
    save_file(tensors, directory / "whole", metadata={"format": "pt"})
    keys = list(tensors)
    order.shuffle(keys)
    with SafetensorsWriter(directory / "streamed", {k: t.to("meta") for k, t in tensors.items()}) as writer:
        for key in keys:
            writer.write(key, tensors[key])
    assert (directory / "streamed").read_bytes() == (directory / "whole").read_bytes()


def test_every_dtype_that_safetensors_writes(tmp_path):
    tensors = {str(dtype): tensor([2, 3], dtype, 0) for dtype in _DTYPES}
    save_file(tensors, tmp_path / "whole", metadata={"format": "pt"})
    with SafetensorsWriter(tmp_path / "streamed", tensors) as writer:
        for key, value in tensors.items():
            writer.write(key, value)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "whole").read_bytes()


def test_views_are_written_as_what_they_show(tmp_path):
    square = torch.arange(6.0).reshape(2, 3)
    with SafetensorsWriter(tmp_path / "a", {"a": square.T, "b": square[:, :2]}) as writer:
        writer.write("b", square[:, :2])
        writer.write("a", square.T)
    read = load_file(tmp_path / "a")
    assert torch.equal(read["a"], square.T)
    assert torch.equal(read["b"], square[:, :2])


def test_what_does_not_fit_the_header_is_refused(tmp_path):
    layout = {"a": torch.empty(2, device="meta")}
    writer = SafetensorsWriter(tmp_path / "a", layout)
    with pytest.raises(ValueError, match=r"'a' must be torch.float32 of shape \(2,\), .*; got torch.float64 of shape"):
        writer.write("a", torch.ones(2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got torch.float32 of shape \(3,\)"):
        writer.write("a", torch.ones(3))
    with pytest.raises(ValueError, match="'b' is not in the layout"):
        writer.write("b", torch.ones(2))
    writer.write("a", torch.ones(2))
    with pytest.raises(ValueError, match="was written already"):
        writer.write("a", torch.ones(2))
    writer.__exit__(None, None, None)
    with (
        pytest.raises(ValueError, match="1 tensors were not written, such as 'a'"),
        SafetensorsWriter(tmp_path / "a", layout),
    ):
        pass
    with pytest.raises(TypeError, match="a is torch.complex128, which a safetensors file cannot have"):
        SafetensorsWriter(tmp_path / "a", {"a": torch.ones(1, dtype=torch.complex128)})
