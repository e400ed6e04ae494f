"""What the checks on several ranks share: shards of a known whole, comparisons, and traffic."""

from collections import Counter

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


def for_ranks(sizes, long=()):
    """Mark a check that is for these numbers of ranks only, for others in the long suite.

    `test_ranks` reads it from the file.
    """
    return lambda check: check


def sizes_of(total, group=None):
    """Cut rows as evenly as can be."""
    ranks = dist.get_world_size(group)
    return [total // ranks + (rank < total % ranks) for rank in range(ranks)]


def uneven_sizes(total, group=None):
    """Cut rows in several ways, of which some leave ranks without any."""
    ranks = dist.get_world_size(group)
    yield sizes_of(total)
    yield [1] * (ranks - 1) + [total - ranks + 1]
    yield [total - 2, 0, 2, 0][:ranks] if ranks > 2 else [total, 0]


def own_rows(weight, sizes, dim=0, group=None):
    """Take the part of this rank, a leaf where the whole is one that learns."""
    rank = dist.get_rank(group)
    part = weight.detach().narrow(dim, sum(sizes[:rank]), sizes[rank]).clone()
    return part.requires_grad_(weight.requires_grad)


def close(actual, expected, tolerance, whole=None):
    """Compare with respect to the size of the whole."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    expected = expected.double()
    size = (expected if whole is None else whole.double()).norm()
    error = (actual.double() - expected).norm()
    assert error <= tolerance * size + 1e-300, f"{error.item()} of {size.item()}"


class Traffic(TorchDispatchMode):
    """Counts the collectives, and the bytes that a rank puts into them."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._schema.name.partition("::")[2]
            self.counts[name] += 1
            if not name.startswith(("recv", "barrier")):
                sent = args[1] if name.startswith("_allgather_base") else args[0]
                sent = sent if isinstance(sent, (list, tuple)) else [sent]
                self.bytes += sum(x.numel() * x.element_size() for x in sent)
        return func(*args, **(kwargs or {}))
