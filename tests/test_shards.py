"Shards: names that find them, damage, killed writers, and what is promised about bytes."
import io, os, signal, subprocess, sys, tarfile, time
from collections import Counter
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.engine.index import Shards
from clipa_nb.engine.pictures import jpeg
from clipa_nb.engine.shards import (add_sample, expand, index_shard, long_name, members, parse_header, parse_meta, whole_samples, write_shard,
                                    write_shards)

torch.set_num_threads(1)


def picture(i, h=24, w=24):
    g = torch.Generator().manual_seed(i)
    return torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), size=(h, w), mode='bilinear')[0].mul(255).byte()


def samples(n, **more):
    for i in range(n): yield f'{i:06d}', jpeg(picture(i)), f'caption number {i}', {'label': i, **more}


def as_file(image, form, **options):
    out = io.BytesIO(); image.save(out, form, **options); return out.getvalue()


@pytest.fixture(scope='module')
def toy(tmp_path_factory):
    out = tmp_path_factory.mktemp('toy') / 'set'
    write_shards(samples(100), out, per_shard=30)
    return out


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
from clipa_nb.engine.shards import write_shards
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


# ---- other sources ----

def test_files_are_on_the_disk_before_they_are_in_place(tmp_path, monkeypatch):
    "A power cut after the move must not find an empty file, `sizes.json` least of all."
    flushed, moved, fsync, replace = {}, {}, os.fsync, os.replace
    def flush(fd): s = os.fstat(fd); flushed[s.st_ino] = s.st_size; fsync(fd)
    def move(a, b): s = os.stat(a); moved[Path(b).name] = flushed.get(s.st_ino) == s.st_size; replace(a, b)
    monkeypatch.setattr(os, 'fsync', flush); monkeypatch.setattr(os, 'replace', move)
    write_shards(samples(3), tmp_path / 'x')
    assert moved == {'000000.tar': True, 'sizes.json': True}


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


# ---- which reader ----

def test_an_unfinished_set_by_any_name(tmp_path):
    write_shards(samples(3), tmp_path / 'all' / 'set'); (tmp_path / 'all' / 'set' / '.unfinished').touch(); at = f'{tmp_path}/all'
    for where in (f'{at}/set', f'{at}/set/*.tar', f'{at}/set/{{000000..000000}}.tar', at, f'{at}/*/*.tar', [f'{at}/set/000000.tar']):
        with pytest.raises(UserError, match='set holds an unfinished set of shards'): expand(where)


# ---- what the chapter used to show: headers, names, braces ----

def test_a_key_holds_no_dot(tmp_path):
    with tarfile.open(fileobj=io.BytesIO(), mode='w') as t:
        add_sample(t, '000000000', b'jpg', 'a star', {'label': 1})
        assert t.getnames() == ['000000000.jpg', '000000000.txt', '000000000.json']
        with pytest.raises(UserError, match='holds a dot'): add_sample(t, 'a.b', b'', '', {})
    with pytest.raises(UserError, match='holds a dot'): write_shard(tmp_path / 'bad.tar', [('a.b', b'', '', {})])
    with pytest.raises(UserError, match="key 'a' comes twice"): write_shard(tmp_path / 'bad.tar', [('a', b'', '', {}), ('a', b'', '', {})])
    assert list(tmp_path.iterdir()) == []


def test_headers(toy):
    assert parse_header((toy / '000000.tar').read_bytes()[:512])[::2] == (b'000000.jpg', ord('0'))
    assert parse_header(bytes(512)) is None
    assert long_name(ord('L'), b'long.jpg\0') == b'long.jpg'
    assert long_name(ord('x'), b'20 mtime=1700000.25\n17 path=long.jpg\n') == b'long.jpg'
    assert long_name(ord('x'), b'20 mtime=1700000.25\n') is None


def test_an_index_counts_samples_and_endings(toy):
    index, endings, whole = index_shard(toy / '000000.tar')
    assert whole and len(index) == 30 and endings == {b'jpg': 30, b'txt': 30, b'json': 30}


def test_no_tar_at_all():
    with pytest.raises(UserError, match='x.tar is not a tar file'): whole_samples('x.tar', {}, Counter(), False)


def test_a_name_that_became_anothers(toy, tmp_path):
    "One sample lost its caption, and another has two."
    bad = rename(toy / '000000.tar', tmp_path / 'twice.tar', b'000001.txt', b'000000.txt')
    kept, note = whole_samples('twice.tar', *index_shard(bad))
    assert len(kept) == 28 and '1 samples lack' in note and '1 key has' in note


def test_facts_are_an_object():
    assert parse_meta(b'{"label": 3}') == {'label': 3} and parse_meta(b'') == {}
    with pytest.raises(ValueError, match='not an object'): parse_meta(b'[1]')


def named(where, tmp_path):
    return [p[len(str(tmp_path)) + 1:] for p in expand(f'{tmp_path}/{where}')]


def test_braces(tmp_path):
    names = ['7.tar', '8.tar', '9.tar', '10.tar', '008.tar', '009.tar', '010.tar', 'a/0.tar', 'a/1.tar', 'b/0.tar', 'b/1.tar', 'odd{name.tar']
    for n in names:
        (tmp_path / n).parent.mkdir(exist_ok=True)
        (tmp_path / n).write_bytes(b'')
    assert named('{008..010}.tar', tmp_path) == ['008.tar', '009.tar', '010.tar']
    assert named('{8..10}.tar', tmp_path) == ['8.tar', '9.tar', '10.tar']
    assert named('{a,b}/{0..1}.tar', tmp_path) == ['a/0.tar', 'a/1.tar', 'b/0.tar', 'b/1.tar']
    assert named('{b/{1,0},a/0}.tar', tmp_path) == ['b/1.tar', 'b/0.tar', 'a/0.tar']
    assert named('{a,b}/*.tar', tmp_path) == ['a/0.tar', 'a/1.tar', 'b/0.tar', 'b/1.tar']
    assert named('odd{name.tar', tmp_path) == ['odd{name.tar']


@pytest.mark.parametrize('inside', ['a..c', '0..', '..9', '0..9..2', '-1..3', '9..0', '0..x'])
def test_ranges_are_of_numbers_and_run_upwards(inside):
    with pytest.raises(UserError, match='a range in braces is written {000000..000009}') as e: expand(f'x/{{{inside}}}.tar')
    assert '\n' not in str(e.value)


def test_an_unpaired_brace_is_part_of_the_name(tmp_path):
    with pytest.raises(UserError, match=r'a\{0\.\.3\.tar.* matches no tar file'): expand(tmp_path / 'a{0..3.tar')
