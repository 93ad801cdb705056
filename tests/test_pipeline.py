"The whole experiment in small, as a user runs it: every arm, both target tasks, the run notebook, refusals, and the same run twice."
import json, os, shutil, signal, subprocess, sys
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
import pytest, torch
from exp2nb.lab import Lab, arm_folder, sft_folder
from exp2nb import arms as arms_module, lab as lab_module
from exp2nb.arms import ArmRun, refuse_twin, run_arm
from exp2nb.fast.bench import Workload, make_groups, our_gradient
from exp2nb.config import UserError, make_config, override, sha256_of
from exp2nb.engine import Sample
from exp2nb.ledger import BUDGET_STAGES
from exp2nb.grpo import GRPO
from exp2nb.tools import run as run_module
from exp2nb.tools.cli import configure
from exp2nb.tools.run import exp2_run
from exp2nb.tools.status import piece_status
from exp2nb.tools.tune import tune
from exp2nb.results import discover
from exp2nb.store import Interrupted, altered_file, artifact_hash, files_record, read_json, read_jsonl
from exp2nb.sandbox.sandbox import usable_cores
from exp2nb.train import Run, Supervised, check_finite

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
    how = dict(progress_bar=False, log_output=False, kernel_name='python3', cwd=str(ROOT))
    try: nb = pm.execute_notebook(str(NOTEBOOK), str(out), parameters=params, **how)
    except pm.PapermillExecutionError as e: return f'{e.ename}: {e.evalue}'
    return '\n'.join(o.get('text', '') for c in nb.cells if c.cell_type=='code' for o in c.outputs)

def test_the_notebook_runs_an_arm(embedded, tmp_path, monkeypatch):
    "sft_plus by papermill in two processes, in the folder where sft and rl ran in this one."
    top, arms, _ = embedded
    monkeypatch.delenv('MPLBACKEND', raising=False)   # as in a user's shell
    changes = ' '.join(f'{k}={v}' for k,v in SMALL.items())
    out = tmp_path/'out.ipynb'
    said = papermill(out, arm='sft_plus', preset='smoke', processes=2, run_dir=str(top), n_train=64, n_test=8, dev=8, changes=changes)
    assert 'more SFT' in said, said
    outputs = [o for c in read_json(out)['cells'] for o in c.get('outputs', [])]
    assert any('image/png' in o.get('data', {}) for o in outputs), 'the journal has no curves'
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
    documented = {'arm', 'preset', 'task', 'seed', 'base', 'sft_checkpoint', 'match_on', 'budget', 'run_dir', 'data_dir'}
    assert documented <= set(pm.inspect_notebook(str(NOTEBOOK)))

@pytest.mark.parametrize('given,words', [
    (dict(arn='rl', preset='smoke'), ("'arn'", 'preset, task, arm')),
    (dict(arm='rll', preset='smoke'), ("'rll'", 'sft, rl, sft_plus')),
    (dict(arm='sft', preset='smoke', processes=-1), ('processes must be a whole number from 0', '-1'))])
def test_the_notebook_refuses_what_it_does_not_know(tmp_path, given, words):
    said = papermill(tmp_path/'out.ipynb', run_dir=str(tmp_path/'run'), **given)
    assert said.startswith('UserError') and all(w in said for w in words) and not (tmp_path/'run').exists()

def test_the_same_run_twice_is_the_same_to_the_bit(embedded, tmp_path):
    top, arms, _ = embedded
    again = run_arm(config(tmp_path, 'rl'), progress=False)
    a,b = (arm_folder(config(t, 'rl')) for t in (top, tmp_path))
    assert artifact_hash(a/'weights')==artifact_hash(b/'weights') and again['sft_sha256']==arms['rl']['sft_sha256']
    assert again['scores']==arms['rl']['scores'] and again['spent']['model']==arms['rl']['spent']['model']
    for name in ('rollouts.jsonl', 'items.jsonl'): assert (a/name).read_bytes()==(b/name).read_bytes(), name

# a hash that is recorded is compared with the bytes that are used, and the advice in each refusal is followed

@pytest.fixture
def copied(embedded, tmp_path):
    "A copy with sft and rl finished; without sft_plus, which the notebook's test may have run in two processes."
    return shutil.copytree(embedded[0], tmp_path/'run', ignore=shutil.ignore_patterns('sft_plus'))

