"From run folders to a page: what is refused, what is written, and that a stranger's browser can show it."
import importlib.util, json, re, shutil, subprocess
from html.parser import HTMLParser
from pathlib import Path
import jsonschema, pytest
from exp2nb.arms import ARMS
from exp2nb.config import UserError, git_revision
from exp2nb.report import (
    COLOURS, FIGURES, MARKERS, RESULT_SCHEMA, also_shown, analyse, benchmarks_shown, check_result, draw, scores_table, verdict_line)
from exp2nb.results import LABELS, discover, summarise
from exp2nb.store import read_json, write_json
from fakes import fake_arm, fake_run, seal

SMALL = dict(items=60, samples=2, steps=8)
BETWEEN = dict(   # arm → gain over SFT
    rft=0., rft_online=.05, positives=.06, sft25_rl75=.05, sft50_rl50=.25, sft75_rl25=.15, sft_plus4=.2, sft_plus16=.2)


def edit(path, **changes):
    "Other fields in an arm.json, or in a config.json with what records it."
    write_json(path, read_json(path) | changes)
    if path.name!='arm.json': seal(path.parent)


def rewrite(path, f):
    rows = [f(json.loads(x)) for x in path.read_text().splitlines()]
    path.write_text(''.join(json.dumps(r)+'\n' for r in rows if r is not None))
    seal(path.parent)


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    "A run with everything, analysed."
    d = tmp_path_factory.mktemp('runs')
    kw = dict(items=400, samples=4, steps=20)
    run = fake_run(d/'one', gains=(.05, .2), seeds=3, **kw)
    for arm, gain in BETWEEN.items():
        for s in range(3): fake_arm(run, arm, s, gain=gain, **kw)
    for b, g in ((.25, .0), (.5, .1)): fake_run(run, gains=(.05, g), budget=b, **kw)
    fake_run(run/'passes-2', level=.6, sft_sha256='e'*64, **kw)   # a second starting point, as `--sft-passes` makes it
    for f in (run/'passes-2').rglob('config.json'): edit(f, sft_passes=2.)
    write = run/'tuning.jsonl'
    write.write_text(json.dumps(dict(arm='rl', factor=.5, seed=7, dev_accuracy=.5, flops_model=10**11))+'\n')
    return run, analyse(run)


def test_every_arm_has_a_name_a_colour_and_a_marker(): assert set(ARMS)==set(LABELS)==set(COLOURS)==set(MARKERS)

def test_result_is_valid_and_complete(done):
    run, result = done
    stored = json.loads((run/'report'/'result.json').read_text())
    assert stored==result
    jsonschema.validate(stored, RESULT_SCHEMA)
    v = result['verdict']
    assert (v['code'], v['scope'], result['seeds'])==('rl_worse', 'one_sft_checkpoint', [0, 1, 2])
    assert {k: b['code'] for k, b in v['by_basis'].items()}==dict(model='rl_worse', executed='rl_worse')
    assert v['by_basis']['model']['difference']==v['difference'] and v['by_basis']['model']['interval']==v['interval']
    for arm in ('sft', 'rl', 'sft_plus', 'rft'):
        assert len(result['arms'][arm]['stories']['accuracy'])==3
    b = result['budget']
    assert b['match_on']=='model' and abs(b['sft_plus']/b['rl']-1) <= .001 and set(b['would_buy'])=={'model', 'executed', 'note', 'seconds'}
    assert len(result['zero_advantage'])==3 and result['sft_sha256']=='a'*64
    assert (result['provenance']['analysis'], result['provenance']['machines'])==(git_revision(), [])
    assert 'arm sft_mix' in result['not_run'] and 'matched on note' in result['not_run'] and 'arm rft' not in result['not_run']
    assert [len(result['tables'][k]) for k in ('budgets', 'starts', 'tuning')]==[3, 2, 1] and result['crossover']['budget']


def test_an_arm_with_fewer_seeds_is_compared_on_the_seeds_that_both_have(tmp_path):
    "Ten seeds with an SFT checkpoint each, and three of random rewards: three pairs, too few for a word, however large the difference."
    run, kw = tmp_path/'one', SMALL | dict(vary='sft')
    for seed in range(10):
        for arm in ('sft', 'rl', 'sft_plus', 'rl_random')[:4 if seed < 3 else 3]:
            fake_arm(run, arm, seed, gain=dict(rl=.1, rl_random=-.3).get(arm, 0.), sft_sha256=f'{seed:064x}', **kw)
    result = analyse(run)
    row = next(r for r in result['tables']['also'] if 'random' in r['what'])
    rl, other = (result['arms'][a]['stories']['accuracy'][:3] for a in ('rl', 'rl_random'))
    assert (row['seeds'], row['code'])==(3, 'cannot_tell') and row['low'] > 0
    assert abs(row['difference']-(sum(rl)-sum(other))/3) < 1e-12
    few = 'Where there are 3 seeds, intervals may cover less than they promise, and nothing is decided.'
    assert few in also_shown(result)['notes'] and few in scores_table(result)['notes'] and few not in benchmarks_shown(result)['notes']


