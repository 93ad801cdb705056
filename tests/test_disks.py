"""Where disks differ from a desk's: no `flock`, no `fsync` of folders, other people's files, limits.

Every error of the operating system is one sentence (`UserError`), and what was there before stays as it was.
"""
import errno, fcntl, json, os, resource, shutil, signal, stat, subprocess, sys, tempfile, threading, time, traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from _forkserver import run_in_child
from exp2nb import store
from exp2nb.config import UserError
from exp2nb.store import (Claim, Jsonl, RunLock, load_checkpoint, load_state, lock_holder, os_errors, read_json, read_jsonl, refusal,
                          save_checkpoint, write_json)

@pytest.fixture(autouse=True)
def first_time():
    "What is said once is said again in the next test."
    store.say_once.cache_clear()

def wait_for(path, p):
    while not path.exists():
        assert p.is_alive(), f'the child ended before {path} appeared'
        time.sleep(.01)

def reported(report, f, args):
    try: f(*args)
    except BaseException:
        os.write(report, traceback.format_exc().encode())
        os._exit(1)

def child_of(report, f, args):
    fd = os.open(report, os.O_WRONLY | os.O_CREAT)   # opened before `f` becomes another user or closes files
    reported(fd, f, args)

def in_child(f, *args):
    "Call `f` in a process of its own, whose limits and user it may change. Fails with its traceback."
    with tempfile.TemporaryDirectory() as d:
        p = run_in_child(child_of, d + '/report', f, args)
        p.join()
        assert p.exitcode==0, Path(d, 'report').read_text()


# ---- no flock ----

def without_flock(code):
    "Let every `flock` of this process fail, as file systems without it do."
    def flock(fd, how): raise OSError(code, os.strerror(code))
    fcntl.flock = flock

def hold(folder, code):
    without_flock(code)
    with RunLock(folder):
        (folder/'ready').touch()
        signal.pause()

@pytest.mark.parametrize('code', sorted(store.NO_FLOCK))
def test_without_flock_a_second_writer_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, monkeypatch, capfd, code):
    monkeypatch.setattr(fcntl, 'flock', None)
    without_flock(code)
    p = run_in_child(hold, tmp_path, code)
    wait_for(tmp_path/'ready', p)
    for _ in range(2):
        with pytest.raises(UserError, match=f'is being written by process {p.pid} on'):
            with RunLock(tmp_path): pass
    assert lock_holder(tmp_path)['pid']==p.pid
    assert capfd.readouterr().err.count('This file system has no flock') in (1, 2)   # one line a process (the child's may go elsewhere)
    p.kill()
    p.join()
    assert lock_holder(tmp_path) is None
    with RunLock(tmp_path): assert lock_holder(tmp_path)['pid']==os.getpid()
    assert lock_holder(tmp_path) is None and not list(tmp_path.glob('.lock-*'))

def test_other_errors_of_flock_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, 'flock', None)
    without_flock(errno.EIO)
    with pytest.raises(UserError, match='the disk reports an input/output error'):
        with RunLock(tmp_path): pass

def claim_of(folder, age, **owner):
    "A claim's file as another process left it, `age` seconds ago."
    claim = Claim(folder)
    claim.path.write_text(json.dumps(claim.me | dict(key='another') | owner))
    os.utime(claim.path, (time.time()-age,)*2)
    return claim.path

@pytest.mark.parametrize('age,owner,alive', [(0, dict(host='elsewhere'), True), (Claim.dead+60, dict(host='elsewhere'), False),
                                             (0, dict(pid=1), True), (0, dict(pid=2**22+7), False), (Claim.dead+60, dict(pid=1), False)])
def test_who_counts_as_alive(tmp_path, monkeypatch, age, owner, alive):
    "Another host's process by the time of its file, one of this host by its number too."
    monkeypatch.setattr(fcntl, 'flock', None)
    without_flock(errno.ENOSYS)
    claim_of(tmp_path, age, **owner)
    assert bool(lock_holder(tmp_path))==alive
    if alive:
        with pytest.raises(UserError, match='is being written by'): RunLock(tmp_path).__enter__()
    else:
        with RunLock(tmp_path): pass

