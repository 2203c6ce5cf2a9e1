"""All kinds of tasks. A new kind is a module and a line here."""

from __future__ import annotations

from typing import Final

from paretune.search.tasks.base import Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit
from paretune.search.tasks.recover import Recover
from paretune.search.tasks.sensitivity import MeasureSensitivity

# What exploring needs first, in the order of importance.
PREPARATIONS: Final = (Fit, Elastic, MeasureSensitivity)
KINDS: Final[tuple[type[Task], ...]] = (*PREPARATIONS, Explore, Recover, Confirm)
