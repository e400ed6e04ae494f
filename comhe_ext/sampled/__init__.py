"""Energies of very many rows, estimated without bias from pairs within random blocks.

    plan = SamplingPlan.from_rows(weight)
    energy = hyperspherical_energy(weight, method="sampled", plan=plan)    # for training
    estimate_energy(weight)                                                # with an error bar

docs/sampled.md tells when to use which, and what each costs.
"""

from comhe_ext.sampled.estimate import Estimate, estimate_energy
from comhe_ext.sampled.plan import SamplingPlan

__all__ = ["Estimate", "SamplingPlan", "estimate_energy"]
