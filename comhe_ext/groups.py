"""Groups of coordinates: a kind of projection that only selects."""

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from comhe_ext.checks import check_count
from comhe_ext.operators.library import DTYPES


def split_columns(
    weight: Tensor, groups: int | Sequence[Sequence[int] | Tensor]
) -> Sequence[Tensor]:
    """Take the columns of each group."""
    features = weight.shape[-1]
    if isinstance(groups, (bool, str)) or not isinstance(groups, (int, Integral, Sequence)):
        raise TypeError(
            f"`groups` must be an int or a sequence of index sequences, got {type(groups).__name__}"
        )
    if not isinstance(groups, Sequence):
        if not 1 <= groups <= features:
            raise ValueError(
                f"`groups` must be between 1 and the {features} columns of `weight`, got {groups}"
            )
        return weight.tensor_split(check_count("groups", groups), -1)
    if len(groups) == 0:
        raise ValueError("`groups` must name at least one group, got none")
    parts = []
    for number, group in enumerate(groups):
        try:
            # on the host: a default device that is a GPU would be waited for at each call
            index = group if isinstance(group, Tensor) else torch.tensor(group, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"`groups[{number}]` must be a list of columns: {error}") from None
        integral = index.dtype not in (torch.bool, *DTYPES)
        if index.dim() != 1 or index.numel() == 0 or not integral:
            raise ValueError(
                f"each of `groups` must be a non-empty list of columns, got {index.dtype} of shape "
                f"{tuple(index.shape)} for `groups[{number}]`"
            )
        lowest, highest = int(index.min()), int(index.max())
        if lowest < 0 or highest >= features:
            raise ValueError(
                f"`groups` must name columns from 0 to {features - 1} of `weight`, got "
                f"{lowest if lowest < 0 else highest} in `groups[{number}]`"
            )
        parts.append(weight.index_select(-1, index.to(weight.device)))
    return parts
