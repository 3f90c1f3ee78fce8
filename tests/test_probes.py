"Chapter 16's guards, and the features, ranks and fits behind its probes."
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.fits import (TRANSFORMS, fit_from, fit_line, fit_logistic, fit_lsr, fit_ridge, fit_temperature, folded, inside, line_at, minimise, peak, reliability, standardised, stratified,
                                  transformed)
from clipa_nb.engine.rows import all_rows, all_texts, exchanged
from clipa_nb.probes import calibration, draw_shots, few_shot, judged, linear_probe, partner_ranks, recall, retrieval, retrieve, robustness
from clipa_nb.engine.suites import caption_choice, winoground
from clipa_nb.engine.features import encoded, features, labelled_features, own_features, strip
from clipa_nb.engine.asking import batched, evaluating
from clipa_nb.zero_shot import linear


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.logit_scale = nn.Linear(12, 8), nn.Embedding(50, 8), nn.Parameter(torch.tensor(2.))
    def encode_image(self, x, normalize=False): return F.normalize(self.image(x.flatten(1).float()), dim=1)
    def encode_text(self, x, normalize=False): return F.normalize(self.text(x).mean(1), dim=1)


MODEL, G = Small(), torch.Generator().manual_seed(1)
X, Y = torch.rand(130, 3, 2, 2, generator=G), torch.randint(0, 5, (130,), generator=G)
T, K = torch.randint(0, 50, (130, 6), generator=G), torch.arange(130) // 2
PAIRS, DATA = [dict(image=X[i:i + 30], text=T[i:i + 30], key=K[i:i + 30]) for i in range(0, 130, 30)], batched(X, Y, 30)
XY = labelled_features(MODEL, DATA)
S = torch.tensor([[.9, .1, .3, .2], [.5, .4, .1, .3], [.2, .6, .6, .1], [.8, .7, .9, .3]]) # chapter 16's four captions


# ---- refusals ----

@pytest.mark.parametrize('call, words', [
    (lambda: encoded(MODEL, dict(image=X[:2], text=T[:3])), '2 images, 3 texts: give one of each for every sample'), (lambda: encoded(MODEL, {}), 'a batch with neither image nor text'),
    (lambda: own_features(MODEL, [PAIRS[0], dict(image=X[:2])]), 'batches disagree: one has image 8, text 8, key, batch, another image 8, batch'), (lambda: own_features(MODEL, [dict(image=X[:2], text=T[:3])]), '2 images, 3 texts'),
    (lambda: features(MODEL, []), 'there is nothing to encode'),
    (lambda: retrieval(torch.eye(4), torch.eye(4), ks=(5,)), 'R@5 among 4 pairs'), (lambda: retrieve(MODEL, [dict(image=X)]), "needs batches with 'image' and 'text', these have image"),
    (lambda: retrieve(MODEL, PAIRS, ks=(1000,)), 'R@1000 among 130 pairs'), (lambda: labelled_features(MODEL, DATA, classes=3), 'labels from 0 to 4: expected 0 to 2'),
    (lambda: labelled_features(MODEL, batched(X, Y - 1, 30)), 'labels from -1 to 3: expected 0 to M − 1'), (lambda: labelled_features(MODEL, PAIRS), "needs batches with 'image' and 'label'"),
    (lambda: linear_probe(XY, XY, fit='lasso'), "unknown fit 'lasso'"), (lambda: linear_probe((XY[0], XY[1] - 1), XY), 'labels from -1 to 3'), (lambda: draw_shots(Y, 10_000), '10000 shots, but class'), (lambda: draw_shots(Y, 1, classes=6), 'class 5 has 0 training images'),
    (lambda: few_shot(XY, XY, linear(torch.eye(2, 8))), 'expected 0 to 1'), (lambda: few_shot(XY, XY, fit='knn'), "unknown few-shot fit 'knn'"), (lambda: few_shot((XY[0][:2], torch.tensor([0, 1])), XY, shots=(1,)), 'expected 0 to 1'),
    (lambda: robustness({}, []), "no accuracy on 'clean' among no scores"), (lambda: robustness(dict(clean=.5), []), "no shifted set beside 'clean'"), (lambda: robustness(dict(clean=.5, blur=.4), [dict(clean=.4, blur=.2)] * 2), '2 peers were measured'),
    (lambda: retrieval(torch.eye(4), torch.eye(4), ties='lucky'), "unknown rule for ties 'lucky'"), (lambda: retrieval(torch.eye(4), torch.eye(5, 4)), '4 pictures and 5 captions: say which'), (lambda: retrieval(torch.eye(4), torch.eye(4), [0, 1, 2, 4]), '4 owners of 4 captions among 4 pictures'),
    (lambda: stratified(torch.arange(4)), 'no class has two labelled pictures'), (lambda: caption_choice(S, S, S, ties='kind'), "unknown rule for ties"), (lambda: winoground(S, S, ties='kind'), "unknown rule for ties"),
    (lambda: transformed([.5, 1.], 'logit'), '1 has no finite logit'), (lambda: transformed([0.], 'log'), '0 has no finite log'), (lambda: transformed([np.inf], None), 'inf has no finite value'), (lambda: transformed([.5], 'sqrt'), "unknown transform 'sqrt'"),
    (lambda: fit_line([.5], [.4], 'logit'), 'at least two points'), (lambda: fit_line([.5, .5], [.4, .6]), 'at least two points of different x')])
