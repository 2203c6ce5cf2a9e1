"""Every method at fixed settings on the embedded teacher: NLL and bytes, as it is and after the same recovery tokens.

Sizes are never cut, so that only the method differs. Every student is exported and scored by the engine on the report text.
Differences are paired by document; an ordering is `shown` where the 95 % interval of its difference excludes zero, else it
is a tie. The intervals know the text, not the luck of a training run: all recoveries see the same batches in the same order.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from benchmarks.common import FOLDER, HOME, Figure, figure
from paretune.compression.distill.recover import RecoveryRecipe, recover
from paretune.compression.export.artifact import ZSTD_LEVEL
from paretune.compression.export.graph import build_model, save_model
from paretune.engines.process.child import EngineChild
from paretune.hardware_profiles.profile import detected_profile
from paretune.objectives.quality.quality import Scores, paired_difference, quality_measurements, sum_by_document
from paretune.search.evaluators.workspace import Workspace
from paretune.search.spec import Spec
from paretune.spaces import Candidate, Format, Layer, Pattern, Shape
from paretune.spaces.candidate import PatternKind, Score
from paretune.spaces.space import PATTERNS, QUANTIZERS, SCORES

FILE = FOLDER / "method_table.json"
RECOVERY_TOKENS = 32_768
STAGES = ("as it is", "recovered")
EMBEDDING = Format(8, 32)
FORMATS = {
    "int8/int8": Format(8, 32, "int8"),
    "int4 groups of 32": Format(4, 32, "fp32"),
    "int4 per channel": Format(4, 0, "fp32"),
    "int2 groups of 32": Format(2, 32, "fp32"),
}
CALIBRATED_BITS = 4  # GPTQ and QAT have next to nothing to repair above


@dataclass(frozen=True)
class Method:
    """One row. `qat` trains under the rounding; without recovery it is its round-to-nearest twin and has no cell."""

    name: str
    group: str
    candidate: Candidate
    qat: bool = False


def masks() -> list[tuple[PatternKind, float, tuple[Score, ...]]]:
    """Pattern, ratio and scores: half of everything, unstructured also at 70 %; a threshold is another unstructured half."""
    kinds = [kind for kind in PATTERNS if kind != "none"]
    half = [(kind, 0.5, SCORES[:1] if kind == "threshold" else SCORES) for kind in kinds]
    return [*half, ("unstructured", 0.7, SCORES)]


def methods(shape: Shape) -> list[Method]:
    """Every mask at float32 and every way to find codes, enumerated from the space's own tables."""
    whole = Layer(shape.ffn, shape.kv_heads)
    found = [Method("fp32", "dense", Candidate((whole,) * shape.layers))]
    for kind, ratio, scores in masks():
        for pattern in (Pattern(kind, ratio, score) for score in scores):
            candidate = Candidate((replace(whole, pattern=pattern),) * shape.layers)
            found.append(Method(pattern.name, "masks", candidate))
    for name, form in FORMATS.items():
        for algorithm in QUANTIZERS if form.bits <= CALIBRATED_BITS else ("rtn",):
            found.append(Method(f"{name} {algorithm.upper()}", "precision", quantized(shape, form, algorithm)))
        if form.bits <= CALIBRATED_BITS:
            found.append(Method(f"{name} QAT", "precision", quantized(shape, form, "rtn"), qat=True))
    return found


def quantized(shape: Shape, form: Format, algorithm: Any) -> Candidate:
    """Layers and head in `form`, the embedding in int8."""
    form = replace(form, algorithm=algorithm)
    layer = Layer(shape.ffn, shape.kv_heads, form, form)
    return Candidate((layer,) * shape.layers, form, EMBEDDING).canonical(shape)


def orderings() -> list[tuple[str, str, str]]:
    """(stage, better, worse) as the literature has it: SparseGPT and Wanda beat magnitude, GPTQ and QAT beat rounding."""
    found = []
    for kind, ratio, scores in masks():
        names: dict[str, str] = {score: Pattern(kind, ratio, score).name for score in scores}
        winners = [s for s in ("wanda", "sparsegpt") if s in names]
        found += [(stage, names[s], names["magnitude"]) for stage in STAGES for s in winners]
        if len(winners) == 2:
            found.append((STAGES[0], names["sparsegpt"], names["wanda"]))
    for name in (n for n, form in FORMATS.items() if form.bits <= CALIBRATED_BITS):
        better = [f"{name} {a.upper()}" for a in QUANTIZERS if a != "rtn"]
        found += [(stage, b, f"{name} RTN") for stage in STAGES for b in better]
        found += [(STAGES[1], f"{name} QAT", other) for other in (f"{name} RTN", *better)]
    return found


def method_table() -> Iterator[Figure]:
    """Fills method_table.json; the value is how many of the literature's orderings are shown."""
    start = time.monotonic()
    table = make_table()
    table["seconds"] = time.monotonic() - start
    FILE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(markdown(table))
    verdicts = [o["verdict"] for o in table["orderings"]]
    counts = {v: verdicts.count(v) for v in ("shown", "tie", "reversed")}
    yield figure("method_table", counts["shown"], f"of {len(verdicts)} orderings", **counts, seconds=table["seconds"])


