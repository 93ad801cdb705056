"""RL at the preset's rates beside the study's arms (the plan's ninth amendment): differences in pairs, and how far the bills lie apart.

    python rl_rates.py STUDY_RUN_FOLDER OTHER_RUN_FOLDER > study/rl_rates.json
"""
import json, sys
from exp2nb.config import git_revision
from exp2nb.ladder import mean_of
import numpy as np
from exp2nb.results import Study, bounds, discover, outcomes, zero_advantage_of
from exp2nb.stats import difference, judge

def learned(rs, study:bool)->dict:   # an arm's records, one a seed
    "Training, means over seeds: reward of the first and of the last ten steps, groups without an advantage, dev accuracy at the end."
    ms = [r.metrics[r.metrics.step>=0] for r in rs]
    def mean_reward(steps): return float(np.mean([m.reward.iloc[steps].mean() for m in ms]))
    reward = [mean_reward(slice(10)), mean_reward(slice(-10, None))] if 'reward' in ms[0] else None
    silent = [zero_advantage_of(r) for r in rs]
    return dict(arm=rs[0].arm, match_on=rs[0].match_on, study=study, seeds=len(rs), reward=reward,
                zero_advantage=float(np.mean(silent)) if None not in silent else None,
                dev=float(np.mean([m.dev_accuracy.dropna().iloc[-1] for m in ms])))

def compared(study, other)->dict:   # run folders → what the record keeps
    "RL of `other` minus SFT, and minus the study's RL and SFT+ on both bases, over all seeds, which start from the same checkpoints."
    ours, theirs = Study(discover([study])), Study(discover([other]))
    rl = theirs.get('rl')
    task, rows = rl[0].task, []
    x, sft, dead = outcomes(rl, task), outcomes(ours.get('sft'), task), mean_of(rl, 'zero_advantage')
    for arm, basis in (('sft', ''), ('rl', 'model'), ('sft_plus', 'model'), ('sft_plus', 'executed')):
        rs = ours.get(arm, basis)
        assert [(r.seed, r.sft_sha256) for r in rs]==[(r.seed, r.sft_sha256) for r in rl], arm
        j = judge(x, outcomes(rs, task), sft, dead, paired=True)
        bills = [a.spent[basis]/b.spent[basis]-1 for a,b in zip(rl, rs, strict=True)] if basis else []
        rows.append(dict(arm=arm, match_on=basis, seeds=len(rl), difference=j['difference'], low=j['interval'][0], high=j['interval'][1],
                         code=j['code'] if arm=='sft_plus' else None, bill=max(bills, key=abs, default=None)))
    scores = {t: float(outcomes(rl, t).mean()) for t in rl[0].scores['end']}
    others = {t: bounds(difference(outcomes(rl, t), outcomes(ours.get('sft'), t), paired=True)) for t in scores if t!=task}
    arms = [ours.get('rl'), ours.get('sft_plus'), ours.get('sft_plus', 'executed')]
    training = [learned(arms[0], True), learned(rl, False), *(learned(rs, True) for rs in arms[1:])]
    return dict(rates=rl[0].config['rl']['rates'], accuracy=scores, others=others, kl=mean_of(rl, 'kl_to_sft'), rows=rows,
                training=training, git=rl[0].info.get('git'), analysis=git_revision())

if __name__=='__main__': print(json.dumps(compared(*sys.argv[1:3]), indent=1))
