"One to four processes give the loss and the gradients of one; a step that goes round the wrapper is noticed; a rank that fails is named."
import contextlib, multiprocessing, os, pickle, signal, socket, subprocess, sys, textwrap, threading, time, warnings
import pytest, torch
import torch.distributed as dist
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.engine.meeting import LAUNCH, is_main, peer_status, rank_device, same_gradients, say, watch
from clipa_nb.distributed_trainer import Ranks, _join, connect, disconnect, spawn
from clipa_nb.engine.meeting import launched as launched_by
from clipa_nb.engine.launch import RankError, _ByValue, _child, _collect, _open, fork_works
from clipa_nb.engine.launch import spawn as launch_spawn
from clipa_nb.infonce import Contrastive
from clipa_nb.trainer import Task, TrainConfig, forward_backward
from clipa_nb.engine.loop import first_look

N, E = 12, 5
FORMS = dict(plain=dict(), streamed=dict(chunk=5), keyed=dict(chunk=5, key=True))

class Pair(nn.Module):
    "Two linear towers and a temperature: the smallest model with the seams of a CLIP."
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(4, E).double(), nn.Linear(3, E).double()
        self.logit_scale = nn.Parameter(torch.tensor(3., dtype=torch.float64))
        self.frozen = nn.Parameter(torch.ones(E, dtype=torch.float64), requires_grad=False)
    def encode_image(self, x, normalize=False, draw=None): return self.image(x) * self.frozen
    def encode_text(self, x, normalize=False, draw=None): return self.text(x)

def batch_of(rank, size, n=N):
    g = torch.Generator().manual_seed(0)
    batch = dict(image=torch.randn(n, 4, generator=g).double(), text=torch.randn(n, 3, generator=g).double(), key=torch.randint(0, 4, (n,), generator=g))
    return {k: v.chunk(size)[rank] for k, v in batch.items()}

def step(comm, form='plain', chunks=1, bypass=False, sync=True):
    "Gradients of every parameter after one backward pass of the objective, as the trainer runs it."
    task = Task(Pair(), Contrastive(**FORMS[form])); wrapped = comm.wrap(task)
    with contextlib.nullcontext() if sync else comm.no_sync(wrapped):
        forward_backward(task if bypass else wrapped, task, batch_of(comm.rank, comm.size), comm, chunks)
    same_gradients(task, comm)
    return {n: p.grad for n, p in task.model.named_parameters() if p.grad is not None}

def all_steps(comm): return {(form, k): step(comm, form, k) for form in FORMS for k in (1, 3)}

@pytest.mark.parametrize('ranks', [2, 3, 4])
def test_wrapped_step_gives_single_process_gradients(ranks):
    alone, together = spawn(all_steps, 1)[0], spawn(all_steps, ranks)
    for case, want in alone.items():
        assert set(want) == {'image.weight', 'image.bias', 'text.weight', 'text.bias', 'logit_scale'}
        for got in (r[case] for r in together):
            assert set(got) == set(want)
            for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-13, msg=lambda m: f'{case}, {n}: {m}')

def test_bypassed_wrapper_is_noticed():
    with pytest.raises(RuntimeError, match='gradients differ between ranks in 5 of 5 parameters') as told: spawn(step, 2, 'plain', 1, True)
    assert not isinstance(told.value, UserError), 'it is no mistake of the user'
    assert same_gradients(Pair()) is None # one process has nobody to compare with

def test_no_sync_leaves_gradients_apart():
    with pytest.raises(RuntimeError, match='gradients differ between ranks'): spawn(step, 2, 'plain', 1, False, False)

@pytest.mark.parametrize('chunks', [1, 2])
def test_uneven_batches_are_refused_on_every_rank(chunks):
    "An uneven first batch, as the trainer meets it; `core`'s tests have the other ways to disagree."
    def uneven(comm):
        batch = {k: v[:3 + comm.rank] for k, v in batch_of(0, 1).items()}
        try: first_look(Task(Pair(), Contrastive()), batch, TrainConfig(chunks=chunks), comm)
        except UserError as e: return str(e)
    first, second = spawn(uneven, 2, timeout=100)
    assert first == second and 'ranks disagree on rows: 3 on rank 0, 4 on rank 1' in first

