"The toy world: the same on every machine, split without leaks, truth that agrees with the pixels, errors that advise."
import hashlib, itertools, json, os, runpy, subprocess, sys, textwrap
from pathlib import Path
import numpy as np
import pytest
import torch
from clipa_nb.core import UserError
from clipa_nb.toyworld import (COLOURS, FILLS, GROUNDS, LIMITS, SHADES, SHAPE_NAMES, SHIFTS, SPACING, WORLDS, World, boxes, caption_text,
                               captions, check_world, class_names, class_scenes, distinct, draws, facts, keys, labels, masks, pairs, pick, questions,
                               render, scenes, shifted)
from clipa_nb.engine.painter import glyph_masks
from clipa_nb.engine.writer import LANGUAGES, fact_keys, lexicon

ARRAYS = ('index', 'count', 'kind', 'colour', 'fill', 'font', 'x', 'y', 'half', 'angle', 'axis', 'ground', 'dark', 'level', 'slope')
hues, DEMO = list(COLOURS), World() # the demo's world, without glyphs

def digest(sc, langs=tuple(LANGUAGES)):
    "One hash of specs and of captions."
    h = hashlib.sha256()
    for k in ARRAYS: h.update(np.ascontiguousarray(getattr(sc, k)).tobytes())
    for lang in langs: h.update('|'.join(caption_text(sc, lang)).encode())
    return h.hexdigest()[:16]

def shown(sc): return {(hues[c], SHAPE_NAMES[k]) for c, k in zip(sc.colour[sc.kind >= 0], sc.kind[sc.kind >= 0])}

# --- the same everywhere, in any order ---

GOLDEN = {'demo': ('0c635b7e9a32a664', 'ceba6c1a37dac803'), 'rich': ('a573ed96bb5337ca', 'c98e4f670c86a2d6'), # in English, which recorded runs read, and in both languages
          'scattered': ('6a305fe4c2947d22', 'c2b3612eef2d7e47'), 'glyphs': ('4725151234065fd9', 'e1c9651bd50e8079')}

@pytest.mark.parametrize('name', WORLDS)
def test_specs_and_captions_never_change(name):
    sc = scenes(DEMO if name == 'demo' else WORLDS[name], 0, range(300))
    assert (digest(sc, ('en',)), digest(sc)) == GOLDEN[name], 'specs or captions of a seed changed: every recorded result is of another world'

@pytest.mark.parametrize('name', WORLDS)
def test_order_and_company_do_not_matter(name):
    w, some = WORLDS[name], np.array([91, 3, 3, 250, 17]); whole = scenes(w, 2, range(300)); part = scenes(w, 2, some)
    for k in ARRAYS: np.testing.assert_array_equal(getattr(whole[some], k), getattr(part, k))
    assert caption_text(part) == [caption_text(whole)[i] for i in some]
    assert [c for c in captions(part)] == [captions(whole)[i] for i in some]
    assert questions(part) == [questions(whole)[i] for i in some]
    np.testing.assert_array_equal(keys(part), keys(whole)[some])
    worst = (render(part, 48).int() - render(whole, 48)[some].int()).abs().max()
    assert worst <= 1

def test_seeds_and_splits_differ():
    w = WORLDS['demo']
    assert len({digest(scenes(w, seed, range(50), split)) for seed in (0, 1) for split in ('train', 'val', 'heldout', 'unseen')}) == 8

CODE = '''
import sys, numpy as np, torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_toyworld import *
for name, size in (('demo', 64), ('rich', 64), ('glyphs', 37)):
    sc = scenes(WORLDS[name], 4, range(64))
    print(digest(sc))
    np.save(f'{sys.argv[2]}/{name}.npy', np.concatenate([render(sc, size, shift=s).numpy() for s in (None, *SHIFTS)]))
'''

def test_pixels_within_one_level_on_an_older_processor(tmp_path):
    said = {}
    for capability in ('native', 'default'):
        out = tmp_path / capability; out.mkdir(); env = {**os.environ, **({'ATEN_CPU_CAPABILITY': 'default'} if capability == 'default' else {})}
        said[capability] = subprocess.run([sys.executable, '-c', CODE, str(Path(__file__).parent), str(out)], env=env, capture_output=True, text=True, check=True).stdout
    assert said['native'] == said['default']
    for name in ('demo', 'rich', 'glyphs'):
        a, b = (np.load(tmp_path / c / f'{name}.npy').astype(int) for c in ('native', 'default'))
        assert np.abs(a - b).max() <= 1, name
        assert (a != b).mean() < 0.001

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA here')
@pytest.mark.parametrize('shift', [None, *SHIFTS])
def test_a_gpu_draws_the_same(shift):
    for name in WORLDS:
        sc = scenes(WORLDS[name], 4, range(64)); there = render(sc, 64, device='cuda', shift=shift)
        assert there.device.type == 'cuda'
        assert (there.cpu().int() - render(sc, 64, shift=shift).int()).abs().max() <= 1

