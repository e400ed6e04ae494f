"""Checks of DTensors in the energies, against one process; see `test_ranks`."""

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_inputs import Traffic, close, for_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import comhe_ext
from comhe_ext.testing.inputs import random_rows

PLACEMENTS = [[Shard(0)], [Shard(1)], [Replicate()]]
PLACEMENTS_2D = [
    [Shard(0), Shard(0)],
    [Replicate(), Shard(0)],
    [Shard(0), Replicate()],
    [Shard(0), Shard(1)],
    [Shard(1), Shard(0)],
    [Shard(1), Replicate()],
    [Replicate(), Replicate()],
]


def _mesh(*shape):
    return init_device_mesh("cpu", shape or (dist.get_world_size(),))


def _like_one_process(energy, weight, mesh, placements):
    """Compare a function of a weight with the same function of its shards."""
    weight = weight.requires_grad_()
    expected = energy(weight)
    factors = torch.arange(1.0, 1.0 + expected.numel()).to(expected).view(expected.shape)
    (gradient,) = torch.autograd.grad((expected * factors).sum(), weight)
    sharded: Any = distribute_tensor(weight.detach(), mesh, placements).requires_grad_()
    actual = energy(sharded)
    assert type(actual) is torch.Tensor
    close(actual, expected, 1e-12)
    grad: Any = torch.autograd.grad((actual * factors).sum(), sharded)[0]
    assert grad.placements == tuple(placements)
    close(grad.full_tensor(), gradient, 1e-12)
    with torch.no_grad():
        close(energy(sharded), expected, 1e-12)


def _matrices(count=3, dim=4, width=12):
    return random_rows(count * dim, width, seed=1, dtype=torch.float64).view(count, dim, width)


def _energies():
    matrices = _matrices()
    yield lambda w: comhe_ext.hyperspherical_energy(w, 1.0, half_space=True, eps=1e-3)
    yield lambda w: comhe_ext.compressive_energy(w, matrices, reduction="sum")
    yield lambda w: comhe_ext.group_energy(w, 3, angular=True)
    yield lambda w: comhe_ext.pair_energy(w, pair=comhe_ext.Gaussian(2.0))


def check_each_placement():
    mesh = _mesh()
    for placements in PLACEMENTS:
        for energy in _energies():
            _like_one_process(energy, random_rows(33, 12, dtype=torch.float64), mesh, placements)


def check_fewer_rows_or_columns_than_ranks():
    mesh = _mesh()
    for count in (0, 1, 2, 5):
        for placements in PLACEMENTS:
            weight = random_rows(count, 12, dtype=torch.float64)
            _like_one_process(comhe_ext.hyperspherical_energy, weight, mesh, placements)
    weight = random_rows(5, 2, dtype=torch.float64)
    matrices = _matrices(width=2)
    for placements in PLACEMENTS:
        _like_one_process(
            lambda w: comhe_ext.compressive_energy(w, matrices), weight, mesh, placements
        )


@for_ranks([2, 3], long=[4])
def check_sets_of_rows():
    mesh = _mesh()
    for sets in (1, 3, 5):
        for placement in (Shard(0), Shard(1), Shard(2), Replicate()):
            weight = random_rows(sets * 7, 12, dtype=torch.float64).view(sets, 7, 12)
            for energy in _energies():
                _like_one_process(energy, weight, mesh, [placement])


@for_ranks([4])
def check_meshes_of_two_dimensions():
    mesh = _mesh(2, 2)
    for placements in PLACEMENTS_2D:
        for count in (33, 3):
            for energy in _energies():
                weight = random_rows(count, 12, dtype=torch.float64)
                _like_one_process(energy, weight, mesh, placements)


def check_gradient_in_the_matrices():
    mesh = _mesh()
    weight = random_rows(17, 12, dtype=torch.float64)
    matrices = _matrices().requires_grad_()
    expected = comhe_ext.compressive_energy(weight, matrices)
    (gradient,) = torch.autograd.grad(expected, matrices)
    for placements in PLACEMENTS:
        for same in (matrices, distribute_tensor(matrices.detach(), mesh, [Replicate()])):
            same = same.detach().requires_grad_()
            energy = comhe_ext.compressive_energy(distribute_tensor(weight, mesh, placements), same)
            (grad,) = torch.autograd.grad(energy, same)
            close(grad.full_tensor() if hasattr(grad, "full_tensor") else grad, gradient, 1e-12)


def check_float32():
    mesh = _mesh()
    weight = random_rows(300, 16)
    expected = comhe_ext.hyperspherical_energy(weight.double())
    for placements in PLACEMENTS:
        sharded = distribute_tensor(weight, mesh, placements)
        close(comhe_ext.hyperspherical_energy(sharded), expected, 1e-6)


