"""The engine against the plain model, over drawn shapes and batches.

`EXP2_DEVICE=cuda` runs the same on a GPU, where bfloat16 is what counts."""
import gc, os, random, shutil, subprocess, sys, weakref
from contextlib import nullcontext
from pathlib import Path
import pytest, torch
from tiny import hub_model
from exp2nb.fast import fused, gpu
from exp2nb.fast.bench import plain_rollout
from exp2nb.config import ModelConfig, UserError
from exp2nb.engine import Decode, Sample, generate, moved, refill
from exp2nb.grpo import policy_loss
from exp2nb.protocol import plain
from exp2nb.model import Transformer
from exp2nb.bases.nanochat import NanoChat, NanoConfig
from exp2nb.protocol import Segments
from exp2nb.tokenizer import train_tokenizer
from exp2nb.train import supervised_loss

DEVICE = os.environ.get('EXP2_DEVICE', 'cpu')
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: .15}   # nats: bfloat16 keeps 8 bits of a number

def toy(seed, **kw):
    m = Transformer(ModelConfig(**(dict(depth=3, aspect=32, head_dim=16, vocab=300, context=256) | kw)))
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters(): p.data.normal_(0, .1, generator=g)
    return m.to(DEVICE)

@torch.no_grad()
def replay(model, prompt, o, dtype=torch.float32):
    "A sample's log-probabilities by one plain pass."
    ids = torch.tensor(prompt+o.tokens[:-1], device=DEVICE)
    seg = Segments(model.shape, [len(ids)], device=DEVICE)
    with torch.autocast(torch.device(DEVICE).type, dtype, enabled=dtype!=torch.float32):
        logits = model.logits(model.hidden(ids, seg.pos, seg))[len(prompt)-1:].float()
    tokens = torch.tensor(o.tokens, device=DEVICE)
    return logits.log_softmax(-1).gather(-1, tokens[:,None])[:,0].cpu(), logits.cpu()

def drawn(seed):
    "A model and a request, drawn at random."
    r = random.Random(seed)
    shape = dict(kv_groups=r.choice([1,2,3]), pattern=r.choice(['L','S','SL','SSSL']), short_window=r.choice([1,2,7,20]))
    prompts = [[r.randrange(300) for _ in range(r.choice([1,2,5,17,40]))] for _ in range(r.choice([1,3,6]))]
    how = dict(n=r.choice([1,2,5]), max_new=r.choice([1,2,15,16,17,50]), rows=r.choice([1,2,4,7,100]), top_k=r.choice([0,1,7,50]))
    return toy(seed, **shape), prompts, how | dict(seed=seed)

def attention(q, k, v, prompt, own, rows, members, window):
    "What `gpu.decode_attention` computes, row by row."
    out = torch.zeros(q.shape, dtype=own.dtype)
    live = members[members>=0]
    assert sorted(live.tolist())==list(range(len(live)))                             # every live row once,
    assert all(len({*rows[m[m>=0],0].tolist()}) < 2 for m in members)                # together with rows of its own prompt
    heads_per_key = q.shape[1]//k.shape[1]
    def keys(j, r, g, P, i):
        "Keys (j=0) or values (j=1) that row r sees."
        seen = torch.cat([prompt[j,g,:,:P], own[j,r,:,:i+1]], 1)[:,-window:]
        return seen.float().repeat_interleave(heads_per_key, 0)
    for r,(g,P,i) in enumerate(rows[:len(live)].tolist()):
        own[0,r,:,i], own[1,r,:,i] = k[r], v[r]
        K,V = (keys(j, r, g, P, i) for j in (0, 1))
        out[r] = ((q[r][:,None].float() @ K.mT*q.shape[-1]**-.5).softmax(-1) @ V)[:,0]
    return out

class Plain:
    "A recorded step that is not recorded."
    def __init__(self, scratch): pass
    def __call__(self, f): f()

