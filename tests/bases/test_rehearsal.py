"What a base rehearses before SFT: sampled once, kept by hash, billed apart, and never a test problem."
import json
from dataclasses import replace
import pytest
from exp2nb import lab as lab_module
from exp2nb.arms import run_arm
from exp2nb.bases.base import export_model, model_card
from exp2nb.config import UserError, make_config, override
from exp2nb.lab import ANSWER, Lab, rehearsal_folder, sft_folder
from exp2nb.ledger import read_rows, totals
from exp2nb.mixture import conversation_texts
from exp2nb.store import read_json, read_jsonl
from exp2nb.tasks import make_task
from tiny import CHATML, hub_model, hub_tokenizer, randomised

SHORT = {'sft.rehearsal_new':8, 'sft.batch_tokens':512, 'rl.steps':1, 'rl.problems':2, 'rl.samples':2, 'rl.max_new':8, 'rl.preflight':0,
         'sft_plus.batch_tokens':512, 'eval.max_new':8, 'eval.curve':0, 'eval.n_samples':0, 'eval.kl_prompts':0, 'eval.tasks':['stories']}

def base(folder, seed=0, specials=CHATML):
    t = make_task('stories', 'train')
    tok = hub_tokenizer([x for i in range(100) for x in conversation_texts(t.conversation(t[i]))], 400, specials)
    model = hub_model(vocab_size=tok.vocab_size, max_position_embeddings=512)
    return str(export_model(randomised(model, .05, seed), tok, folder))

@pytest.fixture(scope='module')
def given(tmp_path_factory): return base(tmp_path_factory.mktemp('base')/'base')

def config(run_dir, given, changes=(), **kw):
    small = dict(task='stories', n_train=16, n_test=4, dev=4)
    return override(make_config('open', run_dir=str(run_dir), base=given, **small | kw), SHORT | dict(changes))

def rehearse(c): return Lab(c, progress=False).rehearsal

def answers(c): return read_jsonl(rehearsal_folder(c)/'answers.jsonl', ANSWER)

def test_answers_are_sampled_once_and_read_by_sft(given, tmp_path, monkeypatch):
    c = config(tmp_path, given)
    lab = Lab(c, progress=False)
    mix = lab.sft_reads
    assert mix.counts==dict(stories=32, rehearsal=8)   # a fifth of 40
    kept = {tuple(ids) for ids,_ in lab.rehearsal.answers}
    assert sum(isinstance(x, tuple) and tuple(x[0]) in kept for x in mix)==8
    record = read_json(sft_folder(c)/'record.json') if lab.sft else None
    assert record['made_of']['rehearsal']==lab.rehearsal.sha256
    monkeypatch.setattr(lab_module, 'generate', None)   # a second sampling would fail
    assert rehearse(c).sha256==lab.rehearsal.sha256
    assert Lab(c, progress=False).sft.sha256==lab.sft.sha256

def test_another_base_answers_otherwise(given, tmp_path):
    one, two = config(tmp_path/'one', given), config(tmp_path/'two', base(tmp_path/'other', seed=1))
    for c in (one, two): assert rehearse(c)
    assert [r['messages'] for r in answers(one)]==[r['messages'] for r in answers(two)]
    assert [r['tokens'] for r in answers(one)]!=[r['tokens'] for r in answers(two)]
    with pytest.raises(UserError, match='rehearsal was made from other settings'): rehearse(replace(one, base=two.base))

def test_it_is_billed_apart_and_in_the_record(given, tmp_path):
    c = config(tmp_path, given)
    got = {a: run_arm(replace(c, arm=a), progress=False) for a in ('sft', 'rl', 'sft_plus')}
    rows = read_rows(rehearsal_folder(c)/'ledger.jsonl')
    assert {r['stage'] for r in rows}=={'rehearsal'} and totals(rows)['model']==0
    spent = totals(rows, ('rehearsal',))['model']
    facts = got['rl']['rehearsal']
    assert (facts['source'], facts['answers'], facts['share'], facts['flops_model'])==('everyday', 8, .2, spent) and spent > 0
    assert all(a['rehearsal']==facts for a in got.values()) and abs(got['sft_plus']['residual']) < .01
    assert not any(r['stage']=='rehearsal' for r in read_rows(sft_folder(c)/'ledger.jsonl'))
    assert "SFT rehearsed 8 of the base's own answers" in model_card(got['rl'])

