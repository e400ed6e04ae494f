"""CIFAR-100 from a folder: the official files, or mosaics of its images.

Nothing is downloaded, and nothing of the images is kept beside the folder.
"""

import io
import itertools
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

CLASSES = 100
SIZE = 32
MEAN = torch.tensor([0.5071, 0.4865, 0.4409]).view(3, 1, 1)
DEVIATION = torch.tensor([0.2673, 0.2564, 0.2762]).view(3, 1, 1)


@dataclass(frozen=True)
class Images:
    """Pictures and their classes."""

    pixels: Tensor  # uint8 [N, 3, size, size]
    labels: Tensor  # int64 [N]

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, index: Tensor) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: str) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Split:
    """The images of one run."""

    train: Images
    validation: Images
    test: Images

    def to(self, device: str) -> "Split":
        return Split(self.train.to(device), self.validation.to(device), self.test.to(device))


def load(folder: Path, size: int = SIZE) -> tuple[Images, Images]:
    """Read the training and the test images, averaged to `size` x `size` pixels.

    `folder` holds `cifar-100-python` as torchvision leaves it, or the files `train` and `test` of
    that folder, or mosaics `train*.npz` and `test.npz`: WebP pictures of 10 x 10 images (`blob`,
    `offsets`) with `labels`.

    Raises:
        FileNotFoundError: it holds none of them.
    """
    official = folder / "cifar-100-python" if (folder / "cifar-100-python").is_dir() else folder
    mosaics = sorted(folder.glob("train*.npz"))
    if (official / "train").is_file() and (official / "test").is_file():
        parts = [_official(official / "train"), _official(official / "test")]
    elif mosaics and (folder / "test.npz").is_file():
        parts = [_join([_mosaics(file) for file in mosaics]), _mosaics(folder / "test.npz")]
    else:
        raise FileNotFoundError(
            f"{folder} holds neither cifar-100-python/train and test nor train*.npz and test.npz"
        )
    train, test = (_averaged(part, size) for part in parts)
    return train, test


class _ArraysOnly(pickle.Unpickler):
    """Reads dicts, lists, strings and NumPy arrays: a pickle may name any function to be called."""

    ALLOWED = {("_codecs", "encode")} | {
        (f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (module == "numpy" and name in ("ndarray", "dtype")):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"a file of images names {module}.{name}")


def _official(file: Path) -> Images:
    with file.open("rb") as stream:
        content = _ArraysOnly(stream, encoding="bytes").load()
    pixels = np.asarray(content[b"data"], dtype=np.uint8).reshape(-1, 3, SIZE, SIZE)
    labels = torch.tensor(content[b"fine_labels"], dtype=torch.int64)
    return Images(torch.from_numpy(pixels.copy()), labels)


def _mosaics(file: Path) -> Images:
    side = 10
    with np.load(file, allow_pickle=False) as content:
        blob, offsets = content["blob"], content["offsets"]
        labels = torch.from_numpy(content["labels"].astype(np.int64))
    pictures = []
    for begin, end in itertools.pairwise(offsets):
        with Image.open(io.BytesIO(blob[begin:end].tobytes())) as picture:
            mosaic = np.asarray(picture.convert("RGB"))
        tiles = mosaic.reshape(side, SIZE, side, SIZE, 3).transpose(0, 2, 4, 1, 3)
        pictures.append(torch.from_numpy(tiles.reshape(-1, 3, SIZE, SIZE).copy()))
    return Images(torch.cat(pictures), labels)


def _join(parts: list[Images]) -> Images:
    return Images(torch.cat([x.pixels for x in parts]), torch.cat([x.labels for x in parts]))


def _averaged(images: Images, size: int) -> Images:
    if size == SIZE:
        return images
    if SIZE % size:
        raise ValueError(f"images of {SIZE} pixels cannot be averaged to {size}")
    pools = [
        torch.nn.functional.avg_pool2d(part.float(), SIZE // size).round().to(torch.uint8)
        for part in images.pixels.split(5000)
    ]
    return Images(torch.cat(pools), images.labels)


def split(train: Images, test: Images, per_class: int, validation: int, seed: int) -> Split:
    """Hold out `validation` images, the same for all seeds, and draw `per_class` of the others."""
    by_class = [(train.labels == label).nonzero().squeeze(1) for label in range(CLASSES)]
    held, taken = [], []
    each = validation // CLASSES
    fixed, drawn = Generator().manual_seed(0), Generator().manual_seed(seed)
    for members in by_class:
        if each + per_class > len(members):
            raise ValueError(
                f"{per_class} images a class and {each} for validation: there are {len(members)}"
            )
        shuffled = members[torch.randperm(len(members), generator=fixed)]
        held.append(shuffled[:each])
        rest = shuffled[each:]
        taken.append(rest[torch.randperm(len(rest), generator=drawn)[:per_class]])
    return Split(train.of(torch.cat(taken)), train.of(torch.cat(held)), test)


def normalized(pixels: Tensor) -> Tensor:
    """Scale uint8 pixels to mean 0 and deviation 1 of a channel, over all of CIFAR-100."""
    return (pixels.float() / 255.0 - MEAN.to(pixels.device)) / DEVIATION.to(pixels.device)


def augmented(pixels: Tensor, generator: Generator) -> Tensor:
    """Cut each image out of itself with a mirrored rim of an eighth, and flip every second one.

    The generator is the processor's, so that the draws are the same on all devices.
    """
    n, _, size, _ = pixels.shape
    rim = size // 8
    padded = torch.nn.functional.pad(pixels.float(), (rim,) * 4, mode="reflect").to(torch.uint8)
    shifts = torch.randint(2 * rim + 1, (2, n, 1), generator=generator)
    flips = torch.rand(n, 1, generator=generator) < 0.5
    steps = torch.arange(size)
    rows = shifts[0] + steps
    columns = shifts[1] + torch.where(flips, size - 1 - steps, steps)
    image = torch.arange(n)
    image, rows, columns = (index.to(pixels.device) for index in (image, rows, columns))
    return padded[image[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )
