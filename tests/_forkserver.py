"""Children that start in milliseconds.

A test that kills a process, or needs several, would wait seconds for each to import PyTorch. Here one server imports everything once
and is forked for each child (the standard library's `forkserver`). The server loads this very module, with `WARM` in its environment,
and does what no child shall repeat."""
import importlib, multiprocessing, os
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

WARM = 'EXP2_TESTS_FORKSERVER'
ctx, here = multiprocessing.get_context('forkserver'), Path(__file__).parent

def run_in_child(f, *args):
    "Start `f(*args)` in a child of the server; the process, started."
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])
    with mock.patch.dict(os.environ, {'PYTHONPATH':path, WARM:'1'}):
        ctx.set_forkserver_preload(['_forkserver'])
        forkserver.ensure_running()
    p = ctx.Process(target=f, args=args, daemon=True)
    p.start()
    return p

def warm():
    "What the server does once: imports, one thread, and the stories."
    import torch
    from exp2nb.stories import make_stories
    for module in ('torch._dynamo', 'exp2nb.arms', 'exp2nb.tools.status'): importlib.import_module(module)   # Muon imports the first
    torch.set_num_threads(1)
    make_stories('train')

if os.environ.pop(WARM, ''): warm()
