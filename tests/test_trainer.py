"The loop: an objective's own weights, the moving average, one agreement, chance keyed by the sample, when a run stops."
import io, math, os, signal, time, zlib
import numpy as np
import pytest, torch
import torch._dynamo # the data-parallel wrapper needs it; forked ranks inherit it instead of importing it each time
import torch.nn.functional as F
from PIL import Image
from torch import nn
from clipa_nb.clip import ModelConfig, build_clip
from clipa_nb.core import LOCAL, UserError, draws_of, keyed_uniform
from clipa_nb.cost import Tower
from clipa_nb.data import Batches
from clipa_nb.engine.pairs import Source
from clipa_nb.engine.meeting import same_gradients
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.checkpoints import pack, unpack
from clipa_nb.engine.pictures import Transform
from clipa_nb.infonce import Contrastive, row_mean
from clipa_nb.optimization import AdamW, Constant, Cosine
from clipa_nb.engine.loop import ASK_EVERY, Meter, Stopped, agree_to_stop, average, draws_itself, due, evaluated, first_look, interrupts, make_ema, run_evals
from clipa_nb.trainer import Task, TrainConfig, fit, forward_backward, train_step

B, N, WORDS, KEPT, E = 8, 10, 9, 4, 6

class Pair(nn.Module):
    "Two small towers and a temperature; the image's drops 30 % of its tokens, keyed by each sample's `draw`."
    def __init__(self, dropout=0.):
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.place, self.head = nn.Linear(5, 12), nn.Parameter(torch.randn(N, 12)), nn.Linear(12, E)
        self.words, self.drop = nn.Embedding(30, E), nn.Dropout(dropout)
        self.logit_scale = nn.Parameter(torch.tensor(1.))

    def encode_image(self, x_bNP, normalize=False, draw=None):
        x_bND = F.gelu(self.patch(x_bNP) + self.place)
        if self.training:
            ids_bK = keyed_uniform(draw, 'image tokens', N).argsort(dim=1, stable=True)[:, :7].sort(1).values
            x_bND = x_bND.gather(1, ids_bK[..., None].expand(-1, -1, 12))
        return self.head(self.drop(x_bND.mean(1)))

    def encode_text(self, ids_bT, normalize=False, draw=None): return self.words(ids_bT).tanh().sum(1)

class Projected(nn.Module):
    "Contrast from images to texts, and a trained projector whose term needs no other sample."
    needs = ('image', 'text', 'draw', 'valid')
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.projector = nn.Sequential(nn.Linear(E, E), nn.Linear(E, E))
        self.weight = nn.Parameter(torch.tensor(0.5)) # acts in the loss alone

    def features(self, model, batch):
        image, text = (F.normalize(z, dim=-1) for z in (model.encode_image(batch['image'], draw=batch['draw']), model.encode_text(batch['text'])))
        return dict(image=image, text=text, projected=self.projector(image))

    def loss(self, features, model, batch, comm=LOCAL):
        valid_b, text_BE, b = batch['valid'], comm.gather(features['text']), len(features['image'])
        logits_bB = model.logit_scale.exp() * features['image'] @ text_BE.T
        own_b = comm.rank * b + torch.arange(b)
        off_bB = ~comm.gather(valid_b) & (torch.arange(len(text_BE)) != own_b[:, None])
        rows_b = F.cross_entropy(logits_bB.masked_fill(off_bB, -torch.inf), own_b, reduction='none')
        miss_b = (features['projected'] - features['text']).square().sum(1)
        contrast, miss = row_mean(rows_b, valid_b, comm), row_mean(miss_b, valid_b, comm)
        return dict(loss=contrast + self.weight.square() * miss, contrast=contrast, miss=miss)

def batch_of(step, comm=LOCAL, invalid=()):
    "This rank's share of a step's batch; the caption keeps words drawn by the sample's `draw`, in order."
    position = torch.arange(step * B, step * B + B)
    g = torch.Generator().manual_seed(step)
    draw, words = draws_of(3, position), torch.randint(0, 30, (B, WORDS), generator=g)
    kept = keyed_uniform(draw, 'text', WORDS).argsort(dim=1, stable=True)[:, :KEPT].sort(1).values
    valid = ~torch.isin(torch.arange(B), torch.tensor(invalid, dtype=torch.long))
    image = torch.randn(B, N, 5, generator=g).double() * valid[:, None, None]
    batch = dict(image=image, text=words.gather(1, kept), draw=draw, valid=valid)
    return {k: v.chunk(comm.size)[comm.rank] for k, v in batch.items()}

