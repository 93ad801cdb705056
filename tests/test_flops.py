"FLOP counting: pinned integers, real steps of every stage against PyTorch's counter, and what may not change a total."
import random
from contextlib import nullcontext
import pytest, torch
from tiny import hub_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from exp2nb import engine, flops
from exp2nb.config import ModelConfig, Rates
from exp2nb.engine import generate
from exp2nb.flops import Work, executed_flops, flop_counter, optimizer_cost, rollout_cost, supervised_cost, update_cost
from exp2nb.grpo import Group, policy_loss, set_weights
from exp2nb.protocol import plain
from exp2nb.model import Transformer
from exp2nb.bases.nanochat import NanoChat, NanoConfig
from exp2nb.optim import Optimizer
from exp2nb.protocol import Shape
from exp2nb.train import supervised_loss

ours = lambda **kw: lambda: Transformer(ModelConfig(**dict(depth=3, aspect=32, head_dim=24, vocab=300, context=64) | kw))
MODELS = {
    'plain': ours(),
    'grouped heads': ours(kv_groups=2),
    'windows': ours(pattern='SSL', short_window=4),
    'padded vocabulary': ours(vocab=301, vocab_multiple=128),
    'one head': ours(depth=1, aspect=24),
    'all of it': ours(kv_groups=4, pattern='SL', short_window=5, vocab=301),
    'nanochat': lambda: NanoChat(NanoConfig(layers=3, width=48, heads=2, kv_heads=1, context=64, vocab=300, padded=320, pattern='SL')),
    'llama': lambda: hub_model(hidden_size=40, head_dim=12, intermediate_size=88, max_position_embeddings=64),
    'qwen, biases, window': lambda: hub_model('qwen2', tie_word_embeddings=True, use_sliding_window=True, sliding_window=6,
                                              max_window_layers=1, max_position_embeddings=64),
    'gemma, windows, soft-cap': lambda: hub_model('gemma2', sliding_window=6, max_position_embeddings=64),
}

@pytest.fixture(params=[(m, how) for m in MODELS for how in ('loops', 'operators')], ids=' by '.join)
def model(request):
    "Each model by compiled loops and by PyTorch's operators."
    torch.manual_seed(0)
    m = MODELS[request.param[0]]()
    for p in m.parameters(): torch.nn.init.normal_(p, 0., .1)
    with plain() if request.param[1]=='operators' else nullcontext(): yield m

def count(f):
    with flop_counter() as c: out = f()
    return c.get_total_flops(), out

def close(executed, counted): assert abs(executed/counted-1) < 1e-3, (executed, counted)

# --- pinned integers: whoever changes one raises COUNTING_REVISION and writes the new ones here
layer = ((4,4), (2,4), (2,4), (4,4), (16,4), (4,16))
TOY = Shape(layers=2, width=4, heads=2, kv_heads=1, head_dim=2, vocab=8, matrices=layer*2, windows=(2,None), context=16)

def test_pinned_integers_of_this_revision():
    assert flops.COUNTING_REVISION==1
    r = rollout_cost(TOY, [3, 5], [[3, 1], [4, 0]], Work(20, 10, 99, 2), forced=1)
    assert r==dict(tokens_prompt=8, tokens_new=8, tokens_forced=1, tokens_pad=2,
                   flops_model=2352+1744 + (5*704+64+16*(9+15)) + (3*768+16*(6+21)),
                   flops_executed=40*352+20*32+16*99,
                   flops_note=(6+4+9+5)*(768+16*18))
    u = update_cost(TOY, [3], [[3, 2]], Work(7, 5, 60), forced=1)
    assert u==dict(tokens_prompt=6, tokens_new=5, tokens_forced=1, tokens_pad=0,
                   flops_model=12672+3*(4*768+16*(7+10)),
                   flops_executed=3*(14*352+10*32)+56*60,
                   flops_note=11*3*(768+16*18))
    s = supervised_cost(TOY, [6], Work(8, 8, 60, pad=3), loss_tokens=2, fused=False)
    assert s==dict(tokens_prompt=4, tokens_new=2, tokens_forced=0, tokens_pad=3,
                   flops_model=12672,
                   flops_executed=3*8*768+48*60,
                   flops_note=9*3*(768+16*18))
    assert optimizer_cost(TOY.matrices, rank=1)==dict(optimizer_cost(TOY.matrices), flops_model=0)
    assert optimizer_cost(TOY.matrices)['flops_executed']==32320