@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": "x", "host": 3}'])
def test_a_broken_claim_blocks_until_it_is_old(tmp_path, monkeypatch, text):
    monkeypatch.setattr(fcntl, 'flock', None)
    without_flock(errno.ENOSYS)
    path = tmp_path/'.lock-owner'
    path.write_text(text)
    with pytest.raises(UserError, match='is being written by another process'): RunLock(tmp_path).__enter__()
    os.utime(path, (time.time()-Claim.dead-60,)*2)
    with RunLock(tmp_path): assert lock_holder(tmp_path)['pid']==os.getpid()

def test_of_many_that_take_over_a_dead_claim_only_one_gets_it(tmp_path):
    "Threads that all found the same dead owner: at no time do two hold the claim."
    holding, most, lock = [0], [0], threading.Lock()
    def compete(n):
        for _ in range(50):
            claim = Claim(tmp_path)
            if not claim.take(): continue
            with lock:
                holding[0] += 1
                most[0] = max(most[0], holding[0])
            with lock: holding[0] -= 1
            claim.release()
    claim_of(tmp_path, Claim.dead+60, host='elsewhere')
    with ThreadPoolExecutor(4) as threads: list(threads.map(compete, range(4)))   # raises what a thread raised
    assert most[0]==1 and not list(tmp_path.glob('.lock-*'))

def test_a_claim_is_renewed_while_it_is_held(tmp_path, monkeypatch):
    monkeypatch.setattr(Claim, 'renew', .01)
    claim = Claim(tmp_path)
    assert claim.take()
    old = time.time()-300
    os.utime(claim.path, (old, old))
    while claim.path.stat().st_mtime < old+200: time.sleep(.01)
    claim.release()
    assert not claim.path.exists()

def test_a_forked_child_does_not_give_its_parents_claim_back(tmp_path):
    claim = Claim(tmp_path)
    assert claim.take()
    pid = os.fork()
    if pid==0:
        claim.release()
        os._exit(0)
    os.waitpid(pid, 0)
    assert claim.path.exists() and claim.living()
    claim.release()


# ---- folders that can't be synced ----

@pytest.mark.parametrize('code', sorted(store.NO_FOLDER_SYNC))
def test_a_file_system_that_cannot_sync_folders_is_said_once(tmp_path, monkeypatch, capfd, code):
    real = os.fsync
    def fsync(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode): raise OSError(code, os.strerror(code))
        return real(fd)
    monkeypatch.setattr(os, 'fsync', fsync)
    for step in (1, 2): save_checkpoint(tmp_path, step, dict(w=torch.ones(3)*step))
    assert load_checkpoint(tmp_path)[0]==2
    assert capfd.readouterr().err.count('This file system cannot sync folders')==1

def test_a_file_that_cannot_be_synced_is_an_error(tmp_path, monkeypatch):
    def fsync(fd): raise OSError(errno.EIO, 'Input/output error')
    monkeypatch.setattr(os, 'fsync', fsync)
    with pytest.raises(UserError, match='arm.json was not written, since the disk reports an input/output error'):
        write_json(tmp_path/'arm.json', {})


# ---- a group's folder ----

def modes(folder): return {p.name: oct(p.stat().st_mode & 0o777) for p in folder.rglob('*') if p.is_file()}

def write_all(folder, mask):
    os.umask(mask)
    with RunLock(folder):
        log = Jsonl(folder/'metrics.jsonl')
        log.append(dict(step=0))
        write_json(folder/'config.json', {})
        save_checkpoint(folder, 1, dict(w=torch.ones(2)))
    without_flock(errno.ENOSYS)
    with RunLock(folder): shutil.copy(folder/'.lock-owner', folder/'owner')

@pytest.mark.parametrize('mask,mode', [(0o002, '0o664'), (0o022, '0o644'), (0o077, '0o600')])
def test_all_files_follow_the_umask(tmp_path, mask, mode):
    in_child(write_all, tmp_path/'run', mask)
    assert set(modes(tmp_path/'run').values())=={mode}, modes(tmp_path/'run')

