"""What a newcomer meets first holds.

README says what the record says, every link leads somewhere, nbdev leaves README alone, the workflows are sound."""
import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text(encoding='utf-8')
NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
PAGES = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', ROOT/'CHANGELOG.md', *(ROOT/'records').rglob('*.md'), *NOTEBOOKS]
ENV = {**os.environ, 'PATH': f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

def prose(path):
    "A page's text; of a notebook, its Markdown cells."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return text
    return '\n\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type']=='markdown')

def links(path):
    "Where a page's relative links lead, code left out."
    text = re.sub(r'```.*?```|`[^`\n]*`', '', prose(path), flags=re.S)
    found = re.findall(r'\]\(([^)\s]+)\)', text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    return [to for to in found if not re.match(r'[a-z]+:|#|data:', to)]

def in_points(x): return f'{100*x:.1f}'.replace('-', '−')

# README

def test_readme_is_short_and_leads_on():
    assert len(README.encode()) <= 6*1024
    for name in ('16_grpo', '11_ledger', '09_flops', '20_stats', '19_arms'):
        assert f'](nbs/{name}.ipynb)' in README

def test_readme_and_index_ask_the_same_question():
    title, question = README.split('\n\n')[:2]
    asked = question.replace('**', '').replace('\n', ' ')
    index = prose(ROOT/'nbs/index.ipynb')
    assert title in index and asked in index

def test_readme_says_what_the_record_says():
    result = json.loads((ROOT/'records/embedded/study/result.json').read_text(encoding='utf-8'))
    verdict, arms = result['verdict'], {arm: {t: row['mean'] for t,row in tasks.items()} for arm,tasks in result['arms'].items()}
    assert verdict['code']=='rl_worse' and result['seeds']==list(range(10)) and verdict['scope']=='methods'
    by_basis = verdict['by_basis']
    for page in (README, (ROOT/'records/embedded/study/README.md').read_text(encoding='utf-8')):
        assert f"{in_points(abs(verdict['difference']))} points below extra SFT" in page
        assert f"{in_points(abs(by_basis['executed']['difference']))} " in page
        for basis in ('model', 'executed'): assert ' to '.join(map(in_points, by_basis[basis]['interval'])) in page
        for arm in ('rl', 'sft_plus'): assert in_points(arms[arm]['stories']-arms['sft']['stories']) in page
        for arm in ('sft', 'sft_plus'): assert in_points(arms[arm]['spellingbee']) in page
        assert f"{in_points(arms['sft']['stories'])} %" in page
    after = json.loads((ROOT/'records/embedded/study/rl_rates.json').read_text(encoding='utf-8'))['rows']
    billed, executed = (next(x for x in after if (x['arm'], x['match_on'])==('sft_plus', basis)) for basis in ('model', 'executed'))
    first = json.loads((ROOT/'records/embedded/study/first_form.json').read_text(encoding='utf-8'))['verdict']['by_basis']['executed']
    text = ' '.join(README.split())
    assert f"{in_points(executed['difference'])} ({in_points(executed['low'])} to +{in_points(executed['high'])})" in text
    assert f"(billed: {in_points(billed['difference'])}), but +{in_points(first['difference'])} with extra SFT" in text

def test_the_studys_tables_are_those_of_its_files():
    path = ROOT/'records/embedded/tables.py'
    spec = importlib.util.spec_from_file_location('tables', path)
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = (path.parent/'study/README.md').read_text(encoding='utf-8')
    assert tables.into(text, tables.of_folder(path.parent/'study'))==text and '### Each seed' in text

def test_readme_shows_every_preset():
    from exp2nb.config import PRESETS
    for name in PRESETS: assert f'| `{name}` |' in README

# The registered plan

def commands_of_the_plan():
    text = (ROOT/'records/embedded/PLAN.md').read_text(encoding='utf-8')
    return [shlex.split(line) for line in re.findall(r'^(?:exp2|papermill).*$', text, re.M)]

def test_the_plans_commands_are_the_ones_that_exist():
    "Their options are read, and what they queue is what the page promises: no arm twice, ten seeds of what decides, all held from test."
    from exp2nb.arms import ARMS
    from exp2nb.lab import arm_folder
    from exp2nb.tools.cli import collected, make_parser, parse
    from exp2nb.tools.queue import queue
    from exp2nb.tools.run import exp2_run
    from exp2nb.tools.tune import exp2_tune
    found, tuned = [], []
    for name,*argv in commands_of_the_plan():
        if name=='papermill': continue
        f = dict(exp2_run=exp2_run, exp2_tune=exp2_tune)[name]
        given, _ = parse(make_parser(name, '', f.options), f.options, [re.sub(r'\$[A-Z]+', 'rft.rates.matrix=0.04', a) for a in argv])
        given = collected(f, given)
        if f is exp2_tune: tuned.append(given)
        else:
            runs = queue(given['c'], **{k:v for k,v in given.items() if k in inspect.signature(queue).parameters and k!='c'})
            assert all(c.train_only and c.vary=='sft' and c.rft.rates.matrix==.04 for c in runs)
            assert given['jobs']==1 or all(c.match_on!='seconds' for c in runs)
            found += [str(arm_folder(c).relative_to('out')) for c in runs]
    assert len(found)==len(set(found))
    seeds = {}
    for f in (f for f in found if f.startswith('study/') and '-1.0/' in f and f.count('/')==3):
        _, arm, basis, seed = f.split('/')
        seeds.setdefault(f"{arm}/{basis.removesuffix('-1.0')}", []).append(int(seed[4:]))
    names = ('sft', 'rl', 'sft_plus', 'rft', 'sft_mix', 'rft_online', 'positives', 'sft50_rl50')
    ten = {f'{a}/model' for a in names} | {'sft_plus/executed'}
    assert set(seeds)-ten=={f'{a}/model' for a in ARMS}-ten
    assert all(of==list(range(10 if name in ten else 3)) for name,of in seeds.items())
    whole, shorter = tuned[:3], tuned[3:]
    assert [t['tuning_seeds'] for t in tuned]==[(1000,), (1001,), (1000, 1001), *2*[(1000,), (1001,)]]
    assert [t['grow'] for t in tuned]==[0, 0, 3, *4*[0]] and all(t['vary']=='sft' for t in tuned)
    for t in whole:
        assert set(t['arms'])=={'rl', 'sft_plus', 'rft', 'sft_mix', 'rft_online', 'positives'}
        assert (t['factors'], t['c'].budget)==((.5, 1., 2., 4.), 1.)
    assert all(t['arms']==('rl', 'sft_plus') and t['factors']==(.125, .25, .5, 1., 2.) for t in shorter)
    assert [t['c'].budget for t in shorter]==[.5, .5, .25, .25]

# Links

@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    gone = [to for to in links(page) if not (page.parent/to.partition('#')[0]).exists()]
    assert not gone, f'{page.relative_to(ROOT)} links to {gone}'

@pytest.mark.parametrize('page', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_whoever_names_a_notebook_links_it(page):
    "'see the protocol notebook' is a link; headings and the claim, which is the module's docstring, may name one without."
    text = re.sub(r'^(?:#|>).*$', '', prose(page), flags=re.M)
    text = re.sub(r'\[[^\]]*\]\([^)]*\)', '', text)
    named = {'next', 'previous', *(n for p in NOTEBOOKS for n in (p.stem, re.sub(r'^\d+_', '', p.stem)))}
    bare = [m[0] for m in re.finditer(r'\b[Tt]he (\w+)\s+notebook\b', text) if m[1].lower() in named|{'run', 'statistics', 'evaluation'}]
    assert not bare, f'{page.relative_to(ROOT)} names without a link: {bare}'

def test_the_index_lists_every_notebook():
    listed = {(ROOT/'nbs'/to).resolve() for to in links(ROOT/'nbs/index.ipynb')}
    assert not [str(p.relative_to(ROOT)) for p in NOTEBOOKS if p.resolve() not in listed and p.name!='index.ipynb']

def test_the_index_lists_every_command():
    index, project = prose(ROOT/'nbs/index.ipynb'), tomllib.loads((ROOT/'pyproject.toml').read_text(encoding='utf-8'))['project']
    assert not [name for name in project['scripts'] if f'`{name}' not in index]

@pytest.mark.parametrize('page', NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT)))
def test_stored_outputs_tell_nothing_of_the_machine(page):
    "Warnings of libraries that name the folder in which they are installed."
    for cell in json.loads(page.read_text(encoding='utf-8'))['cells']:
        text = json.dumps(cell.get('outputs', []))
        assert not re.search(r'/site-packages/|/home/\w+/', text), ''.join(cell['source'])[:200]

