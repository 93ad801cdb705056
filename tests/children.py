"""Children that start in milliseconds: forked from a server that has imported everything and told the stories (`warm.py`)."""
import multiprocessing, os
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ctx, here = multiprocessing.get_context('forkserver'), Path(__file__).parent

def run_in_child(f, *args):
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join([str(here), str(here.parent), os.environ.get('PYTHONPATH', '')])):
        ctx.set_forkserver_preload(['warm'])
        forkserver.ensure_running()
    p = ctx.Process(target=f, args=args, daemon=True)
    p.start()
    return p
