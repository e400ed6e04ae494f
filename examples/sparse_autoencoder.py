"""Keep the features of a sparse autoencoder's dictionary apart.

    python examples/sparse_autoencoder.py

The data are made of known features: a few parents, each nearly always with one of its children.
A sparse autoencoder likes to store parent and child as one feature, their sum, because that saves a
place in the sparse code; the children themselves are then missing from the dictionary. The sums of
one parent are close to each other, and the hyperspherical energy of the dictionary pushes them
apart. It is taken in half space, s = 2: a feature and its opposite lie on one line. The dictionary
is a bare parameter, which `CoMHE` takes by its name.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comhe_ext import CoMHE, nearest

DIMENSIONS, FEATURES = 32, 128
PARENTS, CHILDREN = 16, 4  # children of each parent
ACTIVE = 2  # parents in a sample, each with a child in 9 of 10 samples
PLACES = 4  # features that may be active in the code


class SparseAutoencoder(nn.Module):
    """Code of the `PLACES` largest features, times a dictionary of one row a feature."""

    def __init__(self) -> None:
        super().__init__()
        self.W_dec = nn.Parameter(torch.randn(FEATURES, DIMENSIONS) / DIMENSIONS**0.5)
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.bias = nn.Parameter(torch.zeros(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        code = torch.relu(x @ self.W_enc + self.bias)
        values, places = code.topk(PLACES, dim=1)
        return torch.zeros_like(code).scatter(1, places, values) @ self.W_dec


class Data:
    """Samples of `ACTIVE` parents and their children, of known features."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        features = torch.randn(PARENTS * (1 + CHILDREN), DIMENSIONS, generator=self.generator)
        self.parents, self.children = nn.functional.normalize(features).split(
            [PARENTS, PARENTS * CHILDREN]
        )

    def sample(self, count: int) -> Tensor:
        def random(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=self.generator)

        parent = random(count, PARENTS).argsort(1)[:, :ACTIVE]
        child = parent * CHILDREN + (random(count, ACTIVE) * CHILDREN).long()
        there = random(count, ACTIVE, 1) < 0.9
        of_parents = self.parents[parent] * (0.5 + random(count, ACTIVE, 1))
        of_children = self.children[child] * (0.5 + random(count, ACTIVE, 1)) * there
        return (of_parents + of_children).sum(1)


class Result(NamedTuple):
    """What came out; the first number is of data that were not trained on."""

    unexplained: float  # share of the variance
    parents: int  # features of the data that a row of the dictionary has at a cosine above 0.9
    children: int
    largest_cosine: float  # of a feature of the dictionary with another, the mean


def train(factor: float, steps: int, seed: int) -> Result:
    """Train with `factor` times the energy of the dictionary."""
    torch.manual_seed(seed)
    data, model = Data(seed), SparseAutoencoder()
    comhe = CoMHE(model, None, include=["W_dec"], output_layer=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x = data.sample(256)
        loss = (model(x) - x).square().sum(1).mean() + factor * comhe()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = data.sample(4096)
        unexplained = (model(x) - x).square().sum() / (x - x.mean(0)).square().sum()
        parents, children = (
            int((nearest(truth, model.W_dec, angular=True)[0].cos() > 0.9).sum())
            for truth in (data.parents, data.children)
        )
        cosine = nearest(model.W_dec, half_space=True, angular=True)[0].cos().mean()
    return Result(float(unexplained), parents, children, float(cosine))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with the energy, and compare."""
    parser = argparse.ArgumentParser(description="Keep the features of a dictionary apart.")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--factor", type=float, default=30.0, help="of the energy in the loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, factor in (("without the energy", 0.0), ("with the energy", options.factor)):
        result = train(factor, options.steps, options.seed)
        print(f"{name}:")
        print(f"  variance that is left       {result.unexplained:.2%}")
        print(f"  parents in the dictionary   {result.parents} of {PARENTS}")
        print(f"  children in the dictionary  {result.children} of {PARENTS * CHILDREN}")
        print(f"  largest cosine, on average  {result.largest_cosine:.3f}")


if __name__ == "__main__":
    main()
