"""Rows against columns, and row energies: the dense definition, derivatives, ids, mistakes."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import comhe_ext
from comhe_ext import Gaussian, Riesz, pair_energy
from comhe_ext.testing import random_rows, relative_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

REDUCTIONS = ["mean", "sum", "rows"]
SPACES = [
    dict(half_space=half, angular=angular)
    for half, angular in itertools.product([False, True], repeat=2)
]


def dense(rows, columns, pair, met=None, reduction="mean"):
    """Write the definition out in float64: every pair of `met`, by the cosines' own formula."""
    v, w = (torch.nn.functional.normalize(x.double()) for x in (rows, columns))
    if met is None:
        met = torch.ones(len(rows), len(columns), dtype=torch.bool, device=rows.device)
    cosine = torch.where(met, v @ w.mT, 0.0)
    ends = [cosine, -cosine] if pair.half_space else [cosine]
    values = [
        pair.at_distance(c.arccos() if pair.angular else (2 - 2 * c).clamp_min(0).sqrt())[0]
        for c in ends
    ]
    total = torch.where(met, torch.stack(values).sum(0), 0.0)
    if reduction == "rows":
        return total.sum(1)
    if reduction == "sum":
        return total.sum() * len(ends)
    return total.sum() / (met.sum() * len(ends)).clamp_min(1)


def met_of(row_ids, column_ids):
    return row_ids[:, None] != column_ids


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("pair", [Riesz(2.0), Riesz(0.0), Riesz(1.5), Gaussian(2.0)], ids=str)
def test_it_is_the_definition(pair, reduction, space, backend, device):
    pair = replace(pair, **space)
    rows, columns = random_rows(37, 20, device=device), random_rows(90, 20, seed=1, device=device)
    row_ids = torch.arange(37, device=device) % 11
    column_ids = torch.arange(90, device=device) % 13 - 1
    exact = [x.double().requires_grad_() for x in (rows, columns)]
    truth = dense(exact[0], exact[1], pair, met_of(row_ids, column_ids), reduction)
    weights = random_rows(37, 1, seed=2, device=device).squeeze(1) if reduction == "rows" else None
    expected = torch.autograd.grad((truth if weights is None else truth * weights).sum(), exact)
    rows.requires_grad_(), columns.requires_grad_()
    energy = pair_energy(
        rows,
        columns,
        pair,
        row_ids=row_ids,
        column_ids=column_ids,
        reduction=reduction,
        backend=backend,
    )
    scalar = (energy if weights is None else energy * weights).sum()
    gradients = torch.autograd.grad(scalar, (rows, columns))
    assert energy.dtype == torch.float32
    assert relative_error(energy, truth) <= 1e-6
    for gradient, true in zip(gradients, expected, strict=True):
        assert relative_error(gradient, true) <= 5e-6


def test_a_backend_without_the_kernel_is_refused_by_name(monkeypatch):
    binding = pytest.importorskip("comhe_ext.kernels.cpu.binding")
    if binding.unavailable() is not None:
        pytest.skip(binding.unavailable())
    monkeypatch.setattr(binding, "OFFERS", binding.OFFERS._replace(cross=False, nearest=False))
    rows = random_rows(6, 3)
    with pytest.raises(ValueError, match="'cpu' has no kernel for rows against columns"):
        pair_energy(rows, rows, backend="cpu")
    with pytest.raises(ValueError, match="'cpu' has no kernel for the nearest rows"):
        comhe_ext.nearest(rows, backend="cpu")
    # where nobody asks for it, the portable backend serves
    numbers = torch.arange(6)
    energy = pair_energy(rows, rows, row_ids=numbers, column_ids=numbers)
    assert relative_error(energy, pair_energy(rows)) <= 1e-6
    assert torch.equal(comhe_ext.nearest(rows)[1], comhe_ext.nearest(rows, backend="torch")[1])


