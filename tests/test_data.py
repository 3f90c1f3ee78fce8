"The data room under bad input: damaged samples, other sources, and batches that must not depend on who makes them."
import io, json, os, pickle, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError, draws_of, keyed_uniform
from clipa_nb.data import FIELDS, Batches, Damaged, Filter, PairData, Skips, Subset, _Steps, _same, _start_worker, _stream, apply_filters, captions_of, check_needs, check_pairs, filtered, loader, looks_at, one_caption, open_pairs
from clipa_nb.engine.sources import Columns, Table
from clipa_nb.engine.pairs import Source, cause
from clipa_nb.engine.pictures import Transform, decode, jpeg
from clipa_nb.engine.index import Shards
from clipa_nb.engine.shards import members, write_shards

torch.set_num_threads(1)


def picture(i, h=24, w=24):
    g = torch.Generator().manual_seed(i)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')[0].mul(255).byte()


def samples(n, **more):
    for i in range(n): yield f'{i:06d}', jpeg(picture(i)), f'caption number {i}', {'label': i, **more}


def tokens(texts, context_length=None, strategy=None, draw=None):
    "One id per letter; with a strategy, each row shuffled by its own draw."
    ids = torch.tensor([[ord(c) for c in t[:context_length].ljust(context_length, '\0')] for t in texts])
    return ids.gather(1, keyed_uniform(draw, 'text', context_length).argsort(dim=1, stable=True)) if strategy else ids


def as_file(image, form, **options):
    out = io.BytesIO(); image.save(out, form, **options); return out.getvalue()


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp('toy') / 'set'
    write_shards(samples(100), out, per_shard=30)
    return out


def batches(where, B=8, **more):
    fields = more.pop('fields', ('image', 'text', 'label', 'views'))
    return Batches(Shards(where), tokens, more.pop('transform', Transform(16, jitter=0.8, gray=0.2)), B, seed=more.pop('seed', 3), context_length=20, strategy='shuffle', fields=fields, **more)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- cut shards ----

