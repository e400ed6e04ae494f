"""Projections of compressive energies: single draws, and those of a whole model, step by step.

A `Projection` belongs to one `CoMHE`, which binds it to its hidden layers:

    projection.step(rows)        called once in each training step
    projection.views(rows)       the sets of each layer, and the matrices that project them
    projection.matrices(rows)    {layer: [C, k, d]} of this step

`rows` are the neurons [sets, N, d] of each layer, so that weights are read once; None reads them.
To write a projection, override `matrices`. Its state is part of the regularizer's state_dict. On
several ranks all draw the same numbers: without a seed, the ranks take that of the first one at the
first training step, which all of them have to make together.
"""

from typing import Literal, TypeAlias

from comhe_ext.checks import quote
from comhe_ext.projections.fixed import (
    GroupProjection,
    Projection,
    RandomProjection,
    random_projection,
)
from comhe_ext.projections.learned import AdversarialProjection, AngleProjection

__all__ = [
    "AdversarialProjection",
    "AngleProjection",
    "GroupProjection",
    "Projection",
    "RandomProjection",
    "random_projection",
]

ProjectionName: TypeAlias = Literal["random", "angle-preserving", "adversarial", "group"]
PROJECTIONS: dict[str, type[Projection]] = {
    "random": RandomProjection,
    "angle-preserving": AngleProjection,
    "adversarial": AdversarialProjection,
    "group": GroupProjection,
}


def make_projection(projection: str | Projection | None) -> Projection | None:
    """Make the projection of a name, with its default arguments."""
    if projection is None or isinstance(projection, Projection):
        return projection
    if not isinstance(projection, str) or projection not in PROJECTIONS:
        raise ValueError(
            f"`projection` must be one of {list(PROJECTIONS)}, a Projection or None, "
            f"got {quote(projection)}"
        )
    return PROJECTIONS[projection]()
