"""All of a teacher's folder that inference reads is in its artifact: chat templates, generation settings, vocabularies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support import strange_teachers as strange
from support.artifacts import exported, generated

CHAT = [{"role": "user", "content": "Was heißt das?"}, {"role": "assistant", "content": "{}"}]
TEMPLATE = "{% for m in messages %}<|turn|>{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|turn|>{% endif %}"
OTHER = "other {{ messages | length }}"
SETTINGS = {
    "do_sample": True,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
    "max_new_tokens": 30,
    "eos_token_id": [0, 2],
    "pad_token_id": 0,
}
TEMPLATES: dict[str, dict[str, Any]] = {
    "a file": {"files": {"chat_template.jinja": TEMPLATE}},
    "a key": {"tokenizer_config": {"chat_template": TEMPLATE}},
    "a list": {
        "tokenizer_config": {
            "chat_template": [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": OTHER}]
        }
    },
    "a folder": {"files": {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": OTHER}},
    "a file before a key": {"files": {"chat_template.jinja": TEMPLATE}, "tokenizer_config": {"chat_template": OTHER}},
}


def rendered(folder: Path, **options: Any) -> str:
    from transformers import AutoTokenizer

    text: str = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, tokenize=False, add_generation_prompt=True, **options
    )
    return text


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_from_the_artifact_as_from_the_teacher(name: str, tmp_path: Path) -> None:
    import onnxruntime_genai as og

    folder = strange.strange_teacher(tmp_path / "teacher", **TEMPLATES[name])
    artifact = exported(folder, tmp_path / "artifact")
    expected = rendered(folder)
    assert "<|turn|>user: Was heißt das?<|end|>" in expected
    for part in ("hf", "onnx"):
        assert rendered(artifact / part) == expected
        if name in ("a list", "a folder"):
            assert rendered(artifact / part, chat_template="rag") == rendered(folder, chat_template="rag") == "other 2"
    tokenizer = og.Tokenizer(og.Config(str(artifact / "onnx")))
    assert tokenizer.apply_chat_template(json.dumps(CHAT), add_generation_prompt=True) == expected


def test_generation_settings_come_with_the_artifact(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    folder = strange.strange_teacher(tmp_path / "teacher", files={"generation_config.json": SETTINGS})
    artifact = exported(folder, tmp_path / "artifact")
    expected = GenerationConfig.from_pretrained(folder).to_dict()
    for part in ("hf", "onnx"):
        assert GenerationConfig.from_pretrained(artifact / part).to_dict() == expected
    search = json.loads((artifact / "onnx" / "genai_config.json").read_text())["search"]
    wanted = {key: SETTINGS[key] for key in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")}
    assert {key: search[key] for key in wanted} == wanted
    assert search["max_length"] == 512
    assert generated(artifact)[1] > 0


def test_settings_of_an_old_checkpoint_stand_in_its_config(tmp_path: Path) -> None:
    folder = strange.strange_teacher(
        tmp_path / "teacher", config={"temperature": 0.3, "do_sample": True, "max_length": 99}
    )
    artifact = exported(folder, tmp_path / "artifact")
    search = json.loads((artifact / "onnx" / "genai_config.json").read_text())["search"]
    assert (search["temperature"], search["do_sample"], search["max_length"]) == (0.3, True, 99)
    assert json.loads((artifact / "hf" / "generation_config.json").read_text())["temperature"] == 0.3


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.0, "do_sample": True}, {"temperature": None, "top_k": None}, {"top_k": "20"}]
)
def test_settings_that_say_nothing_useful_do_no_harm(settings: dict[str, Any], tmp_path: Path) -> None:
    import onnxruntime_genai as og

    folder = strange.strange_teacher(tmp_path / "teacher", files={"generation_config.json": settings})
    artifact = exported(folder, tmp_path / "artifact")
    assert og.GeneratorParams(og.Model(str(artifact / "onnx")))
    search = json.loads((artifact / "onnx" / "genai_config.json").read_text())["search"]
    assert (search["do_sample"], search["temperature"], search["top_k"]) == (False, 1.0, 50)


def test_other_files_of_the_tokenizer_come_too(tmp_path: Path) -> None:
    files: dict[str, Any] = {
        "special_tokens_map.json": {"eos_token": strange.END},
        "added_tokens.json": {strange.END: 0},
        "vocab.json": {"a": 0},
        "merges.txt": "#version: 0.2\n",
        "chat_template.json": {"chat_template": TEMPLATE},
        "modeling_evil.py": "raise SystemExit",
    }
    artifact = exported(strange.strange_teacher(tmp_path / "teacher", files=files), tmp_path / "artifact")
    assert {p.name for p in (artifact / "hf").iterdir()} >= files.keys() - {"modeling_evil.py"}
    assert not list(artifact.rglob("*.py"))