def check_what_cannot_be_taken_is_refused():
    mesh = _mesh()
    partial = torch.distributed.tensor.DTensor.from_local(torch.ones(4, 3), mesh, [Partial()])
    with pytest.raises(ValueError, match="`weight` must be replicated, or sharded, by rows"):
        comhe_ext.hyperspherical_energy(partial)
    weight = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
    with pytest.raises(TypeError, match=r"DTensor.*pass weight.full_tensor\(\)"):
        comhe_ext.angle_preserving_loss(weight, torch.ones(1, 2, 4))
    with pytest.raises(ValueError, match="as many columns as `weight`, got 5 and 4"):
        comhe_ext.compressive_energy(weight, torch.ones(1, 2, 5))
    with pytest.raises(ValueError, match="`weight` must be 2-D or 3-D"):
        comhe_ext.hyperspherical_energy(distribute_tensor(torch.ones(6), mesh, [Shard(0)]))


@for_ranks([4])
def check_columns_over_two_dimensions_of_a_mesh_are_refused():
    weight = distribute_tensor(torch.ones(6, 8), _mesh(2, 2), [Shard(1), Shard(1)])
    with pytest.raises(ValueError, match="by columns over one"):
        comhe_ext.hyperspherical_energy(weight)


def check_what_travels_of_shards_of_rows():
    """By gathering: k numbers a row, and one energy a projection; nothing in the backward."""
    weight = distribute_tensor(random_rows(8 * 12, 64), _mesh(), [Shard(0)]).requires_grad_()
    matrices = _matrices(3, 5, 64).float()
    with Traffic() as traffic, CommDebugMode() as mode:
        energy = comhe_ext.compressive_energy(weight, matrices)
    rows = 8 * 12 // dist.get_world_size()
    assert traffic.counts == {"_allgather_base_": 1, "allreduce_": 1}
    assert traffic.bytes == 3 * rows * 5 * 4 + 3 * 4
    assert mode.get_total_counts() == 2
    with Traffic() as traffic, CommDebugMode() as mode:
        energy.backward()
    assert traffic.bytes == mode.get_total_counts() == 0


def check_what_travels_of_shards_of_columns():
    """One sum of the projected rows, k numbers each; nothing in the backward."""
    weight = distribute_tensor(random_rows(96, 64), _mesh(), [Shard(1)]).requires_grad_()
    matrices = _matrices(3, 5, 64).float()
    with Traffic() as traffic, CommDebugMode() as mode:
        energy = comhe_ext.compressive_energy(weight, matrices)
    assert traffic.counts == {"allreduce_": 1}
    assert traffic.bytes == 3 * 96 * 5 * 4
    assert mode.get_total_counts() == 1
    with Traffic() as traffic:
        energy.backward()
    assert traffic.bytes == 0


@for_ranks([2, 3], long=[4])
def check_results_of_single_rows_are_dtensors():
    mesh = _mesh()
    for shape in ((29, 12), (3, 7, 12)):
        weight = random_rows(math.prod(shape[:-1]), 12, dtype=torch.float64).view(shape)
        weight.requires_grad_()
        pair = comhe_ext.Riesz(1.0, half_space=True)
        expected = comhe_ext.pair_energy(weight, pair=pair, reduction="rows")
        distance, index = comhe_ext.nearest(weight)
        (gradient,) = torch.autograd.grad((expected * distance).sum(), weight)
        for dim in (*range(len(shape)), None):
            placement = Replicate() if dim is None else Shard(dim)
            sharded: Any = distribute_tensor(weight.detach(), mesh, [placement]).requires_grad_()
            actual: Any = comhe_ext.pair_energy(sharded, pair=pair, reduction="rows")
            found: Any = comhe_ext.nearest(sharded)
            close(actual.full_tensor(), expected, 1e-12)
            close(found[0].full_tensor(), distance, 1e-12)
            assert torch.equal(found[1].full_tensor(), index)
            total: Any = (actual * found[0]).sum()
            grad: Any = torch.autograd.grad(total, sharded)[0]
            assert grad.placements == (placement,)
            close(grad.full_tensor(), gradient, 1e-12)


@for_ranks([4])
def check_single_rows_over_two_dimensions_of_a_mesh_are_refused():
    weight = distribute_tensor(torch.ones(6, 8), _mesh(2, 2), [Shard(0), Shard(0)])
    with pytest.raises(ValueError, match="over one dimension of a mesh"):
        comhe_ext.nearest(weight)


@for_ranks([2])
def check_a_compiled_function():
    _check_compiled([Shard(0)])


@for_ranks([], long=[2, 3, 4])
def check_compiled_functions():
    for placements in PLACEMENTS:
        _check_compiled(placements)


def _check_compiled(placements):
    warnings.simplefilter("ignore")  # Dynamo has many of its own
    energy = torch.compile(comhe_ext.hyperspherical_energy, backend="eager")
    _like_one_process(energy, random_rows(13, 12, dtype=torch.float64), _mesh(), placements)