def own_checkpoints(run, seeds, gains, **kw):
    "SFT, RL and SFT+ (on both bases, where the budget is whole), each seed from an SFT checkpoint of its own."
    for seed in seeds:
        for arm, gain in dict(sft=0., rl=gains[0], sft_plus=gains[1]).items():
            for basis in ('model', 'executed')[:2 if arm=='sft_plus' and 'budget' not in kw else 1]:
                fake_arm(run, arm, seed, basis, gain=gain, sft_sha256=f'{seed:064x}', **(SMALL | dict(vary='sft') | kw))


def test_a_curve_over_budgets_is_over_the_seeds_that_all_budgets_have(tmp_path):
    "RL is 30 points ahead on the seeds that only the whole budget has, and behind on those that all budgets have: no crossing."
    run = tmp_path/'one'
    own_checkpoints(run, range(3), (0., .2))
    own_checkpoints(run, range(3, 10), (.4, .1))
    for seed in range(3):
        for arm, gain in dict(rl=0., sft_plus=.2).items():
            fake_arm(run, arm, seed, budget=.5, gain=gain, sft_sha256=f'{seed:064x}', **SMALL, vary='sft')
    result = analyse(run)
    assert [r['seeds'] for r in result['tables']['budgets']]==[3, 3] and result['crossover']['budget']['ahead']=='SFT+'
    assert result['verdict']['difference'] > 0 and '3 seeds a point' in result['crossover']['budget']['sentence']
    page = (run/'report'/'report.html').read_text()
    assert 'RL − SFT+' in page and 'Where there are 3 seeds' in draw(result, names=['over_budgets'])['over_budgets']['caption']


def test_further_seeds_may_lie_in_a_folder_of_their_own(tmp_path):
    "Seeds of the same recipe are one study; a seed whose recipe gave two checkpoints is refused; arms that lack seeds are named."
    own_checkpoints(tmp_path/'one', range(3), (.1, .2))
    own_checkpoints(tmp_path/'two', range(3, 5), (.1, .2))
    fake_arm(tmp_path/'one', 'rft', 0, sft_sha256=f'{0:064x}', **SMALL, vary='sft')
    result = summarise([tmp_path/'one', tmp_path/'two'])
    assert result['seeds']==[0, 1, 2, 3, 4] and result['tables']['starts'][0]['seeds']==5 and len(result['tables']['starts'])==1
    assert result['provenance']['records']==4*5+1 and 'seeds 1, 2, 3, 4 of rft' in result['not_run']
    for arm in ('sft', 'rl', 'sft_plus'): fake_arm(tmp_path/'three', arm, 0, sft_sha256='f'*64, **SMALL, vary='sft')
    with pytest.raises(UserError, match='the same SFT recipe gave two checkpoints'): summarise([tmp_path/'one', tmp_path/'three'])


def test_difference_is_of_the_endpoint(done):
    _, result = done
    mean = lambda a: sum(result['arms'][a]['stories']['accuracy'])/3
    assert abs(result['verdict']['difference']-(mean('rl')-mean('sft_plus'))) < 1e-9
    low, high = result['verdict']['interval']
    assert low < result['verdict']['difference'] < high and result['verdict']['endpoint'].startswith('greedy pass@1')


def test_every_figure_is_there_as_png_and_svg(done):
    run, _ = done
    for name in FIGURES:
        assert (run/'report'/'figures'/f'{name}.png').read_bytes()[:4]==b'\x89PNG'
        assert '<svg' in (run/'report'/'figures'/f'{name}.svg').read_text()


class Page(HTMLParser):
    "Open and close every tag; collect what a page asks the network for."
    def __init__(self):
        super().__init__()
        self.open, self.asks, self.text = [], [], []
    def handle_starttag(self, tag, attrs):
        if tag not in ('meta', 'img', 'br'): self.open.append(tag)
        self.asks += [v for k, v in attrs if k in ('src', 'href') and not v.startswith('data:')]
    def handle_endtag(self, tag): assert self.open.pop()==tag
    def handle_data(self, data): self.text.append(data)


