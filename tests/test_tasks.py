"Tasks of your own: files that are wrong, scorers that misbehave, and whole arms on a file and on a program."
import datetime, json, math, os, re, signal
from dataclasses import replace
from types import SimpleNamespace
import pyarrow as pa, pyarrow.parquet as pq, pytest
import exp2nb.tasks, exp2nb.tools.eval
from exp2nb import arms
from exp2nb.arms import run_arm
from exp2nb.config import UserError, make_config, override, task_name
from exp2nb.lab import Lab, arm_folder, make_sft
from exp2nb.mixture import Mixture, sft_mixture, target_tasks
from exp2nb.report import analyse
from exp2nb.store import Interrupt, Interrupted, read_json, read_jsonl
from exp2nb.stories import LEVELS, World, make_stories
from exp2nb.tasks import judged, make_task
from exp2nb.tools.eval import exp2_eval, find_tasks
from exp2nb.tools.plan import plan
from exp2nb.tools.queue import queue

SMALL = {'pretrain.tokens_per_param':.03, 'rl.steps':2, 'rl.samples':2, 'rl.max_new':12, 'rl.preflight':4, 'eval.max_new':12,
         'eval.kl_prompts':2, 'eval.curve':1, 'eval.n_samples':2}

def sums(n=12, worked=True):
    "Rows of small additions."
    says = lambda a, b: f'{a}+{b}=<<{a}+{b}={a+b}>>{a+b}.\n#### {a+b}'
    return [dict(question=f'What is {a}+{b}?', answer=says(a, b) if worked else str(a+b)) for a in range(n) for b in range(n)]

def write(path, rows):
    path.write_text('\n'.join(map(json.dumps, rows)), encoding='utf-8')
    return path

def refused(task, *words, split='test', **kw):
    "Reading the task raises one sentence with these words."
    with pytest.raises(UserError) as e: make_task(str(task), split, **kw)
    message = str(e.value)
    for w in words: assert w in message, message
    assert '\n' not in message and message.endswith('.')

# files

@pytest.mark.parametrize('rows, words', [
    ([dict(prompt='1+1?', answer='2')]*9, ('no column question', 'prompt, answer', 'question=prompt')),
    ([dict(question='1+1?')]*9, ('no column answer',)),
    (sums()+[dict(question='', answer='2')], ('row 145', 'its question')),
    (sums()+[dict(question=None, answer='2')], ('row 145', 'its question')),
    (sums()+[dict(question='Why?', answer='because')], ('row 145', 'is no number')),
    (sums()+[dict(question='Why?', answer='so\n#### because')], ('row 145', 'is no number')),
    (sums()+[dict(question='Why?', answer=True)], ('row 145', 'is no number')),
    (sums()+[dict(question=' what is 3+4? ', answer='7')], ('row 41', 'row 145', 'ask the same question')),
    (sums()+[dict(question='Why?', answer='42')], ('144 of 145', 'worked solution')),
    (sums()+[[1, 2]], ('row 145', 'no object')),
    ([], ('no column question',)),
    (sums(1), ('the t', 'split has no problems'))])
def test_a_wrong_file_is_one_sentence(tmp_path, rows, words): refused(write(tmp_path/'sums.jsonl', rows), 'sums.jsonl', *words)

def test_files_that_cannot_be_read(tmp_path):
    refused(tmp_path/'gone.jsonl', 'there is no file')
    bad = tmp_path/'bad.jsonl'
    bad.write_text('{"question": ')
    refused(bad, 'line 1', 'not JSON')
    bad = tmp_path/'bad.parquet'
    bad.write_bytes(b'PAR1 and no more')
    refused(bad, 'cannot be read')
    refused(write(tmp_path/'mmlu.jsonl', sums()), 'name of a benchmark')
    (tmp_path/'empty').mkdir()
    refused(tmp_path/'empty', 'no train.jsonl')

def test_train_and_test_that_overlap_are_named(tmp_path):
    write(tmp_path/'train.jsonl', sums())
    write(tmp_path/'test.jsonl', [dict(question='What is 40+2?', answer='#### 42'), dict(question='What  is 2+3?', answer='#### 5')])
    refused(tmp_path, 'train.jsonl, row 28', 'test.jsonl, row 2', 'ask the same question')

