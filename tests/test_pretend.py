"""Without a GPU: the engine and the losses on tensors that only pretend to lie on one.

Why: most development happens on machines without a GPU, and the most frequent fault on a rented one is small: a tensor left on the CPU,
an index of the wrong type, a float32 number multiplied by a bfloat16 one. PyTorch's fake tensors have a shape, a type and a device but no
numbers, so such a fault raises here.
Four things stand between fake tensors and the engine, and each has a stand-in below:

- `Pretend` gives operators fake tensors where something lies on `cuda` and real ones elsewhere:
  the engine's lists and random numbers are real;
- `Indexed` sends indexing and three other methods through operators, since Python's own ask for a driver;
- `autocast` and the choice of a current device switch themselves off without a GPU, and are switched on (or left out);
- a token must be a number, so `pick` answers with random ones, after the real one has run on fake logits.
"""
from contextlib import contextmanager, nullcontext
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tiny import hub_model
from exp2nb import engine
from exp2nb.fast.bench import plain_rows
from exp2nb.config import ModelConfig
from exp2nb.engine import Sample, generate
from exp2nb.grpo import policy_loss
from exp2nb.model import Transformer
from exp2nb.train import supervised_loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(),
                                reason='there is a GPU here: EXP2_DEVICE=cuda pytest tests/test_engine.py tests more')


class Pretend(TorchDispatchMode):
    "Operators on `cuda` get PyTorch's fake tensors: sizes, types and devices without numbers. Those on the CPU get real ones."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, kwargs = tree_leaves((args, kwargs)), kwargs or {}
        fake = [x for x in leaves if isinstance(x, FakeTensor)]
        types = {x.dtype for x in fake}
        if len(types) > 1 and func.overloadpacket.__name__ in ('mm', 'bmm', 'addmm', 'baddbmm'):
            raise RuntimeError(f'a GPU does not multiply {types}')   # fake tensors would
        if fake or any(isinstance(x, torch.device) and x.type=='cuda' for x in leaves): return func(*args, **kwargs)
        with unset_fake_temporarily(): return func(*args, **kwargs)


class Indexed(TorchFunctionMode):
    "x[…] and some others through operators."
    instead = {torch.Tensor.copy_: torch.ops.aten.copy_, torch.Tensor.__invert__: torch.ops.aten.bitwise_not}
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], FakeTensor):
            x, at = self.view(*args[:2])
            if func is torch.Tensor.__getitem__: return torch.ops.aten.index(x, at) if at else x
            if at: return torch.ops.aten.index_put_(x, at, torch.as_tensor(args[2], device=x.device, dtype=x.dtype))
            return torch.ops.aten.copy_(x, args[2]) if isinstance(args[2], torch.Tensor) else x.fill_(args[2])
        return self.instead.get(func, func)(*args, **(kwargs or {}))

    def view(self, x, key):
        "What slices, numbers and None make of x, and a tensor or None for each of its dimensions."
        key = key if isinstance(key, tuple) else (key,)
        if Ellipsis in [k for k in key if not isinstance(k, torch.Tensor)]:
            i = [k is Ellipsis for k in key].index(True)
            key = key[:i] + (slice(None),)*(x.dim()-sum(k is not None for k in key)+1) + key[i+1:]
        at = []
        for k in key:
            if k is None: x = x.unsqueeze(len(at))
            elif isinstance(k, int): x = x.select(len(at), k)
            if k is None or isinstance(k, slice): at.append(None)
            elif not isinstance(k, int): at.append(torch.tensor(k, device=x.device) if isinstance(k, (list, range)) else k)
            if isinstance(k, slice): x = torch.ops.aten.slice(x, len(at)-1, k.start, k.stop, k.step or 1)
        return x, at if any(a is not None for a in at) else []


@contextmanager
def pretending():
    with FakeTensorMode(allow_non_fake_inputs=True), Pretend(), Indexed(): yield


@pytest.fixture(autouse=True)
def autocast(monkeypatch):
    "Without a GPU `torch.autocast('cuda')` switches itself off; here it must not. Nor is there a current device to be chosen."
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args, **kw: True)
    monkeypatch.setattr(torch.accelerator, 'device_index', nullcontext)
    torch.set_autocast_cache_enabled(False)   # with it, PyTorch's process aborts
    yield
    torch.set_autocast_cache_enabled(True)


def on_gpu(**kw):
    "A model whose parameters are fake tensors on `cuda`."
    model = Transformer(ModelConfig(**dict(depth=2, aspect=64, head_dim=32, vocab=500, context=128) | kw))
    for m in model.modules():
        for n,p in list(m.named_parameters(recurse=False)): setattr(m, n, torch.nn.Parameter(torch.empty(p.shape, device='cuda')))
    return model


