"""Artifacts of small teachers, and what they generate."""

from __future__ import annotations

from pathlib import Path

from paretune.compression.export.artifact import write_artifact
from paretune.compression.network.student import plain_candidate
from paretune.engines.onnxruntime.generate import Pace, stream
from paretune.teachers.checkpoint.teacher import load_teacher

PROMPT = "The model <|turn|>reads 12 lines"


def exported(folder: Path, target: Path) -> Path:
    teacher = load_teacher(str(folder))
    write_artifact(target, teacher, plain_candidate(teacher.shape, 3), teacher.weights(), {})
    return target


def generated(artifact: Path, prompt: str = PROMPT, most: int = 12) -> tuple[str, int]:
    pieces = list(stream(artifact, prompt, most, 0.0, 1))
    assert isinstance(pieces[-1], Pace)
    return "".join(p for p in pieces if isinstance(p, str)), pieces[-1].tokens
