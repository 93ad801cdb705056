"""Two processes do what one does: the same update on the same rollouts, the same rows, the same bill.

One that dies ends the job, and its error is shown.
"""
import os, shutil, signal, subprocess, sys
from datetime import timedelta
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import exp2nb.train
from _forkserver import run_in_child
from exp2nb import parallel
from exp2nb.arms import ARMS, rl_arm, run_arm
from exp2nb.lab import Lab, arm_folder
from exp2nb.config import EvalConfig, Rates, RLConfig, UserError, make_config, override, seed_of
from exp2nb.engine import Sample
from exp2nb.evaluate import Evaluation, evaluate
from exp2nb.flops import Work, muon_flops, rollout_cost, update_cost
from exp2nb.grpo import GRPO, Group
from exp2nb.ledger import BUDGET_STAGES, Budget, Ledger, read_rows, totals
from exp2nb.model import Transformer
from exp2nb.store import Busy, load_artifact, read_json, read_jsonl
from exp2nb.train import Amount, Conversations, NotFinite, Run, Supervised

CHANGES = ('model.vocab=300 model.context=160 pretrain.tokens_per_param=0.05 pretrain.batch_tokens=1024 sft.batch_tokens=1024 '
           'sft_plus.batch_tokens=640 rl.steps=4 rl.problems=3 rl.samples=3 rl.max_new=16 rl.preflight=3 eval.max_new=16 eval.kl_prompts=2')
SIZES = dict(n_train=48, n_test=7, dev=5)
def config(run_dir, arm): return override(make_config('smoke', arm=arm, run_dir=str(run_dir), **SIZES), CHANGES)


# ---- several processes without a launcher: forked, joined, their results handed back as files ----

def member(rank, n, folder, f, args):
    "They meet in a file: a port that was found free could be taken before it is used."
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n))
    ARMS['rl'] = replace(ARMS['rl'], make=lambda *a: rl_arm(*a, reward=coin))
    meet = f'file://{folder}/rendezvous'
    if n > 1: torch.distributed.init_process_group('gloo', init_method=meet, rank=rank, world_size=n, timeout=timedelta(minutes=30))
    parallel.start()
    try: out = f(*args)
    except Exception as e: out = e
    torch.save(out, folder/f'{rank}.pt')
    parallel.stop()

def coin(step, i, k, score):
    "Random rewards: so tiny a model solves nothing, and the right ones would not move it."
    return float(seed_of('coin', step, i, k) % 3==0)

def on(n, tmp_path, f, *args):
    "What `f(*args)` returns in each of `n` processes; raises what it raised in the first."
    folder = tmp_path/f'results-{len(list(tmp_path.glob("results-*")))}'
    folder.mkdir()
    ps = [run_in_child(member, r, n, folder, f, args) for r in range(n)]
    for p in ps: p.join()   # pytest-timeout ends what hangs
    assert all(p.exitcode==0 for p in ps), [p.exitcode for p in ps]
    out = [torch.load(folder/f'{r}.pt', weights_only=False) for r in range(n)]
    if isinstance(out[0], Exception):
        assert all(str(o)==str(out[0]) for o in out)   # nobody is left waiting
        raise out[0]
    return out


# ---- one step ----

@torch.no_grad()
def tiny(seed=0):
    "A model of which every matrix gets a gradient (freshly made, some are zero)."
    model, g = Transformer(make_config('smoke').model, seed=seed), torch.Generator().manual_seed(seed)
    for p in model.parameters(): p += .02*torch.randn(p.shape, generator=g)
    return model

def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}

def apart(a, b, origin=None):
    "Largest relative distance between two sets of tensors, or between two ways from `origin`."
    origin = origin or {k: 0. for k in a}
    return max(((a[k]-b[k]).norm()/(b[k]-origin[k]).norm().clamp(min=1e-12)).item() for k in a)

def stored_groups(count=5, seed=0):
    "Rollouts as a file would hold them: odd numbers, forced tokens, a group without signal."
    g, out = torch.Generator().manual_seed(seed), []
    def draw(n): return torch.randint(0, 512, (n,), generator=g).tolist()
    for i in range(count):
        samples = [Sample(i, k, draw(n), [j%3!=2 for j in range(n)], [-1.]*n, True) for k,n in enumerate((5+i, 1, 12, 7))]
        out.append(Group(draw(9+3*i), samples, [1., 1., 1., 1.] if i==1 else [0., 1., float(i%2), 0.]))
    return out

