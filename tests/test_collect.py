"""What the notebook of pieces does not show: drawn ways to divide a run, an interruption at every file, trials of two machines."""
import itertools
import os
import shlex
from pathlib import Path
from random import Random
import pytest
from fakes import fake_arm, fake_run, seal
from exp2nb.config import UserError
from exp2nb.report import analyse
from exp2nb.results import summarise
from exp2nb.store import read_json, read_jsonl, write_json
from exp2nb.tools import collect
from exp2nb.tools.collect import collect_pieces, collected_text, pack_run, units_in

def study(folder, seeds=3, **kw):
    "A made-up run in which every seed has an SFT checkpoint of its own."
    for s in range(seeds):
        one = dict(items=40, samples=2, steps=8, vary='sft', sft_sha256=f'{s:064x}', weights_sha256=f'{100+s:064x}') | kw
        fake_arm(folder, 'sft', s, **one)
        fake_arm(folder, 'rl', s, gain=.05, **one)
        for basis in ('model', 'executed'): fake_arm(folder, 'sft_plus', s, basis, gain=.1, **one)
    return Path(folder)

def packed(run, to):
    "A piece for each seed."
    return [pack_run(run, to/f'seed{s}.tar.xz', s)['file'] for s in range(3)]

def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

def test_pieces_in_any_order_are_the_run_and_its_report(tmp_path):
    run = study(tmp_path/'a/run')
    pieces = packed(run, tmp_path)
    analyse(str(run))
    report = (run/'report/result.json').read_bytes()
    for i,order in enumerate(itertools.permutations(pieces)):
        again = tmp_path/f'{i}/run'
        for some in (order[:1], order[1:]): collect_pieces(some, again)   # on two days
        assert files(again)=={n: b for n,b in files(run).items() if not n.startswith('report/')}
        assert summarise(again)==summarise(run)
    analyse(str(again))
    assert (again/'report/result.json').read_bytes()==report

@pytest.mark.parametrize('draw', range(8))
def test_a_drawn_division_of_the_units(tmp_path, draw):
    "Units scattered over run folders, some in several of them, are the run that they came from."
    rng, run = Random(draw), study(tmp_path/'run')
    parts = [tmp_path/f'part{i}' for i in range(4)]
    for u in units_in(run):
        for part in rng.sample(parts, rng.randrange(1, 4)): collect.put(run/u, part/u)
    given = [pack_run(p, tmp_path/f'{p.name}.tar.xz')['file'] if rng.random() < .5 else p for p in parts if p.exists()]
    collect_pieces(given, tmp_path/'all/run')
    assert files(tmp_path/'all/run')==files(run)

def test_an_interruption_at_any_file_is_mended_by_the_same_command(tmp_path, monkeypatch):
    run = study(tmp_path/'run')
    pieces = packed(run, tmp_path)
    real, at = os.replace, 0
    while True:
        left = []
        def until(a, b, stop=at, done=left):
            done.append(b)
            if len(done) > stop: raise KeyboardInterrupt
            return real(a, b)
        again = tmp_path/f'again{at}'
        monkeypatch.setattr(collect.os, 'replace', until)
        try: collect_pieces(pieces, again)
        except KeyboardInterrupt: pass
        else: break
        monkeypatch.setattr(collect.os, 'replace', real)
        for p in again.rglob('arm.json'): assert '.tmp-' in str(p) or files(p.parent)==files(run/p.parent.relative_to(again))
        collect_pieces(pieces, again)
        assert files(again)==files(run)
        at += 1
    assert at==len(units_in(run))

def test_an_arm_that_goes_on_here_is_left_alone(tmp_path):
    run, here = study(tmp_path/'run'), tmp_path/'here'
    write_json(here/'rl/model-1.0/seed1/config.json', dict(arm='rl', seed=1))
    with pytest.raises(UserError, match='has not ended: let it end'): collect_pieces(packed(run, tmp_path), here)
    assert [p.name for p in here.rglob('*.json')]==['config.json']

