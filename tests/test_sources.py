"Sources that are not tars: directories, tables, data sets of the Hub, streams, samples made while they are read."
import bz2, functools, gzip, io, json, lzma, os, tracemalloc
import numpy as np, pytest, torch
from clipa_nb.core import UserError
from clipa_nb.data import Batches, PairData, captions_of, check_pairs, loader, open_pairs
from clipa_nb.engine.pictures import Transform, jpeg
from clipa_nb.engine.shards import write_shards
from clipa_nb.engine.sources import ClassFolders, Columns, Folder, HubSet, HubStream, Made, Recaptioned, Table, kind_of, pairs_in, pick, pictures_in, source_of, table_kind
from clipa_nb.engine.pairs import Source, cause

torch.set_num_threads(1)


def picture(i, h=24, w=24):
    g = torch.Generator().manual_seed(i)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')[0].mul(255).byte()


def tokens(texts, context_length=None, strategy=None, draw=None):
    return torch.tensor([[ord(c) for c in t[:context_length].ljust(context_length, '\0')] for t in texts])


@pytest.mark.parametrize('make, message', [(lambda p: Table(p / 'no.csv'), 'there is no table'), (lambda p: Folder(p), 'holds no image'), (lambda p: open_pairs(p), 'matches no tar file')])
def test_empty_places(tmp_path, make, message):
    with pytest.raises(UserError, match=message): make(tmp_path)


def test_hub_set():
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'image': [{'bytes': jpeg(picture(i)), 'path': None} for i in range(4)], 'caption': [[f'a{i}', f'b{i}'] for i in range(4)], 'label': list(range(4))})
    rows = rows.cast_column('image', datasets.Image())
    with pytest.raises(UserError, match="no column 'words': it has image, caption, label; name one with --text-key"): HubSet(rows, Columns(text='words'))
    assert HubSet(rows).text == 'caption'
    b = Batches(HubSet(rows, Columns(text='caption')), tokens, Transform(16), 4, context_length=2, fields=('image', 'text', 'label'))
    said = {bytes(t.tolist()).decode()[0] for s in range(10) for t in b[s]['text']}
    assert said == {'a', 'b'} and set(b[0]['label'].tolist()) == {0, 1, 2, 3}


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


def test_folders_tables_and_classes(tmp_path):
    for i in range(3): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i))); (tmp_path / f"{i}.{'TXT' if i else 'txt'}").write_text(f'caption {i}\n')
    assert [(p.name, t.name, j) for p, t, j in pairs_in(tmp_path)] == [('0.jpg', '0.txt', None), ('1.jpg', '1.TXT', None), ('2.jpg', '2.TXT', None)]
    assert [p.name for p in pictures_in(tmp_path)] == ['0.jpg', '1.jpg', '2.jpg'] and Folder(tmp_path).fields == ('image', 'text')
    with pytest.raises(UserError, match='holds no folder with images'): ClassFolders(tmp_path)
    (tmp_path / 'a.csv').write_text('filepath,title\na.jpg,"a star, red"\n')
    (tmp_path / 'a.tsv').write_text('filepath\ttitle\tlabel\n0.jpg\tx\t0\n1.jpg\ty\t1\n')
    assert [*Table(tmp_path / 'a.csv').rows] == [{'filepath': 'a.jpg', 'title': 'a star, red'}] and [r['label'] for r in Table(tmp_path / 'a.tsv').rows] == ['0', '1']
    with pytest.raises(UserError, match="no column 'caption': it has filepath, title, label"): Table(tmp_path / 'a.tsv', Columns(text='caption'))


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


@pytest.mark.parametrize('name, mark', [('a.csv', '\ufeff'), ('A.CSV', ''), ('a.Tsv', '\ufeff')])
def test_tables_from_excel(tmp_path, name, mark):
    (tmp_path / '1.jpg').write_bytes(jpeg(picture(1))); between = '\t' if name[-3] == 'T' else ','
    (tmp_path / name).write_text(mark + f'filepath{between}title\n1.jpg{between}a caf\u00e9\n', encoding='utf-8')
    for opened in (open_pairs, PairData().open):
        s = opened(tmp_path / name)
        assert isinstance(s, Table) and s.read(0)['text'] == 'a caf\u00e9' and s.read(0)['image'] == jpeg(picture(1))


