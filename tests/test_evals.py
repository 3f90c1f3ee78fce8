"Chapters 15 and 16 under bad input: templates, names, classes without pictures, and ties that rounding must not decide."
import warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import UserError, generator
from clipa_nb.probes import draw_shots, few_shot, rank_counts
from clipa_nb.zero_shot import check_names, fill, linear


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
    with pytest.raises(UserError, match=f'1 shots, but class {missing} has 0 training images'): few_shot(Flat(), data, data, linear(torch.eye(7, 12)), (1, 2))
    assert set(few_shot(Flat(), data, data, linear(torch.eye(7, 12)), (0,))) == {'0-shot_top1'}


def test_shots_without_a_head_are_of_the_classes_there_are():
    assert draw_shots(torch.tensor([0, 1, 0, 1]), 2).sort().values.tolist() == [0, 1, 2, 3]


# ---- ties ----

@pytest.mark.parametrize('n', [1000, 1025, 1026, 1028, 1030, 1500])
def test_the_side_of_a_tile_decides_no_tie(n):
    "Every third caption is another one's copy, bit for bit: the copies tie, whatever strip they lie in."
    image, text = (F.normalize(torch.randn(n, 512, generator=generator(0, s)), dim=1) for s in 'it')
    text[::3] = text[1::3][torch.arange(len(text[::3])) % len(text[1::3])]
    image = F.normalize(text + 0.01 * image, dim=1)
    first = rank_counts(image, text)
    assert int(first[0]) <= n - len(text[::3])
    for tile in (7, 64, 100, 1000, 4096): assert torch.equal(rank_counts(image, text, tile=tile), first), tile


def test_ranks_are_those_of_the_whole_matrix():
    image, text = (F.normalize(torch.randn(101, 16, generator=generator(1, s)), dim=1) for s in 'it')
    s, key = image @ text.T, torch.arange(101) % 40
    for k in (None, key):
        right = torch.eye(101, dtype=bool) if k is None else key[:, None] == key
        ranks = ((s >= s.masked_fill(~right, -2).amax(1, keepdim=True)) & ~right).sum(1)
        for tile in (1, 7, 64, 1024): assert torch.equal(rank_counts(image, text, k, tile=tile), ranks.bincount(minlength=101)), tile
