"""In which precision a machine trains: the faster one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paretune.hardware_profiles import training_precision


@pytest.fixture(autouse=True)
def _measured_anew() -> Iterator[None]:
    training_precision.training_dtype.cache_clear()
    yield
    training_precision.training_dtype.cache_clear()


@pytest.mark.parametrize(("half_s", "dtype"), [(0.5, torch.bfloat16), (1.0, torch.bfloat16), (30.0, torch.float32)])
def test_the_faster_precision_is_taken(half_s: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_precision, "_seconds", {torch.bfloat16: half_s, torch.float32: 1.0}.__getitem__)
    assert training_precision.training_dtype() is dtype
    x = torch.ones(4, 4)
    with training_precision.autocast():
        assert (x @ x).dtype is dtype
    assert (x @ x).dtype is torch.float32


def test_it_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first = training_precision.training_dtype()
    monkeypatch.setattr(training_precision, "_seconds", None)
    assert training_precision.training_dtype() is first
