"Every command speaks one way: exit code 2 and one sentence for whatever cannot be right, in every option, for every kind of value."
import errno
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
import pytest
import exp2nb.tools.cli
import exp2nb.tools.queue
import exp2nb.tools.run
import exp2nb.tools.status
from exp2nb.bases.base import export_model
from exp2nb.config import Flag, Number, Several, Text, UserError, Whole, Word, make_config
from exp2nb.lab import arm_folder
from exp2nb.store import RunLock, write_json
from exp2nb.tools.cli import REQUIRED, command, configure, make_parser, notebook_options, own_command, parse
from exp2nb.tools.eval import exp2_eval
from exp2nb.tools.fetch import exp2_fetch
from exp2nb.tools.queue import exp2_arm, exp2_queue, queue
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

def test_an_empty_name_is_a_missing_one(capsys, tmp_path):
    "Of every command: '' must not mean the working folder."
    for f in map(function, OURS):
        places = [o.name for o in f.options.values() if o.default is REQUIRED]
        for i,name in enumerate(places):
            words = [str(tmp_path)]*len(places)
            words[i] = ''
            one_sentence(f.main(words), capsys.readouterr(), f'{name} is missing')

def test_a_model_is_not_exported_over_the_working_folder():
    for folder in ('.', '..', '/'):
        with pytest.raises(UserError, match='is not empty: give a new folder'): export_model(SimpleNamespace(family='hub'), None, folder)

@pytest.mark.parametrize('name', OURS)
def test_help_says_defaults_as_they_are_typed(name, monkeypatch):
    monkeypatch.setenv('COLUMNS', '1000')
    f = function(name)
    lines = make_parser(name, '', f.options).format_help().splitlines()
    assert not any("('" in line or ',)' in line for line in lines)
    for o in f.options.values():
        line = next(l for l in lines if l.split()[:1]==[o.flag])
        if o.kind.__class__ is Several and o.default: assert f"(default: {','.join(map(str, o.default))})" in line
        assert not ('without it:' in o.help and 'default' in line), line

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

def test_data_that_are_not_there_are_missed_at_once(capsys, tmp_path, monkeypatch):
    "Also where a task is made here, and would never look for them."
    monkeypatch.setattr(exp2nb.tools.queue, 'launch', None)
    nowhere, run = str(tmp_path/'nowhere'), ['--preset', 'smoke', '--run-dir', str(tmp_path/'run')]
    for f in (exp2_run, exp2_arm, exp2_queue, function('exp2_tune')):
        one_sentence(f.main([*run, '--data-dir', nowhere]), capsys.readouterr(), f"{nowhere} is not a folder: name one in the Hub's layout")
    with pytest.raises(UserError, match='data_dir .* is not a folder'): configure(data_dir='x'*5000)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('launcher,words', [('"unbalanced', ('--launcher', 'no closing quotation')), ('  ', ('--launcher is blank',)),
                                            ('srun exp2_arm\\', ('no escaped character',))])
@pytest.mark.parametrize('more', [[], ['--dry-run']])
def test_a_launcher_is_read_before_anything_else(capsys, tmp_path, launcher, words, more):
    run = ['--preset', 'smoke', '--arms', 'sft', '--run-dir', str(tmp_path/'run'), '--launcher', launcher]
    one_sentence(exp2_run.main([*run, *more]), capsys.readouterr(), *words)
    assert not list(tmp_path.iterdir())

def test_no_more_processes_than_cores(monkeypatch):
    monkeypatch.setattr(exp2nb.tools.cli, 'usable_cores', lambda: 2)
    monkeypatch.setattr(exp2nb.tools.cli.torch.cuda, 'device_count', lambda: 0)
    kind = notebook_options()['processes'].kind
    assert [kind.read('processes', n) for n in (0, 1, 2)]==[0, 1, 2]
    with pytest.raises(UserError, match='^processes 3 is more than .* cores or GPUs: give at most 2.$'): kind.read('processes', 3)
    monkeypatch.setattr(exp2nb.tools.cli.torch.cuda, 'device_count', lambda: 8)
    assert kind.read('processes', 8)==8

