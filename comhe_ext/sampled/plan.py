"""What makes a sampled energy vary little: a polynomial, and a list of near pairs."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from comhe_ext.checks import check_count, check_weight
from comhe_ext.kernels.pair_functions import PairFunction
from comhe_ext.operators.rows import unit_rows
from comhe_ext.progress import bar
from comhe_ext.sampled.near_list import NearList, find_near
from comhe_ext.sampled.polynomials import (
    MAX_DEGREE,
    Polynomial,
    Polynomials,
    fit,
    histogram_of,
)

# random pairs that a polynomial is fitted to
FITTED_PAIRS = 200_000


class SamplingPlan:
    """A polynomial of the cosine and a list of near pairs, made from the rows they are to serve.

    A sampled energy is unbiased whatever the plan: one that is out of date costs variance. So it
    serves many training steps, and is made anew now and then by `refresh`. It has to be made before
    the rows are sampled, not from the sample. It serves every pair function: what it keeps of the
    rows is how often each cosine is met, which the polynomial is fitted to.

    Made by `SamplingPlan.from_rows`; `state_dict` and `load_state_dict` as of a module.

    Source: control variates, as Hammersley and Handscomb (1964) describe them.
    """

    def __init__(
        self, degree: int, trees: int, cosines: Tensor, listed: NearList, num_rows: int
    ) -> None:
        self.degree = degree
        self.trees = trees
        self.cosines = cosines
        self.listed = listed
        self.num_rows = num_rows
        self._fitted = Polynomials()

    @classmethod
    def from_rows(
        cls,
        rows: Tensor,
        degree: int = 2,
        trees: int = 4,
        *,
        generator: Generator | None = None,
        progress: bool | str = False,
    ) -> "SamplingPlan":
        """Look at random pairs of `rows`, and list near pairs by random trees.

        Args:
            rows: [N, d], float16, bfloat16, float32 or float64.
            degree: of the polynomial, from 0 to 4. Degree 2 costs O(N d^2), 3 and 4 a factor d
                more each; in half space odd degrees add nothing.
            trees: how many trees look for near pairs, those of a cosine above 0.9 or below -0.9; 0
                lists none. The nearest 8 N are kept, if there are so many.
            generator: source of the random numbers, on the device of `rows`.
            progress: show a progress bar, a string is its title; needs the package tqdm.

        Returns:
            The plan; O(N d) memory while it is made, three numbers a listed pair after that.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: `rows` is not 2-D, or a number is out of range.
        """
        degree = check_count("degree", degree, 0)
        if degree > MAX_DEGREE:
            raise ValueError(f"`degree` must be at most {MAX_DEGREE}, got {degree}")
        trees = check_count("trees", trees, 0)
        return cls(degree, trees, *_looked_at(rows, trees, generator, progress))

    def refresh(
        self, rows: Tensor, *, generator: Generator | None = None, progress: bool | str = False
    ) -> None:
        """Look at the rows anew, after they have moved.

        Args:
            rows, generator, progress: see `from_rows`.
        """
        looked_at = _looked_at(rows, self.trees, generator, progress)
        self.cosines, self.listed, self.num_rows = looked_at
        self._fitted.clear()

    def check(self, rows: Tensor) -> None:
        """Refuse rows that the list cannot belong to."""
        if rows.shape[-2] != self.num_rows:
            raise ValueError(
                f"`plan` was made from {self.num_rows} rows, got {rows.shape[-2]}: call `refresh`"
            )

    def polynomial(self, pair: PairFunction) -> Polynomial | None:
        """Fit the polynomial that stands for a pair function; None for degree 0."""
        return self._fitted.get(pair, lambda: fit(pair, self.cosines, self.degree))

    def on(self, device: torch.device) -> NearList:
        """Return the list on a device, and keep it there."""
        if self.listed.i.device != device:
            self.listed = NearList(*[x.to(device) for x in self.listed])
        return self.listed

    def state_dict(self) -> dict[str, Any]:
        """Return the plan as tensors and numbers, as `torch.save` takes them."""
        return {
            "degree": self.degree,
            "trees": self.trees,
            "cosines": self.cosines,
            "listed": tuple(self.listed),
            "num_rows": self.num_rows,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the plan of a `state_dict`."""
        if missing := {"degree", "trees", "cosines", "listed", "num_rows"} - state.keys():
            raise ValueError(f"`state` must be the state_dict of a plan, it lacks {min(missing)!r}")
        self.degree, self.trees = state["degree"], state["trees"]
        self.cosines = state["cosines"].to("cpu", torch.float64)
        self.listed, self.num_rows = NearList(*state["listed"]), state["num_rows"]
        self._fitted.clear()

    def __repr__(self) -> str:
        return (
            f"SamplingPlan({self.num_rows} rows, degree {self.degree}, {len(self.listed.i)} listed "
            f"pairs of {self.trees} trees)"
        )


@torch.no_grad()
def _looked_at(
    rows: Tensor, trees: int, generator: Generator | None, progress: bool | str
) -> tuple[Tensor, NearList, int]:
    """Look at rows: how often each cosine is met, the near pairs, and the number of rows."""
    check_weight(rows, "rows")
    if rows.dim() != 2:
        raise ValueError(f"`rows` must be 2-D, got shape {tuple(rows.shape)}")
    with bar(trees, progress, "near pairs") as advance:
        listed = find_near(rows.detach(), trees, generator, advance)
    return _cosines_of(rows, generator), listed, rows.shape[0]


def _cosines_of(rows: Tensor, generator: Generator | None) -> Tensor:
    """Count the cosines of random pairs of rows, as `histogram_of` does."""
    n, device = rows.shape[0], rows.device
    count = min(FITTED_PAIRS, 50 * n) if n > 1 else 0
    i = torch.randint(max(n, 1), (count,), generator=generator, device=device)
    j = torch.randint(max(n - 1, 1), (count,), generator=generator, device=device)
    j = j + (j >= i)  # another row
    parts = [
        (
            unit_rows(rows.index_select(0, a)).double()
            * unit_rows(rows.index_select(0, b)).double()
        ).sum(1)
        for a, b in zip(i.split(1 << 14), j.split(1 << 14), strict=True)
    ]
    return histogram_of(torch.cat(parts))
