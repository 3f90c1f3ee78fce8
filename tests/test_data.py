"The data room under bad input: damaged shards, killed writers, and batches that must not depend on who makes them."
import io, json, os, pickle, signal, subprocess, sys, tarfile, time, warnings
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.data import (Batches, ClassFolders, Csv, Endless, Filter, Folder, HubSet, Shards, Skips, Source, Transform, decode, expand, filtered, index_shard, jpeg,
                           jitter_colours, loader, members, open_pairs, positions, write_shards)

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


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp('toy') / 'set'
    write_shards(samples(100), out, per_shard=30)
    return out


def batches(where, B=8, **more):
    return Batches(Shards(where), tokens, more.pop('transform', Transform(16, jitter=0.8, gray=0.2)), B, seed=more.pop('seed', 3), context_length=20, strategy='shuffle', **more)


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- finding shards ----

@pytest.mark.parametrize('where', ['nothing', 'nothing/*.tar', 'nothing/{000..003}.tar', '{a,b}.tar'])
def test_nothing_matches(tmp_path, where):
    with pytest.raises(UserError, match='matches no tar file'): Shards(tmp_path / where)


def test_part_of_a_range_is_missing(toy):
    with pytest.raises(UserError, match='000004.tar'): Shards(f'{toy}/{{000000..000006}}.tar')


def test_ways_to_name_shards(toy):
    assert len(Shards(toy)) == len(Shards(f'{toy}/*.tar')) == len(Shards(f'{toy}/00000{{0..3}}.tar')) == 100
    assert len(Shards(f'{toy}/000000.tar::{toy}/000003.tar')) == len(Shards([toy / '000000.tar', toy / '000003.tar'])) == 40


def rename(src, out, old, new):
    out.write_bytes(src.read_bytes().replace(old, new)); return out


@pytest.mark.parametrize('old, new, what', [(b'.jpg', b'.gif', 'images'), (b'.txt', b'.cls', 'captions')])
def test_shard_without_a_half_lists_the_keys_seen(toy, tmp_path, old, new, what):
    bad = rename(toy / '000000.tar', tmp_path / 'bad.tar', old, new)
    with pytest.raises(UserError, match=f'holds no {what}.*{new[1:].decode()} × 30') as e: Shards(bad)
    assert '\n' not in str(e.value) and 'json × 30' in str(e.value)


@pytest.mark.parametrize('content', [b'', b'hello', b'\x1f\x8b' + bytes(2000), b'x' * 5000])
def test_not_a_tar(tmp_path, content):
    (tmp_path / 'a.tar').write_bytes(content)
    with pytest.raises(UserError, match='is not a tar file'): Shards(tmp_path)


def test_samples_without_a_half_are_left_out_and_said(tmp_path):
    with tarfile.open(tmp_path / 'a.tar', 'w') as t:
        for name in ('1.jpg', '1.txt', '2.jpg', '3.txt', '4.JPG', '4.txt', '5.jpg.part'):
            m = tarfile.TarInfo(name); m.size = 3; t.addfile(m, io.BytesIO(b'abc'))
    with pytest.warns(UserWarning, match='2 samples lack image or caption'): s = Shards(tmp_path)
    assert [s.where(i)[1] for i in range(len(s))] == ['1', '4']


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_dialects_of_tar(tmp_path, form):
    names = ['short.jpg', 'd' * 90 + '/' + 'n' * 80 + '.jpg', 'sub/x.txt'] + ([] if form == tarfile.USTAR_FORMAT else ['ü' * 70 + '.jpg', 'z' * 180 + '.txt'])
    with tarfile.open(tmp_path / 'a.tar', 'w', format=form, encoding='utf-8') as t:
        t.addfile(tarfile.TarInfo('sub/')); m = tarfile.TarInfo('dir'); m.type = tarfile.DIRTYPE; t.addfile(m)
        for k, name in enumerate(names):
            m = tarfile.TarInfo(name); m.size, m.mtime = 600 + k, 1.25 if form == tarfile.PAX_FORMAT else 1; t.addfile(m, io.BytesIO(bytes([k]) * m.size))
    found, whole = members(tmp_path / 'a.tar'); found = [f for f in found if f[2]]
    assert whole and [n.decode() for n, _, _ in found] == names
    data = (tmp_path / 'a.tar').read_bytes()
    assert [data[a:a + n] for _, a, n in found] == [bytes([k]) * (600 + k) for k in range(len(names))]


# ---- cut shards ----

@pytest.mark.parametrize('share', [0.05, 0.2, 0.5, 0.77, 0.9, 0.97])
def test_cut_tar_keeps_whole_samples_and_says_so(toy, tmp_path, share):
    raw = (toy / '000000.tar').read_bytes(); _, last, size = members(toy / '000000.tar')[0][-1]
    (tmp_path / 'cut.tar').write_bytes(raw[:int((last + size) * share)])
    with pytest.warns(UserWarning, match='is cut short'): s = Shards(tmp_path)
    full = Shards(toy)
    assert len(s) >= int(30 * share) - 1 and len(s.notes) == 1
    assert [s.read(i) for i in range(len(s))] == [full.read(i) for i in range(len(s))]