def test_tables_that_are_no_text_or_lack_columns(tmp_path):
    (tmp_path / '1.jpg').write_bytes(jpeg(picture(1)))
    (tmp_path / 'a.csv').write_bytes('filepath\ttitle\n1.jpg\tcaf\u00e9\n'.encode('utf-16')) # Excel's "Unicode text"
    assert open_pairs(tmp_path / 'a.csv').read(0)['text'] == 'caf\u00e9'
    (tmp_path / 'l.csv').write_bytes('filepath,title\n1.jpg,caf\u00e9\n'.encode('latin1'))
    with pytest.raises(UserError, match='no table of text in UTF-8 .*save it as "CSV UTF-8"'): open_pairs(tmp_path / 'l.csv')
    (tmp_path / 'b.csv').write_text('filepath,title\n')
    (tmp_path / 'c.csv').write_text('url,caption\nx,y\n')
    with pytest.raises(UserError, match="c.csv has no column of paths of pictures: it has url, caption; name one with --image-key .'filepath' is found by itself"): open_pairs(tmp_path / 'c.csv')
    with pytest.raises(UserError, match='it has no rows'): open_pairs(tmp_path / 'b.csv')
    (tmp_path / 'd.csv').write_text('filepath,title\nhttps://host/1.jpg,x\n')
    with pytest.raises(UserError, match='holds addresses and not paths: fetch the pictures first, with img2dataset'): open_pairs(tmp_path / 'd.csv')
    (tmp_path / 'e.csv').write_text('filepath,title\n1.jpg,"never closed\n' + 'x' * (1 << 25))
    with pytest.raises(UserError, match='e.csv, line 1: .*is a quotation mark open'): open_pairs(tmp_path / 'e.csv')
    (tmp_path / 'f.csv').write_text('filepath,caption,text\n1.jpg,x,y\n')
    with pytest.raises(UserError, match='several columns of captions: say which with --text-key, caption or text'): open_pairs(tmp_path / 'f.csv')
    assert open_pairs(tmp_path / 'f.csv', Columns(text='text')).read(0)['text'] == 'y'
    (tmp_path / 'g.csv.gz').write_bytes(gzip.compress(b'filepath,title\n' * 50)[:30])
    with pytest.raises(UserError, match='g.csv.gz cannot be read .*: fetch it again'): open_pairs(tmp_path / 'g.csv.gz')


def test_paths_of_a_table_from_either_place(tmp_path, monkeypatch):
    for folder, i in (('tables', 1), ('runs', 2)): (tmp_path / folder).mkdir(); (tmp_path / folder / 'own.jpg').write_bytes(jpeg(picture(i)))
    (tmp_path / 'runs' / 'there.jpg').write_bytes(jpeg(picture(3)))
    (tmp_path / 'tables' / 'a.csv').write_text(f'filepath,title\nown.jpg,beside the table first\nthere.jpg,then here\n{tmp_path}/runs/own.jpg,absolute\nnone.jpg,nowhere\n')
    monkeypatch.chdir(tmp_path / 'runs')
    s = Table('../tables/a.csv'); monkeypatch.chdir(tmp_path / 'tables')
    assert [s.read(i)['image'] for i in range(3)] == [jpeg(picture(i)) for i in (1, 3, 2)]
    with pytest.raises(FileNotFoundError): s.read(3)


def test_a_set_that_was_saved_to_disk(tmp_path):
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'image': [{'bytes': jpeg(picture(i)), 'path': None} for i in range(4)], 'text': [f'a{i}' for i in range(4)], 'label': list(range(4))})
    rows.cast_column('image', datasets.Image()).save_to_disk(tmp_path / 'one')
    datasets.DatasetDict(train=rows, val=rows.select([0])).save_to_disk(tmp_path / 'splits')
    for where, n in ((tmp_path / 'one', 4), (tmp_path / 'splits', 4), (tmp_path / 'splits' / 'val', 1)):
        s = PairData(path=str(where)).open(); check_pairs(where)
        assert (type(s), len(s), s.read(0)['text'], s.read(0)['image'], s.fields) == (HubSet, n, 'a0', jpeg(picture(0)), ('image', 'text', 'label'))
    with pytest.raises(UserError, match="splits has no split 'test': it has train, val; choose one with --split"): HubSet(tmp_path / 'splits', Columns(split='test'))
    (tmp_path / 'torn').mkdir(); (tmp_path / 'torn' / 'state.json').write_text('{')
    with pytest.raises(UserError, match='torn.* cannot be loaded') as e: open_pairs(tmp_path / 'torn')
    assert '\n' not in str(e.value)


