"""All kinds of tasks for a decoder, done in earnest: latency fit, elastic student, sensitivity table, rung 0, recovery, confirmation."""

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
from paretune.compression.distill.elastic import ElasticTrainer
from paretune.compression.export.artifact import compressed_bytes, describe_artifact, write_artifact
from paretune.compression.network.student import EMBEDDING, Codes, quantized_weights
from paretune.engines.batching import even_batches
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.training_precision import autocast, training_dtype
from paretune.objectives.energy import following
from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores, quality_measurements, sum_by_document
from paretune.search.evaluators.evaluator import Evaluator
from paretune.search.evaluators.measuring import Measuring
from paretune.search.evaluators.recovering import Recovering, sparsity_of
from paretune.search.evaluators.workspace import Workspace
from paretune.search.tasks.base import Outcome, Task
from paretune.search.tasks.confirm import Confirm
from paretune.search.tasks.elastic import Elastic, ElasticResult
from paretune.search.tasks.evaluation import EvaluationResult, EvaluationTask
from paretune.search.tasks.explore import Explore
from paretune.search.tasks.fit import Fit, FitResult
from paretune.search.tasks.recover import Recover, Recovered, RecoverResult
from paretune.search.tasks.sensitivity import MeasureSensitivity, SensitivityResult
from paretune.spaces.candidate import Candidate
from paretune.teachers.checkpoint.families import POSITIONS
from paretune.teachers.checkpoint.training_state import load_tensors
from paretune.teachers.text.tokens import Windows

SCORE_BATCH = 16
ELASTIC_SLICE_S = 10.0
REFERENCE_BYTES = 256 * 2**20
FIRST_SLICE, SCORE_SLICE_S = 32, 5.0  # windows, seconds


