"""Hugging Face: `Trainer(..., compute_loss_func=regularized(comhe, loss, args))`."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

try:
    from accelerate.state import GradientState
    from transformers import TrainingArguments
except ImportError as error:
    raise ImportError("this needs transformers: pip install 'comhe-ext[transformers]'") from error

from comhe_ext.regularizer import CoMHE


def regularized(
    comhe: CoMHE, loss: Callable[..., Tensor], args: TrainingArguments
) -> Callable[..., Tensor]:
    """Make a `compute_loss_func` of the `Trainer` out of a loss and a regularizer.

    Torch equivalent::

        comhe().backward()    # once before each step of the optimizer, and before clipping

    The regularizer is added to the loss of the last batch that the Trainer gathers for a step. So
    a step sees it once and counts as one, however many batches it has, also at the end of an epoch,
    where there may be fewer.

    Args:
        comhe: the regularizer of the model.
        loss: called with (outputs, labels, num_items_in_batch=...), as the Trainer would.
        args: the arguments of the Trainer.
    """

    def compute_loss(
        outputs: Any, labels: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        task = loss(outputs, labels, num_items_in_batch=num_items_in_batch)
        # an evaluation reports the loss of the task; the Trainer tells Accelerate before each batch
        # whether a step follows it
        if not task.requires_grad or not GradientState().sync_gradients:
            return task
        energy = comhe()
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            # the Trainer multiplies what it gets by this number
            energy = energy / (args.n_gpu if args.n_gpu > 1 else args.world_size)
        return task + energy

    return compute_loss
