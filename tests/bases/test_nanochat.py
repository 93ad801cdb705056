"nanochat's own logits: against stored vectors of five of its versions, and live where NANOCHAT_DIR names a checkout."
import json, os, pickle, subprocess, sys
from pathlib import Path
import pytest, tiktoken, torch
from safetensors import safe_open
from tiny import randomised
from exp2nb.bases import nanochat
from exp2nb.bases.base import export_model
from exp2nb.config import ModelConfig, UserError
from exp2nb.engine import generate
from exp2nb.model import Transformer
from exp2nb.protocol import Segments
from exp2nb.tasks import choice_prompt
from exp2nb.tokenizer import train_tokenizer

VECTORS = Path(__file__).parents[1]/'vectors'
LIVE = os.environ.get('NANOCHAT_DIR')
live = pytest.mark.skipif(not LIVE, reason='NANOCHAT_DIR names no nanochat checkout')

def load_vectors(path):
    "Our model with the stored weights, and what nanochat computed with them."
    with safe_open(path, 'pt') as f:
        state = {k[2:]: f.get_tensor(k).float()/64 for k in f.keys() if k.startswith('w.')}
        rest = {k: f.get_tensor(k) for k in f.keys() if not k.startswith('w.')}
        meta = f.metadata()
    c = nanochat.read_meta({'model_config': json.loads(meta['model_config'])}, {k:tuple(v.shape) for k,v in state.items()})
    return nanochat.build_nanochat(c, state), rest, meta

@torch.no_grad()
def full(model, ids):
    seg = Segments(model.shape, [len(ids)])
    return model.logits(model.hidden(ids, seg.pos, seg))

def cached(model, prompt, n):
    "Logits after the prompt and after each of n greedy tokens, as the engine's cache gives them; two rows share the prompt."
    seen, logits = [], model.logits
    model.logits = lambda h: seen.append(logits(h)) or seen[-1]
    try: samples, _ = generate(model, None, [prompt.tolist()], n=2, max_new=n+1, temperature=0)
    finally: del model.logits
    return torch.stack([s[0] for s in seen]), torch.tensor(samples[0].tokens[:n])

def check(path):
    model, v, meta = load_vectors(path)
    ids, prefill = v['ids'].long(), int(meta['prefill'])
    torch.testing.assert_close(full(model, ids)[v['at']], v['logits'], atol=1e-5, rtol=0)
    steps, tokens = cached(model, ids[:prefill], len(ids)-prefill)
    assert torch.equal(tokens, ids[prefill:])
    torch.testing.assert_close(steps, v['cached'][-len(steps):], atol=1e-5, rtol=0)
    assert v['logits'].std() > 1    # and not because everything is near zero
    return model, meta

@pytest.mark.parametrize('path', sorted(VECTORS.glob('nanochat-*.safetensors')), ids=lambda p: p.stem)
def test_stored_vectors(path):
    model, meta = check(path)
    assert model.config.age == path.stem.split('-')[1] and len(meta['nanochat'])==40

def test_a_window_of_the_wrong_size_would_be_seen():
    model, v, _ = load_vectors(VECTORS/'nanochat-smear-gqa-window.safetensors')
    for off in (-1, 1):
        shape = nanochat.Shape(**{**model.shape.__dict__, 'windows': tuple(w and w+off for w in model.shape.windows)})
        seg = Segments(shape, [len(v['ids'])])
        with torch.no_grad(): ours = model.logits(model.hidden(v['ids'].long(), seg.pos, seg))[v['at']]
        assert (ours-v['logits']).abs().max() > 1e-4

@live
@pytest.mark.parametrize('case', ['gqa-window', 'mha-long', 'mqa-short', 'old'])
def test_live_logits(case, tmp_path):
    command = [sys.executable, '-O', VECTORS/'make_nanochat.py', LIVE, case, tmp_path/'v.safetensors']
    subprocess.run(command, check=True, capture_output=True)
    check(tmp_path/'v.safetensors')

def test_choice_questions_in_nanochats_words():
    "As its tasks/common.py has them (commit 92d63d4): the letter behind its choice, an empty line before the last sentence."
    asked = choice_prompt('Which is a fruit?', ['cup', 'pear'], 'AB', 'nanochat')
    assert asked=='Multiple Choice question: Which is a fruit?\n- cup=A\n- pear=B\n\nRespond only with the letter of the correct answer.'

@live
def test_live_choice_questions():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from tasks.common import render_mc\n"
            "print(render_mc('Q?', 'ABC', ['x', 'y', 'z']), end='')")
    theirs = subprocess.run([sys.executable, '-c', code, LIVE], capture_output=True, text=True, check=True).stdout
    assert choice_prompt('Q?', ['x', 'y', 'z'], 'ABC', 'nanochat')==theirs

