"""Damaged or foreign checkpoints and texts: refused before work starts, with the tensor, key or line named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from paretune.common import memory
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.search.prepare import plan as planning
from paretune.search.prepare.prepare import prepare
from paretune.search.spec import Spec, make_spec
from paretune.teachers.checkpoint.stored import INDEX, SINGLE, read_headers
from paretune.teachers.checkpoint.teacher import Teacher, load_teacher
from paretune.teachers.checkpoint.training_state import load_tensors, write_tensors
from paretune.teachers.text.corpus import user_corpus

TENSOR = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_teacher_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny teacher that a test may damage."""
    return Path(shutil.copytree(tiny_teacher_dir, tmp_path / "copy"))


@pytest.fixture
def shards(folder: Path) -> Path:
    """The same in two files with an index."""
    tensors = load_file(folder / SINGLE)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def problem_of(action: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        action()
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    return caught.value.problem


def teacher_problem(folder: Path | str) -> str:
    return problem_of(lambda: load_teacher(str(folder)))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    tensors = load_file(folder / SINGLE) | changes
    save_file({n: v.contiguous() for n, v in tensors.items() if v is not None}, folder / SINGLE, {"format": "pt"})


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_in_every_type(folder: Path, dtype: torch.dtype, value: float) -> None:
    tensor = load_file(folder / SINGLE)[TENSOR].to(dtype)
    change_tensors(folder, **{TENSOR: tensor})
    load_teacher(str(folder))
    tensor[-1, -1] = value
    change_tensors(folder, **{TENSOR: tensor})
    problem = teacher_problem(folder)
    assert f"tensor {TENSOR} holds NaN or infinity" in problem
    assert SINGLE in problem


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn])
def test_quantized_tensors_are_refused_by_name_and_type(folder: Path, dtype: torch.dtype) -> None:
    change_tensors(folder, **{TENSOR: load_file(folder / SINGLE)[TENSOR].to(dtype)})
    assert f"tensor {TENSOR} must hold one of F64, F32, F16, BF16" in teacher_problem(folder)


@pytest.mark.parametrize("name", ["model.layers.3.mlp.up_proj.weight", "adapter.weight", "model.embed_tokens.bias"])
def test_a_tensor_too_many_is_named(folder: Path, name: str) -> None:
    change_tensors(folder, **{name: torch.ones(4)})
    assert f"a llama has no tensor {name} (3 layers by config.json)" in teacher_problem(folder)


def test_a_tied_head_that_differs_is_refused(folder: Path) -> None:
    head = load_file(folder / SINGLE)["model.embed_tokens.weight"].clone()
    change_tensors(folder, **{"lm_head.weight": head})
    load_teacher(str(folder))
    head[7, 3] += 1
    change_tensors(folder, **{"lm_head.weight": head})
    assert "tensor lm_head.weight differs from the embedding" in teacher_problem(folder)
    change_config(folder, tie_word_embeddings=False)
    assert "lm_head.weight" in load_teacher(str(folder)).weights()


def test_shards_are_read_by_their_index(shards: Path, tiny_teacher_dir: Path) -> None:
    found, expected = load_teacher(str(shards)).weights(), load_teacher(str(tiny_teacher_dir)).weights()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    (shards / "consolidated.safetensors").write_bytes(b"not part of the checkpoint")
    load_teacher(str(shards))


def test_an_index_that_names_a_missing_file_says_for_which_tensor(shards: Path) -> None:
    file = "model-00002-of-00002.safetensors"
    (shards / file).unlink()
    problem = teacher_problem(shards)
    assert f"is in {file}, but there is no such file" in problem
    assert "tensor model." in problem


def test_an_index_that_lies_about_a_tensor_is_refused(shards: Path) -> None:
    index = json.loads((shards / INDEX).read_text())
    other = {f"model-0000{a}-of-00002.safetensors": f"model-0000{b}-of-00002.safetensors" for a, b in ((1, 2), (2, 1))}
    index["weight_map"][TENSOR] = other[index["weight_map"][TENSOR]]
    (shards / INDEX).write_text(json.dumps(index))
    assert f"tensor {TENSOR} is in {index['weight_map'][TENSOR]}, but that file has none" in teacher_problem(shards)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_point_outside_its_folder(shards: Path, shard: str) -> None:
    index = json.loads((shards / INDEX).read_text())
    index["weight_map"][TENSOR] = shard
    (shards / INDEX).write_text(json.dumps(index))
    assert f"tensor {TENSOR} must lie in its own folder, but in {shard!r}" in teacher_problem(shards)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_a_damaged_index_is_refused(shards: Path, text: str) -> None:
    (shards / INDEX).write_text(text)
    assert INDEX in teacher_problem(shards)


