"Chapter 15's guards, and an evaluation that several ranks share."
import contextlib, io, warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.zero_shot import (accuracy, batched, build_zero_shot_classifier, check_names, class_vectors, confusion, context_of, evaluating, fill, labelled, linear,
                                not_below, predict, scores, share, tally, text_head, together, zero_shot)

NAMES, TEMPLATES = ['ab', 'cd', 'ef', 'gh', 'ij'], ['{}', 'a {}', lambda name: name[::-1]]


class Small(nn.Module):
    "Pictures of 12 numbers and texts of six letters."
    context_length = 6
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.logit_scale = nn.Linear(12, 8), nn.Embedding(50, 8), nn.Parameter(torch.tensor(2.))
    def encode_image(self, x, normalize=False): return F.normalize(self.image(x.flatten(1).float()), dim=1) if normalize else self.image(x.flatten(1).float())
    def encode_text(self, x, normalize=False): return F.normalize(self.text(x).mean(1), dim=1) if normalize else self.text(x).mean(1)


def tok(texts, context_length=6, strategy=None): return torch.tensor([[ord(c) * 7 % 50 for c in (t + ' ' * context_length)[:context_length]] for t in texts])


MODEL, G = Small(), torch.Generator().manual_seed(1)
X, Y = torch.rand(130, 3, 2, 2, generator=G), torch.randint(0, 5, (130,), generator=G)
DATA, HEAD = batched(X, Y, 30), text_head(MODEL, tok, NAMES, TEMPLATES)


# ---- names and heads ----

@pytest.mark.parametrize('template', ['a photo of a star', 'a photo of a {name}.', '{} and {}', '{', 'a {{}}'])
def test_a_template_without_a_place_for_the_name(template):
    with pytest.raises(UserError, match='no place for the class name'): fill(template, 'red')


def test_a_template_with_a_place():
    assert fill('{}', 'red star') == 'red star' and fill('a {}', '{}') == 'a {}' and fill(lambda n: f'two {n}s', 'red star') == 'two red stars'


def test_a_model_that_does_not_say_how_long_its_texts_are(): assert context_of(nn.Identity()) is None and context_of(MODEL) == 6


def test_the_same_name_twice_is_counted_once_and_different_names_are_quiet():
    ids = tok(['red star', 'red ring', 'blue star'], 10).view(3, 1, 10)
    with pytest.warns(UserWarning, match="1 of 3 class names have the same 10 tokens as another in every prompt, first 'red star' and 'red star': use different names"): check_names(ids[[0, 0, 2]], ['red star', 'red star', 'blue star'])
    with pytest.warns(UserWarning, match='2 of 3 class names have the same 1 tokens'): check_names(torch.zeros(3, 1, 1, dtype=torch.int64), ['red star', 'red ring', 'blue star'])
    with warnings.catch_warnings():
        warnings.simplefilter('error'); check_names(ids, ['red star', 'red ring', 'blue star'])


def test_class_vectors_are_mean_directions_however_many_are_encoded_together():
    w = class_vectors(MODEL, tok, NAMES, TEMPLATES)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(5))
    for k, name in enumerate(NAMES): torch.testing.assert_close(w[k], F.normalize(MODEL.encode_text(tok([fill(t, name) for t in TEMPLATES]), normalize=True).mean(0), dim=0).detach())
    for n in (1, 2, None): torch.testing.assert_close(class_vectors(MODEL, tok, NAMES, TEMPLATES, classes_per_batch=n), w)
    assert torch.equal(class_vectors(MODEL, tok, NAMES, 'a {}'), class_vectors(MODEL, tok, NAMES, ['a {}']))
    assert torch.equal(build_zero_shot_classifier(MODEL, tok, NAMES, TEMPLATES, num_classes_per_batch=50), class_vectors(MODEL, tok, NAMES, TEMPLATES, classes_per_batch=50).T)
    assert HEAD.bias is None and torch.equal(HEAD.weight.detach(), w)


@pytest.mark.parametrize('names, templates, options, words', [([], ['{}'], {}, '0 class names and 1 templates'), (NAMES, [], {}, '5 class names and 0 templates'), (NAMES, '{}', dict(classes_per_batch=0), '0 classes per batch')])
def test_a_head_needs_names_and_templates(names, templates, options, words):
    with pytest.raises(UserError, match=words): class_vectors(MODEL, tok, names, templates, **options)


