"""Profiles that people edit, the detection of this machine, and the machine lock across processes."""

from __future__ import annotations

import os
import pickle
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from paretune.common.errors import EnvironmentProblem, Infeasible, NothingFeasible, ParetuneError, UsageError
from paretune.common.yaml_file import load_model
from paretune.hardware_profiles import (
    MachineLock,
    Profile,
    detect_local,
    fingerprint,
    load_profile,
    local_profile,
    package_version,
)
from paretune.hardware_profiles.profile import detected_profile, profile_names

GOOD = textwrap.dedent("""\
    name: my-board
    description: a board
    engine_version: 1.32.0
    threads: 2
    cores: 4
    cpu: some CPU
    isa: [avx2, avx512f]
    memory_bytes: 8000000000
    weight_formats:
      - fp32/fp32
      - int8/int8
    source: by hand
    """)


def read(tmp_path: Path, text: str | bytes) -> Profile:
    path = tmp_path / "board.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_model(path, Profile)


def problem_of(tmp_path: Path, text: str | bytes) -> str:
    with pytest.raises(UsageError) as caught:
        read(tmp_path, text)
    assert caught.value.remedy
    return caught.value.problem


def test_a_good_file_is_read(tmp_path: Path) -> None:
    profile = read(tmp_path, GOOD)
    assert (profile.name, profile.threads, profile.isa) == ("my-board", 2, ("avx2", "avx512f"))
    assert profile.weight_formats == ("fp32/fp32", "int8/int8")
    assert profile.sparse_patterns == ()


@pytest.mark.parametrize(
    ("old", "new", "where", "words"),
    [
        ("threads: 2", "treads: 2", ":4:1:", "did you mean 'threads'"),
        ("threads: 2", "zzqq: 2", ":4:1:", "known keys:"),
        ("threads: 2", "threads: two", ":4:1:", "'two'"),
        ("threads: 2", "threads: 0", ":4:1:", "greater than or equal to 1"),
        ("threads: 2", "threads: [2]", ":4:1:", "threads"),
        ("  - int8/int8", "  - int9/int8", ":11:5:", "int9/int8"),
        ("name: my-board", "name: My Board", ":1:1:", "pattern"),
        ("engine_version", "engine: tensorflow\nengine_version", ":3:1:", "tensorflow"),
        ("cores: 4", "cores: 4\nthreads: 3", ":6:1:", "duplicate key"),
        ("threads: 2", "\tthreads: 2", ":4:1:", "\\t"),
        ("threads: 2", "threads: {2", ":", "expected"),
    ],
)
def test_a_mistake_is_named_by_line_and_column(tmp_path: Path, old: str, new: str, where: str, words: str) -> None:
    assert GOOD.count(old) == 1
    problem = problem_of(tmp_path, GOOD.replace(old, new))
    assert f"{tmp_path / 'board.yaml'}{where}" in problem
    assert words in problem


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    problem = problem_of(tmp_path, GOOD.replace("threads: 2\n", ""))
    assert "board.yaml:1:1: threads" in problem


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    assert read(tmp_path, b"\xef\xbb\xbf" + GOOD.encode()) == read(tmp_path, GOOD)


def test_windows_line_ends_are_read(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD.replace("\n", "\r\n")) == read(tmp_path, GOOD)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"\xff\xfe\x00", "UTF-8"),
        ("", "mapping"),
        ("- a\n- b\n", "mapping"),
        ("just words", "mapping"),
        ("a: 1\n" * 2 + "x" * 1_000_001, "limit"),
    ],
)
def test_what_is_no_settings_file_is_refused(tmp_path: Path, text: str | bytes, words: str) -> None:
    assert words in problem_of(tmp_path, text)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.yaml cannot be read"):
        load_model(tmp_path / "nowhere.yaml", Profile)