@pytest.fixture(params=['compiled', 'operators', *['recorded']*(DEVICE=='cpu')])
def both(request, monkeypatch):
    "What is compiled for the device; the operators that run everywhere; and, without a GPU, its way through a rollout, by stand-ins."
    if request.param=='recorded':
        for n,f in dict(decode_attention=attention, Recorded=Plain, gpu_runs=lambda device: True).items(): monkeypatch.setattr(gpu, n, f)
    with nullcontext() if request.param=='compiled' else plain(): yield

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('seed', range(8))
def test_logprobs_are_the_plain_models(seed, dtype, both):
    model, prompts, how = drawn(seed)
    samples,_ = generate(model, None, prompts, dtype=dtype, **how)
    assert [(o.prompt, o.sample) for o in samples]==[(p,i) for p in range(len(prompts)) for i in range(how['n'])]
    for o in samples:
        assert len(o.tokens)==how['max_new'] and all(o.sampled) and not o.stopped
        for arithmetic in {dtype, torch.float32}:   # bfloat16 is compared with itself and with float32
            want,_ = replay(model, prompts[o.prompt], o, arithmetic)
            assert (torch.tensor(o.logprobs)-want).abs().max() < TOLERANCE[dtype]

FAMILIES = dict(
    llama=lambda: hub_model(hidden_size=64, num_attention_heads=8, num_key_value_heads=1, vocab_size=300, tie_word_embeddings=True),
    qwen2=lambda: hub_model('qwen2', hidden_size=64, vocab_size=300),
    gemma2=lambda: hub_model('gemma2', hidden_size=64, vocab_size=300, sliding_window=9),
    smear=lambda: NanoChat(NanoConfig(3, 64, 4, 2, 256, 300, 320, 'SL', 'smear')),
    gates12=lambda: NanoChat(NanoConfig(3, 64, 4, 2, 256, 300, 320, 'SL', 'gates12')),
    values=lambda: NanoChat(NanoConfig(3, 64, 4, 4, 256, 300, 320, 'L', 'values')),
    lambdas=lambda: NanoChat(NanoConfig(2, 64, 4, 4, 256, 300, 320, 'SL', 'lambdas')),
    plain=lambda: NanoChat(NanoConfig(2, 64, 4, 4, 256, 300, 320, 'L', 'plain')))

def group_of_four():
    "A prompt, four samples of different lengths, and their weights."
    samples = [Sample(0, k, [5+k]*(9+k), [True]*(9+k), [0.]*(9+k)) for k in range(4)]
    return [1,2,3], samples, [.1, -.3, .2, .1]

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('family', FAMILIES)
def test_other_families(family, dtype, both, recwarn):
    "Generated by the engine and replayed; a gradient; and nothing that a recorded step could not hold."
    model, g = FAMILIES[family](), torch.Generator().manual_seed(3)
    for p in model.parameters(): p.data.normal_(0, .1, generator=g)
    model.to(DEVICE)
    prompts = [[1,2,3], [4,5], [6]*40]
    for o in generate(model, None, prompts, n=3, max_new=20, rows=8, dtype=dtype)[0]:
        want,_ = replay(model, prompts[o.prompt], o, dtype)
        assert (torch.tensor(o.logprobs)-want).abs().max() < TOLERANCE[dtype]
    loss,_,_ = policy_loss(model, [group_of_four()], dtype=dtype)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert not [w for w in recwarn if 'cannot be recorded' in str(w.message)]

@pytest.mark.parametrize('seed', range(8, 14))
def test_greedy_takes_the_best_token(seed, both):
    "Wherever the two best logits differ by more than 1e-4."
    model, prompts, how = drawn(seed)
    for o in generate(model, None, prompts, temperature=0, **how)[0]:
        _,logits = replay(model, prompts[o.prompt], o)
        best = logits.topk(2)
        clear = best.values[:,0]-best.values[:,1] > 1e-4
        assert torch.equal(torch.tensor(o.tokens)[clear], best.indices[:,0][clear])

@pytest.mark.parametrize('rows', [2, 100])
def test_an_answer_ends_where_the_context_does(rows, both):
    "And is, until there, what a longer context allows; the engine does not write a token more."
    prompts, how = [[1,2,3], [4]*30, [5]*10, [6]*38], dict(n=3, max_new=20, rows=rows, top_k=10)
    narrow, wide = toy(3, context=40), toy(3)
    cut, cost = generate(narrow, None, prompts, **how)
    same = 0
    for a,b in zip(cut, generate(wide, None, prompts, **how)[0], strict=True):
        room = 40-len(prompts[a.prompt])
        assert (len(a.tokens), a.full, b.full)==(min(20, room), room < 20, False) and not a.stopped
        want,_ = replay(narrow, prompts[a.prompt], a)
        assert (torch.tensor(a.logprobs)-want).abs().max() < TOLERANCE[torch.float32]
        same += a.tokens==b.tokens[:len(a.tokens)]
    assert same >= 11   # of 12: a near tie may part two answers
    assert cost.new==[[20]*3, [10]*3, [20]*3, [2]*3]
    with pytest.raises(UserError, match='a prompt of 40 tokens leaves no room for an answer in a context of 40'):
        generate(narrow, None, [[1]*40], max_new=1)

