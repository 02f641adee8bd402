"""Linear layers as bitsandbytes stores them in a checkpoint: what transformers writes and reopens as "pre-quantized".

4 bit (Dettmers et al. 2023, arXiv:2305.14314), for a layer of out · in weights cut into n_blocks:

| key | shape, dtype |
|---|---|
| weight | (⌈out · in / 2⌉, 1) uint8, two codes a byte |
| weight.absmax | (n_blocks,) float32; uint8 with double quantization |
| weight.quant_map | (16,) float32, the levels |
| weight.nested_absmax, weight.nested_quant_map | (⌈n_blocks / 256⌉,), (256,) float32, with double quantization |
| weight.quant_state.bitsandbytes__nf4 (or __fp4) | JSON as uint8: block size, shape and dtype of the weight, mean of absmax |

8 bit (Dettmers et al. 2022, arXiv:2208.07339): weight (out, in) int8, SCB (out,) float32: absmax of each row, weight_format.

Weights are (out, in) here whatever class the layer has. Work goes in slabs, so that beside a weight and its codes only a slab
is held in float32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qlab.formats import FP4, NF4, QTensor
from qlab.formats.base import check_weights
from qlab.formats.codebook import DOUBLE_QUANT_BLOCK, BlockCodebook, dynamic_map
from qlab.nn.config import dtype_name

FORMATS = {"nf4": NF4, "fp4": FP4}
SLAB = 1 << 20  # weights; a multiple of every block size
BLOCK_SIZES = tuple(2**n for n in range(5, 13))
_META = "weight.quant_state.bitsandbytes__"
Specs = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Storage:
    """One way in which bitsandbytes stores layers. format: "nf4", "fp4" or "int8"; the others mean 4 bit only.

    >>> storage = Storage("nf4")
    >>> storage.decode(storage.encode(torch.tensor([[0.5, -1.0], [0.0, 2.0]])))
    tensor([[ 0.4922, -1.0501],
            [ 0.0000,  2.0000]])
    """

    format: str
    block_size: int = 64
    double_quant: bool = False

    def __post_init__(self):
        if self.format not in (*FORMATS, "int8"):
            raise ValueError(f"the format of a quantized base is nf4, fp4 or int8, got {self.format!r}")
        if self.block_size not in BLOCK_SIZES:
            raise ValueError(
                f"bitsandbytes has blocks of {', '.join(map(str, BLOCK_SIZES))} weights, not of {self.block_size}"
            )

    def __str__(self) -> str:
        return self.format if self.format == "int8" else repr(self.codebook)

    @property
    def codebook(self) -> BlockCodebook:
        return FORMATS[self.format](self.block_size, self.double_quant)

    def record(self) -> dict:
        """As qlab.json writes it, without the dtype."""
        four_bit = {"block_size": self.block_size, "double_quant": self.double_quant}
        return {"format": self.format, **(four_bit if self.format in FORMATS else {})}

    def config(self, skipped: list[str] | None, dtype: torch.dtype) -> dict:
        """The quantization_config of a checkpoint that is stored so. skipped: linear layers that are not, None: the usual ones."""
        from transformers import BitsAndBytesConfig

        if self.format == "int8":
            return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped).to_dict()
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.format,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=skipped,
        ).to_dict()

    def specs(self, shape: tuple[int, int], dtype: torch.dtype) -> Specs:
        """Key → (dtype, shape) of what `encode` makes of a weight."""
        if self.format == "int8":
            return {
                "weight": (torch.int8, shape),
                "SCB": (torch.float32, shape[:1]),
                "weight_format": (torch.uint8, ()),
            }
        n_weights = shape[0] * shape[1]
        n_blocks = -(-n_weights // self.block_size)
        specs = {
            "weight": (torch.uint8, (-(-n_weights // 2), 1)),
            "weight.absmax": (torch.uint8 if self.double_quant else torch.float32, (n_blocks,)),
            "weight.quant_map": (torch.float32, (16,)),
            _META + self.format: (torch.uint8, (len(self._meta(shape, dtype, 0.0)),)),
        }
        if self.double_quant:
            specs["weight.nested_absmax"] = torch.float32, (-(-n_blocks // DOUBLE_QUANT_BLOCK),)
            specs["weight.nested_quant_map"] = torch.float32, (256,)
        return specs

    def _meta(self, shape, dtype: torch.dtype, offset: float) -> bytes:
        """JSON, always of the same length, so that a file can be laid out before `offset` is known."""
        meta = {
            "quant_type": self.format,
            "blocksize": self.block_size,
            "dtype": dtype_name(dtype),
            "shape": list(shape),
        }
        if self.double_quant:
            meta |= {"nested_blocksize": DOUBLE_QUANT_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(meta).encode().ljust(len(json.dumps({**meta, "nested_offset": 0})) + 32)

    def encode(self, w: Tensor, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What is stored for a weight (out, in). dtype: in which it will be decoded (4 bit); None: that of w.

        Raises ValueError for NaN or Inf.
        """
        if self.format == "int8":
            return _encode_int8(w)
        fmt, absmax, packed = self.codebook, [], []
        for slab in w.reshape(-1).split(SLAB):
            params = fmt.fit(slab)
            absmax.append(params["absmax"])
            packed.append(fmt.pack(fmt.encode(slab, params)))
        params = fmt.stored({"absmax": torch.cat(absmax)})
        tensors = {"weight": torch.cat(packed).unsqueeze(1), "weight.quant_map": fmt.levels.clone()}
        if self.double_quant:
            tensors |= {"weight.absmax": params["absmax_code"], "weight.nested_absmax": params["absmax_scale"]}
            tensors["weight.nested_quant_map"] = dynamic_map()
        else:
            tensors["weight.absmax"] = params["absmax"]
        offset = float(params["absmax_offset"]) if self.double_quant else 0.0
        meta = self._meta(tuple(w.shape), dtype or w.dtype, offset)
        tensors[_META + self.format] = torch.frombuffer(bytearray(meta), dtype=torch.uint8)
        return tensors

    def decode(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight (out, in): 4 bit in the dtype that was quantized, 8 bit in float32."""
        if self.format == "int8":
            return _decode_int8(tensors["weight"], tensors["SCB"])
        meta = json.loads(bytes(tensors[_META + self.format].tolist()))
        fmt, shape, dtype = self.codebook, torch.Size(meta["shape"]), getattr(torch, meta["dtype"])
        params = {"absmax": tensors["weight.absmax"]}
        if self.double_quant:
            params = {"absmax_code": tensors["weight.absmax"], "absmax_scale": tensors["weight.nested_absmax"]}
            params["absmax_offset"] = torch.tensor(meta["nested_offset"])
        absmax, packed = fmt.absmax(params), tensors["weight"].reshape(-1)
        w_hat, plain = torch.empty(shape.numel(), dtype=dtype), type(fmt)(self.block_size)
        for start in range(0, len(w_hat), SLAB):
            slab = w_hat[start : start + SLAB]
            own = absmax[start // self.block_size : (start + SLAB) // self.block_size]
            codes = packed[start // 2 : (start + SLAB) // 2]
            slab.copy_(QTensor(plain, codes, {"absmax": own}, slab.shape, dtype).dequantize())
        return w_hat.view(shape)

    def first_values(self, w: Tensor, count: int) -> Tensor:
        """Levels of the first `count` codes that w (rows, in) would have: what `base_record.checksum` takes."""
        if self.format == "int8":
            return _encode_int8(w[: -(-count // w.shape[1])])["weight"].reshape(-1)[:count]
        fmt = self.codebook
        flat = w.reshape(-1)[: -(-count // self.block_size) * self.block_size]
        return fmt.levels[fmt.encode(flat, fmt.fit(flat)).int()][:count]


def storage_of(config: Mapping, meta: bytes | None) -> Storage:
    """The storage of a checkpoint from its quantization_config and, for 4 bit, the JSON of one of its layers.

    Raises ValueError for a method other than bitsandbytes', naming it, and for settings that these files never have.
    """
    method = config.get("quant_method", "bitsandbytes")
    if method != "bitsandbytes":
        raise ValueError(
            f"the base is quantized by {method!r}, which cannot be merged into here: take its float original"
        )
    if config.get("load_in_8bit"):
        return Storage("int8")
    if not config.get("load_in_4bit") or meta is None:
        raise ValueError(
            "the quantization_config of the base names bitsandbytes, but neither load_in_4bit nor load_in_8bit"
        )
    if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise ValueError(f"the base keeps its codes as {config['bnb_4bit_quant_storage']}: only uint8 can be read here")
    found = json.loads(meta)
    return Storage(found["quant_type"], found["blocksize"], "nested_offset" in found)


def check_same(storage: Storage, name: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError where a stored layer is not as `storage` says."""
    key = _META + storage.format
    if storage.format == "int8":
        if not tensors.keys() >= {"weight", "SCB"}:
            raise ValueError(f"the base stores {name!r} without SCB: {', '.join(tensors)}")
        return
    meta = json.loads(bytes(tensors[key].tolist())) if key in tensors else {}
    if (meta.get("blocksize"), "nested_offset" in meta) != (storage.block_size, storage.double_quant):
        raise ValueError(
            f"the base stores {name!r} otherwise than its other layers, which are {storage}: {meta or list(tensors)}"
        )
    if not torch.equal(tensors["weight.quant_map"], storage.codebook.levels):
        raise ValueError(f"the base stores {name!r} with other levels than those of {storage.format}")


def _encode_int8(w: Tensor) -> dict[str, Tensor]:
    codes, absmax = torch.empty(w.shape, dtype=torch.int8), torch.empty(w.shape[0])
    for rows, start in _row_slabs(w):
        half = rows.half()  # as bitsandbytes, whatever the weights were
        check_weights(half)
        own = half.abs().amax(1).float()
        absmax[start : start + len(rows)] = own
        scaled = half * (127.0 / torch.where(own > 0, own, 1)).unsqueeze(1)
        codes[start : start + len(rows)] = scaled.round_().to(torch.int8)
    return {"weight": codes, "SCB": absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def _decode_int8(codes: Tensor, absmax: Tensor) -> Tensor:
    w_hat = torch.empty(codes.shape)
    for rows, start in _row_slabs(codes):
        own = absmax[start : start + len(rows)].unsqueeze(1)
        w_hat[start : start + len(rows)] = rows * own * 7.874015718698502e-3  # 1/127 in bitsandbytes' digits
    return w_hat


def _row_slabs(w: Tensor):
    step = max(1, SLAB // max(1, w.shape[1]))
    return ((w[start : start + step], start) for start in range(0, len(w), step))