# -- tables -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('packed', ['', '.gz', '.bz2', '.xz', '.zst'])
@pytest.mark.parametrize('kind', ['.csv', '.tsv', '.jsonl'])
def test_packed_tables(tmp_path, kind, packed):
    pa = pytest.importorskip('pyarrow') if packed == '.zst' else None
    pack = {'': bytes, '.gz': gzip.compress, '.bz2': bz2.compress, '.xz': lzma.compress, '.zst': lambda b: pa.compress(b, codec='zstd', asbytes=True)}[packed]
    for i in range(3): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i)))
    rows, between = [(f'{i}.jpg', f'a caf\u00e9, no {i}', i) for i in range(3)], '\t' if kind == '.tsv' else ','
    text = between.join(('filepath', 'title', 'label')) + ''.join(f'\n{between.join((p, json.dumps(t, ensure_ascii=False), str(k)))}' for p, t, k in rows)
    if kind == '.jsonl': text = '\n'.join(json.dumps(dict(filepath=p, title=t, label=k)) for p, t, k in rows)
    (tmp_path / f'a{kind}{packed}').write_bytes(pack(('\ufeff' + text).encode()))
    s = open_pairs(tmp_path / f'a{kind}{packed}')
    assert isinstance(s, Table) and [(r['text'], r['json'], r['image']) for r in map(s.read, range(3))] == [(t, {'label': k}, jpeg(picture(k))) for _, t, k in rows]


def test_a_line_that_is_no_json_is_one_damaged_sample(tmp_path):
    for i in range(6): (tmp_path / f'{i}.jpg').write_bytes(jpeg(picture(i)))
    lines = [json.dumps(dict(image=f'{i}.jpg', captions=[f'a{i}', f'b{i}'])) for i in range(6)]
    lines[2], lines[3], lines[4] = '{"image": ', '[1]', '{"captions": "x"}'
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    b = Batches(open_pairs(tmp_path / 'a.jsonl'), tokens, Transform(16), 6, context_length=2, limit=1.)
    b[0]
    assert dict(b.skipped.counts) == {('a.jsonl', 'bad json'): 1, ('a.jsonl', 'row is not an object'): 1, ('a.jsonl', 'no path of a picture'): 1}


def test_a_large_table_is_one_piece_of_memory(tmp_path):
    (tmp_path / 'a.csv').write_text('filepath,title\n' + ''.join(f'{i}.jpg,caption number {i} of many\n' for i in range(50_000)))
    tracemalloc.start()
    s = Table(tmp_path / 'a.csv')
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(s) == 50_000 and held < 110 * 50_000, 'bytes a row'
    assert s.rows[49_999] == dict(filepath='49999.jpg', title='caption number 49999 of many')


def test_classes_of_a_table(tmp_path):
    (tmp_path / '1.jpg').write_bytes(jpeg(picture(1)))
    (tmp_path / 'a.csv').write_text('filepath,kind\n1.jpg,dog\n1.jpg,cat\n1.jpg,dog\n')
    s = open_pairs(tmp_path / 'a.csv', Columns(label='kind'))
    assert s.names == ['cat', 'dog'] and [s.read(i)['json']['label'] for i in range(3)] == [1, 0, 1] and s.read(1)['text'] == 'cat'


def test_kinds_of_files():
    assert [table_kind(n) for n in ('A.CSV', 'a.csv.gz', 'a.tar.gz', 'a.jsonl.zst', 'a.csv.zip', 'csv')] == [('.csv', ''), ('.csv', '.gz'), ('', ''), ('.jsonl', '.zst'), ('', ''), ('', '')]
    assert kind_of('s3://bucket/a.csv') is None and kind_of('stream:org/name') == (HubStream, 'org/name')


