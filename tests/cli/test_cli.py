"""The command line: bad input gets one clear sentence, the right exit code, and loses nothing."""

import json
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paretune.cli import app as cli
from paretune.cli.commands import search as cli_search
from paretune.common import command_line
from paretune.common.errors import EnvironmentProblem, UsageError
from paretune.objectives.metric_names import MetricNames
from paretune.search.execution import cluster
from paretune.search.study.store import Store

TEACHER = Path(__file__).resolve().parents[2] / "teachers" / "stdlib_coder"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run the command line in this process: (exit code, stdout, stderr without line breaks)."""

    def call(*arguments, home=tmp_path / "home"):
        monkeypatch.setattr(sys, "argv", ["paretune", *map(str, arguments), *(["--home", str(home)] if home else [])])
        try:
            cli.main()
            code: str | int = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, " ".join(err.split())

    return call


@pytest.fixture
def teacher_copy(tmp_path):
    """The embedded teacher as a user's own folder."""
    folder = tmp_path / "model"
    shutil.copytree(TEACHER, folder)
    return folder


def test_dry_run_says_what_it_costs_and_starts_nothing(run, tmp_path):
    code, out, _ = run("search", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0 and plan["space_size"] > 100_000 and plan["expected_candidates"] > 50
    assert plan["disk_bytes"] < plan["free_disk_bytes"]
    assert not (tmp_path / "home" / "studies").exists()


def test_missing_teacher_folder(run, tmp_path):
    code, _, err = run("search", "--teacher", tmp_path / "nowhere")
    assert code == 2 and "is not a folder" in err and "remedy" in err


def test_half_written_teacher(run, teacher_copy):
    weights = teacher_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    code, _, err = run("search", "--teacher", teacher_copy)
    assert code == 2 and "not a complete safetensors file" in err and "half-written" in err


def test_unsupported_architecture(run, teacher_copy):
    config = json.loads((teacher_copy / "config.json").read_text())
    (teacher_copy / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    code, _, err = run("search", "--teacher", teacher_copy)
    assert code == 2 and "model_type='mamba'" in err


def test_pickle_weights(run, teacher_copy):
    (teacher_copy / "model.safetensors").rename(teacher_copy / "pytorch_model.bin")
    code, _, err = run("search", "--teacher", teacher_copy)
    assert code == 2 and "can run code" in err and "save_pretrained" in err


@pytest.mark.parametrize("text", ["", "too little text\n"])
def test_empty_or_tiny_text(run, tmp_path, text):
    (tmp_path / "text.txt").write_text(text)
    code, _, err = run("search", "--data", tmp_path / "text.txt")
    assert code == 2 and "at least 8 distinct documents" in err


def test_typo_in_the_yaml(run, tmp_path):
    spec = tmp_path / "spec.yaml"
    spec.write_text("teacher: stdlib-coder\nbugdet: 9m\n")
    code, _, err = run("search", spec)
    assert code == 2 and "spec.yaml:2:1" in err and "'budget'" in err


@pytest.mark.parametrize(
    ("line", "where"),
    [("budget: 9 weeks", "1:1"), ("shares: {elastik: 0.2}", "1:10"), ("sampler: tpee", "1:1"), ("seed: [1", "")],
)
def test_bad_values_in_the_yaml_have_a_position(run, tmp_path, line, where):
    spec = tmp_path / "spec.yaml"
    spec.write_text(line + "\n")
    code, _, err = run("search", spec)
    assert code == 2 and f"spec.yaml:{where}" in err


def test_unknown_profile_suggests(run):
    code, _, err = run("search", "--profile", "local-cpv")
    assert code == 2 and "did you mean 'local-cpu'" in err


def test_budget_too_short(run):
    code, _, err = run("search", "--budget", "5s")
    assert code == 2 and "at least 45 s" in err and "--budget 1m or more" in err


def test_unknown_preset_and_bad_option(run):
    assert run("search", "--preset", "fast")[0] == 2
    assert run("search", "--no-such-option", home=None)[0] == 2
    code, _, err = run("search", "--budget", "soon")
    assert code == 2 and "such as 45m or 8h" in err


def test_home_that_cannot_be_written(run):
    code, _, err = run("search", home="/proc/paretune-home")
    assert code == 5 and "cannot be written" in err and "--home" in err


def test_full_disk_at_the_start(run, monkeypatch):
    monkeypatch.setattr(
        "paretune.search.execution.run.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    code, _, err = run("search")
    assert code == 5 and "GB of disk" in err and "free some" in err


def test_study_that_does_not_exist(run, tmp_path):
    code, _, err = run("status")
    assert code == 2 and "there is no study" in err
    Store.create(tmp_path / "home" / "studies" / "mine", {"state": "new", "spec": {}}).close()
    for command in ("status", "front", "recommend", "report", "sync"):
        code, _, err = run(command, "yours")
        assert code == 2 and "no study is called 'yours'" in err and "mine" in err
    code, _, err = run("status", "../../etc")
    assert code == 2 and "named by its id" in err


def test_second_search_on_a_running_study(run, tmp_path):
    code, _, _ = run("search", "--dry-run")
    assert code == 0
    from paretune.search.prepare.prepare import prepare
    from paretune.search.prepare.studies import create_study
    from paretune.search.spec import make_spec

    home = tmp_path / "home"
    running = create_study(prepare(make_spec(None, "quick", {}), home), home, "mine", "x")
    code, _, err = run("search", "--study", "mine")
    assert code == 5 and "a search is running on the study 'mine'" in err and "pid" in err
    code, _, err = run("search", "--study", "mine", "--seed", "7")
    assert code == 2 and "other settings" in err
    running.close()


def test_empty_study_has_no_recommendation(run, tmp_path):
    Store.create(tmp_path / "home" / "studies" / "mine", {"state": "new", "spec": {}}).close()
    code, _, err = run("recommend")
    assert code == 4 and "no confirmed candidate yet" in err
    code, out, _ = run("status", "--json")
    assert code == 0 and json.loads(out)["confirmed"] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--max-size", "big"),
        ("--max-size", "-3MB"),
        ("--max-memory", "infMB"),
        ("--max-loss", "little"),
        ("--max-loss", "0%"),
        ("--max-loss", "nan"),
        ("--max-loss", "-1%"),
        ("--max-latency", "-1"),
        ("--max-latency", "nan"),
    ],
)
def test_limits_that_are_no_limits(run, tmp_path, option, value):
    Store.create(tmp_path / "home" / "studies" / "mine", {"state": "new", "spec": {}}).close()
    code, _, err = run("recommend", f"{option}={value}")
    assert code == 2 and f"{option} must be" in err and f"but got '{value}'" in err and "remedy:" in err


@pytest.mark.parametrize("option", ["--min-throughput", "--max-energy", "--max-cost"])
def test_limits_on_rate_energy_and_cost(run, tmp_path, option):
    Store.create(tmp_path / "home" / "studies" / "mine", {"state": "new", "spec": {}}).close()
    code, _, err = run("recommend", f"{option}=-1")
    assert code == 2 and f"{option} must be more than 0" in err
    assert run("recommend", f"{option}=1")[0] == 4, "a study without candidates"


def test_options_of_measure(run, tmp_path):
    code, _, err = run("measure", tmp_path, "--batches", "2")
    assert code == 2 and "belong to a sweep" in err and "--sweep" in err
    for text in ("0", "two", "1,,2", "-4"):
        code, _, err = run("measure", tmp_path, "--sweep", f"--prompts={text}")
        assert code == 2 and "--prompts must be positive whole numbers" in err and repr(text) in err
    code, _, err = run("measure", tmp_path, "--within=0%")
    assert code == 2 and "--within must be" in err


def test_a_measurement_that_was_disturbed_is_printed_and_ends_with_5(run, monkeypatch):
    from types import SimpleNamespace

    from paretune.common.errors import EnvironmentProblem

    found = SimpleNamespace(
        lines=lambda: ["decode: 1 (disturbed)"],
        to_dict=lambda: {"measured": False},
        problem=lambda: EnvironmentProblem("nothing was measured", "end the other work"),
    )
    monkeypatch.setattr("paretune.objectives.artifacts.remeasure.remeasure", lambda *_: found)
    code, out, err = run("measure", "somewhere")
    assert code == 5 and "(disturbed)" in out and "nothing was measured" in err and "end the other work" in err
    code, out, _ = run("measure", "somewhere", "--json")
    assert code == 5 and json.loads(out) == {"measured": False}
    found.problem = lambda: None
    assert run("measure", "somewhere")[0] == 0


def test_artifact_that_is_none(run, tmp_path):
    for command in (("generate", tmp_path, "--prompt", "x"), ("measure", tmp_path)):
        code, _, err = run(*command, home=None)
        assert code == 2 and "is not an artifact" in err


def test_hardware_commands(run, tmp_path):
    code, out, _ = run("hardware", "list", "--json")
    assert code == 0 and "local-cpu" in json.loads(out)
    code, out, _ = run("hardware", "show", "--json")
    shown = json.loads(out)
    assert shown["name"] == "local-cpu" and shown["memory_bytes"] > 0
    path = tmp_path / "home" / "profiles" / "local-cpu.yaml"
    path.write_text(path.read_text().replace("threads: 1", "threads: 2"))
    assert json.loads(run("hardware", "show", "--json")[1])["threads"] == 2
    run("hardware", "detect")
    assert json.loads(run("hardware", "show", "--json")[1])["threads"] == 1


def test_json_is_the_only_thing_on_stdout(run):
    for command in (("search", "--dry-run"), ("hardware", "list"), ("hardware", "show")):
        json.loads(run(*command, "--json")[1])


def test_dry_run_says_how_many_finalists_there_can_be(run):
    code, out, _ = run("search", "--dry-run")
    assert code == 0 and "time to recover and confirm 9 finalists" in out and "up to 36" in out
    assert json.loads(run("search", "--dry-run", "--json")[1])["most_finalists"] == 36


def test_a_search_that_was_killed_is_not_called_running(run, tmp_path):
    store = Store.create(tmp_path / "home" / "studies" / "mine", {"state": "running", "spec": {}})
    assert json.loads(run("status", "--json")[1])["state"] == "running"
    store.close()  # the lock goes with the process, the word in the database stays
    assert json.loads(run("status", "--json")[1])["state"] == "interrupted"


def test_a_prompt_that_is_no_text(run, tmp_path):
    prompt = b"caf\xe9".decode("utf8", "surrogateescape")  # as Python passes arguments on
    code, _, err = run("generate", tmp_path, "--prompt", prompt, home=None)
    assert code == 2 and "must be UTF-8 text, but character 4 is the byte 0xe9" in err and "iconv" in err


def closed_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_that_is_not_there(run, tmp_path, scheme):
    code, _, err = run("search", "--address", f"{scheme}127.0.0.1:{closed_port()}")
    assert code == 5 and "no Ray cluster answers at" in err and "leave --address out" in err
    assert not (tmp_path / "home" / "studies").exists(), "nothing was begun"


def test_what_listens_may_not_be_ray(monkeypatch):
    """Somebody who takes the call and says nothing; the time is bounded by us, not by Ray."""
    asked = []

    def silent(command, timeout, **_):
        asked.append(timeout)
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", silent)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(EnvironmentProblem, match="does not answer as Ray"):
            cluster.require_cluster(f"127.0.0.1:{listening.getsockname()[1]}")
    assert len(asked) == 1 and asked[0] <= cluster.PATIENCE_S


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":1", "host:99999"])
def test_an_address_that_is_none(address):
    with pytest.raises(UsageError, match="HOST:PORT"):
        cluster.require_cluster(address)


def test_a_program_in_a_folder_with_spaces_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "my tools" / "paretune")])
    assert shlex.split(command_line.program()) == [str(tmp_path / "my tools" / "paretune")]


def test_the_printed_command_can_be_pasted(monkeypatch, tmp_path, capsys):
    """The artifact lies below a folder with a space and a quote."""
    point = SimpleNamespace(name="L5", key="abcdef012345")
    monkeypatch.setattr(
        "paretune.search.recommend.recommend.recommend", lambda *_: SimpleNamespace(chosen=point, why=())
    )
    view: Any = SimpleNamespace(front=(), confirmed=(), folder=tmp_path / "it's mine" / "s", figures=MetricNames())
    cli_search._show_end(view, tmp_path, 0, None)
    line = next(line for line in capsys.readouterr().err.splitlines() if " generate " in line)
    words = shlex.split(line)
    assert words[words.index("generate") + 1] == str(view.folder / "artifacts" / point.key)
    assert words[-1] == "def "
