"""The examples of the documentation, and CoMHE in other people's training loops."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from comhe_ext import CoMHE
from comhe_ext.projections import RandomProjection
from comhe_ext.testing import random_rows, relative_error

ROOT = Path(__file__).parents[1]


def examples():
    """The Python blocks of each page, by their headings."""
    for page in sorted((ROOT / "docs").glob("*.md")):
        for section in re.split(r"^#+ ", page.read_text(), flags=re.M):
            blocks = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
            for block in blocks:
                yield pytest.param(block, id=f"{page.stem}: {section.partition(chr(10))[0]}")


@pytest.mark.filterwarnings("ignore")  # of other people's packages
@pytest.mark.parametrize("code", list(examples()))
def test_example(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_importing_the_package_brings_none_of_them():
    code = """
import sys
import torch
before = set(sys.modules)  # torch itself takes tqdm where it is
import comhe_ext, comhe_ext.integrations
names = ("lightning", "pytorch_lightning", "transformers", "pytorch_metric_learning", "tabulate",
         "tqdm", "tensorboard", "triton")
print([name for name in names if name in sys.modules and name not in before])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def network():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 5))


def batches():
    return [(random_rows(8, 60, seed=i), torch.arange(8) * (i + 1) % 5) for i in range(4)]


def loader():
    return torch.utils.data.DataLoader(batches(), batch_size=None)


def task(output, y):
    return nn.functional.cross_entropy(output, y)


def expected_weights(per_step, clip=None):
    """Two steps of so many batches each, by hand."""
    net = network()
    comhe = CoMHE(net, RandomProjection(2, 8, seed=1))
    descent = torch.optim.SGD(net.parameters(), lr=0.1)
    for first in range(0, 4, per_step):
        descent.zero_grad()
        for x, y in batches()[first : first + per_step]:
            (task(net(x), y) / per_step).backward()
        comhe().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        descent.step()
    return list(net.parameters())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_steps_are_those_of_a_loop(tmp_path, precision):
    lightning = pytest.importorskip("lightning")
    from comhe_ext.integrations.lightning import CoMHECallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return task(self.net(batch[0]).float(), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def trainer(callback, **options):
        return lightning.Trainer(
            accelerator="cpu",
            callbacks=[callback],
            accumulate_grad_batches=2,
            gradient_clip_val=0.5,
            precision=precision,
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            **options,
        )

    module = Module()
    callback = CoMHECallback(projection=RandomProjection(2, 8, seed=1))
    whole = trainer(callback, max_epochs=1)
    whole.fit(module, loader())
    assert whole.callback_metrics["comhe"].isfinite()
    bound = 1e-6 if precision == "32-true" else 5e-3
    for one, other in zip(module.net.parameters(), expected_weights(2, clip=0.5), strict=True):
        assert relative_error(one, other) <= bound

    # what a checkpoint brings back is the regularizer at its step
    path = tmp_path / "checkpoint.ckpt"
    whole.save_checkpoint(path)
    again = CoMHECallback(projection=RandomProjection(2, 8, seed=3))
    trainer(again, max_epochs=2).fit(Module(), loader(), ckpt_path=path)
    assert again.comhe.projection._state.tolist() == [1, 4]


@pytest.mark.filterwarnings("ignore")
def test_lightning_with_several_optimizers_is_refused(tmp_path):
    lightning = pytest.importorskip("lightning")
    from comhe_ext.integrations.lightning import CoMHECallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()
            self.automatic_optimization = False

        def training_step(self, batch, _):
            loss = task(self.net(batch[0]), batch[1])
            self.manual_backward(loss)
            self.optimizers()[0].step()

        def configure_optimizers(self):
            return [torch.optim.SGD([p], lr=0.1) for p in self.net[0].parameters()]

    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=1, callbacks=[CoMHECallback()], logger=False,
        default_root_dir=tmp_path, enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="several optimizers"):
        trainer.fit(Module(), loader())
    with pytest.raises(ValueError, match="already has its options, got .*'s'"):
        CoMHECallback(CoMHE(network()), s=1.0)


@pytest.mark.filterwarnings("ignore")
def test_trainer_of_transformers_counts_the_regularizer_once_a_step(tmp_path):
    transformers = pytest.importorskip("transformers")
    from comhe_ext.integrations.transformers import regularized

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x, labels=None):
            return {"logits": self.net(x)}

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        learning_rate=0.1, lr_scheduler_type="constant", max_grad_norm=0.0, optim="sgd",
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model = Model()
    # both batches of a step under the same matrices, as in the loop
    comhe = CoMHE(model, RandomProjection(2, 8, every=2, seed=1))
    rows = [dict(x=x, labels=y) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(
        model, args, train_dataset=rows, compute_loss_func=regularized(comhe, loss, args)
    )
    trainer.train()
    for one, other in zip(model.net.parameters(), expected_weights(2), strict=True):
        assert relative_error(one, other) <= 1e-5


def test_regularizer_of_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    from comhe_ext import compressive_energy, hyperspherical_energy
    from comhe_ext.integrations.metric_learning import EnergyRegularizer

    def head(**options):
        torch.manual_seed(1)
        return losses.ArcFaceLoss(
            20, 12, weight_regularizer=EnergyRegularizer(**options), weight_reg_weight=3.0
        )

    torch.manual_seed(1)
    plain = losses.ArcFaceLoss(20, 12)
    x, y = random_rows(8, 12), torch.arange(8)
    weight = plain.W.detach().T
    expected = plain(x, y) + 3 * hyperspherical_energy(weight, 1.0)
    assert relative_error(head(s=1.0)(x, y), expected) <= 1e-6
    with torch.random.fork_rng():
        torch.manual_seed(7)
        projected = head(num_projections=2, dim=5)
        torch.manual_seed(7)
        energy = projected(x, y)
        torch.manual_seed(7)
        expected = plain(x, y) + 3 * compressive_energy(weight, torch.randn(2, 5, 12))
    assert relative_error(energy, expected) <= 1e-6
    energy.backward()
    assert projected.W.grad.isfinite().all()
    with pytest.raises(ValueError, match="`num_projections` must be at least 0"):
        EnergyRegularizer(num_projections=-1)