def test_cut_after_indexing_is_counted(toy, tmp_path):
    path = tmp_path / 'a.tar'; raw = (toy / '000000.tar').read_bytes(); path.write_bytes(raw)
    b = batches(tmp_path, B=10, transform=Transform(16), limit=1.)
    path.write_bytes(raw[:len(raw) * 4 // 5])
    for step in range(3): b[step]
    assert {('a.tar', 'shard is shorter than when it was indexed')} == set(b.skipped.counts)


# ---- the order ----

def test_every_epoch_is_a_permutation_and_batches_straddle(toy):
    b = batches(toy, B=32); seen = np.concatenate([b.sequence[b.positions(s)] for s in range(25)])
    for e in range(8): assert sorted(seen[100 * e:100 * e + 100]) == list(range(100))
    assert not np.array_equal(seen[:100], seen[100:200])


@pytest.mark.filterwarnings('ignore:This DataLoader')
@pytest.mark.parametrize('workers', [1, 2, 3])
def test_workers_do_not_matter(toy, workers):
    for a, b in zip(loader(batches(toy), 9, 16), loader(batches(toy), 9, 16, workers=workers), strict=True): assert same(a, b)


@pytest.mark.parametrize('size', [2, 4, 8])
def test_ranks_do_not_matter(toy, size):
    "Everything: words drawn at random, views, colours, draws."
    whole = batches(toy)
    for step in (0, 12, 13):
        parts = [batches(toy, rank=r, size=size)[step] for r in range(size)]
        assert same({k: torch.cat([p[k] for p in parts]) for k in whole[step]}, whole[step])


def test_draws_are_the_positions_and_each_field_has_its_own(toy):
    b = batches(toy, transform=Transform(16))
    assert torch.equal(b[5]['draw'], draws_of(3, b.positions(5))) and sorted(b.positions(5)) == list(range(40, 48))
    alone = batches(toy, transform=Transform(16), fields=('views',))[5]
    assert torch.equal(alone['views'], b[5]['views']) and set(alone) == {'views', 'draw', 'valid'}
    x = b[5]['image']
    assert not torch.equal(x, b[5]['views'][:, 0]) and not torch.equal(b[5]['views'][:, 0], b[5]['views'][:, 1])
    sample = b.source.read(b.sequence[b.positions(5)[2]])
    u = keyed_uniform(b[5]['draw'], 'crop', 22)[2].tolist()
    assert np.array_equal(decode(sample['image'], b.transform, u), x[2].permute(1, 2, 0).numpy())


def test_resume_with_another_world_consumes_the_same_samples(toy):
    once = [int(x) for b in loader(batches(toy), 0, 12) for x in b['label']]
    first = [int(x) for s in range(5) for r in range(4) for x in batches(toy, rank=r, size=4)[s]['label']]
    then = [int(x) for s in range(5, 12) for r in range(2) for x in batches(toy, rank=r, size=2)[s]['label']]
    assert first + then == once and len(set(once)) == 96


def test_seed_matters_and_steps_differ(toy):
    assert not torch.equal(batches(toy)[0]['label'], batches(toy, seed=4)[0]['label'])
    assert not same(batches(toy)[0], batches(toy)[1])


def test_batch_that_ranks_cannot_share(toy):
    with pytest.raises(UserError, match='cannot be shared by 3 ranks'): batches(toy, rank=0, size=3)


def test_source_travels_to_a_spawned_worker(toy):
    s = Shards(toy); s.read(0); t = pickle.loads(pickle.dumps(s))
    assert t.stores[False]._open == {} and t.read(50) == s.read(50)


def test_few_files_stay_open(tmp_path):
    write_shards(samples(300), tmp_path / 'x', per_shard=1); s = Shards(tmp_path / 'x')
    assert [s.read(i)['json']['label'] for i in range(300)] == list(range(300)) and len(s.stores[False]._open) <= 256


# ---- damaged samples ----

def damage(toy, out, every, how=lambda n: bytes(n)):
    out.mkdir()
    for path in sorted(toy.glob('*.tar')):
        raw = bytearray(path.read_bytes())
        for k, (name, start, size) in enumerate(m for m in members(path)[0] if m[0].endswith(b'jpg')):
            if k % every == 0: raw[start:start + size] = how(size)
        (out / path.name).write_bytes(raw)
    return out


@pytest.mark.parametrize('how', [bytes, os.urandom, lambda n: b'<html>'.ljust(n)], ids=['zeros', 'noise', 'html'])
def test_corrupt_images_are_masked_and_counted(toy, tmp_path, how):
    bad = damage(toy, tmp_path / 'bad', 15, how)
    b, whole = (batches(where, B=20, transform=Transform(16), limit=0.5) for where in (bad, toy))
    broken = {30 * s + k for s in range(4) for k in (0, 15)} - {115, 105}
    n = 0
    for step in range(5):
        x, y = b[step], whole[step]
        lost = torch.tensor([i in broken for i in b.sequence[b.positions(step)]])
        assert torch.equal(x['valid'], ~lost) and y['valid'].all()
        for k in ('image', 'text', 'label', 'views'):
            assert torch.equal(x[k][~lost], y[k][~lost]), 'the others do not notice'
            assert not x[k][lost].any(), 'zeros, and an empty caption'
        n += int(lost.sum())
    assert n == sum(b.skipped.counts.values()) == 7
    assert {where for where, _ in b.skipped.counts} == {p.name for p in toy.glob('*.tar')}
    again = loader(batches(bad, B=20, transform=Transform(16), limit=0.5), 0, 5, workers=2)
    assert all(same(x, y) for x, y in zip((b[s] for s in range(5)), again))


def test_what_was_skipped_can_be_said(toy, tmp_path):
    "Finding 4: nine of a hundred samples were corrupt and nobody heard of it."
    b = batches(damage(toy, tmp_path / 'bad', 15), transform=Transform(16), limit=0.5)
    assert b.skipped.news() == ''
    for _ in loader(b, 0, 12): pass
    lost, line = sum(b.skipped.counts.values()), b.skipped.news()
    assert lost >= 6 and line.startswith(f'{lost} of 96 samples could not be read') and '000000.tar (not an image, ' in line and ' 1 more' in line and '\n' not in line
    assert b.skipped.news() == '' and b.skipped.rows == 96


def test_counts_come_home_from_workers(toy, tmp_path):
    bad = damage(toy, tmp_path / 'bad', 15); here, there = (batches(bad, transform=Transform(16)) for _ in range(2))
    list(loader(here, 0, 10)); list(loader(there, 0, 10, workers=2))
    assert here.skipped.counts == there.skipped.counts and here.skipped.counts


@pytest.mark.parametrize('workers', [0, 2])
def test_too_much_damage_ends_with_one_line(toy, tmp_path, workers):
    bad = damage(toy, tmp_path / 'bad', 3)
    with pytest.raises(Damaged, match=r'samples cannot be read, most of them in 00000\d.tar \(not an image') as e:
        list(loader(batches(bad, transform=Transform(16)), 0, 500, workers=workers))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_readable_ends_at_once(toy, tmp_path, workers):
    bad = damage(toy, tmp_path / 'bad', 1)
    with pytest.raises(Damaged, match='64 samples in a row cannot be read, the last one in .*not an image') as e:
        list(loader(batches(bad, transform=Transform(16)), 0, 500, workers=workers))
    assert '\n' not in str(e.value)


def test_missing_label_in_one_sample_is_masked_and_counted(tmp_path):
    rows = list(samples(20)); rows[7] = (*rows[7][:3], {}); rows[8] = (*rows[8][:3], {'label': 'eight'})
    write_shards(rows, tmp_path / 'x'); b = batches(tmp_path / 'x', B=10, transform=Transform(16))
    for step in range(2):
        batch, lost = b[step], torch.tensor([i in (7, 8) for i in b.sequence[b.positions(step)]])
        assert torch.equal(batch['valid'], ~lost) and not any(batch[k][lost].any() for k in ('image', 'text', 'label', 'views'))
    assert dict(b.skipped.counts) == {('000000.tar', "json lacks 'label'"): 1, ('000000.tar', 'label is no whole number'): 1}


def test_labels_that_nobody_needs_may_be_missing(toy, tmp_path):
    "Finding 5: a labelled and an unlabelled tar together."
    write_shards([(f'u{k}', jpg, text, {}) for k, (_, jpg, text, _) in enumerate(samples(30))], tmp_path / 'unlabelled')
    both = f'{toy}::{tmp_path}/unlabelled'
    b = batches(both, B=26, fields=('image', 'text'))
    assert all(x['valid'].all() and set(x) == {'image', 'text', 'draw', 'valid'} for x in loader(b, 0, 5)) and len(b.source) == 130
    with pytest.raises(UserError, match="the field 'label' cannot be made: the samples of .*unlabelled lack 'label'; they have image, text$"): batches(tmp_path / 'unlabelled')


def test_string_keys_stay_behind(tmp_path):
    write_shards(samples(4, key='000000001'), tmp_path / 'x')
    assert Shards(tmp_path / 'x').fields == ('image', 'text', 'label')
    with pytest.raises(UserError, match="the field 'key' cannot be made"): batches(tmp_path / 'x', B=2, fields=('image', 'key'))


class Sleepy(Source):
    n = 10
    def read(self, i):
        if not os.environ.get('CLIPA_TEST_AWAKE'): time.sleep(60)
        return {'image': jpeg(picture(i)), 'text': 'x', 'json': {}, 'key': '0'}


def test_worker_that_hangs_is_noticed(monkeypatch):
    monkeypatch.setenv('CLIPA_TEST_AWAKE', '1'); b = Batches(Sleepy(), tokens, Transform(16), 2, context_length=4)
    monkeypatch.delenv('CLIPA_TEST_AWAKE')
    with pytest.warns(UserWarning, match='gave no batch for 1 seconds at batch 0; it was reading Sleepy .sample .+; the workers are restarted'):
        with pytest.raises(Damaged, match='it was reading Sleepy .sample .+; it was restarted before, in vain'): list(loader(b, 0, 2, workers=1, timeout=1))


# ---- other sources ----

def test_csv_paths_that_are_missing_are_counted(tmp_path):
    for i in range(6): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i)))
    (tmp_path / 'a.csv').write_text('filepath,title\n' + ''.join(f'{i}.jpg,"caption, {i}"\n' for i in range(7)))
    b = Batches(Table(tmp_path / 'a.csv'), tokens, Transform(16), 7, context_length=12)
    assert b[0]['valid'].tolist() == [i != 6 for i in b.sequence[b.positions(0)]]
    assert dict(b.skipped.counts) == {('a.csv', 'file is missing'): 1} and Table(tmp_path / 'a.csv').read(3)['text'] == 'caption, 3'
    assert isinstance(open_pairs(tmp_path / 'a.csv'), Table)


