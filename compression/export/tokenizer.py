"""The tokenizer, the chat templates and the generation settings of an artifact: all of the teacher's folder that inference reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.tokenizer.tokenizer_files import (
    TEMPLATE,
    TEMPLATES,
    TOKENIZER,
    chat_templates,
    plain_tokenizer_config,
    plain_tokenizer_json,
)

COPIED = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
SLOW_FILES = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Vocabularies of tokenizers that are not written in Rust; onnxruntime-genai has no use for them."""
SETTINGS_IN_CONFIG = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "max_length",
    "min_length",
)
"""What old checkpoints keep in config.json, where transformers looks if there is no generation_config.json."""


def write_tokenizer(teacher: Teacher, folder: Path, slow: bool = False) -> None:
    """The teacher's tokenizer without settings of batches; with `slow` also the files that only other tokenizers read."""
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TOKENIZER, plain_tokenizer_json(teacher.folder), indent=None)
    _write(folder / "tokenizer_config.json", plain_tokenizer_config(teacher.folder))
    for name in (*COPIED, *(SLOW_FILES if slow else ())):
        if (teacher.folder / name).is_file():
            shutil.copyfile(teacher.folder / name, folder / name)
    for name, text in chat_templates(teacher.folder).items():
        path = folder / TEMPLATE if name == "default" else folder / TEMPLATES / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode())


def write_generation_config(teacher: Teacher, folder: Path) -> None:
    """generation_config.json: the teacher's settings and every token that ends a text."""
    _write(folder / "generation_config.json", generation_settings(teacher))


def generation_settings(teacher: Teacher) -> dict[str, Any]:
    """The teacher's generation settings with all its special tokens; a list of end tokens only where there are several."""
    found = {k: v for k, v in teacher.generation.items() if k not in ("auto_map", "custom_generate")}
    if not found:
        found = {key: value for key, value in _raw_config(teacher).items() if key in SETTINGS_IN_CONFIG}
        found["_from_model_config"] = not found
    special, given = teacher.special, found.get("eos_token_id")
    if set(given if isinstance(given, list) else [given]) != set(special.stop):
        found["eos_token_id"] = None
    if special.stop and found.get("eos_token_id") is None:
        found["eos_token_id"] = special.stop[0] if len(special.stop) == 1 else list(special.stop)
    for key, value in (("bos_token_id", special.begin), ("pad_token_id", special.pad)):
        if found.get(key) is None:
            found[key] = value
    return found


def search_settings(teacher: Teacher) -> dict[str, Any]:
    """The section `search` of genai_config.json: the teacher's settings as far as onnxruntime-genai has them."""
    given = generation_settings(teacher)
    found: dict[str, Any] = {
        "do_sample": False,
        "max_length": teacher.context,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "early_stopping": True,
        "length_penalty": 1.0,
        "diversity_penalty": 0.0,
        "no_repeat_ngram_size": 0,
    }
    for key in found.keys() - {"max_length", "num_return_sequences", "past_present_share_buffer"}:
        value, kind = given.get(key), type(found[key])
        if isinstance(value, bool) == (kind is bool) and isinstance(value, int | float):
            found[key] = kind(value)
    if found["temperature"] <= 0:
        found |= {"do_sample": False, "temperature": 1.0}
    longest = given.get("max_length")
    if isinstance(longest, int) and not isinstance(longest, bool) and 0 < longest < teacher.context:
        found["max_length"] = longest
    found["min_length"] = min(found["min_length"], found["max_length"])
    return found


def _raw_config(teacher: Teacher) -> dict[str, Any]:
    from paretune.teachers.tokenizer.special_tokens import read_json

    return read_json(teacher.folder / "config.json")


def _write(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf8")
