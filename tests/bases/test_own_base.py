"A base that came from elsewhere goes through all arms, and what nobody can know about it is left open."
import dataclasses, json, shutil
from pathlib import Path
import pytest, torch
from tiny import hub_model, hub_tokenizer, randomised, tiny_config
from exp2nb.lab import Lab, arm_folder, given
from exp2nb.arms import base_flops, run_arm
from exp2nb.bases.base import _arm_weights, export_arm, export_model, flops_text, load_base
from exp2nb.config import UserError, make_config, override
from exp2nb.ledger import COLUMNS
from exp2nb.bases.nanochat import NanoChat, NanoConfig, save_nanochat
from exp2nb.mixture import conversation_texts
from exp2nb.store import artifact_hash, weights_hash
from exp2nb.tasks import make_task
from exp2nb.tokenizer import train_tokenizer

SHORT = {'n_test':8, 'dev':8, 'n_train':48, 'rl.steps':2, 'rl.problems':2, 'rl.samples':2, 'rl.max_new':12, 'rl.preflight':2,
         'eval.max_new':12, 'eval.curve':1, 'eval.n_samples':0, 'eval.kl_prompts':4}

def texts():
    t = make_task('stories', 'train')
    return [x for i in range(200) for x in conversation_texts(t.conversation(t[i]))]

def nanochat(folder):
    tok = train_tokenizer(texts(), 400)
    return export_model(randomised(NanoChat(NanoConfig(2, 48, 4, 2, 512, tok.vocab_size, 448, 'SL')), .05), tok, folder)

def qwen3(folder):
    tok = hub_tokenizer(texts(), 400)
    model = hub_model('qwen3', vocab_size=tok.vocab_size, max_position_embeddings=512, tie_word_embeddings=True)
    return export_model(randomised(model, .05), tok, folder)

def config(tmp_path, arm, **kw): return tiny_config(tmp_path/'run', arm, SHORT, **kw)

@pytest.fixture(scope='module', params=[nanochat, qwen3], ids=['nanochat', 'qwen3'])
def runs(request, tmp_path_factory):
    "All three arms from one base."
    d = tmp_path_factory.mktemp('base')
    base = request.param(d/'base')
    return d, base, {a: run_arm(config(d, a, base=str(base)), progress=False) for a in ('sft', 'rl', 'sft_plus')}

def test_every_arm_runs_from_it(runs):
    d, base, arms = runs
    model,_,_ = load_base(base)
    assert (arms['rl']['steps'], arms['sft']['steps'])==(2, 0) and abs(arms['sft_plus']['residual']) < .001
    assert len({a['sft_sha256'] for a in arms.values()})==1
    for a in arms.values():
        assert a['shape']==json.loads(json.dumps(dataclasses.asdict(model.shape)))
        assert set(a['scores']['end'])=={'stories', 'spellingbee', 'choices'} and not a['not_run']

def test_what_it_cost_is_unknown(runs):
    for a in runs[2].values(): assert a['base_flops'] is None and a['dev_seen'] is False
    assert not (runs[0]/'run'/'base').exists() and not (runs[0]/'run'/'tokenizer.json').exists()   # nothing was pretrained here

def test_it_may_move_but_not_change(runs, tmp_path):
    d, base, arms = runs
    moved = tmp_path/'moved'
    shutil.copytree(d/'base', moved)
    again = moved/Path(base).relative_to(d/'base')
    assert run_arm(config(d, 'rl', base=str(again)), progress=False)==arms['rl']
    other = tmp_path/'other'
    model,tok,_ = load_base(base)
    with torch.no_grad(): next(model.parameters()).mul_(1.1)
    at = export_model(model, tok, other)
    with pytest.raises(UserError, match='was made from other settings'): run_arm(config(d, 'rl', base=str(at)), progress=False)

@pytest.mark.parametrize('arm', ['rl', 'sft'])
def test_a_finished_arm_leaves_in_the_form_it_came(runs, tmp_path, arm):
    "The SFT arm too, whose weights are the checkpoint that all arms share."
    d, base, arms = runs
    folder = arm_folder(config(d, arm, base=str(base)))
    back, _, _ = load_base(export_arm(folder, tmp_path/'out'))
    assert weights_hash(back.state_dict())==(arms['sft']['sft_sha256'] if arm=='sft' else artifact_hash(folder/'weights'))
    card = next((tmp_path/'out').rglob('README.md')).read_text(encoding='utf-8')
    score = arms[arm]['scores']['end']['stories']['accuracy']
    assert f'arm `{arm}`' in card and '{' not in card and f'| stories | {100*score:.1f} % |' in card

def test_an_sft_checkpoint_that_exists_already(runs, tmp_path):
    d, base, arms = runs
    here = {a: run_arm(config(tmp_path, a, sft_checkpoint=str(base)), progress=False) for a in ('rl', 'sft_plus')}
    for a in here.values():
        assert (a['dev_seen'], a['base_sha256'], a['base_flops'])==(True, None, None)
        assert set(a['scores'])=={'end'}   # no checkpoint is chosen on dev problems that somebody may have trained on
        assert a['sft_sha256']==arms['sft']['base_sha256']
    assert not (tmp_path/'run'/'sft').exists()
    assert 'dev_accuracy' not in (arm_folder(config(tmp_path, 'rl', sft_checkpoint='x'))/'metrics.jsonl').read_text(encoding='utf-8')

