"""Everything that is here only for speed: faster versions of the book's operators, for a CPU's float32 and for GPUs."""
import torch

def register():
    "Fill `exp2nb.protocol.FASTER`, where each module registers its own functions when it is imported, and share the cores."
    torch.backends.cuda.enable_cudnn_sdp(False)   # cuDNN compiles a plan for every new shape, and a flat batch's blocks hardly ever repeat

    from . import attention, decode, fused, gpu, layers, muon   # noqa: F401
    from .share import share_cores
    share_cores()