def test_a_folder_a_file_and_parquet_are_the_same_task(tmp_path):
    rows = sums()
    train, test = (make_task(str(write(tmp_path/'sums.jsonl', rows)), s) for s in ('train', 'test'))
    pq.write_table(pa.Table.from_pylist([dict(q=r['question'], a=r['answer']) for r in rows]), tmp_path/'sums.parquet')
    again = make_task(f"{tmp_path/'sums.parquet'}:question=q:answer=a", 'test')
    assert [(p.question, p.solution, p.answer) for p in again]==[(p.question, p.solution, p.answer) for p in test]
    folder = tmp_path/'me'/'sums'/'default'
    folder.mkdir(parents=True)
    write(folder/'train.jsonl', [r for r in rows if r['question'] in {p.question for p in train}])
    write(folder/'test.jsonl', [r for r in rows if r['question'] in {p.question for p in test}])
    hub = make_task('me/sums', 'test', str(tmp_path))
    assert [p.question for p in hub]==[p.question for p in test]
    assert {p.question for p in train}.isdisjoint(p.question for p in test) and len(train)+len(test)==144

# programs

@pytest.mark.parametrize('text, words', [
    ('x = 1', ('defines no function problems',)),
    ('def problems(', ('could not be run', 'line 1')),
    ('x = 1\nraise RuntimeError("no")\ndef problems(): pass', ('could not be run', 'line 2', 'no')),
    ('def problems(split):\n    return 1/0', ('line 2', 'ZeroDivisionError')),
    ('def problems(split): return 7', ('return a list of rows',)),
    ('def problems(split): return ["1+1?"]', ("row 1 of problems('train')", 'return dictionaries')),
    ('def problems(split): return []\ndef score(row, answer): return 1', ('the train split has no problems',)),
    ('def problems(split): return [dict(question="1+1?")]\ndef score(row, answer): return 1',
     ("row 1 of problems('train')", "row 1 of problems('test')", 'same')),
    ('def problems(split): return [dict(question=split)]', ('is no number',)),
    ('def problems(split): return [dict(answer=2)]\ndef score(row, answer): return 1', ('a row needs a question',)),
    ('def problems(split): return [dict(question=split)]\ndef conversation(row): return [dict(role="assistant", content="?")]\n'
     'def score(row, answer): return 1', ("end with the user's",)),
    ('def problems(split): return [dict(question=split)]\ndef score(row, answer): return 1\n'
     'def conversation(row): return [dict(content="Be brief."), dict(role="user", content="?")]', ("end with the user's",)),
    ('def problems(split): return [dict(question=split)]\ndef score(row, answer): return 1\n'
     'def conversation(row): return [dict(role="tool", content="4"), dict(role="user", content="?")]', ("end with the user's",)),
    ('def problems(split): return [dict(question=split, answer=float("nan"))]', ('is no number',)),
    ('def problems(split): return [dict(question=split, answer=1)]\nseconds = -1', ('seconds in', 'above 0')),
    ('def problems(split): return [dict(question=split, answer=1)]\nmargin = "wide"', ('margin in', "not 'wide'"))])
def test_a_wrong_program_is_one_sentence(tmp_path, text, words):
    (tmp_path/'mine.py').write_text(text)
    refused(tmp_path/'mine.py', 'mine.py', *words)

def test_a_notebook_is_a_program_too(tmp_path):
    code = lambda s: dict(cell_type='code', source=s)
    problems = '#| export\ndef problems(): return [dict(question=f"{i}?", answer=i) for i in range(99)]'
    cells = [code('%matplotlib inline\nraise RuntimeError'), code(problems)]
    (tmp_path/'mine.ipynb').write_text(json.dumps(dict(cells=cells)))
    task = make_task(str(tmp_path/'mine.ipynb'))
    assert task.kind=='number' and task.score(task[0], f'#### {task[0].answer}')['correct']

def test_a_conversation_may_have_more_than_a_question(tmp_path):
    (tmp_path/'mine.py').write_text(
        'def problems(split): return [dict(question=f"{split} {i}", answer=i) for i in range(9)]\n'
        'def conversation(row): return [dict(role="system", content="Answer."), dict(role="user", content=row["question"])]')
    task = make_task(str(tmp_path/'mine.py'))
    messages = task.conversation(task[3])['messages']
    assert [m['role'] for m in messages]==['system', 'user'] and messages[1]['content']=='test 3' and not task.solved

# scorers

WILD = '''
import itertools
def problems(): return [dict(question=f'What is {i}+{j}?', answer=i+j) for i in range(12) for j in range(12)]
def score(row, answer):
    kind = row['answer']%8
    if kind==0: raise ValueError(answer)
    if kind==1: return 'right'
    if kind==2: return float('nan')
    if kind==3: return 1.5
    if kind==4: return None
    if kind==5: exit()
    if kind==6:
        for _ in itertools.count(): pass
    return .5
seconds = .2
margin = .05
'''

def test_no_scorer_ends_a_run(tmp_path):
    (tmp_path/'wild.py').write_text(WILD)
    task = make_task(str(tmp_path/'wild.py'), 'train')
    some = {p.meta['row']['answer']%8: task.score(p, 'seven') for p in task.take(60)}
    assert {k: s['score'] for k,s in some.items()}=={k: .5*(k==7) for k in range(8)}
    why = ('raised ValueError', "returned 'right'", 'returned nan', 'returned 1.5', 'returned None', 'SystemExit', 'more than 0.2')
    for k,word in enumerate(why):
        assert word in some[k]['failed'] and not some[k]['parsed']
    assert some[7]['failed']==''