# --- chance and decisions ---

def test_every_scene_and_purpose_has_numbers_of_its_own():
    np.testing.assert_array_equal(draws(0, 'train', np.array([8]), 'pair', 3)[0], draws(0, 'train', np.array([7, 8]), 'pair', 3)[1])
    assert draws(0, 'val', np.array([7]), 'x')[0] != draws(0, 'train', np.array([7]), 'x')[0]

def test_outcomes_come_in_their_shares():
    np.testing.assert_array_equal(pick(np.array([0., 0.59, 0.6, 0.99]), (0.6, 0.4)), [0, 0, 1, 1])
    np.testing.assert_array_equal(pick(np.array([0.5]), (0, 3, 0)), [1])

def test_distinct_things_are_distinct_and_equally_likely():
    np.testing.assert_array_equal(distinct(np.array([[2.5 / 5, 3.5 / 4]]), 5), [[2, 4]])
    three = distinct(draws(0, 'train', np.arange(6000), 'pair', 3), 4)
    assert {len(set(r)) for r in three.tolist()} == {3}
    np.testing.assert_allclose(np.bincount(three.reshape(-1)) / 6000, [0.75] * 4, atol=0.03)

def test_specs_are_indexed_like_arrays():
    sc = scenes(DEMO, 0, [5, 6])
    assert len(sc) == 2 and len(sc[1]) == 1 and sc[[1, 0]].index.tolist() == [6, 5]
    np.testing.assert_array_equal(sc[1:].draw('x'), sc.draw('x')[1:])

def test_no_jitter_within_its_limits_makes_a_caption_lie():
    assert 2 * LIMITS['jitter_2'][1] < SPACING[1, 1] - SPACING[1, 0] and 2 * LIMITS['jitter_3'][1] < SPACING[2, 2] - SPACING[2, 1]

def test_empty_slots_hold_nothing():
    sc = scenes(DEMO, 0, range(500))
    np.testing.assert_array_equal((sc.kind >= 0).sum(1), sc.count)
    assert (sc.half[sc.kind < 0] == 0).all() and (np.abs(sc.angle) <= 20).all()

def test_one_draw_sets_brightness_and_red_tint():
    "A known blemish that every recorded picture has: among dark grounds the brighter are the redder."
    sc = scenes(DEMO, 0, range(8000)); level = sc.level[sc.dark]
    np.testing.assert_array_equal(sc.level.mean(1) < 100, sc.dark)
    red, blue = (np.corrcoef(level.mean(1), level[:, k] - level.mean(1))[0, 1] for k in (0, 2))
    assert red > 0.5 > 0 > blue

# --- splits ---

def test_every_colour_and_shape_has_three_heldout_partners():
    held = pairs('heldout')
    assert (len(pairs('all')), len(pairs('seen')), len(held), len(pairs('unseen'))) == (144, 108, 36, 48)
    assert [sum(c == hue for c, _ in held) for hue in hues] == [3] * 12
    assert [sum(s == shape for _, s in held) for shape in SHAPE_NAMES[:12]] == [3] * 12
    assert set(held) | set(pairs('seen')) == set(pairs('all')) and not set(held) & set(pairs('seen'))

@pytest.mark.parametrize('split, allowed', [('train', 'seen'), ('val', 'seen'), ('heldout', 'heldout'), ('unseen', 'unseen')])
def test_no_object_of_any_scene_leaves_its_split(split, allowed):
    three = WORLDS['rich'].replace(n_objects=(0.2, 0.4, 0.4), glyphs=0.)
    for w in (DEMO, three):
        sc = scenes(w, 0, range(6000), split)
        assert shown(sc) <= set(pairs(allowed))
        assert set(np.unique(sc.count)) == set(range(1, len(w.n_objects) + 1))
    assert shown(scenes(DEMO, 0, range(6000), split)) == set(pairs(allowed))

@pytest.mark.parametrize('split', ['heldout', 'unseen'])
def test_heldout_splits_show_no_glyphs(split): assert scenes(WORLDS['glyphs'], 0, range(200), split).kind.max() < len(SHAPE_NAMES)

def test_no_training_caption_names_a_heldout_pair():
    held = {f'{c} {s}' for c, s in pairs('heldout') + pairs('unseen')}
    for text in caption_text(scenes(DEMO, 0, range(5000))):
        words = text.split()
        assert not held & {' '.join(p) for p in zip(words, words[1:])}

def test_objects_of_a_scene_differ_and_lie_as_said():
    sc = scenes(World(n_objects=(0., 0.5, 0.5)), 0, range(3000))
    for i in range(3):
        for j in range(i):
            both = sc.count > i
            assert ((sc.kind[:, i] != sc.kind[:, j]) | (sc.colour[:, i] != sc.colour[:, j]))[both].all()
            assert (sc.x[:, j] < sc.x[:, i])[both & (sc.axis == 1)].all()
            assert (sc.y[:, j] < sc.y[:, i])[both & (sc.axis == 2)].all()