def test_every_cost_is_a_python_integer():
    rollout, update = rollout_cost(TOY, [3], [[3]], Work(5, 3, 9)), update_cost(TOY, [3], [[3]], Work(5, 5, 51))
    for c in (rollout, update, supervised_cost(TOY, [9], Work(8, 8, 8)), optimizer_cost(TOY.matrices)):
        assert all(type(v) is int for v in c.values()), c

# --- executed against FlopCounterMode
class EndsOften(engine.Row):
    def __init__(self, *args):
        super().__init__(*args)
        self.ends = set(range(0, 300, 9))

def test_generation(model):
    "Prefill and decode of rows that end at different times and make room for others."
    prompts = [[1+i]*n for i,n in enumerate((13, 6, 9, 21))]
    for rows in (3, 64):
        counted,(samples,cost) = count(lambda rows=rows: generate(model, None, prompts, n=4, max_new=17, rows=rows, kind=EndsOften))
        assert len({len(s.tokens) for s in samples}) > 2
        close(cost.columns(model.shape)['flops_executed'], counted)

def test_prefill_alone(model):
    counted,(_,cost) = count(lambda: generate(model, None, [[3]*11, [4]*8], n=2, max_new=1))
    assert cost.steps==0
    close(cost.columns(model.shape)['flops_executed'], counted)

def rollouts(model):
    samples,_ = generate(model, None, [[5]*11, [6]*4], n=4, max_new=9)
    groups = [Group([5]*11, samples[:4], [1.,0,0,1]), Group([6]*4, samples[4:], [1.,0,0,0])]
    set_weights(groups, 'step', 9)
    return [(g.prompt, g.samples, g.weights) for g in groups]

def test_gradient_step(model):
    groups = rollouts(model)
    def step():
        loss,_,work = policy_loss(model, groups)
        loss.backward()
        return work
    counted,work = count(step)
    close(update_cost(model.shape, [11, 4], [[9]*4]*2, work)['flops_executed'], counted)