def policy_step(folder, norm, count, micro):
    model = tiny()
    led = Ledger(folder/'ledger.jsonl', model.shape, 'stories', parallel.rank())
    rl = RLConfig(loss_norm=norm, max_new=16, micro_tokens=micro)
    stage = GRPO(model, SimpleNamespace(vocab_size=512), [], None, rl, Amount(10, 'steps'), led, 0)
    stage.folder = folder
    step, grads = stage.opt.step, []
    def kept(factor):
        grads.extend(p.grad.clone() for p in model.parameters())
        step(factor)
    stage.opt.step = kept
    measured = stage.update(parallel.share(stored_groups(count)))
    exp2nb.train.collect(led)
    parallel.check_same_weights(model)
    return weights(model), measured, led.rows, dict(enumerate(grads))

@pytest.mark.parametrize('norm,count,micro', [('step', 5, 64), ('problem', 5, 1000), ('constant', 2, 64)])
def test_the_same_policy_gradient_step_on_the_same_rollouts(tmp_path, norm, count, micro):
    one, = on(1, tmp_path, policy_step, tmp_path/'1', norm, count, micro)
    assert min(g.norm().item() for g in one[3].values())>0
    for n in (2, 3) if norm=='step' else (2,):
        got = on(n, tmp_path, policy_step, tmp_path/f'{n}', norm, count, micro)
        for w,measured,_,grads in got:
            assert apart(grads, one[3])<1e-5
            assert apart(w, one[0], weights(tiny()))<5e-2   # Muon's own matmuls are in bfloat16, AdamW divides by small numbers
            assert measured['grad_norm']==pytest.approx(one[1]['grad_norm'], rel=1e-5) and all(torch.equal(w[k], got[0][0][k]) for k in w)
        same_bill(one[2], got[0][2])
        assert {r['rank'] for r in got[0][2]}==set(range(n)) and not got[1][2]

def same_bill(one, many):
    "Tokens and model FLOPs are integers, equal to the last digit, whatever the number of processes. So are the note's."
    for c in ('tokens_prompt', 'tokens_new', 'tokens_forced', 'tokens_pad', 'flops_model', 'flops_note'):
        assert sum(r[c] for r in one)==sum(r[c] for r in many), c

