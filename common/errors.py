"""What the caller will do decides the class of an error.

    ParetuneError
    ├── UsageError          the user changes the command or the file (exit 2)
    ├── NothingFeasible     the constraints exclude everything (exit 4)
    ├── EnvironmentProblem  the user mends disk, memory, package or machine (exit 5)
    │   └── Shortage        the machine lacks memory, disk or handles just now: what waits goes on when it has them again
    │       └── DiskProblem its disk is full, over quota or read-only
    └── Infeasible          this one candidate cannot be built or run; the search goes on

Every message states the rule and the actual value; `remedy` says what to do.
"""

from __future__ import annotations


class ParetuneError(Exception):
    """Base of all errors that are meant for the user: one sentence and a remedy."""

    exit_code = 1

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.problem = problem
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[ParetuneError], tuple[str, str]]:
        return type(self), (self.problem, self.remedy)


class UsageError(ParetuneError):
    """The user must change the command or a file (exit code 2)."""

    exit_code = 2


class NothingFeasible(ParetuneError):
    """The limits exclude every candidate, or none could be confirmed (exit code 4)."""

    exit_code = 4


class EnvironmentProblem(ParetuneError):
    """The user must mend the disk, the memory, a package or the machine (exit code 5)."""

    exit_code = 5


class Shortage(EnvironmentProblem):
    """Nothing is wrong with what is kept or asked; the machine lacks something for now."""


class DiskProblem(Shortage):
    """The disk is full, over quota, read-only or fails."""


class Infeasible(ParetuneError):
    """A candidate that cannot be exported or executed; the reason names the op or tensor."""


class RenamedSetting(FutureWarning):
    """A setting was given by a name that it had in an earlier version."""