@live
@pytest.mark.parametrize('family', ['nanochat', 'exp2nb'])
def test_live_nanochat_loads_what_we_save(family, tmp_path):
    "nanochat's own loader and tokenizer read an exported arm, also one of our own family, and its logits there are ours."
    tok = train_tokenizer(['Ann has 12 apples and buys 30 more.']*3, 300)
    if family=='nanochat': model = nanochat.NanoChat(nanochat.NanoConfig(3, 48, 4, 2, 64, tok.vocab_size, 320, 'SL'))
    else:
        small = dict(aspect=16, head_dim=12, kv_groups=2, vocab=tok.vocab_size, context=64, pattern='SL', short_window=129)
        model = Transformer(ModelConfig(3, **small))
    randomised(model, .15)
    at = export_model(model, tok, tmp_path/'base', step=5)
    ids = tok.render_prompt('Ann has 12 apples.')
    torch.save(torch.tensor([ids]), tmp_path/'ids.pt')
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1])\n"
            "from nanochat.checkpoint_manager import load_model\n"
            "m,t,meta = load_model('rl', torch.device('cpu'), 'eval')\n"
            "ids = torch.load(sys.argv[2]+'/ids.pt')\n"
            "conv = {'messages':[{'role':'user','content':'Ann has 12 apples.'},{'role':'assistant','content':''}]}\n"
            "assert t.render_for_completion(conv)==ids[0].tolist()\n"
            "torch.save(m(ids)[0].detach(), sys.argv[2]+'/logits.pt')\n")
    env = {**os.environ, 'NANOCHAT_BASE_DIR':str(tmp_path/'base'), 'NANOCHAT_DTYPE':'float32'}
    r = subprocess.run([sys.executable, '-c', code, LIVE, str(tmp_path)], env=env, capture_output=True, text=True)
    assert r.returncode==0, r.stderr
    torch.testing.assert_close(full(model, torch.tensor(ids)), torch.load(tmp_path/'logits.pt'), atol=1e-5, rtol=0)
    back, tok2, meta = nanochat.load_nanochat(at)
    assert tok2.hash==tok.hash and meta['step']==5

# ---- hostile files

class Call:
    "Pickles as a call of `f(*args)`."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args

def encoding(**changes):
    "A whole encoding, or one with some of its fields replaced behind tiktoken's back."
    tok = train_tokenizer(['hello hello']*3, 265)
    specials = {f'<|{r}|>':i for r,i in tok.special.items()}
    e = tiktoken.Encoding('rustbpe', pat_str=tok.pattern, mergeable_ranks=tok.ranks, special_tokens=specials)
    for k,v in changes.items(): setattr(e, f'_{k}', v)
    return e

def hostile(flag):
    "Pickles that would create the file `flag` if anything in them ran, or that are not a tokenizer."
    touch = f'open({str(flag)!r}, "w").close()'
    ranks = {bytes([i]):i for i in range(256)}
    yield 'exec', pickle.dumps(Call(exec, touch))
    yield 'os.system', pickle.dumps(Call(os.system, f'touch {flag}'))
    yield 'subprocess', pickle.dumps(Call(subprocess.call, ['touch', str(flag)]))
    yield 'old protocol', pickle.dumps(Call(eval, touch), protocol=0)
    yield 'inst opcode', b'(S' + repr(touch).encode() + b'\nibuiltins\nexec\n.'
    yield 'inside a field', pickle.dumps(encoding(pat_str=Call(exec, touch)))
    yield 'inside the ranks', pickle.dumps(encoding(mergeable_ranks={**ranks, Call(exec, touch):256}))
    yield 'dotted name', b'\x80\x04\x8c\x0dtiktoken.core\x8c\x13Encoding.__init__.x\x93.'
    yield 'encoding called with arguments', b'\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93\x8c\x04evil\x85R.'
    yield 'state set on the class', b'\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93}\x8c\x01x\x8c\x01ysb.'
    yield 'extension', b'\x80\x04\x82\x01.'
    yield 'persistent id', b'\x80\x04\x8c\x01xQ.'
    yield 'by name', pickle.dumps(tiktoken.get_encoding)
    yield 'a registered name as state', b'\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x0bcl100k_baseb.'
    yield 'no state', b'\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81.'
    yield 'list', pickle.dumps([1, 2])
    yield 'empty', b''
    yield 'noise', bytes(range(256))
    yield 'truncated', pickle.dumps(encoding())[:-20]
    yield 'extra field', pickle.dumps(encoding()).replace(b'pat_str', b'pat_sex')
    yield 'ranks with a hole', pickle.dumps(encoding(mergeable_ranks={**ranks, b'ab':300}))
    yield 'bytes missing', pickle.dumps(encoding(mergeable_ranks={b'a':0}))
    yield 'other specials', pickle.dumps(encoding(special_tokens={'<|endoftext|>':256}))
    yield 'bad pattern', pickle.dumps(encoding(pat_str='('))

def test_hostile_tokenizers(tmp_path):
    flag, p = tmp_path/'executed', tmp_path/'tokenizer.pkl'
    for name,data in hostile(flag):
        p.write_bytes(data)
        with pytest.raises(UserError) as e: nanochat.read_tokenizer_pkl(p)
        assert str(e.value).count('\n')==0 and 'tokenizer.pkl was refused' in str(e.value), name
        assert not flag.exists(), name
    p.write_bytes(pickle.dumps(encoding()))
    assert nanochat.read_tokenizer_pkl(p).decode(nanochat.read_tokenizer_pkl(p).encode('hello é')) == 'hello é'

