"""The list of studies: in parts, quick, in the right order, whatever lies in the home; and what refusals look like."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from paretune.common.errors import UsageError
from paretune.common.validation import said
from paretune.search.spec import Spec, make_spec
from paretune.search.study.store import Store
from paretune.search.study.summary import load_standing, summary
from paretune.search.study.view import load_view
from paretune.service.api.events import clock, status
from paretune.service.api.wording import without_options
from paretune.service.data import Studies
from paretune.service.printable import printable, sendable
from paretune.service.queue.queue import Queue
from paretune.service.server.app import create_app
from paretune.service.state import Service

TOKEN = "t" * 32
LATIN = os.fsdecode(b"caf\xe9")
HTML = {"Accept": "text/html,application/xhtml+xml"}


@pytest.fixture
def home(simulated_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(simulated_home, tmp_path / "home"))


@pytest.fixture
def service(home: Path) -> Iterator[Service]:
    queue = Queue(home)
    yield Service(home, Studies(home), queue, TOKEN)
    queue.close()


@pytest.fixture
def client(service: Service) -> TestClient:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(create_app(service), base_url="http://127.0.0.1:8765", headers=headers, follow_redirects=False)


def copies(home: Path, number: int) -> None:
    """`number` more studies s000, s001, …, each changed a second after the one before it, long ago."""
    source = home / "studies" / "nightly" / "study.db"
    for i in range(number):
        folder = home / "studies" / f"s{i:03}"
        folder.mkdir()
        shutil.copy(source, folder / "study.db")
        os.utime(folder / "study.db", (1e9 + i, 1e9 + i))


# in parts


def test_a_summary_by_queries_is_that_of_the_whole_study(home: Path) -> None:
    folder = home / "studies" / "nightly"
    writer = Store.open_study(folder)
    row = writer.candidates()[0]
    for how in ("failed", "lost", "infeasible"):
        writer.start(row.key, "recovered")
        assert writer.finish(row.key, "recovered", how, reason="x")
    writer.start(row.key, "rung0")
    assert writer.finish(row.key, "rung0", "failed", reason="again, after it was complete")
    writer.close()
    store = Store.reader(folder)
    try:
        found, view = load_standing(store), load_view(store)
    finally:
        store.close()
    assert found.told == summary(view) and found.told["failures"] == len(view.failures) >= 4
    assert list(found.events) == list(view.events[-5:])


def test_the_list_comes_in_parts(client: TestClient, home: Path) -> None:
    copies(home, 120)
    first = client.get("/v1/studies")
    assert first.headers["x-total-count"] == "121" and len(first.json()) == 100
    assert [s["study"] for s in first.json()[:3]] == ["nightly", "s119", "s118"], "each by the name of its folder"
    assert first.headers["link"] == '</v1/studies?offset=100&limit=100>; rel="next"'
    second = client.get("/v1/studies?offset=100")
    assert len(second.json()) == 21 and second.json()[-1]["study"] == "s000" and "link" not in second.headers
    assert len(client.get("/v1/studies?limit=1000").json()) == 121
    assert [s["study"] for s in client.get("/v1/studies?q=S00&limit=2").json()] == ["s009", "s008"]
    for query in ("limit=0", "limit=1001", "offset=-1"):
        assert client.get(f"/v1/studies?{query}").status_code == 422


def test_an_unchanged_list_is_not_sent_again(client: TestClient, home: Path) -> None:
    copies(home, 20)
    first = client.get("/v1/studies?limit=5")
    again = client.get("/v1/studies?limit=5", headers={"If-None-Match": first.headers["etag"]})
    assert again.status_code == 304 and again.content == b"" and again.headers["x-total-count"] == "21"
    store = Store.open_study(home / "studies" / "nightly")
    store.set_meta(state="cancelled")
    store.close()
    time.sleep(1.1)  # what was read is kept for a second
    changed = client.get("/v1/studies?limit=5", headers={"If-None-Match": first.headers["etag"]})
    assert changed.status_code == 200 and changed.json()[0]["state"] == "cancelled"


def test_only_the_stores_of_a_part_are_opened(
    client: TestClient, service: Service, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What made the first list of 1,000 studies take 50 s: every store was read as a whole."""
    copies(home, 60)
    opened: list[Path] = []
    reader = Store.reader

    def watched(folder: Path) -> Store:
        opened.append(folder)
        return reader(folder)

    monkeypatch.setattr(Store, "reader", watched)
    monkeypatch.setattr("paretune.service.data.load_view", lambda _: pytest.fail("no list needs a whole study"))
    assert len(client.get("/v1/studies?limit=10&offset=5").json()) == 10 and len(opened) == 10
    client.get("/v1/studies?limit=10&offset=5")
    assert len(opened) == 10, "and not again while nothing changes"
    assert client.get("/").text.count("<tr data-study=") == 50
    assert client.get("/?offset=50").text.count("<tr data-study=") == 11
    assert client.get("/compare").text.count('type="checkbox"') == 50