def test_another_set_of_fields_is_refused_on_every_rank():
    def odd(comm):
        batch = batch_of(comm.rank, comm.size)
        if comm.rank: del batch['key']
        try: first_look(Task(Pair(), Contrastive()), batch, TrainConfig(), comm)
        except UserError as e: return str(e)
    first, second = spawn(odd, 2, timeout=100)
    assert first == second and 'ranks disagree on fields of the batch: 3 on rank 0, 2 on rank 1' in first

@pytest.mark.parametrize('chunks', [(4, 4), (4, 1), (4, 2), (1, 5)])
def test_a_batch_too_small_for_its_chunks_is_refused_on_every_rank(chunks):
    "3 rows and 4: the rank that cannot cut them must not leave the other one waiting in the loss."
    def small(comm):
        task = Task(Pair(), Contrastive())
        wrapped, cfg, said = comm.wrap(task), TrainConfig(chunks=chunks[comm.rank]), ''
        try: first_look(task, {k: v[:3 + comm.rank] for k, v in batch_of(0, 1).items()}, cfg, comm)
        except UserError as e: said = str(e)
        first_look(task, batch_of(comm.rank, comm.size), cfg, comm)
        forward_backward(wrapped, task, batch_of(comm.rank, comm.size), comm, cfg.chunks) # and they are still in step
        same_gradients(task, comm)
        return said
    said, fault = spawn(small, 2, timeout=20), 0 if chunks[0] == 4 else 1
    assert said[fault] == f'{3 + fault} samples cannot be accumulated in {chunks[fault]} chunks: use 1 to {3 + fault}'
    assert said[1 - fault] == f'rank {fault} refused its input (its own message says why)'

# --- the comm object itself

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]

def collectives(comm):
    out = {}
    for kind in DTYPES:
        x = (torch.arange(6).reshape(3, 2) % 2 == comm.rank % 2).to(kind).T # not contiguous
        kept = x.clone()
        out[kind] = comm.gather(x), comm.all_max(x), comm.all_sum(x), comm.reduce_scatter(torch.ones(4, 2).to(kind))
        assert torch.equal(x, kept), 'a collective changed its input'
    scalar = comm.all_sum(torch.tensor(comm.rank + 1.)), comm.all_max(torch.tensor(comm.rank))
    return out, scalar

def test_collectives_take_every_type():
    (a, (total, most)), (b, _) = spawn(collectives, 2)
    assert (total, most) == (3., 1) and total.shape == ()
    for kind in DTYPES:
        x, y = ((torch.arange(6).reshape(3, 2) % 2 == r).to(kind).T for r in (0, 1))
        want = torch.cat([x, y]), torch.maximum(x, y), x + y, (torch.full((2, 2), 2).to(kind) if kind != torch.bool else torch.ones(2, 2, dtype=kind))
        for got, other, right in zip(a[kind], b[kind], want):
            assert got.dtype == kind and torch.equal(got, right) and torch.equal(other, right), kind

