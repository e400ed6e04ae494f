"""From the keywords by which an energy is asked to be sampled to its estimate."""

from typing import Literal, NamedTuple

from torch import Generator, Tensor

from comhe_ext.checks import check_count, quote
from comhe_ext.operators.library import compute_dtype
from comhe_ext.operators.sweep import SweepOptions
from comhe_ext.sampled.estimator import estimated_energies, permutations
from comhe_ext.sampled.near_list import NearList
from comhe_ext.sampled.plan import SamplingPlan
from comhe_ext.sampled.polynomials import uniform_polynomial

Method = Literal["exact", "sampled"]


class Sampling(NamedTuple):
    """How an energy is to be sampled."""

    samples: int
    plan: SamplingPlan | None
    generator: Generator | None


def check_sampling(
    method: str, samples: int, plan: SamplingPlan | None, generator: Generator | None
) -> Sampling | None:
    """Check the keywords of a sampled energy; None for an exact one."""
    if method not in ("exact", "sampled"):
        raise ValueError(f"`method` must be 'exact' or 'sampled', got {quote(method)}")
    samples = check_count("samples", samples, 2)
    check_draws(plan, generator)
    if method == "exact":
        if plan is not None or generator is not None:
            name = "plan" if plan is not None else "generator"
            raise ValueError(f"`{name}` is for method='sampled'")
        return None
    return Sampling(samples, plan, generator)


def check_sampling_of_pairs(
    method: str,
    samples: int,
    plan: SamplingPlan | None,
    generator: Generator | None,
    columns: Tensor | None,
    reduction: str,
) -> Sampling | None:
    """Check the same of an energy that may be one of rows against columns, or of each row."""
    sampling = check_sampling(method, samples, plan, generator)
    if sampling is not None and (columns is not None or reduction == "rows"):
        raise ValueError(
            "`method` must be 'exact' for rows against columns and for reduction='rows'"
        )
    return sampling


def check_draws(plan: SamplingPlan | None, generator: Generator | None) -> None:
    """Refuse what is no plan or no source of random numbers."""
    if plan is not None and not isinstance(plan, SamplingPlan):
        raise TypeError(f"`plan` must be a SamplingPlan or None, got {type(plan).__name__}")
    if generator is not None and not isinstance(generator, Generator):
        raise TypeError(
            f"`generator` must be a torch.Generator or None, got {type(generator).__name__}"
        )


def sampled_energies(
    sets: Tensor, options: SweepOptions, sampling: Sampling, *, as_planned: bool
) -> Tensor:
    """Estimate the energies of sets of rows [S, N, k] -> [S].

    Args:
        sets: rows of any floating-point dtype.
        options: of the energy.
        sampling: how; the list of its plan belongs to the rows of every set.
        as_planned: whether they are the rows that the plan was made from, and not projected ones,
            whose cosines ask for a polynomial of their own.
    """
    plan, rows = sampling.plan, sets.to(compute_dtype(sets))
    listed: NearList | None = None
    if plan is not None:
        plan.check(sets)
        listed = plan.on(sets.device)
    if plan is not None and as_planned:
        polynomial = plan.polynomial(options.pair)
    else:
        polynomial = uniform_polynomial(options.pair, sets.shape[2])
    permutation = permutations(sets.shape[0], sets.shape[1], sets.device, sampling.generator)
    return estimated_energies(rows, permutation, sampling.samples, polynomial, listed, options)
