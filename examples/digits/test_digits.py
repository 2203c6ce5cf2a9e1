"""What every plug-in's author can write: `pytest examples/digits`."""

from paretune.teachers.plugin_check import PluginConformance
from paretune_digits import Digits


class TestDigits(PluginConformance):
    plugin = Digits()
