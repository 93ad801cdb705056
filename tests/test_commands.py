"Every command speaks one way: exit code 2 and one sentence for whatever cannot be right, in every option, for every kind of value."
import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
import pytest
import exp2nb.tools.status
from exp2nb.config import Flag, Number, Several, Text, UserError, Whole, Word
from exp2nb.store import RunLock
from exp2nb.tools.cli import REQUIRED, command, make_parser, parse
from exp2nb.tools.eval import exp2_eval
from exp2nb.tools.fetch import exp2_fetch
from exp2nb.tools.queue import exp2_queue
from exp2nb.tools.run import exp2_run
from exp2nb.tools.status import exp2_status, files_named, stop_writers

ROOT = Path(__file__).parent.parent
SCRIPTS = tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']['scripts']

def function(name):
    module, attribute = SCRIPTS[name].split(':')
    return getattr(importlib.import_module(module), attribute.removesuffix('.main'))

OURS = [name for name in SCRIPTS if SCRIPTS[name].endswith('.main')]
OPTIONS = [(name, o) for name in OURS for o in function(name).options.values()]

def one_sentence(code, captured, *words):
    assert code==2 and captured.out=='', captured
    err = captured.err
    assert err.startswith('error: ') and err.count('\n')==1 and err.endswith('.\n') and len(err) < 1000, err
    for w in words: assert w in err, err

def refused(kind)->list:
    "Words on a command line that a kind must refuse."
    if isinstance(kind, (Whole, Number)):
        low, high = kind.low, kind.high
        beyond = [f'{high*10:.0f}', f'{low-1:.0f}', '1e999', '9'*5000] + ([f'{low:g}'] if getattr(kind, 'above', False) else [])
        return ['', 'x', 'nan', 'inf', 'true', '1,5', '2%', '٣x', *beyond] + (['1.5'] if isinstance(kind, Whole) else [])
    if isinstance(kind, Word): return ['no such word', 'None', 'true']
    if isinstance(kind, Several): return ['', ',', 'a,,b', *(f'{w},' for w in refused(kind.kind)[:2])]
    return ['a\nb', 'a\0b'.replace('\0', '\x01'), '\udcff'] + (['no'] if kind.pattern else [])

def needed(name, but)->list:
    "What else a command must be given."
    return ['/nowhere' for o in function(name).options.values() if o.default is REQUIRED and o.name!=but]

