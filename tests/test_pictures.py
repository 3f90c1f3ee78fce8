"Pictures: any file becomes a square of bytes, and nothing else changes."
import io
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.engine.pictures import Transform, _rgb, colour_maps, crop_box, decode, draft_box, eval_image, inception_box, jitter_colours, jpeg

torch.set_num_threads(1)


def picture(i, h=24, w=24):
    g = torch.Generator().manual_seed(i)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')[0].mul(255).byte()


# ---- pixels ----

def as_file(image, form, **options):
    out = io.BytesIO(); image.save(out, form, **options); return out.getvalue()


@pytest.mark.parametrize('form, mode', [('png', 'RGBA'), ('png', 'P'), ('png', 'L'), ('png', '1'), ('png', 'I;16'), ('jpeg', 'L'), ('jpeg', 'CMYK'), ('webp', 'RGB'), ('png', 'LA')])
def test_any_kind_of_file(form, mode):
    rgb = Image.fromarray(picture(1, 40, 60).permute(1, 2, 0).numpy())
    image = Image.fromarray(np.arange(2400, dtype=np.uint16).reshape(40, 60)) if mode == 'I;16' else rgb.convert(mode)
    x = decode(as_file(image, form), Transform(16, mode='squash'))
    assert x.shape == (16, 16, 3) and x.dtype == np.uint8


def test_whole_image_when_scale_is_one():
    data = jpeg(picture(2, 64, 64)); t = Transform(64, scale=(1., 1.))
    for k in range(5): assert np.array_equal(decode(data, t, list(np.random.default_rng(k).random(22))), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize('h, w, size', [(384, 512, 84), (300, 200, 64), (65, 97, 16), (64, 64, 32), (20, 30, 64)])
def test_draft_is_close_to_a_full_decode(h, w, size):
    data = jpeg(picture(3, h, w), quality=95)
    for k in range(4):
        u = list(np.random.default_rng(k).random(22)); t = Transform(size)
        a, b = decode(data, t, u).astype(float), decode(data, t.replace(draft=0.), u).astype(float)
        assert np.abs(a - b).mean() < 1.5, (np.abs(a - b).mean(), k)


def test_jitter_share_and_range():
    x = torch.randint(0, 256, (2000, 3, 2, 2), dtype=torch.uint8); u = np.random.default_rng(0).random((2000, 6))
    y = jitter_colours(x, u, Transform(2, jitter=0.8, gray=0.2))
    changed = (y != x).flatten(1).any(1).float().mean(); grey = ((y[:, 0].int() - y[:, 1]).abs().amax((1, 2)) <= 1).float().mean()
    assert abs(changed - 0.84) < 0.04 and abs(grey - 0.2) < 0.05
    assert torch.equal(jitter_colours(x, u, Transform(2)), x)


# ---- pixels of other kinds ----

@pytest.mark.parametrize('form', ['png', 'tiff'])
def test_sixteen_bits_of_grey_keep_their_range(form):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    x = decode(as_file(Image.fromarray(ramp), form), Transform(32, mode='squash'))
    assert abs(x.mean() - 127.5) < 2 and x.min() < 8 and x.max() > 247


def test_decoding_leaves_the_callers_image_alone():
    data = jpeg(picture(5, 400, 500), quality=95); image = Image.open(io.BytesIO(data))
    decode(image, Transform(16, mode='squash'))
    assert image.size == (500, 400)
    assert np.array_equal(decode(image, Transform(224, mode='squash')), decode(data, Transform(224, mode='squash', draft=0.)))


# ---- what the chapter used to show: settings, boxes, scales, colours ----

def test_impossible_settings():
    with pytest.raises(UserError, match='did you mean bicubic'): Transform(interpolation='bicubik')
    with pytest.raises(UserError, match="unknown mode 'crp'"): Transform(mode='crp')
    with pytest.raises(UserError, match='crop scale'): Transform(scale=(0.9, 0.4))
    with pytest.raises(UserError, match='positive number of pixels'): Transform(size=0)
    assert Transform.from_json(Transform(84).to_json()) == Transform(84)


def test_boxes_of_each_mode():
    u = np.random.default_rng(0).random((50, 22))
    assert crop_box(128, 96, Transform(mode='squash')) == (0, 0, 128, 96)
    assert crop_box(128, 96, Transform(mode='shortest')) == (16, 0, 112, 96)
    assert crop_box(64, 64, Transform(scale=(1., 1.)), u[0]) == (0, 0, 64, 64)
    assert crop_box(300, 96, Transform()) == (86, 0, 214, 96)
    for v in u:
        left, top, right, bottom = inception_box(128, 96, Transform(), v)
        assert 0 <= left < right <= 128 and 0 <= top < bottom <= 96 and (right - left) * (bottom - top) >= 0.4 * 128 * 96 - 1e-6


def test_a_draft_moves_the_box_and_only_where_it_is_wanted():
    data = jpeg(picture(0, 96, 128)); image = Image.open(io.BytesIO(data))
    assert tuple(draft_box(image, (0, 0, 128, 96), Transform(16))) == (0, 0, *image.size) and image.size[0] < 128
    assert draft_box(Image.open(io.BytesIO(data)), (1, 2, 3, 4), Transform(16, draft=0)) == (1, 2, 3, 4)


def test_values_of_sixteen_bits_lose_a_byte_and_floats_are_refused():
    deep = Image.fromarray(np.array([[0, 256, 32768, 65535]], dtype=np.uint16))
    assert np.asarray(_rgb(deep))[0, :, 0].tolist() == [0, 1, 128, 255]
    with pytest.raises(OSError, match='unknown range'): _rgb(Image.fromarray(np.ones((2, 2), np.float32)))


def test_evaluation_gives_a_tensor_and_takes_either():
    data = jpeg(picture(0, 96, 128)); t = Transform(84, mode='squash', draft=0.)
    x = eval_image(data, t)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 84, 84), torch.uint8, True)
    assert torch.equal(x, eval_image(Image.open(io.BytesIO(data)), t))
    assert decode(Image.fromarray(picture(1).permute(1, 2, 0).numpy()).convert('L'), Transform(16)).shape == (16, 16, 3)


def test_turns_of_the_colour_plane():
    J = Transform(64, jitter=0.8, gray=0.2); middle = np.array([[0., 0.5, 0.5, 0.5, 0.5, 0.9]])
    A, c = colour_maps(middle, J)
    assert np.allclose(A[0], np.eye(3), atol=1e-12) and c == [0.]
    x = picture(3)[None]
    assert torch.equal(jitter_colours(x, middle, J), x)
    turned = colour_maps(np.array([[0., 0.5, 0.5, 0.5, 1., 0.9]]), J)[0][0]
    assert np.allclose(turned @ np.ones(3), np.ones(3), atol=1e-3) and not np.allclose(turned, np.eye(3), atol=0.1)