def task_of(dropout=0.): return Task(Pair(dropout), Projected()).double().train()

def run(comm, chunks=1, start=0, steps=6, state=None, stop=None, dropout=0., ema=0.9):
    "The trace of a run, and what a checkpoint at its end holds."
    task, trace, last, got = task_of(dropout), [], {}, []
    cfg = TrainConfig(steps=steps, lr=3e-2, schedule=Cosine(warmup=2), chunks=chunks, ema=ema, log_every=1, save_every=stop or 0)
    optimizer, average = AdamW(weight_decay=0.1).build(task, cfg.lr), make_ema(task.model, cfg.ema)
    if state: unpack(state, task, optimizer, average)
    def log(**row): trace.append({k: v for k, v in row.items() if k in ('step', 'train/loss', 'train/contrast', 'train/grad_norm', 'seen')})
    def save(step): last.update(pack(task, optimizer, average))
    def progress(n, row):
        if trace[-1]['step'] == stop: got.append(signal.SIGTERM)
    def seen(model, comm): return dict(seen=float(model.patch.weight.detach().sum()))
    batches = (batch_of(s, comm, invalid=(s % B, 5)) for s in range(start, steps))
    try:
        fit(comm.wrap(task), task, batches, optimizer, cfg, start=start, comm=comm, ema=average, log=log, save=save,
            progress=progress, got=got, evals=dict(seen=seen), check=lambda: same_gradients(task, comm))
    except Stopped: pass
    return trace, last

# --- an objective's own weights

def one_step(rules=(), weight_decay=0.1, lr=1e-2):
    task = task_of()
    before = {n: p.detach().clone() for n, p in task.named_parameters()}
    optimizer = AdamW(weight_decay=weight_decay).build(task, lr, rules)
    cfg = TrainConfig(steps=2, lr=lr, schedule=Constant())
    train_step(task, task, batch_of(0), optimizer, 0, cfg)
    return before, dict(task.named_parameters()), optimizer, task

def test_an_objectives_weights_are_trained():
    before, after, _, _ = one_step()
    still = [n for n in before if torch.equal(before[n], after[n])]
    assert not still and {'objective.weight', 'objective.projector.0.weight', 'model.patch.weight'} <= set(after)

def test_an_objectives_matrices_decay():
    before, plain, _, _ = one_step(weight_decay=0.)
    _, decayed, _, _ = one_step(weight_decay=0.5)
    for name, shrinks in (('objective.projector.0.weight', True), ('objective.projector.0.bias', False), ('objective.weight', False), ('model.patch.weight', True)):
        want = before[name] * 1e-2 * 0.5 * shrinks
        torch.testing.assert_close(plain[name] - decayed[name], want, rtol=1e-6, atol=1e-12, msg=name)

def test_an_objectives_weights_are_frozen_by_name():
    before, after, optimizer, task = one_step(rules=[('objective.projector.*', 'frozen'), ('patch.*', 'frozen')])
    still = {n for n in before if torch.equal(before[n], after[n])}
    assert still == {n for n in before if n.startswith(('objective.projector', 'model.patch'))}
    assert not [k for k in pack(task, optimizer) if k.startswith(('optimizer.exp_avg.objective.projector', 'optimizer.exp_avg.patch'))]

def test_an_objectives_weights_are_packed_and_restored():
    _, _, optimizer, task = one_step()
    packed = pack(task, optimizer)
    assert {'objective.projector.0.weight', 'objective.weight', 'optimizer.exp_avg.objective.weight', 'optimizer.exp_avg.patch.weight'} <= set(packed)
    twin = task_of(); again = AdamW(weight_decay=0.1).build(twin, 1e-2)
    unpack(packed, twin, again)
    for t, o in ((task, optimizer), (twin, again)): train_step(t, t, batch_of(1), o, 1, TrainConfig(steps=2, lr=1e-2))
    for (n, p), q in zip(task.named_parameters(), twin.parameters()): assert torch.equal(p, q), n

def gradients(comm, chunks):
    task = task_of()
    forward_backward(comm.wrap(task), task, batch_of(0, comm, invalid=(0, 1, 6)), comm, chunks)
    same_gradients(task, comm)
    return {n: p.grad for n, p in task.named_parameters()}

