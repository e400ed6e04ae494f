"""Kinds of rows that an estimate of the energy meets: from the even to those of heavy tails."""

import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import normalize

# token kinds whose counts span the space of the word vectors
CONTEXTS = 512
# tokens to each side that count as near a token
WINDOW = 4


def uniform(n: int, k: int, generator: Generator) -> Tensor:
    """Draw uniform directions."""
    return torch.randn(n, k, generator=generator)


def clusters(n: int, k: int, generator: Generator) -> Tensor:
    """Draw rows around 50 centers, at about 45 degrees."""
    centers = normalize(torch.randn(50, k, generator=generator))
    number = torch.randint(50, (n,), generator=generator)
    return centers[number] + normalize(torch.randn(n, k, generator=generator))


def tight(n: int, k: int, generator: Generator) -> Tensor:
    """Draw rows around centers, at about 17 degrees; the sizes of the clusters fall as Zipf's."""
    count = max(n // 64, 2)
    chances = 1.0 / torch.arange(1.0, count + 1)
    number = torch.multinomial(chances, n, replacement=True, generator=generator)
    centers = normalize(torch.randn(count, k, generator=generator))
    return centers[number] + 0.3 * normalize(torch.randn(n, k, generator=generator))


def cone(n: int, k: int, generator: Generator) -> Tensor:
    """Draw rows in a cone, of mean cosine 0.7."""
    axis = normalize(torch.randn(1, k, generator=generator))
    return axis + (3.0 / 7.0) ** 0.5 * normalize(torch.randn(n, k, generator=generator))


def near_duplicates(n: int, k: int, generator: Generator) -> Tensor:
    """Draw uniform directions, 1 % of which another one repeats, but for 0.01 radians."""
    rows = normalize(torch.randn(n, k, generator=generator))
    twins = max(n // 100, 1)
    across = normalize(torch.randn(twins, k, generator=generator))
    rows[-twins:] = rows[:twins] + 0.01 * across
    return rows


def words(n: int, k: int, generator: Generator) -> Tensor:
    """Make word vectors of tokens of Python's standard library; the rarest are much alike.

    Positive pointwise mutual information with the most frequent tokens, and of it the largest
    singular vectors, times the roots of the singular values.
    """
    tokens = _tokens(3 * n // 2)
    frequent = [token for token, _ in Counter(tokens).most_common(n)]
    if len(frequent) < n:
        raise ValueError(f"the standard library has {len(frequent)} different tokens, not {n}")
    number_of = {token: number for number, token in enumerate(frequent)}
    numbers = torch.tensor([number_of.get(token, -1) for token in tokens])
    counts = torch.zeros(n * CONTEXTS)
    for shift in range(1, WINDOW + 1):
        pairs = torch.stack([numbers[:-shift], numbers[shift:]])
        for token, context in (pairs, pairs.flip(0)):
            known = (token >= 0) & (context >= 0) & (context < CONTEXTS)
            places = token[known] * CONTEXTS + context[known]
            counts += places.bincount(minlength=n * CONTEXTS)
    table = counts.view(n, CONTEXTS)
    expected = table.sum(1, keepdim=True) * table.sum(0) / table.sum()
    information = (table / expected.clamp_min(1e-9)).clamp_min(1.0).log()
    values, vectors = torch.linalg.eigh(information.mT @ information)
    rows = normalize((information @ vectors[:, -k:]) / values[-k:].clamp_min(1e-9) ** 0.25)
    # rare tokens of the very same contexts would coincide, and have no direction to part in
    return rows + 0.02 * normalize(torch.randn(n, k, generator=generator))


@cache
def _tokens(kinds: int) -> list[str]:
    """Read tokens of the standard library, until there are so many different ones, or all."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = [x for x in folder.rglob("*.py") if "site-packages" not in x.parts]
    tokens: list[str] = []
    found: set[str] = set()
    for file in sorted(files, key=lambda x: (len(x.parts), x)):
        text = file.read_text(encoding="utf-8", errors="replace")
        some = re.findall(r"\w+|[^\w\s]", text)
        tokens += some
        found.update(some)
        if len(found) >= kinds:
            break
    return tokens


KINDS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "uniform": uniform,
    "clusters": clusters,
    "tight": tight,
    "cone": cone,
    "near-duplicates": near_duplicates,
    "words": words,
}


def rows_of_kind(kind: str, n: int, k: int, seed: int = 0) -> Tensor:
    """Make n rows of a kind of `KINDS`, [n, k]."""
    return KINDS[kind](n, k, Generator().manual_seed(seed))
