"Patches, positions and dropping: equal to what they are defined as and to what others compute, laws that hold, errors that advise."
import copy, math, pickle, re
import pytest, torch
import torch.nn.functional as F
from torch import nn
import numpy as np
from clipa_nb.core import UserError, draws_of, fresh_draws, generator, keyed_uniform, seed_of
from clipa_nb.cost import SIZES, n_tokens
from clipa_nb.patch_embedding import FORMS, ClassToken, LearnedPositions, PatchEmbed, SinCos, _fitting, grid_of, patchify, resize_positions, sincos, speeds, tokens, waves
from clipa_nb.token_dropping import IMAGE_STRATEGIES, TokenDrop, _no_window, _patches, _rectangle, _stride, _window, grid_ids, n_keep, no_ids, resize, resize_for, take_tokens, true_ratio

DROPPING = ('random', 'grid', 'block')
def numbers(b, *keys, n=1024):
    "Uniform numbers [b,n], as a batch's draws give them."
    return keyed_uniform(draws_of(seed_of(*keys), np.arange(b)), 'image tokens', n)

GRIDS = [(8, 8), (6, 10), (1, 7), (16, 16), (3, 5)]

# --- patches ---

@pytest.mark.parametrize('shape, patch, bias', [((24, 40), 8, True), ((28, 28), 14, False), ((5, 3), 1, True), ((16, 16), 16, False)])
def test_embedding_four_ways(shape, patch, bias):
    embed = PatchEmbed(24, patch, bias=bias).double(); torch.manual_seed(0)
    if bias: nn.init.normal_(embed.bias)
    x = torch.randn(2, 3, *shape, dtype=torch.float64); got, (h, w) = embed(x); add = embed.bias if bias else 0
    loop = torch.stack([(embed.weight * x[b, :, None, r*patch:(r+1)*patch, c*patch:(c+1)*patch].transpose(0, 1)).sum((1, 2, 3)) + add for b in range(2) for r in range(h) for c in range(w)]).view(2, h * w, 24)
    unfold = F.unfold(x, patch, stride=patch).transpose(1, 2) @ embed.weight.flatten(1).T + add
    convolution = F.conv2d(x, embed.weight, embed.bias, stride=patch).flatten(2).transpose(1, 2)
    for other in (loop, unfold, convolution): torch.testing.assert_close(got, other, rtol=0, atol=1e-12)
    assert (h, w) == grid_of(*shape, patch)

def test_patchify_keeps_every_pixel_once():
    x = torch.arange(2 * 3 * 12 * 20).view(2, 3, 12, 20).to(torch.int32)
    assert patchify(x, 4).dtype == torch.int32 and patchify(x, 4)[0].flatten().sort().values.equal(x[0].flatten())
    assert patchify(x, 4)[1, 5 + 2].equal(x[1, :, 4:8, 8:12].flatten())

def test_patch_weights_of_open_clip_load_as_they_are():
    open_clip = pytest.importorskip('open_clip', reason='open_clip is not installed: nothing to compare with')
    from open_clip.transformer import VisionTransformer
    theirs = VisionTransformer(image_size=28, patch_size=14, width=32, layers=1, heads=2, mlp_ratio=1, output_dim=8)
    ours = PatchEmbed(32, 14); ours.load_state_dict({'weight': theirs.conv1.weight.detach()}); x = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(ours(x)[0], theirs.conv1(x).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)

def test_published_token_counts():
    table = {(16, 64): 17, (16, 96): 37, (16, 112): 50, (16, 160): 101, (16, 224): 197, (14, 70): 26, (14, 84): 37, (14, 98): 50, (14, 112): 65, (14, 224): 257, (14, 336): 577}
    for (patch, size), n in table.items(): assert tokens(size, patch) == tokens((size, size), patch) == n_tokens(size, patch) == n and tokens(size, patch, cls=False) == n - 1

def test_grids_by_hand():
    assert grid_of(48, 80, 16) == (3, 5) and tokens((48, 80), 16, cls=False) == 15 and tokens([224, 224], 16) == 197
    assert (_fitting(100, 16), _fitting(96, 16), _fitting(8, 14), _fitting(0, 14)) == ('96 or 112', '96', '14', '14')
    assert set(PatchEmbed(8, 4).state_dict()) == {'weight'}

@pytest.mark.parametrize('shape, p', [((4, 4), 2), ((8, 24), 4), ((24, 40), 8)])
def test_patchify_is_two_reshapes_and_a_permutation(shape, p):
    x = torch.randint(0, 256, (2, 3, *shape), dtype=torch.uint8); h, w = grid_of(*shape, p)
    assert patchify(x, p).equal(x.reshape(2, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5).reshape(2, h * w, 3 * p * p)) and patchify(x, p).is_contiguous()

