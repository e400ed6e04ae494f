"""Train a classifier of many classes under FSDP2, with the regularizer, on processors or GPUs.

    torchrun --nproc-per-node 2 examples/distributed/fsdp2.py

The weights stay sharded: of the head's rows only the energy's share of each rank is computed there.
With any number of ranks that divides the batch the losses are those of one rank.
"""

import argparse

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import comhe_ext


def main() -> None:
    """Train for some steps, and print the losses of the whole batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())

    torch.manual_seed(0)  # the same model and data on all ranks
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64), nn.Linear(64, arguments.classes)
    ).to(device)
    inputs, labels = torch.randn(256, 64), torch.randint(arguments.classes, (256,))
    part = slice(256 // ranks * rank, 256 // ranks * (rank + 1))
    x, y = inputs[part].to(device), labels[part].to(device)

    mesh = init_device_mesh(device, (ranks,))
    for layer in (*model, model):
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    comhe = comhe_ext.CoMHE(model, output_layer="3")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for step in range(arguments.steps):
        task = nn.functional.cross_entropy(model(x), y)
        energy = comhe()
        optimizer.zero_grad()
        (task + energy).backward()
        optimizer.step()

        mean = task.detach() / ranks
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step}: task {float(mean):.4f}, energy {float(energy.detach()):.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
