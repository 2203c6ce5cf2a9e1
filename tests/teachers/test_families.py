"""Every model family from its folder to the engine, transformers' own modules as the oracle, each check with its control."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.common.errors import UsageError
from paretune.compression.distill import ElasticRecipe, ElasticTrainer, RecoveryRecipe, recover
from paretune.compression.export.artifact import genai_config, write_artifact
from paretune.compression.network.student import EMBEDDING, Network
from paretune.compression.prune import Importance, slice_weights
from paretune.spaces import Candidate, Format, Layer, Shape, Space
from paretune.teachers.checkpoint.families import COMMON, FAMILIES
from paretune.teachers.checkpoint.layout import GPT2_PREFIX, stored_name, stored_shapes, to_stored
from paretune.teachers.checkpoint.teacher import Teacher, expected_tensors, load_teacher

ROOT = Path(__file__).resolve().parents[2]
CASES = ["fp32", "int4/fp32", "int8/int8", "int4/int8", "sort", "cut", "cache", "hf"]


def _page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_models"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


page = _page()


@pytest.fixture(scope="module")
def figures() -> Callable[[str], Any]:
    """`figures(model)`: all figures of one model, measured once."""
    kept: dict[str, Any] = {}

    def find(model: str) -> Any:
        if model not in kept:
            kept[model] = page.measure(model)
        return kept[model]

    return find


def test_the_cases_are_all_families_and_properties() -> None:
    assert list(page.PROPERTIES) == CASES
    assert {changes["family"] for changes in page.MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("model", page.MODELS)
def test_two_ways_to_compute_the_same_agree(model: str, case: str, figures: Callable[[str], Any]) -> None:
    found = figures(model)[case]
    assert found.difference <= page.BAR
    assert found.control > 10 * page.BAR, "the control passed"


def test_the_page_has_the_figures_of_today(figures: Callable[[str], Any]) -> None:
    text = page.render({model: figures(model) for model in page.MODELS})
    kept = page.PAGE.read_text()
    assert page.same_page(kept, text), "run python docs/make_models.py"
    assert not page.same_page(kept, text.replace("Qwen3, tied", "Qwen4, tied"))
    assert "1e-5 /" in text
    assert not page.same_page(kept, text.replace("1e-5 /", "1e-3 /"))
    assert page.same_page(kept, kept.replace("1e-5 /", "1e-6 /")), "another processor may sum in another order"
    for name in FAMILIES:
        assert f"`{name}`" in kept


@pytest.mark.parametrize("model", page.MODELS)
def test_onnxruntime_genai_streams_what_transformers_decodes_greedily(model: str, tmp_path: Path) -> None:
    toy = page.make_toy(model, tmp_path)
    expected, margin = page.greedy(toy, toy.weights)
    assert len(expected) > 20, "the prompt ends too early to show anything"
    assert margin > 10 * page.BAR, "a tie would make the comparison a matter of luck"
    assert page.streamed(toy) == expected
    turned = {**toy.weights, EMBEDDING: toy.weights[EMBEDDING].roll(1, 0)}
    assert page.greedy(toy, turned)[0] != expected
    kind = "llama" if toy.shape.family == "gpt2" else toy.shape.family
    assert genai_config(toy.teacher, toy.whole(page.INT4))["model"]["type"] == kind


@pytest.fixture(params=FAMILIES)
def teacher(request: pytest.FixtureRequest, tmp_path: Path, write_teacher: Callable[..., Path]) -> Teacher:
    return load_teacher(str(write_teacher(tmp_path / "model", family=request.param)))


def test_the_expected_tensors_are_those_of_transformers(teacher: Teacher) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher.folder)
    expected = expected_tensors(teacher.shape)
    state = dict(model.state_dict())
    if teacher.shape.tied:
        del state["lm_head.weight"]
    prefix = GPT2_PREFIX if teacher.shape.family == "gpt2" else ""
    stored = {name.removeprefix(prefix): tuple(value.shape) for name, value in state.items()}
    assert stored == stored_shapes(teacher.shape)
    assert {name: tuple(value.shape) for name, value in teacher.weights().items()} == expected
    assert teacher.parameters == sum(p.numel() for p in model.parameters())
    again = to_stored(teacher.weights(), teacher.shape)
    assert again.keys() == state.keys()
    for name, value in again.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_silent_config_means_is_what_transformers_assumes(name: str) -> None:
    family = FAMILIES[name]
    for key, value in family.defaults.items():
        assert family.config_class.__dataclass_fields__[key].default == value, key
    fields = family.config_class.__dataclass_fields__
    for key in ("num_key_value_heads", "head_dim", "sliding_window"):
        if key in fields and fields[key].default is not None:
            assert key in family.defaults, key


def problem_of(folder: Path) -> str:
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder))
    assert caught.value.remedy
    return caught.value.problem


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, file, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("family", "tensor"), [(f, name) for f in FAMILIES for name in FAMILIES[f].layer_tensors if name not in COMMON]
)
def test_a_missing_or_misshapen_bias_or_norm_is_named(
    family: str, tensor: str, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder, name = write_teacher(tmp_path / "model", family=family), f"model.layers.2.{tensor}"
    prefix, name = (GPT2_PREFIX, stored_name(name)) if family == "gpt2" else ("", name)
    load_teacher(str(folder))
    value = load_file(folder / "model.safetensors")[prefix + name]
    change_tensors(folder, **{prefix + name: value[:-1].clone()})
    problem = problem_of(folder)
    assert name in problem
    assert str((len(value),)) in problem
    assert str((len(value) - 1,)) in problem
    change_tensors(folder, **{prefix + name: None})
    assert f"lacks the tensor {name}" in problem_of(folder)


@pytest.mark.parametrize(("told", "real", "tensor"), [("llama", "qwen2", "bias"), ("mistral", "qwen3", "_norm.weight")])
def test_a_config_of_another_family_is_refused_by_the_tensors_it_would_ignore(
    told: str, real: str, tensor: str, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder = write_teacher(tmp_path / "model", family=real)
    change_config(folder, model_type=told)
    problem = problem_of(folder)
    assert f"a {told} has no tensor model.layers.0." in problem
    assert tensor in problem


@pytest.mark.parametrize(
    ("tensor", "accepted"),
    [
        ("model.layers.0.self_attn.rotary_emb.inv_freq", True),  # an old buffer that transformers ignores too
        ("model.layers.3.self_attn.q_proj.bias", False),  # a layer beyond num_hidden_layers
        ("model.vision.weight", False),
        ("model.layers.0.self_attn.o_proj.bias", False),
        ("model.layers.0.mlp.up_proj.bias", False),
        ("model.layers.0.pre_feedforward_layernorm.weight", False),
    ],
)
def test_tensors_that_would_be_ignored_in_a_computation_are_refused(
    tensor: str, accepted: bool, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder = write_teacher(tmp_path / "model", family="qwen2")
    change_tensors(folder, **{tensor: torch.ones(64)})
    if accepted:
        load_teacher(str(folder))
    else:
        assert f"a qwen2 has no tensor {tensor}" in problem_of(folder)


WINDOWS: list[tuple[str, dict[str, Any], bool]] = [
    ("mistral", {"sliding_window": None}, True),
    ("mistral", {"sliding_window": 512}, True),
    ("mistral", {"sliding_window": 511}, False),
    ("mistral", {"sliding_window": ...}, True),  # transformers assumes 4096
    ("mistral", {"sliding_window": ..., "max_position_embeddings": 4097}, False),
    ("mistral", {"sliding_window": "512"}, False),
    ("mistral", {"sliding_window": None, "max_position_embeddings": ...}, True),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": False}, True),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": ...}, True),
    ("qwen2", {"sliding_window": 64, "use_sliding_window": True}, False),
    ("qwen3", {"sliding_window": 64, "use_sliding_window": True}, False),
    ("qwen3", {"sliding_window": 512, "use_sliding_window": True}, True),
    ("qwen2", {"max_position_embeddings": ...}, True),
    ("llama", {"sliding_window": 64}, True),  # a Llama has none, the key is without effect
]


@pytest.mark.parametrize(("family", "changes", "accepted"), WINDOWS)
def test_a_window_below_the_context_is_refused(
    family: str, changes: dict[str, Any], accepted: bool, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder = write_teacher(tmp_path / "model", family=family)
    change_config(folder, **changes)
    if accepted:
        load_teacher(str(folder))
        return
    problem = problem_of(folder)
    assert "sliding_window must be null or at least max_position_embeddings" in problem
    assert repr(changes.get("sliding_window")) in problem or changes.get("sliding_window") is ...


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("value", [None, 0, "512"])
def test_an_impossible_context_is_refused(
    name: str, value: Any, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder, key = write_teacher(tmp_path / "model", family=name), "max_position_embeddings"
    key = FAMILIES[name].own_keys.get(key, key)
    change_config(folder, **{key: value})
    assert f"{key} must be a positive integer" in problem_of(folder)


def test_configs_in_the_form_of_older_checkpoints_are_understood(teacher: Teacher) -> None:
    """What most folders look like: rope_theta at the top, torch_dtype, keys for windows that are not used."""
    if teacher.shape.positions:
        pytest.skip("GPT-2 has no rotary positions")
    change_config(
        teacher.folder,
        rope_parameters=...,
        rope_theta=1e6,
        torch_dtype="bfloat16",
        dtype=...,
        layer_types=...,
        max_window_layers=2,
        use_mrope=False,
    )
    toy = page.Toy(load_teacher(str(teacher.folder)), teacher.folder)
    found = toy.engine_logits(toy.weights, toy.whole(page.FP32))
    assert page.worst(found, toy.transformers_logits(toy.weights)) <= page.BAR
    change_config(teacher.folder, rope_theta=1e4)
    assert page.worst(found, toy.transformers_logits(toy.weights)) > 10 * page.BAR


def test_a_window_of_the_context_computes_full_attention(tmp_path: Path, write_teacher: Callable[..., Path]) -> None:
    """What is accepted is exact: transformers with the window against the network without; a smaller one differs."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 288, (1, 64), generator=torch.Generator().manual_seed(0))
    folder = write_teacher(tmp_path / "model", family="mistral", sliding_window=64, max_position_embeddings=64)
    teacher = load_teacher(str(folder))
    with torch.no_grad():
        found = Network(teacher.config, teacher.shape, 3)(teacher.weights(), ids)
        assert (found - AutoModelForCausalLM.from_pretrained(folder)(ids).logits).abs().max() <= 1e-5
        change_config(folder, sliding_window=32)
        assert (found - AutoModelForCausalLM.from_pretrained(folder)(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("family", "architecture"), [("llama", "Mistral"), ("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")]
)
def test_heads_that_do_not_divide_the_hidden_width_have_a_standard_folder(
    family: str, architecture: str, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    """Three of four KV groups are six heads on a hidden width of 128."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4}
    teacher = load_teacher(str(write_teacher(tmp_path / "model", family=family, **sizes)))
    order = Importance((tuple(range(128)),) * 3, ((3, 1, 0, 2),) * 3, (0, 2, 1))
    candidate = Candidate((Layer(96, 3),) * 2)
    weights = slice_weights(teacher.weights(), candidate, order, teacher.shape)
    write_artifact(tmp_path / "artifact", teacher, candidate, weights, {})
    config = json.loads((tmp_path / "artifact" / "hf" / "config.json").read_text())
    assert config["architectures"] == [f"{architecture}ForCausalLM"]
    assert config["model_type"] == architecture.lower()
    assert config.get("sliding_window") is None
    assert "`hf/` is the same student" in (tmp_path / "artifact" / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "artifact" / "hf")
    ids = torch.randint(0, 288, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = Network(teacher.config, teacher.shape, 2)(weights, ids)
        assert (model(ids).logits - expected).abs().max() <= 1e-5
        assert (model(ids).logits[:, 1:] - expected[:, :-1]).abs().max() > 1e-2


def test_the_layout_of_the_first_gpt2_folders_is_read(tmp_path: Path, write_teacher: Callable[..., Path]) -> None:
    """openai-community/gpt2: no prefix, the causal mask as a buffer, no n_inner, the head written out."""
    folder = write_teacher(tmp_path / "model", family="gpt2", intermediate_size=256)
    expected = load_teacher(str(folder)).weights()
    tensors = load_file(folder / "model.safetensors")
    plain = {name.removeprefix(GPT2_PREFIX): value for name, value in tensors.items()}
    plain["h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    plain["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    plain["lm_head.weight"] = plain["wte.weight"].clone()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, n_inner=...)
    found = load_teacher(str(folder)).weights()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activation_function": "relu"}, "activation_function must be 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx must be False"),
        ({"scale_attn_weights": False}, "scale_attn_weights must be True"),
        ({"add_cross_attention": True}, "add_cross_attention must be False"),
        ({"n_head": 5}, "n_embd must be a multiple of n_head, but got 64, 5"),
        ({"n_layer": None}, "n_layer must be a positive integer"),
        ({"n_head": 8}, "head_dim"),
    ],
)
def test_a_gpt2_that_computes_something_else_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path, write_teacher: Callable[..., Path]
) -> None:
    folder = write_teacher(tmp_path / "model", family="gpt2")
    change_config(folder, **changes)
    assert words in problem_of(folder)


def test_gpt2_with_fewer_heads_ships_the_cut_ones_as_zeros(tmp_path: Path, write_teacher: Callable[..., Path]) -> None:
    toy = page.Toy(load_teacher(str(write_teacher(tmp_path / "model", family="gpt2"))), tmp_path)
    write_artifact(tmp_path / "artifact", toy.teacher, toy.cut, toy.cut_weights(toy.weights), {})
    config = json.loads((tmp_path / "artifact" / "hf" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("gpt2", ["GPT2LMHeadModel"])
    assert (config["n_head"], config["n_inner"], config["n_layer"], config["n_embd"]) == (4, 96, 2, 64)
    tensors = load_file(tmp_path / "artifact" / "hf" / "model.safetensors")
    q, k, v = tensors["transformer.h.0.attn.c_attn.weight"].split(64, 1)
    assert all((part[:, 48:] == 0).all() and (part[:, :48] != 0).any() for part in (q, k, v))
    assert (tensors["transformer.h.0.attn.c_proj.weight"][48:] == 0).all()


def test_gpt2_keeps_its_residual_width() -> None:
    shape = Shape(3, 128, 256, 8, 8, 16, 288, True, "gpt2", 512, False)
    assert Space.of(shape, ("fp32/fp32",), hidden=True).hidden_widths == (128,)
    assert len(Space.of(replace(shape, gated=True), ("fp32/fp32",), hidden=True).hidden_widths) > 1


def test_left_padding_does_not_move_gpt2s_positions(tmp_path: Path, write_teacher: Callable[..., Path]) -> None:
    """Positions count the tokens that the mask lets through, and go on behind a cache."""
    toy = page.Toy(load_teacher(str(write_teacher(tmp_path / "model", family="gpt2"))), tmp_path)
    session = toy.decoder(toy.weights, toy.whole(page.FP32)).session
    graph = onnx.load(str(tmp_path / "model.onnx"))
    del graph.graph.output[:]
    graph.graph.output.append(onnx.helper.make_tensor_value_info("/model/positions/own/output", 7, None))
    part = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {i.name: np.zeros((2, 4, 4, 16), np.float32) for i in session.get_inputs() if "past" in i.name}
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    own = part.run(None, {**feeds, "input_ids": np.ones((2, 1), np.int64), "attention_mask": mask})[0]
    assert own.tolist() == [[2], [4]]


def test_layers_of_different_widths_have_no_standard_folder_and_the_card_says_so(
    tiny_teacher: Teacher, tmp_path: Path
) -> None:
    order = Importance((tuple(range(128)),) * 3, ((0, 1),) * 3, (0, 2, 1))
    candidate = Candidate((Layer(128, 2), Layer(64, 2), Layer(128, 2)))
    weights = slice_weights(tiny_teacher.weights(), candidate, order, tiny_teacher.shape)
    write_artifact(tmp_path / "artifact", tiny_teacher, candidate, weights, {})
    assert not (tmp_path / "artifact" / "hf").exists()
    assert "There is no `hf/` folder" in (tmp_path / "artifact" / "README.md").read_text()


def test_every_tensor_of_a_family_learns(teacher: Teacher, tmp_path: Path) -> None:
    """A few steps of the elastic training and of recovery under 4-bit rounding move every tensor, and the bf16 pass of the
    search stays close to float32."""
    tokens = torch.randint(1, 288, (4000,), generator=torch.Generator().manual_seed(0)).numpy()
    space = Space.of(teacher.shape, ("fp32/fp32", "int4/fp32"))
    recipe = ElasticRecipe(seconds=100.0, context=32, batch=4)
    calibration = torch.from_numpy(tokens[:256]).view(8, 32)
    trainer = ElasticTrainer(teacher, space, tokens, calibration, recipe, tmp_path / "elastic.safetensors")
    before = {name: value.detach().clone() for name, value in trainer.parameters.items()}
    for _ in range(3):
        trainer.step()
    for name, value in trainer.parameters.items():
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value, before[name]), name
    network, weights = Network(teacher.config, teacher.shape, 3), teacher.weights()
    form = Format(4, 32, "int8")
    candidate = Candidate((Layer(teacher.shape.ffn, teacher.shape.kv_heads, form, form),) * 3, form, form)
    schedule = RecoveryRecipe(tokens=384, context=32, batch=4)
    recovered, facts = recover(weights, weights, {}, candidate, lambda _: network, 3, tokens, schedule)
    assert facts["qat"] == 1.0
    for name, tensor in recovered.items():
        assert torch.isfinite(tensor).all(), name
        assert not torch.equal(tensor, weights[name]), name
    with torch.no_grad():
        exact = network(weights, calibration)
        with torch.autocast("cpu", torch.bfloat16):
            rough = network(weights, calibration)
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