def test_truth_values_travel_as_bytes():
    "NCCL promises nothing about booleans, and a sum of bytes wraps around at 256 ranks; so neither is ever asked for."
    def spied(comm):
        seen, names = [], ('all_gather_into_tensor', 'all_reduce', 'reduce_scatter_tensor')
        for name in names:
            def spy(out, *args, real=getattr(dist, name), **kwargs):
                seen.append((out.dtype, *[getattr(a, 'dtype', a) for a in args]))
                return real(out, *args, **kwargs)
            setattr(dist, name, spy)
        mask_b = torch.tensor([[True, False], [False, False]][comm.rank])
        got = comm.gather(mask_b), comm.all_sum(mask_b), comm.all_max(mask_b), comm.reduce_scatter(mask_b), comm.gather(torch.tensor([comm.rank]))
        assert not any(torch.bool in row for row in seen) and not any(dist.ReduceOp.SUM in row for row in seen)
        return got
    for rank, (mask_B, any_b, most_b, scattered_b, ids) in enumerate(spawn(spied, 2)):
        assert (mask_B.tolist(), mask_B.dtype) == ([True, False, False, False], torch.bool)
        assert any_b.tolist() == most_b.tolist() == [True, False] and scattered_b.tolist() == [rank == 0]
        assert (ids.tolist(), ids.dtype) == ([0, 1], torch.int64)

def test_nobody_passes_a_barrier_alone():
    def wait(comm):
        if comm.rank == 0: time.sleep(0.5)
        come = time.time()
        comm.barrier()
        return come, time.time(), comm.calls
    answers = spawn(wait, 3)
    assert min(left for _, left, _ in answers) >= max(come for come, *_ in answers) and {c for *_, c in answers} == {1}

def test_the_comm_says_who_it_is():
    comm = Ranks(1, 2)
    assert (comm.rank, comm.size, repr(comm), issubclass(RankError, RuntimeError)) == (1, 2, 'Ranks(1 of 2)', True)
    assert all(name in vars(Ranks) for name in ('gather', 'reduce_scatter', 'all_sum', 'all_max', 'barrier', 'wrap', 'no_sync', 'post_message'))

def test_gather_keeps_the_order_of_the_ranks_and_sums_what_they_ask():
    assert spawn(lambda comm: comm.gather(torch.tensor([comm.rank])).tolist(), 3) == [[0, 1, 2]] * 3
    def weighed(comm):
        x_b = torch.tensor([[1., 2.], [3., 4.]][comm.rank], requires_grad=True)
        (comm.gather(x_b) * (comm.rank + 1)).sum().backward()
        return x_b.grad.tolist()
    assert spawn(weighed, 2) == [[3., 3.]] * 2

def test_nothing_to_train_is_not_wrapped():
    assert spawn(lambda comm: type(comm.wrap(nn.Identity())).__name__, 1) == ['Identity']
    assert isinstance(Ranks(0, 2).wrap(nn.Identity()), nn.Identity)

def gathered(comm, kind):
    "Loss and gradient of a function of all rows and of one's own."
    g = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, generator=g).to(kind).chunk(comm.size)[comm.rank].clone().requires_grad_()
    x_B = comm.gather(x)
    loss = (x.float() @ x_B.float().T).exp().mean(); loss.backward()
    return loss.detach(), x.grad, x_B.requires_grad

@pytest.mark.parametrize('ranks', [2, 4])
def test_gather_is_differentiable(ranks):
    for kind, tol in ((torch.float64, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        loss, grad, _ = spawn(gathered, 1, kind)[0]
        parts = spawn(gathered, ranks, kind)
        assert all(p[2] for p in parts)
        torch.testing.assert_close(torch.stack([p[0] for p in parts]).mean(), loss, rtol=tol, atol=tol)
        torch.testing.assert_close(torch.cat([p[1] for p in parts]) / ranks, grad, rtol=tol, atol=tol)

def test_reduce_scatter_refuses_rows_that_do_not_divide():
    with pytest.raises(UserError, match='3 rows cannot be shared by 2 ranks: use a multiple of 2'): spawn(lambda comm: comm.reduce_scatter(torch.ones(3)), 2)

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device: the collectives over NCCL')
def test_nccl(tmp_path):
    (tmp_path / 'job.py').write_text(textwrap.dedent("""
        import os, torch
        from clipa_nb.distributed_trainer import _join, disconnect
        from clipa_nb.engine.meeting import rank_device
        rank, size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        comm, device = _join(rank, size, rank_device('cuda'), 60), rank_device('cuda')
        for where in (device, torch.device('cpu')): # NCCL, and gloo beside it
            for kind in (torch.float32, torch.bfloat16):
                x = torch.full((2, 3), rank + 1., device=where, dtype=kind, requires_grad=True)
                x_B = comm.gather(x); (x_B * (rank + 1)).sum().backward()
                total = size * (size + 1) / 2
                assert [float(v) for v in x_B[::2, 0]] == [r + 1. for r in range(size)] and float(x.grad[0, 0]) == total
                assert float(comm.all_sum(x).max()) == total and float(comm.all_max(x).min()) == size
        disconnect(); print('fine')
    """))
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH}
    env['PYTHONPATH'] = os.pathsep.join([os.getcwd(), env.get('PYTHONPATH', '')])
    n = min(2, torch.cuda.device_count())
    job = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), str(tmp_path / 'job.py')], capture_output=True, text=True, env=env, timeout=200)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count('fine') == n

