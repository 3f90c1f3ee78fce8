"The index: what it promises about killed builders, changed shards, damage, odd tars, and Energon's files."
import io, json, os, pickle, random, signal, struct, subprocess, sys, tarfile, time, warnings
from pathlib import Path
import numpy as np, pytest
from clipa_nb.core import UserError
from clipa_nb.data import Batches, Order, open_pairs
from clipa_nb.engine import index as module
from clipa_nb.engine.index import BLOCK, Index, Shards, build, energon_offsets, index_of, index_set, read_index, write_index
from clipa_nb.engine.shards import LocalStore, index_shard, whole_samples, write_shards
from clipa_nb.engine.pictures import Transform, jpeg

STORE = LocalStore(waits=())


def samples(n, start=0, size=300):
    g = np.random.default_rng(start)
    for i in range(start, start + n): yield f'{i:06d}', g.bytes(size), f'caption number {i}', {'label': i}


def write_tar(path, rows):
    with tarfile.open(path, 'w') as t:
        for name, data in rows:
            m = tarfile.TarInfo(name)
            m.size = len(data)
            t.addfile(m, io.BytesIO(data))


def quiet(where, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return Shards(where, **kw)


@pytest.fixture
def toy(tmp_path):
    write_shards(samples(700), tmp_path / 'toy', per_shard=300)
    return tmp_path / 'toy'


def index(where, now=True, **kw): return build([str(p) for p in sorted(Path(where).glob('*.tar'))], STORE, now=now, **kw)


# ---- the same samples as a walk over the whole shard ----

def odd_tar(path, seed):
    "Members in strange orders: pictures first, missing halves, keys that come twice, other endings, names without one."
    g = random.Random(seed)
    keys = [f'd{i % 3}/{i:03d}' if g.random() < 0.5 else f'{i:03d}' for i in range(g.randrange(1, 60))]
    rows = [(k, e) for k in keys for e in ('jpg', 'txt', 'json', 'cls')[:g.choice([2, 3, 3, 3, 4])]]
    if seed % 4 == 1: rows = [r for r in rows if g.random() > 0.05]
    if seed % 4 == 2: rows.sort(key=lambda r: r[1])
    if seed % 4 == 3: rows += [(k, 'jpg') for k in keys[::7]]
    rows += [('readme', ''), ('__meta__', 'json')] if seed % 3 == 0 else []
    write_tar(path, [(f'{k}.{e}' if e else k, b'{"label": 1}' if e == 'json' else f'{k} {e} {n}'.encode() * g.randrange(1, 80)) for n, (k, e) in enumerate(rows)])


@pytest.mark.parametrize('cut', [0, 0.6])
@pytest.mark.parametrize('seed', range(24))
def test_any_tar_gives_the_samples_of_a_walk(tmp_path, seed, cut):
    path = tmp_path / 'a.tar'
    odd_tar(path, seed)
    if cut: path.write_bytes(path.read_bytes()[:int(path.stat().st_size * cut)])
    try: kept, _ = whole_samples(path, *index_shard(path))
    except UserError as e:
        with pytest.raises(UserError) as ours: quiet(tmp_path)
        assert str(ours.value) == str(e)
        return
    raw = path.read_bytes()
    want = [(key.decode(), raw[row[0]:row[0] + row[1]], raw[row[2]:row[2] + row[3]].decode()) for key, row in kept.items()]
    if not want: return
    for saved in (False, True):
        if saved: index(tmp_path)
        s = quiet(tmp_path, k=5) if not saved else quiet(tmp_path)
        assert [(r['key'], r['image'], r['text']) for r in map(s.read, range(len(s)))] == want
        assert pickle.loads(pickle.dumps(s)).read(len(s) - 1) == s.read(len(s) - 1)


def test_what_is_read_is_one_call_and_a_block_is_walked_once(toy):
    s, calls = Shards(toy), []
    read = s.stores[False].read
    s.stores[False].read = lambda *a: calls.append(a) or read(*a)
    for i in range(128): s.read(i)
    assert len(calls) == 129, 'the block for its headers, and each sample once'


# ---- kept, noticed, made again ----

def test_an_index_is_kept_and_nothing_is_walked_again(toy, monkeypatch):
    a = index(toy)[0]
    monkeypatch.setattr(module, 'index_of', lambda *a, **k: pytest.fail('walked'))
    s = Shards(toy)
    assert s.notes == [] and len(s) == 700 and len(a.blocks) == len(s.indices[str(toy)].blocks) == 7
    assert [s.read(i)['json']['label'] for i in range(0, 700, 69)] == list(range(0, 700, 69))


@pytest.mark.parametrize('how', ['longer', 'same size', 'gone'])
def test_a_shard_that_changed_is_walked_again_and_said(toy, tmp_path, how):
    index(toy)
    path = toy / '000001.tar'
    write_shards(samples(300 if how == 'same size' else 20, start=5000), tmp_path / 'new', per_shard=300)
    if how == 'gone':
        path.unlink()
        assert len(Shards(toy)) == 400
        return
    time.sleep(0.02)
    path.write_bytes((tmp_path / 'new' / '000000.tar').read_bytes())
    with pytest.warns(UserWarning, match='1 shards of .*toy changed since they were indexed, first .*000001.tar'): s = Shards(toy)
    assert s.read(300)['json']['label'] == 5000 and len(s) == (700 if how == 'same size' else 420)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert len(Shards(toy)) == len(s), 'noticed once'


def test_a_shard_that_changes_under_a_run_is_damage(toy, tmp_path):
    s = Shards(toy)
    write_shards(samples(290, size=2000), tmp_path / 'new', per_shard=290)
    (toy / '000000.tar').write_bytes((tmp_path / 'new' / '000000.tar').read_bytes())
    with pytest.raises(OSError, match='changed since it was indexed|shorter than'):
        for i in range(0, 300, 60): s.read(i)


@pytest.mark.parametrize('where', [0, 5, 20, 70, -3, 'half', 'empty'])
def test_a_damaged_index_is_made_again_and_said(toy, where):
    index(toy)
    path = toy / '.clipa-index'
    raw = bytearray(path.read_bytes())
    if where == 'half': raw = raw[:len(raw) // 2]
    elif where == 'empty': raw = b''
    else: raw[where] ^= 8
    path.write_bytes(raw)
    with pytest.warns(UserWarning, match='the index .*clipa-index is made again'): s = Shards(toy)
    assert [s.read(i)['json']['label'] for i in (0, 299, 300, 699)] == [0, 299, 300, 699]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        Shards(toy)


def test_a_directory_that_cannot_be_written(toy, tmp_path, monkeypatch):
    monkeypatch.setenv('CLIPA_INDEX_DIR', str(tmp_path / 'cache'))
    monkeypatch.setattr(module.os, 'access', lambda *a: False)
    index(toy)
    assert not (toy / '.clipa-index').exists() and len([p for p in (tmp_path / 'cache').iterdir() if len(p.name) == 24]) == 1
    assert len(Shards(toy)) == 700


def test_a_large_set_without_an_index_names_the_command(toy, monkeypatch):
    monkeypatch.setattr(module, 'LARGE', 1000)
    with pytest.raises(UserError, match='3 shards in .*toy .* have no index.*clipa data index') as e: Shards(toy)
    assert '\n' not in str(e.value)
    index_set(toy, say=lambda line: None)
    assert len(Shards(toy)) == 700


def test_a_subset_and_a_superset_use_what_is_there(toy, tmp_path):
    index(toy)
    assert [Shards(f'{toy}/{{000001..000002}}.tar').read(i)['json']['label'] for i in (0, 399)] == [300, 699]
    write_shards(samples(10, start=900), tmp_path / 'more')
    (tmp_path / 'more' / '000000.tar').rename(toy / '000003.tar')
    s = Shards(toy)
    assert len(s) == 710 and s.read(705)['json']['label'] == 905
    assert len(Shards([toy / '000000.tar'] * 3)) == 900


BUILDER = '''
import sys, time
from clipa_nb.engine import index
whole = index.index_of
def slow(store, name, *a, **k):
    time.sleep(0.05)
    print(name, flush=True)
    return whole(store, name, *a, **k)
index.index_of = slow
index.index_set(sys.argv[1], workers=1)
'''

def test_a_builder_that_was_killed_goes_on_where_it_stood(tmp_path):
    write_shards(samples(400, size=50), tmp_path / 'x', per_shard=10)
    victim = subprocess.Popen([sys.executable, '-c', BUILDER, tmp_path / 'x'], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for _ in range(13): victim.stdout.readline()
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    journal = tmp_path / 'x' / '.clipa-index.part'
    assert journal.exists() and not (tmp_path / 'x' / '.clipa-index').exists()
    journal.write_bytes(journal.read_bytes() + b'torn') # the record that was being written
    done = subprocess.run([sys.executable, '-c', BUILDER, tmp_path / 'x'], capture_output=True, text=True)
    again = [line for line in done.stdout.splitlines() if line.startswith('/') and line.endswith('.tar')]
    assert 25 <= len(again) <= 30 and not journal.exists() and len(Shards(tmp_path / 'x')) == 400


def test_processes_find_the_same(toy):
    a, b = index(toy)[0], index(toy, workers=2, energon=True)[0]
    assert np.array_equal(a.blocks, b.blocks) and a.shards == b.shards


def test_a_shard_that_is_none_is_said_and_the_others_are_kept(toy):
    (toy / '000009.tar').write_bytes(b'no tar')
    with pytest.raises(UserError, match='000009.tar is not a tar file'): index_set(toy, say=lambda line: None)
    (toy / '000009.tar').unlink()
    assert len(module._journal(toy / '.clipa-index.part')[0]) == 3
    index_set(toy, say=lambda line: None)
    with pytest.raises(UserError, match='000012.tar cannot be read'): build([str(toy / '000012.tar')], STORE)


# ---- Energon's files ----

def test_offsets_are_those_of_energon(toy):
    "A straight transcription of its rule: the header of each first member of a base name, and where the last one ends."
    index(toy, energon=True)
    for path in sorted(toy.glob('*.tar')):
        want, last = [], None
        with tarfile.open(path) as t:
            for m in t:
                base = m.name.partition('.')[0]
                if base != last: want.append(m.offset)
                last = base
            want.append(t.offset)
        assert np.fromfile(path.with_suffix('.tar.idx'), '<u8').tolist() == want


def test_offsets_are_read_where_they_lie(toy, monkeypatch):
    index(toy, energon=True)
    (toy / '.clipa-index').unlink()
    monkeypatch.setattr(module, 'walked', lambda *a: pytest.fail('walked'))
    s = Shards(toy)
    assert [s.read(i)['json']['label'] for i in range(700)] == list(range(700))
    assert {entry[3] for entry in s.indices[str(toy)].shards.values()} == {module.HOWS.index('offsets')}


@pytest.mark.parametrize('what', ['short', 'odd', 'beyond', 'elsewhere'])
def test_offsets_that_do_not_fit_are_not_believed(toy, what):
    index(toy, energon=True)
    path = toy / '000000.tar'
    at = np.fromfile(path.with_suffix('.tar.idx'), '<u8')
    wrong = dict(short=at[:1], odd=at + np.uint64(100), beyond=at + np.uint64(512 * 10**6), elsewhere=at + np.uint64(1024))[what]
    wrong.tofile(path.with_suffix('.tar.idx'))
    assert energon_offsets(STORE, path, path.stat().st_size) is None
    assert index_of(STORE, path)['how'] == 'plain'


def test_samples_that_energon_counts_and_lack_a_half_are_masked(tmp_path):
    rows = [(f'{i}.{e}', b'x' * 20) for i in range(6) for e in (('jpg',) if i == 3 else ('jpg', 'txt'))]
    write_tar(tmp_path / 'a.tar', rows)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        index(tmp_path, energon=True)
    (tmp_path / '.clipa-index').unlink()
    s = quiet(tmp_path)
    assert len(s) == 6 and s.read(4)['key'] == '4'
    with pytest.raises(ValueError, match='image or caption is missing'): s.read(3)


# ---- what a plan keeps ----

def test_the_fingerprint_knows_names_sizes_and_counts_but_not_times(toy):
    a = Shards(toy).facts()
    os.utime(toy / '000000.tar')
    assert Shards(toy).facts() == a and a['samples'] == 700 and a['files'] == 3
    (toy / '000000.tar').rename(toy / 'other.tar')
    assert Shards(toy).facts()['content'] != a['content']


# ---- windows of blocks, read ahead ----

def words(texts, context_length=None, strategy=None, draw=None):
    import torch
    return torch.tensor([[len(t)] for t in texts])


@pytest.mark.parametrize('size', [1, 2, 3])
def test_batches_of_blocks_are_read_ahead_of_their_use(tmp_path, size):
    "On each rank: before a sample is read, its block was asked for."
    write_shards(samples(900, size=40), tmp_path / 'x', per_shard=130)
    B = 48
    for rank in range(size):
        s = Shards(tmp_path / 'x', k=16)
        ready, prepare = set(), s.prepare
        def noted(blocks): ready.update(blocks.tolist()); return prepare(blocks)
        s.prepare = noted
        b = Batches(s, words, Transform(8), B, seed=1, rank=rank, size=size, fields=('text',), deal=dict(lanes=16, block=16, window=2))
        for step in range(900 // B):
            p = b.positions(step)
            b.prepare(step)
            places = b.sequence.places(p)
            inside = (p % 900 < 16 * b.sequence.length) & (places < 900 // 16 * 16)
            assert set((places[inside] // 16).tolist()) <= ready


def test_a_store_stays_below_its_number_of_files(toy):
    store = LocalStore(most=2)
    names = sorted(map(str, toy.glob('*.tar')))
    store.prepare([(n, 0, 10**7) for n in names])
    assert len(store._open) == 2 and all(len(store.read(n, 0, 512)) == 512 for n in names) and len(store._open) == 2
    store.close()
    assert not store._open


def test_a_disk_that_stalls_is_tried_again(toy, monkeypatch):
    store, fails, pread = LocalStore(waits=(0., 0.)), [5, 5], os.pread
    def flaky(*a):
        if fails: raise OSError(fails.pop(), 'Input/output error')
        return pread(*a)
    monkeypatch.setattr(os, 'pread', flaky)
    assert store.read(str(toy / '000000.tar'), 0, 512)[:6] == b'000000'
    fails += [5] * 9
    with pytest.raises(OSError, match='Input/output'): store.read(str(toy / '000000.tar'), 0, 512)


def test_mixtures_are_opened_by_weight(toy, tmp_path):
    write_shards(samples(50, start=2000), tmp_path / 'b')
    mix = open_pairs(f'{toy}@0.25::{tmp_path}/b@0.75')
    assert mix.shares == [1, 3] and len(mix) == 750 and mix.read(701)['json']['label'] == 2001 and mix.container(701) == '000000.tar'
    assert len(open_pairs(f'{toy}::{tmp_path}/b')) == 750
