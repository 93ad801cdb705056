"Data that is missing, damaged or altered; the real sets; and a second reader that solves the stories from their text alone."
import collections, json, os, re
import pandas as pd, pyarrow as pa, pytest
from dataclasses import replace
from tiny import oracle, write_split

from exp2nb.config import UserError, make_config
from exp2nb.data import KNOWN, corpus_text, load_conversations, load_rows, word_list
from exp2nb.mixture import pretrain_texts, sft_mixture, target_tasks
from exp2nb.stories import NAMES, make_stories
from exp2nb.tasks import Problem, make_task, score_number, spelling_words
from exp2nb.tokenizer import train_tokenizer

DATA = os.environ.get('EXP2_DATA_DIR', '')
real = pytest.mark.skipif(not DATA, reason='EXP2_DATA_DIR does not name a folder of the real data')

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

def test_row_count(tmp_path):
    write_split(tmp_path, [GSM]*1318)
    refuse(tmp_path, '1,318', '1,319')

def test_missing_column(tmp_path):
    write_split(tmp_path, [dict(question='?', solution='!')]*1319)
    refuse(tmp_path, 'no column answer', 'solution')

def test_bad_row(tmp_path):
    write_split(tmp_path, [GSM]*1000+[dict(GSM, answer='#### x')]+[GSM]*318)
    refuse(tmp_path, 'row 1000', '####')

@pytest.mark.parametrize('damage', [lambda b: b[:-200], lambda b: b[:20], lambda b: b'', lambda b: b'not parquet at all',
                                    lambda b: b'PAR1'+b[4:80]+b'\xff'*40+b[120:]])
def test_damaged(tmp_path, damage):
    f = write_split(tmp_path, [dict(GSM, question=f'How many {i}?') for i in range(1319)])
    f.write_bytes(damage(f.read_bytes()))
    refuse(tmp_path, 'damaged', 'test.parquet')

@pytest.mark.parametrize('row, words', [
    (dict(ARC, answerKey='D'), "'D'"),
    (dict(ARC, answerKey=''), 'answer key'),
    (dict(ARC, choices=dict(text=['a','b','c'], label=['A','A','C'])), 'labels'),
    (dict(ARC, choices=dict(text=['a','b'], label=['A','B'])), '2 choices'),
    (dict(ARC, choices=dict(text=['a','b','c'], label=['A','B'])), '2 labels'),
    (dict(ARC, choices=None), 'wrong type')])
def test_arc_rows(tmp_path, row, words):
    write_split(tmp_path, [ARC]*298+[row], 'allenai/ai2_arc', 'ARC-Challenge', 'validation')
    refuse(tmp_path, 'row 298', words, dataset='allenai/ai2_arc', config='ARC-Challenge', split='validation')

@pytest.mark.parametrize('change', [dict(answer=4), dict(answer=-1), dict(answer=None), dict(answer=1.5), dict(answer=float('nan')),
                                    dict(choices=['a','b','c']), dict(choices=None)])
def test_mmlu_rows(tmp_path, change):
    write_split(tmp_path, pa.Table.from_pandas(pd.DataFrame([MMLU]*284+[MMLU | change])), 'cais/mmlu', 'all', 'dev')
    refuse(tmp_path, 'row 284', dataset='cais/mmlu', config='all', split='dev')

def test_mmlu_answers_as_floats_are_what_they_were(tmp_path):
    "A pandas round trip with a missing value in between leaves float64."
    rows = [MMLU | dict(answer=i%4) for i in range(1531)]
    for kind in (pa.float64(), pa.float32(), pa.int8(), pa.decimal128(5, 1)):
        table = pa.Table.from_pylist(rows)
        answers = pa.array([float(i%4) for i in range(1531)]).cast(kind)
        write_split(tmp_path, table.set_column(2, 'answer', answers), 'cais/mmlu', 'all', 'validation')
        task = make_task('mmlu', 'validation', str(tmp_path))
        assert [task[i].answer for i in range(8)]==list('ABCDABCD')

def test_mmlu_validation_is_not_mixed_with_dev(tmp_path):
    write_split(tmp_path, [MMLU]*1531, 'cais/mmlu', 'all', 'validation')
    write_split(tmp_path, [MMLU]*285, 'cais/mmlu', 'all', 'dev')
    assert len(load_rows('cais/mmlu', 'all', 'validation', str(tmp_path)))==1531

