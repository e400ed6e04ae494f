"""Losses of two views of the same samples, and of two networks."""

import torch
from torch import Tensor

from comhe_ext import backends
from comhe_ext.checks import check_number, check_weight
from comhe_ext.functional import pair_energy
from comhe_ext.kernels.pair_functions import Gaussian, PairFunction
from comhe_ext.losses.common import check_views, nothing, positive
from comhe_ext.operators.angle_loss import angle_difference
from comhe_ext.operators.distance import distance_to
from comhe_ext.operators.library import compute_dtype
from comhe_ext.operators.rows import unit_rows
from comhe_ext.settings import BackendName


def kcl(
    anchors: Tensor,
    positives: Tensor,
    pair: PairFunction = Gaussian(tau=2.0),  # noqa: B008 (frozen)
    gamma: float = 16.0,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute the kernel contrastive loss: uniformity of both views, and alignment of the pairs.

    Torch equivalent::

        k = lambda r: (-2 * r.square()).exp()
        loss = gamma * (k(pdist(anchors)).mean() + k(pdist(positives)).mean()) - 2 * k(r_own).mean()

    Args:
        anchors, positives: [N, d], row i of the one belongs to row i of the other.
        pair: the kernel, any pair function in full space.
        gamma: weight of the uniformity.
        backend: see `comhe_ext.pair_energy`.

    Returns:
        [], float32 (float64 if a tensor is).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.

    Source: Koromilas et al. (2024), KCL, with the Gaussian, t = 2, and gamma = 16.
    """
    check_views(anchors, positives)
    gamma = check_number("gamma", gamma)
    if isinstance(pair, PairFunction) and pair.half_space:
        raise ValueError("`pair` must be in full space: an anchor has one positive, no antipode")
    spread = pair_energy(anchors, pair=pair, backend=backend)
    spread = spread + pair_energy(positives, pair=pair, backend=backend)
    numbers = torch.arange(anchors.shape[0], device=anchors.device)
    sets = anchors.unsqueeze(0), positives.unsqueeze(0), numbers.unsqueeze(0)
    distance = distance_to(*sets, False, pair.angular, 0.0, backend or backends.AUTO)
    aligned = pair.at_distance(distance.squeeze(0).double())[0]
    if anchors.shape[0] == 0:
        return gamma * spread
    return gamma * spread - 2.0 * aligned.mean().to(spread.dtype)


def dhel(
    anchors: Tensor,
    positives: Tensor,
    tau: float = 0.3,
    *,
    backend: BackendName | None = None,
) -> Tensor:
    """Compute the decoupled contrastive loss: negatives are the other rows of the same view.

    Torch equivalent::

        e = lambda x: (x @ x.T / tau).exp().fill_diagonal_(0).sum(1).log()
        loss = (e(anchors) + e(positives) - (anchors * positives).sum(1) / tau).mean()

    of normalized rows.

    Args:
        anchors, positives: [N, d], row i of the one belongs to row i of the other.
        tau: temperature of the cosine, greater than 0; from 0.025 on nothing underflows in float32.
        backend: see `comhe_ext.pair_energy`.

    Returns:
        [], float32 (float64 if a tensor is).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.

    Source: Koromilas et al. (2024), DHEL, with tau = 0.3 and the positives' own negatives.
    """
    check_views(anchors, positives)
    tau = positive("tau", tau)
    cosine = (unit_rows(anchors) * unit_rows(positives)).sum(1)
    if anchors.shape[0] < 2:
        return nothing(anchors) + nothing(positives)
    # exp(c / tau) is exp(1 / tau) times the Gaussian of rate 1 / (2 tau)
    pair = Gaussian(tau=0.5 / tau)
    others = [
        pair_energy(view, pair=pair, reduction="rows", backend=backend).log()
        for view in (anchors, positives)
    ]
    return (others[0] + others[1] + (2.0 - cosine) / tau).mean()


def gram(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute how far the cosines of the student's rows are from the teacher's: the Gram loss.

    Torch equivalent::

        ours, theirs = normalize(student), normalize(teacher)
        loss = (ours @ ours.T - theirs @ theirs.T).square().mean()

    with O(N (d_s + d_t)) memory.

    Args:
        student: [N, d_s] or [B, N, d_s], as the patches of B images.
        teacher: [N, d_t] or [B, N, d_t], a constant, or one that learns, too.

    Returns:
        [] or [B], the mean over all N^2 entries, float32 (float64 if a tensor is).

    Raises:
        TypeError: a tensor is not dense and floating-point.
        ValueError: the shapes do not fit.

    Source: Simeoni et al. (2025), the Gram loss of DINOv3, with `remove_neg` off, as they train.
    Their mean over images is the mean of this loss over B.
    """
    check_weight(student, "student")
    check_weight(teacher, "teacher")
    if student.shape[:-1] != teacher.shape[:-1]:
        raise ValueError(
            "`teacher` must have as many sets and rows as `student`, got "
            f"{tuple(teacher.shape)} and {tuple(student.shape)}"
        )
    if student.device != teacher.device:
        raise ValueError(
            f"`teacher` must be on the device of `student`, got {teacher.device} and "
            f"{student.device}"
        )
    spaces = [x if x.dim() == 3 else x.unsqueeze(0) for x in (teacher, student)]
    dtype = compute_dtype(*spaces)
    # a dead row's cosine with itself is 0, another's is 1
    dead = [x.detach().any(-1) for x in spaces]
    diagonal = (dead[0] != dead[1]).sum(1)
    total = angle_difference(spaces[0].to(dtype), spaces[1].to(dtype), False) + diagonal
    loss = total / max(student.shape[-2] ** 2, 1)
    return loss if student.dim() == 3 else loss.squeeze(0)
