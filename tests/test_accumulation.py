"Accumulation in chunks gives the gradient of one graph: any objective, dropped tokens, dropout, bf16, ranks; and bad input is refused."
import contextlib, inspect, math, weakref
import pytest, torch
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from clipa_nb.clip import ModelConfig, build_clip
from clipa_nb.core import LOCAL, UserError, autocast
from clipa_nb.cost import Tower, activation_bytes
from clipa_nb.engine.meeting import same_gradients
from clipa_nb.distributed_trainer import spawn
from clipa_nb.infonce import Contrastive, Sigmoid
from clipa_nb.optimization import AdamW
from clipa_nb.trainer import Task, TrainConfig, clamp_temperature, first_pass, fit, forward_backward, train_step
from clipa_nb.engine.loop import zero_gradient, check_batch, check_row, device_of, rng_state, set_rng_state, split

CHUNKS = [1, 2, 4, 7] # 14 samples: even, ragged, two at a time
N = 14

class Dropping(nn.Module):
    "A layer, then dropout; computed again in the backward pass, as with activation checkpointing."
    def __init__(self, layer): super().__init__(); self.layer = layer
    def forward(self, x): return checkpoint(lambda y: F.dropout(self.layer(y), 0.2, self.training), x, use_reentrant=False)

def clip(**changes):
    "A small CLIP that drops half its patches, with dropout in both towers, and a bias for the sigmoid loss."
    tower = Tower(16, 2, 2, 32)
    cfg = ModelConfig(image=tower, text=tower, embed_dim=8, image_size=16, patch=4, context_length=6, vocab_size=50, image_strategy='random', image_ratio=0.5, **changes)
    torch.manual_seed(0)
    model = build_clip(cfg).train()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn(p.shape)) # away from layers that start at zero
    for t in (model.visual, model.text): t.encoder.blocks[0].mlp = Dropping(t.encoder.blocks[0].mlp)
    if getattr(model, 'logit_bias', None) is None: model.logit_bias = nn.Parameter(torch.tensor(-1.5))
    return model

def batch_of(n=N, rank=0, size=1):
    g = torch.Generator().manual_seed(3)
    batch = dict(image=torch.randint(0, 256, (n, 3, 16, 16), generator=g, dtype=torch.uint8), text=torch.randint(1, 50, (n, 6), generator=g), key=torch.randint(0, 5, (n,), generator=g))
    return {k: v.chunk(size)[rank] for k, v in batch.items()}

class Keyed(Contrastive):
    def __init__(self): super().__init__(key=True, chunk=3)

class Many(Contrastive):
    "Token features, integer features, one the loss does not use, one without a gradient, and a term on a weight that features use too."
    def features(self, model, batch):
        z, out = model.visual(batch['image'].to(model.logit_scale.dtype) / 255)
        return dict(super().features(model, batch), tokens=out['tokens'], ids=out['ids'], unused=2 * z, still=z.detach())
    def loss(self, features, model, batch, comm=LOCAL):
        assert not features['ids'].is_floating_point()
        tokens = features['tokens'].mean(1)[:, :8] @ features['text'].T
        return dict(loss=super().loss(features, model, batch, comm)['loss'] + 0.1 * tokens.pow(2).mean() + 0.1 * (features['still'] ** 2).mean() + 0.1 * model.text.head.weight.pow(2).sum())

class Noisy(Contrastive):
    "A loss that draws random numbers itself."
    def loss(self, features, model, batch, comm=LOCAL): return super().loss({k: F.dropout(z, 0.1) for k, z in features.items()}, model, batch, comm)

OBJECTIVES = dict(infonce=Contrastive, keyed=Keyed, sigmoid=Sigmoid, streamed_sigmoid=lambda: Sigmoid(chunk=3), many=Many, noisy=Noisy)

def grads(task): return {n: p.grad.clone() for n, p in task.model.named_parameters() if p.grad is not None}