@pytest.mark.parametrize("half_space", [False, True])
def test_against_themselves_they_are_the_set(half_space, backend, device):
    rows = random_rows(50, 12, dtype=torch.float32, device=device)
    numbers, pair = torch.arange(50, device=device), Riesz(1.0, half_space=half_space)
    options = {"reduction": "sum", "backend": backend}
    twice = pair_energy(rows, rows, pair, row_ids=numbers, column_ids=numbers, **options)
    alone = pair_energy(rows, pair=pair, **options)
    # of antipodes one is left out by its id, the other has f of the diameter, 50 times twice
    antipodes = 2 * 50 * 0.5 if half_space else 0.0
    assert relative_error(twice + antipodes, alone) <= 1e-6


@pytest.mark.parametrize("eps", [0.0, 0.1])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_row_energies_of_a_set_add_up_to_its_energy(space, eps, backend, device):
    rows, pair = random_rows(60, 10, device=device), Riesz(2.0, **space)
    rows[7] = 0.0
    rows.requires_grad_()
    energies = pair_energy(rows, pair=pair, reduction="rows", eps=eps, backend=backend)
    total = pair_energy(rows, pair=pair, reduction="sum", eps=eps, backend=backend)
    factor = 0.5 if pair.half_space else 1.0  # both points of a row have the same sum
    assert energies.shape == (60,)
    assert relative_error(energies.sum(), factor * total) <= 1e-6
    (ours,) = torch.autograd.grad(energies.sum(), rows)
    (theirs,) = torch.autograd.grad(factor * total, rows)
    assert relative_error(ours, theirs) <= 5e-6


@pytest.mark.parametrize("space", SPACES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_derivatives_in_both_modes(reduction, space):
    rows = random_rows(4, 3, dtype=torch.float64).requires_grad_()
    columns = random_rows(5, 3, seed=1, dtype=torch.float64).requires_grad_()
    ids = {"row_ids": torch.tensor([0, 1, 2, 5]), "column_ids": torch.tensor([1, 1, 0, 9, -4])}

    def energy(rows, columns):
        pair = Riesz(1.5, **space)
        return pair_energy(rows, columns, pair, **ids, reduction=reduction, backend="torch")

    assert gradcheck(energy, (rows, columns), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(energy, (rows, columns), check_fwd_over_rev=True)


def test_derivatives_in_one_side_alone(backend, device):
    rows, columns = random_rows(9, 5, device=device), random_rows(8, 5, seed=1, device=device)
    both = [x.clone().requires_grad_() for x in (rows, columns)]
    expected = torch.autograd.grad(pair_energy(*both, backend=backend), both)
    for side in (0, 1):
        points = [rows, columns]
        points[side] = points[side].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(pair_energy(*points, backend=backend), points[side])
        assert torch.equal(gradient, expected[side])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_in_one_side_alone(reduction):
    points = [random_rows(n, 4, seed=n, dtype=torch.float64) for n in (5, 6)]
    tangent = torch.randn(5 if reduction == "rows" else (), dtype=torch.float64)

    def derivatives(one, other, side):
        sets = (one, other) if side == 0 else (other, one)
        energy = (pair_energy(*sets, reduction=reduction) * tangent).sum()
        (gradient,) = torch.autograd.grad(energy, one, create_graph=True)
        return gradient, *torch.autograd.grad(gradient.square().sum(), one)

    for side in (0, 1):
        one, other = points[side].clone().requires_grad_(), points[1 - side]
        expected = derivatives(one, other.clone().requires_grad_(), side)
        for x, y in zip(derivatives(one, other, side), expected, strict=True):
            assert torch.equal(x, y)


def test_second_derivatives_by_torch_func_and_by_torch_autograd_agree():
    rows = random_rows(4, 3, dtype=torch.float64)
    columns = random_rows(6, 3, seed=1, dtype=torch.float64)

    def loss(rows):
        return pair_energy(rows, columns, reduction="rows", backend="torch").log().sum()

    by_func = torch.func.hessian(loss)(rows)
    by_autograd = torch.autograd.functional.hessian(loss, rows)
    assert relative_error(by_func, by_autograd) <= 1e-12
    tangent = random_rows(4, 3, seed=2, dtype=torch.float64)
    product = torch.autograd.functional.hvp(loss, rows, tangent)[1]
    expected = torch.einsum("ijkl,kl->ij", by_func, tangent)
    assert relative_error(product, expected) <= 1e-12


def test_third_derivatives_raise():
    rows = random_rows(4, 3, dtype=torch.float64).requires_grad_()
    columns = random_rows(5, 3, seed=1, dtype=torch.float64)
    for reduction in REDUCTIONS:
        value = pair_energy(rows, columns, reduction=reduction, backend="torch").sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, rows, create_graph=True)
            value = gradient.square().sum()
        with pytest.raises(NotImplementedError, match="third derivatives"):
            torch.autograd.grad(value, rows)
    with pytest.raises(NotImplementedError, match="forward mode of forward mode"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: pair_energy(x, columns, reduction="rows")))(
            rows.detach()
        )


