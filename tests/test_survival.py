"""kill -9 at random points of every stage, half of them in the middle of a save: the run goes on and ends as if nothing had happened.

`pytest tests/test_survival.py --slow` does it 20 times over instead of twice.
"""
import faulthandler, os, random, shutil, signal, subprocess, sys, threading, time, traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import exp2nb.arms, exp2nb.grpo, exp2nb.optim, exp2nb.store, exp2nb.train
from _forkserver import run_in_child
from exp2nb.arms import ARMS, rl_arm, run_arm
from exp2nb.grpo import GRPO
from exp2nb.config import UserError, make_config, override, seed_of
from exp2nb.tools.status import status, stop_writers
from exp2nb.store import artifact_hash, load_checkpoint, lock_holder, pack, read_json, read_jsonl, weights_hash

ROOT = Path(__file__).parents[1]

CHANGES = ('model.vocab=300 model.context=160 pretrain.tokens_per_param=0.05 pretrain.batch_tokens=1024 sft.batch_tokens=1024 '
           'sft_plus.batch_tokens=640 rl.steps=6 rl.problems=3 rl.samples=3 rl.max_new=16 rl.preflight=2 eval.max_new=16 eval.kl_prompts=2')

def config(run_dir, arm):
    return override(make_config('smoke', arm=arm, run_dir=str(run_dir), n_train=48, n_test=6, dev=6), CHANGES)

FOLDERS = dict(base='base', sft='sft/seed0', rl='rl/model-1.0/seed0', sft_plus='sft_plus/model-1.0/seed0')


# ---- in the child ----

def coin(step, i, k, score):
    "Random rewards: so tiny a model solves nothing, and the right ones would not move it."
    return float(seed_of('coin', step, i, k) % 3==0)

class Often(exp2nb.store.SaveTimer):
    "Save after every second step."
    asked = 0
    def due(self):
        self.asked += 1
        return self.asked % 2==0

def kill_now(): os.kill(os.getpid(), signal.SIGKILL)

def aim(folder, where, number, call, delay):
    "Arrange this process's death in the stage that writes `folder`."
    if where=='saving':     # at system call `call` of save `number`
        real, saves, calls = exp2nb.train.save_checkpoint, [0], [0]
        def save(run, *args, **kw):
            saves[0] += Path(run)==folder
            return real(run, *args, **kw)
        def counted(f):
            def g(*args, **kw):
                if saves[0] > number:
                    if calls[0]==call: kill_now()
                    calls[0] += 1
                return f(*args, **kw)
            return g
        exp2nb.train.save_checkpoint = save
        for module,name in (os, 'fsync'), (os, 'replace'), (exp2nb.store.shutil, 'rmtree'):
            setattr(module, name, counted(getattr(module, name)))
    if where=='anywhere':   # `delay` seconds after step `number` has begun
        for stage in exp2nb.train.Supervised, GRPO:
            def step(self, real=stage.step):
                if self.folder==folder and self.n==number: threading.Timer(delay, kill_now).start()
                return real(self)
            stage.step = step
    if where=='evaluation': # `delay` seconds after evaluation `number` has begun
        real_eval, evals = exp2nb.arms.evaluate, [0]
        def evaluate(*args, **kw):
            if evals[0]==number: threading.Timer(delay, kill_now).start()
            evals[0] += 1
            return real_eval(*args, **kw)
        exp2nb.arms.evaluate = evaluate
    if where=='nan':        # step `number` meets a loss that is not a number
        stages = (exp2nb.train, 'supervised_loss', exp2nb.train.Supervised), (exp2nb.grpo, 'policy_loss', GRPO)
        for module,name,stage in stages:
            real_loss = getattr(module, name)
            def loss(*args, real_loss=real_loss):
                l,*more = real_loss(*args)
                return l*float('nan'), *more
            def step(self, real=stage.step, real_loss=real_loss, loss=loss, module=module, name=name):
                setattr(module, name, loss if self.folder==folder and self.n==number else real_loss)
                return real(self)
            stage.step = step
    if where=='held':       # step `number` waits for a signal, or until the test lets it go on
        for stage in exp2nb.train.Supervised, GRPO:
            def step(self, real=stage.step):
                if self.folder==folder and self.n==number:
                    (folder/'ready').touch()
                    handler = signal.getsignal(signal.SIGTERM)
                    asked = getattr(handler, '__self__', None)   # the `Interrupt` of the loop around this step
                    while not (folder/'go').exists() and not (asked and asked.requested): time.sleep(.01)
                return real(self)
            stage.step = step
    if where=='spoiled':    # the last update leaves weights that are not finite
        real_step, stage_go = exp2nb.optim.Optimizer.step, exp2nb.train.Run.go
        def go(self, *args, **kw):
            target = self.stage
            def spoil(opt, factor):
                real_step(opt, factor)
                if opt is target.opt and self.folder==folder and target.n==number:
                    with torch.no_grad(): opt.params[0].view(-1)[0] = float('nan')
            exp2nb.optim.Optimizer.step = spoil
            try: return stage_go(self, *args, **kw)
            finally: exp2nb.optim.Optimizer.step = real_step
        exp2nb.train.Run.go = go

