"Data that is missing, damaged or altered; the real sets; and a second reader that solves the stories from their text alone."
import collections, os, re
import pyarrow as pa, pyarrow.parquet as pq
import pytest
from dataclasses import replace

from exp2nb.config import UserError, make_config
from exp2nb.data import KNOWN, corpus_text, load_conversations, load_rows, word_list
from exp2nb.stories import NAMES, make_stories, masked_overlap
from exp2nb.tasks import TASKS, make_task, oracle, score_number, spelling_words, Problem
from exp2nb.mixture import pretrain_texts, sft_mixture, target_tasks

DATA = os.environ.get('EXP2_DATA_DIR', '')
real = pytest.mark.skipif(not DATA, reason='EXP2_DATA_DIR does not name a folder of the real data')

def write(folder, rows, dataset='openai/gsm8k', config='main', split='test'):
    f = folder/dataset/config/f'{split}.parquet'
    f.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), f)
    return f

GSM = dict(question='How many?', answer='Seven.\n#### 7')
ARC = dict(id='x', question='Which?', choices=dict(text=['a','b','c'], label=['A','B','C']), answerKey='A')
MMLU = dict(question='Which?', choices=['a','b','c','d'], answer=0, subject='s')

def refuse(folder, *words, dataset='openai/gsm8k', config='main', split='test'):
    "Loading raises one sentence that names the set, says what is wrong and how to get it."
    with pytest.raises(UserError) as e: load_rows(dataset, config, split, str(folder))
    message = str(e.value)
    for w in (dataset, 'exp2_fetch', 'data_dir', *words): assert w in message, message
    assert '\n' not in message and message.endswith('.')

# ---- what can be wrong with a set

def test_missing(tmp_path): refuse(tmp_path, 'missing', 'test.parquet')
def test_row_count(tmp_path): write(tmp_path, [GSM]*1318); refuse(tmp_path, '1,318', '1,319')
def test_missing_column(tmp_path): write(tmp_path, [dict(question='?', solution='!')]*1319); refuse(tmp_path, 'no column answer', 'solution')
def test_bad_row(tmp_path): write(tmp_path, [GSM]*1000+[dict(GSM, answer='#### x')]+[GSM]*318); refuse(tmp_path, 'row 1000', '####')

@pytest.mark.parametrize('damage', [lambda b: b[:-200], lambda b: b[:20], lambda b: b'', lambda b: b'PAR1'+b[4:80]+b'\xff'*40+b[120:], lambda b: b'not parquet at all'])
def test_damaged(tmp_path, damage):
    f = write(tmp_path, [dict(GSM, question=f'How many {i}?') for i in range(1319)])
    f.write_bytes(damage(f.read_bytes()))
    refuse(tmp_path, 'damaged', 'test.parquet')

@pytest.mark.parametrize('row, words', [
    (dict(ARC, answerKey='D'), "'D'"), (dict(ARC, answerKey=''), 'answer key'), (dict(ARC, choices=dict(text=['a','b','c'], label=['A','A','C'])), 'labels'),
    (dict(ARC, choices=dict(text=['a','b'], label=['A','B'])), '2 choices'), (dict(ARC, choices=dict(text=['a','b','c'], label=['A','B'])), '2 labels'),
    (dict(ARC, choices=None), 'wrong type')])
def test_arc_rows(tmp_path, row, words):
    write(tmp_path, [ARC]*298+[row], 'allenai/ai2_arc', 'ARC-Challenge', 'validation')
    refuse(tmp_path, 'row 298', words, dataset='allenai/ai2_arc', config='ARC-Challenge', split='validation')

@pytest.mark.parametrize('row', [dict(MMLU, answer=4), dict(MMLU, answer=-1), dict(MMLU, answer=None), dict(MMLU, choices=['a','b','c']), dict(MMLU, choices=None)])
def test_mmlu_rows(tmp_path, row):
    write(tmp_path, [MMLU]*284+[row], 'cais/mmlu', 'all', 'dev')
    refuse(tmp_path, 'row 284', dataset='cais/mmlu', config='all', split='dev')

def test_mmlu_validation_is_not_mixed_with_dev(tmp_path):
    write(tmp_path, [MMLU]*1531, 'cais/mmlu', 'all', 'validation'); write(tmp_path, [MMLU]*285, 'cais/mmlu', 'all', 'dev')
    assert len(load_rows('cais/mmlu', 'all', 'validation', str(tmp_path)))==1531

def test_split_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match='train'): load_rows('openai/gsm8k', 'main', 'dev', str(tmp_path))