def test_what_cannot_be_probed(call, words):
    with pytest.raises(UserError, match=words): call()


# ---- features and ranks ----

class Two:
    rank, size = 0, 2
    def gather(self, x): return torch.cat([x, -x])


def test_uneven_rows_are_padded():
    assert all_rows(torch.tensor([1., 2.]), 3, Two()).tolist() == [1., 2., 0., -1., -2., 0.] and all_rows(torch.ones(2, 4), 2).shape == (2, 4)
    assert strip(torch.ones(5, 2), 3, 4).sum(1).tolist() == [2, 2, 0, 0] and torch.equal(strip(S, 1, 3), S[1:])


def test_features_are_those_of_the_model_in_order_and_leave_no_trace():
    MODEL.train(); f = features(MODEL, PAIRS)
    assert MODEL.training and torch.equal(f['key'], K) and set(f) == {'image', 'text', 'key'}
    torch.testing.assert_close(f['image'], MODEL.encode_image(X).detach()); torch.testing.assert_close(f['text'], MODEL.encode_text(T).detach())
    with evaluating(MODEL): torch.testing.assert_close(own_features(MODEL, PAIRS)['image'].norm(dim=1), torch.ones(130))


def test_ranks_by_hand():
    key = torch.tensor([0, 1, 1, 2])
    assert [r.tolist() for r in partner_ranks(torch.eye(4), S.T)] == [[0, 1, 1, 3], [0, 2, 1, 1]] and partner_ranks(torch.eye(4), S.T, key)[0].tolist() == [0, 1, 0, 3]
    assert recall(torch.tensor([0, 1, 1, 3]), (1, 2)) == {'R@1': 0.25, 'R@2': 0.75, 'mean_rank': 2.25, 'median_rank': 2.0}


def test_nan_and_ties_never_win():
    x = torch.eye(4)
    assert retrieval(x, torch.ones(4, 4) / 2, ks=(1,))['mean_recall'] == 0 and retrieval(x, torch.ones(4, 4) / 2, ks=(1, 4), ties='clip_benchmark')['image_to_text_R@4'] == 1
    broken = x.clone(); broken[1] = torch.nan
    assert [r.tolist() for r in partner_ranks(x, broken)] == [[1, 3, 1, 1], [0, 3, 0, 0]]


def asked(comm): return [retrieve(MODEL, data, comm=comm, ties=rule) for data in (PAIRS, PAIRS[:1]) for rule in ('strict', 'clip_benchmark')], labelled_features(MODEL, DATA, comm)[0].tolist()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_the_probes_and_get_the_same_floats(ranks): assert spawn(asked, ranks) == [asked(LOCAL)] * ranks


# ---- fits ----

def scored(head, x): return x.to(head[0]) @ head[0].T + head[1]


def test_the_standardisation_is_folded_into_the_weights():
    x, y = XY
    u, mean, std = standardised(x)
    torch.testing.assert_close(u.std(0, correction=0), torch.ones(8), rtol=1e-3, atol=1e-3)
    w, b = torch.randn(3, 8), torch.randn(3)
    torch.testing.assert_close(scored(folded(w, b, mean, std), x), u @ w.T + b, rtol=1e-2, atol=1e-3)
    ridge, logistic = fit_ridge(x, y, 5), fit_logistic(x, y, 5)
    assert F.cross_entropy(scored(logistic, x), y) < F.cross_entropy(scored(ridge, x), y)