def test_the_page_needs_no_other_file_and_answers_first(done):
    run, result = done
    text = (run/'report'/'report.html').read_text()
    page = Page()
    page.feed(text)
    assert not page.open and not page.asks and 'url(' not in text
    order = [text.index(x) for x in ('class="verdict"', '<figure>', '<table>', 'Every score')]
    assert order==sorted(order)
    words = ' '.join(page.text)
    assert result['verdict']['sentence'] in words and 'nan' not in re.findall(r'\b\w+\b', words.lower()) and 'None' not in words


def of_the_record(name):
    "A script of records/embedded, as a module."
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent/'records'/'embedded'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_records_tables_are_made_from_the_result(done):
    "records/embedded/tables.py: every table that there are rows for, the means of the result, nothing but the tables changed in the page."
    tables = of_the_record('tables')
    result = done[1]
    text = tables.page(result)
    titles = ['The verdict', 'Ways to count', 'All arms', 'Each seed', 'Gains and losses', 'What was paid, and how far it led',
              'Besides the endpoint', 'More tries', 'The ladder, step by step', 'Splits of the budget', 'Worked solutions',
              'What lies between, in words', 'Other budgets', 'Other starting points']
    assert re.findall('^### (.*)$', text, re.M)==titles
    said = [result['verdict']['sentence'], *result['between'], *(x['sentence'] for x in result['crossover'].values())]
    assert all(x in text for x in said)
    rows = [[x.strip() for x in line.split('|')[1:-1]] for line in text.splitlines() if line.startswith('|')]
    rl = next(row for row in rows if row[0]=='RL')
    assert rl[1:3]==['3', f"{100*result['arms']['rl']['stories']['mean']:.1f}"]
    last = next(row for row in rows if row[0]=='mean')
    assert last[5]==tables.points(result['verdict']['difference']) and last[5][0]=='−'
    share = next(row for row in rows if row[:2]==['SFT+ first', '50 %'])
    best = next(x for x in result['tables']['splits'] if x['arm']=='sft50_rl50')
    assert share[3]==tables.points(best['difference']) and share[5]=='highest'
    beside = f"With the first form the verdict would be `{result['verdict']['code']}`."
    assert beside not in text and beside in tables.page(result, result)
    with pytest.raises(SystemExit, match='lacks the marks'): tables.into('no marks', text)
    once = tables.into(f'before\n{tables.BEGIN}\nXYZ\n{tables.END}\nafter\n', text)
    assert once.startswith('before\n') and once.endswith('\nafter\n') and text in once and 'XYZ' not in once
    assert tables.into(once, text)==once


