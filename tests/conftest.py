"""One thread per test worker: two workers on two cores otherwise spend their time waiting for each other."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("qlab", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("qlab")