# whole arms

def config(task, arm, run_dir, **kw):
    return override(make_config('smoke', str(task), arm=arm, run_dir=str(run_dir), **(dict(n_train=48, n_test=8, dev=8) | kw)), SMALL)

def test_arms_on_a_program_whose_scorer_misbehaves(tmp_path, capsys):
    "No worked solutions: sft_plus is refused in one sentence before anything is trained; rl and its report count the failures."
    (tmp_path/'wild.py').write_text(WILD)
    with pytest.raises(UserError, match='arm sft_plus imitates worked solutions, and wild has none'):
        run_arm(config(tmp_path/'wild.py', 'sft_plus', tmp_path/'out'), progress=False)
    assert not (tmp_path/'out'/'base').exists()
    with pytest.raises(UserError, match='sft_plus imitates'): queue(config(tmp_path/'wild.py', 'sft', tmp_path/'out'))
    r = run_arm(config(tmp_path/'wild.py', 'rl', tmp_path/'out'))
    assert r['task']=='wild' and r['margin']==.05 and r['scorer_failed'] > 0
    end = r['scores']['end']['wild']
    assert end['failed'] > 0 and 0 <= end['accuracy'] <= .5
    said = capsys.readouterr()
    assert 'scorer failed on' in said.out and re.search(r'rl 100%.*reward \S+ scorer_failed \d', said.err), said
    folder = arm_folder(config(tmp_path/'wild.py', 'rl', tmp_path/'out'))
    rows = [i for i in read_jsonl(folder/'items.jsonl') if i['task']=='wild']
    assert all((i['score']==0) if i['failed'] else i['score']==.5 for i in rows) and {i['correct'] for i in rows}=={False}
    assert sum(m.get('scorer_failed', 0) for m in read_jsonl(folder/'metrics.jsonl'))==r['scorer_failed']
    assert 'wild' not in sft_mixture(config(tmp_path/'wild.py', 'rl', tmp_path/'out')).counts

def test_a_changed_scorer_is_another_run(tmp_path):
    mine = tmp_path/'mine.py'
    mine.write_text(WILD)
    c = config(mine, 'rl', tmp_path/'out')
    before = Lab(c, False).data_hash
    mine.write_text(WILD.replace('return .5', 'return .6'))
    assert Lab(c, False).data_hash!=before

GRADED = '''
def problems():
    return [dict(question=f'What is {i}+{j}?', answer=i+j, solution=f'{i}+{j}=<<{i}+{j}={i+j}>>{i+j}.\\n#### {i+j}')
            for i in range(12) for j in range(12)]
def score(row, answer): return min(1, len(answer)/40)
margin = .03
'''

def test_a_whole_comparison_with_scores_in_between(tmp_path):
    "From a program to the report: its margin, its measure, its name, and intervals of mean scores."
    mine = tmp_path/'near.py'
    mine.write_text(GRADED)
    for arm in ('sft', 'rl', 'sft_plus'): run_arm(config(mine, arm, tmp_path/'out'), progress=False)
    result = analyse(tmp_path/'out')
    assert (result['task'], result['measure'], result['margin'])==('near', 'mean score', .03)
    v = result['verdict']
    assert 'mean score' in v['endpoint'] and 'near' in v['endpoint'] and v['mcnemar_p'] is None and any('McNemar' in n for n in v['notes'])
    low, high = v['interval']
    assert low <= v['difference'] <= high and math.isfinite(v['se'])
    page = (tmp_path/'out'/'report'/'report.html').read_text(encoding='utf-8')
    assert 'Mean score on near' in page and 'GSM8K' not in page and 'stories' not in page
    assert read_json(tmp_path/'out'/'rl'/'model-1.0'/'seed0'/'config.json')['task']==str(mine)

def test_what_follows_from_a_file(tmp_path):
    "Short name, dev split, mixture, plan and scoring of any checkpoint."
    c = config(write(tmp_path/'my sums.jsonl', sums()), 'sft', '', dev=16)
    assert (c.target, c.eval.tasks[0], str(make_config('smoke', c.task).run_dir))==('my-sums', 'my-sums', '')
    train, dev, test = target_tasks(c)
    assert (len(train), len(dev), len(test), test.name)==(48, 16, 8, 'my-sums')
    assert sft_mixture(c).counts['my-sums']==2*48
    p = plan(c, peak=1e11)
    assert p['task']=='my-sums' and p['problems']==48 and p['prompt_tokens'] < 10

