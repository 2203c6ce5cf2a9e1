"""What is refused before a weight is loaded, and that training can be interrupted anywhere."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.common.errors import UsageError
from paretune.common.files import write_atomically
from paretune.teachers import pretrain as pretraining
from paretune.teachers.checkpoint.teacher import EMBEDDED, EMBEDDED_FOLDER, Teacher, expected_tensors, load_teacher
from paretune.teachers.checkpoint.training_state import (
    load_tensors,
    optimizer_tensors,
    restore_optimizers,
    save_tensors,
)
from paretune.teachers.text.batches import Batches
from paretune.teachers.text.corpus import is_held_out, library_mismatches, library_modules


@pytest.fixture
def folder(tiny_teacher_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher that a test may damage."""
    return Path(shutil.copytree(tiny_teacher_dir, tmp_path / "copy"))


def problem_of(folder: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder)).weights()
    assert caught.value.remedy
    return caught.value.problem


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(
        {name: value for name, value in tensors.items() if value is not None},
        folder / "model.safetensors",
        {"format": "pt"},
    )


def test_the_embedded_teacher_is_whole() -> None:
    teacher = load_teacher(EMBEDDED)
    weights = teacher.weights()
    assert teacher.parameters == sum(value.numel() for value in weights.values()) == 5_770_496
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected_tensors(teacher.shape)
    assert teacher.context == 512
    assert teacher.end_token == 0


def test_the_embedded_teachers_held_out_modules_are_those_of_this_python_or_the_difference_is_listed(
    tmp_path: Path,
) -> None:
    expected = json.loads((EMBEDDED_FOLDER / "heldout.json").read_text())["modules"]
    assert all(is_held_out(name) for name in expected)
    here = {name for name, _ in library_modules() if is_held_out(name)}
    mismatches = library_mismatches(EMBEDDED_FOLDER / "heldout.json")
    assert set(mismatches) >= expected.keys() ^ here
    kept = sorted(expected.keys() - set(mismatches))
    assert len(kept) > 10, f"hardly any held-out module is that of training: {mismatches}"
    damaged = dict(expected) | {kept[0]: "0" * 64, "no/such/module.py": "0" * 64}
    del damaged[kept[1]]
    (tmp_path / "heldout.json").write_text(json.dumps({"modules": damaged}))
    assert set(library_mismatches(tmp_path / "heldout.json")) == {*mismatches, kept[0], kept[1], "no/such/module.py"}


def test_parameters_and_weights_follow_the_config(
    tiny_teacher: Teacher, write_teacher: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    untied = load_teacher(str(write_teacher(tmp_path / "untied", tie_word_embeddings=False, head_dim=32)))
    for teacher in (tiny_teacher, untied):
        model = AutoModelForCausalLM.from_pretrained(teacher.folder)
        assert teacher.parameters == sum(p.numel() for p in model.parameters())
        state = model.state_dict()
        for name, value in teacher.weights().items():
            assert torch.equal(value, state[name]), name
    assert "lm_head.weight" in untied.weights()
    assert "lm_head.weight" not in tiny_teacher.weights()


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert "is not a folder" in problem_of(tmp_path / "nowhere")
    assert "config.json" in problem_of(tmp_path)
    (tmp_path / "file").write_text("")
    assert "is not a folder" in problem_of(tmp_path / "file")


@pytest.mark.parametrize("fraction", [0.0, 0.00002, 0.001, 0.02, 0.5, 0.999, 0.9999999])
def test_a_half_written_file_is_refused_wherever_it_was_cut(folder: Path, fraction: float) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(fraction * len(data))])
    problem = problem_of(folder)
    assert "model.safetensors" in problem


@pytest.mark.parametrize("length", [1, 7, 8, 9, 10, 11, 200])
def test_a_file_cut_in_its_header_is_refused(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors" in problem_of(folder)


class Canary:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_a_pickle_is_refused_and_never_executed(folder: Path, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    load_teacher(str(folder)).weights()  # beside safetensors it is ignored
    (folder / "model.safetensors").unlink()
    assert name in problem_of(folder)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists(), "the canary must sing when somebody unpickles it"


def test_a_pickle_that_calls_itself_safetensors_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Canary(tmp_path / "canary")) * 20)
    assert "model.safetensors" in problem_of(folder)
    assert not (tmp_path / "canary").exists()