CASES = pytest.mark.parametrize('kw', [dict(pattern='SSSL'), dict(kv_groups=2)], ids=str)
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)


def test_the_pretence_can_fail():
    with pretending():
        x = torch.ones(3, device='cuda')
        assert (x+1)[1:].device.type=='cuda' and isinstance(x, FakeTensor) and torch.ones(3).tolist()==[1,1,1]
        with pytest.raises(RuntimeError, match='two devices|same device'): x+torch.ones(3)
        with pytest.raises(RuntimeError): torch.ones(2, 3, device='cuda', dtype=torch.bfloat16)@torch.ones(3, 2, device='cuda')
        with torch.autocast('cuda', torch.bfloat16): assert (x[None]@x[:,None]).dtype==torch.bfloat16
        with pytest.raises(RuntimeError): bool((x > 0).all())   # a number that the CPU would have to wait for


def pick_at_random(monkeypatch)->list:
    "The engine's `pick` runs on fake logits, and random tokens go on; what it gave and was given is noted."
    real, picked = engine.pick, []
    def pick(logits, u, **how):
        picked.append((*real(logits, u, **how), logits))
        return torch.randint(0, 500, (len(logits),)), torch.zeros(len(logits))
    monkeypatch.setattr(engine, 'pick', pick)
    return picked


@DTYPES
@CASES
def test_rollout(monkeypatch, dtype, kw):
    picked = pick_at_random(monkeypatch)
    with pretending():
        prompts = [list(range(1, 1+n)) for n in (9, 3, 40)]
        samples, cost = generate(on_gpu(**kw), None, prompts, n=5, max_new=18, rows=7, dtype=dtype)
    assert all(len(s.tokens)==18 for s in samples) and len(samples)==15
    for ids,lps,logits in picked:
        assert {t.device.type for t in (ids, lps, logits)}=={'cuda'} and ids.dtype==torch.long and lps.dtype==logits.dtype==torch.float32


def groups():
    samples = [Sample(0, i, list(range(5+i)), [True]*(5+i)) for i in range(4)]
    return [(list(range(1, 1+n)), samples, [.5, -.5, 1., -1.]) for n in (9, 3)]

@DTYPES
@CASES
def test_losses(dtype, kw):
    "Forward only: the backward pass asks for a driver."
    with pretending():
        model = on_gpu(**kw)
        with torch.no_grad():
            for top_k in (0, 50):
                loss,lp,work = policy_loss(model, groups(), top_k=top_k, dtype=dtype)
                assert loss.device.type==lp.device.type=='cuda' and loss.dtype==lp.dtype==torch.float32
                assert len(lp)==work.heads==2*(5+6+7+8)
            loss,work = supervised_loss(model, [(list(range(n)), [0]*3+[1]*(n-3)) for n in (9, 30, 17)], dtype)
            assert loss.device.type=='cuda' and loss.dtype==torch.float32


@DTYPES
def test_plain_way(dtype):
    with pretending(), torch.autocast('cuda', dtype, enabled=dtype!=torch.float32):
        assert plain_rows(on_gpu(), list(range(9)), 8, 6).shape==(8, 6)


def open_on_gpu(kind):
    "A small open model whose parameters and buffers are fake tensors on `cuda`."
    model = hub_model(kind, vocab_size=500, **dict(sliding_window=9) if kind.startswith('gemma') else {})
    fake = lambda x: torch.empty(x.shape, dtype=x.dtype, device='cuda')
    for m in model.modules():
        for n,p in list(m.named_parameters(recurse=False)): setattr(m, n, torch.nn.Parameter(fake(p)))
        for n,b in list(m.named_buffers(recurse=False)): m.register_buffer(n, fake(b), persistent=False)
    return model


@pytest.mark.parametrize('kind', ['llama', 'qwen3', 'gemma2', 'gemma3_text', 'olmo2', 'phi3', 'granite'])
def test_open_models(monkeypatch, kind, dtype=torch.bfloat16):
    "The library's layers among our tensors: nothing of theirs waits for a number, which a recorded step could not hold."
    pick_at_random(monkeypatch)
    with pretending(), torch.no_grad():
        model = open_on_gpu(kind)
        samples, _ = generate(model, None, [[1,2,3], [4]*12], n=3, max_new=12, rows=4, dtype=dtype)
        loss,lp,_ = policy_loss(model, groups(), dtype=dtype)
    assert all(len(s.tokens)==12 for s in samples) and loss.device.type==lp.device.type=='cuda' and lp.dtype==torch.float32
