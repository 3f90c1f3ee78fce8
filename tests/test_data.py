"The data room under bad input: damaged samples, other sources, and batches that must not depend on who makes them."
import io, json, os, pickle, time
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.data import (Batches, ClassFolders, Csv, Endless, Filter, Folder, HubSet, Shards, Skips, Source, Subset, _Steps, _extras, _one_caption, _pairs,
                           _pictures, _same, _start_worker, _stream, _table, apply_filters, cause, filtered, loader, open_pairs, order, positions, read_row)
from clipa_nb.engine.pictures import Transform, decode, jpeg
from clipa_nb.engine.shards import members, write_shards

torch.set_num_threads(1)


def picture(i, h=24, w=24):
    g = torch.Generator().manual_seed(i)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')[0].mul(255).byte()


def samples(n, **more):
    for i in range(n): yield f'{i:06d}', jpeg(picture(i)), f'caption number {i}', {'label': i, **more}


def tokens(texts, context_length=None, strategy=None, generator=None):
    "One id per letter; with a strategy, shuffled by the generator."
    ids = torch.tensor([[ord(c) for c in t[:context_length].ljust(context_length)] for t in texts])
    return ids[:, torch.randperm(context_length, generator=generator)] if strategy else ids


def as_file(image, form, **options):
    out = io.BytesIO(); image.save(out, form, **options); return out.getvalue()


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp('toy') / 'set'
    write_shards(samples(100), out, per_shard=30)
    return out


def batches(where, B=8, **more):
    return Batches(Shards(where), tokens, more.pop('transform', Transform(16, jitter=0.8, gray=0.2)), B, seed=more.pop('seed', 3), context_length=20, strategy='shuffle', **more)


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
    b = batches(toy, B=32); seen = np.concatenate([[b.sequence[p] for p in positions(s, 32)] for s in range(25)])
    for e in range(8): assert sorted(seen[100 * e:100 * e + 100]) == list(range(100))
    assert not np.array_equal(seen[:100], seen[100:200])


@pytest.mark.filterwarnings('ignore:This DataLoader')
@pytest.mark.parametrize('workers', [1, 2, 3])
def test_workers_do_not_matter(toy, workers):
    for a, b in zip(loader(batches(toy), 9, 16), loader(batches(toy), 9, 16, workers=workers), strict=True): assert same(a, b)


@pytest.mark.parametrize('size', [2, 4, 8])
def test_ranks_do_not_matter(toy, size):
    "All but the text strategy, which draws per rank."
    whole = batches(toy)
    for step in (0, 12, 13):
        parts = [batches(toy, rank=r, size=size)[step] for r in range(size)]
        for k in ('image', 'label', 'skipped'): assert torch.equal(torch.cat([p[k] for p in parts]), whole[step][k])


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
    assert t._open == {} and t.read(50) == s.read(50)


def test_few_files_stay_open(tmp_path):
    write_shards(samples(300), tmp_path / 'x', per_shard=1); s = Shards(tmp_path / 'x')
    assert [s.read(i)['json']['label'] for i in range(300)] == list(range(300)) and len(s._open) <= 256


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
def test_corrupt_images_are_replaced_and_counted(toy, tmp_path, how):
    bad = damage(toy, tmp_path / 'bad', 15, how); b = batches(bad, B=20, transform=Transform(16))
    rows = [b[s] for s in range(5)]
    assert all(r['image'].shape == (20, 3, 16, 16) for r in rows)
    assert sum(int(r['skipped'].sum()) for r in rows) == sum(b.skipped.counts.values()) >= 7
    assert {where for where, _ in b.skipped.counts} == {p.name for p in toy.glob('*.tar')}
    broken = {30 * s + k for s in range(4) for k in (0, 15)}
    assert not broken & {int(x) for r in rows for x in r['label']}
    assert all(same(x, y) for x, y in zip(rows, loader(batches(bad, B=20, transform=Transform(16)), 0, 5, workers=2)))


def test_counts_come_home_from_workers(toy, tmp_path):
    bad = damage(toy, tmp_path / 'bad', 15); here, there = (batches(bad, transform=Transform(16)) for _ in range(2))
    list(loader(here, 0, 10)); list(loader(there, 0, 10, workers=2))
    assert here.skipped.counts == there.skipped.counts and here.skipped.counts


