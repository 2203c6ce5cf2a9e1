"""What every plug-in's author can write: `python -m pytest test_digits.py`."""

from paretune_digits import Digits

from paretune.teachers.plugins.check import PluginConformance


class TestDigits(PluginConformance):
    plugin = Digits()
