"Chapters 00, 03 and 12 under names and numbers that mean nothing, and the loss's work as it is done."
import contextlib
import pytest, torch, torch.nn.functional as F
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
from torch.utils.flop_counter import FlopCounterMode
from clipa_nb import cost
from clipa_nb.core import UserError, autocast, generator, seed_of
from clipa_nb.clip import ModelConfig
from clipa_nb.cost import SIZES, Tower, activation_bytes, memory, n_tokens, plan, train_flops
from clipa_nb.distributed_trainer import spawn
from clipa_nb.infonce import Contrastive, info_nce
from clipa_nb.trainer import Task, forward_backward
from clipa_nb.transformer import Block

H, CPU = SIZES['H/14'], torch.device('cpu')


# ---- chance ----

def test_seeds_without_a_purpose_differ():
    seeds = [seed_of(n) for n in range(-50, 1000)]
    assert len(set(seeds)) == len(seeds) and len({torch.rand(1, generator=generator(n)).item() for n in range(50)}) == 50


def test_seeds_of_recorded_runs_never_change():
    assert (seed_of(0, 'init'), seed_of(0, 'order', 1), seed_of(7, 'stage', 2), seed_of(3, 'augment')) == (3225740572664017231, 8879844671190180801, 5808595887819060079, 5464436771803082158)


# ---- names that nobody knows ----

@pytest.mark.parametrize('call, says', [
    (lambda: autocast('bf16', CPU), "unknown precision 'bf16'"), (lambda: autocast('auto', CPU), "unknown precision 'auto'"),
    (lambda: memory(H, 37, 8, 64, precision='bf16'), "unknown precision 'bf16'"), (lambda: memory(H, 37, 8, 64, checkpointing='ful'), 'did you mean full'),
    (lambda: activation_bytes(H.image, 37, 'amp-bf16'), 'did you mean amp_bf16'), (lambda: train_flops(H, 37, 8, checkpointing='ful'), 'did you mean full'),
    (lambda: plan(H, 37, 8, 64, 1, checkpointing='selectiv'), 'did you mean selective'), (lambda: plan(H, 37, 8, 64, 1, precision='half'), "unknown precision 'half'"),
    (lambda: n_tokens(100, 16), 'use 96'), (lambda: n_tokens(8, 16), 'use 16'), (lambda: n_tokens(32, 16, 0.9), 'leaves none'),
    *((lambda wrong=wrong: cost.hours(3600e12, 1e12, mfu=wrong), '0 < mfu ≤ 1') for wrong in (0, 40, float('nan'))),
    (lambda: n_tokens(-224, 14), 'positive'), (lambda: n_tokens(0, 14), 'positive'), (lambda: n_tokens(224, -14), 'positive'), (lambda: n_tokens(224, 0), 'positive')])
def test_what_means_nothing_is_refused(call, says):
    with pytest.raises(UserError, match=says): call()


# ---- the loss ----

class Four:
    "Rank 0 of four that hold the same features."
    rank, size = 0, 4
    def gather(self, x): return torch.cat([x] * 4)
    def reduce_scatter(self, x): return x.chunk(4)[0]
    def all_sum(self, x): return x * 4
    def all_max(self, x): return x


@pytest.mark.parametrize('case, comm, chunk', [('one process', {}, None), ('several ranks', {'comm': Four()}, None), ('streamed', {}, 16), ('streamed', {'comm': Four()}, 16)])
def test_the_loss_costs_what_chapter_03_says(case, comm, chunk):
    b, E = 64, 32; B = b * (4 if comm else 1)
    image, text = (F.normalize(torch.randn(b, E, generator=generator(0, s)), dim=1).requires_grad_() for s in 'it')
    in_place = {torch.ops.aten.addmm_: lambda self, x, y, *_, out_shape=None, **more: 2 * x[0] * x[1] * y[1]} # torch leaves out products that add in place
    with FlopCounterMode(display=False, custom_mapping=in_place) as counted:
        info_nce(image, text, torch.tensor(10.), chunk=chunk, **comm)['loss'].backward()
    assert counted.get_total_flops() == cost.LOSS[case] * b * B * E
    assert train_flops(H, 37, 8, batch=B) - train_flops(H, 37, 8) == cost.LOSS['one process'] * B * H.embed_dim


# ---- memory, held against what torch saves for the backward pass ----

