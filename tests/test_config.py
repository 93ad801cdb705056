"A parameter is written once: its range holds for every kind of value, and what the notebook and the commands offer is made from it."
import ast
import json
import math
import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
import pytest
import exp2nb
from papermill import inspect_notebook
from exp2nb.config import PRESETS, Config, Flag, Number, Rates, Several, Text, UserError, Whole, Word, checked, make_config, override
from exp2nb.tools.cli import configure, notebook_config, notebook_options, parameters_cell, run_options
from exp2nb.lab import Lab
from exp2nb.tools.plan import plan
from exp2nb.tools.queue import leaves, parameters, queue

ROOT = Path(__file__).parent.parent
PACKAGE = Path(exp2nb.__file__).parent

def kinds(section, path='')->dict:
    "Dotted name → kind of every field."
    out = {}
    for f in fields(section):
        out |= kinds(getattr(section, f.name), f'{path}{f.name}.') if is_dataclass(f.type) else {path+f.name: f.type}
    return out

SMOKE = make_config('smoke')
KINDS = {k:v for k,v in kinds(SMOKE).items() if k!='preset'}

def outside(kind)->list:
    "Values that a kind must refuse, as Python, YAML and a shell can bring them."
    never = [None, [], {}, [1, 2], b'x', object()]
    if isinstance(kind, (Whole, Number)):
        low, high = kind.low, kind.high
        numbers = [low-1, high*2+1, math.inf, -math.inf, math.nan, 10**400, True, False]
        words = ['', 'x', 'nan', 'inf', '-inf', '1e999', 'true', '1,5', '2%', '0x10', str(low-1), '9'*5000]
        more = [1.5, '1.5'] if isinstance(kind, Whole) else [low] if kind.above else []
        return never + numbers + words + more
    if isinstance(kind, Word): return never + ['no such word', 1, 1.5, True, ' '.join(kind.choices)]
    if isinstance(kind, Flag): return never + [0, 1, 1.0, '', '1', 'yes', 'on', math.nan]
    if isinstance(kind, Several): return [None, {}, [], '', ',', 'a,,b', 'a,a', True, math.nan, [1], [None]]
    return never + [7, 1.5, True, math.nan, 'a\nb', 'a\0b', '\udcff'] + (['', 'LX', 'l'] if kind.pattern else [])

TABLE = [(name, value) for name,kind in KINDS.items() for value in outside(kind)]

@pytest.mark.parametrize('name', KINDS)
def test_a_value_that_is_none_is_one_sentence(name):
    for value in outside(KINDS[name]):
        try: got = override(SMOKE, {name: value})
        except UserError as e: assert name in str(e) and '\n' not in str(e) and str(e).endswith('.') and len(str(e)) < 400, e
        else: pytest.fail(f'{name}={value!r} was taken as {leaves(got)[name]!r}')

def test_brackets_around_a_list_are_no_part_of_its_values():
    assert Several(Text()).read('x', '[a, b]')==('a', 'b') and Several(Text()).read('x', '["a", "b [2]"]')==('a', 'b [2]')
    assert Several(Text()).read('x', 'run [v2]')==('run [v2]',) and Several(Text(), least=0).read('x', '[]')==()

def test_the_table_is_long(): assert len(TABLE) > 1000 and {type(k) for k in KINDS.values()}=={Whole, Number, Word, Flag, Several, Text}

@pytest.mark.parametrize('name', KINDS)
def test_a_default_is_in_its_own_range_however_it_is_written(name):
    value, kind = leaves(SMOKE)[name], KINDS[name]
    written = {value, str(value)} if not isinstance(value, tuple) else {value, ','.join(value)}
    if isinstance(kind, Whole): written |= {float(value), f'{value}.0'}
    for v in written:
        got = kind.read(name, v)
        assert got==value and type(got) is type(value)

def test_every_field_has_a_kind_and_every_parameter_a_help():
    assert all(hasattr(k, 'read') for k in KINDS.values())
    for o in run_options().values(): assert o.help and len(o.help) < 120, o

@pytest.mark.parametrize('preset', PRESETS)
def test_reading_a_preset_changes_nothing(preset):
    c = make_config(preset)
    written = Config(**{**PRESETS[preset], 'preset':preset})
    assert checked(c)==c and json.dumps(leaves(c))==json.dumps(leaves(written))

