"Every family through the same engine, training, RL and ledger; and, where they are installed, real weights."
import json
from dataclasses import replace
from pathlib import Path
import pytest, torch
from tiny import hub_model, hub_tokenizer, randomised
from exp2nb.bases.base import export_model, load_base, rebuild
from exp2nb.store import describe
from exp2nb.config import RLConfig, Rates, UserError
from exp2nb.engine import generate
from exp2nb.flops import flop_counter
from exp2nb.grpo import GRPO
from exp2nb.ledger import Ledger
from exp2nb.bases.nanochat import NanoChat, NanoConfig
from exp2nb.tokenizer import train_tokenizer
from exp2nb.train import Amount, Conversations, Supervised

def addition(a, b):
    parts = [{'type':'python', 'text':f'{a}+{b}'}, {'type':'python_output', 'text':str(a+b)}, {'type':'text', 'text':f'\n#### {a+b}'}]
    return {'messages':[{'role':'user', 'content':f'{a}+{b}?'}, {'role':'assistant', 'content':parts}]}

CONVS = [addition(a, b) for a in range(1, 6) for b in range(1, 6)]

class Sums:
    "A target task; its score does not matter here."
    def __len__(self): return len(CONVS)
    def __getitem__(self, i): return CONVS[i]
    def score(self, problem, text): return dict(correct=len(text)%2==0, parsed=True)

def every_other(step, i, k, score): return float(k%2)   # so that every group has an advantage, whatever a random model says

HUB = dict(llama={}, qwen3=dict(tie_word_embeddings=True), gemma2=dict(sliding_window=9),
           qwen2=dict(tie_word_embeddings=True, use_sliding_window=True, sliding_window=9, max_window_layers=1))

def family(name):
    "A random model and its tokenizer."
    if name in HUB:
        tok = hub_tokenizer(['user assistant 1+2? ####'], 270)
        model = hub_model(name, vocab_size=tok.vocab_size, max_position_embeddings=128, **HUB[name])
    else:
        tok = train_tokenizer(['user assistant 1+2? ####']*3, 270)
        model = NanoChat(NanoConfig(3, 48, 4, 2, 64, tok.vocab_size, 320, 'SL', name))
    return randomised(model), tok

ALL = ['smear', 'values', 'plain', *HUB]
RATES = Rates(.01, .01, .001, .001)

def counted(stage):
    "One step of a stage: FLOPs by PyTorch's counter and by the ledger."
    before = len(stage.ledger)
    with flop_counter() as c: row = stage.step()
    return row, c.get_total_flops(), sum(r['flops_executed'] for r in stage.ledger.rows[before:])

@pytest.mark.parametrize('name', ALL)
def test_supervised_steps_learn_and_are_billed_right(name, tmp_path):
    model, tok = family(name)
    ledger = Ledger(tmp_path/'ledger.jsonl', model.shape, 'sums')
    stage = Supervised('sft', model, RATES, Conversations(CONVS, tok, 0, 128), Amount(100, 'steps'), ledger, 400, 300)
    rows = [counted(stage) for _ in range(6)]
    assert all(abs(ours/c-1) < 1e-3 for _,c,ours in rows)
    assert rows[-1][0]['loss'] < rows[0][0]['loss']

@pytest.mark.parametrize('name', ALL)
def test_rl_steps_run_and_are_billed_right(name, tmp_path):
    model, tok = family(name)
    rl = replace(RLConfig(), problems=3, samples=4, max_new=10, rates=RATES, micro_tokens=200)
    ledger = Ledger(tmp_path/'ledger.jsonl', model.shape, 'sums')
    stage = GRPO(model, tok, Sums(), tok.render_prompt, rl, Amount(2, 'steps'), ledger, 0, reward=every_other)
    stage.folder = tmp_path
    before = {k:v.clone() for k,v in model.state_dict().items()}
    row, c, ours = counted(stage)
    assert abs(ours/c-1) < 1e-3 and row['logprob_drift'] < 1e-4   # the gradient's log-probabilities are those of the cached rollout
    assert any(not torch.equal(v, before[k]) for k,v in model.state_dict().items())

@pytest.mark.parametrize('name', ALL)
def test_description_is_enough_to_make_it_again(name):
    model, tok = family(name)
    again, tok2 = rebuild(json.loads(json.dumps(describe(model, tok))), model.state_dict())
    assert (again.config, again.shape, tok2.hash, tok2.special)==(model.config, model.shape, tok.hash, tok.special)
    prompt = [tok.render_prompt('1+2?')]
    assert generate(again, tok2, prompt, max_new=8, seed=1)[0][0].tokens==generate(model, tok, prompt, max_new=8, seed=1)[0][0].tokens

