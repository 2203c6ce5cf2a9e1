"""Files: damaged ones are misses, checksums come last, and a disk that cannot be written has a remedy."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from paretune.common.checksums import CHECKSUMS, write_checksums
from paretune.common.files import disk_problem, read_kept, sync_tree, write_atomically


def test_what_was_kept_is_read_and_what_is_missing_is_none(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x.json", b'{"a": 1}')
    assert read_kept(tmp_path / "x.json") == {"a": 1}
    assert read_kept(tmp_path / "y.json") is None


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe\x00", b"\0" * 100])
def test_a_damaged_file_is_a_miss_with_a_warning(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"x\.json is damaged and is made anew"):
        assert read_kept(tmp_path / "x.json") is None


class Watched:
    """Records which files and folders were synced, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.order: list[Path] = []
        real = os.fsync

        def fsync(handle: int) -> None:
            self.order.append(Path(f"/proc/self/fd/{handle}").readlink())
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)


def some_tree(folder: Path) -> None:
    (folder / "onnx" / "deep").mkdir(parents=True)
    for name in ("paretune.json", "onnx/model.onnx", "onnx/deep/data.bin"):
        (folder / name).write_text(name)


def test_a_tree_is_synced_from_the_inside_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_tree(tmp_path)
    watched = Watched(monkeypatch)
    sync_tree(tmp_path)
    assert set(watched.order) == {tmp_path, *tmp_path.rglob("*")}
    place = {path: i for i, path in enumerate(watched.order)}
    assert all(place[path] < place[path.parent] for path in tmp_path.rglob("*"))


def test_every_file_is_safe_before_its_checksum_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_tree(tmp_path)
    watched = Watched(monkeypatch)
    write_checksums(tmp_path)
    first = watched.order.index(tmp_path / CHECKSUMS)
    assert set(watched.order[:first]) == {tmp_path, *(p for p in tmp_path.rglob("*") if p.name != CHECKSUMS)}
    assert watched.order[-1] == tmp_path, "and the name of the checksums themselves"


def test_what_the_disk_does_has_a_remedy() -> None:
    full = disk_problem(OSError(errno.ENOSPC, "No space left on device", "/x/y"))
    locked = disk_problem(OSError(errno.EROFS, "Read-only file system", "/x/y"))
    assert full is not None and "/x/y" in full.problem and "free the disk" in full.remedy
    assert locked is not None and "Read-only" in locked.problem and "writable" in locked.remedy
    assert full.exit_code == locked.exit_code == 5
    assert disk_problem(OSError(errno.ENOENT, "No such file", "/x/y")) is None
