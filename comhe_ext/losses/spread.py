"""Losses of how rows spread: logarithms of mean potentials, and what follows from sums alone."""

import math

import torch
from torch import Tensor

from comhe_ext.checks import check_weight
from comhe_ext.functional import pair_energy
from comhe_ext.kernels.pair_functions import Gaussian, Laplace, PairFunction
from comhe_ext.losses.common import nothing, positive
from comhe_ext.operators.library import product
from comhe_ext.operators.rows import unit_rows
from comhe_ext.settings import BackendName


def uniformity(x: Tensor, t: float = 2.0, *, backend: BackendName | None = None) -> Tensor:
    """Compute how unevenly rows cover the sphere: the logarithm of the mean Gaussian potential.

    Torch equivalent::

        r2 = torch.nn.functional.pdist(torch.nn.functional.normalize(x)).square()
        loss = (-t * r2).exp().mean().log()

    Args:
        x: [N, d] or [B, N, d]; see `comhe_ext.hyperspherical_energy`.
        t: rate of the Gaussian, greater than 0.
        backend: see `comhe_ext.hyperspherical_energy`.

    Returns:
        [] or [B], float32 (float64 for float64 rows).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.hyperspherical_energy`.

    Source: Wang and Isola (2020), equation 4, with t = 2.
    """
    return _log_of_mean(x, Gaussian(tau=positive("t", t)), backend)


def dispersion(x: Tensor, tau: float = 0.5, *, backend: BackendName | None = None) -> Tensor:
    """Compute the logarithm of the mean Laplace potential of the angles between rows.

    Torch equivalent::

        angle = torch.arccos(normalize(x) @ normalize(x).T)[off_diagonal]
        loss = (-angle / (torch.pi * tau)).exp().mean().log()

    Args:
        x: [N, d] or [B, N, d], as the tokens of B sequences.
        tau: temperature of the angle in units of pi, greater than 0.
        backend: see `comhe_ext.hyperspherical_energy`.

    Returns, raises: see `uniformity`.

    Source: the angular spread of LM-Dispersion (KrishnaswamyLab), with tau = 0.5.
    """
    tau = positive("tau", tau)
    return _log_of_mean(x, Laplace(tau=1.0 / (math.pi * tau), angular=True), backend)


def _log_of_mean(x: Tensor, pair: PairFunction, backend: BackendName | None) -> Tensor:
    energy = pair_energy(x, pair=pair, backend=backend)
    return energy.log() if x.shape[-2] > 1 else nothing(x)


# --- closed forms: no pair is visited -------------------------------------------------------------


def frame_potential(w: Tensor) -> Tensor:
    """Compute the mean squared cosine of two rows.

    Torch equivalent::

        cosine = normalize(w) @ normalize(w).T
        loss = cosine[off_diagonal].square().mean()

    from the d x d matrix of second moments, or the N x N one where that is smaller.

    Args:
        w: [N, d] or [B, N, d].

    Returns:
        [] or [B], float32 (float64 for float64 rows).

    Raises:
        TypeError, ValueError: see `comhe_ext.hyperspherical_energy`.

    Source: Benedetto and Fickus (2003). It is the global orthogonal regularization of
    EmbeddingGemma, and up to a factor soft orthogonality and that of VQ codebooks.
    """
    check_weight(w, "w")
    n, d = w.shape[-2:]
    v = unit_rows(w)
    if n < 2:
        return nothing(w)
    if n <= d:
        gram = product(v, v.mT)
        off_diagonal = ~torch.eye(n, dtype=torch.bool, device=w.device)
        total = (gram.square() * off_diagonal).sum((-2, -1))
        return total / (n * (n - 1))
    # |V^T V|^2 of a tight frame is m^2 / d, where m rows are not dead: only what is above it is
    # summed, so that nothing cancels
    alive = v.detach().any(-1).sum(-1)
    moments = product(v.mT, v)
    even = (alive / d)[..., None, None] * torch.eye(d, dtype=v.dtype, device=w.device)
    excess = (moments - even).square().sum((-2, -1))
    return (excess + (alive * (alive - d) / d).to(v.dtype)) / (n * (n - 1))


def mean_cosine(w: Tensor) -> Tensor:
    """Compute the mean cosine of two rows.

    Torch equivalent::

        cosine = normalize(w) @ normalize(w).T
        loss = cosine[off_diagonal].mean()

    from the sum of the rows.

    Args:
        w: [N, d] or [B, N, d], as the tokens of B images.

    Returns, raises: see `frame_potential`.

    Source: Chen et al. (2022), the diversity of tokens in Diverse-ViT, without the diagonal.
    """
    check_weight(w, "w")
    n = w.shape[-2]
    v = unit_rows(w)
    if n < 2:
        return nothing(w)
    alive = v.detach().any(-1).sum(-1)
    # rows in all directions cancel each other, and their sum may be less than their number
    total = v.sum(-2, dtype=torch.float64).square().sum(-1)
    return ((total - alive) / (n * (n - 1))).to(v.dtype)
