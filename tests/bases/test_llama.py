"Llama's family against transformers: logits of random models in, logits of saved models out, tokens and chat frames."
import json
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
from tiny import CHATML, LLAMA3, hub_tokenizer, randomised
from safetensors.torch import load_file, save_file
from exp2nb.bases import llama
from exp2nb.config import UserError
from exp2nb.engine import generate
from exp2nb.protocol import Segments

transformers = pytest.importorskip('transformers', reason="transformers is not installed: pip install 'exp2nb[hf]'")

ROPE3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32, rope_theta=5e4)
BASE = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=301,
            max_position_embeddings=256, attn_implementation='eager')
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
    randomised(m, .15)
    m.save_pretrained(folder, **save)
    return m

@torch.no_grad()
def ours(model, ids):
    seg = Segments(model.shape, [len(ids)])
    return model.logits(model.hidden(ids, seg.pos, seg))

@torch.no_grad()
def theirs(model, ids): return model(ids[None]).logits[0].float()

def build(folder):
    d = json.loads((Path(folder)/'config.json').read_text())
    return llama.build_llama(llama.read_hub_config(d), llama.read_safetensors(folder), folder)

@pytest.mark.parametrize('case', CASES)
def test_rotary_frequencies_are_transformers_own(case, tmp_path):
    "To the last bit; those that are stretched plane by plane, where the order of sums differs, to two units in the last place."
    theirs = reference(case, tmp_path).model.rotary_emb.inv_freq
    mine = llama.frequencies(build(tmp_path).config)
    if case=='llama3-rope': torch.testing.assert_close(mine, theirs, rtol=2.4e-7, atol=0)
    else: assert torch.equal(mine, theirs)

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
    tok = toy_tokenizer(301-4)
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
    with pytest.raises(UserError, match='not a file next to it'): build(tmp_path)
    index.write_text('{')
    with pytest.raises(UserError, match='damaged'): build(tmp_path)

def test_keys_at_odds(tmp_path):
    reference('qwen2', tmp_path)
    state, d = llama.read_safetensors(tmp_path), json.loads((tmp_path/'config.json').read_text())
    def make(state, **changes): return llama.build_llama(llama.read_hub_config({**d, **changes}), state)
    with pytest.raises(UserError, match=r"'model.layers.0.self_attn.q_norm.weight'"):
        make({k:v for k,v in state.items() if 'bias' not in k}, model_type='qwen3', head_dim=16)
    with pytest.raises(UserError, match='embed_tokens.weight.* the configuration asks for'): make(state, vocab_size=999)

def test_a_head_of_its_own_in_a_tied_model_is_used_as_transformers_uses_it(tmp_path):
    "A merged LoRA or a sharded training run writes one; a copy of the embedding is no head of its own."
    reference('qwen2', tmp_path)
    file, ids = tmp_path/'model.safetensors', torch.arange(20)
    state = load_file(file)
    for same in (True, False):
        embed = state['model.embed_tokens.weight']
        head = embed.clone() if same else torch.randn(embed.shape, generator=torch.Generator().manual_seed(1))
        save_file(state | {'lm_head.weight':head}, file, metadata={'format':'pt'})
        with nullcontext() if same else pytest.warns(UserWarning, match='lm_head.weight of its own'): model = build(tmp_path)
        assert model.config.tied==same and model.roles().get('lm_head.weight')==(None if same else 'head')
        ref = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager', dtype=torch.float32).eval()
        torch.testing.assert_close(ours(model, ids), theirs(ref, ids), atol=1e-4, rtol=0)

WRONG = {'model_type':[None, 7, ['llama'], {}], 'hidden_act':[7, None, []], 'rope_theta':['big', None, [], 0, True, float('nan')],
         'rope_scaling':[7, [1], 'x', {'rope_type':7}, {'rope_type':['linear']}, {'rope_type':'linear'},
                         {'rope_type':'linear', 'factor':'4'}],
         'rms_norm_eps':['x', None, [], 0, -1], 'eos_token_id':['x', {}, [None], 1.5], 'num_hidden_layers':[0, '2', None, True, 2.],
         'head_dim':[0, '8', [8]], 'num_key_value_heads':[3, 0]}

