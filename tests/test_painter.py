"The painter: distances, frames, fills and backgrounds on plain arrays."
import ast
import inspect
import numpy as np
import pytest
import torch
from clipa_nb.engine import painter
from clipa_nb.engine.painter import (DISTANCES, atlas, backdrop, blur, box, coverage, disc, distance, filled, frame, glyph_masks, grain, heart, ink,
                                     inverted, paint, pattern, plane, polygon, reach, specks, spokes, support, wave, windows)

def test_painter_knows_no_world():
    tree = ast.parse(inspect.getsource(painter))
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.level}
    assert modules <= {'core', 'clipa_nb.core'}, modules
    assert not {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} & {'World', 'Scenes'}

def one(*values): return [np.array([v], dtype=np.float32) for v in values]

P = np.stack(np.meshgrid(np.arange(-2., 3), np.arange(-2., 3)))

# --- silhouettes ---

def test_a_disc_and_a_square_by_hand():
    d = disc(P, 0, 0, 1.5)
    assert d[2, 2] == -1.5 and d[0, 0] == pytest.approx(8**0.5 - 1.5) and (d < 0).sum() == 9
    d = polygon(P, box(1.5, 1.5))
    np.testing.assert_allclose(d[2], [0.5, -0.5, -1.5, -0.5, 0.5])
    assert d[0, 0] == pytest.approx(0.5**0.5)

def test_corners_by_hand():
    np.testing.assert_allclose(spokes([1, 1, 1, 1]), [(0, -1), (1, 0), (0, 1), (-1, 0)], atol=1e-9)
    assert box(1, 0.3)[2] == (1, 0.3)
    x, _ = np.array(heart()).T
    np.testing.assert_allclose(x, -x[-np.arange(60)], atol=1e-9) # left and right are mirror images

def test_every_tile_holds_a_silhouette_and_leaves_a_margin():
    from clipa_nb.toyworld import SHAPE_NAMES
    assert tuple(DISTANCES) == SHAPE_NAMES and len(DISTANCES) == 16
    d = atlas()
    assert d.shape == (16, 96, 96) and atlas(True).shape == (8 * 36, 32, 32)
    assert (d.amin((1, 2)) < -0.1).all()
    assert (torch.cat([d[:, 0], d[:, -1], d[:, :, 0], d[:, :, -1]], 1) > 0.15).all()

def test_glyph_masks_are_eight_fonts_of_digits_and_capitals():
    g = glyph_masks()
    assert str(g['characters']) == '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ' and g['masks'].shape == (8, 36, 32, 32)

# --- frames ---

def test_an_object_sees_the_picture_turned_back_and_in_half_sizes():
    f = torch.from_numpy(frame(*one(8, 0, 10, 90)))[0]
    torch.testing.assert_close(f @ torch.tensor([8., 10., 1.]), torch.tensor([1., 0.]), atol=1e-5, rtol=0)

def test_a_plane_is_measured_at_pixel_centres():
    torch.testing.assert_close(plane(torch.tensor([[1., 0., 0.]]), 32)[0, 0, :2], torch.tensor([-31., -29.]))

def test_the_atlas_is_exact_near_the_outline():
    d = distance([0], torch.from_numpy(frame(*one(0, 0, 20, 0))), 64)[0]
    p = (np.arange(64) + 0.5 - 32) / 20
    exact = torch.from_numpy(disc(np.stack(np.meshgrid(p, p)), 0, 0, 0.86)).float()
    assert 20 * (d - exact)[exact.abs() < 0.2].abs().max() < 0.05

# --- coverage ---

def test_waves_and_patterns():
    assert wave(torch.tensor([0., 0.25, 0.5, 1.])).tolist() == [0.5, 0.25, 0., 0.5]
    u, v = (plane(row, 64) for row in torch.from_numpy(frame(*one(0, 0, 20, 0))).unbind(1))
    for k in (1, 2): assert 0.3 < (pattern(u, v, k) > 0).float().mean() < 0.8

def test_a_pattern_only_takes_away():
    f, px = torch.from_numpy(frame(*[np.full(6, v, dtype=np.float32) for v in (0, 0, 26, 15)])), torch.full((6, 1, 1), 26.)
    alpha = filled(distance([3, 3, 3, 1, 1, 1], f, 64), f, px, np.array([0, 1, 2] * 2))
    assert ((alpha >= 0) & (alpha <= 1)).all()
    assert (alpha[1:3] <= alpha[0] + 1e-6).all() and (alpha[4:] <= alpha[3] + 1e-6).all()