def test_fits_are_those_of_scikit_learn():
    linear_model = pytest.importorskip('sklearn.linear_model')
    x, y = XY[0][:60], XY[1][:60]
    u, mean, std = standardised(x.double())
    ridge = linear_model.Ridge(alpha=0.01 * len(x)).fit(u.numpy(), np.where(np.arange(5) == y.numpy()[:, None], 1., -1.))
    torch.testing.assert_close(scored(fit_ridge(x.double(), y, 5, 0.01), x.double()).numpy(), ridge.predict(u.numpy()), rtol=1e-8, atol=1e-8)
    logistic = linear_model.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=500).fit(u.numpy(), y.numpy())
    ours = scored(fit_logistic(x.double(), y, 5, 0.01), x.double()).softmax(1)
    torch.testing.assert_close(ours.numpy(), logistic.predict_proba(u.numpy()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('n', [130, 6])
def test_least_squares_are_big_visions(n):
    "With more samples than features, and with fewer: the solution of the problem that big_vision states, bias feature of 100 included."
    x, y = XY[0][:n].double(), XY[1][:n]
    std = x.std(0, correction=0) + 1e-5
    z = torch.cat([(x - x.mean(0)) / std, torch.full((n, 1), 100., dtype=torch.float64)], 1)
    t, l2 = 2 * F.one_hot(y, 5).double() - 1, 3.
    w = torch.linalg.lstsq(torch.cat([z, l2**0.5 * torch.eye(9, dtype=torch.float64)]), torch.cat([t, torch.zeros(9, 5, dtype=torch.float64)])).solution
    torch.testing.assert_close(scored(fit_lsr(x, y, 5, l2), x), z @ w, rtol=1e-6, atol=1e-6)


def test_the_penalty_is_chosen_where_it_is_best():
    for top in (1e-6, 3e-4, 0.2, 100.):
        best, tried = peak(lambda v: -abs(np.log10(v) - np.log10(top)))
        assert abs(np.log10(best) - np.log10(top)) < 0.26 and len(tried) <= 13
    assert peak(lambda v: 1.)[0] == pytest.approx(1e-2, rel=1e-6) # a plateau: its middle
    fit, held = stratified(XY[1], 0.2, 3)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(130)) and held.tolist() != stratified(XY[1], 0.2, 4)[1].tolist()
    assert XY[1][held].bincount().tolist() == [int(0.2 * c) for c in XY[1].bincount().tolist()]


def test_a_probe_reports_the_spread_of_its_splits():
    g = torch.Generator().manual_seed(7)
    x, y = torch.randn(120, 30, generator=g), torch.arange(120) % 6
    x = x + 0.9 * torch.randn(6, 30, generator=g)[y]
    train, test = (x[:60], y[:60]), (x[60:], y[60:])
    for fit in ('logistic', 'ridge', 'lsr'):
        got = linear_probe(train, test, fit)
        assert got['top1_min'] <= got['top1'] <= got['top1_max'] and got['top5'] >= got['top1'] and got['n'] == 60 and got['top1'] > 0.4
    fixed, tuned = linear_probe(train, test, l2=1e-6), linear_probe(train, test, valid=test)
    assert fixed['l2'] == 1e-6 and fixed['top1_min'] == fixed['top1_max'] and tuned['n'] == 120 and tuned['train_top1'] >= 0.9
    assert set(fixed) == {'top1', 'top5', 'mean_per_class', 'train_top1', 'l2', 'top1_min', 'top1_max', 'n'}


def test_accuracies_of_scores_by_hand():
    s, y = torch.tensor([[.9, .1, 0.], [.5, .5, 0.], [0., .2, .1], [.3, torch.nan, .1]]), torch.tensor([0, 0, 2, 0])
    assert judged(s, y, (1, 2)) == dict(top1=0.25, top2=1., mean_per_class=pytest.approx((1 / 3 + 0) / 2))


def test_the_minimum_is_found():
    ab = torch.zeros(2, requires_grad=True)
    minimise(lambda: (ab - torch.tensor([3., -1.])).square().sum(), [ab], 10)
    torch.testing.assert_close(ab.detach(), torch.tensor([3., -1.]), rtol=1e-4, atol=1e-4)


def test_shots_are_drawn_alike_by_everybody_and_pull_a_head_as_far_as_they_may():
    x, y = XY
    take = draw_shots(y, 2)
    assert y[take].bincount().tolist() == [2] * 5 and torch.equal(draw_shots(y, 2), take) and not torch.equal(draw_shots(y, 2, seed=1), take)
    head = linear(F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(2)), dim=1))
    stiff, loose = (fit_from(head.weight, x[take], y[take], 7., l2=l2) for l2 in (1e6, 1.))
    torch.testing.assert_close(stiff, head.weight.detach(), rtol=0, atol=1e-3)
    assert (loose - head.weight).norm() > 10 * (stiff - head.weight).norm() and F.cross_entropy(7 * x[take] @ loose.T, y[take]) < F.cross_entropy(7 * head(x[take]), y[take])
    assert few_shot(XY, XY, head, (0,))['0-shot_top1'] == judged(head(x), y)['top1']


