"""What no notebook can show of `exp2nb.store`: other processes, kills, full disks, and damage to every kind of file."""
import json, os, random, shutil, signal, subprocess, time, warnings
from pathlib import Path

import pytest
import torch

from _forkserver import run_in_child
import exp2nb.store
from exp2nb.config import UserError, sha256_of
from exp2nb.store import (Jsonl, RunLock, atomic_folder, check_config, checkpoints, damage, load_artifact, load_checkpoint, lock_holder,
                          read_json, read_jsonl, save_artifact, save_checkpoint, save_model, weights_hash, write_json)

def flip(f):
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 1
    f.write_bytes(b)
def shorten(f): f.write_bytes(f.read_bytes()[:-7])
def empty(f): f.write_bytes(b'')
WAYS = dict(truncated=shorten, flipped=flip, missing=Path.unlink, empty=empty)
SAYS = dict(truncated='truncated', flipped='altered', missing='missing', empty='empty')
FILES = 'tensors.safetensors', 'state.json', 'manifest.json'

def state(step, n=8): return dict(model={'w': torch.full((n, n), float(step))}, step=step)

def wait_for(path, p):
    "Wait until child `p` has written `path`, however long the machine takes (pytest-timeout ends what hangs)."
    while not path.exists():
        assert p.is_alive(), f'the child ended before {path} appeared'
        time.sleep(.01)


# ---- damage ----

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', FILES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, name, way):
    for step in (1, 2, 3): save_checkpoint(tmp_path, step, state(step))
    WAYS[way](tmp_path/'checkpoints'/'step_000003'/name)
    match = f'step_000003.*{name}.*continuing from .*step_000002'
    with pytest.warns(UserWarning, match=match) as warned: step, got = load_checkpoint(tmp_path)
    assert step==got['step']==2 and got['model']['w'][0,0]==2
    if name!='manifest.json': assert SAYS[way] in str(warned[0].message)

def test_a_missing_checkpoint_folder_is_just_not_there(tmp_path):
    for step in (1, 2): save_checkpoint(tmp_path, step, state(step))
    shutil.rmtree(tmp_path/'checkpoints'/'step_000002')
    assert load_checkpoint(tmp_path)[0]==1

def test_no_good_checkpoint_is_refused_rather_than_started_again(tmp_path):
    for step in (1, 2): save_checkpoint(tmp_path, step, state(step))
    for p in checkpoints(tmp_path): flip(p/'state.json')
    with pytest.raises(UserError, match='step_000002.*state.json was altered.*step_000001.*state.json was altered'):
        load_checkpoint(tmp_path)

def test_after_a_fallback_two_good_checkpoints_come_back(tmp_path):
    for step in (10, 20, 30): save_checkpoint(tmp_path, step, state(step))
    flip(tmp_path/'checkpoints'/'step_000030'/'state.json')
    with pytest.warns(UserWarning): assert load_checkpoint(tmp_path)[0]==20
    save_checkpoint(tmp_path, 25, state(25))
    assert [p.name for p in checkpoints(tmp_path)]==['step_000020', 'step_000025']
    assert not any(map(damage, checkpoints(tmp_path)))

def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    for step in (10, 20): save_checkpoint(tmp_path, step, state(step))
    flip(tmp_path/'checkpoints'/'step_000020'/'tensors.safetensors')
    save_checkpoint(tmp_path, 20, state(20))
    assert load_checkpoint(tmp_path)[0]==20

@pytest.mark.parametrize('way', WAYS)
@pytest.mark.parametrize('name', FILES)
def test_damaged_weights_are_refused(tmp_path, name, way):
    save_artifact(tmp_path/'sft', {'w': torch.ones(3)}, dict(stage='sft'))
    WAYS[way](tmp_path/'sft'/name)
    with pytest.raises(UserError, match=f'sft cannot be used.*{name}'): load_artifact(tmp_path/'sft')

