"""Plain convolutional networks: those of the paper, and a small one for two cores."""

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

from bench.training.data import CLASSES

# convolutions and channels of each stage, and the width of the hidden layer after them
Stages = Sequence[tuple[int, int]]
SMALL: Stages = ((1, 32), (2, 64), (2, 96))
NETWORKS = ("small", "CNN-6", "CNN-9", "CNN-15")


def network(name: str, size: int, width: int = 64) -> nn.Sequential:
    """Build a network for images of `size` pixels.

    "CNN-6", "CNN-9" and "CNN-15" are three stages of 2, 3 and 5 convolutions with `width`, twice
    and four times as many channels, a pool after each, a hidden layer as wide as the last of them
    and the classes (Liu et al., 2018). "small" has 32 | 64, 64 | 96, 96 channels and no last pool.
    """
    if name == "small":
        return _build(SMALL, size // 4, pool_last=False)
    if name not in NETWORKS:
        raise ValueError(f"unknown network {name!r}, one of {NETWORKS}")
    convolutions = {"CNN-6": 2, "CNN-9": 3, "CNN-15": 5}[name]
    stages = [(convolutions, width << stage) for stage in range(3)]
    return _build(stages, size // 8, pool_last=True)


def _build(stages: Stages, left: int, pool_last: bool) -> nn.Sequential:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage, (convolutions, width) in enumerate(stages, 1):
        for number in range(1, convolutions + 1):
            at = f"{stage}_{number}"
            modules[f"conv{at}"] = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            modules[f"norm{at}"] = nn.BatchNorm2d(width)
            modules[f"relu{at}"] = nn.ReLU(inplace=True)
            channels = width
        if pool_last or stage < len(stages):
            modules[f"pool{stage}"] = nn.MaxPool2d(2)
    modules["flatten"] = nn.Flatten()
    modules["hidden"] = nn.Linear(channels * left * left, channels)
    modules["output"] = nn.Linear(channels, CLASSES)
    for module in modules.values():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return nn.Sequential(modules)
