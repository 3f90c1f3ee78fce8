"Plain and streamed, on one process and on several, are one function; what is not a batch of pairs is refused on all ranks."
import contextlib, json, math, pathlib, runpy, sys
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from clipa_nb import infonce
from clipa_nb.core import LOCAL, UserError, generator
from clipa_nb.distributed_trainer import Ranks, spawn
from clipa_nb.infonce import OBJECTIVES, Contrastive, ContrastiveConfig, Objective, ObjectiveConfig, Sigmoid, SigmoidConfig, auto_chunk, clamp_scale, contrastive, info_nce, row_mean, sigmoid_loss, targets

E = 5
close = dict(rtol=1e-12, atol=1e-12)
FORMS = { # a form, and what makes it: two losses, keys, smoothing, tiles that divide the batch, that do not, and that exceed it
    'plain': dict(), 'streamed': dict(chunk=3), 'ragged': dict(chunk=5), 'one tile': dict(chunk=100), 'tiles of one': dict(chunk=1),
    'key': dict(key=True), 'key, streamed': dict(key=True, chunk=5), 'smoothed': dict(label_smoothing=0.1), 'smoothed, streamed': dict(label_smoothing=0.1, chunk=5),
    'key, smoothed': dict(key=True, label_smoothing=0.2), 'key, smoothed, streamed': dict(key=True, label_smoothing=0.2, chunk=2),
    'sigmoid': dict(bias=-10.), 'sigmoid, streamed': dict(bias=-10., chunk=5), 'sigmoid, key': dict(bias=-2., key=True), 'sigmoid, key, streamed': dict(bias=-2., key=True, chunk=5),
}

def features(b, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(b, E, generator=g, dtype=torch.float64), dim=1).to(dtype) for _ in range(2)]

def found(image, text, form, key=None, comm=LOCAL, scale=100.):
    "All values of the loss and the gradients of images, texts, scale and, where there is one, bias."
    form = dict(form); bias, keyed = form.pop('bias', None), form.pop('key', False)
    x = [v.detach().clone().requires_grad_() for v in (image, text)]
    numbers = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (scale, bias) if v is not None]
    out = (info_nce if bias is None else sigmoid_loss)(*x, *numbers, key=key if keyed else None, comm=comm, **dict(dict(check=True), **form))
    out['loss'].backward()
    return torch.stack([v.detach() for v in out.values()]), [v.grad for v in x], [v.grad for v in numbers]

def same(a, b):
    for p, q in zip((a[0], *a[1], *a[2]), (b[0], *b[1], *b[2]), strict=True): torch.testing.assert_close(p, q, **close)

# -- by hand ------------------------------------------------------------------------------------------------------------------

HAND = torch.tensor([[0.9, 0.1, 0.3, 0.0], [0.2, 0.8, 0.1, 0.4], [0.5, 0.1, 0.6, 0.2], [0.0, 0.3, 0.2, 0.7]], dtype=torch.float64) # chapter 10's four pairs
AXES, OWN = torch.eye(4, dtype=torch.float64), torch.arange(4) # texts whose products with the rows are the rows

def pays(row, partner): return math.log(sum(math.exp(5 * c) for c in row)) - 5 * row[partner]
BY_ROWS, BY_COLS = ([pays(row, i) for i, row in enumerate(m.tolist())] for m in (HAND, HAND.T))

@pytest.mark.parametrize('form', [dict(), dict(chunk=3), dict(chunk='auto'), dict(key=torch.arange(4)), dict(key=torch.arange(4), chunk=3)])
def test_four_pairs_pay_what_they_pay_by_hand(form):
    for scale in (5., torch.tensor([5.])):
        out = info_nce(HAND, AXES, scale, **form)
        for name, rows in (('loss_image', BY_ROWS), ('loss_text', BY_COLS), ('loss', BY_ROWS + BY_COLS)): assert out[name].item() == pytest.approx(sum(rows) / len(rows), abs=1e-12)
    assert info_nce(0 * HAND, AXES, 5., **form)['loss'].item() == pytest.approx(math.log(4), abs=1e-12)

def sigmoid_by_hand(c, scale, bias):
    "The share of the partners and of all others."
    terms = [[math.log1p(math.exp((-1 if i == j else 1) * (scale * v + bias))) for j, v in enumerate(row)] for i, row in enumerate(c.tolist())]
    own = sum(terms[i][i] for i in range(len(terms)))
    return own / len(terms), (sum(map(sum, terms)) - own) / len(terms)

@pytest.mark.parametrize('chunk', [None, 3])
def test_four_pairs_pay_the_sigmoid_loss_by_hand(chunk):
    out, (positive, negative) = sigmoid_loss(HAND, AXES, 5., -2., chunk=chunk), sigmoid_by_hand(HAND, 5., -2.)
    assert out['loss_positive'].item() == pytest.approx(positive, abs=1e-12) and out['loss_negative'].item() == pytest.approx(negative, abs=1e-12)
    assert out['loss'].item() == pytest.approx(positive + negative, abs=1e-12)
    n = 64; out = sigmoid_loss(torch.eye(n, 2 * n), torch.eye(2 * n)[n:], 10., 0., chunk=chunk)
    assert out['loss_negative'].item() == pytest.approx(63 * math.log(2), rel=1e-5) and sigmoid_by_hand(torch.zeros(n, n), 10., 0.)[1] == pytest.approx(63 * math.log(2), rel=1e-9)

def test_index_and_distribution_are_one_loss_to_the_last_digit():
    s = 5 * HAND.float()
    assert torch.equal(contrastive(s, s.T, OWN, OWN)['loss'], contrastive(s, s.T, torch.eye(4), torch.eye(4))['loss'])
    assert torch.equal(contrastive(HAND, HAND, OWN.int(), OWN)['loss'], contrastive(HAND, HAND, OWN, OWN)['loss'])
    for goal in (torch.eye(4), OWN.int(), (3 * HAND).softmax(1).bfloat16()): contrastive(HAND, HAND, goal, goal, check=True)

@pytest.mark.parametrize('goal, words', [
    (torch.arange(3), r'\(3,\) of torch.int64, expected 4 integers'), (torch.eye(3), r'\(3, 3\) of torch.float32, expected 4 integers'), (torch.ones(4), r'\(4,\) of torch.float32, expected 4 integers'),
    (torch.ones(4) > 0, r'\(4,\) of torch.bool, expected 4 integers'), ([0, 1, 2, 3], 'Tensor and list, expected tensors'), (torch.arange(1, 5), 'row 3 is neither'), (torch.ones(4, 4), 'row 0 is neither')])
def test_targets_that_are_none(goal, words):
    with pytest.raises(UserError, match=words): contrastive(HAND, HAND, goal, OWN, check=True)
    with pytest.raises(UserError, match=r'similarities of the texts: \(4, 4\) of torch.int64'): contrastive(HAND, HAND.long(), OWN, OWN)

def test_related_systems_change_one_part():
    "Columns without rows cost more; FILIP's two matrices are no transposes, and with one token a side they are InfoNCE's."
    s, g = 5 * HAND.float(), generator(0, 'general form')
    hard = torch.cat([s, torch.full((4, 2), 4.)], 1)
    assert contrastive(hard, s.T, OWN, OWN)['loss_image'] > contrastive(s, s.T, OWN, OWN)['loss_image']
    teacher = (s + torch.randn(4, 4, generator=g)).softmax(1)
    assert contrastive(s, s.T, teacher, teacher.T / teacher.T.sum(1, keepdim=True), check=True)['loss_image'] >= -(teacher * teacher.log()).sum(1).mean()
    patches, tokens = (F.normalize(torch.randn(4, n, 8, generator=g), dim=-1) for n in (6, 3))
    pairs = torch.einsum('inE,jtE->ijnt', patches, tokens)
    by_patch, by_word = pairs.amax(3).mean(2), pairs.amax(2).mean(2).T
    assert not torch.equal(by_patch, by_word.T)
    torch.testing.assert_close(pairs[:, :, :1, :1].amax(3).mean(2), torch.einsum('iE,jE->ij', patches[:, 0], tokens[:, 0]))

# -- captions that several pairs share ----------------------------------------------------------------------------------------

TWINS = torch.eye(4, dtype=torch.float64); TWINS[0, 1] = TWINS[1, 0] = 1.
TWIN_KEY = torch.tensor([7, 7, 8, 9])

def test_no_model_pays_less_than_the_captions_it_cannot_tell_apart():
    for form in (dict(), dict(key=TWIN_KEY), dict(chunk=3), dict(key=TWIN_KEY, chunk=3)): assert info_nce(TWINS, AXES, 100., **form)['loss'].item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    assert contrastive(100 * TWINS, 100 * TWINS.T, OWN, OWN)['loss'].item() == pytest.approx(math.log(2) / 2, abs=1e-6)
    from clipa_nb import toyworld
    some = toyworld.scenes(toyworld.WORLDS['demo'], 0, range(512))
    _, times = torch.from_numpy(toyworld.keys(some, toyworld.captions(some))).unique(return_counts=True)
    assert 0 < float((times * times.log()).sum()) / 512 < math.log(512)