def test_shapes_and_glyphs_may_mix_and_company_does_not_matter():
    tiles, glyph, fill = np.array([3, 40, 5]), np.array([False, True, False]), np.array([0, 0, 1])
    where = [np.array(v, dtype=np.float32) for v in ((0, 5, -9), (2, 0, 3), (20, 24, 9), (0, 30, -10))]
    together = coverage(tiles, glyph, *where, fill, 48)
    for i in range(3):
        alone = coverage(tiles[[i]], glyph[[i]], *[w[[i]] for w in where], fill[[i]], 48)
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=0)

def test_half_the_size_is_a_quarter_of_the_area():
    def area(half): return coverage(np.arange(16), np.zeros(16, bool), *[np.full(16, v, np.float32) for v in (0, 0, half, 20)], np.zeros(16, int), 96).sum((1, 2))
    assert (area(12) * 4 / area(24) - 1).abs().max() < 0.02

# --- backgrounds, colours, grain ---

def test_grain_is_standard_and_a_window_is_a_window():
    assert abs(grain().mean()) < 0.01 and abs(grain().std() - 1) < 0.01
    u = np.random.default_rng(0).random((3, 2))
    assert torch.equal(windows(u[[2]], 32)[0], windows(u, 32)[2])

def test_backgrounds():
    level, slope = np.tile(np.float32([40, 50, 60]), (4, 1)), np.full((4, 2), 12, np.float32)
    x = backdrop(np.arange(4), level, slope, np.random.default_rng(0).random((4, 2)), 64)
    assert x.shape == (4, 3, 64, 64) and x[0].std((1, 2)).max() < 1e-4
    assert (x[1:].std((2, 3)) > 1).all() and (x.mean((2, 3)) - torch.from_numpy(level)).abs().max() < 5

def test_paint_is_one_interpolation():
    x = torch.zeros(1, 3, 1, 3)
    paint(x, torch.tensor([[200., 100., 0.]]), torch.tensor([[[0., 0.5, 1.]]]))
    assert x[0, :, 0].tolist() == [[0, 100, 200], [0, 50, 100], [0, 0, 0]]

def test_contrast_pulls_a_colour_towards_the_ground():
    own, level = np.float32([[200, 100, 0]]), np.float32([[100, 100, 100]])
    assert ink(own, level, np.float32([[0.5]])).tolist() == [[150, 100, 50]] and ink(own, level, np.float32([[1]])).tolist() == [[200, 100, 0]]

def test_specks_are_up_to_six_and_small():
    level, dark, u = np.full((400, 3), 90, np.float32), np.full(400, True), np.random.default_rng(1).random((400, 19))
    x = torch.full((400, 3, 64, 64), 90.)
    specks(x, level, dark, u, 6)
    touched = ((x - 90).abs().amax(1) > 20).float().mean((1, 2))
    assert abs((touched > 0).float().mean() - 6 / 7) < 0.09 and touched.mean() < 0.05

def test_blur_keeps_light_and_even_pictures():
    spot = torch.zeros(1, 3, 48, 48)
    spot[:, :, 24, 24] = 1000.
    assert abs(blur(spot)[0, 0].sum() - 1000) < 0.1
    torch.testing.assert_close(blur(torch.full((1, 3, 32, 32), 7.)), torch.full((1, 3, 32, 32), 7.), atol=1e-4, rtol=0)

def test_inversion_exchanges_black_and_white_and_keeps_hues():
    x = torch.tensor([[255., 255., 255.], [0., 0., 0.], [216., 30., 38.]])[:, :, None, None]
    white, black, red = inverted(x)[:, :, 0, 0]
    assert white.abs().max() < 1e-3 and (black - 255).abs().max() < 1e-3 and red[0] > red[1] and red[0] - red[1] == pytest.approx(186)

# --- reach ---

def test_how_far_a_square_and_a_circle_reach():
    s = support()
    np.testing.assert_allclose(s[list(DISTANCES).index('square')][[0, 90, 45]], [0.78, 0.78, 0.78 * 2**0.5], atol=0.03)
    np.testing.assert_allclose(s[0], np.full(360, 0.86), atol=0.02)
    np.testing.assert_allclose(reach(np.array([1]), np.array([False]), np.float32([45]))[0], [0.78 * 2**0.5] * 4, atol=0.03)
