"""What a tokenizer's files carry besides its vocabulary never reaches the text: truncation, padding, dropout; and what other
runtimes make of the file is tried before a search."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from paretune.common.errors import UsageError
from paretune.engines.onnxruntime import genai_tokenizer
from paretune.search.prepare.prepare import prepare
from paretune.search.spec import Spec
from paretune.teachers.checkpoint.teacher import load_teacher
from paretune.teachers.text.corpus import user_corpus
from paretune.teachers.text.tokens import token_splits
from support import strange_teachers as strange
from support.artifacts import PROMPT, exported, generated

TRUNCATION = {"direction": "Right", "max_length": 64, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 64},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": strange.END,
}


def with_dropout(folder: Path) -> dict[str, Any]:
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    return {"model": {**model, "dropout": 0.5}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return strange.strange_teacher(tmp_path_factory.mktemp("plain") / "teacher")


@pytest.fixture(scope="module")
def limited(tmp_path_factory: pytest.TempPathFactory, plain: Path) -> Path:
    folder = strange.strange_teacher(
        tmp_path_factory.mktemp("limited") / "teacher",
        tokenizer={"truncation": TRUNCATION, "padding": PADDING, **with_dropout(plain)},
        tokenizer_config={
            "max_length": 64,
            "stride": 4,
            "truncation_strategy": "longest_first",
            "pad_to_multiple_of": 64,
        },
    )
    return folder


def test_stored_limits_and_dropout_do_not_touch_the_text(plain: Path, limited: Path, tmp_path: Path) -> None:
    corpus = user_corpus(strange.write_documents(tmp_path / "text"))
    first, other = (token_splits(load_teacher(str(f)), corpus, tmp_path / f.parent.name) for f in (plain, limited))
    for split in first:
        assert first[split].ids.tolist() == other[split].ids.tolist()
        assert first[split].offsets.tolist() == other[split].offsets.tolist()
    assert len(first["train"].ids) > 64 * len(first["train"].names), "control: the documents are longer than the limit"


def test_tokens_that_were_kept_with_other_settings_are_not_used_again(plain: Path, tmp_path: Path) -> None:
    corpus = user_corpus(strange.write_documents(tmp_path / "text"))
    teacher = load_teacher(str(plain))
    old = tmp_path / "cache" / "tokens" / f"{teacher.digest}-{corpus.fingerprint()}"
    old.mkdir(parents=True)
    (old / "train.u32").write_bytes(bytes(4))
    (old / "train.json").write_text(json.dumps({"offsets": [0, 1], "sizes": [1], "names": ["x"]}))
    assert len(token_splits(teacher, corpus, tmp_path / "cache")["train"].ids) > 20_000


def test_a_shipped_tokenizer_cuts_and_fills_nothing(limited: Path, plain: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    artifact = exported(limited, tmp_path / "artifact")
    text = strange.document(3)
    expected = load_teacher(str(plain)).tokenizer.encode(text).ids
    for part in ("hf", "onnx"):
        stored = json.loads((artifact / part / "tokenizer.json").read_text())
        assert stored["truncation"] is stored["padding"] is stored["model"]["dropout"] is None
        assert AutoTokenizer.from_pretrained(artifact / part)(text)["input_ids"] == expected
    assert not {"max_length", "stride"} & json.loads((artifact / "hf" / "tokenizer_config.json").read_text()).keys()


BEGINNING: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "template": ({"post_processor": strange.adds_begin()}, {"bos_token": strange.BEGIN}),
    "both ends": ({"post_processor": strange.adds_begin(end=True)}, {"bos_token": strange.BEGIN}),
    "key that the class ignores": ({}, {"bos_token": strange.BEGIN, "add_bos_token": True}),
    "key against the template": (
        {"post_processor": strange.adds_begin()},
        {"bos_token": strange.BEGIN, "add_bos_token": False},
    ),
    "none": ({}, {}),
}


@pytest.mark.parametrize("name", BEGINNING)
def test_a_prompt_has_the_ids_that_transformers_gives_it(name: str, tmp_path: Path) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, config = BEGINNING[name]
    folder = strange.strange_teacher(tmp_path / "teacher", tokenizer=tokenizer, tokenizer_config=config, seed=3)
    artifact = exported(folder, tmp_path / "artifact")
    expected = AutoTokenizer.from_pretrained(artifact / "hf")(PROMPT)["input_ids"]
    assert expected == AutoTokenizer.from_pretrained(folder)(PROMPT)["input_ids"]
    assert (expected[0] == 1) == (name in ("template", "both ends", "key against the template"))
    assert 2 in expected, "the special token inside the prompt is one"
    assert Tokenizer.from_file(str(artifact / "onnx" / "tokenizer.json")).encode(PROMPT).ids == expected
    model = AutoModelForCausalLM.from_pretrained(artifact / "hf")
    with torch.no_grad():
        made = model.generate(torch.tensor([expected]), max_new_tokens=12, do_sample=False)[0, len(expected) :].tolist()
    text = AutoTokenizer.from_pretrained(artifact / "hf").decode(made, skip_special_tokens=True)
    assert generated(artifact)[0] == text, "to the last byte, also of a character that is not whole"


def test_the_key_of_a_llamas_own_class_becomes_the_template(tmp_path: Path) -> None:
    for value, expected in ((True, [1, 67]), (False, [67])):
        folder = strange.strange_teacher(
            tmp_path / str(value),
            tokenizer={"post_processor": strange.adds_begin() if not value else None},
            tokenizer_config={
                "tokenizer_class": "LlamaTokenizerFast",
                "bos_token": strange.BEGIN,
                "add_bos_token": value,
            },
        )
        assert load_teacher(str(folder)).tokenizer.encode("a").ids == expected


@pytest.mark.parametrize("name", BEGINNING)
def test_the_snippet_of_the_card_prompts_as_transformers_does(name: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    tokenizer, config = BEGINNING[name]
    folder = strange.strange_teacher(tmp_path / "teacher", tokenizer=tokenizer, tokenizer_config=config)
    artifact = exported(folder, tmp_path / "artifact")
    runtime = og.Tokenizer(og.Config(str(artifact / "onnx")))
    lines = [line for line in (artifact / "README.md").read_text().splitlines() if line.startswith("tokenizer.update")]
    assert len(lines) == 1
    exec(lines[0], {"tokenizer": runtime})
    assert runtime.encode(PROMPT).tolist() == load_teacher(str(folder)).tokenizer.encode(PROMPT).ids


@pytest.mark.parametrize("kind", ["wordlevel", "unigram", "wordpiece", "character"])
def test_a_tokenizer_that_the_runtime_cannot_use_is_said_before_work_and_text_is_made_anyway(
    kind: str, tmp_path: Path
) -> None:
    folder = strange.other_tokenizer(strange.strange_teacher(tmp_path / "teacher"), kind)
    text = strange.write_documents(tmp_path / "text")
    spec = Spec.model_validate({"teacher": str(folder), "data": str(text), "budget": "60s"})
    notes = [note for note in prepare(spec, tmp_path / "home").plan.notes if "onnxruntime-genai" in note]
    assert len(notes) == 1 and "byte-level BPE" in notes[0]
    made, tokens = generated(exported(folder, tmp_path / "artifact"), "the model reads")
    assert tokens > 0 and isinstance(made, str)


def test_nothing_is_said_about_a_tokenizer_that_works(plain: Path, limited: Path) -> None:
    assert genai_tokenizer.tokenizer_problem(plain) is None
    assert genai_tokenizer.tokenizer_problem(limited) is None


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("import os; os.kill(os.getpid(), 11)", "signal 11"),
        ("print('no such parser'); raise SystemExit(1)", "no such parser"),
        ("print('[[1], [2], [3]]')", "where transformers reads"),
    ],
)
def test_a_crash_of_the_runtimes_parser_is_told_and_survived(
    program: str, words: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    genai_tokenizer._tried.cache_clear()
    try:
        assert words in (genai_tokenizer.tokenizer_problem(plain) or "")
    finally:
        genai_tokenizer._tried.cache_clear()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model": 5}'])
def test_a_damaged_tokenizer_is_named(content: str, tmp_path: Path) -> None:
    folder = strange.strange_teacher(tmp_path / "teacher")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UsageError) as caught:
        load_teacher(str(folder))
    assert "tokenizer.json" in caught.value.problem
