"Pictures: any file becomes a square of bytes, and nothing else changes."
import colorsys, io
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError, draws_of, keyed_uniform
from clipa_nb.engine import pictures
from clipa_nb.engine.pictures import Augment, FORMS, Transform, _rgb, colour_maps, crop_box, dct_factor, decode, decode_crop, eval_image, evaluation_pixels, inception_box, jitter_colours, jpeg, move_boxes

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
        a, box, _ = decode_crop(data, t, u)
        full = Image.open(io.BytesIO(data)).crop([int(side) for side in box]) # the crop that was taken, decoded in full
        b = np.asarray(full.resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(a.astype(float) - b).mean() < 1.5, k
        assert decode(data, t.replace(draft=0.), u).shape == a.shape


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


@pytest.mark.parametrize('draft, spare, factor', [(1., 84, 1), (1., 167, 1), (1., 168, 2), (1., 400, 4), (1., 700, 8), (1.5, 168, 1), (1.5, 252, 2), (0., 700, 1)])
def test_the_scale_leaves_enough_pixels(draft, spare, factor):
    assert dct_factor((0, 0, spare, spare + 9), Transform(84, draft=draft), (800, 800)) == factor
    assert dct_factor((0, 0, 15, 15), Transform(1), (15, 15)) == 1, 'a picture of few blocks is decoded whole'


# ---- two decoders, one result ----

def both_ways(data, t, u, monkeypatch):
    fast = decode_crop(data, t, u)
    monkeypatch.setattr(pictures, 'simplejpeg', None)
    return fast, decode_crop(data, t, u)


@pytest.mark.parametrize('options', [{}, dict(progressive=True), dict(subsampling=0), dict(subsampling=2, quality=50), dict(mode='L'), dict(mode='CMYK'), dict(orientation=6), dict(orientation=3), dict(size=(341, 257)), dict(size=(17, 33))], ids=str)
@pytest.mark.parametrize('S', [8, 32, 84])
def test_simplejpeg_and_pillow_give_the_same_pixels(options, S, monkeypatch):
    pytest.importorskip('simplejpeg')
    options = dict(options); w, h = options.pop('size', (512, 384)); mode, turn = options.pop('mode', 'RGB'), options.pop('orientation', 0)
    image = Image.fromarray(picture(1, h, w).permute(1, 2, 0).numpy()).convert(mode)
    if turn: exif = Image.Exif(); exif[0x0112] = turn; options['exif'] = exif
    data = as_file(image, 'jpeg', **options)
    for k in range(3):
        fast, slow = both_ways(data, Transform(S), list(np.random.default_rng(k).random(22)), monkeypatch)
        assert np.array_equal(fast[0], slow[0]) and fast[1:] == slow[1:]
        monkeypatch.undo()


@pytest.mark.parametrize('form', ['jpeg', 'png', 'webp'])
@pytest.mark.parametrize('orientation', range(1, 9))
def test_photographs_are_turned_as_the_camera_was_held(orientation, form):
    from PIL import ImageOps
    image = Image.fromarray(picture(4, 40, 60).permute(1, 2, 0).numpy())
    exif = Image.Exif(); exif[0x0112] = orientation
    data = as_file(image, form, exif=exif, **(dict(quality=98) if form == 'jpeg' else dict(lossless=True) if form == 'webp' else {}))
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    want = decode(upright, Transform(16, mode='squash')).astype(int)
    assert np.abs(decode(data, Transform(16, mode='squash', draft=0.)) - want).max() <= 1
    assert decode_crop(data, Transform(16))[2] == upright.size
    plain = eval_image(data, Transform(16, mode='squash'))
    assert torch.equal(plain, theirs(Image.open(io.BytesIO(data)), 16, 'squash', 'bilinear')), "judged as open_clip judges: not turned"


def test_the_kept_part_lies_in_the_picture_and_has_whole_edges(monkeypatch):
    data = jpeg(picture(6, 257, 341))
    for k in range(20):
        u = list(np.random.default_rng(k).random(22)); t = Transform(84)
        (l, top, r, b), size = decode_crop(data, t, u)[1:]; wanted = crop_box(341, 257, t, u); f = dct_factor(wanted, t, (341, 257))
        assert 0 <= l < r <= 341 and 0 <= top < b <= 257 and size == (341, 257) and l % f == top % f == 0
        assert max(abs(x - y) for x, y in zip((l, top, r, b), wanted)) <= f / 2 + 1


@pytest.mark.parametrize('fast', [True, False])
def test_damage_raises_and_is_pillows_to_judge(fast, monkeypatch):
    if not fast: monkeypatch.setattr(pictures, 'simplejpeg', None)
    data = jpeg(picture(2, 200, 200))
    for broken in (data[:len(data) // 2], data[:40], b'', b'<html>404</html>', bytes(3000)):
        with pytest.raises(OSError): decode(broken, Transform(16))
    assert decode(data + b'rubbish behind the end', Transform(16)).shape == (16, 16, 3)


@pytest.mark.parametrize('form', ['jpeg', 'png'])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(form, monkeypatch):
    data = as_file(Image.new('RGB', (200, 100)), form)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 19_999)
    with pytest.raises(Image.DecompressionBombError, match='more pixels than Pillow allows'): decode(data, Transform(16))


@pytest.mark.parametrize('how', ['bilinear', 'bicubic', 'box'])
def test_the_resize_is_pillows_to_one_level(how):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (150, 201, 3), dtype=np.uint8))
    for S in (32, 84, 224):
        want = np.asarray(image.resize((S, S), pictures.FILTERS[how])).astype(int)
        assert np.abs(decode(image, Transform(S, mode='squash', interpolation=how)) - want).max() <= 1


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
        assert size == (128, 96) and np.abs(np.subtract(box, crop_box(128, 96, t, u))).max() <= 5 and np.array_equal(pixels, decode(data, t, u)), 'in pixels of the file, drafted or not'
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