needs_root = pytest.mark.skipif(os.geteuid()!=0, reason='becoming another user needs root')
NOBODY, GROUP = 65533, 65534

def colleague(folder, f):
    "Run `f(folder)` as another user of the group."
    os.setgroups([])
    os.setgid(GROUP)
    os.setuid(NOBODY)
    os.umask(0o002)
    f(folder)

def reachable(path, top):
    "Let everybody enter the folders above."
    for p in (path, *path.parents):
        if p==top.parent: break
        p.chmod(p.stat().st_mode | 0o055)

def goes_on(folder):
    with RunLock(folder):
        log = Jsonl(folder/'metrics.jsonl')
        assert log.rows==1
        log.append(dict(step=1))
        assert load_checkpoint(folder)[0]==1
        save_checkpoint(folder, 2, dict(w=torch.ones(2)))

@needs_root
def test_a_colleague_goes_on_in_a_groups_folder(tmp_path):
    run = tmp_path/'group'/'run'
    run.parent.mkdir()
    os.chown(run.parent, -1, GROUP)
    run.parent.chmod(0o2775)
    in_child(write_all, run, 0o002)
    reachable(run.parent, Path(tmp_path.anchor)/tmp_path.parts[1])
    in_child(colleague, run, goes_on)
    assert load_checkpoint(run)[0]==2 and len(read_jsonl(run/'metrics.jsonl'))==2

def looks(folder):
    "A folder of somebody else, that may only be read: no lock is needed to look, and writing is a sentence."
    with RunLock(folder):
        assert read_json(folder/'config.json')=={} and load_checkpoint(folder)[0]==1
        assert lock_holder(folder) is None
    writes = (lambda: write_json(folder/'arm.json', {}), lambda: Jsonl(folder/'metrics.jsonl'), lambda: Jsonl(folder/'items.jsonl'),
              lambda: save_checkpoint(folder, 2, {}), lambda: RunLock(folder/'new').__enter__())
    for write in writes:
        with pytest.raises(UserError, match='was not written, since permission was denied: ask the owner'): write()

@needs_root
def test_a_colleague_may_look_where_he_may_not_write(tmp_path):
    in_child(write_all, tmp_path/'run', 0o022)
    reachable(tmp_path/'run', Path(tmp_path.anchor)/tmp_path.parts[1])
    in_child(colleague, tmp_path/'run', looks)

def is_refused(folder):
    for read in (lambda: read_json(folder/'config.json'), lambda: read_jsonl(folder/'metrics.jsonl'), lambda: load_checkpoint(folder),
                 lambda: load_state(folder/'checkpoints/step_000001'), lambda: lock_holder(folder)):
        with pytest.raises(UserError, match='was not read, since permission was denied: ask the owner'): read()

@needs_root
def test_a_folder_that_may_not_be_read_is_a_sentence(tmp_path):
    in_child(write_all, tmp_path/'run', 0o077)
    reachable(tmp_path, Path(tmp_path.anchor)/tmp_path.parts[1])
    for p in [tmp_path/'run', *(tmp_path/'run').rglob('*')]: p.chmod(0o755 if p.is_dir() else 0o600)
    in_child(colleague, tmp_path/'run', is_refused)

@needs_root
def test_a_read_only_disk_can_be_looked_at(tmp_path):
    disk = tmp_path/'disk'
    disk.mkdir()
    mounted = shutil.which('mount') and subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)], capture_output=True)
    if not mounted or mounted.returncode: pytest.skip('mounting a small tmpfs was refused')
    try:
        in_child(write_all, disk/'run', 0o022)
        subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
        with RunLock(disk/'run'): assert load_checkpoint(disk/'run')[0]==1
        for write in (lambda: write_json(disk/'run/arm.json', {}), lambda: Jsonl(disk/'run/items.jsonl'),
                      lambda: RunLock(disk/'new').__enter__()):
            with pytest.raises(UserError, match='since the file system is read-only: choose another run_dir'): write()
    finally: subprocess.run(['umount', '-l', str(disk)], check=True)


