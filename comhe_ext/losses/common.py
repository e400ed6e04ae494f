"""What the losses share: checks of their arguments, and the loss of a set without pairs."""

import math

import torch
from torch import Tensor

from comhe_ext.checks import check_number, check_tensor, check_weight
from comhe_ext.operators.library import compute_dtype


def nothing(rows: Tensor) -> Tensor:
    """Make the loss of sets without a pair: 0, with a gradient of 0, even of NaN."""
    every = torch.ones_like(rows, dtype=torch.bool)
    return rows.to(compute_dtype(rows)).masked_fill(every, 0.0).sum((-2, -1))


def positive(name: str, value: float) -> float:
    """Return a finite number greater than 0."""
    value = check_number(name, value)
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be finite and greater than 0, got {value}")
    return value


def check_matrix(name: str, x: Tensor) -> None:
    """Refuse what is not a set of rows [N, d]."""
    check_weight(x, name)
    if x.dim() != 2:
        raise ValueError(f"`{name}` must be 2-D, got shape {tuple(x.shape)}")


def check_labels(labels: Tensor, weight: Tensor, features: Tensor | None = None) -> None:
    """Refuse labels that are no integers, or on another device than the weights."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"`labels` must be a torch.Tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`labels` must be int32 or int64, got {labels.dtype}")
    shape = None if features is None else tuple(features.shape[:1])
    if labels.dim() != 1 or (shape is not None and tuple(labels.shape) != shape):
        expected = "1-D" if shape is None else f"of shape {shape}"
        raise ValueError(f"`labels` must be {expected}, got shape {tuple(labels.shape)}")
    if labels.device != weight.device:
        raise ValueError(
            f"`labels` must be on the device of `weight`, got {labels.device} and {weight.device}"
        )


def check_views(anchors: Tensor, positives: Tensor) -> None:
    """Refuse what are not two views [N, d] of the same samples."""
    check_matrix("anchors", anchors)
    check_matrix("positives", positives)
    if anchors.shape != positives.shape:
        raise ValueError(
            "`positives` must have the shape of `anchors`, got "
            f"{tuple(positives.shape)} and {tuple(anchors.shape)}"
        )
    if anchors.device != positives.device:
        raise ValueError(
            f"`positives` must be on the device of `anchors`, got {positives.device} and "
            f"{anchors.device}"
        )


def as_row(name: str, point: Tensor) -> Tensor:
    """Make a set of one row of a point [d]."""
    check_tensor(name, point)
    if point.dim() != 1:
        raise ValueError(f"`{name}` must be 1-D, got shape {tuple(point.shape)}")
    return point.unsqueeze(0)