def test_the_picture_of_a_step_names_real_modules():
    picture = (ROOT/'nbs/images/rl_step.svg').read_text(encoding='utf-8')
    names = {n for text in re.findall(r'class="module">([^<]+)<', picture) for n in text.split(', ')}
    assert len(names) > 8
    linked = ' '.join(links(ROOT/'nbs/16_grpo.ipynb'))
    for n in names - {'grpo'}:
        assert (ROOT/f'exp2nb/{n}.py').exists() and f'_{n}.ipynb' in linked, n

# nbdev and the web page

def test_nbdev_leaves_readme_alone(tmp_path):
    "nbdev_prepare and nbdev_docs call nbdev_readme, which replaces README.md where index.ipynb is newer and Quarto is installed."
    pytest.importorskip('nbdev', reason='nbdev is not installed: pip install -e .[dev]')
    for name in ('settings.ini', 'README.md', 'pyproject.toml'): shutil.copy(ROOT/name, tmp_path)
    for name in ('nbs', 'exp2nb'): (tmp_path/name).mkdir()
    shutil.copy(ROOT/'nbs/index.ipynb', tmp_path/'nbs')
    os.utime(tmp_path/'README.md', (0, 0))
    quarto = tmp_path/'bin/quarto'
    quarto.parent.mkdir()
    quarto.write_text(f'#!/bin/sh\ntouch {tmp_path}/quarto-was-called\n', encoding='utf-8')
    quarto.chmod(0o755)
    code = 'from nbdev.quarto import nbdev_readme, refresh_quarto_yml; refresh_quarto_yml(); nbdev_readme.__wrapped__(chk_time=True)'
    env = {**ENV, 'PATH': f"{quarto.parent}:{ENV['PATH']}"}
    r = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert r.returncode==0, r.stderr
    assert not (tmp_path/'quarto-was-called').exists()
    assert (tmp_path/'README.md').read_text(encoding='utf-8') == README