BOMBS = {
    "billion laughs": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "many aliases of one anchor": "a: &a x\nb: [" + ", ".join(["*a"] * 50) + "]\n",
    "block style": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b}\n" + f"  - *{a}\n" * 9 for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "contains itself": "name: &a [*a]\n",
    "deep": "name: " + "[" * 20_000 + "]" * 20_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_bombs_are_refused_at_once(tmp_path: Path, text: str) -> None:
    """In a child with bounded time and memory, because the failure is a hang."""
    path = tmp_path / "bomb.yaml"
    path.write_text(text)
    program = textwrap.dedent("""
        import resource, sys
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_CPU, (15, 15))
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
        from paretune.common.errors import UsageError
        from paretune.hardware_profiles import Profile
        from paretune.common.yaml_file import load_model
        try:
            load_model(Path(sys.argv[1]), Profile)
        except UsageError:
            print("refused")
        """)
    done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, timeout=240)
    assert done.stdout.strip() == "refused", done.stderr[-500:]


def test_a_few_aliases_and_stars_in_words_are_fine(tmp_path: Path) -> None:
    text = (
        GOOD.replace("a board", "'" + "* & " * 30 + "'")
        .replace("cpu: some CPU", "cpu: &c some CPU")
        .replace("source: by hand", "source: *c")
    )
    assert read(tmp_path, text).source == "some CPU"


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [CANARY]",
        "!!python/object/new:os.mkdir [CANARY]",
        "!!python/name:os.mkdir",
        "!!python/object:os.PathLike {a: 1}",
    ],
)
def test_python_tags_execute_nothing_and_are_refused(tmp_path: Path, value: str) -> None:
    canary = tmp_path / "canary"
    problem = problem_of(tmp_path, GOOD.replace("threads: 2", "threads: " + value.replace("CANARY", str(canary))))
    assert not canary.exists()
    assert ":4:" in problem


def test_an_unknown_profile_name_gets_a_suggestion(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "my-board.yaml").write_text(GOOD)
    assert load_profile("my-board", tmp_path).threads == 2
    assert {"local-cpu", "my-board", "nvidia-a100"} < set(profile_names(tmp_path))
    with pytest.raises(UsageError, match="did you mean 'local-cpu'"):
        load_profile("local-cpi", tmp_path)
    with pytest.raises(UsageError, match="did you mean 'my-board'"):
        load_profile("myboard", tmp_path)
    with pytest.raises(UsageError, match=r"known: alveo-u55c, .*local-cpu, .*my-board"):
        load_profile("qqqq", tmp_path)
    with pytest.raises(UsageError, match="no profile is called"):
        load_profile("../profiles/my-board", tmp_path)


def test_detection_agrees_with_what_the_system_says() -> None:
    machine = detect_local()
    assert machine.cores == len(os.sched_getaffinity(0))
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < machine.memory_bytes <= physical
    assert machine.cpu
    assert machine.engine_version == package_version("onnxruntime") != "not installed"
    info = Path("/proc/cpuinfo").read_text()
    assert all(flag in info for flag in machine.isa)
    assert package_version("no-such-distribution-anywhere") == "not installed"


def test_the_fingerprint_is_stable_and_depends_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint()
    assert before == fingerprint()
    assert len(before) == 12
    monkeypatch.setattr("os.sched_getaffinity", lambda _pid: set(range(999)))
    assert fingerprint() != before


def test_the_local_profile_is_written_once_and_an_edit_is_respected(tmp_path: Path) -> None:
    written = local_profile(tmp_path)
    path = tmp_path / "profiles" / "local-cpu.yaml"
    assert written == detected_profile() == load_profile("local-cpu", tmp_path)
    assert "int8/fp32" not in written.weight_formats
    assert path.read_text().startswith("# ")
    path.write_text(path.read_text().replace("threads: 1", "threads: 7"))
    edited = path.read_bytes()
    assert local_profile(tmp_path).threads == 7
    assert path.read_bytes() == edited


def test_an_unwritable_home_is_an_environment_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(EnvironmentProblem, match="cannot be written"):
        local_profile(tmp_path / "file")


