"""The order of the book: nothing imports a later notebook, the rooms come after it, and a code revision follows every import.

Each module's place is its notebook's number. The import graph is read from the syntax trees, so an import inside a function
counts as well."""
import ast, json, os, re, shutil, subprocess, sys
from pathlib import Path
import pytest
import exp2nb
from exp2nb.lab import APART, closure, code_of, imports_of, module_files

ROOT = Path(__file__).parent.parent
PACKAGE = Path(exp2nb.__file__).parent
FILES = module_files(PACKAGE)
ROOMS = ('fast', 'bases', 'sandbox', 'tools', 'appendix')
# what the book may take from a room: (module, what it imports), each in one line of one module
DOORS = {('lab', 'fast'), ('lab', 'bases.base'), ('lab', 'tools.tracker'), ('evaluate', 'sandbox'), ('evaluate', 'sandbox.sandbox')}

def room_of(module): return module.split('.')[0] if module.split('.')[0] in ROOMS else ''

def notebooks():
    "Exported notebooks: module → (its number, its code cells)."
    out = {}
    for path in (ROOT/'nbs').rglob('[0-9]*_*.ipynb'):
        cells = [''.join(c['source']) for c in json.loads(path.read_bytes())['cells'] if c['cell_type']=='code']
        names = re.findall(r'(?m)^#\| *default_exp (\S+)', '\n'.join(cells))
        if names: out[names[0]] = int(path.name.split('_')[0]), cells
    return out

BOOK = notebooks()
GRAPH = {m: imports_of(m, FILES) for m in FILES}

def wrong(module, imported)->str:
    "What is wrong with an import, or ''."
    here, there = room_of(module), room_of(imported)
    if imported in ROOMS and imported==here: return ''                     # a room's __init__
    if here==there and BOOK[imported][0] >= BOOK[module][0]: return 'a later notebook'
    if not here and there and (module, imported) not in DOORS: return f'the book takes from {there} only through {sorted(DOORS)}'
    if here in ('fast', 'sandbox') and there in ('bases', 'tools') and (module, imported) not in COMMANDS: return f'{here} needs no {there}'
    if here=='bases' and there in ('fast', 'sandbox'): return f'bases need no {there}'
    return ''

COMMANDS = {('fast.bench', 'tools.cli'), ('fast.busy', 'tools.cli'), ('fast.bench', 'bases.hub'), ('fast.bench', 'bases.nanochat'),
            ('fast.bench', 'tools.plan'), ('fast.whole', 'tools.cli'), ('bases.base', 'tools.cli')}   # a room's console script

def test_every_module_has_a_numbered_notebook():
    modules = {m for m in FILES if m and m not in ROOMS}
    assert modules==set(BOOK)

def test_no_two_notebooks_of_a_room_share_a_number():
    places = [(room_of(m), n) for m,(n,_) in BOOK.items()]
    assert len(places)==len(set(places))

def test_nothing_imports_a_later_notebook():
    bad = [f'{m} imports {i}: {why}' for m in BOOK for i in sorted(GRAPH[m]) if (why := wrong(m, i))]
    assert not bad, '\n'.join(bad)

def test_a_door_is_one_name():
    "`register` of fast, `load_base` of bases, `Tracker` of tools."
    tree = ast.parse(FILES['lab'].read_bytes())
    froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    taken = {n.module: [a.name for a in n.names] for n in froms if room_of(n.module)}
    assert taken=={'fast': ['register'], 'bases.base': ['load_base'], 'tools.tracker': ['Tracker']}

def test_the_rule_sees_what_it_must():
    "Imports that are there are fine; the same ones turned round are not."
    assert wrong('model', 'optim') and wrong('model', 'fast.gpu') and wrong('fast.gpu', 'tools.plan') and not wrong('optim', 'model')

