"""Checkpoints of safetensors files, read and written one tensor at a time.

    file = length of the header (8 bytes, little endian) · header (JSON: name → dtype, shape, offsets) · data

Because the header comes first and says where every tensor lies, a file can be written before its tensors are known: the
header from their shapes, then each tensor at its place, in any order. Only the tensor at hand is in memory.

Tensors are read into memory of their own, not mapped: what a process holds is then what it has asked for.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes of a tensor that is only copied which are in memory at once


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: in `path`, `nbytes` from byte `start` on. dtype: as safetensors names it."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path.name} holds a tensor of type {self.dtype}, which qlab cannot compute with")
        return DTYPES[self.dtype]

    def read(self) -> Tensor:
        """The whole tensor, in memory of its own."""
        tensor = torch.empty(self.shape, dtype=self.torch_dtype)
        into = memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            _fill(file, into, self.path)
        return tensor

    def rows(self, first: int, count: int) -> Tensor:
        """Rows first … first + count of a matrix: (count, columns), read alone."""
        step = self.nbytes // self.shape[0]
        part = Entry(self.path, self.dtype, (count, *self.shape[1:]), self.start + first * step, count * step)
        return part.read()

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes, piece by piece."""
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.start)
            for at in range(0, self.nbytes, CHUNK):
                piece = bytearray(min(CHUNK, self.nbytes - at))
                _fill(file, memoryview(piece), self.path)
                yield piece

    def crc32(self) -> int:
        """Checksum of the tensor's bytes as they are in the file now."""
        value = 0
        for piece in self.chunks():
            value = zlib.crc32(piece, value)
        return value


def _fill(file, into: memoryview, path: Path) -> None:
    done = 0
    while done < len(into):
        count = file.readinto(into[done:])
        if not count:
            raise ValueError(f"{path} ended while a tensor was read from it: it is cut off, or was changed meanwhile")
        done += count


def read_header(path: Path) -> dict[str, Entry]:
    """Tensor name → entry of one safetensors file, in the order of the data.

    Raises ValueError, naming the file, for a header that is no safetensors header and for data that does not fill the file
    exactly: cut off, or longer than the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path} is cut off or no safetensors file: {size} bytes, a header of {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        items = [(name, item["dtype"], tuple(item["shape"]), *item["data_offsets"]) for name, item in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is no safetensors file, its header cannot be read: {error}") from None
    start, at, entries = 8 + length, 0, {}
    for name, dtype, shape, begin, end in sorted(items, key=lambda item: item[3:]):
        known = dtype in DTYPES
        if begin != at or end < begin or known and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{path} is damaged: {name} of shape {shape} in {dtype} is said to be bytes {begin}…{end}")
        entries[name] = Entry(path, dtype, shape, start + begin, end - begin)
        at = end
    if start + at != size:
        raise ValueError(f"{path} is cut off or damaged: {size} bytes, and its header means {start + at}")
    return entries


def read_checkpoint(folder: Path) -> dict[str, dict[str, Entry]]:
    """File name → its tensors, for a folder that `qlab.models.locate` accepts, with one weight file or an index of several.

    Raises ValueError where the index and the files do not name the same tensors.
    """
    if not (folder / INDEX).is_file():
        return {"model.safetensors": read_header(folder / "model.safetensors")}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {name: read_header(folder / name) for name in sorted(set(index.values()))}
    found = {key: name for name, entries in files.items() for key in entries}
    if wrong := sorted(key for key in found.keys() | index.keys() if found.get(key) != index.get(key)):
        raise ValueError(
            f"{folder / INDEX} does not fit its files: {wrong[0]} is in {found.get(wrong[0])} and listed in "
            f"{index.get(wrong[0])} ({len(wrong)} such tensors). Download the checkpoint again"
        )
    return files


class ShardWriter:
    """One safetensors file, written tensor by tensor.

    specs : name → (dtype, shape) of every tensor that will be written. The room for all of them is taken at once, so that a
        full disk shows before the work begins.

    Raises OSError where the disk is full.
    """

    def __init__(self, path: Path, specs: Mapping[str, tuple[torch.dtype | str, tuple[int, ...]]]):
        sizes = {}
        for name, (dtype, shape) in specs.items():
            dtype = dtype if isinstance(dtype, str) else NAMES[dtype]
            sizes[name] = dtype, tuple(shape), math.prod(shape) * DTYPES[dtype].itemsize
        # Wide types first, so that every tensor lies at a multiple of its own width.
        order = sorted(sizes, key=lambda name: (-DTYPES[sizes[name][0]].itemsize, name))
        header, at = {"__metadata__": {"format": "pt"}}, 0
        for name in order:
            dtype, shape, nbytes = sizes[name]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.entries = {n: Entry(path, *sizes[n][:2], start + header[n]["data_offsets"][0], sizes[n][2]) for n in order}
        self.crc: dict[str, int] = {}
        self._file = path.open("wb", buffering=0)
        try:
            os.posix_fallocate(self._file.fileno(), 0, start + at)
            self._write(0, len(text).to_bytes(8, "little") + text)
        except BaseException:
            self._file.close()
            raise

    def _write(self, at: int, data) -> None:
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._file.fileno(), view, at)
            at, view = at + done, view[done:]

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor in its place. Raises ValueError for another dtype or shape than was announced."""
        entry = self.entries[name]
        if (NAMES.get(tensor.dtype), tuple(tensor.shape)) != (entry.dtype, entry.shape):
            raise ValueError(
                f"{name} was announced as {entry.dtype} {entry.shape}, not {tensor.dtype} {tuple(tensor.shape)}"
            )
        if tensor.numel():
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            self.crc[name] = zlib.crc32(data)
            self._write(entry.start, data)
        else:
            self.crc[name] = 0

    def copy(self, name: str, source: Entry) -> None:
        """Put the bytes of `source` in the place of a tensor of the same dtype and shape."""
        at, crc = self.entries[name].start, 0
        for piece in source.chunks():
            crc = zlib.crc32(piece, crc)
            self._write(at, piece)
            at += len(piece)
        self.crc[name] = crc

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Onto the disk, whole. Raises ValueError where tensors that were announced are missing."""
        try:
            if kind is None:
                if missing := [name for name in self.entries if name not in self.crc]:
                    raise ValueError(
                        f"{self.entries[missing[0]].path.name}: {missing[0]} was announced and never written"
                    )
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
