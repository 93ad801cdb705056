"Evaluation against real benchmarks: an oracle, a novice, programs that never start, and exp2_eval as users call it."
import json, os, subprocess, sys, time
import pytest, torch
from tiny import hub_model, hub_tokenizer, oracle, randomised
from exp2nb.sandbox import sandbox
from exp2nb.bases.base import export_model, load_base
from exp2nb.config import EvalConfig, ModelConfig
from exp2nb.tools.eval import exp2_eval
from exp2nb.evaluate import KEY, Evaluation, choice_answers, evaluate, item, score_all, score_rows
from exp2nb.model import Transformer
from exp2nb.store import read_jsonl, save_checkpoint
from exp2nb.tasks import make_task
from exp2nb.tokenizer import train_tokenizer
from exp2nb.store import save_model

DATA = os.environ.get('EXP2_DATA_DIR', '')
EMBEDDED, REAL = ('stories', 'spellingbee', 'choices'), ('gsm8k', 'mmlu', 'arc_easy', 'arc_challenge', 'humaneval')
needs_data = pytest.mark.skipif(not DATA, reason='EXP2_DATA_DIR is not set: no real data')
each_task = pytest.mark.parametrize('name', [*EMBEDDED, *(pytest.param(n, marks=needs_data) for n in REAL)])
LOADED = {}

def task_of(name):
    if name not in LOADED: LOADED[name] = make_task(name, 'test', DATA)
    return LOADED[name]

def of(model, tok, **kw):
    "An evaluation with short answers."
    return Evaluation(model, tok, EvalConfig(**(dict(max_new=16, rows=128, n_samples=0) | kw)))

@pytest.fixture(scope='module')
def tok():
    texts = ['How many apples are there? Tom has 12. - red=A - blue=B\nAnswer with the letter.', 'def f(x): return x']
    return train_tokenizer(texts*5, 400)

def novice_of(tok, context=512, seed=0):
    m, g = Transformer(ModelConfig(2, aspect=16, head_dim=16, vocab=tok.vocab_size, context=context)), torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data.normal_(0, .3, generator=g)
    return m

@each_task
def test_the_reference_is_right_in_every_row(name):
    "Every problem of the whole set, through the scorer and what the rows add up to (programs: the sandbox's own tests run all 164)."
    task = task_of(name).take(16) if name=='humaneval' else task_of(name)
    problems = [task[i] for i in range(len(task))]
    e = of(None, None)
    scores = score_all(task, problems, [oracle(task, p) for p in problems])
    rows = [item(e, task, p, s, stopped=True) for p,s in zip(problems, scores, strict=True)]
    s = score_rows(rows)
    assert s['accuracy']==1 and s['n']==len(task)
    if task.kind=='number': assert s['parsed']==s['correct_if_parsed']==s['correct_last_number']==1

@each_task
def test_a_novice_guesses(name, tok):
    "Within the 95 % interval around chance on choice questions, nothing elsewhere."
    task = task_of(name).take(400 if task_of(name).kind=='choice' else 24)
    scores, not_run = evaluate(of(novice_of(tok), tok), {name:task})
    if name in not_run: pytest.skip(not_run[name])
    assert abs(scores[name]['accuracy']-task.chance) <= 1.96*(task.chance*(1-task.chance)/len(task))**.5
    if name=='mmlu': assert scores[name]['cropped'] > 0

@needs_data
def test_questions_with_other_labels(tok):
    "ARC's 1–4, three and five choices: the pick is always one of the question's own labels."
    task = task_of('arc_easy')
    odd = [i for i in range(len(task)) if task[i].labels!=('A','B','C','D')]
    rows = choice_answers(of(novice_of(tok), tok), task.subset(odd)).rows
    assert {len(task[i].labels) for i in odd}=={3,4,5} and any('1' in task[i].labels for i in odd)
    assert all(r['pred'] in task[i].labels for r,i in zip(rows, odd, strict=True))

class Split:
    "A tokenizer that cuts every label in two."
    def __init__(self, tok): self.tok = tok
    def __getattr__(self, name): return getattr(self.tok, name)
    def render(self, conv):
        ids, own = self.tok.render(conv)
        return ids[:-1]+[0]+ids[-1:], own[:-1]+[1]+own[-1:]

def test_labels_of_two_tokens_are_refused_and_reported(tok):
    scores, not_run = evaluate(of(novice_of(tok), Split(tok)), dict(choices=task_of('choices').take(4)))
    assert scores=={} and 'not one token' in not_run['choices']

