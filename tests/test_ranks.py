"One, two and three processes give the loss and the gradients of one, and a step that goes round the wrapper is noticed."
import contextlib, os, subprocess, sys, textwrap
import pytest, torch
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
import torch.nn.functional as F
from torch import nn
from clipa_nb.core import UserError
from clipa_nb.distributed_trainer import RankError, same_gradients, spawn
from clipa_nb.infonce import Contrastive, info_nce
from clipa_nb.trainer import Task, forward_backward

N, E = 12, 5
FORMS = {
    'plain': dict(), 'plain, key': dict(key=True), 'plain, smoothed': dict(label_smoothing=0.1),
    'plain, key, smoothed': dict(label_smoothing=0.2, key=True),
    'streamed': dict(chunk=3), 'one tile': dict(chunk=100), 'tiles of one': dict(chunk=1),
    'streamed, key': dict(chunk=5, key=True), 'streamed, smoothed': dict(chunk=5, label_smoothing=0.1),
    'streamed, key, smoothed': dict(chunk=2, label_smoothing=0.2, key=True),
}

class Pair(nn.Module):
    "Two linear towers and a temperature: the smallest model with the seams of a CLIP."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(4, E).double(), nn.Linear(3, E).double()
        self.logit_scale = nn.Parameter(torch.tensor(3., dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(E, dtype=torch.float64), requires_grad=False)
    def encode_image(self, x): return self.image(x) * self.frozen
    def encode_text(self, x): return self.text(x)

def batch_of(rank, size, n=N):
    g = torch.Generator().manual_seed(0)
    batch = dict(image=torch.randn(n, 4, generator=g).double(), text=torch.randn(n, 3, generator=g).double(), key=torch.randint(0, 4, (n,), generator=g))
    return {k: v.chunk(size)[rank] for k, v in batch.items()}

def raw(comm, form):
    "The loss of this rank and the gradients of its features and of the scale, before anything is averaged."
    batch, form = batch_of(comm.rank, comm.size), dict(form)
    pad = torch.ones(len(batch['key']), 1).double()
    image, text = (F.normalize(x, dim=1).requires_grad_() for x in (torch.cat([batch['image'], pad], 1), torch.cat([batch['text'], pad, -pad], 1)))
    scale = torch.tensor(100., dtype=torch.float64, requires_grad=True)
    if form.pop('key', False): form['key'] = batch['key']
    out = info_nce(image, text, scale, comm=comm, check=True, **form)
    out['loss'].backward()
    return [torch.stack([out[k].detach() for k in ('loss', 'loss_image', 'loss_text')]), image.grad, text.grad, scale.grad]

def step(comm, form=(), chunks=1, bypass=False, sync=True):
    "Gradients of every parameter after one backward pass of the objective, as the trainer runs it."
    form = dict(form)
    task = Task(Pair(), Contrastive(chunk=form.get('chunk'), use_key=form.get('key', False), label_smoothing=form.get('label_smoothing', 0.)))
    wrapped = comm.wrap(task)
    with contextlib.nullcontext() if sync else comm.no_sync(wrapped):
        forward_backward(task if bypass else wrapped, task, batch_of(comm.rank, comm.size), comm, chunks)
    same_gradients(task, comm)
    return {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}

@pytest.mark.parametrize('ranks', [1, 2, 3])
def test_loss_and_gradients_are_those_of_one_process(ranks):
    def both(comm): return {name: raw(comm, form) for name, form in FORMS.items()}
    alone, together = spawn(both, 1)[0], spawn(both, ranks)
    for name in FORMS:
        loss, image, text, scale = alone[name]
        parts = [r[name] for r in together]
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).mean(0), loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]) / ranks, image, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.cat([p[2] for p in parts]) / ranks, text, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(torch.stack([p[3] for p in parts]).mean(), scale, rtol=1e-12, atol=1e-12)
        plain = next(k for k in FORMS if {**FORMS[name], 'chunk': None} == {'chunk': None, **FORMS[k]})
        for a, b in zip(alone[name], alone[plain]): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)

@pytest.mark.parametrize('ranks', [2, 3])
@pytest.mark.parametrize('chunks', [1, 3])
def test_wrapped_step_gives_single_process_gradients(ranks, chunks):
    for form in (dict(), dict(chunk=5), dict(chunk=5, key=True)):
        alone = spawn(step, 1, form)[0]
        assert set(alone) == {'image.weight', 'image.bias', 'text.weight', 'text.bias', 'logit_scale'}
        for grads in spawn(step, ranks, form, chunks):
            assert set(grads) == set(alone)
            for n in alone: torch.testing.assert_close(grads[n], alone[n], rtol=1e-10, atol=1e-13)

def test_bypassed_wrapper_is_noticed():
    with pytest.raises(UserError, match='gradients differ between ranks in 5 of 5 parameters'): spawn(step, 2, {}, 1, True)

def test_no_sync_leaves_gradients_apart():
    with pytest.raises(UserError, match='gradients differ between ranks'): spawn(step, 2, {}, 1, False, False)

def test_uneven_rows_are_refused_on_every_rank():
    def uneven(comm):
        x = F.normalize(torch.randn(3 + comm.rank, E), dim=1)
        try: info_nce(x, x, 1., comm=comm)
        except UserError as e: return str(e)
    first, second = spawn(uneven, 2, timeout=30)
    assert first == second and 'rank 0 3×5, rank 1 4×5' in first

def test_failures_reach_the_parent():
    def broken(comm): return 1 / comm.rank
    with pytest.raises(RankError, match='(?s)rank 0 failed.*ZeroDivisionError'): spawn(broken, 2)
    with pytest.raises(RankError, match='did not finish within 1 s'): spawn(lambda comm: comm.all_sum(torch.ones(1)) if comm.rank else __import__('time').sleep(9), 2, timeout=1)

def test_fresh_processes_take_functions_by_value():
    k = 3
    assert spawn(lambda comm: (comm.rank + k, float(comm.all_sum(torch.ones(())))), 2, method='spawn') == [(3, 2.), (4, 2.)]

def test_torchrun(tmp_path):
    (tmp_path / 'job.py').write_text(textwrap.dedent('''
        import torch
        from clipa_nb.distributed_trainer import connect, disconnect, rank_device, say
        comm = connect('cpu', timeout=60)
        total = comm.all_sum(torch.tensor(comm.rank + 1.))
        say(comm, f'{comm.size} ranks on {rank_device("cpu")}, sum {total:g}')
        disconnect()
    '''))
    env = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')}
    env['PYTHONPATH'] = os.pathsep.join([os.getcwd(), env.get('PYTHONPATH', '')])
    for n in (1, 2):
        job = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), str(tmp_path / 'job.py')],
                             capture_output=True, text=True, env=env, timeout=120)
        assert job.returncode == 0, job.stderr
        assert f'{n} ranks on cpu, sum {n * (n + 1) / 2:g}' in job.stdout
    alone = subprocess.run([sys.executable, str(tmp_path / 'job.py')], capture_output=True, text=True, env=env, timeout=60)
    assert '1 ranks on cpu, sum 1' in alone.stdout
    half = subprocess.run([sys.executable, str(tmp_path / 'job.py')], capture_output=True, text=True, env={**env, 'RANK': '0'}, timeout=60)
    assert 'UserError' in half.stderr and 'MASTER_ADDR' in half.stderr