def test_two_studies_are_refused_and_the_reason_is_named(tmp_path):
    a, b = study(tmp_path/'a', 1), study(tmp_path/'b', 2, level=.6)
    pieces = [pack_run(a, tmp_path/'a.tar.xz')['file'], pack_run(b, tmp_path/'b.tar.xz', 0)['file']]
    with pytest.raises(UserError, match=r'seed0 is in .*a\.tar\.xz and in .*b\.tar\.xz, and is not the same: leave one of them out'):
        collect_pieces(pieces, tmp_path/'all')
    twin = pack_run(b, tmp_path/'twin.tar.xz', 1)['file']
    for f in (b/'rl/model-1.0').glob('seed*/arm.json'): write_json(f, read_json(f) | dict(weights_sha256='e'*64))
    for s in (0, 1): pack_run(b, tmp_path/f'same{s}.tar.xz', s)
    with pytest.raises(UserError, match='they are not two seeds'):
        collect_pieces([tmp_path/'same0.tar.xz', tmp_path/'same1.tar.xz'], tmp_path/'all')
    assert twin and not (tmp_path/'all').exists()

def test_trials_from_two_machines_become_one_list(tmp_path):
    def trial(run, seed, factor, accuracy):
        place = run/f'tuning/rl/model-1.0/x{factor:g}/seed{seed}'
        row = dict(arm='rl', match_on='model', budget=1., factor=factor, seed=seed, dev_accuracy=accuracy, flops_model=1)
        write_json(place/'trial.json', row)
        write_json(place/'config.json', dict(arm='rl', seed=seed))
    for seed,best in ((1000, 2.), (1001, 4.)):
        for f in (1., 2., 4.): trial(tmp_path/f'm{seed}', seed, f, .3 + .1*(f==best) + .05*(f==2.))
        pack_run(tmp_path/f'm{seed}', tmp_path/f'{seed}.tar.xz', seed)
    r = collect_pieces([tmp_path/'1000.tar.xz', tmp_path/'1001.tar.xz'], tmp_path/'all')
    rows = read_jsonl(tmp_path/'all/tuning.jsonl')
    assert r['trials']==6 and [(x['factor'], x['seed']) for x in rows if x['best']]==[(2., 1000), (2., 1001)]

def test_a_run_on_one_sft_checkpoint_keeps_it_in_every_seed_s_piece(tmp_path):
    "Seeds that share an SFT checkpoint also share the arm that evaluates it."
    run = fake_run(tmp_path/'run', seeds=3, items=40, samples=2, steps=8)
    for f in run.rglob('config.json'): write_json(f, read_json(f) | dict(hashes=dict(sft='a'*64, code='c'*64, data='d'*64)))
    for f in run.rglob('arm.json'): seal(f.parent)
    for s in (1, 2): (run/f'sft/model-1.0/seed{s}').rename(tmp_path/f'gone{s}')
    collect_pieces([pack_run(run, tmp_path/f'{s}.tar.xz', s)['file'] for s in (1, 2)], tmp_path/'all')
    assert units_in(tmp_path/'all')==[u for u in units_in(run) if 'seed0' not in u or u.startswith('sft/')]

ALTERED = {
    'config.json was altered': lambda f: write_json(f/'config.json', read_json(f/'config.json') | dict(preset='smoke')),
    'is list, not dict': lambda f: (f/'arm.json').write_text('[]'),
    'is missing': lambda f: (f/'items.jsonl').unlink()}

@pytest.mark.parametrize('says', ALTERED)
@pytest.mark.parametrize('seed', [None, 1])
def test_what_would_not_be_collected_is_not_packed(tmp_path, says, seed):
    run = study(tmp_path/'run')
    ALTERED[says](run/'rl/model-1.0/seed1')
    with pytest.raises(UserError, match=f'cannot be used: .*seed1.*{says}'): pack_run(run, tmp_path/'piece.tar.xz', seed)
    assert not (tmp_path/'piece.tar.xz').exists() and pack_run(run, tmp_path/'other.tar.xz', 0)

def test_the_command_that_is_suggested_takes_a_folder_with_blanks(tmp_path):
    run = study(tmp_path/'my run', 1)
    line = collected_text(collect_pieces([pack_run(run, tmp_path/'0.tar.xz')['file']], tmp_path/"all it's")).splitlines()[-1]
    both = str(tmp_path/"all it's")
    assert shlex.split(line)==['papermill', 'nbs/analysis.ipynb', f'{both}/report/analysis.ipynb', '-p', 'run_dirs', both]
