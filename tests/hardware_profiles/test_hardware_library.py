"""The shipped profiles, what the schema refuses, calibration of this machine, and the commands about targets."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paretune.cli.app import app
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.common.yaml_file import dump_model, load_model
from paretune.hardware_profiles import Profile, load_profile, local_profile
from paretune.hardware_profiles.calibrate import Peaks, calibrate, write_peaks
from paretune.hardware_profiles.execution import BLOCKWISE_INT8, executed, has_sparse_kernel, peak_flops
from paretune.hardware_profiles.kernels import INSTEAD, Kernel, weight_bits
from paretune.hardware_profiles.library import FOLDER, HERE, library_names, variants
from paretune.hardware_profiles.profile import all_profiles, profile_names
from paretune.hardware_profiles.schema import DEVICE_SPECS, PRIORS

ELSEWHERE = sorted(path.stem for path in FOLDER.glob("*.yaml"))
BOARD = (FOLDER / "jetson-orin-nano.yaml").read_text()


def problem_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "board.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        load_model(path, Profile)
    return caught.value.problem


def test_every_kind_of_target_is_shipped() -> None:
    assert {load_profile(name, Path("nowhere")).kind for name in ELSEWHERE} == {"gpu", "tpu", "fpga", "board"}
    wanted = {"raspberry-pi-5", "jetson-orin-nano", "nvidia-t4", "nvidia-a10", "nvidia-a100", "nvidia-h100"}
    assert wanted | {"amd-mi300x", "tpu-v5e", "alveo-u55c", "versal-vck5000"} <= set(ELSEWHERE)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_shipped_target_can_be_predicted_and_every_figure_has_a_source(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, tmp_path)
    assert profile.name == name
    assert not profile.at_hand and profile.can_predict
    given = [key for key in DEVICE_SPECS if getattr(profile, key) is not None]
    given += [key for key in PRIORS if getattr(profile, key) != Profile.model_fields[key].default]
    assert given and all(profile.sources[key] for key in given)
    assert "memory_bytes" in profile.sources
    path = tmp_path / "again.yaml"
    path.write_text(dump_model(profile, "written and read again"))
    assert load_model(path, Profile) == profile
    assert not (tmp_path / "profiles").exists(), "to read a shipped profile writes nothing"


@pytest.mark.parametrize("name", ELSEWHERE)
def test_data_sheets_are_dense_and_in_the_right_unit(name: str, tmp_path: Path) -> None:
    """Ratios that hold on every device of today: more operations than bytes per second, and wider arithmetic no faster."""
    profile = load_profile(name, tmp_path)
    peaks = [profile.peak_fp32_tflops, profile.peak_fp16_tflops, profile.peak_int8_tops, profile.peak_int4_tops]
    known = [peak for peak in peaks if peak is not None]
    assert known == sorted(known)
    assert profile.bandwidth_gb_per_s is not None
    assert 1 < known[-1] * 1e12 / (profile.bandwidth_gb_per_s * 1e9) < 2000
    assert 1e9 < profile.memory_bytes < 1e12


def test_variants_of_this_machine_follow_its_own_profile(tmp_path: Path) -> None:
    local = local_profile(tmp_path)
    one = load_profile("cpu-1-thread", tmp_path)
    assert (one.threads, one.at_hand, one.cpu, one.memory_bytes) == (1, True, local.cpu, local.memory_bytes)
    openvino = load_profile("local-openvino", tmp_path)
    assert openvino.engine == "openvino" and "int8/dynamic" not in openvino.weight_formats
    assert openvino.engine_version != local.engine_version or openvino.engine_version == "not installed"
    assert {variant.name for variant in variants()} == {path.stem for path in HERE.glob("*.yaml")}


def test_two_threads_take_two_cores(tmp_path: Path) -> None:
    assert "cpu-2-threads" in library_names(2)
    assert "cpu-2-threads" not in library_names(1)
    path = tmp_path / "profiles" / "local-cpu.yaml"
    cores = local_profile(tmp_path).cores
    path.write_text(path.read_text().replace(f"cores: {cores}", "cores: 1"))
    with pytest.raises(UsageError, match="needs 2 cores, but this machine has 1"):
        load_profile("cpu-2-threads", tmp_path)
    path.write_text(path.read_text().replace("cores: 1", "cores: 2"))
    assert load_profile("cpu-2-threads", tmp_path).threads == 2


def test_a_users_file_comes_before_the_shipped_one(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    text = (FOLDER / "nvidia-t4.yaml").read_text()
    (tmp_path / "profiles" / "nvidia-t4.yaml").write_text(text.replace("power_watts: 70", "power_watts: 60"))
    assert load_profile("nvidia-t4", tmp_path).power_watts == 60
    assert profile_names(tmp_path).count("nvidia-t4") == 1


def test_the_list_shows_a_broken_file_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "broken.yaml").write_text("name: broken\n")
    found = all_profiles(tmp_path)
    assert isinstance(found["broken"], UsageError)
    assert {name for name, profile in found.items() if isinstance(profile, Profile)} == {*found} - {"broken"}
    assert [path.name for path in (tmp_path / "profiles").iterdir()] == ["broken.yaml"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("bandwidth_gb_per_s: 68", "bandwidth_mb_per_s: 68000", ["unknown key", "did you mean 'bandwidth_gb_per_s'"]),
        ("memory_bytes: 8000000000", "memory_gb: 8", ["unknown key", "did you mean 'memory_bytes'"]),
        ("peak_int8_tops: 20", "peak_int8_gops: 20000", ["unknown key", "did you mean 'peak_int8_tops'"]),
        ("memory_bytes: 8000000000", "memory_bytes: 8", ["memory_bytes", "but got 8"]),
        ("bandwidth_gb_per_s: 68", "bandwidth_gb_per_s: 0", ["greater than 0", "but got 0"]),
        ("bandwidth_gb_per_s: 68", "bandwidth_gb_per_s: .nan", ["bandwidth_gb_per_s"]),
        ("bandwidth_gb_per_s: 68", "bandwidth_gb_per_s: .inf", ["bandwidth_gb_per_s"]),
        ("bandwidth_gb_per_s: 68", "bandwidth_gb_per_s: 68000000000", ["less than or equal to 100000"]),
        ("power_watts: 15", "power_watts: 15\nprice_usd_per_hour: -1", ["greater than or equal to 0", "but got -1"]),
        ("peak_int8_tops: 20", "peak_int8_tops: 2", ["at least a quarter of the fp16 peak (10", "but got 2"]),
        ("[fp32/fp32, fp16/fp32", "[fp16/fp32", ["fp32/fp32 must be among the weight formats"]),
        ("efficiency: [0.4, 0.65, 0.85]", "efficiency: [0.4, 0.65, 1.2]", ["0 < low <= likely <= high <= 1"]),
        ("efficiency: [0.4, 0.65, 0.85]", "efficiency: [0, 0.65, 0.85]", ["0 < low <= likely <= high <= 1"]),
        ("efficiency: [0.4, 0.65, 0.85]", "efficiency: [0.7, 0.65, 0.85]", ["0 < low <= likely <= high <= 1"]),
        ("efficiency: [0.4, 0.65, 0.85]", "efficiency: [0.4, 0.65]", ["bandwidth_efficiency"]),
        ("op: [3, 8, 20]", "op: [9, 8, 20]", ["low <= likely <= high"]),
        ("power_watts: 15", "power_watts: 15\ndevices: 2", ["link_alpha_us and link_gb_per_s must be given"]),
        ("bandwidth_gb_per_s: 68\n", "", ["not at hand is predicted", "lacks bandwidth_gb_per_s"]),
        ("  power_watts: Jetson", "  power_wats: Jetson", ["'power_wats' is no figure; did you mean 'power_watts'"]),
        ("engine: tensorrt", "engine: tensorrt2", ["engine"]),
        ("kind: board", "kind: toaster", ["kind"]),
    ],
)
def test_what_cannot_be_is_refused_with_rule_and_value(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert BOARD.count(old) == 1, old
    problem = problem_of(tmp_path, BOARD.replace(old, new))
    assert "board.yaml:" in problem
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize("figure", ["bandwidth_gb_per_s", "peak_int8_tops", "power_watts", "bandwidth_efficiency"])
def test_a_figure_without_source_is_refused_by_name_and_line(tmp_path: Path, figure: str) -> None:
    lines = BOARD.splitlines()
    kept = [line for line in lines if not line.startswith(f"  {figure}: ")]
    assert len(kept) == len(lines) - 1
    problem = problem_of(tmp_path, "\n".join(kept))
    assert f"board.yaml:{lines.index('sources:') + 1}:1: sources: " in problem
    assert f"{figure} has no source" in problem
    blank = [f'  {figure}: "  "' if line.startswith(f"  {figure}: ") else line for line in lines]
    assert f"{figure} has no source" in problem_of(tmp_path, "\n".join(blank))


def test_a_source_from_memory_is_told(tmp_path: Path) -> None:
    assert "power_watts" in load_profile("versal-vck5000", tmp_path).from_memory
    assert "bandwidth_gb_per_s" not in load_profile("raspberry-pi-5", tmp_path).from_memory
    assert "bandwidth_gb_per_s" not in load_profile("nvidia-t4", tmp_path).from_memory


def test_what_runs_in_place_of_a_missing_kernel_is_never_coarser() -> None:
    coarse = {"static": 0, "dynamic": 1, "int8": 2, "fp32": 3}
    for kernel, others in INSTEAD.items():
        for other in others:
            assert weight_bits(other) >= weight_bits(kernel)
            assert coarse[other.split("/")[1]] >= coarse[kernel.split("/")[1]], (kernel, other)


def test_kernels_that_are_executed(tmp_path: Path) -> None:
    pi, t4, a100, alveo = (
        load_profile(name, tmp_path) for name in ("raspberry-pi-5", "nvidia-t4", "nvidia-a100", "alveo-u55c")
    )
    asked: dict[tuple[str, Kernel], Kernel] = {
        ("pi", "fp16/fp32"): "fp32/fp32",
        ("pi", "int4/int8"): "int4/int8",
        ("pi", "int8/fp32"): "fp32/fp32",
        ("t4", "bf16/fp32"): "fp32/fp32",
        ("t4", "fp16/fp32"): "fp16/fp32",
        ("t4", "int4/int8"): "int4/fp32",
        ("a100", "int8/int8"): "int8/fp32",
        ("a100", "int8/dynamic"): "int8/dynamic",
        ("a100", "int2/int8"): "int4/fp32",
        ("alveo", "int8/static"): "int8/static",
        ("alveo", "int4/fp32"): "fp32/fp32",
    }
    targets = {"pi": pi, "t4": t4, "a100": a100, "alveo": alveo}
    for (target, kernel), expected in asked.items():
        assert executed(targets[target], kernel) == expected, (target, kernel)
    assert peak_flops(a100, "int4/fp32") == peak_flops(a100, "fp16/fp32") == 312e12
    assert peak_flops(a100, "int8/dynamic") == 624e12
    assert peak_flops(a100, "fp32/fp32") == 19.5e12
    assert peak_flops(pi, "int8/static") == pytest.approx(0.61e12)
    assert peak_flops(pi, "int4/int8") == pytest.approx(BLOCKWISE_INT8 * 0.61e12)
    assert peak_flops(pi, "int4/fp32") == pytest.approx(0.154e12)
    assert has_sparse_kernel(a100, "2:4", "fp16/fp32") and not has_sparse_kernel(a100, "2:4", "int4/fp32")
    assert not has_sparse_kernel(t4, "2:4", "fp16/fp32") and not has_sparse_kernel(a100, "unstructured", "fp16/fp32")


def test_calibration_measures_this_machine_and_keeps_the_file(tmp_path: Path) -> None:
    local_profile(tmp_path)
    path = tmp_path / "profiles" / "local-cpu.yaml"
    path.write_text("# mine\n" + path.read_text())
    peaks = calibrate(1, 0.4)
    assert 0.3 < peaks.bandwidth_gb_per_s < 3000
    assert 0.3 < peaks.fp32_gflop_per_s < 30_000
    assert peaks.int8_gop_per_s is not None and 0.3 < peaks.int8_gop_per_s < 300_000
    if peaks.cache_gb_per_s is not None:
        assert peaks.cache_gb_per_s > 0.5 * peaks.bandwidth_gb_per_s
    found = write_peaks(peaks, tmp_path)
    assert found == load_profile("local-cpu", tmp_path) and found.can_predict
    assert found.bandwidth_gb_per_s == pytest.approx(peaks.bandwidth_gb_per_s, rel=1e-3)
    assert found.peak_fp32_tflops == pytest.approx(peaks.fp32_gflop_per_s / 1e3, rel=1e-3)
    assert "calibrate" in found.sources["peak_int8_tops"] and "1 thread" in found.sources["peak_int8_tops"]
    assert path.read_text().startswith("# mine\n# Detected by")
    assert not load_profile("cpu-1-thread", tmp_path).missing_figures


def test_figures_of_one_thread_are_not_those_of_two(tmp_path: Path) -> None:
    path = tmp_path / "profiles" / "local-cpu.yaml"
    cores = local_profile(tmp_path).cores
    path.write_text(path.read_text().replace(f"cores: {cores}", "cores: 2"))
    write_peaks(Peaks(1, 20.0, 80.0, None), tmp_path)
    assert load_profile("cpu-1-thread", tmp_path).bandwidth_gb_per_s == 20
    assert load_profile("cpu-2-threads", tmp_path).missing_figures == ("bandwidth_gb_per_s", "peak_fp32_tflops")
    again = write_peaks(Peaks(1, 30.0, 80.0, 300.0, 2**24, 90.0), tmp_path)
    assert (again.bandwidth_gb_per_s, again.peak_int8_tops) == (30, 0.3)
    assert (again.cache_bytes, again.cache_gb_per_s) == (2**24, 90)


def test_impossible_peaks_leave_the_file_alone(tmp_path: Path) -> None:
    local_profile(tmp_path)
    path = tmp_path / "profiles" / "local-cpu.yaml"
    before = path.read_bytes()
    with pytest.raises(UsageError, match="bandwidth_gb_per_s"):
        write_peaks(Peaks(1, 0.0, 80.0, None), tmp_path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("threads", "seconds"), [(0, 1.0), (1, 0.0), (1, math.inf), (1, math.nan)])
def test_calibration_refuses_nonsense(threads: int, seconds: float) -> None:
    with pytest.raises(UsageError, match="threads >= 1"):
        calibrate(threads, seconds)


def test_a_failing_child_is_an_environment_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(EnvironmentProblem, match="calibration failed: exit code 1"):
        calibrate(1, 0.1)


def run(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_commands(tmp_path: Path) -> None:
    home = ("--home", tmp_path / "home")
    code, out = run("hardware", "list", *home)
    assert code == 0
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert " measured " in lines["local-cpu"] and " predicted " in lines["tpu-v5e"]
    assert json.loads(run("hardware", "list", "--json", *home)[1]) == list(lines)
    assert json.loads(run("hardware", "show", "nvidia-h100", "--json", *home)[1])["bandwidth_gb_per_s"] == 3350
    assert "link_gb_per_s: 450" in run("hardware", "show", "nvidia-h100", *home)[1]
    found = json.loads(run("hardware", "calibrate", "--seconds", "0.2", "--json", *home)[1])
    assert found.keys() == {*Peaks.__dataclass_fields__}
    assert json.loads(run("hardware", "show", "--json", *home)[1])["bandwidth_gb_per_s"] > 0


def test_check_tells_valid_from_invalid(tmp_path: Path) -> None:
    good = tmp_path / "board.yaml"
    good.write_text(BOARD)
    code, out = run("hardware", "check", good)
    assert code == 0 and "jetson-orin-nano is valid; it is predicted" in out
    assert "from memory" in out and "peak_fp32_tflops" in out
    told = json.loads(run("hardware", "check", good, "--json")[1])
    assert told["can_predict"] and not told["at_hand"] and "peak_fp32_tflops" in told["from_memory"]
    good.write_text(BOARD.replace("power_watts: 15", "power_kilowatts: 0.015"))
    with pytest.raises(UsageError, match="unknown key 'power_kilowatts'; did you mean 'power_watts'"):
        run("hardware", "check", good)


def test_another_way_to_use_this_machine_is_calibrated_by_itself(tmp_path: Path) -> None:
    """Its peaks hold for its own threads, and a prediction is possible then."""
    before = load_profile("cpu-1-thread", tmp_path)
    found = write_peaks(Peaks(1, 20.0, 80.0, 300.0, 2**24, 90.0), tmp_path, "cpu-1-thread")
    assert found.name == "cpu-1-thread" and found.can_predict and found.bandwidth_gb_per_s == 20.0
    assert load_profile("cpu-1-thread", tmp_path) == found
    assert load_profile("local-cpu", tmp_path).bandwidth_gb_per_s == before.bandwidth_gb_per_s
    assert "1 thread(s)" in found.sources["bandwidth_gb_per_s"]