@pytest.mark.parametrize('way', ('truncated', 'missing', 'empty'))
def test_damaged_json_is_refused(tmp_path, way):
    f = tmp_path/'arm.json'
    write_json(f, dict(arm='rl', steps=467))
    WAYS[way](f)
    with pytest.raises(UserError, match='arm.json is ' + dict(truncated='damaged').get(way, way)): read_json(f)

def test_a_flipped_bit_in_config_json_never_passes_for_the_same_config(tmp_path):
    record = dict(config=dict(arm='rl', steps=467, rate=.05))
    check_config(tmp_path, record)
    good = (tmp_path/'config.json').read_bytes()
    for i in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[i] ^= 1<<bit
            (tmp_path/'config.json').write_bytes(bad)
            try: check_config(tmp_path, record)
            except UserError: continue
            assert json.loads(bad)==json.loads(good), bad

@pytest.mark.parametrize('way', WAYS)
def test_damaged_rows_are_never_taken_for_what_the_checkpoint_counts_on(tmp_path, way):
    f = tmp_path/'metrics.jsonl'
    log = Jsonl(f)
    for step in range(20): log.append(dict(step=step, loss=1/(step+1)))
    here = log.position
    log.close()
    WAYS[way](f)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        log = Jsonl(f)
    before = f.read_bytes()
    with pytest.raises(UserError, match='metrics.jsonl (was altered|has only)'): log.truncate(**here)
    assert f.read_bytes()==before

def test_a_row_cut_at_any_byte_is_dropped(tmp_path):
    f = tmp_path/'ledger.jsonl'
    rows = [dict(stage='rollout', step=s, tokens='é'*s) for s in range(4)]
    log = Jsonl(f)
    for r in rows: log.append(r)
    log.close()
    whole = f.read_bytes()
    ends = [i+1 for i,b in enumerate(whole) if b==10]
    for cut in range(len(whole)):
        f.write_bytes(whole[:cut])
        n = sum(e<=cut for e in ends)
        assert read_jsonl(f)==rows[:n]
        assert f.stat().st_size==cut, 'a reader must not repair'
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            log = Jsonl(f)
        assert bool(warned) == (cut not in [0]+ends)
        for r in rows[n:]: log.append(r)
        log.close()
        assert f.read_bytes()==whole

def test_nothing_is_unpickled():
    import exp2nb.store as m
    text = Path(m.__file__).read_text(encoding='utf-8')
    assert 'pickle' not in text.replace('unpickle', '') and 'torch.load' not in text


# ---- a full disk ----

@pytest.fixture
def small_disk(tmp_path):
    "A disk of 1 MB."
    disk = tmp_path/'disk'
    disk.mkdir()
    if not shutil.which('mount') or os.geteuid()!=0: pytest.skip('mounting a small tmpfs needs root')
    r = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'mounting a small tmpfs was refused: {r.stderr.strip()}')
    yield disk
    subprocess.run(['umount', '-l', str(disk)], check=True)

def fill(disk, leave):
    "Fill a disk until `leave` bytes are free."
    s = os.statvfs(disk)
    (disk/'filler').write_bytes(b'x'*max(0, s.f_bavail*s.f_frsize - leave))

@pytest.mark.parametrize('leave', (0, 4096, 8192, 200_000))
def test_full_disk_keeps_the_last_good_checkpoint(small_disk, leave):
    save_checkpoint(small_disk, 1, state(1, 200))  # 160 kB
    fill(small_disk, leave)
    try: save_checkpoint(small_disk, 2, state(2, 250))
    except UserError as e: assert 'disk is full' in str(e) and 'step_000002' in str(e)
    else: pytest.fail('a full disk was not noticed')
    assert [p.name for p in (small_disk/'checkpoints').iterdir()]==['step_000001']
    assert load_checkpoint(small_disk)[0]==1
    (small_disk/'filler').unlink()
    save_checkpoint(small_disk, 2, state(2, 250))
    assert load_checkpoint(small_disk)[0]==2