def saved_bytes(module, x, precision, *args):
    "Bytes of everything that a forward pass saves, each storage once, without parameters."
    own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}
    def keep(t):
        if t.untyped_storage().data_ptr() not in own and t.ndim > 1: seen[t.untyped_storage().data_ptr()] = t # holding it keeps its address
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), autocast(precision, CPU): module(x, *args)
    weights = sum(p.numel() for p in module.parameters() if p.ndim > 1) * 2 if precision == 'amp_bf16' else 0 # autocast's copies
    return sum(t.untyped_storage().nbytes() for t in seen.values()) - weights


@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('act', ['gelu', 'gelu_tanh', 'quick_gelu'])
@pytest.mark.parametrize('impl', ['sdpa', 'matmul'])
def test_a_layer_keeps_what_the_formula_says(precision, act, impl):
    tower, n, b = Tower(96, 1, 4, 384), 50, 4
    x = torch.randn(b, n, 96, requires_grad=True)
    found = saved_bytes(Block(96, 4, 384, act, impl=impl), x, precision) / b
    want = activation_bytes(tower, n, precision, act=act, matrix=impl == 'matmul')
    assert found == pytest.approx(want, rel=0.03)


def test_shards_chunks_and_averages_change_memory_by_what_they_hold():
    n = cost.parameters(H)['total']
    def of(**kw): return memory(H, 37, 8, 1024, ranks=64, **kw)
    whole, shards = of(), of(shards=64)
    assert whole['weights'] + whole['gradients'] + whole['moments'] == 18 * n
    assert shards['weights'] + shards['gradients'] + shards['moments'] == pytest.approx(2 * n + 16 * n / 64)
    assert of(ema=True)['weights'] - whole['weights'] == 4 * n and of(micro=256)['activations'] == whole['activations'] / 4
    assert of(shards=64, micro=256)['gradients'] == pytest.approx(4 * n + 4 * n / 64), 'gradients pile up between chunks'


def test_an_attention_pool_costs_what_torch_counts():
    cfg = ModelConfig(image=Tower(32, 1, 4, 64), text=Tower(32, 1, 4, 64), embed_dim=16, image_size=16, patch=4, context_length=6, vocab_size=50, cls=False, pool='map', attention='matmul')
    model, images = cfg.build(), torch.randn(3, 3, 16, 16)
    def counted(model):
        with FlopCounterMode(display=False) as counter: model.encode_image(images)
        return counter.get_total_flops()
    query = 2 * 32 * 32 # of the one query, which a batch shares
    assert counted(model) - counted(cfg.replace(pool='avg').build()) == 3 * cost.pool_flops(cfg, 16) + query
    with_pool, without = (cost.parameters(c, 50, 6, cls=False)['total'] for c in (cfg, cfg.replace(pool='avg')))
    assert with_pool == sum(p.numel() for p in model.parameters()) and with_pool > without


# ---- chunks are one more forward pass ----

def test_plans_count_the_forward_pass_of_accumulation():
    once, twice, eight = (train_flops(H, 37, 8, 84, chunks=k) for k in (1, 2, 8))
    assert twice == eight and twice - once == cost.pair_flops(H, 37, 8, 84)['total'] and twice * 3 == once * 4
    assert plan(H, 37, 8, 64, 2, 84, chunks=4)['flops'] == 128 * train_flops(H, 37, 8, 84, 64, chunks=4)
    torch.manual_seed(0)
    cfg = ModelConfig(image=Tower(32, 2, 4, 64), text=Tower(32, 1, 4, 64), embed_dim=16, image_size=16, patch=4, context_length=6, vocab_size=50, attention='matmul')
    task, batch = Task(cfg.build(), Contrastive(chunk=None)), dict(image=torch.randn(8, 3, 16, 16), text=torch.randint(1, 50, (8, 6)))
    def counted(chunks):
        with FlopCounterMode(display=False) as counter: forward_backward(task, task, batch, chunks=chunks)
        return counter.get_total_flops()
    heads = 8 * 2 * 2 * 32 * 16 # two projections, which the closed form leaves out
    assert counted(2) - counted(1) == 8 * cost.pair_flops(cfg, 17, 6, 16)['total'] + heads


# ---- what fits ----

def fitting(room, **kw): return cost.choose(H, 37, 8, 1024, int(room * 1e9), 64, tile=4096, image_size=84, **kw)

@pytest.mark.parametrize('room, found', [(0, ('ddp', 'none', 1024)), (90, ('ddp', 'none', 1024)), (72, ('ddp', 'selective', 1024)), (30, ('ddp', 'full', 1024)), (20, ('hsdp', 'full', 1024)), (10, ('fsdp2', 'selective', 64))])
def test_the_cheapest_way_that_fits(room, found):
    chosen = fitting(room)
    assert tuple(chosen[k] for k in ('wrap', 'checkpointing', 'micro_batch')) == found, chosen
    assert not room or chosen['memory_bytes'] <= room * 1e9


