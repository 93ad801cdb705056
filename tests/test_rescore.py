"""The second scorer is lm-evaluation-harness's: on drawn texts it says what that package's own filters say, where it is installed.

    pip install --no-deps lm_eval && pip install sacrebleu     (validated with lm_eval 0.4.13)"""
import json
import re
from random import Random
import pytest
from exp2nb.store import files_record, read_json, write_json
from exp2nb.tasks import Problem, make_task, score_number
from exp2nb.tools.rescore import FLEXIBLE, IGNORED, STRICT, exp2_rescore, extract, flexible_kind, harness, reduced, strict_kind

PARTS = ('#### ', '####', '72', '7', '-72', '72.0', '72.', '$72', '1,072', '072', '.', '..', ',', '$', ' ', '\n', 'so', '3-5', '1.2.3', '…')
REFERENCES = ('It is 72.\n#### 72', '#### 1,072', '#### -7', '#### 72.50')

def texts(n=4000, seed=0):
    draw = Random(seed)
    return [''.join(draw.choices(PARTS, k=draw.randrange(1, 9))) for _ in range(n)]

def test_the_rules_are_those_of_the_package():
    "Its filters extract what ours do, and its comparison of texts, as its task's file configures it, is ours."
    extraction = pytest.importorskip('lm_eval.filters.extraction', reason='lm_eval is not installed: pip install --no-deps lm_eval')
    filters = [extraction.RegexFilter(STRICT), extraction.RegexFilter(FLEXIBLE, group_select=-1)]
    said = texts()
    for f,pattern,which in zip(filters, (STRICT, FLEXIBLE), (0, -1)):
        theirs = f.apply([[t] for t in said], [{}]*len(said))
        assert [t[0] for t in theirs]==[extract(pattern, t, which) for t in said]

def test_the_comparison_is_that_of_the_package():
    why = 'lm_eval, or sacrebleu, which its metrics import, is not installed'
    metrics = pytest.importorskip('lm_eval.api.metrics', reason=why, exc_type=ImportError)
    how = dict(regexes_to_ignore=list(IGNORED), ignore_case=True, ignore_punctuation=False)
    for reference in REFERENCES:
        for t in texts(300):
            for key,pattern,which in (('strict', STRICT, 0), ('flexible', FLEXIBLE, -1)):
                theirs = metrics.exact_match_hf_evaluate([extract(pattern, t, which)], [reference], **how)['exact_match']
                assert bool(theirs)==harness(t, reference)[key], (t, reference)

def test_the_task_is_configured_as_we_say():
    lm_eval = pytest.importorskip('lm_eval', reason='lm_eval is not installed: pip install --no-deps lm_eval')
    yaml = pytest.importorskip('yaml', reason='PyYAML is not installed: pip install pyyaml')
    from pathlib import Path
    task = yaml.safe_load((Path(lm_eval.__file__).parent/'tasks/gsm8k/gsm8k.yaml').read_text())
    filters = {f['name']: f['filter'][0] for f in task['filter_list']}
    assert filters['strict-match']['regex_pattern']==STRICT and filters['flexible-extract']['regex_pattern']==FLEXIBLE
    assert filters['flexible-extract']['group_select']==-1 and 'group_select' not in filters['strict-match']
    metric, = task['metric_list']
    assert tuple(metric['regexes_to_ignore'])==IGNORED and metric['ignore_case'] and not metric['ignore_punctuation']

def test_every_disagreement_has_a_name_and_no_other_does():
    "On drawn texts: our scorer and the harness disagree only in ways that are told apart, and all of them occur."
    found = set()
    for reference in REFERENCES:
        p = Problem('x', '?', reference, re.sub(',', '', reference.split('#### ')[1]))
        for text in texts():
            item, h = score_number(p, text), harness(text, reference)
            kinds = strict_kind(text, item, h), flexible_kind(text, item, h)
            assert (kinds[0]=='')==(item['correct']==h['strict']) and (kinds[1]=='')==(item['correct_last_number']==h['flexible'])
            found |= set(kinds)
    assert found=={'', 'the same number in another form', 'a run of punctuation was taken for a number', 'another number was read'}

