"""Running the director's tasks by Ray Tune in worker processes."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.common.errors import EnvironmentProblem
from paretune.hardware_profiles.profile import Profile
from paretune.search.execution.processes import descendants, end_survivors
from paretune.search.execution.secrets_kept import hidden
from paretune.search.execution.signals import obeyed
from paretune.search.execution.surroundings import TEMP_PREFIX, not_started, prepare_environment, session_folder
from paretune.search.layout import THREADS, Layout
from paretune.search.policy.director import Director
from paretune.search.tasks.base import Task

OBJECT_STORE_BYTES = 100 * 2**20
RAY_ENVIRONMENT = {
    "RAY_worker_niceness": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "86400",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_DEDUP_LOGS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_ray(
    director: Director, folder: Path, home: Path, layout: Layout, launch: int, address: str | None = None
) -> None:
    """Run by Ray Tune until the director is done or SIGINT/SIGTERM ask for the end (once: orderly; again: at once)."""
    os.environ.update({name: value for name, value in RAY_ENVIRONMENT.items() if name not in os.environ})
    os.environ["PARETUNE_STUDY_FOLDER"], os.environ["PARETUNE_STUDY_HOME"] = str(folder), str(home)
    os.environ[THREADS] = str(layout.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(layout.threads))
    prepare_environment(os.environ, home, local=address is None)
    _clean_up_dead_launch(director)
    with hidden(os.environ) as secrets:
        _run_ray(director, folder, layout, launch, address, secrets)


def _run_ray(
    director: Director, folder: Path, layout: Layout, launch: int, address: str | None, secrets: Path | None
) -> None:
    import optuna
    import ray
    from ray import tune

    from paretune.search.execution.trainable import StudyWorker
    from paretune.search.execution.tune_search import Interrupt, JointSearch

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for name in ("ray", "ray.tune", "ray._private.worker"):
        logging.getLogger(name).setLevel(logging.ERROR)
    temp = session_folder()
    passed = passed_on(os.environ)
    local: dict[str, Any] = {
        "num_cpus": layout.cores,
        "num_gpus": 0,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_temp_dir": str(temp),
        "include_dashboard": False,
    }
    try:
        try:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level="error",
                configure_logging=False,
                runtime_env={"env_vars": passed},
                **({} if address else local),
            )
        except (OSError, RuntimeError, ValueError) as error:  # ConnectionError and TimeoutError are OSErrors
            raise not_started(error, temp) from error
        require_cpus(layout, [float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]])
        director.state.store.set_meta(
            ray={
                "temp": str(temp),
                "secrets": None if secrets is None else str(secrets),
                "processes": descendants(os.getpid()),
            }
        )
        tuner = tune.Tuner(
            tune.with_resources(StudyWorker, placement(layout.threads, folder, ray.cluster_resources())),
            tune_config=tune.TuneConfig(
                search_alg=JointSearch(director),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=tune.RunConfig(
                name=f"launch-{launch:03d}",
                storage_path=str(folder / "ray"),
                verbose=0,
                stop=Interrupt(director),
                failure_config=tune.FailureConfig(max_failures=0),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        )
        with obeyed(director):
            tuner.fit()
    finally:
        ray.shutdown()
        shutil.rmtree(temp, ignore_errors=True)
        shutil.rmtree(folder / "ray", ignore_errors=True)
        if director.state.store.is_there:
            director.state.store.set_meta(ray=None)


def require_cpus(layout: Layout, cpus: Sequence[float]) -> None:
    """Raises EnvironmentProblem if nodes with so many CPUs cannot hold all workers at once: Ray would wait for them for ever."""
    room = sum(int(found // layout.threads) for found in cpus)
    if room < layout.workers:
        told = ", ".join(f"{found:g}" for found in cpus) or "no"
        raise EnvironmentProblem(
            f"the search needs {layout.describe()}, but the nodes of the cluster have {told} CPUs",
            "lower --workers or --threads-per-trial, or add nodes",
        )


def placement(cores: int, folder: Path, cluster: Mapping[str, float]) -> Any:
    """What a trial asks of Ray: CPUs; and where a node was started with the study's profile as a resource
    (`ray start --resources='{"profile:NAME": 1}'`), what is timed goes there. Weights and artifacts stay in the study folder, which
    all nodes must share."""
    profile = Profile.model_validate(json.loads((folder / "setup.json").read_text(encoding="utf-8"))["profile"])
    name = f"profile:{profile.name}"
    if name not in cluster:
        if not (profile.at_hand or profile.agent):
            raise EnvironmentProblem(
                f"{profile.name} is not this machine, and no node of the cluster has the resource {name!r}",
                f"""start one with ray start --resources='{{"{name}": 1}}'""",
            )
        return {"cpu": cores}

    def of(config: dict[str, Any]) -> Any:
        from ray.tune import PlacementGroupFactory

        from paretune.search.execution.tune_search import TASK

        timed = config[TASK].is_timed
        return PlacementGroupFactory([{"CPU": 1, name: 1} if timed else {"CPU": cores}])  # a board may have fewer cores

    return of


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that workers on other machines need too. Never a token: Ray shows these to everyone who can reach it."""
    wanted = ("PARETUNE_", "OMP_", "RAY_", "TUNE_")
    hidden = ("TOKEN", "SECRET", "NOTIFY")
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(wanted) and not any(word in name for word in hidden)
    }


def _clean_up_dead_launch(director: Director) -> None:
    """After SIGKILL two of Ray's agents live on for a minute, and its session folder for ever: end and remove them."""
    dead = director.state.store.meta("ray")
    if dead is None:
        return
    end_survivors([(pid, started) for pid, started in dead["processes"]])
    for place in (dead["temp"], dead.get("secrets")):
        if place and Path(place).name.startswith(TEMP_PREFIX):
            shutil.rmtree(place, ignore_errors=True)


def _trial_name(trial: Any) -> str:
    """Kind and candidate, short enough for a folder."""
    task: Task = trial.config["task"]
    return f"{task.kind}-{'' if task.subject is None else task.subject.key[:8] + '-'}{trial.trial_id}"
