"""The threads of a worker process."""

from __future__ import annotations

import os

import torch

from paretune.hardware_profiles.profile import Profile
from paretune.search.layout import THREADS, cores_here


def use_threads(profile: Profile) -> int:
    """Let torch use the threads that the search's layout gives to each worker, else all cores of the profile; returns their number."""
    threads = int(os.environ.get(THREADS, 0)) or cores_here(profile)
    torch.set_num_threads(threads)
    return threads
