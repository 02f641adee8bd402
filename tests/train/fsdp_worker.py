"""Train an adapter for a few steps, alone or as one of several processes that share the model by FSDP2, and print what came out.

python fsdp_worker.py lora|qlora            torchrun --nproc_per_node 2 fsdp_worker.py lora|qlora
"""

import hashlib
import json
import os
import sys

import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from qlab.adapters import add_adapters
from qlab.formats import NF4
from qlab.models import load, trainable_parameters
from qlab.ptq import quantize_model

STEPS, ROWS = 8, 8


def sharded(model, world: int):
    mesh = distributed.init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(parameter: torch.Tensor) -> torch.Tensor:
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def main(method: str) -> None:
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    torch.manual_seed(0)
    model, _ = load("qlab-mini")
    if method == "qlora":
        quantize_model(model, NF4(double_quant=True), "rtn", progress=False)
    add_adapters(model, "lora", r=4, lora_alpha=12)
    if world > 1:
        distributed.init_process_group("gloo")
        sharded(model, world)
    ids = torch.randint(5, 200, (STEPS, ROWS, 16), generator=torch.Generator().manual_seed(1))
    optimizer, losses = torch.optim.AdamW(trainable_parameters(model), lr=1e-2), []
    for batch in ids:
        mine = batch.view(world, -1, batch.shape[-1])[rank]
        loss = model(input_ids=mine, labels=mine).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / world
        if world > 1:
            distributed.all_reduce(mean)
        losses.append(mean.item())
    digest = hashlib.sha256()
    for parameter in trainable_parameters(model):
        digest.update(whole(parameter).numpy().tobytes())
    result = {
        "rank": rank,
        "losses": losses,
        "adapter": digest.hexdigest(),
        "parameter_bytes": sum(local(p).nbytes for p in model.parameters()),
        "buffer_bytes": sum(buffer.nbytes for buffer in model.buffers()),
    }
    print("\n" + json.dumps(result) + "\n", end="", flush=True)
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
