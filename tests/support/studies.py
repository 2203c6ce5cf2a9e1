"""Studies with made-up results, without a search: their names and commands try to break out of pages."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

from paretune.objectives.measurement import Measurement
from paretune.objectives.quality.quality import Scores, quality_measurements
from paretune.search.study.store import Store
from paretune.search.study.target_records import Target, TargetRow, keep_targets
from paretune.search.study.view import load_view
from paretune.spaces.candidate import FP32, Candidate, Format, Layer, Pattern
from support.decoders import decoder

INT8, INT4 = Format(8, 32, "int8"), Format(4, 32, "int8")
EVIL = "<script>alert('x')</script>"
DOCUMENTS, TARGETS = 24, 400
CONFIRMED = 10


def candidate(layers: int = 6, ffn: int = 768, fmt: Format = FP32, pattern: Pattern | None = None) -> Candidate:
    """A layer-uniform candidate with one precision."""
    one = Layer(ffn, 4, fmt, fmt, pattern or Pattern())
    return Candidate((one,) * layers, fmt, dataclasses.replace(fmt, activation="fp32"))


def scores(nll: float, noise: int = 0) -> Scores:
    """Scores whose documents differ alike for every candidate, so that paired differences are narrow, but for `noise`."""
    hard, own = random.Random(0), random.Random(noise)
    spread = 0.01 if noise else 0.0
    per_document = tuple(
        TARGETS * nll * hard.uniform(0.8, 1.2) * own.uniform(1 - spread, 1 + spread) for _ in range(DOCUMENTS)
    )
    names, targets = tuple(f"d{i}" for i in range(DOCUMENTS)), (TARGETS,) * DOCUMENTS
    kl, agree = (TARGETS * 0.05,) * DOCUMENTS, (TARGETS * 0.9,) * DOCUMENTS
    return Scores(names, per_document, targets, kl, agree, targets)


def confirm(
    store: Store,
    x: Candidate,
    nll: float,
    decode: float,
    megabytes: float,
    *,
    source: str = "sampler",
    disturbed: bool = False,
    artifact: bool = True,
    noise: int = 0,
) -> str:
    """Put a confirmed candidate with its artifact and outbox row into the store."""
    store.add_candidate(x, source, {})
    store.start(x.key, "confirmed")
    folder = store.folder / "artifacts" / x.key
    if artifact:
        (folder / "onnx").mkdir(parents=True)
        (folder / "onnx" / "model.onnx").write_bytes(b"onnx " + x.key.encode())
    mine = scores(nll, noise)
    found = quality_measurements(mine, scores(2.0), 3.6, "machine")
    kind: Any = "disturbed" if disturbed else "measured"
    for name, value, unit in (("decode_ms_per_token", decode, "ms/token"), ("ttft_ms", 14 * decode, "ms")):
        found[name] = Measurement(
            value, unit, 0.98 * value, 1.02 * value, kind, 12, "machine", "corrected by the drift"
        )
    found["peak_memory_bytes"] = Measurement.exact(megabytes * 1.4e6, "bytes")
    found["compressed_bytes"] = Measurement.exact(megabytes * 1e6, "bytes")
    found["bytes"] = Measurement.exact(megabytes * 1.1e6, "bytes")
    assert store.finish(
        x.key,
        "confirmed",
        "complete",
        measurements=found,
        scores=mine,
        seconds=40.0,
        publish=True,
        artifact=(folder, "0" * 64) if artifact else None,
    )
    return x.key


def score_rung0(store: Store, x: Candidate, nll: float, decode: float, megabytes: float) -> None:
    store.add_candidate(x, "sampler", {"layers": len(x.layers)})
    store.start(x.key, "rung0")
    store.finish(
        x.key,
        "rung0",
        "complete",
        seconds=1.0,
        measurements={
            "estimated_nll": Measurement(nll, "nats/token", 0.95 * nll, 1.05 * nll, "predicted"),
            "decode_ms_per_token": Measurement(decode, "ms/token", 0.96 * decode, 1.04 * decode, "predicted"),
            "ttft_ms": Measurement(14 * decode, "ms", 13 * decode, 15 * decode, "predicted"),
            "bytes": Measurement.exact(megabytes * 1.1e6, "bytes"),
            "compressed_bytes": Measurement.exact(megabytes * 1e6, "bytes"),
        },
    )


def new_study(folder: Path) -> Store:
    """A study with settings and nothing evaluated. Its command and failure texts try to break out of the page."""
    meta: dict[str, Any] = {
        "state": "running",
        "stage": "explore",
        "teacher": {"name": "stdlib-coder", "parameters": 5_800_000},
        "profile": {"name": "local-cpu", "threads": 1, "cpu": "Zen 5"},
        "seed": 7,
        "budget_s": 7200.0,
        "spent_s": 4321.0,
        "spec": {
            "objectives": ["nll", "decode_ms_per_token", "compressed_bytes"],
            "budget": "2h",
            "limits": {"loss": 0.1},
        },
        "versions": {"torch": "2.13.0", "onnxruntime": "1.32.0"},
        "machine": {"cpu": "Zen 5", "cores": 2},
        "fit_error": {"decode_ms_per_token": {"median": 0.014, "worst": 0.041, "points": 30}},
        "calibration": {"points": 6, "median_error": 0.021},
        "space_size": 1.2e9,
        "command": f"paretune search --study 'night' --note {EVIL}",
        "seconds_by_stage": {"baselines": 300.0, "elastic": 1500.0, "explore": 1400.0, "recover": 1121.0},
    }
    return Store.create(folder, meta)


def fill(store: Store) -> None:
    """Three baselines, thirty rung-0 points, seven confirmed students (one disturbed, two tied), two failures."""
    for fmt, nll, decode, megabytes in ((FP32, 2.0, 0.92, 21.0), (INT8, 2.001, 0.37, 5.9), (INT4, 2.05, 0.35, 3.6)):
        confirm(store, candidate(fmt=fmt), nll, decode, megabytes, source="baseline")
    generator = random.Random(1)
    for i in range(30):
        layers, ffn, fmt = 2 + i % 5, 192 + 64 * (i % 9), (FP32, INT8, INT4)[i % 3]
        pattern = Pattern("unstructured", 0.3, "wanda") if i % 4 == 0 else Pattern()
        work = layers * ffn / (6 * 768)
        nll = 2.02 + 0.9 * (1 - work) ** 2 + generator.uniform(0, 0.1)
        decode = 0.08 + 0.28 * work * (2.4 if fmt.bits == 32 else 1)
        score_rung0(store, candidate(layers, ffn, fmt, pattern), nll, decode, 0.7 * fmt.bits * (0.2 + 0.8 * work))
    for layers, ffn, fmt, nll, decode, megabytes in (
        (5, 576, INT4, 2.10, 0.27, 2.9),
        (4, 512, INT4, 2.19, 0.21, 2.2),
        (4, 448, INT8, 2.16, 0.22, 3.5),
        (3, 384, INT8, 2.60, 0.24, 3.6),
        (2, 256, INT4, 2.75, 0.13, 1.2),
    ):
        confirm(store, candidate(layers, ffn, fmt), nll, decode, megabytes)
    confirm(store, candidate(4, 576, INT4), 2.1897, 0.212, 2.2, noise=1)
    confirm(store, candidate(3, 512, INT4), 2.30, 0.17, 1.9, disturbed=True)
    failed = candidate(2, 192, INT8)
    for status in ("failed", "infeasible"):
        store.add_candidate(failed, "sampler", {})
        store.start(failed.key, "confirmed")
        store.finish(failed.key, "confirmed", status, reason=f"the engine refused {EVIL}")
    store.event("stage", f"explore begins {EVIL}")


def add_board(store: Store) -> None:
    """A further target: a board on which int8 takes four times as long as here, int4 forty times, and fp32 does not run."""
    rows = {}
    for point in load_view(store).confirmed:
        bits = decoder(point.candidate).head_format.bits
        if bits == 32:
            rows[point.key] = TargetRow(infeasible="it does not fit the board's memory")
            continue
        decode = point.measurements["decode_ms_per_token"].value * (40 if bits == 4 else 4)
        costs = {"decode_ms_per_token": decode, "ttft_ms": 14 * decode, "peak_memory_bytes": 1e7}
        rows[point.key] = TargetRow(
            {name: Measurement(value, "ms", 0.5 * value, 2 * value, "predicted") for name, value in costs.items()}
        )
    keep_targets(store, [Target("board", {"name": "board"}, rows)])
