"Chapter 16's guards, and the features, ranks and fits behind its probes."
import numpy as np, pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.probes import (TRANSFORMS, encoded, _transformed, _wrong_in_front, all_rows, all_texts, as_linear, draw_shots, effective_robustness, features, few_shot, fit_from, fit_line, fit_logistic,
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
    (lambda: encoded(MODEL, dict(image=X[:2], text=T[:3])), '2 images, 3 texts: give one of each for every sample'), (lambda: encoded(MODEL, {}), 'a batch with neither image nor text'),
    (lambda: own_features(MODEL, [PAIRS[0], dict(image=X[:2])]), 'batches disagree: one has image 8, text 8, key, batch, another image 8, batch'), (lambda: own_features(MODEL, [dict(image=X[:2], text=T[:3])]), '2 images, 3 texts'),
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
    got = retrieval(TOKENS, pairs, ks=(1, 5, 10))
    for k in (1, 5, 10): assert (got[f'image_to_text_R@{k}'], got[f'text_to_image_R@{k}']) == pytest.approx(recalls(s, own, k))
    assert got != retrieval(MODEL, pairs, ks=(1, 5, 10))
    for tile in (32, 64, 4096): assert retrieval(TOKENS, pairs, ks=(1, 5, 10), tile=tile) == got


@pytest.mark.parametrize('size', [30, 130, 7])
def test_several_captions_count_as_in_clip_benchmark(size):
    for model in (MODEL, TOKENS):
        f = features(model, several(size))
        s = (f['image'] @ f['text'].T if model is MODEL else model.similarity(f['image'], f['text'])).detach()
        got = retrieval(model, several(size), ks=(1, 5, 10))
        assert torch.equal(f['owner'], OWNER) and got['n'] == 130
        for k in (1, 5, 10): assert (got[f'image_to_text_R@{k}'], got[f'text_to_image_R@{k}']) == pytest.approx(recalls(s, OWNER, k))


def test_one_caption_with_an_owner_is_a_pair():
    pairs = [dict(image=X[i:i + 30], text=T[i:i + 30]) for i in range(0, 130, 30)]
    assert retrieval(MODEL, [dict(b, owner=torch.arange(len(b['image']))) for b in pairs]) == retrieval(MODEL, pairs)


def test_pictures_without_captions_are_refused():
    with pytest.raises(UserError, match='some pictures have no caption'): retrieval(MODEL, [dict(image=X, text=T[:2], owner=torch.tensor([0, 1]))], (1,))


def asked_more(comm): return retrieval(TOKENS, PAIRS, comm=comm), retrieval(TOKENS, several(70), comm=comm), retrieval(MODEL, several(20), comm=comm), linear_probe(TOKENS, DATA, DATA, comm=comm)


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
    assert set(few_shot(TOKENS, DATA, DATA, None, (1, 2))) == {'1-shot_top1', '2-shot_top1'} # no temperature


def test_a_probe_needs_a_vector():
    class Parts(Tokens):
        def embed(self, batch): return dict(image=dict(a=batch['image'].flatten(1).float(), b=batch['image'][:, 0]))
    with pytest.raises(UserError, match='a probe needs a vector for each picture, Parts gives a, b'): linear_probe(Parts(), DATA, DATA)


def as_it_was(query, target, key, tile):
    "The histogram as it was computed when a similarity could only be a product."
    n, tile = len(query), -(-min(tile, len(query)) // 32) * 32
    total = torch.zeros(n, dtype=torch.int64)
    def cut(x, i): return F.pad(x[i:i + tile], (0, 0, 0, tile - len(x[i:i + tile])))
    def pieces(i):
        for j in range(0, n, tile):
            right = key[i:i + tile, None] == key[j:j + tile]
            yield (cut(query, i) @ cut(target, j).T)[:len(right), :right.shape[1]], right
    for i in range(0, n, tile): total += torch.bincount(_wrong_in_front(lambda: pieces(i), torch.full((len(query[i:i + tile]),), -torch.inf)), minlength=n)
    return total


def test_products_are_those_they_were():
    "Ties within rounding are decided alike: captions repeat with noise of one bit."
    g = torch.Generator().manual_seed(5)
    image, text = (F.normalize(torch.randn(300, 64, generator=g), dim=1) for _ in 'it')
    text[1::2] = text[::2] * (1 + 2.**-23); image[::2] = text[::2]
    for key in (torch.arange(300), torch.arange(300) % 90):
        for tile in (32, 96, 1024):
            assert torch.equal(rank_counts(image, text, key, tile), as_it_was(image, text, key, tile)) and torch.equal(rank_counts(text, image, key, tile), as_it_was(text, image, key, tile))
