"""Hugging Face: `Trainer(..., compute_loss_func=regularized(comhe, loss, args))`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from transformers import TrainingArguments
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'comhe-ext[transformers]'") from error

from comhe_ext.regularizer import CoMHE


def regularized(
    comhe: CoMHE, loss: Callable[..., Tensor], args: TrainingArguments
) -> Callable[..., Tensor]:
    """Make a `compute_loss_func` of the `Trainer` out of a loss and a regularizer.

    Torch equivalent::

        lambda outputs, labels, num_items_in_batch: loss(...) + comhe() / batches_of_a_step

    The Trainer does not divide what a `compute_loss_func` returns by the batches that it gathers
    for one step, and multiplies it by the number of processes where tokens are averaged across
    them; the regularizer's share makes up for both, so that a step sees it once.

    Args:
        comhe: the regularizer of the model.
        loss: called with (outputs, labels, num_items_in_batch=...), as the Trainer would.
        args: the arguments of the Trainer.
    """

    def compute_loss(
        outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        parts = args.gradient_accumulation_steps
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            parts *= args.world_size
        task = loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        # an evaluation reports the loss of the task
        return task + comhe() / parts if task.requires_grad else task

    return compute_loss