def test_few_shots_choose_their_pull_and_print_their_spread():
    g = torch.Generator().manual_seed(8)
    centre = F.normalize(torch.randn(6, 16, generator=g), dim=1)
    y = torch.arange(240) % 6
    x = F.normalize(centre[y] + 0.35 * torch.randn(240, 16, generator=g), dim=1)
    train, test = (x[:120], y[:120]), (x[120:], y[120:])
    names = few_shot(train, test, linear(centre), (0, 1), scale=20.)
    none, lsr = few_shot(train, test, None, (1, 4), (0, 1), scale=20.), few_shot(train, test, None, (1, 4), fit='lsr')
    for got in (none, lsr):
        for k in (1, 4): assert got[f'{k}-shot_top1_min'] <= got[f'{k}-shot_top1'] <= got[f'{k}-shot_top1_max']
    assert names['1-shot_top1'] > none['1-shot_top1'] and lsr['4-shot_l2'] == 1024 and lsr['4-shot_top1'] > lsr['1-shot_top1'] > 1 / 6
    assert few_shot((x[:6], y[:6]), test, None, (1,), scale=20.)['1-shot_l2'] == 1 # nothing is left to choose on
    held = few_shot(train, test, linear(centre.roll(1, 0)), (4,), (0,), 10., 20.), few_shot(train, test, linear(centre.roll(1, 0)), (4,), (0,), scale=20.)
    assert held[1]['4-shot_top1'] > held[0]['4-shot_top1'] # wrong names: a weak pull is chosen


# ---- calibration ----

def test_calibration_by_hand():
    p = torch.tensor([[.95, .05], [.95, .05], [.55, .45], [.25, .75]])
    s, y = p.log(), torch.tensor([0, 1, 1, 1])
    acc, conf, n = reliability(s, y, 10)
    assert n.tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0, 2] and acc[[5, 7, 9]].tolist() == [0, 1, .5] and conf[[5, 7, 9]].tolist() == pytest.approx([.55, .75, .95])
    got = calibration(s, y, 10)
    assert got['ece'] == pytest.approx((0.55 + 0.25 + 2 * 0.45) / 4) and got['confidence'] == pytest.approx(.8) and got['top1'] == .5
    assert got['brier'] == pytest.approx((2 * .05**2 + 2 * .95**2 + 2 * .55**2 + 2 * .25**2) / 4) and got['nll'] == pytest.approx(-np.log([.95, .05, .45, .75]).mean())
    assert calibration(torch.zeros(4, 2), y)['ece'] == pytest.approx(.25) # confidence 1/2; argmax is 0 and one of four is right


@pytest.mark.parametrize('true', [0.05, 1., 20.])
def test_the_temperature_of_labels_drawn_at_one(true):
    g = torch.Generator().manual_seed(9)
    z = 2 * torch.randn(4000, 5, generator=g, dtype=torch.float64)
    y = torch.multinomial(z.softmax(1), 1, generator=g)[:, 0]
    assert fit_temperature(z * true, y) == pytest.approx(true, rel=0.06)


# ---- compositional ----