@pytest.mark.parametrize('key, value', [(k, v) for k,vs in WRONG.items() for v in vs])
def test_a_field_of_config_json_that_makes_no_sense_is_one_sentence(key, value):
    d = dict(BASE, model_type='llama')
    assert llama.read_hub_config(d).layers==3
    with pytest.raises(UserError) as e: llama.read_hub_config({**d, key:value}, 'x/config.json')
    assert 'x/config.json' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('index', ['[]', '{}', '{"weight_map":[]}', '{"weight_map":{"a":7}}', '{"weight_map":{}}', 'null'])
def test_an_index_of_any_shape_is_one_sentence(tmp_path, index):
    (tmp_path/'model.safetensors.index.json').write_text(index, encoding='utf-8')
    with pytest.raises(UserError, match='model.safetensors.index.json'): llama.read_safetensors(tmp_path)

# ---- tokenizers

def toy_tokenizer(size=340, specials=CHATML):
    texts = ['Ann has 12 apples and 30 pears.', 'user assistant system: How many? naïve 東京 🙂']*9
    return hub_tokenizer(texts, size, specials)

TEXTS = ['Ann has 12 apples.', ' two  spaces\n\n', 'naïve 東京 🙂', '<|im_end|> is text', '<|python_start|>1+1', '']

@pytest.mark.parametrize('specials', [CHATML, LLAMA3, []], ids=['chatml', 'llama3', 'plain'])
def test_text_round_trip_never_makes_specials(tmp_path, specials):
    tok = toy_tokenizer(specials=specials)
    assert len(set(tok.special.values())) >= 7 and list(tok.special)==list(llama.ROLES)
    for t in TEXTS:
        ids = tok.encode(t)
        assert tok.decode(ids)==t and not set(ids) & set(tok.special.values())
        assert b''.join(map(tok.token_bytes, ids))==t.encode()
    assert max(tok.special.values()) < tok.vocab_size and tok.token_bytes(10**6)==b''

@pytest.mark.parametrize('specials', [CHATML, LLAMA3, []], ids=['chatml', 'llama3', 'plain'])
def test_chat_template_of_the_export_renders_what_we_render(tmp_path, specials):
    tok = toy_tokenizer(specials=specials)
    model = llama.Llama(llama.LlamaConfig('llama', 1, 16, 2, 2, 8, 24, tok.vocab_size, 64))
    theirs = transformers.AutoTokenizer.from_pretrained(llama.save_llama(model, tok, tmp_path/'out'))
    talk = [{'role':'user', 'content':'How many?'}, {'role':'assistant', 'content':'42'}, {'role':'user', 'content':'Sure?'}]
    for lead in ([], [{'role':'system', 'content':'Be brief.'}]):
        want = theirs.apply_chat_template(lead+talk, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert tok.render_prompt({'messages':lead+talk})==want
        assert tok.render({'messages':lead+talk})[0]==theirs.apply_chat_template(lead+talk, tokenize=True, return_dict=False)

SYSTEM = {   # templates as they are published with models (shortened), and the system message that each adds
    'chatml, default': ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Kestrel.<|im_end|>\n{% endif %}"
                        "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
                        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", CHATML, 'You are Kestrel.'),
    'chatml, none': ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
                     "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}", CHATML, ''),
    'llama3, dates': ("{{ bos_token }}{% if not date is defined %}{% set date = '26 Jul 2024' %}{% endif %}"
                      "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + '<|eot_id|>' }}"
                      "{% for m in messages %}"
                      "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
                      "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
                      LLAMA3, 'Today: 26 Jul 2024')}

def folder_with(tmp_path, template, specials, **settings):
    "A small model's folder whose makers wrote this template."
    tok = hub_tokenizer(['Bo has 7 kites. system user assistant']*5, 320, specials)
    model = randomised(llama.Llama(llama.LlamaConfig('llama', 1, 16, 2, 2, 8, 24, tok.vocab_size, 256)))
    folder = llama.save_llama(model, tok, tmp_path/'in')
    f = folder/'tokenizer_config.json'
    d = json.loads(f.read_text()) | dict(chat_template=template, bos_token=specials[0]) | settings
    f.write_text(json.dumps(d), encoding='utf-8')
    return folder

