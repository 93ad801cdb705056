"""Everything that is here only for speed: faster doubles of the book's operators, for a CPU's float32 and for GPUs."""

def register():
    "Put the faster doubles into `exp2nb.protocol.FASTER`: each module does so for its own when it is imported."
    from . import attention, decode, fused, gpu   # noqa: F401
