"""Gradients that go straight to the parameters."""

import torch
from torch import Tensor


def accumulate(output: Tensor, factor: Tensor) -> None:
    """Add the gradient of `output` times `factor` to the `.grad` of all leaves that it reaches.

    What a backward leaves, bit for bit, without the hooks that run when a gradient is accumulated.
    """
    leaves = _leaves(output)
    # a weight may be part of a graph that is still wanted
    gradients = torch.autograd.grad(output, leaves, factor, retain_graph=True)
    given: set[int] = set()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        # one tensor may be the gradient of several leaves, and none may see another's sums
        alias = gradient.data_ptr() in given
        given.add(gradient.data_ptr())
        # by autograd itself, which knows of strides and sparse gradients, on a tensor that has none
        # of the leaf's hooks
        stand_in = leaf.detach().requires_grad_()
        stand_in.grad = leaf.grad
        torch.autograd.backward(stand_in.view_as(stand_in), gradient.clone() if alias else gradient)
        leaf.grad = stand_in.grad


def _leaves(output: Tensor) -> list[Tensor]:
    """Find the leaves that a backward from `output` reaches."""
    leaves: list[Tensor] = []
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        stack += [parent for parent, _ in node.next_functions]
    return leaves
