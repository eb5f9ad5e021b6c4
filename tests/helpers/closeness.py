"""Comparison of computed values, whose last bits depend on the processor.

torch, MKL and oneDNN choose a kernel by processor, shape, memory alignment and whether a gradient is needed, and every
kernel adds up in its own order. So what is computed twice is compared by the functions below. Weights, state dicts and
files are copied and not computed: they are compared by `torch.equal`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

# The largest difference of two outputs, relative to the largest entry. Reordering a sum of n products changes it by at
# most n units of rounding (torch.finfo(dtype).eps). The tiny models of the tests add up fewer than 100 products at a
# time, and the errors of their layers average out: float32 and float64 get about 100 units. In half precision sums are
# taken in float32 and every intermediate result is rounded, so a reordered sum moves it by one unit at most: bfloat16
# and float16 get about 3 units. An adapter of the tests that is missing or wrongly scaled changes outputs by 1e-3 at
# least in single precision, and by a tenth in half precision.
TOLERANCE = {
    torch.float64: 2e-14,
    torch.float32: 1e-5,
    torch.bfloat16: 2e-2,
    torch.float16: 3e-3,
}
# Of numbers in reports, which are Python floats computed from float32 tensors: relative, and absolute where they are
# differences of numbers of order 1, as two losses are.
REPORT_RELATIVE, REPORT_ABSOLUTE = TOLERANCE[torch.float32], 1e-6


def assert_close_outputs(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    """Assert equality of shape, dtype and, up to the order in which sums are taken, values.

    `tolerance` is relative to the largest entry of `expected`; by default it is that of the dtype, and 0 for integers.
    """
    assert expected.isfinite().all()
    relative = TOLERANCE.get(expected.dtype, 0.0) if tolerance is None else tolerance
    torch.testing.assert_close(actual, expected, rtol=0, atol=relative * float(expected.detach().abs().max()))


def assert_close_reports(actual: Any, expected: Any, path: str = "report") -> None:
    """Assert that two reports, or the dicts and lists made of them, differ in the last digits of their floats alone."""
    if dataclasses.is_dataclass(expected):
        assert type(actual) is type(expected), path
        actual, expected = (
            {field.name: getattr(report, field.name) for field in dataclasses.fields(expected)}
            for report in (actual, expected)
        )
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys(), path
        for key, value in expected.items():
            assert_close_reports(actual[key], value, f"{path}.{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(actual) == len(expected), path
        for i, value in enumerate(expected):
            assert_close_reports(actual[i], value, f"{path}[{i}]")
    elif isinstance(expected, Tensor):
        assert_close_outputs(actual, expected, REPORT_RELATIVE)
    elif isinstance(expected, float):
        assert actual == pytest.approx(expected, rel=REPORT_RELATIVE, abs=REPORT_ABSOLUTE, nan_ok=True), path
    else:
        assert actual == expected, path
