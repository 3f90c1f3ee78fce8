"Replicas, shards and both: one process and several take the same steps, skip the same steps, and evaluate the same model."
import math, os, subprocess, sys, warnings
import pytest, torch
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
from clipa_nb.clip import ModelConfig
from clipa_nb.core import LOCAL, UserError, draws_of
from clipa_nb.cost import Tower
from clipa_nb.engine.meeting import LAUNCH, same_gradients, slurm_launch
from clipa_nb.distributed_trainer import Ranks, layers_of, spawn
from clipa_nb.infonce import Contrastive, row_mean
from clipa_nb.optimization import AdamW, Cosine
from clipa_nb.engine.loop import Diverged, Guard
from clipa_nb.trainer import Task, TrainConfig, assemble, fit, forward_backward, train_step

warnings.filterwarnings('ignore', category=FutureWarning, module='torch.distributed')
B = 8
SMALL = ModelConfig(
    image=Tower(12, 2, 2, 24), text=Tower(12, 2, 2, 24), embed_dim=6, image_size=16, patch=4, context_length=6,
    vocab_size=51, image_strategy='random', image_ratio=0.5)

class Mapped(Contrastive):
    "An objective with a matrix, a frozen matrix and a scalar of its own."
    def __init__(self):
        super().__init__(chunk=3)
        self.map, self.weight = torch.nn.Linear(6, 6), torch.nn.Parameter(torch.tensor(0.5))
    def features(self, model, batch):
        out = super().features(model, batch)
        return dict(out, mapped=self.map(out['image']))
    def loss(self, features, model, batch, comm=LOCAL):
        out = super().loss(features, model, batch, comm)
        miss = row_mean((features['mapped'] - features['text']).square().sum(1), batch['valid'], comm)
        return dict(out, loss=out['loss'] + self.weight.square() * miss)

RULES = (('visual.patch.*', 'frozen'), ('text.encoder.blocks.0.*', 0.5))

def task_of(checkpointing='none', double=True):
    torch.manual_seed(0)
    task = Task(SMALL.replace(checkpointing=checkpointing).build(), Mapped()).train()
    return task.double() if double else task

def batch_of(step, comm=LOCAL, poison=()):
    "This rank's share; the last row is not valid; in the steps of `poison` one sample holds no number."
    g, position = torch.Generator().manual_seed(step), torch.arange(B * step, B * step + B)
    image = torch.randn(B, 3, 16, 16, generator=g).double()
    if step in poison: image[0] = math.nan
    batch = dict(image=image, text=torch.randint(1, 50, (B, 6), generator=g), draw=draws_of(1, position),
                 valid=torch.arange(B) < B - 1)
    return {k: v.chunk(comm.size)[comm.rank] for k, v in batch.items()}

def run(comm, how='ddp', chunks=1, checkpointing='none', poison=(), steps=4, per_node=0, cfg={}):
    "The trace of a few steps, what stands at the end, and what was said."
    if per_node: comm.per_node = per_node
    task, trace = task_of(checkpointing), []
    cfg = TrainConfig(**{**dict(steps=steps, lr=3e-2, schedule=Cosine(), chunks=chunks, log_every=1, ema=0.8, grad_clip=0.5), **cfg})
    wrapped, optimizer, average = assemble(task, AdamW(weight_decay=0.1), cfg, RULES, comm, how)
    names = sorted(n for n, _ in task.named_parameters())
    def log(**row): trace.append({k: v for k, v in row.items() if k in ('step', 'train/loss', 'train/grad_norm', 'train/skipped_steps', 'seen')})
    def seen(model, comm):
        with torch.no_grad(): return dict(seen=float(model.encode_image(batch_of(99)['image']).sum()))
    story = None
    try:
        fit(wrapped, task, (batch_of(s, comm, poison) for s in range(steps)), optimizer, cfg, comm=comm, ema=average,
            log=log, evals=dict(seen=seen), check=lambda: same_gradients(task, comm))
    except Diverged as e: story = str(e), e.story
    state = {k: v.detach() for k, v in comm.whole(task).state_dict().items()}
    state.update({f'ema.{k}': v for k, v in comm.whole(average.module).state_dict().items()})
    def full(v): return v.full_tensor() if hasattr(v, 'full_tensor') else v
    moments = {n: {k: full(v) for k, v in optimizer.state[p].items()} for n, p in task.named_parameters() if p in optimizer.state}
    return trace, state, moments, names, story

