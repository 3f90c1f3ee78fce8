"A run goes on, to the digit, on another number of ranks and under another wrapper."
import math
import pytest, torch
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
import torch.distributed.checkpoint # likewise
from clipa_nb.core import LOCAL
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.checkpoints import Checkpoints, live_tensors, own_pieces
from clipa_nb.optimization import AdamW, Cosine
from clipa_nb.trainer import TrainConfig, assemble, fit
from test_wrappers import B, RULES, batch_of as share_of, task_of

WIDE = 3 * B # 24 rows are shared evenly by 1, 2, 3 and 4 ranks

def batch_of(step, comm):
    parts = [share_of(3 * step + i) for i in range(3)]
    return {k: torch.cat([p[k] for p in parts]).chunk(comm.size)[comm.rank] for k in parts[0]}

def part(comm, where, how, stop, per_node=0, chunks=1):
    "Train from the newest checkpoint, or from the beginning, to step `stop` of 5; save there."
    if per_node: comm.per_node = per_node
    cfg = TrainConfig(steps=5, lr=3e-2, schedule=Cosine(), log_every=1, ema=0.8, chunks=chunks)
    task = task_of()
    wrapped, optimizer, average = assemble(task, AdamW(weight_decay=0.1), cfg, RULES, comm, how)
    kept, start, trace = Checkpoints(where, comm=comm), 0, []
    if found := kept.latest():
        found.load(task, optimizer, average); start = found.state['samples'] // WIDE
    def log(**row): trace.append((row['step'], row['train/loss'], row['train/grad_norm']))
    class Enough(Exception): pass
    def told(n, row):
        if trace[-1][0] == stop: raise Enough
    try: fit(wrapped, task, (batch_of(s, comm) for s in range(start, 5)), optimizer, cfg, start=start, comm=comm, ema=average, log=log, progress=told)
    except Enough: pass
    tensors = live_tensors(task, optimizer, average)
    staged = sum(p.tensor.nbytes for p in own_pieces(tensors, comm.rank, comm.size))
    kept.save(stop, tensors, dict(samples=stop * WIDE)); kept.join(); comm.barrier()
    return trace, staged

def whole(where): return Checkpoints(where).latest().tensors()

@pytest.mark.parametrize('first, how, then', [
    (2, 'fsdp2', [(1, 'ddp'), (3, 'fsdp2'), (4, 'fsdp2'), (3, 'ddp')]),
    (2, 'ddp', [(1, 'ddp'), (4, 'fsdp2')]),
    (1, 'ddp', [(2, 'fsdp2')]),
    (4, 'hsdp', [(1, 'ddp'), (2, 'fsdp2'), (4, 'hsdp')])], ids=lambda x: str(x) if not isinstance(x, list) else '')
def test_a_run_goes_on_under_another_wrapper_and_on_other_ranks(tmp_path, first, how, then):
    import shutil
    want, _ = part(LOCAL, tmp_path / 'alone', 'ddp', 5); end = whole(tmp_path / 'alone')
    answers = spawn(part, first, tmp_path / 'half', how, 2, 2 if how == 'hsdp' else 0)
    total = sum(t.nbytes for t in end.values())
    assert sum(staged for _, staged in answers) == total # nothing is copied twice
    if first > 1: assert max(staged for _, staged in answers) < 0.75 * total
    for n, other in then:
        where = tmp_path / f'{n}{other}'; shutil.copytree(tmp_path / 'half', where)
        if n == 1: trace, _ = part(LOCAL, where, other, 5)
        else: trace, _ = spawn(part, n, where, other, 5, 2 if other == 'hsdp' else 0, 2)[0]
        assert [t[0] for t in trace] == [3, 4, 5]
        for got, right in zip(trace, want[2:]): assert got == pytest.approx(right, rel=1e-10)
        found = whole(where)
        assert set(found) == set(end)
        for k in end: # the bias of the keys has no gradient but rounding, which Adam divides by its own size
            torch.testing.assert_close(found[k], end[k], rtol=1e-8, atol=1e-7 if 'in_proj_bias' in k else 1e-10, msg=f'{n} {other}: {k}')