def test_split_that_does_not_exist(tmp_path):
    with pytest.raises(UserError, match='train'): load_rows('openai/gsm8k', 'main', 'dev', str(tmp_path))

# ---- a split in several files

def string(kind):
    def change(table): return table.cast(pa.schema([(f.name, kind) for f in table.schema]))
    return change

def struct_of_large(table):
    "ARC's choices as another writer stores them."
    kind = pa.struct([('label', pa.large_list(pa.large_string())), ('text', pa.large_list(pa.string()))])
    choices = pa.array([dict(label=c['label'], text=c['text']) for c in table['choices'].to_pylist()], kind)
    return table.set_column(table.column_names.index('choices'), 'choices', choices)

OTHER = {
    'large_string': string(pa.large_string()),
    'string_view': string(pa.string_view()),
    'dictionary': string(pa.dictionary(pa.int32(), pa.string())),
    'order of columns': lambda t: t.select(t.column_names[::-1]),
    'not nullable': lambda t: t.cast(pa.schema([pa.field(f.name, f.type, nullable=False) for f in t.schema])),
    "pandas' index": lambda t: t.append_column('__index_level_0__', pa.array(range(len(t)))),
    'a column more': lambda t: t.append_column('source', pa.array(['x']*len(t))),
    'metadata': lambda t: t.replace_schema_metadata({'huggingface': '{"info": {}}'})}

@pytest.mark.parametrize('change', OTHER.values(), ids=OTHER)
@pytest.mark.parametrize('first', [True, False])
def test_pieces_written_by_different_programs(tmp_path, change, first):
    "Either piece may be the odd one, and the rows are those of one file."
    rows = [dict(GSM, question=f'How many {i}?') for i in range(1319)]
    for i,piece in enumerate((rows[:1000], rows[1000:])):
        table = pa.Table.from_pylist(piece)
        write_split(tmp_path, change(table) if (i==0)==first else table, split=f'test-{i:05}-of-00002')
    got = load_rows('openai/gsm8k', 'main', 'test', str(tmp_path))
    assert [{k:r[k] for k in GSM} for r in got]==rows

def test_pieces_with_nested_columns(tmp_path):
    for i,(n,change) in enumerate(((200, lambda t: t), (99, struct_of_large))):
        table = change(pa.Table.from_pylist([ARC | dict(id=f'{i}/{j}') for j in range(n)]))
        write_split(tmp_path, table, 'allenai/ai2_arc', 'ARC-Challenge', f'validation-{i}')
    got = load_rows('allenai/ai2_arc', 'ARC-Challenge', 'validation', str(tmp_path))
    assert got[0]['choices']==got[298]['choices']==ARC['choices']

def test_pieces_that_are_no_one_set(tmp_path):
    write_split(tmp_path, [GSM]*1000, split='test-0')
    write_split(tmp_path, [dict(question='?')]*319, split='test-1')
    refuse(tmp_path, 'test-1.parquet has no column answer')
    write_split(tmp_path, [dict(question='?', answer=[7])]*319, split='test-1')
    refuse(tmp_path, 'different types')
    f = write_split(tmp_path, [GSM]*319, split='test-1')
    f.write_bytes(b'PAR1')
    refuse(tmp_path, 'test-1.parquet cannot be read')

# ---- the Hub, corpora, words

def test_hub(monkeypatch):
    import datasets
    def down(*a, **k): raise ConnectionError('no route to anywhere')
    monkeypatch.setattr(datasets, 'load_dataset', down)
    with pytest.raises(UserError, match=r'openai/gsm8k .*Hub.*ConnectionError.*exp2_fetch'): load_rows('openai/gsm8k', 'main', 'test')
    with pytest.raises(UserError, match='could not be streamed'): next(corpus_text())
    asked = []
    def answer(*a, **k):
        asked.append((a, k))
        return datasets.Dataset.from_list([GSM]*1319)
    monkeypatch.setattr(datasets, 'load_dataset', answer)
    assert load_rows('openai/gsm8k', 'main', 'test')[5]==GSM
    assert asked==[(('openai/gsm8k','main'), dict(split='test'))]
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: datasets.Dataset.from_list([GSM]*7))
    with pytest.raises(UserError, match='7 rows and not 1,319'): load_rows('openai/gsm8k', 'main', 'test')
    monkeypatch.setattr(datasets, 'load_dataset', lambda *a, **k: datasets.Dataset.from_list([GSM]).to_iterable_dataset())
    with pytest.raises(UserError, match='no column text'): next(corpus_text())