# ---- limits, and things of the wrong kind ----

def too_large(folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    log = Jsonl(folder/'metrics.jsonl')
    write_json(folder/'arm.json', dict(arm='rl'))
    with pytest.raises(UserError, match='metrics.jsonl was not written, since the file would be larger than is allowed: raise the limit'):
        while True: log.append(dict(step=log.rows, text='x'*700))
    assert len(read_jsonl(log.path))==log.rows > 20
    for write in (lambda: write_json(folder/'arm.json', 'x'*30_000), lambda: save_checkpoint(folder, 1, dict(w=torch.ones(10_000)))):
        with pytest.raises(UserError, match='since the file would be larger than is allowed'): write()
    assert read_json(folder/'arm.json')==dict(arm='rl')
    assert load_checkpoint(folder) is None

def too_many(folder):
    save_checkpoint(folder, 1, dict(w=torch.ones(3)))
    write_json(folder/'arm.json', dict(arm='rl'))
    soft = len(os.listdir('/proc/self/fd'))+200
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, soft))
    files = []
    try:
        while True: files.append(open('/dev/null'))
    except OSError: pass
    for use in (lambda: read_json(folder/'arm.json'), lambda: write_json(folder/'arm.json', {}), lambda: Jsonl(folder/'x.jsonl'),
                lambda: load_state(folder/'checkpoints/step_000001'), lambda: save_checkpoint(folder, 2, {}),
                lambda: RunLock(folder).__enter__()):
        with pytest.raises(UserError, match='since too many files are open: raise the limit'): use()
    for f in files: f.close()
    assert load_checkpoint(folder)[0]==1 and read_json(folder/'arm.json')==dict(arm='rl')

@pytest.mark.parametrize('limit', (too_large, too_many))
def test_a_limit_that_is_reached_is_a_sentence(tmp_path, limit): in_child(limit, tmp_path)

USES = dict(write=lambda p: write_json(p/'arm.json', {}), append=lambda p: Jsonl(p/'metrics.jsonl'),
            save=lambda p: save_checkpoint(p, 1, {}), lock=lambda p: RunLock(p).__enter__())
PLACES = dict(file='a file stands where a folder is wanted', long='its name is too long: choose a shorter run_dir')

@pytest.mark.parametrize('use', USES)
@pytest.mark.parametrize('kind', PLACES)
def test_a_place_that_cannot_be_a_run_folder_is_a_sentence(tmp_path, use, kind):
    place = tmp_path/('x'*300 if kind=='long' else 'run')
    if kind=='file': place.write_text('a file')
    with pytest.raises(UserError, match=PLACES[kind]): USES[use](place)
    assert kind=='long' or place.read_text()=='a file'

@pytest.mark.parametrize('use', (lambda p: read_json(p), lambda p: read_jsonl(p), lambda p: Jsonl(p), lambda p: write_json(p, {})))
def test_a_folder_where_a_file_is_wanted_is_a_sentence(tmp_path, use):
    (tmp_path/'arm.json').mkdir()
    with pytest.raises(UserError, match='a folder stands where a file is wanted'): use(tmp_path/'arm.json')

@pytest.mark.parametrize('error', (MemoryError(), OSError(errno.ENOMEM, 'Cannot allocate memory')))
def test_no_memory_is_a_sentence(tmp_path, monkeypatch, error):
    save_checkpoint(tmp_path, 1, dict(w=torch.ones(3)))
    def load_file(*args, **kw): raise error
    monkeypatch.setattr(store, 'load_file', load_file)
    with pytest.raises(UserError, match='was not read, since there is not enough memory'): load_checkpoint(tmp_path)

@pytest.mark.parametrize('code', sorted(errno.errorcode))
def test_every_error_of_the_operating_system_has_a_sentence(code):
    sentence = refusal(OSError(code, os.strerror(code)), 'run/arm.json')
    assert 'run/arm.json was not written' in sentence and sentence.endswith('.') and '\n' not in sentence