def make_table(spec: Spec | None = None, home: Path = HOME, tokens: int = RECOVERY_TOKENS) -> Figure:
    """Run every method. `spec` names teacher, text and how much of it is scored."""
    spec = spec or Spec()
    with tempfile.TemporaryDirectory() as folder:
        setup = {"spec": spec.model_dump(mode="json"), "profile": detected_profile().model_dump(mode="json")}
        (Path(folder) / "setup.json").write_text(json.dumps({**setup, "mild": False}), encoding="utf-8")
        bench = Bench(Workspace(Path(folder), home), tokens)
        rows = [(method, bench.measure(method)) for method in methods(bench.space.teacher.shape)]
    teacher = rows[0][1][STAGES[0]].scores
    return {
        "teacher": spec.teacher,
        "report_tokens": sum(teacher.targets),
        "documents": len(teacher.documents),
        "recovery_tokens": tokens,
        "rows": [
            {"method": m.name, "group": m.group, **{stage: told(r, teacher) for stage, r in found.items()}}
            for m, found in rows
        ],
        "orderings": judged({m.name: found for m, found in rows}),
    }


@dataclass(frozen=True)
class Result:
    scores: Scores
    compressed_bytes: int


class Bench:
    """Makes, exports and scores students of the teacher's own size."""

    def __init__(self, space: Workspace, tokens: int) -> None:
        self.space = space
        self.recipe = RecoveryRecipe(
            tokens, context=space.window, batch=space.batch_within_memory(RecoveryRecipe.batch)
        )

    def measure(self, method: Method) -> dict[str, Result]:
        """Results by stage."""
        weights, masks = self.space.sparsify(method.candidate, self.space.teacher_weights)
        found = {} if method.qat else {STAGES[0]: self.ship(method.candidate, weights)}
        recipe = replace(self.recipe, qat="always" if method.qat else "never")
        recovered, _ = recover(
            self.space.teacher_weights,
            weights,
            masks,
            method.candidate,
            self.space.network,
            self.space.teacher.shape.layers,
            self.space.tokens["train"].ids,
            recipe,
        )
        return {**found, STAGES[1]: self.ship(method.candidate, recovered)}

    def ship(self, candidate: Candidate, weights: Mapping[str, torch.Tensor]) -> Result:
        """Export, score in the engine, weigh."""
        space, model = self.space, self.space.folder / "model.onnx"
        codes = space.codes(candidate, weights)
        save_model(build_model(weights, candidate, space.teacher.config, space.teacher.shape, codes), model)
        return Result(self.score(model), len(zstandard.compress(model.read_bytes(), ZSTD_LEVEL)))

    def score(self, model: Path) -> Scores:
        """NLL per document of the report text, by the engine in a process of its own."""
        space, windows, names = self.space, self.space.report_windows, self.space.tokens["report"].names
        out = space.folder / "nll.npy"
        ids, targets = space.npy("report-ids", windows.ids), space.npy("report-targets", windows.targets)
        with EngineChild(space.profile.cores) as child:
            child.ask(do="load", path=str(model), threads=space.profile.cores)
            child.ask(timeout_s=600.0, do="score", ids=str(ids), targets=str(targets), nll=str(out))
        sums = sum_by_document(np.load(out), windows.cluster, len(names))
        counts = tuple(int(t) for t in sum_by_document(windows.targets, windows.cluster, len(names)))
        return Scores(names, sums, counts)


def told(result: Result, teacher: Scores) -> Figure:
    """Values with 95 % intervals: NLL, and its increase over the fp32 teacher paired by document."""
    found = quality_measurements(result.scores, teacher, 1.0, "")
    return {
        **{name: [found[name].value, found[name].low, found[name].high] for name in ("nll", "nll_increase")},
        "compressed_bytes": result.compressed_bytes,
    }


def judged(results: Mapping[str, Mapping[str, Result]]) -> list[Figure]:
    """The orderings with their paired differences (better minus worse, nats/token) and what these say."""
    found = []
    for stage, better, worse in orderings():
        value, low, high = paired_difference(results[better][stage].scores, results[worse][stage].scores)
        verdict = "shown" if high < 0 else "reversed" if low > 0 else "tie"
        entry = {"stage": stage, "better": better, "worse": worse, "difference": [value, low, high], "verdict": verdict}
        found.append(entry)
    return found


def markdown(table: Figure) -> str:
    """Both tables for people."""
    lines = [
        f"| method | NLL increase (nats/token) | after {table['recovery_tokens']:,} tokens of recovery | MB zstd |",
        "| --- | --- | --- | --- |",
    ]
    for row in table["rows"]:
        cells = [_interval(row[stage]["nll_increase"]) if stage in row else "" for stage in STAGES]
        size = row[STAGES[1]]["compressed_bytes"] / 1e6
        lines.append(f"| {row['method']} | {cells[0]} | {cells[1]} | {size:.2f} |")
    lines += ["", "| ordering | when | difference of NLL | verdict |", "| --- | --- | --- | --- |"]
    for o in table["orderings"]:
        lines.append(
            f"| {o['better']} beats {o['worse']} | {o['stage']} | {_interval(o['difference'])} | {o['verdict']} |"
        )
    return "\n".join(lines)


def _interval(triple: list[float]) -> str:
    value, low, high = triple
    return f"{value:+.4f} ({low:+.4f} … {high:+.4f})"
