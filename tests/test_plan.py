"exp2_plan as users call it, and its figures against the ledger's functions."
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
import pytest
from exp2nb.bases.base import BaseFacts
from exp2nb.config import PRESETS, make_config, override
from exp2nb.flops import decode_flops, muon_flops, prefill_flops, train_flops
from exp2nb.ledger import Budget
from exp2nb.model import shape_of
from exp2nb.protocol import Shape
from exp2nb.tools import plan as plan_module
from exp2nb.tools.plan import exp2_plan, plan, plan_text, sft_step

RECORDS = Path(__file__).parent.parent/'records'/'bench'
LAYER = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))
SMOLLM2 = Shape(layers=30, width=576, heads=9, kv_heads=3, head_dim=64, vocab=49_152, matrices=LAYER*30, windows=(None,)*30, context=2048)

MAIN = 'import sys; from exp2nb.tools.plan import exp2_plan; sys.exit(exp2_plan.main())'

def cli(*args): return subprocess.run([sys.executable, '-c', MAIN, *args], capture_output=True, text=True, timeout=600)

def test_command_line():
    given = '--preset d12 --prompt-tokens 90 --completion-tokens=120 --samples 8 --devices 4 --mfu 0.5 --json'
    r = cli(*given.split())
    p = json.loads(r.stdout)
    assert r.returncode==0 and (p['prompt_tokens'], p['completion_tokens'], p['samples'], p['devices'], p['mfu'])==(90, 120, 8, 4, .5)
    text = cli('--help').stdout
    for o in ('--preset', '--prompt-tokens', '--completion-tokens', '--samples', '--devices', '--mfu', '--json'): assert o in text

WRONG = [('--preset d13', 'choose one of smoke, tiny, open, d12, d26'),
         ('--preset d12 --mfu 1.5', '--mfu'),
         ('--preset d12 --mfu -0.1', '--mfu'),
         ('--preset d12 --samples -1', '--samples'),
         ('--preset d12 --device abacus', 'h100'),
         ('--preset d12 --devices 0', '--devices'),
         ('--preset d12 --prompt-tokens 9000', 'context'),
         ('--preset d12 --completion-tokens 500', 'rl.max_new'),
         ('--preset d12 --peak inf', '--peak')]

@pytest.mark.parametrize('args,word', WRONG)
def test_bad_input_is_one_line(args, word, capsys):
    assert exp2_plan.main(args.split())==2
    out, err = capsys.readouterr()
    assert out=='' and len(err.strip().splitlines())==1 and word in err

def test_short_completions_are_planned_short():
    "rl.max_new is the longest that a completion can be."
    short, long = (plan(override(make_config('d12'), f'rl.max_new={n}')) for n in (16, 256))
    assert (short['completion_tokens'], long['completion_tokens'])==(16, 150)
    assert short['rl']['flops']['generation'] < long['rl']['flops']['generation']/3

def test_evaluation_is_in_the_plan():
    "The target 1 + n_samples times, the other generated benchmarks once; then dev along the budget and the best weights on the target."
    c = override(make_config('d12', dev=256), 'eval.n_samples=4 eval.curve=8')
    e = plan(c, device='h100')['evaluation']
    assert e['answers']==1319*5 + 164 + 256 + 256*9 + 1319*5
    assert e['hours'] > e['reference_hours'] > 0
    assert plan(replace(c, dev=0), device='h100')['evaluation']['hours']==e['reference_hours']

def measured(name):
    "Seconds of an RL step on an H200 and its workload, from the record."
    record = json.loads((RECORDS/f'{name}.json').read_text())
    return record['figures']['rl_step_seconds'], record['workload']

@pytest.mark.parametrize('name', ['h200-d12-c49c60c', 'h200-d26', 'h200-smollm2-135m-even'])
def test_the_plan_is_near_what_was_measured(name, monkeypatch):
    "All rows write 256 tokens in these workloads. An open model's kind sets its utilisation."
    seconds, w = measured(name)
    c = make_config(w.get('preset', 'd12'))
    c = replace(c, rl=replace(c.rl, problems=w['problems'], samples=w['samples'], max_new=w['new'], steps=1))
    if w['shape']=='smollm2-135m':
        c = replace(c, base='a SmolLM2')
        monkeypatch.setattr(plan_module, 'base_at', lambda path: BaseFacts('hub', SMOLLM2, tied=True))
    p = plan(c, prompt_tokens=w['prompt'], completion_tokens=w['new'], device='h200')
    assert .67 < 3600*p['rl']['hours']['total']/seconds < 1.5

@pytest.mark.parametrize('preset', PRESETS)
def test_a_plan_for_every_preset(preset):
    p = plan(make_config(preset), device='a100', shape=SMOLLM2 if preset=='open' else None)
    assert p['rl']['total']==sum(p['rl']['flops'].values()) and all(v > 0 for v in p['memory'].values())
    assert p['sft_plus']['total']==p['rl']['total'] and preset in plan_text(p)
    json.dumps(p)

