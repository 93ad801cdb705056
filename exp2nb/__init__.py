"""RL (GRPO) versus more SFT at the same number of FLOPs."""
__version__ = "0.1.0"

# How long a thread of PyTorch or numba spins at a barrier before it sleeps. GNU's default, 300,000 turns (milliseconds), makes a machine
# with one other busy process several times slower: nbs/fast/09_busy.ipynb. Read once, when PyTorch is loaded; a value already set stays.
import os
if 'OMP_WAIT_POLICY' not in os.environ: os.environ.setdefault('GOMP_SPINCOUNT', '10000')
del os
