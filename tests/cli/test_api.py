"""The Python interface: light to import, the same answers as the command line, tables with units and intervals."""

from __future__ import annotations

import copy
import os
import pickle
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import paretune
from paretune.common.errors import NothingFeasible, UsageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(simulated_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(simulated_home, tmp_path / "mlruns"))


@pytest.fixture
def study(home: Path) -> paretune.Study:
    return paretune.open_study("nightly", home)


def python(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


@pytest.mark.parametrize(
    "order",
    [
        "import paretune; paretune.search; from paretune.search.study.store import Store",
        "from paretune.search.study.store import Store; import paretune",
        "import paretune.search; import paretune",
        "from paretune import search; import paretune",
        "import importlib, paretune; importlib.reload(paretune); importlib.import_module('paretune.search')",
    ],
)
def test_the_package_can_be_called_in_every_order_of_imports(order: str, tmp_path: Path) -> None:
    done = python(
        f"{order}\nimport types; assert callable(paretune.search) and isinstance(paretune.search, types.ModuleType)",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_importing_is_light_and_unknown_names_are_said(tmp_path: Path) -> None:
    code = """
        import sys, paretune
        paretune.open_study, paretune.search
        heavy = {"torch", "ray", "mlflow", "pandas", "transformers", "onnxruntime", "optuna", "fastapi", "plotly"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        try: paretune.serach
        except AttributeError as error: assert "serach" in str(error)
        else: raise SystemExit("a typo was taken")
    """
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_search_is_the_command_lines_and_goes_on(tmp_path: Path) -> None:
    code = """
        import paretune
        study = paretune.search(budget="5m", fit_points=30, max_candidates=12, finalists=1, study="py", progress=False)
        assert study.status()["state"] == "complete", study.status()
        assert len(study.candidates()) > 3 and len(study.candidates("rung0")) >= 9
        print(study.recommend().name)
        try: paretune.search(budgett="5m")
        except Exception as error: print(type(error).__name__, "budgett" in str(error))
    """
    done = python(
        code,
        tmp_path,
        PARETUNE_EVALUATOR="paretune.search.evaluators.simulated:SimulatedEvaluator",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name, refused = done.stdout.strip().splitlines()
    assert name and refused == "UsageError True"
    assert done.stderr.strip() == "", "progress=False is silent"


def test_tables_have_units_intervals_and_provenance(study: paretune.Study) -> None:
    view, front = study.view, study.front()
    assert list(front.index) == [p.key for p in view.front]
    first = view.front[0].measurements["nll"]
    assert front.iloc[0]["nll"] == first.value and front.iloc[0]["nll_low"] == first.low
    assert set(front["nll_provenance"]) == {"measured"}
    assert len(study.candidates("rung0")) == len(view.rung0)
    assert study.targets().empty and "nightly" in paretune.studies(study.home).index
    with pytest.raises(UsageError, match="rung0"):
        study.candidates("all")


def test_another_target_is_predicted(study: paretune.Study) -> None:
    assert set(study.front(profile="nvidia-t4")["decode_ms_per_token_provenance"]) == {"predicted"}
    assert "predicted" in " ".join(study.recommend(profile="nvidia-t4").why)


def test_recommendations_carry_reasons_and_deliver(study: paretune.Study, tmp_path: Path) -> None:
    best = study.recommend(goal="fastest")
    assert best.key in study.front().index and best.why and best.artifact.is_dir()
    assert best.measurements().loc["nll", "unit"] == "nats/token"
    assert str(best).startswith(best.name)
    folder = best.export(tmp_path / "out")
    assert (folder / "HOW_TO_RUN.md").read_text().startswith(f"# {best.name}")
    with pytest.raises(UsageError, match="new or empty"):
        best.export(tmp_path / "out")
    with pytest.raises(UsageError, match="begins with"):
        study.export("zzz", tmp_path / "other")
    with pytest.raises(NothingFeasible, match="nearest is"):
        study.recommend(max_latency_ms=1e-9)
    with pytest.raises(UsageError, match="goal"):
        study.recommend(goal="cheap")


def test_a_notebook_shows_it_without_scripts(study: paretune.Study) -> None:
    html = study._repr_html_()
    assert "<script" not in html and study.recommend().name in html and html.count("<tr>") == len(study.front()) + 1
    empty = paretune.Study("<b>", study.home)
    assert copy.copy(study) == study and pickle.loads(pickle.dumps(study)) == study
    with pytest.raises(UsageError):
        empty.status()


def test_an_unknown_study_is_refused(home: Path) -> None:
    with pytest.raises(UsageError, match="no study is called"):
        paretune.open_study("none", home)
    with pytest.raises(UsageError, match="by its id"):
        paretune.open_study("../nightly", home)


def test_the_pages_code_runs(home: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), flags=re.DOTALL)
    code = "import paretune\n" + "\n".join(block for block in blocks if "paretune.search(" not in block)
    done = python(code, home.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "HOW_TO_RUN.md" in done.stdout and "predicted" in done.stdout
