"The ledger: kills, merging, refusals, and an SFT+ arm that stops where the RL arm's total says."
import json, os, random, subprocess, sys
from dataclasses import replace
from pathlib import Path
import pandas as pd
import pytest
from exp2nb import ledger as L
from exp2nb.config import MATCH_ON, PRESETS, ModelConfig, Rates, UserError
from exp2nb.flops import Work, optimizer_cost, rollout_cost, supervised_cost, update_cost
from exp2nb.ledger import COLUMNS, RERUN, Budget, Ledger, budget_record, ledger_summary, load_budget, read_rows, totals, would_buy
from exp2nb.model import Transformer, shape_of
from exp2nb.tools.plan import rl_step
from exp2nb.protocol import Segments, Shape
from exp2nb.tokenizer import train_tokenizer
from exp2nb.train import Conversations, Run, Supervised

layer = ((4,4), (2,4), (2,4), (4,4), (16,4), (4,16))
TOY = Shape(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, vocab=8, matrices=layer*2, windows=(2,None), context=16)

def rl_steps(led, steps, start=0, seed=0):
    "A made-up RL run: its rows depend on the step alone."
    for i in range(start, steps):
        rng = random.Random(f'{seed}-{i}')
        prompts, new = [rng.randint(2, 9) for _ in range(4)], [[rng.randint(1, 9) for _ in range(4)] for _ in range(4)]
        led.add('rollout', i, rng.random(), **rollout_cost(TOY, prompts, new, Work(100, 90, 5000)))
        led.add('update', i, rng.random(), **update_cost(TOY, prompts, new, Work(120, 80, 6000)))
        led.add('optimizer', i, rng.random(), **optimizer_cost(TOY.matrices))
        led.add('eval', i, 5., flops_model=10**12)

@pytest.fixture
def arm(tmp_path):
    "A trained RL arm."
    led = Ledger(tmp_path/'rl'/'ledger.jsonl', TOY, 'stories')
    rl_steps(led, 6)
    (tmp_path/'rl'/'trained.json').write_text(json.dumps(dict(arm='rl', ledger=ledger_summary(led.file.path))))
    return tmp_path/'rl'

# --- rows
def test_columns_and_pandas(arm):
    rows = pd.read_json(arm/'ledger.jsonl', lines=True)
    assert tuple(rows.columns)==COLUMNS and len(rows)==24
    pd.testing.assert_frame_equal(rows, pd.DataFrame(read_rows(arm/'ledger.jsonl')), check_dtype=False)
    paid = rows[rows.stage.isin(L.BUDGET_STAGES)]
    assert paid.flops_model.sum()==totals(read_rows(arm/'ledger.jsonl'))['model'] < 10**12   # evaluation is not part of the budget

@pytest.mark.parametrize('bad', [dict(flop_model=1), dict(rank=1), dict(stage='x')])
def test_names_are_checked(tmp_path, bad):
    led = Ledger(tmp_path/'ledger.jsonl', TOY, 'stories')
    with pytest.raises((UserError, TypeError)): led.add('update', 0, **bad)
    assert len(led)==0 and (tmp_path/'ledger.jsonl').read_bytes()==b''

# --- kills
WRITER = '''
import signal, sys
sys.path.insert(0, {here!r})
from test_ledger import *
led = Ledger({path!r}, TOY, 'stories')
rl_steps(led, 20)
print('twenty steps', flush=True)
rl_steps(led, 2000, start=20)
signal.pause()
'''

def test_kill_and_resume_gives_the_same_total(tmp_path):
    "The kill comes at any time after the twentieth step; nothing here depends on when."
    path = tmp_path/'ledger.jsonl'
    code = WRITER.format(here=str(Path(__file__).parent), path=str(path))
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, env=os.environ | dict(OMP_NUM_THREADS='1'))
    assert p.stdout.readline()==b'twenty steps\n'
    p.kill()
    p.wait()
    with open(path, 'ab') as f: f.write(b'{"stage": "upd')      # and a write that was cut
    with pytest.warns(UserWarning, match='cut short'): led = Ledger(path, TOY, 'stories')
    steps = len(led)//4//2                                       # the checkpoint lies half-way back
    led.truncate(steps*4)
    rl_steps(led, steps+10, start=steps)
    whole = Ledger(tmp_path/'whole'/'ledger.jsonl', TOY, 'stories')
    rl_steps(whole, steps+10)
    assert len(led)==len(whole) and all(led.total(b)==whole.total(b) for b in MATCH_ON)
    assert path.read_bytes()==whole.file.path.read_bytes()