def test_batches_are_sets_of_their_own(backend, device):
    rows = random_rows(3 * 7, 5, device=device).view(3, 7, 5)
    columns = random_rows(3 * 4, 5, seed=1, device=device).view(3, 4, 5)
    ids = {
        "row_ids": torch.arange(7, device=device),
        "column_ids": torch.arange(12, device=device).view(3, 4),
    }
    for reduction in REDUCTIONS:
        together = pair_energy(rows, columns, **ids, reduction=reduction, backend=backend)
        for index in range(3):
            own = {"row_ids": ids["row_ids"], "column_ids": ids["column_ids"][index]}
            alone = pair_energy(
                rows[index], columns[index], **own, reduction=reduction, backend=backend
            )
            assert torch.equal(together[index], alone)
    by_vmap = torch.func.vmap(lambda x, y: pair_energy(x, y, backend=backend))(rows, columns)
    assert torch.equal(by_vmap, pair_energy(rows, columns, backend=backend))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_without_pairs_all_is_zero(shape, reduction, backend, device):
    points = [torch.ones(n, 4, device=device, requires_grad=True) for n in shape]
    energy = pair_energy(*points, reduction=reduction, backend=backend)
    assert torch.equal(energy, torch.zeros_like(energy))
    assert energy.shape == (shape[:1] if reduction == "rows" else ())
    for gradient in torch.autograd.grad(energy.sum(), points):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ids_that_leave_nothing(backend, device):
    rows = random_rows(5, 4, device=device).requires_grad_()
    same = torch.full((5,), 7, device=device)
    energy = pair_energy(rows, rows, row_ids=same, column_ids=same, backend=backend)
    (gradient,) = torch.autograd.grad(energy, rows)
    assert energy == 0
    assert not gradient.any()


def test_ids_may_be_any_integers(backend, device):
    rows = random_rows(6, 4, device=device)
    small = torch.tensor([0, 1, 0, 2, 1, 3], device=device)
    large = torch.tensor([-(2**62), 5, -(2**62), 2**62, 5, 2**33], device=device)
    energies = [
        pair_energy(rows, rows, row_ids=ids, column_ids=ids, backend=backend)
        for ids in (small, large, small.to(torch.uint8))
    ]
    assert energies[0] == energies[1] == energies[2]
    assert relative_error(energies[0], dense(rows, rows, Riesz(), met_of(small, small))) <= 1e-6