def child(run_dir, arm, output, often, where='', stage='base', *how):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(1000, exit=True, file=open(output + '.hung', 'w'))   # a child that hangs shows where
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    ARMS['rl'] = replace(ARMS['rl'], make=lambda *a: rl_arm(*a, reward=coin))
    if often: exp2nb.train.SaveTimer = Often
    if where: aim(run_dir/FOLDERS[stage], where, *how)
    try: run_arm(config(run_dir, arm), progress=False)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)

def start(run_dir, arm, often=True, *how):
    run_dir.mkdir(exist_ok=True)
    return run_in_child(child, run_dir, arm, str(run_dir/'output.txt'), often, *how)

def finish(run_dir, arm, *how):
    p = start(run_dir, arm, *how)
    p.join()
    return p.exitcode, output(run_dir) + (run_dir/'output.txt.hung').read_text()

def output(run_dir): return (run_dir/'output.txt').read_text(encoding='utf-8')

def wait_until(condition, p, run_dir):
    "Wait for what a child is going to do, however long the machine takes (pytest-timeout ends what hangs)."
    while not condition():
        assert (p.is_alive() if hasattr(p, 'is_alive') else p.poll() is None), output(run_dir)
        time.sleep(.02)


# ---- what a finished run says ----

TIMES = {'seconds', 'device_seconds', 'sha256', 'where', 'started'}   # positions, sizes and hashes of files cover times too

def without_times(x):
    if isinstance(x, dict): return {k:without_times(v) for k,v in x.items() if k not in TIMES}
    return [without_times(v) for v in x] if isinstance(x, (list, tuple)) else x

def facts(run_dir, stages=FOLDERS):
    "Everything that must not depend on what happened on the way."
    out = {}
    for stage in stages:
        folder = run_dir/FOLDERS[stage]
        for f in sorted(folder.glob('*.jsonl')): out[f'{stage} {f.name}'] = without_times(read_jsonl(f))
        for f in ('arm.json', 'preflight.json', 'samples.json'):
            if (folder/f).exists(): out[f'{stage} {f}'] = without_times(read_json(folder/f, needs=None))
        for f in 'weights', 'best_dev':
            if (folder/f).exists(): out[f'{stage} {f}'] = artifact_hash(folder/f)
        tensors, tree = pack(load_checkpoint(folder)[1])
        out[f'{stage} final state'] = weights_hash(tensors), without_times(tree)
    return out

def assert_same(run_dir, expected, stages=FOLDERS):
    got, want = facts(run_dir, stages), {k:v for k,v in expected.items() if k.split()[0] in stages}
    assert list(got)==list(want)
    for k in want: assert got[k]==want[k], k

@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "A run that nobody interrupted, and that saved nothing but its ends."
    d = tmp_path_factory.mktemp('whole')/'run'
    for arm in 'rl', 'sft_plus':
        code, text = finish(d, arm, False)
        assert code==0, text
    return d

@pytest.fixture(scope='module')
def expected(reference):
    f = facts(reference)
    assert f['rl weights']!=f['sft weights']!=f['base weights'] and f['sft_plus weights']!=f['sft weights']   # every stage moved
    assert 'preflight' in {r['stage'] for r in f['rl ledger.jsonl']}
    return f

def steps(reference, stage): return sum(r['step']>=0 for r in read_jsonl(reference/FOLDERS[stage]/'metrics.jsonl'))

