"""RL (GRPO) versus more SFT at the same number of FLOPs."""
__version__ = "0.1.0"
