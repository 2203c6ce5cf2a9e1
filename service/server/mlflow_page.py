"""MLflow's page behind a login: a process of our own on a Unix socket, and an application that hands requests on to it.

What the process answers is decided in tracking/mlflow/app.py; who may ask it, by the guard before this application. The socket
lies in a folder that only this user can enter.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretune.common.errors import EnvironmentProblem
from paretune.tracking.mlflow.addresses import end_server, require_database
from paretune.tracking.mlflow.app import PREFIX, environment_of
from paretune.tracking.mlflow.paths import follow_home

if TYPE_CHECKING:
    import aiohttp

    from paretune.service.security.guard import App, Receive, Scope, Send

START_S, ANSWER_S = 90.0, 60.0
RESTARTS_S = (0.5, 1.0, 5.0, 30.0)  # before the process is started again; the last one from then on
ASKED = (b"accept", b"accept-encoding", b"content-type", b"if-none-match", b"if-modified-since", b"range")
ANSWERED = (
    "content-type",
    "content-length",
    "content-encoding",
    "content-disposition",
    "content-range",
    "etag",
    "last-modified",
    "cache-control",
    "location",
)
# MLflow's page is not ours: scripts of its own files only, and files of runs are shown in a frame without rights. Its parallel
# coordinates make functions at run time (unsafe-eval). Scripts inside HTML files of runs are under the page's policy, so they
# draw only where `inline` allows it.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-eval'{inline}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "font-src 'self' data:; connect-src 'self'; worker-src 'self' blob:; frame-src 'self' blob: data:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'self'"
)
FRAMES = (b"x-frame-options", b"SAMEORIGIN")


@contextlib.contextmanager
def mlflow_process(home: Path) -> Iterator[Path]:
    """MLflow over `home` until the end of the block; gives its Unix socket once it answers. If it ends by itself, it is started again.

    Raises UsageError if nothing was recorded in `home` yet, EnvironmentProblem if it does not come up.
    """
    require_database(home)
    _follow(home)
    folder = Path(tempfile.mkdtemp(prefix="paretune-", dir=_short_folder()))  # of mode 0700
    try:
        kept = _Kept(home, folder / "mlflow")
        try:
            kept.begin()
            yield kept.path
        finally:
            kept.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Kept:
    """The process on `path`, and a thread that starts it again when it ends before `end` was called."""

    def __init__(self, home: Path, path: Path) -> None:
        self.home, self.path = home, path
        self._server: subprocess.Popen[bytes] | None = None
        self._ending = threading.Event()
        self._lock = threading.Lock()  # no start after the end
        self._thread = threading.Thread(target=self._keep, name="mlflow", daemon=True)

    def begin(self) -> None:
        self._server = self._start()
        _wait(self._server, self.path)
        self._thread.start()

    def end(self) -> None:
        with self._lock:
            self._ending.set()
        if self._server is not None:
            end_server(self._server)
        if self._thread.ident is not None:
            self._thread.join()

    def _keep(self) -> None:
        """The kernel ends the process when the thread that started it ends, so this one waits for what it started."""
        for wait_s in itertools.chain(RESTARTS_S, itertools.repeat(RESTARTS_S[-1])):
            assert self._server is not None
            code = self._server.wait()
            if self._ending.is_set():
                return
            print(f"MLflow exited with code {code}; restarting it in {wait_s:g} s", file=sys.stderr, flush=True)
            self._ending.wait(wait_s)
            with self._lock:
                if self._ending.is_set():
                    return
                try:
                    self._server = self._start()
                except OSError as error:
                    print(f"MLflow cannot be restarted: {error.strerror}", file=sys.stderr, flush=True)

    def _start(self) -> subprocess.Popen[bytes]:
        self.path.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "paretune.tracking.mlflow.app", str(self.path), str(os.getpid())]
        return subprocess.Popen(
            command,
            env=environment_of(self.home),
            cwd=self.path.parent,  # MLflow makes folders where it stands
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )


def _follow(home: Path) -> None:
    """A home that was moved or copied shows its own files. One that cannot be written shows what it can."""
    try:
        follow_home(home)
    except sqlite3.Error as error:
        print(f"note: MLflow's addresses of files stay as they are: {error}", file=sys.stderr)


def _short_folder() -> str | None:
    """A Unix socket's path has at most 107 bytes; None: the usual place."""
    return None if len(os.fsencode(tempfile.gettempdir())) < 70 else "/tmp"


def _wait(server: subprocess.Popen[bytes], path: Path) -> None:
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket(socket.AF_UNIX) as probe:
            if path.exists() and probe.connect_ex(str(path)) == 0:
                return
        time.sleep(0.1)
    reason = f"it ended with {server.returncode}" if server.poll() is not None else f"no answer in {START_S:.0f} s"
    raise EnvironmentProblem(f"MLflow did not come up: {reason}", "look at its words above")


class MlflowProxy:
    """Hands requests below PREFIX on to the socket, without cookies, tokens or other headers that MLflow does not need; everything
    else goes to `app`. `inline_scripts`: charts inside HTML files of runs are drawn; only where nothing but MLflow has the address."""

    def __init__(self, app: App, path: Path, inline_scripts: bool = False) -> None:
        self.app, self.path = app, path
        policy = POLICY.format(inline=" 'unsafe-inline'" if inline_scripts else "")
        self.headers = [(b"content-security-policy", policy.encode()), FRAMES]
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not (path == PREFIX or path.startswith(f"{PREFIX}/")):
            await self.app(scope, receive, send)
        elif path == PREFIX:
            await _answer(send, 307, [(b"location", f"{PREFIX}/".encode())])
        else:
            await self._hand_on(scope, receive, send)

    async def _hand_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        import aiohttp

        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in scope["headers"] if k.lower() in ASKED]
        raw = (scope.get("raw_path") or str(scope["path"]).encode()).decode("latin-1")
        query = scope.get("query_string", b"").decode("latin-1")
        url = _exact(f"http://localhost{raw}{'?' + query if query else ''}")
        body = await _body(receive) if scope["method"] == "POST" else None
        began = False
        try:
            async with self._opened().request(
                scope["method"], url, headers=headers, data=body, allow_redirects=False
            ) as answer:
                kept = [(n.encode(), answer.headers[n].encode("latin-1")) for n in ANSWERED if n in answer.headers]
                await send({"type": "http.response.start", "status": answer.status, "headers": [*kept, *self.headers]})
                began = True
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if began:
                raise
            words = f"MLflow does not answer ({type(error).__name__}). If it has exited, it is restarted: try again in a few seconds"
            await _answer(
                send, 503, [(b"content-type", b"text/plain; charset=utf-8"), (b"retry-after", b"5")], words.encode()
            )

    def _opened(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(str(self.path)),
                timeout=aiohttp.ClientTimeout(total=ANSWER_S),
                auto_decompress=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


def _exact(url: str) -> Any:
    import yarl

    return yarl.URL(url, encoded=True)


async def _body(receive: Receive) -> bytes:
    """The whole body, which the guard has bounded: MLflow reads none whose length it is not told."""
    found = bytearray()
    while True:
        message: MutableMapping[str, Any] = await receive()
        found += message.get("body", b"")
        if message["type"] != "http.request" or not message.get("more_body", False):
            return bytes(found)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes = b"") -> None:
    size = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [*headers, size]})
    await send({"type": "http.response.body", "body": body})
