"""Losses of each row and the row that is nearest to it."""

from torch import Tensor

from comhe_ext.checks import check_factor
from comhe_ext.functional import nearest
from comhe_ext.losses.common import nothing
from comhe_ext.settings import BackendName


def koleo(x: Tensor, eps: float = 1e-8, *, backend: BackendName | None = None) -> Tensor:
    """Compute minus the mean logarithm of each row's distance to its nearest.

    Torch equivalent::

        distance, _ = comhe_ext.nearest(x)
        loss = -(distance + eps).log().mean()

    Args:
        x: [N, d], or [B, N, d] for groups that do not meet, as the views of a batch.
        eps: added to the distance.
        backend: see `comhe_ext.nearest`.

    Returns:
        [] or [B], float32 (float64 for float64 rows).

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.nearest`.

    Source: Sablayrolles et al. (2019); Oquab et al. (2024), DINOv2, where the losses of the two
    global views, as B = 2 groups, are added with weight 0.1.
    """
    eps = check_factor("eps", eps)
    distance, _ = nearest(x, backend=backend)
    return _mean_of_rows(-(distance + eps).log(), x)


def minimal_angle(
    w: Tensor, *, half_space: bool = False, backend: BackendName | None = None
) -> Tensor:
    """Compute minus the mean angle of each row to its nearest, in radians.

    Torch equivalent::

        angle, _ = comhe_ext.nearest(w, angular=True)
        loss = -angle.mean()

    Args:
        w: [N, d] or [B, N, d].
        half_space: take an antipode for the row itself.
        backend: see `comhe_ext.nearest`.

    Returns, raises: see `koleo`.

    Source: Wang et al. (2020), MMA, with weight 0.07, or 0.03 for networks with skip connections.
    """
    angle, _ = nearest(w, half_space=half_space, angular=True, backend=backend)
    return _mean_of_rows(-angle, w)


def separation(
    w: Tensor, *, half_space: bool = False, backend: BackendName | None = None
) -> Tensor:
    """Compute minus the least squared distance between two rows.

    Torch equivalent::

        loss = -torch.nn.functional.pdist(torch.nn.functional.normalize(w)).square().min()

    Args:
        w: [N, d] or [B, N, d].
        half_space: take an antipode for the row itself, as for hidden layers.
        backend: see `comhe_ext.nearest`.

    Returns, raises: see `koleo`.

    Source: Liu et al. (2021), MHS. In their code hidden layers have weight 0.1, in half space,
    where a pair counts once more as its mirror image: 0.2 of this loss; the output layer has 1.
    """
    distance, _ = nearest(w, half_space=half_space, backend=backend)
    if w.shape[-2] < 2:
        return nothing(w)
    least = distance.argmin(-1, keepdim=True)  # of one pair: min would share the gradient of equals
    return -distance.gather(-1, least).squeeze(-1).square()


def regular_face(w: Tensor, *, backend: BackendName | None = None) -> Tensor:
    """Compute the mean of each row's largest cosine with another row.

    Torch equivalent::

        cosine = normalize(w) @ normalize(w).T
        loss = cosine.fill_diagonal_(-torch.inf).amax(1).mean()

    Args:
        w: [N, d] or [B, N, d], the weights of N classes.
        backend: see `comhe_ext.nearest`.

    Returns, raises: see `koleo`.

    Source: Zhao et al. (2019), RegularFace; Mettes et al. (2019) place prototypes by it.
    """
    distance, _ = nearest(w, backend=backend)
    return _mean_of_rows(1.0 - distance.square() / 2.0, w)


def _mean_of_rows(losses: Tensor, rows: Tensor) -> Tensor:
    """Take the mean over the rows of each set, 0 where a row has no other."""
    return losses.mean(-1) if rows.shape[-2] > 1 else nothing(rows)
