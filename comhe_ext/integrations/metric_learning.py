"""pytorch-metric-learning: `ArcFaceLoss(..., weight_regularizer=EnergyRegularizer())`."""

from typing import Any

from torch import Tensor

try:
    from pytorch_metric_learning.regularizers import BaseRegularizer
except ImportError as error:
    raise ImportError(
        "this needs pytorch-metric-learning: pip install 'comhe-ext[metric-learning]'"
    ) from error

from comhe_ext import projections
from comhe_ext.checks import check_count
from comhe_ext.packing import Part, total_energy
from comhe_ext.settings import lists_energy_options, mean_settings, take_energy_options


class EnergyRegularizer(BaseRegularizer):
    """The hyperspherical energy of a loss's class weights, or their compressive energy.

    Torch equivalent::

        hyperspherical_energy(weight, s)    # or compressive_energy under fresh projections

    Args:
        s, half_space: see `comhe_ext.hyperspherical_energy`.
        num_projections: C, matrices drawn at each call; 0 takes the weights as they are, as the
            paper does with classes.
        dim: k, the dimension projected to.
        others: `pair`, any pair function, in place of `s`, `angular` and `min_distance`; all other
            keywords of `comhe_ext.hyperspherical_energy` but `reduction`, and those of
            pytorch-metric-learning's own base class.

    Source: Liu et al. (2018), where it makes SphereFace+ out of SphereFace.
    """

    @lists_energy_options
    def __init__(
        self,
        s: float = 2.0,
        *,
        half_space: bool = False,
        num_projections: int = 0,
        dim: int = 40,
        **others: Any,
    ) -> None:
        options = take_energy_options(others)
        super().__init__(**others)
        self.num_projections = check_count("num_projections", num_projections, least=0)
        self.dim = check_count("dim", dim)
        self.settings = mean_settings(s, half_space, options)

    def compute_loss(self, weights: Tensor) -> dict[str, dict[str, Any]]:
        """Compute the energy, in the form that the library's reducers take."""
        matrices = None
        if self.num_projections and weights.shape[1] > self.dim:
            matrices = projections.random_projection(
                self.num_projections, self.dim, weights.shape[1], device=weights.device
            )
        energy = total_energy([Part(weights.unsqueeze(0), matrices)], self.settings)
        return {"loss": {"losses": energy, "indices": None, "reduction_type": "already_reduced"}}
