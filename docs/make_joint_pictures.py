"""The three pictures of joint against sequential search, from the studies that `make bench NAME=joint_vs_sequential` left.

    python docs/make_joint_pictures.py [--run mlruns/joint_vs_sequential/6m] [--out docs/pictures]

joint-loss-latency.png and joint-loss-bytes.png show the confirmed fronts of all seeds, joint-volume.png the dominated volume
over time. Everything is in units of the fp32 teacher; the axes end at the reference point. Exit code 2 without such a run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.joint import ARMS, Arm, read_arms  # noqa: E402
from paretune.search.front import non_dominated  # noqa: E402
from paretune.search.hypervolume import corner  # noqa: E402

COLORS = {"joint": "#0b6e99", "sequential": "#d1603d"}
MARKS = {"joint": "o", "sequential": "^"}
PICTURES = {"joint-loss-latency.png": "decode_ms_per_token", "joint-loss-bytes.png": "compressed_bytes"}
VOLUME = "joint-volume.png"
LABELS = {
    "decode_ms_per_token": "decode time / teacher's at fp32",
    "compressed_bytes": "compressed bytes / teacher's at fp32",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="folder of the run; the latest below mlruns if left out")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures", help="folder to fill")
    arguments = parser.parse_args()
    runs = [arguments.run] if arguments.run else sorted(Path("mlruns/joint_vs_sequential").glob("*"), key=_changed)
    arms = read_arms(runs[-1]) if runs else []
    if {arm.name for arm in arms} != set(ARMS):
        print("error: there is no finished run\nremedy: make bench NAME=joint_vs_sequential", file=sys.stderr)
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, objective in PICTURES.items():
        draw_fronts(arms, objective, arguments.out / name)
    draw_volumes(arms, arguments.out / VOLUME)
    return 0


def draw_fronts(arms: list[Arm], objective: str, file: Path) -> None:
    """NLL increase against one objective: every member of the 3-D fronts, a staircase through those that lead in 2-D."""
    figure, axes = _new()
    loss, other = arms[0].objectives.index("nll"), arms[0].objectives.index(objective)
    top = corner(arms[0].reference, arms[0].objectives)
    for arm in arms:
        points = [(v[other], 100 * v[loss]) for v in arm.front]
        leading = sorted(points[i] for i in non_dominated(points))
        if leading:
            leading = [*leading, (top[other], leading[-1][1])]
            axes.step(*zip(*leading, strict=True), where="post", color=COLORS[arm.name], alpha=0.6, linewidth=1.2)
        axes.scatter(
            *zip(*points, strict=True), s=18, color=COLORS[arm.name], marker=MARKS[arm.name], label=_label(arm, arms)
        )
    axes.set(xlabel=LABELS.get(objective, objective), ylabel="NLL increase over the teacher (%)", xlim=(0, top[other]))
    axes.set_ylim(top=100 * top[loss])
    _save(figure, axes, file)


def draw_volumes(arms: list[Arm], file: Path) -> None:
    """Dominated volume over wall time, one line per search."""
    figure, axes = _new()
    for arm in arms:
        axes.step(arm.seconds, arm.volumes, where="post", color=COLORS[arm.name], label=_label(arm, arms))
    axes.set(xlabel="wall time of the search (s)", ylabel="dominated volume (share of the box)")
    axes.set_xlim(left=0)
    _save(figure, axes, file)


def _label(arm: Arm, arms: list[Arm]) -> str:
    """One entry per kind of search in the legend, with the median volume over seeds."""
    same = [a for a in arms if a.name == arm.name]
    if arm is not same[0]:
        return "_"
    return f"{arm.name}: volume {statistics.median(a.volume for a in same):.3f} (median of {len(same)})"


def _new() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, axes: Any, file: Path) -> None:
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    print(f"{file} ({file.stat().st_size / 1000:.0f} kB)")


def _changed(path: Path) -> float:
    return path.stat().st_mtime


if __name__ == "__main__":
    sys.exit(main())
