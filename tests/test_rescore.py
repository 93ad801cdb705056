"""The second scorer is lm-evaluation-harness's: on drawn texts it says what that package's own filters say, where it is installed.

    pip install --no-deps lm_eval && pip install sacrebleu     (validated with lm_eval 0.4.13)"""
import re
from random import Random
import pytest
from exp2nb.tasks import Problem, score_number
from exp2nb.tools.rescore import FLEXIBLE, IGNORED, STRICT, extract, flexible_kind, harness, reduced, strict_kind

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
