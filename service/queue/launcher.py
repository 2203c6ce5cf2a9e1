"""`python -m paretune.service.queue.launcher PARENT -- ARGUMENT…`: a search that is asked to end when the service dies.

The wish (PR_SET_PDEATHSIG) is made here and survives exec; made between fork and exec of a threaded parent it would not be safe.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Ask the kernel for a SIGINT when the parent dies, then become the search.

    Raises SystemExit for a wrong command line, and with 130 if the parent has died already.
    """
    parent, separator, *rest = arguments
    if separator != "--":
        raise SystemExit("launcher PARENT -- ARGUMENT…")
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a service in the background ignores it, and so would its children
    if os.getppid() != int(parent):  # it died before the wish was made
        raise SystemExit(130)
    os.execv(sys.executable, [sys.executable, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
