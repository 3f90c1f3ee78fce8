"Chapter 16's guards, and the features, ranks and fits behind its probes."
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.probes import (TRANSFORMS, _encoded, _transformed, _wrong_in_front, all_rows, as_linear, draw_shots, effective_robustness, features, few_shot, fit_from, fit_line, fit_logistic,
                             fit_ridge, labelled_features, line_at, linear_probe, minimise, own_features, rank_counts, recall, retrieval, robustness, standardised, strip, top1)
from clipa_nb.zero_shot import batched, evaluating, linear


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
S = torch.tensor([[.9, .1, .3, .2], [.5, .4, .1, .3], [.2, .6, .6, .1], [.8, .7, .9, .3]]) # chapter 16's four captions


# ---- refusals ----

@pytest.mark.parametrize('call, words', [
    (lambda: _encoded(MODEL, dict(image=X[:2], text=T[:3]), 'cpu'), '2 images, 3 texts: give one of each for every sample'), (lambda: _encoded(MODEL, {}, 'cpu'), 'a batch with neither image nor text'),
    (lambda: own_features(MODEL, [PAIRS[0], dict(image=X[:2])]), 'batches disagree: one has image, text, key, batch, another image, batch'), (lambda: own_features(MODEL, [dict(image=X[:2], text=T[:3])]), '2 images, 3 texts'),
    (lambda: features(MODEL, []), 'there is nothing to encode'),
    (lambda: recall(torch.tensor([1, 2, 0, 1]), (5,)), 'R@5 among 4 candidates'), (lambda: retrieval(MODEL, [dict(image=X)]), "needs batches with 'image' and 'text', these have image"),
    (lambda: retrieval(MODEL, PAIRS, ks=(1000,)), 'R@1000 among 130 pairs'), (lambda: labelled_features(MODEL, DATA, classes=3), 'labels from 0 to 4: expected 0 to 2'),
    (lambda: labelled_features(MODEL, batched(X, Y - 1, 30)), 'labels from -1 to 3: expected 0 to M − 1'), (lambda: labelled_features(MODEL, PAIRS), "needs batches with 'image' and 'label'"),
    (lambda: linear_probe(MODEL, DATA, DATA, fit='lasso'), "unknown fit 'lasso'"), (lambda: draw_shots(Y, 10_000), '10000 shots, but class'), (lambda: draw_shots(Y, 1, classes=6), 'class 5 has 0 training images'),
    (lambda: few_shot(MODEL, DATA, DATA, linear(torch.eye(2, 8))), 'expected 0 to 1'), (lambda: robustness(MODEL, {}, None), '0 sets and no shift among them'), (lambda: robustness(MODEL, dict(clean=DATA), None), '1 sets and no shift'),
    (lambda: _transformed([.5, 1.], 'logit'), '1 has no finite logit'), (lambda: _transformed([0.], 'log'), '0 has no finite log'), (lambda: _transformed([np.inf], None), 'inf has no finite value'), (lambda: _transformed([.5], 'sqrt'), "unknown transform 'sqrt'"),
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
    assert rank_counts(torch.eye(4), S.T, None).tolist() == [1, 2, 0, 1] and rank_counts(torch.eye(4), S.T, key).tolist() == [2, 1, 0, 1]
    assert recall(torch.tensor([1, 2, 0, 1]), (1, 2)) == {'R@1': 0.25, 'R@2': 0.75, 'mean_rank': 2.25, 'median_rank': 2.0}
    piece = torch.tensor([[0.9, 0.8, 0.1], [0.5, 0.5, 0.5]]), torch.tensor([[False, True, False], [True, False, False]])
    assert _wrong_in_front(lambda: [piece], torch.full((2,), -torch.inf)).tolist() == [1, 2]


def asked(comm): return retrieval(MODEL, PAIRS, comm=comm), retrieval(MODEL, PAIRS[:1], comm=comm), linear_probe(MODEL, DATA, DATA, comm=comm)


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_the_probes_and_get_the_same_floats(ranks): assert spawn(asked, ranks) == [asked(LOCAL)] * ranks


# ---- fits ----

def test_the_standardisation_is_folded_into_the_weights():
    x, y = labelled_features(MODEL, DATA)
    u, mean, std = standardised(x)
    torch.testing.assert_close(u.std(0, correction=0), torch.ones(8), rtol=1e-3, atol=1e-3)
    w, b = torch.randn(3, 8), torch.randn(3)
    torch.testing.assert_close(as_linear(w, b, mean, std)(x), u @ w.T + b, rtol=1e-2, atol=1e-3)
    ridge, logistic = fit_ridge(x, y, 5), fit_logistic(x, y, 5)
    assert F.cross_entropy(logistic(x), y) < F.cross_entropy(ridge(x), y) and top1(ridge, x, ridge(x).argmax(1)) == 1.


def test_the_minimum_is_found():
    ab = torch.zeros(2, requires_grad=True)
    minimise(lambda: (ab - torch.tensor([3., -1.])).square().sum(), [ab], 10)
    torch.testing.assert_close(ab.detach(), torch.tensor([3., -1.]), rtol=1e-4, atol=1e-4)


def test_shots_are_drawn_alike_by_everybody_and_pull_a_head_as_far_as_they_may():
    x, y = labelled_features(MODEL, DATA)
    take = draw_shots(y, 2)
    assert y[take].bincount().tolist() == [2] * 5 and torch.equal(draw_shots(y, 2), take) and not torch.equal(draw_shots(y, 2, seed=1), take)
    head = linear(F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(2)), dim=1))
    stiff, loose = (fit_from(head, x[take], y[take], 7., l2=l2) for l2 in (1e6, 1.))
    torch.testing.assert_close(stiff.weight.detach(), head.weight.detach(), rtol=0, atol=1e-3)
    assert (loose.weight - head.weight).norm() > 10 * (stiff.weight - head.weight).norm() and F.cross_entropy(7 * loose(x[take]), y[take]) < F.cross_entropy(7 * head(x[take]), y[take])
    assert few_shot(MODEL, DATA, DATA, head, (0,))['0-shot_top1'] == top1(head, x, y)


