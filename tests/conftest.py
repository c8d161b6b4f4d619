"""Without a GPU, Triton kernels run in its interpreter. It is chosen when a kernel is defined, so
the choice stands before anything is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