def test_an_arm_starts_no_more_processes_than_cores(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(exp2nb.tools.cli, 'usable_cores', lambda: 2)
    monkeypatch.setattr(exp2nb.tools.cli.torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(exp2nb.tools.queue, 'launch', lambda c, processes: dict(arm='sft', seed=0, steps=processes))   # nothing is started
    run = ['--preset', 'smoke', '--run-dir', str(tmp_path), '--processes']
    one_sentence(exp2_arm.main([*run, '99']), capsys.readouterr(), '--processes 99 is more than', 'give at most 2')
    assert exp2_arm.main([*run, '2'])==0

# a study that is there

def test_a_seed_on_which_rates_were_tuned_is_not_of_the_study(capsys, tmp_path):
    write_json(tmp_path/'tuning/sft_plus/model-1.0/x0.5/seed1/trial.json', {})
    before = sorted(tmp_path.rglob('*'))
    run = ['--preset', 'smoke', '--run-dir', str(tmp_path), '--dry-run']
    one_sentence(exp2_run.main([*run, '--seeds', '2']), capsys.readouterr(), 'rates were tuned on seed 1', 'choose another run_dir')
    assert exp2_run.main(run)==0 and sorted(tmp_path.rglob('*'))==before

@pytest.mark.parametrize('end', ['config.json', 'trained.json', 'arm.json'])
@pytest.mark.parametrize('how', [[], ['--no-notebooks'], ['--only-seed', '0']])
def test_other_settings_than_those_of_the_run_are_refused_before_anything_is_written(capsys, tmp_path, monkeypatch, end, how):
    def began(*args): raise UserError('it began.')
    for name in ('run_notebook', 'launch', 'in_this_process'): monkeypatch.setattr(exp2nb.tools.run, name, began)
    for c in queue(make_config('smoke', run_dir=str(tmp_path))):
        for name in ('config.json', end): write_json(arm_folder(c)/name, asdict(c) | dict(dtype='float32'))
    plan = tmp_path/'plan.json'
    plan.write_text('{"pieces": {}}')
    run = ['--preset', 'smoke', '--run-dir', str(tmp_path), *how]
    one_sentence(exp2_run.main([*run, '--changes', 'rl.steps=9']), capsys.readouterr(), 'made with other settings: rl.steps (4 and 9)')
    assert plan.read_text()=='{"pieces": {}}' and not (tmp_path/'notebooks').exists()
    assert exp2_run.main(run)==2 and capsys.readouterr().err=='error: it began.\n'   # the same settings

def test_another_shell_finds_the_command_that_is_suggested(monkeypatch, tmp_path):
    bin = tmp_path/'my env'/'bin'
    bin.mkdir(parents=True)
    (bin/'exp2_status').touch(0o755)
    monkeypatch.setattr(sys, 'executable', str(bin/'python'))
    monkeypatch.setenv('PATH', str(bin))
    def said(prefix):
        monkeypatch.setattr(sys, 'prefix', prefix)
        return shlex.split(own_command('exp2_status', Path("it's/my run")))
    assert said(str(bin.parent))==[str(bin/'exp2_status'), "it's/my run"]      # a virtual environment is active in this shell alone
    assert said(sys.base_prefix)==['exp2_status', "it's/my run"]
    monkeypatch.setenv('PATH', '/nowhere')
    assert said(sys.base_prefix)==[str(bin/'exp2_status'), "it's/my run"]
    assert own_command('exp2_nothing')=='exp2_nothing'

def test_a_run_says_how_to_ask_for_its_status(monkeypatch, tmp_path):
    monkeypatch.setattr(exp2nb.tools.run, 'one_by_one', lambda *args: None)
    said = []
    exp2_run(make_config('smoke', run_dir=str(tmp_path/'my run')), arms=('sft',), say=said.append)
    assert f"exp2_status '{tmp_path}/my run' says how far" in said[-1], said

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

def test_busy_looks_for_its_folder_before_it_measures(capsys, tmp_path, monkeypatch):
    import exp2nb.fast.busy
    monkeypatch.setattr(exp2nb.fast.busy, 'stages', None)
    one_sentence(function('exp2_busy').main(['--out', str(tmp_path/'nowhere'/'file')]), capsys.readouterr(), 'has no folder to lie in')
    monkeypatch.setenv('HOME', str(tmp_path))
    one_sentence(function('exp2_busy').main(['--out', '~/nowhere/file']), capsys.readouterr(), f'{tmp_path}/nowhere/file has no folder')

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

RUN = dict(name='a', makes=['a'], after='')
ODD_PLANS = [
    (dict(pieces={}, jobs=2), 'runs cannot go 2'), (dict(pieces=dict(x='a')), 'pieces.x is str'),
    (dict(pieces={}, jobs='x'), 'jobs is str'),
    (dict(pieces={}, jobs=2, runs=5), 'runs'), (dict(pieces={}, jobs=2, runs=['a']), 'runs'), (dict(pieces={}, jobs=0, runs=[RUN]), 'runs'),
    (dict(pieces={}, jobs=2, runs=[RUN | dict(after='a')]), 'runs'), (dict(pieces={}, jobs=2, runs=[RUN | dict(makes=[[]])]), 'runs'),
    (dict(pieces={}, jobs=-1), 'out of range'), (dict(pieces=dict(x=10**400)), 'out of range'), (dict(pieces=[]), 'pieces is list'),
    ([], 'is list')]

@pytest.mark.parametrize('plan,word', ODD_PLANS)
def test_an_odd_plan_is_one_sentence(capsys, tmp_path, plan, word):
    (tmp_path/'plan.json').write_text(json.dumps(plan))
    one_sentence(exp2_status.main([str(tmp_path)]), capsys.readouterr(), f'{tmp_path}/plan.json', word)

ODD_ROWS = [({}, 'seconds is missing'), (dict(seconds='x'), 'seconds is str'), (dict(seconds=float('nan')), 'out of range'),
            (dict(seconds=1., fraction=1e-320), 'out of range'), (dict(seconds=1., step=10**400), 'out of range')]

@pytest.mark.parametrize('row,word', ODD_ROWS)
def test_odd_metrics_are_one_sentence(capsys, tmp_path, row, word):
    log = tmp_path/'rl'/'metrics.jsonl'
    write_json(log.with_name('config.json'), {})
    log.write_text(json.dumps(dict(step=-1, fraction=0.))+'\n' + json.dumps(dict(step=0, fraction=.1) | row)+'\n')
    one_sentence(exp2_status.main([str(tmp_path)]), capsys.readouterr(), str(log), word)

def test_a_word_list_of_one_s_own_stays_where_the_network_fails(tmp_path, monkeypatch):
    from exp2nb.tools import fetch
    own = tmp_path/'words'/'words_alpha.txt'
    own.parent.mkdir()
    own.write_text('one\ntwo\n')
    def down(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(fetch.urllib.request, 'urlopen', down)
    assert 'could not be fetched' in fetch.get_words(tmp_path) and own.read_text()=='one\ntwo\n'
