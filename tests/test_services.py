"""Every outside service once for real, offline: W&B, trackio, SkyPilot's reader of task files, and a server that speaks the Hub's URLs."""
import importlib.util
import json
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub import hub
from exp2nb.tools.tracker import Tracker, run_id

ROOT = Path(__file__).parent.parent
RUN = 'rl: out/tiny-stories/rl/model-1.0/seed0'   # as the lab names a run
ROWS = [dict(stage='rl', step=step, reward=.25*step, loss=None) for step in range(-1, 3)]

def needs(package): return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f'{package} is not installed')

def track(name, run=RUN, config=None):
    "A run of four rows; why the tracker was dropped, '' if it was not."
    tracker = Tracker(name, run, config or dict(preset='tiny', rl=dict(steps=100)), patience=60)
    for row in ROWS: tracker.log(row)
    tracker.finish()
    return tracker.failed

def track_apart(name, run=RUN, **env):
    "`track` in a process of its own: both packages read their settings once, when they are imported."
    code = f'from test_services import track; failed = track({name!r}, {run!r}); assert not failed, failed'
    path = f'{ROOT}:{ROOT}/tests:{os.environ.get("PYTHONPATH", "")}'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=dict(os.environ, PYTHONPATH=path, **env), check=True, timeout=300)

def wandb_records(file):
    "The records of an offline run: a log of LevelDB's form (blocks of 32 KB, a header of 7 bytes a piece) of protobuf messages."
    from wandb.proto import wandb_internal_pb2
    data, at, piece, out = Path(file).read_bytes(), 7, b'', []
    while at+7 <= len(data):
        if 32768-at%32768 < 7:
            at += 32768-at%32768
            continue
        _, length, kind = struct.unpack('<IHB', data[at:at+7])
        piece += data[at+7:at+7+length]
        at += 7+length
        if kind in (1, 4):   # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(piece)
            out.append(record)
            piece = b''
    return out

