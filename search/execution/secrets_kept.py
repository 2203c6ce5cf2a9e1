"""Our secrets stay out of Ray: its processes, and whoever reaches a cluster, can read the environment of the one that starts it.

What names a token or a secret of ours, or where notifications go, is taken out of this process's environment while Ray runs. The
workers of this machine, which may measure behind an agent, find its token in a private file whose name is no secret.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

from paretune.common.agent_access import TOKEN, TOKEN_FILE
from paretune.search.execution.surroundings import TEMP_PREFIX

OURS = "PARETUNE_"
WORDS = ("TOKEN", "SECRET", "NOTIFY")


def is_secret(name: str) -> bool:
    """Whether this environment variable is one of our secrets, which Ray must not see."""
    return name.startswith(OURS) and name != TOKEN_FILE and any(word in name for word in WORDS)


@contextmanager
def hidden(environment: MutableMapping[str, str], place: str | None = None) -> Iterator[Path | None]:
    """Take our secrets out of `environment` for the block; yields the folder of the agent's token, None without one."""
    taken = {name: environment.pop(name) for name in list(environment) if is_secret(name)}
    folder, given = None, environment.get(TOKEN_FILE)
    try:
        if TOKEN in taken:
            folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=place))
            environment[TOKEN_FILE] = str(_write(folder / "agent.token", taken[TOKEN]))
        yield folder
    finally:
        environment.pop(TOKEN_FILE, None)
        environment.update(taken if given is None else taken | {TOKEN_FILE: given})
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write(path: Path, token: str) -> Path:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="ascii", errors="replace") as file:
        file.write(token)
    return path