@pytest.mark.parametrize('seed', range(14, 18))
def test_the_plain_ways_cache_agrees(seed):
    "Two caches that share no code."
    model, prompts, how = drawn(seed)
    new, n = how['max_new'], how['n']
    ours = [o.tokens for o in generate(model, None, prompts, n=n, max_new=new, temperature=0)[0]]
    plain = [x for xs in plain_rollout(model, prompts, n, new, temperature=0) for x in xs]
    same = sum(a==b for a,b in zip(ours, plain, strict=True))
    assert same >= .9*len(ours)   # a near tie may part two answers

@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [dict(), dict(kv_groups=2, pattern='SL', short_window=5)], ids=str)
def test_what_is_compiled_has_the_operators_gradient(dtype, shape):
    "And the same one at every run."
    model = toy(7, **shape)
    groups = [group_of_four(), ([4]*20, [Sample(1, 0, [6,7], [True]*2, [0.]*2)], [.5])]
    def run():
        model.zero_grad()
        loss,said,_ = policy_loss(model, groups, dtype=dtype)
        loss.backward()
        more,_ = supervised_loss(model, [([1,2,3,4]*5, [0,1]*10)], dtype)
        more.backward()
        return [loss.detach(), more.detach(), said, *(p.grad.clone() for p in model.parameters())]
    got, again = run(), run()
    with plain(): want = run()
    tolerance = .05 if dtype==torch.bfloat16 else 1e-4
    for a,b,c in zip(got, want, again, strict=True): assert torch.equal(a, c) and (a-b).norm() <= tolerance*b.norm()

def test_a_rollout_leaves_nothing_behind_but_what_the_next_one_uses(both, monkeypatch):
    "Its keys and values are gigabytes on a GPU: they must not wait for the collector of cycles, nor outlive their model."
    made, room = [], Decode.room
    def noted(self, *a):
        x = room(self, *a)
        made.append(weakref.ref(x))
        return x
    monkeypatch.setattr(Decode, 'room', noted)
    def alive(): return sum(r() is not None and r().numel() > 0 for r in made)
    model = toy(5)
    generate(model, None, [[1,2]]*3, n=3, max_new=5)
    kept = alive()
    assert kept in (0, 2)   # nothing, or what a recorded step reads: prompts and rows
    gc.disable()
    try:
        for n in (3, 2): generate(model, None, [[1,2]]*n, n=3, max_new=5, rows=9)
        if kept: assert alive()==4   # of two sizes
        else: assert alive()==0
        del model
        assert alive()==0
    finally: gc.enable()

def test_a_second_rollout_in_the_same_buffers_is_that_of_new_ones(both):
    "Whatever the first has left there, and with the weights of then."
    model, prompts, how = drawn(3)
    first = [(o.tokens, o.logprobs) for o in generate(model, None, prompts, **how)[0]]
    for p in model.parameters(): p.data.mul_(1.5)
    generate(model, None, [[7]*len(p) for p in prompts], **how)
    for p in model.parameters(): p.data.div_(1.5)
    again = [(o.tokens, o.logprobs) for o in generate(model, None, prompts, **how)[0]]
    assert [t for t,_ in again]==[t for t,_ in first]
    for (_,a),(_,b) in zip(again, first, strict=True): assert (torch.tensor(a)-torch.tensor(b)).abs().max() < 1e-4

def test_rows_do_not_matter(both):
    model, tok = toy(3), train_tokenizer(['1+1=2 ']*9, 300)
    prompts = [[i+1]*(i+1) for i in range(9)]
    want,_ = generate(model, tok, prompts, n=3, max_new=40, temperature=1.5)
    assert len({len(o.tokens) for o in want}) > 3   # many lengths: rows come and go
    for rows in (1, 4, 11):
        got,_ = generate(model, tok, prompts, n=3, max_new=40, temperature=1.5, rows=rows)
        assert sum(a.tokens!=b.tokens for a,b in zip(want, got, strict=True)) <= 1   # a draw may fall on an edge

