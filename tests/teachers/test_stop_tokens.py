"""All tokens that end a text, from whichever file names them, and none that no file names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretune.common.errors import UsageError
from paretune.search.prepare.prepare import runtime_notes
from paretune.teachers.checkpoint.teacher import load_teacher
from support import strange_teachers as strange
from support.artifacts import exported, generated

NO_END = {"eos_token": ...}
# config.json's value, generation_config.json's, the tokenizer's text: the right tokens
CASES: dict[str, tuple[Any, Any, Any, tuple[int, ...]]] = {
    "a list in the config": ([0, 2], None, ..., (0, 2)),
    "generation config only": (None, [0, 2], ..., (0, 2)),
    "generation config only, one": (..., 2, ..., (2,)),
    "tokenizer only": (None, None, strange.TURN, (2,)),
    "all of them": (0, [5, 0], strange.TURN, (0, 5, 2)),
    "config only": (2, None, ..., (2,)),
    "none": (None, None, ..., ()),
    "no key": (..., ..., ..., ()),
    "unknown to the tokenizer": (2, None, ..., (2,)),
}


def teacher_of(folder: Path, config: Any, generation: Any, token: Any, always: int | None = 2) -> Path:
    files = {} if generation is ... else {"generation_config.json": {"eos_token_id": generation}}
    return strange.strange_teacher(
        folder, config={"eos_token_id": config}, tokenizer_config={"eos_token": token}, files=files, always=always
    )


@pytest.mark.parametrize("name", CASES)
def test_every_named_stop_token_ends_a_text_everywhere(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, GenerationConfig

    config, generation, token, expected = CASES[name]
    folder = teacher_of(tmp_path / "teacher", config, generation, token)
    teacher = load_teacher(str(folder))
    assert teacher.special.stop == expected
    assert teacher.end_token == (expected[0] if expected else None)
    artifact = exported(folder, tmp_path / "artifact")
    found = json.loads((artifact / "onnx" / "genai_config.json").read_text())["model"]["eos_token_id"]
    assert tuple(found if isinstance(found, list) else [found]) == expected
    settings = GenerationConfig.from_pretrained(artifact / "hf").eos_token_id
    assert set(settings if isinstance(settings, list) else [settings] if settings is not None else []) == set(expected)
    standard = AutoConfig.from_pretrained(artifact / "hf").eos_token_id
    assert standard == (None if config is ... else config), "nothing is made up by the class"
    assert generated(artifact)[1] == (1 if 2 in expected else 12)
    assert any("ends a text" in note for note in runtime_notes(teacher)) == (not expected)


def test_a_document_ends_with_the_named_token_or_with_none(tmp_path: Path) -> None:
    from paretune.teachers.text.corpus import user_corpus
    from paretune.teachers.text.tokens import token_splits

    corpus = user_corpus(strange.write_documents(tmp_path / "text"))
    for name, ends in (("generation config only, one", [2]), ("none", [])):
        teacher = load_teacher(str(teacher_of(tmp_path / name, *CASES[name][:3])))
        found = token_splits(teacher, corpus, tmp_path / "cache")["report"]
        text = next(d.text for d in corpus.splits["report"] if d.name == found.names[0])
        ids = found.ids[: found.offsets[1]].tolist()
        assert ids == [*teacher.tokenizer.encode(text, add_special_tokens=False).ids, *ends]


@pytest.mark.parametrize("value", [288, -1, [0, 999], "2", True, []])
@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "pad_token_id"])
def test_an_id_of_generation_config_outside_the_vocabulary_is_refused_by_name(
    key: str, value: Any, teacher_folder: Path
) -> None:
    (teacher_folder / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(UsageError) as caught:
        load_teacher(str(teacher_folder))
    assert "generation_config.json" in caught.value.problem and f"{key} must be null" in caught.value.problem


@pytest.fixture
def teacher_folder(tmp_path: Path) -> Path:
    return strange.strange_teacher(tmp_path / "teacher")


def test_a_special_token_that_the_model_has_no_row_for_is_refused_by_name(teacher_folder: Path) -> None:
    strange.merge(teacher_folder / "tokenizer_config.json", {"pad_token": "[PAD]"})
    with pytest.raises(UsageError, match=r"pad_token must be a token of tokenizer.json, but '\[PAD\]' is not"):
        load_teacher(str(teacher_folder))


def test_a_padded_embedding_has_room_for_it(tmp_path: Path) -> None:
    folder = strange.strange_teacher(
        tmp_path / "teacher", config={"vocab_size": 320}, tokenizer_config={"pad_token": "[PAD]"}
    )
    assert load_teacher(str(folder)).special.pad is None


def test_begin_and_pad_are_those_that_are_named(tmp_path: Path) -> None:
    named = strange.strange_teacher(
        tmp_path / "named",
        config={"bos_token_id": 0, "eos_token_id": 2},
        tokenizer_config={"pad_token": strange.BEGIN, "eos_token": strange.TURN},
    )
    unnamed = strange.strange_teacher(tmp_path / "unnamed", config={"eos_token_id": 2})
    model = json.loads((exported(named, tmp_path / "a") / "onnx" / "genai_config.json").read_text())["model"]
    assert (model["bos_token_id"], model["pad_token_id"]) == (0, 1)
    artifact = exported(unnamed, tmp_path / "b")
    model = json.loads((artifact / "onnx" / "genai_config.json").read_text())["model"]
    assert "bos_token_id" not in model and model["pad_token_id"] == 2
    standard = json.loads((artifact / "hf" / "config.json").read_text())
    assert standard["bos_token_id"] is standard["pad_token_id"] is None