def test_longer_answers_are_compared_with_the_arms_own(tmp_path):
    "records/embedded/longer.py: at 160 tokens four cut answers of forty of one arm end, and are right; the others change in nothing."
    longer = of_the_record('longer')
    run, folder = tmp_path/'run', tmp_path/'longer'
    folder.mkdir()
    for seed in (0, 1):
        for arm in longer.ARMS:
            f = fake_arm(run, arm, seed, items=40, samples=0, steps=2, weights_sha256=f'{arm}{seed}')
            ends = 36 if arm=='sft_plus16' else 40
            def answer(row, ends=ends, seed=seed):
                i = int(row['id'].split('/')[1])
                right = (i+seed)%3 > 0 and i < ends
                return row | dict(correct=right, score=float(right), stopped=i < ends)
            rewrite(f/'items.jsonl', answer)
            rows = [json.loads(x) for x in (f/'items.jsonl').read_text().splitlines()]
            rows = [r for r in rows if r['task']=='stories' and r['checkpoint']=='end']
            rows = [r if r['stopped'] else r | dict(score=1., stopped=True) for r in reversed(rows)]   # in any order
            (folder/f'{arm}-{seed}.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
            write_json(folder/f'{arm}-{seed}.json', dict(weights_sha256=f'{arm}{seed}', settings=dict(max_new=160)))
    found = longer.compared(run, folder)
    rows = {x['arm']: x for x in found['rows']}
    assert (found['before'], found['tokens'], found['seeds'])==(96, 160, [0, 1]) and set(rows)==set(longer.ARMS)
    assert rows['sft_plus16']['cut_before']==pytest.approx(.1) and rows['sft_plus16']['cut']==0
    assert rows['sft_plus16']['accuracy']-rows['sft_plus16']['before']==pytest.approx(.1)
    assert all(rows[a]['accuracy']==rows[a]['before'] and rows[a]['cut']==0 for a in ('sft', 'rl', 'sft_plus', 'sft_plus4'))
    gain = rows['sft_plus16']['over_sft']
    assert gain['low'] < gain['difference'] < gain['high'] and rows['rl']['to_rl'] is None
    assert gain['difference']==pytest.approx(rows['sft_plus16']['accuracy']-rows['sft']['accuracy'])
    text = of_the_record('tables').longer_answers(found)
    assert 'greedy, 96 tokens' in text and 'cut, 160 tokens' in text and '| 10.0 | 0.0 |' in text
    write_json(folder/'rl-1.json', dict(weights_sha256='other', settings=dict(max_new=160)))
    with pytest.raises(AssertionError): longer.compared(run, folder)


def test_the_page_names_every_processor_and_the_analysis_own_revision(tmp_path):
    run = small(tmp_path)
    for arm, cpu in (('rl', 'AMD EPYC'), ('sft_plus', 'Intel Xeon')):
        for f in (run/arm).rglob('arm.json'): edit(f, versions=dict(cpu=cpu, gpu=None, torch='2.13.0'))
    result = analyse(run)
    assert result['provenance']['machines']==['AMD EPYC, PyTorch 2.13.0', 'Intel Xeon, PyTorch 2.13.0']
    page = (run/'report'/'report.html').read_text()
    assert 'AMD EPYC, PyTorch 2.13.0; Intel Xeon, PyTorch 2.13.0' in page and (git_revision() or 'not recorded') in page


def test_verdict_line(done):
    run, result = done
    line = verdict_line(run)
    assert line.startswith('Verdict: rl_worse. ') and '\n' not in line
    assert line==verdict_line(result)==verdict_line(run/'report'/'result.json')


def test_analysis_again_gives_the_same_numbers_and_leaves_no_stale_figure(done, tmp_path):
    run, result = done
    (tmp_path/'figures').mkdir()
    (tmp_path/'figures'/'over_starts.png').write_bytes(b'old')
    for arm in ('sft', 'rl', 'sft_plus'): shutil.copytree(run/arm, tmp_path/'r'/arm)
    again = analyse(tmp_path/'r', tmp_path)
    assert again['verdict']==result['verdict'] and not (tmp_path/'figures'/'over_starts.png').exists()


def small(d, seeds=2, **kw): return fake_run(Path(d)/'r', seeds=seeds, **(SMALL | kw))


def test_a_copy_that_was_never_finished_is_no_arm(tmp_path):
    "What a killed exp2_collect leaves."
    run = small(tmp_path)
    seed = run/'rl'/'model-1.0'/'seed0'
    shutil.copytree(seed, seed.with_name('.tmp-seed0'))
    assert len([r for r in discover(run) if r.arm=='rl'])==2


def test_a_report_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path/'out').write_text('a file')
    with pytest.raises(UserError, match='out.* was not written'): analyse(small(tmp_path), out=tmp_path/'out')


def test_missing_arm_or_seed_names_the_folder(tmp_path):
    run = small(tmp_path)
    shutil.rmtree(run/'sft_plus'/'model-1.0'/'seed1')
    with pytest.raises(UserError, match=r'sft_plus/model-1.0/seed1/arm.json is missing: run .*-p arm sft_plus -p seed 1'): summarise(run)
    shutil.rmtree(run/'sft_plus')
    with pytest.raises(UserError, match='sft_plus/model-1.0/seed0/arm.json is missing'): summarise(run)
    with pytest.raises(UserError, match='seed7/arm.json is missing'): summarise(small(tmp_path/'b'), seeds=[0, 1, 7])
    with pytest.raises(UserError, match='rl/model-0.3/seed0.* is missing.*-p seed 0 -p budget 0.3`'): summarise(run, budget=.3)
    run = small(tmp_path/'c')
    shutil.rmtree(run/'sft')
    with pytest.raises(UserError, match='sft/model-1.0/seed0/arm.json is missing'): summarise(run)
    with pytest.raises(UserError, match='no finished arm'): summarise(tmp_path/'nowhere')


@pytest.mark.parametrize('change,said', [
    (dict(sft_sha256='f'*64), 'sft_sha256'), (dict(eval_settings=dict(max_new=7)), 'eval_settings'),
    (dict(preset='d12'), 'preset'), (dict(task='gsm8k'), 'task'),
    (dict(tokenizer_sha256='9'*64), 'tokenizer'), (dict(seed=5), 'seed 5'), (dict(arm='rl'), "arm 'rl'")])
def test_what_does_not_belong_together_is_named(tmp_path, change, said):
    run = small(tmp_path)
    file = run/'sft_plus'/'model-1.0'/'seed1'/'arm.json'
    edit(file, **change)
    with pytest.raises(UserError, match=said) as e: summarise(run)
    assert str(file) in str(e.value) and '\n' not in str(e.value)