def test_a_base_pretrained_here_has_its_price(tmp_path):
    "The FLOPs of its own ledger; unknown for a base that came from elsewhere."
    c = make_config('smoke', run_dir=str(tmp_path))
    rows = [dict.fromkeys(COLUMNS, 0) | dict(stage=s, flops_model=n) for s,n in (('pretrain', 5), ('pretrain_optimizer', 2), ('eval', 9))]
    (tmp_path/'base').mkdir()
    (tmp_path/'base'/'ledger.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    assert base_flops(c)==7
    assert base_flops(dataclasses.replace(c, base='x')) is None

def holding(name, text=''):
    "A folder with one file in it."
    def make(d):
        (d/name).write_text(text, encoding='utf-8')
        return d
    return make

@pytest.mark.parametrize('make,says', [
    (lambda d: d/'nothing', 'there is nothing at'),
    (lambda d: d, 'it holds neither model_XXXXXX.pt nor config.json'),
    (holding('x.gguf'), 'cannot be read'),
    (lambda d: holding('notes.txt')(d)/'notes.txt', "is a file that we don't know"),
    (holding('config.json', '{"model_type":"gpt2"}'), "a model of type 'gpt2' cannot be used"),
    (holding('config.json', '[]'), 'not a JSON object')])
@pytest.mark.parametrize('which', ['base', 'sft_checkpoint'])
def test_what_is_not_recognised_is_one_sentence(which, make, says, tmp_path):
    folder = tmp_path/'it'
    folder.mkdir()
    with pytest.raises(UserError) as e: run_arm(config(tmp_path, 'sft', **{which:str(make(folder))}), progress=False)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_not_both(tmp_path):
    with pytest.raises(UserError, match='base and sft_checkpoint were both given'):
        Lab(config(tmp_path, 'rl', base='a', sft_checkpoint='b'))

def test_a_tracker_that_fails_stops_nothing(tmp_path, monkeypatch, capfd):
    import sys, types
    rows = []
    def module(log): return types.SimpleNamespace(init=lambda **kw: rows.append(kw['name']), log=log, finish=lambda: rows.append('finish'))
    base = nanochat(tmp_path/'base')
    c = config(tmp_path, 'rl', sft_checkpoint=str(base), tracker='wandb')
    def fails(row, step=None): raise OSError('no route to host')
    monkeypatch.setitem(sys.modules, 'wandb', module(fails))
    first = run_arm(c, progress=False)
    assert capfd.readouterr().err.count('wandb failed (OSError: no route to host): the run goes on without it')==1
    monkeypatch.setitem(sys.modules, 'wandb', module(lambda row, step=None: rows.append(step)))
    second = run_arm(dataclasses.replace(c, run_dir=str(tmp_path/'second')), progress=False)
    assert [r for r in rows if isinstance(r, int)]==[1, 2] and rows[-1]=='finish'
    assert second['scores']['end']['stories']['accuracy']==first['scores']['end']['stories']['accuracy']

def test_a_base_that_was_fine_tuned_already_is_told(tmp_path, capfd):
    "The same folder under sft_checkpoint needs no word."
    tok = train_tokenizer(texts(), 400)
    model = randomised(NanoChat(NanoConfig(2, 48, 4, 2, 512, tok.vocab_size, 448, 'SL')), .05)
    at = save_nanochat(model, tok, tmp_path/'nano', 'sft')
    given(at)
    assert not capfd.readouterr().err
    given(at, as_base=True)
    assert f'give -p sft_checkpoint {at} in place of base' in capfd.readouterr().err

ASKS = dict(nanochat='\n\nRespond only with the letter of the correct answer.', plain='\nAnswer with the letter.')

def test_choice_questions_are_asked_as_the_base_was_trained(runs):
    "In the evaluation and in the SFT mixture; the record says in which form, and a change overrules it."
    d, base, arms = runs
    family = load_base(base)[0].family
    form = 'nanochat' if family=='nanochat' else 'plain'
    assert {a['eval_settings']['choice_form'] for a in arms.values()}=={form}
    for which in ('base', 'sft_checkpoint'):
        for want in {form, 'plain'}:
            c = override(config(d, 'rl', **{which:str(base)}), {} if want==form else {'eval.choice_form':want})
            lab = Lab(c)
            trained = [lab.mixture[i]['messages'][0]['content'] for i in range(len(lab.mixture)) if lab.mixture.source(i)=='choices']
            asked = [p.question for p in lab.tasks['choices']]
            assert trained and asked and all(q.endswith(ASKS[want]) for q in trained+asked)
            assert all(q.startswith('Multiple Choice question: ')==(want=='nanochat') for q in trained+asked)

def test_weights_that_an_arm_does_not_have_are_named(tmp_path):
    for which,why in dict(best_dev='no checkpoint was chosen on dev', weights='they were deleted').items():
        with pytest.raises(UserError, match=f'has no {which}, since {why}'): _arm_weights(tmp_path, dict(arm='rl'), which)

def test_flops_are_rounded_before_their_unit_is_chosen():
    assert [flops_text(n) for n in (999.4e12, 999.7e12, 0)]==['999 TFLOPs', '1 PFLOPs', '0 FLOPs']
