"""The training experiment: its images, runs that are interrupted, choices and statistics."""

import io
import os
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

pd = pytest.importorskip("pandas")
Image = pytest.importorskip("PIL.Image")

from bench.training import __main__ as command  # noqa: E402
from bench.training import data, report, tuning  # noqa: E402
from bench.training.methods import METHODS, WITHOUT_WEIGHT  # noqa: E402
from bench.training.networks import NETWORKS, network  # noqa: E402
from bench.training.plans import HELD, NONE, PLANS, SMALL  # noqa: E402
from bench.training.runs import Setting, train  # noqa: E402

TINY = Setting(
    size=8, per_class=2, validation=100, epochs=2, batch=100, evaluate_every=1, lr=0.05, dim=3
)


def pictures(each, seed):
    labels = np.repeat(np.arange(100), each)
    # the same blocks of colour for a class in all files, and noise
    blocks = np.random.default_rng(0).integers(0, 256, (100, 3, 4, 4), dtype=np.uint8)[labels]
    pixels = blocks.repeat(8, 2).repeat(8, 3)
    noise = np.random.default_rng(seed).integers(0, 9, pixels.shape, dtype=np.uint8)
    return pixels // 2 + noise, labels


def write_mosaics(file, pixels, labels):
    blobs, offsets = [], [0]
    for part in pixels.reshape(-1, 10, 10, 3, 32, 32):
        mosaic = part.transpose(0, 3, 1, 4, 2).reshape(320, 320, 3)
        stream = io.BytesIO()
        Image.fromarray(mosaic).save(stream, "WEBP", lossless=True)
        blobs.append(np.frombuffer(stream.getvalue(), np.uint8))
        offsets.append(offsets[-1] + len(blobs[-1]))
    np.savez(file, blob=np.concatenate(blobs), offsets=np.array(offsets), labels=labels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of mosaics, in two files of training images as the set comes."""
    folder = tmp_path_factory.mktemp("images")
    for name, each, seed in (("train-a", 2, 1), ("train-b", 1, 2), ("test", 1, 3)):
        write_mosaics(folder / f"{name}.npz", *pictures(each, seed))
    return folder


@pytest.fixture(scope="module")
def images(folder):
    return data.load(folder, 8)


def test_both_layouts_hold_the_same_images(folder, tmp_path):
    official = tmp_path / "cifar-100-python"
    official.mkdir()
    parts = [pictures(2, 1), pictures(1, 2)]
    train_set = [np.concatenate(x) for x in zip(*parts, strict=True)]
    for name, (pixels, labels) in (("train", train_set), ("test", pictures(1, 3))):
        content = {
            b"data": pixels.reshape(len(pixels), -1),
            b"fine_labels": labels.tolist(),
            b"filenames": [b"x.png"] * len(labels),
        }
        (official / name).write_bytes(pickle.dumps(content, protocol=2))
    for path in (tmp_path, official):
        for ours, theirs in zip(data.load(path), data.load(folder), strict=True):
            assert torch.equal(ours.pixels, theirs.pixels)
            assert torch.equal(ours.labels, theirs.labels)
    assert data.load(folder)[0].pixels.shape == (300, 3, 32, 32)


def test_a_pickle_that_calls_a_function_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("true",)

    for name in ("train", "test"):
        (tmp_path / name).write_bytes(pickle.dumps({b"data": Evil()}))
    with pytest.raises(pickle.UnpicklingError, match=r"names (posix|nt)\.system"):
        data.load(tmp_path)


def test_a_folder_without_images_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit, match="holds neither"):
        command.main(["one", "--images", str(tmp_path), "--results", str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_images_are_averaged():
    pixels = torch.arange(3 * 32 * 32).remainder(251).to(torch.uint8).view(1, 3, 32, 32)
    averaged = data._averaged(data.Images(pixels, torch.zeros(1, dtype=torch.int64)), 16)
    expected = pixels.double().view(3, 16, 2, 16, 2).mean((2, 4))
    assert (averaged.pixels[0].double() - expected).abs().max() <= 0.5


def test_a_split_holds_out_the_same_images_for_all_seeds(images):
    train_set, test_set = images
    first, second = (data.split(train_set, test_set, 2, 100, seed) for seed in (1, 2))
    assert torch.equal(first.validation.pixels, second.validation.pixels)
    assert not torch.equal(first.train.pixels, second.train.pixels)
    for part, each in ((first.train, 2), (first.validation, 1)):
        assert part.labels.bincount().tolist() == [each] * 100
    # with one held out, two of three images a class are all the others
    held = {x.numpy().tobytes() for x in first.validation.pixels}
    assert not held & {x.numpy().tobytes() for x in first.train.pixels}
    with pytest.raises(ValueError, match="there are 3"):
        data.split(train_set, test_set, 3, 100, 1)


def test_an_augmented_image_is_cut_out_of_its_mirrored_self():
    image = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8)
    mirrored = torch.nn.functional.pad(image.float(), (1,) * 4, mode="reflect").to(torch.uint8)[0]
    possible = {}
    for y in range(3):
        for x in range(3):
            cut = mirrored[:, y : y + 8, x : x + 8]
            possible[cut.numpy().tobytes()] = (y, x, False)
            possible[cut.flip(2).contiguous().numpy().tobytes()] = (y, x, True)
    cuts = data.augmented(image.expand(500, -1, -1, -1), torch.Generator().manual_seed(0))
    seen = {possible[cut.contiguous().numpy().tobytes()] for cut in cuts}
    assert len(seen) == 18  # all shifts and flips are drawn


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("size", [16, 32])
def test_networks(name, size):
    model = network(name, size, width=8)
    assert model(torch.zeros(2, 3, size, size)).shape == (2, 100)
    if name != "small":
        convolutions = [m for m in model if isinstance(m, torch.nn.Conv2d)]
        # with the hidden layer and the classes, as their papers count
        assert len(convolutions) == {"CNN-6": 6, "CNN-9": 9, "CNN-15": 15}[name]
        assert model.hidden.weight.shape == (32, 32 * (size // 8) ** 2)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_two_epochs(method, images, tmp_path):
    weights = {} if method in WITHOUT_WEIGHT else dict(weight=1e-3, output_weight=1e-3)
    lines = train(replace(TINY, method=method, **weights), lambda: images, tmp_path)
    assert [line["epoch"] for line in lines] == [1, 2]
    for line in lines:
        assert np.isfinite(line["loss"])
        assert 0 <= line["test_error"] <= 100
        assert 0 <= line["validation_error"] <= 100
        assert set(line["norms"]) == set(line["energies"]) - {"output"}
        assert 0 <= line["penalty_ms"] <= line["step_ms"]
    assert not list(tmp_path.glob("*.pt"))


def test_norms_are_held(images, tmp_path):
    torch.manual_seed(TINY.seed)
    expected = {
        name.removesuffix(".weight"): float(w.flatten(1).norm(dim=1).mean())
        for name, w in network("small", 8).state_dict().items()
        if w.dim() > 1  # neither biases nor statistics
    }
    *_, last = train(replace(TINY, method=HELD), lambda: images, tmp_path)
    for layer, norm in last["norms"].items():
        assert norm == pytest.approx(expected[layer], abs=1e-4)


def test_an_energy_lowers_the_energies(images, tmp_path):
    plain = train(TINY, lambda: images, tmp_path)[-1]
    setting = replace(TINY, method="half-space MHE", weight=100.0, output_weight=100.0)
    spread = train(setting, lambda: images, tmp_path)[-1]
    for layer in ("conv1_1", "output"):
        assert spread["energies"][layer] < plain["energies"][layer]


@pytest.mark.parametrize("method", ["none", "norms held", "RP-CoMHE", "AP-CoMHE, unrolled"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(method, images, tmp_path):
    weights = {} if method in WITHOUT_WEIGHT else dict(weight=1.0, output_weight=1.0)
    setting = replace(TINY, method=method, epochs=3, **weights)
    whole = train(setting, lambda: images, tmp_path / "whole")

    class Interrupted(Exception):
        pass

    def interrupt(line):
        raise Interrupted

    for _ in range(2):
        with pytest.raises(Interrupted):
            train(setting, lambda: images, tmp_path / "parts", interrupt)
    parts = train(setting, lambda: images, tmp_path / "parts")
    for ours, theirs in zip(parts, whole, strict=True):
        for key in theirs:
            assert key.endswith("_ms") or ours[key] == theirs[key]
    # a finished run is read: it does not ask for the images
    assert train(setting, pytest.fail, tmp_path / "parts") == parts


@pytest.mark.parametrize("name", PLANS)
def test_plans_can_be_run(name):
    plan = PLANS[name]
    assert {NONE, HELD} <= set(plan.methods) <= set(METHODS)
    assert not set(plan.seeds) & set(plan.tuning_seeds)
    for setting in tuning.settings(plan, {method: Setting() for method in plan.methods}):
        setting.check()
    if plan.tuning_seeds:  # every method may try as many settings
        first = plan.first_settings()
        for method in set(plan.methods) - {NONE}:
            assert len(plan.further_settings(method, first)) == len(first)


def test_tuning_takes_the_best_of_each_method(tmp_path):
    def run(settings):
        """A made-up error that is least at lr 0.1, weight decay 5e-3 and weight 10."""
        assert not any(setting.test for setting in settings)
        return [
            [
                {
                    "validation_error": abs(np.log10(x.lr / 0.1))
                    + abs(np.log10(x.weight_decay / 5e-3))
                    + (abs(np.log10(x.weight / 10)) if x.weight else 0.0)
                }
            ]
            for x in settings
        ]

    chosen = tuning.tune(SMALL, run)
    tuning.write(chosen, tmp_path / "chosen.json")
    read = tuning.read(tmp_path / "chosen.json")
    assert list(read) == list(SMALL.methods)
    for method, setting in read.items():
        assert (setting.lr, setting.weight_decay) == (0.1, 5e-3), method
    assert read["RP-CoMHE"].weight == 10.0
    assert len(tuning.table(chosen)) == 6 * len(SMALL.methods)
    runs = tuning.settings(SMALL, read)
    assert len({x.name for x in runs}) == len(runs) == 8 * len(SMALL.methods)
    assert all(x.test for x in runs)


def test_differences_are_paired_and_corrected():
    base = np.array([30.0, 32.0, 28.0, 31.0])  # seeds differ by more than the methods
    errors = {
        NONE: base,
        HELD: base - 2.0 + np.array([0.1, -0.1, 0.1, -0.1]),
        "MHE": base - 2.1 + np.array([0.2, -0.2, 0.1, -0.1]),
    }
    last = pd.DataFrame(
        [
            dict(method=method, seed=seed, test_error=error)
            for method, values in errors.items()
            for seed, error in enumerate(values)
        ]
    )
    table = report.differences(last).set_index(["method", "compared with"])
    assert set(table.index) == {(HELD, NONE), ("MHE", NONE), ("MHE", HELD)}
    held = table.loc[(HELD, NONE)]
    # Student's t of 3 degrees of freedom: 3.182 at 95 %; deviation 0.11547 of four values
    assert held["difference, %"] == pytest.approx(-2.0)
    assert held.low == pytest.approx(-2.0 - 3.182446 * 0.1154701 / 2, abs=1e-6)
    assert held.high == pytest.approx(-2.0 + 3.182446 * 0.1154701 / 2, abs=1e-6)
    assert table.differs[(HELD, NONE)] == "yes"
    assert table.differs[("MHE", NONE)] == "yes"
    assert table.differs[("MHE", HELD)] == "no"


def test_correction_for_several_comparisons():
    # p of 0.02 to 0.04 each alone: below 0.05, yet none of them passes 0.05 / 3
    spread = np.array([-1.0, 1.0, -0.5, 0.5])
    spread /= spread.std(ddof=1) / 2
    last = pd.DataFrame(
        [
            dict(method=method, seed=seed, test_error=value)
            for method, shift in ((NONE, 0.0), ("MHE", 4.0), ("RP-CoMHE", 4.2), ("MMA", 4.4))
            for seed, value in enumerate(shift + (spread if shift else 0 * spread))
        ]
    )
    table = report.differences(last)
    assert (table.p < 0.05).all()
    assert (table.p > 0.05 / 3).all()
    assert (table.differs == "no").all()


def test_the_whole_experiment_by_the_command(folder, tmp_path, monkeypatch, capsys):
    base = replace(TINY, epochs=1, per_class=2, size=8)
    plan = replace(
        SMALL,
        base=base,
        methods=(NONE, HELD, "half-space MHE"),
        seeds=(1, 2),
        lrs=(0.05,),
        weight_decays=(1e-3, 5e-3),
        weights={"half-space MHE": ((1.0, 1.0),)},
        held_lrs=(0.05, 0.1),
    )
    monkeypatch.setitem(PLANS, "small", plan)
    arguments = ["small", "--images", str(folder), "--results", str(tmp_path)]
    command.main(["tune", *arguments])
    command.main(["run", *arguments])
    out = capsys.readouterr().out
    assert "compared with" in out
    results = tmp_path / "small"
    assert len(list((results / "runs").glob("*.jsonl"))) == 6
    assert {x.name for x in results.iterdir()} == {
        "chosen.json", "tuning", "runs", "report.md", "errors.png", "energies.png"
    }  # fmt: skip
    before = (results / "report.md").read_text()
    command.main(["report", "small", "--results", str(tmp_path)])
    assert (results / "report.md").read_text() == before
    command.main(["cost", "small", "--results", str(tmp_path)])
    command.main(["report", "small", "--results", str(tmp_path)])
    after = (results / "report.md").read_text()
    assert after.startswith(before.rstrip("\n"))
    assert "RP-CoMHE, naive" in after