@pytest.mark.parametrize('name', ['smear', 'qwen2'])
def test_an_exported_arm_is_a_base(name, tmp_path):
    model, tok = family(name)
    at = export_model(model, tok, tmp_path/'out', card='# A card\n')
    back, tok2, meta = load_base(at)
    assert (tmp_path/'out'/'README.md').read_text(encoding='utf-8')=='# A card\n' and meta['train_flops'] is None
    assert (tok2.special, tok2.ends, tok2.render(CONVS[0]))==(tok.special, tok.ends, tok.render(CONVS[0]))
    for (n,p),q in zip(model.named_parameters(), back.parameters(), strict=True): assert torch.equal(p, q), n

@pytest.mark.parametrize('name', ['smear', 'qwen2'])
@pytest.mark.parametrize('exists', [True, False])
def test_a_failed_export_leaves_nothing(name, exists, tmp_path, monkeypatch):
    "Whatever fails, at whatever file: no folder, or the empty one that was there; and the second try succeeds."
    model, tok = family(name)
    out = tmp_path/'out'
    if exists: out.mkdir()
    write, left = Path.write_text, {}
    def fails(self, *a, **k):
        if self.name==left['at']: raise OSError(28, 'No space left on device')
        return write(self, *a, **k)
    monkeypatch.setattr(Path, 'write_text', fails)
    for left['at'] in ('README.md', *dict(smear=['meta_000000.json'], qwen2=['generation_config.json', 'tokenizer.json'])[name]):
        with pytest.raises(UserError, match='disk is full'): export_model(model, tok, out, card='# A card\n')
        assert list(tmp_path.iterdir())==([out] if exists else []) and not (exists and list(out.iterdir()))
    left['at'] = ''
    assert load_base(export_model(model, tok, out, card='# A card\n'))[2]['family']==model.family

def test_bad_folders_are_one_sentence(tmp_path):
    model, tok = family('llama')
    def fresh(name): return export_model(model, tok, tmp_path/name)
    def broken(name, file, change, says):
        f = fresh(name)/file
        change(f)
        with pytest.raises(UserError) as e: load_base(tmp_path/name)
        assert says in str(e.value) and '\n' not in str(e.value), str(e.value)
    def edit(**kw): return lambda f: f.write_text(json.dumps({**json.loads(f.read_text()), **kw}))
    broken('a', 'tokenizer.json', Path.unlink, 'there is no tokenizer.json')
    broken('b', 'tokenizer.json', lambda f: f.write_text('{}'), 'its tokenizer cannot be read')
    broken('c', 'model.safetensors', Path.unlink, 'its weights cannot be read')
    broken('d', 'model.safetensors', lambda f: f.write_bytes(f.read_bytes()[:1000]), 'its weights cannot be read')
    broken('e', 'config.json', edit(model_type='gpt2'), "a model of type 'gpt2' cannot be used")
    broken('f', 'config.json', edit(vocab_size=100), 'its weights cannot be read')
    broken('g', 'config.json', edit(num_hidden_layers=3), "lacks the tensor 'model.layers.2.")
    broken('h', 'config.json', edit(num_hidden_layers=1), "too much: the tensor 'model.layers.1.")
    broken('j', 'config.json', lambda f: f.write_text('{"a":'), 'is not JSON')
    for i,text in enumerate(('[]', 'null', '7', '"llama"')):
        broken(f'l{i}', 'config.json', lambda f, text=text: f.write_text(text), 'not a JSON object')
        broken(f'm{i}', 'tokenizer.json', lambda f, text=text: f.write_text(text), 'its tokenizer cannot be read')
    broken('k', 'config.json', edit(quantization_config={'bits':4}), 'quantized')
    nano, ntok = family('smear')
    at = export_model(nano, ntok, tmp_path/'n')
    (tmp_path/'n'/'tokenizer'/'tokenizer.pkl').unlink()
    with pytest.raises(UserError, match='there is no tokenizer.pkl'): load_base(at)
    export_model(nano, train_tokenizer(['abc']*3, 266), tmp_path/'other')
    (tmp_path/'other'/'tokenizer'/'tokenizer.pkl').rename(tmp_path/'n'/'tokenizer'/'tokenizer.pkl')
    with pytest.raises(UserError, match="another model's tokenizer"): load_base(at)
