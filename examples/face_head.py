"""Spread the classes of a face recognizer by SphereFace+, on synthetic identities.

    python examples/face_head.py

A network maps samples of identities to the sphere, and a head of one weight a class is trained with
the softmax of scaled cosines. SphereFace+ adds the energy between the classes of a batch and all
classes, m x N pairs at each step instead of N x N. With many more classes than dimensions some of
them come close; SphereFace+ drives these apart. What it does to recognition is printed as well: the
accuracy among the trained identities, and verification, how well two samples of one identity are
told from those of two, of identities that were not trained on, as the area under the curve.
"""

import argparse
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comhe_ext import losses, nearest

IDENTITIES, NEW_IDENTITIES, INPUTS, HIDDEN_FACTORS, DIMENSIONS = 500, 200, 64, 24, 12
SCALE = 16.0


class Faces:
    """Identities are points of a few hidden factors; a sample is a noisy nonlinear view of one."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.identities = self._normal(IDENTITIES + NEW_IDENTITIES, HIDDEN_FACTORS)
        self.view = self._normal(2 * HIDDEN_FACTORS, INPUTS) / HIDDEN_FACTORS**0.5

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def sample(self, labels: Tensor) -> Tensor:
        factors = self.identities[labels]
        pose = self._normal(len(labels), HIDDEN_FACTORS)
        x = torch.cat([factors + 0.4 * self._normal(*factors.shape), 0.5 * pose], 1) @ self.view
        return torch.tanh(x)

    def labels(self, count: int, first: int, last: int) -> Tensor:
        return torch.randint(first, last, (count,), generator=self.generator)


class Result(NamedTuple):
    """What came out."""

    nearest_class: float  # degrees from a class to the nearest other, on average
    closest_classes: float  # degrees between the closest two
    accuracy: float  # of new samples of the trained identities
    verification: float  # area under the curve, of identities that were not trained on


def train(factor: float, steps: int, seed: int) -> Result:
    """Train with `factor` times SphereFace+."""
    torch.manual_seed(seed)
    faces = Faces(seed)
    network = nn.Sequential(nn.Linear(INPUTS, 256), nn.ReLU(), nn.Linear(256, DIMENSIONS))
    weight = nn.Parameter(torch.randn(IDENTITIES, DIMENSIONS))
    optimizer = torch.optim.Adam([*network.parameters(), weight], lr=2e-3)
    for _ in range(steps):
        labels = faces.labels(128, 0, IDENTITIES)
        cosine = nn.functional.normalize(network(faces.sample(labels))) @ unit(weight).T
        loss = nn.functional.cross_entropy(SCALE * cosine, labels)
        loss = loss + factor * losses.sphereface_plus(weight, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        degrees = nearest(weight, angular=True)[0].rad2deg()
        labels = faces.labels(4096, 0, IDENTITIES)
        right = (network(faces.sample(labels)) @ unit(weight).T).argmax(1) == labels
        labels = faces.labels(1024, IDENTITIES, IDENTITIES + NEW_IDENTITIES)
        features = unit(network(faces.sample(labels)))
        verification = area_under_curve(features @ features.T, labels)
    return Result(
        float(degrees.mean()), float(degrees.min()), float(right.float().mean()), verification
    )


def unit(x: Tensor) -> Tensor:
    """Normalize rows."""
    return nn.functional.normalize(x)


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """Compute how often a pair of one identity scores higher than a pair of two."""
    i, j = torch.triu_indices(len(labels), len(labels), offset=1)
    same = labels[i] == labels[j]
    ranks = scores[i, j].argsort().argsort().double()
    positives = int(same.sum())
    above = ranks[same].sum() - positives * (positives - 1) / 2
    return float(above / (positives * (len(same) - positives)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without and with SphereFace+, and compare."""
    parser = argparse.ArgumentParser(description="Spread the classes of a face recognizer.")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--factor", type=float, default=10.0, help="of SphereFace+ in the loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, factor in (("softmax alone", 0.0), ("with SphereFace+", options.factor)):
        result = train(factor, options.steps, options.seed)
        print(f"{name}:")
        print(f"  nearest other class, on average       {result.nearest_class:.1f} degrees")
        print(f"  the closest two classes               {result.closest_classes:.1f} degrees")
        print(f"  accuracy, trained identities          {result.accuracy:.2%}")
        print(f"  verification, new identities (area)   {result.verification:.2%}")


if __name__ == "__main__":
    main()