def test_errors_of_the_program_pass():
    for error in (KeyError('x'), ZeroDivisionError(), UserError('as it is.')):
        with pytest.raises(type(error)), os_errors('x'): raise error


# ---- JSON of another shape ----

SHAPES = {'[]': 'the whole is list, not dict', 'null': 'the whole is NoneType', '{}': 'a is missing', '{"a": {}}': 'a.b is missing',
          '{"a": []}': 'a is list, not dict', '{"a": {"b": true}}': 'a.b is bool, not int', '{"a": {"b": "1"}}': 'a.b is str, not int'}

@pytest.mark.parametrize('text,bad', SHAPES.items())
def test_valid_json_of_another_shape_is_refused_by_name(tmp_path, text, bad):
    needs = dict(a=dict(b=int))
    (tmp_path/'arm.json').write_text(text)
    with pytest.raises(UserError, match=f'arm.json is not what this version writes .{bad}'): read_json(tmp_path/'arm.json', needs)
    (tmp_path/'rows.jsonl').write_text('{"a": {"b": 1}}\n' + text + '\n')
    with pytest.raises(UserError, match=f'rows.jsonl is not what this version writes .line 2: {bad}'):
        read_jsonl(tmp_path/'rows.jsonl', needs)
    assert read_json(tmp_path/'arm.json', None)==json.loads(text)   # any shape

@pytest.mark.parametrize('text', (b'[' * 100_000, b'\xff\xfe{}', b'{"a": 1', b'\x00', b'{"a": 1} x'))
def test_what_is_not_json_is_refused_by_name(tmp_path, text):
    (tmp_path/'arm.json').write_bytes(text)
    with pytest.raises(UserError, match='arm.json is damaged'): read_json(tmp_path/'arm.json')


# ---- another locale ----

LOCALE = """
import sys; from exp2nb.store import Jsonl, read_json, read_jsonl, write_json
folder = sys.argv[1]
write_json(folder+'/arm.json', dict(name='Käuzchen → ½'))
log = Jsonl(folder+'/rows.jsonl'); log.append(dict(name='Käuzchen → ½'))
assert read_json(folder+'/arm.json')==read_jsonl(folder+'/rows.jsonl')[0]==dict(name='Käuzchen → ½')
"""

ASCII = dict(LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')

@pytest.mark.parametrize('settings', [ASCII, dict(PYTHONIOENCODING='latin-1'), dict(LC_ALL='C.UTF-8')])
def test_files_are_utf8_whatever_the_locale(tmp_path, settings):
    (tmp_path/'code.py').write_text(LOCALE, encoding='utf-8')
    env = {k:v for k,v in os.environ.items() if k not in ('LANG', 'LC_ALL', 'LC_CTYPE')} | settings
    env |= dict(PYTHONPATH=os.pathsep.join(sys.path))
    r = subprocess.run([sys.executable, str(tmp_path/'code.py'), str(tmp_path)], env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    assert json.loads((tmp_path/'arm.json').read_text(encoding='utf-8'))==dict(name='Käuzchen → ½')

def unsaid_encodings(path):
    "Lines of a module that open text without saying its encoding."
    import ast
    tree = ast.parse(path.read_text(encoding='utf-8'))
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = getattr(call.func, 'id', getattr(call.func, 'attr', ''))
        module = getattr(getattr(call.func, 'value', None), 'id', '')
        if name not in ('open', 'read_text', 'write_text') or module in ('os', 'Image', 'urllib', 'webbrowser', 'gzip'): continue
        words = [a.value for a in call.args if isinstance(a, ast.Constant)] + [k.value.value for k in call.keywords if k.arg=='mode']
        binary = name=='open' and any(isinstance(w, str) and 'b' in w and len(w) <= 3 for w in words)
        if not binary and not any(k.arg=='encoding' for k in call.keywords): yield f'{path.name}:{call.lineno}'

def test_every_text_file_is_opened_as_utf8():
    package = Path(store.__file__).parent
    found = [line for f in sorted(package.rglob('*.py')) for line in unsaid_encodings(f)]
    assert not found, found
