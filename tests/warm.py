"""What the server of `children.py` does once, so that no child has to."""
import torch, torch._dynamo   # Muon imports the latter on first use
import exp2nb.lab, exp2nb.tools.status
from exp2nb.stories import make_stories

torch.set_num_threads(1)
make_stories('train')