def test_captions_that_differ_by_a_word():
    image, right, wrong = torch.eye(4), torch.diag(torch.tensor([1., .5, .5, 0.])), torch.diag(torch.tensor([0., .4, .5, .1]))
    assert caption_choice(image, right, wrong) == dict(acc=.5, n=4.) and caption_choice(image, right, wrong, ties='clip_benchmark') == dict(acc=.75, n=4.)


def test_winoground_by_hand():
    image = torch.eye(2).repeat(3, 1)                                             # three pairs, the same two pictures
    text = torch.tensor([[1., 0.], [0., 1.], [1., .9], [.8, 1.], [.9, .5], [.8, .7]]) # all right; all right; the second caption is nearer to the first picture
    assert winoground(image, text) == dict(text_acc=1., image_acc=pytest.approx(2 / 3), acc=pytest.approx(2 / 3), n=3.)
    flat = torch.ones(2, 2)
    assert winoground(image[:2], flat)['acc'] == 0 and winoground(image[:2], flat, ties='clip_benchmark')['acc'] == 0


# ---- lines ----

def test_every_transform_comes_back():
    for name in TRANSFORMS:
        there, back, finite = TRANSFORMS[name]
        t = torch.tensor([.1, .5, .9], dtype=torch.float64)
        torch.testing.assert_close(back(there(t)), t); assert finite(t).all()
    assert transformed([.5, .9], 'logit').tolist() == pytest.approx([0, np.log(9)]) and transformed([.975], 'probit').item() == pytest.approx(1.96, abs=1e-3)


def test_lines_of_known_laws():
    x = np.array([1., 10., 100., 1000.])
    slope, intercept, r2 = fit_line(x, 3 * x**-0.2, 'log')
    assert (slope, np.exp(intercept), r2) == pytest.approx((-0.2, 3., 1.))
    line = fit_line([.2, .5, .8], [.1, .3, .6], 'logit')
    assert line_at((1., 0., 1.), [.3, .7], 'logit') == pytest.approx([.3, .7])
    assert line_at(line, [.2, .5, .8], 'logit') == pytest.approx([.1, .3, .6], abs=.02)


def test_effective_robustness_is_the_distance_from_the_peers():
    logit = lambda p: np.log(p / (1 - p))
    def on_line(clean, extra=0.): return dict(clean=clean, blur=float(1 / (1 + np.exp(-(0.8 * logit(clean) - 0.5)))) + extra)
    peers = [on_line(c) for c in (.2, .4, .6, .8)]
    got = robustness(on_line(.7, .1), peers)
    assert got['blur_effective'] == pytest.approx(.1) and got['blur_r2'] == pytest.approx(1.) and got['blur_scatter'] == pytest.approx(0., abs=1e-9) and got['clean_top1'] == .7
    scattered = robustness(on_line(.7), [on_line(c, d) for c, d in ((.2, .02), (.4, -.02), (.6, .02), (.8, -.02))])
    assert .01 < scattered['blur_scatter'] < .05
    assert robustness(dict(clean=1., blur=0.), peers, n=100)['blur_expected'] < 1 and (inside(0., 10), inside(1., 10), inside(.4, 10)) == (.05, .95, .4)
    with pytest.raises(UserError, match='1 has no finite logit'): robustness(dict(clean=1., blur=0.), peers)


# ---- features that are no vectors, captions that are several ----

class Tokens(nn.Module):
    "Four vectors a picture, six a text and a mask; a similarity of its own and no temperature."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3, 8), nn.Embedding(50, 8)
    def embed(self, batch):
        out = {}
        if 'image' in batch: out['image'] = F.normalize(self.image(batch['image'].flatten(2).transpose(1, 2).float()), dim=-1)
        if 'text' in batch:
            z = self.text(batch['text'])
            out['text'] = dict(tokens=F.normalize(z + z.mean(1, keepdim=True), dim=-1), mask=batch['text'] > 5) # no two texts tie
        return out
    def similarity(self, image, text):
        s = torch.einsum('nie,mte->nmit', image, text['tokens'])
        return s.masked_fill(~text['mask'][None, :, None], -torch.inf).amax(3).mean(2)


TOKENS, OWNER = Tokens(), torch.arange(130).repeat_interleave(torch.arange(130) % 3 + 1)
MANY = torch.randint(6, 50, (len(OWNER), 6), generator=G)


