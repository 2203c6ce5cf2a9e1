"""What ships computes what was searched: the ONNX file in ONNX Runtime against the student in torch, with controls that must fail."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zstandard

from paretune.common.checksums import check_artifact, write_checksums
from paretune.common.errors import Infeasible, UsageError
from paretune.compression.calibration.calibrated import calibrated_codes
from paretune.compression.export import graph as graph_module
from paretune.compression.export.artifact import ArtifactFacts, compressed_bytes, write_artifact
from paretune.compression.export.graph import build_model, save_model
from paretune.compression.network.student import (
    ATTENTION,
    EMBEDDING,
    FFN,
    HEAD,
    NO_CODES,
    Codes,
    Network,
    quantized_weights,
)
from paretune.compression.prune import Importance, mask_for, slice_weights
from paretune.compression.quantize import Quantized, fake_quantize, quantize
from paretune.engines.onnxruntime.decoder import Decoder
from paretune.engines.process.child import EngineChild
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape, Space
from paretune.spaces.candidate import DENSE
from paretune.spaces.mixed import Sensitivity
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher

Weights = dict[str, torch.Tensor]
BAR = 1e-4
FP32 = Format()
INT8, INT4, INT4_FP = Format(8, 32, "int8"), Format(4, 32, "int8"), Format(4, 32, "fp32")
SPARSE = Pattern("2:4", 0.5)


def uniform(
    form: Format,
    head: Format | None = None,
    embedding: Format | None = None,
    pattern: Pattern = DENSE,
    ffn: int = 128,
    groups: int = 2,
    depth: int = 3,
    hidden: int = 0,
) -> Candidate:
    layer = Layer(ffn, groups, form, form, pattern)
    return Candidate((layer,) * depth, form if head is None else head, form if embedding is None else embedding, hidden)


EXACT = {
    "fp32": uniform(FP32),
    "int4/fp32": uniform(INT4_FP),
    "int4/fp32 groups of 64": uniform(Format(4, 64, "fp32")),
    "int4/fp32 groups of 16": uniform(Format(4, 16, "fp32")),
    "int8/fp32": uniform(Format(8, 32, "fp32")),
    "only layers": uniform(INT4_FP, FP32, FP32),
    "only head": uniform(FP32, INT4_FP, FP32),
    "only embedding": uniform(FP32, FP32, Format(4, 32)),
    "head int4, embedding int8": uniform(FP32, INT4_FP, Format(8, 64)),
    "head and embedding of different groups": uniform(INT4_FP, Format(4, 32, "fp32"), Format(4, 64)),
    "attention int4, ffn fp32": Candidate((Layer(128, 2, INT4_FP, FP32),) * 3),
    "every layer another format": Candidate(
        (Layer(128, 2, INT4_FP, FP32), Layer(128, 2, FP32, Format(8, 64, "fp32")), Layer(128, 2)), FP32, INT4_FP
    ),
    "2:4 sparse": uniform(INT4_FP, pattern=SPARSE),
    "unstructured sparse fp32": uniform(FP32, pattern=Pattern("unstructured", 0.6)),
    "smaller student": uniform(INT4_FP, ffn=96, groups=1, depth=2),
    "narrow FFN repairs its groups": uniform(Format(4, 64, "fp32"), ffn=32, groups=1, depth=2),
    "narrower residual stream": uniform(FP32, hidden=32),
    "narrower residual stream int4": uniform(Format(4, 16, "fp32"), ffn=96, groups=1, depth=2, hidden=32),
    "narrower residual stream, two tables": uniform(FP32, Format(4, 64, "fp32"), Format(8, 64), hidden=48),
}
ROUNDED = {
    "int8/int8": uniform(INT8),
    "int4/int8": uniform(INT4),
    "int4/int8 groups of 64": uniform(Format(4, 64, "int8")),
    "int8 layers, int4 head, fp32 embedding": uniform(INT8, INT4, FP32),
    "fp32 layers, int8 head": uniform(FP32, INT8, INT8),
    "attention int8, ffn int4": Candidate((Layer(128, 2, INT8, INT4),) * 3, INT4_FP, INT4),
    "2:4 sparse int4": uniform(INT4, pattern=SPARSE),
    "smaller student int8": uniform(INT8, ffn=64, groups=1, depth=2),
    "narrower residual stream int8": uniform(INT8, hidden=32),
    "narrower residual stream int4": uniform(INT4, pattern=Pattern("threshold", 0.5), hidden=32),
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory, write_teacher: Callable[..., Path]) -> Teacher:
    """Untied, heads wider than the hidden size asks for, llama3 rope, another epsilon."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return load_teacher(
        str(
            write_teacher(
                tmp_path_factory.mktemp("untied") / "model",
                7,
                tie_word_embeddings=False,
                head_dim=32,
                rope_parameters=rope,
                rms_norm_eps=1e-2,
            )
        )
    )