@needs('wandb')
@pytest.mark.parametrize('run', [RUN, 'sft: ~/a b/#1?%\\é/seed0', 'x'*300])
def test_wandb_keeps_every_row(tmp_path, run):
    track_apart('wandb', run, WANDB_MODE='offline', WANDB_SILENT='true', WANDB_DIR=str(tmp_path))
    file, = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    assert file.stem==f'run-{run_id(run)}'
    records = wandb_records(file)
    logged = [r.history.item for r in records if r.WhichOneof('record_type')=='history']
    rows = [{'/'.join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in logged]
    assert [(r['_step'], r['reward']) for r in rows]==[(i, .25*(i-1)) for i in range(4)]
    assert all('loss' not in r and 'stage' not in r for r in rows)

@needs('trackio')
def test_trackio_keeps_every_row(tmp_path):
    track_apart('trackio', TRACKIO_DIR=str(tmp_path), HF_HUB_OFFLINE='1')
    db, = tmp_path.glob('*.db')
    rows = sqlite3.connect(db).execute('select run_name, step, metrics from metrics order by step').fetchall()
    assert [(name, step, json.loads(m)['reward']) for name,step,m in rows]==[(RUN, i, .25*(i-1)) for i in range(4)]

SKY = os.environ.get('EXP2_SKY_PYTHON') or next((str(p) for p in [ROOT/'.venv-sky/bin/python'] if p.exists()), sys.executable)

def test_skypilot_reads_the_task_file():
    "SkyPilot wants older versions of what others need newer, so it may live in an environment of its own: EXP2_SKY_PYTHON or .venv-sky."
    code = """
import json, sky, sys
t = sky.Task.from_yaml(sys.argv[1])
kinds = sorted(a for r in t.resources for a in r.accelerators)
print(json.dumps(dict(name=t.name, kinds=kinds, spot=all(r.use_spot for r in t.resources), envs=t.envs, run=t.run, setup=t.setup)))"""
    if subprocess.run([SKY, '-c', 'import sky'], capture_output=True, timeout=300).returncode:
        pytest.skip(f'skypilot is not installed for {SKY}: name another Python in EXP2_SKY_PYTHON')
    said = subprocess.run([SKY, '-c', code, ROOT/'runs/skypilot.yaml'], capture_output=True, text=True, timeout=300)
    assert said.returncode==0, said.stderr
    task = json.loads(said.stdout.strip().splitlines()[-1])
    assert task['kinds']==['A100-80GB', 'H100'] and task['spot'] and task['name']=='exp2'
    assert (ROOT/task['run'].split()[1]).is_file() and (ROOT/task['setup'].split()[1]).is_file()
    options = task['envs']['OPTIONS'].split()
    env = dict(os.environ, EXP2_ENV='active')
    plan = subprocess.run(['bash', 'runs/exp2.sh', *options, '--dry-run'], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert plan.returncode==0, plan.stderr   # the options are ones that the script takes

# The Hub, by a server on this machine that speaks its URLs.

def python(code, url, home, *args):
    "Run code in a fresh process whose Hub is `url`."
    path = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
    env = dict(os.environ, HF_ENDPOINT=url, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY='1', PYTHONPATH=path)
    env.pop('HF_HUB_OFFLINE', None)
    return subprocess.run([sys.executable, '-c', code, *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)

CARD = """---
configs:
- config_name: {config}
  data_files:
{splits}
---
"""

def data_set(folder, config, splits):
    "A repository as the Hub has it: a card that names the files, and Parquet files with the Hub's names. splits: name → file to copy."
    (folder/config).mkdir(parents=True)
    lines = '\n'.join(f'  - split: {s}\n    path: {config}/{s}-*' for s in splits)
    (folder/'README.md').write_text(CARD.format(config=config, splits=lines), encoding='utf-8')
    for name,file in splits.items(): shutil.copy(file, folder/config/f'{name}-00000-of-00001.parquet')
    return folder

def real(path):
    "A real data file, or skip."
    file = Path(os.environ.get('EXP2_DATA_DIR') or '/nowhere')/path
    if not file.is_file(): pytest.skip(f'EXP2_DATA_DIR has no {path}')
    return file

def test_gsm8k_from_the_hub_is_what_a_folder_has(tmp_path):
    files = {s: real(f'openai/gsm8k/main/{s}.parquet') for s in ('train', 'test')}
    with hub({('datasets', 'openai/gsm8k'): data_set(tmp_path/'gsm8k', 'main', files)}) as server:
        ask = "from exp2nb.data import load_rows; a = load_rows('openai/gsm8k', 'main', 'test'); "
        folder = os.environ['EXP2_DATA_DIR']
        same = ask + f"b = load_rows('openai/gsm8k', 'main', 'test', {folder!r}); assert list(a)==list(b); print(len(a))"
        r = python(same, server.url, tmp_path/'home')
        assert r.stdout.split()==['1319'], r.stderr
        assert any('resolve' in line and 'test-00000' in line for line in server.asked)
        fetch = "import sys; from exp2nb.tools.fetch import exp2_fetch; sys.exit(exp2_fetch.main())"
        r = python(fetch, server.url, tmp_path/'home2', 'openai/gsm8k', '--data-dir', str(tmp_path/'got'))
        assert r.returncode==0, r.stderr
        r = python(ask.replace("'test')", f"'test', {str(tmp_path/'got')!r})") + "print(len(a))", 'http://127.0.0.1:9', tmp_path/'home3')
        assert r.stdout.split()==['1319'], r.stderr

OWN = """
import sys
from exp2nb.tasks import make_task
for split in ('train', 'test'): print(*(p.question for p in make_task('me/sums:question=q:config=small', split, *sys.argv[1:])), sep='|')
"""

@pytest.mark.parametrize('splits', [('train', 'test'), ('train',)])
def test_a_task_of_your_own_from_the_hub_and_fetched_beforehand(tmp_path, splits):
    "Split as the Hub has it, or by hash; the same from a folder that was filled for a machine without network."
    rows = [dict(q=f'What is {a}+{b}?', answer=str(a+b)) for a in range(12) for b in range(12)]
    parts = dict(train=rows[:100] if 'test' in splits else rows, test=rows[100:])
    for s in splits: pq.write_table(pa.Table.from_pylist(parts[s]), tmp_path/f'{s}.parquet')
    folder = data_set(tmp_path/'sums', 'small', {s: tmp_path/f'{s}.parquet' for s in splits})
    with hub({('datasets', 'me/sums'): folder}) as server:
        r = python(OWN, server.url, tmp_path/'home')
        assert r.returncode==0, r.stderr
        train, test = (line.split('|') for line in r.stdout.strip().splitlines())
        assert len(train)+len(test)==144 and not set(train) & set(test)
        if 'test' in splits: assert sorted(test)==sorted(row['q'] for row in rows[100:])
        fetch = "import sys; from exp2nb.tools.fetch import exp2_fetch; sys.exit(exp2_fetch.main())"
        got = ('--preset', 'tiny', '--task', 'me/sums:question=q:config=small', '--data-dir', str(tmp_path/'got'))
        f = python(fetch, server.url, tmp_path/'home2', *got)
        assert f.returncode==0, f.stderr
    there = python(OWN, 'http://127.0.0.1:9', tmp_path/'home3', str(tmp_path/'got'))
    assert there.stdout==r.stdout, there.stderr

def test_a_set_that_the_hub_does_not_have_is_one_sentence(tmp_path):
    with hub({}) as server:
        ask = "from exp2nb.data import load_rows\ntry: load_rows('openai/gsm8k', 'main', 'test')\nexcept ValueError as e: print(e)"
        r = python(ask, server.url, tmp_path/'home')
    assert 'could not be loaded from the Hub' in r.stdout and r.stdout.count('\n')==1, r.stdout+r.stderr

def test_a_corpus_is_streamed_from_where_it_was(tmp_path):
    pq.write_table(pa.table(dict(text=[f'document {i}' for i in range(20)])), tmp_path/'t.parquet')
    name = 'karpathy/fineweb-edu-100b-shuffle'
    with hub({('datasets', name): data_set(tmp_path/'text', 'default', dict(train=tmp_path/'t.parquet'))}) as server:
        ask = "from itertools import islice\nfrom exp2nb.data import corpus_text\nprint(*islice(corpus_text(start=5), 2), sep='|')"
        r = python(ask, server.url, tmp_path/'home')
    assert r.stdout.strip()=='document 5|document 6', r.stderr

def test_a_base_is_loaded_by_its_name(tmp_path):
    from exp2nb.bases.base import load_base
    from exp2nb.bases.hub import save_hub
    from exp2nb.store import weights_hash
    from tiny import hub_model, hub_tokenizer, randomised
    tok = hub_tokenizer(['Ann has 12 apples and 30 pears.']*9, 340)
    save_hub(randomised(hub_model(vocab_size=tok.vocab_size)), tok, tmp_path/'tiny')
    here = weights_hash(load_base(str(tmp_path/'tiny'))[0].state_dict())
    with hub({('models', 'someone/tiny'): tmp_path/'tiny'}) as server:
        imports = 'from exp2nb.bases.base import load_base\nfrom exp2nb.store import weights_hash\n'
        ask = imports + "print(weights_hash(load_base('someone/tiny')[0].state_dict()))"
        r = python(ask, server.url, tmp_path/'home')
        assert r.stdout.split()==[here], r.stderr
        gone = python(imports + "try: load_base('someone/else')\nexcept ValueError as e: print(e)", server.url, tmp_path/'home')
        assert 'someone/else' in gone.stdout and gone.stdout.count('\n')==1, gone.stdout+gone.stderr

# exp2.sh with a name on the Hub, on a machine without a GPU

SMOLLM2 = dict(model_type='llama', architectures=['LlamaForCausalLM'], hidden_size=576, num_hidden_layers=30, num_attention_heads=9,
               num_key_value_heads=3, intermediate_size=1536, vocab_size=49_152, max_position_embeddings=8192, tie_word_embeddings=True)

def exp2(url, home, *args):
    "runs/exp2.sh, its Hub at `url`, in the environment that is active here."
    env = dict(os.environ, HF_ENDPOINT=url, HF_HOME=str(home), HF_HUB_DISABLE_TELEMETRY='1', EXP2_ENV='active', CUDA_VISIBLE_DEVICES='')
    env.pop('HF_HUB_OFFLINE', None)
    return subprocess.run(['bash', 'runs/exp2.sh', *args], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)

def model_folder(folder, config):
    "A repository with a configuration, and weights that are not to be asked for."
    folder.mkdir()
    (folder/'config.json').write_text(json.dumps(config))
    (folder/'model.safetensors').write_bytes(b'not to be asked for')
    return folder

@needs('transformers')
def test_exp2_of_a_name_shows_the_hours_on_a_cpu_and_stops(tmp_path):
    name = 'HuggingFaceTB/SmolLM2-135M-Instruct'
    with hub({('models', name): model_folder(tmp_path/'model', SMOLLM2)}) as server:
        r = exp2(server.url, tmp_path/'home', '--base', name, '--run-dir', str(tmp_path/'run'))
    assert r.returncode==2, r.stdout+r.stderr
    assert 'open on gsm8k: 134.5 M matmul parameters' in r.stdout and 'this machine, which has no GPU' in r.stdout
    for row in ('rehearsal', 'sft ', 'rl ', 'sft_plus', 'Memory on a device'): assert f'\n{row}' in r.stdout, row
    assert 'hours on this CPU: start it where there is a GPU, or give --yes.' in r.stderr.strip().splitlines()[-1]
    assert any('config.json' in line for line in server.asked) and not any('safetensors' in line for line in server.asked)

@needs('transformers')
@pytest.mark.parametrize('kind,says', [('t5', 'it has an encoder'), ('mamba', 'linear_attention'), ('mixtral', 'experts')])
def test_exp2_refuses_a_family_before_its_weights_are_downloaded(kind, says, tmp_path):
    with hub({('models', 'someone/other'): model_folder(tmp_path/'model', dict(model_type=kind))}) as server:
        r = exp2(server.url, tmp_path/'home', '--base', 'someone/other', '--run-dir', str(tmp_path/'run'))
    last = r.stderr.strip().splitlines()[-1]
    assert r.returncode==2 and 'someone/other' in last and says in last and 'Traceback' not in r.stderr, r.stderr
    assert any('config.json' in line for line in server.asked) and not any('safetensors' in line for line in server.asked)

@needs('transformers')
def test_exp2_of_a_name_trains_with_yes(tmp_path):
    "The weights are downloaded, answer the instructions to rehearse, and go through SFT and RL."
    from exp2nb.bases.hub import save_hub
    from tiny import hub_model, hub_tokenizer, randomised
    tok = hub_tokenizer(['Ann has 12 apples and 30 pears.']*9, 340)
    save_hub(randomised(hub_model(vocab_size=tok.vocab_size, max_position_embeddings=1024), .05), tok, tmp_path/'tiny')
    short = ('sft.rehearsal_new=8 rl.steps=1 rl.problems=2 rl.samples=2 rl.max_new=8 rl.preflight=0 eval.tasks=stories eval.max_new=8 '
             'eval.n_samples=0 eval.kl_prompts=0 eval.curve=0')
    with hub({('models', 'someone/tiny'): tmp_path/'tiny'}) as server:
        r = exp2(server.url, tmp_path/'home', '--base', 'someone/tiny', '--task', 'stories', '--arms', 'sft,rl', '--train-only', '--yes',
                 '--n-train', '16', '--n-test', '4', '--dev', '4', '--run-dir', str(tmp_path/'run'), '--changes', short)
    assert r.returncode==0 and 'Trained: 2 arms.' in r.stdout, r.stdout+r.stderr
    assert any('model.safetensors' in line for line in server.asked)
    rehearsal, sft = (json.loads((tmp_path/'run'/of/'record.json').read_text()) for of in ('rehearsal', 'sft/seed0'))
    assert rehearsal['answers']==8 and rehearsal['sha256']==sft['made_of']['rehearsal']