def test_keys_pull_twins_together_and_partners_alone_push_them_apart():
    def push(right, c):
        s = TWINS.clone(); s[0, 1] = s[1, 0] = c
        s.requires_grad_(); contrastive(10 * s, 10 * s.T, right, right)['loss'].backward()
        return s.grad[0, 1].item()
    keyed = targets(TWIN_KEY, dtype=torch.float64)
    for c in (0.4, 0.6, 0.9): assert push(OWN, c) > 0 > push(keyed, c)
    assert push(OWN, 0.9) > push(OWN, 0.6) and push(keyed, 1.) == pytest.approx(0, abs=1e-3)

def test_targets_of_a_tile_are_those_of_the_matrix():
    keyed, diagonal, all_of = infonce._Targets(4, TWIN_KEY, LOCAL), infonce._Targets(4, None, LOCAL), slice(0, 4)
    assert torch.equal(1 / keyed.count_B, targets(TWIN_KEY).amax(1)) and diagonal.count_B is None
    assert torch.equal(targets(torch.arange(4)), torch.eye(4)) and torch.equal(targets(TWIN_KEY).sum(1), torch.ones(4))
    for kind in (torch.int32, torch.uint8): assert torch.equal(infonce._Targets(4, TWIN_KEY.to(kind), LOCAL).key_B, TWIN_KEY)
    assert torch.equal(diagonal.tile(slice(1, 3), slice(0, 3)), torch.tensor([[False, True, False], [False, False, True]]))
    assert diagonal.tile(slice(0, 2), slice(2, 4)) is None
    assert torch.equal(infonce._Targets(4, None, Ranks(1, 2)).tile(all_of, slice(4, 8)), torch.eye(4, dtype=torch.bool))
    assert torch.equal(keyed.weights(all_of, all_of, torch.float32), targets(TWIN_KEY)) and torch.equal(keyed.tile(all_of, all_of), TWIN_KEY[:, None] == TWIN_KEY)
    assert torch.equal(diagonal.weights(slice(0, 2), slice(0, 2), torch.float32), torch.eye(2, dtype=torch.bool))

# -- precision, and the parts of the streamed form ----------------------------------------------------------------------------

def test_bf16_similarities_cost_more_than_bf16_features():
    g = generator(0, 'bf16')
    image = F.normalize(torch.randn(128, 64, generator=g).repeat(2, 1) + 0.3 * torch.randn(256, 64, generator=g), dim=1)
    text = F.normalize(image + 0.01 * torch.randn(256, 64, generator=g), dim=1)
    def loss_of(s): return contrastive(s, s.T, torch.arange(256), torch.arange(256))['loss'].item()
    exact, rounded = loss_of(100 * image @ text.T), loss_of(100 * image.bfloat16().float() @ text.bfloat16().float().T)
    assert abs(rounded - exact) < abs(loss_of((100 * image @ text.T).bfloat16()) - exact) / 5
    assert [torch.tensor(v).bfloat16().item() for v in (98.6, 99., 99.2, 99.4)] == [98.5, 99., 99., 99.5]

def test_products():
    assert infonce.widens('cpu') is False
    out = torch.ones(4, 4, dtype=torch.float64); infonce._add_product(out, HAND, AXES)
    assert torch.equal(out, HAND + 1) and torch.equal(infonce._product(HAND, AXES), HAND)
    a, b = (torch.randn(n, 3, dtype=torch.float64, generator=generator(0, str(n))).requires_grad_() for n in (4, 5))
    assert torch.autograd.gradcheck(infonce._Product.apply, (a, b))
    torch.testing.assert_close(infonce._scaled(5., a, b), 5 * infonce._Product.apply(a, b), **close)

def test_what_is_multiplied():
    unit = features(4)[0].float()
    image, text, wide = infonce._to_multiply(unit.bfloat16(), unit)
    assert (image.dtype, text.dtype, wide) == (torch.float32,) * 3 and infonce._to_multiply(unit.bfloat16(), unit.bfloat16())[2] == torch.float32
    assert infonce._side('auto', unit, LOCAL) is None and infonce._side(7, unit, LOCAL) == 7

def test_sums_are_taken_in_parts():
    sums = infonce._Sums(1, torch.zeros((), dtype=torch.float64))
    for part in ([4.5, 0.5], [1.5, 7.]): sums.add(slice(0, 1), torch.tensor([part], dtype=torch.float64), 1)
    torch.testing.assert_close(sums.losses()[0], torch.tensor([4.5, 0.5, 1.5, 7.], dtype=torch.float64).logsumexp(0), **close)
    assert sums.top_n.item() == 7. and sums.total_n.item() == pytest.approx(sum(math.exp(v - 7) for v in (4.5, 0.5, 1.5, 7.)), rel=1e-12)

@pytest.mark.parametrize('n, m, chunk', [(3, 2, 2), (10, 14, 4), (4, 4, 3), (4, 4, 100)])
def test_tiles_cover_the_matrix_once_row_by_row(n, m, chunk):
    five, one = (torch.tensor(v, dtype=torch.float64) for v in (5., 1.))
    a, b = (torch.randn(k, 3, dtype=torch.float64, generator=generator(0, s)) for k, s in ((n, 'a'), (m, 'b')))
    seen, again, corners = torch.zeros(n, m), torch.zeros(n, m, dtype=torch.float64), []
    for rows, cols, s_hw in infonce._similarities(a, b, five, chunk, infonce._Targets(n, None, LOCAL), one):
        seen[rows, cols] += 1; again[rows, cols] = s_hw; corners.append((rows.start, cols.start))
        assert (rows.stop - rows.start, cols.stop - cols.start) == s_hw.shape
    assert (seen == 1).all() and corners == sorted(corners)
    torch.testing.assert_close(again, 5 * a @ b.T + 1, **close)

def merged(comm):
    rows, five = HAND.chunk(comm.size)[comm.rank], torch.tensor(5., dtype=torch.float64)
    right = infonce._Targets(len(rows), None, comm)
    _, of_cols = infonce._statistics(rows, AXES, five, right, 3)
    infonce._merge_columns(of_cols, right, comm)
    return of_cols.losses()[right.own]

def test_ranks_merge_the_sums_of_their_columns():
    torch.testing.assert_close(torch.cat(spawn(merged, 2)), torch.tensor(BY_COLS, dtype=torch.float64), **close)

def test_the_way_back_in_tiles_is_that_of_the_plain_form():
    half, five = (torch.tensor(v, dtype=torch.float64) for v in (0.5, 5.))
    right = infonce._Targets(4, None, LOCAL)
    of_rows, of_cols = infonce._statistics(HAND, AXES, five, right, 3)
    slope = infonce._slope(of_rows, of_cols, right, half, half, 0.)
    leaf = (5 * HAND).requires_grad_(); contrastive(leaf, leaf.T, OWN, OWN)['loss'].backward()
    torch.testing.assert_close(slope(slice(0, 4), slice(0, 4), 5 * HAND) / 4, leaf.grad, **close)
    image, text, scale = (v.clone().requires_grad_() for v in (HAND, AXES, five))
    info_nce(image, text, scale)['loss'].backward()
    d_image, d_text, d_scale, d_bias = infonce._pull(HAND, AXES, five, 3, slope, right, LOCAL)
    for got, want in ((d_image, image), (d_text, text), (d_scale, scale)): torch.testing.assert_close(got, want.grad, **close)
    assert d_bias is None