def assert_same(got, want, what, tol=1e-10):
    (trace, state, moments, names, _), (trace_, state_, moments_, names_, _) = got, want
    assert names == names_, what
    assert len(trace) == len(trace_)
    for a, b in zip(trace, trace_):
        assert a.keys() == b.keys()
        for k in a: assert a[k] == pytest.approx(b[k], rel=tol, nan_ok=True), (what, k, a, b)
    for k in state_: torch.testing.assert_close(state[k], state_[k], rtol=1e-8, atol=tol, msg=f'{what}: {k}')
    for n in moments_:
        for k in moments_[n]: torch.testing.assert_close(moments[n][k], moments_[n][k], rtol=1e-7, atol=tol, msg=f'{what}: {k} of {n}')

def several(comm, cases):
    "Many runs in one launch: starting processes is what costs."
    out = []
    for case in cases:
        comm.device_mesh = None
        out.append(run(comm, **case))
    return out

CASES = [dict(how='ddp'), dict(how='ddp', chunks=2), dict(how='fsdp2'), dict(how='fsdp2', chunks=2), dict(how='fsdp2', checkpointing='full'),
         dict(how='fsdp2', chunks=2, checkpointing='selective'), dict(how='ddp', poison=(1,)), dict(how='fsdp2', chunks=2, poison=(1,))]

@pytest.mark.parametrize('ranks', [2, 4])
def test_every_wrapper_takes_the_steps_of_one_process(ranks):
    "In float64, tokens dropped, a row missing, a group frozen, clipped, averaged; weights, moments and average too."
    alone = {p: run(LOCAL, poison=p) for p in ((), (1,))}
    assert alone[()][0][0]['train/loss'] > alone[()][0][-2]['train/loss'] + 1e-3, 'it learns something'
    cases = CASES + ([dict(how='hsdp', per_node=2), dict(how='hsdp', per_node=2, chunks=2, poison=(1,))] if ranks == 4 else [])
    for case, got in zip(cases, spawn(several, ranks, cases)[0]):
        assert_same(got, alone[case.get('poison', ())], f'{ranks} ranks, {case}')

# --- the guard

def test_a_bad_step_leaves_everything_as_it_was():
    "Weights, moments, counters and average, whatever the optimiser; the next step is the one that would have come."
    for fused in (True, False):
        ends = []
        for poisoned in (False, True):
            task = task_of(); cfg = TrainConfig(steps=9, lr=1e-2, schedule=Cosine(), ema=0.8, chunks=2)
            wrapped, optimizer, average = assemble(task, AdamW(), cfg, RULES)
            for group in optimizer.param_groups: group['fused'] = fused
            guard = Guard(task, cfg)
            for step in (0, 1, 2):
                if step == 1 and not poisoned: continue
                train_step(wrapped, task, batch_of(step, poison=(1,)), optimizer, step, cfg, ema=average, guard=guard)
            counters = {float(state['step']) for state in optimizer.state.values()}
            ends.append([*task.parameters(), *average.module.parameters(), *(v for s in optimizer.state.values() for v in s.values())])
            assert counters == {2.} and int(guard.total) == poisoned
        assert all(torch.equal(a, b) for a, b in zip(*ends)), fused

def test_an_infinite_loss_with_finite_gradients_is_bad_too():
    class Infinite(Mapped):
        def loss(self, features, model, batch, comm=LOCAL):
            out = super().loss(features, model, batch, comm)
            return dict(out, loss=out['loss'] + math.inf) # its gradient is finite
    task = Task(SMALL.build(), Infinite()).double(); before = [p.detach().clone() for p in task.parameters()]
    out = train_step(task, task, batch_of(0), AdamW().build(task, 1e-2), 0, TrainConfig(steps=2, lr=1e-2, schedule=Cosine()))
    assert out['loss'].isinf() and out['grad_norm'].isnan() and all(torch.equal(p, q) for p, q in zip(task.parameters(), before))

