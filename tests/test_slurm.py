"""The Slurm template under a real Slurm of one node, started here: it runs, saves when Slurm's time is up, is queued again and goes on."""
import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
import pytest

ROOT = Path(__file__).parent.parent
TOOLS = ('munged', 'slurmctld', 'slurmd', 'sbatch')
PATH = os.environ['PATH'] + ':/usr/sbin:/sbin'

def missing():
    "Why there is no Slurm here; '' if there can be one."
    gone = [t for t in TOOLS if not shutil.which(t, path=PATH)]
    if gone: return f'{", ".join(gone)} not installed (Debian: slurm-wlm, munge)'
    return '' if os.geteuid()==0 else 'Slurm is started as root'

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={port1}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""

class Cluster:
    "One node. `call` runs a command of Slurm's and gives what it prints."
    def __init__(self, folder, port):
        self.folder, self.env = folder, dict(os.environ, SLURM_CONF=str(folder/'slurm.conf'), PATH=PATH, EXP2_ENV='active')
        for name in ('munge', 'state', 'spool'): (folder/name).mkdir(mode=0o700)
        (folder/'munge'/'key').write_bytes(os.urandom(128))
        (folder/'munge'/'key').chmod(0o400)
        (folder/'slurm.conf').write_text(CONF.format(folder=folder, host=socket.gethostname().split('.')[0], port=port, port1=port+1))
        files = dict(socket='socket', key_file='key', pid_file='pid', log_file='log', seed_file='seed')
        self.call('munged', '--force', *(f'--{k.replace("_", "-")}={folder}/munge/{v}' for k,v in files.items()))
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)   # each writes a log of its own
        self.servers = [subprocess.Popen([t, '-D', '-c'], env=self.env, **quiet) for t in ('slurmctld', 'slurmd')]

    def call(self, *args, **kw):
        r = subprocess.run([*map(str, args)], env=self.env, capture_output=True, text=True, timeout=120, **kw)
        assert r.returncode==0, f'{args}: {r.stdout}{r.stderr}'
        return r.stdout.strip()

    def up(self):
        "Is the node ready? None: a server has died."
        if any(s.poll() is not None for s in self.servers): return None
        with contextlib.suppress(AssertionError): return self.call('sinfo', '-h', '-o', '%T')=='idle'
        return False

    def state(self, job): return self.call('squeue', '-h', '-o', '%T', '-j', job, '--states=all')

    def stop(self):
        for s in self.servers: s.terminate()
        for s in self.servers: s.wait(60)
        subprocess.run(['kill', (self.folder/'munge'/'pid').read_text().strip()], check=False)

def until(done, seconds, what):
    "Wait for an event; the limit only ends a test that hangs."
    end = time.monotonic()+seconds
    while not (found := done()):
        assert time.monotonic() < end, f'{what} did not happen within {seconds} s'
        time.sleep(.2)
    return found

@pytest.fixture
def cluster(tmp_path_factory):
    for port in range(21817, 21900, 2):   # a port that somebody has makes its server end at once: the next one
        c = Cluster(tmp_path_factory.mktemp('slurm'), port)
        until(lambda c=c: c.up() is not False, 120, 'the start of Slurm')
        if c.up(): break
        c.stop()
    yield c
    c.stop()

def rows(file): return len(file.read_text(encoding='utf-8').splitlines()) if file.exists() else 0

def submit(cluster, tmp_path, *options):
    slurm = ('--parsable', '--nodes=1', '--gpus-per-node=0', '--cpus-per-task=1', '--time=60', f'--output={tmp_path}/log.txt')
    return cluster.call('sbatch', *slurm, 'runs/slurm.sbatch', '--preset', 'smoke', '--run-dir', tmp_path/'run', *options, cwd=ROOT)

@pytest.mark.timeout(1500)
def test_the_template_saves_at_the_signal_is_queued_again_and_goes_on(cluster, tmp_path):
    job = submit(cluster, tmp_path, '--arms', 'rl', '--changes', 'rl.steps=60 eval.curve=0 eval.n_samples=0', '--n-test', '8')
    arm = tmp_path/'run'/'rl'/'model-1.0'/'seed0'
    log = lambda: (tmp_path/'log.txt').read_text(encoding='utf-8', errors='replace') if (tmp_path/'log.txt').exists() else ''
    def begun():
        assert cluster.state(job) in ('PENDING', 'CONFIGURING', 'RUNNING'), log()
        return rows(arm/'metrics.jsonl') >= 3
    until(begun, 900, 'the third RL step')
    cluster.call('scancel', '--batch', '--signal=TERM', job)   # as `--signal=B:TERM@300` does when the time is nearly up
    until(lambda: cluster.state(job)=='PENDING', 300, 'queueing again')
    done = rows(arm/'metrics.jsonl')
    saved = max(p.name for p in (arm/'checkpoints').iterdir())
    assert saved==f'step_{done:06d}', f'{done} steps were done and the newest checkpoint is {saved}:\n{log()}'
    # not now: in the second in which a job was ended, Slurm refuses to start it ("Job credential revoked")
    cluster.call('scontrol', 'update', f'JobId={job}', 'StartTime=now+5')
    until(lambda: cluster.state(job) in ('COMPLETED', 'FAILED', 'CANCELLED', 'NODE_FAIL'), 900, 'the end of the job')
    assert cluster.state(job)=='COMPLETED', log()
    assert f'going on after step {done}.' in log(), log()
    assert json.loads((arm/'arm.json').read_text())['steps']==60 and rows(arm/'metrics.jsonl')==60
