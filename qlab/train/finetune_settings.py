"""What a fine-tune is told: one frozen dataclass, checked before anything else happens."""

import dataclasses
import math
import os
from dataclasses import dataclass

import torch

from qlab.train.finetune_methods import METHODS


@dataclass(frozen=True)
class Settings:
    """Of one run; JSON holds them all. None: as `settled` says.

    model : what qlab.models.load takes. method : a name of METHODS. data, eval_data : see finetune_data.py. out : a new folder.
    bits, group_size : of what is rounded to integers (1 to 8 bits). block_size, double_quant : of NF4 (4 bits, qlora and bitfit).
    r, lora_alpha, lora_dropout, targets : as in add_adapters; targets: "all-linear", a regular expression, or names' ends.
    lr : the highest; it rises for a tenth of the steps and falls as a cosine. AdamW without weight decay, gradients clipped to 1.
    steps or epochs : optimizer steps, or passes over the data (1). batch_size : rows for each process and forward; a step sees
        batch_size · grad_accum · processes of them.
    max_length : tokens of a row, or of a block of text (the model's own limit, at most 1024).
    save_steps, eval_steps : steps between checkpoints, and between evaluations on eval_data (one more at the end).
    dtype : of the weights that are not rounded. compute : "float32", or "bfloat16" by autocast.
    device : "cpu" or "cuda" (CUDA where there is one), the first one that CUDA_VISIBLE_DEVICES leaves, or one for each process.
    bitsandbytes : let transformers and bitsandbytes make the NF4 base (on CUDA yes, elsewhere no).
    activation_checkpointing : less memory, a third more computing. fsdp : shard the model over the processes (FSDP2).
    """

    model: str
    method: str
    data: str
    out: str
    eval_data: str | None = None
    bits: int | None = None
    group_size: int = 32
    block_size: int = 64
    double_quant: bool = True
    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    lr: float | None = None
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    grad_accum: int = 1
    max_length: int | None = None
    seed: int = 0
    save_steps: int = 100
    eval_steps: int = 100
    dtype: str = "float32"
    compute: str = "float32"
    device: str | None = None
    bitsandbytes: bool | None = None
    activation_checkpointing: bool = False
    fsdp: bool = False

    def settled(self) -> "Settings":
        """The same with every None decided. Raises ValueError for what cannot be."""
        if self.method not in METHODS:
            raise ValueError(f"method is one of {', '.join(METHODS)}, got {self.method!r}")
        method = METHODS[self.method]
        if method.bits is None and self.bits is not None:
            raise ValueError(
                f"{self.method} rounds nothing: leave bits={self.bits} out, or take qlora, which rounds the base"
            )
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"steps={self.steps} and epochs={self.epochs} both say how long to train: give one")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        settled = dataclasses.replace(
            self,
            model=str(self.model), data=str(self.data), out=str(self.out),
            eval_data=None if self.eval_data is None else str(self.eval_data),
            bits=self.bits if self.bits is not None else method.bits,
            targets=self.targets if isinstance(self.targets, str) else tuple(self.targets),
            lr=self.lr if self.lr is not None else method.lr,
            epochs=1.0 if self.steps is None and self.epochs is None else self.epochs,
            device=device,
            bitsandbytes=device == "cuda" if self.bitsandbytes is None else self.bitsandbytes,
        )  # fmt: skip
        settled._check()
        return settled

    def _check(self) -> None:
        for name in ("r", "group_size", "block_size", "batch_size", "grad_accum", "save_steps", "eval_steps"):
            _refuse_unless(name, getattr(self, name), int, lambda value: value >= 1, "a whole number of at least 1")
        for name in ("steps", "max_length"):
            if (value := getattr(self, name)) is not None:
                _refuse_unless(name, value, int, lambda value: value >= 1, "a whole number of at least 1")
        if self.bits is not None:
            _refuse_unless("bits", self.bits, int, lambda value: 1 <= value <= 8, "1 to 8")
        if self.epochs is not None:
            _refuse_unless("epochs", self.epochs, (int, float), lambda value: 0 < value < math.inf, "above 0")
        _refuse_unless("lr", self.lr, (int, float), lambda value: 0 < value < math.inf, "above 0")
        _refuse_unless("seed", self.seed, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 − 1")
        _refuse_unless("lora_dropout", self.lora_dropout, (int, float), lambda value: 0 <= value < 1, "in [0, 1)")
        _refuse_unless(
            "dtype", self.dtype, str, ("float32", "float16", "bfloat16").__contains__, "float32, float16 or bfloat16"
        )
        _refuse_unless(
            "device", self.device, str, ("cpu", "cuda").__contains__, "cpu or cuda (which one: CUDA_VISIBLE_DEVICES)"
        )
        _refuse_unless("compute", self.compute, str, ("float32", "bfloat16").__contains__, "float32 or bfloat16")

    @property
    def place(self) -> str:
        """The device of this process."""
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if self.device == "cuda" else self.device

    @property
    def target_modules(self) -> str | list[str]:
        return self.targets if isinstance(self.targets, str) else list(self.targets)


def _refuse_unless(name: str, value, types, right, wanted: str) -> None:
    if not isinstance(value, types) or isinstance(value, bool) or not right(value):
        raise ValueError(f"{name} is {wanted}, got {value!r}")