def test_corpus_without_text(tmp_path):
    write_split(tmp_path, [dict(body='x')], 'my/corpus', 'default', 'train')
    with pytest.raises(UserError, match='text'): next(corpus_text('my/corpus', data_dir=str(tmp_path)))
    with pytest.raises(UserError, match='missing'): next(corpus_text('your/corpus', data_dir=str(tmp_path)))

def test_a_document_that_is_null_is_no_document(tmp_path):
    write_split(tmp_path, [dict(text=str(i) if i%3 else None) for i in range(200)], 'my/corpus', 'default', 'train')
    whole = list(corpus_text('my/corpus', data_dir=str(tmp_path)))
    assert whole==[str(i) for i in range(200) if i%3]
    for start in (1, 60, 100): assert list(corpus_text('my/corpus', data_dir=str(tmp_path), start=start))==whole[start:]

def test_word_file(tmp_path):
    (tmp_path/'words').mkdir()
    f = tmp_path/'words'/'words_alpha.txt'
    letters = 'abcdefghij'
    words = '\r\n'.join(a+b+c+d for a in letters for b in letters for c in letters for d in letters)
    for mark in ('', '\ufeff'):
        f.write_text(mark+words, encoding='utf-8')
        assert len(word_list(str(tmp_path)))==10_000
    f.write_bytes(b'\xff\xfe\x00words')
    with pytest.raises(UserError, match='words_alpha.txt is damaged'): word_list(str(tmp_path))

# ---- conversations from a file

TURN = [dict(role='user', content='a'), dict(role='assistant', content='b')]

@pytest.mark.parametrize('line, words', [
    ('{', 'not JSON'), ('7', 'not a list'), ('null', 'not a list'), ('[]', 'turns'), ('['*100_000, 'not JSON'),
    ('[{"role":"user","content":"a"}]', 'turns'), ('{"messages":[{"role":"user"}]}', 'not a list'),
    ('[{"role":"system","content":"a"}]', 'turns'), ('[{"role":1,"content":"a"},{"role":["x"],"content":"b"}]', 'turns'),
    ('[{"role":"assistant","content":"a"},{"role":"user","content":"b"}]', 'turns'),
    ('[{"role":"user","content":"a"},{"role":"assistant","content":3}]', 'string')])
def test_identity_file(tmp_path, line, words):
    f = tmp_path/'identity.jsonl'
    f.write_text(f'{json.dumps(TURN)}\n{line}\n', encoding='utf-8')
    with pytest.raises(UserError, match=f'line 2.*{words}'): load_conversations(f)

@pytest.mark.parametrize('character', ['\u2028', '\u2029', '\x85', '\x1c', '\x0c', 'é', '🙂', '\ufeff'])
@pytest.mark.parametrize('mark', [b'', b'\xef\xbb\xbf'], ids=['', 'byte-order mark'])
@pytest.mark.parametrize('end', ['\n', '\r\n'], ids=['LF', 'CRLF'])
def test_any_character_may_stand_in_a_string(tmp_path, character, mark, end):
    "JSON forbids only the control characters below U+0020 there; a line ends at a line feed and nowhere else."
    text = f'I am{character}Kestrel.'
    line = json.dumps([TURN[0], dict(role='assistant', content=text)], ensure_ascii=ord(character) < 32)
    f = tmp_path/'identity.jsonl'
    f.write_bytes(mark + (line+end+end+line).encode())
    assert [c['messages'][1]['content'] for c in load_conversations(f)]==[text]*2

def test_an_identity_file_in_another_encoding_is_refused(tmp_path):
    f = tmp_path/'identity.jsonl'
    f.write_bytes(json.dumps(TURN).encode('utf-16'))
    with pytest.raises(UserError, match='in UTF-8'): load_conversations(f)

# ---- a second reader: solves a story from its sentences, sharing no code with the generator