@pytest.mark.parametrize('change,word', [
    ('model.depth=-1', 'model.depth'), ('model.aspect=33', 'multiple of model.head_dim'), ('model.kv_groups=3', 'model.kv_groups'),
    ('rl.max_new=256', 'no room for a prompt'), ('eval.max_new=9999', 'no room for a prompt'), ('eval.max_items=5', 'n_test alone'),
    ('sft.passes=0', 'sft.passes'), ('eval.top_k=-5', 'eval.top_k'), ('eval.tasks=stories,mmul', 'mmul'),
    ('model.pattern=SXL', 'letters L and S')])
def test_what_would_only_fail_later_is_found_at_once(change, word):
    with pytest.raises(UserError) as e: configure(preset='smoke', changes=change)
    assert word in str(e.value)

# changes

@pytest.mark.parametrize('name', [n for n in run_options() if n!='changes'])
def test_what_has_an_option_of_its_own_is_not_changed_behind_it(name):
    with pytest.raises(UserError, match='is a parameter of its own'): override(SMOKE, f'{name}=4')

@pytest.mark.parametrize('changes,word', [
    ('rl.steps=2 rl.steps=3', 'changed twice'), ('rl.stepz=2', "'stepz' is not known"), ('nowhere.x=2', "'nowhere' is not known"),
    ('rl=2', 'group of settings'), ('rl.rates=2', 'group of settings'), ('rl.steps.x=2', 'too deep'), ('rl.steps', 'is not a change'),
    ('=2', 'is not a change'), ('rl.=2', 'is not known'), ('.steps=2', 'is not known'), ('rl.steps=', 'rl.steps must be')])
def test_a_change_that_says_nothing_is_one_sentence(changes, word):
    with pytest.raises(UserError) as e: override(SMOKE, changes)
    assert word in str(e.value) and '\n' not in str(e.value)

def test_sft_passes_have_one_place():
    with pytest.raises(UserError, match='same length of SFT'): override(make_config('smoke', sft_passes=2), 'sft.passes=3')
    with pytest.raises(UserError, match='same length of SFT'): queue(override(SMOKE, 'sft.passes=3'), ['rl'], sft_passes=(1., 2.))

# what is made from it

def cell():
    cells = json.loads((ROOT/'nbs'/'run_arm.ipynb').read_text(encoding='utf-8'))['cells']
    return next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))

def test_the_notebook_s_parameters_cell_is_made_from_config():
    assert ''.join(cell()['source'])==parameters_cell(), 'print(exp2nb.tools.cli.parameters_cell()) is what the cell must say'

def test_papermill_reads_every_line_of_the_cell(caplog):
    found = {p['name'] for p in inspect_notebook(str(ROOT/'nbs'/'run_arm.ipynb')).values()}
    assert found==set(notebook_options()) and 'Unable to parse' not in caplog.text

def test_the_cell_s_defaults_are_a_preset_s():
    given = {}
    exec(''.join(cell()['source']), given)
    c, processes = notebook_config(given, {'__builtins__'})
    assert (replace(c, run_dir=''), processes)==(make_config('tiny'), 0)

@pytest.mark.parametrize('given,preset', [({}, 'tiny'), (dict(base='org/model'), 'open'), (dict(sft_checkpoint='org/model'), 'open'),
    (dict(base='org/model', preset='d12'), 'd12'), (dict(base='./nowhere'), 'tiny'), (dict(base='nano/base_checkpoints/d2'), 'tiny')])
def test_the_preset_follows_from_the_base_where_none_is_named(given, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'nano'/'base_checkpoints'/'d2').mkdir(parents=True)
    (tmp_path/'nano'/'base_checkpoints'/'d2'/'model_000001.pt').touch()
    assert configure(**given).preset==preset

def test_a_corpus_without_text_needs_a_base():
    with pytest.raises(UserError, match='give a base'): Lab(make_config('open'))

def test_rates_of_a_width_are_scaled_and_those_without_are_left():
    rates = PRESETS['open']['sft'].rates
    assert rates.of_width(384).matrix==2*rates.matrix and rates.times(.5).optimizer=='adamw'
    assert Rates().of_width(384) is not None and Rates().of_width(384)==Rates()

def test_a_run_is_described_by_what_the_notebook_takes():
    "The queue's parameters lead the notebook to the same configuration."
    shared = override(make_config('smoke', dev=8, run_dir='out/x'), 'rl.steps=2 eval.n_samples=0')
    for c in queue(shared, ['rl', 'sft_plus'], 2, (.5, 1.), (0., 2.)):
        given = {o.name: o.default for o in notebook_options().values()} | json.loads(json.dumps(parameters(c)))
        assert notebook_config(given, ())[0]==c

