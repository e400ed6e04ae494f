"""CoMHE in other people's training loops."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from comhe_ext import CoMHE
from comhe_ext.projections import RandomProjection
from comhe_ext.testing import random_rows, relative_error


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


class Stream(torch.utils.data.IterableDataset[torch.Tensor]):
    """Rows of which nobody knows how many there are."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


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

    # a checkpoint restores the step of the regularizer
    path = tmp_path / "checkpoint.ckpt"
    whole.save_checkpoint(path)
    again = CoMHECallback(projection=RandomProjection(2, 8, seed=3))
    trainer(again, max_epochs=2).fit(Module(), loader(), ckpt_path=path)
    assert again.comhe.projection._state.tolist()[:2] == [1, 4]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("stream", [False, True])
def test_each_step_of_lightning_sees_the_regularizer_once(tmp_path, stream):
    lightning = pytest.importorskip("lightning")
    from comhe_ext.integrations.lightning import CoMHECallback

    shares = []

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            return self.net(batch).sum() * 0.0

        def on_before_optimizer_step(self, _):  # after the callback's
            weight = self.net[0].weight
            (alone,) = torch.autograd.grad(CoMHE(self, projection=None)(), weight)
            shares.append(float((weight.grad * alone).sum() / alone.square().sum()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = CoMHECallback(projection=None)
    rows = random_rows(14, 60)
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=2, callbacks=[callback], accumulate_grad_batches=3,
        logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    # 7 batches an epoch: 3 + 3 + 1
    data = torch.utils.data.DataLoader(Stream(rows) if stream else rows, batch_size=2)
    trainer.fit(Module(), data)
    assert shares == pytest.approx([1.0] * 6, rel=1e-5)


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
    with pytest.raises(ValueError, match=r"already has its options, got .*'s'"):
        CoMHECallback(CoMHE(network()), s=1.0)


class Classifier(nn.Module):
    """As the Trainer of transformers calls models."""

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        return {"logits": self.net(x)}


def arguments(folder, **options):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    defaults = dict(
        per_device_train_batch_size=8, learning_rate=0.1, lr_scheduler_type="constant",
        max_grad_norm=0.0, optim="sgd", use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    return transformers.TrainingArguments(str(folder), **{**defaults, **options})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("clip", [None, 0.5])
def test_steps_of_the_trainer_of_transformers_are_those_of_a_loop(tmp_path, clip):
    transformers = pytest.importorskip("transformers")
    from comhe_ext.integrations.transformers import regularized

    def loss(outputs, labels, num_items_in_batch=None):
        logits = outputs["logits"]
        return nn.functional.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch

    args = arguments(
        tmp_path, max_steps=2, gradient_accumulation_steps=2, max_grad_norm=clip or 0.0
    )
    model = Classifier()
    comhe = CoMHE(model, RandomProjection(2, 8, seed=1))
    rows = [dict(x=x, labels=y) for xs, ys in batches() for x, y in zip(xs, ys, strict=True)]

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(rows)

    trainer = InOrder(
        model, args, train_dataset=rows, compute_loss_func=regularized(comhe, loss, args)
    )
    trainer.train()
    for one, other in zip(model.net.parameters(), expected_weights(2, clip), strict=True):
        assert relative_error(one, other) <= 1e-5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("num_rows", "per_step", "stream", "options", "steps"),
    [
        (12, 4, False, dict(num_train_epochs=1), 2),  # 6 batches of 2: 4 + 2
        (14, 3, False, dict(num_train_epochs=3), 9),  # 7: 3 + 3 + 1, three times
        (13, 5, False, dict(max_steps=5), 5),  # the last batch has one row, epochs end in between
        (4, 8, False, dict(num_train_epochs=2), 2),  # fewer batches than one step gathers
        (6, 1, False, dict(max_steps=2), 2),
        (14, 3, True, dict(max_steps=5), 5),  # the batches left over belong to the next step
        (12, 4, False, dict(max_steps=4, eval_strategy="steps", eval_steps=1), 4),
        (12, 4, False, dict(num_train_epochs=1, average_tokens_across_devices=False), 2),
        (12, 4, False, dict(num_train_epochs=1, bf16=True), 2),
    ],
)
def test_each_step_of_the_trainer_of_transformers_sees_the_regularizer_once(
    tmp_path, num_rows, per_step, stream, options, steps
):
    transformers = pytest.importorskip("transformers")
    from comhe_ext.integrations.transformers import regularized

    model = Classifier()
    comhe = CoMHE(model, projection=None)
    weight = model.net[0].weight
    shares, calls, energies = [], [], []
    comhe.register_forward_hook(lambda *call: energies.append(call[-1]))

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs):
            (alone,) = torch.autograd.grad(CoMHE(model, projection=None)(), weight)
            shares.append(float((weight.grad * alone).sum() / alone.square().sum()))

    def nothing(outputs, labels, num_items_in_batch=None):
        calls.append(outputs["logits"].requires_grad)
        return outputs["logits"].sum() * 0.0

    rows = [dict(x=x, labels=i % 5) for i, x in enumerate(random_rows(num_rows, 60))]
    args = arguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=per_step, **options
    )
    trainer = transformers.Trainer(
        model, args, train_dataset=Stream(rows) if stream else rows, eval_dataset=rows[:3],
        compute_loss_func=regularized(comhe, nothing, args), callbacks=[Look()],
    )  # fmt: skip
    trainer.train()
    assert shares == pytest.approx([1.0] * steps, rel=1e-5)
    assert len(energies) == steps  # and it is a step of the regularizer
    if "eval_strategy" in options:  # evaluations report the task alone
        assert calls.count(False) == 4
        assert trainer.evaluate()["eval_loss"] == 0.0