def solve(question):
    *told, ask = re.split(r'(?<=[.?]) ', question)
    has = collections.defaultdict(lambda: None)
    who = '|'.join(NAMES)
    P,Q,T,N,K = rf'(?P<p>{who})', rf'(?P<q>{who})', r'(?P<t>[a-z]+)', r'(?P<n>\d+)', r'(?P<k>\d+)'
    def nothing(m): pass
    def owns(f):
        def rule(m): has[m['p'],m['t']] = f(m)
        return rule
    def add(who, t, n):
        if has[who,t] is not None: has[who,t] += n
    def gains(f): return lambda m: add(m['p'], m['t'], f(m))
    def gives(m):
        add(m['p'], m['t'], -int(m['n']))
        add(m['q'], m['t'], int(m['n']))
    def number(m): return int(m['n'])
    def boxes(m): return int(m['k'])*int(m['n'])
    def times(m): return int(m['k'])*has[m['q'],m['t']]
    def half(m): return has[m['q'],m['t']]/2
    def more(m): return has[m['q'],m['t']]+int(m['n'])
    def fewer(m): return has[m['q'],m['t']]-int(m['n'])
    def halved(m): return has[m['p'],m['t']]/2
    def part(m): return has[m['p'],m['t']]/int(m['k'])
    def lost(m): return -int(m['n'])
    rules = [
        (rf'{P} is {N} years old\.', nothing),
        (rf'{P} turns {N} today\.', nothing),
        (rf'{P} (?:has|fills) {K} (?:boxes|bags) (?:of |with ){N} {T}(?: in each| each)?\.', owns(boxes)),
        (rf'{P} has {K} times as many {T} as {Q}\.', owns(times)),
        (rf'For each of the {T} of {Q}, {P} has {K}\.', owns(times)),
        (rf'{P} has half as many {T} as {Q}\.', owns(half)),
        (rf'{P} has half the number of {T} that {Q} has\.', owns(half)),
        (rf'{P} has {N} more {T} than {Q}\.', owns(more)),
        (rf'{P} has as many {T} as {Q} and {N} more\.', owns(more)),
        (rf'{P} has {N} fewer {T} than {Q}\.', owns(fewer)),
        (rf'{P} needs {N} more {T} to have as many as {Q}\.', owns(fewer)),
        (rf'{P} (?:has|starts with|owns) {N} {T}\.', owns(number)),
        (rf'There are {N} {T} in the room of {P}\.', owns(number)),
        (rf'{P} gives half of the {T} to a friend\.', owns(halved)),
        (rf'{P} sells half of the {T}\.', owns(halved)),
        (rf'{P} puts the {T} in {K} equal piles and keeps one pile\.', owns(part)),
        (rf'{P} keeps one of {K} equal parts of the {T}\.', owns(part)),
        (rf'{P} (?:buys|gets) {K} (?:boxes|bags) (?:of |with ){N} {T}(?: in each)?\.', gains(boxes)),
        (rf'{P} buys {N} {T}\.', gains(number)),
        (rf'{P} finds {N} more {T}\.', gains(number)),
        (rf'Then {P} gets {N} {T} as a gift\.', gains(number)),
        (rf'A friend brings {P} {N} {T}\.', gains(number)),
        (rf'{P} (?:loses|sells) {N} {T}\.', gains(lost)),
        (rf'Then {P} throws away {N} {T}\.', gains(lost)),
        (rf'A friend takes {N} {T} from {P}\.', gains(lost)),
        (rf'{P} gives {Q} {N} {T}\.', gives),
        (rf'Then {P} hands {N} {T} to {Q}\.', gives),
        (rf'{Q} gets {N} {T} from {P}\.', gives)]
    for s in told:
        found = [(rule,m) for pattern,rule in rules if (m := re.fullmatch(pattern, s))]
        assert len(found)==1, (s, len(found))
        rule,m = found[0]
        rule(m)
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

def test_seeds_make_other_stories():
    a,b = ({r['question'] for r in make_stories('test', seed=s)} for s in (0,1))
    assert len(a & b) < 20

# ---- tasks

def test_scores_of_hostile_completions():
    p = Problem('x', '?', '#### 7', '7')
    for text in ('', '####', '#### ', '#### -', '#### ,', '#### .', '#### 7.7.7', '#### ٧', '7', '#### 7e0000'*1000,
                 '<|python_start|>#### 7', '\x00'*1000, '#'*100_000, '#### '+'9'*100_000):
        assert set(score_number(p, text))=={'pred','correct','parsed','correct_last_number','used_calculator'}
    assert score_number(p, '#### 7.')['correct'] and score_number(p, '#### 7.00')['correct']
    assert not score_number(p, '#### 7.7.7')['parsed']
    assert not score_number(p, 'The answer is 9.<|assistant_end|>#### 7')['correct'], 'what follows the end of the turn does not count'

