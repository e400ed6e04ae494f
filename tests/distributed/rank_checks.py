"""Checks of energies of rows that are spread over ranks, against one process; see `test_ranks`."""

import math

import pytest
import rank_inputs
import torch
import torch.distributed as dist
from rank_inputs import close, for_ranks, own_rows, sizes_of, uneven_sizes
from torch.autograd import forward_ad

import comhe_ext
from comhe_ext import distributed
from comhe_ext.sharded import energy
from comhe_ext.testing import reference
from comhe_ext.testing.inputs import paired_rows, random_rows

OPTIONS = (
    dict(s=2.0),
    dict(s=0.0, half_space=True),
    dict(s=1.0, half_space=True, reduction="sum"),
    dict(s=-1.0, reduction="sum"),
    dict(s=1.5, angular=True),
    dict(s=2.0, half_space=True, angular=True),
    dict(s=2.0, eps=1e-2),
    dict(s=2.0, half_space=True, eps=1e-2, min_distance=0.0),
)


def check_energy_and_gradient_are_those_of_one_process():
    weight = random_rows(33, 7, dtype=torch.float64).requires_grad_()
    for options in OPTIONS:
        expected = reference.hyperspherical_energy(weight, **options)
        (gradient,) = torch.autograd.grad(expected, weight)
        for sizes in uneven_sizes(33):
            for strategy in ("gather", "ring"):
                rows = own_rows(weight, sizes)
                actual = distributed.hyperspherical_energy(rows, strategy=strategy, **options)
                close(actual, expected, 1e-12)
                (grad,) = torch.autograd.grad(3.0 * actual, rows)
                close(grad, 3.0 * own_rows(gradient, sizes), 1e-12, whole=gradient)
        with torch.no_grad():
            rows = own_rows(weight, sizes)
            close(distributed.hyperspherical_energy(rows, **options), expected, 1e-12)


@for_ranks([3], long=[2, 4])
def check_float32_and_half_precision():
    options = dict(half_space=True, reduction="sum")  # of means float16 cannot hold the gradient
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = random_rows(200, 24, dtype=dtype)
        double = weight.double().requires_grad_()
        expected = reference.hyperspherical_energy(double, 2.0, **options)
        expected.backward()
        for strategy in ("gather", "ring"):
            rows = own_rows(weight, sizes_of(200)).requires_grad_()
            actual = distributed.hyperspherical_energy(rows, 2.0, strategy=strategy, **options)
            assert actual.dtype == torch.float32
            close(actual, expected, 1e-6)
            actual.backward()
            assert rows.grad.dtype == dtype
            tolerance = max(1e-6, torch.finfo(dtype).eps)
            close(rows.grad, own_rows(double.grad, sizes_of(200)), tolerance, whole=double.grad)


def check_sets_are_independent():
    weight = random_rows(3 * 17, 5, dtype=torch.float64).view(3, 17, 5).requires_grad_()
    expected = torch.stack([reference.hyperspherical_energy(x, 2.0) for x in weight])
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(expected @ factors, weight)
    for sizes in uneven_sizes(17):
        for strategy in ("gather", "ring"):
            rows = own_rows(weight, sizes, dim=1)
            actual = distributed.hyperspherical_energy(rows, strategy=strategy)
            close(actual, expected, 1e-12)
            (grad,) = torch.autograd.grad(actual @ factors, rows)
            close(grad, own_rows(gradient, sizes, dim=1), 1e-12, whole=gradient)


def check_sets_that_are_gathered_one_by_one():
    limit, energy.BATCH_BYTES = energy.BATCH_BYTES, 1
    try:
        check_sets_are_independent()
    finally:
        energy.BATCH_BYTES = limit


def check_large_shards_go_around_the_ring():
    rows = random_rows(dist.get_rank() + 5, 4)
    limit = energy.RING_ROWS
    try:
        for energy.RING_ROWS in (dist.get_world_size() + 4, dist.get_world_size() + 5):
            with rank_inputs.Traffic() as traffic:
                distributed.hyperspherical_energy(rows)
            largest = dist.get_world_size() + 4
            assert (traffic.counts["send"] > 0) == (largest >= energy.RING_ROWS)
    finally:
        energy.RING_ROWS = limit


def check_projected_energy_has_gradients_in_rows_and_matrices():
    weight = random_rows(29, 12, dtype=torch.float64).requires_grad_()
    matrices = random_rows(3 * 4, 12, seed=1, dtype=torch.float64).view(3, 4, 12).requires_grad_()
    expected = reference.compressive_energy(weight, matrices, 2.0, half_space=True)
    gradients = torch.autograd.grad(expected, (weight, matrices))
    for sizes in uneven_sizes(29):
        for strategy in ("gather", "ring"):
            rows, same = own_rows(weight, sizes), matrices.detach().requires_grad_()
            actual = distributed.compressive_energy(rows, same, half_space=True, strategy=strategy)
            close(actual, expected, 1e-12)
            to_rows, to_matrices = torch.autograd.grad(actual, (rows, same))
            close(to_rows, own_rows(gradients[0], sizes), 1e-12, whole=gradients[0])
            close(to_matrices, gradients[1], 1e-12)