@pytest.fixture(scope="module", params=["tied", "untied", "qwen2", "qwen3"])
def teacher(
    request: pytest.FixtureRequest,
    tiny_teacher: Teacher,
    write_teacher: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Teacher:
    """A Mistral has the graph of a Llama; test_families.py holds every family against transformers."""
    if request.param in ("qwen2", "qwen3"):
        folder = write_teacher(tmp_path_factory.mktemp("model") / "model", family=request.param, rms_norm_eps=1e-2)
        return load_teacher(str(folder))
    found: Teacher = tiny_teacher if request.param == "tied" else request.getfixturevalue("untied")
    return found


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 288, (2, 48))


@pytest.fixture(scope="module")
def child() -> Iterator[EngineChild]:
    with EngineChild(1) as engine:
        yield engine


class Shipping:
    """Builds, saves, loads and runs a student in the engine child."""

    def __init__(self, child: EngineChild, folder: Path, ids: np.ndarray) -> None:
        self.child, self.folder, self.ids = child, folder, ids
        np.save(folder / "ids.npy", ids)

    def logits(self, weights: Weights, candidate: Candidate, teacher: Teacher, codes: Codes = NO_CODES) -> torch.Tensor:
        path = self.folder / "model.onnx"
        save_model(build_model(weights, candidate, teacher.config, teacher.shape, codes), path)
        return self.run(path)

    def run(self, path: Path) -> torch.Tensor:
        self.child.ask(do="load", path=str(path), threads=1)
        self.child.ask(do="logits", ids=str(self.folder / "ids.npy"), out=str(self.folder / "out.npy"))
        return torch.from_numpy(np.load(self.folder / "out.npy"))


@pytest.fixture
def shipping(child: EngineChild, tmp_path: Path, ids: np.ndarray) -> Shipping:
    return Shipping(child, tmp_path, ids)


def student_weights(teacher: Teacher, candidate: Candidate) -> Weights:
    """The candidate's slice of the teacher, masked."""
    shape = teacher.shape
    order = Importance(
        tuple(tuple(range(shape.ffn)) for _ in range(shape.layers)),
        (tuple(range(shape.kv_heads)),) * shape.layers,
        (0, 2, 1),
    )
    found = slice_weights(teacher.weights(), candidate, order, shape)
    for i, layer in enumerate(candidate.layers):
        for name in (*ATTENTION, *FFN):
            full = f"model.layers.{i}.{name}.weight"
            found[full] = found[full] * mask_for(found[full], layer.pattern, None)
    return found


def torch_logits(
    weights: Weights,
    candidate: Candidate,
    teacher: Teacher,
    ids: np.ndarray,
    rounded: bool = True,
    codes: Codes = NO_CODES,
) -> torch.Tensor:
    network = Network(teacher.config, teacher.shape, len(candidate.layers))
    with torch.no_grad():
        if not rounded:
            return network(weights, torch.from_numpy(ids))
        with network.activations(candidate):
            return network(quantized_weights(weights, candidate, codes), torch.from_numpy(ids))