# --- starting ranks

def child(fn, *args, connect=None):
    "The answer of one child of `spawn`."
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context('fork').Process(target=_child, args=(fn, args, connect, 0, 1, None, 60, theirs))
    with warnings.catch_warnings(): warnings.simplefilter('ignore', DeprecationWarning); process.start()
    answer = pickle.loads(ours.recv_bytes()); ours.send_bytes(b'bye'); process.join()
    return answer

def refuse(comm): raise UserError('no such recipe')

@pytest.mark.skipif(sys.platform != 'linux', reason='needs forked processes')
def test_a_child_answers_with_what_happened():
    assert child(lambda comm, word: word * 2, 'ho') == ('ok', 'hoho', '')
    assert child(lambda comm: print('seen')) == ('ok', None, 'seen\n')
    assert child(refuse) == ('user', 'no such recipe', '')
    kind, text, _ = child(lambda comm: 1 / 0)
    assert kind == 'failed' and 'ZeroDivisionError' in text
    kind, text, _ = child(lambda comm: lambda: 0) # what cannot be sent
    assert kind == 'failed' and 'pickle' in text

def test_the_parent_opens_an_answer():
    ours, theirs = multiprocessing.Pipe()
    theirs.send_bytes(pickle.dumps(('ok', 7, 'hello'))); assert _open(0, ours) == (7, 'hello')
    theirs.send_bytes(pickle.dumps(('failed', 'Traceback …', '')))
    with pytest.raises(RankError, match='rank 1 failed\nTraceback …'): _open(1, ours)
    theirs.send_bytes(pickle.dumps(('user', 'no such recipe', '')))
    with pytest.raises(UserError, match='rank 1: no such recipe'): _open(1, ours)
    theirs.close()
    with pytest.raises(RankError, match='rank 2 died without a word'): _open(2, ours)

@pytest.mark.skipif(sys.platform != 'linux', reason='needs forked processes')
def test_the_parent_watches_the_clock_and_the_processes():
    ours, theirs = multiprocessing.Pipe()
    sleeper = multiprocessing.get_context('fork').Process(target=time.sleep, args=(5,), daemon=True)
    with warnings.catch_warnings(): warnings.simplefilter('ignore', DeprecationWarning); sleeper.start()
    with pytest.raises(RankError, match='did not finish within 0.1 s'): _collect([sleeper], [ours], 0.1)
    sleeper.kill(); sleeper.join()
    with pytest.raises(RankError, match='rank 0 died without a word'): _collect([sleeper], [ours], 5)
    theirs.send_bytes(pickle.dumps(('ok', 7, ''))); assert _collect([sleeper], [ours], 5) == [(7, '')]

def test_functions_travel_by_value():
    pytest.importorskip('cloudpickle', reason='functions travel to fresh processes by value: extra [dev]')
    k = 3
    assert pickle.loads(pickle.dumps(_ByValue(lambda x: k * x)))(2) == 6