# -- captions -----------------------------------------------------------------------------------------------------------------

def test_captions_of_a_folder_in_three_places(tmp_path):
    for i in range(3): (tmp_path / f'{i}.png').write_bytes(jpeg(picture(i)))
    (tmp_path / '0.txt').write_bytes(b'\xef\xbb\xbffirst\nsecond\n'); (tmp_path / '1.caption').write_text('beside'); (tmp_path / '1.json').write_text('{"alt": ["x", "y"]}')
    (tmp_path / '2.txt').write_text('two'); (tmp_path / '2.caption').write_text('too')
    read = lambda **columns: [s.read(i)['text'] for s in [open_pairs(tmp_path, Columns(**columns))] for i in range(len(s))]
    assert read() == ['first\nsecond', 'beside', 'two'] and read(text='.caption') == ['beside', 'too'] and read(text='alt') == [['x', 'y']]
    assert read(lines=True) == [['first', 'second'], ['beside'], ['two']]
    with pytest.raises(UserError, match='holds no image with a .words of the same name'): open_pairs(tmp_path, Columns(text='.words'))
    (tmp_path / '1.json').write_text('{"other": 1}')
    assert cause(pytest.raises(KeyError, open_pairs(tmp_path, Columns(text='alt')).read, 0).value) == "json lacks 'alt'"


def test_a_named_entry_of_the_json_of_shards(tmp_path):
    write_shards(((f'{i:03d}', jpeg(picture(i)), 'from the page', {'alts': [f'a{i}', f'b{i}'], 'label': i}) for i in range(8)), tmp_path / 'set', per_shard=4)
    s = PairData(text_key='alts').open(str(tmp_path / 'set'))
    assert s.read(5)['text'] == ['a5', 'b5'] and s.where(5)[0] == '000001.tar' and s.fields[:2] == ('image', 'text') and len(s.paths) == 2
    b = Batches(s, tokens, Transform(16), 8, context_length=2)
    seen = {bytes(t.tolist()).decode() for step in range(12) for t in b[step]['text']}
    assert seen == {f'{c}{i}' for c in 'ab' for i in range(8)}, 'each caption comes, one at a visit'
    assert all(torch.equal(x['text'], y['text']) for x, y in zip(loader(b, 0, 4), loader(b, 0, 4, workers=2)))


def test_sets_with_and_without_labels_are_joined(tmp_path):
    "Finding 5: training asks for images and texts, so that one set has labels is no matter."
    for name, meta in (('with', lambda i: {'label': i}), ('without', lambda i: {})):
        write_shards(((f'{i:03d}', jpeg(picture(i)), f'{name[4:]:3}{i}', meta(i)) for i in range(8)), tmp_path / name, per_shard=4)
    b = Batches(open_pairs(f"{tmp_path / 'with'}::{tmp_path / 'without'}"), tokens, Transform(16), 16, context_length=4)
    assert b[0]['valid'].all() and not b.skipped.counts
    (tmp_path / 'pictures').mkdir()
    for i in range(4): (tmp_path / 'pictures' / f'{i}.jpg').write_bytes(jpeg(picture(i))); (tmp_path / 'pictures' / f'{i}.txt').write_text(f'own{i}')
    s = open_pairs(f"{tmp_path / 'with'}::{tmp_path / 'pictures'}")
    b = Batches(s, tokens, Transform(16), 12, context_length=4)
    assert len(s) == 12 and s.fields == ('image', 'text') and sorted(bytes(t.tolist()).decode()[:3] for t in b[0]['text']) == ['   '] * 8 + ['own'] * 4


# -- the Hub ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def rows():
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'img': [{'bytes': jpeg(picture(i)), 'path': None} for i in range(12)], 'kind': [i % 3 for i in range(12)]})
    return rows.cast_column('img', datasets.Image()).cast_column('kind', datasets.ClassLabel(names=['ant', 'bee', 'cat']))