def test_no_invented_addresses():
    for name in ('settings.ini', 'pyproject.toml', 'CITATION.cff', 'exp2nb/_modidx.py'):
        assert not re.search(r'example\.(org|com)|github\.com/exp2nb|github\.io', (ROOT/name).read_text(encoding='utf-8')), name

def test_citation():
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed: pip install pyyaml')
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text(encoding='utf-8'))
    settings = dict(re.findall(r'^(\w+) = (.+)$', (ROOT/'settings.ini').read_text(encoding='utf-8'), re.M))
    assert {'cff-version', 'message', 'title', 'authors'} <= set(cff)
    assert cff['authors'] == [dict(name=settings['author'])] and cff['version'] == settings['version']

def test_the_book_builds(tmp_path):
    "Sphinx turns any broken link between pages into an error (-W)."
    pytest.importorskip('sphinx_book_theme', reason='Sphinx is not installed: pip install -e .[book], or bash runs/book.sh')
    env = ENV | {'EXP2_ENV': 'active'}
    r = subprocess.run(['bash', ROOT/'runs/book.sh', tmp_path], env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode==0, r.stderr
    page = (tmp_path/'nbs/16_grpo.html').read_text(encoding='utf-8')
    assert 'rl_step.svg' in page and '#| export' not in page and (tmp_path/'index.html').exists()

# Workflows: nothing here runs them

WORKFLOWS = sorted((ROOT/'.github/workflows').glob('*.yml'))

LINTERS = [['check-jsonschema', '--builtin-schema', 'vendor.github-workflows'], ['zizmor', '--offline', '--no-progress'], ['actionlint']]

@pytest.mark.parametrize('linter', LINTERS, ids=lambda x: x[0])
def test_workflows_are_sound(linter):
    if not shutil.which(linter[0], path=ENV['PATH']):
        pytest.skip(f'{linter[0]} is not installed: pip install -e .[dev] has check-jsonschema and zizmor')
    r = subprocess.run([*linter, *WORKFLOWS], cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=120)
    assert r.returncode==0, r.stdout + r.stderr

def test_workflows_run_what_is_there():
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed: pip install pyyaml')
    assert [p.stem for p in WORKFLOWS] == ['book', 'test']
    for path in WORKFLOWS:
        for job in yaml.safe_load(path.read_text(encoding='utf-8'))['jobs'].values():
            for step in job['steps']:
                for script in re.findall(r'bash (\S+)', step.get('run', '')): assert (ROOT/script).exists(), script