def test_progress_is_shown_where_it_is_asked_for():
    with contextlib.redirect_stderr(io.StringIO()) as said: build_zero_shot_classifier(MODEL, tok, NAMES, 'a {}', num_classes_per_batch=2, use_tqdm=True)
    assert 'class vectors' in said.getvalue()
    with contextlib.redirect_stderr(io.StringIO()) as said: class_vectors(MODEL, tok, NAMES, 'a {}')
    assert said.getvalue() == ''


def test_a_linear_holds_what_it_is_given():
    assert linear(torch.eye(2), torch.tensor([1., 2.]))(torch.ones(2)).tolist() == [2., 3.] and linear(torch.eye(2)).bias is None


# ---- what is evaluated ----

@pytest.mark.parametrize('call, words', [
    (lambda: batched(X, Y[1:], 100), '130 images and 129 labels: give one label for each image'),
    (lambda: labelled(dict(image=X), 5, 'cpu'), 'has no label'), (lambda: labelled(DATA[0], 3, 'cpu'), 'but the head has 3 classes'),
    (lambda: tally(MODEL, [], HEAD, lambda s, l: l, (1,)), 'there is no image to evaluate'), (lambda: zero_shot(MODEL, DATA, HEAD, ks=(200,)), 'top-200 of 5 classes'),
    (lambda: zero_shot(MODEL, batched(X, Y + 100, 50), HEAD), 'the head has 5 classes'), (lambda: accuracy(torch.zeros(3, 3, dtype=torch.int64), [0]), 'no image of these classes')])
def test_what_cannot_be_evaluated(call, words):
    with pytest.raises(UserError, match=words): call()


def test_every_module_is_left_in_its_mode_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()); model[0].eval()
    with pytest.raises(RuntimeError):
        with evaluating(model):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            raise RuntimeError
    assert (model.training, model[0].training, model[1].training, torch.is_grad_enabled()) == (True, False, True, True)


def test_what_fails_alone_fails():
    with pytest.raises(UserError, match='labels from 3 to 9'):
        with together(LOCAL): raise UserError('labels from 3 to 9')


def test_ties_and_nan_count_against_the_model():
    right = torch.tensor([0, 2])
    assert not_below(torch.tensor([[.9, .1, .2], [.9, .1, .2]]), right).tolist() == [0, 1]
    for s in (torch.full((2, 3), 0.5), torch.full((2, 3), torch.nan)): assert not_below(s, right).tolist() == [2, 2]
    assert zero_shot(MODEL, DATA, linear(torch.zeros(5, 8)), (1,))['top1'] == 0


def test_tables_agree_with_the_scores():
    c, guess = confusion(MODEL, DATA, HEAD), scores(MODEL, X, HEAD).argmax(1)
    assert int(c.sum()) == 130 and torch.equal(c.sum(1), Y.bincount(minlength=5)) and torch.equal(c.sum(0), guess.bincount(minlength=5))
    assert accuracy(c) == pytest.approx(zero_shot(MODEL, DATA, HEAD, (1,))['top1']) and accuracy(c, groups=[0] * 5) == 1
    assert torch.equal(predict(MODEL, X, HEAD, size=7), guess) and predict(MODEL, X[:0], HEAD).numel() == 0
    assert list(share(iter('abc'))) == ['a', 'b', 'c'] and int(tally(MODEL, DATA, HEAD, lambda s, l: torch.bincount(l, minlength=5), (5,)).sum()) == 130


def evaluation(comm): return zero_shot(MODEL, DATA[:3], HEAD, comm=comm), confusion(MODEL, DATA[:3], HEAD, comm).tolist()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_an_evaluation_and_get_the_same_floats(ranks): assert spawn(evaluation, ranks) == [evaluation(LOCAL)] * ranks


def bad_label(comm):
    try: return zero_shot(MODEL, [DATA[0], dict(DATA[1], label=DATA[1]['label'] + 999)], HEAD, comm=comm)
    except UserError as e: return str(e)


def test_a_bad_label_on_one_rank_ends_the_evaluation_on_all():
    first, second = spawn(bad_label, 2)
    assert first == 'the evaluation failed on another rank: its message says why' and 'but the head has 5 classes' in second