def test_what_ended_without_a_study_does_not_stay_on_top(client: TestClient, service: Service, home: Path) -> None:
    for name in ("dropped", "waiting"):
        service.queue.submit({}, None, name)
    service.queue.cancel("dropped")
    store = Store.open_study(home / "studies" / "nightly")
    store.event("note", "changed after that")
    store.close()
    os.utime(home / "studies" / "nightly" / "study.db", (time.time() + 5, time.time() + 5))
    assert [s["study"] for s in client.get("/v1/studies").json()] == ["waiting", "nightly", "dropped"]


# what lies in the home


def test_names_that_are_no_utf8_are_said_and_hold_nobody_up(client: TestClient, home: Path) -> None:
    for folder in ("data", "models", "profiles", "studies"):
        (home / folder).mkdir(exist_ok=True)
    (home / "data" / f"{LATIN}.txt").write_text("words")
    (home / "data" / "good.txt").write_text("words")
    (home / "models" / LATIN).mkdir()
    (home / "profiles" / f"{LATIN}.yaml").write_text("x: 1")
    shutil.copytree(home / "studies" / "nightly", home / "studies" / LATIN)
    artifact = next((home / "studies" / "nightly" / "artifacts").iterdir())
    (artifact / LATIN).write_text("no part of it")
    found = client.get("/v1/choices").json()
    assert found["data"] == ["good.txt"] and found["teacher"] == ["stdlib-coder"]
    assert [text.partition(":")[0] for text in found["not_offered"]] == ["models/caf\\xe9", "data/caf\\xe9.txt"]
    assert all("UTF-8" in text for text in found["not_offered"])
    states = {s["study"]: s["state"] for s in client.get("/v1/studies").json()}
    assert states == {"nightly": "complete", "caf\\xe9": "unreadable"}
    paths = [
        "/",
        "/new",
        "/compare",
        "/v1/profiles",
        f"/studies/nightly/candidates/{artifact.name}",
        "/studies/nightly",
    ]
    for path in paths:
        answer = client.get(path)
        assert answer.status_code == 200, path
        assert answer.content.decode(), path
    assert "data/caf\\xe9.txt" in client.get("/new").text


def test_links_out_of_the_folder_are_not_followed_and_say_what_to_do(
    client: TestClient, home: Path, tmp_path: Path
) -> None:
    (home / "models").mkdir()
    (tmp_path / "outside").mkdir()
    (home / "models" / "mine").mkdir()
    (home / "models" / "link").symlink_to(tmp_path / "outside")
    (home / "models" / "near").symlink_to(home / "models" / "mine")
    (home / "models" / "gone").symlink_to(tmp_path / "nothing")
    found = client.get("/v1/choices").json()
    assert found["teacher"] == ["stdlib-coder", "mine", "near"]
    assert [text.partition(":")[0] for text in found["not_offered"]] == ["models/gone", "models/link"]
    refused = client.post("/v1/studies", json={"spec": {"teacher": "link"}})
    assert refused.status_code == 422 and "bind-mounts" in refused.json()["remedy"]


def test_what_a_study_says_can_always_be_sent(client: TestClient, home: Path) -> None:
    store = Store.open_study(home / "studies" / "nightly")
    store.set_meta(
        teacher={"name": f"/models/{LATIN}", "digest": "d", "parameters": 1}, seconds_by_stage={"explore": float("inf")}
    )
    store.close()
    for path in ("/v1/studies", "/v1/studies/nightly", "/", "/studies/nightly"):
        answer = client.get(path)
        assert answer.status_code == 200 and "caf\\xe9" in answer.text.replace("\\\\", "\\"), path
    assert client.get("/v1/studies").json()[0]["seconds_by_stage"] == {"explore": None}


def test_printable() -> None:
    assert printable("grün 統") == "grün 統"
    assert printable(LATIN) == "caf\\xe9" and printable("\ud800") == "\\ud800"
    assert sendable({LATIN: [float("nan"), 1.5, (LATIN,)]}) == {"caf\\xe9": [None, 1.5, ["caf\\xe9"]]}


