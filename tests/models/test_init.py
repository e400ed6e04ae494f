"""The initializer of least energy: known optima, what it keeps, when it stops."""

import math

import pytest
import torch
from torch import nn

import comhe_ext
from comhe_ext import bounds
from comhe_ext.init import directions, minimum_energy_, minimum_energy_model_
from comhe_ext.kernels.pair_functions import Riesz
from comhe_ext.testing import random_rows, relative_error


def generator(seed=1):
    return torch.Generator().manual_seed(seed)


def excess(weight, **options):
    """What is left of the distance from random directions to the lower bound."""
    n, d = weight.shape
    random = bounds.random_energy(n, d, Riesz(min_distance=0.0, **options))
    lowest = bounds.lowest_energy(n, d, Riesz(**options), dead=0)
    energy = float(comhe_ext.hyperspherical_energy(weight.detach().double(), **options))
    return (energy - lowest) / (random - lowest)


def test_unprojected_rows_reach_the_simplex_and_the_orthogonal_rows():
    weight = minimum_energy_(random_rows(12, 30), half_space=False)
    assert excess(weight) < 1e-3
    cosines = nn.functional.normalize(weight) @ nn.functional.normalize(weight).T
    off_diagonal = cosines[~torch.eye(12, dtype=torch.bool)]
    assert bool((off_diagonal + 1 / 11).abs().max() < 1e-2)
    assert excess(minimum_energy_(random_rows(12, 30)), half_space=True) < 1e-3


@pytest.mark.parametrize(
    ("n", "best"), [(4, 3.674234614), (6, 9.985281374), (12, 49.165253058), (32, 412.261274651)]
)
def test_few_dimensions_reach_the_least_energy_known(n, best):
    # Thomson's electrons (Wales and Ulker, 2006); several starts, for there are other minima
    energies = []
    for seed in range(5):
        weight = torch.randn(n, 3, generator=generator(seed), dtype=torch.float64)
        options = dict(s=1.0, half_space=False)
        minimum_energy_(weight, **options, min_distance=0.0, tolerance=0.0)
        energies.append(comhe_ext.hyperspherical_energy(weight, 1.0, reduction="sum") / 2)
    assert float(min(energies)) == pytest.approx(best, rel=1e-8)


@pytest.mark.parametrize("dim", [2, 3])
def test_neighbours_in_few_dimensions_end_apart(dim):
    weight = random_rows(24, dim)
    weight[1] = weight[0] + 1e-4 * weight[2]  # so close that a step of any fixed size throws it
    minimum_energy_(weight)
    angles, _ = comhe_ext.nearest(weight, half_space=True, angular=True)
    # in the plane they end at equal angles; on the sphere no two are far closer than the others
    bound = math.pi / 24 * (1 - 1e-3) if dim == 2 else 0.8 * float(angles.mean())
    assert float(angles.min()) >= bound


def test_directions_of_the_plane_and_of_the_icosahedron():
    plane = directions(7, 2, generator=generator(), dtype=torch.float64)
    angles = torch.atan2(plane[:, 1], plane[:, 0]).remainder(math.pi).sort().values
    assert torch.allclose(angles.diff(), torch.full((6,), math.pi / 7).double(), atol=1e-5)
    # the six axes of the icosahedron meet at cos = 1/sqrt(5)
    axes = directions(6, 3, generator=generator(), dtype=torch.float64)
    cosines = (axes @ axes.T).abs()[~torch.eye(6, dtype=torch.bool)]
    assert torch.allclose(cosines, torch.full((30,), 5**-0.5).double(), atol=1e-5)


def test_an_average_over_directions_is_unbiased_and_varies_less():
    def squares(rows):  # of a random line; its mean over the sphere is |a|^2 / 3
        return (rows.double() @ torch.tensor([1.0, 2.0, -2.0]).double()).square().mean()

    draws = generator()
    ours = torch.stack([squares(directions(9, 3, generator=draws)) for _ in range(49)])
    independent = torch.stack(
        [squares(nn.functional.normalize(torch.randn(9, 3, generator=draws))) for _ in range(49)]
    )
    assert abs(float(ours.mean()) - 3.0) <= 4 * float(ours.std()) / 7
    assert float(ours.std()) < 0.2 * float(independent.std())


