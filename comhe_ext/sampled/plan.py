"""What makes a sampled energy vary little: a polynomial, and a list of near pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from comhe_ext.checks import check_count, check_weight
from comhe_ext.kernels.pair_functions import PairFunction, Riesz, pair_function
from comhe_ext.operators.rows import unit_rows
from comhe_ext.progress import bar
from comhe_ext.sampled.near_list import NearList, find_near
from comhe_ext.sampled.polynomials import MAX_DEGREE, fit

# random pairs that a polynomial is fitted to
FITTED_PAIRS = 200_000


class SamplingPlan:
    """A polynomial of the cosine and a list of near pairs, made from the rows they are to serve.

    A sampled energy is unbiased whatever the plan: one that is out of date costs variance. So it
    serves many training steps, and is made anew now and then by `refresh`. It has to be made before
    the rows are sampled, not from the sample.

    Made by `SamplingPlan.from_rows`, or from a `state_dict`.

    Source: control variates, as Hammersley and Handscomb (1964) describe them.
    """

    def __init__(
        self,
        pair: PairFunction,
        coefficients: tuple[float, ...],
        listed: NearList,
        num_rows: int,
        trees: int,
    ) -> None:
        self.pair = pair
        self.coefficients = coefficients
        self.listed = listed
        self.num_rows = num_rows
        self.trees = trees

    @classmethod
    def from_rows(
        cls,
        rows: Tensor,
        degree: int = 2,
        trees: int = 4,
        *,
        pair: PairFunction = Riesz(),  # noqa: B008 (frozen)
        generator: Generator | None = None,
        progress: bool | str = False,
    ) -> "SamplingPlan":
        """Fit a polynomial to random pairs of `rows`, and list near pairs by random trees.

        Args:
            rows: [N, d], float16, bfloat16, float32 or float64.
            degree: of the polynomial, from 0 to 4. Degree 2 costs O(N d^2), 3 and 4 a factor d
                more each; in half space odd degrees add nothing.
            trees: how many trees look for near pairs; 0 lists none.
            pair: the pair function whose energy is to be sampled.
            generator: source of the random numbers, on the device of `rows`.
            progress: show a progress bar, a string is its title; needs the package tqdm.

        Returns:
            The plan; O(N d) memory while it is made, two numbers a listed pair after that.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: `rows` is not 2-D, or a number is out of range.
        """
        degree, trees = _checked(rows, degree, trees, pair)
        listed = _find(rows, trees, pair, generator, progress)
        coefficients = _fit(rows, degree, pair, generator)
        return cls(pair, coefficients, listed, rows.shape[0], trees)

    def refresh(
        self, rows: Tensor, *, generator: Generator | None = None, progress: bool | str = False
    ) -> None:
        """Make the polynomial and the list anew, from rows that have moved.

        Args:
            rows, generator, progress: see `from_rows`.
        """
        _checked(rows, len(self.coefficients), self.trees, self.pair)
        listed = _find(rows, self.trees, self.pair, generator, progress)
        self.coefficients = _fit(rows, len(self.coefficients), self.pair, generator)
        self.listed, self.num_rows = listed, rows.shape[0]

    def check(self, rows: Tensor) -> None:
        """Refuse rows that the list cannot belong to."""
        if rows.shape[-2] != self.num_rows:
            raise ValueError(
                f"`plan` was made from {self.num_rows} rows, got {rows.shape[-2]}: call `refresh`"
            )

    def on(self, device: torch.device) -> NearList:
        """Return the list on a device, and keep it there."""
        if self.listed.i.device != device:
            self.listed = NearList(*[x.to(device) for x in self.listed])
        return self.listed

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as tensors and numbers, as `torch.save` takes them."""
        return {
            "pair": (self.pair.name, self.pair.parameters),
            "coefficients": self.coefficients,
            "listed": tuple(self.listed),
            "num_rows": self.num_rows,
            "trees": self.trees,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the plan of a `state_dict`."""
        name, parameters = state["pair"]
        pair = pair_function(name, tuple(parameters))
        listed = NearList(*state["listed"])
        self.pair, self.coefficients = pair, tuple(state["coefficients"])
        self.listed, self.num_rows, self.trees = listed, state["num_rows"], state["trees"]

    def __repr__(self) -> str:
        return (
            f"SamplingPlan({self.num_rows} rows, {len(self.listed.i)} listed pairs of "
            f"{self.trees} trees, degree {len(self.coefficients)}, {self.pair})"
        )


def _checked(rows: Tensor, degree: int, trees: int, pair: PairFunction) -> tuple[int, int]:
    check_weight(rows, "rows")
    if rows.dim() != 2:
        raise ValueError(f"`rows` must be 2-D, got shape {tuple(rows.shape)}")
    if not isinstance(pair, PairFunction):
        raise TypeError(f"`pair` must be a pair function, got {type(pair).__name__}")
    degree, trees = check_count("degree", degree, 0), check_count("trees", trees, 0)
    if degree > MAX_DEGREE:
        raise ValueError(f"`degree` must be at most {MAX_DEGREE}, got {degree}")
    return degree, trees


@torch.no_grad()
def _find(
    rows: Tensor,
    trees: int,
    pair: PairFunction,
    generator: Generator | None,
    progress: bool | str,
) -> NearList:
    with bar(trees, progress, "near pairs") as advance:
        return find_near(rows, trees, pair.half_space, generator, advance)


@torch.no_grad()
def _fit(
    rows: Tensor, degree: int, pair: PairFunction, generator: Generator | None
) -> tuple[float, ...]:
    n = rows.shape[0]
    if n < 2 or degree == 0:
        return (0.0,) * degree
    count = min(FITTED_PAIRS, 50 * n)
    device = rows.device
    i = torch.randint(n, (count,), generator=generator, device=device)
    j = torch.randint(n - 1, (count,), generator=generator, device=device)
    j = j + (j >= i)  # another row
    cosines = torch.cat(
        [
            (unit_rows(rows[a]).double() * unit_rows(rows[b]).double()).sum(1)
            for a, b in zip(i.split(1 << 16), j.split(1 << 16), strict=True)
        ]
    )
    cosines = cosines[cosines.isfinite()]
    return fit(pair, cosines, torch.ones_like(cosines), degree)
