"A base that came from elsewhere goes through all arms, and what nobody can know about it is left open."
import dataclasses, json, shutil
from pathlib import Path
import pytest, torch
from exp2nb.lab import Lab, arm_folder
from exp2nb.arms import base_flops, run_arm
from exp2nb.bases.base import export_model, load_base
from exp2nb.config import UserError, make_config, override
from exp2nb.ledger import COLUMNS
from exp2nb.bases.nanochat import NanoChat, NanoConfig
from exp2nb.mixture import conversation_texts
from exp2nb.tasks import make_task
from exp2nb.tokenizer import train_tokenizer

SHORT = {'n_test':8, 'dev':8, 'n_train':48, 'rl.steps':2, 'rl.problems':2, 'rl.samples':2, 'rl.max_new':12, 'rl.preflight':2, 'eval.max_new':12, 'eval.curve':1, 'eval.n_samples':0, 'eval.kl_prompts':4}

def texts():
    t = make_task('stories', 'train')
    return [x for i in range(200) for x in conversation_texts(t.conversation(t[i]))]

def randomised(model):
    torch.manual_seed(0)
    for n,p in model.named_parameters(): torch.nn.init.normal_(p, 1. if 'resid' in n or 'norm' in n else 0., .05)
    return model

def nanochat(folder):
    tok = train_tokenizer(texts(), 400)
    return export_model(randomised(NanoChat(NanoConfig(2, 48, 4, 2, 512, tok.vocab_size, 448, 'SL'))), tok, folder)

def llama(folder):
    pytest.importorskip('tokenizers', reason="tokenizers is not installed: pip install 'exp2nb[hf]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from exp2nb.bases.llama import HubTokenizer, Llama, LlamaConfig
    t = Tokenizer(models.BPE()); t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(texts(), trainers.BpeTrainer(vocab_size=400, special_tokens=['<|endoftext|>', '<|im_start|>', '<|im_end|>'], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tok = HubTokenizer(t.to_str())
    return export_model(randomised(Llama(LlamaConfig('qwen3', 2, 48, 4, 2, 16, 96, tok.vocab_size, 512, tied=True))), tok, folder)

def config(tmp_path, arm, **kw): return override(make_config('smoke', arm=arm, run_dir=str(tmp_path/'run'), **kw), SHORT)

@pytest.fixture(scope='module', params=[nanochat, llama], ids=['nanochat', 'llama'])
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
        assert a['shape']==json.loads(json.dumps(dataclasses.asdict(model.shape))) and set(a['scores']['end'])=={'stories', 'spellingbee', 'choices'} and not a['not_run']

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

def test_a_finished_arm_leaves_in_the_form_it_came(runs, tmp_path):
    from exp2nb.bases.base import export_arm
    d, base, arms = runs
    folder = arm_folder(config(d, 'rl', base=str(base)))
    back, tok, _ = load_base(export_arm(folder, tmp_path/'out'))
    from exp2nb.store import load_artifact
    for k,v in load_artifact(folder/'weights')[0].items(): assert torch.equal(v.float(), back.state_dict()[k].float()), k
    assert 'rl on stories' in next((tmp_path/'out').rglob('README.md')).read_text()

def test_an_sft_checkpoint_that_exists_already(runs, tmp_path):
    d, base, arms = runs
    here = {a: run_arm(config(tmp_path, a, sft_checkpoint=str(base)), progress=False) for a in ('rl', 'sft_plus')}
    for a in here.values():
        assert (a['dev_seen'], a['base_sha256'], a['base_flops'])==(True, None, None)
        assert set(a['scores'])=={'end'}   # no checkpoint is chosen on dev problems that somebody may have trained on
        assert a['sft_sha256']==arms['sft']['base_sha256']
    assert not (tmp_path/'run'/'sft').exists()
    assert not any('dev_accuracy' in l for l in (arm_folder(config(tmp_path, 'rl', sft_checkpoint='x'))/'metrics.jsonl').read_text().splitlines())

def test_a_base_pretrained_here_has_its_price(tmp_path):
    "The FLOPs of its own ledger; unknown for a base that came from elsewhere."
    c = make_config('smoke', run_dir=str(tmp_path))
    rows = [dict.fromkeys(COLUMNS, 0) | dict(stage=s, flops_model=n) for s,n in (('pretrain', 5), ('pretrain_optimizer', 2), ('eval', 9))]
    (tmp_path/'base').mkdir()
    (tmp_path/'base'/'ledger.jsonl').write_text(''.join(json.dumps(r)+'\n' for r in rows))
    assert base_flops(c)==7
    assert base_flops(dataclasses.replace(c, base='x')) is None

@pytest.mark.parametrize('make,says', [(lambda d: d/'nothing', 'there is nothing at'), (lambda d: d, 'it holds neither model_XXXXXX.pt nor config.json'),
                                       (lambda d: (d/'x.gguf').write_text('') or d, 'GGUF'), (lambda d: (d/'notes.txt').write_text('') or d/'notes.txt', "is a file that we don't know"),
                                       (lambda d: (d/'config.json').write_text('{"model_type":"gpt2"}') and d, "model_type 'gpt2'")])
@pytest.mark.parametrize('which', ['base', 'sft_checkpoint'])
def test_what_is_not_recognised_is_one_sentence(which, make, says, tmp_path):
    folder = tmp_path/'it'
    folder.mkdir()
    with pytest.raises(UserError) as e: run_arm(config(tmp_path, 'sft', **{which:str(make(folder))}), progress=False)
    assert says in str(e.value) and '\n' not in str(e.value)

def test_not_both(tmp_path):
    with pytest.raises(UserError, match='base and sft_checkpoint were both given'): Lab(config(tmp_path, 'rl', base='a', sft_checkpoint='b'))

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
    assert [r for r in rows if isinstance(r, int)]==[1, 2] and rows[-1]=='finish' and second['scores']['end']['stories']['accuracy']==first['scores']['end']['stories']['accuracy']