@pytest.mark.parametrize('chunks', [1, 2])
def test_an_objectives_weights_are_reduced_across_ranks(chunks):
    "Also where ranks have different numbers of valid rows: none on the first of four, both on others."
    want = gradients(LOCAL, 1)
    for n in (2, 4):
        for got in spawn(gradients, n, chunks):
            assert set(got) == set(want)
            for name in want: torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12, msg=f'{n} ranks, {name}')

@pytest.mark.parametrize('chunks', [2, 3, 8])
def test_chunks_with_different_numbers_of_valid_rows_are_exact(chunks):
    "With 8 chunks three of them hold no valid row at all."
    for name, got in (whole := gradients(LOCAL, 1)).items():
        torch.testing.assert_close(gradients(LOCAL, chunks)[name], got, rtol=1e-10, atol=1e-12, msg=name)
    assert all(p.isfinite().all() and p.abs().sum() > 0 for p in whole.values())

# --- chance does not know how many ranks there are

def assert_same(a, b, what):
    assert [r['step'] for r in a] == [r['step'] for r in b]
    for x, y in zip(a, b):
        assert set(x) == set(y)
        for k in x: assert x[k] == pytest.approx(y[k], rel=1e-10, abs=1e-10), (what, x['step'], k)

def test_a_trace_is_the_same_on_any_number_of_ranks_and_after_a_resume_on_another():
    "30 % of the image tokens dropped, random words, float64; weights, moments and average at the end too."
    alone, end = run(LOCAL)
    assert alone[0]['train/loss'] != pytest.approx(alone[-2]['train/loss'], rel=1e-3), 'it learns something'
    halves = {n: spawn(run, n, 1, 0, 6, None, 3)[0][1] for n in (1, 2)}
    for n in (1, 2, 4):
        for chunks in (1, 2):
            trace, last = spawn(run, n, chunks)[0]
            assert_same(trace, alone, f'{n} ranks, {chunks} chunks')
            for k in end: torch.testing.assert_close(last[k], end[k], rtol=1e-8, atol=1e-10, msg=f'{n} ranks, {chunks} chunks, {k}')
        half = halves[1 if n > 1 else 2] # stopped after three steps on another number of ranks
        trace, last = spawn(run, n, 2, 3, 6, half)[0]
        assert_same(trace, [r for r in alone if r['step'] > 3], f'resumed on {n} ranks')
        for k in end: torch.testing.assert_close(last[k], end[k], rtol=1e-8, atol=1e-10, msg=f'resumed on {n} ranks, {k}')

def test_another_draw_is_another_run():
    "What the test above compares depends on `draw`: it would notice one that is keyed by the rank."
    task = task_of()
    losses = {seed: float(task.loss(task(b := dict(batch_of(0), draw=draws_of(seed, torch.arange(B)))), b)['loss'].detach()) for seed in (3, 4)}
    assert abs(losses[3] - losses[4]) > 1e-3

class Words:
    "A tokenizer in miniature: the caption's words by number, some of them drawn by `draw` and kept in order."
    context_length = KEPT
    def __call__(self, texts, context_length=None, strategy=None, draw=None):
        rows = []
        for text, u in zip(texts, keyed_uniform(draw, 'text', WORDS)):
            ids = torch.tensor([zlib.crc32(w.encode()) % 30 for w in text.split()] or [0])
            rows.append(F.pad(ids[u[:len(ids)].argsort(stable=True)[:KEPT].sort().values], (0, KEPT))[:KEPT])
        return torch.stack(rows)

class Noise(Source):
    "Pictures of noise in memory, one of which is broken."
    n = 24
    def read(self, i):
        rng, file = np.random.default_rng(i), io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(file, 'PNG')
        words = rng.integers(0, 1000, WORDS)
        return dict(image=b'no picture' if i == 13 else file.getvalue(), text=' '.join(map(str, words)), json={})

class Patches(Pair):
    "The image tower over ten patches of 10×10 pixels."
    def encode_image(self, image, normalize=False, draw=None):
        pixels = image.double().unfold(2, 10, 10).unfold(3, 10, 10).flatten(2, 3).mean((-1, -2)).transpose(1, 2)[:, :N]
        return super().encode_image(torch.cat([pixels, pixels[..., :2]], -1) / 255, draw=draw)