def test_any_checkpoint_is_scored_on_a_file(tmp_path, monkeypatch):
    task = write(tmp_path/'sums.jsonl', sums())
    run_arm(config(task, 'sft', tmp_path/'out'), progress=False)
    r = exp2_eval(checkpoint=str(arm_folder(config(task, 'sft', tmp_path/'out'))), task=(str(task),), max_items=6, max_new=8)
    assert list(r['tasks'])==['sums'] and r['tasks']['sums']['n']==6
    def fails(*a, **kw): raise UserError('memory is not enough.')
    monkeypatch.setattr(exp2nb.tools.eval, 'evaluate', fails)   # then there is no file of answers in the way of the next try
    with pytest.raises(UserError, match='memory'):
        exp2_eval(checkpoint=r['checkpoint'], task=(str(task),), items=str(tmp_path/'items.jsonl'))
    assert not (tmp_path/'items.jsonl').exists()

def test_hours_without_signal_are_refused_unless_told_to(tmp_path, monkeypatch, capsys):
    "A model that solves nothing; here every run counts as long. The easier levels are tried first, and a refusal trains nothing."
    monkeypatch.setattr(arms, 'LONG', 0.)
    c = config('stories', 'rl', tmp_path/'out')
    with pytest.raises(UserError, match='no group of the pre-flight has signal on stories.*without_signal'): run_arm(c, progress=False)
    out = capsys.readouterr().out
    assert 'Level stories:first' in out and 'Level stories:easy' in out
    found = read_json(arm_folder(c)/'preflight.json')
    assert set(found['levels'])=={'first', 'easy'} and found['signal']==0 and not (arm_folder(c)/'trained.json').exists()
    assert run_arm(replace(c, without_signal=True), progress=False)['steps']==2

# levels, and a generator

def test_the_usual_level_is_the_embedded_task():
    assert make_stories('test', 0, LEVELS['usual'])==make_stories('test') and LEVELS['usual']==World()
    assert [p.question for p in make_task('stories:usual', n=20)] != [] and task_name('stories:usual')=='stories-usual'

@pytest.mark.parametrize('text, word', [('stories:heavy', 'first, easy, usual'), ('stories:steps=9:events=1', 'gives no problem'),
                                        ('stories:other=2', 'other must be'), ('stories:change=1', 'change must be')])
def test_a_level_that_cannot_be(text, word): refused(text, word)

def test_a_generator_of_reasoning_gym():
    pytest.importorskip('reasoning_gym', reason="reasoning_gym is not installed: pip install 'exp2nb[gym]'")
    train, test = (make_task('reasoning_gym:chain_sum:size=200', s) for s in ('train', 'test'))
    assert {p.question for p in train}.isdisjoint(p.question for p in test) and not train.solved
    assert all(test.score(p, f'#### {p.answer}')['score']==1 for p in test)
    refused('reasoning_gym:no_such_thing', 'gives no problems')

@pytest.mark.skipif('reasoning_gym' in os.sys.modules, reason='reasoning_gym is there')
def test_a_generator_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(os.sys.modules, 'reasoning_gym', None)
    refused('reasoning_gym:leg_counting', "pip install 'exp2nb[gym]'")

def test_a_data_set_of_the_hub_may_have_columns_that_are_no_json(monkeypatch):
    when = datetime.datetime(2026, 1, 1)
    def rows(dataset, config, split, data_dir=''): return [dict(question=f'{split} {i}?', answer=str(i), made=when) for i in range(9)]
    monkeypatch.setattr(exp2nb.tasks, 'hub_splits', lambda *a: ['train', 'test'])
    monkeypatch.setattr(exp2nb.tasks, 'load_rows', rows)
    assert exp2nb.tasks.hub_task('someone/sums', {}, 'sums', 'test', '')[2].answer=='2'

def test_two_files_of_one_name_are_not_one_task(tmp_path):
    for d in ('a', 'b'):
        (tmp_path/d).mkdir()
        write(tmp_path/d/'sums.jsonl', [dict(question=f'{d}{i}?', answer=str(i)) for i in range(30)])
    names = [str(tmp_path/d/'sums.jsonl') for d in ('a', 'b')]
    with pytest.raises(UserError, match='two of the tasks are called sums'): find_tasks(names, '', 0)

def test_a_signal_while_a_scorer_judges_is_no_score():
    "It ends the evaluation, as anywhere else."
    def reward(row, answer): os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match='SIGTERM: it goes on'), Interrupt('it goes on'): judged(reward, {}, '7', 5)

def test_sft_without_anything_to_read_is_refused():
    "A task without worked solutions, and no other source."
    nothing = SimpleNamespace(c=make_config('open', base='somewhere'), mixture=Mixture([], 0))
    with pytest.raises(UserError, match='SFT has nothing to read'): make_sft(nothing)