SEQS = [([i % 300 for i in range(n)], [0]*(n//2)+[1]*(n-n//2)) for n in (32, 17, 5, 24)]

def supervised(model):
    loss,work = supervised_loss(model, SEQS)
    loss.backward()
    return work

def test_supervised_step(model):
    counted,work = count(lambda: supervised(model))
    close(supervised_cost(model.shape, [len(i) for i,_ in SEQS], work, work.heads)['flops_executed'], counted)

@pytest.fixture
def operators():
    "PyTorch's own, which its counter knows."
    with plain(): yield

def test_a_count_without_attention_fails(model, operators):
    counted,work = count(lambda: supervised(model))
    assert abs(executed_flops(model.shape, Work(work.positions, work.heads, 0), True)/counted-1) > 1e-2
    with FlopCounterMode(display=False) as blind: supervised(model)   # PyTorch's own counter agrees with the wrong count: the trap is real
    assert (blind.get_total_flops() < counted)==(not model.shape.softcap)   # capped scores are two products, which it does count

def test_math_backend_needs_no_registration(model, operators):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as c: work = supervised(model)
    close(supervised_cost(model.shape, [len(i) for i,_ in SEQS], work, fused=False)['flops_executed'], c.get_total_flops())

def test_optimizer_step(model):
    opt = Optimizer(model, Rates())
    supervised(model)
    counted,_ = count(lambda: opt.step(1.))
    close(optimizer_cost(opt.matrices)['flops_executed'], counted)

def test_adamw_counts_nothing(model):
    opt = torch.optim.AdamW(model.parameters())
    supervised(model)
    assert count(opt.step)[0]==optimizer_cost(())['flops_executed']==0

def test_matrices_of_the_shape_are_those_that_a_token_passes(model):
    linears = [m for n,m in model.named_modules() if isinstance(m, torch.nn.Linear) and 'lm_head' not in n and n!='head']
    assert sorted(model.shape.matrices)==sorted(tuple(m.weight.shape) for m in linears)

# --- properties of `model`
def random_step(rng):
    shape = Shape(3, 8, 2, 1, 4, 16, ((8,8), (32,8))*3, (rng.choice([1, 3, 7]), None, 5), 64)
    groups = [(rng.randint(1, 20), [rng.randint(0, 12) for _ in range(rng.randint(2, 5))]) for _ in range(rng.randint(1, 8))]
    return shape, groups

def model_cost(f, shape, groups): return f(shape, [p for p,_ in groups], [ns for _,ns in groups], Work())['flops_model']

@pytest.mark.parametrize('seed', range(50))
def test_model_is_additive_monotone_and_blind_to_batching(seed):
    rng = random.Random(seed)
    shape, groups = random_step(rng)
    for f in (rollout_cost, update_cost):
        whole = model_cost(f, shape, groups)
        k = rng.randint(0, len(groups))
        assert whole==model_cost(f, shape, groups[:k])+model_cost(f, shape, groups[k:])             # over batches, micro-batches, ranks
        assert whole==sum(model_cost(f, shape, groups[r::3]) for r in range(3))
        assert whole==model_cost(f, shape, rng.sample(groups, len(groups)))
        p,ns = groups[0]
        assert whole <= model_cost(f, shape, [(p, [ns[0]+1, *ns[1:]]), *groups[1:]])                # one token more
        assert whole <= model_cost(f, shape, [(p+1, ns), *groups[1:]]) <= model_cost(f, shape, [(p+1, [*ns, 2]), *groups[1:]])
    split = [(p, [n]) for p,ns in groups for n in ns]   # rows of a group apart: same gradient step, but prompts run again
    assert model_cost(update_cost, shape, split)==model_cost(update_cost, shape, groups)
    lengths = [p+n for p,ns in groups for n in ns]
    sft = lambda ls: supervised_cost(shape, ls, Work())['flops_model']
    assert sft(lengths)==sum(sft([l]) for l in lengths)==model_cost(update_cost, shape, groups)
    assert supervised_cost(shape, lengths, Work(pad=99))['flops_model']==sft(lengths)               # padding is nothing

@pytest.mark.parametrize('seed', range(20))
def test_against_a_loop_over_positions(seed):
    rng = random.Random(seed)
    shape, groups = random_step(rng)
    at = lambda c, head: 2*(shape.n if head else shape.n_body) + sum(4*shape.heads*shape.head_dim*min(c, w or c) for w in shape.windows)
    generation = sum(sum(at(c, c==p) for c in range(1, p+1)) + sum(at(c, True) for n in ns for c in range(p+1, p+n)) for p,ns in groups)
    update = 3*sum(at(c, True) for p,ns in groups for n in ns for c in range(1, p+n))
    assert (model_cost(rollout_cost, shape, groups), model_cost(update_cost, shape, groups))==(generation, update)

def test_zero_advantage_groups_cost_the_algorithm_but_not_the_machine():
    model = MODELS['plain']()
    groups = rollouts(model)
    whole, skipped = (policy_loss(model, g)[2] for g in (groups, groups[:1]))
    a,b = (update_cost(model.shape, [11, 4], [[9]*4]*2, w) for w in (whole, skipped))
    assert a['flops_model']==b['flops_model'] and a['flops_executed'] > b['flops_executed']