PAPERMILL = ['2026', '7', '1e2', '16.0', '0.5', '2%', 'mps', 'cuda', 'true', 'yes', 'None', 'null', 'nan', 'inf', '-1', '007', '1_000',
             '[1]', '~', '']

@pytest.mark.parametrize('name', notebook_options())
def test_papermill_s_types_are_right_or_one_sentence(name):
    from papermill.cli import _resolve_type
    base = {o.name: o.default for o in notebook_options().values()}
    kind = notebook_options()[name].kind
    for text in PAPERMILL:
        for value in (_resolve_type(text), text):   # -p, -r
            try: c, processes = notebook_config(base | {name: value}, ())
            except UserError as e:
                assert '\n' not in str(e) and str(e).endswith('.')
                continue
            if value is None or name=='changes' or value=='': continue
            got = processes if name=='processes' else getattr(c, name)
            if isinstance(kind, Flag): assert got==(text=='true')
            elif isinstance(kind, (Whole, Number)): assert got==float(text)
            else: assert isinstance(value, str) and got==(os.path.expanduser(text) if getattr(kind, 'path', False) else text)

@pytest.mark.parametrize('name,value,got', [
    ('n_train', 1e2, 100), ('dev', 16.0, 16), ('budget', '0.5', .5), ('seed', '3', 3), ('run_dir', '~/x', os.path.expanduser('~/x'))])
def test_what_papermill_makes_of_numbers(name, value, got): assert getattr(configure(preset='smoke', **{name: value}), name)==got

@pytest.mark.parametrize('given,word', [(dict(run_dir=2026), 'run_dir must be text'), (dict(base=7), 'base must be text'),
                                        (dict(device='mps'), "device 'mps'"), (dict(arm=['rl']), 'arm'),
                                        (dict(preset=12), 'preset 12'), (dict(task=True), 'task must be text')])
def test_what_is_no_text_is_refused(given, word):
    with pytest.raises(UserError) as e: configure(**given)
    assert word in str(e.value)

def analysis_cells():
    cells = json.loads((ROOT/'nbs'/'analysis.ipynb').read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type']=='code']

@pytest.mark.parametrize('name,value,got', [
    ('seeds', 1, (1,)), ('seeds', '0,1', (0, 1)), ('arms', 'sft,rl', ('sft', 'rl')), ('arms', ['sft'], ('sft',)), ('run_dirs', 'a', ('a',)),
    ('margin', '0.03', .03), ('run_dirs', ['~/a'], (os.path.expanduser('~/a'),)), ('budget', 1, 1.),
    ('out', '', None), ('margin', None, None), ('margin', '2%', 'margin must be'), ('run_dirs', 2026, 'run_dirs must be text'),
    ('seeds', 1.5, 'seeds must be'),
    ('seeds', True, 'seeds must be'),
    ('arms', 7, 'arms must be'), ('tolerance', float('nan'), 'tolerance must be'), ('budget', -1, 'budget must be'),
    ('marign', .01, "'marign' is not known")])
def test_the_analysis_notebook_takes_what_papermill_brings(name, value, got):
    "Its first cells, as they are, with one parameter injected; None: left to the analysis."
    imports, parameters, read = analysis_cells()[:3]
    space = {}
    exec(imports, space)
    exec(parameters, space)
    space[name] = value
    if isinstance(got, str):
        with pytest.raises(UserError, match=got): exec(read, space)
    else:
        exec(read, space)
        assert space['given'].get(name)==got

# presets are data

def test_no_code_asks_for_a_preset_s_name():
    bad = []
    for path in PACKAGE.rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(node, ast.Compare): continue
            named = [n for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in PRESETS]
            bad += [f'{path.name}:{node.lineno}: {ast.unparse(node)}' for _ in named[:1]]
    assert not bad

def test_a_preset_of_one_s_own_is_a_row(monkeypatch):
    monkeypatch.setitem(PRESETS, 'mine', PRESETS['smoke'] | dict(dev=16))
    c = configure(preset='mine')
    assert (c.embedded, c.task, c.dev)==(True, 'stories', 16) and plan(c)['device']=='cpu'
    assert make_config('mine', 'gsm8k').model.context==768
