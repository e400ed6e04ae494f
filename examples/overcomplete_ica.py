"""Learn 256 features of 64-dimensional patches of two photos, without twins.

    python examples/overcomplete_ica.py --picture features.png

Independent component analysis looks for directions in which the data are sparse. With more
directions than dimensions nothing keeps two of them from being the same one, and without a
regularizer many are. Soft orthogonality, |V V^T - I|^2, cannot part them: for more rows than
dimensions it is as low for any tight frame, duplicates included. The half-space hyperspherical
energy grows without bound at duplicates: none is left. How well ten features together explain a
patch (by orthogonal matching pursuit) tells whether that was worth it.

The photos come with scikit-learn, the features are trained on their left part and judged on the
right one. Soft orthogonality and the sparsity of overcomplete features: Le et al. (2011), RICA.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from sklearn.decomposition import sparse_encode
from torch import Tensor
from torch.nn.functional import normalize, softplus

from comhe_ext import hyperspherical_energy, nearest

SIZE, DIMENSIONS, FEATURES = 8, 64, 256
TRAIN, TEST = slice(0, 400), slice(520, 640)  # columns of the photos
# factor of each regularizer, chosen on columns that are in neither part
METHODS = {"none": 0.0, "soft orthogonality": 0.1, "half-space energy": 40.0}


class Patches(NamedTuple):
    """Whitened patches, and what turns features back into patches."""

    train: Tensor
    test: Tensor
    unwhiten: Tensor  # [DIMENSIONS, SIZE * SIZE * 3]


def load_patches(per_image: int, seed: int = 0) -> Patches:
    """Cut patches out of both photos, without their mean and the flat ones, and whiten them."""
    random = np.random.default_rng(seed)
    photos = [photo.astype(np.float32) / 255 for photo in load_sample_images().images]

    def cut(columns: slice, count: int) -> Tensor:
        found = []
        for photo in photos:
            part = photo[:, columns]
            windows = np.lib.stride_tricks.sliding_window_view(part, (SIZE, SIZE), axis=(0, 1))
            rows, cols = (random.integers(0, n, count) for n in windows.shape[:2])
            found.append(windows[rows, cols].reshape(count, -1))
        patches = np.concatenate(found)
        patches -= patches.mean(1, keepdims=True)
        return torch.from_numpy(patches[patches.std(1) > 0.03])

    train, test = cut(TRAIN, per_image), cut(TEST, per_image // 10)
    mean = train.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((train - mean).T))
    values, vectors = values[-DIMENSIONS:], vectors[:, -DIMENSIONS:]
    whiten = vectors / values.sqrt()
    return Patches(
        (train - mean) @ whiten, (test - mean) @ whiten, (vectors * values.sqrt()).T.contiguous()
    )


def penalty(method: str, weight: Tensor) -> Tensor | float:
    """Compute a regularizer of the features."""
    if method == "soft orthogonality":
        v = normalize(weight)
        return (v @ v.T - torch.eye(FEATURES)).square().sum() / FEATURES
    if method == "half-space energy":
        return hyperspherical_energy(weight, half_space=True)
    return 0.0


def train(method: str, patches: Patches, steps: int, seed: int) -> Tensor:
    """Learn the features, unit rows [FEATURES, DIMENSIONS]."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(FEATURES, DIMENSIONS, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x = patches.train[torch.randint(len(patches.train), (1000,), generator=generator)]
        size = 2.0 * (x @ normalize(weight).T).abs()
        sparsity = (size + softplus(-2.0 * size)).mean()  # log cosh, up to a constant
        loss = sparsity + METHODS[method] * penalty(method, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return normalize(weight.detach())


class Result(NamedTuple):
    """What came out."""

    twins: float  # share of the features with another at |cos| above 0.9
    largest_cosine: float
    unexplained: float  # share of the test patches' variance that ten features leave


def judge(features: Tensor, patches: Patches) -> Result:
    """Compare the features with each other, and with patches that were not trained on."""
    cosines = nearest(features, half_space=True, angular=True)[0].cos()
    x, v = patches.test.double().numpy(), features.double().numpy()
    code = sparse_encode(x, v, algorithm="omp", n_nonzero_coefs=10)
    unexplained = np.square(x - code @ v).sum() / np.square(x).sum()
    return Result(float((cosines > 0.9).float().mean()), float(cosines.max()), float(unexplained))


def draw(features: dict[str, Tensor], patches: Patches, file: Path) -> None:
    """Draw the features as patches, those with a twin framed."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    figure, all_axes = plt.subplots(
        1, len(features), figsize=(5 * len(features), 5.3), layout="constrained", squeeze=False
    )
    side = int(FEATURES**0.5)
    for axes, (method, rows) in zip(all_axes[0], features.items(), strict=True):
        pictures = (rows @ patches.unwhiten).view(FEATURES, 3, SIZE, SIZE)
        pictures = 0.5 + 0.5 * pictures / pictures.abs().amax((1, 2, 3), keepdim=True)
        place = SIZE + 2
        canvas = torch.ones(side * place, side * place, 3)
        cosines = nearest(rows, half_space=True, angular=True)[0].cos()
        # features and their twins stand together
        first = torch.pca_lowrank(rows, q=1)[0][:, 0]
        for at, index in enumerate(first.argsort().tolist()):
            y, x = place * (at // side) + 1, place * (at % side) + 1
            canvas[y : y + SIZE, x : x + SIZE] = pictures[index].permute(1, 2, 0)
            if cosines[index] > 0.9:
                frame = Rectangle((x - 1, y - 1), SIZE + 1, SIZE + 1, fill=False, color="red")
                axes.add_patch(frame)
        axes.imshow(canvas.numpy(), interpolation="nearest")
        axes.set_title(f"{method}: {float((cosines > 0.9).float().mean()):.0%} have a twin")
        axes.set_axis_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with each regularizer, and compare."""
    parser = argparse.ArgumentParser(description="Learn features of photos, without twins.")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--patches", type=int, default=40_000, help="of each photo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="file to draw the features into")
    options = parser.parse_args(arguments)
    patches, features = load_patches(options.patches), {}
    for method in METHODS:
        features[method] = train(method, patches, options.steps, options.seed)
        result = judge(features[method], patches)
        print(f"{method}:")
        print(f"  features with a twin, |cos| > 0.9   {result.twins:.1%}")
        print(f"  largest |cos|                       {result.largest_cosine:.3f}")
        print(f"  variance that 10 features leave     {result.unexplained:.2%}")
    if options.picture:
        draw(features, patches, options.picture)


if __name__ == "__main__":
    main()