def test_pieces(tmp_path):
    "A split may be cut into several files."
    for i,n in enumerate((1000, 319)): write(tmp_path, [GSM]*n, split=f'test-{i:05}-of-00002')
    assert len(load_rows('openai/gsm8k', 'main', 'test', str(tmp_path)))==1319

def test_hub(monkeypatch):
    import datasets
    def down(*a, **k): raise ConnectionError('no route to anywhere')
    monkeypatch.setattr(datasets, 'load_dataset', down)
    with pytest.raises(UserError, match=r'openai/gsm8k .*Hub.*ConnectionError.*exp2_fetch'): load_rows('openai/gsm8k', 'main', 'test')
    with pytest.raises(UserError, match='could not be streamed'): next(corpus_text())
    asked = []
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: asked.append((a,k)) or datasets.Dataset.from_list([GSM]*1319))
    assert load_rows('openai/gsm8k', 'main', 'test')[5]==GSM
    assert asked==[(('openai/gsm8k','main'), dict(split='test'))]
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: datasets.Dataset.from_list([GSM]*7))
    with pytest.raises(UserError, match='7 rows and not 1,319'): load_rows('openai/gsm8k', 'main', 'test')

def test_corpus_without_text(tmp_path):
    write(tmp_path, [dict(body='x')], 'my/corpus', 'default', 'train')
    with pytest.raises(UserError, match='text'): next(corpus_text('my/corpus', data_dir=str(tmp_path)))
    with pytest.raises(UserError, match='missing'): next(corpus_text('your/corpus', data_dir=str(tmp_path)))

def test_word_file(tmp_path):
    (tmp_path/'words').mkdir(); f = tmp_path/'words'/'words_alpha.txt'
    letters = 'abcdefghij'
    f.write_text('\n'.join(a+b+c+d for a in letters for b in letters for c in letters for d in letters))
    assert len(word_list(str(tmp_path)))==10_000
    f.write_bytes(b'\xff\xfe\x00words')
    with pytest.raises(UserError, match='words_alpha.txt is damaged'): word_list(str(tmp_path))

@pytest.mark.parametrize('line, words', [('{', 'not JSON'), ('7', 'not a list'), ('[]', 'turns'), ('[{"role":"user","content":"a"}]', 'turns'), ('{"messages":[{"role":"user"}]}', 'not a list'),
    ('[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]', 'turns'), ('[{"role":"user","content":"a"},{"role":"assistant","content":3}]', 'string')])
def test_identity_file(tmp_path, line, words):
    f = tmp_path/'identity.jsonl'
    f.write_text('[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]\n'+line+'\n')
    with pytest.raises(UserError, match=f'line 2.*{words}'): load_conversations(f)

# ---- a second reader: solves a story from its sentences, sharing no code with the generator