def test_near_rows_and_columns_are_exact(backend, device):
    rows = random_rows(30, 20, dtype=torch.float64)
    columns = rows + 1e-3 * random_rows(30, 20, seed=1, dtype=torch.float64)
    points = [x.float().to(device).requires_grad_() for x in (rows, columns)]
    exact = [x.detach().double().requires_grad_() for x in points]
    # cosines lose their digits in float64, too: the distance itself
    v, w = (torch.nn.functional.normalize(x) for x in exact)
    truth = ((v[:, None] - w).norm(dim=2) ** -2).mean()
    energy = pair_energy(*points, Riesz(2.0, min_distance=0.0), backend=backend)
    assert relative_error(energy, truth) <= 1e-5
    expected = torch.autograd.grad(truth, exact)
    for gradient, true in zip(torch.autograd.grad(energy, points), expected, strict=True):
        assert relative_error(gradient, true) <= 1e-5


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nan_comes_out(reduction, backend, device):
    rows, columns = random_rows(5, 4, device=device), random_rows(6, 4, seed=1, device=device)
    rows[2, 1] = torch.nan
    energy = pair_energy(rows, columns, reduction=reduction, backend=backend)
    if reduction == "rows":
        assert torch.equal(energy.isnan(), torch.arange(5, device=device) == 2)
    else:
        assert energy.isnan()
    columns[0] = torch.inf
    assert pair_energy(rows, columns, reduction=reduction, backend=backend).isnan().all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compile_full_graph(reduction, dynamic):
    ids = {"row_ids": torch.arange(8) % 3, "column_ids": torch.arange(9) % 4}

    def loss(rows, columns):
        return pair_energy(rows, columns, **ids, reduction=reduction).log().sum()

    points = [random_rows(8, 5).requires_grad_(), random_rows(9, 5, seed=1).requires_grad_()]
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    expected = torch.autograd.grad(loss(*points), points)
    for ours, theirs in zip(torch.autograd.grad(compiled(*points), points), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_changes_nothing():
    points = [random_rows(8, 5).requires_grad_(), random_rows(9, 5, seed=1).requires_grad_()]
    expected = pair_energy(*points)
    with torch.autocast("cpu"):
        energy = pair_energy(*points)
    assert energy.dtype == torch.float32
    assert torch.equal(energy, expected)


def test_dtypes_mix():
    rows, columns = random_rows(8, 5).half().requires_grad_(), random_rows(9, 5, seed=1).double()
    energy = pair_energy(rows, columns.requires_grad_())
    assert energy.dtype == torch.float64
    energy.backward()
    assert (rows.grad.dtype, columns.grad.dtype) == (torch.float16, torch.float64)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        ({"columns": torch.ones(3, 5)}, ValueError, "as wide rows"),
        ({"columns": torch.ones(2, 3, 4)}, ValueError, "as many sets"),
        ({"columns": [1.0]}, TypeError, "`columns` must be a torch.Tensor"),
        ({"row_ids": torch.arange(3)}, ValueError, "need `columns`"),
        ({"columns": torch.ones(2, 4), "row_ids": torch.arange(3)}, ValueError, "together"),
        (
            {
                "columns": torch.ones(2, 4),
                "row_ids": torch.arange(2),
                "column_ids": torch.arange(2),
            },
            ValueError,
            r"`row_ids` must have shape \(3,\)",
        ),
        (
            {"columns": torch.ones(2, 4), "row_ids": torch.ones(3), "column_ids": torch.arange(2)},
            TypeError,
            "`row_ids` must be integers",
        ),
        ({"reduction": "none"}, ValueError, "'mean' or 'sum' or 'rows'"),
        ({"pair": 2.0}, TypeError, "must be a pair function"),
    ],
)
def test_mistakes_are_told(more, error, message):
    with pytest.raises(error, match=message):
        pair_energy(torch.ones(3, 4), **more)


def test_row_energies_are_of_pair_energy_alone():
    with pytest.raises(ValueError, match="`reduction` must be 'mean' or 'sum'"):
        comhe_ext.hyperspherical_energy(torch.ones(3, 4), reduction="rows")
    arguments = Riesz().name, Riesz().parameters, "rows", 0.0, "torch"
    with pytest.raises(ValueError, match="`reduction`"):
        torch.ops.comhe_ext.sweep([torch.ones(1, 3, 4)], [None], False, *arguments)


def test_opcheck():
    points = random_rows(6, 4).view(1, 6, 4), random_rows(5, 4, seed=1).view(1, 5, 4)
    ids = (
        torch.arange(6, dtype=torch.int32).view(1, 6),
        torch.arange(5, dtype=torch.int32).view(1, 5),
    )
    weights = torch.ones(1, 6)
    arguments = Riesz().name, Riesz().parameters, "rows", 0.0, "torch"
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.comhe_ext.cross_sweep.default,
        (*points, *ids, weights, True, False, True, *arguments),
        test_utils=tests,
    )
    torch.library.opcheck(
        torch.ops.comhe_ext.cross_hessian_vector_product.default,
        (*points, *ids, weights, points[0], None, *arguments),
        test_utils=tests,
    )
