"""The keywords of an energy, where they are handed on without being named."""

import inspect

import pytest
import torch

import comhe_ext
from comhe_ext import CoMHE, Gaussian, Riesz
from comhe_ext.init import minimum_energy_

HANDED_ON = ("angular", "eps", "min_distance", "backend")
OPTIONS = {"s": 1.0, "angular": True, "eps": 1e-2, "min_distance": 0.5, "backend": "torch"}


def energy_regularizer(**options):
    module = pytest.importorskip("comhe_ext.integrations.metric_learning")
    return module.EnergyRegularizer(**options)


def fronts():
    module = pytest.importorskip("comhe_ext.integrations.metric_learning")
    return CoMHE, minimum_energy_, module.EnergyRegularizer


def test_signatures_show_them_with_the_defaults_of_the_energy():
    energy = inspect.signature(comhe_ext.hyperspherical_energy).parameters
    for front in fronts():
        parameters = inspect.signature(front).parameters
        assert "options" not in parameters
        for name in HANDED_ON:
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert parameters[name].default == energy[name].default


def test_they_reach_the_energy():
    regularizer = CoMHE(torch.nn.Linear(9, 8), output_layer=None, **OPTIONS)
    for settings, half_space in (
        (regularizer._settings, True),
        (energy_regularizer(**OPTIONS).settings, False),
    ):
        assert settings.pair == Riesz(1.0, min_distance=0.5, angular=True, half_space=half_space)
        assert (settings.reduction, settings.eps, settings.backend) == ("mean", 1e-2, "torch")


def test_any_pair_function_takes_their_place():
    for half_space in (False, True):
        pair = Gaussian(3.0, angular=True)
        regularizer = CoMHE(torch.nn.Linear(9, 8), output_layer=None, pair=pair, eps=1e-2)
        assert regularizer._settings.pair == Gaussian(3.0, angular=True, half_space=True)
        settings = energy_regularizer(half_space=half_space, pair=pair).settings
        assert settings.pair == Gaussian(3.0, angular=True, half_space=half_space)
        own = energy_regularizer(pair=Gaussian(3.0, half_space=half_space)).settings
        assert own.pair.half_space is half_space


def test_a_regularizer_of_any_pair_function_is_its_energy():
    layer = torch.nn.Linear(9, 8)
    energy = CoMHE(layer, None, output_layer=None, half_space=False, pair=Riesz(2.0, shift=1.0))()
    expected = comhe_ext.pair_energy(layer.weight, pair=Riesz(2.0, shift=1.0))
    torch.testing.assert_close(energy, expected)


@pytest.mark.parametrize("more", [{"s": 1.0}, {"angular": True}, {"min_distance": 0.1}])
def test_a_pair_function_and_what_it_replaces_exclude_each_other(more):
    with pytest.raises(ValueError, match=f"`pair` takes the place of `{next(iter(more))}`"):
        CoMHE(torch.nn.Linear(9, 8), output_layer=None, pair=Gaussian(1.0), **more)
    with pytest.raises(TypeError, match="`pair` must be a pair function"):
        CoMHE(torch.nn.Linear(9, 8), output_layer=None, pair="gaussian")


def test_those_of_the_base_class_reach_it():
    assert energy_regularizer(collect_stats=True, angular=True).collect_stats


@pytest.mark.parametrize("name", ["reduction", "angulr"])
def test_others_are_refused(name):
    for call in (
        lambda **options: CoMHE(torch.nn.Linear(9, 8), **options),
        lambda **options: minimum_energy_(torch.ones(3, 2), **options),
    ):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
            call(**{name: "sum"})
