"""What settings may say: text that can be kept, numbers that a machine can do, and the plan's cheap checks before a search is queued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from paretune.common.errors import UsageError
from paretune.common.text import clean, cleaned, loads, require_text
from paretune.common.yaml_file import load_model
from paretune.search.spec import make_spec, seconds
from paretune.service.notify.notify import Notify
from paretune.service.queue.checks import check_plan, check_settings, least_parameters
from paretune.service.queue.job import Conflict
from paretune.service.queue.queue import Queue

LONE, ESCAPED_BYTE = "\ud800", "caf\udce9"
WRONG_TEXT = [
    {"field": LONE},
    {"teacher": f"/models/{ESCAPED_BYTE}"},
    {"data": "a\0b"},
    {"profile": "x\x1b[2J"},
    {"targets": ["t4", LONE]},
    {"objectives": ["nll", f"bytes{LONE}"]},
    {"limits": {f"bytes{LONE}": 1}},
    {f"budget{LONE}": "9m"},
    {"student_configs": [{"layers": 1, "ffn": 1, "kv_groups": 1, LONE: 2}]},
    {"recovery": {"temperature": LONE}},
    {"budget": f"9m{LONE}"},
]
WRONG_NUMBERS: list[tuple[str, Any]] = [
    ("loss_of_interest", float("inf")),
    ("loss_of_interest", float("nan")),
    ("loss_of_interest", -1),
    ("loss_of_interest", 1e9),
    ("qat_threshold", float("inf")),
    ("qat_threshold", "9" * 400 + "%"),
    ("limits", {"bytes": float("inf")}),
    ("limits", {"bytes": float("nan")}),
    ("limits", {"bytes": 0}),
    ("limits", {"bytes": 1e300}),
    ("budget", "9" * 400 + "d"),
    ("budget", "9" * 14 + "d"),
    ("budget", "366d"),
    ("budget", "0s"),
    ("budget", "٣m"),
    ("budget", "1e3s"),
    ("max_candidates", 10**12),
    ("max_candidates", 0),
    ("finalists", 10**9),
    ("search_tokens", 10**15),
    ("report_tokens", 10**15),
    ("seed", -1),
    ("seed", 10**300),
    ("shares", {"elastic": float("nan")}),
    ("reference", {"loss": float("inf")}),
    ("reference", {"times": float("inf")}),
    ("recovery", {"kl_weight": float("inf")}),
    ("student_configs", [{"layers": 10**30, "ffn": 1, "kv_groups": 1}]),
    ("student_configs", [{"layers": 1, "ffn": 1, "kv_groups": 1}] * 2),
    ("precisions", ["fp32", "fp32"]),
    ("group_sizes", [64, 64]),
    ("targets", [f"t{i}" for i in range(100)]),
    ("teacher", ""),
    ("teacher", "x" * 5000),
    ("field", ""),
    ("data", ""),
]


@pytest.mark.parametrize("settings", WRONG_TEXT, ids=lambda value: ascii(value)[:40])
def test_text_that_cannot_be_kept_is_refused_wherever_it_enters(settings: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "search.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML, and escapes halves of pairs as YAML does
    for enter in (
        lambda: check_settings(settings),  # HTTP and the queue
        lambda: make_spec(None, None, settings),  # command line and Python
        lambda: make_spec(file, None, {}),
    ):
        with pytest.raises(UsageError) as caught:
            enter()
        str(caught.value).encode(), caught.value.problem.encode()  # the refusal itself can be sent


def test_every_yaml_file_of_ours_is_checked(tmp_path: Path) -> None:
    file = tmp_path / "notify.yaml"
    file.write_text('command: "tell \\ud800"\n')
    with pytest.raises(UsageError, match=r"notify\.yaml: command: text must be valid Unicode"):
        load_model(file, Notify)


@pytest.mark.parametrize(("name", "value"), WRONG_NUMBERS, ids=lambda value: ascii(value)[:40])
def test_what_no_machine_does_is_refused(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name) as caught:
        check_settings({name: value})
    assert len(str(caught.value)) < 700 and str(caught.value).count("but got") <= 1


def test_what_is_stored_is_json_of_the_standard() -> None:
    """No Infinity, no NaN: other readers of the queue's rows and files would refuse them."""
    most = {
        "budget": "365d",
        "max_candidates": 10**6,
        "limits": {"bytes": 1e18},
        "loss_of_interest": 1000.0,
        "seed": 2**32 - 1,
    }
    assert json.loads(json.dumps(check_settings(most), allow_nan=False)) == most


@pytest.mark.parametrize("settings", [{}, {"budget": "45s"}, {"budget": " 1.5 h "}, {"field": "Größe"}, {"field": "𝄞"}])
def test_what_is_right_is_taken(settings: dict[str, Any], tmp_path: Path) -> None:
    check_plan(check_settings(settings), tmp_path)


def test_durations() -> None:
    assert (seconds("90s"), seconds("1.5h"), seconds("365d")) == (90.0, 5400.0, 365 * 86400.0)


def test_deep_nesting_is_refused() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(UsageError):
        check_settings({"limits": deep})
    with pytest.raises(ValueError, match="nested"):
        require_text(deep)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "10s"}, "at least 45 s"),
        ({"profile": "no-such-machine"}, "no-such-machine"),
        ({"profile": "nvidia-t4"}, "only predicted"),
        ({"targets": ["nvidia-t4", "nvidia-t4"]}, "twice"),
        ({"targets": ["local-cpu"]}, "twice"),
        ({"objectives": ["nll", "energy_j_per_token"]}, "energy_j_per_token needs"),
        ({"teacher": "plugin:mine"}, "command line only"),
    ],
)
def test_a_plans_checks_come_before_the_queue(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    with pytest.raises(UsageError, match=words):
        queue.submit(settings)
    assert queue.jobs() == [] and not list((tmp_path / "service").glob("specs/*"))
    queue.close()


def test_a_large_teacher_needs_a_larger_budget(tmp_path: Path) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(4 * 60_000_000)
    assert least_parameters(str(tmp_path)) == 60_000_000
    with pytest.raises(UsageError, match="at least 450 s"):
        check_plan({"teacher": str(tmp_path), "budget": "5m"}, tmp_path)


@pytest.mark.parametrize("name", ["a\n", "a\r", LONE, "a\0", "a" * 82])
def test_a_name_is_matched_to_its_end(name: str, tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    with pytest.raises(UsageError) as caught:
        queue.submit({}, name=name)
    assert not isinstance(caught.value, Conflict) and queue.job(name) is None
    queue.close()


def test_what_an_older_version_kept_can_be_shown() -> None:
    kept = json.dumps({"a": [f"x{LONE}"], ESCAPED_BYTE: 1})
    assert loads(kept) == {"a": ["x\\ud800"], "caf\\xe9": 1}
    assert clean("Größe 𝄞") == "Größe 𝄞" and cleaned([1, None]) == [1, None]