def test_directions_are_drawn_by_the_generator():
    first, again, other = (directions(5, 4, generator=generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    half = directions(5, 4, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    assert directions(3, 1).abs().tolist() == [[1.0]] * 3
    assert directions(1, 6).norm() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="`dim` must be at least 1"):
        directions(3, 0)
    with pytest.raises(TypeError, match="floating-point"):
        directions(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(("n", "d"), [(64, 64), (100, 50), (40, 120)])
def test_projected_rows_come_near_the_bound(n, d):
    weight = random_rows(n, d)
    assert excess(weight, half_space=True) > 0.9
    minimum_energy_(weight, steps=200, generator=generator())
    assert excess(weight, half_space=True) < 0.06


def test_lengths_and_dead_rows_stay():
    weight = random_rows(30, 60)
    weight[4] = 0
    lengths = weight.norm(dim=1)
    assert minimum_energy_(weight, steps=5, generator=generator()) is weight
    assert relative_error(weight.norm(dim=1), lengths) <= 1e-6
    assert not weight[4].any()


def magnitude_and_directions(weight):
    """Lengths as a factor and a rest that no square of can overflow, and unit rows, in float64."""
    rows = weight.detach().double()
    largest = rows.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rest = (rows / largest).norm(dim=1, keepdim=True)
    return largest, rest, rows / largest / rest.clamp_min(1.0)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, x) for x in (1e-3, 1.0, 1e4)]
    + [(torch.bfloat16, x) for x in (1e-37, 1e-19, 1e19, 1e37)]
    + [(torch.float32, x) for x in (1e-37, 1e-30, 1e-22, 1e19, 1e30, 5e37)]
    + [(torch.float64, x) for x in (1e-300, 1e-38, 1e38, 1e300)],
)
@pytest.mark.parametrize("width", [12, 60])
def test_rows_of_any_length(dtype, scale, width):
    weight = (random_rows(30, width, dtype=torch.float64) * scale).to(dtype)
    weight[4] = 0
    weight[5] /= 16  # rows of one weight may differ
    largest, rest, directions = magnitude_and_directions(weight)
    before = comhe_ext.hyperspherical_energy(directions, half_space=True)
    random = bounds.random_energy(30, width, Riesz(2.0, min_distance=0.0, half_space=True))
    minimum_energy_(weight, steps=100, generator=generator())
    assert weight.isfinite().all()
    assert not weight[4].any()
    new_largest, new_rest, directions = magnitude_and_directions(weight)
    after = comhe_ext.hyperspherical_energy(directions, half_space=True)
    lowest = bounds.lowest_energy(30, width, Riesz(half_space=True), dead=1)
    assert after - lowest < 0.3 * (min(float(before), random) - lowest)
    lengths = (new_largest / largest) * new_rest
    assert float((lengths - rest).abs().max()) <= 8 * torch.finfo(dtype).eps * float(rest.max())