def test_too_many_bad_steps_end_the_run_with_a_story():
    trace, _, _, _, (message, story) = run(LOCAL, poison=(1, 2, 3, 4), steps=9, cfg=dict(max_bad=2))
    assert [r['step'] for r in trace] == [1, 2, 3] and trace[-1]['train/skipped_steps'] == 2
    assert message.startswith('step 2: loss nan; 3 steps in a row without a finite gradient, more than max_bad 2 allows')
    assert story['step'] == 2 and story['skipped'] == story['in_a_row'] == 3 and story['draw'] == batch_of(1)['draw'].tolist()
    assert story['logit_scale'] > 1 and math.isnan(story['norms']['visual.head.weight']) and 'objective.map.weight' in story['norms']
    trace, *_, story = run(LOCAL, poison=(1, 2, 4, 5), steps=7, cfg=dict(max_bad=2)) # never three in a row
    assert story is None and trace[-2]['train/skipped_steps'] == 4

def both_end(comm): return run(comm, 'fsdp2', poison=(1, 2), steps=5, cfg=dict(max_bad=1))[::4]

def test_all_ranks_end_together():
    "One rank of two sees the number that is none."
    (trace, (one, told)), (_, (two, other)) = spawn(both_end, 2)
    assert one.startswith('step 2: loss nan; 2 steps in a row') and two.startswith('step 2: loss') and len(trace) == 2
    assert told['draw'] != other['draw'] and told['step'] == other['step'] == 2

def test_a_loss_spike_ends_the_run_where_it_is_asked_for():
    guard = Guard(task_of(), TrainConfig(spike=1.5))
    for step in range(10): guard.look_at_row({'train/loss': 1. + step % 2}, step)
    guard.look_at_row({'train/loss': 2.2}, 10)
    with pytest.raises(Diverged, match=r'step 11: loss 3.1, more than 1.5 times 2, the median of the last 10 rows') as e: guard.look_at_row({'train/loss': 3.1}, 11)
    assert e.value.story == dict(step=11, loss=3.1, median=2.)
    quiet = Guard(task_of(), TrainConfig())
    for step in range(12): quiet.look_at_row({'train/loss': 10. ** step}, step)
    for bad, says in ((dict(max_bad=-1), 'max_bad -1: expected 0 or more, a whole number'), (dict(max_bad=1.5), 'max_bad 1.5: expected 0 or more'), (dict(spike=0.5), 'spike 0.5: expected 0 .no guard. or at least 1')):
        with pytest.raises(UserError, match=says): TrainConfig(**bad)

class Towers(torch.nn.Module):
    "Towers that ask nothing themselves."
    def __init__(self):
        super().__init__()
        self.image, self.text, self.logit_scale = torch.nn.Linear(5, 4), torch.nn.Linear(3, 4), torch.nn.Parameter(torch.tensor(1.))
    def encode_image(self, x): return self.image(x)
    def encode_text(self, x): return self.text(x)

class NoNumbers(torch.overrides.TorchFunctionMode):
    "Refuses every way in which the host fetches a number, except for those of one tensor that lives on the host."
    asking = (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__)
    def __init__(self, spared): super().__init__(); self.spared, self.seen = spared, 0
    def __torch_function__(self, f, types, args=(), kwargs=None):
        self.seen += 1
        assert f not in self.asking or args[0] is self.spared, f
        return f(*args, **(kwargs or {}))

def test_a_step_fetches_no_number():
    "On a GPU every fetched number stalls the device."
    task = Task(Towers(), Contrastive()); cfg = TrainConfig(steps=4, lr=1e-2, schedule=Cosine(), ema=0.5, grad_clip=1.)
    batch = dict(image=torch.randn(4, 5), text=torch.randn(4, 3), draw=draws_of(0, torch.arange(4)))
    wrapped, optimizer, average = assemble(task, AdamW(), cfg)
    guard = Guard(task, cfg)
    for step in range(3):
        with NoNumbers(average.n_averaged) as mode: train_step(wrapped, task, batch, optimizer, step, cfg, ema=average, guard=guard)
        assert mode.seen > 50
    with pytest.raises(AssertionError), NoNumbers(None): guard.look()

# --- what is sharded, and what is refused