def test_the_demo_world_is_the_one_that_was_tried():
    assert set(WORLDS['demo'].diff(DEMO)) <= {'glyphs'}
    sc = scenes(DEMO, 0, range(20_000)); one, two = sc.count == 1, sc.count == 2
    assert abs(one.mean() - 0.6) < 0.02 and (one | two).all()
    assert 11 <= sc.half[one, 0].min() < 11.2 and 24.8 < sc.half[one, 0].max() <= 25
    assert 10 <= sc.half[two].min() < 10.1 and 15.4 < sc.half[two].max() <= 15.5
    assert np.abs(sc.x[one]).max() <= 4 and np.abs(sc.y[one]).max() <= 4 and np.abs(sc.angle).max() <= 20
    assert abs(np.abs(sc.x[two & (sc.axis == 1)]).mean() - 16) < 0.2 and abs((sc.axis[two] == 1).mean() - 0.5) < 0.03
    assert (sc.ground == 1).all() and (sc.fill[sc.kind >= 0] == 0).all() and abs(sc.dark.mean() - 0.5) < 0.02
    text = caption_text(sc)
    for t, c, k in zip(text, sc.colour, sc.kind): assert all(f'{hues[a]} {SHAPE_NAMES[b]}' in t for a, b in zip(c, k) if b >= 0)
    share = lambda f, rows: np.mean([f(t) for t, r in zip(text, rows) if r])
    assert abs(share(lambda t: any(w in t for w in (' left of ', ' right of ', ' above ', ' below ')), two) - 0.4) < 0.02
    assert abs(share(lambda t: 'background' in t, one | two) - 0.2) < 0.02
    assert abs(share(lambda t: any(w in t.split() for w in ('small', 'medium', 'large')), one) - 0.3) < 0.02

# --- words ---

@pytest.mark.parametrize('lang', LANGUAGES)
@pytest.mark.parametrize('name', WORLDS)
def test_words_are_the_text_and_every_word_has_its_one_tag(name, lang):
    sc = scenes(WORLDS[name], 3, range(2000)); table = lexicon(lang); sep = ' ' if lang == 'en' else ''
    for i, (cap, text) in enumerate(zip(captions(sc, lang), caption_text(sc, lang))):
        assert cap.text == text == sep.join(w for w, *_ in cap.words)
        assert all(table[w] == t for w, t, _ in cap.words)
        assert {o for *_, o in cap.words} - {-1} == set(range(sc.count[i]))
        assert 3 <= len(cap.words) <= 30

@pytest.mark.parametrize('lang', LANGUAGES)
@pytest.mark.parametrize('n', [1, 2, 3])
def test_a_caption_has_3_to_30_words_whatever_is_said(n, lang):
    dials = ('say_fill', 'say_ground', 'orders', 'filler', 'opener', 'glyphs'); said = dict(say_size=1., say_place=1., say_relation=1., say_shade=1., synonyms=0.5); shortened = 0
    for i, corner in enumerate(itertools.product((0., 1.), repeat=len(dials))):
        sc = scenes(World(n_objects=(0.,) * (n - 1) + (1.,), **(said if i % 3 else {}), **dict(zip(dials, corner))), i, range(100))
        for cap in captions(sc, lang):
            assert 3 <= len(cap.words) <= 30, cap.text
            assert {o for *_, o in cap.words} - {-1} == set(range(n))
            articles = [w for w, _, o in cap.words if w == '个' and o >= 0]
            if lang == 'zh' and not articles: shortened += 1; assert len(cap.words) + 2 * n > 30 # only where nothing else is left to drop
            elif lang == 'zh': assert len(articles) == n
    assert (shortened > 0) == (lang == 'zh' and n == 3)

def test_words_speak_of_the_object_they_belong_to():
    sc = scenes(DEMO, 0, range(2000))
    for i, cap in enumerate(captions(sc)):
        for word, _, o in cap.words:
            if word in COLOURS: assert hues[sc.colour[i, o]] == word
            if word in SHAPE_NAMES: assert SHAPE_NAMES[sc.kind[i, o]] == word

def test_relations_in_captions_are_true():
    sc = scenes(World(say_relation=1., n_objects=(0., 1.)), 0, range(2000)); seen = set()
    for i, cap in enumerate(captions(sc)):
        order = list(dict.fromkeys(o for *_, o in cap.words if o >= 0)); a, b = order
        said = next(w for w in ('left', 'right', 'above', 'below') if w in cap.text.split()); seen.add(said)
        dx, dy = sc.x[i, b] - sc.x[i, a], sc.y[i, b] - sc.y[i, a]
        assert dict(left=dx > 0, right=dx < 0, above=dy > 0, below=dy < 0)[said]
    assert seen == {'left', 'right', 'above', 'below'}