def before(stage, reference, run_dir):
    "A copy of the uninterrupted run as it was before a stage."
    shutil.copytree(reference, run_dir)
    for later in list(FOLDERS)[list(FOLDERS).index(stage):]: shutil.rmtree(run_dir/FOLDERS[later])

def arm_of(stage): return 'sft_plus' if stage=='sft_plus' else 'rl'


# ---- kills ----

def test_kills_anywhere_change_nothing(tmp_path, reference, expected, slow):
    kills = []
    for trial in range(20 if slow else 2):
        rng, run_dir = random.Random(trial), tmp_path/f'{trial}'
        for i,stage in enumerate(FOLDERS):
            where, arm, n = ('saving', 'anywhere')[(trial+i) % 2], arm_of(stage), steps(reference, stage)
            at = rng.randrange(n//2 if where=='saving' else n-1)
            code, text = finish(run_dir, arm, True, where, stage, at, rng.randrange(16), rng.random()*.05)
            assert code==-signal.SIGKILL, f'trial {trial}: not killed {where} {stage}: {code} {text[-2000:]}'
            kills.append((stage, where))
            if stage=='rl':
                code, text = finish(run_dir, arm, True, 'evaluation', stage, rng.randrange(3), 0, rng.random()*.05)
                assert code==-signal.SIGKILL, text
            if arm=='sft_plus' or stage=='rl':
                code, text = finish(run_dir, arm)
                assert code==0, text
        assert_same(run_dir, expected)
        shutil.rmtree(run_dir)
    print(f'{len(kills)} kills')
    assert len(kills)==4*(20 if slow else 2) and sum(w=='saving' for _,w in kills)*2==len(kills)


# ---- an orderly stop ----

@pytest.mark.parametrize('stage', FOLDERS)
def test_sigterm_saves_after_the_present_step(tmp_path, reference, expected, stage):
    run_dir, arm = tmp_path/'run', arm_of(stage)
    folder = run_dir/FOLDERS[stage]
    before(stage, reference, run_dir)
    p = start(run_dir, arm, False, 'held', stage, 2, 0, 0)
    try:
        wait_until((folder/'ready').exists, p, run_dir)
        assert status(run_dir)['pieces'][FOLDERS[stage]]['state']=='runs'
        assert stop_writers(run_dir)==[p.pid]
        p.join()
        assert p.exitcode==1
    finally:
        p.kill()
        p.join()
    assert 'Interrupted: SIGTERM: saved after step 3 of' in output(run_dir)
    assert load_checkpoint(folder)[0]==3 and lock_holder(folder) is None
    s = status(run_dir)['pieces'][FOLDERS[stage]]
    assert (s['state'], s['step'], s['checkpoint'])==('stopped', 3, 3)
    (folder/'ready').unlink()
    code, text = finish(run_dir, arm)
    assert code==0 and 'going on after step 3' in text, text
    assert_same(run_dir, expected, [stage])


# ---- numbers that are not finite ----

@pytest.mark.parametrize('stage', ('sft', 'rl'))
def test_weights_that_the_last_update_spoiled_are_not_saved(tmp_path, reference, expected, stage):
    "No later step would notice them: they must be found before they are evaluated or saved."
    run_dir, arm = tmp_path/'run', arm_of(stage)
    before(stage, reference, run_dir)
    last = steps(reference, stage)-1
    code, text = finish(run_dir, arm, True, 'spoiled', stage, last, 0, 0)
    assert code==1 and f'is not finite after step {last}: these weights were not saved' in text, text
    folder = run_dir/FOLDERS[stage]
    assert not (folder/'weights').exists() and not (folder/'arm.json').exists()
    step, state = load_checkpoint(folder)
    assert step<=last and all(v.isfinite().all() for v in state['model'].values())
    code, text = finish(run_dir, arm)
    assert code==0, text
    assert_same(run_dir, expected, [stage])

@pytest.mark.parametrize('stage', FOLDERS)
def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path, reference, expected, stage):
    run_dir, arm = tmp_path/'run', arm_of(stage)
    before(stage, reference, run_dir)
    code, text = finish(run_dir, arm, True, 'nan', stage, 2, 0, 0)
    assert code==1 and f"NotFinite: the {'gradient' if stage=='rl' else 'loss'} is nan at step 2: nothing was updated" in text, text
    folder = run_dir/FOLDERS[stage]
    bad = read_json(folder/'bad_batch.json')
    assert bad['step']==2 and bad['batch']
    step, state = load_checkpoint(folder)
    assert step==2 and all(v.isfinite().all() for v in state['model'].values())
    code, text = finish(run_dir, arm)
    assert code==0, text
    assert_same(run_dir, expected, [stage])