def solve(question):
    *said, ask = re.split(r'(?<=[.?]) ', question)
    has = collections.defaultdict(lambda: None)
    who = '|'.join(NAMES)
    P,Q,T,N,K = rf'(?P<p>{who})', rf'(?P<q>{who})', r'(?P<t>[a-z]+)', r'(?P<n>\d+)', r'(?P<k>\d+)'
    def add(p, t, n):
        if has[p,t] is not None: has[p,t] += n
    rules = [
        (rf'{P} is {N} years old\.', lambda m: None), (rf'{P} turns {N} today\.', lambda m: None),
        (rf'{P} (?:has|fills) {K} (?:boxes|bags) (?:of |with ){N} {T}(?: in each| each)?\.', lambda m: has.__setitem__((m['p'],m['t']), int(m['k'])*int(m['n']))),
        (rf'{P} has {K} times as many {T} as {Q}\.', lambda m: has.__setitem__((m['p'],m['t']), int(m['k'])*has[m['q'],m['t']])),
        (rf'For each of the {T} of {Q}, {P} has {K}\.', lambda m: has.__setitem__((m['p'],m['t']), int(m['k'])*has[m['q'],m['t']])),
        (rf'{P} has half as many {T} as {Q}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]/2)),
        (rf'{P} has half the number of {T} that {Q} has\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]/2)),
        (rf'{P} has {N} more {T} than {Q}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]+int(m['n']))),
        (rf'{P} has as many {T} as {Q} and {N} more\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]+int(m['n']))),
        (rf'{P} has {N} fewer {T} than {Q}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]-int(m['n']))),
        (rf'{P} needs {N} more {T} to have as many as {Q}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['q'],m['t']]-int(m['n']))),
        (rf'{P} (?:has|starts with|owns) {N} {T}\.', lambda m: has.__setitem__((m['p'],m['t']), int(m['n']))),
        (rf'There are {N} {T} in the room of {P}\.', lambda m: has.__setitem__((m['p'],m['t']), int(m['n']))),
        (rf'{P} (?:buys|gets) {K} (?:boxes|bags) (?:of |with ){N} {T}(?: in each)?\.', lambda m: add(m['p'], m['t'], int(m['k'])*int(m['n']))),
        (rf'{P} gives half of the {T} to a friend\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['p'],m['t']]/2)),
        (rf'{P} sells half of the {T}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['p'],m['t']]/2)),
        (rf'{P} puts the {T} in {K} equal piles and keeps one pile\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['p'],m['t']]/int(m['k']))),
        (rf'{P} keeps one of {K} equal parts of the {T}\.', lambda m: has.__setitem__((m['p'],m['t']), has[m['p'],m['t']]/int(m['k']))),
        (rf'{P} gives {Q} {N} {T}\.', lambda m: (add(m['p'], m['t'], -int(m['n'])), add(m['q'], m['t'], int(m['n'])))),
        (rf'Then {P} hands {N} {T} to {Q}\.', lambda m: (add(m['p'], m['t'], -int(m['n'])), add(m['q'], m['t'], int(m['n'])))),
        (rf'{Q} gets {N} {T} from {P}\.', lambda m: (add(m['p'], m['t'], -int(m['n'])), add(m['q'], m['t'], int(m['n'])))),
        (rf'{P} buys {N} {T}\.', lambda m: add(m['p'], m['t'], int(m['n']))), (rf'{P} finds {N} more {T}\.', lambda m: add(m['p'], m['t'], int(m['n']))),
        (rf'Then {P} gets {N} {T} as a gift\.', lambda m: add(m['p'], m['t'], int(m['n']))), (rf'A friend brings {P} {N} {T}\.', lambda m: add(m['p'], m['t'], int(m['n']))),
        (rf'{P} (?:loses|sells) {N} {T}\.', lambda m: add(m['p'], m['t'], -int(m['n']))), (rf'Then {P} throws away {N} {T}\.', lambda m: add(m['p'], m['t'], -int(m['n']))),
        (rf'A friend takes {N} {T} from {P}\.', lambda m: add(m['p'], m['t'], -int(m['n'])))]
    for s in said:
        found = [(f,m) for rule,f in rules if (m := re.fullmatch(rule, s))]
        assert len(found)==1, (s, len(found))
        f,m = found[0]; f(m)
        assert all(v is None or v > 0 and v==int(v) for v in has.values()), question
    names = re.findall(who, ask)
    things = [t for t in dict.fromkeys(t for _,t in has) if re.search(rf'\b{t}\b', ask)]
    if ' they ' in ask: names = list(dict.fromkeys(p for p,_ in has))
    if 'more' in ask or 'ahead' in ask: return has[names[0],things[0]] - has[names[1],things[0]]
    return sum(has[p,t] for p in names for t in things)

def test_a_second_reader_agrees():
    for split in ('train', 'test'):
        for r in make_stories(split)[:1500]:
            assert solve(r['question'])==int(r['answer'].split('#### ')[1]), r

def test_most_stories_are_no_repetition():
    assert masked_overlap(make_stories('train'), make_stories('test')) < .10

def test_seeds_make_other_stories():
    a,b = ({r['question'] for r in make_stories('test', seed=s)} for s in (0,1))
    assert len(a & b) < 20

# ---- tasks

def test_scores_of_hostile_completions():
    p = Problem('x', '?', '#### 7', '7')
    for text in ('', '####', '#### ', '#### -', '#### ,', '#### .', '#### 7.7.7', '#### ٧', '7', '#### 7e0000'*1000, '<|python_start|>#### 7', '\x00'*1000, '#'*100_000, '#### '+'9'*100_000):
        s = score_number(p, text)
        assert set(s)=={'pred','correct','parsed','correct_last_number','used_calculator'}
    assert score_number(p, '#### 7.')['correct'] and score_number(p, '#### 7.00')['correct'] and not score_number(p, '#### 7.7.7')['parsed']
    assert not score_number(p, 'The answer is 9.<|assistant_end|>#### 7')['correct'], 'what follows the end of the turn does not count'

@pytest.mark.parametrize('name', ['stories', 'spellingbee', 'choices'])
def test_oracle_embedded(name):
    t = make_task(name)
    assert all(t.score(p, oracle(t, p))['correct'] for p in t)
    assert len({p.id for p in t})==len(t)
    assert [p.question for p in t]==[p.question for p in make_task(name)]

def test_mixture_holds_neither_dev_nor_test():
    c = make_config('tiny')
    train,dev,test = target_tasks(c)
    held = {p.question for t in (dev,test) for p in t}
    mix = sft_mixture(c)
    asked = collections.Counter(m['messages'][0]['content'] for m in mix)
    assert not held & set(asked)
    assert all(asked[p.question]==2 for p in train)
    spelled = {re.search(r"'(\w+)'.count", m['messages'][1]['content'][1]['text'])[1] for m,i in ((mix[i],i) for i in range(len(mix))) if mix.source(i)=='spellingbee'}
    assert spelled <= set(spelling_words('train'))
    assert {p.meta['word'] for p in make_task('spellingbee')} <= set(spelling_words('test'))
    other = sft_mixture(c, seed=1)
    assert other.counts==mix.counts and [other[i] for i in range(20)]!=[mix[i] for i in range(20)]
    texts = pretrain_texts(c)
    assert not any(q in t for t in (next(texts) for _ in range(300)) for q in list(held)[:200])

# ---- the real sets

@real
def test_real_sets_are_sound():
    for name,known in KNOWN.items():
        for (config,split),n in known.rows.items():
            if (name,split) in (('cais/mmlu','auxiliary_train'), ('HuggingFaceTB/smol-smoltalk','train'), ('HuggingFaceTB/smol-smoltalk','test')) or not n: continue
            assert len(load_rows(name, config, split, DATA))==n

@real
def test_arc_labels():
    "269 questions are labelled 1, 2, 3, …; 22 have three choices and 15 five."
    rows = [r for c in ('ARC-Easy','ARC-Challenge') for s in ('train','validation','test') for r in load_rows('allenai/ai2_arc', c, s, DATA)]
    assert sum(r['choices']['label'][0]=='1' for r in rows)==269
    assert collections.Counter(len(r['choices']['label']) for r in rows)=={4:len(rows)-37, 3:22, 5:15}

@real
@pytest.mark.parametrize('name, n', [('gsm8k',1319), ('mmlu',14042), ('arc_easy',2376), ('arc_challenge',1172), ('spellingbee',256)])
def test_oracle_real(name, n):
    t = make_task(name, data_dir=DATA)
    assert len(t)==n and all(t.score(p, oracle(t, p))['correct'] for p in t)
    assert len({p.id for p in t})==n

@real
def test_gsm8k_target():
    train,dev,test = target_tasks(make_config('d12', data_dir=DATA))
    assert (len(train), len(dev), len(test), len(train)//16)==(7217, 256, 1319, 451)
    assert all(dev.score(p, oracle(dev, p))['correct'] for p in dev)
    assert [p.id for p in dev]==[p.id for p in target_tasks(make_config('d12', data_dir=DATA, n_train=100))[1]]

@real
def test_mmlu_cap_takes_from_every_part():
    assert len({p.meta['subject'] for p in make_task('mmlu', data_dir=DATA, n=300)}) > 40

@real
def test_full_mixture_names_what_is_missing():
    with pytest.raises(UserError, match='smol-smoltalk'): sft_mixture(make_config('d12', data_dir=DATA))

def test_full_mixture(tmp_path):
    "The note's sources (fewer chats), any row by its number, none built before it is asked for."
    write(tmp_path, [dict(GSM, question=f'How many {i}?') for i in range(7473)], split='train'); write(tmp_path, [GSM]*1319)
    write(tmp_path, [MMLU]*99842, 'cais/mmlu', 'all', 'auxiliary_train')
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')]
    write(tmp_path, [dict(messages=talk)]*20_000, 'HuggingFaceTB/smol-smoltalk', 'default', 'train')
    (tmp_path/'identity.jsonl').write_text('[{"role":"user","content":"Who?"},{"role":"assistant","content":"Me."}]\n'*1000)
    c = make_config('d12', data_dir=str(tmp_path))
    c = replace(c, sft=replace(c.sft, identity=str(tmp_path/'identity.jsonl')))
    mix = sft_mixture(c)
    assert mix.counts==dict(smoltalk=20_000, mmlu=99842, gsm8k=2*7217, simple_spelling=200_000, spellingbee=80_000, identity=1000)
    seen = {mix.source(i): mix[i] for i in range(2000)}
    assert set(seen)==set(mix.counts)
    assert seen['smoltalk']['messages']==talk and seen['mmlu']['messages'][1]['content']=='A'
    assert mix[len(mix)-1]==sft_mixture(c)[len(mix)-1]

def test_registry():
    with pytest.raises(UserError, match=', '.join(TASKS)): make_task('gsm9k')