def test_the_layers_of_a_model():
    model = SMALL.build()
    assert layers_of(Task(model, Mapped())) == [*model.visual.encoder.blocks, *model.text.encoder.blocks]
    assert layers_of(torch.nn.Sequential(torch.nn.Linear(2, 2))) == []
    nested = torch.nn.ModuleList([torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(2, 2))])])
    assert layers_of(nested) == [nested[0][0]]

def test_wrappers_that_cannot_be():
    comm = Ranks(0, 4, per_node=3); task = task_of()
    with pytest.raises(UserError, match="unknown wrapper 'fsdp3': did you mean fsdp2"): comm.wrap(task, 'fsdp3')
    with pytest.raises(UserError, match="'hsdp': 4 ranks with 3 on a machine"): comm.wrap(task, 'hsdp')
    assert LOCAL.wrap(task, 'fsdp2') is task and LOCAL.whole(task) is task and comm.whole(task) is task

# --- SLURM

SRUN = dict(SLURM_STEP_NUM_TASKS='12', SLURM_NTASKS='12', SLURM_PROCID='9', SLURM_LOCALID='1', SLURM_NODEID='2', SLURM_JOB_ID='7001', SLURM_STEP_ID='2',
            SLURM_STEP_NODELIST='node[07-09,12],gpu1', SLURM_STEP_TASKS_PER_NODE='4(x2),2(x2)')

def test_srun_says_who_a_task_is():
    assert slurm_launch(SRUN) == dict(RANK='9', WORLD_SIZE='12', LOCAL_RANK='1', LOCAL_WORLD_SIZE='2', MASTER_ADDR='node07', MASTER_PORT=str(20_000 + (7001 * 101 + 2) % 20_000))
    assert slurm_launch({**SRUN, 'MASTER_ADDR': 'head', 'MASTER_PORT': '1'})['MASTER_ADDR'] == 'head'
    first = {k: slurm_launch({**SRUN, 'SLURM_STEP_NODELIST': k})['MASTER_ADDR'] for k in ('a1', 'a1,b2', 'a[3,5]-ib,b2', 'gpu-[001-004]', 'x,y[1-2]')}
    assert list(first.values()) == ['a1', 'a1', 'a3-ib', 'gpu-001', 'x']
    assert slurm_launch({}) == slurm_launch({**SRUN, 'SLURM_STEP_NUM_TASKS': '1'}) == slurm_launch(dict(SLURM_NTASKS='1', SLURM_PROCID='0')) == slurm_launch(dict(SLURM_NTASKS='8')) == {}

@pytest.mark.parametrize('change, says', [
    (dict(SLURM_STEP_NUM_TASKS=''), 'SLURM gave this job 12 tasks, but srun did not start this process: begin the line with srun or torchrun'),
    (dict(SLURM_PROCID=None), 'srun started 12 tasks, but SLURM_PROCID is not set'), (dict(SLURM_STEP_NODELIST=''), 'SLURM_JOB_NODELIST is not set')])
def test_a_task_that_cannot_tell_is_refused(change, says):
    env = {k: v for k, v in {**SRUN, **change}.items() if v is not None}
    with pytest.raises(UserError, match=says): slurm_launch(env)

def test_two_tasks_of_srun_meet(tmp_path):
    "Neither thinks that it is alone."
    program = 'import torch; from clipa_nb.distributed_trainer import connect, disconnect, rank_device; comm = connect("cpu", timeout=60); print(comm, comm.per_node, int(comm.all_sum(torch.tensor(comm.rank + 1))), rank_device("cpu")); disconnect()'
    base = {k: v for k, v in os.environ.items() if k not in LAUNCH and not k.startswith('SLURM')}
    base.update(SLURM_STEP_NUM_TASKS='2', SLURM_NTASKS='2', SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_NODELIST='localhost', SLURM_STEP_TASKS_PER_NODE='2', PYTHONPATH=os.pathsep.join([os.getcwd(), base.get('PYTHONPATH', '')]))
    tasks = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', program], env={**base, 'SLURM_PROCID': str(r), 'SLURM_LOCALID': str(r)}, stdout=subprocess.PIPE, text=True) for r in range(2)]
    assert [t.communicate(timeout=120)[0].strip() for t in tasks] == ['Ranks(0 of 2) 2 3 cpu', 'Ranks(1 of 2) 2 3 cpu']