@pytest.mark.parametrize('workers', [0, 2])
def test_too_much_damage_ends_with_one_line(toy, tmp_path, workers):
    bad = damage(toy, tmp_path / 'bad', 3)
    with pytest.raises(UserError, match=r'samples cannot be read, most of them in 00000\d.tar \(not an image') as e:
        list(loader(batches(bad, transform=Transform(16)), 0, 500, workers=workers))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('workers', [0, 2])
def test_nothing_readable_ends_at_once(toy, tmp_path, workers):
    bad = damage(toy, tmp_path / 'bad', 1)
    with pytest.raises(UserError, match='64 samples in a row cannot be read.*not an image') as e:
        list(loader(batches(bad, transform=Transform(16)), 0, 500, workers=workers))
    assert '\n' not in str(e.value)


def test_missing_label_in_one_sample_is_counted(tmp_path):
    rows = list(samples(20)); rows[7] = (*rows[7][:3], {})
    write_shards(rows, tmp_path / 'x'); b = batches(tmp_path / 'x', B=10, transform=Transform(16))
    assert 7 not in [int(x) for s in range(2) for x in b[s]['label']]
    assert dict(b.skipped.counts) == {('000000.tar', "json lacks 'label'"): 1}


def test_string_keys_stay_behind(tmp_path):
    write_shards(samples(4, key='000000001'), tmp_path / 'x')
    assert set(batches(tmp_path / 'x', B=2, transform=Transform(16))[0]) == {'image', 'text', 'label', 'skipped'}


class Sleepy(Source):
    n = 10
    def read(self, i):
        if not os.environ.get('CLIPA_TEST_AWAKE'): time.sleep(60)
        return {'image': jpeg(picture(i)), 'text': 'x', 'json': {}, 'key': '0'}


def test_worker_that_hangs_is_noticed(monkeypatch):
    monkeypatch.setenv('CLIPA_TEST_AWAKE', '1'); b = Batches(Sleepy(), tokens, Transform(16), 2, context_length=4)
    monkeypatch.delenv('CLIPA_TEST_AWAKE')
    with pytest.raises(RuntimeError, match='timed out'): list(loader(b, 0, 2, workers=1, timeout=1))


# ---- other sources ----

def test_csv_paths_that_are_missing_are_counted(tmp_path):
    for i in range(6): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i)))
    (tmp_path / 'a.csv').write_text('filepath,title\n' + ''.join(f'{i}.jpg,"caption, {i}"\n' for i in range(7)))
    b = Batches(Csv(tmp_path / 'a.csv'), tokens, Transform(16), 7, context_length=12)
    b[0]
    assert dict(b.skipped.counts) == {('a.csv', 'file is missing'): 1} and Csv(tmp_path / 'a.csv').read(3)['text'] == 'caption, 3'
    assert isinstance(open_pairs(tmp_path / 'a.csv'), Csv)


@pytest.mark.parametrize('make, message', [(lambda p: Csv(p / 'no.csv'), 'there is no table'), (lambda p: Folder(p), 'holds no image'), (lambda p: open_pairs(p), 'matches no tar file')])
def test_empty_places(tmp_path, make, message):
    with pytest.raises(UserError, match=message): make(tmp_path)


def test_hub_set():
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'image': [{'bytes': jpeg(picture(i)), 'path': None} for i in range(4)], 'caption': [[f'a{i}', f'b{i}'] for i in range(4)], 'label': list(range(4))})
    rows = rows.cast_column('image', datasets.Image())
    with pytest.raises(UserError, match="no column 'text': it has image, caption, label"): HubSet(rows)
    b = Batches(HubSet(rows, text='caption'), tokens, Transform(16), 4, context_length=2)
    said = {bytes(t.tolist()).decode()[0] for s in range(10) for t in b[s]['text']}
    assert said == {'a', 'b'} and set(b[0]['label'].tolist()) == {0, 1, 2, 3}


# ---- how much damage ends a run ----

