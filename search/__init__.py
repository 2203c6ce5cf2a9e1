"""The search: store, samplers, the Ray executor, budget, front, recommendation.

The package can be called, too: `paretune.search(teacher=…, budget=…)` is `paretune.run_search`, the name that type checkers know.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is also the function of its name (a module's class may be assigned)."""

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        # Looked up, not imported: that package stands above this one, and has been imported before it.
        return sys.modules["paretune"].run_search(*arguments, **settings)


sys.modules[__name__].__class__ = _Callable