def test_rows_end_at_the_end_token_and_only_there(both):
    model, tok = toy(4), train_tokenizer(['1+1=2 ']*9, 300)
    ends = {tok.special['assistant_end'], tok.special['bos']}
    samples,cost = generate(model, tok, [[5,6],[7]], n=40, max_new=60)
    assert any(o.stopped for o in samples) and cost.tokens==sum(len(o.tokens) for o in samples)
    for o in samples:
        assert o.stopped==(o.tokens[-1] in ends) and not ends & set(o.tokens[:-1])
        assert len(o.tokens)==len(o.sampled)==len(o.logprobs) <= 60
        assert o.stopped or len(o.tokens)==60
    needed = 3 + sum(len(o.tokens)-1 for o in samples)    # positions: the prompts' and those of all tokens but the last
    late = cost.work.positions-cost.work.pad - needed     # a recorded step is sent before the last one's tokens are read
    assert 0 <= late <= sum(o.stopped for o in samples) and (late==cost.work.pad==0 or gpu.gpu_runs(torch.device(DEVICE)))

def test_memory_stays_bounded_while_late_rows_come():
    "Blocks that nobody needs any more are used again."
    model = toy(5)
    kept = []
    room = Decode.room
    Decode.room = lambda self,*a: kept.append(a) or room(self, *a)
    try:
        with plain(): generate(model, None, [[1,2]]*40, max_new=33, rows=4)
    finally: Decode.room = room
    block = 16 if DEVICE=='cpu' else 256
    assert len(kept)-1 <= 33//block+3

def test_threads_do_not_matter():
    "Each row is one thread's: the same digits with one as with two."
    model, prompts, how = drawn(2)
    before = torch.get_num_threads()
    def run(n):
        torch.set_num_threads(n)
        return [(o.tokens, o.logprobs) for o in generate(model, None, prompts, **how)[0]]
    try:
        for n in (1, 2):
            run(n)
            assert torch.get_num_threads()==n   # the loops leave PyTorch's number alone
        for (tokens, logprobs),(others, theirs) in zip(run(1), run(2), strict=True):
            assert tokens==others and torch.allclose(torch.tensor(logprobs), torch.tensor(theirs), atol=1e-4)
    finally: torch.set_num_threads(before)

def test_without_onednn_everything_runs_as_before(monkeypatch):
    model, prompts, how = drawn(6)
    want = [o.tokens for o in generate(model, None, prompts, **how)[0]]
    monkeypatch.setattr(fused, 'onednn_linear', lambda: None)
    assert [o.tokens for o in generate(model, None, prompts, **how)[0]]==want

def test_a_broken_model_gets_tokens_in_finite_time(both):
    model = toy(1)
    with torch.no_grad(): model.head.weight.fill_(torch.nan)
    for how in (dict(), dict(temperature=0)):
        samples,_ = generate(model, None, [[1,2,3]], n=3, max_new=5, **how)
        assert all(0 <= t < 300 for o in samples for t in o.tokens)

def test_holes_are_filled_from_the_end():
    for seed in range(200):
        r = random.Random(seed)
        n = r.randrange(1, 12)
        gone = r.sample(range(n), r.randrange(n+1))
        left = moved(list(range(n)), *refill(n, gone), n-len(gone))
        assert sorted(left)==[i for i in range(n) if i not in gone]

def test_the_first_loop_leaves_pytorchs_threads_alone():
    "numba starts its threads with the first loop, on the same OpenMP: seen in a new process only."
    code = ('import torch; torch.set_num_threads(1); from exp2nb.fast.loops import pick_tokens; '
            'pick_tokens(torch.randn(4, 50), torch.rand(4), 1., 5, 50, False); print(torch.get_num_threads())')
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()[-1]=='1'

def test_a_package_that_cannot_be_written_to_is_imported(tmp_path):
    "Containers whose user has no home: compiled loops go to the temporary files, with one line; without any place they are not kept."
    shutil.copytree(Path(fused.__file__).parents[1], tmp_path/'exp2nb', ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'exp2nb'/'fast'/'__pycache__').write_text('')   # a file, so that no folder can be made
    temporary = tmp_path/'temporary'
    temporary.mkdir()
    code = 'import numba, exp2nb.fast.loops as l; print(numba.config.CACHE_DIR, l.FAST["cache"])'
    env = {k:v for k,v in os.environ.items() if not k.startswith('NUMBA')}
    env |= dict(HOME='/dev/null', PYTHONPATH=str(tmp_path), PYTHONDONTWRITEBYTECODE='1', TMPDIR=str(temporary))
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, cwd=tmp_path)
    folder, kept = r.stdout.split()
    assert Path(folder).parents[1]==temporary and kept=='True', r.stderr
    assert r.stderr.count('\n')==1 and 'cannot be written to' in r.stderr