def one_graph(task, batch, k, context=contextlib.nullcontext):
    "The definition: all chunks in one graph, each drawing as it comes."
    task.zero_grad(); torch.manual_seed(1)
    with context(): feats = [task(part) for part in split(batch, k)]
    out = task.loss({n: torch.cat([f[n] for f in feats]) for n in feats[0]}, batch); out['loss'].backward()
    return out, grads(task), torch.rand(3)

def in_chunks(task, batch, k, context=contextlib.nullcontext):
    task.zero_grad(); torch.manual_seed(1)
    out = forward_backward(task, task, batch, chunks=k, context=context)
    return out, grads(task), torch.rand(3)

@pytest.mark.parametrize('name', OBJECTIVES)
def test_equals_one_graph(name):
    task, batch = Task(clip().double(), OBJECTIVES[name]()), batch_of()
    if name == 'sigmoid': batch['prompt'] = [f'is it {i}?' for i in range(N)]
    for k in CHUNKS:
        (a, got, after), (b, want, end) = in_chunks(task, batch, k), one_graph(task, batch, k)
        torch.testing.assert_close(a['loss'], b['loss'].detach(), rtol=1e-12, atol=1e-12)
        assert set(got) == set(want) and ('logit_bias' in want) == ('sigmoid' in name) and 'logit_scale' in want
        for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-10, msg=lambda m: f'{name}, {k} chunks, {n}: {m}')
        torch.testing.assert_close(after, end, rtol=0, atol=0) # the generators stand where one graph leaves them
        assert k == 1 or a['replay_gap'] == 0

def test_chunks_draw_their_own_randomness():
    "What the test above compares is not the same for all k: the masks matter, and so would redrawing them."
    task, batch = Task(clip().double(), Contrastive()), batch_of()
    scales = [float(one_graph(task, batch, k)[1]['logit_scale']) for k in CHUNKS]
    assert len({round(s, 9) for s in scales}) == len(CHUNKS)

@pytest.mark.parametrize('outer', [False, True])
def test_under_bf16_autocast(outer):
    "Chunks in bf16 differ from one graph in bf16 by no more than bf16 differs from fp32; also where the caller is inside autocast already."
    task, batch, bf16 = Task(clip(), Sigmoid()), batch_of(), lambda: autocast('amp_bf16', torch.device('cpu'))
    with bf16() if outer else contextlib.nullcontext():
        got, low = in_chunks(task, batch, 4, bf16)[1], one_graph(task, batch, 4, bf16)[1]
    full = one_graph(task, batch, 4)[1]
    assert set(got) == set(low) == set(full)
    flat = lambda g: torch.cat([g[n].flatten() for n in full])
    noise = (flat(low) - flat(full)).norm()
    assert 0 < noise and (flat(got) - flat(low)).norm() <= 0.5 * noise
    for n in ('logit_scale', 'logit_bias'): assert abs(got[n] / full[n] - 1) < 0.05, n

def test_features_keep_their_type():
    seen = {}
    class Spy(Contrastive):
        def features(self, model, batch): return dict(image=model.encode_image(batch['image']), text=model.encode_text(batch['text']))
        def loss(self, features, model, batch, comm=LOCAL):
            seen.setdefault(len(seen), {k: z.dtype for k, z in features.items()})
            return super().loss({k: F.normalize(z.float(), dim=-1) for k, z in features.items()}, model, batch, comm)
    task, bf16 = Task(clip(), Spy()), lambda: autocast('amp_bf16', torch.device('cpu'))
    for k in (1, 3): in_chunks(task, batch_of(), k, bf16)
    assert seen[0] == seen[1] == dict(image=torch.bfloat16, text=torch.bfloat16)