def test_greedy_answers_are_those_of_the_engine(given, tmp_path):
    "What is kept is prompt and answer as tokens, the answer's alone with a loss."
    c = config(tmp_path, given, {'sft.rehearsal_temperature': 0})
    lab = Lab(c, progress=False)
    kept = lab.rehearsal.answers
    for r,(ids,mask) in zip(answers(c), kept, strict=True):
        prompt = lab.base.tok.render_prompt(dict(messages=r['messages']))
        assert ids==prompt+r['tokens'] and mask==[0]*len(prompt)+[1]*len(r['tokens'])
        own, _ = lab_module.generate(lab.base.model, lab.base.tok, [prompt], max_new=8, temperature=0., calculator=False)
        assert own[0].tokens==r['tokens']

def test_a_damaged_file_is_refused_and_sampled_again(given, tmp_path):
    c = config(tmp_path, given)
    sha = rehearse(c).sha256
    path = rehearsal_folder(c)/'answers.jsonl'
    path.write_text(path.read_text().replace('"tokens": [', '"tokens": [7, ', 1))
    with pytest.raises(UserError, match='is not the file that') as e: rehearse(c)
    assert '\n' not in str(e.value) and f'delete {path}' in str(e.value)
    path.unlink()
    assert rehearse(c).sha256==sha

def test_stopped_half_way_it_goes_on(given, tmp_path, monkeypatch):
    monkeypatch.setattr(lab_module, 'TOGETHER', 3)
    whole = config(tmp_path/'whole', given)
    assert rehearse(whole)
    real, calls = lab_module.answer_some, []
    def dies(*args):
        calls.append(1)
        if len(calls)==2: raise KeyboardInterrupt
        return real(*args)
    cut = config(tmp_path/'cut', given)
    monkeypatch.setattr(lab_module, 'answer_some', dies)
    with pytest.raises(KeyboardInterrupt): rehearse(cut)
    with open(rehearsal_folder(cut)/'answers.jsonl', 'a') as f: f.write(json.dumps(answers(cut)[0])+'\n')   # of a step that was not billed
    assert rehearse(cut)
    assert answers(cut)==answers(whole)
    assert [r['step'] for r in read_rows(rehearsal_folder(cut)/'ledger.jsonl')]==[0, 1, 2]
    assert len(calls)==4   # one, the one that died, and the two that were left

def test_a_file_of_instructions(given, tmp_path):
    c = config(tmp_path/'run', given)
    dev, test = Lab(c, progress=False).problems[1:]
    asked = f'Please solve: {dev[0].question}', 'Name a bird.', test[1].question, 'Why?'
    lines = [dict(prompt=text) for text in asked]
    file = tmp_path/'ask.jsonl'
    file.write_text('\n'.join(map(json.dumps, lines)))
    c = override(c, {'sft.rehearsal': str(file)})
    assert rehearse(c).facts['answers']==2
    assert {r['messages'][0]['content'] for r in answers(c)}=={'Name a bird.', 'Why?'}

BAD = [('{"prompt": 1}\n', 'line 1: it has no text'), ('', 'is empty'), ('no json\n', 'line 1: this is not JSON'), (None, 'cannot be read'),
       ('{"prompt": "%s"}\n' % ('long '*900), 'has no instruction to rehearse')]

@pytest.mark.parametrize('text,says', BAD, ids=[says for _,says in BAD])
def test_a_bad_file_is_one_sentence(given, tmp_path, text, says):
    file = tmp_path/'ask.jsonl'
    if text is not None: file.write_text(text)
    with pytest.raises(UserError, match=says) as e: rehearse(config(tmp_path/'run', given, {'sft.rehearsal': str(file)}))
    assert '\n' not in str(e.value)

def test_a_base_that_does_not_chat_rehearses_nothing(tmp_path):
    c = config(tmp_path/'run', base(tmp_path/'plain', specials=[]))
    lab = Lab(c, progress=False)
    assert lab.rehearsal is None and lab.sft_reads is lab.mixture
    assert read_json(rehearsal_folder(c)/'record.json')['answers']==0   # the queue sees that it is done

def test_without_a_base_there_is_nobody_to_ask(tmp_path):
    c = override(make_config('smoke', run_dir=str(tmp_path)), {'sft.rehearsal': 'everyday'})
    with pytest.raises(UserError, match='give a base'): Lab(c)
    lab = Lab(make_config('smoke', run_dir=str(tmp_path)), progress=False)
    assert lab.rehearsal is None and lab.sft_reads is lab.mixture