def worst(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def one_weight_moved(weights: Weights) -> Weights:
    """One entry of one matrix moved by a tenth of the largest: a code or two on any grid."""
    name = "model.layers.1.self_attn.v_proj.weight"
    value = weights[name].clone()
    value[3, 5] += 0.25 * value.abs().max()
    return {**weights, name: value}


def coarser(candidate: Candidate) -> Candidate:
    """Every quantized matrix on a coarser grid: int8 becomes int4, int4 doubles its groups or loses a bit's worth of them."""

    def worse(form: Format) -> Format:
        return (
            form
            if form.bits == 32
            else Format(4, 64 if form.bits == 4 and form.group_size < 64 else 32, form.activation)
        )

    layers = tuple(
        Layer(x.ffn, x.kv_groups, worse(x.attention_format), worse(x.ffn_format), x.pattern) for x in candidate.layers
    )
    return Candidate(layers, worse(candidate.head_format), worse(candidate.embedding_format), candidate.hidden)


@pytest.mark.parametrize("candidate", EXACT.values(), ids=EXACT)
def test_the_shipped_graph_computes_the_searched_student(
    candidate: Candidate, teacher: Teacher, shipping: Shipping
) -> None:
    weights = student_weights(teacher, candidate)
    shipped = shipping.logits(weights, candidate, teacher)
    assert worst(shipped, torch_logits(weights, candidate, teacher, shipping.ids)) <= BAR
    controls = {"one weight moved": torch_logits(one_weight_moved(weights), candidate, teacher, shipping.ids)}
    if candidate.is_quantized:
        controls["fake-quant off"] = torch_logits(weights, candidate, teacher, shipping.ids, rounded=False)
        controls["coarser grid"] = torch_logits(weights, coarser(candidate), teacher, shipping.ids)
    for name, other in controls.items():
        assert worst(shipped, other) > 10 * BAR, f"the control {name!r} passed"


@pytest.mark.parametrize("candidate", ROUNDED.values(), ids=ROUNDED)
def test_the_shipped_graph_rounds_activations_as_the_searched_student_does(
    candidate: Candidate, teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    """About ten activations in a million lie on a rounding tie and may fall the other way, which changes its own and all later
    positions of its sequence by a visible amount. So positions are counted: of 32 short sequences nearly all must agree to the
    bar (relative to the logits' size), and under every control nearly none may."""
    shipping = Shipping(child, tmp_path, ids.reshape(32, 3))
    weights = student_weights(teacher, candidate)
    shipped = shipping.logits(weights, candidate, teacher)
    bar = BAR * max(1.0, float(shipped.abs().max()) / 10)

    def agreement(other: torch.Tensor) -> float:
        return float(((shipped - other).abs().amax(-1) <= bar).float().mean())

    network = Network(teacher.config, teacher.shape, len(candidate.layers))
    with torch.no_grad():
        float_activations = network(quantized_weights(weights, candidate), torch.from_numpy(shipping.ids))
    controls = {
        "activations not rounded": float_activations,
        "fake-quant off": torch_logits(weights, candidate, teacher, shipping.ids, rounded=False),
        "one weight moved": torch_logits(one_weight_moved(weights), candidate, teacher, shipping.ids),
        "coarser grid": torch_logits(weights, coarser(candidate), teacher, shipping.ids),
    }
    # The least seen on two of a CPU's paths was 0.875. With four ties expected in 32 sequences, fewer than 0.6 of
    # them agree in 3 of ten million runs.
    assert agreement(torch_logits(weights, candidate, teacher, shipping.ids)) >= 0.6
    for name, other in controls.items():
        assert agreement(other) <= 0.1, f"the control {name!r} passed"


@pytest.mark.parametrize("level", [5, 9])
def test_mixed_precision_ships_every_layer_in_its_own_format(level: int, teacher: Teacher, shipping: Shipping) -> None:
    """What the knapsack assigns; activations in fp32, so that the bar is tight. Controls: two layers' formats swapped, one
    layer a bit coarser, fake-quant off."""
    space = Space.of(teacher.shape, ("fp32/fp32", "int8/fp32", "int4/fp32"), second_order=False)
    losses = [tuple((i + 1) ** 2 * 4.0**-f.bits for f in space.mixed_formats) for i in (2, 0, 1)]
    table = Sensitivity(space.mixed_formats, tuple(losses), tuple(losses[::-1]), losses[0], losses[1])
    space = replace(space, mixed=True, sensitivity=table)
    params = space.encode(space.baselines()[0]) | {"precision_mode": "mixed", "effective_bits": level}
    candidate = space.decode(params)
    assert len({(x.attention_format, x.ffn_format) for x in candidate.layers}) > 1
    weights = student_weights(teacher, candidate)
    shipped = shipping.logits(weights, candidate, teacher)
    assert worst(shipped, torch_logits(weights, candidate, teacher, shipping.ids)) <= BAR
    a, b, c = candidate.layers
    swapped = next(
        replace(candidate, layers=layers) for layers in ((b, a, c), (c, b, a), (a, c, b)) if layers != (a, b, c)
    )
    one = replace(candidate, layers=(a, coarser(replace(candidate, layers=(b,))).layers[0], c))
    for other in (swapped, one):
        assert other != candidate
        assert worst(shipped, torch_logits(weights, other, teacher, shipping.ids)) > 10 * BAR
    assert worst(shipped, torch_logits(weights, candidate, teacher, shipping.ids, rounded=False)) > 10 * BAR


GPTQ = Format(4, 32, "fp32", "gptq")
CALIBRATED = {
    "everything": uniform(GPTQ, embedding=FP32),
    "groups of 64": uniform(Format(4, 64, "fp32", "gptq"), FP32, FP32),
    "int8": uniform(Format(8, 32, "fp32", "gptq"), FP32, FP32),
    "2:4 sparse": uniform(GPTQ, INT4_FP, INT4_FP, SPARSE),
    "blocks": uniform(GPTQ, embedding=Format(8, 32), pattern=Pattern("block", 0.5)),
    "attention only, smaller": Candidate((Layer(96, 1, GPTQ, INT4_FP),) * 2, INT4_FP, INT4_FP),
    "head only": uniform(FP32, GPTQ, FP32),
}


def calibrated(teacher: Teacher, candidate: Candidate) -> tuple[Weights, dict[str, Quantized]]:
    weights = student_weights(teacher, candidate)
    calibration = torch.from_numpy(np.random.default_rng(1).integers(0, 288, (8, 64)))
    return weights, calibrated_codes(
        Network(teacher.config, teacher.shape, len(candidate.layers)), weights, candidate, calibration
    )


def to_nearest(candidate: Candidate) -> Candidate:
    return Candidate.from_json(candidate.to_json().replace('"algorithm":"gptq"', '"algorithm":"rtn"'))


def one_code_moved(codes: dict[str, Quantized]) -> dict[str, Quantized]:
    """One row of one matrix a step off; a single code of a single entry would drown in the bar's own margin."""
    name = sorted(codes)[0]
    moved = codes[name].codes.clone()
    moved[3] = torch.where(moved[3] > 0, moved[3] - 1, moved[3] + 1)
    return {**codes, name: Quantized(moved, codes[name].scales, codes[name].bits, codes[name].group_size)}


@pytest.mark.parametrize("candidate", CALIBRATED.values(), ids=CALIBRATED)
def test_codes_found_by_gptq_are_those_that_ship(candidate: Candidate, teacher: Teacher, shipping: Shipping) -> None:
    weights, codes = calibrated(teacher, candidate)
    shipped = shipping.logits(weights, candidate, teacher, codes)
    assert worst(shipped, torch_logits(weights, candidate, teacher, shipping.ids, codes=codes)) <= BAR
    nearest, moved = to_nearest(candidate), one_code_moved(codes)
    controls = {
        "rounded to nearest": torch_logits(weights, nearest, teacher, shipping.ids),
        "fake-quant off": torch_logits(weights, candidate, teacher, shipping.ids, rounded=False),
        "coarser grid": torch_logits(weights, coarser(candidate), teacher, shipping.ids),
        "one row a step off": torch_logits(weights, candidate, teacher, shipping.ids, codes=moved),
    }
    for name, other in controls.items():
        assert worst(shipped, other) > 10 * BAR, f"the control {name!r} passed"


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_gptq_ships_beside_the_biases_and_head_norms_of_other_families(
    family: str, write_teacher: Callable[..., Path], shipping: Shipping, tmp_path: Path
) -> None:
    other = load_teacher(str(write_teacher(tmp_path / "model", 3, family=family)))
    for candidate in (CALIBRATED["everything"], CALIBRATED["attention only, smaller"]):
        weights, codes = calibrated(other, candidate)
        shipped = shipping.logits(weights, candidate, other, codes)
        assert worst(shipped, torch_logits(weights, candidate, other, shipping.ids, codes=codes)) <= BAR
        assert worst(shipped, torch_logits(weights, to_nearest(candidate), other, shipping.ids)) > 10 * BAR


def test_gptq_with_rounded_activations_ships_as_it_is_searched(
    teacher: Teacher, child: EngineChild, tmp_path: Path, ids: np.ndarray
) -> None:
    """Positions are counted, see the test of rounded activations above."""
    candidate = uniform(Format(4, 32, "int8", "gptq"), embedding=INT8)
    shipping = Shipping(child, tmp_path, ids.reshape(16, 6))
    weights, codes = calibrated(teacher, candidate)
    shipped = shipping.logits(weights, candidate, teacher, codes)
    bar = BAR * max(1.0, float(shipped.abs().max()) / 10)

    def agreement(other: torch.Tensor) -> float:
        return float(((shipped - other).abs().amax(-1) <= bar).float().mean())

    network = Network(teacher.config, teacher.shape, 3)
    with torch.no_grad():
        exact = network(quantized_weights(weights, candidate, codes), torch.from_numpy(shipping.ids))
    # The least seen on two of a CPU's paths was 0.875. With four ties expected in 32 sequences, fewer than 0.6 of
    # them agree in 3 of ten million runs.
    assert agreement(torch_logits(weights, candidate, teacher, shipping.ids, codes=codes)) >= 0.6
    assert agreement(exact) <= 0.1, "the control without rounded activations passed"
    assert agreement(torch_logits(weights, to_nearest(candidate), teacher, shipping.ids)) <= 0.1
    moved = one_code_moved(codes)
    assert agreement(torch_logits(weights, candidate, teacher, shipping.ids, codes=moved)) <= 0.1


def test_gptq_cannot_ship_without_its_codes_or_with_others(teacher: Teacher) -> None:
    candidate = CALIBRATED["groups of 64"]
    weights, codes = calibrated(teacher, candidate)
    name = "model.layers.1.self_attn.k_proj.weight"
    for build in (
        lambda given: build_model(weights, candidate, teacher.config, teacher.shape, given),
        lambda given: quantized_weights(weights, candidate, given),
    ):
        build(codes)
        with pytest.raises(ValueError, match=r"k_proj.*must be given"):
            build({n: q for n, q in codes.items() if n != name})
        with pytest.raises(ValueError, match=r"k_proj.*4 bits in groups of 64, but got .* 8 bits in groups of 32"):
            build({**codes, name: quantize(weights[name], Format(8, 32))})


def test_transformers_is_the_oracle_of_the_unmodified_teacher(teacher: Teacher, shipping: Shipping) -> None:
    from transformers import AutoModelForCausalLM

    shipped = shipping.logits(teacher.weights(), uniform(FP32), teacher)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(teacher.folder)(torch.from_numpy(shipping.ids)).logits
    assert worst(shipped, expected) <= BAR
    assert worst(shipped[:, :-1], expected[:, 1:]) > 10 * BAR


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> tuple[Decoder, Candidate]:
    candidate = uniform(INT4_FP)
    path = tmp_path_factory.mktemp("decoder") / "model.onnx"
    save_model(build_model(tiny_teacher.weights(), candidate, tiny_teacher.config, tiny_teacher.shape), path)
    return Decoder(str(path), 1), candidate


@pytest.mark.parametrize("prompt", [1, 7, 40])
def test_decoding_with_the_cache_is_one_full_pass(
    decoder: tuple[Decoder, Candidate], ids: np.ndarray, prompt: int
) -> None:
    """Growing caches: past in, present out, token by token, batch 2."""
    session, whole = decoder[0].session, decoder[0].logits(ids)
    caches = {
        f"past_key_values.{i}.{kind}": np.zeros((2, 2, 0, 16), np.float32)
        for i in range(3)
        for kind in ("key", "value")
    }
    names = [output.name for output in session.get_outputs()]
    for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 48))]:
        feeds = {"input_ids": ids[:, start:end], "attention_mask": np.ones((2, end), np.int64), **caches}
        found = dict(zip(names, session.run(names, feeds), strict=True))
        assert np.abs(found["logits"] - whole[:, start:end]).max() <= BAR
        caches = {name: found[name.replace("past_key_values", "present")] for name in caches}
    forgetful = {name: value * 0 for name, value in caches.items()}
    feeds = {"input_ids": ids[:, -1:], "attention_mask": np.ones((2, 49), np.int64), **forgetful}
    assert np.abs(session.run(["logits"], feeds)[0] - whole[:, -1:]).max() > 10 * BAR