def test_full_disk_leaves_whole_rows_and_the_old_json(small_disk):
    log = Jsonl(small_disk/'metrics.jsonl')
    write_json(small_disk/'arm.json', dict(arm='rl'))
    fill(small_disk, 8192)
    rows = 0
    with pytest.raises(UserError, match='disk is full'):
        while True:
            log.append(dict(step=rows, pad='x'*700))
            rows += 1
    assert len(read_jsonl(log.path))==rows==log.rows > 0
    with pytest.raises(UserError, match='disk is full'): write_json(small_disk/'arm.json', dict(arm='x'*5000))
    assert read_json(small_disk/'arm.json')==dict(arm='rl')
    assert not list(small_disk.glob('.tmp*'))
    (small_disk/'filler').unlink()
    log.append(dict(step=rows))
    assert len(read_jsonl(log.path))==rows+1
    log.close()


# ---- two writers ----

def hold(folder, ready):
    "Own a folder and write rows for ever."
    with RunLock(folder) as _, open(folder/'metrics.jsonl', 'ab', buffering=0) as f:
        ready.touch()
        while True:
            f.write(b'{}\n')
            time.sleep(.001)

def hold_and_fork(folder, ready):
    with RunLock(folder):
        pid = os.fork()
        if pid==0: signal.pause()
        (folder/'child').write_text(str(pid))
        ready.touch()
        signal.pause()

def test_the_second_writer_is_refused_and_the_first_goes_on(tmp_path):
    p = run_in_child(hold, tmp_path, tmp_path/'ready')
    try:
        wait_for(tmp_path/'ready', p)
        with pytest.raises(UserError, match=f'being written by process {p.pid} on'):
            with RunLock(tmp_path): pass
        assert lock_holder(tmp_path)['pid']==p.pid
        before = (tmp_path/'metrics.jsonl').stat().st_size
        while (tmp_path/'metrics.jsonl').stat().st_size==before: assert p.is_alive()   # it still writes
    finally:
        p.kill()
        p.join()
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path): assert lock_holder(tmp_path)['pid']==os.getpid()

def test_a_waiting_writer_gets_its_turn(tmp_path, monkeypatch):
    "The present writer is killed after the waiting one has been refused three times."
    p = run_in_child(hold, tmp_path, tmp_path/'ready')
    wait_for(tmp_path/'ready', p)
    tries, take = [], RunLock._take
    def counted(self):
        tries.append(take(self))
        if len(tries)==3: p.kill()
        return tries[-1]
    monkeypatch.setattr(RunLock, '_take', counted)
    with RunLock(tmp_path, wait=3600): assert lock_holder(tmp_path)['pid']==os.getpid()
    assert tries[:3]==[False]*3 and tries[-1]
    p.join()

def test_a_killed_writers_child_does_not_keep_its_lock(tmp_path):
    p = run_in_child(hold_and_fork, tmp_path, tmp_path/'ready')
    wait_for(tmp_path/'ready', p)
    p.kill()
    p.join()
    child = int((tmp_path/'child').read_text())
    try:
        os.kill(child, 0)  # it lives
        with RunLock(tmp_path, wait=3600): pass
    finally: os.kill(child, signal.SIGKILL)

@pytest.mark.parametrize('text', ('', '{"pid": 1', '[]', 'nonsense'))
def test_a_stale_or_broken_lock_file_is_no_obstacle(tmp_path, text):
    (tmp_path/'.lock').write_text(text)
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path): assert lock_holder(tmp_path)['pid']==os.getpid()


# ---- kill -9 during saves ----

def save_forever(run):
    "Count, log and save as fast as possible, from wherever the folder stands."
    with RunLock(run):
        found = load_checkpoint(run)
        step, s = found or (0, {})
        log = Jsonl(run/'metrics.jsonl')
        log.truncate(**s.get('metrics', {}))
        w = s.get('w', torch.zeros(100_000))
        while True:
            step += 1
            w = w*1.01 + step
            log.append(dict(step=step, high=w.max()))
            save_checkpoint(run, step, dict(w=w, metrics=log.position))
            (run/'confirmed').write_text(str(step))