@pytest.mark.parametrize('name,option', OPTIONS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_option_refuses_what_it_is_not(capsys, name, option):
    f = function(name)
    if isinstance(option.kind, Flag):
        one_sentence(f.main([*needed(name, ''), f'{option.flag}=maybe']), capsys.readouterr(), option.flag)
        return
    for word in refused(option.kind):
        args = [word, *needed(name, option.name)] if option.positional else [*needed(name, ''), f'{option.flag}={word}']
        if option.positional and word.startswith('-'): continue
        one_sentence(f.main(args), capsys.readouterr(), option.name.replace('_', '-') if not option.positional else option.name)

@pytest.mark.parametrize('name,option', OPTIONS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_option_takes_its_own_default(name, option):
    if option.default in (REQUIRED, None, '', ()) or isinstance(option.kind, Flag): return
    text = ','.join(map(str, option.default)) if isinstance(option.default, tuple) else str(option.default)
    parser = make_parser(name, '', {option.name: option})
    got, as_json = parse(parser, {option.name: option}, [option.flag, text, '--json'])
    assert got=={option.name: option.default} and type(got[option.name]) is type(option.default) and as_json

@pytest.mark.parametrize('name', OURS)
def test_help_names_every_option_with_dashes_and_json(capsys, name):
    f = function(name)
    with pytest.raises(SystemExit) as e: f.main(['--help'])
    text = capsys.readouterr().out
    assert e.value.code==0 and '--json' in text and name in text
    for o in f.options.values():
        assert o.flag in text and o.help and ('_' not in o.flag or o.positional), o
    assert not any(p.name not in f.options and p.name not in ('c', 'say') for p in parameters_of(f)), 'a parameter without a kind'

def parameters_of(f):
    import inspect
    return inspect.signature(f).parameters.values()

@pytest.mark.parametrize('name', OURS)
def test_unknown_missing_and_repeated_options(capsys, name):
    f, more = function(name), needed(name, '')
    one_sentence(f.main([*more, '--no-such-option']), capsys.readouterr(), '--no-such-option is not an option')
    valued = next((o for o in f.options.values() if not o.positional and isinstance(o.kind, (Whole, Number, Word, Text))), None)
    if valued:
        one_sentence(f.main([*more, valued.flag]), capsys.readouterr(), valued.flag)
        if isinstance(valued.kind, Text) and not valued.kind.pattern:
            one_sentence(f.main([*more, valued.flag, 'a', valued.flag, 'b']), capsys.readouterr(), 'given twice')
    if more: one_sentence(f.main([]), capsys.readouterr(), 'is missing')

def test_two_values_without_names_keep_their_places(capsys, tmp_path):
    arm, out, export = str(tmp_path/'arm'), str(tmp_path/'out'), function('exp2_export')
    one_sentence(export.main([arm, out]), capsys.readouterr(), arm)
    one_sentence(export.main([arm, out, 'more']), capsys.readouterr(), 'more is not an option')
    one_sentence(export.main([arm]), capsys.readouterr(), 'out is missing')

def test_the_table_is_long(): assert len(OPTIONS) > 120 and len(OURS) >= 10

# a whole queue is checked before its first arm

@pytest.mark.parametrize('args,word', [
    ('--budgets 0.5,2', '--budgets must be a number above 0 and at most 1'),
    ('--budgets 1,1', 'has 1.0 twice'),
    ('--sft-passes -1', '--sft-passes'),
    ('--sft-passes 1,nan', '--sft-passes'),
    ('--seeds 100000000000000000000', '--seeds'),
    ('--seeds 0', '--seeds'),
    ('--arms rl,r1', "arm 'r1' is not known"),
    ('--sft-passes 2 --changes sft.passes=3', 'same length of SFT'),
    ('--changes seed=4', 'parameter of its own'),
    ('--changes preset=d26', 'parameter of its own'),
    ('--changes eval.tasks=stories,mmul', 'mmul'),
    ('--changes eval.rows=0', 'eval.rows'),
    ('--changes nowhere.x=1', 'nowhere'),
    ('--device mps', '--device'),
    ('--changes model.depth=-1', 'model.depth'),
    ('--preset d13', 'choose one of smoke'),
    ('--base a --sft-checkpoint b', 'both given')])
def test_a_queue_is_checked_before_its_first_arm(capsys, tmp_path, args, word):
    for f in (exp2_run, exp2_queue):
        first = [] if '--preset' in args else ['--preset', 'smoke']
        one_sentence(f.main([*first, '--run-dir', str(tmp_path/'run'), *args.split()]), capsys.readouterr(), word)
    assert not list(tmp_path.iterdir())

def test_a_queue_is_json(capsys, tmp_path):
    assert exp2_queue.main(['--preset', 'smoke', '--run-dir', str(tmp_path/'my "run"'), '--seeds', '2', '--changes', 'rl.steps=2'])==0
    q = json.loads(capsys.readouterr().out)
    given = [r['parameters'] for r in q['runs']]
    arms = [('sft', 'model'), ('rl', 'model'), ('sft_plus', 'model'), ('sft_plus', 'executed')]   # of each seed, on its own SFT checkpoint
    assert [(p['seed'], p['arm'], p.get('match_on', 'model')) for p in given]==[(seed, *arm) for seed in (0, 1) for arm in arms]
    assert all(p['vary']=='sft' for p in given)
    assert all(p['run_dir']==q['run_dir']==str(tmp_path/'my "run"') and p['changes']=='rl.steps=2' for p in given)
    assert set(q['pieces']) >= {r['name'] for r in q['runs']} and q['minutes'] > 0

# what the operating system says

@pytest.mark.parametrize('number,why', [
    (errno.EROFS, 'read-only'), (errno.EACCES, 'permission is denied'), (errno.EFBIG, 'too large'),
    (errno.EMFILE, 'too many files'), (errno.ENAMETOOLONG, 'too long'), (errno.ENOTDIR, 'a file stands'),
    (errno.EISDIR, 'a folder stands'), (errno.ENOSPC, 'disk is full'), (errno.ENOMEM, 'no memory'),
    (errno.EIO, 'input/output')])
def test_errors_of_the_system_are_sentences(capsys, number, why):
    @command()
    def f(): raise OSError(number, os.strerror(number), '/some/where')
    one_sentence(f.main([]), capsys.readouterr(), '/some/where', why)

def test_no_memory_is_a_sentence(capsys):
    @command()
    def f(): raise MemoryError
    one_sentence(f.main([]), capsys.readouterr(), 'no memory')

@pytest.mark.parametrize('number,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_outside_a_training_loop_is_a_sentence(capsys, number, code):
    @command()
    def f(): os.kill(os.getpid(), number)
    assert f.main([])==code
    err = capsys.readouterr().err
    assert err.startswith('error: stopped by SIG') and err.count('\n')==1

def test_files_where_folders_are_wanted(capsys, tmp_path):
    (tmp_path/'file').write_text('x')
    run = ['--preset', 'smoke', '--arms', 'sft', '--run-dir', str(tmp_path/'file'/'run')]
    one_sentence(exp2_run.main(run), capsys.readouterr(), 'a file stands')
    one_sentence(exp2_status.main([str(tmp_path/'file')]), capsys.readouterr(), 'is not a folder')
    one_sentence(exp2_status.main(['x'*5000]), capsys.readouterr(), 'too long')
    one_sentence(exp2_fetch.main([]), capsys.readouterr(), 'nothing to fetch')

def test_an_output_that_cannot_be_written_is_found_first(capsys, tmp_path):
    bench = function('exp2_bench')
    for f,args in ((exp2_eval, ['--checkpoint', 'x', '--items']), (bench, ['--out']), (bench, ['--plot'])):
        one_sentence(f.main([*args, str(tmp_path/'nowhere'/'file')]), capsys.readouterr(), 'has no folder to lie in')

# status

def test_status_into_a_closed_pipe_is_silent(tmp_path):
    (tmp_path/'run'/'rl').mkdir(parents=True)
    (tmp_path/'run'/'rl'/'config.json').write_text('{}')
    code = 'import sys; from exp2nb.tools.status import exp2_status; sys.exit(exp2_status.main())'
    read, write = os.pipe()
    os.close(read)
    p = subprocess.Popen([sys.executable, '-c', code, tmp_path/'run'], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    _, err = p.communicate()
    assert p.returncode==141 and err==''

def test_stopping_another_user_s_run_is_a_sentence(monkeypatch, tmp_path):
    def forbidden(pid, number): raise PermissionError
    with RunLock(tmp_path/'rl'):
        monkeypatch.setattr(exp2nb.tools.status.os, 'kill', forbidden)
        with pytest.raises(UserError, match='belongs to another user'): stop_writers(tmp_path)

def test_a_folder_that_may_not_be_read_is_not_done(monkeypatch, capsys, tmp_path):
    "As another user: root may read everything, so the system's answer is made here."
    (tmp_path/'secret').mkdir()
    real = os.scandir
    def scandir(path='.'):
        if Path(path).name=='secret': raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(UserError, match='permission is denied'): files_named(tmp_path, 'config.json')
    one_sentence(exp2_status.main([str(tmp_path)]), capsys.readouterr(), 'secret', 'permission is denied')
