"""Run folders as a run would write them, with outcomes whose truth is chosen: for tests of the analysis, without training.

The truth is a gain over SFT per arm, in shares of the target's problems, and a deviation from run to run."""
import json
from pathlib import Path
import numpy as np
from exp2nb.results import SPLITS
from exp2nb.store import files_record, read_json, write_json

FILES = ('config.json', 'items.jsonl', 'ledger.jsonl', 'metrics.jsonl')


def answer_rows(rng, task, levels, shift, samples, checkpoints):
    "Rows of items.jsonl: one greedy answer a problem and checkpoint, and `samples` sampled ones."
    rows, n = [], len(levels)
    for ckpt in checkpoints:
        for t, k in [(0., 1)] + ([(1., samples)] if samples else []):
            p = np.clip(levels + shift - .06*(t>0), .01, .99)
            right = rng.random((k, n)) < p
            parsed = right | (rng.random((k, n)) < .9)
            for s in range(k):
                for i in range(n):
                    r, ok = bool(right[s, i]), bool(parsed[s, i])
                    pred = None
                    if ok: pred = str(i) if r else str(i+1+rng.integers(3))
                    rows.append(dict(
                        task=task, id=f'{task}/{i:04d}', sample=s, temperature=t, checkpoint=ckpt, correct=r, parsed=ok, pred=pred,
                        stopped=bool(ok or rng.random()<.5), used_calculator=bool(rng.random()<.8), correct_last_number=r))
    return rows


def kinds_of_work(arm):
    "Stage → its share of an arm's bill: the optimizer's is 3 %, generation's a fifth of what RL or answers of one's own take."
    if arm in ('rft', 'rft_online'): return dict(rollout=.2, sft=.77, optimizer=.03)
    split = {f'{a}{s}_{b}{100-s}': (s if a=='rl' else 100-s)/100 for s,a,b in SPLITS}
    rl = split.get(arm, 1. if arm.startswith('rl') or arm=='positives' else 0.)
    return {k: f for k,f in dict(rollout=.2*rl, update=.77*rl, sft=.97*(1-rl), optimizer=.03).items() if f}


def ledger_rows(arm, steps, total, executed=1.3):
    "Rows of ledger.jsonl. `executed`: executed FLOPs for one of the model's."
    rl, parts = arm.startswith('rl'), kinds_of_work(arm)
    rows = []
    for s in range(steps):
        for stage, share in parts.items():
            f = int(total*share*(s+1))//steps - int(total*share*s)//steps
            rows.append(dict(
                stage=stage, step=s, rank=0, tokens_prompt=640, tokens_new=2000, tokens_forced=100, tokens_pad=0,
                flops_model=f, flops_executed=int(executed*f), flops_note=int((1.1 if rl else 1.4)*f),
                seconds=.001*(5 if stage=='rollout' else 1), device_seconds=.001))
    return rows


def metric_rows(rng, arm, steps, gain, level, zero_advantage):
    "Rows of metrics.jsonl, one a step, with dev accuracy at about nine of them."
    rows, rl = [], arm.startswith('rl')
    for s in range(-1, steps):
        f = (s+1)/steps
        row = dict(stage='rl' if rl else 'sft_plus', step=s, seconds=.01, fraction=f)
        if s>=0 and rl:
            row |= dict(reward=level-.1+1.5*gain*f+.03*rng.standard_normal(),
                        zero_advantage=float(np.clip(zero_advantage+.05*rng.standard_normal(), 0, 1)),
                        completion_tokens=40+3*f, entropy=.5-.2*f, noise_scale=2e4)
        if s>=0 and not rl: row |= dict(loss=.3-.1*f, noise_scale=3e3)
        if (s+1) % max(1, steps//8)==0: row |= dict(dev_accuracy=level+gain*f**.5+.01*rng.standard_normal())
        rows.append(row)
    return rows


def fake_arm(
    run_dir, arm, seed=0, match_on='model', budget=1.,
    gain=0.,               # accuracy above SFT on the target, as a share
    run_sd=.005,           # run-to-run deviation
    items=300, samples=4, steps=40, total=10**12,
    tasks=('stories', 'spellingbee', 'choices'),
    level=.45,             # SFT's accuracy
    zero_advantage=.4,
    executed=1.3,          # executed FLOPs for one model FLOP
    vary='arm',
    **info                 # replaces fields of arm.json
):
    "Write one arm's folder, and return it."
    folder = Path(run_dir)/arm/f'{match_on}-{budget:g}'.replace('-1', '-1.0')/f'seed{seed}'
    rng = np.random.default_rng([seed, len(arm), int(1000*budget), len(match_on)])
    fixed = np.random.default_rng(0)
    checkpoints = ('end',) if arm=='sft' else ('end', 'best_dev')
    rows = []
    for k, task in enumerate(tasks):
        shift = (gain + run_sd*rng.standard_normal()) if k==0 else -.3*abs(gain)*(arm!='sft')
        levels = np.clip(level + .3*fixed.standard_normal(items), .02, .98)
        draws = np.random.default_rng([0, k]) if arm=='sft' else rng
        rows += answer_rows(draws, task, levels, shift, samples if k==0 else 0, checkpoints)
    ledger = ledger_rows(arm, steps, int(total*budget), executed) if arm!='sft' else []
    metrics = metric_rows(rng, arm, steps, gain, level, zero_advantage)
    folder.mkdir(parents=True, exist_ok=True)
    for name, what in (('items', rows), ('ledger', ledger), ('metrics', metrics)):
        (folder/f'{name}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in what))
    write_json(folder/'config.json', dict(arm=arm, task=tasks[0], preset='tiny', seed=seed, vary=vary, sft_passes=1., sft=dict(passes=1.)))
    rl = arm.startswith('rl')
    write_json(folder/'arm.json', dict(
        schema=1, arm=arm, task=tasks[0], preset='tiny', seed=seed, match_on=match_on, budget=budget,
        sft_sha256='a'*64, base_sha256='b'*64, tokenizer_sha256='c'*64,
        steps=len({r['step'] for r in ledger}), epochs=.2 if rl else 4.,
        eval_settings=dict(tasks=list(tasks), temperature=1., top_k=50, n_samples=samples, max_new=96),
        files=files_record(folder, FILES),
        not_run=[], kl_to_sft=0. if arm=='sft' else .02 if rl else .15, entropy=.3 if rl else .4, 
        zero_advantage=zero_advantage if arm=="rl" else None) | info)
    return folder


def seal(folder):
    "Let arm.json record the files as they are now."
    arm = read_json(folder/'arm.json')
    write_json(folder/'arm.json', arm | dict(files=files_record(folder, FILES)))


def fake_run(run_dir, gains=(.05, .12), seeds=1, bases=('model', 'executed'), **kw):
    "An invented run: SFT, RL and SFT+ with the given gains over SFT, as shares; SFT+ on each basis."
    for s in range(seeds):
        fake_arm(run_dir, 'sft', s, **kw)
        fake_arm(run_dir, 'rl', s, gain=gains[0], **kw)
        for basis in bases: fake_arm(run_dir, 'sft_plus', s, basis, gain=gains[1], **kw)
    return Path(run_dir)
