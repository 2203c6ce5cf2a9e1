"""The command line as a process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Of a real search in a test: recoveries are short.
SHARES = {"elastic": 0.03, "explore": 0.6, "confirm": 0.02}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}


def paretune(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`paretune` with these arguments in a folder, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "paretune", *map(str, arguments)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=270,
        check=False,
    )