def several(size):
    "Pictures with one, two or three captions, in batches."
    parts = [(i, torch.nonzero((OWNER >= i) & (OWNER < i + size))[:, 0]) for i in range(0, 130, size)]
    return [dict(image=X[i:i + size], text=MANY[rows], owner=OWNER[rows] - i) for i, rows in parts]


def recalls(s_nm, owner_m, k):
    "CLIP_benchmark's: any caption of a picture among the first k; the picture of a caption among the first k."
    right_nm = torch.arange(len(s_nm))[:, None] == owner_m
    to_text = right_nm.gather(1, s_nm.topk(k, 1).indices).any(1).double().mean()
    to_image = right_nm.T.gather(1, s_nm.T.topk(k, 1).indices).any(1).double().mean()
    return float(to_text), float(to_image)


def test_features_may_be_dictionaries():
    f = features(TOKENS, PAIRS)
    assert f['image'].shape == (130, 4, 8) and {k: tuple(v.shape) for k, v in f['text'].items()} == dict(tokens=(130, 6, 8), mask=(130, 6)) and f['text']['mask'].dtype == torch.bool
    torch.testing.assert_close(f['text']['tokens'], TOKENS.embed(dict(text=T))['text']['tokens'].detach()); assert torch.equal(f['key'], K)
    assert {k: tuple(v.shape) for k, v in strip(f['text'], 128, 4).items()} == dict(tokens=(4, 6, 8), mask=(4, 6))


def test_retrieval_ranks_by_the_similarity_of_the_model():
    z = TOKENS.embed(dict(image=X, text=T))
    s, own = TOKENS.similarity(z['image'], z['text']).detach(), torch.arange(130)
    pairs = [{k: v for k, v in batch.items() if k != 'key'} for batch in PAIRS]
    got = retrieve(TOKENS, pairs, ks=(1, 5, 10))
    for k in (1, 5, 10): assert (got[f'image_to_text_R@{k}'], got[f'text_to_image_R@{k}']) == pytest.approx(recalls(s, own, k))
    assert got != retrieve(MODEL, pairs, ks=(1, 5, 10))
    for tile in (32, 64, 4096): assert retrieve(TOKENS, pairs, ks=(1, 5, 10), chunk=tile) == got


@pytest.mark.parametrize('size', [30, 130, 7])
def test_several_captions_count_as_in_clip_benchmark(size):
    for model in (MODEL, TOKENS):
        f = features(model, several(size))
        s = (f['image'] @ f['text'].T if model is MODEL else model.similarity(f['image'], f['text'])).detach()
        got = retrieve(model, several(size), ks=(1, 5, 10))
        assert torch.equal(f['owner'], OWNER) and got['n'] == 130
        for k in (1, 5, 10): assert (got[f'image_to_text_R@{k}'], got[f'text_to_image_R@{k}']) == pytest.approx(recalls(s, OWNER, k))


def test_one_caption_with_an_owner_is_a_pair():
    pairs = [dict(image=X[i:i + 30], text=T[i:i + 30]) for i in range(0, 130, 30)]
    assert retrieve(MODEL, [dict(b, owner=torch.arange(len(b['image']))) for b in pairs]) == retrieve(MODEL, pairs)


def test_pictures_without_captions_are_refused():
    with pytest.raises(UserError, match='some pictures have no caption'): retrieve(MODEL, [dict(image=X, text=T[:2], owner=torch.tensor([0, 1]))], (1,))


def asked_more(comm): return retrieve(TOKENS, PAIRS, comm=comm), retrieve(TOKENS, several(70), comm=comm), retrieve(MODEL, several(20), comm=comm), labelled_features(TOKENS, DATA, comm)[1].tolist()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_tokens_and_several_captions(ranks): assert spawn(asked_more, ranks) == [asked_more(LOCAL)] * ranks


def odd_batch(comm):
    try: return features(MODEL, [dict(image=X[:3]), dict(text=T[:3])], comm)
    except UserError as e: return str(e)


def test_ranks_whose_batches_differ_all_say_so():
    said = spawn(odd_batch, 2)
    assert said[0] == said[1] and said[0].startswith('batches disagree between ranks: some have {"batch": ["int64"], "image": ["float32", 8]}'), said