def check_groups_of_coordinates():
    weight = random_rows(19, 9, dtype=torch.float64).requires_grad_()
    for groups in (3, [[0, 1, 2], [3, 8]]):
        expected = comhe_ext.group_energy(weight, groups)
        (gradient,) = torch.autograd.grad(expected, weight)
        rows = own_rows(weight, sizes_of(19))
        actual = distributed.group_energy(rows, groups)
        close(actual, expected, 1e-12)
        (grad,) = torch.autograd.grad(actual, rows)
        close(grad, own_rows(gradient, sizes_of(19)), 1e-12, whole=gradient)


def check_few_rows_or_none():
    for count in (0, 1, 2, 3):
        weight = random_rows(count, 4, dtype=torch.float64).requires_grad_()
        for half_space in (False, True):
            expected = comhe_ext.hyperspherical_energy(weight, half_space=half_space)
            (gradient,) = torch.autograd.grad(expected, weight)
            for strategy in ("gather", "ring"):
                rows = own_rows(weight, sizes_of(count))
                actual = distributed.hyperspherical_energy(
                    rows, half_space=half_space, strategy=strategy
                )
                close(actual, expected, 1e-12)
                (grad,) = torch.autograd.grad(actual, rows)
                close(grad, own_rows(gradient, sizes_of(count)), 1e-12, whole=gradient)


def check_near_rows_of_two_ranks():
    for half_space in (False, True):
        for angle in (1e-2, 1e-4):
            weight = paired_rows(64, 8, angle, antipodal=half_space)
            weight[5] = 3.0 * weight[60]  # equal directions, on the first rank and on the last
            weight[7] = 0.0
            double = weight.double().requires_grad_()
            expected = reference.hyperspherical_energy(double, 2.0, half_space=half_space)
            expected.backward()
            for strategy in ("gather", "ring"):
                rows = own_rows(weight, sizes_of(64)).requires_grad_()
                actual = distributed.hyperspherical_energy(
                    rows, half_space=half_space, strategy=strategy
                )
                close(actual, expected, 1e-5)
                actual.backward()
                close(rows.grad, own_rows(double.grad, sizes_of(64)), 1e-5, whole=double.grad)


def check_nan_reaches_all_ranks():
    weight = random_rows(20, 6)
    weight[17, 2] = math.nan
    rows = own_rows(weight, sizes_of(20)).requires_grad_()
    assert distributed.hyperspherical_energy(rows).isnan()


def check_a_group_of_some_ranks():
    members = list(range(dist.get_world_size()))[1:]
    group = dist.new_group(members)
    if dist.get_rank() == 0:
        return
    weight = random_rows(21, 5, dtype=torch.float64).requires_grad_()
    expected = reference.hyperspherical_energy(weight, 2.0)
    (gradient,) = torch.autograd.grad(expected, weight)
    for strategy in ("gather", "ring"):
        rows = own_rows(weight, sizes_of(21, group), group=group)
        actual = distributed.hyperspherical_energy(rows, group=group, strategy=strategy)
        close(actual, expected, 1e-12)
        (grad,) = torch.autograd.grad(actual, rows)
        close(grad, own_rows(gradient, sizes_of(21, group), group=group), 1e-12, whole=gradient)


def check_rows_that_do_not_fit_together_are_refused_on_all_ranks():
    rank = dist.get_rank()
    with pytest.raises(ValueError, match="as many sets and columns, and one dtype, on all ranks"):
        distributed.hyperspherical_energy(torch.ones(3, 4 + (rank == 1)))
    dtype = torch.float64 if rank == 0 else torch.float32
    with pytest.raises(ValueError, match="one dtype"):
        distributed.hyperspherical_energy(torch.ones(3, 4, dtype=dtype))
    with pytest.raises(ValueError, match="`strategy` must be 'gather', 'ring' or None"):
        distributed.hyperspherical_energy(torch.ones(3, 4), strategy="tree")


