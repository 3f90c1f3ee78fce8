"Chapters 15, 16 and 18 and the exam under bad input: templates, names, classes without pictures, ties that rounding must not decide, recipes that cannot be drawn."
import warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import UserError, generator
from clipa_nb.probes import draw_shots, few_shot, partner_ranks
from clipa_nb.engine.features import labelled_features
from clipa_nb.engine.asking import check_names, fill
from clipa_nb.zero_shot import linear


# ---- prompts ----

@pytest.mark.parametrize('template', ['a photo of a {name}.', '{} and {}', '{', '}', 'a {{}}', 'a {0.colour}', 'a {:d}', 'a photo of a star', ''])
@pytest.mark.parametrize('name', ['star', '{}'])
def test_templates_that_are_none(template, name):
    with pytest.raises(UserError, match='no place for the class name'): fill(template, name)


@pytest.mark.parametrize('template, said', [('a {}.', 'a {}.'), ('{}', '{}'), ('{0}, a {0}', '{}, a {}'), ('{!r}', "'{}'"), ('a {{{}}}', 'a {{}}'), (lambda n: n + 's', '{}s')])
def test_a_name_may_be_anything(template, said): assert fill(template, '{}') == said


def test_the_same_name_twice_is_said():
    ids = torch.tensor([[[1, 2]], [[3, 4]], [[1, 2]]])
    with pytest.warns(UserWarning, match="1 of 3 class names.*'star' and 'star'"): check_names(ids, ['star', 'ring', 'star'])
    with warnings.catch_warnings():
        warnings.simplefilter('error'); check_names(ids[:2], ['star', 'ring'])


# ---- shots ----

class Flat(nn.Module):
    "A model whose features are its pictures."
    def __init__(self):
        super().__init__(); self.logit_scale = nn.Parameter(torch.tensor(1.))
    def encode_image(self, x, normalize=False): return F.normalize(x.flatten(1).float(), dim=1)


@pytest.mark.parametrize('missing', [0, 3, 6])
def test_few_shots_of_a_class_without_pictures(missing):
    y = torch.tensor([k for k in range(7) for _ in range(4) if k != missing])
    data = [dict(image=torch.rand(len(y), 3, 2, 2, generator=generator(0, 'pictures')), label=y)]
    with pytest.raises(UserError, match=f'1 shots, but class {missing} has 0 training images'): few_shot(*[labelled_features(Flat(), data)] * 2, linear(torch.eye(7, 12)), (1, 2))
    assert '0-shot_top1' in few_shot(*[labelled_features(Flat(), data)] * 2, linear(torch.eye(7, 12)), (0,))


def test_shots_without_a_head_are_of_the_classes_there_are():
    assert draw_shots(torch.tensor([0, 1, 0, 1]), 2).sort().values.tolist() == [0, 1, 2, 3]


# ---- ties ----

@pytest.mark.parametrize('n', [1000, 1025, 1026, 1028, 1030, 1500])
def test_the_side_of_a_tile_decides_no_tie(n):
    "Every third caption is another one's copy, bit for bit: the copies tie, whatever strip they lie in."
    image, text = (F.normalize(torch.randn(n, 512, generator=generator(0, s)), dim=1) for s in 'it')
    text[::3] = text[1::3][torch.arange(len(text[::3])) % len(text[1::3])]
    image = F.normalize(text + 0.01 * image, dim=1)
    first = partner_ranks(image, text)[0]
    assert int((first == 0).sum()) <= n - len(text[::3])
    for tile in (7, 64, 100, 1000, 4096): assert torch.equal(partner_ranks(image, text, tile=tile)[0], first), tile


def test_ranks_are_those_of_the_whole_matrix():
    image, text = (F.normalize(torch.randn(101, 16, generator=generator(1, s)), dim=1) for s in 'it')
    s, key = image @ text.T, torch.arange(101) % 40
    for k in (None, key):
        right = torch.eye(101, dtype=bool) if k is None else key[:, None] == key
        ranks = ((s >= s.masked_fill(~right, -2).amax(1, keepdim=True)) & ~right).sum(1)
        for tile in (1, 7, 64, 1024): assert torch.equal(partner_ranks(image, text, k, tile=tile)[0], ranks), tile


# ---- worlds ----

def test_worlds_that_do_not_exist():
    from clipa_nb.recipes import ToyData, recipe, toy_world
    with pytest.raises(UserError, match='did you mean'): recipe('clipa-h14')
    with pytest.raises(UserError, match='did you mean demo'): toy_world(ToyData(name='dmo'))
    with pytest.raises(UserError, match='did you mean noise'): toy_world(ToyData(name='demo', dials=(('nois', 3.),)))


# ---- the exam ----

