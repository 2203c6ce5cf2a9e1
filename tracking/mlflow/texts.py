"""What the runs say: parameters, tags, metrics, the note, the table of rung 0."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from paretune.search.recommend.recommend import Recommendation
from paretune.search.study.view import Point, StudyView
from paretune.spaces.candidate import PER_CHANNEL
from paretune.spaces.module_candidate import ModuleCandidate
from paretune.tracking.mlflow.standing import Standing
from paretune.tracking.report.page import flat
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
MOST_ROWS = 25
RUNG0_COLUMNS = ("estimated_nll", "decode_ms_per_token", "ttft_ms", "bytes", "compressed_bytes")


def note(view: StudyView, standing: Standing, run_id: str) -> str:
    """The parent run's description in Markdown, the answer first; all values are measured unless they say otherwise."""
    answer = ["**No candidate is confirmed yet.**"]
    if standing.chosen is not None:
        found = standing.chosen
        answer = [f"**Recommended: {found.chosen.name}** (`{found.chosen.key[:8]}`): {'; '.join(found.why)}.", ""]
        answer += [found.price] if found.price else []
    # MLflow's page shows a run's artifact by this address, which is relative to its own.
    picture = f"![The front](get-artifact?path=front.png&run_uuid={run_id})"
    state = f"State: {view.meta.get('state') or 'running'}. `report.html` and `front.html` are under Artifacts."
    parts = [answer, _targets(standing), _front(view), [picture], [f"{headline(view)}. {state}"]]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _front(view: StudyView) -> list[str]:
    """The members of the front as a table."""
    columns = view.figures.objectives()
    titles = ("NLL", "decode per token", "compressed") if view.figures.is_decoder else [short_of(n) for n in columns]
    names = run_names(view)
    rows = [[names[p.key], *(_cell(p, name) for name in columns)] for p in view.front[:MOST_ROWS]]
    return [f"**Front on {named(view.meta.get('profile'))}**", "", *_table(["member", *titles], rows)]


def _targets(standing: Standing) -> list[str]:
    """What to take on each target, for a study of several."""
    if len(standing.sides) < 2:
        return []
    rows = []
    for side, found in zip(standing.sides, standing.choices, strict=True):
        latency = side.view.figures.latency
        known = ["nothing runs", "–"] if found is None else [found.chosen.name, _cell(found.chosen, latency)]
        rows.append([side.name, *known])
    return ["**On each target**", "", *_table(["target", "recommended", "its latency"], rows)]


def candidate_note(point: Point) -> str:
    """A candidate's description in Markdown: what it is, what it costs, why it was trained as it was."""
    names = METRICS if point.figures.is_decoder else told(point.figures)
    rows = [[short_of(n), _cell(point, n)] for n in names if measurement(point, n) is not None]
    reason = str(point.facts.get("qat_reason") or "")
    trained = (
        [f"Trained {'with' if point.facts.get('qat') else 'without'} fake quantization: {reason}."] if reason else []
    )
    parts = [[point.description], _table(["", "value [interval]"], rows), trained]
    return "\n\n".join("\n".join(part) for part in parts if part)


def run_names(view: StudyView) -> dict[str, str]:
    """A name for every confirmed candidate. One that an earlier candidate has is followed by the start of the key."""
    found: dict[str, str] = {}
    for point in view.confirmed:
        taken = point.name in found.values()
        found[point.key] = f"{point.name} ({point.key[:4]})" if taken else point.name
    return found


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


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table. MLflow's page sets its columns without any room between them, so every cell brings its own."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(f"{cell}&emsp;" for cell in cells) + " |"

    return [line(titles), "| --- " * len(titles) + "|", *(line(row) for row in rows)]


def _cell(point: Point, name: str) -> str:
    """A value with its interval; parentheses behind the brackets would be a link in Markdown."""
    m = measurement(point, name)
    return with_interval(name, m) + ("" if m is None or m.provenance == "measured" else f", {m.provenance}")


def candidate_params(point: Point) -> dict[str, str]:
    """What varies between candidates. Sizes, bits and sparsity are means over the layers, so that they are numbers and
    MLflow draws a scale for them; precisions are listed with slashes where layers differ."""
    x = point.candidate
    if isinstance(x, ModuleCandidate):
        return _module_params(x)
    attention, ffn = [y.attention_format for y in x.layers], [y.ffn_format for y in x.layers]
    executed = [x.head_format, *attention, *ffn]
    sizes = {f.group_size for f in (x.embedding_format, *executed) if f.is_integer}
    return {
        "layers": str(len(x.layers)),
        "ffn_width": _mean(layer.ffn for layer in x.layers),
        "n_kv_heads": _mean(layer.kv_groups for layer in x.layers),
        **({"hidden_width": str(x.hidden)} if x.hidden else {}),
        "bits": _mean(f.bits for f in (*attention, *ffn)),
        "precision_attention": _joined(f.name for f in attention),
        "precision_ffn": _joined(f.name for f in ffn),
        "precision_head": x.head_format.name,
        "precision_embedding": x.embedding_format.name,
        "precision_activations": _joined(sorted({f.activation for f in executed})),
        "precision_group": _groups(sizes),
        "quantizer": x.quantizer,
        "sparsity": _mean(layer.pattern.ratio for layer in x.layers),
        "sparsity_pattern": _joined(layer.pattern.kind for layer in x.layers),
    }


def _module_params(x: ModuleCandidate) -> dict[str, str]:
    """Of a plug-in's module: its widths, and per group precision and sparsity."""
    found = {name: str(width) for name, width in x.widths}
    for group in x.groups:
        found |= {
            f"precision_{group.name}": group.format.name,
            f"sparsity_{group.name}": str(group.pattern.ratio),
            f"sparsity_pattern_{group.name}": group.pattern.kind,
        }
    return found | {"precision_group": _groups({g.format.group_size for g in x.groups if g.format.bits != 32})}


def _mean(values: Iterable[float]) -> str:
    found = list(values)
    return f"{sum(found) / len(found):g}"


def _joined(values: Iterable[Any]) -> str:
    """Different values in their order, or "none"."""
    return "/".join(str(v) for v in dict.fromkeys(values)) or "none"


def _groups(sizes: set[int]) -> str:
    return _joined("channel" if size == PER_CHANNEL else size for size in sorted(sizes))


def candidate_tags(point: Point) -> dict[str, str]:
    """Return the tags of a candidate's run, among them the provenance of its latency and its description."""
    latency = measurement(point, point.figures.latency)
    return {
        "kind": "candidate",
        "source": point.source,
        "latency": "none" if latency is None else latency.provenance,
        "mlflow.note.content": candidate_note(point),
    }


def metrics(point: Point) -> dict[str, float]:
    """A candidate's figures, rounded for MLflow's tables."""
    names = METRICS if point.figures.is_decoder else told(point.figures)
    return {name: rounded(m.value) for name in names if (m := measurement(point, name)) is not None}


def rounded(value: float) -> float:
    """Six significant digits: MLflow shows all there are, and no measurement has more. Whole numbers, as bytes, stay exact."""
    return value if float(value).is_integer() else float(f"{value:.6g}")


def study_metrics(view: StudyView, found: Recommendation | None) -> dict[str, float]:
    """Figures of a study's run: counts, and those of the recommended candidate under their usual names."""
    counts = {"front_members": len(view.front), "confirmed": len(view.confirmed), "explored": len(view.rung0)}
    return {name: float(n) for name, n in counts.items()} | ({} if found is None else metrics(found.chosen))


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