def test_class_token_in_front_of_every_sample():
    front = ClassToken(4); x = torch.randn(3, 5, 4); front(x).sum().backward()
    assert front(x.bfloat16()).dtype == torch.bfloat16 and front.token.requires_grad
    assert front(x).shape == (3, 6, 4) and front(x)[:, 1:].equal(x) and front.token.grad.tolist() == [3.] * 4

@pytest.mark.parametrize('call, says', [
    (lambda: tokens(100, 16), 'use 96 or 112'), (lambda: tokens((96, 0), 16), 'use 96 pixels for the height'), (lambda: tokens(224, 0), '1 or more'), (lambda: grid_of(0, 0, 16), 'not divisible'),
    (lambda: PatchEmbed(8, 0), 'found a patch of 0 pixels, expected 1 or more'), (lambda: PatchEmbed(8, -4), 'found a patch of -4 pixels'),
    (lambda: grid_of(100, 96, 16), 'use 96 or 112'), (lambda: grid_of(8, 8, 14), 'use 14 pixels'), (lambda: grid_of(8, 8, 0), '1 or more'), (lambda: SinCos(30), 'multiple of 4'), (lambda: speeds(30), 'use 28 or 32'), (lambda: sincos((8, -1), 8), 'at least 1×1'),
    (lambda: PatchEmbed(8, 4)(torch.zeros(2, 1, 8, 8)), 'convert the images to RGB'), (lambda: PatchEmbed(32, 8)(torch.zeros(2, 3, 25, 40)), 'use 24 or 32'),
    (lambda: resize_positions(torch.zeros(16, 6), (4, 4), (8, 8), 1), 'found 16 positions'), (lambda: resize_positions(torch.zeros(16, 6), (3, 5), (0, 8), 1), 'at least 1×1'),
    (lambda: PatchEmbed(8, 4)(torch.zeros(3, 8, 8)), 'batch axis'), (lambda: PatchEmbed(8, 4)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), 'normalise'), (lambda: PatchEmbed(8, 4)(torch.zeros(1, 3, 0, 8)), 'not divisible'),
    (lambda: sincos((0, 4), 8), 'at least 1×1'), (lambda: sincos((2, 2), 6), 'use 4 or 8'), (lambda: sincos((2, 2), 8, 'mocco'), 'did you mean moco'), (lambda: SinCos(8)((4, 0)), 'at least 1×1'),
    (lambda: LearnedPositions(8, (0, 4)), 'at least 1×1'), (lambda: LearnedPositions(8, (2, 2))((0, 4)), 'at least 1×1'), (lambda: resize_positions(torch.zeros(10, 8), (3, 3), (4, 4)), 'expected 0 + 3×3'),
])
def test_bad_patches_and_positions(call, says):
    with pytest.raises(UserError, match=re.escape(says)): call()

# --- positions ---

