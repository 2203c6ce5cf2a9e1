"""Joint search over student size, sparsity and precision of a trained language model, per hardware profile.

    import paretune

    study = paretune.search(teacher="stdlib-coder", budget="9m")   # as `paretune search`
    study.front()                                                  # a pandas DataFrame
    study.recommend(max_loss=0.01).export("delivered")
    paretune.open_study("stdlib-coder-1124-1")                     # an earlier one; or one that runs elsewhere

Nothing heavy is imported before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paretune.common.version import VERSION

__version__ = VERSION

if TYPE_CHECKING:
    from paretune.api import Recommended, Study, open_study, studies
    from paretune.api import search as run_search

__all__ = ["Recommended", "Study", "__version__", "open_study", "run_search", "search", "studies"]
_OF_THE_API = {
    "Recommended": "Recommended",
    "Study": "Study",
    "open_study": "open_study",
    "run_search": "search",
    "studies": "studies",
}


def __getattr__(name: str) -> Any:
    """What is imported when it is first asked for. `search` is a package that can be called (search/__init__.py)."""
    if name == "search":
        import importlib

        return importlib.import_module("paretune.search")
    if name in _OF_THE_API:
        from paretune import api

        return getattr(api, _OF_THE_API[name])
    raise AttributeError(f"module 'paretune' has no attribute {name!r}")