# progress


def test_time_is_told_between_two_reports_and_the_stage_always(service: Service, home: Path) -> None:
    folder = home / "studies" / "nightly"
    store = Store.open_study(folder)  # which holds the lock, as a search does
    try:
        assert store.meta("stage") == "ending" and store.meta("spent_at"), "a search writes both"
        store.set_meta(state="running", spent_s=10.0, spent_at=[10.0, "2020-01-01T00:00:00.000+00:00"], stage="explore")
        told = status(service, "nightly")
        assert told["state"] == "running" and told["stage"] == "explore"
        assert clock(told)["elapsed_s"] > 1e8
        store.set_meta(state="complete", spent_s=11.0)
    finally:
        store.close()
    assert clock({**told, "state": "complete"}) == {} and clock({**told, "spent_at": None}) == {}


def test_one_stream_follows_several_studies(client: TestClient, service: Service, home: Path) -> None:
    copies(home, 2)
    with client.stream("GET", "/v1/events?studies=nightly,s000,nightly") as answer:
        lines = list(answer.iter_lines())
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]
    assert [t["study"] for t in told] == ["nightly", "nightly", "s000", "s000"] and lines.count("event: end") == 2
    assert client.get("/v1/events?studies=none").status_code == 404
    for query in ("studies=", "studies=,", "studies=" + ",".join(["s000"] * 51), ""):
        assert client.get(f"/v1/events?{query}").status_code == 422


# refusals


@pytest.mark.parametrize(
    ("path", "status"), [("/studies/none", 404), ("/nothing", 404), ("/studies/nightly?profile=x", 422)]
)
def test_somebody_with_a_browser_gets_a_page(client: TestClient, path: str, status: int) -> None:
    page = client.get(path, headers=HTML)
    assert page.status_code == status and page.headers["content-type"].startswith("text/html")
    assert (
        "<h1>" in page.text
        and "All studies" in page.text
        and "script-src 'self'" in page.headers["content-security-policy"]
    )
    told = client.get(path)
    assert told.status_code == status and set(told.json()) == {"error", "remedy"}
    assert client.get("/v1/studies/none", headers=HTML).json()["error"], "the interface speaks JSON to everybody"


def test_an_error_page_escapes(client: TestClient) -> None:
    page = client.get("/compare?candidates=%3Cimg%20src=x%3E", headers=HTML)
    assert page.status_code == 422 and "<img" not in page.text and "&lt;img" in page.text


@pytest.mark.parametrize("budget", ["10", "soon"])
def test_the_value_is_named_once(client: TestClient, budget: str) -> None:
    told = client.post("/v1/studies", json={"spec": {"budget": budget}}).json()["error"]
    assert told.count("but got") == 1 and "Value error" not in told and repr(budget) in told
    with pytest.raises(UsageError) as raised:
        make_spec(None, None, {"budget": budget})
    assert raised.value.problem.count("but got") == 1 and "Value error" not in raised.value.problem


def test_pydantics_own_rules_name_the_value() -> None:
    with pytest.raises(ValidationError) as raised:
        Spec.model_validate({"seed": "x"})
    first: Any = raised.value.errors()[0]
    assert said(first).endswith(", but got 'x'")


@pytest.mark.parametrize(
    ("text", "said_as"),
    [
        ("use --budget 5m", "use `budget` 5m"),
        ("more than --qat-threshold allows", "more than `qat_threshold` allows"),
        ("free the disk or choose a folder with --home", "free the disk or choose a folder as the service's home"),
        ("choose another --study name", "choose another `name`"),
        ("`paretune targets ID --profile x`", "`paretune targets ID --profile x`"),
        ("nothing -- here", "nothing -- here"),
    ],
)
def test_errors_by_http_name_no_options(text: str, said_as: str) -> None:
    assert without_options(text) == said_as


def test_a_plan_that_is_refused_names_the_setting(client: TestClient) -> None:
    told = client.post("/v1/plan", json={"spec": {"budget": "1s"}})
    assert told.status_code == 422 and "--" not in told.json()["error"] + told.json()["remedy"]
    assert "budget" in told.json()["error"] + told.json()["remedy"]


def test_the_header_counts_the_front_of_the_shown_profile(client: TestClient) -> None:
    front = client.get("/v1/studies/nightly/front?profile=nvidia-t4").json()
    page = client.get("/studies/nightly?profile=nvidia-t4").text
    assert f"front of {len(front['front']) - len(front['ties'])}," in page