@pytest.mark.skipif(sys.platform != 'linux', reason='needs forked processes')
def test_launch_is_handed_what_connects():
    "The engine knows no process group: whatever `connect` returns is the comm, and one rank is never connected."
    def connect(rank, size, device, timeout, init): return rank, size, str(device), timeout, init.startswith('file://')
    assert launch_spawn(lambda comm: comm, 2, connect=connect, timeout=30., method='fork') == [(r, 2, 'cpu', 15., True) for r in (0, 1)]
    assert launch_spawn(lambda comm: comm.size, 1, connect=None, method='fork') == [1]

def test_joining_and_leaving(tmp_path):
    assert repr(_join(0, 1, torch.device('cpu'), 60, f'file://{tmp_path}/alone')) == 'Ranks(0 of 1)' and dist.is_initialized()
    disconnect(); assert not dist.is_initialized()
    disconnect() # to leave twice is no mistake
    with pytest.raises(RankError, match=r'ranks \[1\] did not come'): _join(0, 2, torch.device('cpu'), 1, f'file://{tmp_path}/two')

def test_rank_0_is_the_main_one(capsys):
    assert is_main(LOCAL) and spawn(lambda comm: is_main(comm), 3) == [True, False, False]
    say(LOCAL, 'one', 'process'); assert capsys.readouterr().out == 'one process\n'
    assert spawn(lambda comm: say(comm, 'printed once'), 2) == [None, None] and capsys.readouterr().out == '[rank 0] printed once\n'

def test_devices_are_dealt_out(monkeypatch):
    for launched in (False, True):
        if launched: monkeypatch.setenv('LOCAL_RANK', '0')
        assert rank_device('cpu') == torch.device('cpu') and rank_device('auto').type in ('cpu', 'cuda', 'mps')
        with pytest.raises(UserError, match='unknown device'): rank_device('gpu')

def learn(comm):
    "Something of everything: printing, a collective, a wrapped module, a result that refers to the function's surroundings."
    torch.manual_seed(0); line = comm.wrap(nn.Linear(3, 1).double())
    line(torch.full((2, 3), comm.rank + 1.).double()).sum().backward()
    print('learnt on', comm.rank)
    return comm.rank, float(comm.all_sum(torch.ones(()))), [p.grad for p in line.parameters()], N

def test_every_way_to_start_ranks_gives_the_same(capsys):
    pytest.importorskip('cloudpickle', reason='functions travel to fresh processes by value: extra [dev]')
    answers = {}
    for method in ('fork', 'spawn'):
        answers[method] = spawn(learn, 2, method=method)
        assert capsys.readouterr().out == '[rank 0] learnt on 0\n[rank 1] learnt on 1\n'
    for a, b in zip(*answers.values()):
        assert a[:2] == b[:2] and a[3] == b[3] == N
        for p, q in zip(a[2], b[2]): assert torch.equal(p, q)
    assert answers['fork'][0][2][0].tolist() == [[3.] * 3] # the mean of 2 · 1 and 2 · 2

@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != 'linux', reason='forking is refused there without being tried')
def test_fork_is_tried_before_it_is_used():
    assert fork_works() is True
    assert fork_works(lambda: os._exit(1)) is False # the probe cannot learn
    assert fork_works(lambda: os.kill(os.getpid(), signal.SIGKILL)) is False # or dies
    lock, taken, over = threading.Lock(), threading.Event(), threading.Event()
    def keep():
        with lock: taken.set(); over.wait()
    thread = threading.Thread(target=keep); thread.start(); taken.wait()
    try: assert fork_works(lock.acquire, patience=0.5) is False # the child has the lock, and not the thread that would open it
    finally: over.set(); thread.join()
    assert fork_works(lock.acquire) is True

def test_fork_is_refused_beside_an_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    assert fork_works() is False

def test_bad_input_to_spawn():
    with pytest.raises(UserError, match='0 ranks: expected at least 1'): spawn(learn, 0)
    with pytest.raises(UserError, match="unknown way to start ranks 'thread'"): spawn(learn, 2, method='thread')

