"""A plan for sampling rows that are spread over ranks."""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Generator

from comhe_ext.sampled.near_list import NearList
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.sharded.collectives import AllRows, Group
from comhe_ext.sharded.rows import ShardedRows


def common_plan(
    rows: ShardedRows,
    groups: Sequence[Group],
    degree: int,
    trees: int,
    generator: Generator | None,
) -> SamplingPlan:
    """Gather one set of rows, let the first rank of all groups make its plan, and share that.

    Its random choices, and what rounding makes of near pairs, might differ on other ranks.
    """
    points = rows.points()
    if rows.rows.groups:
        points = AllRows(points, rows.rows).wait()
    state: list[Any] = [None]
    if all(dist.get_rank(group) == 0 for group in groups):
        plan = SamplingPlan.from_rows(points.squeeze(0), degree, trees, generator=generator)
        listed = tuple(x.cpu() for x in plan.listed)
        state = [{**plan.state_dict(), "listed": listed}]
    else:
        # to raise what the first rank raises, instead of waiting for it
        SamplingPlan.from_rows(points[0, :0], degree, trees)
    for group in groups:
        dist.broadcast_object_list(state, dist.get_global_rank(group, 0), group)
    made = state[0]
    plan = SamplingPlan(
        made["degree"], made["trees"], made["cosines"], NearList(*made["listed"]), made["num_rows"]
    )
    plan.on(points.device)
    return plan
