"""Exact hyperspherical energy of sets of vectors and its gradient, without N x N matrices."""

__version__ = "0.1.0"

from importlib.util import find_spec

if find_spec("comhe_ext.kernels") is None:
    raise ImportError(
        "comhe_ext.kernels is missing: a checkout has to be installed, with `pip install -e .`"
    )

from comhe_ext import distributed, init, losses, projections, sampled
from comhe_ext.functional import (
    angle_preserving_loss,
    compressive_energy,
    group_energy,
    hyperspherical_energy,
    nearest,
    pair_energy,
)
from comhe_ext.kernels.pair_functions import Gaussian, Laplace, Riesz
from comhe_ext.projections import random_projection
from comhe_ext.regularizer import CoMHE

__all__ = [
    "CoMHE",
    "Gaussian",
    "Laplace",
    "Riesz",
    "angle_preserving_loss",
    "compressive_energy",
    "distributed",
    "group_energy",
    "hyperspherical_energy",
    "init",
    "losses",
    "nearest",
    "pair_energy",
    "projections",
    "random_projection",
    "sampled",
]
