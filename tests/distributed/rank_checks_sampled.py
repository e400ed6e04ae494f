"""Checks of sampled energies of rows on several ranks, against one process; see `test_ranks`."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_inputs import Traffic, close, for_ranks, own_rows, sizes_of, uneven_sizes
from torch import nn
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import comhe_ext
from comhe_ext import Gaussian, Laplace, Riesz, distributed, projections
from comhe_ext.projections.draws import seed_of
from comhe_ext.sampled import SamplingPlan
from comhe_ext.sampled.polynomials import uniform_polynomial
from comhe_ext.settings import pair_settings
from comhe_ext.sharded.collectives import Shards
from comhe_ext.sharded.sampled import SEEDS, draw, estimated_energies
from comhe_ext.testing import reference
from comhe_ext.testing.inputs import random_rows

FUNCTIONS = {
    Riesz(2.0): lambda t: t**-2,
    Riesz(0.0): lambda t: -t.log(),
    Gaussian(2.0): lambda t: (-2.0 * t.square()).exp(),
    Riesz(1.0, angular=True): lambda t: 1.0 / t,
    Riesz(2.0, half_space=True): lambda t: t**-2,
    Laplace(1.0, half_space=True, angular=True): lambda t: (-t).exp(),
}


def _rows(n, k=4):
    """Make rows with two near pairs, a nearly antipodal one, and a dead row."""
    rows = nn.functional.normalize(random_rows(n, k, dtype=torch.float64))
    rows[1] = 2.0 * rows[n - 2] + 0.6 * rows[2]
    rows[3] = -rows[2] + 0.3 * rows[0]
    rows[5] = rows[0] + 0.3 * rows[1]
    rows[4] = 0.0
    return rows


def _plan(rows, degree, trees=1):
    return SamplingPlan.from_rows(rows, degree, trees, generator=torch.Generator().manual_seed(1))


def _definition(rows, drawn, polynomial, listed, pair, reduction="mean", eps=0.0):
    """Estimate as `comhe_ext.sharded.sampled` says, of all rows [N, k] and cosines, one by one."""
    n, function = len(rows), FUNCTIONS[pair]
    every, times = torch.arange(n), n / len(drawn)
    options = dict(half_space=pair.half_space, angular=pair.angular, eps=eps)

    def of_pairs(left, right, left_ids, right_ids):
        ids = dict(row_ids=left_ids, column_ids=right_ids)
        return reference.cross_energy(left, right, function, **options, **ids)[0]

    squares = rows.square().sum(1, keepdim=True) + eps
    v = torch.where(squares > 0, rows / torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)

    def p(c):
        return torch.zeros_like(c) if polynomial is None else polynomial.at(c)

    c = v @ v.detach().T
    off = every[:, None] != every
    met = (every[:, None] == drawn).sum(1).double()
    pairs = of_pairs(rows, rows.detach()[drawn], every, drawn) - (p(c) * off * met).sum()
    pairs = times * pairs
    found = [] if listed is None else [*zip(listed.i, listed.j, strict=True)]
    for i, j in [*found, *[(j, i) for i, j in found]]:
        one, other = rows[i : i + 1], rows[j : j + 1].detach()
        residual = of_pairs(one, other, every[:1], every[1:2]) - p(c[i, j])
        pairs = pairs + (1.0 - times * met[j]) * residual
    # half of the value, all of the gradient
    total = pairs / 2.0 + (pairs - pairs.detach()) / 2.0
    total = total + (p(v @ v.T) * off).sum() / 2.0
    if pair.half_space:
        alone = [reference.pair_energy(row[None], function, **options) for row in rows]
        total = 2.0 * total + torch.stack(alone).sum()
    return pair.scale(n, reduction) * total


@for_ranks([2, 3], long=[4])
def check_the_estimate_is_its_definition():
    n, m = 17, 5
    weight = _rows(n).requires_grad_()
    for number, pair in enumerate(FUNCTIONS):
        eps, reduction = (1e-2, "sum") if number % 2 else (0.0, "mean")
        options = pair_settings(pair, reduction, eps, None).options((weight,))
        for degree in (2, (0, 3, 4)[number % 3]):
            plan = _plan(weight, degree)
            assert len(plan.listed.i) > 1
            polynomial, drawn = plan.polynomial(pair), draw(degree, 1, m, n)
            listed = plan.listed if degree else None
            expected = _definition(weight, drawn[0], polynomial, listed, pair, reduction, eps)
            (gradient,) = torch.autograd.grad(expected, weight)
            for sizes in uneven_sizes(n):
                rows = own_rows(weight, sizes)
                shards = Shards((dist.group.WORLD,), (tuple(sizes),))
                actual = estimated_energies(
                    rows[None], shards, drawn, polynomial, listed, options
                ).squeeze(0)
                close(actual, expected, 1e-12)
                (grad,) = torch.autograd.grad(3.0 * actual, rows)
                close(grad, 3.0 * own_rows(gradient, sizes), 1e-12, whole=gradient)


@for_ranks([2, 3], long=[4])
def check_the_mean_over_all_draws_is_exact():
    """With the same place within each part, the draws of all places hold each row m times."""
    n, m, sets = 12, 5, 2
    weight = torch.stack([_rows(n), random_rows(n, 4, seed=3, dtype=torch.float64)])
    weight.requires_grad_()
    # a list that lacks pairs, and has others that are not near
    listed = _plan(weight[0], 2).listed
    listed = type(listed)(torch.tensor([1, 2]), torch.tensor([n - 2, 7]), torch.ones(2))
    for number, pair in enumerate(FUNCTIONS):
        settings = pair_settings(pair, "mean", 0.0, None)
        polynomial = uniform_polynomial(pair, 4)
        expected = comhe_ext.pair_energy(weight, pair=pair)
        (gradient,) = torch.autograd.grad(expected.sum(), weight)
        sizes = list(uneven_sizes(n))[number % 3]
        rows = own_rows(weight, sizes, dim=1)
        shards = Shards((dist.group.WORLD,), (tuple(sizes),))
        energies = []
        for place in range(n):
            drawn = ((torch.arange(m) * n + place) // m).expand(sets, m).contiguous()
            options = settings.options((rows,))
            energies.append(estimated_energies(rows, shards, drawn, polynomial, listed, options))
        mean = torch.stack(energies).mean(0)
        close(mean, expected, 1e-12)
        (grad,) = torch.autograd.grad(mean.sum(), rows)
        close(grad, own_rows(gradient, sizes, dim=1), 1e-12, whole=gradient)


@for_ranks([2])
def check_draws_are_uniform():
    """Each place of each part is drawn as often as any other, and ranks draw the same."""
    n, m, sets = 7, 3, 20_000
    counts = draw(5, sets, m, n).flatten().bincount(minlength=n).double()
    expected = sets * m / n
    assert float(((counts - expected).square() / expected).sum()) < 40.0  # chi-square, 6 degrees
    assert torch.equal(draw(5, 4, 7, 7), torch.arange(7).expand(4, 7))  # all of them
    drawn = draw(9, 4, 6, 1000)
    everyone = [torch.empty_like(drawn) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, drawn)
    assert all(torch.equal(drawn, one) for one in everyone)


def _generator(rank=None):
    """Make a generator of another state on each rank, or that of one of them."""
    return torch.Generator().manual_seed(dist.get_rank() if rank is None else rank)


def _first_draws(sets, m, n):
    """Draw what a call draws, from the seed of the first rank."""
    seed = int(torch.randint(SEEDS, (), generator=_generator(0)))
    return draw(seed, sets, m, n)


@for_ranks([2, 3], long=[4])
def check_functions_of_plain_rows():
    n, m = 23, 6
    weight = _rows(n, 8).requires_grad_()
    matrices = random_rows(2 * 6, 8, seed=1, dtype=torch.float64).view(2, 6, 8).requires_grad_()
    plan = _plan(weight, 2)
    pair = Riesz(2.0)

    def mean(parts, listed):
        polynomial = uniform_polynomial(pair, parts[0].shape[1])
        drawn = _first_draws(len(parts), m, n)
        energies = [
            _definition(x, y, polynomial, listed, pair) for x, y in zip(parts, drawn, strict=True)
        ]
        return torch.stack(energies).mean()

    planned = _definition(
        weight, _first_draws(1, m, n)[0], plan.polynomial(pair), plan.listed, pair
    )
    expected = [
        mean([weight], None),
        planned,
        planned,
        mean([weight @ x.T for x in matrices], plan.listed),
        mean([weight[:, :4], weight[:, 4:]], None),
    ]
    for sizes in uneven_sizes(n):
        rows = own_rows(weight, sizes)

        def options(**others):
            return dict(method="sampled", samples=m, generator=_generator(), **others)

        actual = [
            distributed.hyperspherical_energy(rows, **options()),
            distributed.hyperspherical_energy(rows, **options(plan=plan)),
            distributed.pair_energy(rows, pair=pair, **options(plan=plan)),
            distributed.compressive_energy(rows, matrices, **options(plan=plan)),
            distributed.group_energy(rows, 2, **options()),
        ]
        for x, y in zip(actual, expected, strict=True):
            close(x, y, 1e-12)
            (grad,) = torch.autograd.grad(x, rows, retain_graph=True)
            (gradient,) = torch.autograd.grad(y, weight, retain_graph=True)
            close(grad, own_rows(gradient, sizes), 1e-12, whole=gradient)
        (grad,) = torch.autograd.grad(actual[3], matrices)
        (gradient,) = torch.autograd.grad(expected[3], matrices, retain_graph=True)
        close(grad, gradient, 1e-12)


def check_all_rows_drawn_is_exact():
    weight = random_rows(9, 4, dtype=torch.float64)
    rows = own_rows(weight, sizes_of(9))
    for samples in (9, 1024):
        actual = distributed.hyperspherical_energy(rows, method="sampled", samples=samples)
        close(actual, comhe_ext.hyperspherical_energy(weight), 1e-12)
    for count in (0, 1):
        rows = own_rows(weight[:count], sizes_of(count))
        assert distributed.hyperspherical_energy(rows, method="sampled") == 0.0
    with torch.no_grad():
        assert distributed.hyperspherical_energy(rows.expand(0, *rows.shape)).shape == (0,)


@for_ranks([2, 3], long=[4])
def check_dtensors_of_each_placement():
    n, m, width = 23, 6, 12
    weight = _rows(n, width).requires_grad_()
    pair, mesh = Riesz(2.0, half_space=True), init_device_mesh("cpu", (dist.get_world_size(),))
    matrices = random_rows(2 * 5, width, seed=1, dtype=torch.float64).view(2, 5, width)
    drawn, polynomial = _first_draws(2, m, n), uniform_polynomial(pair, 5)
    expected = torch.stack(
        [
            _definition(weight @ x.T, y, polynomial, None, pair)
            for x, y in zip(matrices, drawn, strict=True)
        ]
    ).mean()
    (gradient,) = torch.autograd.grad(expected, weight)
    same = []
    for placement in (Shard(0), Shard(1), Replicate()):
        sharded = distribute_tensor(weight.detach(), mesh, [placement]).requires_grad_()
        actual = comhe_ext.compressive_energy(
            sharded, matrices, half_space=True, method="sampled", samples=m, generator=_generator()
        )
        grad: Any = torch.autograd.grad(actual, sharded)[0]
        assert grad.placements == (placement,)
        if placement == Shard(0):
            close(actual, expected, 1e-12)
            close(grad.full_tensor(), gradient, 1e-12)
        else:
            # all rows are on each rank, which takes blocks of them
            same.append((actual, grad.full_tensor()))
    close(same[0][0], same[1][0], 1e-12)
    close(same[0][1], same[1][1], 1e-12)


@for_ranks([4])
def check_dtensors_on_a_mesh_of_two_dimensions():
    n, m = 19, 6
    weight = _rows(n, 8).requires_grad_()
    drawn, polynomial = _first_draws(1, m, n)[0], uniform_polynomial(Riesz(2.0), 8)
    expected = _definition(weight, drawn, polynomial, None, Riesz(2.0))
    (gradient,) = torch.autograd.grad(expected, weight)
    for placements in (
        [Shard(0), Shard(0)],
        [Replicate(), Shard(0)],
        [Shard(0), Replicate()],
        [Shard(0), Shard(1)],
    ):
        mesh = init_device_mesh("cpu", (2, 2))
        sharded = distribute_tensor(weight.detach(), mesh, placements).requires_grad_()
        actual = comhe_ext.hyperspherical_energy(
            sharded, method="sampled", samples=m, generator=_generator()
        )
        grad: Any = torch.autograd.grad(actual, sharded)[0]
        close(actual, expected, 1e-12)
        assert grad.placements == tuple(placements)
        close(grad.full_tensor(), gradient, 1e-12)
        plan = distributed.sampling_plan(sharded, generator=_generator())
        assert plan.num_rows == n
        comhe_ext.hyperspherical_energy(sharded, method="sampled", samples=m, plan=plan)


def check_what_travels_of_a_sample():
    """The drawn rows, k numbers each, and k (k + 1) / 2 + k moments and a sum for each set."""
    ranks, sets, k, m = dist.get_world_size(), 3, 5, 12
    rows = random_rows(8 * 12 // ranks, 64).requires_grad_()
    matrices = comhe_ext.random_projection(sets, k, 64, generator=torch.Generator().manual_seed(0))
    with Traffic() as traffic:
        actual = distributed.compressive_energy(
            rows, matrices, method="sampled", samples=m, generator=_generator()
        )
    assert traffic.counts == {"_allgather_base_": 2, "allreduce_": 1}
    # each rank has its share of the columns, but for one at either end
    sums = sets * (k * (k + 1) // 2 + k + 1) * 8
    drawn = traffic.bytes - 6 * 8 - sums
    assert sets * m / ranks * k * 4 <= drawn <= sets * (m / ranks + 2) * k * 4
    with Traffic() as traffic:
        actual.backward()
    assert traffic.counts == {}

    mesh = init_device_mesh("cpu", (ranks,))
    weight = distribute_tensor(random_rows(8 * 12, 64), mesh, [Shard(0)]).requires_grad_()
    with Traffic() as traffic, CommDebugMode() as mode:
        actual = comhe_ext.compressive_energy(
            weight, matrices, half_space=True, method="sampled", samples=m
        )
        actual.backward()
    assert traffic.counts == {"_allgather_base_": 2, "allreduce_": 1}
    assert mode.get_total_counts() == 3
    # the polynomial is even in half space
    sums = sets * (k * (k + 1) // 2 + 1) * 8
    drawn = traffic.bytes - 3 * 8 - sums
    assert sets * m / ranks * k * 4 <= drawn <= sets * (m / ranks + 2) * k * 4


@for_ranks([2, 3], long=[4])
def check_a_plan_of_all_ranks():
    """It lists near rows of two ranks, and with it they cost no variance."""
    n = 600
    weight = random_rows(n, 16)
    weight[n // 2 :][:200] = weight[:200] + 1e-2 * random_rows(200, 16, seed=1)
    exact = weight.double().requires_grad_()
    expected = reference.hyperspherical_energy(exact)
    expected.backward()
    rows = own_rows(weight, sizes_of(n)).requires_grad_()
    plan = distributed.sampling_plan(rows, generator=_generator())
    state = [None] * dist.get_world_size()
    dist.all_gather_object(state, [x.tolist() for x in plan.listed])
    assert all(x == state[0] for x in state)
    found = {(i, j) for i, j in zip(*state[0][:2], strict=True)}
    assert len(found & {(i, i + n // 2) for i in range(200)}) >= 190
    # the pairs that are not listed give an error as that of uniform rows
    for _ in range(3):
        actual = distributed.hyperspherical_energy(
            rows, method="sampled", samples=64, plan=plan, generator=_generator()
        )
        (grad,) = torch.autograd.grad(actual, rows)
        close(actual, expected, 0.05)
        close(grad, own_rows(exact.grad, sizes_of(n)), 0.1, whole=exact.grad)


@for_ranks([3], long=[2, 4])
def check_lower_precision():
    n, m = 150, 40
    plan = _plan(random_rows(n, 24), 2)
    drawn = _first_draws(1, m, n)[0]
    pair = Riesz(2.0, half_space=True)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = random_rows(n, 24, dtype=dtype)
        double = weight.double().requires_grad_()
        polynomial = plan.polynomial(pair)
        expected = _definition(double, drawn, polynomial, plan.listed, pair, "sum")
        (gradient,) = torch.autograd.grad(expected, double)
        rows = own_rows(weight, sizes_of(n)).requires_grad_()
        actual = distributed.pair_energy(
            rows,
            pair=pair,
            reduction="sum",
            method="sampled",
            samples=m,
            plan=plan,
            generator=_generator(),
        )
        assert actual.dtype == torch.float32
        close(actual, expected, 1e-6)
        (grad,) = torch.autograd.grad(actual, rows)
        assert grad.dtype == dtype
        close(grad, own_rows(gradient, sizes_of(n)), max(4e-6, torch.finfo(dtype).eps), gradient)


def check_nan_reaches_all_ranks_of_a_sample():
    weight = random_rows(40, 6)
    weight[17, 2] = math.nan
    rows = own_rows(weight, sizes_of(40))
    assert distributed.hyperspherical_energy(rows, method="sampled", samples=4).isnan()


@for_ranks([2])
def check_what_cannot_be_sampled_is_refused_on_all_ranks():
    rows = random_rows(20, 4).requires_grad_()
    sampled = dict(method="sampled", samples=5)
    with pytest.raises(ValueError, match=r"`samples` and `plan` must be the same on all ranks"):
        distributed.hyperspherical_energy(rows, method="sampled", samples=5 + dist.get_rank())
    plan = _plan(random_rows(20 * dist.get_world_size(), 4, seed=dist.get_rank()), 2)
    with pytest.raises(ValueError, match="must be the same on all ranks"):
        distributed.hyperspherical_energy(rows, plan=plan, **sampled)
    with pytest.raises(ValueError, match=r"`plan` was made from 20 rows, got"):
        distributed.hyperspherical_energy(rows, plan=_plan(random_rows(20, 4), 2), **sampled)
    with pytest.raises(ValueError, match="`strategy` is for method='exact', got 'ring'"):
        distributed.hyperspherical_energy(rows, strategy="ring", **sampled)
    with pytest.raises(ValueError, match="`method` must be 'exact' for rows against columns"):
        distributed.pair_energy(rows, reduction="rows", **sampled)
    with pytest.raises(ValueError, match="`degree` must be at most 4, got 5"):
        distributed.sampling_plan(rows, 5)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = distribute_tensor(random_rows(20, 4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="must be the same on all ranks"):
        comhe_ext.hyperspherical_energy(sharded, method="sampled", samples=5 + dist.get_rank())

    actual = distributed.hyperspherical_energy(rows, **sampled)
    (grad,) = torch.autograd.grad(actual, rows, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once"):
        grad.sum().backward()
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=r"jvp|forward"):
        distributed.hyperspherical_energy(forward_ad.make_dual(rows, rows), **sampled)


@for_ranks([2, 3], long=[4])
def check_a_sampled_layer_of_a_model():
    """The draws are those of the step, the same on all ranks and for all placements."""
    torch.manual_seed(3)
    single = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 6)).double()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    pair, m = Riesz(2.0, half_space=True), 8
    polynomial = uniform_polynomial(pair, 5)
    for placement in (Shard(0), Shard(1), Replicate()):
        model = copy.deepcopy(single)
        for layer in model:
            shards = distribute_tensor(layer.weight.detach(), mesh, [placement])
            layer.weight = nn.Parameter(shards)
        projection = projections.RandomProjection(2, 5, every=100, seed=4)
        comhe = comhe_ext.CoMHE(
            model,
            projection,
            include="0",
            output_layer=None,
            method="sampled",
            samples=m,
        )
        for step in range(1, 4):
            actual = comhe()
            grad: Any = torch.autograd.grad(actual, model[0].weight)[0]
            grad = grad.full_tensor()
            close(grad, _of_first_rank(grad), 0.0)
            close(actual.detach(), _of_first_rank(actual.detach()), 0.0)
            if placement != Shard(0):
                continue
            weight: Any = single[0].weight
            (matrices,) = projection.matrices().values()
            drawn = draw(seed_of(step, 0), 2, m, 40)
            sets = zip(matrices, drawn, strict=True)
            energies = [_definition(weight @ x.T, y, polynomial, None, pair) for x, y in sets]
            expected = torch.stack(energies).mean()
            (gradient,) = torch.autograd.grad(expected, weight)
            close(actual, expected, 1e-12)
            close(grad, gradient, 1e-12)


def _of_first_rank(tensor):
    tensor = tensor.clone()
    dist.broadcast(tensor, 0)
    return tensor
