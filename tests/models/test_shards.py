"""safetensors files written and read tensor by tensor, against the safetensors package."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlab.models.shards import CHUNK, INDEX, ShardWriter, read_checkpoint, read_header

TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)),
    "codes": torch.arange(7, dtype=torch.uint8),
    "one": torch.tensor(5, dtype=torch.uint8),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
    "half": torch.ones(3, dtype=torch.float16),
    "wide": torch.ones(3, dtype=torch.float64),
    "f8": torch.ones(5).to(torch.float8_e4m3fn),
}


def specs(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def equal(found, expected):
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_safetensors_opens_what_is_written_in_any_order(tmp_path):
    path = tmp_path / "model.safetensors"
    with ShardWriter(path, specs(TENSORS)) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])
    found = load_file(path)
    assert found.keys() == TENSORS.keys() and all(
        equal(found[name], TENSORS[name]) for name in TENSORS if found[name].dim()
    )
    assert found["one"] == 5
    entries = read_header(path)
    assert all(entry.start % max(1, entry.torch_dtype.itemsize) == 0 for entry in entries.values())
    assert {name: entry.crc32() for name, entry in entries.items()} == writer.crc


def test_what_safetensors_writes_is_read_and_copied(tmp_path):
    large = {"large": torch.arange(CHUNK // 2, dtype=torch.int32).reshape(2, -1)}
    path = tmp_path / "model.safetensors"
    save_file(TENSORS | large, path, metadata={"format": "pt"})
    entries = read_checkpoint(tmp_path)["model.safetensors"]
    for name, tensor in (TENSORS | large).items():
        assert torch.equal(entries[name].read().reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    assert torch.equal(entries["a"].rows(1, 2), TENSORS["a"][1:3])
    with ShardWriter(
        tmp_path / "copy", {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    ) as writer:
        for name, entry in entries.items():
            writer.copy(name, entry)
    copied = load_file(tmp_path / "copy")
    assert all(torch.equal(copied[name], tensor) for name, tensor in load_file(path).items() if name != "f8")


def test_a_tensor_that_was_not_announced_so(tmp_path):
    with pytest.raises(ValueError, match=r"announced as F32 \(2,\), not torch.float32 \(3,\)"), ShardWriter(tmp_path / "f", {"a": (torch.float32, (2,))}) as writer:  # fmt: skip
        writer.write("a", torch.zeros(3))
    with pytest.raises(ValueError, match="a was announced and never written"), ShardWriter(tmp_path / "f", {"a": (torch.float32, (2,))}):  # fmt: skip
        pass


@pytest.mark.parametrize("keep", [0, 4, 30, -1])
def test_cut_off(keep, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is cut off"):
        read_header(path)


def test_damaged_headers(tmp_path):
    path = tmp_path / "model.safetensors"
    for header in ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}):  # fmt: skip
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
        with pytest.raises(ValueError, match="is damaged: a of shape"):
            read_header(path)
    save_file(TENSORS, path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ValueError, match="cut off or damaged"):
        read_header(path)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    entry = read_header(path)["one"]
    path.write_bytes(path.read_bytes()[: entry.start])
    with pytest.raises(ValueError, match="ended while a tensor was read"):
        entry.read()


def test_an_index_that_does_not_fit(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}))
    with pytest.raises(ValueError, match="b is in None and listed in one.safetensors"):
        read_checkpoint(tmp_path)