# ---- how much damage ends a run ----

def test_the_limit_is_a_share_of_a_batch_larger_than_the_window():
    one = [('a.tar', 'not an image')]
    Skips().add(one * 101, 8192); Skips().add(one * 163, 8192)
    for bad, rows in ((101, 128), (1000, 8192)):
        with pytest.raises(Damaged, match=f'{bad} of the last {rows} samples cannot be read'): Skips().add(one * bad, rows)
    nine = Skips()
    for _ in range(20): nine.add(one * 90, 900)
    assert sum(nine.counts.values()) == 1800


# ---- which reader ----

@pytest.mark.parametrize('join', [list, '::'.join], ids=['list', 'joined'])
def test_hundreds_of_shards(toy, join):
    assert len(open_pairs(join([str(toy / '000003.tar')] * 400))) == 4000


# ---- pixels of other kinds ----

@pytest.mark.parametrize('kind', [np.float32, np.int32])
def test_pixels_without_a_known_range_are_damage(tmp_path, kind):
    "A picture of floats became black and one of large integers white; now they are counted."
    for i in range(8): (tmp_path / f'{i}.txt').write_text('x'); (tmp_path / f'{i}.png').write_bytes(as_file(Image.fromarray(np.ones((8, 8), kind)), 'tiff') if i == 3 else jpeg(picture(i)))
    b = Batches(open_pairs(tmp_path), tokens, Transform(16), 8, context_length=4); b[0]
    assert [why for _, why in b.skipped.counts] == ['pixel values of unknown range']


