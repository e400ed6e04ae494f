"""PyTorch Lightning: `Trainer(callbacks=[CoMHECallback()])`."""

from typing import Any

from torch.optim import Optimizer

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    try:
        from pytorch_lightning import (  # type: ignore[assignment]
            Callback,
            LightningModule,
            Trainer,
        )
    except ImportError as error:
        raise ImportError(
            "this needs PyTorch Lightning: pip install 'comhe-ext[lightning]'"
        ) from error

from comhe_ext.regularizer import CoMHE


class CoMHECallback(Callback):
    """Add the regularizer's gradient before each step of the optimizer, and log its energy.

    Torch equivalent::

        comhe.accumulate_gradients()    # after the backward, before clipping and the step

    The LightningModule and its loss stay as they are. Gradient accumulation, mixed precision and
    DDP are supported, and the state is part of the checkpoint.

    Args:
        comhe: the regularizer; None makes `CoMHE(module, **options)` when the fit begins.
        name: of the logged energy; None logs nothing.
        options: see `comhe_ext.CoMHE`.

    Raises:
        ValueError: at the first step, if the module has several optimizers.
    """

    def __init__(
        self, comhe: CoMHE | None = None, *, name: str | None = "comhe", **options: Any
    ) -> None:
        if comhe is not None and options:
            raise ValueError(f"`comhe` already has its options, got {sorted(options)}")
        self.comhe = comhe
        self.name = name
        self._options = options
        self._state: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.comhe is None:
            self.comhe = CoMHE(pl_module, **self._options)
        if self.comhe is not None and self._state is not None:
            self.comhe.load_state_dict(self._state)
            self._state = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        if len(trainer.optimizers) > 1:
            raise ValueError(
                "CoMHECallback cannot tell which of several optimizers it belongs to: "
                "add comhe() to the loss in training_step"
            )
        # Lightning has unscaled the gradients, unless the optimizer does so in its step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler = None
        assert self.comhe is not None
        energy = self.comhe.accumulate_gradients(scaler)
        if self.name is not None:
            pl_module.log(self.name, energy)

    def state_dict(self) -> dict[str, Any]:
        return {} if self.comhe is None else self.comhe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.comhe is None:
            self._state = state_dict
        else:
            self.comhe.load_state_dict(state_dict)
