"""What readers other than this project's transformers make of `hf/`: the oldest supported one is transformers 4.57.

The test in that reader itself needs `make readers`, an environment beside .venv with that version; without it, it is skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from support import strange_teachers as strange
from support.artifacts import PROMPT, exported

READERS = Path(os.environ.get("PARETUNE_READERS", Path(__file__).parents[2] / ".venv-readers"))
PROGRAM = """
import json, sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
folders, ids, prompt = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for folder in folders:
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        output = model(torch.tensor([ids]), labels=torch.tensor([ids]))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    print(json.dumps({"version": transformers.__version__, "top": output.logits[0].argmax(-1).tolist(),
        "nll": output.loss.item(), "prompt": tokenizer(prompt)["input_ids"], "chat": chat,
        "end": model.generation_config.eos_token_id}))
"""
CONTROL = "the old spelling says another base"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
ROTARY: dict[str, dict[str, Any]] = {
    "base of a million": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "llama3": {"rope_parameters": LLAMA3},
}


def artifact_of(tmp_path: Path, name: str) -> Path:
    folder = strange.strange_teacher(
        tmp_path / "teacher",
        config={**ROTARY[name], "eos_token_id": [0, 2]},
        tokenizer={"post_processor": strange.adds_begin()},
        tokenizer_config={"bos_token": strange.BEGIN, "extra_special_tokens": [strange.TURN]},
        files={"chat_template.jinja": "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"},
    )
    return exported(folder, tmp_path / "artifact")


def read_by(folders: Mapping[str, Path], libraries: Path | None) -> dict[str, dict[str, Any]]:
    """What a reader finds in each folder; `libraries` is a folder of packages that come before the installed ones."""
    ids = [(7 * i + i * i) % 288 for i in range(200)]
    environment = {**os.environ, "PYTHONPATH": "" if libraries is None else str(libraries)}
    command = [sys.executable, "-c", PROGRAM, json.dumps([*map(str, folders.values())]), json.dumps(ids), PROMPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(folders, map(json.loads, done.stdout.splitlines()[-len(folders) :]), strict=True))


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the oldest supported reader and the installed one find in every artifact, and in one with a wrong old spelling."""
    folders = {name: artifact_of(tmp_path_factory.mktemp("artifact"), name) / "hf" for name in ROTARY}
    folders[CONTROL] = tmp_path_factory.mktemp("control") / "hf"
    shutil.copytree(folders["base of a million"], folders[CONTROL])
    config = json.loads((folders[CONTROL] / "config.json").read_text())
    (folders[CONTROL] / "config.json").write_text(json.dumps({**config, "rope_theta": 100.0, "rope_scaling": None}))
    return read_by(folders, READERS), read_by(folders, None)


@pytest.mark.parametrize("name", ROTARY)
def test_both_spellings_stand_in_the_config(name: str, tmp_path: Path) -> None:
    config = json.loads((artifact_of(tmp_path, name) / "hf" / "config.json").read_text())
    rope = ROTARY[name]["rope_parameters"]
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == rope["rope_theta"]
    scaled = {key: value for key, value in rope.items() if key != "rope_theta"}
    expected = None if rope["rope_type"] == "default" else {**scaled, "type": rope["rope_type"]}
    assert config["rope_scaling"] == expected
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "artifact" / "hf" / "tokenizer_config.json").read_text())
    assert tokenizer["additional_special_tokens"] == [strange.TURN] and "extra_special_tokens" not in tokenizer


@pytest.mark.skipif(not READERS.is_dir(), reason="transformers 4.57 is not there: make readers")
@pytest.mark.parametrize("name", ROTARY)
def test_the_oldest_supported_reader_computes_the_same(name: str, read: tuple[dict[str, Any], dict[str, Any]]) -> None:
    old, new = (dict(found[name]) for found in read)
    assert old.pop("version").startswith("4.57.") and new.pop("version").startswith("5.")
    assert old.pop("nll") == pytest.approx(new.pop("nll"), abs=1e-4)
    assert old == new


@pytest.mark.skipif(not READERS.is_dir(), reason="transformers 4.57 is not there: make readers")
def test_the_old_spelling_is_what_the_oldest_reader_reads(read: tuple[dict[str, Any], dict[str, Any]]) -> None:
    old, new = read
    assert old[CONTROL]["top"] != old["base of a million"]["top"]
    assert new[CONTROL]["top"] == new["base of a million"]["top"]
