"""One real search that several files look at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from support.commands import SHARES, paretune


@pytest.fixture(scope="session")
def night(
    tmp_path_factory: pytest.TempPathFactory, tiny_teacher_dir: Path, tiny_text: Path
) -> tuple[Path, dict[str, Any]]:
    """A finished search: (working directory, its JSON). It ends when all is done; a busy machine has the whole budget."""
    folder = tmp_path_factory.mktemp("night")
    (folder / "spec.yaml").write_text(
        f"teacher: {tiny_teacher_dir}\ndata: {tiny_text}\nbudget: 200s\n"
        f"fit_points: 8\nfinalists: 1\nmax_candidates: 24\nshares: {json.dumps(SHARES)}\n"
    )
    done = paretune("search", "spec.yaml", "--json", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, json.loads(done.stdout)