def chain(comm, chunks=1, start=0, steps=5, state=None):
    "A run on real batches: crops, words and dropped tokens all by `draw`."
    task, trace, last = Task(Patches(), Projected()).double().train(), [], {}
    data = Batches(Noise(), Words(), Transform(40, scale=(0.4, 1.)), B, seed=2, rank=comm.rank, size=comm.size, limit=0.5)
    cfg = TrainConfig(steps=steps, lr=3e-2, chunks=chunks, log_every=1)
    optimizer = AdamW().build(task, cfg.lr)
    if state: unpack(state, task, optimizer)
    def log(**row): trace.append({k: row[k] for k in ('step', 'train/loss', 'train/grad_norm')})
    def save(step): last.update(pack(task, optimizer))
    batches = [data[s] for s in range(start, steps)]
    fit(comm.wrap(task), task, batches, optimizer, cfg, start=start, comm=comm, log=log, save=save)
    return trace, last, sum(int((~b['valid']).sum()) for b in batches)

def test_the_whole_chain_is_the_same_on_any_number_of_ranks():
    "Batches from a source with an unreadable sample; the ranks that meet it have fewer valid rows than the others."
    alone, end, missing = chain(LOCAL)
    assert missing == 2, 'the broken picture is met twice in five batches'
    for n, chunks in ((2, 1), (2, 4), (4, 1), (4, 2)):
        answers = spawn(chain, n, chunks)
        assert_same(answers[0][0], alone, f'{n} ranks, {chunks} chunks')
        assert sum(a[2] for a in answers) == missing

def small_clip():
    tower = Tower(16, 1, 2, 32)
    return build_clip(ModelConfig(image=tower, text=tower, embed_dim=8, image_size=16, patch=4, context_length=6, vocab_size=50))

def test_who_draws_for_itself():
    class Foreign(nn.Module): pass
    assert not draws_itself(Task(small_clip(), Contrastive())) and not draws_itself(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.)))
    assert draws_itself(nn.Sequential(nn.Dropout(0.1))) and draws_itself(nn.MultiheadAttention(4, 2, dropout=0.1)) and draws_itself(nn.Sequential(Foreign()))

def test_towers_of_this_package_leave_the_default_generators_alone():
    "Neither seeded nor drawn from; with dropout of another make both."
    batch = dict(image=torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8), text=torch.randint(1, 50, (4, 6)), draw=draws_of(0, torch.arange(4)))
    def states(extra):
        model = small_clip(); model.extra = extra
        task = Task(model.train(), Contrastive())
        torch.manual_seed(7); before = torch.get_rng_state()
        fit(task, task, [batch] * 2, AdamW().build(task, 1e-3), TrainConfig(steps=2))
        return before, torch.get_rng_state()
    assert torch.equal(*states(None)) and not torch.equal(*states(nn.Dropout(0.1)))

def test_dropout_of_another_make_resumes_exactly():
    (whole, end), (_, half) = run(LOCAL, dropout=0.3), run(LOCAL, dropout=0.3, stop=3)
    rest, last = run(LOCAL, start=3, state=half, dropout=0.3)
    assert [r for r in whole if r['step'] > 3] == rest and all(torch.equal(end[k], last[k]) for k in end)
    assert whole[0]['train/loss'] != run(LOCAL)[0][0]['train/loss'], 'dropout is on'

# --- the moving average

def test_the_average_follows_evaluations_see_it_and_a_resume_continues_it():
    whole, end = run(LOCAL, ema=0.8)
    _, half = run(LOCAL, ema=0.8, stop=3)
    rest, last = run(LOCAL, start=3, state=half, ema=0.8)
    assert [r for r in whole if r['step'] > 3] == rest and all(torch.equal(end[k], last[k]) for k in end)
    packs = [run(LOCAL, ema=0.8, stop=s)[1] for s in range(1, 6)] + [end]
    by_hand = packs[0]['model.patch.weight'].clone() # the first update takes the weights as they are
    for p in packs[1:]: by_hand = 0.8 * by_hand + 0.2 * p['model.patch.weight']
    torch.testing.assert_close(end['ema.module.patch.weight'], by_hand, rtol=1e-12, atol=1e-12)
    assert int(end['ema.n_averaged']) == 6 and whole[-1]['seen'] == float(end['ema.module.patch.weight'].sum()) != float(end['model.patch.weight'].sum())

def test_a_run_without_an_average_evaluates_the_model():
    trace, end = run(LOCAL, ema=0.)
    assert not [k for k in end if k.startswith('ema.')] and trace[-1]['seen'] == float(end['model.patch.weight'].sum())