def test_a_folder_without_weights_or_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "moved")
    assert "tokenizer.json" in problem_of(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert "tokenizer.json" in problem_of(folder)
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in problem_of(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "model_type='bert'"),
        ({"model_type": ...}, "model_type=None"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "yarn"}}, "'yarn'"),
        ({"rope_parameters": [1]}, "rope"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "kv heads"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads"),
        ({"head_dim": 12}, "head_dim"),
        ({"head_dim": "16"}, "head_dim"),
        ({"num_key_value_heads": -2}, "num_key_value_heads"),
        ({"head_dim": -16}, "head_dim"),
    ],
)
def test_a_config_that_is_not_supported_is_named_by_its_key(folder: Path, changes: dict[str, Any], words: str) -> None:
    change_config(folder, **changes)
    problem = problem_of(folder)
    assert words in problem
    assert "config.json" in problem


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\ufffd", '{"model_type": "llama"'])
def test_a_damaged_config_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert "config.json" in problem_of(folder)


def test_keys_that_name_code_are_dropped(folder: Path) -> None:
    auto_map = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "configuration_evil.Evil"}
    change_config(folder, auto_map=auto_map, trust_remote_code=True, _name_or_path="evil/evil")
    (folder / "modeling_evil.py").write_text("raise SystemExit('remote code ran')")
    teacher = load_teacher(str(folder))
    assert not {"auto_map", "trust_remote_code", "_name_or_path"} & teacher.config.keys()
    teacher.weights()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_named(folder: Path, value: float) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name].clone()
    tensor[3, 5] = value
    change_tensors(folder, **{name: tensor})
    assert name in problem_of(folder)


