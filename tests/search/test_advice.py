"""The recommendation against a slow and obvious one: what is chosen, what binds, what looser limits buy, what cannot be met."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paretune.common.checksums import check_artifact
from paretune.common.errors import UsageError
from paretune.search.recommend.advice import GOALS, RELAXED, advise
from paretune.search.recommend.export import GUIDE, export_artifact
from paretune.search.recommend.recommend import Limits
from paretune.search.study.store import Store
from paretune.search.study.view import StudyView, load_view, tied

NAMES = {
    "latency_ms": "decode_ms_per_token",
    "compressed_bytes": "compressed_bytes",
    "memory_bytes": "peak_memory_bytes",
    "loss": "relative_loss",
    "throughput": "throughput_tokens_per_s",
}


@pytest.fixture(scope="module")
def view(simulated_home: Path) -> StudyView:
    store = Store.reader(simulated_home / "studies" / "nightly")
    try:
        return load_view(store)
    finally:
        store.close()


def keeps(point: Any, limit: str, bound: float) -> bool:
    value = point.measurements[NAMES[limit]].value
    return bool(value >= bound if limit == "throughput" else value <= bound)


@given(data=st.data())
def test_the_choice_is_what_trying_all_would_choose(view: StudyView, data: st.DataObject) -> None:
    known = [name for name in NAMES if all(NAMES[name] in p.measurements for p in view.front)]
    chosen = data.draw(st.lists(st.sampled_from(known), unique=True, max_size=3))
    values = {
        name: data.draw(
            st.sampled_from([p.measurements[NAMES[name]].value * f for p in view.front for f in (0.95, 1.0, 1.05)])
        )
        for name in chosen
    }
    values = {name: v for name, v in values.items() if v > 0}
    goal = data.draw(st.sampled_from([None, *GOALS]))
    found = advise(view, Limits(**values), goal)
    feasible = [p for p in view.front if all(keeps(p, name, v) for name, v in values.items())]
    assert (found.chosen is None) == (not feasible) and found.considered == len(feasible)
    if not feasible:
        assert found.nearest in view.front
        missed = {u.limit for u in found.unmet}
        assert found.nearest is not None
        assert missed == {NAMES[n] for n, v in values.items() if not keeps(found.nearest, n, v)} and missed
        return
    assert found.chosen in feasible
    rule = goal or ("balanced" if not values else "fastest" if set(values) == {"loss"} else "quality")
    by = {"fastest": "decode_ms_per_token", "quality": "nll", "smallest": "compressed_bytes"}.get(rule)
    if by is not None:
        assert found.chosen is not None
        assert found.chosen.measurements[by].value == min(p.measurements[by].value for p in feasible)
    assert set(found.ties) == {
        p.key for p in feasible if p is not found.chosen and all(tied(found.chosen, p, o) for o in view.objectives)
    }


@given(data=st.data())
def test_a_looser_limit_buys_what_asking_for_it_would(view: StudyView, data: st.DataObject) -> None:
    point = data.draw(st.sampled_from(view.front))
    bound = point.measurements["decode_ms_per_token"].value * data.draw(st.floats(0.8, 1.3))
    found = advise(view, Limits(latency_ms=bound))
    (relaxed,) = found.relaxed
    assert relaxed.relaxed_to == pytest.approx(bound * (1 + RELAXED))
    then = advise(view, Limits(latency_ms=relaxed.relaxed_to)).chosen
    now = None if found.chosen is None else found.chosen.key
    expected = None if then is None or then.key == now else then.key
    assert relaxed.key == expected
    assert (relaxed.gain == "nothing") == (expected is None)


def test_the_binding_limit_has_the_least_room(view: StudyView) -> None:
    slow = max(p.measurements["decode_ms_per_token"].value for p in view.front)
    large = max(p.measurements["compressed_bytes"].value for p in view.front)
    told = advise(view, Limits(latency_ms=slow * 10, compressed_bytes=large)).to_dict()
    assert told["binding"]["limit"] == "compressed_bytes" and 0 <= told["binding"]["room"] < 0.95
    assert (
        told["feasible"]
        and told["provenance"] in ("measured", "mixed")
        and told["artifact"].endswith(told["chosen"]["key"])
    )


@pytest.mark.parametrize("goal", ["fast", "", "Fastest"])
def test_unknown_goals_are_refused_with_the_nearest(view: StudyView, goal: str) -> None:
    with pytest.raises(UsageError, match="a goal is one of"):
        advise(view, Limits(), goal)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_cannot_be_are_refused(view: StudyView, value: float) -> None:
    with pytest.raises(UsageError, match="positive and finite"):
        advise(view, Limits(latency_ms=value))


def test_a_target_that_was_never_looked_at_is_predicted_and_marked(view: StudyView, simulated_home: Path) -> None:
    found = advise(view, Limits(), None, "nvidia-a100", simulated_home)
    assert found.provenance in ("predicted", "mixed") and found.answer.name == "nvidia-a100" and not found.answer.kept
    assert any("predicted on the fly" in why for why in found.why)


def test_an_export_is_a_valid_artifact_with_how_to_run_it(view: StudyView, tmp_path: Path) -> None:
    point = view.front[0]
    folder = export_artifact(view, point, tmp_path / "new" / "out")
    check_artifact(folder)
    guide = (folder / GUIDE).read_text()
    assert point.description in guide and "paretune search" in guide and "```python" in guide
    assert not list(folder.parent.glob(".*")), "nothing temporary is left"
    (tmp_path / "empty").mkdir()
    export_artifact(view, point, tmp_path / "empty")


def test_an_export_overwrites_nothing_and_follows_no_link(view: StudyView, tmp_path: Path) -> None:
    point = view.front[0]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    for name in ("full", "file", "link"):
        with pytest.raises(UsageError, match="new or empty"):
            export_artifact(view, point, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "x" and not any((tmp_path / "elsewhere").iterdir())


def test_a_damaged_artifact_is_not_delivered(simulated_home: Path, tmp_path: Path) -> None:
    home = Path(shutil.copytree(simulated_home, tmp_path / "home"))
    store = Store.reader(home / "studies" / "nightly")
    copy = load_view(store)
    store.close()
    key = copy.front[0].key
    (home / "studies" / "nightly" / "artifacts" / key / "onnx" / "model.onnx").write_bytes(os.urandom(8))
    with pytest.raises(UsageError, match="differs from its checksum"):
        export_artifact(copy, copy.front[0], tmp_path / "out")
    assert not (tmp_path / "out").exists()
