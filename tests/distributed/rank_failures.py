"""What ranks do that make the others fail; see `test_ranks`."""

import os
import time
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
    group = dist.new_group(timeout=timedelta(seconds=2))
    if dist.get_rank() == 1:
        time.sleep(5)
    else:
        distributed.hyperspherical_energy(torch.randn(50, 8), group=group)