def test_the_package_does_not_import_itself_by_name_at_run_time():
    "`import_module` with a name of this package would evade the graph."
    for m,path in FILES.items():
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Call) and getattr(node.func, 'attr', getattr(node.func, 'id', '')) in ('import_module', '__import__'):
                assert 'exp2nb' not in ast.unparse(node), f'{m}: {ast.unparse(node)}'

# the code revision

STAGES = (('tokenizer', 'mixture'), ('lab',), ('arms',))

@pytest.fixture
def package(tmp_path): return shutil.copytree(PACKAGE, tmp_path/'exp2nb', ignore=shutil.ignore_patterns('__pycache__'))

def revision(package, *roots): return code_of(*roots, package=package)

def add(package, module, text):
    path = module_files(package)[module]
    path.write_text(path.read_text(encoding='utf-8')+text, encoding='utf-8')

@pytest.mark.parametrize('roots', STAGES)
def test_a_copy_of_the_package_has_its_revision(package, roots): assert revision(package, *roots)==code_of(*roots)

def test_an_import_is_followed_wherever_it_stands(package):
    """At first two new modules belong to nothing. Then optim imports one inside a function, which imports the other:
    both determine base, SFT and arms."""
    (package/'aside.py').write_text('def f():\n    import exp2nb.further\n    return 1\n')
    (package/'further.py').write_text('x = 1\n')
    before = {r: revision(package, *r) for r in STAGES}
    assert before=={r: code_of(*r) for r in STAGES}
    add(package, 'optim', '\ndef g():\n    from .aside import f\n    return f()\n')
    assert {'aside', 'further'} <= set(closure('lab', package=package)) and 'aside' not in closure('tokenizer', 'mixture', package=package)
    with_import = {r: revision(package, *r) for r in STAGES}
    assert [with_import[r]==before[r] for r in STAGES]==[True, False, False]
    add(package, 'further', 'x = 2\n')
    assert [revision(package, *r)==with_import[r] for r in STAGES]==[True, False, False]

@pytest.mark.parametrize('module', sorted({m for r in STAGES for m in closure(*r)}))
def test_each_module_of_a_stage_counts_and_its_comments_do_not(package, module):
    roots = next(r for r in STAGES if module in closure(*r))
    add(package, module, '\n\n# Größe\n\n')
    assert revision(package, *roots)==code_of(*roots)
    add(package, module, '\nfurther = 1\n')
    assert revision(package, *roots)!=code_of(*roots)

def test_what_only_shows_a_run_does_not_count(package):
    before = {r: revision(package, *r) for r in STAGES}
    for m in FILES:
        if m.split('.')[0] in APART and m not in ROOMS: add(package, m, '\nfurther = 1\n')
    assert {r: revision(package, *r) for r in STAGES}==before

def test_what_is_left_out_of_a_revision_touches_no_weights():
    "Outside the tools themselves, one module takes from them: the lab, its tracker (and consoles, for commands)."
    users = {(m, i) for m in closure('arms') for i in GRAPH[m] if i.split('.')[0] in APART}
    assert users <= {('lab', 'tools.tracker'), *COMMANDS}

def test_the_locale_does_not_count():
    "Source files hold characters beyond ASCII; a cluster's jobs often run in the C locale."
    program = "import sys; from exp2nb.lab import code_of; print(code_of('arms'))"
    env = os.environ | dict(LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    out = subprocess.run([sys.executable, '-c', program], env=env, capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip()==code_of('arms')

def test_every_fast_module_with_an_operator_is_registered():
    "A module that `register` forgets costs nothing but its speed, which no other test would notice."
    mine = {m.split('.')[1] for m in BOOK if m.startswith('fast.') and any(re.search(r'(?m)^@faster\(', c) for c in BOOK[m][1])}
    source = (ROOT/'exp2nb/fast/__init__.py').read_text()
    imported = set(re.findall(r'\w+', re.search(r'from \. import (.*?)#', source)[1]))
    assert mine <= imported | {'loops'}, mine-imported
