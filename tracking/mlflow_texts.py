"""What the runs say: parameters, tags, metrics, the note, the table of rung 0."""

from __future__ import annotations

import re
from typing import Any

from paretune.search.recommend import Recommendation
from paretune.search.view import Point, StudyView
from paretune.spaces.candidate import PER_CHANNEL
from paretune.spaces.module_candidate import ModuleCandidate
from paretune.tracking.page import flat
from paretune.tracking.wording import headline, measurement, named, short_of, told, with_interval

METRICS = (
    "nll",
    "relative_loss",
    "decode_ms_per_token",
    "ttft_ms",
    "throughput_tokens_per_s",
    "energy_j_per_token",
    "usd_per_million_tokens",
    "peak_memory_bytes",
    "compressed_bytes",
    "kl",
    "top1_agreement",
)
RUNG0_COLUMNS = ("estimated_nll", "decode_ms_per_token", "ttft_ms", "bytes", "compressed_bytes")


def note(view: StudyView, chosen: Recommendation | None) -> str:
    """The parent run's description in Markdown; all values are measured unless they say otherwise."""
    why = ["No candidate is confirmed yet."]
    if chosen is not None:
        why = [
            f"**Recommended: {chosen.chosen.name}** (`{chosen.chosen.key[:8]}`)",
            "",
            *(f"- {reason}" for reason in chosen.why),
        ]
    columns = view.figures.objectives()
    rows = [f"| {p.name} | {' | '.join(_cell(p, name) for name in columns)} |" for p in view.front[:25]]
    state = f"State: {view.meta.get('state') or 'running'}. Open `report.html` or `front.html` under Artifacts."
    named_columns = ("NLL", "decode per token", "compressed")
    titles = named_columns if view.figures.is_decoder else tuple(short_of(name) for name in columns)
    table = [f"| front member | {' | '.join(titles)} |", "| --- | --- | --- | --- |", *rows]
    return "\n".join([f"### {headline(view)}", "", state, "", *why, "", *table])


def rung0_table(view: StudyView) -> dict[str, Any]:
    """All rung-0 rows as MLflow's table format; values are estimates, bytes are counted."""

    columns = (
        RUNG0_COLUMNS
        if view.figures.is_decoder
        else (view.figures.estimate, view.figures.latency, "bytes", "compressed_bytes")
    )

    def cells(point: Point) -> list[float | None]:
        return [m.value if (m := point.measurements.get(name)) else None for name in columns]

    rows = [[p.key, p.number, p.source, p.description, *cells(p)] for p in view.rung0]
    return {"columns": ["key", "number", "source", "description", *columns], "data": rows}


def _cell(point: Point, name: str) -> str:
    m = measurement(point, name)
    return with_interval(name, m) + ("" if m is None or m.provenance == "measured" else f" ({m.provenance})")


def candidate_params(point: Point) -> dict[str, str]:
    """What varies between candidates; mixed layers are listed with slashes."""
    x = point.candidate
    if isinstance(x, ModuleCandidate):
        return _module_params(x)
    executed = [x.head_format, *(f for layer in x.layers for f in (layer.attention_format, layer.ffn_format))]
    sizes = {f.group_size for f in (x.embedding_format, *executed) if f.is_integer}

    def joined(values: Any) -> str:
        return "/".join(str(v) for v in dict.fromkeys(values)) or "none"

    return {
        "layers": str(len(x.layers)),
        "ffn": joined(layer.ffn for layer in x.layers),
        "kv_groups": joined(layer.kv_groups for layer in x.layers),
        **({"hidden": str(x.hidden)} if x.hidden else {}),
        "pattern": joined(layer.pattern.kind for layer in x.layers),
        "sparsity": joined(layer.pattern.ratio for layer in x.layers),
        "attention": joined(layer.attention_format.name for layer in x.layers),
        "ffn_precision": joined(layer.ffn_format.name for layer in x.layers),
        "quantizer": x.quantizer,
        "head": x.head_format.name,
        "embedding": x.embedding_format.name,
        "group_size": joined("channel" if size == PER_CHANNEL else size for size in sorted(sizes)),
        "activations": joined(sorted({f.activation for f in executed})),
    }


def _module_params(x: ModuleCandidate) -> dict[str, str]:
    """Of a plug-in's module: its widths, and per group precision and sparsity."""
    found = {name: str(width) for name, width in x.widths}
    for group in x.groups:
        found |= {
            f"{group.name} precision": group.format.name,
            f"{group.name} pattern": group.pattern.kind,
            f"{group.name} sparsity": str(group.pattern.ratio),
        }
    sizes = sorted({g.format.group_size for g in x.groups if g.format.bits != 32})
    return found | {"group_size": "/".join("channel" if size == 0 else str(size) for size in sizes) or "none"}


def candidate_tags(point: Point) -> dict[str, str]:
    latency = measurement(point, point.figures.latency)
    return {
        "source": point.source,
        "latency": "none" if latency is None else latency.provenance,
        "mlflow.note.content": point.description,
    }


def metrics(point: Point) -> dict[str, float]:
    names = METRICS if point.figures.is_decoder else told(point.figures)
    return {name: m.value for name in names if (m := measurement(point, name)) is not None}


def study_params(view: StudyView) -> dict[str, str]:
    """What is constant in a study: teacher, text, profile, seed, objectives, settings, versions."""
    meta = view.meta
    found = {
        "teacher": named(meta.get("teacher")),
        "profile": named(meta.get("profile")),
        "seed": str(meta.get("seed")),
        "objectives": ", ".join(view.objectives),
        **{f"text.{name}": text for name, text in flat(meta.get("corpus") or {})},
    }
    for prefix, value in (("spec", meta.get("spec")), ("version", meta.get("versions"))):
        found |= {re.sub(r"[^\w./ -]", "_", f"{prefix}.{name}")[:250]: text for name, text in flat(value)}
    return found