def test_the_handwritten_digits():
    pytest.importorskip('sklearn')
    from clipa_nb.app.exam import digit_set
    digits = digit_set(64)
    assert digits['image'].shape == (1797, 3, 64, 64) and digits['label'].bincount().min() > 170


def test_no_evaluations_no_exam():
    from clipa_nb.app.exam import evaluate, skipped
    from clipa_nb.recipes import recipe
    assert evaluate(None, None, recipe('clipa-v2-h14')) == ({}, []) and skipped(None, recipe('clipa-v2-h14')) == {}


def test_evaluations_that_lead_nowhere():
    from clipa_nb.app.exam import exams
    from clipa_nb.recipes import TOY
    for kind, says in (('app.exam:ToyExm', 'did you mean ToyExam'), ('app.exams:ToyExam', 'no module app.exams'), ('recipes:Stage', 'build\\(context\\)')):
        with pytest.raises(UserError, match=says): exams(TOY.replace(evaluations=(kind,)))


def test_a_recipe_without_a_world_is_asked_about_the_toy_recipes():
    from clipa_nb.app.exam import toy_data
    from clipa_nb.recipes import TOY, ToyData, recipe
    own = ToyData(name='scattered')
    assert toy_data(recipe('clipa-v2-h14')) == TOY.data and toy_data(TOY.replace(data=own)) == own
    assert toy_data(recipe('clipa-v2-h14'), TOY.stages[0].replace(data=own)) == own


class Seeing(nn.Module):
    "Six numbers of a picture; no texts."
    cfg = type('cfg', (), dict(image_size=32))
    def encode_image(self, x, normalize=False): return F.normalize(F.adaptive_avg_pool2d(x.float(), (1, 2)).flatten(1), dim=1)


def test_an_exam_leaves_out_and_names_what_a_model_cannot_answer():
    from clipa_nb.app.exam import Context, ToyExam, evaluate, skipped
    from clipa_nb.recipes import TOY
    exam = ToyExam().build(Context(TOY, TOY.stages[0], None, small=True, quick=True))
    assert exam(Seeing()) == {} and exam.examples(Seeing()) == []
    why = 'it does not encode texts'
    assert ToyExam().skipped(Seeing()) == skipped(Seeing(), TOY) == {'zero-shot': why, 'retrieval': why}
    assert evaluate(Seeing(), None, TOY, small=True) == ({}, [])


def test_what_is_quick_and_what_is_small():
    from clipa_nb.app.exam import Context, ToyExam
    from clipa_nb.recipes import TOY
    def amounts(**kw): return ToyExam().amounts(Context(TOY, TOY.stages[0], None, **kw))
    assert amounts() == dict(n_class=8, n_pairs=1000) and amounts(small=True) == dict(n_class=1, n_pairs=100)
    assert amounts(quick=True) == dict(n_class=2, n_pairs=200, shifts=()) and amounts(quick=True, small=True) == dict(n_class=1, n_pairs=100, shifts=())
    quick = ToyExam().build(Context(TOY, TOY.stages[0], None, small=True, quick=True))
    assert quick.sets['seen']['image'].shape[-1] == 32 and quick.digits is None and quick.templates == ['a photo of a {}']


def test_questions_without_glyphs_or_shifts():
    from clipa_nb.app.exam import toy_questions, toy_sets
    from clipa_nb.recipes import TOY
    sets = toy_sets(TOY.data, 32, n_class=1, n_pairs=20, shifts=())
    assert set(sets) == {'seen', 'heldout', 'shifts', 'drawn', 'pairs'} and sets['shifts'] == {} and len(set(sets['pairs']['text'])) == 20
    assert list(toy_questions(sets)) == ['seen', 'heldout', 'shape', 'colour', 'glyphs']
    plain = toy_sets(TOY.data.replace(dials=(), name='scattered'), 32, n_class=1, n_pairs=20)
    for data, names in toy_questions(plain).values(): assert int(data['label'].max()) < len(names)


def test_examples_right_and_wrong():
    from clipa_nb.app.exam import best_captions
    class Known(Flat):
        "Half of the pictures match their caption, the other half the next one's."
        cfg = type('cfg', (), dict(context_length=1))
        def encode_text(self, ids, normalize=False): return torch.eye(20)[ids.flatten()]
    wanted = torch.arange(20); wanted[10:] = torch.arange(10, 20).roll(1)
    pairs = dict(image=torch.eye(20)[wanted][:, None, :, None], text=[str(i) for i in range(20)])
    def words(texts, n): return torch.tensor([[int(t)] for t in texts])
    for n, right in ((4, 2), (12, 6), (20, 10)):
        found = best_captions(Known(), words, pairs, n)
        assert len(found) == n and sum(e['right'] for e in found) == right and all((e['true'] == e['best']) == e['right'] for e in found)
