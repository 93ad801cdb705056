"""RL at the preset's rates beside the study's arms (the plan's ninth amendment): differences in pairs, and how far the bills lie apart.

    python rl_rates.py STUDY_RUN_FOLDER OTHER_RUN_FOLDER > study/rl_rates.json
"""
import json, sys
from exp2nb.config import git_revision
from exp2nb.ladder import mean_of
from exp2nb.results import Study, discover, outcomes
from exp2nb.stats import judge

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
    return dict(rates=rl[0].config['rl']['rates'], accuracy=scores, kl=mean_of(rl, 'kl_to_sft'), rows=rows, git=rl[0].info.get('git'),
                analysis=git_revision())

if __name__=='__main__': print(json.dumps(compared(*sys.argv[1:3]), indent=1))