# ---- filters ----

class Torn(Source):
    n = 20
    def read(self, i):
        if i == 7: raise json.JSONDecodeError('no json', '', 0)
        return {'image': b'', 'text': 'x' * i, 'json': {}, 'key': str(i)}


def test_filters_count_what_cannot_be_read():
    kept, counts = filtered(Torn(), [Filter('short', lambda row: len(row['text']) < 10), Filter('not empty', lambda row: row['text'] != '')])
    assert kept.ids.tolist() == [1, 2, 3, 4, 5, 6, 8, 9] and counts == {'readable': 1, 'short': 10, 'not empty': 1}


def test_filters_that_leave_nothing():
    with pytest.raises(UserError, match="leave none of 20 samples.*readable 1.*never 19"): filtered(Torn(), [Filter('never', lambda row: False)])


# ---- what the chapter used to show ----

class Some(Source):
    "Ten samples, of which the even ones are broken."
    n = 10
    def read(self, i): return {'image': jpeg(picture(int(i))) if i % 2 else b'?', 'text': ['one', 'another'], 'json': {'label': i}, 'key': str(i)}


def test_what_a_source_offers():
    assert (len(Some()), Some().where(1), Some.names) == (10, ('Some', '1'), None)
    part = Subset(Some(), [5, 3])
    assert (len(part), part.where(0), part.read(1)['key']) == (2, ('Some', '5'), '3')


def test_a_member_beyond_the_end(toy):
    s = Shards(toy)
    assert s.where(31) == ('000001.tar', '000031')
    with pytest.raises(OSError, match='shorter than when it was indexed'): s.stores[False].read(s.paths[1], 10**9, 1)


def test_damage_has_a_name():
    def fails(data):
        try: decode(data, Transform(84))
        except Exception as e: return cause(e)
    whole = jpeg(picture(1, 64, 64))
    assert (fails(b'<html>404</html>'), fails(b''), fails(whole[:700])) == ('not an image', 'not an image', 'image file is truncated')
    assert cause(KeyError('label')) == "json lacks 'label'" and cause(json.JSONDecodeError('no json', '', 0)) == 'bad json'


def test_one_of_several_captions():
    assert one_caption('a star', 0.9) == 'a star' and [one_caption(['a', 'b', 'c'], u) for u in (0.1, 0.5, 0.9)] == ['a', 'b', 'c']
    for nothing in (None, [], 7):
        with pytest.raises(ValueError, match='no caption'): one_caption(nothing, 0.5)


def test_the_worst_place_is_named():
    skips = Skips()
    for k in range(50): skips.add([('a.tar', 'not an image')] if k % 5 == 0 else [], 20)
    assert skips.counts == {('a.tar', 'not an image'): 10}
    with pytest.raises(Damaged, match=r'most of them in b.tar \(file is missing, 101 times\)'): skips.add([('b.tar', 'file is missing')] * 101, 128)


