"""A Ray node that was started with the profile as a resource gets what is timed, and nothing else has to be there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from paretune.hardware_profiles.profile import detected_profile
from paretune.search.execution.ray_executor import placement

EVALUATOR = """
import os, ray
from paretune.search.evaluators.simulated import SimulatedEvaluator

class Placed(SimulatedEvaluator):
    def run(self, work):
        with open(self.folder / "placed.log", "a") as log:
            log.write(f"{work.kind} {ray.get_runtime_context().get_node_id()}\\n")
        return super().run(work)
"""
PROGRAM = """
import json, sys
from pathlib import Path
from ray.cluster_utils import Cluster
from paretune.hardware_profiles.profile import detected_profile
from paretune.search.prepare.plan import Plan
from paretune.search.prepare.ready import Ready
from paretune.search.execution.run import run_study
from paretune.search.evaluators.simulated import SHAPE
from paretune.search.spec import Spec
from paretune.search.prepare.studies import create_study
from paretune.spaces.space import Space
from paretune.teachers.checkpoint.teacher import load_teacher

home = Path(sys.argv[1])
spec = Spec.model_validate({"budget": "300s", "fit_points": 30, "max_candidates": 4, "finalists": 1})
profile = detected_profile().model_copy(update={"name": "board", "cores": 1})
space = Space.of(SHAPE, profile.weight_formats)
ready = Ready(spec, load_teacher("stdlib-coder"), profile, space, Plan("x", 1, "board", space.size(), {}, 300.0, {}, 0, 0, 0, 0, 0, 0, ()))
small = {"object_store_memory": 80 * 2**20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **small})
board = cluster.add_node(num_cpus=1, resources={"profile:board": 1}, object_store_memory=80 * 2**20)
cluster.wait_for_nodes()
try:
    code = run_study(create_study(ready, home, "s", "x"), ready, home, lambda *_: None, cluster.address)
    print(json.dumps({"code": code, "board": board.node_id}))
finally:
    cluster.shutdown()
"""


@pytest.mark.timeout(200)
def test_what_is_timed_runs_on_the_node_of_the_profile(tmp_path: Path) -> None:
    (tmp_path / "placed_evaluator.py").write_text(EVALUATOR)
    environment = {
        **os.environ,
        "PARETUNE_EVALUATOR": "placed_evaluator:Placed",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["code"] == 0
    nodes = defaultdict(set)
    for line in (tmp_path / "studies" / "s" / "placed.log").read_text().splitlines():
        kind, node = line.split()
        nodes[kind].add(node)
    assert {"fit", "confirm", "rung0", "elastic", "recover"} <= nodes.keys()
    assert nodes["fit"] == nodes["confirm"] == {told["board"]}
    assert nodes["rung0"] - {told["board"]}, "the other work is free to run elsewhere"


def test_without_such_a_node_every_trial_asks_the_same(tmp_path: Path) -> None:
    (tmp_path / "setup.json").write_text(json.dumps({"profile": detected_profile().model_dump(mode="json")}))
    assert placement(2, tmp_path, {"CPU": 4.0, "profile:another": 1.0}) == {"cpu": 2}
    assert callable(placement(2, tmp_path, {"CPU": 4.0, "profile:local-cpu": 1.0}))
