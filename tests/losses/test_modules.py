"""The losses as modules: options kept and checked, copies, pickles, what they show."""

import copy
import inspect
import pickle
import re

import pytest
import torch

from comhe_ext import Gaussian, Riesz, losses
from comhe_ext.losses.modules import Loss
from comhe_ext.testing import random_rows

MODULES = [x for x in vars(losses).values() if inspect.isclass(x) and issubclass(x, Loss)]
every_module = pytest.mark.parametrize("module", MODULES, ids=lambda x: x.__name__)


def function_of(module):
    """Find the function by its name, independently of the module."""
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", module.__name__).lower()
    return getattr(losses, name.replace("ko_leo", "koleo").replace("sphere_face", "sphereface"))


def tensors_of(module):
    special = {"labels": torch.tensor([0, 3, 3, 1]), "pole": random_rows(1, 6, seed=4)[0]}
    parameters = inspect.signature(function_of(module)).parameters.values()
    names = [x.name for x in parameters if x.annotation is torch.Tensor]
    return [special.get(name, random_rows(4, 6, seed=len(name))) for name in names]


def test_every_loss_has_its_module():
    functions = {x for x in losses.__all__ if inspect.isfunction(getattr(losses, x))}
    assert {function_of(x).__name__ for x in MODULES} == functions
    assert {x.__name__ for x in MODULES} | functions == set(losses.__all__)


@every_module
def test_it_is_the_function(module):
    tensors = tensors_of(module)
    loss = module()
    assert torch.equal(loss(*tensors), function_of(module)(*tensors))
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert repr(loss) == f"{module.__name__}()"


@every_module
def test_it_shows_the_functions_options_and_text(module):
    function = function_of(module)
    ours, theirs = (inspect.signature(x).parameters for x in (module, function))
    options = {n: x.default for n, x in theirs.items() if x.annotation is not torch.Tensor}
    assert {n: x.default for n, x in ours.items()} == options
    assert all(x.kind is inspect.Parameter.KEYWORD_ONLY for x in ours.values())
    text = inspect.getdoc(module)
    assert text.startswith(f"Compute `comhe_ext.losses.{function.__name__}` as a module.")
    assert inspect.getdoc(function) in text


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (losses.Uniformity, {"t": 3.0, "backend": "torch"}),
        (losses.KCL, {"pair": Riesz(1.0), "gamma": 4.0}),
        (losses.KCL, {"pair": Gaussian(2.0, angular=True)}),
        (losses.Separation, {"half_space": True}),
        (losses.Covering, {"gamma": 5.0, "half_space": True}),
    ],
)
def test_options_are_kept(module, options):
    tensors = tensors_of(module)
    loss = module(**options)
    expected = function_of(module)(*tensors, **options)
    assert not torch.equal(expected, module()(*tensors))
    for same in (loss, copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), loss.half().eval()):
        assert torch.equal(same(*tensors), expected)
        shown = ", ".join(f"{name}={value!r}" for name, value in options.items())
        assert repr(same) == f"{module.__name__}({shown})"
    parent = torch.nn.ModuleDict({"loss": loss})
    assert torch.equal(parent["loss"](*tensors), expected)


@pytest.mark.parametrize(
    ("module", "options", "error", "message"),
    [
        (losses.Uniformity, {"tau": 2.0}, TypeError, "Uniformity has no option 'tau'"),
        (losses.Uniformity, {"x": torch.ones(3, 2)}, TypeError, "has no option 'x'"),
        (losses.Gram, {"backend": "torch"}, TypeError, "Gram has no option 'backend'"),
        (losses.Uniformity, {"t": 0.0}, ValueError, "`t` must be finite and greater than 0"),
        (losses.Uniformity, {"backend": "gpu"}, ValueError, "`backend` must be one of"),
        (losses.Dispersion, {"tau": "1"}, TypeError, "`tau` must be a number"),
        (losses.KoLeo, {"eps": -1.0}, ValueError, "`eps` must be finite and at least 0"),
        (losses.MinimalAngle, {"half_space": 1}, TypeError, "`half_space` must be a bool"),
        (losses.Separation, {"half_space": 1}, TypeError, "`half_space` must be a bool"),
        (losses.SphereFacePlus, {"s": "2"}, TypeError, "`s` must be a number"),
        (losses.Polarization, {"s": None}, TypeError, "`s` must be a number"),
        (losses.Covering, {"gamma": -1.0}, ValueError, "`gamma` must be finite and greater"),
        (losses.DHEL, {"tau": 0.0}, ValueError, "`tau` must be finite and greater"),
        (losses.KCL, {"pair": 2.0}, TypeError, "`pair` must be a pair function"),
        (losses.KCL, {"pair": Gaussian(half_space=True)}, ValueError, "full space"),
        (losses.AngularVisualHardness, {"backend": "no"}, ValueError, "`backend` must be one of"),
    ],
)
def test_a_wrong_option_is_told_when_the_module_is_made(module, options, error, message):
    with pytest.raises(error, match=message):
        module(**options)


@every_module
def test_it_is_made_wherever_tensors_are_made(module):
    # whatever tensors are made by default, the options alone are checked
    with torch.device("meta"):
        loss = module()
    tensors = tensors_of(module)
    assert torch.equal(loss(*tensors), module()(*tensors))


def test_a_backend_need_not_be_here_when_the_module_is_made():
    # as in a script that is read on another machine than it runs on
    assert losses.Uniformity(backend="triton").options == {"backend": "triton"}


def test_a_subclass_keeps_the_function():
    class Twice(losses.Uniformity):
        def forward(self, *tensors):
            return 2 * super().forward(*tensors)

    rows = random_rows(5, 3)
    assert torch.equal(Twice(t=1.0)(rows), 2 * losses.uniformity(rows, t=1.0))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script. is deprecated")
def test_compile_full_graph():
    loss, rows = losses.Uniformity(t=1.0, backend="torch"), random_rows(9, 4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rows), loss(rows))
