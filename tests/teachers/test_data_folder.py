"""A folder of text in which programs write too: what they write is never text, and the text's fingerprint stays the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paretune.cli.app import app
from paretune.common.errors import UsageError
from paretune.search.prepare.prepare import check_home
from paretune.search.spec import make_spec
from paretune.teachers.checkpoint.teacher import Teacher
from paretune.teachers.text.corpus import SPLITS, user_corpus
from paretune.teachers.text.own_output import is_home
from paretune.teachers.text.tokens import token_splits

LONG = "words of a report that nobody wrote as text. " * 200


def names(folder: Path) -> set[str]:
    corpus = user_corpus(folder)
    return {document.name for split in SPLITS for document in corpus.splits[split]}


@pytest.fixture
def data(tmp_path: Path, write_text: Callable[..., Path]) -> Path:
    return write_text(tmp_path / "data", 60)


def put(path: Path, text: str = LONG) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("home", ["mlruns", "results/deep", "."])
def test_a_home_inside_the_data_is_never_text(data: Path, tiny_teacher: Teacher, home: str) -> None:
    wanted = names(data)
    check_home(data / home)
    before = user_corpus(data)
    token_splits(tiny_teacher, before, data / home / "cache")
    for name in (
        "studies/a-1/setup.json",
        "studies/a-1/report.html",
        "artifacts/x/README.md",
        "cache/k.json",
        "profiles/local-cpu.yaml",
    ):
        put(data / home / name)
    after = user_corpus(data)
    assert names(data) == wanted
    assert after.fingerprint() == before.fingerprint()
    assert any("output of this program" in line or "folder mlruns" in line for line in after.read)


def test_a_home_without_a_marker_and_one_that_was_moved_are_known(data: Path) -> None:
    wanted = names(data)
    put(data / "old" / "studies" / "a-1" / "setup.json", "{}")
    put(data / "old" / "studies" / "a-1" / "report.html")
    check_home(data / "runs")
    put(data / "runs" / "cache" / "a.json")
    (data / "runs").rename(data / "runs [best]")
    assert is_home(data / "old") and is_home(data / "runs [best]") and not is_home(data)
    assert names(data) == wanted


def test_scoring_twice_gives_the_same_documents(
    data: Path, tiny_teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    line = ["score", "--teacher", str(tiny_teacher_dir), "--data", ".", "--home", "kept", "--tokens", "300", "--json"]
    first, second = (CliRunner().invoke(app, line) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output
    told = [[d["name"] for d in json.loads(r.stdout)["documents"]] for r in (first, second)]
    assert told[0] == told[1]
    assert len(list((data / "kept" / "cache" / "tokens").iterdir())) == 1


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD.txt",
        ".venv/lib/notes.txt",
        "env/lib/notes.txt",
        "lib/site-packages/x/y.py",
        "__pycache__/x.txt",
        "node_modules/a/README.md",
        ".ipynb_checkpoints/a.py",
        "._document001.txt",
        "mlartifacts/1/notes.md",
        "exported/README.md",
        "exported/hf/config.json",
        "exported/HOW_TO_RUN.md",
        "profile.json",
    ],
)
def test_what_programs_leave_is_not_text(data: Path, path: str) -> None:
    wanted = names(data)
    put(data / "env" / "pyvenv.cfg", "home = /usr")
    put(data / "exported" / "paretune.json", "{}")
    put(data / "profile.html" if path == "profile.json" else data / "env" / "x.html")
    put(data / path)
    assert names(data) == wanted
    assert any(line.startswith("left out: ") for line in user_corpus(data).read)


def test_a_model_inside_the_data_and_data_inside_a_model(
    data: Path, tiny_teacher_dir: Path, write_teacher: Callable[..., Path]
) -> None:
    wanted = names(data)
    write_teacher(data / "model")
    put(data / "model" / "README.md")
    put(data / "model" / "merges.txt")
    assert names(data) == wanted
    write_teacher(data)
    put(data / "README.md")
    assert names(data) == wanted
    for file in data.glob("document00*.txt"):
        put(data / "model" / "text" / file.name, file.read_text())
        file.unlink()
    moved = {f"model/text/{name}" if name.startswith("document00") else name for name in wanted}
    assert names(data) == moved


def test_links_do_not_go_in_circles(data: Path, tmp_path: Path) -> None:
    wanted = names(data)
    (data / "again").symlink_to(data, target_is_directory=True)
    (data / "self.txt").symlink_to(data / "self.txt")
    (data / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(data / "pipe.txt")
    assert names(data) == wanted
    told = "; ".join(user_corpus(data).read)
    assert "1 link to a folder" in told and "3 broken link, socket or device" in told


@pytest.mark.parametrize("spelling", ["{}", "{}/", "{}/.", "{}/../data"])
def test_the_same_folder_spelt_otherwise_is_the_same_search(data: Path, spelling: str) -> None:
    plain = make_spec(None, None, {"data": str(data)})
    assert make_spec(None, None, {"data": spelling.format(data)}).digest() == plain.digest()
    assert user_corpus(Path(spelling.format(data))).fingerprint() == user_corpus(data).fingerprint()


def test_a_relative_folder_is_the_same_search(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_spec(None, None, {"data": str(data)})
    monkeypatch.chdir(data)
    assert make_spec(None, None, {"data": "."}).digest() == plain.digest()


def test_text_that_changes_during_a_study_is_refused(data: Path, tmp_path: Path, tiny_teacher_dir: Path) -> None:
    from paretune.hardware_profiles.profile import load_profile
    from paretune.search.evaluators.workspace import Workspace

    spec = make_spec(None, None, {"data": str(data), "teacher": str(tiny_teacher_dir)})
    profile = load_profile("jetson-orin-nano", tmp_path).model_dump(mode="json")
    setup = {
        "spec": spec.model_dump(mode="json"),
        "profile": profile,
        "mild": False,
        "text": user_corpus(data).fingerprint(),
    }
    put(tmp_path / "study" / "setup.json", json.dumps(setup))
    assert Workspace(tmp_path / "study", tmp_path).corpus_fingerprint == setup["text"]
    put(data / "new.txt")
    with pytest.raises(UsageError, match="the text must stay the same during a study"):
        _ = Workspace(tmp_path / "study", tmp_path).corpus_fingerprint
