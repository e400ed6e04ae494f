"""What tests, benchmarks and examples share; nothing else imports it.

reference       the definition in float64, every pair written out
inputs          rows of every kind
optima          configurations whose energy is known
architectures   models of known shape
sweeps          short ways to call operators and backends
"""

from comhe_ext.testing.inputs import collapsed_rows, paired_rows, random_rows
from comhe_ext.testing.optima import (
    cross_polytope,
    e8_roots,
    icosahedron,
    leech_minimal_vectors,
    simplex,
)
from comhe_ext.testing.reference import exact_energy_and_gradient, relative_error
from comhe_ext.testing.sweeps import (
    options_of,
    packed_energy,
    riesz,
    sweep_columns,
    sweep_of,
    sweep_projected,
)

__all__ = [
    "collapsed_rows",
    "cross_polytope",
    "e8_roots",
    "exact_energy_and_gradient",
    "icosahedron",
    "leech_minimal_vectors",
    "options_of",
    "packed_energy",
    "paired_rows",
    "random_rows",
    "relative_error",
    "riesz",
    "simplex",
    "sweep_columns",
    "sweep_of",
    "sweep_projected",
]
