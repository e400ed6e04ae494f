"""Checkpoints of every kind, whole, sharded, cut off and hostile."""

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from comhe_ext.__main__ import run
from comhe_ext.cli.checkpoint import find_checkpoints
from comhe_ext.cli.safetensors_file import DTYPES

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def state(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.weight": torch.randn(4, 5, generator=generator).to(FLOATS[i % 4])
        for i in range(12)
    }


def write_safetensors(path, tensors, header=None):
    """Write the format from its definition; `header` changes what is said of the tensors."""
    offset, said, parts = 0, {}, []
    codes = {dtype: code for code, (dtype, _) in DTYPES.items()}
    for name, tensor in tensors.items():
        numbers = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        code = codes[str(tensor.dtype).removeprefix("torch.")]
        place = [offset, offset + len(numbers)]
        said[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": place}
        offset += len(numbers)
        parts.append(numbers)
    text = json.dumps(said | (header or {})).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def tensors_of(path):
    (checkpoint,) = find_checkpoints(path)
    assert checkpoint.unreadable == []
    return {entry.name: entry.read().clone() for entry in checkpoint.entries}


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def reasons(path):
    return {what: why for x in find_checkpoints(path) for what, why in x.unreadable}


# --- what others write ----------------------------------------------------------------------------


def test_safetensors(tmp_path):
    files = pytest.importorskip("safetensors.torch")
    files.save_file(state(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    # layer 10 comes behind layer 9, wherever the file has it
    assert_same(tensors_of(tmp_path / "model.safetensors"), state())


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "last.ckpt"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(tmp_path, name, zipped):
    torch.save(state(), tmp_path / name, _use_new_zipfile_serialization=zipped)
    assert_same(tensors_of(tmp_path / name), state())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_weights_are_found_beside_the_rest(tmp_path, key):
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(3, 3))])
    content = {"epoch": 3, "optimizer": optimizer.state_dict(), key: state(), "note": "x"}
    torch.save(content, tmp_path / "last.ckpt")
    assert_same(tensors_of(tmp_path / "last.ckpt"), state())


def test_tensors_are_found_however_they_are_nested(tmp_path):
    a, b, c = torch.randn(3, 2, 3).unbind()
    inner = {"b": b, "deep": {"c": c}}
    content = {"list": [a, inner], "optimizer": {"step": torch.ones(2, 2)}}
    inner["self"] = inner
    torch.save(content, tmp_path / "model.pt")
    assert_same(tensors_of(tmp_path / "model.pt"), {"list.0": a, "list.1.b": b, "list.1.deep.c": c})
    torch.save(a, tmp_path / "one.pt")
    assert_same(tensors_of(tmp_path / "one.pt"), {"tensor": a})


def test_strided_and_shared_tensors(tmp_path):
    weight = torch.randn(6, 4)
    content = {"whole": weight, "turned": weight.T, "part": weight[1:3], "again": weight}
    torch.save(content, tmp_path / "model.pt")
    assert_same(tensors_of(tmp_path / "model.pt"), content)