def test_budgets_that_do_not_match(tmp_path):
    run = small(tmp_path)
    file = run/'sft_plus'/'model-1.0'/'seed0'/'ledger.jsonl'
    rewrite(file, lambda r: r | dict(flops_model=int(1.002*r['flops_model'])))
    with pytest.raises(UserError, match=r'ledger.jsonl spent .*\+0.20 %') as e: summarise(run)
    assert str(file) in str(e.value)
    edit(file.parent/'arm.json', resolution=.01)        # a smoke run's smallest step
    assert abs(summarise(run)['budget']['residual']-.002) < 1e-4


def test_a_ledger_that_was_changed_is_refused(tmp_path):
    run = small(tmp_path, seeds=1)
    edit(run/'rl'/'model-1.0'/'seed0'/'arm.json', ledger=dict(sha256='0'*64, rows=1))
    with pytest.raises(UserError, match='rl/model-1.0/seed0/ledger.jsonl is not the ledger'): summarise(run)


def test_other_problems_and_damaged_items(tmp_path):
    run = small(tmp_path)
    items = run/'rl'/'model-1.0'/'seed1'/'items.jsonl'
    rewrite(items, lambda r: None if r['id'].endswith('0003') else r)
    with pytest.raises(UserError, match='answers other stories problems') as e: summarise(run)
    assert 'items.jsonl' in str(e.value)
    rewrite(items, lambda r: {k: v for k, v in r.items() if k!='parsed'})
    with pytest.raises(UserError, match='parsed is missing'): summarise(run)
    rewrite(items, lambda r: None)
    with pytest.raises(UserError, match='holds no rows'): summarise(run)


def test_without_the_model_basis_there_is_no_verdict(tmp_path):
    run = small(tmp_path, seeds=1)
    shutil.rmtree(run/'sft_plus')
    fake_arm(run, 'sft_plus', match_on='note', total=int(10**12*1.1/1.4), gain=.3, **SMALL)
    edit(run/'sft_plus'/'note-1.0'/'seed0'/'arm.json', resolution=.01)
    r = analyse(run)
    assert r['verdict']['code']=='cannot_tell' and r['verdict']['difference'] is None and 'model FLOPs' in r['verdict']['reason']
    assert r['budget']['match_on']=='note' and any('sampled' in x['what'] for x in r['tables']['also'])
    assert list(r['verdict']['by_basis'])==['note'] and r['verdict']['scope']=='two_checkpoints'


def test_a_basis_that_turns_the_answer_withholds_it(tmp_path):
    kw = dict(items=500, samples=0, steps=8, seeds=3)
    run = fake_run(tmp_path/'r', gains=(.1, .3), bases=('model',), **kw)
    alone = summarise(run)['verdict']
    assert alone['code']=='cannot_tell' and 'executed not run' in alone['sentence'] and alone['by_basis']['model']['code']=='rl_worse'
    for s in range(3): fake_arm(run, 'sft_plus', s, 'executed', gain=-.2, items=500, samples=0, steps=8)
    turned = summarise(run)['verdict']
    assert turned['code']=='cannot_tell' and turned['by_basis']['executed']['code']=='rl_better'
    assert 'RL worse at equal billed FLOPs and RL better at equal executed FLOPs' in turned['sentence']


@pytest.mark.parametrize('basis,price', [('note', 1.1/1.4), ('seconds', 9/5)])
def test_other_bases_are_reported_and_never_decide(tmp_path, basis, price):
    kw = dict(items=500, samples=0, steps=8)
    run = fake_run(tmp_path/'r', gains=(.1, .3), seeds=3, **kw)
    want = summarise(run)['verdict']
    for s in range(3): fake_arm(run, 'sft_plus', s, basis, gain=-.2, total=int(10**12*price), resolution=.9, **kw)
    got = summarise(run)['verdict']
    assert (got['code'], got['sentence'])==(want['code'], want['sentence'])==('rl_worse', want['sentence'])
    assert got['by_basis'][basis]['code']=='rl_better'