def test_names_of_classes_are_captions_where_there_are_none(rows):
    s = HubSet(rows)
    assert (s.names, s.read(4)['text'], s.read(4)['json'], s.read(4)['image']) == (['ant', 'bee', 'cat'], 'bee', {'kind': 1, 'label': 1}, jpeg(picture(4)))
    with pytest.raises(UserError, match="no column 'words': it has img, kind"): HubSet(rows, Columns(text='words'))


def test_parquet_files_and_folders_of_them(rows, tmp_path, monkeypatch):
    datasets = pytest.importorskip('datasets')
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')
    (tmp_path / 'data').mkdir()
    rows = rows.add_column('text', [f'a{i}' for i in range(12)])
    rows.select(range(8)).to_parquet(tmp_path / 'data' / 'train-00000-of-00001.parquet'); rows.select(range(8, 12)).to_parquet(tmp_path / 'data' / 'test-00000-of-00001.parquet')
    for where, columns, n in ((tmp_path / 'data' / 'train-00000-of-00001.parquet', {}, 8), (tmp_path / 'data', {}, 8), (f'{tmp_path}/data/*.parquet', {}, 12), (tmp_path, dict(split='test'), 4)):
        s = open_pairs(where, Columns(**columns))
        assert isinstance(s, HubSet) and len(s) == n and s.read(n - 1)['text'].startswith('a') and s.read(0)['image'][:2] == b'\xff\xd8'
    with pytest.raises(UserError, match='none.parquet. matches no parquet file'): open_pairs(tmp_path / 'none.parquet')
    with pytest.raises(UserError, match='choose one with --split'): open_pairs(tmp_path, Columns(split='dev'))


class Counting:
    "What a stream asks of the library's rows; it counts what was read."
    column_names, features, read = ['image', 'text'], None, 0
    def cast_column(self, name, feature): return self
    def __iter__(self): return self.skip(0)
    def skip(self, n):
        for i in range(n, 20):
            Counting.read += 1
            yield {'image': {'bytes': jpeg(picture(i)), 'path': None}, 'text': f's{i:02d}'}


def test_a_stream_goes_on_where_it_was():
    pytest.importorskip('datasets')
    with pytest.raises(UserError, match='does not say how many samples it has: give --set data.n=N'): HubStream(Counting())
    s, Counting.read = HubStream(Counting(), Columns(n=20)), 0
    assert s.sequential and [s.read(i)['text'] for i in (0, 1, 2, 5, 6)] == ['s00', 's01', 's02', 's05', 's06'] and Counting.read == 7, 'one pass'
    assert s.read(3)['text'] == 's03' and s.read(19)['text'] == 's19', 'an earlier one begins anew'
    Counting.read = 0
    resumed = HubStream(Counting(), Columns(n=20))
    assert resumed.read(17)['text'] == 's17' and Counting.read == 1, 'a resumed run skips ahead'
    long = HubStream(Counting(), Columns(n=25))
    with pytest.raises(ValueError, match='stream ends before it should'): long.read(22)


def test_a_stream_of_files(rows, tmp_path):
    rows.add_column('text', [f's{i:02d}' for i in range(12)]).save_to_disk(tmp_path / 'saved')
    s = open_pairs(f'stream:{tmp_path}/saved', Columns(n=12))
    assert [s.read(i)['text'] for i in (0, 4, 11, 2)] == ['s00', 's04', 's11', 's02'] and s.first[7]['text'] == 's07'


def test_a_set_that_cannot_be_had(monkeypatch):
    datasets = pytest.importorskip('datasets')
    def no(*a, **k): raise ConnectionError('no network\nand a long story')
    monkeypatch.setattr(datasets, 'load_dataset', no)
    with pytest.raises(UserError, match=r"the data set 'org/name' cannot be loaded \(ConnectionError: no network\)$"): open_pairs('hub:org/name')
    asked = []
    def load(*a, **k):
        asked.append((a, k)); raise ConnectionError('no')
    monkeypatch.setattr(datasets, 'load_dataset', load)
    for where in ('hub:org/name/config', 'stream:org/name'):
        with pytest.raises(UserError): open_pairs(where, Columns(split='val'))
    assert asked == [(('org/name', 'config'), dict(split='val', streaming=False)), (('org/name', None), dict(split='val', streaming=True))]


