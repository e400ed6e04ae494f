"""Projections of compressive energies: single draws, and those of a whole model, step by step.

A `Projection` belongs to one `CoMHE`, which binds it to its hidden layers:

    projection.step(rows)        once a training step
    projection.views(rows)       what is swept: the sets of each layer, and its matrices
    projection.matrices(rows)    {layer: [C, k, d]} of this step

`rows` are the neurons [sets, N, d] of each layer, read once for all of them; None reads them.
A projection of one's own overrides `matrices`. The state goes with the state_dict of the
regularizer. On several ranks all draw the same numbers: a seed that is not given is that of the
first rank, asked for at the first training step, which all ranks make together.
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