@pytest.mark.parametrize('frozen', ['visual', 'both', 'logit_scale'])
def test_frozen_parts_stay_without_gradient(frozen):
    task, batch = Task(clip().double(), Sigmoid()), batch_of()
    for n, p in task.model.named_parameters():
        if n.startswith('logit') != (frozen != 'logit_scale') and (frozen != 'visual' or n.startswith('visual')): p.requires_grad_(False)
    got, want = in_chunks(task, batch, 4)[1], one_graph(task, batch, 4)[1]
    assert set(got) == set(want) == {n for n, p in task.model.named_parameters() if p.requires_grad}
    for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-10)

class Generator(Contrastive):
    "Breaks the contract: a generator of its own, which nobody can put back."
    def __init__(self): super().__init__(); self.own = torch.Generator().manual_seed(0)
    def features(self, model, batch): return {k: z + 0.5 * torch.randn(z.shape, generator=self.own).to(z) for k, z in super().features(model, batch).items()}

def test_what_cannot_be_replayed_is_noticed():
    task, batch = Task(clip(), Generator()), batch_of()
    gap = in_chunks(task, batch, 2)[0]['replay_gap']
    assert gap > 0.3
    with pytest.raises(RuntimeError, match='step 1: features differ by .* between the two passes'):
        fit(task, task, [batch], AdamW(weight_decay=0.).build(task, 1e-3), TrainConfig(steps=2, chunks=2, log_every=1))

def test_step_does_not_know_whether_it_accumulates():
    lines = [line for line in inspect.getsource(train_step).splitlines() if line.strip()]
    assert len(lines) <= 30 and 'split' not in inspect.getsource(train_step)
    def train(chunks):
        torch.manual_seed(0)
        cfg = ModelConfig(image=Tower(16, 1, 2, 32), text=Tower(16, 1, 2, 32), embed_dim=8, image_size=16, patch=4, context_length=6, vocab_size=50)
        model = build_clip(cfg).double(); task = Task(model, Contrastive()); opt = AdamW(weight_decay=0.1).build(task, 1e-2)
        return [float(train_step(task, task, batch_of(), opt, s, TrainConfig(steps=6, lr=1e-2, chunks=chunks))['loss']) for s in range(6)]
    assert train(1) == pytest.approx(train(5), rel=1e-8)

@pytest.mark.parametrize('max_scale, want', [(100., (0., math.log(100))), (0., (-1., 6.)), (10., (0., math.log(10)))])
def test_scale_is_clamped_after_the_step_or_never(max_scale, want):
    for start, end in zip((-1., 6.), want):
        task = Task(clip(), Contrastive()); task.model.logit_scale.data.fill_(start)
        train_step(task, task, batch_of(4), AdamW(weight_decay=0.).build(task, 1e-9), 0, TrainConfig(steps=2, lr=1e-9, max_scale=max_scale))
        assert float(task.model.logit_scale.detach()) == pytest.approx(end, abs=1e-6)

def test_rows_that_stop_a_run():
    good = {'train/loss': 1., 'train/grad_norm': 1.}
    with pytest.raises(RuntimeError, match='between the two passes'): check_row({**good, 'train/replay_gap': 0.06}, 7)
    assert check_row({**good, 'train/replay_gap': 0.01}, 7) is None

def test_the_last_backward_pass_reaches_what_only_the_loss_used():
    p = nn.Parameter(torch.tensor([1., math.inf])); p.grad = torch.tensor([5., 6.]); reached = []
    p.register_hook(reached.append)
    torch.autograd.backward(zero_gradient([p]))
    assert p.grad.tolist() == [5., 6.] and len(reached) == 1 and reached[0].tolist() == [0., 0.] and zero_gradient([]) == []

def test_clamp_leaves_alone_what_is_not_its_own():
    model = clip(); model.logit_scale.data.fill_(6.); model.logit_scale.requires_grad_(False)
    clamp_temperature(model, 100.); assert float(model.logit_scale) == 6. # frozen
    clamp_temperature(nn.Linear(2, 2), 100.) # no temperature
    for bad in (0.5, -1., math.nan):
        with pytest.raises(UserError, match=r'max_scale .*: expected 0 \(never clamp\) or at least 1'): TrainConfig(max_scale=bad)
    for bad in (0, -1, 2.5, None):
        with pytest.raises(UserError, match=f'chunks {bad}: expected 1'): TrainConfig(chunks=bad)

