"""One process of a fine-tune by `qlab.train.finetune`; each prints the checksum of the adapter that it holds in the end.

python ddp_worker.py '{"model": …}'        torchrun --nproc_per_node 2 ddp_worker.py '{"model": …}'
"""

import hashlib
import json
import os
import sys

from qlab.models import trainable_parameters
from qlab.train.finetune import Settings, finetune

if __name__ == "__main__":
    result, digest = finetune(Settings(**json.loads(sys.argv[1]))), hashlib.sha256()
    for parameter in trainable_parameters(result.model):
        digest.update(parameter.detach().numpy().tobytes())
    print("\n" + json.dumps({"rank": int(os.environ.get("RANK", 0)), "adapter": digest.hexdigest()}), flush=True)
