"""Make vectors from a nanochat checkout: random weights, ids, and nanochat's own logits.

    python -O tests/vectors/make_nanochat.py NANOCHAT_DIR CASE OUT.safetensors

Weights are multiples of 1/64 stored as int8, so that a file stays small and float32 holds them exactly. A prompt of `prefill` random
tokens is continued greedily, one token at a time through nanochat's own key/value cache: those are the `cached` logits. `logits` come
from one full forward. Both are kept for the positions `at`.
-O because older versions assert that their rotary angles are bfloat16, and here everything is float32.
"""
import dataclasses, inspect, json, os, subprocess, sys
import torch
from safetensors.torch import save_file

CASES = {   # n_layer, n_head, n_kv_head, n_embd, vocab_size, sequence_len, window_pattern; tokens
    'gqa-window': ((3, 4, 2, 32, 61, 512, 'SL'), 140),    # the short window of 128 binds
    'mha-long':   ((2, 2, 2, 32, 64, 32, 'L'), 24),
    'mqa-short':  ((4, 2, 1, 24, 70, 64, 'SSSL'), 40),    # before March 2026 the short window is 32 here
    'old':        ((3, 4, 2, 32, 61, 24, 'SSL'), 20),     # width 32 for gates on 32 channels; a short window of 12 binds
}

def main(nanochat_dir, case, out):
    os.environ['NANOCHAT_DTYPE'] = 'float32'
    torch.Tensor.bfloat16 = torch.Tensor.float   # older versions round their angles
    sys.path.insert(0, nanochat_dir)
    from nanochat.gpt import GPT, GPTConfig
    from nanochat.engine import KVCache
    sizes, n = CASES[case]
    config = dict(zip('n_layer n_head n_kv_head n_embd vocab_size sequence_len window_pattern'.split(), sizes, strict=True))
    if 'window_pattern' not in {f.name for f in dataclasses.fields(GPTConfig)}: del config['window_pattern']
    model = GPT(GPTConfig(**config)).float()
    model.init_weights()
    g = torch.Generator().manual_seed(1)
    weights = {}
    for name,p in model.named_parameters():
        w = torch.randn(p.shape, generator=g)*(.15 if 'attn.c_' in name or 'mlp' in name else .3) + (1. if 'resid' in name else 0.)
        weights[name] = (w*64).round().clamp(-127, 127).to(torch.int8)
        p.data = weights[name].float()/64
    at, prefill = torch.arange(n-6, n), n-5
    ids = torch.randint(config['vocab_size'], (prefill,), generator=g)
    sized = dict(batch_size=1, num_heads=config['n_kv_head'], seq_len=n, head_dim=config['n_embd']//config['n_head'],
                 num_layers=config['n_layer'], device='cpu', dtype=torch.float32)
    cache = KVCache(**{k:v for k,v in sized.items() if k in inspect.signature(KVCache.__init__).parameters})
    with torch.inference_mode():
        cached = [model(ids[None], kv_cache=cache)[0].float()]
        while len(ids) < n:
            ids = torch.cat([ids, cached[-1][-1:].argmax(-1)])
            cached.append(model(ids[None,-1:], kv_cache=cache)[0].float())
        logits = model(ids[None])[0].float()
    commit = subprocess.run(['git', '-C', nanochat_dir, 'rev-parse', 'HEAD'], capture_output=True, text=True).stdout.strip()
    tensors = {f'w.{k}':v for k,v in weights.items()}
    tensors |= dict(ids=ids.to(torch.int16), at=at, logits=logits[at], cached=torch.cat(cached)[at])
    save_file(tensors, out, metadata=dict(nanochat=commit, case=case, model_config=json.dumps(config), prefill=str(prefill)))

if __name__=='__main__': main(*sys.argv[1:])