def refused(c):
    "The one sentence with which an arm refuses to run."
    with pytest.raises(UserError) as e: run_arm(c, progress=False)
    assert '\n' not in str(e.value)
    return str(e.value)

def test_an_sft_checkpoint_with_other_weights_is_refused_and_comes_back(embedded, copied):
    "The base's weights in its place, complete, with their own manifest."
    c = config(copied, 'sft_plus')
    weights = sft_folder(c)/'weights'
    shutil.rmtree(weights)
    shutil.copytree(copied/'base'/'weights', weights)
    assert f'delete {weights} and give the same command again' in refused(c)
    shutil.rmtree(weights)
    assert run_arm(c, progress=False)['sft_sha256']==embedded[1]['rl']['sft_sha256']

def test_a_base_without_weights_is_made_again(embedded, copied):
    "Its record is still there: the weights come back from the last checkpoint, the same to the bit."
    shutil.rmtree(copied/'base'/'weights')
    assert Lab(config(copied, 'rl'), False).base.sha256==embedded[1]['rl']['base_sha256']

def test_an_altered_tokenizer_is_refused_and_made_again(embedded, copied):
    path = copied/'tokenizer.json'
    tok = json.loads(path.read_text())
    tok['tokens'][-2:] = tok['tokens'][:-3:-1]   # the last two change places
    path.write_text(json.dumps(tok))
    assert f'delete {path} and give the same command again' in refused(config(copied, 'sft_plus'))
    path.unlink()
    assert Lab(config(copied, 'sft_plus'), False).base.tok.hash==embedded[1]['rl']['tokenizer_sha256']

def test_an_arm_is_not_matched_on_the_seconds_of_a_run_that_had_company(copied):
    "One at a time is what exp2_run asks for; an arm that is started by itself must ask for it, too."
    (copied/'plan.json').write_text(json.dumps(dict(beside=True)))
    c = config(copied, 'sft_plus', match_on='seconds')
    assert 'not alone on their machine' in refused(c) and not (arm_folder(c)/'trained.json').exists()
    run_arm(config(copied, 'sft_plus'), progress=False)   # FLOPs do not depend on company

def test_after_rl_was_run_again_a_matched_arm_can_be_run_again(copied):
    "Another run of RL took other seconds, so its ledger has another hash; what matched the old one is not continued."
    c, rl = config(copied, 'sft_plus'), config(copied, 'rl')
    before = run_arm(c, progress=False)
    shutil.rmtree(arm_folder(rl))
    run_arm(rl, progress=False)
    folder = arm_folder(c)
    assert f'delete {folder} and give the same command again' in refused(c)
    shutil.rmtree(folder)
    assert run_arm(c, progress=False)['weights_sha256']==before['weights_sha256']

def test_weights_swapped_before_the_evaluation_are_refused_and_come_back(embedded, copied):
    "Training has ended, the evaluation has not: then the weights are read from their folder."
    c = config(copied, 'rl')
    folder = arm_folder(c)
    (folder/'arm.json').unlink()
    path = folder/'progress.json'
    path.write_text(json.dumps(read_json(path) | dict(complete=False)))
    shutil.rmtree(folder/'weights')
    shutil.copytree(copied/'base'/'weights', folder/'weights')
    assert f'the weights in {folder/"weights"} are not those' in refused(c)
    shutil.rmtree(folder/'weights')
    again = run_arm(c, progress=False)
    assert again['weights_sha256']==embedded[1]['rl']['weights_sha256'] and again['scores']==embedded[1]['rl']['scores']

