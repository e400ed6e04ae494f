"""What ranks do that make the others fail; see `test_ranks`."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from comhe_ext import distributed
from comhe_ext.sharded import energy


def fail_by_a_rank_that_dies():
    if dist.get_rank() == 1:
        # while the others' rows are on their way
        energy._Sum.add_own = lambda self: os._exit(1)  # type: ignore[method-assign]
    distributed.hyperspherical_energy(torch.randn(50, 8), strategy="ring")


def fail_by_a_rank_that_does_not_come():
    group = dist.new_group()
    # once the group stands: ranks of a busy machine may be later than this at making it
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), group)
    if dist.get_rank() != 1:
        distributed.hyperspherical_energy(torch.randn(50, 8), group=group)