def test_no_room_for_the_prompt_is_said(tok):
    _, not_run = evaluate(of(novice_of(tok), tok, max_new=512), dict(stories=task_of('stories').take(4)))
    assert 'lower max_new' in not_run['stories']

@needs_data
def test_a_program_that_never_started_is_not_wrong(tok, monkeypatch):
    from exp2nb import evaluate as module
    not_started = dict(passed=False, outcome='not_started', reason='no memory', isolation='landlock')
    monkeypatch.setattr(module, 'run_many', lambda problems, texts, **kw: [not_started]*len(texts))
    items = []
    tasks = dict(humaneval=task_of('humaneval').take(2), choices=task_of('choices').take(2))
    scores, not_run = evaluate(of(novice_of(tok), tok), tasks, items=items)
    assert list(scores)==['choices'] and 'no memory' in not_run['humaneval'] and {r['task'] for r in items}=={'choices'}

@needs_data
def test_without_isolation_programs_run_only_on_demand_and_the_result_says_so(tok, monkeypatch):
    monkeypatch.setattr(sandbox, 'try_isolation', lambda name: 'not on this machine')
    tasks = dict(humaneval=task_of('humaneval').take(2))
    scores, not_run = evaluate(of(novice_of(tok), tok), tasks)
    assert scores=={} and 'allow_unsafe' in not_run['humaneval']
    scores, _ = evaluate(of(novice_of(tok), tok, allow_unsafe=True), tasks)
    assert scores['humaneval']['unsafe'] and scores['humaneval']['isolation']=='none' and scores['humaneval']['n']==2

def test_every_row_has_its_text(tok):
    "items.jsonl and completions.jsonl: the same answers under the same keys, and the text is what was scored."
    tasks = dict(stories=task_of('stories').take(3), choices=task_of('choices').take(3))
    rows, texts = [], []
    evaluate(of(novice_of(tok), tok, n_samples=2), tasks, 'stories', items=rows, completions=texts)
    assert len(rows)==3+3*2+3 and [[r[k] for k in KEY] for r in rows]==[[t[k] for k in KEY] for t in texts]
    for r,t in zip(rows, texts, strict=True):
        task = tasks[r['task']]
        problem = next(task[i] for i in range(len(task)) if task[i].id==r['id'])
        assert task.score(problem, t['text'])['pred']==r['pred'] and r['score']==float(r['correct'])

@pytest.mark.slow
@needs_data
def test_all_of_mmlu_in_ten_minutes():
    model = Transformer(ModelConfig(4, aspect=32, head_dim=32, vocab=640, context=256))   # the embedded default
    words = train_tokenizer((p.question for p in (task_of('mmlu')[i] for i in range(500))), 640)
    began = time.time()
    scores, _ = evaluate(of(model, words), dict(mmlu=task_of('mmlu')))
    assert scores['mmlu']['n']==14042 and time.time()-began < 600

# the command

@pytest.fixture(scope='module')
def folders(tok, tmp_path_factory):
    "The same model in all the forms that can be named."
    top = tmp_path_factory.mktemp('models')
    torch.manual_seed(0)
    tok = train_tokenizer(['Tom has 3 apples. - cat=A - dog=B']*5, 320)
    model = Transformer(ModelConfig(2, aspect=16, head_dim=16, vocab=tok.vocab_size, context=256))
    for p in model.parameters(): p.data.normal_(0, .1)
    arm = top/'run/rl/model-1.0/seed0'
    save_model(arm/'weights', model, tok)
    save_checkpoint(arm, 7, dict(model=model.state_dict(), stage={}))
    out = dict(arm=arm, weights=arm/'weights', step=arm/'checkpoints/step_000007', nanochat=top/'nanochat')
    out['nanochat'] = export_model(model, tok, top/'nanochat')
    return out

@pytest.fixture(scope='module')
def hub_folder(tmp_path_factory):
    "A small Llama in Hugging Face's form."
    tok = hub_tokenizer(['user assistant cat=A'], 270)
    model = randomised(hub_model(vocab_size=tok.vocab_size))
    export_model(model, tok, top := tmp_path_factory.mktemp('hub')/'llama')
    return top

def call(capsys, *args):
    "Exit code, stdout, stderr."
    code = 0
    try: code = exp2_eval.main([str(a) for a in args])
    except SystemExit as e: code = e.code
    said = capsys.readouterr()
    return code, said.out, said.err