def test_an_arms_record_covers_its_files(embedded, copied):
    "Every file that a number is made from, whatever was done to it."
    for arm,r in embedded[1].items():
        folder = arm_folder(config(copied, arm))
        assert {'config.json', 'ledger.jsonl', 'items.jsonl', 'completions.jsonl'} <= set(r['files'])
        assert altered_file(folder, r['files'])==''
        for name in r['files']:
            path = folder/name
            kept = path.read_bytes()
            for damaged in (kept.replace(b'false', b'true ', 1), kept[:len(kept)//2], kept+kept, b''):
                path.write_bytes(damaged)
                assert (altered_file(folder, r['files'])!='')==(damaged!=kept), (name, len(damaged))
            path.write_bytes(kept)

def test_the_analysis_reads_no_altered_file(embedded, copied):
    "With every answer of an arm set to right, the analysis names the file; what it advises brings the arm back."
    folder = arm_folder(config(copied, 'rl'))
    assert len(discover(copied))==2
    items = folder/'items.jsonl'
    items.write_text(items.read_text().replace('"correct": false', '"correct": true'))
    with pytest.raises(UserError, match=f'items.jsonl was altered.*or delete {folder} and run this arm again') as e: discover(copied)
    assert '\n' not in str(e.value)
    shutil.rmtree(folder)
    run_arm(config(copied, 'rl'), progress=False)
    assert len(discover(copied))==2 and read_json(folder/'arm.json')['scores']==embedded[1]['rl']['scores']

def test_the_analysis_takes_no_file_without_a_record(copied):
    path = arm_folder(config(copied, 'rl'))/'arm.json'
    record = read_json(path)
    for files in ({}, {k: v for k,v in record['files'].items() if k!='items.jsonl'}):
        path.write_text(json.dumps(record | dict(files=files)))
        with pytest.raises(UserError, match='arm.json records no hash of .*items.jsonl'): discover(copied)
    path.write_text(json.dumps({k: v for k,v in record.items() if k!='files'}))
    with pytest.raises(UserError, match='files is missing'): discover(copied)

def test_a_seed_that_was_copied_is_no_second_seed(copied):
    folder = arm_folder(config(copied, 'rl'))
    record = read_json(folder/'arm.json') | dict(weights_sha256='1'*64)
    (folder/'arm.json').write_text(json.dumps(record))
    twin = shutil.copytree(folder, folder.parent/'seed1')
    (twin/'config.json').write_text(json.dumps(read_json(twin/'config.json') | dict(seed=1)))
    (twin/'arm.json').write_text(json.dumps(record | dict(seed=1, files=files_record(twin, record['files']))))
    with pytest.raises(UserError, match='not two seeds'): discover(copied)

def test_a_matched_arm_stands_on_no_altered_ledger(copied):
    "RL is finished, so its command alone would do nothing: the advice says what to delete."
    rl, plus = config(copied, 'rl'), config(copied, 'sft_plus')
    folder = arm_folder(rl)
    ledger = folder/'ledger.jsonl'
    ledger.write_bytes(b''.join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    assert f'delete {folder} and run' in refused(plus)
    ledger.unlink()
    assert f'delete {folder} and run' in refused(plus)
    shutil.rmtree(folder)
    run_arm(rl, progress=False)
    assert run_arm(plus, progress=False)['arm']=='sft_plus'

@pytest.mark.parametrize('name', ['rollouts.jsonl', 'metrics.jsonl'])
def test_a_matched_arm_stands_on_no_altered_rollouts(copied, name):
    "rft trains on RL's rollouts, rl_random draws with its rewards: neither takes what RL did not write."
    folder = arm_folder(config(copied, 'rl'))
    path = folder/name
    path.write_bytes(path.read_bytes().replace(b'false', b'true ').replace(b'"reward": 0.0', b'"reward": 1.0'))
    assert f'{name} was altered' in refused(config(copied, 'rft')) and f'delete {folder} and run' in refused(config(copied, 'rl_random'))

def test_a_target_that_cannot_be_evaluated_is_no_finished_arm(copied, monkeypatch):
    "Its training is kept; when what was wrong is mended, the same command finishes it."
    c, real = config(copied, 'sft_plus'), arms_module.evaluate
    monkeypatch.setattr(arms_module, 'evaluate', lambda e, tasks, *a: ({}, dict.fromkeys(tasks, 'the disk of the data is away.')))
    assert 'stories is the target and could not be evaluated: the disk of the data is away.' in refused(c)
    assert not (arm_folder(c)/'arm.json').exists()
    monkeypatch.setattr(arms_module, 'evaluate', real)
    assert run_arm(c, progress=False)['not_run']==[]

def test_two_seeds_with_the_same_weights_are_refused(copied):
    run = ArmRun(config(copied, 'rl', seed=1), progress=False)
    refuse_twin(run, dict(weights_sha256='0'*64))
    refuse_twin(run, dict(weights_sha256=run.lab.sft.sha256))    # nothing learned: seeds may agree in that
    other = arm_folder(config(copied, 'rl'))/'arm.json'
    other.write_text(json.dumps(read_json(other) | dict(weights_sha256='1'*64)))
    with pytest.raises(UserError, match='delete the one that was copied'): refuse_twin(run, dict(weights_sha256='1'*64))

# ablations and tuning, on a copy in which some of the rollouts were right: so small a model solves nothing

def seal(record):
    "Let a record agree with the files that it names."
    facts = {k:v for k,v in read_json(record).items() if k!='sha256'}
    facts |= dict(files=files_record(record.parent, facts['files']))
    record.write_text(json.dumps(facts | dict(sha256=sha256_of(facts)) if record.name=='trained.json' else facts))

@pytest.fixture
def solved(embedded, tmp_path):
    "A copy of the run folder whose RL arm was right at every third answer."
    top = shutil.copytree(embedded[0], tmp_path/'run')
    folder = arm_folder(config(top, 'rl'))
    changes = dict(rollouts=lambda i,r: r | dict(correct=i%3==0),
                   metrics=lambda i,r: r | (dict(reward=.33) if 'reward' in r else {}))
    for name,change in changes.items():
        path = folder/f'{name}.jsonl'
        path.write_text(''.join(json.dumps(change(i, r))+'\n' for i,r in enumerate(read_jsonl(path))))
    for name in ('arm.json', 'trained.json'): seal(folder/name)
    return top

def ledger(top, arm): return read_jsonl(arm_folder(config(top, arm))/'ledger.jsonl')

def test_ablations_spend_the_same_budget(solved):
    rl = read_json(arm_folder(config(solved, 'rl'))/'arm.json')
    got = {a: run_arm(config(solved, a), progress=False) for a in ('rft', 'rl_random', 'sft_mix')}
    for a in ('rft', 'sft_mix'): assert abs(got[a]['residual']) < .001, a
    assert abs(got['rl_random']['residual']) < got['rl_random']['resolution']   # one problem
    paid = lambda arm, stage: sum(r['flops_model'] for r in ledger(solved, arm) if r['stage']==stage)
    assert paid('rft', 'rollout')==paid('rl', 'rollout') > 0==paid('sft_mix', 'rollout')
    assert 0 < paid('rft', 'sft') < paid('sft_mix', 'sft') and got['rl_random']['zero_advantage'] < 1
    assert {r['sft_sha256'] for r in got.values()}=={rl['sft_sha256']}

def test_an_interrupted_rft_pays_for_its_generation_once(solved, tmp_path, monkeypatch):
    other = shutil.copytree(solved, tmp_path/'other')
    whole, step = run_arm(config(solved, 'rft'), progress=False), Supervised.step
    def last(self):
        row = step(self)
        if self.n==1: os.kill(os.getpid(), signal.SIGTERM)
        return row
    monkeypatch.setattr(Supervised, 'step', last)
    with pytest.raises(Interrupted): run_arm(config(other, 'rft'), progress=False)
    monkeypatch.undo()
    assert not (arm_folder(config(other, 'rft'))/'arm.json').exists()
    again = run_arm(config(other, 'rft'), progress=False)
    assert again['spent']['model']==whole['spent']['model'] and again['scores']==whole['scores']
    assert len({artifact_hash(arm_folder(config(t, 'rft'))/'weights') for t in (solved, other)})==1

@pytest.fixture
def lucky(monkeypatch):
    "Every third answer or so counts as right, by its tokens."
    real = GRPO.rollout
    def rollout(self, numbers, *args, **kw):
        groups = real(self, numbers, *args, **kw)
        for g in groups:
            g.scores = [s | dict(correct=right, score=float(right)) for s,a in zip(g.scores, g.samples) for right in [sum(a.tokens)%3==0]]
            g.rewards = [float(s['correct']) for s in g.scores]
            g.__post_init__()
        return groups
    monkeypatch.setattr(GRPO, 'rollout', rollout)

def test_the_arms_between_sft_and_rl_spend_the_same_budget(solved, lucky):
    got = {a: run_arm(config(solved, a), progress=False) for a in ('positives', 'rft_online', 'sft25_rl75', 'rl50_sft50', 'sft_plus4')}
    for a in ('rft_online', 'rl50_sft50', 'sft_plus4'): assert abs(got[a]['residual']) < .001, a
    for a in ('positives', 'sft25_rl75'): assert abs(got[a]['residual']) < 1.5*got[a]['resolution'], a   # a problem more or less
    paid = lambda arm, *stages: sum(r['flops_model'] for r in ledger(solved, arm) if r['stage'] in stages)
    rl = read_json(arm_folder(config(solved, 'rl'))/'arm.json')
    def before(arm, stage):   # share of the budget that was spent before the second part
        rows = takewhile(lambda r: r['stage']!=stage, ledger(solved, arm))
        return sum(r['flops_model'] for r in rows if r['stage'] in BUDGET_STAGES)/rl['spent']['model']
    assert abs(before('sft25_rl75', 'rollout')-.25) < .001
    assert abs(before('rl50_sft50', 'sft')-.5) < 1.5*got['sft25_rl75']['resolution']
    executed = lambda arm: sum(r['flops_executed'] for r in ledger(solved, arm) if r['stage']=='update')
    assert 0 < executed('positives') < executed('sft25_rl75') + executed('rl50_sft50')   # wrong answers are not computed
    rows = read_jsonl(arm_folder(config(solved, 'rft_online'))/'metrics.jsonl')
    sampled = [i for i,r in enumerate(rows) if r['stage']=='rollout']
    asked = rl['steps']*config(solved, 'rl').rl.problems*config(solved, 'rl').rl.samples
    answered = len(read_jsonl(arm_folder(config(solved, 'rft_online'))/'rollouts.jsonl'))   # the last step may have no room
    assert asked/2 < answered <= asked and paid('rft_online', 'rollout') > 0 and paid('rft_online', 'sft') > 0
    assert any(b-a > 1 for a,b in zip(sampled, sampled[1:]))   # training in between: the answers are fresh
    for a in got: assert got[a]['kl_to_sft'] >= 0 and got[a]['entropy'] > 0, a

def test_one_round_samples_once_from_the_sft_checkpoint(solved, tmp_path, lucky):
    "With one round, all answers are sampled before the first update."
    other = shutil.copytree(solved, tmp_path/'other')
    got = run_arm(config(other, 'rft_online', changes={'rft_online.rounds': 1}), progress=False)
    stages = [r['stage'] for r in ledger(other, 'rft_online') if r['stage'] in ('rollout', 'sft')]
    first = stages.index('sft')
    assert abs(got['residual']) < .001 and 0 < first < len(stages)
    assert set(stages[:first])=={'rollout'} and set(stages[first:])=={'sft'}

@pytest.mark.parametrize('arm', ['rft_online', 'sft50_rl50', 'rl50_sft50'])
def test_an_arm_in_parts_goes_on_where_it_was_stopped(solved, tmp_path, monkeypatch, lucky, arm):
    other = shutil.copytree(solved, tmp_path/'other')
    whole, step = run_arm(config(solved, arm), progress=False), Run._step
    for last in sorted({1, whole['steps']-1}):   # in the first part, and in the last
        def stopped(self, last=last):
            row = step(self)
            if self.stage.n==last: os.kill(os.getpid(), signal.SIGTERM)
            return row
        monkeypatch.setattr(Run, '_step', stopped)
        with pytest.raises(Interrupted): run_arm(config(other, arm), progress=False)
    monkeypatch.setattr(Run, '_step', step)
    again = run_arm(config(other, arm), progress=False)
    assert again['spent']['model']==whole['spent']['model'] and again['scores']==whole['scores']
    assert again['weights_sha256']==whole['weights_sha256']

def test_rft_online_needs_an_answer_that_is_right(embedded, tmp_path):
    assert 'nothing to train on' in refused(config(shutil.copytree(embedded[0], tmp_path/'run'), 'rft_online'))

def test_a_matched_arm_is_bound_to_the_rl_run_that_set_its_budget(solved):
    run_arm(config(solved, 'sft_mix'), progress=False)
    path = arm_folder(config(solved, 'rl'))/'trained.json'
    arm = read_json(path)
    path.write_text(json.dumps(arm | dict(ledger=arm['ledger'] | dict(sha256='0'*64))))
    with pytest.raises(UserError): run_arm(config(solved, 'sft_mix'), progress=False)

def test_learning_rates_get_the_same_trials(embedded, tmp_path, monkeypatch):
    "Every arm, on seeds that are not the study's; where nothing is solved, the smallest rates are as good, so the grid grows there, once."
    monkeypatch.setattr(arms_module, 'evaluate', None)   # no test problem is answered
    top, seeds, said = shutil.copytree(embedded[0], tmp_path/'run'), (7, 8), []
    c = config(top, 'rl')
    tune(c, ('rl',), (1.,), seeds, grow=0, progress=False)
    for path in (top/'tuning').rglob('rollouts.jsonl'):   # rft needs something that was right
        path.write_text(''.join(json.dumps(r | dict(correct=i%3==0))+'\n' for i,r in enumerate(read_jsonl(path))))
        seal(path.parent/'trained.json')
    rows = tune(c, ('sft_mix', 'rl', 'rft', 'sft_plus'), (1., 2.), seeds, grow=1, progress=False, say=said.append)
    arms, factors = ('rl', 'sft_plus', 'rft', 'sft_mix'), sorted({r['factor'] for r in rows})
    assert [(r['arm'], r['factor'], r['seed']) for r in rows]==[(a, f, s) for a in arms for f in factors for s in seeds]
    assert len(said)==1 and 'edge of the grid' in said[0] and len(factors) > 2
    assert rows==[json.loads(line) for line in (top/'tuning.jsonl').read_text().splitlines()]
    paid = {(r['arm'], r['factor'], r['seed']): r['flops_model'] for r in rows}
    assert all(x==pytest.approx(paid['rl', 1., k[2]], rel=.001) for k,x in paid.items() if k[0]!='rl')
    rates = {(r['arm'], r['factor']): r['rates']['matrix'] for r in rows}
    for a in arms: assert rates[a, 2.]==2*rates[a, 1.]
    assert all(len(read_json(p)['scores'])==c.dev for p in (top/'tuning').rglob('trial.json')) and {'near'} <= set(rows[0])
    assert len({(top/'sft'/f'seed{s}'/'record.json').read_text() for s in seeds})==2   # each seed has its own SFT checkpoint
    assert len(tune(c, arms, (1., 2.), seeds, grow=0, progress=False))==len(rows)
    with pytest.raises(UserError, match='seed 0 is one of the study'): tune(c, ('rl',), (1.,), (0,), progress=False)
    other = config(top, 'rl', changes={'rl.rates.matrix':.123})
    with pytest.raises(UserError, match='other learning rates'): tune(other, ('rl',), (2.,), seeds, progress=False)

def test_a_trial_that_goes_astray_is_a_trial(embedded, tmp_path, monkeypatch):
    "Rates at which the loss is no number anymore count as 0 % on dev, and the others are still tried; any other error stops the tuning."
    top = shutil.copytree(embedded[0], tmp_path/'run')
    c, step = config(top, 'rl'), Supervised.step
    tune(c, ('rl',), (1.,), (7,), grow=0, progress=False)
    def astray(self):
        check_finite(float('nan') if '/x2/' in str(self.folder) else 1., 'the loss', self.n, [], self.folder)
        return step(self)
    monkeypatch.setattr(Supervised, 'step', astray)
    rows = tune(c, ('sft_plus',), (1., 2.), (7,), grow=0, progress=False)
    got = [(r['factor'], r['finite'], r['best']) for r in rows if r['arm']=='sft_plus']
    assert got==[(1., True, 'yes'), (2., False, '')] and rows[-1]['dev_accuracy']==0
    def spoil(self):   # by the last update: the next step, which would notice, does not come
        row = step(self)
        if '/x8/' in str(self.folder) and self.clock.fraction > .99: next(self.model.parameters()).data.fill_(float('nan'))
        return row
    monkeypatch.setattr(Supervised, 'step', spoil)
    rows = tune(c, ('sft_plus',), (8.,), (7,), grow=0, progress=False)
    assert [r['finite'] for r in rows if r['factor']==8.]==[False]
    def broken(self): raise UserError('the disk is full.')
    monkeypatch.setattr(Supervised, 'step', broken)
    with pytest.raises(UserError, match='the disk is full'): tune(c, ('sft_plus',), (4.,), (7,), grow=0, progress=False)

# where the context ends

def test_rl_counts_the_answers_that_the_context_cuts(embedded, tmp_path):
    "They are rewarded like any other answer; prompts that leave no room are refused before anything is trained."
    lab = Lab(config(embedded[0], 'rl'), False)
    task, tok = lab.problems[0], lab.base.tok
    prompts = [len(tok.render_prompt(task.conversation(task[i]))) for i in range(len(task))]
    c = config(tmp_path/'run', 'rl', changes={'model.context':max(prompts)+4, 'eval.max_new':8})
    arm, folder = run_arm(c, progress=False), arm_folder(c)
    rows = read_jsonl(folder/'rollouts.jsonl')
    room = {i: max(prompts)+4-n for i,n in enumerate(prompts)}
    assert all(len(r['tokens']) <= min(c.rl.max_new, room[r['problem']]) for r in rows)
    assert all(r['full']==(not r['stopped'] and len(r['tokens'])==room[r['problem']] < c.rl.max_new) for r in rows)
    assert all(r['reward']==float(r['correct']) for r in rows)
    full = sum(r['full'] for r in rows)
    assert arm['context_full']==full==sum(r.get('context_full', 0) for r in read_jsonl(folder/'metrics.jsonl') if r['step'] >= 0) > 0
    c = config(tmp_path/'short', 'rl', changes={'model.context':max(prompts), 'eval.max_new':8})
    assert 'have a prompt that fills the context' in refused(c)
    assert not (arm_folder(c)/'metrics.jsonl').exists()

# all is trained before a test problem is answered

TRIO = ('sft', 'rl', 'sft_plus')

def run_without_notebooks(notebook, out, run_dir, given):
    "`run_notebook`, in this process."
    if notebook=='run_arm.ipynb': run_arm(configure(**given), progress=False)

def test_all_is_trained_before_a_test_problem_is_answered(embedded, tmp_path, monkeypatch, capsys):
    "The arms are those of a run that evaluates as it goes; until the second command no file and no line holds a score on test."
    c = config(tmp_path, 'sft')
    monkeypatch.setattr(run_module, 'run_notebook', run_without_notebooks)
    monkeypatch.setattr(run_module, 'verdict', lambda run_dir: dict(said='the analysis'))
    with monkeypatch.context() as m:
        m.setattr(lab_module, 'benchmark', None)   # a benchmark that is asked for fails
        m.setattr(arms_module, 'evaluate', None)
        for _ in range(2): said = exp2_run(replace(c, train_only=True))['said']
    folders = [arm_folder(replace(c, arm=a)) for a in TRIO]
    assert said.startswith('Trained: 3 arms. No test problem was answered.') and 'accuracy' not in capsys.readouterr().out
    assert [piece_status(f)['state'] for f in folders]==['trained']*3 and not list(tmp_path.rglob('arm.json'))
    assert not any((f/name).exists() for f in folders for name in ('items.jsonl', 'completions.jsonl', 'progress.json'))
    before = {f: artifact_hash(f/'weights') for f in folders[1:]}
    assert exp2_run(c)['said']=='the analysis' and [piece_status(f)['state'] for f in folders]==['done']*3
    top, arms, _ = embedded
    for f,a in zip(folders, TRIO):
        r = read_json(f/'arm.json')
        if a!='sft': assert artifact_hash(f/'weights')==before[f]
        if a in arms: assert (r['weights_sha256'], r['scores'])==(arms[a]['weights_sha256'], arms[a]['scores'])
    assert abs(r['residual']) < .001 and read_json(folders[1]/'arm.json')['spent']==r['target']
    assert 'though 3 of them had been evaluated' in exp2_run(replace(c, train_only=True))['said']

def test_the_notebook_of_a_trained_arm_shows_no_score(embedded, tmp_path):
    "It shows the curves and what was spent."
    top = shutil.copytree(embedded[0], tmp_path/'run', ignore=shutil.ignore_patterns('sft_plus'))
    given = dict(preset='smoke', run_dir=str(top), n_train=64, n_test=8, dev=8, changes=' '.join(f'{k}={v}' for k,v in SMALL.items()))
    said = papermill(tmp_path/'out.ipynb', arm='sft_plus', train_only=True, **given)
    assert 'Trained, not evaluated' in said, said
    assert not (top/'sft_plus/model-1.0/seed0/arm.json').exists()

# the experiment without `exp2nb.fast`

PLAIN = """
import sys, torch
import exp2nb.fast
exp2nb.fast.register = lambda: None
from exp2nb.arms import run_arm
from exp2nb.config import make_config, override
from exp2nb.protocol import FASTER
small = {'pretrain.tokens_per_param':.02, 'sft.passes':.2, 'rl.steps':1, 'rl.preflight':4}
small |= {'eval.kl_prompts':2, 'eval.curve':1, 'eval.n_samples':0}
arms = {}
for a in ('sft', 'rl', 'sft_plus'):
    c = override(make_config('smoke', arm=a, run_dir=sys.argv[1], n_train=32, n_test=4, dev=4), small)
    arms[a] = run_arm(c, progress=False)
assert not FASTER, list(FASTER)
assert not any(m.startswith('exp2nb.fast.') for m in sys.modules), 'something in the book imports exp2nb.fast'
assert len({r['sft_sha256'] for r in arms.values()})==1 and abs(arms['sft_plus']['residual']) < .001 and not arms['rl']['not_run']
print('all three arms')
"""

def test_everything_runs_on_pytorch_alone(tmp_path):
    "With nothing registered, the three arms run on PyTorch's operators, and no module of exp2nb.fast is even loaded."
    out = subprocess.run([sys.executable, '-c', PLAIN, str(tmp_path/'run')], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode==0 and 'all three arms' in out.stdout, out.stderr[-3000:]

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
    def run(arm): return run_arm(config(tmp_path, arm, task='gsm8k', data_dir=str(only_gsm8k), changes=changes), progress=False)
    arms = {a: run(a) for a in ('sft', 'rl', 'sft_plus')}
    check_comparison(arms)
    for r in arms.values():
        assert list(r['scores']['end'])==['gsm8k', 'spellingbee'] and {x['task'] for x in r['not_run']}=={'mmlu', 'humaneval'}
        assert all('exp2_fetch' in x['why'] for x in r['not_run'])
        assert r['scores']['end']['gsm8k']['n']==8 and 't1' in r['scores']['end']['gsm8k']

@pytest.mark.skipif(usable_cores() < 2, reason='one processor adds in one order')
def test_a_gradient_is_the_same_every_time_with_two_threads():
    "To the bit: a prompt's last token is asked for by all its samples, and their gradients must be added in a fixed order."
    w, n = Workload(depth=1, problems=2, samples=16), torch.get_num_threads()
    model = w.model()
    def sample(p, s): return Sample(p, s, [(7*p+5*s+3*t)%w.vocab for t in range(w.new)], [True]*w.new)
    groups = make_groups(w, w.prompts(), [sample(p, s) for p in range(2) for s in range(16)])
    def gradients():
        model.zero_grad()
        our_gradient(model, groups, w)
        return {k: p.grad.clone() for k,p in model.named_parameters()}
    try:
        torch.set_num_threads(2)
        first = gradients()
        for _ in range(6): assert all(torch.equal(first[k], g) for k,g in gradients().items())
    finally: torch.set_num_threads(n)

# the folder

def test_a_run_folder_that_cannot_be_made_is_said_at_once(tmp_path):
    "Nothing to wait for: no other process writes there. (It was waited for, up to a day.)"
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(UserError, match='file'), lab_module.alone(tmp_path/'file'/'tokenizer', wait=24*3600): pass

def test_a_notebook_that_was_cut_short_says_nothing(tmp_path):
    "A full disk cuts the notebook of a run that failed: the log is named, the other runs go on."
    (tmp_path/'rl.ipynb').write_text('{"cells": [')
    code, sentence = run_module.failure(tmp_path/'rl.ipynb', tmp_path/'rl.log')
    assert code==1 and 'rl.log' in sentence