def test_an_average_that_is_forgotten_is_refused():
    task = task_of(); optimizer = AdamW().build(task, 1e-3)
    for decay, given in ((0.9, None), (0., make_ema(task.model, 0.9))):
        with pytest.raises(ValueError, match='use make_ema'): fit(task, task, [batch_of(0)], optimizer, TrainConfig(steps=1, ema=decay), ema=given)
    assert make_ema(task.model, 0.) is None and evaluated(task.model) is task.model
    for bad in (1., -0.1, math.nan):
        with pytest.raises(UserError, match='ema .*: expected 0'): TrainConfig(ema=bad)

def test_the_average_is_no_part_of_the_training():
    ema = make_ema(small_clip().train(), 0.9)
    assert not ema.module.training and not any(p.requires_grad for p in ema.parameters())

# --- one agreement before the first step, none inside a step

@pytest.mark.parametrize('changes, says', [
    (dict(draw=None, valid=None), "the objective needs draw, valid, and the batch has image, text: choose data"),
    (dict(draw=torch.zeros(B)), "entry 'draw' of the batch: expected a tensor of torch.int64"),
    (dict(valid=torch.ones(B, dtype=torch.int64)), "entry 'valid' of the batch: expected a tensor of torch.bool"),
    (dict(valid=[True] * B), "entry 'valid' of the batch: expected a tensor of torch.bool"),
    (dict(text=torch.zeros(B - 1, KEPT).long()), 'differ in length .*image 8, text 7'),
    (dict(epoch=3), "entry 'epoch' of the batch is one int")])
def test_a_first_batch_that_cannot_be_trained_on(changes, says):
    batch = {k: v for k, v in {**batch_of(0), **changes}.items() if v is not None}
    task = task_of(); before = [p.detach().clone() for p in task.parameters()]
    with pytest.raises(UserError, match=says): first_look(task, batch, TrainConfig())
    with pytest.raises(UserError, match=says): fit(task, task, [batch], AdamW().build(task, 1e-3), TrainConfig(steps=1))
    assert all(torch.equal(p, q) for p, q in zip(task.parameters(), before))

def test_more_chunks_than_samples_are_refused_before_the_first_step():
    task = task_of()
    with pytest.raises(UserError, match='8 samples cannot be accumulated in 9 chunks: use 1 to 8'): first_look(task, batch_of(0), TrainConfig(chunks=9))
    first_look(task, batch_of(0), TrainConfig(chunks=8))

class Rowwise(Projected):
    "Needs no other sample and no other rank: whatever is asked of the comm is the loop's doing."
    def loss(self, features, model, batch, comm=LOCAL):
        z = features['projected'] - features['text'] - features['image']
        return dict(loss=(z.square().sum(1) * model.logit_scale.exp() * self.weight).mean())

def questions(comm, steps, told_at, save_every):
    "Collectives of a run, in which the last rank is told to stop, and the steps after which it saved."
    task = Task(Pair(), Rowwise()).double()
    wrapped, got, saved, cfg = comm.wrap(task), [], [], TrainConfig(steps=steps, lr=1e-3, log_every=0, save_every=save_every)
    def progress(n, row):
        progress.done += 1
        if progress.done == told_at and comm.rank == comm.size - 1: got.append(signal.SIGTERM)
    progress.done, before = 0, comm.calls
    try: fit(wrapped, task, (batch_of(s, comm) for s in range(steps)), AdamW().build(task, 1e-3), cfg, comm=comm, got=got, save=saved.append, progress=progress)
    except Stopped as e: saved.append(str(e))
    return comm.calls - before, saved

def test_several_ranks_ask_every_twenty_steps_and_before_a_checkpoint():
    assert ASK_EVERY == 20
    for told_at, save_every, calls, saved in ((0, 0, 1 + 2 + 1 + 1, [45]), # one agreement; asked after 20 and 40, and at the end; one row
                                              (3, 0, 1 + 1, [20, 'SIGTERM']), # heard at the next question
                                              (3, 8, 1 + 1, [8, 'SIGTERM'])): # a checkpoint is due before it
        assert spawn(questions, 2, 45, told_at, save_every) == [(calls, saved)] * 2

def test_a_step_asks_nothing_of_the_other_ranks():
    def step(comm):
        task = Task(Pair(), Rowwise()).double(); wrapped, optimizer, before = comm.wrap(task), AdamW().build(task, 1e-3), comm.calls
        for chunks in (1, 2): train_step(wrapped, task, batch_of(0, comm), optimizer, 0, TrainConfig(steps=2, chunks=chunks), comm)
        return comm.calls - before
    assert spawn(step, 2) == [0, 0]

