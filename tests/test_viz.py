"Figures: shown once, in one style, refusing what does not fit, saying what is missing, and a widget that leaves a picture."
import base64
import importlib
import itertools
import sys
from pathlib import Path
from unittest import mock
import numpy as np
import pytest
import torch
pytest.importorskip('matplotlib')
import matplotlib
from matplotlib.colors import to_rgb
from clipa_nb.core import UserError
from clipa_nb.engine import viz
from clipa_nb.engine.viz import (PALETTE, SERIES, Drawing, as_array, as_picture, bars, canvas, flow, heatmap, history, lines, report_picture, save,
                                 show_images, show_patches, styled, token_strip, two_stages, widget)

PHOTO = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64), dtype=np.uint8))
ROWS = [dict(step=i, stage=1 if i < 40 else 2, samples=128 * i, **{'train/loss': 1 / (1 + i)}, **({'val/top1': i / 60} if i % 10 == 0 else {})) for i in range(60)]

def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.delitem(sys.modules, 'clipa_nb.engine.viz')
    with pytest.raises(UserError) as e: importlib.import_module('clipa_nb.engine.viz')
    assert "pip install 'clipa_nb[demo]'" in str(e.value)

# --- palette and style ---

SIGHT = {'normal': np.eye(3), 'no red cones': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
         'no green cones': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],
         'no blue cones': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .303900]]}

def oklab(colour, sight):
    "A colour as somebody sees it, in a space where equal distances look about equally different."
    c = np.array(to_rgb(colour))
    linear = np.clip(np.array(SIGHT[sight]) @ np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4), 0, 1)
    cones = np.cbrt(np.array([[.4122215, .5363325, .0514460], [.2119035, .6806995, .1073970], [.0883025, .2817188, .6299787]]) @ linear)
    return np.array([[.2104543, .7936178, -.0040720], [1.9779985, -2.4285922, .4505937], [.0259040, .7827718, -.8086758]]) @ cones

def nearest(colours, sight): return min(np.linalg.norm(oklab(a, sight) - oklab(b, sight)) for a, b in itertools.combinations(colours, 2))

@pytest.mark.parametrize('sight', SIGHT)
def test_the_palette_survives_every_kind_of_sight(sight):
    assert nearest(SERIES, sight) > 0.12
    assert nearest([PALETTE[k] for k in ('kept', 'dropped', 'cls', 'text')], sight) > 0.12
    if sight == 'no green cones': assert nearest(('#d62728', '#2ca02c'), sight) < 0.05 # a traffic light does not

def test_a_figure_is_shown_once_and_belongs_to_no_global_state():
    capture = pytest.importorskip('IPython.utils.capture').capture_output
    from IPython.display import display
    with capture() as drawn: fig = Drawing(figsize=(1, 1))
    with capture() as shown: display(fig)
    assert len(drawn.outputs) == 0 and len(shown.outputs) <= 1 and fig._repr_png_()[:4] == b'\x89PNG'
    pyplot = sys.modules.get('matplotlib.pyplot')
    assert not pyplot or fig not in [pyplot.figure(n) for n in pyplot.get_fignums()]

def test_style_is_ours_only_while_we_draw():
    before = matplotlib.rcParams['font.size']
    assert styled(lambda: matplotlib.rcParams['font.size'])() == 9 and matplotlib.rcParams['font.size'] == before
    assert styled(nearest).__name__ == 'nearest'

def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    fig = canvas(1, 1)[0]
    assert save(fig, tmp_path / 'a.png').stat().st_size > 0
    with pytest.raises(ValueError, match='nonsense'): save(fig, tmp_path / 'a.nonsense')
    assert [p.name for p in tmp_path.iterdir()] == ['a.png']

# --- images, patches ---

def test_anything_array_like_becomes_numpy():
    x = torch.tensor([0.5, 1.5], dtype=torch.bfloat16, requires_grad=True)
    np.testing.assert_array_equal(as_array(x), np.float32([0.5, 1.5]))
    np.testing.assert_array_equal(as_array([1, 2]), [1, 2])

def test_any_layout_is_the_same_picture():
    np.testing.assert_allclose(as_picture(PHOTO), as_picture(PHOTO.float() / 255), atol=1e-6)
    np.testing.assert_array_equal(as_picture(PHOTO), as_picture(PHOTO.permute(1, 2, 0).numpy()))
    for x in (PHOTO[:1], PHOTO[0]): assert as_picture(x).shape == (64, 64, 3)
    np.testing.assert_allclose(as_picture(torch.tensor([[-2., 2.]])).ravel(), [0, 0, 0, 1, 1, 1])

def test_contact_sheets():
    fig = show_images([PHOTO] * 10, [f'{i}' for i in range(10)], right=[True, False] * 5)
    assert sum(ax.axison for ax in fig.axes) == 10
    assert [ax.get_title()[0] for ax in fig.axes[:2]] == ['✓', '✗']
    assert show_images([PHOTO], ['plain']).axes[0].get_title() == 'plain'

