"Pictures: any file becomes a square of bytes, and nothing else changes."
import io
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.engine.pictures import Transform, _rgb, colour_maps, crop_box, decode, decode_crop, draft_box, eval_image, evaluation_pixels, inception_box, jitter_colours, jpeg, move_boxes

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


# ---- evaluation is open_clip's ----

def odd_image(mode, w, h):
    rng = np.random.default_rng(w * 1000 + h)
    if mode in ('I;16', 'I', 'F'):
        return Image.fromarray(rng.integers(0, 65536, (h, w)).astype({'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]))
    if mode == 'P': return Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)).quantize(64)
    if mode == '1': return Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)).convert('1')
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = rng.integers(0, 256, (h, w, bands), dtype=np.uint8)
    return Image.frombytes(mode, (w, h), pixels.tobytes())


def theirs(image, size, mode, interpolation):
    "What open_clip's evaluation transform gives, as bytes."
    open_clip = pytest.importorskip('open_clip.transform')
    f = open_clip.image_transform(size, False, mean=(0., 0., 0.), std=(1., 1., 1.), resize_mode=mode, interpolation=interpolation)
    return (f(image) * 255).round().byte()


@pytest.mark.parametrize('mode', ['RGB', 'P', 'RGBA', 'LA', 'I;16', 'CMYK', 'L', '1', 'I', 'F', 'YCbCr', 'HSV'])
@pytest.mark.parametrize('resize', ['squash', 'shortest'])
def test_evaluation_is_open_clips_bit_for_bit(mode, resize):
    for w, h in ((32, 32), (64, 48), (48, 64), (45, 30), (31, 97), (97, 31), (33, 32), (1, 1), (1, 7), (7, 1), (1, 40), (20, 13), (13, 20), (500, 333)):
        for size in (32, 31, 8):
            for interpolation in ('bicubic', 'bilinear'):
                image, t = odd_image(mode, w, h), Transform(size, mode=resize, interpolation=interpolation)
                want = theirs(image, size, resize, interpolation)
                assert torch.equal(eval_image(image, t), want), (mode, w, h, size, interpolation)
                assert torch.equal(torch.from_numpy(evaluation_pixels(image, t).copy()).permute(2, 0, 1), want)


@pytest.mark.parametrize('form, mode', [('png', 'P'), ('png', 'RGBA'), ('png', 'LA'), ('png', 'I;16'), ('png', 'L'), ('gif', 'P'), ('webp', 'RGBA'), ('jpeg', 'CMYK'), ('jpeg', 'L'), ('jpeg', 'RGB'), ('tiff', 'F')])
@pytest.mark.parametrize('resize', ['squash', 'shortest'])
def test_files_are_evaluated_as_open_clip_evaluates_them(form, mode, resize):
    for w, h in ((341, 256), (200, 301)):
        data = as_file(odd_image(mode, w, h), form)
        want = theirs(Image.open(io.BytesIO(data)), 84, resize, 'bicubic')
        assert torch.equal(eval_image(data, Transform(84, mode=resize, interpolation='bicubic')), want), 'no draft either'


def test_a_transparent_palette():
    image = odd_image('P', 40, 30)
    data = as_file(image, 'png', transparency=3)
    for resize in ('squash', 'shortest'): assert torch.equal(eval_image(data, Transform(16, mode=resize)), theirs(Image.open(io.BytesIO(data)), 16, resize, 'bilinear'))


def test_evaluation_gives_a_tensor_takes_either_and_draws_nothing():
    data = jpeg(picture(0, 96, 128)); t = Transform(84, mode='squash')
    x = eval_image(data, t); image = Image.open(io.BytesIO(data))
    assert (x.shape, x.dtype, x.is_contiguous()) == ((3, 84, 84), torch.uint8, True)
    assert torch.equal(x, eval_image(image, t)) and image.size == (128, 96)
    assert decode(Image.fromarray(picture(1).permute(1, 2, 0).numpy()).convert('L'), Transform(16)).shape == (16, 16, 3)
    with pytest.raises(UserError, match="evaluate with 'squash' or 'shortest'"): eval_image(data, Transform(84))


# ---- boxes ----

def test_what_was_cut_from_where():
    data = jpeg(picture(0, 96, 128)); t = Transform(16)
    for k in range(5):
        u = list(np.random.default_rng(k).random(22)); pixels, box, size = decode_crop(data, t, u)
        assert size == (128, 96) and box == crop_box(128, 96, t, u) and np.array_equal(pixels, decode(data, t, u)), 'in pixels of the file, drafted or not'
    assert decode_crop(data, Transform(16, mode='squash'))[1:] == ((0, 0, 128, 96), (128, 96))


def test_boxes_move_clip_and_go():
    whole = (0, 0, 200, 100)
    boxes = [[0.5, 0.5, 0.5, 0.5], [0.1, 0.2, 0.1, 0.2]]
    moved, kept = move_boxes(boxes, whole, (200, 100))
    assert np.allclose(moved, boxes) and kept.tolist() == [0, 1] and moved.dtype == np.float32
    moved, kept = move_boxes(boxes, (100, 0, 200, 100), (200, 100))
    assert kept.tolist() == [0] and np.allclose(moved, [[0.25, 0.5, 0.5, 0.5]]), 'the right half of a centred box'
    for share, n in ((0.11, 1), (0.09, 0)):
        left = 80 + (1 - share) * 40
        assert len(move_boxes([[0.5, 0.5, 0.2, 0.2]], (left, 0, 200, 100), (200, 100))[1]) == n, 'a tenth must be left'
    assert [len(x) for x in move_boxes([], whole, (200, 100))] == [0, 0] and move_boxes([], whole, (200, 100))[0].shape == (0, 4)
    assert len(move_boxes([[0.5, 0.5, 0., 0.2], [np.nan, 0.5, 0.1, 0.1], [1.5, 0.5, 0.1, 0.1]], whole, (200, 100))[1]) == 0
    with pytest.raises(ValueError): move_boxes([[0.5, 0.5, 0.1]], whole, (200, 100))


# ---- colours ----

def test_turns_of_the_colour_plane():
    J = Transform(64, jitter=0.8, gray=0.2); middle = np.array([[0., 0.5, 0.5, 0.5, 0.5, 0.9]])
    A, c = colour_maps(middle, J)
    assert np.allclose(A[0], np.eye(3), atol=1e-12) and c == [0.]
    x = picture(3)[None]
    assert torch.equal(jitter_colours(x, middle, J), x)
    turned = colour_maps(np.array([[0., 0.5, 0.5, 0.5, 1., 0.9]]), J)[0][0]
    assert np.allclose(turned @ np.ones(3), np.ones(3), atol=1e-3) and not np.allclose(turned, np.eye(3), atol=0.1)
