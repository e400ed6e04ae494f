"""Many weights of mixed shapes in one sweep: each as if it were alone, in few torch calls."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import comhe_ext
from comhe_ext.operators import energy as operator
from comhe_ext.operators.energy import energy
from comhe_ext.testing import options_of, random_rows, relative_error
from comhe_ext.testing.architectures import resnet50

# sets, rows, columns, matrices (0: none), whether the weight and the matrices are learned
WEIGHTS = [
    (1, 7, 6, 3, True, True),
    (2, 5, 9, 2, True, False),
    (1, 7, 6, 3, True, True),
    (1, 4, 4, 0, True, False),
    (1, 7, 6, 3, True, False),
    (1, 7, 6, 2, False, True),
    (2, 5, 9, 2, True, True),
    (1, 3, 2, 0, True, False),
    (1, 8, 6, 3, True, True),
    (2, 5, 9, 2, True, True),
]
K = 4


def made(dtype):
    weights, matrices = [], []
    for number, (sets, n, d, count, weight_learned, matrices_learned) in enumerate(WEIGHTS):
        rows = random_rows(sets * n, d, seed=number, dtype=dtype).view(sets, n, d)
        weights.append(rows.requires_grad_(weight_learned))
        if count == 0:
            matrices.append(None)
        else:
            draws = random_rows(count * K, d, seed=100 + number, dtype=dtype).view(count, K, d)
            matrices.append(draws.requires_grad_(matrices_learned))
    return weights, matrices


def learned(weights, matrices):
    return [x for x in (*weights, *matrices) if x is not None and x.requires_grad]


@pytest.fixture
def together(monkeypatch):
    """The way of a GPU, where weights share launches, on the tensors of a processor."""
    monkeypatch.setattr(operator, "ONE_BY_ONE_ON", ())


@pytest.fixture(params=["one by one", "together"])
def either_way(request):
    if request.param == "together":
        request.getfixturevalue("together")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_gradients_are_those_of_each_weight_alone(backend, summed, create_graph):
    options = options_of(backend=backend, half_space=True)
    weights, matrices = made(torch.float32)
    energies = energy(weights, matrices, options)
    shares = torch.ones_like(energies) if summed else torch.linspace(-1.0, 2.0, len(energies))
    total = energies.sum() if summed else (energies * shares).sum()
    tensors = learned(weights, matrices)
    gradients = torch.autograd.grad(total, tensors, create_graph=create_graph)
    assert [g.shape for g in gradients] == [x.shape for x in tensors]

    first, alone = 0, torch.zeros(())
    for weight, projection in zip(weights, matrices, strict=True):
        part = energy([weight], [projection], options)
        assert relative_error(energies[first : first + len(part)], part) <= 1e-6
        alone = alone + (part * shares[first : first + len(part)]).sum()
        first += len(part)
    for actual, expected in zip(gradients, torch.autograd.grad(alone, tensors), strict=True):
        assert relative_error(actual, expected) <= 3e-6


@pytest.mark.usefixtures("either_way")
def test_gradients_come_in_the_dtype_of_what_they_belong_to():
    weights, matrices = made(torch.bfloat16)
    energy(weights, matrices, options_of()).sum().backward()
    for x in learned(weights, matrices):
        assert x.grad.dtype == torch.bfloat16
        assert x.grad.shape == x.shape


# operators that launch nothing
VIEWS = {
    *("view", "unsqueeze", "transpose", "t", "slice", "select", "expand", "detach", "alias"),
    *("unbind", "split", "split_with_sizes", "_unsafe_view", "squeeze", "as_strided", "permute"),
    *("empty", "empty_like", "empty_strided", "new_empty", "is_same_size", "promote_types"),
}


class Counted(TorchDispatchMode):
    """Counts torch's operators, but for those that launch nothing."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.calls[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.usefixtures("together")
def test_a_step_of_a_resnet50_takes_few_launches():
    """Sixty small ones, in as many microseconds of a GPU, and each costs the host several."""
    model = resnet50()
    comhe = comhe_ext.CoMHE(model)
    with Counted() as counted:
        comhe().backward()
    assert counted.calls.pop("sweep") == 3
    assert counted.calls.total() <= 60, counted.calls
