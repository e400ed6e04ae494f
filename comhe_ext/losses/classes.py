"""Losses of the weights of classes: against some of them, a pole, or features."""

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.functional import pair_energy
from comhe_ext.kernels.pair_functions import Gaussian, Riesz
from comhe_ext.losses.common import as_row, check_labels, check_matrix, positive
from comhe_ext.operators.distance import distance_to
from comhe_ext.settings import BackendName


def sphereface_plus(
    weight: Tensor, labels: Tensor, s: float = 2.0, *, backend: BackendName | None = None
) -> Tensor:
    """Compute the energy between the classes of a batch and all other classes.

    Torch equivalent::

        r = torch.cdist(normalize(weight)[labels], normalize(weight))
        loss = (r**-s)[labels[:, None] != torch.arange(len(weight))].mean()

    Args:
        weight: [N, d], the weights of N classes.
        labels: integers [m], the class of each element of the batch; a class may come repeatedly.
        s: exponent of the energy, see `comhe_ext.hyperspherical_energy`.
        backend: see `comhe_ext.pair_energy`.

    Returns:
        [], float32 (float64 for float64 weights); O((m + N) d) memory.

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.
        IndexError: a label is not from 0 to N - 1.

    Source: Liu et al. (2018), MHE, section 3.5: SphereFace+.
    """
    check_matrix("weight", weight)
    check_labels(labels, weight)
    numbers = torch.arange(weight.shape[0], device=weight.device)
    rows = weight.index_select(0, labels)
    return pair_energy(
        rows, weight, Riesz(s=s), row_ids=labels, column_ids=numbers, backend=backend
    )


def polarization(
    weight: Tensor,
    pole: Tensor,
    s: float = 2.0,
    *,
    half_space: bool = False,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute the mean potential of rows at a pole, which the pole lowers and the rows raise.

    Torch equivalent::

        r = (normalize(weight) - normalize(pole)).norm(dim=1)
        loss = (r**-s).mean()

    Args:
        weight: [N, d].
        pole: [d], a point that learns to lie where the rows do not.
        s: exponent of the potential.
        half_space: take the mean over the rows and their antipodes, as for hidden layers.
        backend: see `comhe_ext.pair_energy`.

    Returns:
        [], float32 (float64 if a tensor is).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.

    Source: Liu et al. (2021), MHP: the pole minimizes what the weights maximize. In their code a
    step of the weights comes after ten of the pole, with weight 1 for hidden layers, 10 for the
    output layer.
    """
    check_matrix("weight", weight)
    pair = Riesz(s=s, half_space=half_space)
    return pair_energy(weight, as_row("pole", pole), pair, backend=backend)


def covering(
    weight: Tensor,
    pole: Tensor,
    gamma: float = 10.0,
    *,
    half_space: bool = False,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute the soft least squared distance of rows to a pole, which the pole raises.

    Torch equivalent::

        r2 = (normalize(weight) - normalize(pole)).square().sum(1)
        loss = -(-gamma * r2).exp().mean().log() / gamma

    Args:
        weight: [N, d].
        pole: [d], a point that learns to lie far from all rows.
        gamma: how sharp the minimum is, greater than 0; up to 20 nothing underflows in float32.
        half_space: take the mean over the rows and their antipodes, as for hidden layers.
        backend: see `comhe_ext.pair_energy`.

    Returns, raises: see `polarization`.

    Source: Liu et al. (2021), MHC: the pole maximizes what the weights minimize, with gamma = 10.
    In their code a step of the weights comes after ten of the pole, with weight 0.01 for hidden
    layers, 0.1 for the output layer.
    """
    check_matrix("weight", weight)
    gamma = positive("gamma", gamma)
    pair = Gaussian(tau=gamma, half_space=half_space)
    energy = pair_energy(weight, as_row("pole", pole), pair, backend=backend)
    return -energy.log() / gamma if weight.shape[0] > 0 else energy


def angular_visual_hardness(
    features: Tensor, weight: Tensor, labels: Tensor, *, backend: BackendName | None = None
) -> Tensor:
    """Compute how hard each sample is: its angle to its class over the sum of those to all classes.

    Torch equivalent::

        angle = torch.arccos(normalize(features) @ normalize(weight).T)
        hardness = angle.gather(1, labels[:, None]).squeeze(1) / angle.sum(1)

    Args:
        features: [B, d].
        weight: [N, d], the weights of N classes.
        labels: integers [B] from 0 to N - 1.
        backend: see `comhe_ext.pair_energy`.

    Returns:
        [B], float32 (float64 if a tensor is).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.
        IndexError: a label is not from 0 to N - 1.

    Source: Chen et al. (2020), Angular Visual Hardness, definition 1.
    """
    check_matrix("features", features)
    check_matrix("weight", weight)
    check_labels(labels, weight, features)
    by_angle = Riesz(s=-1.0, min_distance=0.0, angular=True)  # minus the angle
    total = -pair_energy(features, weight, by_angle, reduction="rows", backend=backend)
    numbers = torch.arange(features.shape[0], device=features.device)
    sets = features.unsqueeze(0), weight.index_select(0, labels).unsqueeze(0)
    own = distance_to(*sets, numbers.unsqueeze(0), False, True, 0.0, backend or backends.AUTO)
    return own.squeeze(0) / total