# ---- damage, a full disk, a second writer, in a real run folder ----

def test_a_spoiled_checkpoint_is_named_and_the_one_before_taken(tmp_path, reference, expected):
    run_dir = tmp_path/'run'
    before('sft', reference, run_dir)
    code, _ = finish(run_dir, 'rl', True, 'anywhere', 'sft', 5, 0, 0)
    assert code==-signal.SIGKILL
    newest = exp2nb.store.checkpoints(run_dir/FOLDERS['sft'])[-1]
    data = bytearray((newest/'tensors.safetensors').read_bytes())
    data[len(data)//2] ^= 4
    (newest/'tensors.safetensors').write_bytes(data)
    code, text = finish(run_dir, 'rl')
    assert code==0, text
    assert f'{newest} cannot be used, since tensors.safetensors was altered' in text and 'continuing from' in text
    assert_same(run_dir, expected, ['sft', 'rl'])

@pytest.fixture(scope='module')
def killed(tmp_path_factory, reference):
    "A run that was killed in the middle of RL."
    run_dir = tmp_path_factory.mktemp('killed')/'run'
    before('rl', reference, run_dir)
    code, text = finish(run_dir, 'rl', True, 'anywhere', 'rl', 4, 0, 0)
    assert code==-signal.SIGKILL, text
    return run_dir

ALTERED = [('metrics.jsonl', 'flip', 'metrics.jsonl was altered'), ('ledger.jsonl', 'flip', 'ledger.jsonl was altered'),
           ('rollouts.jsonl', 'flip', 'rollouts.jsonl was altered'), ('metrics.jsonl', 'missing', 'metrics.jsonl has only 0 rows'),
           ('ledger.jsonl', 'empty', 'ledger.jsonl has only 0 rows'), ('rollouts.jsonl', 'truncated', 'rollouts.jsonl has only'),
           ('config.json', 'empty', 'config.json is empty'), ('config.json', 'truncated', 'config.json is damaged'),
           ('ledger.owner.json', 'empty', 'ledger.owner.json is empty')]

@pytest.mark.parametrize('name,how,what', ALTERED)
def test_files_that_were_altered_are_refused_by_name(tmp_path, killed, name, how, what):
    run_dir = tmp_path/'run'
    shutil.copytree(killed, run_dir)
    f = run_dir/FOLDERS['rl']/name
    if how=='flip':    # a digit of a number in the middle
        text = f.read_text()
        i = next(i for i in range(len(text)//2, len(text)) if text[i].isdigit() and text[i-1].isdigit())
        f.write_text(text[:i] + str(9-int(text[i])) + text[i+1:])
    if how=='missing': f.unlink()
    if how=='empty': f.write_text('')
    if how=='truncated': f.write_text(f.read_text()[:-20])
    code, text = finish(run_dir, 'rl')
    assert code==1 and 'UserError' in text and what in text, text

@pytest.mark.parametrize('name', ('base', 'sft'))
def test_damaged_shared_weights_are_refused(tmp_path, reference, name):
    run_dir = tmp_path/'run'
    before('rl', reference, run_dir)
    f = run_dir/FOLDERS[name]/'weights'/'tensors.safetensors'
    f.write_bytes(f.read_bytes()[:-9])
    code, text = finish(run_dir, 'rl')
    assert code==1 and f'{f.parent} cannot be used, since tensors.safetensors is truncated' in text, text

def test_a_full_disk_is_said_and_the_run_goes_on_later(tmp_path, reference, expected):
    if os.geteuid()!=0 or not shutil.which('mount'): pytest.skip('mounting a small tmpfs needs root')
    disk = tmp_path/'disk'
    disk.mkdir()
    r = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', str(disk)], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'mounting a small tmpfs was refused: {r.stderr.strip()}')
    try:
        run_dir = disk/'run'
        before('rl', reference, run_dir)
        code, _ = finish(run_dir, 'rl', True, 'anywhere', 'rl', 3, 0, 0)
        assert code==-signal.SIGKILL
        good, _ = load_checkpoint(run_dir/FOLDERS['rl'])
        free = os.statvfs(disk)
        (disk/'filler').write_bytes(b'x'*(free.f_bavail*free.f_frsize - 300_000))
        code, text = finish(run_dir, 'rl')
        assert code==1 and 'UserError: The disk is full' in text, text
        assert load_checkpoint(run_dir/FOLDERS['rl'])[0]>=good
        (disk/'filler').unlink()
        code, text = finish(run_dir, 'rl')
        assert code==0, text
        assert_same(run_dir, expected, ['rl'])
    finally: subprocess.run(['umount', '-l', str(disk)], check=True)

def test_a_second_writer_is_refused_and_the_first_ends_as_expected(tmp_path, reference, expected):
    run_dir = tmp_path/'run'
    before('rl', reference, run_dir)
    first = start(run_dir, 'rl', False, 'held', 'rl', 3, 0, 0)
    folder = run_dir/FOLDERS['rl']
    wait_until((folder/'ready').exists, first, run_dir)
    with pytest.raises(UserError, match=f'is being written by process {first.pid} on'): run_arm(config(run_dir, 'rl'), progress=False)
    (folder/'go').touch()
    first.join()
    assert first.exitcode==0, output(run_dir)
    assert_same(run_dir, expected, ['rl'])

def test_another_configuration_is_refused(tmp_path, reference):
    run_dir = tmp_path/'run'
    before('sft_plus', reference, run_dir)
    other = override(config(run_dir, 'rl'), 'rl.max_new=17')
    with pytest.raises(UserError, match='rl.max_new is 16 there and 17 here'): run_arm(other, progress=False)


# ---- through the commands that people use ----

ENV = {**os.environ, 'EXP2_ENV':'active', 'OMP_NUM_THREADS':'1', 'PATH':f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
needs_commands = pytest.mark.skipif(not shutil.which('exp2_status', path=ENV['PATH']),
                                    reason='the console scripts are not installed: pip install -e .')
SIZES = dict(n_train=48, n_test=6, dev=6)

HOLD = """# sitecustomize, imported by every Python of a command: one function waits, and a file says so
import importlib.abc, importlib.util, os, pathlib, sys
module_name, owner, function = os.environ['HOLD_AT'].split(':')
class Hold(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name!=module_name: return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        real = spec.loader.exec_module
        def exec_module(module):
            real(module)
            place = getattr(module, owner) if owner else module
            f = getattr(place, function)
            def held(*args, **kw):
                import signal, time
                first = args[0] if args else None
                if owner and not (first.name=='sft' and first.n==3): return f(*args, **kw)
                pathlib.Path(os.environ['HOLD_READY']).write_text(str(os.getpid()))
                asked = getattr(signal.getsignal(signal.SIGTERM), '__self__', None)   # the `Interrupt` of a loop around a step
                while not (owner and asked.requested): time.sleep(.01)
                return f(*args, **kw)
            setattr(place, function, held)
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Hold())
"""
IN_A_STEP = 'exp2nb.train:Supervised:step'   # step 3 of SFT

def command(run_dir, *args, hold=''):
    "Start a command of the project; its output goes to a file."
    run_dir.mkdir(exist_ok=True)
    env = dict(ENV)
    if hold:
        (run_dir.parent/'hold').mkdir(exist_ok=True)
        (run_dir.parent/'hold'/'sitecustomize.py').write_text(HOLD, encoding='utf-8')
        env |= dict(HOLD_AT=hold, HOLD_READY=str(run_dir/'ready'),
                    PYTHONPATH=os.pathsep.join([str(run_dir.parent/'hold'), str(ROOT), os.environ.get('PYTHONPATH', '')]))
    with open(run_dir/'output.txt', 'w') as f:
        return subprocess.Popen([str(a) for a in args], cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT)

OPTIONS = ['--preset', 'smoke', '--changes', CHANGES, *(x for k,v in SIZES.items() for x in (f"--{k.replace('_', '-')}", v))]

def script(run_dir, **kw): return command(run_dir, 'bash', ROOT/'runs'/'exp2.sh', '--arms', 'rl', '--run-dir', run_dir, *OPTIONS, **kw)

def papermill(run_dir, **kw):
    given = dict(arm='rl', preset='smoke', run_dir=run_dir, changes=CHANGES, **SIZES)
    parameters = [x for k,v in given.items() for x in ('-p', k, v)]
    return command(run_dir, 'papermill', '--no-progress-bar', ROOT/'nbs'/'run_arm.ipynb', run_dir/'out.ipynb', *parameters, **kw)

def wait_for_end(pid):
    "Wait until a process that is not our child has ended (pytest-timeout ends what hangs)."
    while True:
        try: os.kill(pid, 0)
        except ProcessLookupError: return
        time.sleep(.02)

@needs_commands
@pytest.mark.parametrize('number', (signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)))
def test_the_script_passes_a_signal_to_the_writer_and_waits(tmp_path, expected, number):
    run_dir = tmp_path/'run'
    sft = run_dir/FOLDERS['sft']
    p = script(run_dir, hold=IN_A_STEP)
    try:
        wait_until((run_dir/'ready').exists, p, run_dir)
        writer = lock_holder(sft)['pid']
        p.send_signal(number)
        p.wait()
    finally: p.kill()
    text = output(run_dir)
    assert p.returncode==128+number and 'The same command goes on from the last checkpoint' in text, text
    step, _ = load_checkpoint(sft)
    assert step==4==len(read_jsonl(sft/'metrics.jsonl'))   # the step that it was in is done and saved
    assert lock_holder(sft) is None
    wait_for_end(writer)   # the kernel does not outlive its script
    p = script(run_dir)
    assert p.wait()==0, output(run_dir)
    assert_same(run_dir, expected, ['base', 'sft'])

@needs_commands
@pytest.mark.slow
def test_a_bare_papermill_dies_at_once_and_goes_on(tmp_path, expected):
    run_dir = tmp_path/'run'
    sft = run_dir/FOLDERS['sft']
    p = papermill(run_dir, hold=IN_A_STEP)
    wait_until((run_dir/'ready').exists, p, run_dir)
    writer = lock_holder(sft)['pid']
    p.terminate()
    assert p.wait()!=0
    wait_for_end(writer)
    p = papermill(run_dir)
    assert p.wait()==0, output(run_dir)
    assert_same(run_dir, expected, ['base', 'sft'])


OUTSIDE = dict(data='exp2nb.lab::target_tasks', evaluation='exp2nb.arms::evaluate')

@needs_commands
@pytest.mark.parametrize('number', (signal.SIGTERM, signal.SIGINT))
@pytest.mark.parametrize('where', OUTSIDE)
def test_a_signal_outside_a_training_loop_is_a_sentence(tmp_path, reference, where, number):
    run_dir = tmp_path/'run'
    before('rl', reference, run_dir)
    p = command(run_dir, 'exp2_arm', '--arm', 'sft', '--run-dir', run_dir, *OPTIONS, hold=OUTSIDE[where])
    try:
        wait_until((run_dir/'ready').exists, p, run_dir)
        p.send_signal(number)
        p.wait()
    finally: p.kill()
    text = output(run_dir)
    assert p.returncode==128+number and 'Traceback' not in text and number.name in text.splitlines()[-1], text
    assert not list(run_dir.rglob('arm.json')) and lock_holder(run_dir/'sft'/'model-1.0'/'seed0') is None


# ---- what a saved notebook shows ----

def test_a_saved_notebook_shows_one_line_of_progress_in_its_last_state(tmp_path):
    "Forty states of a bar would be forty lines in the page; a widget would be an empty space."
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor
    code = """
from exp2nb.train import ProgressLine
with ProgressLine(total=40, desc='sft', mininterval=0, bar_format='{desc} {percentage:3.0f}%|{bar:40}| {postfix}') as bar:
    for i in range(40):
        bar.set_postfix_str(f'loss {i}', refresh=False)
        bar.update(1)
        print(f'step {i}') if i in (10, 20) else None
"""
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nb.metadata.kernelspec = dict(name='python3', display_name='Python 3', language='python')
    ExecutePreprocessor(timeout=600).preprocess(nb, dict(metadata=dict(path=str(tmp_path))))
    lines = [o for o in nb.cells[0].outputs if o.output_type=='display_data']
    assert len(lines)==1 and 'sft 100%' in lines[0].data['text/plain'] and 'loss 39' in lines[0].data['text/plain']
    page, _ = HTMLExporter().from_notebook_node(nb)
    assert page.count('loss 39')==1 and 'loss 38' not in page and 'jupyter-widgets' not in page.split('<body')[1]