class DecoderEvaluator(Evaluator):
    """Does a study's tasks with the weights of its teacher."""

    def __init__(self, folder: Path, home: Path) -> None:
        self.space = Workspace(folder, home)
        self.measuring = Measuring(self.space)
        self._deadline: tuple[Task, float] | None = None
        self._trainer: ElasticTrainer | None = None

    def fit(self, task: Fit) -> Outcome[FitResult]:
        """Time designed candidates."""
        return self.measuring.fit(task)

    def elastic(self, task: Elastic) -> Outcome[ElasticResult]:
        """Train the elastic student, or go on where an earlier slice or search has stopped."""
        if self._trainer is None:
            with self.space.lock.shared():
                self._trainer = self.space.elastic_trainer()
        trainer = self._trainer
        before = trainer.elapsed
        if self._deadline is None or self._deadline[0] is not task:
            self._deadline = (task, time.monotonic() + task.seconds_left)
        left = self._deadline[1] - time.monotonic()
        if left <= 0 and not trainer.done:
            trainer.save()
            self._trainer = None
            return Outcome(
                "failed", reason="the budget ended while the elastic student was trained; it will go on from there"
            )
        progress = trainer.run(min(ELASTIC_SLICE_S, left))
        found = ElasticResult(
            elapsed_s=progress["elapsed_s"],
            tokens=progress["tokens"],
            batch_tokens=trainer.recipe.batch * trainer.recipe.context,
            is_kept=before >= trainer.recipe.seconds,
            seconds=trainer.recipe.seconds,
            loss=None if np.isnan(progress["loss"]) else float(progress["loss"]),
            file=str(self.space.elastic_file),
            threads=trainer.threads,
        )
        if trainer.done:
            self._trainer = None
        return Outcome(result=found, done=trainer.done)

    def sensitivity(self, task: MeasureSensitivity) -> Outcome[SensitivityResult]:
        """Measure the table, or take that of an earlier search."""
        start = time.monotonic()
        try:
            table, kept = self.space.sensitivity(task.formats)
        except ValueError as error:
            return Outcome("failed", reason=str(error))
        return Outcome(result=SensitivityResult(table, time.monotonic() - start, kept))

    def explore(self, task: Explore) -> Outcome[EvaluationResult]:
        """Score a candidate in torch, with fake-quant on the engine's grid."""
        candidate = _decoder(task)
        with self.space.lock.shared():
            weights, masks = self.space.sparsify(candidate, self.space.dense_weights(candidate))
            codes = self.space.codes(candidate, weights)
            scores = self.score_in_torch(candidate, weights, codes)
            sizes = compressed_bytes(weights, candidate, self.space.teacher.config, self.space.teacher.shape, codes)
        measurements = {
            "bytes": Measurement.exact(sizes.bytes, "bytes", "the graph with its weights"),
            "compressed_bytes": Measurement.exact(sizes.compressed_bytes, "bytes", "zstd level 3"),
        }
        return Outcome(result=EvaluationResult(scores, measurements, sparsity_of(masks)))

    @torch.no_grad()
    def score_in_torch(self, candidate: Candidate, weights: Mapping[str, torch.Tensor], codes: Codes) -> Scores:
        """NLL on the search split with fake-quant; sums per document. Products are in `training_dtype`; `codes`: `Workspace.codes`."""
        windows, network = self.space.search_windows, self.space.network(len(candidate.layers))
        effective = quantized_weights(weights, candidate, codes)
        for name, value in list(effective.items()):
            if value.ndim == 2 and name not in (EMBEDDING, POSITIONS):
                effective[name] = value.to(training_dtype())  # in place, so that the two sets never exist side by side
        sums, exact = np.zeros(len(windows.ids)), candidate.uses_dynamic_activations  # whose scale sees the padding
        with autocast(), network.activations(candidate, codes):
            for chosen, length in even_batches(windows.targets, SCORE_BATCH * self.space.window, exact):
                loss = network.token_losses(effective, torch.from_numpy(windows.ids[chosen, :length]))
                valid = torch.arange(length - 1)[None] < torch.from_numpy(windows.targets[chosen])[:, None]
                sums[chosen] = loss.where(valid, 0.0).sum(1).numpy()
        if not np.isfinite(sums).all():
            raise Infeasible("the NLL is not finite", "")
        return _scores(windows, self.space.tokens["search"].names, sums)

    def recover(self, task: Recover) -> Outcome[RecoverResult]:
        """Distil a candidate."""
        return Recovering(self.space, self.score_in_torch).run(_decoder(task), task)

    def confirm(self, task: Confirm) -> Outcome[EvaluationResult]:
        """Export a candidate, score it in its engine and time it."""
        candidate, recovered = _decoder(task), task.recovered
        weights = load_tensors(Path(recovered.file))[0] if recovered else dict(self.space.dense_weights(candidate))
        folder = self.space.folder / "artifacts" / candidate.key
        facts = {
            "key": candidate.key,
            "study": self.space.folder.name,
            "profile": self.space.profile.name,
            "corpus": self.space.corpus_fingerprint,
        }
        with self.space.lock.shared():
            codes = self.space.codes(candidate, weights)
            sizes = write_artifact(folder, self.space.teacher, candidate, weights, facts, codes)
        benchmark = self.measuring.measure(candidate, folder / MODEL)
        scores, reference = self._score_in_engine(folder / MODEL, candidate)
        if not all(np.isfinite(scores.nll)):
            raise Infeasible("the NLL in the engine is not finite", "")
        quality = quality_measurements(
            scores, reference, self.space.report_windows.bytes_per_token, self.space.fingerprint
        )
        measurements = {
            **quality,
            **following(benchmark.measurements["decode_ms_per_token"], self.space.profile),
            **benchmark.measurements,
            "bytes": Measurement.exact(sizes.bytes, "bytes", "onnx/model.onnx"),
            "compressed_bytes": Measurement.exact(sizes.compressed_bytes, "bytes", "onnx/model.onnx, zstd level 3"),
        }
        describe_artifact(folder, self._told(measurements, recovered))
        described = {
            "unrecovered": recovered is None,
            "recovery_tokens": recovered.tokens if recovered else 0,
            "qat": recovered is not None and recovered.qat,
            "qat_reason": recovered.qat_reason if recovered else "the weights were not trained",
        }
        if recovered is None:
            with self.space.lock.shared():
                described["search_nll"] = self.score_in_torch(candidate, weights, codes).mean_nll
        artifact = (str(folder), sha256(folder / CHECKSUMS))
        return Outcome(result=EvaluationResult(scores, measurements, described, artifact))

    def _told(self, measurements: Mapping[str, Measurement], recovered: Recovered | None) -> dict[str, Any]:
        """What was found out about a candidate, for its card and paretune.json."""
        decode = measurements["decode_ms_per_token"]
        text = (
            f"NLL {measurements['nll'].value:.4f} nats/token ({measurements['relative_loss'].value:+.2%} against the fp32 teacher), "
            f"{decode.value:.3f} ms/token on {self.space.profile.name} ({decode.provenance})"
        )
        return {
            "quality_text": text,
            "measurements": {n: m.to_dict() for n, m in measurements.items()},
            "recovery_text": f"{int(recovered.tokens):,} tokens of distillation, {_qat_text(recovered)}"
            if recovered
            else "none, the teacher's own weights",
        }

    def _score_in_engine(self, model: Path, candidate: Candidate) -> tuple[Scores, Scores]:
        """NLL on the report split by the engine, KL and agreement on its first windows; and the fp32 teacher's scores."""
        space, windows = self.space, self.space.report_windows
        names = space.tokens["report"].names
        ids, targets = space.npy("report-ids", windows.ids), space.npy("report-targets", windows.targets)
        m = max(
            1, min(len(windows.ids), REFERENCE_BYTES // (4 * (windows.ids.shape[1] - 1) * space.teacher.shape.vocab))
        )
        reference, teacher_scores = space.folder / "work" / "reference.npy", space.folder / "work" / "teacher.json"
        is_teacher = (
            candidate.is_full_size(space.teacher.shape)
            and not candidate.is_quantized
            and not candidate.is_sparse
            and not teacher_scores.exists()
        )
        out = {name: str(space.folder / "work" / f"{name}-{candidate.key}.npy") for name in ("nll", "kl", "agree")}
        request = {"ids": str(ids), "targets": str(targets), "reference_windows": m, **out}
        request["one_by_one"] = candidate.uses_dynamic_activations  # their scale is that of all windows in a run
        request["save_reference" if is_teacher else "reference"] = str(reference)
        with EngineChild(space.threads) as child:
            child.ask(do="load", path=str(model), threads=space.threads)
            self._score_in_slices(child, request, len(windows.ids))
        itself = {"kl": np.zeros(m), "agree": windows.targets[:m]}
        extra = itself if is_teacher else {name: np.load(out[name]) for name in ("kl", "agree")}
        scores = _scores(windows, names, np.load(out["nll"]), m, **extra)
        for path in out.values():
            Path(path).unlink(missing_ok=True)
        if is_teacher:
            write_atomically(teacher_scores, json.dumps(scores.__dict__).encode())
        return scores, Scores.from_dict(json.loads(teacher_scores.read_text(encoding="utf-8")))

    def _score_in_slices(self, child: EngineChild, request: Mapping[str, Any], rows: int) -> None:
        """Score all rows, letting go of the machine every few seconds."""
        start, size = 0, FIRST_SLICE
        while start < rows:
            stop = min(rows, start + size)
            with self.space.lock.shared():
                began = time.monotonic()
                child.ask(timeout_s=3600.0, do="score", start=start, stop=stop, **request)
            seconds = max(1e-3, time.monotonic() - began)
            start, size = stop, max(1, min(4 * size, int(size * SCORE_SLICE_S / seconds)))


def _decoder(task: EvaluationTask[Any]) -> Candidate:
    """The task's candidate, which is a decoder's."""
    assert isinstance(task.candidate, Candidate)
    return task.candidate


def _qat_text(recovered: Recovered) -> str:
    told = "under its rounding (QAT)" if recovered.qat else "without its rounding"
    return f"{told}: {recovered.qat_reason}" if recovered.qat_reason else told


def _scores(
    windows: Windows, names: tuple[str, ...], nll: Any, m: int = 0, kl: Any = None, agree: Any = None
) -> Scores:
    n = len(names)
    targets = tuple(int(t) for t in sum_by_document(windows.targets, windows.cluster, n))
    sums = sum_by_document(nll, windows.cluster, n)
    if kl is None:
        return Scores(names, sums, targets)
    counted = tuple(int(t) for t in sum_by_document(windows.targets[:m], windows.cluster, n))
    return Scores(
        names,
        sums,
        targets,
        sum_by_document(kl, windows.cluster, n),
        sum_by_document(agree, windows.cluster, n),
        counted,
    )