def test_a_missing_or_misshapen_tensor_is_named(folder: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    change_tensors(folder, **{name: tensor[:-1].contiguous()})
    problem = problem_of(folder)
    assert name in problem
    assert "(32, 64)" in problem
    assert "(31, 64)" in problem
    change_tensors(folder, **{name: None})
    assert f"lacks the tensor {name}" in problem_of(folder)


def test_an_untied_config_needs_a_head(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in problem_of(folder)


@pytest.mark.parametrize("vocab", [287, 100])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(
    tmp_path: Path, write_teacher: Callable[..., Path], vocab: int
) -> None:
    assert f"has 288 tokens, but the model only {vocab}" in problem_of(
        write_teacher(tmp_path / "small", vocab_size=vocab)
    )


def test_a_token_id_beyond_the_vocabulary_is_refused_even_if_there_are_few_tokens(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    tokenizer["model"]["vocab"][last] = 5000
    path.write_text(json.dumps(tokenizer))
    assert "tokens" in problem_of(folder)


def test_the_digest_follows_every_file_that_decides_the_numbers(folder: Path, tiny_teacher: Teacher) -> None:
    assert load_teacher(str(folder)).digest == tiny_teacher.digest
    (folder / "notes.txt").write_text("no matter")
    assert load_teacher(str(folder)).digest == tiny_teacher.digest
    weight = load_file(folder / "model.safetensors")["model.norm.weight"].clone()
    weight[0] += 1
    digests = {tiny_teacher.digest}
    change_config(folder, rms_norm_eps=1e-5)
    digests.add(load_teacher(str(folder)).digest)
    change_tensors(folder, **{"model.norm.weight": weight})
    digests.add(load_teacher(str(folder)).digest)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    digests.add(load_teacher(str(folder)).digest)
    assert len(digests) == 4


def test_the_learning_rate_warms_up_holds_and_falls() -> None:
    scale = pretraining.learning_rate_scale
    warm_up = [scale(step, 0.0) for step in range(101)]
    assert warm_up == pytest.approx([min(1.0, (step + 1) / 100) for step in range(101)])
    assert [scale(1000, p) for p in (0.1, 0.3, 0.499)] == [1.0, 1.0, 1.0]
    falling = [scale(1000, p / 100) for p in range(50, 101)]
    assert falling == sorted(falling, reverse=True)
    assert scale(1000, 0.75) == pytest.approx(0.5)
    assert scale(1000, 1.0) == pytest.approx(0.02)


def test_batches_are_a_pure_function_of_seed_and_step() -> None:
    tokens = torch.arange(1000)
    steps = [0, 7, 3, 100, 24, 25, 0, 7]
    ordered = Batches(tokens, 10, 4, seed=1)
    expected = {step: ordered.at(step) for step in range(101)}
    jumping = Batches(tokens, 10, 4, seed=1)
    for step in steps:
        assert torch.equal(jumping.at(step), expected[step])
        assert torch.equal(Batches(tokens, 10, 4, seed=1).at(step), expected[step])
    other = Batches(tokens, 10, 4, seed=2)
    assert not all(torch.equal(other.at(step), expected[step]) for step in range(5))


def test_batches_read_every_window_once_per_epoch_and_shift_afterwards() -> None:
    tokens = torch.arange(1000)
    batches = Batches(tokens, 10, 3, seed=0)
    assert (batches.windows, batches.per_epoch) == (99, 33)
    first = torch.cat([batches.at(step) for step in range(33)])
    assert sorted(first[:, 0].tolist()) == list(range(0, 990, 10))
    assert (first - first[:, :1] == torch.arange(10)).all()
    second = torch.cat([batches.at(step) for step in range(33, 66)])
    assert (second - second[:, :1] == torch.arange(10)).all()
    assert second.max() <= 999
    assert (second[:, 0] % 10 != 0).any()
    assert Batches(tokens.numpy().astype("uint32"), 10, 3, 0).at(2).equal(batches.at(2))


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 11 tokens, but has 11"):
        Batches(torch.arange(11), 10, 1, 0)
    assert Batches(torch.arange(12), 10, 4, 0).at(5).shape == (4, 10)


def tiny_training(steps: int, resume_at: int | None, file: Path) -> dict[str, torch.Tensor]:
    """`steps` of the pretraining's own optimizers on a tiny model; at `resume_at` everything is saved, dropped and rebuilt."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def fresh() -> tuple[Any, list[torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                tie_word_embeddings=True,
            )
        )
        return model, pretraining.make_optimizers(model)

    batches = Batches(torch.randint(0, 32, (500,), generator=torch.Generator().manual_seed(1)), 8, 4, 0)
    model, optimizers = fresh()
    for step in range(steps):
        if step == resume_at:
            named = {f"model.{name}": p for name, p in model.named_parameters()}
            save_tensors(file, {**named, **optimizer_tensors(optimizers)}, {"step": step})
            model, optimizers = fresh()
            tensors, meta = load_tensors(file)
            assert meta == {"step": step}
            model.load_state_dict(
                {k.removeprefix("model."): v for k, v in tensors.items() if not k.startswith("optimizer")}, strict=False
            )
            restore_optimizers(optimizers, tensors)
        x = batches.at(step)
        model(x, labels=x).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_training_continues_bit_for_bit_from_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_training(6, None, tmp_path / "state.safetensors")
    resumed = tiny_training(6, 3, tmp_path / "state.safetensors")
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name
    monkeypatch.setitem(globals(), "restore_optimizers", lambda *_: None)  # negative control: forget the momentum
    forgot = tiny_training(6, 3, tmp_path / "state.safetensors")
    assert any(not torch.equal(value, forgot[name]) for name, value in whole.items())


def test_pretraining_stops_resumes_and_finishes_with_a_loadable_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_text: Path
) -> None:
    """The real `train` on a few files with a tiny model and no compilation, interrupted twice."""
    from transformers import LlamaConfig, LlamaForCausalLM

    files = sorted(tiny_text.iterdir())[:12]
    modules = [(path.name, path) for path in files]
    held_out = {modules[0][0], modules[1][0]}
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    for name, value in {
        "library_modules": lambda: modules,
        "is_held_out": lambda n: n in held_out,
        "VOCAB": 300,
        "CONTEXT": 16,
        "BATCH": 4,
        "make_model": lambda: LlamaForCausalLM(config),
    }.items():
        monkeypatch.setattr(pretraining, name, value)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    steps = []
    for stop_after in (0.1, 0.2, math.inf):
        pretraining.train(tmp_path, 0.4, stop_after, seed=0)
        steps.append(load_tensors(tmp_path / "state.safetensors")[1]["step"])
        assert (tmp_path / "figures.json").exists() == (stop_after == math.inf)
    assert steps == sorted(set(steps))
    teacher = load_teacher(str(tmp_path))
    assert teacher.shape.vocab == 300
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["tokens"] == steps[-1] * 4 * 16
    assert 0 < figures["held_out_nll"] < math.log(300)
    assert json.loads((tmp_path / "heldout.json").read_text())["modules"].keys() == held_out


def test_atomic_writes_leave_the_old_file_when_they_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "file"
    write_atomically(target, b"old")

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")
    with pytest.raises(OSError, match="No space"):
        save_tensors(target, {"a": torch.ones(1)}, {})
    assert target.read_bytes() == b"old"
    assert [p.name for p in target.parent.iterdir()] == ["file"]