def test_the_hostile_pickles_are_really_hostile(tmp_path):
    "Read the usual way, the same bytes do run."
    flag = tmp_path/'executed'
    pickle.loads(dict(hostile(flag))['exec'])
    assert flag.exists()

def test_hostile_model_file(tmp_path):
    flag = tmp_path/'executed'
    torch.save({'lm_head.weight': Call(exec, f'open({str(flag)!r}, "w").close()')}, tmp_path/'model_000001.pt')
    with pytest.raises(UserError, match='something other than tensors'): nanochat.read_pt(tmp_path/'model_000001.pt')
    assert not flag.exists()
    for bad in (b'', b'PK\x03\x04 not a zip', b'{}'):
        (tmp_path/'model_000001.pt').write_bytes(bad)
        with pytest.raises(UserError): nanochat.read_pt(tmp_path/'model_000001.pt')
    torch.save([torch.ones(2)], tmp_path/'model_000001.pt')
    with pytest.raises(UserError, match='not a dictionary of tensors'): nanochat.read_pt(tmp_path/'model_000001.pt')

@live
def test_live_nanochat_is_timed_doing_the_same():
    "What the benchmark times: greedy, both engines say the same; the gradient steps have the same loss and gradient."
    from exp2nb.fast import bench
    w = bench.Workload(depth=2, width=32, head_dim=16, vocab=64, problems=2, samples=4, prompt=8, new=6)
    engine, ours = bench.from_checkout(w, LIVE)
    theirs = bench.nanochat_rollout(engine, w, rows=3, temperature=0.)
    samples,_ = bench.generate(ours, None, w.prompts(), n=4, max_new=6, temperature=0)
    assert [x for xs in theirs for x in xs]==[s.tokens for s in samples]
    samples,_ = bench.generate(ours, None, w.prompts(), n=4, max_new=6)
    groups = bench.make_groups(w, w.prompts(), samples)
    tokens = [[s.tokens for s in g.samples] for g in groups]
    a = bench.nanochat_gradient(engine.model, w.prompts(), tokens, [g.weights for g in groups], rows=3)
    b, _ = bench.our_gradient(ours, groups, w)
    assert a==pytest.approx(b, rel=1e-4)
    theirs = dict(engine.model.named_parameters())
    for n,p in ours.named_parameters(): torch.testing.assert_close(p.grad, theirs[n].grad, rtol=1e-3, atol=1e-5)
    assert all(s > 0 for s in bench.nanochat_seconds(w, LIVE).values())

def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
    from exp2nb.fast import bench
    with pytest.raises(UserError, match='is no checkout of nanochat'): bench.from_checkout(bench.Workload(), tmp_path)

@pytest.mark.parametrize('content', ['[]', 'null', '7', '"x"', '{', '', '[' * 100_000, '{}', '{"model_config":[]}',
                                     '{"model_config":{"n_layer":-1}}'])
def test_meta_of_any_shape_is_one_sentence(tmp_path, content):
    torch.save({'lm_head.weight': torch.ones(2, 2)}, tmp_path/'model_000001.pt')
    (tmp_path/'meta_000001.json').write_text(content, encoding='utf-8')
    with pytest.raises(UserError) as e: nanochat.load_nanochat(tmp_path)
    assert 'meta_000001.json' in str(e.value) and '\n' not in str(e.value)

def meta_of(**changes):
    mc = dict(sequence_len=16, vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, window_pattern='L')
    return {'model_config': mc | changes}

@pytest.mark.parametrize('meta', [
    *(meta_of(**{k:v}) for k in ('n_layer', 'n_head', 'n_embd', 'sequence_len', 'vocab_size')
      for v in (0, -1, True, None, 2., '2', [2], {})),
    *(meta_of(window_pattern=v) for v in ('', 'X', 3, [], None)),
    *(meta_of() | {'softcap':v} for v in (0, -1, None, '15', [], True, float('nan'), float('inf')))])
def test_a_field_that_makes_no_sense_is_one_sentence(meta):
    with pytest.raises(UserError) as e: nanochat.read_meta(meta, {}, 'meta.json')
    assert 'meta.json' in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('shapes', [{'lm_head.weight':()}, *({'transformer.h.0.attn.ve_gate.weight':s} for s in ((), (3,)))])
def test_tensors_of_any_shape_are_read_or_refused(shapes):
    c = nanochat.read_meta(meta_of(), shapes)
    with pytest.raises(UserError): nanochat.build_nanochat(c, {k:torch.ones(s) for k,s in shapes.items()})

def test_a_pointer_of_git_lfs_is_called_that(tmp_path):
    (tmp_path/'model_000650.pt').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n')
    with pytest.raises(UserError, match='a pointer of Git LFS.*run git lfs pull'): nanochat.read_pt(tmp_path/'model_000650.pt')