def test_kill_during_saves_loses_nothing(tmp_path, slow):
    rng, last = random.Random(0), 0
    for _ in range(100 if slow else 12):
        (tmp_path/'confirmed').unlink(missing_ok=True)
        p = run_in_child(save_forever, tmp_path)
        wait_for(tmp_path/'confirmed', p)
        time.sleep(.2*rng.random())   # the kill may come at any time
        p.kill()
        p.join()
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            step, s = load_checkpoint(tmp_path)
        text = (tmp_path/'confirmed').read_text()
        if text: last = max(last, int(text))
        assert step >= last
        assert len(checkpoints(tmp_path)) >= min(step, 2) and not any(map(damage, checkpoints(tmp_path)))
        rows = read_jsonl(tmp_path/'metrics.jsonl')[:s['metrics']['rows']]
        assert [r['step'] for r in rows]==list(range(1, step+1))
        w = torch.zeros(100_000)
        for i in range(1, step+1):
            w = w*1.01 + i
            assert rows[i-1]['high']==w.max().item()   # exact with any number of threads
        assert weights_hash(dict(w=w))==weights_hash(dict(w=s['w']))
    assert last >= 12


# ---- a model in a folder ----

def test_a_saved_model_is_rebuilt_from_its_folder_alone(tmp_path):
    from exp2nb.bases.base import rebuild
    from exp2nb.config import ModelConfig
    from exp2nb.model import Transformer
    from exp2nb.tokenizer import train_tokenizer
    tok = train_tokenizer(['one two three']*3, 270)
    model = Transformer(ModelConfig(2, aspect=16, head_dim=16, vocab=270, context=32))
    sha = save_model(tmp_path/'m', model, tok, note='a toy')
    tensors, meta = load_artifact(tmp_path/'m')
    again, tok2 = rebuild(meta, tensors, tmp_path/'m')
    assert weights_hash(again.state_dict())==sha and tok2.hash==tok.hash and meta['note']=='a toy'


# ---- two at a time, and a kill between two renames ----

def test_two_writers_of_one_json_file_leave_a_whole_one(tmp_path, monkeypatch):
    "The second writes all of its own while the first is about to rename."
    path, sync, again = tmp_path/'plan.json', exp2nb.store.sync, [1]
    def meanwhile(p):
        if again: write_json(path, dict(writer=again.pop()+1))
        sync(p)
    monkeypatch.setattr(exp2nb.store, 'sync', meanwhile)
    write_json(path, dict(writer=1))
    assert read_json(path, dict)==dict(writer=1) and [p.name for p in tmp_path.iterdir()]==['plan.json']

def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path):
    "The old folder lies aside, the new one is not there yet: the next writer finds the old one, also if it fails itself."
    save_artifact(tmp_path/'best', dict(w=torch.ones(2)))
    os.replace(tmp_path/'best', tmp_path/'.tmp-old-best')
    with pytest.raises(ValueError), atomic_folder(tmp_path/'best'): raise ValueError
    assert load_artifact(tmp_path/'best')[0]['w'].sum()==2

def test_weights_that_are_no_tensors_are_a_sentence(tmp_path):
    "Cut short by somebody who made the manifest fit."
    save_artifact(tmp_path/'w', dict(w=torch.ones(2)))
    file, manifest = tmp_path/'w'/'tensors.safetensors', tmp_path/'w'/'manifest.json'
    file.write_bytes(file.read_bytes()[:40])
    write_json(manifest, read_json(manifest, dict) | {file.name: dict(bytes=40, sha256=sha256_of(file))})
    with pytest.raises(UserError, match='tensors.safetensors holds no tensors'): load_artifact(tmp_path/'w')