def test_a_users_error_leaves_a_worker_as_a_value():
    def complain(samples, batches, draw_b): raise UserError('this tokenizer has no such word')
    b = Batches(Some(), tokens, Transform(32), 4, context_length=4, limit=1.); good, lost = _Steps(b)[0]
    assert good['text'].shape == (4, 4) and lost == [('Some', 'not an image')] * int((~good['valid']).sum())
    b.makers['text'] = complain; error, skipped = _Steps(b)[0]
    assert isinstance(error, UserError) and skipped == []
    with pytest.raises(UserError, match='^this tokenizer has no such word$'): list(loader(b, 0, 2, workers=1))


def test_workers_have_one_thread_and_steps_keep_their_order(toy):
    _start_worker(0)
    assert torch.get_num_threads() == 1 and _same('x') == 'x'
    stream = _stream([n * n for n in range(10)], range(2, 7), workers=2, prefetch=1, timeout=60., pin=False)
    assert list(stream) == [4, 9, 16, 25, 36]
    assert list(loader(batches(toy), 7, 7, workers=2)) == []


def test_filters_are_asked_in_turn(toy):
    few, low = Filter('few', lambda row: len(row['text']) <= 16), Filter('low', lambda row: row['text'][-1] in '01234')
    rows = [{'text': f'caption number {i}'} for i in range(100)]
    survivors, counts = apply_filters(rows, [few, low])
    assert len(survivors) == 5 and counts == {'few': 90, 'low': 5} and apply_filters(rows[:1], []) == (rows[:1], {})
    kept, counts = filtered(Shards(toy), [few, low])
    assert kept.ids.tolist() == [0, 1, 2, 3, 4] and counts == {'readable': 0, 'few': 90, 'low': 5}


# ---- fields ----

class Scene(Source):
    "Pictures of two boxes with names; sample 3 has none, sample 5 has one too many, sample 6 is not told what they are."
    n = 8
    def read(self, i):
        boxes = {3: [], 5: [[0.5, 0.5, 0.1, 0.1], [0.25, 0.5, 0.5, 1.], [0.75, 0.5, 0.5, 1.]]}.get(i, [[0.25, 0.5, 0.5, 1.], [0.75, 0.5, 0.5, 1.]])
        names = ['left', 'right'] if len(boxes) == 2 else ['', 'left', 'right'][:len(boxes)]
        meta = {'boxes': boxes, 'box_text': names, 'prompt': 'where?', 'answer': 'here', 'lang': 'en', 'key': i, 'height': 2.5, 'seen': True, 'url': 'x'}
        if i == 6: meta.pop('box_text')
        return {'image': jpeg(picture(i, 40, 80)), 'text': ['one', 'two', 'three'], 'json': meta, 'key': str(i)}


def test_what_the_first_samples_have():
    assert Scene().fields == Subset(Scene(), [3, 1]).fields == ('image', 'text', 'boxes', 'box_text', 'prompt', 'answer', 'lang', 'key')
    check_needs(('image', 'views', 'caption', 'boxes', 'n_boxes', 'box_text', 'prompt', 'answer', 'key', 'draw', 'valid'), Scene())
    with pytest.raises(UserError, match="'label' cannot be made: the samples of Scene lack 'label'; they have image, text, boxes"): check_needs(('label',), Scene())
    with pytest.raises(UserError, match="nothing makes the field 'depth': known are image, .*makers"): check_needs(('depth',), Scene())
    check_needs(('depth',), Scene(), {'depth': lambda samples, batches, draw_b: draw_b})
    with pytest.raises(UserError, match="'deep' cannot be made: the samples of Scene lack 'depth'"): check_needs(('deep',), Scene(), {'deep': looks_at('depth')(lambda *a: a)})


def test_nothing_readable_at_all():
    class Closed(Source):
        n = 100
        def read(self, i): raise OSError('permission denied 17')
    with pytest.raises(UserError, match=r'none of the first samples of Closed can be read \(permission denied\)'): Closed().fields


def scenes_of(fields, **more): return Batches(Scene(), tokens, more.pop('transform', Transform(20)), 8, seed=1, context_length=6, fields=fields, limit=1., **more)


