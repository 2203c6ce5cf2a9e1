"""A small generative model that is no language model as a teacher of paretune."""

from paretune_digits.plugin import Digits

__all__ = ["Digits"]
