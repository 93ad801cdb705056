"""Damage × file × moment: whatever is wrong with a file of a run folder, a command says so in one sentence, or its result is the same.

The short version tries two kinds of damage on each file, `pytest tests/test_damage.py --slow` all of them at all moments.
"""
import json, os, random, shutil, traceback
from dataclasses import replace

import pytest

from _forkserver import run_in_child
from exp2nb.arms import ARMS, rl_arm, run_arm
from exp2nb.config import UserError, make_config, override, seed_of
from exp2nb.store import artifact_hash, read_json, read_jsonl

CHANGES = ('model.vocab=300 model.context=160 pretrain.tokens_per_param=0.02 pretrain.batch_tokens=1024 sft.batch_tokens=1024 '
           'sft_plus.batch_tokens=640 rl.steps=2 rl.problems=3 rl.samples=3 rl.max_new=8 rl.preflight=2 eval.max_new=8 eval.kl_prompts=2 '
           'eval.n_samples=0')

def config(run_dir, arm):
    return override(make_config('smoke', arm=arm, run_dir=str(run_dir), n_train=24, n_test=2, dev=2), CHANGES)

def coin(step, i, k, score):
    "Random rewards: so tiny a model solves nothing, and the right ones would not move it."
    return float(seed_of('coin', step, i, k) % 3==0)

FOLDERS = dict(base='base', sft='sft/seed0', rl='rl/model-1.0/seed0', sft_plus='sft_plus/model-1.0/seed0')

@pytest.fixture(scope='module', autouse=True)
def rewards():
    "The RL arm with random rewards."
    arm = ARMS['rl']
    ARMS['rl'] = replace(arm, make=lambda *a: rl_arm(*a, reward=coin))
    yield
    ARMS['rl'] = arm

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A finished run of RL and SFT+, whose checkpoints are kept."
    run_dir = tmp_path_factory.mktemp('whole')/'run'
    for arm in ('rl', 'sft_plus'): run_arm(config(run_dir, arm), progress=False)
    return run_dir

# a file with times has another hash
TIMES = {'seconds', 'device_seconds', 'sha256', 'where', 'started', 'versions', 'git'}

def timeless(x):
    if isinstance(x, dict): return {k: timeless(v) for k,v in x.items() if k not in TIMES and not k.endswith('sha256')}
    return [timeless(v) for v in x] if isinstance(x, list) else x

def facts(run_dir):
    "What a damaged file must not change silently."
    out = {}
    for name in ('rl', 'sft_plus'):
        folder = run_dir/FOLDERS[name]
        out[name] = timeless(read_json(folder/'arm.json')), artifact_hash(folder/'weights'), read_jsonl(folder/'items.jsonl')
    return out

@pytest.fixture(scope='module')
def expected(whole): return facts(whole)


# ---- damage ----

def drop(x, rng):
    "A file of an older version: a field is missing."
    if isinstance(x, dict) and x: return {k: v for k,v in x.items() if k!=rng.choice(list(x))}
    return []

def retype(x, rng):
    "A field has a value of another type."
    if not isinstance(x, dict) or not x: return 'text'
    name = rng.choice(list(x))
    return x | {name: [] if isinstance(x[name], dict) else {}}

def deeper(change):
    "The same, one level further down."
    def f(x, rng):
        inner = [k for k,v in x.items() if isinstance(v, dict) and v] if isinstance(x, dict) else []
        if not inner: return change(x, rng)
        name = rng.choice(inner)
        return x | {name: change(x[name], rng)}
    return f

SHAPES = dict(list=lambda x, rng: [], object=lambda x, rng: {}, null=lambda x, rng: None, drop=drop, retype=retype,
              drop_inner=deeper(drop), retype_inner=deeper(retype))
