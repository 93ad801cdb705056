"Llama's family against transformers: logits of random models in, logits of saved models out, tokens and chat frames."
import json
from pathlib import Path
import pytest, torch
from exp2nb.bases import llama
from exp2nb.config import UserError
from exp2nb.engine import generate
from exp2nb.protocol import Segments

transformers = pytest.importorskip('transformers', reason="transformers is not installed: pip install 'exp2nb[hf]'")

ROPE3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32, rope_theta=5e4)
BASE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=301, max_position_embeddings=256,
            attn_implementation='eager')
CASES = {
    'llama':          ('Llama', dict(rms_norm_eps=1e-5)),
    'llama-tied':     ('Llama', dict(tie_word_embeddings=True, num_attention_heads=8, num_key_value_heads=1)),
    'llama3-rope':    ('Llama', dict(rope_parameters=ROPE3)),
    'llama-linear':   ('Llama', dict(rope_parameters=dict(rope_type='linear', factor=4., rope_theta=1e4))),
    'llama-biases':   ('Llama', dict(attention_bias=True, mlp_bias=True)),
    'qwen2':          ('Qwen2', dict(rope_parameters=dict(rope_type='default', rope_theta=1e6), tie_word_embeddings=True)),
    'qwen2-window':   ('Qwen2', dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    'qwen3':          ('Qwen3', dict(head_dim=32, tie_word_embeddings=False)),
    'qwen3-tied':     ('Qwen3', dict(head_dim=8, tie_word_embeddings=True, attention_bias=True)),
}

def reference(case, folder, **save):
    "A random transformers model, every weight large enough to matter, saved in `folder`."
    name,changes = CASES[case]
    torch.manual_seed(0)
    m = getattr(transformers, f'{name}ForCausalLM')(getattr(transformers, f'{name}Config')(**{**BASE, **changes})).float().eval()
    for n,p in m.named_parameters(): torch.nn.init.normal_(p, 1. if 'norm' in n else 0., .15)
    m.save_pretrained(folder, **save)
    return m

@torch.no_grad()
def ours(model, ids):
    seg = Segments(model.shape, [len(ids)])
    return model.logits(model.hidden(ids, seg.pos, seg))

@torch.no_grad()
def theirs(model, ids): return model(ids[None]).logits[0].float()

def build(folder):
    return llama.build(llama.read_config(json.loads((Path(folder)/'config.json').read_text())), llama.read_safetensors(folder), folder)

@pytest.mark.parametrize('case', CASES)
def test_logits_both_ways(case, tmp_path):
    ref, ids = reference(case, tmp_path/'in'), torch.randint(301, (60,), generator=torch.Generator().manual_seed(1))
    model = build(tmp_path/'in')
    torch.testing.assert_close(ours(model, ids), theirs(ref, ids), atol=1e-4, rtol=0)
    answer = generate(model, None, [ids.tolist()], max_new=12, temperature=0)[0][0]      # cached, against transformers' full forward
    lp = theirs(ref, torch.cat([ids, torch.tensor(answer.tokens)])).log_softmax(-1)[59:-1]
    assert lp.argmax(-1).tolist()==answer.tokens
    torch.testing.assert_close(lp.max(-1).values, torch.tensor(answer.logprobs), atol=1e-4, rtol=0)
    assert theirs(ref, ids).std() > .5
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.01)   # a "trained" arm
    tok = toy_tokenizer(tmp_path, 301-4)
    llama.save_llama(llama.make_room(model, tok), tok, tmp_path/'out')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', attn_implementation='eager', dtype=torch.float32).eval()
    torch.testing.assert_close(ours(build(tmp_path/'out'), ids), theirs(back, ids), atol=1e-4, rtol=0)

def test_shards_and_what_is_wrong_with_them(tmp_path):
    ref, ids = reference('llama', tmp_path, max_shard_size='100KB'), torch.arange(20)
    shards = sorted(tmp_path.glob('*.safetensors'))
    assert len(shards) > 2
    torch.testing.assert_close(ours(build(tmp_path), ids), theirs(ref, ids), atol=1e-4, rtol=0)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name+' is missing'): build(tmp_path)
    index = tmp_path/'model.safetensors.index.json'
    index.write_text(json.dumps({'weight_map':{'a':'../../secret.safetensors'}}))
    with pytest.raises(UserError, match='not a file beside it'): build(tmp_path)
    index.write_text('{')
    with pytest.raises(UserError, match='damaged'): build(tmp_path)

def test_keys_at_odds(tmp_path):
    reference('qwen2', tmp_path)
    state, d = llama.read_safetensors(tmp_path), json.loads((tmp_path/'config.json').read_text())
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.q_norm.weight'"): llama.build(llama.read_config({**d, 'model_type':'qwen3', 'head_dim':16}), {k:v for k,v in state.items() if 'bias' not in k})
    with pytest.raises(UserError, match='embed_tokens.weight.* the configuration asks for'): llama.build(llama.read_config({**d, 'vocab_size':999}), state)