@pytest.mark.parametrize('width', [-8, 0, 1, 2, 3, 6, 30, 1282])
def test_the_widths_an_error_offers_work(width):
    with pytest.raises(UserError) as e: speeds(width)
    offered = [int(n) for n in str(e.value).split('use ')[1].split(' or ')]
    assert len(set(offered)) == len(offered) and all(len(speeds(n)) == n // 4 for n in offered)
    assert offered == sorted({max(4, width // 4 * 4), max(4, width // 4 * 4 + 4)})

def test_speeds_by_hand():
    assert (FORMS['moco'](1), FORMS['moco'](32), FORMS['mae'](32)) == (1, 31, 32) and speeds(4, 'moco').tolist() == [1.]
    assert speeds(8, 'moco').tolist() == pytest.approx([1, 1e-4], abs=1e-12) and speeds(8, 'mae').tolist() == pytest.approx([1, 1e-2], abs=1e-12)
    assert waves(3, 8, 'mae', 'cpu')[0].tolist() == [0, 0, 1, 1] and waves(3, 8, 'mae', 'cpu')[2].tolist() == pytest.approx([f(2 * s) for f in (math.sin, math.cos) for s in (1, 0.01)], abs=1e-12)
    with pytest.raises(UserError, match='did you mean moco'): speeds(8, 'moko')

@pytest.mark.parametrize('form', ['moco', 'mae'])
@pytest.mark.parametrize('grid, width', [((3, 5), 8), ((4, 4), 4), ((24, 24), 64)])
def test_sincos_is_its_formula(form, grid, width):
    q = width // 4; speed = [10_000 ** -(k / (max(q - 1, 1) if form == 'moco' else q)) for k in range(q)]
    rows = [[f(v * s) for v in (x, y) for f in (math.sin, math.cos) for s in speed] for y in range(grid[0]) for x in range(grid[1])]
    torch.testing.assert_close(sincos(grid, width, form), torch.tensor(rows, dtype=torch.float64), rtol=0, atol=1e-12)
    assert sincos(grid, width, form, cls=2)[:2].abs().max() == 0 and sincos(grid, width, form, cls=2)[2:].equal(sincos(grid, width, form))

@pytest.mark.parametrize('side, width, cls', [(14, 768, True), (7, 64, False)])
def test_mae_form_is_open_clips(side, width, cls):
    theirs = pytest.importorskip('open_clip.pos_embed', reason='open_clip is not installed: nothing to compare with')
    table = torch.as_tensor(theirs.get_2d_sincos_pos_embed(width, side, cls_token=cls)).double()
    torch.testing.assert_close(sincos((side, side), width, 'mae', cls=cls), table, rtol=0, atol=1e-6)
    assert (sincos((side, side), width, 'moco', cls=cls) - table).abs().max() > 1e-2

def test_released_towers_lie_between_the_published_differences():
    gap = lambda name, size: float((sincos((size // 14,) * 2, SIZES[name].image.width, 'moco') - sincos((size // 14,) * 2, SIZES[name].image.width, 'mae')).abs().max())
    gaps = [gap(name, size) for name in ('L/14', 'H/14', 'bigG/14') for size in (224, 336)]
    assert (round(min(gaps), 3), round(max(gaps), 3)) == (0.013, 0.033)

@pytest.mark.parametrize('old, new', [(7, 14), (14, 7), (6, 16), (16, 24), (4, 4)])
def test_resizing_is_open_clips(old, new):
    model = pytest.importorskip('open_clip.model', reason='open_clip is not installed: nothing to compare with')
    class Stub: pass
    stub = Stub(); stub.visual = Stub(); stub.visual.grid_size = (new, new)
    pos = torch.randn(1 + old * old, 16, generator=generator(0, 'pos')); state = {'visual.positional_embedding': pos.clone()}
    model.resize_pos_embed(state, stub)
    ours = resize_positions(pos, (old, old), (new, new), n_prefix=1)
    torch.testing.assert_close(ours, state['visual.positional_embedding'], rtol=0, atol=1e-6); assert ours[0].equal(pos[0])

def test_resizing_prefixes_and_dtypes():
    pos = torch.randn(3 + 12, 4)
    for n in (0, 1, 3):
        got = resize_positions(pos[3 - n:], (3, 4), (6, 2), n_prefix=n)
        assert got.shape == (n + 12, 4) and got[:n].equal(pos[3 - n:3]) and got[n:].equal(resize_positions(pos[3:], (3, 4), (6, 2)))
    assert resize_positions(pos.bfloat16(), (3, 5), (6, 10)).dtype == torch.bfloat16 and resize_positions(pos.double(), (3, 5), (6, 10)).dtype == torch.float64

def test_learned_positions_learn_through_a_resize():
    for new in ((8, 8), (2, 3)):
        learned = LearnedPositions(4, (4, 4), n_prefix=1); learned(new).square().sum().backward()
        assert learned(new).shape == (1 + new[0] * new[1], 4) and (learned.table.grad.abs().sum(1) > 0).all()

def test_resizing_by_hand():
    ramp = resize_positions(torch.arange(4.)[:, None], (1, 4), (1, 8))[:, 0]
    torch.testing.assert_close(ramp + ramp.flip(0), torch.full((8,), 3.), rtol=0, atol=1e-5)
    assert ramp[3:5].tolist() == pytest.approx([1.25, 1.75], abs=1e-6) and ramp[0] < 0
    torch.testing.assert_close(resize_positions(torch.eye(4), (1, 4), (1, 8)), resize_positions(torch.eye(4), (4, 1), (8, 1)), rtol=0, atol=1e-6)
    torch.testing.assert_close(resize_positions(torch.ones(9, 2), (3, 3), (2, 7)), torch.ones(14, 2), rtol=0, atol=1e-6)
    pos = torch.randn(16, 6, requires_grad=True)
    assert resize_positions(pos, (3, 5), (3, 5), 1) is pos
    bigger = resize_positions(pos, (3, 5), (6, 4), 1); bigger[1:].sum().backward()
    assert bigger[0].equal(pos[0]) and (pos.grad[1:].abs().sum(1) > 0).all() and float(pos.grad[1:].sum()) == pytest.approx(24 * 6, abs=1e-3)

def test_positions_are_called_alike():
    fixed, learned = SinCos(32, n_prefix=1), LearnedPositions(32, (4, 4), n_prefix=1)
    for m in (fixed, learned): assert m((8, 6)).shape == (49, 32) and m((4, 4), dtype=torch.bfloat16).dtype == torch.bfloat16
    assert learned((4, 4)) is learned.table and set(learned.state_dict()) == {'table'}
    assert fixed((8, 8))[1:].equal(sincos((8, 8), 32).float()) and fixed((8, 8))[0].abs().sum() == 0
    with torch.inference_mode(): fresh = SinCos(8); fresh((4, 4))
    assert not fresh((4, 4)).is_inference()

def test_sincos_module_remembers_little_and_saves_nothing():
    m = SinCos(8, n_prefix=1)
    for n in range(1, 30): m((n, 2))
    assert len(m._made) == 16 and m((29, 2)) is m((29, 2)) and not m.state_dict()
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert twin((3, 5)).equal(m((3, 5)))
    with torch.inference_mode(): fresh = SinCos(8); fresh((2, 2))
    x = torch.randn(4, 8, requires_grad=True); (x * fresh((2, 2))).sum().backward(); assert x.grad.equal(fresh((2, 2)))

@pytest.mark.parametrize('write', [lambda t: t.add_(1), lambda t: t[0].fill_(7), lambda t: t.detach().zero_(), lambda t: t.view(-1).mul_(2)])
@pytest.mark.parametrize('mode', [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_nobody_can_spoil_the_remembered_table(write, mode):
    "Remembered, not copied: the same tensor at every step, and another one after somebody wrote into it."
    m, right = SinCos(8, n_prefix=1), sincos((2, 3), 8, cls=True).float()
    with mode(): first = m((2, 3)); assert m((2, 3)) is first; write(first)
    assert not first.equal(right) and m((2, 3)).equal(right) and m((2, 3)) is m((2, 3)), 'the change stayed'
    write(m((2, 3)))
    for twin in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))): assert twin((2, 3)).equal(right) and m((2, 3)).equal(right)

def test_what_antialiasing_averages():
    "What the solution to chapter 04's third exercise says, by the weights of the old rows in each new one."
    plainly = lambda table, n: F.interpolate(table.T[None, :, None], size=(1, n), mode='bicubic')[0, :, 0].T
    smoothly = lambda table, n: resize_positions(table, (1, len(table)), (1, n))
    for old in (8, 16, 32):
        plain, smooth = plainly(torch.eye(old), old // 2), smoothly(torch.eye(old), old // 2)
        assert ((plain[1:-1] != 0).sum(1) == 4).all() and ((plain[1:-1] < 0).sum(1) == 2).all() and (plain.abs().sum(0) > 0.45).all(), 'every old row counts'
        assert ((smooth != 0).sum(1) <= 8).all() and ((smooth[2:-2] != 0).sum(1) == 8).all()
        torch.testing.assert_close(smooth, resize_positions(torch.eye(old), (old, 1), (old // 2, 1))) # a grid of one column is one of one row, turned
    differ = lambda table: float((plainly(table, 4) - smoothly(table, 4)).norm() / smoothly(table, 4).norm())
    assert differ(torch.randn(8, 64, generator=generator(0, 'rows'))) > 5 * differ(sincos((1, 8), 64).float())

# --- dropping: counts ---

@pytest.mark.parametrize('strategy', DROPPING)
@pytest.mark.parametrize('grid', GRIDS)
def test_ids_are_distinct_ascending_and_as_many_as_promised(strategy, grid):
    done = 0
    for ratio in (0., 0.1, 0.3, 0.4, 0.5, 0.75, 8 / 9, 0.9375):
        try: k = n_keep(strategy, grid, ratio)
        except UserError: continue
        ids = IMAGE_STRATEGIES[strategy](numbers(7, 0, strategy), grid, ratio); done += 1
        assert ids.shape == (7, k) and ids.dtype == torch.int64 and ids.min() >= 0 and ids.max() < grid[0] * grid[1] and (ids.diff(dim=1) > 0).all()
        assert true_ratio(strategy, grid, ratio) == 1 - k / (grid[0] * grid[1])
        if ratio == 0: assert ids.equal(torch.arange(grid[0] * grid[1]).expand(7, -1))
    assert done >= 1

def test_counts_by_hand():
    assert _patches((3, 5), 0.) == 15 and n_keep('random', (7, 7), 0.5) == 24 and n_keep('random', (3, 5), 0.) == 15 and n_keep('random', (1, 1), 0.) == 1
    with pytest.raises(UserError, match='ratio up to 0.899'): n_keep('random', (2, 5), 0.9)
    assert n_keep('random', (2, 5), 0.899) == 1
    assert [_window(1 - 1 / s**2) for s in range(1, 33)] == [*range(1, 33)] and [_window(r) for r in (0.5, 0.7, 0.8, 0.97)] == [0] * 4
    assert [_stride((12, 24), 1 - 1 / s**2) for s in (1, 2, 3, 4, 6, 12)] == [1, 2, 3, 4, 6, 12]
    for grid, ratio, says in (((8, 8), 0.5, '0.000 or 0.750'), ((9, 9), 0.75, '0.000 or 0.889'), ((7, 7), 0.75, '0.000 or 0.980, the nearest on a grid of 7×7')):
        with pytest.raises(UserError, match=says): _stride(grid, ratio)
    for ratio, sides, says in ((0.8, range(1, 9), 'expected 0.750 or 0.889, the nearest there are'), (0.999, [1], 'expected 0.000, the'), (0.9998, [1, 50, 100], 'expected 0.9996 or 0.9999, the')):
        assert says in str(_no_window(ratio, sides, 'there are'))
    assert [_window(v) for v in (0.9996, 0.9999)] == [50, 100]
    assert [_rectangle(g, r) for g, r in (((8, 8), 0.75), ((8, 8), 0.5), ((6, 10), 0.75), ((3, 5), 0.), ((5, 5), 0.75), ((7, 7), 0.75))] == [(4, 4), (6, 6), (3, 5), (3, 5), (2, 2), (4, 4)]
    with pytest.raises(UserError, match='leaves none'): _rectangle((1, 16), 0.9)
    assert true_ratio('block', (8, 8), 0.5) == 1 - 36 / 64
    assert no_ids(torch.zeros(2, 6), (2, 3)).equal(torch.arange(6).expand(2, 6))
    assert grid_ids(torch.zeros(1, 24), (4, 6), 0.75)[0].tolist() == [0, 2, 4, 12, 14, 16]
    assert grid_ids(torch.full((1, 24), 1 - 2**-24), (4, 6), 0.75)[0].tolist() == [7, 9, 11, 19, 21, 23]
    assert resize_for(1, 16) == 16 and [resize_for(n, p) for n, p in ((16, 8), (49, 16), (98, 16), (36, 14))] == [32, 112, 160, 84]

def test_equal_numbers_give_equal_ids_and_other_draws_others():
    for s in DROPPING:
        u = numbers(64, 0, s)
        assert IMAGE_STRATEGIES[s](u, (8, 8), 0.75)[5:9].equal(IMAGE_STRATEGIES[s](u[5:9], (8, 8), 0.75))
        assert not IMAGE_STRATEGIES[s](u, (8, 8), 0.75).equal(IMAGE_STRATEGIES[s](numbers(64, 1, s), (8, 8), 0.75))

def test_official_rounding():
    assert [n_keep('random', (s, s), r) for s, r in ((16, 0.3), (16, 0.4), (24, 0.4), (14, 0.75), (14, 0.5))] == [179, 153, 345, 49, 98]

def test_rounding_is_open_clips():
    transformer = pytest.importorskip('open_clip.transformer', reason='open_clip is not installed: nothing to compare with')
    for side, ratio in [(s, r) for s in (7, 14, 16, 24) for r in (0.1, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.9)]:
        theirs = transformer.PatchDropout(ratio).train()(torch.zeros(1, 1 + side**2, 1)).shape[1]
        ours = TokenDrop('random', ratio, n_prefix=1).train()(torch.zeros(1, 1 + side**2, 1), (side, side))[0].shape[1]
        assert ours == theirs, (side, ratio)

def test_four_strategies_meet_at_sixteen():
    assert [n_keep(s, (8, 8), 0.75) for s in DROPPING] + [tokens(resize_for(16, 8), 8, cls=False)] == [16] * 4

@pytest.mark.parametrize('strategy, grid, ratio, says', [(s, (8, 8), r, 'expected 0 ≤ ratio < 1') for s in DROPPING for r in (-0.01, 1., 1.5, float('nan'), float('inf'))]
    + [(s, g, 0.75, 'at least 1×1') for s in DROPPING for g in ((0, 0), (0, 8), (8, 0), (-2, 4))]
    + [('random', (1, 3), 0.75, 'leaves none'), ('block', (1, 3), 0.9, 'leaves none'), ('none', (8, 8), 0.5, 'name a strategy'), ('resize', (8, 8), 0.75, 'it is a transform'), ('rand', (8, 8), 0.75, 'did you mean random')])
def test_bad_ratios_and_grids(strategy, grid, ratio, says):
    with pytest.raises(UserError, match=re.escape(says)): n_keep(strategy, grid, ratio)
    if strategy in IMAGE_STRATEGIES:
        with pytest.raises(UserError, match=re.escape(says)): IMAGE_STRATEGIES[strategy](2, grid, ratio)

@pytest.mark.parametrize('grid', [(8, 8), (7, 7), (6, 9), (12, 24), (1, 5)])
def test_the_ratios_an_error_names_are_the_nearest_that_work(grid):
    true = sorted({1 - 1 / s**2 for s in range(1, 25) if grid[0] % s == grid[1] % s == 0})
    for ratio in (0.1, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99):
        with pytest.raises(UserError) as e: n_keep('grid', grid, ratio)
        named = [float(v) for v in re.findall(r'\d\.\d{3}', str(e.value).split('expected')[1])]
        below, above = [v for v in true if v < ratio], [v for v in true if v > ratio]
        assert named == [round(v, 3) for v in below[-1:] + above[:1]]
        for v in named: n_keep('grid', grid, v)

@pytest.mark.parametrize('side, ratio, sides', [(200, 0.9998, (50, 100)), (17, 0.5, (1, 17)), (23, 0.9, (1, 23)), (48, 0.9978, (16, 24)), (100, 0.99985, (50, 100)), (1000, 0.99999, (250, 500)), (24, 0.8, (2, 3))])
def test_the_ratios_an_error_names_work_on_large_grids(side, ratio, sides):
    "Three digits do not tell a window of 50 from one of 100: as many as it takes are named."
    with pytest.raises(UserError) as e: n_keep('grid', (side, side), ratio)
    named = re.findall(r'\d\.\d+', str(e.value).split('expected')[1])
    assert [n_keep('grid', (side, side), float(v)) for v in named] == [(side // s)**2 for s in sides] and all(len(v) >= 5 for v in named)

def test_the_ratio_an_error_offers_leaves_a_patch():
    for n in (2, 3, 10, 49):
        with pytest.raises(UserError) as e: n_keep('random', (1, n), 1 - 0.5 / n)
        assert n_keep('random', (1, n), float(re.search(r'up to (\d\.\d+)', str(e.value))[1])) >= 1

def test_resizing_pictures():
    x = torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    small = resize(x, 16); exact = F.interpolate(x.double(), size=(16, 16), mode='bilinear', antialias=True)
    assert small.dtype == torch.uint8 and small.shape == (2, 3, 16, 16) and (small.double() - exact).abs().max() <= 0.5 + 1e-3
    assert resize(x.float(), 16).dtype == torch.float32 and resize(x.bfloat16(), 16).dtype == torch.bfloat16
    stripes = (torch.arange(64).view(1, 1, 8, 8) // 8 % 2 * 255).to(torch.uint8)
    assert resize(x[:, :, :, :32], 32).equal(x[:, :, :, :32]) and 100 < resize(stripes, 4)[0, 0, 1:-1].float().mean() < 155 # grey, as from afar
    for budget in range(1, 300):
        side = resize_for(budget, 14) // 14
        assert resize_for(budget, 14) % 14 == 0 and abs(side**2 - budget) == min(abs(s * s - budget) for s in range(1, 20))
    for call in (lambda: resize_for(0, 16), lambda: resize_for(4, 0), lambda: resize(x, 0)):
        with pytest.raises(UserError, match='1 or more'): call()

# --- dropping: laws ---

def worst(count, p, draws): return float(((count - draws * p) / (draws * p * (1 - p)).clamp(min=1e-9).sqrt()).abs()[(p > 0) & (p < 1)].max())

@pytest.mark.parametrize('grid, ratio', [((8, 8), 0.75), ((6, 10), 0.4), ((16, 16), 0.3)])
def test_random_keeps_every_place_alike(grid, ratio):
    n, draws = grid[0] * grid[1], 20_000; ids = IMAGE_STRATEGIES['random'](numbers(draws, 1, 'uniform'), grid, ratio)
    assert worst(torch.bincount(ids.flatten(), minlength=n), torch.full((n,), ids.shape[1] / n), draws) < 4.5

def test_random_keeps_every_subset_alike():
    ids = IMAGE_STRATEGIES['random'](numbers(30_000, 1, 'subsets'), (1, 5), 0.6); count = torch.bincount(ids[:, 0] * 5 + ids[:, 1], minlength=25)
    p = torch.tensor([[0.1 if j > i else 0. for j in range(5)] for i in range(5)]).flatten()
    assert worst(count, p, 30_000) < 4.5 and count[p == 0].sum() == 0

def test_random_under_another_default_dtype():
    before = torch.get_default_dtype()
    try: torch.set_default_dtype(torch.bfloat16); ids = IMAGE_STRATEGIES['random'](numbers(5, 1, 'dtype'), (24, 24), 0.4)
    finally: torch.set_default_dtype(before)
    assert ids.equal(IMAGE_STRATEGIES['random'](numbers(5, 1, 'dtype'), (24, 24), 0.4))

@pytest.mark.parametrize('grid, ratio', [((8, 8), 0.75), ((6, 10), 0.5), ((16, 16), 0.3)])
def test_block_starts_anywhere_it_fits(grid, ratio):
    (h, w), draws = grid, 20_000; kh, kw = (round(s * math.sqrt(1 - ratio)) for s in grid)
    ids = IMAGE_STRATEGIES['block'](numbers(draws, 1, 'block'), grid, ratio); y, x = ids[:, 0] // w, ids[:, 0] % w
    whole = (y[:, None, None] + torch.arange(kh)[:, None]) * w + x[:, None, None] + torch.arange(kw)
    assert ids.equal(whole.flatten(1)) and y.max() == h - kh and x.max() == w - kw
    starts = torch.bincount(y * (w - kw + 1) + x, minlength=(h - kh + 1) * (w - kw + 1)); assert worst(starts, torch.full(starts.shape, 1 / len(starts)), draws) < 4.5
    inside = lambda n, k: torch.tensor([sum(s <= i < s + k for s in range(n - k + 1)) / (n - k + 1) for i in range(n)])
    seen = torch.bincount(ids.flatten(), minlength=h * w); assert worst(seen, (inside(h, kh)[:, None] * inside(w, kw)).flatten(), draws) < 4.5

@pytest.mark.parametrize('grid, s', [((8, 8), 2), ((6, 9), 3), ((8, 4), 4)])
def test_grid_hits_every_window_once_at_every_corner(grid, s):
    draws = 8_000; ids = IMAGE_STRATEGIES['grid'](numbers(draws, 1, 'grid'), grid, 1 - 1 / s**2); y, x = ids // grid[1], ids % grid[1]
    assert ((y // s) * (grid[1] // s) + x // s).sort(1).values.equal(torch.arange(ids.shape[1]).expand(draws, -1))
    corner = (y % s) * s + x % s; assert (corner == corner[:, :1]).all()
    assert worst(torch.bincount(corner[:, 0], minlength=s * s), torch.full((s * s,), 1 / s**2), draws) < 4.5

GOLDEN = {'random': [0, 6, 11, 19, 20, 23], 'grid': [0, 2, 4, 6, 16, 18], 'block': [1, 2, 3, 4, 9, 10]}

def test_the_draws_of_a_seed_never_change():
    first = {s: IMAGE_STRATEGIES[s](numbers(2, 0, 'golden'), (8, 8), 0.75)[1, :6].tolist() for s in DROPPING}
    assert first == GOLDEN, 'the ids of a seed changed: recorded runs cannot be repeated'

# --- dropping: in a tower ---

def where_it_is(n, d=4): return torch.arange(n).float()[None, :, None].expand(3, n, d)

@pytest.mark.parametrize('strategy', DROPPING)
@pytest.mark.parametrize('n_prefix', [0, 1, 5])
def test_kept_tokens_are_those_named_and_prefixes_stay(strategy, n_prefix):
    prefix = -1. - torch.rand(3, n_prefix, 4); x = torch.cat([prefix, where_it_is(64)], 1)
    kept, ids = TokenDrop(strategy, 0.75, n_prefix).train()(x, (8, 8))
    assert kept[:, :n_prefix].equal(prefix) and kept[:, n_prefix:, 0].long().equal(ids) and kept.shape[1] == n_prefix + 16
    same, every = TokenDrop(strategy, 0.75, n_prefix).eval()(x, (8, 8))
    assert same is x and every.equal(torch.arange(64).expand(3, 64))

@pytest.mark.parametrize('strategy', DROPPING)
def test_dropped_tokens_get_no_gradient(strategy):
    x = torch.randn(3, 65, 4, requires_grad=True); kept, ids = TokenDrop(strategy, 0.75, 1)(x, (8, 8)); kept.pow(2).sum().backward()
    alive = torch.cat([torch.ones(3, 1, dtype=torch.bool), torch.zeros(3, 64, dtype=torch.bool).scatter(1, ids, True)], 1)
    assert (x.grad[~alive] == 0).all() and x.grad[alive].equal(2 * x.detach()[alive])

@pytest.mark.parametrize('strategy', DROPPING)
def test_a_sample_drops_the_same_in_any_batch(strategy):
    drop, x, draw = TokenDrop(strategy, 0.75), torch.zeros(64, 64, 1), draws_of(0, np.arange(64))
    whole = drop(x, (8, 8), draw)[1]
    torch.rand(5) # what was drawn before does not matter
    parts = torch.cat([drop(x[:n], (8, 8), d)[1] for d in draw.split((10, 30, 24)) for n in [len(d)]])
    assert parts.equal(whole) and not drop(x, (8, 8), draws_of(1, np.arange(64)))[1].equal(whole)

@pytest.mark.parametrize('strategy', DROPPING)
def test_without_draws_the_default_generator_gives_them(strategy):
    drop, x = TokenDrop(strategy, 0.75), torch.zeros(64, 64, 1)
    torch.manual_seed(3)
    first, second = drop(x, (8, 8))[1], drop(x, (8, 8))[1]
    torch.manual_seed(3)
    assert drop(x, (8, 8), fresh_draws(64))[1].equal(first) and not first.equal(second)

@pytest.mark.parametrize('strategy', DROPPING)
def test_never_looks_at_a_value(strategy):
    kept, ids = TokenDrop(strategy, 0.75, 1)(torch.empty(3, 65, 4, device='meta'), (8, 8)) # a tensor without values
    assert kept.shape == (3, 17, 4) and ids.device.type == kept.device.type == 'meta'

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('strategy', DROPPING)
def test_never_makes_a_gpu_wait(strategy):
    drop, x = TokenDrop(strategy, 0.75, 1), torch.randn(3, 65, 4, device='cuda'); drop(x, (8, 8)); state = torch.cuda.get_rng_state()
    torch.cuda.set_sync_debug_mode('error')
    try: kept, ids = drop(x, (8, 8))
    finally: torch.cuda.set_sync_debug_mode('default')
    torch.cuda.set_rng_state(state)
    assert ids.is_cuda and drop(x, (8, 8))[1].equal(ids) and kept[:, 1:].equal(take_tokens(x[:, 1:], ids))

@pytest.mark.parametrize('strategy', DROPPING)
@pytest.mark.parametrize('backend', ['eager', 'aot_eager'])
def test_traced_whole(strategy, backend):
    torch._dynamo.reset(); drop = TokenDrop(strategy, 0.75, 1); traced = torch.compile(drop, fullgraph=True, backend=backend)
    x, y = (torch.arange(3 * 65 * 2.).view(3, 65, 2).requires_grad_() for _ in range(2))
    torch.manual_seed(7); kept, ids = drop(x, (8, 8)); kept.pow(2).sum().backward()
    torch.manual_seed(7); kept_too, ids_too = traced(y, (8, 8)); kept_too.pow(2).sum().backward()
    assert ids.equal(ids_too) and kept.equal(kept_too) and x.grad.equal(y.grad)
    for h, w in ((6, 10), (4, 4)): assert traced(torch.zeros(2, 1 + h * w, 2), (h, w))[1].shape == (2, h * w // 4)

def test_a_whole_front_of_a_tower_traced():
    class Front(nn.Module):
        def __init__(self): super().__init__(); self.embed, self.cls, self.positions, self.drop = PatchEmbed(8, 4), ClassToken(8), SinCos(8, n_prefix=1), TokenDrop('random', 0.5, 1)
        def forward(self, x): x, grid = self.embed(x); return self.drop(self.cls(x) + self.positions(grid, x.device, x.dtype), grid)[0]
    torch._dynamo.reset(); front = Front(); traced = torch.compile(front, fullgraph=True, backend='eager')
    for size in ((16, 16), (8, 12)):
        x = torch.randn(2, 3, *size); torch.manual_seed(1); a = front(x); torch.manual_seed(1); torch.testing.assert_close(traced(x), a)

def test_positions_must_be_added_before_dropping():
    "The plausible bug: tokens that are their positions must come out as the positions at their ids."
    positions = sincos((8, 8), 32).float()
    def right(drop): kept, ids = drop(positions.expand(3, -1, -1).clone(), (8, 8)); return kept, ids
    def wrong(drop): kept, ids = drop(torch.zeros(3, 64, 32), (8, 8)); return kept + positions[:kept.shape[1]], ids
    for f, ok in ((right, True), (wrong, False)): kept, ids = f(TokenDrop('random', 0.75)); assert kept.equal(positions[ids]) == ok

def test_a_strategy_can_be_handed_in():
    def last(u, grid, ratio): return torch.arange(grid[0] * grid[1] - 3, grid[0] * grid[1], device=u.device).expand(len(u), -1)
    drop = TokenDrop(last, 0.5); assert drop(where_it_is(12), (3, 4))[1].tolist() == [[9, 10, 11]] * 3 and 'last' in repr(drop)

def forgot(u, grid, ratio): pass # the return

@pytest.mark.parametrize('call, says', [
    (lambda: TokenDrop('random', -0.1), 'expected 0 ≤ ratio < 1'), (lambda: TokenDrop('block', 1), 'expected 0 ≤ ratio < 1'), (lambda: TokenDrop('grid', 0.5), '0.000 or 0.750'), (lambda: TokenDrop('none', 0.5), 'name a strategy'),
    (lambda: TokenDrop('blok', 0.5), 'did you mean block'), (lambda: TokenDrop('resize', 0.5), 'it is a transform'), (lambda: TokenDrop()(torch.zeros(1, 0, 4), (0, 8)), 'at least 1×1'),
    (lambda: TokenDrop('random', 0.5, 1)(torch.zeros(1, 64, 4), (8, 8)), 'expected 1 + 8×8'), (lambda: TokenDrop('grid', 0.75)(torch.zeros(1, 49, 4), (7, 7)), '0.000 or 0.980'),
    (lambda: take_tokens(torch.zeros(3, 8, 4), torch.zeros(2, 4, dtype=torch.int64)), 'one row of ids'), (lambda: take_tokens(torch.zeros(3, 8, 4), torch.zeros(4, dtype=torch.int64)), 'expected [B,N,D] and [B,K]'),
    (lambda: TokenDrop('random', 0.75)(torch.zeros(1, 16, 4), (8, 8)), 'drop once'),
    (lambda: TokenDrop('random', 0.5, -1), 'found n_prefix = -1, expected 0 or more'), (lambda: TokenDrop(n_prefix=-1), 'found n_prefix = -1'),
    (lambda: TokenDrop(forgot, 0.5)(torch.zeros(1, 8, 4), (2, 4)), "the strategy forgot gave NoneType, expected ids [B,K]"), (lambda: TokenDrop(lambda *a, **k: [[0, 1]], 0.5)(torch.zeros(1, 8, 4), (2, 4)), 'gave list, expected'),
    (lambda: TokenDrop(lambda u, grid, ratio: torch.ones(len(u), 8, dtype=torch.bool), 0.5)(torch.zeros(1, 8, 4), (2, 4)), 'gave torch.bool, expected ids [B,K]: an int64 tensor'),
])
def test_bad_use_of_the_dropper(call, says):
    with pytest.raises(UserError, match=re.escape(says)): call()
