"""Without a GPU, the Triton kernels run in Triton's interpreter. It has to know before Triton is imported."""
import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
