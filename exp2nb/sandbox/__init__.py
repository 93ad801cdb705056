"""Programs that a model wrote, run where they can do no harm."""
from .sandbox import find_isolation, run_candidate, run_many

__all__ = ['find_isolation', 'run_candidate', 'run_many']