def test_one_file_over_ranks_and_a_kill_before_the_others_hand_over(tmp_path):
    path = tmp_path/'ledger.jsonl'
    ranks = [Ledger(path, TOY, 'stories', r) for r in range(3)]
    for step in range(5):
        for led in ranks: rl_steps(led, step+1, start=step, seed=led.rank)
        for led in ranks[1:]: ranks[0].take(led.hand_over())
    assert len(ranks[0])==60 and not ranks[1].rows and [p.name for p in tmp_path.glob('*.jsonl')]==['ledger.jsonl']
    here = ranks[0].position
    for led in ranks: rl_steps(led, 6, start=5, seed=led.rank)         # killed: only the main process's rows are in the file
    again = Ledger(path, TOY, 'stories')
    assert len(again)==64
    again.truncate(**here)
    assert again.rows==read_rows(path) and len(again)==60
    by_rank = pd.DataFrame(read_rows(path)).query('stage != "eval"').groupby('rank').seconds.sum()
    t = totals(read_rows(path))
    assert t['seconds']==pytest.approx(by_rank.max()) and t['device_seconds']==pytest.approx(by_rank.sum())

def test_ranks_share_a_step_without_changing_its_price(tmp_path):
    groups = [(p, [p, 3, 1]) for p in range(2, 9)]
    def price(world):
        folder = tmp_path/str(world)
        ranks = [Ledger(folder/'ledger.jsonl', TOY, 'stories', r) for r in range(world)]
        for r,led in enumerate(ranks):
            mine = groups[r::world]
            led.add('update', 0, **update_cost(TOY, [p for p,_ in mine], [ns for _,ns in mine], Work()))
            led.add('optimizer', 0, **optimizer_cost(TOY.matrices, rank=r))
            if r: ranks[0].take(led.hand_over())
        return totals(read_rows(folder/'ledger.jsonl'))['model']
    assert price(1)==price(2)==price(3)

# --- refusals
def refused(f, *words):
    with pytest.raises(UserError) as e: f()
    message = str(e.value)
    assert '\n' not in message and all(w in message for w in words), message

def test_good_budget(arm):
    for basis in MATCH_ON:
        b = load_budget(arm, basis, TOY, 'stories')
        assert b.target==Ledger(arm/'ledger.jsonl', TOY, 'stories').total(basis) > 0 and b.spent==0

def test_missing(arm, tmp_path):
    refused(lambda: load_budget(tmp_path/'no', 'model', TOY, 'stories'), 'no arm was trained', RERUN)
    (arm/'trained.json').unlink()
    refused(lambda: load_budget(arm, 'model', TOY, 'stories'), 'no arm was trained', RERUN)
    (arm/'trained.json').write_text('{}')
    refused(lambda: load_budget(arm, 'model', TOY, 'stories'), 'trained.json is not what this version writes (ledger is missing)')
    (arm/'trained.json').write_text('{"ledger"')
    refused(lambda: load_budget(arm, 'model', TOY, 'stories'), 'damaged')

def test_another_model_task_or_revision(arm, monkeypatch):
    refused(lambda: load_budget(arm, 'model', replace(TOY, width=8), 'stories'), 'another model', RERUN)
    refused(lambda: load_budget(arm, 'model', TOY, 'gsm8k'), 'another task', 'stories', 'gsm8k', RERUN)
    refused(lambda: load_budget(arm, 'watts', TOY, 'stories'), 'model, executed, note, seconds')
    refused(lambda: Ledger(arm/'ledger.jsonl', TOY, 'gsm8k'), 'another task')
    monkeypatch.setattr(L, 'COUNTING_REVISION', L.COUNTING_REVISION+1)
    refused(lambda: load_budget(arm, 'model', TOY, 'stories'), 'another revision of the counting', RERUN)

def test_damaged_files(arm):
    path = arm/'ledger.jsonl'
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    damages = [(b'', 'is empty'), (b''.join(lines[:7]), 'truncated (7 of 24 rows)'), (whole[:-30], 'truncated (23 of 24 rows)'),
               (whole.replace(b'"rollout"', b'"preflight"', 1), 'was changed'), (lines[1]+lines[0]+b''.join(lines[2:]), 'was changed')]
    for data,words in damages:
        path.write_bytes(data)
        refused(lambda: load_budget(arm, 'model', TOY, 'stories'), words, RERUN)
    path.write_bytes(b''.join(lines[:3])+b'nonsense\n'+b''.join(lines[3:]))
    refused(lambda: read_rows(path), 'line 4')

def test_what_follows_the_training_does_not_count(arm):
    "The evaluation's rows, or any others: the budget stays that of the training, and the ledger is as good as before."
    before = load_budget(arm, 'model', TOY, 'stories')
    rl_steps(Ledger(arm/'ledger.jsonl', TOY, 'stories'), 8, start=6)
    assert len(read_rows(arm/'ledger.jsonl'))==32 and load_budget(arm, 'model', TOY, 'stories')==before

def test_a_ledger_that_bills_nothing(tmp_path):
    led = Ledger(tmp_path/'ledger.jsonl', TOY, 'stories')
    led.add('eval', 0, 1., flops_model=5)
    (tmp_path/'trained.json').write_text(json.dumps(dict(ledger=ledger_summary(led.file.path))))
    refused(lambda: load_budget(tmp_path, 'model', TOY, 'stories'), 'no training work', RERUN)

# --- matching
TINY = PRESETS['tiny']

