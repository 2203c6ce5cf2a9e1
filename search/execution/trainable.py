"""The worker as a Tune Trainable: one process, one evaluator, reused for every task.

A watchdog in C ends the process when a task outlives its time, whatever Python is doing; Tune then reports the
trial as failed and starts a fresh worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from ray import tune

from paretune.common.files import disk_problem
from paretune.search.evaluators.evaluator import Evaluator
from paretune.search.execution.tune_search import OUTCOME, TASK
from paretune.search.study.database import folder_gone
from paretune.search.tasks.base import Outcome, Task, fatal

DECODER = "paretune.search.evaluators.decoder:DecoderEvaluator"
PLUGIN = "paretune.search.evaluators.plugin:PluginEvaluator"
FOLDER, HOME, EVALUATOR = "PARETUNE_STUDY_FOLDER", "PARETUNE_STUDY_HOME", "PARETUNE_EVALUATOR"


class StudyWorker(tune.Trainable):  # type: ignore[misc, unused-ignore]
    """Runs `Evaluator.run`; the evaluator lives as long as the process."""

    def setup(self, config: dict[str, Any]) -> None:
        """Send all output to the study's worker.log, make the evaluator, and take the first task."""
        log = (Path(os.environ[FOLDER]) / "worker.log").open("a", buffering=1, encoding="utf-8", errors="replace")
        os.dup2(log.fileno(), sys.stderr.fileno())
        os.dup2(log.fileno(), sys.stdout.fileno())
        self._evaluator = make_evaluator(Path(os.environ[FOLDER]), Path(os.environ[HOME]))
        self._task: Task = config[TASK]

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next task. Always True, so that Tune keeps the process."""
        self._task = new_config[TASK]
        return True

    def step(self) -> dict[str, Any]:
        """Run the task once and return its outcome.

        An exception becomes an outcome. After the task's `timeout_s` a watchdog ends the process.
        """
        task = self._task
        faulthandler.dump_traceback_later(task.timeout_s, exit=True)
        try:
            outcome: Outcome[Any] = self._evaluator.run(task)
        except OSError as error:
            outcome = _disk_outcome(error)
        except MemoryError:
            outcome = Outcome("infeasible", reason="out of memory")
        except Exception as error:
            traceback.print_exc()
            outcome = Outcome("failed", reason=f"{type(error).__name__}: {error}")
        finally:
            faulthandler.cancel_dump_traceback_later()
            give_memory_back()
        return {OUTCOME: outcome, "done": outcome.done}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: every kind of work keeps its own state in the study folder."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing to load."""

    def cleanup(self) -> None:
        """Close the evaluator."""
        self._evaluator.close()


def give_memory_back() -> None:
    """Hand freed heap pages to the system: glibc keeps them, a gigabyte after training 135M parameters."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _disk_outcome(error: OSError) -> Outcome[Any]:
    """Fatal if the disk or the study folder is what failed, else this work's own failure."""
    folder = Path(os.environ[FOLDER])
    problem = disk_problem(error) if (folder / "study.db").exists() else folder_gone(folder)
    if problem is not None:
        return fatal(problem)
    traceback.print_exc()
    return Outcome("failed", reason=f"{type(error).__name__}: {error}")


def make_evaluator(folder: Path, home: Path) -> Evaluator:
    """The evaluator of the study's kind of teacher, or the simulated one that tests name by `module:class` in the environment."""
    setup = json.loads((folder / "setup.json").read_text(encoding="utf-8"))
    name = os.environ.get(EVALUATOR, PLUGIN if "plugin_folder" in setup else DECODER)
    module, _, cls = name.partition(":")
    made: Evaluator = getattr(__import__(module, fromlist=[cls]), cls)(folder, home)
    return made
