"""Answers of up to 160 tokens (the plan's sixth amendment): SFT+ with 1, 4 and 16 solutions a problem, beside SFT and RL.

    python longer.py STUDY_RUN_FOLDER FOLDER > study/longer.json

FOLDER holds what this wrote for each arm and seed:

    exp2_eval --checkpoint … --task stories --max-new 160 --items ARM-SEED.jsonl --json > ARM-SEED.json
"""
import json, sys
from pathlib import Path
import numpy as np, pandas as pd
from exp2nb.config import git_revision
from exp2nb.results import Study, bounds, discover, outcomes
from exp2nb.stats import difference
from exp2nb.store import read_json

ARMS = ['sft', 'rl', 'sft_plus', 'sft_plus4', 'sft_plus16']
def cut(rows)->float:
    "Share of greedy answers that did not end."
    return float(1-rows['stopped'].mean())

def at_length(r, folder:Path)->tuple:
    "An arm's longer answers, their scores in the order of `outcomes`, and the settings. Raises `AssertionError` for other weights."
    told = read_json(folder/f'{r.arm}-{r.seed}.json', dict)
    assert told['weights_sha256']==r.weights_sha256, r.folder
    rows = pd.read_json(folder/f'{r.arm}-{r.seed}.jsonl', lines=True)
    return rows, rows.set_index('id')['score'].sort_index().to_numpy(float), told['settings']['max_new']

def compared(study, folder)->dict:   # run folder, folder of longer answers → what the record keeps
    "Each arm's accuracy and cut answers at both lengths, and at the longer one its gain over SFT and its difference to RL, in pairs."
    study, folder = Study(discover([study])), Path(folder)
    task = study.get('rl')[0].task
    seeds = sorted(r.seed for r in study.get('rl') if (folder/f'rl-{r.seed}.json').exists())
    runs = {arm: [r for r in study.get(arm) if r.seed in seeds] for arm in ARMS}
    read = {arm: [at_length(r, folder) for r in rs] for arm,rs in runs.items()}
    lengths = {length for got in read.values() for _,_,length in got}
    assert len(lengths)==1 and all(len(rs)==len(seeds) for rs in runs.values()), (lengths, seeds)
    scores = {arm: np.array([s for _,s,_ in got]) for arm,got in read.items()}
    def gap(arm, other): return bounds(difference(scores[arm], scores[other], paired=True)) if arm!=other else None
    def short(r): return r.answers[task, 'end', True]
    rows = [dict(arm=arm, seeds=len(seeds), before=float(outcomes(rs, task).mean()), accuracy=float(scores[arm].mean()),
                 cut_before=float(np.mean([cut(short(r)) for r in rs])), cut=float(np.mean([cut(rows) for rows,_,_ in read[arm]])),
                 over_sft=gap(arm, 'sft'), to_rl=gap(arm, 'rl')) for arm,rs in runs.items()]
    before = {r.info['eval_settings']['max_new'] for rs in runs.values() for r in rs}
    assert len(before)==1
    git = runs['rl'][0].info.get('git')
    return dict(before=before.pop(), tokens=lengths.pop(), seeds=seeds, rows=rows, git=git, analysis=git_revision())

if __name__=='__main__': print(json.dumps(compared(*sys.argv[1:3]), indent=1))