def write_shards(folder, kind):
    every = list(state().items())
    files = [f"model-{i + 1:05}-of-00003.{kind}" for i in range(3)]
    for number, file in enumerate(files):
        part = dict(every[4 * number : 4 * number + 4])
        if kind == "safetensors":
            write_safetensors(folder / file, part)
        else:
            torch.save(part, folder / file)
    placed = {name: files[i // 4] for i, (name, _) in enumerate(every)}
    index = {"metadata": {"total_size": 1}, "weight_map": placed}
    (folder / f"model.{kind}.index.json").write_text(json.dumps(index))
    return files


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_with_an_index(tmp_path, kind):
    files = write_shards(tmp_path, kind)
    assert_same(tensors_of(tmp_path / f"model.{kind}.index.json"), state())
    assert_same(tensors_of(tmp_path), state())
    (tmp_path / files[1]).unlink()
    (checkpoint,) = find_checkpoints(tmp_path)
    assert len(checkpoint.entries) == 8
    assert checkpoint.unreadable == [(files[1], "No such file or directory")]


def test_shards_by_the_library_that_most_use(tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_state_dict(state(), tmp_path, max_shard_size=200)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = tensors_of(tmp_path)
    assert_same({name: found[name] for name in state()}, state())


def test_shards_without_an_index_are_one_checkpoint(tmp_path):
    write_shards(tmp_path, "safetensors")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(tensors_of(tmp_path), state())


def test_a_folder_of_checkpoints(tmp_path):
    for epoch in (1, 2, 10):
        torch.save(state(epoch), tmp_path / f"epoch{epoch}.pt")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    (tmp_path / "training_args.bin").write_bytes(b"no weights")
    (tmp_path / "config.json").write_text("{}")
    found = find_checkpoints(tmp_path)
    assert [x.path.name for x in found] == ["epoch1.pt", "epoch2.pt", "epoch10.pt"]
    # of the same weights twice, one is enough
    write_safetensors(tmp_path / "model.safetensors", state())
    torch.save(state(), tmp_path / "pytorch_model.bin")
    names = [x.path.name for x in find_checkpoints(tmp_path)]
    assert names == ["epoch1.pt", "epoch2.pt", "epoch10.pt", "model.safetensors"]


def test_a_folder_of_folders(tmp_path):
    for step in (500, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
        write_safetensors(tmp_path / f"checkpoint-{step}/model.safetensors", state(step))
    (tmp_path / "logs").mkdir()
    found = find_checkpoints(tmp_path)
    assert [x.path.parent.name for x in found] == ["checkpoint-500", "checkpoint-1000"]
    assert reasons(tmp_path / "logs") == {"logs": "there is no checkpoint in this folder"}


def test_numbers_that_are_not_aligned(tmp_path):
    tensors = {"odd": torch.ones(3, dtype=torch.int8), "w": torch.randn(5, 3)}
    write_safetensors(tmp_path / "model.safetensors", tensors, {"__metadata__": {"x": "y" * 3}})
    path = tmp_path / "model.safetensors"
    for shift in range(4):  # of the numbers: blanks may follow the header
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        blank = content[8 : 8 + length] + b" " * shift
        path.write_bytes(len(blank).to_bytes(8, "little") + blank + content[8 + length :])
        found = tensors_of(path)["w"]
        assert torch.equal(found, tensors["w"])
        assert found.data_ptr() % found.element_size() == 0


# --- what nobody should have written --------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.system, ("touch was_run",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_is_more_than_weights_is_refused(tmp_path, monkeypatch, zipped, capsys):
    monkeypatch.chdir(tmp_path)
    content = {"w": torch.randn(3, 3), "x": Evil()}
    torch.save(content, "model.pt", _use_new_zipfile_serialization=zipped)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    torch.save(nn.Linear(3, 3), "module.pt")
    write_safetensors(tmp_path / "fine.safetensors", state())
    names = ("model.pt", "plain.pt", "module.pt", "fine.safetensors")
    assert run(["energy", *names, "--json"]) == 1
    output = capsys.readouterr()
    assert output.err.count("refused: it holds more than weights") == len(names) - 1
    assert "system" in output.err
    assert len(json.loads(output.out)) == 12
    assert not (tmp_path / "was_run").exists()


def test_a_safetensors_file_that_was_cut_off_gives_what_it_has(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state())
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    (checkpoint,) = find_checkpoints(path)
    assert len(checkpoint.entries) == 11
    for entry in checkpoint.entries:
        assert torch.equal(entry.read(), state()[entry.name])
    ((name, why),) = checkpoint.unreadable
    assert name == "layers.11.weight"
    assert why == "truncated: its numbers end 30 bytes behind the file"


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_a_file_that_was_cut_off_anywhere_raises_nothing(tmp_path, name, zipped):
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(state(), path, _use_new_zipfile_serialization=zipped)
    else:
        write_safetensors(path, state())
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(0, len(whole), len(whole) // 40)}:
        path.write_bytes(whole[:length])
        (checkpoint,) = find_checkpoints(path)
        assert checkpoint.unreadable
        for entry in checkpoint.entries:
            assert torch.equal(entry.read(), state()[entry.name])


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_bytes_turned_over_raise_nothing(tmp_path, name, capsys):
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save(state(), path)
    else:
        write_safetensors(path, state())
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for at in torch.randint(min(len(whole), 2000), (60,), generator=generator).tolist():
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x15]) + whole[at + 1 :])
        assert run(["energy", str(path), "--json"]) in (0, 1)
        json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (3, "no JSON object"),
        ({}, "dtype"),
        ({"dtype": "F32", "shape": [1, 2]}, "place None"),
        ({"dtype": "F32", "shape": [-1, 2], "data_offsets": [0, 8]}, "shape is [-1, 2]"),
        ({"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}, "shape is [True, 2]"),
        ({"dtype": "F32", "shape": [1, 2], "data_offsets": [8, 0]}, "place is [8, 0]"),
        ({"dtype": "F32", "shape": [1, 3], "data_offsets": [0, 8]}, "8 bytes are not float32"),
        ({"dtype": "F32", "shape": [10**30, 9], "data_offsets": [0, 8]}, "8 bytes are not"),
        ({"dtype": "F32", "shape": [1, 2], "data_offsets": [10**12, 10**12 + 8]}, "truncated"),
    ],
)
def test_entries_that_cannot_be(tmp_path, said, why):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, state(), {"bad": said})
    (checkpoint,) = find_checkpoints(path)
    assert len(checkpoint.entries) == 12
    assert why in dict(checkpoint.unreadable)["bad"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "truncated"),
        (b"\xff" * 8, "truncated"),
        ((2).to_bytes(8, "little") + b"[]", "no JSON object"),
        ((2).to_bytes(8, "little") + b"\xff\xfe", "no JSON"),
        ((90000).to_bytes(8, "little") + b"[" * 90000, "no JSON"),
    ],
)
def test_headers_that_cannot_be(tmp_path, content, why):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert why in reasons(tmp_path / "model.safetensors")["model.safetensors"]


