"""Train a small self-distilled network, DINO-like, with KoLeo and the Gram loss.

    python examples/dino_features.py

A student predicts what a slowly following teacher makes of another view of the same image. KoLeo
spreads the features of a batch, so that images of one class do not fall together on one spot: what
is counted is how often, among new images, the nearest feature to one view of an image is that of
its other view. Later the Gram loss holds the cosines between the patches of an image near those of
an early teacher, as DINOv3 does in long training: what is counted is how far they have moved by
the end.
"""

import argparse
import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comhe_ext import losses, nearest

CLASSES, PATCHES, INPUTS, DIMENSIONS, PROTOTYPES = 40, 8, 48, 32, 64


class Images:
    """Images of `PATCHES` patches around the pattern of their class; a view hides some patches."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.patterns = self._normal(CLASSES, 1, INPUTS)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def sample(self, count: int) -> Tensor:
        classes = torch.randint(CLASSES, (count,), generator=self.generator)
        own = 0.5 * self._normal(count, 1, INPUTS)  # by which it differs from others of its class
        return self.patterns[classes] + own + self._normal(count, PATCHES, INPUTS)

    def view(self, images: Tensor) -> Tensor:
        shown = torch.rand(*images.shape[:2], 1, generator=self.generator) < 0.6
        return (images + 0.5 * self._normal(*images.shape)) * shown


class Network(nn.Module):
    """Patches [B, N, INPUTS] -> features of the patches, of the image, and its prototype scores."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(INPUTS, 128), nn.GELU(), nn.Linear(128, DIMENSIONS))
        self.head = nn.Linear(DIMENSIONS, PROTOTYPES, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = self.body(x)
        image = nn.functional.normalize(patches.mean(1), dim=-1)
        return patches, image, image @ nn.functional.normalize(self.head.weight).T


class Result(NamedTuple):
    """What came out, on new images."""

    found: float  # views whose nearest feature is that of the image's other view
    angle: float  # degrees from an image to the nearest other, on average
    gram: float  # between the patches and those of the early teacher


def train(koleo: float, gram: float, steps: int, seed: int) -> Result:
    """Train with so much of KoLeo, and of the Gram loss in the second half."""
    torch.manual_seed(seed)
    images = Images(seed)
    student = Network()
    teacher = copy.deepcopy(student).requires_grad_(False)
    early = teacher
    center = torch.zeros(PROTOTYPES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for step in range(steps):
        if step == steps // 2:
            early = copy.deepcopy(teacher)
        x = images.sample(128)
        views = images.view(x), images.view(x)
        loss = torch.zeros(())
        with torch.no_grad():
            targets = [teacher(view)[2] for view in views]
            center = 0.9 * center + 0.1 * torch.cat(targets).mean(0)
        for view, target in zip(views, reversed(targets), strict=True):
            patches, image, scores = student(view)
            wanted = ((target - center) / 0.05).softmax(1)
            loss = loss - (wanted * (scores / 0.1).log_softmax(1)).sum(1).mean() / 2
            # within the batch of one view: an image and its other view shall stay together
            loss = loss + koleo * losses.koleo(image)
            if gram and step >= steps // 2:
                with torch.no_grad():
                    early_patches = early(view)[0]
                loss = loss + gram * losses.gram(patches, early_patches).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), student.parameters(), strict=True):
                slow.lerp_(fast, 0.01)
    with torch.no_grad():
        x = images.sample(2048)
        one, other = (teacher(images.view(x))[1] for _ in range(2))
        _, index = nearest(one, other)
        patches, image, _ = teacher(x)
        return Result(
            float((index == torch.arange(len(x))).float().mean()),
            float(nearest(image, angular=True)[0].rad2deg().mean()),
            float(losses.gram(patches, early(x)[0]).mean()),
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train without either loss, with KoLeo, and with both, and compare."""
    parser = argparse.ArgumentParser(description="Train a DINO-like network, KoLeo and Gram.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--koleo", type=float, default=0.1, help="weight of KoLeo, as in DINOv2")
    parser.add_argument("--gram", type=float, default=2.0, help="weight of Gram, as in DINOv3")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    for name, koleo, gram in (
        ("self-distillation alone", 0.0, 0.0),
        ("with KoLeo", options.koleo, 0.0),
        ("with KoLeo and Gram", options.koleo, options.gram),
    ):
        result = train(koleo, gram, options.steps, options.seed)
        print(f"{name}:")
        print(f"  views that find their other view        {result.found:.1%}")
        print(f"  angle to the nearest image, on average  {result.angle:.1f} degrees")
        print(f"  cosines of patches since mid-training   moved by {result.gram**0.5:.3f} (rms)")


if __name__ == "__main__":
    main()
