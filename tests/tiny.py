"""What several tests need: models small enough to run in milliseconds, their tokenizers, a short configuration, an oracle.

Weights are drawn large enough that every part of a model matters: freshly made, some matrices are zero."""
from importlib.util import find_spec
import pyarrow as pa, pyarrow.parquet as pq, pytest, torch
from exp2nb.config import make_config, override

CHATML = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
LLAMA3 = ['<|begin_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>']

def needs(library):
    "Skip the test where a library of the extra `hf` is not installed. One that is there and cannot be imported fails."
    if not find_spec(library): pytest.skip(f"{library} is not installed: pip install 'exp2nb[hf]'")

def tiny_config(run_dir, arm, changes=(), **kw):
    "The smoke preset with caps that make an arm a matter of seconds."
    return override(make_config('smoke', arm=arm, run_dir=str(run_dir), **kw), dict(changes))

def randomised(model, std=.1, seed=0):
    "The same model: norms and residual scalars around 1, everything else around 0."
    torch.manual_seed(seed)
    for n,p in model.named_parameters(): torch.nn.init.normal_(p, 1. if 'resid' in n or 'norm' in n else 0., std)
    return model

CHATML_TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
                   "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
LLAMA3_TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
                   "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
                   "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")

def hub_tokenizer(texts, size, specials=CHATML, **more):
    "A small byte-level BPE in the form of a tokenizer.json, behind our interface, with the template that goes with its special tokens."
    needs('tokenizers')
    needs('transformers')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from exp2nb.bases.hub import HubTokenizer
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(texts, trainer)
    template = CHATML_TEMPLATE if specials==CHATML else LLAMA3_TEMPLATE if specials==LLAMA3 else ''
    how = dict(template=template, names=dict(bos_token=specials[0], eos_token=specials[-1]) if specials else {})
    return HubTokenizer(core.to_str(), **how | more)

def hub_model(kind='llama', **fields):
    "A small open model, its weights not set."
    needs('transformers')
    from exp2nb.bases.hub import HubConfig, HubModel
    size = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=64,
                vocab_size=301, max_position_embeddings=256, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return HubModel(HubConfig(dict(model_type=kind) | size | fields))

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
