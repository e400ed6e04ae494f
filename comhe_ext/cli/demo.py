"""`comhe-ext demo`: what the package does."""

import argparse
import time

import torch
from torch import nn

import comhe_ext
from comhe_ext import bounds
from comhe_ext.cli import screen
from comhe_ext.kernels.pair_functions import Riesz

HELP = "show what the package does: seconds"
DESCRIPTION = """Spread a few vectors as far as they go, compute the energy of very many, and train
a small network with and without the regularizer. `make demo` in a checkout does more: a real data
set, several seeds, pictures."""
STEPS = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take no options."""


def run(options: argparse.Namespace) -> int:
    """Show the three."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for title, part in (
            ("1. Nine vectors in eight dimensions, turned to low energy", spread),
            ("2. The energy of many vectors, and its gradient", many),
            (f"3. A network, {STEPS} steps with and without the regularizer", train),
        ):
            print(screen.paint(title, screen.BOLD))
            part()
            print()
    return 0


def spread() -> None:
    """Turn random rows to the regular simplex, whose energy is the least there is."""
    rows = torch.randn(9, 8)
    before = float(comhe_ext.hyperspherical_energy(rows))
    comhe_ext.init.minimum_energy_(rows, half_space=False, steps=500)
    after = float(comhe_ext.hyperspherical_energy(rows))
    print(f"  random         {before:.5f}")
    print(f"  after          {after:.5f}")
    print(f"  least possible {bounds.lowest_energy(9, 8, Riesz()):.5f}  (the regular simplex)")


def many() -> None:
    """Time a set whose pairs would not fit into the memory of many machines."""
    n, d = 16384, 32
    rows = torch.randn(n, d, requires_grad=True)
    start = time.perf_counter()
    energy = comhe_ext.hyperspherical_energy(rows)
    energy.backward()
    took = time.perf_counter() - start
    print(f"  {n:,} x {d}: {energy.item():.5f}, expected {bounds.random_energy(n, d, Riesz()):.5f}")
    print(
        f"  {took:.2f} s; a matrix of all pairs would take {4 * n * n / 2**30:.0f} GiB, each time"
    )


def train() -> None:
    """Train a classifier of clusters twice from the same weights, and compare the energies."""
    centers = torch.randn(10, 32)
    labels = torch.randint(10, (4096,))
    x = centers[labels] + 2.5 * torch.randn(4096, 32)
    state = _network().state_dict()
    results = {}
    for name, weight in (("without", 0.0), ("with", 1.0)):
        model = _network()
        model.load_state_dict(state)
        regularizer = comhe_ext.CoMHE(model, projection=None, output_layer="4")
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for step in range(STEPS):
            batch = torch.arange(64 * step, 64 * step + 64) % 2048
            loss = nn.functional.cross_entropy(model(x[batch]), labels[batch])
            optimizer.zero_grad()
            (loss + weight * regularizer()).backward()
            optimizer.step()
        right = float((model(x[2048:]).argmax(1) == labels[2048:]).float().mean())
        energies = {key: value.energy for key, value in regularizer.energies().items()}
        results[name] = [f"{100 * right:.1f}", *(f"{x:.4f}" for x in energies.values())]
    lowest = [f"{value.lowest:.4f}" for value in regularizer.energies().values()]
    headers = ("  regularizer", "right, %", *(f"energy of layer {key}" for key in energies))
    lines = [[f"  {name}", *cells] for name, cells in results.items()]
    screen.print_table(headers, [*lines, ["  least possible", "", *lowest]])


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