def test_every_error_has_an_exit_code_and_survives_pickling() -> None:
    codes = {UsageError: 2, NothingFeasible: 4, EnvironmentProblem: 5, Infeasible: 1, ParetuneError: 1}
    for kind, code in codes.items():
        error = pickle.loads(pickle.dumps(kind("the rule, the value", "the remedy")))
        assert type(error) is kind
        assert (error.exit_code, error.problem, error.remedy) == (code, "the rule, the value", "the remedy")
        assert str(error) == "the rule, the value; the remedy"


HOLDER = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from paretune.hardware_profiles import MachineLock
    with getattr(MachineLock(Path(sys.argv[1])), sys.argv[2])():
        print("held", flush=True)
        time.sleep(60)
    """)


def hold(folder: Path, mode: str) -> subprocess.Popen[str]:
    """A process that holds the lock in `mode` until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def can_take_exclusively(folder: Path) -> bool:
    try:
        with MachineLock(folder).exclusive(timeout_s=0.3):
            return True
    except EnvironmentProblem:
        return False


@pytest.mark.parametrize("mode", ["shared", "exclusive"])
def test_a_holder_in_another_process_keeps_the_exclusive_lock_away_until_it_is_killed(
    tmp_path: Path, mode: str
) -> None:
    assert can_take_exclusively(tmp_path)
    holder = hold(tmp_path, mode)
    try:
        assert not can_take_exclusively(tmp_path)
    finally:
        end(holder)
    assert can_take_exclusively(tmp_path)


def test_shared_holders_do_not_exclude_each_other(tmp_path: Path) -> None:
    holder = hold(tmp_path, "shared")
    try:
        with MachineLock(tmp_path).shared(), MachineLock(tmp_path).shared():
            pass
    finally:
        end(holder)


def test_an_exclusive_holder_keeps_shared_ones_out_across_processes(tmp_path: Path) -> None:
    with MachineLock(tmp_path).exclusive():
        waiting = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), "shared"], stdout=subprocess.PIPE, text=True
        )
        assert waiting.stdout is not None
        ready, _, _ = select.select([waiting.stdout], [], [], 1.0)
        assert not ready
    assert waiting.stdout.readline().strip() == "held"
    end(waiting)


STREAM = textwrap.dedent("""
    import sys, time
    from pathlib import Path
    from paretune.hardware_profiles import MachineLock
    lock, until = MachineLock(Path(sys.argv[1])), time.monotonic() + 40
    print("running", flush=True)
    while time.monotonic() < until:
        with lock.shared():
            time.sleep(0.05)
    """)


def test_a_stream_of_shared_holders_does_not_starve_an_exclusive_one(tmp_path: Path) -> None:
    """Three processes overlap so that the lock is never free; without the gate the wait would last their 40 seconds."""
    stream = [
        subprocess.Popen([sys.executable, "-c", STREAM, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    try:
        for process in stream:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == "running"
        for _ in range(5):
            with MachineLock(tmp_path).exclusive(timeout_s=10.0):
                pass
        assert all(process.poll() is None for process in stream)
    finally:
        for process in stream:
            end(process)


def test_a_gpu_build_of_the_engine_has_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another distribution of the same module, and keys must change with it."""
    from importlib import metadata

    from paretune.hardware_profiles.detect import package_version

    def version(name: str) -> str:
        if name != "onnxruntime-gpu":
            raise metadata.PackageNotFoundError(name)
        return "9.8.7"

    monkeypatch.setattr(metadata, "version", version)
    assert package_version("onnxruntime") == "9.8.7" and package_version("torch") == "not installed"


@pytest.mark.parametrize(
    ("given", "near"), [("CUDAExecutionprovider", "CUDAExecutionProvider"), ("CUDA", "there are"), ("", "there are")]
)
def test_an_execution_provider_is_one_that_an_engine_knows(given: str, near: str, tmp_path: Path) -> None:
    known = detected_profile().model_dump(mode="json")
    Profile.model_validate(known | {"execution_provider": "TensorrtExecutionProvider"})
    with pytest.raises(ValueError, match=near):
        Profile.model_validate(known | {"execution_provider": given})