def test_bad_batches():
    task, batch = Task(clip(), Contrastive()), batch_of(6)
    for k in (0, 7, -1, 2.5, None):
        with pytest.raises(UserError, match=f'6 samples cannot be accumulated in {k} chunks: use 1 to 6'): forward_backward(task, task, batch, chunks=k)
    with pytest.raises(UserError, match='differ in length .*image 6, text 5'): forward_backward(task, task, dict(batch, text=batch['text'][:5]), chunks=2)
    for whole, kind in ((3, 'int'), (torch.tensor(3), 'Tensor'), (None, 'NoneType')):
        with pytest.raises(UserError, match=f"entry 'epoch' of the batch is one {kind} and cannot be cut"): forward_backward(task, task, dict(batch, epoch=whole), chunks=2)
        forward_backward(task, task, dict(batch, epoch=whole)) # one graph cuts nothing
    with pytest.raises(UserError, match='0 samples cannot be accumulated'): forward_backward(task, task, {}, chunks=2)
    class Scaled(Contrastive):
        def features(self, model, batch): return dict(super().features(model, batch), scale=model.logit_scale.exp())
    scaled = Task(task.model, Scaled())
    with pytest.raises(UserError, match=r"feature 'scale' of a chunk of 3 samples is \(\)"): forward_backward(scaled, scaled, batch, chunks=2)
    with pytest.raises(UserError, match="feature 'scale'"): first_pass(scaled, split(batch, 2), device_of(batch))
    class Long(Contrastive):
        def features(self, model, batch): return {k: torch.cat([z, z]) for k, z in super().features(model, batch).items()}
    long = Task(task.model, Long())
    with pytest.raises(UserError, match=r"feature 'image' of a chunk of 3 samples is \(6, 8\)"): forward_backward(long, long, batch, chunks=2)
    assert check_batch(batch, 2) == 6
    assert device_of(dict(prompt=['a'], image=torch.zeros(1, device='meta'))) == torch.device('meta') and device_of(dict(prompt=['a'])) == torch.device('cpu')

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device: its own generator must be kept too')
def test_on_cuda():
    task, batch = Task(clip().double().cuda(), Sigmoid()), {k: v.cuda() for k, v in batch_of().items()}
    for k in CHUNKS:
        (a, got, after), (b, want, end) = in_chunks(task, batch, k), one_graph(task, batch, k)
        for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-9, atol=1e-9)
    def held(k):
        torch.cuda.reset_peak_memory_stats(); before = torch.cuda.memory_allocated()
        in_chunks(task, {k: v.repeat(64, *[1] * (v.ndim - 1)) for k, v in batch.items()}, k)
        return torch.cuda.max_memory_allocated() - before
    assert held(8) < held(1) / 2
    state = rng_state(torch.device('cuda')); x = torch.rand(3, device='cuda'); set_rng_state(state, torch.device('cuda'))
    torch.testing.assert_close(torch.rand(3, device='cuda'), x, rtol=0, atol=0)

def rank_model(name):
    model = clip().double()
    if name != 'sigmoid': model.logit_bias.requires_grad_(False) # a wrapper wants every trained parameter used
    return Task(model, OBJECTIVES[name]())

def steps(comm, name, chunks):
    "For each number of chunks: gradients on this rank after the second of two steps, and how many numbers each step averaged."
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    out = []
    for k in chunks:
        task = rank_model(name); wrapped, sent, sums = comm.wrap(task), [], []
        def counting(state, bucket): sent.append(bucket.buffer().numel()); return allreduce_hook(state, bucket)
        wrapped.register_comm_hook(None, counting)
        for _ in range(2):
            task.zero_grad(); sent.clear(); torch.manual_seed(1 + comm.rank)
            forward_backward(wrapped, task, batch_of(rank=comm.rank, size=comm.size), comm, k if isinstance(k, int) else k[comm.rank])
            sums.append(sum(sent))
        same_gradients(task, comm)
        out.append((grads(task), sums))
    return out

