"""An energy of very many rows with an error bar."""

import math
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from comhe_ext.checks import check_count, check_number, check_weight
from comhe_ext.kernels.pair_functions import PairFunction, Riesz
from comhe_ext.operators.energy import energy
from comhe_ext.operators.library import compute_dtype
from comhe_ext.progress import bar
from comhe_ext.sampled.estimator import Blocks, Estimator, permutations
from comhe_ext.sampled.keywords import check_draws
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.settings import BackendName, pair_settings

# pairs that all partitions together meet so often show in the spread of the partitions; of rarer
# ones, the largest, the spread knows nothing
MET_OFTEN = 20


class Estimate(NamedTuple):
    """An energy, its standard error, the ends of its confidence interval, and the listed pairs."""

    energy: float
    std_error: float
    low: float
    high: float
    listed_pairs: int


@torch.no_grad()
def estimate_energy(
    rows: Tensor,
    pair: PairFunction = Riesz(),  # noqa: B008 (frozen)
    *,
    samples: int = 1024,
    partitions: int = 16,
    confidence: float = 0.95,
    degree: int = 2,
    trees: int = 4,
    plan: SamplingPlan | None = None,
    eps: float = 0.0,
    backend: BackendName | None = None,
    generator: Generator | None = None,
    progress: bool | str = False,
) -> Estimate:
    """Estimate the mean energy of very many rows, and how far it may be off.

    Torch equivalent, of the energy::

        comhe_ext.pair_energy(rows, pair=pair)

    in O(N samples partitions) instead of O(N^2) time, and O(N d) memory. Unbiased; the interval is
    Student's of independent random partitions, widened by what the trees may have missed.

    Args:
        rows: [N, d]; see `comhe_ext.hyperspherical_energy`.
        pair: the pair function; half space and the angle are its own.
        samples: rows of a block; each row meets the others of its block.
        partitions: how many partitions, at least 2.
        confidence: that the interval covers the exact energy, between 0 and 1.
        degree, trees: see `SamplingPlan.from_rows`; at least 2 trees, for what one misses is judged
            by what another finds.
        plan: made before, instead of one made here; degree and trees are its own.
        eps, backend: see `comhe_ext.pair_energy`.
        generator: source of the random numbers, on the device of `rows`.
        progress: show a progress bar, a string is its title; needs the package tqdm.

    Returns:
        (energy, std_error, low, high, listed_pairs). Exact, with an error of 0, where one block
        would hold all rows.

    Raises:
        TypeError, ValueError, RuntimeError: see `comhe_ext.pair_energy`.
    """
    check_weight(rows, "rows")
    if rows.dim() != 2:
        raise ValueError(f"`rows` must be 2-D, got shape {tuple(rows.shape)}")
    samples = check_count("samples", samples, 2)
    partitions = check_count("partitions", partitions, 2)
    confidence = check_number("confidence", confidence)
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` must be between 0 and 1, got {confidence}")
    check_draws(plan, generator)
    options = pair_settings(pair, "mean", eps, backend).options((rows,))
    n = rows.shape[0]
    if n < 2 or Blocks.of(n, samples).number == 1:
        exact = float(energy([rows.unsqueeze(0)], [None], options))
        return Estimate(exact, 0.0, exact, exact, 0)
    if plan is None:
        check_count("trees", trees, 2)
        plan = SamplingPlan.from_rows(rows, degree, trees, generator=generator, progress=progress)
    plan.check(rows)
    listed, polynomial = plan.on(rows.device), plan.polynomial(pair)
    sets = rows.to(compute_dtype(rows)).unsqueeze(0)
    estimator = Estimator(sets, samples, polynomial, listed, options)
    draws = []
    with bar(partitions, progress, "partitions") as advance:
        for _ in range(partitions):
            order = permutations(1, n, rows.device, generator)
            draws.append(float(estimator.energies(order)))
            advance()
    energies = torch.tensor(draws, dtype=torch.float64, device="cpu")
    mean = float(energies.mean())
    std_error = float(energies.std()) / math.sqrt(partitions)
    missed = 0.0
    if estimator.residuals is not None and plan.trees > 1:
        # pairs that one tree alone has found tell of those that none has
        once = estimator.residuals[0, listed.trees == 1]
        rare = min(math.ceil(MET_OFTEN * estimator.weight / partitions), len(once))
        once = once[once.abs().topk(rare).indices]
        missed = estimator.scale * abs(float(once.sum())) * (plan.trees - 1) / plan.trees
    width = _student_quantile((1.0 + confidence) / 2.0, partitions - 1) * std_error + missed
    return Estimate(mean, std_error, mean - width, mean + width, len(listed.i))


def _student_quantile(probability: float, degrees: int) -> float:
    """Invert Student's distribution for a probability above one half."""
    log = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)
    factor = math.exp(log) / math.sqrt(math.pi * degrees)

    def density_of_angle(angle: float) -> float:
        # t = sqrt(degrees) tan(angle) makes the range finite and the integrand cos^(degrees - 1)
        return math.cos(angle) ** (degrees - 1)

    def below(angle: float) -> float:
        # Simpson's rule
        steps = 400
        values = [density_of_angle(angle * i / steps) for i in range(steps + 1)]
        weighted = values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2])
        return 0.5 + factor * math.sqrt(degrees) * weighted * angle / steps / 3

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
