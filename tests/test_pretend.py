"""Without a GPU: the engine and the losses on tensors that only pretend to lie on one. What is on the wrong device, or of the wrong type, stops here and not on a rented node."""
from contextlib import contextmanager
import pytest, torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from exp2nb import engine
from exp2nb.fast.bench import plain_rows
from exp2nb.config import ModelConfig
from exp2nb.engine import Sample, generate
from exp2nb.grpo import policy_loss
from exp2nb.model import Transformer
from exp2nb.train import supervised_loss

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU here: EXP2_DEVICE=cuda pytest tests/test_engine.py says more')


class Pretend(TorchDispatchMode):
    "Tensors on `cuda` are PyTorch's fake ones: sizes, types and devices without numbers. Those on the CPU are real."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves, kwargs = tree_leaves((args, kwargs)), kwargs or {}
        types = {x.dtype for x in leaves if isinstance(x, FakeTensor)}
        if len(types) > 1 and func.overloadpacket.__name__ in ('mm', 'bmm', 'addmm', 'baddbmm'): raise RuntimeError(f'a GPU does not multiply {types}')   # fake tensors would
        if any(isinstance(x, FakeTensor) or (isinstance(x, torch.device) and x.type=='cuda') for x in leaves): return func(*args, **kwargs)
        with unset_fake_temporarily(): return func(*args, **kwargs)


class Indexed(TorchFunctionMode):
    "x[…] and some others by way of operators: Python's own ask for a driver."
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
        key, at, d = key if isinstance(key, tuple) else (key,), [], 0
        if Ellipsis in [k for k in key if not isinstance(k, torch.Tensor)]:
            i = [k is Ellipsis for k in key].index(True)
            key = key[:i] + (slice(None),)*(x.dim()-sum(k is not None for k in key)+1) + key[i+1:]
        for k in key:
            if k is None: x = x.unsqueeze(d)
            elif isinstance(k, slice): x = torch.ops.aten.slice(x, d, k.start, k.stop, k.step or 1)
            elif isinstance(k, int): x = x.select(d, k); continue
            at.append(torch.tensor(k, device=x.device) if isinstance(k, (list, range)) else k if isinstance(k, torch.Tensor) else None); d += 1
        return x, at if any(a is not None for a in at) else []


@contextmanager
def pretending():
    with FakeTensorMode(allow_non_fake_inputs=True), Pretend(), Indexed(): yield


@pytest.fixture(autouse=True)
def autocast(monkeypatch):
    "Where there is no GPU `torch.autocast('cuda')` switches itself off; here it mustn't."
    monkeypatch.setattr(torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *args, **kw: True)
    torch.set_autocast_cache_enabled(False)   # with it, the pretence aborts
    yield
    torch.set_autocast_cache_enabled(True)


def on_gpu(**kw):
    model = Transformer(ModelConfig(**dict(depth=2, aspect=64, head_dim=32, vocab=500, context=128) | kw))
    for m in model.modules():
        for n,p in list(m.named_parameters(recurse=False)): setattr(m, n, torch.nn.Parameter(torch.empty(p.shape, device='cuda')))
    return model


CASES = pytest.mark.parametrize('kw', [dict(pattern='SSSL'), dict(kv_groups=2)], ids=str)
DTYPES = pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)


def test_the_pretence_has_teeth():
    with pretending():
        x = torch.ones(3, device='cuda')
        assert (x+1)[1:].device.type=='cuda' and isinstance(x, FakeTensor) and torch.ones(3).tolist()==[1,1,1]
        with pytest.raises(RuntimeError, match='two devices|same device'): x+torch.ones(3)
        with pytest.raises(RuntimeError): torch.ones(2, 3, device='cuda', dtype=torch.bfloat16)@torch.ones(3, 2, device='cuda')
        with torch.autocast('cuda', torch.bfloat16): assert (x[None]@x[:,None]).dtype==torch.bfloat16


@DTYPES
@CASES
def test_rollout(monkeypatch, dtype, kw):
    real, picked = engine.pick, []
    def pick(logits, u, *args):
        picked.append((*real(logits, u, *args), logits))
        return torch.randint(0, 500, (len(logits),)), torch.zeros(len(logits))   # numbers to go on with
    monkeypatch.setattr(engine, 'pick', pick)
    with pretending():
        samples, cost = generate(on_gpu(**kw), None, [list(range(1, 1+n)) for n in (9, 3, 40)], n=5, max_new=18, rows=7, dtype=dtype)
    assert all(len(s.tokens)==18 for s in samples) and len(samples)==15
    for ids,lps,logits in picked:
        assert {t.device.type for t in (ids, lps, logits)}=={'cuda'} and ids.dtype==torch.long and lps.dtype==logits.dtype==torch.float32


def groups():
    return [(list(range(1, 1+n)), [Sample(0, i, list(range(5+i)), [True]*(5+i)) for i in range(4)], [.5, -.5, 1., -1.]) for n in (9, 3)]

@DTYPES
@CASES
def test_losses(dtype, kw):
    "Forward only: the backward pass asks for a driver."
    with pretending():
        model = on_gpu(**kw)
        with torch.no_grad():
            for top_k in (0, 50):
                loss,lp,work = policy_loss(model, groups(), top_k=top_k, dtype=dtype)
                assert loss.device.type==lp.device.type=='cuda' and loss.dtype==lp.dtype==torch.float32 and len(lp)==work.heads==2*(5+6+7+8)
            loss,work = supervised_loss(model, [(list(range(n)), [0]*3+[1]*(n-3)) for n in (9, 30, 17)], dtype)
            assert loss.device.type=='cuda' and loss.dtype==torch.float32


@DTYPES
def test_plain_way(dtype):
    with pretending(), torch.autocast('cuda', dtype, enabled=dtype!=torch.float32):
        assert plain_rows(on_gpu(), list(range(9)), 8, 6).shape==(8, 6)