def test_patches_that_are_not_kept_fade():
    faded, kept = viz._fade(np.zeros((4, 4, 3)), 2, torch.tensor([0, 3]))
    assert kept == {0, 3} and faded[:2, :2].max() == 0 and faded[:2, 2:].min() > 0.7

def test_a_frame_for_every_patch_and_gold_for_class_tokens():
    fig = show_patches(PHOTO, 16, [5, 6, 9, 10], '4 of 16', prefix=1)
    assert len(fig.axes[0].patches) == 16 + 1 and fig.axes[0].get_title() == '4 of 16'
    assert len(show_patches([PHOTO] * 4, 8, [None, [1], [2, 3], None], ['a', 'b', 'c', 'd']).axes) == 4

# --- words ---

def test_words_wrap():
    spots = viz._place(['a', 'small', 'red', 'star'], width=1.1)
    assert [line for _, line, _ in spots] == [0, 0, 1, 1] and spots[2][0] == 0.0

def test_ink_is_readable():
    assert [viz._ink_on(PALETTE[k]) for k in ('kept', 'dropped', 'cls')] == ['white', PALETTE['ink'], PALETTE['ink']]

def test_a_board_counts_inches_from_the_top_left():
    assert tuple(viz._board(4.2, 0.4)[1].transData.transform((0, 0))) == (0, 40)

def test_positions_and_bools_mean_the_same():
    assert viz._positions(torch.tensor([2, 0]), 3) == viz._positions(np.array([True, False, True]), 3) == {0, 2}
    assert viz._positions(None, 3) == {0, 1, 2} and viz._positions({1}, 3) == {1}

def test_strips_colour_what_is_kept():
    words = '[CLS] a photo of a small red star to the left of a large blue circle'.split()
    fig = token_strip(words, {'all': None, 'truncate': range(8), 'syntax': [0, 2, 5, 6, 7, 10, 14, 15]})
    colours = [p.get_facecolor()[:3] for p in fig.axes[0].patches]
    assert len(colours) == 3 * 16 and sum(c == to_rgb(PALETTE['kept']) for c in colours) == 15 + 7 + 7

# --- matrices, bars, curves, flows ---

def test_zero_is_white_in_signed_matrices():
    assert viz._limits(np.array([[-0.1, 0.4]])) == (-0.4, 0.4, True) and viz._limits(np.array([[0.2, 0.4]])) == (0.0, 0.4, False)
    assert viz._limits(np.array([[np.nan, 0.0]])) == (0.0, 1.0, False)
    np.testing.assert_allclose(viz._cmap(True)(0.5)[:3], (1, 1, 1), atol=0.01)
    assert len(heatmap(np.eye(5)).axes[0].texts) == 25

def test_bars_say_what_was_not_run():
    fig = bars({'one': {'colour': 99, 'pair': 58}, 'another': {'colour': 98, 'pair': None}}, marks={'floor': {'pair': 60}})
    assert [t.get_text() for t in fig.axes[0].texts].count('not run') == 1
    assert [t.get_text() for t in bars({'measured': 3.0, 'planned': None}, unit=' s').axes[0].texts] == ['3 s', 'not run']
    assert len(bars([('a', 1), ('b', 2)]).axes[0].patches) == 2

def test_curves_have_gaps_and_plain_ticks():
    fig = lines([4, 16, 64, 256], {'N': [1, 4, 16, 64], 'measured': [1, 4.2, None, 80]}, log='xy', dashed=('N',))
    ax = fig.axes[0]
    assert ax.get_xscale() == 'log' and np.isnan(ax.lines[1].get_ydata()).sum() == 1
    assert [t.get_text() for t in ax.get_xticklabels()] == ['4', '16', '64', '256']
    assert [line.get_linestyle() for line in ax.lines] == ['--', '-']

def test_flows():
    assert viz._span('patches', 0) > viz._span('pixels', 0) and viz._span('', 1) == 0.5
    fig = flow(['image', '[B,3,S,S]', 'ViT', '[B,E]'], ['caption', '[B,T]', 'transformer', '[B,E]'], join=['similarity', '[B,B]', 'loss'])
    assert len(fig.axes[0].patches) == 6 and [t.get_text() for t in fig.axes[0].texts].count('[B,E]') == 2

def test_history_breaks_at_stages():
    assert [(name, len(part)) for name, part in viz._stages(ROWS)] == [(1, 40), (2, 20)]
    fig = history(ROWS)
    assert len(fig.axes) == 2 and len(history(ROWS, keys=['val/top1']).axes) == 1
    assert len(fig.axes[0].lines) == 3 # two stages, and the line between them
    late = [dict(step=1, stage='a', samples=1, other=0.), dict(step=99, stage='a', samples=99, other=1.), dict(step=100, stage='a', samples=100, other=1., top1=0.5)]
    _, axes = canvas()
    viz._history_on(axes[0, 0], late, ['top1'])
    assert axes[0, 0].texts[0].get_position()[0] == 100 # a stage is named where its curve is