def texts(comm): return all_texts('κ' * comm.rank, comm)


def test_texts_of_different_lengths_are_gathered(): assert spawn(texts, 3) == [['', 'κ', 'κκ']] * 3


def test_probes_of_tokens_are_those_of_their_mean():
    x, y = labelled_features(TOKENS, DATA)
    torch.testing.assert_close(x, TOKENS.embed(dict(image=X))['image'].mean(1).detach()); assert torch.equal(y, Y)
    assert few_shot((x, y), (x, y), None, (2,), (0,), 1.)['2-shot_top1'] > 0


def test_a_probe_needs_a_vector():
    class Parts(Tokens):
        def embed(self, batch): return dict(image=dict(a=batch['image'].flatten(1).float(), b=batch['image'][:, 0]))
    with pytest.raises(UserError, match='a probe needs a vector for each picture, Parts gives a, b'): labelled_features(Parts(), DATA)


def whole(s, key_n, key_m):
    "Ranks from the whole matrix."
    right = key_n[:, None] == key_m
    return [(~(m < m.masked_fill(~r, -torch.inf).amax(1, keepdim=True)) & ~r).sum(1) for m, r in ((s, right), (s.T, right.T))]


@pytest.mark.parametrize('tile', [32, 96, 1024])
def test_tiles_make_the_ranks_of_the_whole_matrix(tile):
    g = torch.Generator().manual_seed(5)
    image, text = F.normalize(torch.randn(130, 16, generator=g), dim=1), F.normalize(torch.randn(300, 16, generator=g), dim=1)
    for key_n, key_m in ((torch.arange(130), torch.arange(300) % 130), (torch.arange(130) % 40, torch.arange(300) % 40)):
        for a, b in zip(partner_ranks(image, text, key_n, key_m, tile), whole(image @ text.T, key_n, key_m)): assert torch.equal(a, b)


def clip_benchmark_recall(image, text, owner, k):
    "The lines of CLIP_benchmark's `recall_at_k`, in a form that fits a small set."
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), owner] = True
    out = []
    for s, p in ((scores.T, positive.T), (scores, positive)):
        chosen = F.one_hot(torch.topk(s, k, dim=1)[1], num_classes=s.shape[1])
        out.append((((chosen * p[:, None]).sum((1, 2)) / p.sum(1)) > 0).float().mean().item())
    return out


def test_ties_fall_as_in_clip_benchmark():
    "Half of the captions are copies, a third of the pictures too: the strict rule and theirs differ, and theirs is met."
    g = torch.Generator().manual_seed(6)
    image, text = (F.normalize(torch.randn(n, 16, generator=g), dim=1) for n in (60, 180))
    owner = torch.arange(180) // 3
    image[::3] = image[1::3]
    text = F.normalize(image[owner] + text, dim=1)
    text[1::2] = text[::2]
    theirs, strict = retrieval(image, text, owner, (1, 5, 10), 'clip_benchmark'), retrieval(image, text, owner, (1, 5, 10))
    for k in (1, 5, 10):
        assert (theirs[f'image_to_text_R@{k}'], theirs[f'text_to_image_R@{k}']) == pytest.approx(clip_benchmark_recall(image, text, owner, k))
        assert theirs[f'text_to_image_R@{k}'] >= strict[f'text_to_image_R@{k}']
    assert theirs['text_to_image_R@1'] > strict['text_to_image_R@1'] and theirs['image_to_text_R@1'] > strict['image_to_text_R@1']
    for chunk in (7, 60, 1000): assert retrieval(image, text, owner, (1, 5, 10), 'clip_benchmark', chunk) == theirs
    assert strict['mean_recall'] == pytest.approx(np.mean([v for k, v in strict.items() if 'R@' in k])) and strict['captions'] == 180


def test_memory_stays_a_tile():
    "1,000 × 40,000 scores would be 160 MB; both rules keep to a few tiles."
    import resource
    image, text = torch.randn(1000, 8, generator=G), torch.randn(40_000, 8, generator=G)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    retrieval(image, text, torch.arange(40_000) % 1000, ties='strict')
    retrieval(image, text, torch.arange(40_000) % 1000, ties='clip_benchmark', chunk=64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 80_000 # kB
