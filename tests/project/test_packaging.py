"""Links, what loads what, and what the wheel holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import paretune

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "paretune"
HEAVY = {"torch", "ray", "mlflow", "pandas", "transformers", "onnxruntime", "optuna"}


def packages() -> set[str]:
    return {path.parent.name for path in ROOT.glob("*/__init__.py")}


def own_files() -> list[Path]:
    """Modules that are no package of the root: the Python interface and the command line."""
    return [*SOURCE.glob("*.py"), *(SOURCE / "cli").rglob("*.py")]


def test_every_package_has_its_link_and_every_link_its_package() -> None:
    links = {path.name: path.readlink().as_posix() for path in SOURCE.iterdir() if path.is_symlink()}
    assert links == {name: f"../../{name}" for name in packages()}


def test_every_folder_of_a_package_is_importable() -> None:
    for name in packages():
        for file in (ROOT / name).rglob("*.py"):
            assert (file.parent / "__init__.py").is_file(), f"{file.parent} would be left out of the wheel"


def loaded_by(*arguments: str) -> set[str]:
    """Top-level modules in a fresh interpreter after running it."""
    program = f"""
import sys
sys.argv = {["paretune", *arguments]!r}
import paretune
if len(sys.argv) > 1:
    from paretune.cli.app import main
    try:
        main()
    except SystemExit as stop:
        assert stop.code in (0, None), stop.code
print("LOADED", *sorted({{name.split(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rsplit("LOADED", 1)[1].split())


def test_importing_the_package_loads_next_to_nothing() -> None:
    loaded = loaded_by()
    assert "paretune" in loaded
    assert not loaded & (HEAVY | {"numpy", "pydantic", "typer"})


@pytest.mark.parametrize("arguments", [["--help"], ["search", "--help"], ["hardware", "--help"]], ids=" ".join)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    assert not loaded_by(*arguments) & HEAVY


def test_the_check_of_loaded_modules_would_see_one() -> None:
    program = "import torch, sys; print(*{name.split('.')[0] for name in sys.modules})"
    assert (
        "torch"
        in subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_python_dash_m_shows_help() -> None:
    done = subprocess.run([sys.executable, "-m", "paretune", "--help"], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0
    assert "search" in done.stdout


def test_the_changelog_speaks_of_this_version() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == paretune.__version__


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy, so that no build/ folder is left in the checkout."""
    pytest.importorskip("setuptools")
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        assert (ROOT / name).is_file(), f"pyproject.toml needs {name} to build"
        shutil.copy(ROOT / name, copy / name)
    for name in ("src", *packages()):
        shutil.copytree(
            ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-q",
        "-w",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_holds_every_module_once_under_our_name(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    modules = {name for name in names if name.endswith(".py")}
    expected = {
        f"paretune/{file.relative_to(ROOT).as_posix()}"
        for package in packages()
        for file in (ROOT / package).rglob("*.py")
    }
    expected |= {f"paretune/{file.relative_to(SOURCE).as_posix()}" for file in own_files()}
    assert modules == expected
    assert {f"paretune/{package}/__init__.py" for package in packages()} <= modules
    assert "paretune/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"paretune", f"paretune-{paretune.__version__}.dist-info"}


def test_the_wheel_holds_the_embedded_model(wheel: zipfile.ZipFile) -> None:
    for path in sorted((ROOT / "teachers" / "stdlib_coder").iterdir()):
        assert wheel.read(f"paretune/teachers/stdlib_coder/{path.name}") == path.read_bytes()
    assert wheel.getinfo("paretune/teachers/stdlib_coder/model.safetensors").file_size > 11_000_000


def test_the_wheel_holds_the_profiles_of_targets(wheel: zipfile.ZipFile) -> None:
    shipped = sorted((ROOT / "hardware_profiles" / "library").rglob("*.yaml"))
    assert len(shipped) > 10
    for path in shipped:
        assert wheel.read(f"paretune/{path.relative_to(ROOT).as_posix()}") == path.read_bytes()


def test_the_wheel_installs_the_command(wheel: zipfile.ZipFile) -> None:
    entry = wheel.read(f"paretune-{paretune.__version__}.dist-info/entry_points.txt").decode()
    assert "paretune = paretune.cli.app:main" in entry