def test_boxes_names_and_their_number():
    b = scenes_of(('boxes', 'n_boxes', 'box_text'), transform=Transform(20, scale=(1., 1.)), max_boxes=2); x = b[0]
    ids = b.sequence[b.positions(0)].tolist(); at = {i: k for k, i in enumerate(ids)}
    assert x['boxes'].shape == (8, 2, 4) and x['box_text'].shape == (8, 2, 6) and x['boxes'].dtype == torch.float32
    assert x['valid'].tolist() == [i != 6 for i in ids] and dict(b.skipped.counts) == {('Scene', "json lacks 'box_text'"): 1}
    assert x['n_boxes'][[at[0], at[3], at[5], at[6]]].tolist() == [2, 0, 2, 0]
    said = [[bytes(r.tolist()).decode().strip('\0') for r in row] for row in x['box_text']]
    assert (said[at[0]], said[at[3]], said[at[5]], said[at[6]]) == (['left', 'right'], ['', ''], ['left', 'right'], ['', '']), 'the largest are kept, in their order'
    side = Transform(20, scale=(1., 1.)).ratio[1] * 40
    assert torch.allclose(x['boxes'][at[0]], torch.tensor([[0.25, 0.5, 0.5, 1.], [0.75, 0.5, 0.5, 1.]])), 'the centred crop shows half of each'
    assert not x['boxes'][at[3]].any() and 40 < side < 80
    assert scenes_of(('boxes',))[0]['boxes'].shape == (8, 3, 4)


def test_boxes_stay_on_their_pixels():
    "The left half is black and the right one white: wherever the crop is, the boxes end where the colour changes."
    class Halves(Scene):
        def read(self, i): return dict(super().read(0), image=as_file(Image.fromarray(np.repeat(np.array([[[0], [255]]], np.uint8), 40, 1).repeat(40, 0).repeat(3, 2)), 'png'))
    x = Batches(Halves(), tokens, Transform(64), 8, context_length=6, fields=('image', 'boxes', 'n_boxes'))
    x = {k: torch.cat([batch[k] for batch in loader(x, 0, 8)]) for k in ('image', 'boxes', 'n_boxes')}
    both = x['n_boxes'] == 2
    edge = (x['image'].float().mean((1, 2)) < 127.5).float().mean(1)
    right_of_left = x['boxes'][:, 0, 0] + x['boxes'][:, 0, 2] / 2
    assert both.sum() > 10 and (edge[both] - right_of_left[both]).abs().max() < 1.5 / 64 and edge[both].std() > 0.05


def test_texts_of_all_kinds():
    b = scenes_of(('text', 'caption', 'prompt', 'answer', 'key'), strategy='shuffle'); x = b[0]
    read = lambda row: bytes(row.tolist()).decode().strip('\0')
    assert {read(r) for r in x['prompt']} == {'where?'} and {read(r) for r in x['answer']} == {'here'}
    assert x['key'].tolist() == b.sequence[b.positions(0)].tolist()
    drawn = keyed_uniform(x['draw'], 'caption', 1)[:, 0].tolist()
    captions = [['one', 'two', 'three'][int(3 * u)] for u in drawn]
    assert [read(r) for r in x['caption']] == captions and len(set(captions)) > 1
    assert [sorted(r.tolist()) for r in x['text']] == [sorted(r.tolist()) for r in x['caption']] and not torch.equal(x['text'], x['caption'])


def test_a_field_of_ones_own():
    def sizes(samples, batches, draw_b): return torch.tensor([s.size if s else (0, 0) for s in samples])
    def picky(samples, batches, draw_b):
        if any(s and s.row['json']['key'] == 2 for s in samples): raise ValueError('two is too much')
        return torch.ones(len(samples))
    b = scenes_of(('image', 'sizes', 'picky'), makers=dict(sizes=sizes, picky=picky)); x = b[0]
    two = torch.tensor([i == 2 for i in b.sequence[b.positions(0)]])
    assert torch.equal(x['valid'], ~two) and dict(b.skipped.counts) == {('Scene', 'two is too much'): 1}
    assert x['sizes'].tolist() == [[0, 0] if t else [80, 40] for t in two] and not x['image'][two].any()


@pytest.mark.parametrize('wrong', [NameError, AttributeError, UserError])
def test_a_makers_mistake_is_not_the_samples(wrong):
    def broken(samples, batches, draw_b): raise wrong('a slip')
    with pytest.raises(wrong, match='a slip'): scenes_of(('image', 'mine'), makers=dict(mine=broken))[0]


def test_a_maker_that_fails_only_on_many_is_not_hidden():
    def broken(samples, batches, draw_b):
        if len(samples) > 1: raise ValueError('shapes')
        return torch.ones(1)
    with pytest.raises(ValueError, match='shapes'): scenes_of(('image', 'mine'), makers=dict(mine=broken))[0]


