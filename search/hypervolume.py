"""A front as one number: the volume it dominates below a corner that the spec fixes, everything in units of the fp32 teacher.

The NLL becomes the relative increase over the teacher, every other objective a multiple of the teacher's. So the corner
is the same in every study of a teacher, and a machine that is slower today changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from paretune.objectives.quality.quality import relative
from paretune.search.front import Vector, hypervolume
from paretune.search.spec import Reference


def in_teacher_units(vector: Vector, teacher: Vector, objectives: Sequence[str]) -> Vector:
    """Relative NLL increase, and the other objectives over the teacher's."""
    return tuple(
        relative(value - base, base) if name == "nll" else value / base
        for value, base, name in zip(vector, teacher, objectives, strict=True)
    )


def corner(reference: Reference, objectives: Sequence[str]) -> Vector:
    """The reference point in units of the teacher."""
    return tuple(reference.loss if name == "nll" else reference.times for name in objectives)


def volume(vectors: Iterable[Vector], reference: Reference, objectives: Sequence[str]) -> float:
    """Share of the box between (no loss, nothing, nothing) and the corner that the vectors (in teacher units) dominate.

    A student that is better than its teacher reaches beyond the box, so 1 is no strict bound. 0 if none is inside the corner.
    """
    top = corner(reference, objectives)
    box = 1.0
    for side in top:
        box *= side
    return hypervolume(list(vectors), top) / box