# --- widgets ---

def keep(patch=8, share=0.25): return show_patches(PHOTO, patch, range(max(1, int((64 // patch) ** 2 * share))), f'{share} of {patch}')

def test_a_missing_ipywidgets_names_the_extra():
    with mock.patch.dict(sys.modules, {'ipywidgets': None}), pytest.raises(UserError) as e: widget(print)
    assert "pip install 'clipa_nb[dev]'" in str(e.value)

def test_a_widget_follows_its_sliders():
    pytest.importorskip('ipywidgets')
    box = widget(keep, patch=[16, 8, 4], share=(0.05, 1.0, 0.05))
    assert box.result.axes[0].get_title() == '0.25 of 8'
    box.children[0].value = 16
    assert box.result.axes[0].get_title() == '0.25 of 16'

def test_a_widget_carries_the_picture_of_its_state():
    pytest.importorskip('ipywidgets')
    bundle = widget(keep, patch=[16, 8])._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in bundle
    assert base64.b64decode(bundle['image/png']) == keep(patch=8)._repr_png_()
    assert 'image/png' not in widget(lambda n=1: None, n=(0, 3))._repr_mimebundle_() # nothing to picture

def test_refresh_keeps_a_widgets_picture_and_drops_its_view():
    nbformat = pytest.importorskip('nbformat')
    pytest.importorskip('nbclient')
    sys.path.insert(0, str(Path(__file__).parents[1] / '.ci'))
    from refresh import tidy
    view = {'application/vnd.jupyter.widget-view+json': {'model_id': 'x'}, 'text/plain': 'Live(…)'}
    out = [nbformat.v4.new_output('display_data', data=d) for d in ({**view, 'image/png': 'AAAA'}, view, {'text/plain': 'words'})]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell('widget(f)', outputs=[*out, nbformat.v4.new_output('stream', text='said')])])
    tidy(nb)
    assert [o.get('data', 'stream') for o in nb.cells[0].outputs] == [{'image/png': 'AAAA'}, {'text/plain': 'words'}, 'stream']

# --- the report ---

def test_shares_alone_are_accuracies():
    assert viz._percent({'top1': 0.5, 'seconds': 312.0, 'note': 'fine'}) == {'top1': 50.0} and viz._percent(None) == {}

def test_examples_name_the_truth_where_they_are_wrong():
    assert viz._example_title(dict(best='a red star', true='a red star', right=True)) == 'a red star'
    assert viz._example_title(dict(best='a red star', true='a red heart', right=False)) == 'a red star\n(a red heart)'
    fig = Drawing(figsize=(6, 2), layout='constrained')
    viz._examples_on(fig, fig.add_gridspec(1, 1)[0], [dict(image=PHOTO, best='a', true='a', right=True)] * 3)
    assert len(fig.axes) == 3 and fig.axes[2].get_subplotspec().rowspan.start == 1

def test_a_report_is_drawn_whole(tmp_path):
    examples = [dict(image=PHOTO, true='a', best='a', right=bool(i % 4)) for i in range(16)]
    report = dict(history=ROWS, examples=examples, metrics={'pairs': 0.9}, compare={'pairs': 0.5}, floors={'pairs': 0.8}, shifts={'blur': 0.7})
    fig = report_picture(report, tmp_path / 'report.png')
    assert len(fig.axes) == 4 + 16 and (tmp_path / 'report.png').read_bytes()[:4] == b'\x89PNG'

def test_an_empty_report_says_what_it_lacks():
    fig = report_picture({})
    assert sorted(t.get_text() for ax in fig.axes for t in ax.texts) == [f'no {what} in this report' for what in ('examples', 'history', 'metrics', 'shifts')]

def test_the_front_page_says_what_was_not_run():
    rows = [dict(run=run, spent=t, top1=t / 1000) for run in ('two stages', 'full length') for t in (60, 300)]
    assert len(two_stages({'long': 354, 'short': 52}, rows).axes[1].lines) == 2
    assert two_stages({'long': 354}).axes[1].texts[0].get_text() == 'not run'

def test_a_contact_sheet_is_small(): assert len(show_images([PHOTO] * 16)._repr_png_()) < 400 * 1024

# --- refusals ---

@pytest.mark.parametrize('bad, says', [
    (lambda: as_picture(torch.zeros(16, 3, 64, 64)), 'pick one image of the batch'), (lambda: show_patches(torch.zeros(3, 6, 6), 4), 'multiples of patch 4'),
    (lambda: show_patches(torch.zeros(3, 4, 4), 2, [7]), '0…3'), (lambda: token_strip('a b c'.split(), [True, False]), 'each of 3 words'),
    (lambda: history([{'step': 1}]), 'expected train/loss'),
])
def test_what_does_not_fit_is_refused(bad, says):
    with pytest.raises(UserError) as e: bad()
    assert says in str(e.value) and '\n' not in str(e.value)