# -- made, and damaged --------------------------------------------------------------------------------------------------------

def blots(size, ids): return [{'image': jpeg(picture(i, size, size)), 'text': f'no {i}', 'json': {'label': i}, 'key': str(i)} for i in ids]


@pytest.mark.parametrize('sequential', [False, True])
def test_samples_that_are_made(sequential):
    made = []
    def make(ids):
        made.append(len(ids))
        return blots(24, ids)
    s = Made(make, 10, 'blots', most=4, sequential=sequential)
    assert [s.read(i)['text'] for i in (0, 1, 2, 3, 4, 9, 8)] == [f'no {i}' for i in (0, 1, 2, 3, 4, 9, 8)] and made == [1, 2, 4, 1, 1]
    s = Made(functools.partial(blots, 24), 10, 'blots', most=4, sequential=sequential)
    b = Batches(s, tokens, Transform(16), 5, context_length=4, fields=('image', 'text', 'label'))
    for x, y in zip(loader(b, 0, 4), loader(b, 0, 4, workers=2)): assert all(torch.equal(x[k], y[k]) for k in x)
    labels = [x['label'].tolist() for x in loader(b, 0, 4)]
    assert sorted(labels[0] + labels[1]) == list(range(10)) == sorted(labels[2] + labels[3])
    if sequential: assert labels == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] * 2
    assert s.where(3) == ('blots', '3')
    with pytest.raises(IndexError): s.read(10)


def test_the_toy_world_live_is_the_toy_world_in_shards(tmp_path):
    from clipa_nb.recipes import ToyData
    data = ToyData(n=70)
    live, shards = data.replace(live=True).open(seed=3), data.open('', tmp_path, seed=3)
    for i in (0, 1, 2, 69, 5): assert live.read(i) == shards.read(i)
    assert len(live) == 70 and live.fields == shards.fields and live.sequential and not list(tmp_path.glob('live*'))
    b = Batches(live, tokens, Transform(16), 35, context_length=4)
    assert b[0]['valid'].all() and all(torch.equal(x['image'], y['image']) for x, y in zip(loader(b, 0, 2), loader(b, 0, 2, workers=2)))


@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may read everything')
def test_files_that_may_not_be_read(tmp_path):
    (tmp_path / '1.jpg').write_bytes(jpeg(picture(1))); (tmp_path / '1.txt').write_text('x'); (tmp_path / '1.jpg').chmod(0)
    assert cause(pytest.raises(PermissionError, open_pairs(tmp_path).read, 0).value) == 'permission denied'


@pytest.mark.parametrize('error, name', [(PermissionError(13, 'Permission denied', '1.jpg'), 'permission denied'), (OSError(5, 'Input/output error'), 'input/output error'),
                                         (OSError('http://host:80/a.tar: given up after 10 minutes of trying (status 503)'), 'given up after'), (OSError('shard is shorter than when it was indexed'), 'shard is shorter than when it was indexed'),
                                         (FileNotFoundError('s3://b/a.tar: there is no such object'), 'file is missing'), (KeyError('label'), "json lacks 'label'"), (ValueError(), 'ValueError')])
def test_damage_has_one_name_whatever_the_numbers(error, name): assert cause(error) == name


def test_links_that_lead_back_are_walked_once(tmp_path):
    (tmp_path / 'a').mkdir(); (tmp_path / 'a' / '1.jpg').write_bytes(jpeg(picture(1))); (tmp_path / 'a' / 'up').symlink_to(tmp_path)
    assert [p.name for p in pictures_in(tmp_path)] == ['1.jpg']


def test_the_folder_of_an_image_set_with_metadata(tmp_path):
    (tmp_path / '1.jpg').write_bytes(jpeg(picture(1))); (tmp_path / 'metadata.jsonl').write_text('{"file_name": "1.jpg", "text": "one"}\n')
    s = open_pairs(tmp_path)
    assert isinstance(s, Table) and (s.read(0)['text'], s.read(0)['image']) == ('one', jpeg(picture(1)))