def test_seconds_are_compared_with_the_rl_run_beside_them(tmp_path):
    "RL on the clock lies in a folder of its own, where it had the machine for itself; the main folder's RL took another time."
    kw = dict(items=300, samples=0, steps=8)
    run, clock = fake_run(tmp_path/'r', gains=(.1, .3), seeds=3, **kw), tmp_path/'clock'
    shutil.copytree(run/'sft', clock/'sft')
    for s in range(3):
        rl, plus = fake_arm(clock, 'rl', s, gain=.1, **kw), fake_arm(clock, 'sft_plus', s, 'seconds', gain=.2, **kw)
        rewrite(rl/'ledger.jsonl', lambda r: r | dict(seconds=r['seconds']/2))       # 7 ms a step in the main folder, 3.5 here
        rewrite(plus/'ledger.jsonl', lambda r: r | dict(seconds=r['seconds']*7/4))   # 2 ms a step as made, 3.5 here
    r = summarise([run, clock])
    assert (r['verdict']['code'], r['verdict']['by_basis']['seconds']['seeds'])==('rl_worse', 3)
    assert r['verdict']['sentence']==summarise(run)['verdict']['sentence']
    shutil.rmtree(clock/'rl')
    with pytest.raises(UserError, match='on the seconds basis, RL spent'): summarise([run, clock])


def test_dev_lines_begin_where_the_arms_do(done):
    "The dev problems may be easier than those of test: a line is drawn as a gain, from SFT's own accuracy on test."
    result = done[1]
    assert result['tables']['curve'][0]['dev_accuracy']!=pytest.approx(result['arms']['sft']['stories']['mean'], abs=.01)
    fig = FIGURES['accuracy_vs_flops'][0](result)
    lines = [line.get_ydata() for line in fig.axes[0].lines if len(line.get_xdata())==60]
    assert 'SFT+, executed' in [t.get_text() for t in fig.legends[0].get_texts()]
    assert len(lines) >= 2 and all(y[0]==pytest.approx(100*result['arms']['sft']['stories']['mean']) for y in lines)


def test_one_seed_has_no_winner_anywhere(done, tmp_path):
    "Neither in the verdict, its badge and hypothesis, nor in the table of other comparisons; captions and notes say of what they speak."
    r = analyse(small(tmp_path, seeds=1, gains=(.05, .4), items=300))
    page = (tmp_path/'r'/'report'/'report.html').read_text()
    assert (r['verdict']['code'], r['verdict']['scope'], r['verdict']['hypothesis'])==('cannot_tell', 'two_checkpoints', None)
    assert {x['code'] for x in r['tables']['also']}=={'cannot_tell'} and 'RL worse' not in page and 'data-code="cannot_tell"' in page
    assert 'about two checkpoints' in page and page.count('about these checkpoints') >= 3
    assert 'about one SFT checkpoint' in (done[0]/'report'/'report.html').read_text()