def test_a_dead_row_does_not_change_what_the_others_do():
    weight = random_rows(20, 12)
    weight[3] = 0
    minimum_energy_(weight, half_space=False, steps=500)
    others = torch.cat([weight[:3], weight[4:]])
    # 19 rows in 12 dimensions have many minima, all of them near the simplex bound
    alone = minimum_energy_(torch.cat([random_rows(20, 12)[:3], random_rows(20, 12)[4:]]),
                            half_space=False, steps=500)  # fmt: skip
    assert excess(others) < excess(alone) + 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_row_that_is_not_finite_is_named_and_nothing_is_changed(bad, dtype):
    weight = random_rows(9, 5, dtype=dtype)
    weight[7, 2] = bad
    before = weight.clone()
    with pytest.raises(ValueError, match="`weight` must be finite, got NaN or infinity in row 7"):
        minimum_energy_(weight, steps=3)
    assert torch.equal(weight.nan_to_num(), before.nan_to_num())
    net = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 9), nn.Conv2d(4, 8, 3, groups=2))
    net[2].weight.data[5, 1, 1, 1] = bad  # of the second group
    parameters = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"`2\.weight` must be finite, .* row 5$"):
        minimum_energy_model_(net, steps=3)
    for one, other in zip(net.parameters(), parameters, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_ends_it_leaves_everything_unchanged(error, monkeypatch):
    net = nn.Sequential(
        nn.Linear(6, 9), nn.utils.parametrizations.weight_norm(nn.Linear(9, 7)), nn.Linear(7, 5)
    )
    before = [p.detach().clone() for p in net.parameters()]

    def unchanged():
        return all(map(torch.equal, net.parameters(), before))

    def end_at(owner, name, call):
        function, calls = getattr(owner, name), []

        def ending(*args, **options):
            calls.append(None)
            if len(calls) == call:
                raise error
            return function(*args, **options)

        monkeypatch.setattr(owner, name, ending)

    with monkeypatch.context():
        end_at(comhe_ext.init, "total_energy", 7)  # during the steps of the second layer
        with pytest.raises(error):
            minimum_energy_model_(net, steps=5)
        assert unchanged()
        monkeypatch.undo()
        end_at(comhe_ext.init, "total_energy", 3)
        with pytest.raises(error):
            minimum_energy_(net[0].weight, steps=5)
        assert unchanged()
        monkeypatch.undo()
        end_at(comhe_ext.layers.Layer, "assign", 3)  # two layers are written by then
        with pytest.raises(error):
            minimum_energy_model_(net, steps=5)
        assert unchanged()


@pytest.mark.parametrize("shape", [(5, 1), (5, 1, 1)])
def test_rows_of_one_column_have_nowhere_to_turn(shape):
    weight = torch.randn(shape)
    before = weight.clone()
    with pytest.warns(UserWarning, match="`weight` has one column: .* left as they are"):
        assert minimum_energy_(weight, steps=3) is weight
    assert torch.equal(weight, before)
    net = nn.Sequential(nn.Linear(1, 9), nn.Linear(9, 5), nn.Conv1d(4, 8, 1, groups=4))
    parameters = [p.detach().clone() for p in net.parameters()]
    with pytest.warns(UserWarning, match="^layer '.' is left as it is") as warned:
        minimum_energy_model_(net, steps=3)
    assert [str(w.message).partition(" is left ")[0] for w in warned] == ["layer '0'", "layer '2'"]
    changed = [not torch.equal(a, b) for a, b in zip(net.parameters(), parameters, strict=True)]
    assert changed == [False, False, True, False, False, False]


def test_weights_of_every_storage():
    expected = minimum_energy_(random_rows(12, 30), steps=9)
    assert torch.equal(minimum_energy_(random_rows(12, 30).T.contiguous().T, steps=9), expected)
    every_other = torch.zeros(12, 60)[:, ::2].copy_(random_rows(12, 30))
    assert torch.equal(minimum_energy_(every_other, steps=9), expected)
    filters = random_rows(12, 30).view(12, 5, 2, 3).to(memory_format=torch.channels_last)
    assert torch.equal(minimum_energy_(filters, steps=9), expected.view(12, 5, 2, 3))
    parameter = nn.Parameter(random_rows(12, 30))
    assert torch.equal(minimum_energy_(parameter, steps=9), expected)
    assert parameter.is_leaf
    with torch.inference_mode():
        inferred = random_rows(12, 30)
        assert torch.equal(minimum_energy_(random_rows(12, 30), steps=9), expected)
        plain = nn.Parameter(random_rows(12, 30))
        assert torch.equal(minimum_energy_(plain, steps=9), expected)
        net = nn.Linear(30, 12)
    assert inferred.is_inference()
    assert torch.equal(minimum_energy_(inferred, steps=9), expected)
    before = net.weight.clone()
    minimum_energy_model_(net, steps=9)
    assert net.weight.is_inference()
    assert not torch.equal(net.weight, before)

    one = random_rows(1, 30)
    with pytest.raises(RuntimeError, match="`weight` must not be expanded"):
        minimum_energy_(one.expand(12, 30), steps=9)
    assert torch.equal(one, random_rows(1, 30))
    assert minimum_energy_(torch.empty(0, 5)).shape == (0, 5)
    alone = random_rows(1, 5)
    assert relative_error(minimum_energy_(alone.clone(), steps=3), alone) <= 1e-6


def test_what_leaves_no_room_is_not_written():
    weight = torch.full((3, 40), 60000.0, dtype=torch.float16)
    weight[1, ::2], weight[2, ::3] = -60000.0, -60000.0
    before = weight.clone()
    with pytest.raises(ValueError, match=r"must leave room in torch\.float16 to turn, got .* 6e"):
        minimum_energy_(weight, half_space=False, steps=200, lr=5.0)
    assert torch.equal(weight, before)
    close = random_rows(4, 5)
    close[1] = close[0] + 1e-3
    before = close.clone()
    with pytest.raises(ValueError, match="overflows: use a smaller `s` or `lr`"):
        minimum_energy_(close, s=14.0, half_space=False, steps=3)
    assert torch.equal(close, before)


def test_a_generator_decides():
    first, second, third = (random_rows(30, 60) for _ in range(3))
    minimum_energy_(first, steps=5, generator=generator())
    minimum_energy_(second, steps=5, generator=generator())
    minimum_energy_(third, steps=5, generator=generator(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_stops_on_a_plateau():
    calls = []

    def count(weight, **options):
        drawn = generator()
        minimum_energy_(weight, generator=drawn, num_projections=1, **options)
        calls.append(drawn.get_state())
        return weight

    # at its optimum from the start: the energy does not fall, so two windows are enough
    optimum = nn.init.orthogonal_(torch.empty(50, 50), generator=generator())
    count(optimum.clone(), steps=300, patience=20)
    count(optimum.clone(), steps=40, patience=20, tolerance=0.0)
    assert torch.equal(*calls)
    # without tolerance all steps are made
    calls.clear()
    weight = random_rows(50, 50)
    count(weight.clone(), steps=60, patience=20, tolerance=0.0)
    drawn = generator()
    for _ in range(60):
        comhe_ext.random_projection(1, 40, 50, generator=drawn)
    assert torch.equal(calls[0], drawn.get_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes_and_shapes(dtype):
    weight = random_rows(20, 54, dtype=dtype).view(20, 6, 3, 3)
    before = float(comhe_ext.hyperspherical_energy(weight.flatten(1), half_space=True))
    minimum_energy_(weight, steps=50, generator=generator())
    assert weight.dtype == dtype
    assert float(comhe_ext.hyperspherical_energy(weight.flatten(1), half_space=True)) < before


def test_parameters_stay_leaves():
    layer = nn.Linear(60, 30)
    minimum_energy_(layer.weight, steps=3)
    assert layer.weight.is_leaf
    assert layer.weight.requires_grad
    assert layer.weight.grad is None


def test_every_layer_of_a_model():
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(4, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 12, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(60, 30)),
        nn.Linear(30, 5),
    )
    head = net[3].weight.detach().clone()
    before = comhe_ext.CoMHE(net, output_layer=None).energies()
    norms = net[2].parametrizations.weight.original0.detach().clone()
    assert minimum_energy_model_(net, exclude=["3"], steps=60, generator=generator()) is net
    after = comhe_ext.CoMHE(net, output_layer=None).energies()
    assert torch.equal(net[3].weight, head)
    for name in ("0", "1", "2"):
        assert after[name].energy < before[name].energy
    assert relative_error(net[2].parametrizations.weight.original0, norms) <= 1e-6


def test_progress_bar(capsys):
    minimum_energy_(random_rows(5, 3), steps=3, progress=True)
    assert "minimum_energy_: 100%" in capsys.readouterr().err
    minimum_energy_model_(nn.Sequential(nn.Linear(4, 5)), steps=3, progress=True)
    assert "0: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "`steps` must be at least 1, got 0", dict(steps=0)),
        (ValueError, "`num_projections` must be at least 1", dict(num_projections=0)),
        (ValueError, "`patience` must be at least 1", dict(patience=0)),
        (ValueError, "`lr` must be at least 0, got -1", dict(lr=-1)),
        (TypeError, "`tolerance` must be a number", dict(tolerance=None)),
        (ValueError, "`s` must be finite", dict(s=-2.0)),
        (ValueError, "`backend` must be one of", dict(backend="numpy")),
    ],
)
def test_messages(error, message, options):
    weight = random_rows(5, 4)
    before = weight.clone()
    with pytest.raises(error, match=message):
        minimum_energy_(weight, **options)
    net = nn.Linear(4, 5)
    with pytest.raises(error, match=message):
        minimum_energy_model_(net, **options)
    assert torch.equal(weight, before)


def test_what_is_not_a_weight():
    with pytest.raises(ValueError, match=r"`weight` must have at least one column, got .*\(5, 0\)"):
        minimum_energy_(torch.empty(5, 0))
    with pytest.raises(ValueError, match=r"at least one column, got shape \(5, 3, 0\)"):
        minimum_energy_(torch.empty(5, 3, 0))
    with pytest.raises(TypeError, match="`weight` must hold numbers, got a meta tensor"):
        minimum_energy_(torch.empty(5, 3, device="meta"))
    with torch.device("meta"):
        net = nn.Linear(5, 3)
    with pytest.raises(TypeError, match="`weight` must hold numbers, got a meta tensor"):
        minimum_energy_model_(net)
    for option in ("lr", "momentum", "tolerance"):
        for number in (float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"`{option}` must be"):
                minimum_energy_(random_rows(5, 4), **{option: number})
    with pytest.raises(ValueError, match="at least 2-D"):
        minimum_energy_(torch.ones(3))
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor"):
        minimum_energy_([1.0])
