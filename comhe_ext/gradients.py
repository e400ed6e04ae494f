"""Gradients that are added to parameters without running the hooks of a backward."""

import torch
from torch import Tensor


def accumulate(output: Tensor, factor: Tensor) -> None:
    """Add the gradient of `output` times `factor` to the `.grad` of all leaves that it reaches.

    The result is that of a backward, bit for bit, but hooks on the accumulation do not run.
    """
    leaves = _leaves(output)
    # the graph of a weight may still be needed
    gradients = torch.autograd.grad(output, leaves, factor, retain_graph=True)
    given: set[int] = set()
    for leaf, gradient in zip(leaves, gradients, strict=True):
        # several leaves may share one gradient tensor, but must not share what accumulates in it
        alias = gradient.data_ptr() in given
        given.add(gradient.data_ptr())
        # autograd itself accumulates, for strides and sparse gradients, but on a stand-in that has
        # none of the leaf's hooks
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