def test_the_timed_decoding_with_shared_buffers_is_one_full_pass(
    decoder: tuple[Decoder, Candidate], ids: np.ndarray
) -> None:
    """The very steps that the lane times, with past and present bound to one buffer."""
    engine = decoder[0]
    whole = engine.logits(ids[:1])
    assert np.abs(engine.stepped_logits(ids[:1], 20) - whole).max() <= BAR


def test_external_weights_are_written_anew_not_appended(
    tmp_path: Path, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph_module, "INLINE_LIMIT_BYTES", 1)
    model = build_model(tiny_teacher.weights(), uniform(FP32), tiny_teacher.config, tiny_teacher.shape)
    sizes = []
    for _ in range(2):
        save_model(model, tmp_path / "fit.onnx")
        sizes.append((tmp_path / "fit.onnx.data").stat().st_size)
        model = build_model(tiny_teacher.weights(), uniform(FP32), tiny_teacher.config, tiny_teacher.shape)
    assert sizes[0] == sizes[1] > 1000


ARTIFACTS = {
    "fp32": uniform(FP32),
    "int4": uniform(INT4_FP),
    "mixed": uniform(INT4_FP, FP32, Format(8, 32)),
    "sparse cut": uniform(INT4_FP, pattern=SPARSE, ffn=96, groups=1, depth=2),
    "hidden cut": uniform(INT4_FP, FP32, ffn=96, hidden=32),
}


