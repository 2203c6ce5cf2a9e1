"""What the methods cost on random weights: seconds per 100M parameters, and filling a cached graph against building it anew.

The layers are those of a 135M-parameter Llama (hidden 576, FFN 1536, 9 heads on 3 KV heads), but only a few of them. Every
method treats one matrix after the other, so its time is linear in the number of layers of given widths and only that is
extrapolated; GPTQ and SparseGPT grow with the cube of a width, so at other widths the figure is another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import onnx
import torch

from benchmarks.common import Figure, figure
from paretune.compression.calibration.calibrated import calibrated_codes, sparsegpt_weights
from paretune.compression.export import graph
from paretune.compression.export.graph import build_model
from paretune.compression.export.graph_builder import GraphBuilder
from paretune.compression.network.student import ATTENTION, FFN, Network, matmul_formats
from paretune.compression.prune import layer_statistics, mask_for
from paretune.compression.quantize import quantize
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape
from paretune.teachers.checkpoint.teacher import expected_tensors, load_teacher

SHAPE = Shape(layers=2, hidden=576, ffn=1536, heads=9, kv_heads=3, head_dim=64, vocab=1024)
CONFIG = {"model_type": "llama", "hidden_size": 576, "vocab_size": 1024, "max_position_embeddings": 2048}
CALIBRATION = (16, 256)
HUNDRED_MILLION = 1e8


def quantize_seconds_per_100m_params() -> Iterator[Figure]:
    """Rounding to nearest and GPTQ of the layers' matrices to int4 in groups of 32, calibration pass included."""
    weights, network, ids = random_model()
    for algorithm in ("rtn", "gptq"):
        form = Format(4, 32, "fp32", algorithm)
        candidate = uniform(form)

        def run(candidate: Candidate = candidate, algorithm: str = algorithm) -> None:
            if algorithm == "gptq":
                calibrated_codes(network, weights, candidate, ids)
            else:
                for name, own in matmul_formats(candidate).items():
                    if own.bits != 32:
                        quantize(weights[name], own)

        yield per_hundred_million("quantize_seconds_per_100m_params", algorithm, run, weights)


def prune_seconds_per_100m_params() -> Iterator[Figure]:
    """Wanda and SparseGPT masks of the layers' matrices at 2:4, calibration pass included."""
    weights, network, ids = random_model()
    matrices = layer_matrices()

    def wanda() -> None:
        found = layer_statistics(network, weights, ids)
        for name, (i, short) in matrices.items():
            mask_for(weights[name], Pattern("2:4", 0.5, "wanda"), found[i].input_norms[short])

    def second_order() -> None:
        sparsegpt_weights(network, weights, uniform(Format(), Pattern("2:4", 0.5, "sparsegpt")), ids)

    for method, run in (("wanda", wanda), ("sparsegpt", second_order)):
        yield per_hundred_million("prune_seconds_per_100m_params", method, run, weights)


def weights_fill_ms() -> Iterator[Figure]:
    """The embedded teacher's int4 graph: weights and scales into a kept graph, against all of it anew."""
    teacher = load_teacher("stdlib-coder")
    weights, form = teacher.weights(), Format(4, 32, "int8")
    layer = Layer(teacher.shape.ffn, teacher.shape.kv_heads, form, form)
    candidate = Candidate((layer,) * teacher.shape.layers, form, form).canonical(teacher.shape)

    def build() -> onnx.ModelProto:
        return build_model(weights, candidate, teacher.config, teacher.shape)

    whole = build()
    kept = without_weights(whole)

    def fill() -> onnx.ModelProto:
        with mock.patch.object(graph, "GraphBuilder", filling(kept)):
            return build()

    if tensors_of(fill()) != tensors_of(whole):
        raise RuntimeError("a filled graph must hold what a new one holds, but it does not")
    anew, filled = ([1e3 * s for s in times(run, 15)] for run in (build, fill))
    yield figure(
        "weights_fill_ms",
        statistics.median(filled),
        "ms",
        min(filled),
        max(filled),
        build_anew_ms=statistics.median(anew),
        ratio=statistics.median(filled) / statistics.median(anew),
    )


def random_model() -> tuple[dict[str, torch.Tensor], Network, torch.Tensor]:
    """Random weights of `SHAPE`, the network they belong to, and token ids to calibrate on."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(size) if len(size) == 1 else 0.02 * torch.randn(size, generator=generator)
        for name, size in expected_tensors(SHAPE).items()
    }
    ids = torch.randint(0, SHAPE.vocab, CALIBRATION, generator=generator)
    return weights, Network(CONFIG, SHAPE, SHAPE.layers), ids


def uniform(form: Format, pattern: Pattern | None = None) -> Candidate:
    layer = Layer(SHAPE.ffn, SHAPE.kv_heads, form, form, pattern or Pattern())
    return Candidate((layer,) * SHAPE.layers)


def layer_matrices() -> dict[str, tuple[int, str]]:
    """Weight name to (layer, name inside the layer)."""
    names = (*ATTENTION, *FFN)
    return {f"model.layers.{i}.{name}.weight": (i, name) for i in range(SHAPE.layers) for name in names}


def per_hundred_million(name: str, method: str, run: Callable[[], Any], weights: dict[str, torch.Tensor]) -> Figure:
    parameters = sum(weights[n].numel() for n in layer_matrices())
    found = [s * HUNDRED_MILLION / parameters for s in times(run, 3)]
    extra = {"method": method, "measured_parameters": parameters, "calibration_tokens": CALIBRATION[0] * CALIBRATION[1]}
    return figure(f"{name}_{method}", statistics.median(found), "s", min(found), max(found), **extra)


def times(run: Callable[[], Any], count: int) -> list[float]:
    """Seconds of `count` runs after one that warms up."""
    run()
    found = []
    for _ in range(count):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return found


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Everything of a graph but its tensors, except the rotary tables, which belong to the structure."""
    kept = onnx.ModelProto()
    kept.CopyFrom(model)
    tables = [t for t in kept.graph.initializer if t.name in ("cos_cache", "sin_cache")]
    del kept.graph.initializer[:]
    kept.graph.initializer.extend(tables)
    return kept


def filling(kept: onnx.ModelProto) -> type[Any]:
    """A graph writer that makes tensors as ever, but no nodes: those come from `kept`."""

    class Filling(GraphBuilder):
        def node(
            self, op: str, inputs: list[str], name: str, outputs: list[str] | None = None, *_: Any, **__: Any
        ) -> str:
            return outputs[0] if outputs else f"{name}/output"

        def rotary(self, *_: Any) -> None:
            """The tables are in the kept graph."""

        def finish(self, *_: Any) -> onnx.ModelProto:
            model = onnx.ModelProto()
            model.CopyFrom(kept)
            model.graph.initializer.extend(self.initializers.values())
            return model

    return Filling


def tensors_of(model: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: t.raw_data for t in model.graph.initializer}
