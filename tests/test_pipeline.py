"The whole experiment in small, as a user runs it: every arm, both target tasks, the run notebook, refusals, and the same run twice."
import json, os, sys
from pathlib import Path
import pytest
from exp2nb.arms import arm_folder, run_arm
from exp2nb.config import UserError, make_config, override
from exp2nb.store import artifact_hash, read_json, read_jsonl

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT/'nbs'/'run_arm.ipynb'
DATA = os.environ.get('EXP2_DATA_DIR', '')
SMALL = {'pretrain.tokens_per_param':.05, 'rl.steps':2, 'rl.preflight':4, 'eval.kl_prompts':4, 'eval.curve':1}

def config(run_dir, arm, **kw):
    "The smoke preset with caps that make an arm a matter of seconds."
    changes = SMALL | kw.pop('changes', {})
    return override(make_config('smoke', arm=arm, run_dir=str(run_dir), **(dict(n_train=64, n_test=8, dev=8) | kw)), changes)

def check_comparison(arms):
    "What must hold for any finished trio of arms."
    assert {a: r['arm'] for a,r in arms.items()}=={a:a for a in arms}
    assert len({r['sft_sha256'] for r in arms.values()})==len({r['tokenizer_sha256'] for r in arms.values()})==1
    assert abs(arms['sft_plus']['residual']) < .001 and arms['sft_plus']['spent']['model']==arms['sft_plus']['budget_record']['sft_plus']
    assert 0 <= arms['rl']['zero_advantage'] <= 1 and arms['rl']['steps']==2
    assert arms['sft']['steps']==0 and arms['sft']['spent']['model']==0
    assert len({json.dumps(r['eval_settings'], sort_keys=True) for r in arms.values()})==1
    assert len({tuple(r['scores']['end']) for r in arms.values()})==1
    assert all(r['chat_core']['over']==list(r['scores']['end']) and not r['chat_core']['complete'] for r in arms.values())

# the embedded task

@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
    "A run folder with sft and rl finished, and what sft_plus said before there was an rl."
    top = tmp_path_factory.mktemp('run')
    arms = dict(sft=run_arm(config(top, 'sft'), progress=False))
    with pytest.raises(UserError) as e: run_arm(config(top, 'sft_plus'), progress=False)
    arms['rl'] = run_arm(config(top, 'rl'), progress=False)
    return top, arms, str(e.value)

def test_sft_plus_without_rl_says_what_to_run_first(embedded):
    assert 'rl' in embedded[2] and 'run' in embedded[2].lower() and '\n' not in embedded[2]

def papermill(out, **params):
    "Run the notebook; its cells' text output, or the error that stopped it."
    import papermill as pm
    try: nb = pm.execute_notebook(str(NOTEBOOK), str(out), parameters=params, progress_bar=False, log_output=False, kernel_name='python3', cwd=str(ROOT))
    except pm.PapermillExecutionError as e: return f'{e.ename}: {e.evalue}'
    return '\n'.join(o.get('text', '') for c in nb.cells if c.cell_type=='code' for o in c.outputs)

def test_the_notebook_runs_an_arm(embedded, tmp_path):
    "sft_plus by papermill, in the folder where sft and rl ran in this process."
    top, arms, _ = embedded
    said = papermill(tmp_path/'out.ipynb', arm='sft_plus', preset='smoke', run_dir=str(top), n_train=64, n_test=8, dev=8, changes=' '.join(f'{k}={v}' for k,v in SMALL.items()))
    assert 'more SFT' in said, said
    plus = read_json(arm_folder(config(top, 'sft_plus'))/'arm.json')
    check_comparison(arms | dict(sft_plus=plus))

def test_every_answer_is_kept(embedded):
    top, arms, _ = embedded
    for arm,r in arms.items():
        rows = read_jsonl(arm_folder(config(top, arm))/'items.jsonl')
        for task,s in r['scores']['end'].items():
            mine = [x for x in rows if x['task']==task and x['checkpoint']=='end' and x['temperature']==0]
            assert len(mine)==s['n'] and sum(x['correct'] for x in mine)/len(mine)==s['accuracy']
        assert r['scores']['end']['stories']['t1']['samples']==2*8 and r['not_run']==[]

def test_a_finished_arm_is_shown_again_not_run_again(embedded, capsys):
    top, arms, _ = embedded
    assert run_arm(config(top, 'rl'), progress=False)==arms['rl'] and 'finished already' in capsys.readouterr().out

def test_other_settings_in_the_same_folder_are_refused(embedded):
    with pytest.raises(UserError, match='another|other|differ'): run_arm(config(embedded[0], 'rl', changes={'rl.top_k':10}), progress=False)

def test_parameters_are_those_that_the_documentation_names():
    import papermill as pm
    assert {'arm', 'preset', 'task', 'seed', 'base', 'sft_checkpoint', 'match_on', 'budget', 'run_dir', 'data_dir'} <= set(pm.inspect_notebook(str(NOTEBOOK)))

@pytest.mark.parametrize('given,words', [(dict(arn='rl', preset='smoke'), ("'arn'", 'arm, preset')), (dict(arm='rll', preset='smoke'), ("'rll'", 'sft, rl, sft_plus'))])
def test_the_notebook_refuses_what_it_does_not_know(tmp_path, given, words):
    said = papermill(tmp_path/'out.ipynb', run_dir=str(tmp_path/'run'), **given)
    assert said.startswith('UserError') and all(w in said for w in words) and not (tmp_path/'run').exists()

def test_the_same_run_twice_is_the_same_to_the_bit(embedded, tmp_path):
    top, arms, _ = embedded
    again = run_arm(config(tmp_path, 'rl'), progress=False)
    a,b = (arm_folder(config(t, 'rl')) for t in (top, tmp_path))
    assert artifact_hash(a/'weights')==artifact_hash(b/'weights') and again['sft_sha256']==arms['rl']['sft_sha256']
    assert again['scores']==arms['rl']['scores'] and again['spent']['model']==arms['rl']['spent']['model']
    assert (a/'rollouts.jsonl').read_bytes()==(b/'rollouts.jsonl').read_bytes() and (a/'items.jsonl').read_bytes()==(b/'items.jsonl').read_bytes()

# GSM8K

@pytest.fixture(scope='module')
def only_gsm8k(tmp_path_factory):
    "A data folder with GSM8K and nothing else."
    if not DATA: pytest.skip('EXP2_DATA_DIR is not set: no GSM8K here')
    top = tmp_path_factory.mktemp('data')
    (top/'openai').mkdir()
    (top/'openai'/'gsm8k').symlink_to((Path(DATA)/'openai'/'gsm8k').resolve())
    return top

def test_gsm8k_from_end_to_end(only_gsm8k, tmp_path):
    "Three arms; the benchmarks whose data is missing are not run, with the reason, and never 0."
    changes = {'eval.tasks':['gsm8k', 'mmlu', 'humaneval', 'spellingbee'], 'sft.spelling':.1, 'sft.choices':.1}
    arms = {a: run_arm(config(tmp_path, a, task='gsm8k', data_dir=str(only_gsm8k), changes=changes), progress=False) for a in ('sft', 'rl', 'sft_plus')}
    check_comparison(arms)
    for r in arms.values():
        assert list(r['scores']['end'])==['gsm8k', 'spellingbee'] and {x['task'] for x in r['not_run']}=={'mmlu', 'humaneval'}
        assert all('exp2_fetch' in x['why'] for x in r['not_run'])
        assert r['scores']['end']['gsm8k']['n']==8 and 't1' in r['scores']['end']['gsm8k']
