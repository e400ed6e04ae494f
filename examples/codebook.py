"""Keep the codes of a vector-quantized autoencoder in use, by their uniformity.

    python examples/codebook.py

Each vector between encoder and decoder is replaced by the code of the largest cosine. A code that
lies where no vector comes is never chosen, gets no gradient and stays dead. Codes that cover the
sphere evenly have few such places: the uniformity loss of the codebook pushes them there, or the
frame potential, which asks less: that no direction is preferred.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from comhe_ext import losses, nearest

INPUTS, DIMENSIONS, CODES, CLUSTERS = 32, 8, 128, 128


class Quantizer(nn.Module):
    """Replace rows by their codes; the gradient passes straight through."""

    def __init__(self) -> None:
        super().__init__()
        # new codes lie close together, as the vectors do that an untrained encoder makes
        self.codes = nn.Parameter(torch.ones(DIMENSIONS) + 0.3 * torch.randn(CODES, DIMENSIONS))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = nn.functional.normalize(z)
        with torch.no_grad():
            _, chosen = nearest(z, self.codes)
        code = nn.functional.normalize(self.codes[chosen])
        apart = (code - z.detach()).square().sum(1).mean()
        commitment = (code.detach() - z).square().sum(1).mean()
        return z + (code - z).detach(), chosen, apart + 0.25 * commitment


class Result(NamedTuple):
    """What came out, on data that were not trained on."""

    unexplained: float  # share of the variance
    used: int  # codes that were chosen at all
    perplexity: float  # as many codes, chosen equally often, would have the same entropy


def train(regularizer: Callable[[Tensor], Tensor] | None, steps: int, seed: int) -> Result:
    """Train an autoencoder of clustered data, with `regularizer` of the codes in its loss."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    centers = torch.randn(CLUSTERS, INPUTS, generator=generator)

    def sample(count: int) -> Tensor:
        of = torch.randint(CLUSTERS, (count,), generator=generator)
        return centers[of] + 0.2 * torch.randn(count, INPUTS, generator=generator)

    encoder = nn.Sequential(nn.Linear(INPUTS, 128), nn.ReLU(), nn.Linear(128, DIMENSIONS))
    decoder = nn.Sequential(nn.Linear(DIMENSIONS, 128), nn.ReLU(), nn.Linear(128, INPUTS))
    quantizer = Quantizer()
    parts = nn.ModuleList([encoder, quantizer, decoder])
    optimizer = torch.optim.Adam(parts.parameters(), lr=2e-3)
    for _ in range(steps):
        x = sample(256)
        z, _, quantization = quantizer(encoder(x))
        loss = (decoder(z) - x).square().mean() + quantization
        if regularizer is not None:
            loss = loss + regularizer(quantizer.codes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        x = sample(8192)
        z, chosen, _ = quantizer(encoder(x))
        unexplained = (decoder(z) - x).square().sum() / (x - x.mean(0)).square().sum()
    share = chosen.bincount(minlength=CODES) / len(chosen)
    return Result(
        float(unexplained), int((share > 0).sum()), float(torch.special.entr(share).sum().exp())
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with each regularizer, and compare."""
    parser = argparse.ArgumentParser(description="Keep the codes of a codebook in use.")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--factor", type=float, default=0.1, help="of the regularizer in the loss")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    regularizers: dict[str, Callable[[Tensor], Tensor] | None] = {
        "no regularizer": None,
        "frame potential": lambda codes: options.factor * losses.frame_potential(codes),
        "uniformity": lambda codes: options.factor * losses.uniformity(codes),
    }
    for name, regularizer in regularizers.items():
        result = train(regularizer, options.steps, options.seed)
        print(
            f"{name:>15}: variance left {result.unexplained:6.2%}, codes in use "
            f"{result.used:3d} of {CODES}, perplexity {result.perplexity:5.1f}"
        )


if __name__ == "__main__":
    main()
