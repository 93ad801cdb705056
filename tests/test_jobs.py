"""Seeds side by side, with real runs: the weights of one after the other, signals that reach all of them, threads that stay as they began.

The scheduler itself is tested in its notebook, with stand-ins for the runs."""
import signal
import pytest
import test_survival
from exp2nb.store import load_checkpoint, lock_holder, read_json, read_jsonl
from test_survival import IN_A_STEP, OPTIONS, command, needs_commands, output, wait_for_end, wait_until

pytestmark = needs_commands
SFT = [f'sft/seed{k}' for k in (0, 1)]

def side_by_side(run_dir, jobs, *more, **kw):
    return command(run_dir, 'exp2_run', '--seeds', 2, '--jobs', jobs, '--run-dir', run_dir, *OPTIONS, *more, **kw)

def weights(run_dir, names): return [read_json(run_dir/n/f)[k] for n,f,k in names]

def test_one_job_and_two_at_one_thread_give_the_same_weights(tmp_path):
    one, two = tmp_path/'one', tmp_path/'two'
    for run_dir,jobs in (one, 1), (two, 2):
        p = side_by_side(run_dir, jobs, '--arms', 'rl,sft_plus', '--match-on', 'model')
        assert p.wait()==0, output(run_dir)
    made = [(n, 'record.json', 'sha256') for n in ('base', *SFT)]
    rl, plus = ([f'{a}/model-1.0/seed{k}' for k in (0, 1)] for a in ('rl', 'sft_plus'))
    made += [(name, 'arm.json', 'weights_sha256') for name in rl+plus]
    assert weights(one, made)==weights(two, made) and len(set(weights(one, made))) >= 5   # so small a model earns no reward, RL may stay
    assert read_json(two/'plan.json')['jobs']==2 and '2 at a time' in output(two)
    def files(run_dir):
        return [read_json(run_dir/n/'arm.json')['files'][f]['sha256'] for n in rl for f in ('items.jsonl', 'rollouts.jsonl')]
    assert files(one)==files(two)

@pytest.mark.parametrize('number', (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)))
def test_a_signal_stops_all_runs_and_all_save(tmp_path, number):
    "Both seeds are in the middle of a step of their SFT, which they finish and save."
    run_dir = tmp_path/'run'
    p = side_by_side(run_dir, 2, '--arms', 'rl', hold=IN_A_STEP)
    steps = lambda name: len(read_jsonl(run_dir/name/'metrics.jsonl')) if (run_dir/name/'metrics.jsonl').exists() else 0
    try:
        wait_until(lambda: [steps(n) for n in SFT]==[3, 3], p, run_dir)
        writers = [lock_holder(run_dir/n)['pid'] for n in SFT]
        p.send_signal(number)
        p.wait()
    finally: p.kill()
    text = output(run_dir)
    assert p.returncode==128+number and 'The same command goes on from the last checkpoint' in text and 'Traceback' not in text, text
    assert len(set(writers))==2
    for name,writer in zip(SFT, writers):
        assert load_checkpoint(run_dir/name)[0]==4==steps(name) and lock_holder(run_dir/name) is None
        wait_for_end(writer)

def test_a_seed_that_fails_leaves_the_other_one_alone(tmp_path):
    run_dir = tmp_path/'run'
    (run_dir/'sft'/'seed0').mkdir(parents=True)
    (run_dir/'sft'/'seed0'/'record.json').write_text('{"made_of": {"passes": 7}}')
    p = side_by_side(run_dir, 2, '--arms', 'sft')
    assert p.wait()==2, output(run_dir)
    text = output(run_dir)
    assert 'sft/model-1.0/seed0 failed: ' in text and 'the others go on' in text, text
    last = text.strip().splitlines()[-1]
    assert last.startswith('error: ') and 'was made from other settings' in last and 'sft/seed0' in last
    assert (run_dir/'sft/model-1.0/seed1/arm.json').exists() and not (run_dir/'sft/model-1.0/seed0/arm.json').exists()

def test_what_was_begun_with_two_threads_goes_on_with_two(tmp_path, monkeypatch):
    "Stopped in the middle of SFT and continued by a process that has one thread: the weights of a run that nobody stopped."
    def sft(run_dir, threads, **kw):
        monkeypatch.setitem(test_survival.ENV, 'OMP_NUM_THREADS', str(threads))
        return command(run_dir, 'exp2_arm', '--arm', 'sft', '--run-dir', run_dir, *OPTIONS, **kw)
    whole, stopped = tmp_path/'whole', tmp_path/'stopped'
    p = sft(whole, 2)
    assert p.wait()==0, output(whole)
    p = sft(stopped, 2, hold=IN_A_STEP)
    try:
        wait_until((stopped/'ready').exists, p, stopped)
        p.terminate()
        assert p.wait()==143, output(stopped)
    finally: p.kill()
    p = sft(stopped, 1)
    assert p.wait()==0 and 'sft/seed0 was begun with 2 CPU threads and goes on with as many' in output(stopped), output(stopped)
    records = [read_json(d/'sft/seed0/record.json') for d in (whole, stopped)]
    assert records[0]['sha256']==records[1]['sha256'] and [r['versions']['threads'] for r in records]==[2, 2]
    assert read_json(stopped/'sft/model-1.0/seed0/arm.json')['versions']['threads']==1   # begun by that process