def price_on(shape, basis):
    def price(lengths):
        lengths = [l-1 for l in lengths]
        work = Work(sum(lengths), sum(lengths)//2, sum(Segments(shape, lengths).pairs_planned) if lengths else 0)
        return sum(r[f'flops_{basis}'] for r in (supervised_cost(shape, [l+1 for l in lengths], work), optimizer_cost(shape.matrices)))
    return price

@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('basis', ['model', 'executed', 'note'])
def test_budget_of_the_embedded_default_is_met(basis, seed):
    "The tiny preset's whole RL budget, spent on conversations of the stories' lengths."
    shape, rng = shape_of(TINY['model']), random.Random(seed)
    lengths = [rng.randint(40, 131) for _ in range(2000)]
    b = Budget(25*sum(r[f'flops_{basis}'] for r in rl_step(shape, 16, 16, 40, 40).values()), basis)   # a quarter of it: 25 steps
    price, i, sizes, prices, fractions = price_on(shape, basis), 0, [], [], []
    while take := b.fit([lengths[(i+k)%2000] for k in range(64)], 32, price):
        fractions.append(b.fraction)
        b.spend({f'flops_{basis}': price(take)})
        i, sizes, prices = i+len(take), [*sizes, len(take)], [*prices, price(take)]
    assert abs(b.residual) < 1e-3 and b.spent <= b.target
    assert set(sizes[:-1])=={32} and sizes[-1] <= 49
    assert prices[-1] >= .49*prices[-2]   # in price, the optimizer's step included: half a step at least
    assert fractions==sorted(fractions) and fractions[0]==0 and fractions[-1] < 1

@pytest.mark.parametrize('seed', range(100))
def test_fit_never_overspends_and_leaves_less_than_a_token(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(3, 16) for _ in range(500)]
    price = price_on(TOY, 'model')
    batch = rng.randint(4, 9)
    b = Budget(rng.randint(price(lengths[:batch])//2, 20*price(lengths[:batch])))
    overhead, i = price([]), 0
    while take := b.fit(lengths[i:i+6*batch], batch, price):
        assert take[:-1]==lengths[i:i+len(take)-1] and 2 <= take[-1] <= lengths[i+len(take)-1]
        b.spend(dict(flops_model=price(take)))
        i += len(take)
    assert 0 <= b.left < max(overhead+price([2])-overhead, 3*(2*TOY.n+16*32)), (b.left, overhead)

def chat(question, answer): return {'messages': [{'role':'user', 'content':question}, {'role':'assistant', 'content':answer}]}
TEXTS = [f'What is {a} plus {b}?' for a in range(10) for b in range(10)]

@pytest.fixture(scope='module')
def words():
    tok = train_tokenizer(TEXTS, 300)
    return tok, [chat(t, f'#### {i//10+i%10}') for i,t in enumerate(TEXTS)]

@pytest.mark.parametrize('basis', MATCH_ON)
def test_sft_plus_stops_where_the_ledger_says(tmp_path, words, basis):
    "A made-up RL ledger with a known total; real supervised steps until it is spent."
    tok, convs = words
    model = Transformer(ModelConfig(2, aspect=16, head_dim=16, vocab=tok.vocab_size, context=64))
    rl = Ledger(tmp_path/'rl'/'ledger.jsonl', model.shape, 'stories')
    rl.add('rollout', 0, .1, flops_model=700_000_000, flops_executed=800_000_000, flops_note=900_000_000)
    rl.add('update', 0, .15, flops_model=1_300_000_000, flops_executed=1_000_000_000, flops_note=2_000_000_000)
    rl.add('preflight', 0, 99., flops_model=10**15)
    (tmp_path/'rl'/'trained.json').write_text(json.dumps(dict(ledger=ledger_summary(rl.file.path))))
    budget = load_budget(tmp_path/'rl', basis, model.shape, 'stories')
    assert budget.target==dict(model=2_000_000_000, executed=1_800_000_000, note=2_900_000_000, seconds=.25)[basis]
    led = Ledger(tmp_path/'sft_plus'/'ledger.jsonl', model.shape, 'stories')
    stage = Supervised('sft', model, Rates(), Conversations(convs, tok, 0, 64), budget, led, batch_tokens=300, micro_tokens=150)
    Run(stage, tmp_path/'sft_plus').go(progress=False)
    spent = led.total(basis)
    assert spent==pytest.approx(budget.spent)
    if basis=='seconds':
        last = sum(r['seconds'] for r in led.rows if r['step']==led.rows[-1]['step'])
        assert 0 <= spent-budget.target <= last
    else: assert spent==budget.spent and abs(spent/budget.target-1) < 1e-3
    record = budget_record(basis, totals(rl.rows), totals(led.rows), stage.n, stage.stream.passes)
    assert record['would_buy'][basis]['steps']==pytest.approx(stage.n/(1+record['residual']))

def test_would_buy_from_totals():
    rl, more = dict(model=10, executed=20, note=30, seconds=40.), dict(model=10, executed=10, note=10, seconds=10.)
    want = {b: dict(steps=6*k, epochs=3*k) for b,k in dict(model=1, executed=2, note=3, seconds=4).items()}
    assert would_buy(rl, more, 6, 3.)==want