# -- one process ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('b', [1, 2, 12, 33])
@pytest.mark.parametrize('duplicates', [False, True])
def test_streamed_is_plain(b, duplicates):
    image, text = features(b)
    if duplicates: image, text = (torch.cat([x[:(b + 1) // 2], x[:b // 2]]) for x in (image, text))
    key = torch.arange(b) // 3
    for name, form in FORMS.items():
        if 'chunk' in form: same(found(image, text, form, key), found(image, text, {k: v for k, v in form.items() if k != 'chunk'}, key))

@pytest.mark.parametrize('scale', [1e-3, 1., 100.])
def test_plain_is_what_the_definition_says(scale):
    image, text = (x.clone().requires_grad_() for x in features(7))
    s, own = scale * image @ text.T, torch.arange(7)
    want = (F.cross_entropy(s, own, label_smoothing=0.1) + F.cross_entropy(s.T, own, label_smoothing=0.1)) / 2
    got, grads, _ = found(image, text, dict(label_smoothing=0.1), scale=scale)
    torch.testing.assert_close(got[0], want.detach(), **close)
    for p, q in zip(grads, torch.autograd.grad(want, (image, text))): torch.testing.assert_close(p, q, **close)
    z = 2 * torch.eye(7) - 1
    got = found(*features(7), dict(bias=-3.), scale=scale)[0]
    torch.testing.assert_close(got[0], -F.logsigmoid(z * (s.detach() - 3)).sum() / 7, **close)
    torch.testing.assert_close(got[0], got[1] + got[2], **close)

@pytest.mark.parametrize('loss', ['info_nce', 'sigmoid'])
def test_finite_differences(loss):
    image, text = (x.requires_grad_() for x in features(5))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3., -1.))
    key = torch.tensor([0, 1, 0, 2, 3])
    if loss == 'info_nce': assert torch.autograd.gradcheck(lambda *x: tuple(info_nce(*x, key=key, chunk=2, label_smoothing=0.1).values()), (image, text, scale))
    else: assert torch.autograd.gradcheck(lambda *x: tuple(sigmoid_loss(*x, key=key, chunk=2).values()), (image, text, scale, bias))

@pytest.mark.parametrize('chunk', [None, 5])
def test_distinct_keys_are_no_keys_to_the_last_digit(chunk):
    x = [v.float() for v in features(33)]
    for form in (dict(chunk=chunk), dict(chunk=chunk, label_smoothing=0.1)):
        with_keys, without = found(*x, dict(form, key=True), torch.randperm(33)), found(*x, form)
        for p, q in zip((with_keys[0], *with_keys[1], *with_keys[2]), (without[0], *without[1], *without[2])): assert torch.equal(p, q)

def distinct(comm):
    "Largest differences of the loss and the gradients between distinct keys and none, form by form."
    image, text = (v.float().chunk(comm.size)[comm.rank] for v in features(400 * comm.size)); key = 400 * comm.rank + torch.randperm(400)
    out = {}
    for name, form in dict(plain=dict(), streamed=dict(chunk=128), smoothed=dict(chunk=128, label_smoothing=0.1), sigmoid=dict(chunk=128, bias=-10.)).items():
        with_keys, without = (found(image, text, dict(form, key=k), key, comm) for k in (True, False))
        out[name] = max((p - q).abs().max().item() for p, q in zip((with_keys[0], *with_keys[1], *with_keys[2]), (without[0], *without[1], *without[2])))
    return out

@pytest.mark.parametrize('ranks', [2, 3])
def test_distinct_keys_are_no_keys_to_the_last_digit_on_ranks(ranks):
    for rank in spawn(distinct, ranks): assert set(rank.values()) == {0.}, rank

KINDS = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool]

@pytest.mark.parametrize('form', ['key', 'key, streamed', 'sigmoid, key', 'sigmoid, key, streamed'])
def test_keys_of_every_integer_type_are_the_same_keys(form):
    want = found(*features(12), FORMS[form], torch.arange(12) % 2)
    for kind in KINDS: same(found(*features(12), FORMS[form], (torch.arange(12) % 2).to(kind)), want)

def test_keys_of_different_types_on_ranks_are_the_same_keys():
    "A gather of two types aborts the process."
    def mixed(comm):
        image, text = features(12); key = (torch.arange(12) // 3).to(KINDS[comm.rank])
        return {name: found(share(image, comm), share(text, comm), form, share(key, comm), comm)[0] for name, form in FORMS.items() if 'key' in name}
    parts = spawn(mixed, 3, timeout=60)
    for name, form in FORMS.items():
        if 'key' in name: torch.testing.assert_close(torch.stack([p[name] for p in parts]).mean(0), found(*features(12), form, torch.arange(12) // 3)[0], **close)

def test_small_losses_survive_scale_100_in_fp32():
    "Sure rows have losses far below the rounding of a log-sum-exp near 100."
    image = F.normalize(torch.eye(8, dtype=torch.float64) + 0.8, dim=1)
    exact = found(image, image, dict())[0]
    assert 1e-7 < exact[0] < 1e-3
    for chunk in (None, 3): torch.testing.assert_close(found(image.float(), image.float(), dict(chunk=chunk))[0].double(), exact, rtol=2e-2, atol=0)

@pytest.mark.parametrize('chunk', [None, 3])
def test_the_two_directions_can_be_weighted(chunk):
    "The gradient of one direction alone, as a caller who uses only `loss_image` sees it."
    image, text = (x.requires_grad_() for x in features(7))
    own = torch.arange(7)
    for k, want in (('loss_image', F.cross_entropy(9 * image @ text.T, own)), ('loss_text', F.cross_entropy(9 * text @ image.T, own))):
        for p, q in zip(torch.autograd.grad(info_nce(image, text, 9., chunk=chunk)[k], (image, text)), torch.autograd.grad(want, (image, text))): torch.testing.assert_close(p, q, **close)

@pytest.mark.parametrize('chunk', [None, 3, 'auto'])
def test_low_precision_features_give_fp32_losses(chunk):
    image, text = features(9, dtype=torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        for out, want in ((info_nce(image, text, 100., chunk=chunk), info_nce(image.double(), text.double(), 100.)), (sigmoid_loss(image, text, 100., -10., chunk=chunk), sigmoid_loss(image.double(), text.double(), 100., -10.))):
            assert all(v.dtype == torch.float32 for v in out.values())
            torch.testing.assert_close(out['loss'].double(), want['loss'], rtol=1e-5, atol=1e-6)
    x = [v.requires_grad_() for v in (image, text)]
    info_nce(*x, torch.tensor(100.), chunk=chunk)['loss'].backward()
    assert all(v.grad.dtype == torch.bfloat16 and v.grad.isfinite().all() for v in x)

def test_the_wide_product_is_used_where_it_is(monkeypatch):
    "A device with a bf16 product into fp32, played by the CPU: features stay bf16, results and gradients are those of fp32 up to bf16's rounding of the slopes."
    image, text = features(33, dtype=torch.bfloat16)
    want = {name: found(image.float(), text.float(), form, torch.arange(33) // 3, scale=10.) for name, form in FORMS.items()}
    mm, wide = torch.mm, []
    def played(a, b, out_dtype=None):
        if out_dtype is None: return mm(a, b)
        assert a.dtype == b.dtype == torch.bfloat16 and out_dtype == torch.float32
        wide.append(a.shape)
        return mm(a.float(), b.float())
    monkeypatch.setattr(infonce, 'widens', lambda kind: True); monkeypatch.setattr(torch, 'mm', played)
    for name, form in FORMS.items():
        wide.clear(); got = found(image, text, form, torch.arange(33) // 3, scale=10.)
        assert wide, name
        torch.testing.assert_close(got[0].float(), want[name][0].float(), rtol=1e-5, atol=1e-5)
        for p, q in zip(got[1] + got[2], want[name][1] + want[name][2]): torch.testing.assert_close(p.float(), q.float(), rtol=2e-2, atol=2e-3 * q.abs().max().item())

def test_memory_is_of_a_tile():
    "The largest tensor that the streamed loss makes is a tile or a matrix of features, never b × b."
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    class Largest(TorchDispatchMode):
        most = 0
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
            return out
    b, image, text = 80, *(x.requires_grad_() for x in features(80))
    for loss in (lambda **k: info_nce(image, text, 10., label_smoothing=0.1, **k), lambda **k: info_nce(image, text, 10., key=torch.arange(b) // 2, **k), lambda **k: sigmoid_loss(image, text, 10., -1., **k)):
        with Largest() as streamed: loss(chunk=16)['loss'].backward()
        with Largest() as plain: loss()['loss'].backward()
        assert streamed.most == b * E and plain.most == b * b

def test_auto():
    assert [auto_chunk(1024, 1024), auto_chunk(1025, 1024), auto_chunk(1024, 1025), auto_chunk(8192, 8192, 'cuda'), auto_chunk(8192, 65536, 'cuda')] == [None, 512, 512, None, 4096]
    image, text = (F.normalize(torch.randn(1030, 4), dim=1) for _ in range(2))
    torch.testing.assert_close(info_nce(image, text, 20., chunk='auto')['loss'], info_nce(image, text, 20.)['loss'], rtol=1e-5, atol=1e-5)

# -- the general form -------------------------------------------------------------------------------------------------------

def test_general_form():
    g = torch.Generator().manual_seed(0)
    a, b, own = torch.randn(4, 7, generator=g).double(), torch.randn(4, 5, generator=g).double(), torch.arange(4)
    soft_a, soft_b = torch.randn(4, 7, generator=g).double().softmax(1), torch.randn(4, 5, generator=g).double().softmax(1)
    for goal_a, goal_b in ((own, own), (soft_a, own), (own, soft_b), (soft_a, soft_b)):
        for smoothing in (0., 0.3):
            out = contrastive(a, b, goal_a, goal_b, smoothing, check=True)
            torch.testing.assert_close(out['loss_image'], F.cross_entropy(a, goal_a, label_smoothing=smoothing), **close)
            torch.testing.assert_close(out['loss_text'], F.cross_entropy(b, goal_b, label_smoothing=smoothing), **close)
            torch.testing.assert_close(out['loss'], (out['loss_image'] + out['loss_text']) / 2, **close)
    assert contrastive(a.bfloat16(), b.bfloat16(), own, own)['loss'].dtype == torch.float32

def test_general_form_takes_every_integer_type_and_no_other():
    s, own = torch.randn(4, 7, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    for kind in (torch.int32, torch.int16, torch.int8, torch.uint8):
        assert torch.equal(contrastive(s, s, own.to(kind), own.to(kind), check=True)['loss'], contrastive(s, s, own, own)['loss'])
        with pytest.raises(UserError, match='row 3 is neither a column from 0 to 2'): contrastive(s[:, :3], s, own.to(kind), own, check=True)
    for wrong in (own.bool(), own * 1j, torch.eye(4, 7).long(), torch.eye(4, 7).bool()):
        with pytest.raises(UserError, match='targets of the texts: .* expected 4 integers'): contrastive(s, s, own, wrong)
    for bad in ((s.numpy(), s, own, own), (s, s, own, own.tolist()), (s, None, own, own)):
        with pytest.raises(UserError, match='expected tensors'): contrastive(*bad)

@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_distributions_sum_to_one_up_to_the_rounding_of_their_type(kind):
    for seed in range(50):
        s = 5 * torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        soft = s.softmax(1).to(kind); contrastive(s, s, soft, soft, check=True)
    with pytest.raises(UserError, match='row 0 is neither'): contrastive(s, s, 1.02 * soft, soft, check=True)

def test_columns_that_are_not_there_can_be_minus_infinity():
    s = torch.randn(3, 3, dtype=torch.float64); wide = torch.cat([s, torch.full((3, 1), -torch.inf, dtype=torch.float64)], 1).requires_grad_()
    soft = torch.cat([torch.eye(3), torch.zeros(3, 1)], 1).double()
    for goal in (torch.arange(3), soft):
        out = contrastive(wide, wide, goal, goal)['loss']
        torch.testing.assert_close(out, F.cross_entropy(s, torch.arange(3)), **close)
        assert torch.autograd.grad(out, wide)[0].isfinite().all()

def test_targets_from_keys():
    key = torch.tensor([3, 5, 3, 3])
    assert torch.equal(targets(key)[0], torch.tensor([1., 0, 1, 1]) / 3) and torch.equal(targets(key)[1], torch.tensor([0., 1, 0, 0]))
    assert torch.equal(targets(key[2:], key, torch.float64), targets(key, dtype=torch.float64)[2:])
    assert torch.equal(targets(torch.tensor([-4, 9])), torch.eye(2))

def test_identical_texts_with_one_key_are_infonce():
    "Where the texts of a key are the same vector, the keyed loss and its gradient of the towers equal InfoNCE's (UniCL changes nothing there)."
    image, kinds = features(6); kinds = kinds[:3]; key = torch.arange(6) % 3
    grads = []
    for form in (dict(), dict(key=key)):
        rows = kinds.clone().requires_grad_(); out = info_nce(image, rows[key], 4., **form)
        grads.append((out['loss_image'].item(), torch.autograd.grad(out['loss_image'], rows)[0]))
    assert grads[0][0] == pytest.approx(grads[1][0], rel=1e-12)
    torch.testing.assert_close(grads[0][1], grads[1][1], **close)

# -- across ranks -----------------------------------------------------------------------------------------------------------

def share(x, comm): return x.chunk(comm.size)[comm.rank]

def on_ranks(comm):
    image, text = features(12); key = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 4, 5, 6, 0])
    return {name: found(share(image, comm), share(text, comm), form, share(key, comm), comm) for name, form in FORMS.items()}

@pytest.mark.parametrize('ranks', [1, 2, 3, 4])
def test_ranks_give_the_loss_and_gradients_of_one_process(ranks):
    alone, together = on_ranks(LOCAL), spawn(on_ranks, ranks)
    for name in FORMS:
        parts = [r[name] for r in together]
        joined = torch.stack([p[0] for p in parts]).mean(0), [torch.cat(x) / ranks for x in zip(*(p[1] for p in parts))], [torch.stack(x).mean(0) for x in zip(*(p[2] for p in parts))]
        same(joined, alone[name])

VALID = { # which of twelve rows count: on 2 and 4 ranks some, all or none of a rank's
    'all': range(12), 'one of each three': (0, 3, 6, 9), 'uneven': (0, 1, 2, 3, 5, 10), 'none on the first half': (6, 7, 8, 11), 'none on the last quarter': (0, 1, 2, 3, 6, 7, 8), 'one': (5,)}
SHARED_KEYS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 3, 4, 5, 6, 0])

def with_invalid(comm):
    "Loss and gradients of every form and pattern; what does not count is long, and belongs to keys that others have."
    out = {}
    for pattern, rows in VALID.items():
        counts = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(rows), True)
        image, text = (torch.where(counts[:, None], x, 7 * x) for x in features(12))
        for name, form in FORMS.items(): out[name, pattern] = found(share(image, comm), share(text, comm), dict(form, valid=share(counts, comm)), share(SHARED_KEYS, comm), comm, scale=20.)
    return out

def gathered(parts, ranks):
    return torch.stack([p[0] for p in parts]).mean(0), [torch.cat(x) / ranks for x in zip(*(p[1] for p in parts))], [torch.stack(x).mean(0) for x in zip(*(p[2] for p in parts))]

@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_rows_that_do_not_count_are_as_if_they_were_not_there(ranks):
    together = spawn(with_invalid, ranks)
    for pattern, rows in VALID.items():
        rows, (image, text) = torch.tensor(rows), features(12)
        for name, form in FORMS.items():
            loss, grads, numbers = gathered([r[name, pattern] for r in together], ranks)
            want = found(image[rows], text[rows], form, SHARED_KEYS[rows], scale=20.)
            same((loss, [g[rows] for g in grads], numbers), want)
            rest = torch.ones(12, dtype=torch.bool).index_fill(0, rows, False)
            assert all((g[rest] == 0).all() for g in grads), (name, pattern) # they learn nothing either, to the last bit

@pytest.mark.parametrize('ranks', [1, 2])
def test_no_row_that_counts_costs_nothing(ranks):
    def none_at_all(comm):
        image, text = features(12)
        return {name: found(share(image, comm), share(text, comm), dict(form, valid=torch.zeros(12 // comm.size, dtype=torch.bool)), share(SHARED_KEYS, comm), comm) for name, form in FORMS.items()}
    for rank in spawn(none_at_all, ranks):
        for name, (loss, grads, numbers) in rank.items(): assert all((v == 0).all() for v in (loss, *grads, *numbers)), name

@pytest.mark.parametrize('form', FORMS)
def test_all_rows_count_to_the_last_digit(form):
    x = [v.float() for v in features(33)]
    told, untold = (found(*x, dict(FORMS[form], **more), torch.arange(33) // 3) for more in (dict(valid=torch.ones(33, dtype=torch.bool)), {}))
    for p, q in zip((told[0], *told[1], *told[2]), (untold[0], *untold[1], *untold[2])):
        if 'smoothed' in form: torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6) # a mean is taken as a product with shares
        else: assert torch.equal(p, q)

@pytest.mark.parametrize('kind', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('wide', [False, True])
def test_rows_that_do_not_count_in_low_precision(kind, wide, monkeypatch):
    "Also where bf16 is multiplied as it is; what does not count may even be no number."
    if wide:
        mm = torch.mm
        monkeypatch.setattr(infonce, 'widens', lambda kind: True)
        monkeypatch.setattr(torch, 'mm', lambda a, b, out_dtype=None: mm(a, b) if out_dtype is None else mm(a.float(), b.float()))
    image, text = features(33, dtype=kind); rows = torch.arange(0, 33, 2); key = torch.arange(33) // 3
    counts = torch.zeros(33, dtype=torch.bool).index_fill(0, rows, True)
    holed = [torch.where(counts[:, None], x, torch.nan) for x in (image, text)]
    for name, form in FORMS.items():
        got, want = found(*holed, dict(form, valid=counts), key, scale=10.), found(image[rows], text[rows], form, key[rows], scale=10.)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
        for p, q in zip(got[1], want[1]): torch.testing.assert_close(p[rows], q, rtol=2e-2, atol=2e-3 * q.abs().max().item())
        assert all((g[1::2] == 0).all() for g in got[1]), name

def test_rows_that_do_not_count_by_finite_differences():
    image, text = (x.requires_grad_() for x in features(5)); counts, key = torch.tensor([True, False, True, True, False]), torch.tensor([0, 0, 0, 1, 1])
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (3., -1.))
    for chunk in (None, 2):
        assert torch.autograd.gradcheck(lambda *x: tuple(info_nce(*x, key=key, valid=counts, chunk=chunk, label_smoothing=0.1).values()), (image, text, scale))
        assert torch.autograd.gradcheck(lambda *x: tuple(sigmoid_loss(*x, key=key, valid=counts, chunk=chunk).values()), (image, text, scale, bias))

@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_a_mean_over_rows_that_count(ranks):
    def means(comm, rows):
        loss = torch.arange(12, dtype=torch.float64).requires_grad_()
        counts = torch.zeros(12, dtype=torch.bool).index_fill(0, torch.tensor(rows, dtype=torch.int64), True)
        out = row_mean(share(loss, comm), share(counts, comm), comm); out.backward()
        return comm.all_sum(out.detach()) / comm.size, comm.all_sum(loss.grad) / comm.size
    for rows in (*VALID.values(), ()):
        mean, grad = spawn(means, ranks, rows)[0]
        assert mean.item() == pytest.approx(sum(rows) / max(1, len(rows)), abs=1e-12)
        torch.testing.assert_close(grad, torch.zeros(12, dtype=torch.float64).index_fill(0, torch.tensor(rows, dtype=torch.int64), 1 / max(1, len(rows))), **close)

def test_a_mean_over_rows_refuses():
    assert row_mean(torch.tensor([1., 3.])) == 2 and row_mean(torch.tensor([1., torch.nan]), torch.tensor([True, False])) == 1 and row_mean(torch.ones(3, dtype=torch.bfloat16)).dtype == torch.float32
    for bad, words in ((torch.ones(2, 2), r'losses \(2, 2\) of torch.float32'), (torch.arange(2), 'of torch.int64'), ([1., 2.], 'losses list')):
        with pytest.raises(UserError, match=words): row_mean(bad)
    for bad in (torch.ones(3, dtype=torch.bool), torch.ones(2), [True, False]):
        with pytest.raises(UserError, match='valid of'): row_mean(torch.ones(2), bad)

class Counting(Ranks):
    "Which collectives were called."
    def __init__(self, comm): super().__init__(comm.rank, comm.size); self.names = []
    def gather(self, x): self.names.append(f'gather {x.dtype}'); return super().gather(x)
    def reduce_scatter(self, x): self.names.append('reduce_scatter'); return super().reduce_scatter(x)
    def all_sum(self, x): self.names.append('all_sum'); return super().all_sum(x)
    def all_max(self, x): self.names.append('all_max'); return super().all_max(x)

def called(comm):
    image, text = (share(x, comm) for x in features(12)); out = {}
    for name, more in dict(bare={}, key=dict(key=share(SHARED_KEYS, comm)), valid=dict(valid=torch.ones(6) > 0), both=dict(key=share(SHARED_KEYS, comm), valid=torch.ones(6) > 0), check=dict(check=True)).items():
        for form, chunk in dict(plain=None, streamed=3).items(): info_nce(image, text, 5., chunk=chunk, comm=(c := Counting(comm)), **more); out[name, form] = c.names
    return out

def test_values_stay_on_the_device(monkeypatch):
    "Tensors without values: whoever looks at one fails, as a GPU would be waited for."
    monkeypatch.setattr(torch, 'autocast', lambda *args, **more: contextlib.nullcontext()) # which there is none of
    image, text = (x.to('meta').requires_grad_() for x in features(12)); key, counts = SHARED_KEYS.to('meta'), (SHARED_KEYS > 1).to('meta')
    for form in FORMS.values():
        bias, more = form.get('bias'), {k: v for k, v in form.items() if k not in ('bias', 'key')} | dict(key=key if 'key' in form else None, valid=counts)
        out = info_nce(image, text, 5., **more) if bias is None else sigmoid_loss(image, text, 5., bias, **more)
        out['loss'].backward()
    row_mean(image.sum(1), counts).backward()
    with pytest.raises((RuntimeError, NotImplementedError)): info_nce(image, text, 5., check=True)

def test_features_are_as_narrow_as_autocast(monkeypatch):
    batch = dict(image=torch.randn(6, 4), text=torch.randn(6, E))
    def kinds(model):
        with torch.autocast('cpu', torch.bfloat16): inside = Contrastive().features(model, batch)
        return {z.dtype for z in inside.values()}, {z.dtype for z in Contrastive().features(model, batch).values()}
    assert kinds(Pair()) == ({torch.float32}, {torch.float32})
    monkeypatch.setattr(infonce, 'widens', lambda kind: True)
    assert kinds(Pair()) == ({torch.bfloat16}, {torch.float32})

def test_a_step_makes_no_collective_that_the_loss_does_not_need():
    names, f, i = spawn(called, 2)[0], 'gather torch.float64', 'gather torch.int64'
    assert names['bare', 'plain'] == [f, f] and names['bare', 'streamed'] == [f, 'all_max', 'all_sum']
    for more in ('key', 'valid', 'both', 'check'): assert names[more, 'plain'] == [i, f, f], more
    assert names['valid', 'streamed'] == [i, f, 'all_max', 'all_sum'] and names['both', 'streamed'] == names['key', 'streamed'] == [i, f, 'all_max', 'all_sum', 'all_sum']

class Deaf(Ranks):
    "A gather without gradient, as torch's own."
    def gather(self, x_b): return super().gather(x_b).detach()

def test_a_gather_without_gradient_has_the_loss_and_not_the_gradient():
    def image_gradient(comm):
        image, text = features(12); x = [share(v, comm).clone().requires_grad_() for v in (image, text)]
        out = info_nce(*x, 5., comm=Deaf(comm.rank, comm.size))['loss']; out.backward()
        return comm.all_sum(out.detach()) / comm.size, comm.gather(x[0].grad) / comm.size
    loss, grad = spawn(image_gradient, 2)[0]
    want = found(*features(12), dict(), scale=5.)
    torch.testing.assert_close(loss, want[0][0], **close)
    with pytest.raises(AssertionError): torch.testing.assert_close(grad, want[1][0], rtol=1e-2, atol=1e-3)

def test_without_a_gradient_of_the_gather_only_the_streamed_form_stays_right():
    def text_gradient(comm):
        out, deaf = {}, Deaf(comm.rank, comm.size)
        for name in ('sigmoid', 'streamed', 'sigmoid, streamed'):
            loss, grads, _ = found(*(share(v, comm) for v in features(12)), FORMS[name], comm=deaf)
            grad = torch.zeros(12 // comm.size, E, dtype=torch.float64) if grads[1] is None else grads[1] # the plain sigmoid has no other way to the texts
            out[name] = loss[0], comm.gather(grad) / comm.size
        return out
    for name, (_, grad) in spawn(text_gradient, 2)[0].items():
        apart = (grad - found(*features(12), FORMS[name])[1][1]).abs().max()
        assert apart > 1e-3 if name == 'sigmoid' else apart < 1e-12, name

def refused(comm):
    "What every rank says, case by case; all of them would hang or abort if one rank went on alone."
    x = F.normalize(torch.randn(6, E), dim=1); b, narrow = x[:3 + comm.rank], F.normalize(x[:, :3 + comm.rank], dim=1)
    one = comm.rank == 1
    cases = dict(
        rows=lambda: info_nce(b, b, 1., comm=comm, check=True), rows_streamed=lambda: sigmoid_loss(b, b, 1., 0., comm=comm, check=True, chunk=2),
        width=lambda: info_nce(narrow, narrow, 1., comm=comm, check=True),
        sides=lambda: info_nce(x, x[:5] if one else x, 1., comm=comm, check=True), kind=lambda: info_nce(x.long() if one else x, x, 1., comm=comm, check=True),
        double=lambda: info_nce(x.double() if one else x, x, 1., comm=comm, check=True), key=lambda: info_nce(x, x, 1., comm=comm, check=True, key=torch.arange(6) if one else None),
        form=lambda: info_nce(x, x, 1., comm=comm, check=True, chunk=2 if one else None), smoothing=lambda: info_nce(x, x, 1., comm=comm, check=True, label_smoothing=0.1 * one),
        chunk=lambda: info_nce(x, x, 1., comm=comm, check=True, chunk=-1 if one else 3), value=lambda: info_nce(torch.full_like(x, torch.nan) if one else x, x, 1., comm=comm, check=True),
        listed=lambda: info_nce(x, x, 1., comm=comm, check=True, key=[0] * 6 if one else torch.arange(6)), arrays=lambda: info_nce(x.numpy() if one else x, x, 1., comm=comm, check=True), scales=lambda: sigmoid_loss(x, x, torch.ones(1 + comm.rank), 0., comm=comm, check=True),
        valid=lambda: info_nce(x, x, 1., comm=comm, check=True, valid=torch.ones(6, dtype=torch.bool) if one else None), shares=lambda: sigmoid_loss(x, x, 1., 0., comm=comm, check=True, valid=torch.ones(6)[:5 + one] > 0),
        empty=lambda: info_nce(x[:0] if one else x, x[:0] if one else x, 1., comm=comm, check=True), flat=lambda: info_nce(x[0] if one else x, x[0] if one else x, 1., comm=comm, check=True),
    )
    said = {}
    for name, call in cases.items():
        try: call(); said[name] = ''
        except UserError as e: said[name] = str(e)
    return said, info_nce(x, x, 1., comm=comm)['loss'].item()

def test_ranks_that_differ_are_refused_together_and_named():
    (first, loss), (second, _) = spawn(refused, 2, timeout=60)
    expected = dict(rows='rows: 3 on rank 0, 4 on rank 1', rows_streamed='rows: 3 on rank 0, 4 on rank 1', width='width: 3 on rank 0, 4 on rank 1', valid='having valid: 0 on rank 0, 1 on rank 1', double='bits of a feature: 32 on rank 0, 64 on rank 1',
                    key='having a key: 0 on rank 0, 1 on rank 1', form='streaming: 0 on rank 0, 1 on rank 1', smoothing='millionths of label smoothing: 0 on rank 0, 100000 on rank 1')
    for name, words in expected.items(): assert words in first[name] and first[name] == second[name]
    for name, words in dict(sides='(6, 5) and text features (5, 5)', kind='expected floating point', chunk='chunk -1', value='6 of 6 image features are not finite, first row 0', empty='(0, 5)', flat='(5,)', listed='key of type list', arrays='image features of type ndarray', scales='scale (2,)').items():
        assert 'rank 1 refused its input' in first[name] and words in second[name]
    assert math.isfinite(loss) # and the ranks are still in step

def half_types(comm):
    "bf16 on rank 0 and another type on rank 1: streamed, so that what is gathered is what `_ready` has made of it."
    said = []
    for kind in (torch.float16, torch.float32):
        image, text = features(12, dtype=kind if comm.rank else torch.bfloat16)
        try: said.append(found(share(image, comm), share(text, comm), dict(chunk=5), comm=comm, scale=10.)[0])
        except UserError as e: said.append(str(e))
    return said

def test_ranks_send_one_type(monkeypatch):
    "Where bf16 stays bf16 other types are refused, although fp16 has as many bits; where all are taken up to fp32 they may be mixed."
    image, text = features(12)
    for losses in zip(*spawn(half_types, 2, timeout=60)): torch.testing.assert_close(torch.stack(losses).mean(0), found(image, text, dict(), scale=10.)[0], rtol=1e-2, atol=1e-2, check_dtype=False)
    monkeypatch.setattr(infonce, 'widens', lambda kind: True)
    for said in spawn(half_types, 2, timeout=60):
        for words in said: assert 'bits of a feature: 16 on rank 0, 32 on rank 1' in words

# -- what it costs ------------------------------------------------------------------------------------------------------------

def wire(b, B, E, size=4):
    "Bytes that a rank receives, as chapter 10's table has them; `size` bytes a feature."
    return {'plain': 4 * (B - b) * E * size, 'streamed': (B - b) * (E * (size + 4) + 16), 'sigmoid, streamed': (B - b) * E * (size + 4)}

class Counted(Ranks):
    received = 0
    def count(self, x, times, f):
        before = self.received; y = f(x); self.received = before + (times * x.nbytes if x.is_floating_point() else 0) # one call may use another
        return y
    def gather(self, x): return self.count(x, self.size - 1, super().gather)
    def reduce_scatter(self, x): return self.count(x, 1 - 1 / self.size, super().reduce_scatter)
    def all_sum(self, x): return self.count(x, 2 * (1 - 1 / self.size), super().all_sum)
    def all_max(self, x): return self.count(x, 2 * (1 - 1 / self.size), super().all_max)

def traffic(comm):
    image, text = (v.float().requires_grad_() for v in (F.normalize(torch.randn(8, 32), dim=1) for _ in range(2))); scale, bias = (torch.tensor(v, requires_grad=True) for v in (100., -10.))
    received = {}
    for form, loss in {'plain': lambda c: info_nce(image, text, scale, comm=c), 'streamed': lambda c: info_nce(image, text, scale, comm=c, chunk=4), 'sigmoid, streamed': lambda c: sigmoid_loss(image, text, scale, bias, comm=c, chunk=4)}.items():
        counted = Counted(comm.rank, comm.size); loss(counted)['loss'].backward(); received[form] = counted.received
    return received

def test_the_wire_carries_what_chapter_10_says():
    assert spawn(traffic, 2)[0] == pytest.approx(wire(8, 16, 32))
    assert {k: round(v / 1e9, 2) for k, v in wire(8192, 65536, 1024, 2).items()} == {'plain': 0.47, 'streamed': 0.35, 'sigmoid, streamed': 0.35}

# -- bad input --------------------------------------------------------------------------------------------------------------

x = F.normalize(torch.randn(4, E), dim=1)
BAD = {
    'rows': (dict(text=x[:3]), r'image features \(4, 5\) and text features \(3, 5\)'), 'widths': (dict(text=x[:, :4]), r'text features \(4, 4\)'), 'no pairs': (dict(image=x[:0], text=x[:0]), r'\(0, 5\)'),
    'one axis': (dict(image=x[0], text=x[0]), r'\(5,\)'), 'integers': (dict(image=x.long()), 'type torch.int64'), 'chunk 0': (dict(chunk=0), 'chunk 0'), 'negative chunk': (dict(chunk=-2), 'chunk -2'),
    'a word': (dict(chunk='big'), "chunk 'big'"), 'a fraction': (dict(chunk=2.5), 'chunk 2.5'), 'short key': (dict(key=torch.arange(3)), r'key of shape \(3,\)'), 'float key': (dict(key=torch.ones(4)), 'float32: expected 4 integers'),
    'complex key': (dict(key=torch.arange(4) * 1j), 'complex64: expected 4 integers'), 'list as key': (dict(key=[0, 1, 2, 3]), 'key of type list: expected a tensor'), 'short list as key': (dict(key=[1, 2]), 'key of type list'),
    'array as key': (dict(key=torch.arange(4).numpy()), 'key of type ndarray'), 'lists': (dict(image=x.tolist()), 'image features of type list'), 'arrays': (dict(text=x.numpy()), 'text features of type ndarray'), 'complex': (dict(image=x * 1j), 'type torch.complex64'),
    'a truth': (dict(chunk=True), 'chunk True'), 'a width less': (dict(text=x[:, :2]), r'text features \(4, 2\)'), 'float key by text': (dict(key=x[:, 0]), r'key of shape \(4,\) and type torch.float32'),
    'key by text': (dict(key=torch.zeros(4, 4, dtype=torch.int64)), r'key of shape \(4, 4\)'), 'short valid': (dict(valid=torch.ones(3) > 0), r'valid of shape \(3,\) and type torch.bool: expected 4 booleans'),
    'float valid': (dict(valid=torch.ones(4)), 'torch.float32: expected 4 booleans'), 'list as valid': (dict(valid=[True] * 4), 'valid of type list'),
}

@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_always_refused(case):
    change, words = BAD[case]
    image, text, form = change.get('image', x), change.get('text', x), {k: v for k, v in change.items() if k in ('chunk', 'key', 'valid')}
    for call in (lambda: info_nce(image, text, 1., **form), lambda: sigmoid_loss(image, text, 1., 0., **form)):
        with pytest.raises(UserError, match=words): call()

def test_factors_are_numbers_or_tensors_of_one():
    for good in (2, 2., np.float32(2), torch.tensor(2), torch.tensor([2.]), torch.tensor([[2.]])): assert info_nce(x, x, good)['loss'] == info_nce(x, x, 2.)['loss'] and sigmoid_loss(x, x, 1., good)['loss'] == sigmoid_loss(x, x, 1., 2.)['loss']
    for bad, words in ((torch.ones(2), r'\(2,\)'), (None, 'None'), ('10', "'10'"), ([1.], r'\[1.0\]'), (torch.ones(0), r'\(0,\)'), (torch.tensor(1j), r'\(\)')):
        for call, name in ((lambda: info_nce(x, x, bad), 'scale'), (lambda: sigmoid_loss(x, x, bad, 0.), 'scale'), (lambda: sigmoid_loss(x, x, 1., bad), 'bias'), (lambda: info_nce(x, x, 1., label_smoothing=bad), 'label smoothing')):
            with pytest.raises(UserError, match=f'{name} {words}: expected a number or a tensor of one'): call()

@pytest.mark.parametrize('chunk', [None, 'auto', 64])
def test_good_input_is_not_complained_about(chunk):
    assert infonce._complaint(x, x.bfloat16(), torch.arange(4), torch.ones(4) > 0, chunk, scale=torch.ones(1), bias=-10, label_smoothing=0.1) == ''
    assert infonce._complaint_about_values(x.bfloat16(), x) == ''

def test_values_far_from_one_are_counted():
    long, holed = x.clone(), x.clone(); long[1:] *= 3; holed[2, 0] = torch.nan
    assert '3 of 4 image features have norms from 3 to 3, first row 1' in infonce._complaint_about_values(long, x)
    assert '1 of 4 text features are not finite, first row 2' in infonce._complaint_about_values(x, holed)
    assert '4 of 4 text features are not finite' in infonce._complaint_about_values(x, torch.full_like(x, torch.inf))

@pytest.mark.parametrize('chunk', [None, 2, 'auto'])
def test_checks_do_not_break_a_captured_graph(chunk):
    call = torch.compile(info_nce, fullgraph=True, backend='eager')
    torch.testing.assert_close(call(x, x, 2., key=torch.arange(4) // 2, chunk=chunk)['loss'], info_nce(x, x, 2., key=torch.arange(4) // 2)['loss'])

def test_values_are_looked_at_on_request():
    nan, inf, long = x.clone(), x.clone(), x.clone(); nan[2, 1] = torch.nan; inf[1:3, 0] = torch.inf; long[3] *= 2
    for image, text, words in ((nan, x, '1 of 4 image features are not finite, first row 2'), (x, inf, '2 of 4 text features are not finite, first row 1'), (x, long, '1 of 4 text features have norms from 2 to 2, first row 3')):
        for call in (lambda **k: info_nce(image, text, 1., **k), lambda **k: sigmoid_loss(image, text, 1., 0., **k)):
            with pytest.raises(UserError, match=words): call(check=True)
            call() # and no look without it
    info_nce(x.bfloat16(), x.bfloat16(), 1., check=True)
    for bad, row in ((nan, 2), (long, 3)): info_nce(bad, x, 1., check=True, valid=torch.arange(4) != row) # what does not count is not looked at
    assert info_nce(nan, x, 1., chunk=2)['loss'].isnan() and info_nce(nan, x, 1.)['loss'].isnan()

def test_label_smoothing_and_general_form_refuse():
    for call in (lambda v: info_nce(x, x, 1., label_smoothing=v), lambda v: contrastive(x, x, torch.arange(4), torch.arange(4), v)):
        for v in (-0.1, 1., math.nan):
            with pytest.raises(UserError, match='label smoothing'): call(v)
    own = torch.arange(4)
    for bad, words in (((x, x[:3], own, own[:3]), '4 images and 3 texts'), ((x, x, own[:3], own), 'targets of the images'), ((x, x, own, x[:, :4]), 'targets of the texts'), ((x.long(), x, own, own), 'similarities of the images')):
        with pytest.raises(UserError, match=words): contrastive(*bad)
    for goal, row in ((torch.tensor([0, 1, 5, 2]), 2), (torch.full((4, E), 0.25), 0)):
        with pytest.raises(UserError, match=f'row {row} is neither'): contrastive(x, x, goal, own, check=True)

# -- the objectives and the scale -------------------------------------------------------------------------------------------

class Pair(torch.nn.Module):
    def __init__(self, bias=None):
        super().__init__()
        self.image, self.logit_scale = torch.nn.Linear(4, E), torch.nn.Parameter(torch.tensor(2.))
        self.logit_bias = None if bias is None else torch.nn.Parameter(torch.tensor(bias))
    def encode_image(self, v): return self.image(v)
    def encode_text(self, v): return 3 * v

def test_objectives():
    batch = dict(image=torch.randn(6, 4), text=torch.randn(6, E), key=torch.arange(6) // 2)
    model = Pair(-10.)
    z = Contrastive().features(model, batch)
    torch.testing.assert_close(torch.stack([v.norm(dim=1) for v in z.values()]), torch.ones(2, 6))
    out = Contrastive(key=True, label_smoothing=0.1).loss(z, model, batch)
    torch.testing.assert_close(out['loss'], info_nce(z['image'], z['text'], model.logit_scale.exp(), key=batch['key'], label_smoothing=0.1)['loss'])
    out = Sigmoid(key=True).loss(z, model, batch)
    assert set(out) == {'loss', 'loss_positive', 'loss_negative', 'logit_scale', 'logit_bias'} and not out['logit_bias'].requires_grad
    out['loss'].backward()
    assert all(p.grad is not None for p in model.parameters())
    for objective, m, data, words in ((Contrastive(key=True), model, {'image': 0}, "needs batches with a 'key'"), (Sigmoid(key=True), model, {'image': 0}, "needs batches with a 'key'")):
        with pytest.raises(UserError, match=words): objective.loss(z, m, data)

class Learner(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.encode_image, self.encode_text, self.logit_scale = torch.nn.Linear(10, 6), torch.nn.Linear(8, 6), torch.nn.Parameter(torch.tensor(1 / 0.07).log())
        self.logit_bias = torch.nn.Parameter(torch.tensor(-10.))

@pytest.mark.parametrize('objective, lr, floor, least', [(Contrastive(key=True), 0.02, math.log(2), 1.), (Sigmoid(), 0.05, 0., 0.5)])
def test_objectives_learn_twelve_pairs_by_heart(objective, lr, floor, least):
    torch.manual_seed(0); model = Learner()
    batch = dict(image=torch.randn(12, 10), text=torch.randn(12, 8), key=torch.arange(12) // 2)
    optimizer, trace = torch.optim.Adam(model.parameters(), lr=lr), []
    for _ in range(40):
        out = objective.loss(objective.features(model, batch), model, batch)
        optimizer.zero_grad(); out['loss'].backward(); optimizer.step(); clamp_scale(model.logit_scale)
        trace.append(out['loss'].item())
    assert floor < trace[-1] < trace[0] * least
    assert all(p.grad is not None for n, p in model.named_parameters() if n != 'logit_bias' or isinstance(objective, Sigmoid))
    with torch.autocast('cpu', torch.bfloat16): assert objective.features(model, batch)['image'].dtype == torch.float32

def test_configs_build_objectives():
    built = OBJECTIVES['contrastive'](chunk=7, key=True, label_smoothing=0.1, check=True).build(Pair())
    assert isinstance(built, Objective) and (built.chunk, built.key, built.label_smoothing, built.check) == (7, True, 0.1, True) and built.needs == ('image', 'text', 'key')
    assert Contrastive().needs == ('image', 'text') and Contrastive().chunk == 'auto' and not list(Contrastive().parameters())
    assert isinstance(SigmoidConfig().build(Pair(-10.)), Sigmoid) and SigmoidConfig(key=True).build(Pair(-10.)).needs == ('image', 'text', 'key')
    with pytest.raises(UserError, match='a logit_bias, and this one has none: use model.init_bias=-10'): SigmoidConfig().build(Pair())
    bare = Pair(); bare.logit_scale = None
    for config in OBJECTIVES.values():
        with pytest.raises(UserError, match='a logit_scale, and this one has none'): config().build(bare)
        with pytest.raises(UserError, match='chunk 0: expected'): config(chunk=0)
        for text, value in (('512', 512), ('auto', 'auto'), ('None', None)): assert config().set('chunk', text).chunk == value
        for value in (512, 'auto', None): assert ObjectiveConfig.from_json(config(chunk=value).to_json()) == config(chunk=value)
    with pytest.raises(UserError, match='label smoothing 1.0'): ContrastiveConfig(label_smoothing=1.)
    with pytest.raises(NotImplementedError): ObjectiveConfig().build(Pair())
    for call in (lambda: Objective().features(None, {}), lambda: Objective().loss({}, None, {})):
        with pytest.raises(NotImplementedError): call()

def test_draw_reaches_the_model():
    "Through `embed` where the model has it, else through encoders that ask for it; a model of another make is not told."
    seen = []
    class Asking(Pair):
        def encode_image(self, v, normalize=False, draw=None): seen.append(draw); return super().encode_image(v)
    class Embedding(Pair):
        def embed(self, batch): seen.append(batch['draw']); return dict(image=F.normalize(batch['image'], dim=1), text=F.normalize(batch['text'][:, :4], dim=1))
    batch = dict(image=torch.randn(3, 4), text=torch.randn(3, E), draw=torch.arange(3))
    for model in (Asking(), Embedding(), Pair()): Contrastive().features(model, batch)
    assert len(seen) == 2 and all(d is batch['draw'] for d in seen)
    Asking().encode_image(batch['image']); Contrastive().features(Asking(), {k: v for k, v in batch.items() if k != 'draw'})
    assert seen[2:] == [None, None]

@pytest.mark.parametrize('objective, model', [(Contrastive(chunk=None), Pair()), (Contrastive(chunk=2, key=True, label_smoothing=0.1), Pair()), (Sigmoid(chunk=2), Pair(-1.))])
def test_objectives_pass_valid_on(objective, model):
    torch.manual_seed(0); rows = torch.tensor([0, 2, 3, 5])
    batch = dict(image=torch.randn(6, 4), text=torch.randn(6, E), key=torch.arange(6) // 2, valid=torch.zeros(6, dtype=torch.bool).index_fill(0, rows, True))
    few = {k: v[rows] for k, v in batch.items() if k != 'valid'}
    torch.testing.assert_close(*(objective.loss(objective.features(model, b), model, b)['loss'] for b in (batch, few)))

def test_clamp_is_the_callers_choice():
    t = torch.nn.Parameter(torch.tensor([-1., 2.66, 9.])); clamp_scale(t)
    torch.testing.assert_close(t.detach().exp(), torch.tensor([1., math.exp(2.66), 100.]))
    for most, want in ((100., math.log(100)), (50, math.log(50)), (0, 9.), (None, 9.)):
        p = torch.nn.Parameter(torch.tensor(9.)); clamp_scale(p, most)
        assert p.item() == pytest.approx(want, abs=1e-6) and p.grad is None and p.requires_grad
    p = torch.nn.Parameter(torch.tensor(-1.)); clamp_scale(p); assert p.item() == 0
    p = torch.nn.Parameter(torch.tensor(9.)); clamp_scale(p, 1); assert p.item() == 0
    for bad in (0.5, -1., math.nan):
        p = torch.nn.Parameter(torch.tensor(9.))
        with pytest.raises(UserError, match=r'expected 0 \(never clamp\) or at least 1'): clamp_scale(p, bad)
        assert p.item() == 9

# -- other people's, and the bench ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('loss', ['info_nce', 'sigmoid'])
def test_equals_open_clip(loss):
    theirs = pytest.importorskip('open_clip.loss', reason='open_clip is not installed')
    image, text = features(12)
    got = found(image, text, dict(chunk=5, **({} if loss == 'info_nce' else dict(bias=-10.))), scale=30.)
    scale, bias = torch.tensor(30., dtype=torch.float64), torch.tensor(-10., dtype=torch.float64)
    i, t = image.clone().requires_grad_(), text.clone().requires_grad_()
    want = theirs.ClipLoss()(i, t, scale) if loss == 'info_nce' else theirs.SigLipLoss()(i, t, scale, bias)
    torch.testing.assert_close(got[0][0], want.detach(), **close)
    for p, q in zip(got[1], torch.autograd.grad(want, (i, t))): torch.testing.assert_close(p, q, **close)

def test_bench_writes_rows(tmp_path, monkeypatch):
    bench = str(Path(__file__).parent / 'bench' / 'loss.py')
    monkeypatch.setattr(sys, 'argv', [bench, *'--batches 600 --forms plain auto --rounds 1 --width 16 --out'.split(), str(tmp_path / 'rows.jsonl')])
    runpy.run_path(bench, run_name='__main__')
    rows = [json.loads(line) for line in (tmp_path / 'rows.jsonl').read_text().splitlines()]
    assert [r['form'] for r in rows] == ['plain', 'auto'] and all(r['fits'] and r['b'] == 600 and r['seconds'] > 0 for r in rows)
    assert rows[0]['loss_value'] == pytest.approx(rows[1]['loss_value'], rel=1e-5) and rows[0]['d_scale'] == pytest.approx(rows[1]['d_scale'], rel=1e-3)
    assert {'git_sha', 'hardware', 'torch', 'threads', 'extra_mb'} <= set(rows[0])

@pytest.mark.parametrize('form', ['bogus', 'streamed', 'streamed 0', 'streamed x'])
def test_bench_refuses_forms_it_does_not_know(form, monkeypatch, capsys):
    bench = str(Path(__file__).parent / 'bench' / 'loss.py')
    monkeypatch.setattr(sys, 'argv', [bench, '--forms', 'plain', form])
    with pytest.raises(SystemExit) as e: runpy.run_path(bench, run_name='__main__')
    said = capsys.readouterr().err
    assert e.value.code == 2 and repr(form) in said and 'streamed N' in said

ROW = dict(git_sha='abc', date='2026-01-01', hardware='a CPU', torch='2.6', threads=1, device='cpu', dtype='float32', loss='info_nce', width=512, rounds=2)
def row(b, form, seconds=1., **changes): return dict(dict(ROW, b=b, form=form, fits=True, seconds=seconds, extra_mb=10 * seconds), **changes)
def unfit(b, form, **changes): return {k: v for k, v in row(b, form, fits=False, **changes).items() if k not in ('seconds', 'extra_mb')}

RECORDED = { # rows that the bench may write, what the chapter says of them, and what it must not say
    'nothing': ([], ['on a CPU: not run', 'on a GPU: not run'], []),
    'plain and auto': ([row(4096, 'plain', 2.), row(4096, 'auto')], ['plain 2.00 s, 20 MB; auto 0.50 × time, 0.500 × memory', 'abc'], []),
    'plain does not fit': ([row(4096, 'plain'), row(4096, 'auto'), unfit(65536, 'plain'), row(65536, 'auto', 9.)], ['65536: plain does not fit; auto 9.00 s, 90 MB'], []),
    'nothing fits': ([unfit(65536, 'plain'), unfit(65536, 'auto')], ['65536: plain does not fit; auto does not fit'], []),
    'another form does not fit': ([row(4096, 'plain'), unfit(4096, 'open_clip')], ['open_clip does not fit'], []),
    'no plain row': ([row(4096, 'plain'), row(4096, 'auto'), row(16384, 'auto', 7.)], ['16384: auto 7.00 s, 70 MB'], []),
    'only streamed 2048': ([row(12288, 'streamed 2048', 7.)], ['12288'], []),
    'other settings': ([row(4096, 'plain'), row(4096, 'auto'), *(row(4096, 'auto', 0.09, **{k: v}) for k, v in dict(threads=2, dtype='bfloat16', width=64, loss='sigmoid').items())], ['auto 1.00 × time'], ['0.09']),
    'another machine': ([row(4096, 'plain', hardware='old'), row(8192, 'plain', hardware='old'), row(4096, 'plain'), row(4096, 'auto', 3.)], ['auto 3.00 × time', 'a CPU'], ['old', '8192']),
    'run again': ([unfit(4096, 'plain'), row(4096, 'plain', 5.), row(4096, 'plain', 4.), row(4096, 'auto')], ['plain 4.00 s', 'auto 0.25 × time'], ['does not fit']),
    'a GPU': ([row(65536, f, s, device='cuda', dtype='bfloat16', width=1024) for f, s in (('plain', 2.), ('auto', 1.))], ['on a CPU: not run', '65536: plain 2.00 s, 20 MB; auto 0.50 × time'], []),
}

def as_recorded(rows, tmp_path):
    out = tmp_path / 'results' / 'loss.jsonl'
    if rows: out.parent.mkdir(); out.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    return out

@pytest.mark.parametrize('case', RECORDED)
def test_the_bench_reports_whatever_rows_it_wrote(case, tmp_path, monkeypatch, capsys):
    rows, said, unsaid = RECORDED[case]
    bench = str(Path(__file__).parent / 'bench' / 'loss.py')
    monkeypatch.setattr(sys, 'argv', [bench, '--report', '--out', str(as_recorded(rows, tmp_path))])
    runpy.run_path(bench, run_name='__main__')
    out = capsys.readouterr().out
    for words in said: assert words in out, out
    for words in unsaid: assert words not in out, out

@pytest.mark.parametrize('case', RECORDED)
def test_chapter_reads_whatever_rows_the_bench_wrote(case, tmp_path, monkeypatch, capsys):
    pytest.importorskip('matplotlib', reason='figures need the extra [demo]')
    from clipa_nb.engine import viz
    rows, _, unsaid = RECORDED[case]
    as_recorded(rows, tmp_path)
    monkeypatch.chdir(tmp_path)
    cells = [''.join(c['source']) for c in json.loads((Path(__file__).parents[1] / 'nbs' / '10_infonce.ipynb').read_text())['cells'] if c['cell_type'] == 'code']
    names = dict(json=json, pathlib=pathlib, viz=viz)
    [reading] = [c for c in cells if 'results/loss.jsonl' in c]
    exec(reading, names)
    names['fig'].canvas.draw()
    out = capsys.readouterr().out
    for words in unsaid: assert words not in out, out

# -- a GPU --------------------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_equals_cpu():
    image, text = features(33); key = torch.arange(33) // 3
    for form in FORMS.values():
        def moved(dtype): return found(image.to('cuda', dtype), text.to('cuda', dtype), form, key.cuda(), scale=10.)
        got, want = moved(torch.float64), found(image, text, form, key, scale=10.)
        for p, q in zip((got[0], *got[1], *got[2]), (want[0], *want[1], *want[2])): torch.testing.assert_close(p.cpu(), q, rtol=1e-10, atol=1e-10)
        low, exact = moved(torch.bfloat16), found(image.bfloat16().double(), text.bfloat16().double(), form, key, scale=10.)
        torch.testing.assert_close(low[0].cpu().double(), exact[0], rtol=1e-4, atol=1e-4)
        for p, q in zip(low[1] + low[2], exact[1] + exact[2]): torch.testing.assert_close(p.cpu().double(), q, rtol=3e-2, atol=4e-3 * q.abs().max().item())

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_cuda_is_never_waited_for():
    image, text = (v.to('cuda', torch.bfloat16).requires_grad_() for v in features(33)); scale, bias, key = torch.tensor(9., device='cuda'), torch.tensor(-1., device='cuda'), torch.arange(33, device='cuda') // 3; valid = key % 2 == 0
    def all_forms():
        for chunk in (None, 8, 'auto'):
            info_nce(image, text, scale, key=key, valid=valid, chunk=chunk, label_smoothing=0.1)['loss'].backward(); sigmoid_loss(image, text, scale, bias, valid=valid, chunk=chunk)['loss'].backward(); row_mean(image.float().sum(1), valid).backward()
    all_forms()
    torch.cuda.set_sync_debug_mode('error')
    try: all_forms()
    finally: torch.cuda.set_sync_debug_mode('default')