def on_one_process(name, k, size):
    "One graph over every rank's chunks with every rank's randomness."
    task, feats = rank_model(name), []
    for r in range(size):
        torch.manual_seed(1 + r)
        feats += [task(part) for part in split(batch_of(rank=r, size=size), k if isinstance(k, int) else k[r])]
    task.loss({n: torch.cat([f[n] for f in feats]) for n in feats[0]}, batch_of())['loss'].backward()
    return grads(task), sum(p.numel() for p in task.parameters() if p.requires_grad)

@pytest.mark.parametrize('name', ['infonce', 'keyed', 'sigmoid'])
def test_two_ranks_synchronise_once(name):
    chunks = [*CHUNKS, (2, 3)] # in the last case the ranks do not even agree on the number of chunks
    answers = spawn(steps, 2, name, chunks)
    for i, k in enumerate(chunks):
        want, trained = on_one_process(name, k, 2)
        for got, sums in (a[i] for a in answers):
            assert sums == [trained, trained], 'every gradient is averaged once in a step, those that only the loss uses too'
            assert set(got) == set(want)
            for n in want: torch.testing.assert_close(got[n], want[n], rtol=1e-10, atol=1e-10, msg=lambda m: f'{name}, {k} chunks, {n}: {m}')

# --- what chunks hold in memory

class Live(TorchDispatchMode):
    "The bytes that torch holds, and their peak, while this mode is on: the same number on every run."
    def __init__(self):
        super().__init__()
        self.now, self.peak, self.held = 0, 0, set()

    def free(self, key, n):
        self.now -= n
        self.held.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([t.untyped_storage() for t in tree_leaves(x) if torch.is_tensor(t)] for x in ((args, kwargs), out))
        old = self.held | {s._cdata for s in given}
        for s in made: # views of what was there before are not new
            if s._cdata in old: continue
            old.add(s._cdata)
            self.held.add(s._cdata)
            self.now += s.nbytes()
            weakref.finalize(s, self.free, s._cdata, s.nbytes())
        self.peak = max(self.peak, self.now)
        return out

def test_a_counter_of_bytes_counts():
    with Live() as live:
        a = torch.zeros(1000)
        b = a[:10] + 1
        c = b.view(2, 5)
        del a
    assert (live.peak, live.now) == (4040, 40) and c.shape == (2, 5)

@pytest.mark.parametrize('chunks', [1, 8])
def test_chunks_hold_what_is_predicted(chunks):
    "One graph holds b times what a sample keeps; chunks hold b/k of it and three copies of the features; both hold gradients."
    tower, E = Tower(64, 2, 2, 256), 64
    cfg = ModelConfig(image=tower, text=tower, embed_dim=E, image_size=32, patch=8, context_length=8, vocab_size=100, image_strategy='random', image_ratio=0.5)
    model = build_clip(cfg); task = Task(model.train(), Contrastive())
    each = sum(activation_bytes(tower, n, 'fp32') for n in (8 + 1, 8)) + 2 * 3 * 32 * 32 * 4 # pixels as numbers and as patches
    gradients = sum(4 * p.numel() for p in model.parameters())
    for b in (64, 256):
        batch = dict(image=torch.zeros(b, 3, 32, 32, dtype=torch.uint8), text=torch.ones(b, 8, dtype=torch.long), draw=torch.arange(b))
        model.zero_grad()
        with Live() as live: forward_backward(task, task, batch, chunks=chunks)
        features = 3 * b * 2 * E * 4 if chunks > 1 else 0
        assert live.peak == pytest.approx(b * each / chunks + features + gradients, rel=0.1)