J = Transform(64, jitter=0.8, gray=0.2)


def test_turns_of_the_colour_plane():
    middle = np.array([[0., 0.5, 0.5, 0.5, 0.5, 0.9]])
    A, c = colour_maps(middle, J)
    assert np.allclose(A[0], np.eye(3), atol=1e-12) and c == [0.]
    x = picture(3)[None]
    assert torch.equal(jitter_colours(x, middle, J), x)
    turned = colour_maps(np.array([[0., 0.5, 0.5, 0.5, 1., 0.9]]), J)[0][0]
    assert np.allclose(turned @ np.ones(3), np.ones(3), atol=1e-3) and not np.allclose(turned, np.eye(3), atol=0.1)


def colourful(n, side=24):
    "Noise, few colours, greys, black and white: every branch of a change to HSV."
    x = torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
    x[1::5, 1] = x[1::5, 0]
    x[2::5] = x[2::5] // 64 * 85
    x[3::5] = x[3::5, :1]
    return x


def torchvisions(x, u, strength=0.4):
    "CLIPA's torch code on one picture: RandomApply(ColorJitter), then grey, both on PIL images."
    F = pytest.importorskip('torchvision.transforms.functional')
    image, most = Image.fromarray(x.permute(1, 2, 0).numpy()), 0.8 * strength
    if u[0] < 0.8:
        amounts = [1 + most * (2 * u[k] - 1) for k in (1, 2, 3)] + [most / 4 * (2 * u[4] - 1)]
        for k in u[6:10].argsort().tolist():
            image = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[k](image, float(amounts[k]))
    if u[5] < 0.2: image = F.to_grayscale(image, 3)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def tensorflows(x, u, strength=0.4):
    "CLIPA's JAX code on one picture: tf.image on floats, pixel by pixel, clipped after each operation, the fraction cut off."
    image, most = x.permute(1, 2, 0).numpy().astype(np.float32) / np.float32(255), 0.8 * strength
    def in_hsv(f): return np.array([[colorsys.hsv_to_rgb(*f(*colorsys.rgb_to_hsv(*pixel))) for pixel in row] for row in image.tolist()], np.float32)
    if u[0] < 0.8:
        bright, contrast, saturation = (1 + most * (2 * float(u[k]) - 1) for k in (1, 2, 3))
        for k in u[6:10].argsort().tolist():
            if k == 0: image = image * np.float32(bright)
            if k == 1: image = (image - image.mean((0, 1))) * np.float32(contrast) + image.mean((0, 1))
            if k == 2: image = in_hsv(lambda h, s, v: (h, min(1., max(0., s * saturation)), v))
            if k == 3: image = in_hsv(lambda h, s, v: ((h + most / 4 * (2 * float(u[4]) - 1)) % 1., s, v))
            image = image.clip(0, 1)
    if u[5] < 0.2: image = np.repeat(image @ np.array([0.2989, 0.587, 0.114], np.float32)[:, None], 3, 2)
    return torch.from_numpy((image * np.float32(255)).clip(0, 255).astype(np.uint8)).permute(2, 0, 1)