def test_cut_after_indexing_is_counted(toy, tmp_path):
    path = tmp_path / 'a.tar'; raw = (toy / '000000.tar').read_bytes(); path.write_bytes(raw)
    b = batches(tmp_path, B=10, transform=Transform(16), limit=1.)
    path.write_bytes(raw[:len(raw) * 4 // 5])
    for step in range(3): b[step]
    assert {('a.tar', 'shard is shorter than when it was indexed')} == set(b.skipped.counts)


# ---- writing ----

def test_out_below_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(UserError, match='cannot make the directory'): write_shards(samples(2), tmp_path / 'file' / 'out')


def test_shards_of_others_are_not_touched(toy, tmp_path):
    before = {p.name: p.read_bytes() for p in toy.iterdir()}
    with pytest.raises(UserError, match='already holds 4 shards'): write_shards(samples(2), toy)
    assert before == {p.name: p.read_bytes() for p in toy.iterdir()}


def test_writer_that_fails_leaves_no_part(tmp_path):
    def broken():
        yield from samples(7)
        raise RuntimeError('disk of the source died')
    with pytest.raises(RuntimeError): write_shards(broken(), tmp_path / 'x', per_shard=5)
    assert sorted(p.name for p in (tmp_path / 'x').iterdir()) == ['.unfinished', '000000.tar']
    with pytest.raises(UserError, match='unfinished set'): Shards(tmp_path / 'x')
    write_shards(samples(3), tmp_path / 'x', per_shard=5)
    assert len(Shards(tmp_path / 'x')) == 3 and not list((tmp_path / 'x').glob('.unfinished'))


def test_no_samples(tmp_path):
    with pytest.raises(UserError, match='no samples'): write_shards(iter(()), tmp_path / 'x')
    with pytest.raises(UserError, match='1 sample or more'): write_shards(samples(2), tmp_path / 'x', per_shard=0)
    assert not (tmp_path / 'x').exists()


def test_source_that_cannot_begin_leaves_no_mark(tmp_path):
    def broken():
        raise UserError('no such world')
        yield
    (tmp_path / 'there').mkdir()
    for out in (tmp_path / 'there', tmp_path / 'new'):
        with pytest.raises(UserError, match='no such world'): write_shards(broken(), out)
    assert [p.name for p in tmp_path.rglob('*')] == ['there']


SLOW = '''
import sys, time
from clipa_nb.data import write_shards
def slow():
    for i in range(10_000):
        if i == 25: print('go', flush=True)
        if i >= 25: time.sleep(0.01)
        yield f'{i:06d}', b'x' * 3000, 'caption', {'label': i}
write_shards(slow(), sys.argv[1], per_shard=10)
'''


def test_killed_writer_leaves_only_whole_shards(tmp_path):
    out = tmp_path / 'x'
    p = subprocess.Popen([sys.executable, '-c', SLOW, str(out)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'go\n'
    time.sleep(0.15); p.send_signal(signal.SIGKILL); p.wait()
    tars = sorted(out.glob('*.tar'))
    assert len(tars) >= 2 and not (out / 'sizes.json').exists()
    for t in tars:
        kept, _, whole = index_shard(t)
        assert whole and len(kept) == 10
    with pytest.raises(UserError, match='unfinished'): Shards(out)
    write_shards(samples(12), out, per_shard=10)
    assert sorted(p.name for p in out.iterdir()) == ['000000.tar', '000001.tar', 'sizes.json']


def test_headers_are_ustar_and_take_nothing_from_the_machine(toy):
    with tarfile.open(toy / '000000.tar') as t: rows = t.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in rows} == {(0, 0, 0, '', '', 0o644)}
    assert (toy / '000000.tar').read_bytes()[257:265] == b'ustar\x0000' and [m.name for m in rows[:3]] == ['000000.jpg', '000000.txt', '000000.json']
    assert members(toy / '000000.tar') == ([(m.name.encode(), m.offset_data, m.size) for m in rows], True)


def test_key_that_no_header_holds(tmp_path):
    with pytest.raises(UserError, match='does not fit the 100 bytes'): write_shards([('k' * 101, b'x', 'text', {})], tmp_path / 'x')
    assert [p.name for p in (tmp_path / 'x').iterdir()] == ['.unfinished']


def test_same_samples_same_bytes(toy, tmp_path):
    write_shards(samples(100), tmp_path / 'again', per_shard=30)
    assert all((tmp_path / 'again' / p.name).read_bytes() == p.read_bytes() for p in toy.iterdir())


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


def test_files_are_on_the_disk_before_they_are_in_place(tmp_path, monkeypatch):
    "A power cut after the move must not find an empty file, `sizes.json` least of all."
    flushed, moved, fsync, replace = {}, {}, os.fsync, os.replace
    def flush(fd): s = os.fstat(fd); flushed[s.st_ino] = s.st_size; fsync(fd)
    def move(a, b): s = os.stat(a); moved[Path(b).name] = flushed.get(s.st_ino) == s.st_size; replace(a, b)
    monkeypatch.setattr(os, 'fsync', flush); monkeypatch.setattr(os, 'replace', move)
    write_shards(samples(3), tmp_path / 'x')
    assert moved == {'000000.tar': True, 'sizes.json': True}


def test_hub_set():
    datasets = pytest.importorskip('datasets')
    rows = datasets.Dataset.from_dict({'image': [{'bytes': jpeg(picture(i)), 'path': None} for i in range(4)], 'caption': [[f'a{i}', f'b{i}'] for i in range(4)], 'label': list(range(4))})
    rows = rows.cast_column('image', datasets.Image())
    with pytest.raises(UserError, match="no column 'text': it has image, caption, label"): HubSet(rows)
    b = Batches(HubSet(rows, text='caption'), tokens, Transform(16), 4, context_length=2)
    said = {bytes(t.tolist()).decode()[0] for s in range(10) for t in b[s]['text']}
    assert said == {'a', 'b'} and set(b[0]['label'].tolist()) == {0, 1, 2, 3}


# ---- keys ----

def tar_of(path, *rows):
    with tarfile.open(path, 'w') as t:
        for name, data in rows: m = tarfile.TarInfo(name); m.size = len(data); t.addfile(m, io.BytesIO(data))
    return path


@pytest.mark.parametrize('again', [('a.jpg',), ('a.txt',), ('a.json',), ('a.png',), ('a.jpg', 'a.txt'), ('a.txt', 'a.jpg', 'a.json')])
def test_a_key_that_comes_twice_is_left_out_and_said(tmp_path, again):
    "Nobody can say which picture belongs to which caption."
    part = {'.jpg': jpeg(picture(1)), '.png': as_file(Image.new('RGB', (8, 8)), 'png'), '.txt': b'red', '.json': b'{}'}
    rows = [(n, part[Path(n).suffix]) for n in ('a.jpg', 'a.txt', 'a.json', *again, 'b.jpg', 'b.txt')]
    with pytest.warns(UserWarning, match='1 key has an image, a caption or a json twice and is left out'): s = Shards(tar_of(tmp_path / 'x.tar', *rows))
    assert [s.where(i)[1] for i in range(len(s))] == ['b'] and len(s.notes) == 1
    with pytest.warns(UserWarning, match='1 samples lack image or caption.*; .*1 key has'): Shards(tar_of(tmp_path / 'x.tar', *rows, ('c.txt', b'c')))


def test_a_key_of_another_shard_is_another_key(tmp_path):
    for n in 'xy': tar_of(tmp_path / f'{n}.tar', ('a.jpg', jpeg(picture(1))), ('a.txt', n.encode()))
    assert [Shards(tmp_path).read(i)['text'] for i in range(2)] == ['x', 'y']


def test_writing_a_key_twice(tmp_path):
    with pytest.raises(UserError, match="key 'k' comes twice"): write_shards([('k', jpeg(picture(1)), 'one', {}), ('k', jpeg(picture(2)), 'two', {})], tmp_path / 'x')
    assert not list((tmp_path / 'x').glob('*.tar'))


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


def test_an_unfinished_set_by_any_name(tmp_path):
    write_shards(samples(3), tmp_path / 'all' / 'set'); (tmp_path / 'all' / 'set' / '.unfinished').touch(); at = f'{tmp_path}/all'
    for where in (f'{at}/set', f'{at}/set/*.tar', f'{at}/set/{{000000..000000}}.tar', at, f'{at}/*/*.tar', [f'{at}/set/000000.tar']):
        with pytest.raises(UserError, match='set holds an unfinished set of shards'): expand(where)


# ---- pixels of other kinds ----

@pytest.mark.parametrize('form', ['png', 'tiff'])
def test_sixteen_bits_of_grey_keep_their_range(form):
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    x = decode(as_file(Image.fromarray(ramp), form), Transform(32, mode='squash'))
    assert abs(x.mean() - 127.5) < 2 and x.min() < 8 and x.max() > 247


@pytest.mark.parametrize('kind', [np.float32, np.int32])
def test_pixels_without_a_known_range_are_damage(tmp_path, kind):
    "A picture of floats became black and one of large integers white; now they are counted."
    for i in range(8): (tmp_path / f'{i}.txt').write_text('x'); (tmp_path / f'{i}.png').write_bytes(as_file(Image.fromarray(np.ones((8, 8), kind)), 'tiff') if i == 3 else jpeg(picture(i)))
    b = Batches(open_pairs(tmp_path), tokens, Transform(16), 8, context_length=4); b[0]
    assert [why for _, why in b.skipped.counts] == ['pixel values of unknown range']


def test_decoding_leaves_the_callers_image_alone():
    data = jpeg(picture(5, 400, 500), quality=95); image = Image.open(io.BytesIO(data))
    decode(image, Transform(16, mode='squash'))
    assert image.size == (500, 400)
    assert np.array_equal(decode(image, Transform(224, mode='squash')), decode(data, Transform(224, mode='squash', draft=0.)))


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