def test_the_note_s_run_by_hand():
    "467 steps of 16 × 16 at 12 layers, 110 + 150 tokens."
    c = override(make_config('d12', dev=0), 'rl.steps=467')
    s, p = shape_of(c.model), plan(c)
    assert p['rl']['flops']['generation']==467*16*(prefill_flops(s, 110)+16*decode_flops(s, 110, 150))
    assert p['rl']['flops']['update']==467*256*train_flops(s, 260)
    assert p['rl']['flops']['optimizer']==467*muon_flops(s.matrices)

def test_planned_steps_are_those_that_the_budget_gives():
    c = make_config('d12')
    s, p = shape_of(c.model), plan(c)
    step = sum(r['flops_model'] for r in sft_step(s, c.sft_plus.batch_tokens, 110, 150).values())
    b = Budget(p['rl']['total'])
    steps = 0
    while b.left > step/2:
        b.spend(dict(flops_model=step))
        steps += 1
    assert abs(steps-p['sft_plus']['steps']) <= 1

def test_more_devices_take_less_time_and_memory():
    one, eight = (plan(make_config('d26'), devices=n) for n in (1, 8))
    assert eight['rl']['hours']['update'] < one['rl']['hours']['update']
    assert eight['memory']['kv_cache'] < one['memory']['kv_cache']
    assert eight['memory']['total'] <= one['memory']['total']   # the most is a supervised pass, as long on one device as on eight
    assert eight['rl']['total']==one['rl']['total'] and eight['sft_plus']['steps']==one['sft_plus']['steps']

# Open models

def open_config(folder, **fields):
    "A folder with nothing but the config.json of an open model."
    size = dict(model_type='llama', hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                intermediate_size=1536, vocab_size=49_152, max_position_embeddings=2048, tie_word_embeddings=True)
    (folder/'config.json').write_text(json.dumps(size | fields))
    return str(folder)

def test_the_plan_of_an_open_base_needs_its_config_alone(tmp_path):
    pytest.importorskip('transformers')
    p = plan(make_config('open', base=open_config(tmp_path)), device='h100')
    assert p['parameters']==SMOLLM2.n and p['pretrain']['steps']==0

def test_preset_open_without_a_base_is_one_sentence(capsys):
    assert exp2_plan.main(['--preset', 'open'])==2
    out, err = capsys.readouterr()
    assert out=='' and len(err.strip().splitlines())==1 and 'give --base' in err

SMALL = dict(qwen2_05b=dict(model_type='qwen2', hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
                            intermediate_size=4864, vocab_size=151_936, max_position_embeddings=32_768),
             smollm2_360m=dict(hidden_size=960, num_hidden_layers=32, num_attention_heads=15, num_key_value_heads=5, intermediate_size=2560,
                               max_position_embeddings=8192))

@pytest.mark.parametrize('device', ['l4', 'rtx4090'])
@pytest.mark.parametrize('name', SMALL)
def test_half_a_billion_parameters_train_in_24_gb(name, device, tmp_path):
    "At preset open's micro-batch, with 15 % left for what the allocator wastes. Weights are there once in float32, and once in bfloat16."
    pytest.importorskip('transformers')
    p = plan(make_config('open', base=open_config(tmp_path, **SMALL[name])), device=device)
    m = p['memory']
    assert m['available']==24e9 and m['total'] < .85*m['available']
    assert m['weights']==p['parameters']*(4+2)
    assert 'GB' in plan_text(p) and 'does not fit' not in plan_text(p)

def test_rehearsal_is_in_the_plan():
    on, off = (plan(override(make_config('open'), {'sft.rehearsal': r}), device='h100', shape=SMOLLM2) for r in ('everyday', ''))
    r = on['rehearsal']
    assert r['answers']==1024 and r['flops']==1024*(prefill_flops(SMOLLM2, 50)+decode_flops(SMOLLM2, 50, 165)) and r['hours'] > 0
    assert off['rehearsal']==dict(answers=0, tokens=0, steps=0, flops=0, hours=0.)
    assert on['sft']['tokens']-off['sft']['tokens']==round(.25*2*7217)*215
    assert on['rl']==off['rl'] and on['sft_plus']==off['sft_plus']
    assert any(line.startswith('rehearsal') for line in plan_text(on).splitlines()) and 'rehearsal' not in plan_text(off)
    assert plan(make_config('smoke'))['rehearsal']['answers']==0

def test_a_plan_says_for_which_device_and_why(monkeypatch):
    monkeypatch.setattr(plan_module, 'device_of', lambda c: 'cpu')
    text = plan_text(plan(make_config('d12')))
    assert 'planned for 1 × h100 (not this machine, which has no GPU' in text and '--device cpu' in text
    assert 'planned for 1 × cpu (this machine)' in plan_text(plan(make_config('tiny'), peak=1e11))
    assert 'planned for 1 × cpu (this machine, which has no GPU)' in plan_text(plan(make_config('open'), shape=SMOLLM2, peak=1e11))
    assert 'planned for 1 × a100 (as asked for)' in plan_text(plan(make_config('d12'), device='a100'))
    monkeypatch.setattr(plan_module, 'device_of', lambda c: 'cuda')
    assert "planned for 1 × h100 (in place of this machine's GPU" in plan_text(plan(make_config('d12')))
