"""Logins, tokens and proxies: who is known, for how long, and as whom."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from paretune.common.errors import UsageError
from paretune.service.data import Studies
from paretune.service.queue.queue import Queue
from paretune.service.security.proxies import forwarded_client, forwarded_scheme, is_in, networks
from paretune.service.security.sessions import COOKIE, MOST_SESSIONS, SECURE_COOKIE, SESSION_S, Sessions, session_names
from paretune.service.server.app import create_app
from paretune.service.state import Service

TOKEN = "t" * 43
BASE = "http://127.0.0.1:8765"
PUBLIC = {"Host": "models.example.org", "Origin": "https://models.example.org"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    queue = Queue(tmp_path)
    names = frozenset({"models.example.org"})
    yield Service(tmp_path, Studies(tmp_path), queue, TOKEN, names, proxies=networks(["10.0.0.0/24"]))
    queue.close()


def client_at(service: Service, address: str = "127.0.0.1", app: Any = None) -> TestClient:
    return TestClient(app or create_app(service), base_url=BASE, follow_redirects=False, client=(address, 5000))


@pytest.fixture
def client(service: Service) -> TestClient:
    return client_at(service)


def cookie_of(answer: Any) -> str:
    return str(answer.headers["set-cookie"]).partition(";")[0]


def read(client: TestClient, *cookies: str | bytes, **headers: str) -> int:
    """The status of a read with Cookie headers as they stand."""
    client.cookies.clear()
    sent: Any = [*(("cookie", cookie) for cookie in cookies), *headers.items()]
    return client.get("/v1/queue", headers=sent).status_code


# sessions


def test_a_session_is_random_and_logout_ends_it(client: TestClient) -> None:
    first, second = (cookie_of(client.post("/login", json={"token": TOKEN})) for _ in range(2))
    assert first != second and TOKEN not in first
    client.cookies.clear()
    other = cookie_of(client.post("/login", json={"token": TOKEN}))
    client.cookies.clear()
    assert read(client, second) == read(client, other) == 200
    assert client.post("/logout", json={}, headers={"Cookie": second}).status_code == 204
    assert read(client, second) == 401, "the old cookie is void"
    assert read(client, other) == 200, "another browser's is not"


def test_a_restart_ends_all_sessions(service: Service, client: TestClient) -> None:
    cookie = cookie_of(client.post("/login", json={"token": TOKEN}))
    again = Service(service.home, service.studies, service.queue, TOKEN)
    assert read(client, cookie) == 200 and read(client_at(again), cookie) == 401


def test_a_session_expires_and_the_oldest_goes_first() -> None:
    moment = [0.0]
    sessions = Sessions(lambda: moment[0])
    name = sessions.begin()
    moment[0] = SESSION_S - 1
    assert sessions.knows(name)
    moment[0] = SESSION_S
    assert not sessions.knows(name)
    names = [sessions.begin() for _ in range(MOST_SESSIONS + 1)]
    assert not sessions.knows(names[0]) and sessions.knows(names[1]) and sessions.knows(names[-1])
    assert not sessions.knows("") and not sessions.knows("ü\ud800")


FOREIGN: list[bytes] = [
    b'prefs={"a":1}',
    b"a[b]=1",
    b"flag",
    b"=",
    b"",
    b";;;",
    b"name=J\xfcrgen",
    "name=Jürgen ☃".encode(),
    b"two words=a b c",
    b'quoted="a;b',
    b"comma=a,b",
    b"x=" + b"y" * 20_000,
    f"{COOKIE}=stale".encode(),
    f"{COOKIE}=".encode(),
    f"{COOKIE}".encode(),
    f"x{COOKIE}=1".encode(),
    b"; ".join(b"c%d=1" % i for i in range(500)),
]


@pytest.mark.parametrize("foreign", FOREIGN, ids=lambda f: repr(f)[:30])
def test_foreign_cookies_do_no_harm(client: TestClient, foreign: bytes) -> None:
    own = cookie_of(client.post("/login", json={"token": TOKEN})).encode()
    assert read(client, foreign + b"; " + own) == 200
    assert read(client, own + b"; " + foreign) == 200
    assert read(client, own + b";" + foreign) == 200
    assert read(client, foreign, own) == 200, "as two headers"
    assert read(client, foreign) == 401


def test_no_cookie_is_taken_for_another() -> None:
    assert session_names([f"a={COOKIE}=x; {COOKIE.upper()}=y; {SECURE_COOKIE}=z"]) == ["z"]
    assert session_names([f"{COOKIE}=plain; {SECURE_COOKIE}=z"], secure_only=True) == ["z"]


# TLS


def test_behind_tls_the_cookie_is_secure(service: Service) -> None:
    app = create_app(service)
    for address, headers, secure in (
        ("127.0.0.1", PUBLIC, True),  # a proxy that nobody has named: the page's own Origin says so
        ("127.0.0.1", {"Host": "models.example.org", "Origin": "http://models.example.org"}, False),
        ("127.0.0.1", {"Host": "models.example.org", "X-Forwarded-Proto": "https"}, False),  # not from a trusted proxy
        ("10.0.0.7", {"Host": "models.example.org", "X-Forwarded-Proto": "https"}, True),
        ("10.0.0.7", {"Host": "models.example.org", "X-Forwarded-Proto": "http"}, False),
    ):
        client = client_at(service, address, app)
        answer = client.post("/login", json={"token": TOKEN}, headers=headers)
        told = answer.headers["set-cookie"]
        assert answer.status_code == 204 and ("Secure" in told) == secure, headers
        assert told.startswith(SECURE_COOKIE if secure else f"{COOKIE}=")
        assert "Path=/" in told and "Domain" not in told and "HttpOnly" in told, "as the prefix __Host- wants"
        assert read(client, cookie_of(answer), **headers) == 200
        ended = client.post("/logout", json={}, headers={**headers, "Cookie": cookie_of(answer)})
        assert ended.status_code == 204 and read(client, cookie_of(answer), **headers) == 401


def test_the_scheme_of_an_origin_counts(service: Service) -> None:
    proxied = {"Host": "models.example.org", "X-Forwarded-Proto": "https"}
    at_proxy = client_at(service, "10.0.0.7")
    for origin, status in (
        ("https://models.example.org", 401),
        ("https://models.example.org:443", 401),
        ("http://models.example.org", 403),
        ("https://models.example.org:8443", 403),
        ("ftp://models.example.org", 403),
    ):
        assert read(at_proxy, **proxied, Origin=origin) == status, origin


# guesses


def test_wrong_tokens_are_counted_as_logins(service: Service) -> None:
    app = create_app(service)
    client, other = client_at(service, "192.0.2.1", app), client_at(service, "192.0.2.2", app)
    codes = [read(client, Authorization=f"Bearer {i}") for i in range(14)]
    assert codes[:10] == [401] * 10 and codes[-1] == 429
    assert client.post("/login", json={"token": TOKEN}).status_code == 429, "it is one bucket"
    assert read(other, Authorization="Bearer no") == 401
    assert other.post("/login", json={"token": TOKEN}).status_code == 204
    assert read(client, Authorization=f"Bearer {TOKEN}") == 200, (
        "a token that cannot be guessed opens whatever others try"
    )


def test_a_short_token_is_not_tried_when_the_guesses_are_used_up(service: Service) -> None:
    short = Service(service.home, service.studies, service.queue, "correct-horse-16")
    client = client_at(short, "192.0.2.1")
    assert read(client, Authorization="Bearer correct-horse-16") == 200
    assert [read(client, Authorization=f"Bearer {i}") for i in range(14)][-1] == 429
    assert read(client, Authorization="Bearer correct-horse-16") == 429


def test_a_program_with_an_old_token_keeps_no_browser_out(client: TestClient) -> None:
    assert {read(client, Authorization="Bearer of-last-week") for _ in range(40)} == {401}
    assert client.post("/login", json={"token": TOKEN}).status_code == 204


# proxies


def test_a_proxys_clients_are_told_apart(service: Service) -> None:
    client = client_at(service, "10.0.0.7")

    def login(forwarded: str, token: str = "no") -> int:
        return client.post("/login", json={"token": token}, headers={"X-Forwarded-For": forwarded}).status_code

    assert [login("198.51.100.1") for _ in range(14)][-1] == 429
    assert login("198.51.100.2", TOKEN) == 204
    assert login("203.0.113.9, 198.51.100.1", TOKEN) == 429, "what the client itself has put before does not count"


def test_others_are_not_believed(service: Service) -> None:
    client = client_at(service, "192.0.2.1")
    codes = [
        client.post("/login", json={"token": "no"}, headers={"X-Forwarded-For": f"198.51.100.{i}"}).status_code
        for i in range(14)
    ]
    assert codes[-1] == 429


@pytest.mark.parametrize(
    ("headers", "client"),
    [
        ([], "10.0.0.1"),
        (["198.51.100.1"], "198.51.100.1"),
        (["1.2.3.4, 198.51.100.1"], "198.51.100.1"),
        (["1.2.3.4", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),
        (["198.51.100.1:4711"], "198.51.100.1"),
        (['"[2001:db8::1]:4711"'], "2001:db8::1"),
        (["::ffff:198.51.100.1"], "198.51.100.1"),
        (["unknown"], "10.0.0.1"),
        (["1.2.3.4, unknown"], "10.0.0.1"),
        ([""], "10.0.0.1"),
        (["1.2.3.4," + "10.0.0.2," * 5000], "10.0.0.1"),
    ],
)
def test_the_last_stranger_is_the_client(headers: list[str], client: str) -> None:
    trusted = networks(["10.0.0.0/24"])
    assert forwarded_client("10.0.0.1", headers, lambda address: is_in(address, trusted)) == client


def test_the_proxys_own_word_is_the_last() -> None:
    assert forwarded_scheme(["http, https"]) == forwarded_scheme(["http", "HTTPS"]) == "https"
    assert forwarded_scheme([]) is forwarded_scheme(["wss"]) is None


@pytest.mark.parametrize("text", ["", "proxy.example.org", "0.0.0.0/0", "::/0", "10.0.0.1:80", "10.0.0.0/33"])
def test_a_trusted_proxy_is_an_address(text: str) -> None:
    with pytest.raises(UsageError, match="--trusted-proxy"):
        networks([text])


def test_networks_know_both_families() -> None:
    trusted = networks(["127.0.0.1", "fd00::/8"])
    assert is_in("127.0.0.1", trusted) and is_in("::ffff:127.0.0.1", trusted) and is_in("fd12::1", trusted)
    assert not is_in("127.0.0.2", trusted) and not is_in("", trusted) and not is_in("testclient", trusted)