# --- rows of the log, evaluations, and stopping

def test_the_meter_counts_valid_samples():
    meter = Meter()
    with meter.waiting(): time.sleep(0.01)
    for invalid in ((0,), (0, 1, 2)): meter.count(batch_of(0, invalid=invalid))
    meter.count(dict(image=torch.zeros(128, 1))) # a batch that says nothing about it
    assert int(meter.samples) == 7 + 5 + 128 and meter.steps == 3
    row = meter.row({'loss': torch.tensor(0.5)}, lr=1e-3)
    assert list(row) == ['train/loss', 'train/lr', 'train/samples_per_second', 'train/data_time', 'train/batch_time']
    assert (row['train/loss'], row['train/lr']) == (0.5, 1e-3) and row['train/data_time'] >= 0.01 / 3 and row['train/batch_time'] >= row['train/data_time']
    assert row['train/samples_per_second'] * row['train/batch_time'] * 3 == pytest.approx(140)
    assert (meter.samples, meter.steps, meter.waited) == (0, 0, 0.)

def test_a_row_holds_means_over_ranks_and_everybodys_samples():
    def rows(comm):
        meter = Meter(); meter.count(batch_of(0, comm, invalid=(0, 1, 6)))
        row = meter.row(dict(loss=torch.tensor(0.1 + comm.rank, dtype=torch.float64)), 1e-3, comm)
        return row['train/loss'], row['train/samples_per_second'] * row['train/batch_time']
    for loss, samples in spawn(rows, 2): assert loss == pytest.approx(0.6, rel=1e-14) and samples == pytest.approx(5)
    assert average({'loss': torch.tensor(0.5)}) == {'loss': torch.tensor(0.5)}

@pytest.mark.parametrize('other, says', [({'val/b': 2.}, ''), ({'val/a': 1.}, "evaluations 'first' and 'second' both return 'val/a'")])
def test_two_evaluations_never_share_a_key(other, says):
    "One row holds all numbers, so a second owner of a key would replace the first in silence; refused or not, the model trains on."
    model = nn.Linear(2, 2).train(); evals = dict(first=lambda model, comm: {'val/a': 1.}, second=lambda model, comm: other)
    if says:
        with pytest.raises(UserError, match=says): run_evals(evals, model)
    else: assert run_evals(evals, model) == {'val/a': 1., 'val/b': 2.}
    assert model.training

def test_when_things_are_due():
    assert [s for s in range(1, 11) if due(s, 3, s == 10)] == [3, 6, 9, 10] and [s for s in range(1, 11) if due(s, 0, s == 10)] == [10]

def test_a_run_is_stopped_after_a_checkpoint_and_says_when_data_end():
    kept, told = [], []
    def run(**options):
        task = task_of(); kept.clear(); told.clear()
        optimizer, cfg = AdamW().build(task, 1e-3), TrainConfig(steps=3, log_every=2)
        return fit(task, task, map(batch_of, range(3)), optimizer, cfg, save=kept.append, progress=lambda n, row: told.append(bool(row)), **options)
    with pytest.raises(Stopped, match='SIGINT') as e: run(got=[signal.SIGINT])
    assert kept == [1] and e.value.signum == signal.SIGINT and repr(e.value) == "Stopped('SIGINT')"
    assert run() == 3 and kept == [3] and told == [False, True, True]
    with pytest.raises(StopIteration): run(start=-1) # one batch too few: nothing is hidden
    with interrupts() as got: os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.01)
    assert got == [signal.SIGTERM] and agree_to_stop(got) == signal.SIGTERM and agree_to_stop([]) == 0

def test_a_second_interrupt_is_immediate():
    with pytest.raises(KeyboardInterrupt), interrupts() as got:
        for _ in range(2): os.kill(os.getpid(), signal.SIGINT); time.sleep(0.01)
    assert got == [signal.SIGINT]

def test_checkpoints_are_written_without_being_asked():
    "A stage of a day must not be lost because nobody set `save_every`."
    assert TrainConfig().save_every == 1000

def test_a_training_configuration_goes_through_json():
    cfg = TrainConfig(schedule=Constant(warmup=3), ema=0.9)
    assert TrainConfig.from_json(cfg.to_json()) == cfg and cfg.set('schedule.warmup', '7').schedule == Constant(warmup=7)