BYTES = dict(empty=lambda b, rng: b'', cut=lambda b, rng: b[:len(b)//2], text=lambda b, rng: b'<html>no</html>\n')

def whole_file(f, rng, how):
    "Damage of a file's bytes."
    f.write_bytes(BYTES[how](f.read_bytes(), rng))

def value(f, rng, how):
    "Damage of what a JSON file holds, or one row of a JSONL file."
    if f.suffix=='.json':
        f.write_text(json.dumps(SHAPES[how](json.loads(f.read_bytes()), rng)), encoding='utf-8')
        return
    rows = f.read_bytes().splitlines(keepends=True)
    if not rows: return
    i = rng.randrange(len(rows))
    rows[i] = (json.dumps(SHAPES[how](json.loads(rows[i]), rng)) + '\n').encode()
    f.write_bytes(b''.join(rows))

def gone(f, rng, how): f.unlink()

def folder_instead(f, rng, how):
    f.unlink()
    f.mkdir()

WAYS = {**{how: value for how in SHAPES}, **{how: whole_file for how in BYTES}, 'gone': gone, 'folder': folder_instead}


# ---- moments ----

def finished(run_dir): pass
def before_sft_plus(run_dir): shutil.rmtree(run_dir/FOLDERS['sft_plus'])
def before_evaluation(run_dir):
    "RL has trained; its evaluation is still to come."
    for name in ('arm.json', 'progress.json', 'samples.json', 'items.jsonl'): (run_dir/FOLDERS['rl']/name).unlink()
    before_sft_plus(run_dir)
def before_the_weights(run_dir):
    "RL was killed after its last checkpoint."
    before_evaluation(run_dir)
    shutil.rmtree(run_dir/FOLDERS['rl']/'weights')

MOMENTS = [finished, before_sft_plus, before_evaluation, before_the_weights]

def files(run_dir):
    "JSON and JSONL files of a run folder."
    return sorted(str(p.relative_to(run_dir)) for p in run_dir.rglob('*.json*') if p.is_file() and '.tmp-' not in str(p))


def outcome(run_dir, arms):
    "Run the arms: '' if all went well, else the sentence that said what is wrong. Any other error is a fault."
    for arm in arms:
        try: run_arm(config(run_dir, arm), progress=False)
        except UserError as e: return str(e)
    return ''

def content(f): return f.read_bytes() if f.is_file() else None

def trial(whole, run_dir, expected, name, how, moment, seed):
    "One damaged file, then both arms. Returns the sentence; fails on another error, and on another result without a sentence."
    shutil.copytree(whole, run_dir)
    moment(run_dir)
    f = run_dir/name
    if not f.exists(): return ''
    WAYS[how](f, random.Random(seed), how)
    damaged = content(f)
    sentence = outcome(run_dir, ('rl', 'sft_plus'))
    if sentence:
        assert '\n' not in sentence and str(run_dir) in sentence and sentence.rstrip().endswith('.'), sentence
        return sentence
    if content(f)==damaged:   # neither used nor written again (the analysis checks a finished arm's files by their hashes)
        if f.is_dir(): f.rmdir()
        shutil.copy(whole/name, f)
    assert facts(run_dir)==expected, 'another result, and no sentence'
    return ''

def test_the_arms_as_they_are(whole, tmp_path, expected):
    "Without damage every moment ends in the same result: what the trials below rely on."
    for moment in MOMENTS:
        run_dir = tmp_path/moment.__name__
        shutil.copytree(whole, run_dir)
        moment(run_dir)
        assert outcome(run_dir, ('rl', 'sft_plus'))=='' and facts(run_dir)==expected, moment

def test_every_damaged_file_is_a_sentence_or_changes_nothing(whole, tmp_path, expected, slow):
    rng, said, faults = random.Random(0), 0, []
    names = files(whole)
    assert len(names) > 20
    trials = [(name, how, moment) for name in names for how in WAYS for moment in MOMENTS]
    if not slow: trials = [(name, how, rng.choice(MOMENTS[:2])) for name in names for how in rng.sample(list(WAYS), 2)]
    for i,(name,how,moment) in enumerate(trials):
        run_dir = tmp_path/f'{i}'
        try: said += bool(trial(whole, run_dir, expected, name, how, moment, i))
        except Exception as e: faults.append(f'{name} {how} {moment.__name__}: {type(e).__name__}: {str(e)[:300]}')
        shutil.rmtree(run_dir, ignore_errors=True)
    print(f'{len(trials)} trials, {said} sentences')
    assert not faults, f'{len(faults)} of {len(trials)}:\n' + '\n'.join(faults)
    assert said > len(trials)/5


# ---- a colleague ----

def as_colleague(whole, run_dir, arm, report):
    "Run an arm as another user of the group."
    report = open(report, 'w', encoding='utf-8')   # opened by the first user
    run_arm(config(whole, 'rl'), progress=False)   # imports what the other user may not be able to read
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65533)
    os.umask(0o002)
    try: print(run_arm(config(run_dir, arm), progress=False)['arm'], file=report)
    except UserError as e: print(f'UserError: {e}', file=report)
    except BaseException: traceback.print_exc(file=report)
    report.flush()
    os._exit(0)

@pytest.mark.skipif(os.geteuid()!=0, reason='becoming another user needs root')
def test_a_colleague_is_shown_a_finished_arm_and_told_where_he_may_not_write(whole, tmp_path):
    for p in (tmp_path, *tmp_path.parents):
        if len(p.parts) > 2: p.chmod(0o755)
    def colleague(arm):
        p = run_in_child(as_colleague, whole, run_dir, arm, str(tmp_path/'report'))
        p.join()
        return (tmp_path/'report').read_text(encoding='utf-8').strip()
    run_dir = tmp_path/'run'
    shutil.copytree(whole, run_dir)
    before_sft_plus(run_dir)
    text = colleague('rl')
    assert text=='rl', text
    text = colleague('sft_plus')
    assert text.startswith('UserError: ') and 'since permission was denied: ask the owner' in text, text