@pytest.mark.parametrize('w', [World(n_objects=(0., 1.), jitter_2=15., size_2=(1., 32.)), World(n_objects=(0., 0., 1.), jitter_3=10., size_3=(1., 32.))])
def test_relations_are_true_and_centres_in_view_at_the_limits_of_jitter(w):
    sc = scenes(w, 0, range(60_000))
    for k in range(sc.kind.shape[1] - 1):
        beside = sc.axis == 1
        assert (sc.x[:, k + 1] - sc.x[:, k])[beside].min() >= 1 and (sc.y[:, k + 1] - sc.y[:, k])[~beside].min() >= 1
    assert np.abs(sc.x).max() <= 31 and np.abs(sc.y).max() <= 31
    assert masks(sc[:500], 160)[sc.kind[:500] >= 0].any((1, 2)).all() # something of every shape is in the picture

@pytest.mark.parametrize('half', [1., 8., 32.])
def test_every_shape_shows_in_every_corner_at_the_limit_of_jitter(half):
    shapes, corners, angles = (a.reshape(-1, 1) for a in np.meshgrid(np.arange(len(SHAPE_NAMES)), np.arange(4), np.arange(0, 360, 15.), indexing='ij'))
    check_world(DEMO.replace(jitter_1=26.))
    sc = scenes(World(n_objects=(1.,)), 0, range(len(shapes))).replace(kind=shapes, angle=angles.astype(np.float32), half=np.full(shapes.shape, half, np.float32),
                                                                      x=np.where(corners % 2, 26, -26).astype(np.float32), y=np.where(corners // 2, 26, -26).astype(np.float32))
    assert masks(sc, 128).any((2, 3)).all()

def test_keys_are_equal_exactly_where_meaning_is():
    w = WORLDS['rich'].replace(n_objects=(0.5, 0.5), say_fill=0., say_place=0., say_size=0.2, say_ground=0., glyphs=0.3)
    sc = scenes(w, 0, range(30_000)); k, text = keys(sc), caption_text(sc)
    meanings = {}
    for a, t in zip(k.tolist(), text): meanings.setdefault(t, set()).add(a)
    assert max(map(len, meanings.values())) == 1                              # the same text always has the same key
    np.testing.assert_array_equal(k, keys(sc, captions(sc)))
    np.testing.assert_array_equal(k, keys(sc, captions(sc, 'zh')))            # in any language
    plain = {}                                                               # canonical wording: what differs only in style has one key, and the other way round
    calm = sc.replace(world=w.replace(opener=0., filler=0., synonyms=0., orders=0.))
    np.testing.assert_array_equal(keys(calm), k)
    def canonical(words):
        objects = {}
        for v, _, o in words: objects.setdefault(o, []).append(v)
        rest = objects.pop(-1, []); related = [v for v in rest if v in ('left', 'right', 'above', 'below')]
        phrases = [tuple(v) for _, v in sorted(objects.items())] if related else sorted(tuple(v) for v in objects.values())
        axis = {'left': 'row', 'right': 'row', 'above': 'column', 'below': 'column'}[related[0]] if related else ''
        return (tuple(phrases), axis, *[v for v in rest if v in ('dark', 'light')])
    for cap in captions(calm): plain.setdefault(canonical([q for q in cap.words if q[0] not in ('this', 'is', 'there', 'photo', 'of')]), set()).add(cap.key)
    assert max(map(len, plain.values())) == 1 and len(plain) == len(set(k.tolist()))

def test_takes_are_other_captions_of_the_same_scene():
    sc = scenes(WORLDS['rich'], 0, range(500)); a, b = caption_text(sc, take=0), caption_text(sc, take=1)
    assert np.mean([x != y for x, y in zip(a, b)]) > 0.9

def test_class_names_are_words_of_the_world():
    for kind in ('pairs', 'shapes', 'colours', 'unseen', 'digits', 'letters'):
        assert {w for n in class_names(kind) for w in n.split()} <= set(lexicon())

# --- truth ---

@pytest.mark.parametrize('name', WORLDS)
def test_boxes_are_those_of_the_masks(name):
    sc = scenes(WORLDS[name], 1, range(150)); b, m = boxes(sc), masks(sc, 160).numpy()
    assert b.shape == (*sc.kind.shape, 4) and b.dtype == np.float32 and m.shape == (*sc.kind.shape, 160, 160)
    assert (b[sc.kind < 0] == 0).all() and not m[sc.kind < 0].any()
    for i, k in zip(*np.nonzero(sc.kind >= 0)):
        cx, cy, w, h = b[i, k] * 160
        if not m[i, k].any(): assert min(w, h) < 4; continue
        rows, cols = np.flatnonzero(m[i, k].any(1)), np.flatnonzero(m[i, k].any(0))
        got = np.array([cx - w / 2, cx + w / 2, cy - h / 2, cy + h / 2])
        assert np.abs(got - [cols[0], cols[-1] + 1, rows[0], rows[-1] + 1]).max() < 3.5, (name, i, k)

def test_masks_hold_the_colour():
    sc = scenes(World(n_objects=(1.,), noise=0.), 0, range(100)); x, m = render(sc, 64).float(), masks(sc, 64)[:, 0]
    inner = -torch.nn.functional.max_pool2d(-m[:, None].float(), 3, 1, 1)[:, 0] > 0
    for i in range(100):
        off = (x[i][:, inner[i]] - torch.tensor(list(COLOURS.values())[sc.colour[i, 0]])[:, None].float()).abs().amax(0) > 1
        assert off.float().mean() < 0.05 # the notch of a heart, the waist of a bow

def test_labels_name_the_first_object():
    sc = scenes(DEMO, 0, range(500)); names = class_names('pairs')
    assert [names[y] for y in labels(sc)] == [f'{hues[c]} {SHAPE_NAMES[k]}' for c, k in zip(sc.colour[:, 0], sc.kind[:, 0])]

@pytest.mark.parametrize('split, n', [('seen', 108), ('heldout', 36), ('unseen', 48), ('digits', 10), ('letters', 26)])
def test_class_scenes_are_balanced_and_true(split, n):
    sc, y = class_scenes(DEMO, 0, split, 2); names = class_names(split if split in ('unseen', 'digits', 'letters') else 'pairs')
    assert len(sc) == 2 * n and (sc.count == 1).all() and set(np.bincount(y)) <= {0, 2} and len(set(y.tolist())) == n
    for text, label in zip(caption_text(sc), y): assert names[label].split()[-1] in text.split()
    if split in ('seen', 'heldout', 'unseen'): assert shown(sc) == set(pairs(split))

def test_answers_are_true():
    sc = scenes(DEMO, 0, range(3000)); kinds = set()
    for i, (q, a) in enumerate(questions(sc)):
        objects = [(hues[c], SHAPE_NAMES[k]) for c, k in zip(sc.colour[i], sc.kind[i]) if k >= 0]; words = q.split(); kinds.add(words[1])
        if q.startswith('how many'): assert a == ('one', 'two')[len(objects) - 1]
        elif q.startswith('is there'): assert (a == 'yes') == (tuple(words[-2:]) in objects)
        elif q.startswith('is the background'): assert (a == 'dark') == sc.dark[i]
        elif q.startswith('what colour'): assert [c for c, s in objects if s == words[-1]] == [a]
        elif len(words) == 3: assert [f'a {s}' for c, s in objects if c == words[-1]] == [a]
        else:
            other = objects.index(tuple(words[-2:])); here = 1 - other
            assert a == 'a ' + ' '.join(objects[here])
            assert (here == 0) == (words[2] in ('left', 'above'))
    assert kinds >= {'many', 'there', 'the', 'colour', 'is'}

# --- pictures ---

@pytest.mark.parametrize('size', [32, 33, 64, 96, 224])
def test_any_size(size):
    for name in WORLDS:
        x = render(scenes(WORLDS[name], 0, range(5)), size)
        assert x.shape == (5, 3, size, size) and x.dtype == torch.uint8 and x.float().std() > 5

def test_objects_are_visible_against_their_ground():
    sc, _ = class_scenes(DEMO.replace(noise=0.), 0, 'seen', 4); x, m = render(sc, 64).float(), masks(sc, 64)[:, 0]
    for i in range(len(sc)):
        inside, outside = x[i][:, m[i]].mean(1), x[i][:, ~m[i]].mean(1)
        assert (inside - outside).norm() > 40, caption_text(sc[i])

@pytest.mark.parametrize('shift', SHIFTS)
def test_shifts_change_what_they_say(shift):
    shapes, letters = scenes(DEMO, 0, range(40)), scenes(WORLDS['glyphs'], 0, range(40))
    changed = lambda sc: (render(sc, 64, shift=shift) != render(sc, 64)).flatten(1).any(1).float().mean()
    assert changed(letters) == 1 and changed(shapes) == (shift != 'fonts')
    if shift == 'fonts': assert shifted(letters, shift).font.max() == len(glyph_masks()['fonts']) - 1 and letters.font.max() < glyph_masks()['n_train']
    if shift == 'rotate': assert (np.abs(shifted(shapes, shift).angle) >= 30).all()

def test_glyph_masks_are_what_the_script_draws():
    pytest.importorskip('matplotlib'); pytest.importorskip('scipy')
    sys.path.insert(0, str(Path(__file__).parent))
    import make_glyphs
    z = glyph_masks()
    assert tuple(z['fonts']) == make_glyphs.TRAIN + make_glyphs.HELD_OUT and int(z['n_train']) == len(make_glyphs.TRAIN) >= 3
    for f, c in ((0, '7'), (4, 'Q'), (6, 'B')):
        fresh = make_glyphs.mask(str(z['fonts'][f]), c).astype(int)
        assert np.abs(fresh - z['masks'][f, make_glyphs.CHARACTERS.index(c)]).mean() < 2

def test_sizes_agree_and_the_shape_is_that_asked_for():
    sc = scenes(DEMO, 0, range(32))
    assert [tuple(render(sc[:2], s).shape) for s in (32, 37, 224)] == [(2, 3, s, s) for s in (32, 37, 224)]
    small, large = (torch.nn.functional.interpolate(render(sc, s).float(), size=32, mode='area') for s in (32, 224))
    assert (small - large).abs().mean() < 6 # most of it grain

def test_the_middle_of_a_circle_has_the_circles_colour():
    sc = scenes(World(n_objects=(1.,)), 0, range(200)); sc = sc[np.isin(sc.kind[:, 0], [SHAPE_NAMES.index(s) for s in ('circle', 'square', 'heart', 'star')])]
    own = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[sc.colour[:, 0]]
    assert ((render(sc, 64)[:, :, 32, 32].float() - own).abs() < 30).all() # grain apart

def test_contrast_pulls_objects_towards_their_ground():
    sc = scenes(World(n_objects=(1.,), noise=0., grounds=(1., 0., 0., 0.)), 0, range(100))
    sure = masks(sc, 64)[:, :1].expand(-1, 3, -1, -1) & (render(sc, 64).float() - torch.tensor(list(COLOURS.values()))[sc.colour[:, 0]][:, :, None, None]).abs().amax(1, keepdim=True).le(1)
    faint = render(sc.replace(world=sc.world.replace(contrast=(0.5, 0.5))), 64).float(); level = torch.from_numpy(sc.level)[:, :, None, None]
    assert ((2 * faint - level - render(sc, 64).float())[sure].abs() <= 3).all() # bytes are rounded

def test_fills_and_grounds_multiply():
    one = scenes(World(n_objects=(0., 1.), noise=0.), 0, np.full(12, 2))
    table = one.replace(fill=np.repeat(np.repeat(np.arange(len(FILLS)), 4)[:, None], 2, 1), ground=np.tile(np.arange(len(GROUNDS)), 3))
    assert len({r.tobytes() for r in render(table, 96).numpy()}) == 12

def test_scattered_objects_touch_less_than_half_the_patches_of_the_demo():
    def touched(name): return masks(scenes(WORLDS[name], 0, range(300)), 64)[:, 0].view(300, 8, 8, 8, 8).any(4).any(2).sum((1, 2)).float().mean()
    assert touched('scattered') < touched('demo') / 2

def test_shifted_specs():
    sc = scenes(DEMO, 0, range(2000))
    np.testing.assert_array_equal(shifted(sc, 'small').half * 2, sc.half)
    assert (shifted(sc, 'fonts').font[sc.kind >= 0] >= 6).all() and list(SHADES) == list(COLOURS)

def test_facts_come_in_their_shares():
    sc = scenes(DEMO, 0, range(2000)); f = facts(sc)
    np.testing.assert_allclose([(f.size[:, 0] > 0).mean(), (f.axis[sc.count == 2] > 0).mean(), (f.shade > 0).mean()], [0.3, 0.4, 0.2], atol=0.06)
    np.testing.assert_array_equal(f.colour[:, 0] - 1, sc.colour[:, 0])
    assert (f.noun[:, 0] > 1).all() and facts(sc, take=1).size.tolist() != f.size.tolist()

def test_there_are_a_thousand_meanings_to_choose_among():
    for w in (WORLDS['rich'], DEMO, World(n_objects=(1.,))):
        k = np.unique(fact_keys(facts(scenes(w, 0, range(10_000)))))
        assert len(k) >= 1000

def test_labels_of_other_splits_lie_behind():
    every = pairs('all') + pairs('unseen')
    assert {every[j] for j in labels(scenes(DEMO, 0, range(50), 'unseen'))} <= set(pairs('unseen'))
    assert labels(scenes(WORLDS['glyphs'], 0, range(50))).min() >= 192

def test_both_answers_are_given():
    sc = scenes(DEMO, 0, range(2000))
    assert {a for q, a in questions(sc) if q.startswith('is there')} == {'yes', 'no'}

def test_a_box_by_hand():
    sc = scenes(DEMO, 0, [0]).replace(kind=np.array([[0, -1]]), x=np.zeros((1, 2)), y=np.zeros((1, 2)), half=np.array([[16., 0.]]), angle=np.array([[33., 0.]]))
    np.testing.assert_allclose(boxes(sc)[0, 0], [0.5, 0.5, 0.43, 0.43], atol=0.005)
    assert (boxes(sc)[0, 1] == 0).all()

def test_no_scenes_are_fine():
    none = scenes(DEMO, 0, [])
    assert len(none) == 0 and render(none, 64).shape == (0, 3, 64, 64) and caption_text(none) == [] and captions(none) == [] and len(keys(none)) == 0
    assert boxes(none).shape == (0, 2, 4) and questions(none) == []

def test_worlds_survive_json():
    for w in WORLDS.values(): assert World.from_json(w.to_json()) == w

# --- the recorded rows ---

def recorded_cell():
    "The source of the cell that draws recorded rows, and of the prose behind it."
    cells = [(c['cell_type'], ''.join(c['source'])) for c in json.loads((Path(__file__).parents[1] / 'nbs' / '01_toyworld.ipynb').read_text())['cells']]
    i = next(i for i, (kind, s) in enumerate(cells) if kind == 'code' and 'results/toyworld.jsonl' in s)
    return cells[i][1], cells[i + 1][1]

@pytest.mark.parametrize('panels, values, seeds', [(0, 0, 0), (1, 1, 1), (2, 3, 2), (5, 2, 1), (9, 5, 3), (11, 2, 2)])
def test_every_recorded_row_is_drawn(panels, values, seeds, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib')
    from clipa_nb.engine.viz import PALETTE, canvas
    at = lambda p, v, s, m: ((p * 7 + v * 13 + s * 3 + m * 29) % 90 + 5) / 100
    names = ('class_top1', 'shape', 'colour', 'r1'); label = ['demo', 'turned ±90°', 'contrast 0.3', 'specks', 'grain 30']
    rows = [dict(dial=f'dial {p}', value=label[v], seed=s, hardware='here', data=f'{p}/{v}', metrics={k: at(p, v, s, m) for m, k in enumerate(names)})
            for s in range(seeds) for p in range(panels) for v in range(values)]
    (tmp_path / 'results').mkdir(); (tmp_path / 'results/toyworld.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in rows)); monkeypatch.chdir(tmp_path)
    ns = dict(json=json, np=np, textwrap=textwrap, Path=Path, PALETTE=PALETTE, canvas=canvas); exec(recorded_cell()[0], ns); fig = ns['fig']; fig.savefig(tmp_path / 'x.png')
    drawn = [ax for ax in fig.axes if ax.get_title()]
    assert [ax.get_title() for ax in drawn] == [f'dial {p}' for p in range(panels)] and len(fig.legends) == (panels > 0)
    assert len({round(ax.get_position().x0, 3) for ax in drawn}) <= 3
    for p, ax in enumerate(drawn):
        assert [t.get_text().replace('\n', ' ') for t in ax.get_xticklabels()] == label[:values]
        for m, (line, dots) in enumerate(zip(ax.lines, ax.collections, strict=True)):
            np.testing.assert_allclose(line.get_ydata(), [np.mean([100 * at(p, v, s, m) for s in range(seeds)]) for v in range(values)])
            np.testing.assert_allclose(sorted(map(tuple, dots.get_offsets())), sorted((v, 100 * at(p, v, s, m)) for v in range(values) for s in range(seeds)))
        boxes = [t.get_window_extent() for t in ax.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:])), 'tick labels run into one another'

def test_the_prose_says_what_the_rows_say():
    rows = [json.loads(l) for l in (Path(__file__).parents[1] / 'nbs/results/toyworld.jsonl').read_text().splitlines()]; prose = recorded_cell()[1]
    mean = lambda dial, value, k: np.mean([r['metrics'][k] for r in rows if (r['dial'], r['value']) == (dial, value)])
    for dial, gentle, harsh in (('half-size of a lone object', '11–25', '5–9'), ('jitter of a lone object', '4', '22'), ('captions', 'demo', 'rich'), ('world', 'demo', 'rich'), ('world', 'demo', 'scattered')):
        for k in ('class_top1', 'shape', 'r1'): assert mean(dial, harsh, k) < mean(dial, gentle, k), (dial, k)
        assert mean(dial, harsh, 'colour') > 0.97
    for world in ('rich', 'scattered'): assert mean('world', world, 'shape') < 0.2 and mean('world', world, 'r1') < 0.3 # little retrieval, too
    assert 'R@1 falls with them' in prose and 'retrieval score read alone' not in prose
    for seed in {r['seed'] for r in rows}:
        by_name = {r['value']: r['metrics']['shape'] for r in rows if (r['dial'], r['seed']) == ('colour is named', seed)}
        assert len(by_name) == 3 and min(by_name, key=by_name.get) == '1', (seed, by_name)
    for dial, value, least, most in (('view', 'pale', 0, 2 / 3), ('view', 'turned ±90°', 0, 2 / 3), ('fills', 'half', 0, 2 / 3), ('view', 'grain 30', 2 / 3, 0.9), ('view', 'specks', 0.9, 1.1)):
        assert least <= mean(dial, value, 'class_top1') / mean('view', 'demo', 'class_top1') < most and mean(dial, value, 'colour') > 0.97, (dial, value)
    before, after = ({k: mean('length of a run', v, k) for k in ('shape', 'r1')} for v in ('rich', 'rich, 3 ×'))
    assert before['shape'] < after['shape'] < after['r1'] and before['r1'] < after['r1']
    alone = {d for world, dials, *_ in (json.loads(r['data']) for r in rows) if world == 'demo' and len(dials) <= 3 for d, _ in dials}
    assert not alone & {'n_objects', 'size_2', 'size_3', 'jitter_2', 'jitter_3', 'grounds', 'say_size', 'say_fill', 'say_place', 'say_relation', 'say_shade', 'say_ground', 'language'}

# --- legal and illegal worlds ---

def test_the_worlds_in_use_are_legal():
    for w in WORLDS.values(): check_world(w)
    from clipa_nb.recipes import toy_world
    bench = runpy.run_path(str(Path(__file__).parent / 'bench' / 'dials.py'))
    for _, _, *setting in bench['RUNS']: check_world(toy_world(bench['recipe'](*setting).data))
    for dials in (dict(jitter_1=22.), dict(jitter_2=13.), dict(jitter_1=0, noise=0, clutter=np.int64(6)), dict(rotation=180., contrast=(0.2, 0.2)), dict(n_objects=[3, 0, 1])): check_world(World(**dials))

NAN, INF = float('nan'), float('inf')
PROBABILITIES = ('glyphs', 'opener', 'filler', 'synonyms', 'orders', 'say_colour', 'say_shape', 'say_size', 'say_fill', 'say_place', 'say_relation', 'say_shade', 'say_ground')
LIES = dict(n_objects=[0.5, (), (0.,), (NAN, 1), (INF, 1), (-1., 2.), ('a', 1), None], fills=[(1., 0.), (0., 0., NAN), 'abc'], grounds=[(0.,) * 4, 1.], jitter_1=[1000., -1., NAN, '4'], jitter_2=[16., 20., 30., -3., NAN, None],
            jitter_3=[10.5, -2., INF], rotation=[-20., NAN, INF, 1e9, (1., 2.)], noise=[-6., NAN, INF, 'much'], contrast=[(5., 9.), (1., 0.5), (-0.1, 1.), (NAN, 1.), 1., (1.,)], clutter=[2.5, 7, -1, NAN, '3'], language=['fr', None, 3],
            **{k: [12., (5.,), (9., 5.), (0., 9.), (9., 40.), (NAN, 9.), ('5', '9'), None] for k in ('size_1', 'size_2', 'size_3', 'size_glyph')}, **{k: [-0.1, 1.1, NAN, INF, 'often', None, (0.5,)] for k in PROBABILITIES})

@pytest.mark.parametrize('dial', World().flat())
def test_worlds_that_lie_are_refused(dial):
    for value in LIES[dial]:
        with pytest.raises(UserError) as e: scenes(World(**{dial: value}), 0, range(3))
        assert dial in str(e.value) and '\n' not in str(e.value) and ('expected' in str(e.value) or dial == 'language')

# --- bad input ---

@pytest.mark.parametrize('bad, says', [
    (lambda: scenes(DEMO, 0, 0, 'test'), 'unknown split'), (lambda: scenes(DEMO, 0, -1), 'negative'), (lambda: scenes(DEMO, 0, [0.5]), 'integers'),
    (lambda: scenes(World(n_objects=(0.25,) * 4), 0, 0), 'n_objects'), (lambda: scenes(World(say_size=2.), 0, 0), 'say_size'), (lambda: scenes(World(size_1=(0., 5.)), 0, 0), 'size_1'),
    (lambda: scenes(World(clutter=9), 0, 0), 'clutter'), (lambda: caption_text(scenes(World(language='fr'), 0, 0)), 'unknown language'),
    (lambda: render(scenes(DEMO, 0, 0), 20), 'size 20'), (lambda: render(scenes(DEMO, 0, 0), 300), 'size 300'), (lambda: render(scenes(DEMO, 0, 0), 64.5), 'size 64.5'),
    (lambda: masks(scenes(DEMO, 0, 0), 16), 'size 16'), (lambda: render(scenes(DEMO, 0, 0), 64, shift='skech'), 'did you mean sketch'),
    (lambda: caption_text(scenes(DEMO, 0, 0), 'de'), 'unknown language'), (lambda: pairs('held-out'), 'unknown split'), (lambda: class_names('shape'), 'did you mean shapes'),
    (lambda: pairs('helddout'), 'did you mean heldout'), (lambda: World().replace(colour=1.), 'colour'), (lambda: shifted(scenes(DEMO, 0, 0), 'invrt'), 'did you mean invert'),
    (lambda: render(scenes(DEMO, 0, 0), 64, shift='fog'), 'unknown shift'), (lambda: caption_text(scenes(DEMO, 0, 0), 'fr'), 'unknown language'), (lambda: scenes(DEMO, 0, 1.5), 'integers'),
    (lambda: class_scenes(DEMO, 0, 'train', 1), 'unknown split of classes'), (lambda: class_scenes(DEMO, 0, 'seen', 0), 'n_per_class'),
])
def test_bad_input_ends_with_advice(bad, says):
    with pytest.raises(UserError) as e: bad()
    assert says in str(e.value) and '\n' not in str(e.value)
