"""What several tests need: models small enough to run in milliseconds, their tokenizers, a short configuration, an oracle.

Weights are drawn large enough that every part of a model matters: freshly made, some matrices are zero."""
import pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from exp2nb.config import make_config, override

CHATML = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
LLAMA3 = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']

def tiny_config(run_dir, arm, changes=(), **kw):
    "The smoke preset with caps that make an arm a matter of seconds."
    return override(make_config('smoke', arm=arm, run_dir=str(run_dir), **kw), dict(changes))

def randomised(model, std=.1, seed=0):
    "The same model: norms and residual scalars around 1, everything else around 0."
    torch.manual_seed(seed)
    for n,p in model.named_parameters(): torch.nn.init.normal_(p, 1. if 'resid' in n or 'norm' in n else 0., std)
    return model

def hub_tokenizer(texts, size, specials=CHATML):
    "A small byte-level BPE in the form of a tokenizer.json, behind our interface."
    pytest.importorskip('tokenizers', reason="tokenizers is not installed: pip install 'exp2nb[hf]'")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from exp2nb.bases.llama import HubTokenizer
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainer)
    return HubTokenizer(core.to_str())

def oracle(task, problem):
    "The reference as a completion, special tokens visible."
    if isinstance(problem.solution, str): return problem.solution + '<|assistant_end|>'
    wrap = dict(text='{}', python='<|python_start|>{}<|python_end|>', python_output='<|output_start|>{}<|output_end|>')
    return ''.join(wrap[p['type']].format(p['text']) for p in problem.solution) + '<|assistant_end|>'

def write_split(folder, rows, dataset='openai/gsm8k', config='main', split='test'):
    "A Parquet file in the Hub's layout; `rows` is a list of rows or an Arrow table."
    f = folder/dataset/config/f'{split}.parquet'
    f.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), f)
    return f
