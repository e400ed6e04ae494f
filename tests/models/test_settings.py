"""The keywords of an energy, where they are handed on without being named."""

import inspect

import pytest
import torch

import comhe_ext
from comhe_ext import CoMHE, Riesz
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