def supervised_step(folder, batch_tokens, basis=None):
    model, g = tiny(), torch.Generator().manual_seed(1)
    def draw(n): return torch.randint(0, 512, (n,), generator=g).tolist()
    convs = [(draw(n), [int(j>=n//3) for j in range(n)]) for n in (20, 31, 7, 44, 12)]
    led = Ledger(folder/'ledger.jsonl', model.shape, 'stories', parallel.rank())
    clock = Budget(6e9, basis) if basis else Amount(2, 'steps')
    stream = Conversations(convs, SimpleNamespace(render=lambda c: c), 0, 100)
    stage = Supervised('sft', model, Rates(), stream, clock, led, batch_tokens, 40 if batch_tokens<=100 else 200)
    rows = Run(stage, folder).go(progress=False)
    return weights(model), rows, led.rows, clock.spent, stage.n

@pytest.mark.parametrize('batch_tokens', [100, 30])   # 30: often a single conversation, so that a process has none
def test_the_same_supervised_steps(tmp_path, batch_tokens):
    one, = on(1, tmp_path, supervised_step, tmp_path/'1', batch_tokens)
    two = on(2, tmp_path, supervised_step, tmp_path/'2', batch_tokens)
    for w,rows,_,_,_ in two:
        assert apart(w, one[0], weights(tiny()))<2e-2
        assert [r['loss'] for r in rows]==pytest.approx([r['loss'] for r in one[1]], rel=1e-4)
        assert [r['flops_model'] for r in rows]==[r['flops_model'] for r in one[1]]
    same_bill(one[2], two[0][2])
    assert len(read_jsonl(tmp_path/'2/metrics.jsonl'))==2

@pytest.mark.parametrize('basis', ['model', 'executed'])
def test_two_processes_meet_a_budget(tmp_path, basis):
    "What the next step will cost is known beforehand, the second optimizer step of `executed` included."
    _,_,led,spent,n = on(2, tmp_path, supervised_step, tmp_path/'2', 600, basis)[0]
    assert n>3 and spent==totals(led)[basis] and abs(spent/6e9-1)<1e-3, (n, spent)

def drifted():
    model = tiny(seed=parallel.rank())
    parallel.check_same_weights(model)

def bad_step(folder):
    model = tiny()
    with torch.no_grad(): next(model.parameters()).fill_(float('nan'))
    led = Ledger(folder/'l.jsonl', model.shape, 'stories', parallel.rank())
    stage = GRPO(model, SimpleNamespace(vocab_size=512), [], None, RLConfig(max_new=16), Amount(10, 'steps'), led, 0)
    stage.folder = folder
    stage.update(parallel.share(stored_groups()))

def test_weights_that_drifted_apart_and_a_bad_gradient_are_noticed_by_all(tmp_path):
    with pytest.raises(UserError, match='process 1 differ from those of process 0'): on(2, tmp_path, drifted)
    with pytest.raises(UserError, match='gradient is nan at step 0'): on(2, tmp_path, bad_step, tmp_path/'bad')
    batch = read_json(tmp_path/'bad/bad_batch.json')['batch']
    assert [len(b['prompt']) for b in batch]==[9, 12, 15, 18, 21]   # whole, in order


# ---- whole arms ----

def arm(c): return run_arm(c, progress=False)

class Stop(Exception): pass
def arm_until(c, step):
    "As if killed: every step is saved, then the processes end in the middle of a later one."
    exp2nb.train.SaveTimer.due = lambda self: True
    for kind in GRPO, Supervised:
        def stepped(self, real=kind.step):
            row = real(self)
            if self.folder==arm_folder(c) and self.n==step: raise Stop   # done and billed, but not saved
            return row
        kind.step = stepped
    run_arm(c, progress=False)

@pytest.fixture(scope='module')
def run1(tmp_path_factory):
    "A run folder in which one process ran everything."
    tmp = tmp_path_factory.mktemp('one')
    for a in 'sft', 'rl', 'sft_plus': on(1, tmp, arm, config(tmp/'run', a))
    return tmp/'run'

@pytest.fixture(scope='module')
def run2(run1, tmp_path_factory):
    "The same, RL and SFT+ by two processes."
    tmp = tmp_path_factory.mktemp('two')
    run = only_sft(run1, tmp/'run')
    for a in 'rl', 'sft_plus': on(2, tmp, arm, config(run, a))
    return run

def only_sft(run1, to):
    shutil.copytree(run1, to)
    for a in 'rl', 'sft_plus': shutil.rmtree(to/a)
    return to

def bill(folder, shape, lab, tok, problems):
    "Model FLOPs of an RL run, from its rollouts alone."
    rows, total = read_jsonl(folder/'rollouts.jsonl'), 0
    for step in sorted({r['step'] for r in rows}):
        groups = {}
        for r in (r for r in rows if r['step']==step): groups.setdefault(r['problem'], []).append(len(r['tokens']))
        prompts = [len(tok.render_prompt(problems.conversation(problems[i]))) for i in groups]
        lengths = list(groups.values())
        total += rollout_cost(shape, prompts, lengths, Work())['flops_model'] + update_cost(shape, prompts, lengths, Work())['flops_model']
    return total

def same_bills(a, b, stages=None):
    "The ledgers of two folders add up to the same, stage by stage (or over `stages`)."
    one, two = (read_rows(f/'ledger.jsonl') for f in (a, b))
    for part in [stages] if stages else [(s,) for s in sorted({r['stage'] for r in one})]:
        same_bill([r for r in one if r['stage'] in part], [r for r in two if r['stage'] in part])

def test_whole_arms_with_two_processes(run1, run2):
    a, b = (arm_folder(config(run, 'rl')) for run in (run1, run2))
    assert {p.name for p in a.rglob('*') if p.is_file()}=={p.name for p in b.rglob('*') if p.is_file()}   # no file of a second process
    rollouts = read_jsonl(b/'rollouts.jsonl')
    assert (a/'rollouts.jsonl').read_bytes()==(b/'rollouts.jsonl').read_bytes()   # a random stream per sample, written in order
    assert [(r['step'], r['sample']) for r in rollouts]==[(s, k) for s in range(4) for _ in range(3) for k in range(3)]
    ma, mb = (read_jsonl(f/'metrics.jsonl') for f in (a, b))
    assert [r['step'] for r in mb]==[-1, 0, 1, 2, 3] and [r.get('flops_model') for r in ma]==[r.get('flops_model') for r in mb]
    for x,y in zip(ma[1:], mb[1:], strict=True):
        assert x['grad_norm']==pytest.approx(y['grad_norm'], rel=1e-3) and x['reward']==y['reward']
    assert (a/'items.jsonl').read_bytes()==(b/'items.jsonl').read_bytes()
    same_bills(a, b)
    assert {r['rank'] for r in read_rows(b/'ledger.jsonl')}=={0, 1}
    ja, jb = (read_json(f/'arm.json') for f in (a, b))
    assert ja['spent']['model']==jb['spent']['model']==jb['ledger']['totals']['model']
    assert ja['scores']==jb['scores'] and ja['steps']==jb['steps']==4
    assert apart(*(load_artifact(f/'weights')[0] for f in (a, b)))<2e-2

def test_two_processes_pay_what_their_rollouts_and_their_optimizer_cost(run2):
    rl, plus = (arm_folder(config(run2, a)) for a in ('rl', 'sft_plus'))
    lab = Lab(config(run2, 'rl'), False)
    model, tok = lab.sft.copy(), lab.sft.tok
    matrices = [p.shape for n,p in model.named_parameters() if model.roles()[n]=='matrix']
    assert read_json(rl/'arm.json')['spent']['model']==bill(rl, model.shape, lab, tok, lab.problems[0]) + 4*muon_flops(matrices)
    record = read_json(plus/'arm.json')
    assert abs(record['residual'])<1e-3 and record['spent']['model']==totals(read_rows(plus/'ledger.jsonl'))['model']

@pytest.mark.parametrize('first,then', [(2, 1), (1, 2)])
@pytest.mark.parametrize('name', ['rl', 'sft_plus'])
def test_a_run_goes_on_with_another_number_of_processes(run1, tmp_path, name, first, then):
    run = only_sft(run1, tmp_path/'run')
    if name=='sft_plus': shutil.copytree(run1/'rl', run/'rl')
    c, folder = config(run, name), arm_folder(config(run, name))
    with pytest.raises(Stop): on(first, tmp_path, arm_until, c, 3)
    assert not (folder/'arm.json').exists()
    on(then, tmp_path, arm, c)
    a, b = arm_folder(config(run1, name)), folder
    one, two = ([(r['step'], r.get('flops_model')) for r in read_jsonl(f/'metrics.jsonl')] for f in (a, b))
    assert one==two
    same_bills(a, b, BUDGET_STAGES)
    paid = [r for r in read_rows(b/'ledger.jsonl') if r['stage'] in BUDGET_STAGES]
    ranks = {s: {r['rank'] for r in paid if r['step']==s} for s in (0, 1, 2, 3)}
    assert ranks=={0: set(range(first)), 1: set(range(first)), 2: set(range(then)), 3: set(range(then))}
    if name=='rl': assert (a/'rollouts.jsonl').read_bytes()==(b/'rollouts.jsonl').read_bytes()
    assert read_json(b/'arm.json')['spent']['model']==read_json(a/'arm.json')['spent']['model']
    assert apart(*(load_artifact(f/'weights')[0] for f in (a, b)))<2e-2

def scores(run):
    lab = Lab(config(run, 'sft'), False)
    model, tok = lab.sft.copy(), lab.sft.tok
    led = Ledger(run/f'eval{parallel.world()}.jsonl', model.shape, 'stories', parallel.rank())
    rows = []
    items = SimpleNamespace(append=rows.append)
    settings = EvalConfig(max_new=24, n_samples=3, top_k=20)
    out = evaluate(Evaluation(model, tok, settings), lab.tasks, 'stories', items=items, ledger=led)
    exp2nb.train.collect(led)
    return rows, out, led.rows

def test_evaluation_is_the_same(run1, tmp_path):
    run = only_sft(run1, tmp_path/'run')
    one, = on(1, tmp_path, scores, run)
    two = on(2, tmp_path, scores, run)
    assert two[0][0]==one[0] and two[0][1]==two[1][1]==one[1] and not two[1][0] and len(one[0])==7*(1+3+1+1)
    same_bill(one[2], two[0][2])

def locked(c):
    from exp2nb.lab import alone
    with alone(c): pass

def test_a_refusal_in_the_main_process_reaches_all(run1, tmp_path):
    from exp2nb.store import RunLock
    with RunLock(tmp_path/'x'), pytest.raises(UserError, match='is being written by process'): on(2, tmp_path, locked, tmp_path/'x')
    other = override(config(run1, 'rl'), 'rl.samples=4')
    with pytest.raises(UserError, match='rl.samples is 3 there and 4 here'): on(2, tmp_path, arm, other)
    bare = only_sft(run1, tmp_path/'run')
    with pytest.raises(UserError, match='no ledger to match'): on(2, tmp_path, arm, config(bare, 'sft_plus'))


# ---- the launchers ----

def dies(how):
    parallel.barrier()
    if parallel.rank()==1:
        if how=='killed': os.kill(os.getpid(), signal.SIGKILL)
        return 1/0
    parallel.each(0)   # waits for the other

DEATHS = [('killed', 'Signal 9 .SIGKILL.'),
          ('fails', r'process 1 of 2 failed.*ZeroDivisionError: division by zero\n(.*\n)*.*in dies')]

@pytest.mark.parametrize('how,words', DEATHS)
def test_a_process_that_dies_ends_the_job_with_its_error(how, words):
    with pytest.raises(RuntimeError, match=words): parallel.processes(2, dies, how)

def refuses(): parallel.on_main(lambda: refuse() if parallel.rank()==0 else None)
def refuse(): raise UserError('this is taken: choose another.')

def test_a_refusal_arrives_as_what_it_is():
    with pytest.raises(UserError, match='^this is taken: choose another.$'): parallel.processes(2, refuses)

def torchrun(run, arm):
    "One arm by `torchrun` with two processes, on a port that the store chose itself."
    main = "import sys; from exp2nb.tools.queue import exp2_arm; sys.exit(exp2_arm.main())"
    sizes = [x for k,v in SIZES.items() for x in (f"--{k.replace('_', '-')}", str(v))]
    args = ['--arm', arm, '--preset', 'smoke', '--run-dir', str(run), *sizes, '--changes', CHANGES]
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--no-python']
    return subprocess.run([*launcher, sys.executable, '-c', main, *args], capture_output=True, text=True, cwd=Path(__file__).parents[1],
                          env=dict(os.environ, OMP_NUM_THREADS='1'))

def test_torchrun_runs_an_arm_or_says_why_not(run1, tmp_path, slow):
    run = only_sft(run1, tmp_path/'run')
    shutil.rmtree(arm_folder(config(run, 'sft')))
    done = torchrun(run, 'sft')
    assert done.returncode==0 and done.stdout.count('0 steps, stories')==1, done.stdout+done.stderr
    one, two = ((arm_folder(config(r, 'sft'))/'items.jsonl').read_bytes() for r in (run1, run))
    assert one==two
    if not slow: return
    bad = torchrun(run, 'sft_plus')
    assert bad.returncode and 'no ledger to match' in bad.stderr


# ---- the benchmark's own check of several processes ----

def test_the_benchmark_s_gradient_is_the_same_in_two_processes(tmp_path):
    from exp2nb.fast.bench import Workload, gradient_norms
    w = Workload(depth=2, width=32, head_dim=16, vocab=64, problems=3, samples=4, prompt=8, new=6)
    alone = gradient_norms(w)
    assert sum(alone) > 0
    for norms in on(2, tmp_path, gradient_norms, w): assert norms==pytest.approx(alone, rel=1e-4, abs=1e-6)

def test_the_launcher_knows_the_kinds_of_a_user_s_error():
    "A run that another process writes, or whose weights went astray, is a sentence from several processes as it is from one."
    for kind in (Busy, NotFinite):
        failed = SimpleNamespace(message=dict(message=f'{kind.__name__}: wait for it.'), timestamp=1)
        e = parallel._first_error({0: failed}, 8, (UserError,))
        assert type(e) is kind and str(e)=='wait for it.'