def test_billed_is_not_executed(tmp_path):
    "RL executed less than it was billed: the ratio stands in the verdict's block; equal ratios need no word."
    run = small(tmp_path, seeds=3)
    v = summarise(run)['verdict']
    assert v['executed_ratio']==pytest.approx(1) and not any('Billed' in n for n in v['notes'])
    for part in (run/'rl', run/'sft_plus'/'executed-1.0'):
        for f in part.rglob('ledger.jsonl'): rewrite(f, lambda x: x | dict(flops_executed=x['flops_executed']//2))
    v = analyse(run)['verdict']
    assert v['executed_ratio']==pytest.approx(.5, abs=.01)
    assert v['notes'][0]=='Billed the same FLOPs; RL executed 50 % of what extra SFT did.'
    assert v['notes'][0] in (run/'report'/'report.html').read_text()


def test_what_lies_between_sft_and_rl_is_told(done):
    "From what the folders hold to the sentences on the page: gains that were chosen, the best split, the price of a reward."
    run, result = done
    t, page = result['tables'], (run/'report'/'report.html').read_text()
    for r in t['gains']:
        true = BETWEEN.get(r['arm'], dict(rl=.05, sft_plus=.2).get(r['arm']))
        assert abs(r['difference']-true) < .06 and r['low'] < r['difference'] < r['high'] and r['seeds']==3, r
    made = {r['arm']: r['generation']/(r['generation']+r['training']) for r in t['gains']}
    shares = dict(sft_plus=0., rft=.2, rft_online=.2, positives=.2, rl=.2, sft50_rl50=.1, sft75_rl25=.05)
    for arm, share in shares.items(): assert made[arm]==pytest.approx(share, abs=1e-3), arm
    assert [r['arm'] for r in t['neighbours']]==['rft', 'rft_online', 'positives', 'rl']
    assert [r['share'] for r in t['splits']]==[0., .25, .5, .75, 1.] and [r['arm'] for r in t['splits'] if r['best']]==['sft50_rl50']
    ladder, split, price, bought, lost, unsaid, scope = result['between']
    assert 'from one SFT checkpoint' in scope
    assert 'from SFT+ to RFT −' in ladder
    assert 'SFT+ first: the highest mean is that of 50 % SFT+' in split and 'Not told from it: 75 %' in split
    assert price.startswith("By its means, SFT+ has at least RL's gain with 1 worked solution a problem, the fewest")
    assert bought.startswith('What to buy: 50 % SFT+, then RL has the highest mean gain over SFT') and '75 % SFT+, then RL' in bought
    assert lost.startswith('Forgotten') and lost.index('No loss is shown for') > 0 and unsaid.startswith('What none of this says')
    assert '<h2>What lies between SFT and RL</h2>' in page
    assert all(line.split('(')[0] in page for line in (split, price.replace("'", '&#39;')))
    for name in ('ladder', 'frontier', 'split_curve', 'price_of_a_reward'): assert (run/'report'/'figures'/f'{name}.png').is_file()

def test_what_lies_between_gets_no_winner_s_words_from_few_seeds(tmp_path):
    "Three pairs: a share whose interval lies below is of a lower mean; one seed: about these checkpoints."
    run = tmp_path/'pairs'
    own_checkpoints(run, range(3), (.0, .3))
    for arm, gain in dict(rft=.1, sft25_rl75=.02, sft50_rl50=.3, sft75_rl25=.25, sft_plus4=.3).items():
        for s in range(3): fake_arm(run, arm, s, gain=gain, sft_sha256=f'{s:064x}', **SMALL, vary='sft')
    said = ' '.join(analyse(run)['between'])
    assert 'Below it' not in said and 'too few seeds for a verdict' in said and '1 seeds' not in said
    assert 'change the score' not in said and 'Steps to another mean, from too few seeds for a verdict' in said
    one = tmp_path/'one'
    for arm, gain in dict(sft=0., rl=.05, sft_plus=.2, rft=.1, sft50_rl50=.25, sft_plus4=.2).items():
        fake_arm(one, arm, 0, gain=gain, **SMALL)
    said = ' '.join(analyse(one)['between'])
    assert 'One seed: this is about these checkpoints.' in said and '1 seeds' not in said


def test_the_usual_three_arms_have_nothing_between_them(tmp_path):
    run = small(tmp_path, seeds=1)
    assert analyse(run)['between']==[] and 'What lies between' not in (run/'report'/'report.html').read_text()
    assert not (run/'report'/'figures'/'ladder.png').exists()

def test_the_record_of_the_old_rule_can_still_be_read():
    "records/embedded/first was written by schema 1: its verdict and figures show; the schema of today refuses it by name."
    path = Path(__file__).parent.parent/'records'/'embedded'/'first'/'result.json'
    old = read_json(path)
    assert old['schema']==1
    assert verdict_line(path).startswith('Verdict: ') and set(draw(old))>={'accuracy_vs_flops', 'benchmarks', 'over_budgets'}
    with pytest.raises(UserError, match='scope'): check_result(old)


def test_no_signal_and_all_zero(tmp_path):
    nothing = small(tmp_path, seeds=1, zero_advantage=1.)
    fake_arm(nothing, 'sft_plus4', **SMALL)
    dead = analyse(nothing)
    assert dead['between']==['Nothing was learned, so what lies between SFT and RL cannot be told.']
    assert dead['verdict']['code']=='cannot_tell' and '100.0 %' in dead['verdict']['reason']
    run = small(tmp_path/'zero', seeds=1)                # real GSM8K at CPU size: nothing is ever right
    for f in run.rglob('items.jsonl'): rewrite(f, lambda r: r | dict(correct=False, parsed=False, pred=None, correct_last_number=False))
    for f in run.rglob('metrics.jsonl'): rewrite(f, lambda r: {k: v for k, v in r.items() if k not in ('dev_accuracy', 'noise_scale')})
    r = analyse(run)
    assert r['verdict']['code']=='cannot_tell' and any(n.startswith('No gain') for n in r['verdict']['notes'])
    assert r['arms']['rl']['stories']['accuracy']==[0.]


def test_only_greedy_and_no_dev(tmp_path):
    run = small(tmp_path, seeds=1, samples=0)
    for f in run.rglob('items.jsonl'): rewrite(f, lambda r: None if r['checkpoint']=='best_dev' else r)
    r = analyse(run)
    assert {'best-on-dev checkpoints', 'sampled answers'} <= set(r['not_run'])
    assert not (run/'report'/'figures'/'more_tries.png').exists()


def test_an_sft_checkpoint_per_seed_is_paired(tmp_path):
    run = small(tmp_path, seeds=3)
    for f in run.rglob('config.json'):
        edit(f, vary='sft')
        edit(f.parent/'arm.json', sft_sha256=str(read_json(f)['seed'])*64)
    r = summarise(run)
    assert r['provenance']['vary']=='sft' and r['sft_sha256']==['0'*64, '1'*64, '2'*64] and r['verdict']['scope']=='methods'
    assert r['verdict']['code']=='cannot_tell'
    assert '3 seeds, each with an SFT checkpoint of its own, are too few' in r['verdict']['sentence']
    edit(run/'rl'/'model-1.0'/'seed1'/'arm.json', sft_sha256='2'*64)
    with pytest.raises(UserError, match='seed1/arm.json'): summarise(run)


def test_two_checkpoints_of_one_recipe_are_refused(tmp_path):
    a, b = small(tmp_path/'a', seeds=1), fake_run(tmp_path/'b'/'r', sft_sha256='e'*64, **SMALL)
    with pytest.raises(UserError, match='same SFT recipe'): summarise([a, b])


def test_further_seeds_from_another_folder(tmp_path):
    run = small(tmp_path, seeds=2)
    other = tmp_path/'other'
    for arm in ('sft', 'rl', 'sft_plus'): shutil.move(run/arm/'model-1.0'/'seed1', other/arm/'model-1.0'/'seed1')
    assert summarise([run, other])['seeds']==[0, 1]


def test_ten_seeds_with_an_sft_checkpoint_each_speak_of_the_methods(tmp_path):
    run = fake_run(tmp_path/'r', gains=(.05, .2), seeds=10, items=200, samples=0, steps=4, vary='base')
    for f in run.rglob('arm.json'): edit(f, sft_sha256=str(read_json(f)['seed'])*64, base_sha256=str(read_json(f)['seed'])*64)
    v = summarise(run)['verdict']
    assert (v['code'], v['scope'])==('rl_worse', 'methods') and v['needed'] is None
    assert v['sentence'].endswith('10 seeds, each from its own base and SFT checkpoint.')


def test_bad_parameters(tmp_path):
    with pytest.raises(UserError, match='0.02 is two points'): analyse(tmp_path, margin=2)
    with pytest.raises(UserError, match='no run folder'): analyse([])


def test_hostile_names_do_not_reach_the_page(tmp_path):
    run = small(tmp_path, seeds=1)
    for f in run.rglob('arm.json'): edit(f, not_run=['<script>alert(1)</script>'], git='<b>')
    analyse(run)
    assert '<script>' not in (run/'report'/'report.html').read_text()


def test_notebook_by_papermill(tmp_path):
    papermill = pytest.importorskip('papermill')
    nb = Path(__file__).parent.parent/'nbs'/'analysis.ipynb'
    assert list(papermill.inspect_notebook(nb))==['run_dirs', 'out', 'margin', 'budget', 'seeds', 'arms', 'tolerance']
    run = small(tmp_path, seeds=1)
    papermill.execute_notebook(nb, tmp_path/'OUT.ipynb', dict(run_dirs=str(run)), progress_bar=False)
    assert (run/'report'/'result.json').exists() and 'Verdict: ' in (tmp_path/'OUT.ipynb').read_text()
    with pytest.raises(Exception, match='marign'):
        papermill.execute_notebook(nb, tmp_path/'OUT.ipynb', dict(run_dirs=str(run), marign=.1), progress_bar=False)


BROWSER = '''--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --allow-file-access-from-files --window-size=1400,900 --virtual-time-budget=4000 --dump-dom'''
MEASURE = '''   // width of the content, end of the verdict, width of the narrowest picture
const sizes = [...document.images].map(i => i.getBoundingClientRect().width);
const verdict = document.querySelector(".verdict").getBoundingClientRect();
document.title = [document.documentElement.scrollWidth, verdict.bottom, Math.min(...sizes)].join(" ");
parent.document.title = document.title;'''


@pytest.mark.parametrize('width', [1366, 390])
def test_rendered_in_a_browser(done, tmp_path, width):
    "No content is wider than the screen. Narrow screens are shown in a frame, since a browser window cannot be that narrow."
    chromium = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if not chromium: pytest.skip('needs chromium')
    run, _ = done
    page = (run/'report'/'report.html').read_text()
    (tmp_path/'page.html').write_text(page.replace('</body>', f'<script>{MEASURE}</script></body>'))
    frame = f'<iframe src="page.html" style="border:0;width:{width}px;height:800px"></iframe>'
    (tmp_path/'frame.html').write_text(f'<body style="margin:0">{frame}</body>')
    command = [chromium, *BROWSER.split(), f'--user-data-dir={tmp_path/"profile"}', (tmp_path/'frame.html').as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    wide, bottom, narrowest = map(float, re.search(r'<title>([\d.]+ [\d.]+ [\d.]+)</title>', out)[1].split())
    assert wide <= width and bottom < 800 and narrowest > (330 if width==390 else 450)