def test_every_form_of_a_checkpoint_has_the_same_score(folders, capsys):
    got = {k: json.loads(call(capsys, '--checkpoint', f, '--task', 'choices', '--max-items', 40, '--json')[1]) for k,f in folders.items()}
    assert len({r['tasks']['choices']['accuracy'] for r in got.values()})==1
    assert len({r['weights_sha256'] for k,r in got.items() if k!='nanochat'})==1 and got['nanochat']['family']=='nanochat'

def test_an_arm_on_a_base_from_elsewhere(hub_folder, tmp_path, capsys):
    "The base as it came, and the arm's own weights."
    model, tok, _ = load_base(hub_folder)
    for p in model.parameters(): p.data += .01
    sha = save_model(tmp_path/'arm/weights', model, tok, base=str(hub_folder))
    def result(folder): return json.loads(call(capsys, '--checkpoint', folder, '--task', 'choices', '--max-items', 20, '--json')[1])
    base, arm = result(hub_folder), result(tmp_path/'arm')
    assert base['family']==arm['family']=='hub' and arm['weights_sha256']==sha!=base['weights_sha256']

def test_samples_and_rows(folders, capsys, tmp_path):
    rows = tmp_path/'rows.jsonl'
    args = f'--task stories --task choices --n-samples 3 --temperature 1 --max-items 5 --max-new 12 --items {rows} --json'.split()
    code, out, _ = call(capsys, '--checkpoint', folders['arm'], *args)
    r = json.loads(out)
    assert code==0 and list(r['tasks'])==['stories','choices'] and r['not_run']=={} and not r['unsafe']
    t1 = r['tasks']['stories']['t1']
    assert t1['samples']==15 and set(t1['pass_at_k'])==set(t1['majority_at_k'])=={'1','2','3'} and 't1' not in r['tasks']['choices']
    kept = read_jsonl(rows)
    columns = {'task', 'id', 'sample', 'temperature', 'checkpoint', 'pred', 'correct', 'parsed', 'stopped', 'used_calculator'}
    assert len(kept)==5+15+5 and columns <= set(kept[0])
    assert call(capsys, '--checkpoint', folders['arm'], '--task', 'choices', '--items', rows)[0]==2

def test_missing_sets_are_not_run_and_never_zero(folders, capsys, tmp_path):
    args = ('--task', 'all', '--max-items', 4, '--max-new', 8, '--data-dir', tmp_path, '--json')
    code, out, _ = call(capsys, '--checkpoint', folders['arm'], *args)
    r = json.loads(out)
    assert code==0 and list(r['tasks'])==['spellingbee'] and set(r['not_run'])=={'gsm8k','mmlu','arc_easy','arc_challenge','humaneval'}
    assert 'exp2_fetch cais/mmlu' in r['not_run']['mmlu'] and not r['chat_core']['complete'] and r['chat_core']['over']==['spellingbee']
    code, out, _ = call(capsys, '--checkpoint', folders['arm'], '--task', 'mmlu', '--data-dir', tmp_path)
    assert code==1 and 'mmlu was not run' in out

@pytest.mark.parametrize('args,word', [
    (['--task','mmul'], 'choose one of'),
    (['--n-samples','-1'], '--n-samples'),
    (['--n-samples','many'], '--n-samples'),
    (['--temperature','0'], '--temperature'),
    (['--max-items','-3'], '--max-items'),
    (['--data-dir','/no/such/folder'], '--data-dir'),
    (['--device','abacus'], 'cuda'),
    (['--chekpoint','x'], '--chekpoint is not an option')])
def test_bad_input_is_one_line(folders, capsys, args, word):
    code, out, err = call(capsys, '--checkpoint', folders['arm'], *args)
    assert code==2 and out=='' and len(err.strip().splitlines())==1 and word in err

def test_checkpoints_that_are_none(folders, capsys, tmp_path):
    (tmp_path/'half').mkdir()
    for path,word in ((None, '--checkpoint is missing'), (tmp_path/'nothing', 'nothing at'), (tmp_path/'half', 'not a base that we know')):
        code, out, err = call(capsys, *(['--checkpoint', path] if path else []), '--task', 'choices')
        assert (code, out)==(2, '') and word in err and len(err.strip().splitlines())==1

def test_help_in_a_fresh_process():
    code = 'from exp2nb.tools.eval import exp2_eval; exp2_eval.main()'
    r = subprocess.run([sys.executable, '-c', code, '--help'], capture_output=True, text=True, timeout=120)
    assert r.returncode==0
    for o in '--checkpoint --task --n-samples --temperature --max-items --data-dir --json --allow-unsafe'.split(): assert o in r.stdout