def test_one_tensor_in_two_files_is_refused(shards: Path) -> None:
    (shards / INDEX).unlink()
    load_teacher(str(shards))
    shutil.copy(shards / "model-00001-of-00002.safetensors", shards / "other.safetensors")
    problem = teacher_problem(shards)
    assert "is in both" in problem and "other.safetensors" in problem


@pytest.mark.parametrize("value", [[], "0", 288, -1, [0, 999], 1.5, True, {}])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_a_special_token_outside_the_vocabulary_is_refused(folder: Path, key: str, value: Any) -> None:
    change_config(folder, **{key: value})
    problem = teacher_problem(folder)
    assert f"{key} must be null, a token id from 0 to 287 or a list of them, but is {value!r}" in problem


@pytest.mark.parametrize(("value", "expected"), [(None, 0), (5, 5), ([7, 9], 7), (0, 0)])
def test_a_special_token_in_the_vocabulary_is_taken(folder: Path, value: Any, expected: int) -> None:
    change_config(folder, eos_token_id=value)
    assert load_teacher(str(folder)).end_token == expected


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path, write_teacher: Callable[..., Path]) -> None:
    load_teacher(str(write_teacher(tmp_path / "padded", vocab_size=576)))
    problem = teacher_problem(write_teacher(tmp_path / "other", vocab_size=577))
    assert "must cover at least half of the embedding, but has 288 tokens of 577" in problem


@pytest.mark.parametrize("path", ["", "x" * 300, "x/" * 3000, "a\0b"])
def test_an_impossible_teacher_path_is_a_usage_error(path: str, tmp_path: Path) -> None:
    def search() -> None:
        prepare(make_spec(None, None, {"teacher": path}), tmp_path)

    problem = problem_of(search)
    assert "teacher" in problem
    assert len(problem) < 500


@pytest.mark.parametrize("path", ["", "x" * 300, "x/" * 3000, "a\0b", "nowhere", "/dev/null"])
def test_impossible_data_is_a_usage_error(path: str, tmp_path: Path, tiny_teacher_dir: Path) -> None:
    def search() -> None:
        prepare(make_spec(None, None, {"data": path, "teacher": str(tiny_teacher_dir)}), tmp_path)

    problem = problem_of(search)
    assert "--data must name" in problem or "data: " in problem


TEXT = "".join(f"line {i} of a text with an ä in it\n" for i in range(40))