@pytest.mark.parametrize('name', ['stories', 'spellingbee', 'choices'])
def test_a_task_is_the_same_every_time_and_names_each_problem_once(name):
    t = make_task(name)
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
    bees = (mix[i] for i in range(len(mix)) if mix.source(i)=='spellingbee')
    spelled = {re.search(r"'(\w+)'.count", m['messages'][1]['content'][1]['text'])[1] for m in bees}
    assert spelled <= set(spelling_words('train'))
    assert {p.meta['word'] for p in make_task('spellingbee')} <= set(spelling_words('test'))
    other = sft_mixture(c, seed=1)
    assert other.counts==mix.counts and [other[i] for i in range(20)]!=[mix[i] for i in range(20)]
    texts = pretrain_texts(c)
    assert not any(q in t for t in (next(texts) for _ in range(300)) for q in list(held)[:200])

def test_a_tokenizer_file_of_the_wrong_shape_is_one_sentence(tmp_path):
    from exp2nb.tokenizer import Tokenizer
    f = tmp_path/'tokenizer.json'
    whole = train_tokenizer(['abc']*3, 270).to_dict()
    changes = [dict(format='other'), dict(tokens={}), dict(tokens=[1]), dict(tokens=['%']), dict(pattern='('), dict(pattern=3)]
    for wrong in ([], {}, None, 7, 'x', dict(format=whole['format']), *(whole | c for c in changes)):
        f.write_text(json.dumps(wrong), encoding='utf-8')
        with pytest.raises(UserError, match='is not a tokenizer of this project'): Tokenizer.load(f)
    f.unlink()
    f.mkdir()
    with pytest.raises(UserError, match='cannot be read'): Tokenizer.load(f)

# ---- the real sets

@real
def test_real_sets_are_sound():
    for name,known in KNOWN.items():
        for (config,split),n in known.rows.items():
            if split=='auxiliary_train' or not n: continue
            assert len(load_rows(name, config, split, DATA))==n

@real
def test_arc_labels():
    "269 questions are labelled 1, 2, 3, …; 22 have three choices and 15 five."
    sets = [load_rows('allenai/ai2_arc', c, s, DATA) for c in ('ARC-Easy','ARC-Challenge') for s in ('train','validation','test')]
    rows = [r for rows in sets for r in rows]
    assert sum(r['choices']['label'][0]=='1' for r in rows)==269
    assert collections.Counter(len(r['choices']['label']) for r in rows)=={4:len(rows)-37, 3:22, 5:15}

@real
@pytest.mark.parametrize('name, n', [('gsm8k',1319), ('mmlu',14042), ('arc_easy',2376), ('arc_challenge',1172), ('spellingbee',256)])
def test_the_reference_is_right_on_the_real_set(name, n):
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
    "The sources of the full size (fewer chats), any row by its number, none built before it is asked for."
    write_split(tmp_path, [dict(GSM, question=f'How many {i}?') for i in range(7473)], split='train')
    write_split(tmp_path, [GSM]*1319)
    write_split(tmp_path, [MMLU]*99842, 'cais/mmlu', 'all', 'auxiliary_train')
    talk = [dict(role='system', content='Be brief.'), dict(role='user', content='Hi'), dict(role='assistant', content='Hello.')]
    write_split(tmp_path, [dict(messages=talk)]*20_000, 'HuggingFaceTB/smol-smoltalk', 'default', 'train')
    identity = tmp_path/'identity.jsonl'
    identity.write_text((json.dumps(TURN)+'\n')*1000, encoding='utf-8')
    c = make_config('d12', data_dir=str(tmp_path))
    c = replace(c, sft=replace(c.sft, identity=str(identity)))
    mix = sft_mixture(c)
    assert mix.counts==dict(smoltalk=20_000, mmlu=99842, gsm8k=2*7217, simple_spelling=200_000, spellingbee=80_000, identity=1000)
    seen = {mix.source(i): mix[i] for i in range(2000)}
    assert set(seen)==set(mix.counts)
    assert seen['smoltalk']['messages']==talk and seen['mmlu']['messages'][1]['content']=='A'
    assert mix[len(mix)-1]==sft_mixture(c)[len(mix)-1]