# --- ranks that fail: nobody waits for ever, and the error names them

def test_failures_reach_the_parent():
    def broken(comm): return 1 / comm.rank
    with pytest.raises(RankError, match='(?s)rank 0 failed.*ZeroDivisionError'): spawn(broken, 2)
    def bad_input(comm):
        if comm.rank == 1: raise UserError('no captions')
        comm.all_sum(torch.ones(1))
    begun = time.monotonic()
    with pytest.raises(UserError, match='^rank 1: no captions$'): spawn(bad_input, 3, timeout=100)
    def killed(comm):
        if comm.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
        comm.all_sum(torch.ones(1))
    with pytest.raises(RankError, match='(?s)rank 1 died without a word|rank 0 failed.*rank 1 left no word'): spawn(killed, 2, timeout=100)
    assert time.monotonic() - begun < 60, 'somebody waited for the timeout'
    with pytest.raises(RankError, match=r'ranks \[0\] did not finish within 1 s'): spawn(lambda comm: time.sleep(9), 1, timeout=1)

def test_a_rank_that_stays_away_is_named():
    def away(comm):
        if comm.rank == 1: time.sleep(60)
        return comm.gather(torch.ones(1))
    with pytest.raises(RankError, match=r'(?s)rank [02] waited in gather, its call 1: rank 1 left no word: it is busy elsewhere, or was killed'): spawn(away, 3, timeout=16)

def test_a_message_can_be_read_by_the_others():
    def notes(comm):
        if comm.rank == 1: comm.post_message('ran out of disk')
        while not comm.store.check(['message 1']): time.sleep(0.01)
        return comm.store.get('message 1').decode()
    assert spawn(notes, 2) == ['ran out of disk'] * 2
    def three(comm):
        text = ['waited in all_sum', 'waited in all_sum', 'stopped with UserError: no captions'][comm.rank]
        if comm.rank: comm.post_message(text)
        time.sleep(0.2)
        return peer_status(comm, text)
    assert spawn(three, 3)[0] == 'rank 2 stopped with UserError: no captions; 1 other waited in the same call'
    assert peer_status(LOCAL) == ''

def test_ranks_in_different_calls_are_told_apart():
    def elsewhere(comm):
        if comm.rank == 0: comm.post_message('waited in all_sum, its call 3')
        return peer_status(comm, 'waited in all_max, its call 3') if comm.rank else ''
    assert spawn(elsewhere, 2)[1] == 'rank 0 waited in all_sum, its call 3'
    def together(comm):
        comm.post_message('waited in gather, its call 1')
        return peer_status(comm, 'waited in gather, its call 1')
    assert spawn(together, 3) == ['2 others waited in the same call'] * 3

def test_a_rank_that_raises_is_named_in_the_wrappers_average():
    def one_leaves(comm):
        torch.manual_seed(0); line = comm.wrap(nn.Linear(2, 1))
        try:
            with watch(comm):
                if comm.rank == 1: raise UserError('shard 7 holds no captions')
                line(torch.ones(1, 2)).sum().backward()
        except UserError: disconnect()
        except RankError as e: return str(e)
    assert 'rank 0 waited in the average of the gradients: rank 1 stopped with UserError: shard 7 holds no captions' in spawn(one_leaves, 2, timeout=60)[0]

def test_watch_changes_nothing_else():
    with pytest.raises(UserError, match='^mine$'), watch(LOCAL): raise UserError('mine')
    def own_fault(comm):
        with watch(comm): raise RuntimeError('shapes do not fit')
    with pytest.raises(RankError, match='(?s)failed.*RuntimeError: shapes do not fit'): spawn(own_fault, 2)

def free_port():
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); return str(s.getsockname()[1])

def launched(program, rank, size, port, out):
    "A process as a cluster starts it: it meets the others at an address, no parent watches it, and it ends as programs end."
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    try: program()
    except Exception as e: out.write_text(f'{type(e).__name__}: {e}')
    os._exit(1)

