"""What `paretune op-profile` found out about a teacher, kept so that its searches start from it.

Kept by what it depends on: the teacher's digest, the hardware profile, the engine's version and the machine.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from paretune.common.files import read_kept, warn_damaged, write_atomically
from paretune.hardware_profiles.detect import fingerprint, package_version
from paretune.hardware_profiles.profile import Profile
from paretune.objectives.profiler.places import Findings
from paretune.spaces.kinds import AnyCandidate, AnySpace
from paretune.spaces.space import Space

# Raised when findings of an older version say something else.
FORMAT = 1
MOST_DROPPED = 2


def findings_file(cache: Path, digest: str, profile: Profile) -> Path:
    """Where the findings about the teacher of this digest on this profile are kept."""
    parts = (str(FORMAT), digest, profile.model_dump_json(), package_version("onnxruntime"), fingerprint())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return cache / "findings" / f"{digest}-{key}.json"


def keep_findings(cache: Path, digest: str, profile: Profile, findings: Findings) -> Path:
    """Keep them, in place of older ones of the same key."""
    file = findings_file(cache, digest, profile)
    write_atomically(file, json.dumps(findings.to_dict()).encode())
    return file


def kept_findings(cache: Path, digest: str, profile: Profile) -> Findings | None:
    """The findings of an earlier `paretune op-profile`; None if there are none, or with a warning if they are damaged."""
    file = findings_file(cache, digest, profile)
    found = read_kept(file)
    try:
        return None if found is None else Findings.from_dict(found)
    except (KeyError, TypeError, ValueError) as error:
        warn_damaged(file, error)
        return None


def profiled_candidates(space: AnySpace, findings: Findings | None) -> list[AnyCandidate]:
    """Return the candidates to explore first, by what an op profile found; none without findings.

    At full size, one candidate has the costliest matrix group in few bits, the next one the two costliest, and so on.
    With fewer layers, each candidate has the costliest group in few bits; these come first if a dropped layer saves
    more than any group. A candidate does not choose its layers: the elastic student drops the least important first.
    """
    if findings is None or not isinstance(space, Space) or not findings.groups:
        return []
    low, rest = _levels(space)
    if low == rest:
        return []
    order = [name for name, _ in findings.groups]
    whole = [_candidate(space, space.shape.layers, order[:n], low, rest) for n in range(1, len(order) + 1)]
    depths = [space.shape.layers - n for n in range(1, MOST_DROPPED + 1)] if findings.layers else []
    cut = [_candidate(space, depth, order[:1], low, rest) for depth in depths if depth >= space.min_depth]
    return [*cut, *whole] if findings.cuts_first else [*whole, *cut]


def _levels(space: Space) -> tuple[str, str]:
    """(few bits, what the other groups stay at): int4 and int8, or int8 and the finest there is."""
    integers = [name for name in ("int4", "int8") if name in space.levels]
    finest = space.levels[-1]
    return (integers[0], integers[1]) if len(integers) == 2 else (integers[0] if integers else finest, finest)


def _candidate(space: Space, depth: int, few: list[str], low: str, rest: str) -> AnyCandidate:
    levels = list(space.levels)
    params: dict[str, Any] = {
        "depth": depth,
        "ffn": len(space.ffn_widths) - 1,
        "kv_groups": space.shape.kv_heads,
        "pattern": "none",
        "ratio": 0,
        "score": "magnitude",
        "group_size": 0,
    }
    for group in ("attention", "ffn", "head", "embedding"):
        params[f"{group}_bits"] = levels.index(low if group in few else rest)
    return space.decode(params)