def check_second_derivatives_raise():
    rows = random_rows(5, 4).requires_grad_()
    actual = distributed.hyperspherical_energy(rows)
    (grad,) = torch.autograd.grad(actual, rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()


@for_ranks([2])
def check_forward_mode_raises():
    rows = random_rows(5, 4)
    for energy_of in (
        distributed.hyperspherical_energy,
        lambda x: distributed.pair_energy(x, reduction="rows"),
    ):
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|forward"):
            energy_of(forward_ad.make_dual(rows, torch.ones_like(rows)))
    with pytest.raises(RuntimeError, match="setup_context"):
        torch.func.grad(distributed.hyperspherical_energy)(rows)


def check_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    rows = own_rows(random_rows(23, 6, dtype=torch.float64), sizes_of(23)).requires_grad_()

    def energy_of(x):
        return distributed.hyperspherical_energy(x.sin())

    (expected,) = torch.autograd.grad(energy_of(rows), rows)
    for use_reentrant in (False, True):
        again = checkpoint(energy_of, rows, use_reentrant=use_reentrant)
        again.backward()
        close(rows.grad, expected, 0.0)
        rows.grad = None


def check_what_travels():
    """By gathering: 4 numbers of each rank, k numbers a row, and one energy a projection."""
    ranks = dist.get_world_size()
    rows = random_rows(8, 64).requires_grad_()
    matrices = comhe_ext.random_projection(3, 5, 64, generator=torch.Generator().manual_seed(0))
    with rank_inputs.Traffic() as traffic:
        actual = distributed.compressive_energy(rows, matrices, strategy="gather")
    assert traffic.counts == {"_allgather_base_": 2, "allreduce_": 1}
    assert traffic.bytes == 4 * 8 + 3 * 8 * 5 * 4 + 3 * 4
    with rank_inputs.Traffic() as traffic:
        actual.backward()
    assert traffic.counts == {}
    with rank_inputs.Traffic() as traffic:
        distributed.compressive_energy(rows, matrices, strategy="ring")
    steps = ranks // 2
    assert traffic.counts == {
        "_allgather_base_": 1,
        "send": steps * 2,
        "recv_": steps * 2,
        "allreduce_": 1,
    }


def check_rows_against_columns():
    sizes, others = sizes_of(23), sizes_of(18)[::-1]
    rows = random_rows(23, 6, dtype=torch.float64).requires_grad_()
    columns = random_rows(18, 6, seed=1, dtype=torch.float64).requires_grad_()
    row_ids, column_ids = torch.arange(23) % 5, torch.arange(18) % 7
    pair = comhe_ext.Riesz(1.0, half_space=True)
    for ids in (dict(), dict(row_ids=row_ids, column_ids=column_ids)):
        for reduction in ("mean", "sum", "rows"):
            expected = comhe_ext.pair_energy(rows, columns, pair, reduction=reduction, **ids)
            factors = torch.arange(1.0, 1.0 + expected.numel()).double().view(expected.shape)
            gradients = torch.autograd.grad((expected * factors).sum(), (rows, columns))
            mine = own_rows(rows, sizes), own_rows(columns, others)
            parts = dict()
            if ids:
                parts["row_ids"] = own_rows(row_ids, sizes)
                parts["column_ids"] = own_rows(column_ids, others)
            actual = distributed.pair_energy(*mine, pair, reduction=reduction, **parts)
            if reduction == "rows":
                expected, factors = own_rows(expected, sizes), own_rows(factors, sizes)
            close(actual, expected, 1e-12)
            grads = torch.autograd.grad((actual * factors).sum(), mine)
            close(grads[0], own_rows(gradients[0], sizes), 1e-12, whole=gradients[0])
            close(grads[1], own_rows(gradients[1], others), 1e-12, whole=gradients[1])


def check_energies_of_rows_and_their_second_derivatives():
    weight = random_rows(19, 5, dtype=torch.float64).requires_grad_()
    factors = torch.arange(1.0, 20.0).double()
    along = random_rows(19, 5, seed=1, dtype=torch.float64)
    for half_space in (False, True):
        pair = comhe_ext.Riesz(2.0, half_space=half_space)
        expected = comhe_ext.pair_energy(weight, pair=pair, reduction="rows")
        (gradient,) = torch.autograd.grad((expected * factors).sum(), weight, create_graph=True)
        (product,) = torch.autograd.grad((gradient * along).sum(), weight)
        for sizes in uneven_sizes(19):
            rows = own_rows(weight, sizes)
            actual = distributed.pair_energy(rows, pair=pair, reduction="rows")
            close(actual, own_rows(expected, sizes), 1e-12, whole=expected)
            total = (actual * own_rows(factors, sizes)).sum()
            (grad,) = torch.autograd.grad(total, rows, create_graph=True)
            close(grad, own_rows(gradient, sizes), 1e-12, whole=gradient)
            (second,) = torch.autograd.grad((grad * own_rows(along, sizes)).sum(), rows)
            close(second, own_rows(product, sizes), 1e-12, whole=product)


def check_nearest_rows_of_all_ranks():
    weight = random_rows(31, 4, dtype=torch.float64).requires_grad_()
    factors = torch.arange(1.0, 32.0).double()
    for options in (dict(), dict(half_space=True), dict(angular=True, eps=1e-2)):
        expected, expected_index = comhe_ext.nearest(weight, **options)
        (gradient,) = torch.autograd.grad((expected * factors).sum(), weight)
        for sizes in uneven_sizes(31):
            rows = own_rows(weight, sizes)
            distance, index = distributed.nearest(rows, **options)
            assert torch.equal(index, own_rows(expected_index, sizes))
            close(distance, own_rows(expected, sizes), 1e-12, whole=expected)
            total = (distance * own_rows(factors, sizes)).sum()
            (grad,) = torch.autograd.grad(total, rows)
            close(grad, own_rows(gradient, sizes), 1e-12, whole=gradient)