def launch(program, ranks, size, folder):
    context, port = multiprocessing.get_context('fork'), free_port()
    jobs = [context.Process(target=launched, args=(program, r, size, port, folder / f'{r}.txt'), daemon=True) for r in ranks]
    with warnings.catch_warnings(): warnings.simplefilter('ignore', DeprecationWarning); [j.start() for j in jobs]
    try:
        for j in jobs: j.join(60); assert j.exitcode == 1, 'still waiting'
        return [(folder / f'{r}.txt').read_text() for r in ranks]
    finally: [j.kill() for j in jobs]

@pytest.mark.skipif(sys.platform != 'linux', reason='needs forked processes')
def test_processes_without_a_parent_do_not_wait_for_one_that_raised(tmp_path):
    def program():
        comm = connect('cpu', timeout=300)
        with watch(comm):
            comm.all_sum(torch.ones(1))
            if comm.rank == 1: raise UserError('shard 000017.tar holds no captions')
            comm.all_sum(torch.ones(1))
    zero, one = launch(program, (0, 1), 2, tmp_path)
    assert one == 'UserError: shard 000017.tar holds no captions'
    assert zero.startswith('RankError: rank 0 waited in all_sum, its call 2: rank 1 stopped with UserError: shard 000017.tar holds no captions')

@pytest.mark.skipif(sys.platform != 'linux', reason='needs forked processes')
def test_waiting_for_a_rank_that_was_never_started_ends(tmp_path):
    first, = launch(lambda: connect('cpu', timeout=2), (0,), 2, tmp_path)
    assert first.startswith('RankError: rank 0 of 2 at the meeting place, waiting up to 2 s: not all ranks reached it (') and '1/2 clients joined' in first, first

@pytest.mark.parametrize('env, message', [
    (dict(RANK='0'), 'launched with RANK but without WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT'),
    (dict(RANK='2', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='x', MASTER_PORT='1'), 'RANK=2 of WORLD_SIZE=2: expected numbers, ranks counted from 0'),
    (dict(RANK='one', WORLD_SIZE='2', LOCAL_RANK='0', MASTER_ADDR='x', MASTER_PORT='1'), 'RANK=one: expected numbers')])
def test_environments_that_cannot_be(monkeypatch, env, message):
    for k in LAUNCH: monkeypatch.delenv(k, raising=False)
    assert connect() is LOCAL
    for k, v in env.items(): monkeypatch.setenv(k, v)
    with pytest.raises(UserError, match=message): connect()

def test_launched_or_not():
    whole = dict(zip(LAUNCH, ('1', '2', '1', 'localhost', '29500')))
    assert (launched_by({}), launched_by({'MASTER_PORT': '1'}), launched_by(whole)) == (False, False, True)
    with pytest.raises(UserError, match='WORLD_SIZE=two: expected numbers'): launched_by({**whole, 'WORLD_SIZE': 'two'})

def test_torchrun(tmp_path):
    (tmp_path / 'job.py').write_text(textwrap.dedent('''
        import torch
        from clipa_nb.distributed_trainer import connect, disconnect
        from clipa_nb.engine.meeting import rank_device, say
        comm = connect('cpu', timeout=60)
        total = comm.all_sum(torch.tensor(comm.rank + 1.))
        say(comm, f'{comm.size} ranks on {rank_device("cpu")}, sum {total:g}')
        disconnect()
    '''))
    env = {k: v for k, v in os.environ.items() if k not in LAUNCH}
    env['PYTHONPATH'] = os.pathsep.join([os.getcwd(), env.get('PYTHONPATH', '')])
    job = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(tmp_path / 'job.py')], capture_output=True, text=True, env=env, timeout=200)
    assert job.returncode == 0, job.stderr
    assert '2 ranks on cpu, sum 3' in job.stdout