def test_an_index_leads_nowhere_else(tmp_path):
    (tmp_path / "inside").mkdir()
    write_safetensors(tmp_path / "secret.safetensors", state())
    write_safetensors(tmp_path / "inside/a.safetensors", {"w": torch.randn(3, 3)})
    placed = {
        "w": "a.safetensors",
        "gone": "a.safetensors",
        "up": "../secret.safetensors",
        "root": str(tmp_path / "secret.safetensors"),
        "number": 3,
    }
    index = tmp_path / "inside/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": placed}))
    (checkpoint,) = find_checkpoints(index)
    assert [entry.name for entry in checkpoint.entries] == ["w"]
    assert set(dict(checkpoint.unreadable)) == {"gone", "up", "root", "number"}
    for content in ("[]", "{", '{"weight_map": []}'):
        index.write_text(content)
        assert reasons(index)


def test_tensors_that_hold_less_than_they_say(tmp_path, capsys):
    content = {
        "wide": torch.ones(1).expand(10**6, 10**6),
        "meta": torch.empty(5, 5, device="meta"),
        "fine": torch.randn(4, 5),
    }
    torch.save(content, tmp_path / "model.pt")
    assert run(["energy", str(tmp_path / "model.pt"), "--json"]) == 1
    output = capsys.readouterr()
    assert [layer["name"] for layer in json.loads(output.out)] == ["fine"]
    assert "wide: NOT READ: 1000000000000 numbers share the memory of fewer" in output.err
    assert "meta: NOT READ: it was saved without its numbers" in output.err


def test_files_of_other_kinds(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"")
    assert ".safetensors" in reasons(tmp_path / "model.onnx")["model.onnx"]
    assert reasons(tmp_path / "missing.pt") == {"missing.pt": "No such file or directory"}


# --- memory ---------------------------------------------------------------------------------------

# not getrusage, whose peak begins with that of the process that starts this one
PEAK = """
import re, sys
from pathlib import Path
from comhe_ext.__main__ import run
assert run(["energy", sys.argv[1], "--json"]) == 0
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the peak")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_a_checkpoint_of_4_gb_takes_less_than_1_gb(tmp_path, kind):
    path, layers, shape = tmp_path / f"model.{kind}", 64, (64, 262144)
    layer = torch.randn(shape)
    if kind == "pt":
        # a mapped file lends the tensors their memory
        numbers = torch.from_file(str(tmp_path / "n"), True, layers * layer.numel())
        parts = numbers.view(layers, *shape).unbind()
        for part in parts:
            part.copy_(layer)
        torch.save({f"{i}": part for i, part in enumerate(parts)}, path)
        del numbers, parts, part
        (tmp_path / "n").unlink()
    else:
        size = 4 * layer.numel()
        header = {
            f"{i}": {
                "dtype": "F32",
                "shape": list(shape),
                "data_offsets": [i * size, i * size + size],
            }
            for i in range(layers)
        }
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _ in range(layers):
                file.write(memoryview(layer.numpy()))
    assert path.stat().st_size >= 4 << 30
    result = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    )
    path.unlink()
    found = json.loads(result.stdout)
    assert len(found) == layers
    assert len({x["energy"] for x in found}) == 1
    assert int(result.stderr.splitlines()[-1]) * 1024 < 1e9