def test_what_was_decided_stays():
    chosen = fitting(72, wrap='fsdp2', checkpointing='none', micro=100)
    assert (chosen['wrap'], chosen['checkpointing'], chosen['micro_batch']) == ('fsdp2', 'none', 100)
    assert 'does not fit: use more devices' in fitting(1)['why'] and 'not known' in fitting(0)['why'] and 'ddp, none, 1,024 at a time: 81.' in fitting(72)['why']


def test_rooms():
    assert cost.device_bytes(CPU, 2) == cost.device_bytes(CPU) // 2 > 1e8 and cost.device_bytes(torch.device('meta')) == 0
    assert [cost.shards_of(w, 64) for w in ('ddp', 'fsdp2', 'hsdp')] == [1, 64, 8] and cost.shards_of('hsdp', 4) == 4


# ---- what is sent ----

def sent_bytes(comm, wrap, masked):
    "Bytes of the tensors that a step hands to its collectives, by kind; torch tells a mode about each of them."
    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            kind = {'_allgather_base_': 'all_gather', 'allreduce_': 'all_reduce', '_reduce_scatter_base_': 'reduce_scatter'}.get(f._schema.name.partition('::')[2])
            if f.namespace == 'c10d' and kind:
                whole = args[0] if kind != 'reduce_scatter' else args[1] # the larger side
                seen[kind] += sum(t.nbytes for t in ([whole] if torch.is_tensor(whole) else whole))
            return f(*args, **(kwargs or {}))
    torch.manual_seed(0)
    comm.per_node = 2
    task, seen = Task(COUNTED.build(), Contrastive(chunk=16)), dict.fromkeys(('all_gather', 'all_reduce', 'reduce_scatter'), 0)
    wrapped = comm.wrap(task, wrap)
    batch = dict(image=torch.randn(32 // comm.size, 3, 16, 16), text=torch.randint(1, 48, (32 // comm.size, 6)))
    if masked: batch['valid'] = torch.ones(len(batch['text']), dtype=torch.bool)
    for count in (False, True): # shards are gathered twice in a first step
        task.zero_grad(set_to_none=True)
        with Counting() if count else contextlib.nullcontext(): forward_backward(wrapped, task, batch, comm)
    return seen

COUNTED = ModelConfig(image=Tower(32, 2, 4, 64), text=Tower(32, 1, 4, 64), embed_dim=16, image_size=16, patch=4, context_length=8, vocab_size=48, cls=False)

def several_sent(comm, cases):
    out = []
    for case in cases:
        comm.device_mesh = None
        out.append(sent_bytes(comm, *case))
    return out

@pytest.mark.parametrize('ranks', [2, 4])
def test_traffic_is_what_is_counted(ranks):
    "Every size of this model divides by four, so that no shard is padded; scalars are averaged on their own, which traffic leaves out."
    cases = [('ddp', True), ('fsdp2', True)] + [('hsdp', False)] * (ranks == 4)
    for case, seen in zip(cases, spawn(several_sent, ranks, cases)[0]):
        want = dict.fromkeys(seen, 0)
        rows = cost.traffic(COUNTED, 32, ranks, case[0], 2, 'fp32', masked=case[1], vocab=48, context=8, cls=False)
        for _, kind, bytes, *_ in rows: want[kind] += bytes
        for kind in seen: assert abs(seen[kind] - want[kind]) <= 8, (case, kind, seen, want)


def test_predicted_scaling_is_bounded_and_ordered():
    for name in ('L/14', 'H/14', 'bigG/14'):
        for wrap in ('ddp', 'hsdp', 'fsdp2'):
            rates = [1 / (cost.step_seconds(SIZES[name], 37, 8, 65536, r, wrap)['total'] * r) for r in (8, 64, 512)]
            assert rates[0] >= rates[1] >= rates[2] > 0
    one = cost.step_seconds(H, 37, 8, 65536, 1)
    assert one['loss'] == one['gradients'] == 0 and one['compute'] == pytest.approx(65536 * train_flops(H, 37, 8) / 989e12 / 0.4)
    fast = cost.step_seconds(H, 37, 8, 65536, 512, network=cost.Network(between=5e12))
    assert fast['total'] < cost.step_seconds(H, 37, 8, 65536, 512)['total']
    assert (cost.sent('all_reduce', 100, 4), cost.sent('all_gather', 100, 4), cost.sent('all_gather', 100, 1)) == (150, 75, 0)
