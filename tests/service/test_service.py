"""The HTTP interface: what it answers, and whom."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from paretune.search.recommend.advice import advise
from paretune.search.recommend.recommend import Limits
from paretune.search.study.store import Store
from paretune.search.study.view import load_view
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.security.guard import Buckets
from paretune.service.security.sessions import COOKIE
from paretune.service.server.app import create_app
from paretune.service.state import Service

TOKEN = "t" * 32
BASE = "http://127.0.0.1:8765"
KNOWN = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def home(simulated_home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(simulated_home, tmp_path / "home"))


@pytest.fixture
def service(home: Path) -> Iterator[Service]:
    queue = Queue(home)
    yield Service(home, Studies(home), queue, TOKEN, frozenset({"models.example.org"}))
    queue.close()


@pytest.fixture
def open_client(service: Service) -> TestClient:
    """Without a token."""
    return TestClient(create_app(service), base_url=BASE, follow_redirects=False, raise_server_exceptions=True)


@pytest.fixture
def client(service: Service) -> TestClient:
    return TestClient(create_app(service), base_url=BASE, headers=KNOWN, follow_redirects=False)


def view_of(home: Path) -> Any:
    store = Store.reader(home / "studies" / "nightly")
    try:
        return load_view(store)
    finally:
        store.close()


# who may ask


def test_only_health_and_login_answer_strangers(open_client: TestClient) -> None:
    assert open_client.get("/v1/health").json()["status"] == "ok"
    assert open_client.get("/login").status_code == 200
    assert open_client.get("/static/base.js").status_code == 200
    for path in ("/v1/studies", "/v1/studies/nightly", "/v1/openapi.json", "/v1/queue", "/v1/choices", "/nothing"):
        answer = open_client.get(path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer", path
    assert open_client.post("/v1/studies", json={"spec": {}}).status_code == 401
    page = open_client.get("/studies/nightly", headers={"Accept": "text/html"})
    assert page.status_code == 303 and page.headers["location"] == "/login"


@pytest.mark.parametrize(
    "given", ["", "Bearer", "Bearer ", f"bearer {TOKEN}", f"Bearer {TOKEN}x", TOKEN, f"Bearer {TOKEN[:-1]}", "Bearer ü"]
)
def test_a_wrong_token_is_none(open_client: TestClient, given: str) -> None:
    assert open_client.get("/v1/studies", headers={b"Authorization": given.encode("latin-1")}).status_code == 401


def test_a_login_is_a_cookie_that_scripts_and_other_sites_cannot_use(open_client: TestClient) -> None:
    assert open_client.post("/login", json={"token": "x" * 32}).status_code == 403
    answer = open_client.post("/login", json={"token": TOKEN})
    assert answer.status_code == 204
    flags = answer.headers["set-cookie"].lower()
    assert "httponly" in flags and "samesite=strict" in flags and "path=/" in flags
    assert TOKEN not in answer.headers["set-cookie"], "the cookie does not show the token"
    assert open_client.get("/v1/studies").status_code == 200
    open_client.post("/logout", json={})
    assert open_client.get("/v1/studies").status_code == 401
    open_client.cookies.set(COOKIE, "x" * 43)
    assert open_client.get("/v1/studies").status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8765", 200),
        ("localhost:8765", 200),
        ("LOCALHOST:8765", 200),
        ("models.example.org", 200),
        ("models.example.org:8080", 200),
        ("models.example.org:", 403),
        ("evil.test", 403),
        ("evil.test:8765", 403),
        ("127.0.0.1", 403),
        ("127.0.0.1:80", 403),
        ("127.0.0.1:8765.evil.test", 403),
        ("localhost.evil.test:8765", 403),
        ("models.example.org.evil.test", 403),
        ("", 403),
        ("0.0.0.0:8765", 403),
        ("[::1]:8765", 403),
    ],
)
def test_dns_rebinding_is_refused(client: TestClient, host: str, status: int) -> None:
    """A page of evil.test whose name was made to point here sends its own name as Host, with whatever cookies."""
    assert client.get("/v1/studies", headers={"Host": host}).status_code == status
    assert client.get("/v1/health", headers={"Host": host}).status_code == status, "also where no token is needed"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": BASE}, 200),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "ftp://127.0.0.1:8765"}, 403),
        ({"Origin": "https://127.0.0.1:8765"}, 403),
        ({"Origin": "127.0.0.1:8765"}, 403),
        ({"Origin": "http://127.0.0.1:8766"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(client: TestClient, headers: dict[str, str], status: int) -> None:
    assert client.get("/v1/studies", headers=headers).status_code == status
    written = client.post("/v1/studies", json={"spec": {}}, headers=headers).status_code
    assert written == (201 if status == 200 and headers.get("Sec-Fetch-Mode") != "navigate" else 403)


def test_headers_that_decide_come_once(client: TestClient) -> None:
    for name, value in (("host", "127.0.0.1:8765"), ("authorization", KNOWN["Authorization"]), ("origin", BASE)):
        twice = [(name, value), (name, value)]
        assert client.get("/v1/studies", headers=twice).status_code == 400, name


def test_no_cors_and_the_same_headers_on_every_answer(client: TestClient, open_client: TestClient) -> None:
    answers = [
        client.get("/v1/studies"),
        client.get("/v1/studies/none"),
        client.get("/nothing"),
        client.options("/v1/studies", headers={"Origin": BASE, "Access-Control-Request-Method": "POST"}),
        client.get("/studies/nightly"),
        client.get("/static/base.js"),
        open_client.get("/v1/studies"),
        client.get("/v1/studies", headers={"Host": "evil.test"}),
    ]
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control")]
        policy = answer.headers["content-security-policy"]
        assert (
            "script-src 'self';" in policy
            and "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY" and answer.headers["referrer-policy"] == "no-referrer"
    assert answers[0].headers["cache-control"] == "no-store"


def test_the_report_runs_without_an_origin(client: TestClient) -> None:
    answer = client.get("/studies/nightly/report")
    assert answer.status_code == 200 and answer.headers["content-security-policy"].startswith("sandbox allow-scripts;")
    assert "allow-same-origin" not in answer.headers["content-security-policy"]


# what they may send


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"]
)
def test_writes_are_json(client: TestClient, kind: str) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert client.post("/v1/studies", content=b'{"spec": {}}', headers=headers).status_code == 415
    assert client.get("/v1/queue").json() == []


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[]", 422),
        (b'{"spec": []}', 422),
        (b'{"spec": {}, "more": 1}', 422),
        (b'{"spec": {}, "name": "../x"}', 422),
        (b'{"spec": {"budget": "never"}}', 422),
        (b'{"spec": {"seed": 1e999}}', 422),
        (b'{"spec": {"limits": {"nll": 1}}}', 422),
        (b"[" * 100_000, 400),
        (b'{"spec": ' + b'{"a":' * 20_000 + b"1" + b"}" * 20_001, 400),
    ],
)
def test_bad_bodies_are_refused_in_words(client: TestClient, body: bytes, status: int) -> None:
    answer = client.post("/v1/studies", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code in {status, 422} and set(answer.json()) == {"error", "remedy"}
    assert client.get("/v1/queue").json() == []


def test_large_bodies_are_refused_whatever_they_say_of_their_length(client: TestClient) -> None:
    large = json.dumps({"spec": {"teacher": "x" * 300_000}}).encode()
    assert client.post("/v1/studies", content=large, headers={"Content-Type": "application/json"}).status_code == 413

    def pieces() -> Iterator[bytes]:
        yield from (large[i : i + 10_000] for i in range(0, len(large), 10_000))

    answer = client.post("/v1/studies", content=pieces(), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert client.get("/v1/studies?" + "x" * 5000).status_code == 414


def test_a_slow_body_is_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """One byte, and then nothing for ever."""
    monkeypatch.setattr("paretune.service.security.guard.BODY_S", 0.05)
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if not sent:
            sent.append("asked")
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.sleep(30)
        raise AssertionError("nobody waits so long")

    async def send(message: Any) -> None:
        sent.append(message)

    headers = {"host": "127.0.0.1:8765", "content-type": "application/json", **KNOWN}
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": "/v1/studies",
        "query_string": b"",
        "server": ("127.0.0.1", 8765),
        "client": ("127.0.0.1", 1),
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(create_app(service)(scope, receive, send))
    assert sent[1]["status"] == 408 and b"within" in sent[2]["body"]


TRICKS = [
    "..",
    "../s",
    "..%2fs",
    "%2e%2e",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..%5c..%5cs",
    "s%00",
    "s/",
    "s%2f",
    "%2fetc%2fpasswd",
    "....//",
    "s%0d%0aX: y",
    "%c0%ae%c0%ae",
    "~root",
    "C:%5c",
    "s" * 500,
    "%ff",
    "s.",
    "S",
]


@pytest.mark.parametrize("trick", TRICKS)
def test_ids_are_never_paths(client: TestClient, home: Path, trick: str) -> None:
    (home / "secret").write_text("the canary")
    routes = [
        f"/v1/studies/{trick}",
        f"/v1/studies/{trick}/front",
        f"/v1/studies/{trick}/events",
        f"/v1/studies/nightly/candidates/{trick}",
        f"/v1/studies/nightly/candidates/{trick}/artifact",
        f"/v1/studies/nightly/front?profile={trick}",
        f"/v1/profiles/{trick}",
        f"/v1/artifacts/{trick}",
        f"/v1/compare?studies={trick}",
        f"/v1/compare?candidates=nightly:{trick}",
        f"/studies/{trick}",
        f"/studies/nightly/candidates/{trick}",
        f"/static/{trick}",
        f"/static/../{trick}",
    ]
    for route in routes:
        answer = client.get(route)
        assert 400 <= answer.status_code < 500 or answer.status_code in (200, 307), (route, answer.status_code)
        assert "canary" not in answer.text and "root:" not in answer.text, route
        if answer.status_code == 200:
            assert trick in ("s/", "..", "%2e%2e", "../s") and ("{" not in trick), route
    for verb in ("pause", "resume", "stop", "cancel"):
        assert client.post(f"/v1/studies/{trick}/{verb}", json={}).status_code in (404, 405, 422, 307)
    assert client.get("/v1/queue").json() == []


@pytest.mark.parametrize(
    "spec",
    [
        {"teacher": "/etc"},
        {"teacher": "../../etc"},
        {"teacher": "plugin:os:system"},
        {"teacher": ["stdlib-coder"]},
        {"data": "/etc/passwd"},
        {"data": "~/.ssh"},
        {"profile": "/tmp/evil.yaml"},
        {"profile": 3},
        {"targets": ["../x.yaml"]},
    ],
)
def test_a_submission_names_only_what_the_operator_offers(client: TestClient, spec: dict[str, Any]) -> None:
    answer = client.post("/v1/studies", json={"spec": spec})
    assert answer.status_code == 422 and next(iter(spec)) in answer.json()["error"]


def test_models_and_data_of_the_home_are_named_without_paths(client: TestClient, home: Path, tmp_path: Path) -> None:
    (home / "models" / "mine").mkdir(parents=True)
    (home / "data").mkdir()
    (home / "data" / "text.txt").write_text("words")
    (tmp_path / "outside").mkdir()
    (home / "models" / "link").symlink_to(tmp_path / "outside")
    assert client.get("/v1/choices").json()["teacher"] == ["stdlib-coder", "mine"]
    answer = client.post("/v1/studies", json={"spec": {"teacher": "mine", "data": "text.txt"}})
    assert answer.status_code == 201 and answer.json()["settings"]["teacher"] == str(home / "models" / "mine")
    assert client.post("/v1/studies", json={"spec": {"teacher": "link"}}).status_code == 422


def test_clients_have_a_bucket_each() -> None:
    moment = [0.0]
    buckets = Buckets(2.0, 3.0, lambda: moment[0])
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    assert buckets.take("b")
    moment[0] = 0.5
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    for i in range(2000):
        buckets.take(str(i))
    assert len(buckets._left) == 1000


def test_too_many_requests_and_logins_are_refused(open_client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [open_client.post("/login", json={"token": "no"}).status_code for _ in range(15)]
    assert codes[:10] == [403] * 10 and codes[-1] == 429
    app: Any = open_client.app
    monkeypatch.setattr(app, "requests", Buckets(1.0, 3.0, lambda: 0.0))
    codes = [open_client.get("/v1/health").status_code for _ in range(5)]
    assert codes == [200, 200, 200, 429, 429]
    assert open_client.get("/v1/health").headers["retry-after"] == "1"


# what they are told


def test_studies_and_fronts_are_those_of_the_store(client: TestClient, home: Path) -> None:
    view = view_of(home)
    (told,) = client.get("/v1/studies").json()
    assert told["study"] == "nightly" and told["state"] == "complete" and told["confirmed"] == len(view.confirmed)
    front = client.get("/v1/studies/nightly/front").json()
    assert [p["key"] for p in front["front"]] == [p.key for p in view.front]
    page = client.get("/v1/studies/nightly/candidates?kind=rung0&limit=7&offset=3").json()
    assert page["total"] == len(view.rung0) and len(page["candidates"]) == 7
    key = view.front[0].key
    one = client.get(f"/v1/studies/nightly/candidates/{key}").json()
    assert one["on_front"] and one["measurements"]["nll"]["value"] == view.front[0].measurements["nll"].value
    assert client.get("/v1/studies/nightly/candidates?limit=0").status_code == 422
    assert client.get("/v1/studies/nightly/targets").json()["targets"] == []
    both = client.get(f"/v1/compare?studies=nightly&candidates=nightly:{key}").json()
    assert both["studies"][0]["study"] == "nightly" and both["candidates"][0]["key"] == key
    assert client.get("/v1/compare").status_code == 422


def test_a_recommendation_is_what_the_command_line_says(client: TestClient, home: Path) -> None:
    view = view_of(home)
    own = advise(view, Limits(loss=0.05), None, None, home).to_dict()
    told = client.get("/v1/studies/nightly/recommendation?max_loss=0.05").json()
    assert told["artifact"] == f"/v1/studies/nightly/candidates/{told['chosen']['key']}/artifact"
    assert {**told, "artifact": None} == {**json.loads(json.dumps(own)), "artifact": None}
    nothing = client.get("/v1/studies/nightly/recommendation?max_latency_ms=1e-9").json()
    assert nothing["feasible"] is False and nothing["unmet"][0]["limit"] == "decode_ms_per_token"
    assert client.get("/v1/studies/nightly/recommendation?goal=smallest").json()["rule"] == "the smallest"
    for query in (
        "goal=cheapest",
        "max_loss=nan",
        "max_loss=-1",
        "max_loss=x",
        "max_latency_ms=inf",
        "profile=/etc/x.yaml",
    ):
        assert client.get(f"/v1/studies/nightly/recommendation?{query}").status_code == 422, query


def test_a_profile_that_was_never_searched_is_predicted_and_marked(client: TestClient) -> None:
    told = client.get("/v1/studies/nightly/recommendation?profile=nvidia-t4").json()
    assert told["profile"] == "nvidia-t4" and told["provenance"] in ("predicted", "mixed")
    assert any("predicted on the fly" in why for why in told["why"])


def test_files_of_an_artifact_come_by_digest_and_only_if_they_are_what_was_vouched_for(
    client: TestClient, home: Path, tmp_path: Path
) -> None:
    key = view_of(home).front[0].key
    told = client.get(f"/v1/studies/nightly/candidates/{key}/artifact").json()
    file = max(told["files"], key=lambda f: f["bytes"])
    answer = client.get(f"/v1/artifacts/{file['sha256']}")
    import hashlib

    assert hashlib.sha256(answer.content).hexdigest() == file["sha256"]
    assert answer.headers["content-disposition"].startswith("attachment")
    path = home / "studies" / "nightly" / "artifacts" / key / file["name"]
    path.write_bytes(b"something else")
    others = [f for f in told["files"] if f["sha256"] == file["sha256"]]
    assert client.get(f"/v1/artifacts/{file['sha256']}").status_code == (404 if len(others) == 1 else 200)
    (tmp_path / "outside").write_text("canary")
    path.unlink()
    path.symlink_to(tmp_path / "outside")
    listed = client.get(f"/v1/studies/nightly/candidates/{key}/artifact").json()["files"]
    assert file["name"] not in [f["name"] for f in listed]


def test_a_submit_is_idempotent_by_its_key(client: TestClient) -> None:
    first = client.post("/v1/studies", json={"spec": {"seed": 1}}, headers={"Idempotency-Key": "k"})
    again = client.post("/v1/studies", json={"spec": {"seed": 1}}, headers={"Idempotency-Key": "k"})
    assert (first.status_code, again.status_code) == (201, 200) and first.json() == again.json()
    assert first.headers["location"] == f"/v1/studies/{first.json()['study']}"
    other = client.post("/v1/studies", json={"spec": {"seed": 2}}, headers={"Idempotency-Key": "k"})
    assert other.status_code == 409 and "used before" in other.json()["error"]
    study = first.json()["study"]
    assert client.get(f"/v1/studies/{study}").json()["job"]["position"] == 1
    assert client.post(f"/v1/studies/{study}/cancel", json={}).json()["state"] == "cancelled"
    assert client.post(f"/v1/studies/{study}/resume", json={}).status_code == 409
    assert client.post("/v1/studies/none/pause", json={}).status_code == 404


def test_a_plan_costs_nothing_and_says_what_a_search_would(client: TestClient) -> None:
    answer = client.post("/v1/plan", json={"spec": {"budget": "9m"}})
    assert answer.status_code == 200 and answer.json()["budget_s"] == 540
    assert client.get("/v1/queue").json() == []


def test_a_study_that_cannot_be_read_is_said_and_holds_nobody_up(client: TestClient, home: Path) -> None:
    (home / "studies" / "broken").mkdir()
    (home / "studies" / "broken" / "study.db").write_bytes(b"no database" * 100)
    told = {s["study"]: s["state"] for s in client.get("/v1/studies").json()}
    assert told == {"broken": "unreadable", "nightly": "complete"}
    assert client.get("/v1/studies/broken").status_code == 503
    assert client.get("/studies/broken").status_code == 503
    assert client.get("/").status_code == 200


def test_a_view_is_read_again_only_when_the_store_has_changed(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paretune.service.data.LEAST_AGE_S", 0.0)
    monkeypatch.setattr("paretune.service.data.READING_SHARE", 1e9)
    first = service.studies.view("nightly")
    assert service.studies.view("nightly") is first
    store = Store.open_study(service.home / "studies" / "nightly")
    store.event("note", "something happened")
    store.close()
    again = service.studies.view("nightly")
    assert again is not first and again.events[-1].text == "something happened"


def test_pages_show_and_escape(client: TestClient, home: Path) -> None:
    evil = "<img src=x onerror=alert(1)>"
    store = Store.open_study(home / "studies" / "nightly")
    store.event("note", evil)
    store.set_meta(teacher={"name": evil, "digest": "d", "parameters": 1})
    store.close()
    key = view_of(home).front[0].key
    for path in (
        "/",
        "/studies/nightly",
        f"/studies/nightly/candidates/{key}",
        "/compare?studies=nightly",
        f"/compare?candidates=nightly:{key}",
        "/new",
        "/compare",
    ):
        answer = client.get(path)
        assert answer.status_code == 200 and evil not in answer.text, path
        assert answer.headers["content-type"].startswith("text/html")
    assert client.get("/studies/nightly/chart").json()["recommended"]
    assert client.get("/studies/none").status_code == 404