def test_the_limit_is_a_share_of_a_batch_larger_than_the_window():
    one = [('a.tar', 'not an image')]
    Skips().add(one * 101, 8192); Skips().add(one * 163, 8192)
    for bad, rows in ((101, 128), (1000, 8192)):
        with pytest.raises(UserError, match=f'{bad} of the last {rows + bad} samples cannot be read'): Skips().add(one * bad, rows)
    nine = Skips()
    for _ in range(20): nine.add(one * 90, 900)
    assert sum(nine.counts.values()) == 1800


# ---- which reader ----

@pytest.mark.parametrize('join', [list, '::'.join], ids=['list', 'joined'])
def test_hundreds_of_shards(toy, join):
    assert len(open_pairs(join([str(toy / '000003.tar')] * 400))) == 4000


def test_a_stray_text_hides_no_class_folders(tmp_path):
    (tmp_path / 'cat').mkdir(); (tmp_path / 'cat' / '1.jpg').write_bytes(jpeg(picture(1))); (tmp_path / 'readme.txt').write_text('read me')
    s = open_pairs(tmp_path)
    assert isinstance(s, ClassFolders) and s.names == ['cat']
    (tmp_path / 'cat' / '1.jpg').unlink()
    with pytest.raises(UserError, match='holds no image with a .txt'): open_pairs(tmp_path)


def test_endings_in_capitals(tmp_path):
    for i, (a, b, c) in enumerate((('.JPG', '.TXT', '.JSON'), ('.jpg', '.txt', '.json'), ('.Png', '.Txt', '.Json'))):
        (tmp_path / f'{i}{a}').write_bytes(jpeg(picture(i))); (tmp_path / f'{i}{b}').write_text(f'number {i}'); (tmp_path / f'{i}{c}').write_text(f'{{"label": {i}}}')
    s = open_pairs(tmp_path)
    assert isinstance(s, Folder) and [(s.read(i)['text'], s.read(i)['json'], s.where(i)[1]) for i in range(len(s))] == [(f'number {i}', {'label': i}, str(i)) for i in range(3)]


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
    with pytest.raises(OSError, match='shorter than when it was indexed'): s._pread(1, 10**9, 1)


def test_orders_and_positions():
    assert np.array_equal(np.sort(order(1000, 0, 3)), np.arange(1000)) and np.array_equal(order(6, 7, 0), order(6, 7, 0))
    assert Endless(10, 0)[3] == Endless(10, 0)[3] == order(10, 0, 0)[3]
    with pytest.raises(UserError, match='cannot be shared by 3 ranks'): positions(0, 4, 0, 3)


def test_damage_has_a_name():
    def fails(data):
        try: decode(data, Transform(84))
        except Exception as e: return cause(e)
    whole = jpeg(picture(1, 64, 64))
    assert (fails(b'<html>404</html>'), fails(b''), fails(whole[:700])) == ('not an image', 'not an image', 'image file is truncated')
    assert cause(KeyError('label')) == "json lacks 'label'" and cause(json.JSONDecodeError('no json', '', 0)) == 'bad json'


def test_one_of_several_captions():
    assert _one_caption('a star', 0.9) == 'a star' and [_one_caption(['a', 'b', 'c'], u) for u in (0.1, 0.5, 0.9)] == ['a', 'b', 'c']


def test_rows_that_cannot_be_read():
    sequence, u = Endless(10, 0), [0.5] * 23
    pixels, text, extras, skipped = read_row(Some(), sequence, 0, Transform(32), u, ['label'])
    assert extras[0] % 2 == 1 and text == 'another' and skipped == [('Some', 'not an image')] * len(skipped)
    with pytest.raises(UserError, match='10 samples in a row cannot be read, the last one in Some'): read_row(Some(), sequence, 0, Transform(32), u, ['key'])


def test_the_worst_place_is_named():
    skips = Skips()
    for k in range(50): skips.add([('a.tar', 'not an image')] if k % 5 == 0 else [], 20)
    assert skips.counts == {('a.tar', 'not an image'): 10}
    with pytest.raises(UserError, match=r'most of them in b.tar \(file is missing, 101 times\)'): skips.add([('b.tar', 'file is missing')] * 101, 128)


