"""The kinds of tasks for a plug-in's module: measuring for the fit, its training speed, rung 0, recovery, confirmation."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from paretune.common.checksums import CHECKSUMS, MODEL, sha256
from paretune.common.errors import Infeasible
from paretune.common.files import write_atomically
from paretune.compression.distill.module_recover import ModuleRecipe, recover_module
from paretune.compression.export.graph import save_model
from paretune.compression.export.module_artifact import describe_module, module_bytes, write_module_artifact
from paretune.engines.process.child import EngineChild
from paretune.objectives.measurement import Measurement
from paretune.objectives.metric_names import FORWARD
from paretune.objectives.quality.module_quality import Judged, judge, module_measurements
from paretune.objectives.quality.quality import Scores
from paretune.search.evaluators.evaluator import Evaluator
from paretune.search.evaluators.plugin_measuring import PluginMeasuring
from paretune.search.evaluators.plugin_workspace import PluginWorkspace
from paretune.search.tasks.base import Outcome
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic, ElasticResult
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit, FitResult
from paretune.search.tasks.recover import Recover, Recovered, RecoverResult
from paretune.spaces.module_candidate import ModuleCandidate
from paretune.teachers.checkpoint.training_state import load_tensors, save_tensors
from paretune.teachers.plugins.plugin import Outputs

# Largest difference between engine and torch, as a fraction of the largest output; a bit less of precision moves a hundred times that.
PARITY = 1e-4
SPEED_S = 1.0


class PluginEvaluator(Evaluator):
    """Does a study's tasks with a plug-in's module."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.space = PluginWorkspace(folder, home)
        self.measuring = PluginMeasuring(self.space)

    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Time designed candidates."""
        return self.measuring.fit(task)

    def elastic(self, task: Elastic) -> Outcome[ElasticResult]:
        """How many examples a second can be distilled at full size: there is no elastic student to train."""
        teacher, examples, elapsed = self.space.space.baselines()[0], 0.0, 0.0
        weights, _ = self.space.sparsify(teacher)
        size = len(self.space.batch.inputs[0])
        while examples == 0.0 or elapsed < SPEED_S:
            facts = self._distil(teacher, weights, {}, ModuleRecipe(4 * size), lambda: False)[1]
            examples, elapsed = examples + facts["tokens"], elapsed + facts["seconds"]
        return Outcome(result=ElasticResult(elapsed, examples, size, threads=self.space.threads))

    def explore(self, task: Explore) -> Outcome[EvaluationResult]:
        """Score a candidate in torch."""
        candidate = _module(task)
        with self.space.lock.shared():
            weights, masks = self.space.sparsify(candidate)
            judged = self.space.judge(candidate, weights, "search")
            sizes = module_bytes(self.space.graph(candidate).fill(weights, self.space.forms(candidate)))
        measurements = {
            "bytes": Measurement.exact(sizes.bytes, "bytes", "the graph with its weights"),
            "compressed_bytes": Measurement.exact(sizes.compressed_bytes, "bytes", "zstd level 3"),
        }
        return Outcome(result=EvaluationResult(judged.scores, measurements, _sparsity(masks)))

    def recover(self, task: Recover) -> Outcome[RecoverResult]:
        """Distil a candidate; the better of the weights before and after are kept."""
        candidate, space, deadline = _module(task), self.space, time.monotonic() + task.seconds_left
        with space.lock.shared():
            before, masks = space.sparsify(candidate)
        recipe = ModuleRecipe(task.tokens, seed=space.spec.seed + 1)
        after, facts = self._distil(candidate, before, masks, recipe, lambda: time.monotonic() > deadline)
        if facts["tokens"] < task.tokens:
            return Outcome("failed", RecoverResult(details=facts), reason="the budget ended during recovery")
        with space.lock.shared():
            now = space.judge(candidate, after, "search").scores
            was = space.judge(candidate, before, "search").scores
        better = now.mean_nll <= was.mean_nll
        file = space.folder / "recovered" / f"{candidate.key}.safetensors"
        save_tensors(file, after if better else before, {"key": candidate.key})
        details = {
            **facts,
            "kept_recovery": better,
            "search_before": was.mean_nll,
            "search_after": now.mean_nll,
            **_sparsity(masks),
        }
        recovered = Recovered(str(file), facts["tokens"], bool(facts.get("qat", False)))
        return Outcome(result=RecoverResult(now if better else was, details=details, recovered=recovered))

    def _distil(
        self,
        candidate: ModuleCandidate,
        weights: Mapping[str, torch.Tensor],
        masks: Any,
        recipe: ModuleRecipe,
        stop: Any,
    ) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        space = self.space
        return recover_module(
            space.forwarding(candidate),
            space.forwarding(space.space.baselines()[0]),
            weights,
            masks,
            space.matrices(candidate),
            space.forms(candidate),
            space.batches("train"),
            recipe,
            space.lock.shared,
            stop,
        )

    def confirm(self, task: Confirm) -> Outcome[EvaluationResult]:
        """Export a candidate, check that the engine computes what torch does, score it there and time it."""
        candidate, space, recovered = _module(task), self.space, task.recovered
        weights = load_tensors(Path(recovered.file))[0] if recovered else space.sparsify(candidate)[0]
        folder = space.folder / "artifacts" / candidate.key
        with space.lock.shared():
            effective = space.effective(candidate, weights)
            model = space.graph(candidate).fill(weights, space.forms(candidate))
            difference = self._check_parity(candidate, effective, model)
            sizes = write_module_artifact(folder, model, effective, self._facts(candidate))
        benchmark = self.measuring.measure(candidate, folder / MODEL)
        with space.lock.shared():
            judged = self._judge_in_engine(folder / MODEL)
            search = space.judge(candidate, weights, "search").scores.mean_nll
        reference = self._reference(candidate, judged)
        objective = space.teacher.plugin.qualities[0].objective
        measurements = {
            **module_measurements(space.teacher.plugin, judged, reference, space.fingerprint),
            **benchmark.measurements,
            "bytes": Measurement.exact(sizes.bytes, "bytes", "onnx/model.onnx"),
            "compressed_bytes": Measurement.exact(sizes.compressed_bytes, "bytes", "onnx/model.onnx, zstd level 3"),
        }
        describe_module(folder, self._told(measurements, recovered))
        facts = {
            "unrecovered": recovered is None,
            "recovery_tokens": recovered.tokens if recovered else 0,
            "qat": recovered is not None and recovered.qat,
            "parity": difference,
            f"search_{objective}": search,
        }
        artifact = (str(folder), sha256(folder / CHECKSUMS))
        return Outcome(result=EvaluationResult(judged.scores, measurements, facts, artifact))

    def _facts(self, candidate: ModuleCandidate) -> dict[str, Any]:
        space = self.space
        return {
            "key": candidate.key,
            "kind": "module",
            "study": space.folder.name,
            "profile": space.profile.name,
            "candidate": json.loads(candidate.to_json()),
            "description": candidate.describe(),
            "teacher": space.teacher.name,
            "teacher_digest": space.teacher.digest,
            "inputs": ", ".join(f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for x in space.batch.inputs),
        }

    def _told(self, measurements: Mapping[str, Measurement], recovered: Recovered | None) -> dict[str, Any]:
        """What was found out about a candidate, for its card and paretune.json."""
        first, forward = self.space.teacher.plugin.qualities[0], measurements[FORWARD]
        text = (
            f"{first.name} {measurements[first.name].value:.5g} {first.unit} "
            f"({measurements['relative_loss'].value:+.2%} against the fp32 teacher), {forward.value:.3f} ms per forward on "
            f"{self.space.profile.name} ({forward.provenance})"
        )
        told = {"quality_text": text, "measurements": {n: m.to_dict() for n, m in measurements.items()}}
        if recovered:
            told["recovery_text"] = f"{int(recovered.tokens):,} examples of distillation"
        return told

    def _check_parity(self, candidate: ModuleCandidate, effective: Mapping[str, torch.Tensor], model: Any) -> float:
        """Largest difference between the graph in the engine and torch, relative to the largest output.

        Raises Infeasible above PARITY: then the file would not compute what was searched and trained.
        """
        batch, file = self.space.batch, self.space.folder / "work" / f"parity-{candidate.key}.onnx"
        inputs = self.space.npz("parity", [batch])
        try:
            save_model(model, file)
            (found,) = self._in_engine(file, inputs, 1)
        finally:
            file.unlink(missing_ok=True)
        with torch.no_grad():
            wanted = self.space.forwarding(candidate).with_weights(effective, batch.inputs)
        return parity(found, wanted)

    def _judge_in_engine(self, model: Path) -> Judged:
        """Quality on the report split by the engine."""
        batches = self.space.batches("report")
        outputs = self._in_engine(model, self.space.npz("report", batches), len(batches))
        return judge(self.space.teacher.plugin, batches, outputs)

    def _in_engine(self, model: Path, inputs: Path, count: int) -> list[Outputs]:
        """The outputs of an engine child for batches in a file."""
        out = inputs.with_name(f"{inputs.stem}-out.npz")
        try:
            with EngineChild(self.space.threads) as child:
                child.ask(do="load", path=str(model), threads=self.space.threads)
                child.ask(timeout_s=3600.0, do="forward", inputs=str(inputs), out=str(out))
            with np.load(out, allow_pickle=False) as held:
                return [
                    tuple(
                        torch.from_numpy(held[f"{i}.{j}"])
                        for j in range(sum(n.startswith(f"{i}.") for n in held.files))
                    )
                    for i in range(count)
                ]
        finally:
            out.unlink(missing_ok=True)

    def _reference(self, candidate: ModuleCandidate, judged: Judged) -> Scores:
        """The fp32 teacher's scores on the report split; it is the first to be confirmed."""
        kept, teacher = self.space.folder / "work" / "teacher.json", self.space.space.baselines()[0]
        if not kept.exists():
            if candidate != teacher:  # an earlier launch confirmed it and took its files away
                file = kept.with_name("teacher.onnx")
                save_model(self.space.graph(teacher).fill(self.space.sparsify(teacher)[0], {}), file)
                judged = self._judge_in_engine(file)
            write_atomically(kept, json.dumps(judged.scores.__dict__).encode())
        return Scores.from_dict(json.loads(kept.read_text(encoding="utf-8")))


def parity(found: Outputs, wanted: Outputs) -> float:
    """Largest difference of two outputs, relative to the largest number in `wanted`. Raises Infeasible above PARITY."""
    worst = 0.0
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        if a.shape != b.shape:
            raise Infeasible(f"output{i} of the engine has shape {list(a.shape)}, of torch {list(b.shape)}", "")
        scale = max(1e-12, float(b.abs().max()))
        difference = float((a.double() - b.double()).abs().max()) / scale
        if not difference <= PARITY:
            raise Infeasible(
                f"engine and torch must agree to {PARITY:g} of the largest output, but output{i} differs by {difference:.2g}",
                "",
            )
        worst = max(worst, difference)
    return worst


def _module(task: EvaluationTask[Any]) -> ModuleCandidate:
    """The task's candidate, which is a plug-in's."""
    assert isinstance(task.candidate, ModuleCandidate)
    return task.candidate


def _sparsity(masks: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Fraction of the masked matrices' entries that are zero."""
    total = sum(mask.numel() for mask in masks.values())
    return {"sparsity": 1 - sum(int(mask.sum()) for mask in masks.values()) / total} if total else {}
