"""Measured tables of chips: read by rows and N·K, never beyond what was measured, and labelled; and what they are worth, if installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from paretune.hardware_profiles import load_profile
from paretune.hardware_profiles.schema import Profile
from paretune.objectives.prediction import silicon
from paretune.objectives.prediction.predict import predict
from paretune.objectives.prediction.roofline import FusedOp
from paretune.spaces.candidate import FP32, Candidate, Format, Layer, Shape

LLAMA_7B = Shape(32, 4096, 11008, 32, 32, 128, 32000, False)
HALF, INT8, INT4 = Format(16), Format(8, 0, "fp32"), Format(4, 32, "fp32")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    silicon._read.cache_clear()
    yield
    silicon._read.cache_clear()


@pytest.fixture
def a100(tmp_path: Path) -> Profile:
    return load_profile("nvidia-a100", tmp_path)


@pytest.fixture
def made_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package whose products take N·K/1e9 ms times their rows to the 0.5, in int4 half of that."""
    folder = tmp_path / "aiconfigurator_core"
    table = folder / "systems" / "data" / "a100_sxm" / "gemm" / "trtllm" / "1.0"
    table.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    rows = [
        {"gemm_dtype": dtype, "m": m, "n": n, "k": k, "latency": factor * n * k / 1e9 * m**0.5}
        for dtype, factor in (("bfloat16", 1.0), ("int4_wo", 0.5))
        for m in (1, 4, 256)
        for n in (1024, 4096, 16384)
        for k in (1024, 4096, 16384)
    ]
    pd.DataFrame(rows).to_parquet(table / "gemm_perf.parquet")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "aiconfigurator_core", raising=False)


def product(n: int, k: int, rows: int, kernel: str = "fp16/fp32", name: str = "up") -> FusedOp:
    return FusedOp(name, 0, kernel, 2.0 * rows * n * k, 2.0 * n * k)  # type: ignore[arg-type]


def test_a_product_takes_its_measured_time(made_up: None, a100: Profile) -> None:
    tables = silicon.tables_of(a100)
    assert tables is not None and "a100_sxm, trtllm 1.0" in tables.source
    for n, k, rows in ((4096, 4096, 1), (1024, 16384, 4), (16384, 16384, 256), (2048, 4096, 16)):
        found = tables.time_of(product(n, k, rows), rows)
        assert found is not None and found.likely == pytest.approx(n * k / 1e9 * rows**0.5, rel=0.06)
        assert found.low <= found.likely <= found.high
    half = tables.time_of(product(4096, 4096, 1, "int4/fp32"), 1)
    assert half is not None and half.likely == pytest.approx(0.5 * 4096 * 4096 / 1e9, rel=0.06)


@pytest.mark.parametrize(
    ("n", "k", "rows", "kernel", "name"),
    [
        (512, 512, 1, "fp16/fp32", "up"),
        (65536, 65536, 1, "fp16/fp32", "up"),
        (4096, 4096, 512, "fp16/fp32", "up"),
        (4096, 4096, 1, "fp32/fp32", "up"),
        (4096, 4096, 1, "int8/fp32", "up"),
        (4096, 4096, 1, "fp16/fp32", "attention"),
    ],
)
def test_nothing_is_extrapolated(
    made_up: None, a100: Profile, n: int, k: int, rows: int, kernel: str, name: str
) -> None:
    tables = silicon.tables_of(a100)
    assert tables is not None and tables.time_of(product(n, k, rows, kernel, name), rows) is None


def whole(form: Format) -> Candidate:
    return Candidate((Layer(11008, 32, form, form),) * 32, form, HALF)


def test_what_comes_from_a_table_says_so(made_up: None, a100: Profile, tmp_path: Path) -> None:
    with_table = predict(a100, whole(HALF), LLAMA_7B)
    decode = with_table["decode_ms_per_token"]
    assert decode.provenance == "table" and "from measured tables (aiconfigurator-core" in decode.note
    assert with_table["throughput_tokens_per_s"].provenance == "table"
    assert predict(a100, whole(FP32), LLAMA_7B)["decode_ms_per_token"].provenance == "predicted"
    other = predict(load_profile("nvidia-t4", tmp_path), whole(INT4), LLAMA_7B)
    assert other["decode_ms_per_token"].provenance == "predicted", "another chip has no table"


def test_without_the_package_nothing_changes(a100: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert silicon.tables_of(a100) is None
    assert predict(a100, whole(HALF), LLAMA_7B)["decode_ms_per_token"].provenance == "predicted"


@pytest.mark.skipif(importlib.util.find_spec("aiconfigurator_core") is None, reason="pip install paretune[nvidia]")
@pytest.mark.parametrize(("form", "published"), [(HALF, 104.9), (INT8, 155.58), (INT4, 196.80)])
def test_published_speeds_are_within_a_tenth(a100: Profile, form: Format, published: float) -> None:
    """gpt-fast's Llama-2-7B on an A100 80GB at batch 1: another engine than the tables', the same chip."""
    found = predict(a100, whole(form), LLAMA_7B, prompt=5, context=100)["throughput_tokens_per_s"]
    assert found.provenance == "table" and abs(found.value / published - 1) < 0.1
