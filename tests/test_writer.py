"The writer: phrase tables in two languages, keys and sentences on plain arrays."
import ast
import inspect
import numpy as np
import pytest
from clipa_nb.core import UserError
from clipa_nb.engine import writer
from clipa_nb.engine.writer import LANGUAGES, Facts, Grammar, fact_keys, grammar, lexicon, named, phrases, sentence, style, written
from clipa_nb.toyworld import COLOURS, SHAPE_NAMES, World, draws, facts, scenes

DEMO = scenes(World(), 0, range(2000))
SAID = facts(DEMO)

def test_writer_knows_no_world():
    tree = ast.parse(inspect.getsource(writer))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert modules <= {'core', 'clipa_nb.core'}, modules
    assert not {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & {'World', 'Scenes'}

def test_tables_have_a_row_for_every_colour_and_shape():
    assert tuple(writer._HUES) == tuple(COLOURS) and writer._N_SHAPES == len(SHAPE_NAMES)
    for lang in LANGUAGES:
        assert len(LANGUAGES[lang]['colour']) == 1 + len(COLOURS)
        assert len(LANGUAGES[lang]['noun']) == 2 + len(SHAPE_NAMES) + 10 + 26
    assert [p.split('/')[0] for p in LANGUAGES['en']['noun'][2:18]] == list(SHAPE_NAMES)

def test_a_value_owns_a_run_of_phrases():
    g = grammar('en')
    assert isinstance(g, Grammar) and str(g.text[g.first['noun'][2]]) == ' circle' and g.first['size'][0] == 0
    assert [str(t) for t in g.text[g.first['size'][1]:][:g.count['size'][1]]] == [' small', ' little', ' tiny']
    assert g.length[g.first['size'][0]] == 0
    assert grammar('zh').words[grammar('zh').first['opener'][1]] == (('照片', 'NN'), ('里', 'LC'), ('有', 'VE'))

def test_another_language_is_refused():
    with pytest.raises(UserError, match='unknown language'): grammar('fr')

@pytest.mark.parametrize('lang', LANGUAGES)
def test_a_word_has_one_tag(lang):
    assert len({(w, t) for p in grammar(lang).words for w, t in p}) == len(lexicon(lang))

def test_tags_by_hand():
    assert [lexicon()[w] for w in ('a', 'A', 'red', 'star', 'above', 'photo')] == ['DT', 'NN', 'JJ', 'NN', 'IN', 'NN']

def test_order_is_part_of_the_meaning_only_where_a_relation_is_said():
    swapped = SAID._replace(**{k: getattr(SAID, k)[:, ::-1] for k in ('noun', 'colour', 'size', 'fill')})
    same = fact_keys(SAID) == fact_keys(swapped)
    assert same[(DEMO.count == 2) & (SAID.axis == 0)].all()
    assert not same[(DEMO.count == 2) & (SAID.axis > 0)].any()
    assert 10 * 3 * 3 * 5 * writer._PER_OBJECT**3 < 2**63 # every key fits

def test_style_of_the_demo():
    w = World()
    s = style(SAID, DEMO.count, draws(0, 'train/0/style', DEMO.index, 'words', 9), w.opener, w.filler, w.orders)
    np.testing.assert_allclose(np.bincount(s['opener'], minlength=6) / len(DEMO), [1 / 6] * 6, atol=0.04)
    assert not s['post'].any() and not s['lead'].any() # one word order and no filler
    assert [slot for slot, *_ in sentence(SAID, DEMO.count, s)].count('noun') == 2

def test_a_late_colour_leaves_its_place_before_the_noun():
    late, early = (named(SAID, 0, np.full((2000, 2), b)) for b in (True, False))
    assert late['colour'].max() == 0 and (late['post'] == SAID.colour[:, 0]).all()
    assert (early['colour'] == SAID.colour[:, 0]).all() and early['post'].max() == 0

def test_phrases_are_written_one_after_the_other():
    def u(purpose, n): return np.random.default_rng(len(purpose)).random((2000, n))
    g, numbers, owner = phrases(SAID, DEMO.count, u, 'en', 0.8, 0., 0., 0.)
    assert numbers.shape == owner.shape
    for text, row in zip(written(g, numbers), numbers): assert text == ' '.join(w for p in row for w, _ in g.words[p])

def test_three_objects_of_which_everything_is_said_give_up_what_says_nothing():
    full = World(n_objects=(0., 0., 1.), say_size=1., say_fill=1., say_relation=1., say_shade=1., say_ground=1., filler=1.)
    sc = scenes(full, 0, range(200))
    f, longest = facts(sc), {}
    for lang in LANGUAGES:
        g, numbers, _ = phrases(f, sc.count, lambda purpose, n: draws(0, f'train/0{purpose}', sc.index, 'words', n), lang, 5 / 6, 1., 0., 0.)
        longest[lang] = int(g.length[numbers].sum(1).max())
    assert max(longest.values()) <= 30 and longest['zh'] + 3 * 2 == 33 # with the articles it would be too long

def test_facts_by_hand():
    f = Facts(noun=np.array([[5]]), colour=np.array([[1]]), size=np.array([[1]]), fill=np.array([[0]]), axis=np.array([0]), place=np.array([0]), shade=np.array([0]), ground=np.array([0]))
    g, numbers, owner = phrases(f, np.array([1]), lambda purpose, n: np.full((1, n), 0.999), 'en', 0., 0., 0., 0.)
    assert written(g, numbers) == ['a small red star']
