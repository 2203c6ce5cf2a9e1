"""Figures at the edges of arithmetic: losses of thousands of nats, of exactly 0, layers of zeros, weights that are no numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from paretune.cli.app import app
from paretune.common.errors import UsageError
from paretune.compression.quantize.grid import quantize
from paretune.objectives.artifacts.remeasure import Agreement
from paretune.objectives.latency.intervals import half_width
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores, perplexity, quality_measurements, relative
from paretune.search.estimation.finalists import perceived
from paretune.search.hypervolume import in_teacher_units
from paretune.spaces.candidate import Bits, Format
from paretune.teachers.checkpoint.teacher import load_teacher


def scores(*nll: float) -> Scores:
    return Scores(tuple(map(str, range(len(nll)))), tuple(10 * v for v in nll), (10,) * len(nll))


def strict(data: object) -> str:
    """JSON as the standard has it: ValueError for NaN and infinity."""
    return json.dumps(data, allow_nan=False)


def test_a_loss_of_thousands_of_nats_has_an_infinite_perplexity() -> None:
    found = quality_measurements(scores(18_000, 17_000, 19_000), scores(18_000, 17_000, 19_000), 2.0, "machine")
    assert found["nll"].value == 18_000 and found["relative_loss"].value == 0
    assert found["perplexity"].value == found["perplexity"].low == math.inf
    assert found["bits_per_byte"].value == pytest.approx(18_000 / math.log(2) / 2)


@pytest.mark.parametrize(
    ("nll", "wanted"), [(0, 1), (1, math.e), (709, math.exp(709)), (710, math.inf), (1e9, math.inf), (-1000, 0)]
)
def test_perplexity_is_defined_for_every_loss(nll: float, wanted: float) -> None:
    assert perplexity(nll) == wanted


def test_infinity_is_null_in_json_and_comes_back() -> None:
    m = Measurement(math.inf, "1", 3.0, math.inf, "measured", 5, "machine", "note")
    told = strict(m.to_dict())
    assert json.loads(told)["value"] is None and json.loads(told)["low"] == 3.0
    assert Measurement.from_dict(json.loads(told)) == m
    plain = Measurement.exact(5, "bytes")
    assert Measurement.from_dict(json.loads(strict(plain.to_dict()))) == plain
    old = {**plain.to_dict(), "value": math.inf}  # as it was kept before
    assert Measurement.from_dict(json.loads(json.dumps(old))).value == math.inf


def test_a_teacher_without_any_loss_is_no_division_by_zero() -> None:
    found = quality_measurements(scores(0.5, 0.5), scores(0.0, 0.0), 2.0, "machine")
    assert found["relative_loss"].value == 0.5
    assert quality_measurements(scores(0.0), scores(0.0), 2.0, "machine")["relative_loss"].value == 0
    strict({name: m.to_dict() for name, m in found.items()})
    assert relative(0.1, 2.0) == 0.05 and relative(-0.1, -2.0) == -0.05 and relative(0.1, 0.0) == 0.1
    assert in_teacher_units((0.5, 2.0), (0.0, 4.0), ("nll", "bytes")) == (0.5, 0.5)
    assert in_teacher_units((2.2, 2.0), (2.0, 4.0), ("nll", "bytes")) == pytest.approx((0.1, 0.5))
    assert all(map(math.isfinite, perceived((0.0, 0.0, 5.0), 0, 0.0)))


def test_values_of_zero_have_a_width_and_agree_with_themselves() -> None:
    assert half_width(0.0, 0.0, 0.0) == 0 and half_width(-1.0, 0.0, 1.0) == math.inf
    assert half_width(1.9, 2.0, 2.2) == pytest.approx(0.1)
    nothing = Measurement(0.0, "ms", 0.0, 0.0, "measured", 1, "machine")
    assert Agreement("x", nothing, nothing).agrees is True
    assert Agreement("x", replace(nothing, value=1.0, low=1.0, high=1.0), nothing).agrees is False


@pytest.fixture
def loud(tmp_path: Path, write_teacher: Callable[..., Path]) -> Path:
    """A teacher whose head is multiplied by 5,000."""
    folder = write_teacher(tmp_path / "loud", tie_word_embeddings=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"] * 5000
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_scoring_a_teacher_with_huge_logits_goes_on(loud: Path, tiny_text: Path, tmp_path: Path) -> None:
    line = [
        "score",
        "--teacher",
        str(loud),
        "--data",
        str(tiny_text),
        "--home",
        str(tmp_path / "home"),
        "--tokens",
        "500",
    ]
    told = CliRunner().invoke(app, [*line, "--json"])
    assert told.exit_code == 0, told.output

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    found = json.loads(told.stdout, parse_constant=refuse)["measurements"]
    assert found["nll"]["value"] > 2000 and found["perplexity"]["value"] is None
    shown = CliRunner().invoke(app, line)
    assert shown.exit_code == 0 and "perplexity: inf [inf … inf]" in shown.stdout


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers_are_refused_by_name(
    tmp_path: Path, write_teacher: Callable[..., Path], value: float, dtype: torch.dtype
) -> None:
    folder = write_teacher(tmp_path / "model")
    weights = {name: tensor.to(dtype) for name, tensor in load_file(folder / "model.safetensors").items()}
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"tensor model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        load_teacher(str(folder))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-40, 1e-38, 3e38], ids=str)
def test_weights_of_any_size_round_to_numbers(bits: Bits, value: float) -> None:
    weight = torch.full((4, 64), value)
    weight[1] = 0
    found = quantize(weight, Format(bits, 32, "fp32"))
    assert torch.isfinite(found.scales).all() and torch.isfinite(found.dequantize()).all()
    assert (found.scales != 0).all()
    assert (found.dequantize()[1] == 0).all()


def test_a_layer_of_zeros_is_quantized_by_every_method(tiny_weights: dict[str, torch.Tensor]) -> None:
    from paretune.compression.quantize.clip import search_scales
    from paretune.compression.quantize.gptq import gptq

    weight, gram = torch.zeros(16, 64), torch.zeros(64, 64)
    for found in (gptq(weight, gram, Format(4, 32, "fp32")), search_scales(weight, Format(4, 32, "fp32"))):
        assert torch.isfinite(found.dequantize()).all() and (found.dequantize() == 0).all()


def test_probabilities_of_extreme_logits_are_numbers() -> None:
    from paretune.engines.process.scoring import log_softmax

    found = log_softmax(np.array([[1e38, 0.0, -1e38], [0.0, 0.0, 0.0]], np.float32))
    assert found[0, 0] == 0 and found[1].tolist() == pytest.approx([-math.log(3)] * 3)
    assert not np.isnan(found).any()