def test_the_torch_form_is_torchvisions_to_the_bit():
    x, u = colourful(120), torch.rand(120, 10, generator=torch.Generator().manual_seed(0))
    got = jitter_colours(x, u, J.replace(form='torch'))
    assert torch.equal(got, torch.stack([torchvisions(a, b) for a, b in zip(x, u)]))


def test_the_jax_form_is_tf_images_to_one_level():
    x, u = colourful(60, 16), torch.rand(60, 10, generator=torch.Generator().manual_seed(1))
    got, want = jitter_colours(x, u, J.replace(form='jax')).int(), torch.stack([tensorflows(a, b) for a, b in zip(x, u)]).int()
    assert (got - want).abs().max() <= 1 and (got != want).float().mean() < 0.02


@pytest.mark.parametrize('form', ['torch', 'jax'])
def test_a_gpu_changes_all_rows_and_keeps_those_of_the_mask(form, monkeypatch):
    x, u = colourful(40, 12), torch.rand(40, 10, generator=torch.Generator().manual_seed(2))
    want = jitter_colours(x, u, J.replace(form=form))
    def everywhere(x, mask, f, *values): return torch.where(mask[:, None, None, None], f(x.clone(), *(v[:, None, None, None] for v in values)), x)
    monkeypatch.setattr(pictures, '_changed', everywhere)
    assert torch.equal(jitter_colours(x, u, J.replace(form=form)), want)


@pytest.mark.parametrize('form', ['torch', 'jax', 'affine'])
def test_augmentation_is_a_function_of_draw_in_any_split(form):
    x, draw, augment = colourful(30, 12), draws_of(3, np.arange(30)), Augment(flip=0.5, jitter=0.8, gray=0.2, form=form)
    whole = augment(x, draw)
    parts = torch.cat([augment(a, d) for a, d in zip(x.split(7), draw.split(7))])
    assert (whole.int() - parts.int()).abs().max() <= (0 if form == 'torch' else 1)
    assert torch.equal(augment(x, draw), whole) and not torch.equal(augment(x, draw, 'view 1 colour'), whole)
    before = x.clone(); augment(x, draw); assert torch.equal(x, before), 'the batch that was handed over is not changed'


def test_flips_and_normalisation():
    x, draw = colourful(200, 8), draws_of(0, np.arange(200))
    flipped = Augment(flip=0.5)(x, draw); on = Augment(flip=0.5).flips(draw)
    assert torch.equal(flipped[on], x[on].flip(3)) and torch.equal(flipped[~on], x[~on]) and 70 < int(on.sum()) < 130
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    y = Augment(mean=mean, std=std)(x, draw)
    assert y.dtype == torch.float32 and torch.allclose(y[0, 1], (x[0, 1] / 255 - 0.456) / 0.224, atol=1e-6)
    assert Augment.of(Transform(8)).idle and not Augment.of(J).idle
    with pytest.raises(UserError, match='form of colour jitter'): Transform(form='jx')