@pytest.mark.parametrize(
    ("data", "line", "words"),
    [
        (TEXT.encode("utf-16"), 1, "looks like UTF-16"),
        (TEXT.encode("utf-16-le"), 1, "looks like UTF-16"),
        (TEXT.encode("utf-32"), 1, "looks like UTF-32"),
        (b"plain\n" * 4 + TEXT.encode("latin-1"), 5, "is 0xe4"),
        (b"\xef\xbb\xbf" + b"plain\n" * 2 + b"\xff", 3, "is 0xff"),
        (b"plain\n" * 6 + b"PNG\0\0\0\0", 7, "is 0x00"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_text_in_another_encoding_is_named_by_line(
    data: bytes, line: int, words: str, in_folder: bool, tmp_path: Path, tiny_text: Path
) -> None:
    text = Path(shutil.copytree(tiny_text, tmp_path / "text"))
    (text / "odd.txt").write_bytes(data)
    problem = problem_of(lambda: user_corpus(text if in_folder else text / "odd.txt"))
    assert f"odd.txt:{line}: the text must be UTF-8" in problem
    assert words in problem


def test_a_byte_order_mark_of_utf8_is_no_text(tmp_path: Path, tiny_text: Path) -> None:
    text = Path(shutil.copytree(tiny_text, tmp_path / "text"))
    (text / "marked.txt").write_bytes(b"\xef\xbb\xbfmarked text\r\nof two lines\n")
    documents = [d for split in user_corpus(text).splits.values() for d in split]
    assert "marked text\nof two lines\n" in [d.text for d in documents]


def test_a_file_name_need_not_be_utf8(tmp_path: Path, tiny_text: Path) -> None:
    text = Path(shutil.copytree(tiny_text, tmp_path / "text"))
    try:
        Path(os.fsdecode(os.fsencode(text) + b"/caf\xe9.txt")).write_text("some text\n")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    assert len(user_corpus(text).fingerprint()) == 16


def test_a_teacher_that_does_not_fit_into_memory_is_refused(
    tiny_teacher_dir: Path, tiny_text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = Spec(teacher=str(tiny_teacher_dir), data=str(tiny_text), budget="60s")
    needed = prepare(spec, tmp_path).plan.memory_bytes
    monkeypatch.setattr(planning, "available_memory", lambda: needed)
    prepare(spec, tmp_path)
    monkeypatch.setattr(planning, "available_memory", lambda: needed - 1)
    with pytest.raises(EnvironmentProblem) as caught:
        prepare(spec, tmp_path)
    assert caught.value.exit_code == 5
    assert f"about {needed / 1e9:.1f} GB of memory" in caught.value.problem
    assert caught.value.remedy


def test_memory_that_a_control_group_withholds_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = memory.available_memory()
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    assert memory.available_memory() > 0.5 * machine  # no files: no limit
    (tmp_path / "memory.max").write_text("900000000\n")
    (tmp_path / "memory.current").write_text("500000000\n")
    (tmp_path / "memory.stat").write_text("anon 400000000\ninactive_file 60000000\n")
    assert memory.available_memory() == 460_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_memory() > 0.5 * machine


def test_the_estimate_of_memory_grows_with_weights_and_logits(tiny_teacher: Teacher) -> None:
    """By hand: seven copies of the weights, two of the tables, five of a batch of logits, in float32."""
    needed = planning.memory_needed(tiny_teacher)
    by_hand = 2.2e9 + 4 * (7 * tiny_teacher.parameters + 2 * 288 * 64 + 5 * 6 * 256 * 288)
    assert needed == int(by_hand)
    wide = dataclasses.replace(tiny_teacher, shape=dataclasses.replace(tiny_teacher.shape, vocab=49152))
    logits = 2 * 256 * 49152  # two windows, because more would pass the limit
    assert planning.memory_needed(wide) == int(2.2e9 + 4 * (7 * wide.parameters + 2 * 49152 * 64 + 5 * logits))


def test_weights_of_another_type_are_converted_once_for_all_processes(folder: Path, tmp_path: Path) -> None:
    expected = {name: value.to(torch.bfloat16) for name, value in load_file(folder / SINGLE).items()}
    change_tensors(folder, **expected)
    teacher = load_teacher(str(folder)).kept_in(tmp_path / "cache")
    first = teacher.weights()
    kept = list((tmp_path / "cache" / "teachers").iterdir())
    assert len(kept) == 1
    written = kept[0].stat().st_mtime_ns
    again = load_teacher(str(folder)).kept_in(tmp_path / "cache").weights()
    assert kept[0].stat().st_mtime_ns == written
    for name, value in expected.items():
        assert torch.equal(first[name], value.float()) and torch.equal(again[name], value.float()), name
    assert is_mapped(again["model.embed_tokens.weight"], kept[0])
    del first, again
    kept[0].write_bytes(b"half-written")
    with pytest.warns(RuntimeWarning, match=kept[0].name):
        third = load_teacher(str(folder)).kept_in(tmp_path / "cache").weights()
    assert all(torch.equal(third[name], value.float()) for name, value in expected.items())


def test_a_float32_teacher_is_mapped_as_it_lies(folder: Path, tmp_path: Path) -> None:
    weights = load_teacher(str(folder)).kept_in(tmp_path / "cache").weights()
    assert not (tmp_path / "cache").exists()
    assert all(is_mapped(value, folder / SINGLE) for value in weights.values())
    assert not is_mapped(weights[TENSOR].clone(), folder / SINGLE), "the control passed"


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether a tensor's memory is a mapping of `file`, by /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return line.endswith(str(file))
    return False


def test_what_is_written_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "half": torch.randn(5, 3).to(torch.bfloat16),
        "turned": torch.randn(4, 6).t(),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "count": torch.tensor([7]),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"format": "pt"})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys() == load_tensors(tmp_path / "a.safetensors")[0].keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    half = read_headers([tmp_path / "a.safetensors"])["half"]
    assert (
        np.concatenate(list(half.chunks())).tolist()
        == tensors["half"].flatten().view(torch.int16).numpy().astype(np.uint16).tolist()
    )