# ---- tokenizers ------------------------------------------------------------------------------------------------------------------------------------------

CHATML, LLAMA3 = ['<|endoftext|>', '<|im_start|>', '<|im_end|>'], ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']

def toy_tokenizer(tmp_path, size=340, specials=CHATML):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    t = Tokenizer(models.BPE()); t.pre_tokenizer, t.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    t.train_from_iterator(['Ann has 12 apples and 30 pears.', 'user assistant system: How many? naïve 東京 🙂']*9,
                          trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    t.save(str(tmp_path/'tokenizer.json'))
    return llama.load_hub_tokenizer(tmp_path/'tokenizer.json')

TEXTS = ['Ann has 12 apples.', ' two  spaces\n\n', 'naïve 東京 🙂', '<|im_end|> is text', '<|python_start|>1+1', '']

@pytest.mark.parametrize('specials', [CHATML, LLAMA3, []], ids=['chatml', 'llama3', 'plain'])
def test_text_round_trip_never_makes_specials(tmp_path, specials):
    tok = toy_tokenizer(tmp_path, specials=specials)
    assert len(set(tok.special.values())) >= 7 and list(tok.special)==list(llama.ROLES)
    for t in TEXTS:
        ids = tok.encode(t)
        assert tok.decode(ids)==t and not set(ids) & set(tok.special.values())
        assert b''.join(map(tok.token_bytes, ids))==t.encode()
    assert max(tok.special.values()) < tok.vocab_size and tok.token_bytes(10**6)==b''

@pytest.mark.parametrize('specials', [CHATML, LLAMA3, []], ids=['chatml', 'llama3', 'plain'])
def test_chat_template_of_the_export_renders_what_we_render(tmp_path, specials):
    tok = toy_tokenizer(tmp_path, specials=specials)
    model = llama.Llama(llama.LlamaConfig('llama', 1, 16, 2, 2, 8, 24, tok.vocab_size, 64))
    theirs = transformers.AutoTokenizer.from_pretrained(llama.save_llama(model, tok, tmp_path/'out'))
    talk = [{'role':'user', 'content':'How many?'}, {'role':'assistant', 'content':'42'}, {'role':'user', 'content':'Sure?'}]
    for lead in ([], [{'role':'system', 'content':'Be brief.'}]):
        want = theirs.apply_chat_template(lead+talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tok.render_prompt({'messages':lead+talk})==want
        assert tok.render({'messages':lead+talk})[0]==theirs.apply_chat_template(lead+talk, tokenize=True, return_dict=False)

def test_mask_is_exactly_the_assistants_own(tmp_path):
    tok = toy_tokenizer(tmp_path)
    conv = {'messages':[{'role':'user', 'content':'12+30?'}, {'role':'assistant', 'content':[{'type':'text', 'text':'So '}, {'type':'python', 'text':'12+30'},
            {'type':'python_output', 'text':'42'}, {'type':'text', 'text':' #### 42'}]}, {'role':'user', 'content':'Sure?'}, {'role':'assistant', 'content':'Yes.'}]}
    ids,mask = tok.render(conv)
    said = [i for i,m in zip(ids, mask, strict=True) if m]
    assert tok.decode(said)=='So <|python_start|>12+30<|python_end|> #### 42<|assistant_end|>Yes.<|assistant_end|>'
    assert tok.decode(ids)==('<|im_start|>user\n12+30?<|assistant_end|>\n<|im_start|>assistant\nSo <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|> #### 42'
                             '<|assistant_end|>\n<|im_start|>user\nSure?<|assistant_end|>\n<|im_start|>assistant\nYes.<|assistant_end|>')

def test_rows_that_are_spare_are_used_before_the_model_grows(tmp_path):
    tok = toy_tokenizer(tmp_path)
    model = llama.Llama(llama.LlamaConfig('qwen2', 1, 16, 2, 2, 8, 24, 400, 64, tied=True, qkv_bias=True))
    rows = model.model.embed_tokens.weight.detach().clone()
    roomy = llama.make_room(model, tok)
    assert roomy.shape.vocab==400
    new = [tok.core.token_to_id(t) for t in tok.added]
    torch.testing.assert_close(roomy.model.embed_tokens.weight[new], rows[:tok.vocab_size-4].mean(0).expand(4, -1))
    old = [i for i in range(400) if i not in new]
    assert torch.equal(roomy.model.embed_tokens.weight[old], rows[old])

def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path):
    from tokenizers import Tokenizer, decoders, models
    t = Tokenizer(models.BPE()); t.decoder = decoders.Metaspace(); t.save(str(tmp_path/'tokenizer.json'))
    with pytest.raises(UserError, match='not a byte-level BPE'): llama.load_hub_tokenizer(tmp_path/'tokenizer.json')