RANK = """
import sys, torch, transformers
from torch import nn
from comhe_ext import CoMHE
from comhe_ext.integrations.transformers import regularized

transformers.logging.set_verbosity_error()
torch.manual_seed(0)

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 3))

    def forward(self, x, labels=None):
        return {"logits": self.net(x)}

model, shares = Model(), []
comhe = CoMHE(model, projection=None)

class Look(transformers.TrainerCallback):
    def on_pre_optimizer_step(self, *args, **kwargs):
        weight = model.net[0].weight
        (alone,) = torch.autograd.grad(CoMHE(model, projection=None)(), weight)
        shares.append(float((weight.grad * alone).sum() / alone.square().sum()))

args = transformers.TrainingArguments(
    sys.argv[1], num_train_epochs=1, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    max_grad_norm=0.0, optim="sgd", use_cpu=True, report_to=[], save_strategy="no",
    logging_strategy="no", disable_tqdm=True, average_tokens_across_devices=sys.argv[2] == "1",
)
nothing = lambda outputs, labels, num_items_in_batch=None: outputs["logits"].sum() * 0.0
rows = [dict(x=torch.randn(6), labels=i % 3) for i in range(12)]
trainer = transformers.Trainer(
    model, args, train_dataset=rows, compute_loss_func=regularized(comhe, nothing, args),
    callbacks=[Look()],
)
trainer.train()
assert args.world_size == 2
torch.save(shares, f"{sys.argv[1]}-{args.process_index}.pt")
"""


@pytest.mark.parametrize("average", ["0", "1"])
def test_two_processes_of_the_trainer_see_the_regularizer_once(tmp_path, average):
    pytest.importorskip("transformers")
    program = tmp_path / "rank.py"
    program.write_text(RANK)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            str(program),
            str(tmp_path / "out"),
            average,
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    for rank in range(2):
        shares = torch.load(tmp_path / f"out-{rank}.pt")
        assert len(shares) == 2  # three batches a rank, in two steps
        assert max(abs(share - 1) for share in shares) < 5e-5, shares


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
