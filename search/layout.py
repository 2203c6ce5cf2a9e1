"""How many tasks run at once, and on how many threads each."""

from __future__ import annotations

import os
from dataclasses import dataclass

from paretune.common.errors import UsageError
from paretune.hardware_profiles.profile import Profile
from paretune.search.spec import Spec

THREADS = "PARETUNE_THREADS"


@dataclass(frozen=True)
class Layout:
    """`workers` processes that do a task each, on `threads` threads each."""

    workers: int = 1
    threads: int = 1

    @property
    def cores(self) -> int:
        """Cores that are in use while every worker has a task."""
        return self.workers * self.threads

    def describe(self) -> str:
        """In words: "2 workers with 1 thread each"."""
        each = " each" if self.workers > 1 else ""
        return f"{_count(self.workers, 'worker')} with {_count(self.threads, 'thread')}{each}"


def cores_here(profile: Profile) -> int:
    """Cores of the profile that this process may use."""
    return max(1, min(profile.cores, len(os.sched_getaffinity(0))))


def layout_of(spec: Spec, profile: Profile, address: str | None = None) -> Layout:
    """The spec's layout, or one worker on all cores of this machine; on a Ray cluster, whose machines may have more, on all cores
    of the profile. Raises UsageError if this machine has too few cores."""
    cores = cores_here(profile) if address is None else profile.cores
    workers, threads = spec.workers, spec.threads_per_trial
    found = Layout(workers or max(1, cores // (threads or cores)), threads or max(1, cores // (workers or 1)))
    if address is None and found.cores > cores:
        raise UsageError(
            f"workers x threads per trial must be at most the {_count(cores, 'core')} that this search may use, but got "
            f"{found.workers} x {found.threads} = {found.cores}",
            "lower --workers or --threads-per-trial",
        )
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