def test_integers_that_come_along(toy):
    assert _extras(Some()) == _extras(Shards(toy)) == ['label']


def test_a_users_error_leaves_a_worker_as_a_value():
    b = Batches(Some(), tokens, Transform(32), 4, context_length=4); good = _Steps(b)[0]
    b.extras = ['nothing']; error, skipped = _Steps(b)[0]
    assert isinstance(error, UserError) and skipped == [] and good[0]['text'].shape == (4, 4)
    with pytest.raises(UserError, match='10 samples in a row cannot be read'): list(loader(b, 0, 2, workers=1))


def test_workers_have_one_thread_and_steps_keep_their_order(toy):
    _start_worker(0)
    assert torch.get_num_threads() == 1 and _same('x') == 'x'
    stream = _stream([n * n for n in range(10)], range(2, 7), workers=2, prefetch=1, timeout=60., pin=False)
    assert (list(stream.sampler), stream.batch_size, len(stream)) == ([2, 3, 4, 5, 6], None, 5)
    assert list(loader(batches(toy), 7, 7, workers=2)) == []


def test_folders_tables_and_classes(tmp_path):
    for i in range(3): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i))); (tmp_path / f"{i}.{'TXT' if i else 'txt'}").write_text(f'caption {i}\n')
    assert [(p.name, t.name, j) for p, t, j in _pairs(tmp_path)] == [('0.jpg', '0.txt', None), ('1.jpg', '1.TXT', None), ('2.jpg', '2.TXT', None)]
    assert [p.name for p in _pictures(tmp_path)] == ['0.jpg', '1.jpg', '2.jpg'] and _extras(Folder(tmp_path)) == []
    with pytest.raises(UserError, match='holds no folder with images'): ClassFolders(tmp_path)
    (tmp_path / 'a.csv').write_text('filepath,title\na.jpg,"a star, red"\n')
    (tmp_path / 'a.tsv').write_text('filepath\ttitle\tlabel\n0.jpg\tx\t0\n1.jpg\ty\t1\n')
    assert _table(tmp_path / 'a.csv') == [{'filepath': 'a.jpg', 'title': 'a star, red'}] and [r['label'] for r in _table(tmp_path / 'a.tsv')] == ['0', '1']
    with pytest.raises(UserError, match="no column 'caption': it has filepath, title, label"): Csv(tmp_path / 'a.tsv', text='caption')


def test_labels_follow_the_names_of_class_folders(tmp_path):
    for k, name in enumerate(('star', 'ring', 'star')): (tmp_path / name).mkdir(exist_ok=True); (tmp_path / name / f'{k}.jpg').write_bytes(jpeg(picture(k)))
    s = ClassFolders(tmp_path)
    assert (s.names, [s.read(i)['json']['label'] for i in range(3)], s.read(0)['image']) == (['ring', 'star'], [0, 1, 1], jpeg(picture(1)))


class Rows:
    "A stand-in with the three things that `HubSet` asks of a `datasets.Dataset`."
    column_names = ['image', 'text', 'label']
    def cast_column(self, name, feature): return self
    def __len__(self): return 3
    def __getitem__(self, i): return {'image': {'bytes': jpeg(picture(i)), 'path': None}, 'text': f'row {i}', 'label': i}


def test_what_a_hub_set_asks_of_its_rows():
    pytest.importorskip('datasets')
    row = HubSet(Rows()).read(2)
    assert (row['image'], row['text'], row['json']) == (jpeg(picture(2)), 'row 2', {'label': 2})


def test_filters_are_asked_in_turn(toy):
    few, low = Filter('few', lambda row: len(row['text']) <= 16), Filter('low', lambda row: row['text'][-1] in '01234')
    rows = [{'text': f'caption number {i}'} for i in range(100)]
    survivors, counts = apply_filters(rows, [few, low])
    assert len(survivors) == 5 and counts == {'few': 90, 'low': 5} and apply_filters(rows[:1], []) == (rows[:1], {})
    kept, counts = filtered(Shards(toy), [few, low])
    assert kept.ids.tolist() == [0, 1, 2, 3, 4] and counts == {'readable': 0, 'few': 90, 'low': 5}