@pytest.mark.parametrize('name', SYSTEM)
@pytest.mark.parametrize('place', ['tokenizer_config.json', 'chat_template.jinja'])
def test_the_makers_system_message_is_there_in_and_out(tmp_path, name, place):
    template, specials, system = SYSTEM[name]
    folder = folder_with(tmp_path, template if place=='tokenizer_config.json' else None, specials)
    if place!='tokenizer_config.json': (folder/place).write_text(template, encoding='utf-8')
    model, tok, _ = llama.load_llama(folder)
    assert tok.system==system
    ask = [{'role':'user', 'content':'Bo?'}]
    out = llama.save_llama(model, llama.HubTokenizer.from_dict(tok.to_dict()), tmp_path/'out')
    for f in (folder, out):
        theirs = transformers.AutoTokenizer.from_pretrained(f)
        assert tok.render_prompt('Bo?')==theirs.apply_chat_template(ask, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert llama.load_llama(out)[1].system==system

@pytest.mark.parametrize('template', ["{% for m in messages %}[INST] {{m['content']}} [/INST]{% endfor %}", '{{ raise_exception("no") }}',
                                      '{% if %}', '{{ messages.__class__.__mro__ }}'])
def test_a_template_of_another_form_is_told(tmp_path, template):
    folder = folder_with(tmp_path, template, CHATML)
    with pytest.warns(UserWarning, match='renders otherwise than the style'): tok = llama.load_llama(folder)[1]
    assert tok.system==''

@pytest.mark.parametrize('specials', [CHATML, ['<|endoftext|>']], ids=['chatml', 'plain'])
def test_every_declared_end_ends_an_answer(specials):
    "A model that only ever writes <|endoftext|>, which its config.json names, stops at once."
    core = hub_tokenizer(['Bo has 7 kites.']*5, 300, specials).core
    end = core.token_to_id('<|endoftext|>')
    tok = llama.HubTokenizer(core.to_str(), ends=(end,))
    model = llama.Llama(llama.LlamaConfig('llama', 1, 16, 2, 2, 8, 24, tok.vocab_size, 128, eos=(end,)))
    with torch.no_grad():
        for n,p in model.named_parameters(): p.fill_(1. if 'norm' in n or 'embed' in n else 0.)
        model.lm_head.weight[end] = 1.
    answer = generate(model, tok, [tok.render_prompt('Bo?')], max_new=16, temperature=0)[0][0]
    assert answer.stopped and answer.tokens==[end]

def test_mask_is_exactly_the_assistants_own(tmp_path):
    tok = toy_tokenizer()
    parts = [('text', 'So '), ('python', '12+30'), ('python_output', '42'), ('text', ' #### 42')]
    conv = {'messages':[{'role':'user', 'content':'12+30?'}, {'role':'assistant', 'content':[{'type':t, 'text':x} for t,x in parts]},
                        {'role':'user', 'content':'Sure?'}, {'role':'assistant', 'content':'Yes.'}]}
    ids,mask = tok.render(conv)
    own = [i for i,m in zip(ids, mask, strict=True) if m]
    assert tok.decode(own)=='So <|python_start|>12+30<|python_end|> #### 42<|assistant_end|>Yes.<|assistant_end|>'
    assert tok.decode(ids)==('<|im_start|>user\n12+30?<|assistant_end|>\n<|im_start|>assistant\n'
                             'So <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|> #### 42<|assistant_end|>\n'
                             '<|im_start|>user\nSure?<|assistant_end|>\n<|im_start|>assistant\nYes.<|assistant_end|>')

def test_rows_that_are_spare_are_used_before_the_model_grows(tmp_path):
    tok = toy_tokenizer()
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
    t = Tokenizer(models.BPE())
    t.decoder = decoders.Metaspace()
    t.save(str(tmp_path/'tokenizer.json'))
    with pytest.raises(UserError, match='not a byte-level BPE'): llama.load_hub_tokenizer(tmp_path/'tokenizer.json')