def made(folder: Path, teacher: Teacher, candidate: Candidate, **facts: Any) -> tuple[Path, ArtifactFacts, Weights]:
    weights = student_weights(teacher, candidate)
    return folder, write_artifact(folder, teacher, candidate, weights, facts), weights


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Teacher) -> Path:
    return made(tmp_path_factory.mktemp("artifacts") / "whole", tiny_teacher, uniform(INT4_FP), note="kept")[0]


@pytest.mark.parametrize("candidate", ARTIFACTS.values(), ids=ARTIFACTS)
def test_the_hugging_face_folder_computes_what_the_engine_computes(
    candidate: Candidate, teacher: Teacher, shipping: Shipping, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _, weights = made(tmp_path / "artifact", teacher, candidate)
    model, info = AutoModelForCausalLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    shipped = shipping.run(folder / "onnx" / "model.onnx")
    with torch.no_grad():
        other = model(torch.from_numpy(shipping.ids)).logits
    assert worst(shipped, other) <= BAR
    control = torch_logits(one_weight_moved(weights), candidate, teacher, shipping.ids)
    assert worst(other, control) > 10 * BAR
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    text = "The model reads a line."
    tokens = AutoTokenizer.from_pretrained(folder / "hf")(text, add_special_tokens=False)["input_ids"]
    assert tokens == teacher.tokenizer.encode(text, add_special_tokens=False).ids


def test_the_artifact_describes_itself_and_passes_its_check(artifact: Path, tiny_teacher: Teacher) -> None:
    facts = check_artifact(artifact)
    assert facts["note"] == "kept"
    assert Candidate.from_dict(facts["candidate"]) == uniform(INT4_FP)
    assert facts["teacher_digest"] == tiny_teacher.digest
    model = artifact / "onnx" / "model.onnx"
    assert facts["bytes"] == model.stat().st_size
    assert facts["compressed_bytes"] == pytest.approx(len(zstandard.compress(model.read_bytes(), 3)), rel=0.01)
    listed = {line.split("  ")[1] for line in (artifact / "SHA256SUMS").read_text().splitlines()}
    assert listed == {p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()} - {"SHA256SUMS"}
    assert not [p for p in artifact.parent.iterdir() if p.name.startswith(".")], "a temporary folder was left behind"


@pytest.mark.parametrize("candidate", [*ARTIFACTS.values(), ROUNDED["int4/int8"]], ids=[*ARTIFACTS, "int4/int8"])
def test_the_bytes_of_a_candidate_are_those_of_its_artifact(
    candidate: Candidate, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    _, actual, weights = made(tmp_path / "artifact", tiny_teacher, candidate)
    predicted = compressed_bytes(weights, candidate, tiny_teacher.config, tiny_teacher.shape)
    assert predicted.bytes == actual.bytes
    assert predicted.compressed_bytes == pytest.approx(actual.compressed_bytes, rel=0.002)


def test_fewer_bits_and_zeros_ship_fewer_bytes(tiny_teacher: Teacher) -> None:
    sizes = [
        compressed_bytes(student_weights(tiny_teacher, c), c, tiny_teacher.config, tiny_teacher.shape).compressed_bytes
        for c in (uniform(FP32), uniform(INT8), uniform(INT4), uniform(INT4, pattern=Pattern("unstructured", 0.7)))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[3] < 0.9 * sizes[2]


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


def problem_of(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        check_artifact(folder)
    return caught.value.problem


@pytest.mark.parametrize("name", ["onnx/model.onnx", "hf/model.safetensors", "paretune.json", "onnx/tokenizer.json"])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_named(copy: Path, name: str) -> None:
    path = copy / name
    data = path.read_bytes()
    for at in (0, len(data) // 2, len(data) - 1):
        damaged = bytearray(data)
        damaged[at] ^= 1
        path.write_bytes(bytes(damaged))
        assert name in problem_of(copy)
    path.write_bytes(data[:-1])
    assert name in problem_of(copy)
    path.unlink()
    assert name in problem_of(copy)
    path.write_bytes(data)
    check_artifact(copy)


@pytest.mark.parametrize("trick", ["../secret", "onnx/../../secret", "ABSOLUTE"])
def test_checksums_cannot_name_files_outside_the_artifact(copy: Path, trick: str) -> None:
    secret = copy.parent / "secret"
    secret.write_text("secret")
    name = str(secret) if trick == "ABSOLUTE" else trick
    with (copy / "SHA256SUMS").open("a") as stream:
        stream.write(f"{hashlib.sha256(b'secret').hexdigest()}  {name}\n")
    assert "outside the artifact" in problem_of(copy)


def test_links_out_of_the_artifact_are_refused(copy: Path) -> None:
    outside = copy.parent / "outside"
    shutil.move(copy / "onnx", outside)
    (copy / "onnx").symlink_to(outside)
    assert "outside the artifact" in problem_of(copy)
    (copy / "onnx").unlink()
    shutil.move(outside, copy / "onnx")
    check_artifact(copy)
    shutil.move(copy / "onnx" / "model.onnx", copy.parent / "model.onnx")
    (copy / "onnx" / "model.onnx").symlink_to(copy.parent / "model.onnx")
    assert "outside the artifact" in problem_of(copy)


@pytest.mark.parametrize("text", ["", "no checksum line\n", "\xff"])
def test_a_damaged_list_of_checksums_vouches_for_nothing(copy: Path, text: str) -> None:
    (copy / "SHA256SUMS").write_text(text)
    problem_of(copy)
    (copy / "SHA256SUMS").unlink()
    assert "is not an artifact" in problem_of(copy)


def test_a_list_that_was_cut_short_does_not_vouch_for_the_model(copy: Path) -> None:
    lines = (copy / "SHA256SUMS").read_text().splitlines(keepends=True)
    (copy / "SHA256SUMS").write_text("".join(line for line in lines if "model.onnx" not in line))
    assert "model.onnx" in problem_of(copy)
    write_checksums(copy)
    check_artifact(copy)


def test_a_failed_export_leaves_nothing_and_keeps_the_old_artifact(copy: Path, tiny_teacher: Teacher) -> None:
    broken = dict(tiny_teacher.weights())
    del broken["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(Infeasible, match=r"up_proj"):
        write_artifact(copy, tiny_teacher, uniform(FP32), broken, {})
    check_artifact(copy)
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_onnxruntime_genai_streams_what_torch_decodes_greedily(artifact: Path, tiny_teacher: Teacher) -> None:
    import onnxruntime_genai as genai

    candidate, length, prompt = uniform(INT4_FP), 40, [17, 5, 200, 33, 90]
    expected, margin = list(prompt), float("inf")
    while len(expected) < length:
        logits = torch_logits(tiny_teacher.weights(), candidate, tiny_teacher, np.array([expected]))[0, -1]
        best, second = logits.topk(2).values.tolist()
        margin = min(margin, best - second)
        expected.append(int(logits.argmax()))
        if expected[-1] == tiny_teacher.end_token:
            break
    assert len(expected) > 20, "the prompt ends too early to show anything"
    assert margin > 10 * BAR, "a tie would make the comparison a matter of luck"
    model = genai.Model(str(artifact / "onnx"))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=length, do_sample=False)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([prompt], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0).tolist() == expected
    tokenizer = genai.Tokenizer(model)
    text = "The model reads a line."
    assert tokenizer.encode(text).tolist() == tiny_teacher.tokenizer.encode(text, add_special_tokens=False).ids


def shipped_codes(path: Path) -> dict[str, np.ndarray]:
    """Integers of every MatMulNBits of a file, the implied zero point subtracted: node name to [N, K]."""
    model = onnx.load(path)
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        facts = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        data = tensors[node.input[1]]
        if facts["bits"] == 4:
            data = np.stack([data & 15, data >> 4], -1)
        found[node.name] = data.reshape(facts["N"], facts["K"]).astype(int) - 2 ** (facts["bits"] - 1)
    return found


@pytest.mark.parametrize("form", [INT4, INT8], ids=lambda f: f.kernel)
def test_the_zeros_of_a_sparse_candidate_are_zeros_in_the_shipped_integers(
    form: Format, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    candidate = uniform(form, pattern=SPARSE)
    folder, _, weights = made(tmp_path / "artifact", tiny_teacher, candidate)
    codes = shipped_codes(folder / "onnx" / "model.onnx")
    sparse = {name: value for name, value in codes.items() if name.startswith("/model/layers")}
    assert len(sparse) == 3 * 5  # packed qkv, o, gate, up, down
    for name, value in sparse.items():
        zeros = (value.reshape(len(value), -1, 4) == 0).sum(-1)
        assert (zeros >= 2).all(), name
        assert (value == 0).mean() >= 0.5
    assert ((codes["/lm_head"].reshape(288, -1, 4) == 0).sum(-1) < 2).any(), "control: the head is dense"
    expected = quantize(weights["model.layers.1.mlp.down_proj.weight"], form).codes.numpy()
    assert (codes["/model/layers.1/mlp/down_proj"] == expected).all()
    dense = shipped_codes(made(tmp_path / "dense", tiny_teacher, uniform(form))[0] / "onnx" / "model.onnx")
    assert ((dense["/model/layers.1/mlp/down_proj"].reshape(64, -1, 4) == 0).sum(-1) < 2).any()


@pytest.mark.parametrize("pattern", [SPARSE, Pattern("block", 0.5)], ids=lambda p: p.kind)
def test_an_artifact_of_gptq_has_its_integers_its_zeros_its_size_and_says_so(
    pattern: Pattern, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    candidate = uniform(GPTQ, embedding=FP32, pattern=pattern)
    weights, codes = calibrated(tiny_teacher, candidate)
    sizes = write_artifact(tmp_path / "a", tiny_teacher, candidate, weights, {}, codes)
    shipped = shipped_codes(tmp_path / "a" / "onnx" / "model.onnx")
    for i in range(3):
        layer = f"model.layers.{i}."
        names = [f"{layer}self_attn.{p}_proj.weight" for p in "qkv"]
        packed = shipped[f"/model/layers.{i}/attn/qkv_proj"]
        assert (packed == np.concatenate([codes[n].codes.numpy() for n in names])).all()
        assert (packed[(torch.cat([weights[n] for n in names]) == 0).numpy()] == 0).all()
        for node, name in (("attn/o_proj", "self_attn.o_proj"), ("mlp/gate_proj", "mlp.gate_proj")):
            value, weight = shipped[f"/model/layers.{i}/{node}"], weights[f"{layer}{name}.weight"]
            assert (value == codes[f"{layer}{name}.weight"].codes.numpy()).all()
            assert (value[(weight == 0).numpy()] == 0).all() and (value == 0).mean() >= 0.5
            assert (value != quantize(weight, INT4_FP).codes.numpy()).mean() > 0.02, "control: not rounded to nearest"
    predicted = compressed_bytes(weights, candidate, tiny_teacher.config, tiny_teacher.shape, codes)
    assert predicted.bytes == sizes.bytes
    facts = check_artifact(tmp_path / "a")
    assert Candidate.from_dict(facts["candidate"]) == candidate
    assert "int4 GPTQ" in (tmp_path / "a" / "README.md").read_text()


def test_the_hugging_face_folder_of_gptq_computes_what_the_engine_computes(
    teacher: Teacher, shipping: Shipping, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    candidate = CALIBRATED["everything"]
    weights, codes = calibrated(teacher, candidate)
    write_artifact(tmp_path / "a", teacher, candidate, weights, {}, codes)
    shipped = shipping.run(tmp_path / "a" / "onnx" / "model.onnx")
    with torch.no_grad():
        other = AutoModelForCausalLM.from_pretrained(tmp_path / "a" / "hf")(torch.from_numpy(shipping.ids)).logits
    assert worst(shipped, other) <= BAR
    assert worst(other, torch_logits(weights, to_nearest(candidate), teacher, shipping.ids)) > 10 * BAR


def test_tied_tables_of_one_format_ship_once_and_others_twice(tiny_teacher: Teacher, untied: Teacher) -> None:
    def tables(teacher: Teacher, candidate: Candidate) -> int:
        model = build_model(teacher.weights(), candidate, teacher.config, teacher.shape)
        return sum(1 for t in model.graph.initializer if t.dims and t.dims[0] == 288 and not t.name.endswith(".scales"))

    for form in (FP32, INT4, INT8):
        assert tables(tiny_teacher, uniform(form)) == 1
        assert tables(untied, uniform(form)) == 2
    assert tables(tiny_teacher, uniform(FP32, INT4, INT8)) == 2
    shared = uniform(GPTQ).canonical(tiny_teacher.shape)  # GPTQ in the layers does not split the table
    model = build_model(
        tiny_teacher.weights(), shared, tiny_teacher.config, tiny_teacher.shape, calibrated(tiny_teacher, shared)[1]
    )
    assert {t.name for t in model.graph.initializer} & {"embedding", "lm_head"} == {"embedding"}
    assert tables(tiny_teacher, uniform(FP32, INT4, FP32)) == 2


def test_mixed_kv_groups_run_in_the_engine_but_have_no_genai_folder(
    tiny_teacher: Teacher, shipping: Shipping, tmp_path: Path
) -> None:
    candidate = Candidate((Layer(128, 2, INT4_FP, FP32), Layer(32, 1), Layer(64, 2, FP32, INT4_FP)))
    weights = student_weights(tiny_teacher, candidate)
    shipped = shipping.logits(weights, candidate, tiny_teacher)
    assert worst(shipped, torch_logits(weights, candidate, tiny_teacher, shipping.ids)) <= BAR
    with pytest.raises(Infeasible, match="same KV groups"):
        write_artifact(tmp_path / "artifact", tiny_teacher, candidate, weights, {})


def test_weights_beyond_the_protobuf_limit_go_into_a_file_beside_the_model(
    tiny_teacher: Teacher, shipping: Shipping, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    inside = shipping.logits(tiny_teacher.weights(), uniform(INT4_FP), tiny_teacher)
    monkeypatch.setattr("paretune.compression.export.graph.INLINE_LIMIT_BYTES", 1000)
    folder, sizes, _ = made(tmp_path / "artifact", tiny_teacher, uniform(INT4_FP))
    data = folder / "onnx" / "model.onnx.data"
    assert data.is_file()
    assert sizes.bytes == data.stat().st_size + (folder / "onnx" / "model.onnx").stat().st_size
    assert torch.equal(shipping.run(folder / "onnx" / "model.onnx"), inside)
    check_artifact(folder)


def test_the_head_and_embedding_names_are_those_of_transformers(tiny_teacher: Teacher, untied: Teacher) -> None:
    shape: Shape = tiny_teacher.shape
    assert shape.tied
    assert EMBEDDING in tiny_teacher.weights()
    assert HEAD in untied.weights()
    assert torch.equal(
        quantized_weights(untied.weights(), uniform(INT4))[HEAD], fake_quantize(untied.weights()[HEAD], INT4)
    )


def test_nothing_in_an_artifact_can_name_code(artifact: Path) -> None:
    for path in artifact.rglob("*.json"):
        if path.name != "tokenizer.json":
            text = json.loads(path.read_text())
            assert "auto_map" not in text, path