def test_only_what_is_looked_at_is_decoded():
    class Words(Scene):
        def read(self, i): return dict(super().read(i), image=b'no picture')
    x = Batches(Words(), tokens, Transform(16), 8, context_length=6, fields=('text', 'key'))[0]
    assert x['valid'].all() and set(x) == {'text', 'key', 'draw', 'valid'}


def test_a_source_keeps_its_rows():
    "A source may hand out what it holds in memory."
    held = [Scene().read(i) for i in range(8)]
    class Held(Scene):
        def read(self, i): return held[i]
    Batches(Held(), tokens, Transform(16), 8, context_length=6)[0]
    assert all('image' in row for row in held)


@pytest.mark.parametrize('B, warned', [(8, 0), (9, 1)])
def test_a_batch_larger_than_the_data(B, warned):
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always'); Batches(Scene(), tokens, Transform(16), B, context_length=6)
    assert len(seen) == warned and all('Scene has 8 samples for batches of 9' in str(w.message) for w in seen)


# ---- what an engineer tries first ----

@pytest.mark.parametrize('name, says', [
    ('a.zip', 'a .zip file is not read: give tar shards'), ('a.tfrecord', 'a .tfrecord file is not read'), ('a.xlsx', 'a .xlsx file is not read'),
    ('a.tar.gz', r'a compressed tar \(.tar.gz\).*unpack it'), ('a.TGZ', 'a compressed tar'), ('ftp://host/{000..009}.tar', 'ftp:// is not read, only tar shards at http://'),
    ('https://x/a.csv', 'a web server cannot be asked which shards it has'), ('http://x/', 'name plain .tar files in braces'),
    ('pipe:aws s3 cp s3://b/{0..9}.tar -', 'pipe: is not read'), ('nothing', 'matches no tar file: give tar shards .*table.*hub:NAME')])
@pytest.mark.parametrize('opened', [open_pairs, check_pairs, Shards, lambda where: PairData(path=where).open(), lambda where: PairData().check(where)], ids=['open', 'check', 'Shards', 'data', 'dry'])
def test_what_is_not_read_is_refused_by_name(tmp_path, monkeypatch, name, says, opened):
    monkeypatch.chdir(tmp_path)
    if ':' not in name and name != 'nothing': (tmp_path / name).write_bytes(b'x')
    with pytest.raises(UserError, match=says) as e: opened(name)
    assert '\n' not in str(e.value)


def test_two_tables_are_not_joined(tmp_path):
    with pytest.raises(UserError, match='b.csv: a table cannot be joined'): open_pairs([str(tmp_path / 'b.csv'), 'x'])


def test_data_as_a_configuration(toy):
    assert PairData.from_json(PairData(name='own', n=100, path='x').to_json()) == PairData(name='own', n=100, path='x') and PairData().makers() == {}
    with pytest.raises(UserError, match='no training data: give --train-data .*tar shards.*table.*hub:NAME'): PairData().open()
    assert len(PairData(path='nowhere').open(str(toy), folder=None, seed=3)) == len(PairData(path=str(toy)).open()) == 100
    PairData(path=str(toy)).check()
    with pytest.raises(UserError, match='matches no tar file'): PairData().check('nowhere')


def test_a_check_looks_into_the_first_shard_only(toy, tmp_path):
    (tmp_path / 'x').mkdir(); (tmp_path / 'x' / '0.tar').write_bytes((toy / '000000.tar').read_bytes()); (tmp_path / 'x' / '1.tar').write_bytes(b'no tar')
    check_pairs(tmp_path / 'x'); (tmp_path / 'x' / '0.tar').write_bytes(b'no tar')
    with pytest.raises(UserError, match='0.tar is not a tar file'): check_pairs(tmp_path / 'x')


def test_captions_to_learn_from(toy, tmp_path):
    "Finding 12: one bad json, one missing picture."
    assert captions_of(Torn()) == ['x' * i for i in range(20) if i != 7]
    assert captions_of(Shards(toy), 4) == [f'caption number {i}' for i in (0, 25, 50, 75)]
    assert captions_of(Some(), 2) == ['one', 'another'] * 2
    (tmp_path / 'a.csv').write_text('filepath,title\n1.jpg,x\n')
    with pytest.raises(UserError, match='none of 1 samples of .*a.csv has a caption'): captions_of(Table(tmp_path / 'a.csv'))
