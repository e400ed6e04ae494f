"""Polynomials of the cosine: fitted to a pair function, and summed over all pairs by moments.

    sum_ij c_ij = |sum_i v_i|^2        sum_ij c_ij^2 = |V^T V|^2
    sum_ij c_ij^3 = |Q^T V|^2          sum_ij c_ij^4 = |Q^T Q|^2

where a row of Q has the products v_a v_b of a row of V, so that <Q_i, Q_j> = c_ij^2. No pair is
visited: O(N k^d) for degree d. There is no constant term, for the number of pairs is known.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.operators.library import product
from comhe_ext.sampled.recompute import recomputed

MAX_DEGREE = 4
# of the polynomial where nothing is known of the rows
DEGREE = 2
# pairs beyond it do not count in a fit: the few near ones would bend the polynomial, and they are
# listed. c = 0.92 is the chord 0.4
LARGEST_COSINE = 0.92
# of the histogram of cosines that is fitted to
BINS = 4096
# rows whose products are multiplied at a time; in one product of all rows the order of the sum,
# and the last bits with it, would depend on the number of threads
ROWS_OF_PRODUCT = 256
# numbers that exist at a time beside the rows
CHUNK = 1 << 21


class Polynomial(NamedTuple):
    """The sum of coefficient * c^power."""

    powers: tuple[int, ...]
    # 0-dimensional, on the host, so that new ones are no new trace of torch.compile
    coefficients: tuple[Tensor, ...]

    def at(self, c: Tensor) -> Tensor:
        """Evaluate it, elementwise."""
        value, terms = torch.zeros_like(c), dict(zip(self.powers, self.coefficients, strict=True))
        for power in range(self.powers[-1], 0, -1):
            value = (value + terms[power]) * c if power in terms else value * c
        return value


def fit(pair: PairFunction, histogram: Tensor, degree: int) -> Polynomial | None:
    """Fit a polynomial to F by its slope, weighted by the square 1 - c^2 of a pair's lever.

    The slope makes the gradient, whose variance is what the polynomial is for: fitted to the values
    it gives a better energy and a worse gradient.

    Args:
        pair: the pair function.
        histogram: [BINS], float64, how often each cosine is met.
        degree: of the polynomial; in half space, where F is even, it gets even powers alone.

    Returns:
        The polynomial, its coefficients rounded to float32; None where it has no term.
    """
    powers = tuple(m for m in range(1, degree + 1) if not (pair.half_space and m % 2))
    if not powers:
        return None
    c = bin_centers()
    _, slope, _ = pair.of_cosine(2.0 - 2.0 * c, 2.0 + 2.0 * c)
    counts = (c.abs() if pair.two_ended else c) <= LARGEST_COSINE
    root = (histogram * (1.0 - c.square()) * counts).sqrt()
    columns = torch.stack([m * c.pow(m - 1) for m in powers], 1) * root[:, None]
    lengths = columns.square().sum(0).sqrt()
    columns = columns / torch.where(lengths > 0, lengths, 1.0)
    target = torch.where(counts, slope, 0.0) * root
    # a very small ridge: where all cosines are alike, the columns are
    ridge = 1e-9 * torch.eye(len(powers), dtype=c.dtype, device=c.device)
    q, r = torch.linalg.qr(torch.cat([columns, ridge]))
    right = (q[: len(target)] * target[:, None]).sum(0)[:, None]
    solution = torch.linalg.solve_triangular(r, right, upper=True).squeeze(1)
    solution = solution / torch.where(lengths > 0, lengths, 1.0)
    return Polynomial(powers, torch.nan_to_num(solution, 0.0, 0.0, 0.0).float().unbind())


def bin_centers() -> Tensor:
    """List the cosines at the middle of the bins, [BINS]."""
    places = torch.arange(BINS, dtype=torch.float64, device="cpu")
    return (2.0 * places + 1.0) / BINS - 1.0


def histogram_of(cosines: Tensor) -> Tensor:
    """Count cosines, NaN left out, in bins [BINS], float64 on the host."""
    known = cosines[cosines.isfinite()]
    places = ((known + 1.0) * (BINS / 2.0)).long().clamp(0, BINS - 1)
    return places.bincount(minlength=BINS).to("cpu", torch.float64)


def uniform_polynomial(pair: PairFunction, dim: int, degree: int = DEGREE) -> Polynomial | None:
    """Fit to independent random directions in `dim` dimensions: unbiased whatever the rows."""
    return _UNIFORM.get((pair, dim, degree), lambda: fit(pair, _density(dim), degree))


def _density(dim: int) -> Tensor:
    # of the cosines, (1 - c^2)^((dim - 3) / 2)
    return (1.0 - bin_centers().square()).pow((max(dim, 2) - 3) / 2.0)


# what a polynomial is kept as: numbers, which belong to no mode or transform that made them
Numbers: TypeAlias = tuple[tuple[int, ...], list[float]] | None
MOST_REMEMBERED = 256


class Polynomials:
    """Those that were fitted: a fit takes longer than the blocks of a small layer."""

    def __init__(self) -> None:
        self._known: dict[Any, Numbers] = {}

    def clear(self) -> None:
        """Forget all."""
        self._known.clear()

    def get(self, key: Any, make: Callable[[], Polynomial | None]) -> Polynomial | None:
        """Make a polynomial once for each key.

        Under torch.compile, which in PyTorch 2.6 cannot even look at such keys, and under the
        transforms of torch.func, whose tensors have no numbers to keep, it is made anew.
        """
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return make()
        if key not in self._known:
            if len(self._known) >= MOST_REMEMBERED:
                self.clear()
            made = make()
            self._known[key] = (
                None if made is None else (made.powers, [float(x) for x in made.coefficients])
            )
        numbers = self._known[key]
        if numbers is None:
            return None
        powers, coefficients = numbers
        tensor = torch.tensor(coefficients, dtype=torch.float32, device="cpu")
        return Polynomial(powers, tensor.unbind())


_UNIFORM = Polynomials()


# --- sums over pairs ------------------------------------------------------------------------------


def pair_sums(polynomial: Polynomial, v: Tensor) -> Tensor:
    """Sum a polynomial of the cosines over unordered pairs of sets v [S, n, k] -> [S], float64."""
    length = v.square().sum(-1).double()
    n, k = v.shape[1:]
    products = k * (k + 1) // 2
    # multiplications a row: of the moments, and of the cosines themselves, with what follows them
    cost = {1: 0, 2: k * k, 3: k * products, 4: products * products}
    if cost[polynomial.powers[-1]] > n * (k + 16):
        every = _over_cosines(polynomial, v)
        return (every - polynomial.at(length).sum(-1)) / 2.0
    total = length.new_zeros(v.shape[0])
    for power, coefficient in zip(*polynomial, strict=True):
        # a row meets itself at |v|^2
        own = length.pow(power).sum(-1)
        total = total + coefficient / 2.0 * (_sum_of_powers(v, power) - own)
    return total


def _over_cosines(polynomial: Polynomial, v: Tensor) -> Tensor:
    """Sum a polynomial over all ordered pairs of each set, from the cosines themselves."""
    n = v.shape[1]

    def sums(rows: Tensor, others: Tensor) -> Tensor:
        return polynomial.at(product(rows, others.mT)).sum((-2, -1), dtype=torch.float64)

    totals = []
    for some in v.split(max(CHUNK // (n * n), 1)):
        parts = some.split(max(CHUNK // n, 1), 1)
        totals.append(torch.stack([recomputed(sums, part, some) for part in parts]).sum(0))
    return torch.cat(totals)


def _sum_of_powers(v: Tensor, power: int) -> Tensor:
    """Sum c_ij^power over all ordered pairs of each set, by moments."""
    return moments(v, power).square().sum((-2, -1))


def moments(v: Tensor, power: int) -> Tensor:
    """Sum over the rows of each set [S, n, k] what c^power is made of -> [S, a, b], float64.

    The sum of the products of two sets' moments is that of c^power over the pairs between them.
    """
    if power == 1:
        return v.sum(1, keepdim=True, dtype=torch.float64)
    n, k = v.shape[1:]
    products = k * (k + 1) // 2
    # rows at a time, for what is made of each of them, and of each product
    rows = CHUNK // (k if power == 2 else products)
    size = {2: k * k, 3: k * products, 4: products * products}[power]
    rows = max(min(rows // ROWS_OF_PRODUCT, CHUNK // size), 1) * ROWS_OF_PRODUCT
    sums = []
    for some in v.split(max(rows // n, 1)):
        parts = [recomputed(_MOMENTS[power], part) for part in some.split(rows, 1)]
        sums.append(torch.stack(parts).sum(0))
    return torch.cat(sums)


def _moment(left: Tensor, right: Tensor) -> Tensor:
    """Compute left right^T of each set, [S, a, n] and [S, b, n] -> [S, a, b], float64."""
    short = -left.shape[2] % ROWS_OF_PRODUCT
    first, second = (
        torch.nn.functional.pad(x, (0, short)).unflatten(2, (-1, ROWS_OF_PRODUCT)).transpose(1, 2)
        for x in (left, right)
    )
    return product(first, second.mT).sum(1, dtype=torch.float64)


def _products(v: Tensor) -> Tensor:
    """Make the columns of Q of each set [S, n, k] -> [S, k (k + 1) / 2, n]."""
    sets, n, k = v.shape
    i, j = torch.triu_indices(k, k, device=v.device)
    columns = v.permute(2, 0, 1).flatten(1)
    # by embeddings, whose backward adds in one order
    left, right = (torch.nn.functional.embedding(index, columns) for index in (i, j))
    # off the diagonal each product stands for two
    twice = (1.0 + (i != j).to(v.dtype)).sqrt()
    return (left * right * twice[:, None]).unflatten(1, (sets, n)).transpose(0, 1)


def _cubic(v: Tensor) -> Tensor:
    return _moment(_products(v), v.mT)


def _quartic(v: Tensor) -> Tensor:
    q = _products(v)
    return _moment(q, q)


_MOMENTS: dict[int, Callable[[Tensor], Tensor]] = {
    2: lambda v: _moment(v.mT, v.mT),
    3: _cubic,
    4: _quartic,
}