# ---- lines ----

def test_every_transform_comes_back():
    for name in TRANSFORMS:
        there, back, finite = TRANSFORMS[name]
        t = torch.tensor([.1, .5, .9], dtype=torch.float64)
        torch.testing.assert_close(back(there(t)), t); assert finite(t).all()
    assert _transformed([.5, .9], 'logit').tolist() == pytest.approx([0, np.log(9)]) and _transformed([.975], 'probit').item() == pytest.approx(1.96, abs=1e-3)


def test_lines_of_known_laws():
    x = np.array([1., 10., 100., 1000.])
    slope, intercept, r2 = fit_line(x, 3 * x**-0.2, 'log')
    assert (slope, np.exp(intercept), r2) == pytest.approx((-0.2, 3., 1.))
    line = fit_line([.2, .5, .8], [.1, .3, .6], 'logit')
    assert line_at((1., 0., 1.), [.3, .7], 'logit') == pytest.approx([.3, .7])
    assert effective_robustness([.2, .5], line_at(line, [.2, .5], 'logit'), line) == pytest.approx([0., 0.], abs=1e-12)


def test_the_drop_is_what_the_shifts_lose():
    head = linear(torch.randn(5, 8, generator=torch.Generator().manual_seed(3)))
    got = robustness(MODEL, dict(clean=DATA, a=DATA[:2], b=DATA[2:]), head)
    assert set(got) == {'clean_top1', 'a_top1', 'b_top1', 'average_top1', 'drop'}
    assert got['drop'] == pytest.approx(got['clean_top1'] - (got['a_top1'] + got['b_top1']) / 2)
    assert 'drop' not in robustness(MODEL, dict(a=DATA), head)