def test_right_by_the_strict_rule_is_right_by_ours():
    "Equal texts are equal numbers: what strict-match accepts, our scorer accepts."
    for reference in REFERENCES:
        p = Problem('x', '?', reference, re.sub(',', '', reference.split('#### ')[1]))
        assert all(score_number(p, t)['correct'] for t in texts() if harness(t, reference)['strict'])
    assert reduced('It is\n#### 1,072.')=='1072'

# the records of a run, changed by hand

def sums(path, n):
    "A task of your own, with all of its problems in test and in train."
    for split in ('train', 'test'):
        rows = [json.dumps(dict(question=f'{split}: what is {i}+1?', answer=f'#### {i+1}')) for i in range(n)]
        path.mkdir(parents=True, exist_ok=True)
        (path/f'{split}.jsonl').write_text('\n'.join(rows))
    return str(path)

KEPT = ['config.json', 'items.jsonl', 'completions.jsonl']

def answered(folder, task, **kw):
    "An arm that has answered every test problem of a task rightly."
    arm = folder/'rl'/'model-1.0'/'seed0'
    problems = make_task(task, 'test')
    arm.mkdir(parents=True)
    about = dict(task=problems.name, sample=0, temperature=0., checkpoint='end')
    for name,more in (('items', dict(correct=True, pred='1', correct_last_number=True)), ('completions', dict(text='#### 1'))):
        (arm/f'{name}.jsonl').write_text(''.join(json.dumps(about | dict(id=p.id) | more)+'\n' for p in problems))
    write_json(arm/'config.json', dict(arm='rl', task=task) | kw)
    record = dict(arm='rl', task=problems.name, preset='tiny', seed=0, match_on='model', budget=1., sft_sha256='a'*64, eval_settings={})
    write_json(arm/'arm.json', record | dict(files=files_record(arm, KEPT)))
    return arm

def without(path, *keys):
    "Take a field out of a JSON file."
    x = inner = read_json(path)
    for k in keys[:-1]: inner = inner[k]
    del inner[keys[-1]]
    write_json(path, x)

CHANGED = {
    'task': lambda arm: without(arm/'arm.json', 'task'),
    'match_on': lambda arm: without(arm/'arm.json', 'match_on'),
    'rows': lambda arm: without(arm/'arm.json', 'files', 'items.jsonl', 'rows'),
    'completions.jsonl': lambda arm: without(arm/'arm.json', 'files', 'completions.jsonl'),
    'list': lambda arm: (arm/'arm.json').write_text('[]'),
    'empty': lambda arm: (arm/'arm.json').write_text(''),
    'config.json was altered': lambda arm: write_json(arm/'config.json', dict(arm='rl')),
    'is missing': lambda arm: (arm/'config.json').unlink()}

@pytest.mark.parametrize('says', CHANGED)
def test_a_changed_record_is_one_sentence(tmp_path, capsys, monkeypatch, says):
    arm = answered(tmp_path/'run', sums(tmp_path/'sums', 4))
    monkeypatch.chdir(arm)
    assert exp2_rescore.main(['.'])==0 and capsys.readouterr().out
    CHANGED[says](arm)
    assert exp2_rescore.main([str(arm)])==2
    out, err = capsys.readouterr()
    assert out=='' and err.startswith('error: ') and err.count('\n')==1 and says in err, err

def test_a_problem_that_is_gone_and_an_arm_without_answers_are_named(tmp_path, capsys):
    task = sums(tmp_path/'sums', 4)
    answered(tmp_path/'run', task)
    sums(tmp_path/'sums', 3)
    assert exp2_rescore.main([str(tmp_path/'run')])==2
    assert 'sums/test/3 is no longer among the test problems' in capsys.readouterr().err
    empty = answered(tmp_path/'other', task)
    (empty/'items.jsonl').write_text('')
    write_json(empty/'arm.json', read_json(empty/'arm.json') | dict(files=files_record(empty, KEPT)))
    assert exp2_rescore.main([str(empty)])==2 and 'holds no answers to sums' in capsys.readouterr().err
