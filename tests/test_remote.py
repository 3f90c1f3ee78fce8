"Remote shards against servers of this machine: ranges or none, a network that fails, S3, a cache that is small or full."
import errno, http.server, importlib.util, json, os, random, signal, subprocess, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote
import pytest
from clipa_nb.core import UserError
from clipa_nb.engine import remote
from clipa_nb.engine.remote import CHUNK, Bill, Fetcher, RemoteStore, Room, Servers, expand_remote, failure, is_remote, remote_bill

pytestmark = pytest.mark.skipif(importlib.util.find_spec('obstore') is None, reason='the extra `remote` is not installed')


class Handler(http.server.BaseHTTPRequestHandler):
    "Files in memory; `server.ranges`, `server.rate` of requests that fail or are cut, `server.status` for all of them."
    protocol_version = 'HTTP/1.1'

    def log_message(self, *a): pass

    def do_HEAD(self): self.answer()

    def do_GET(self): self.answer()

    def answer(self):
        s = self.server
        with s.lock: fate, s.asked = s.chance.random(), s.asked + 1
        data = s.files.get(unquote(self.path))
        status = s.status or (404 if data is None else 200)
        if status == 200 and fate < s.rate / 3: status = 503
        if status != 200: return self.reply(status, b'')
        if fate < s.rate * 2 / 3 and fate >= s.rate / 3: # the connection breaks before a word
            self.close_connection = True
            return
        cut = fate < s.rate and fate >= s.rate * 2 / 3
        wanted = self.headers.get('Range')
        if self.command == 'GET': s.gets.append((self.path, wanted))
        if not (s.ranges and wanted): return self.reply(200, data, cut)
        low, high = (int(x) for x in wanted.removeprefix('bytes=').split('-'))
        self.reply(206, data[low:high + 1], cut, f'bytes {low}-{min(high, len(data) - 1)}/{len(data)}')

    def reply(self, status, body, cut=False, where=None):
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('Last-Modified', 'Wed, 25 Nov 2026 04:00:00 GMT')
        if where: self.send_header('Content-Range', where)
        self.end_headers()
        if self.command == 'HEAD': return
        self.wfile.write(body[:len(body) * 2 // 3] if cut else body)
        if cut: self.close_connection = True


class Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address): pass # clients that leave early are part of these tests


@pytest.fixture
def web():
    s = Quiet(('127.0.0.1', 0), Handler)
    s.files, s.ranges, s.rate, s.status, s.asked, s.gets = {}, True, 0., None, 0, []
    s.lock, s.chance, s.url = threading.Lock(), random.Random(0), f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()


@pytest.fixture
def store(tmp_path):
    s = RemoteStore(str(tmp_path / 'cache'), cache_gb=0.1, minutes=0.5)
    yield s
    s.close()


def noise(n, seed=0): return random.Random(seed).randbytes(n)


def held(store): return sum(p.stat().st_size for p in Path(store.cache_dir).glob('slot_*/*/*'))


def test_a_range_is_what_lies_there_and_comes_once(web, store):
    data = web.files['/a b.tar'] = noise(3 * CHUNK + 5)
    name = web.url + '/a%20b.tar'
    assert store.size(name)[0] == len(data) and store.size(name)[1]
    for low, n in ((0, 10), (CHUNK - 3, 7), (len(data) - 4, 4), (5, 0), (10, 2 * CHUNK)): assert store.read(name, low, n) == data[low:low + n]
    n = len(web.gets)
    assert store.read(name, 100, 5) == data[100:105] and len(web.gets) == n
    with pytest.raises(OSError, match='shorter than when it was indexed'): store.read(name, len(data) - 3, 4)


def test_prepared_ranges_are_one_request_each(web, store):
    data = web.files['/a.tar'] = noise(CHUNK * 2)
    name, ranges = web.url + '/a.tar', [(web.url + '/a.tar', k * 300_000, 300_000) for k in range(8)]
    store.prepare(ranges)
    for _, low, n in ranges: assert store.read(name, low + 11, n - 11) == data[low + 11:low + n]
    assert sorted(web.gets) == sorted(('/a.tar', f'bytes={low}-{low + n - 1}') for _, low, n in ranges)


def test_thirty_percent_of_all_requests_fail_or_are_cut(web, store):
    data = web.files['/a.tar'] = noise(12 * CHUNK)
    web.rate = 0.3
    name = web.url + '/a.tar'
    store.prepare([(name, k * 500_000, 500_000) for k in range(60)])
    for k in range(60): assert store.read(name, k * 500_000, 500_000) == data[k * 500_000:(k + 1) * 500_000]
    news = store._ask('news')
    failed = {k: n for k, n in news.items() if k.startswith('failed: ')}
    assert set(failed) == {'failed: status 503', 'failed: no connection', 'failed: cut short'} and not news.get('given up')
    assert news['taken up where it was cut'] >= 1 and news['bytes'] == 60 * 500_000
    resumed = [w for _, w in web.gets if int(w.split('=')[1].split('-')[0]) % 500_000]
    assert resumed, 'a request that was cut begins behind what came'
    assert remote.news_line(news).startswith('remote data: ') and 'status 503 ×' in remote.news_line(news)
    assert store.news() == ''


def test_a_server_without_ranges_sends_whole_shards_once(capfd, web, tmp_path):
    store = RemoteStore(str(tmp_path), cache_gb=0.1, minutes=0.5)
    data, web.ranges = noise(CHUNK + 100), False
    web.files['/a.tar'] = data
    web.rate = 0.2
    for low in (0, 17, CHUNK): assert store.read(web.url + '/a.tar', low, 50) == data[low:low + 50]
    whole = [w for _, w in web.gets if w is None]
    n = len(web.gets)
    assert whole and store.read(web.url + '/a.tar', 5, 5) == data[5:10] and len(web.gets) == n
    said = ''
    for _ in range(100):
        said += capfd.readouterr().err
        if said: break
        time.sleep(0.1)
    assert 'cannot send parts of a file: shards are fetched whole' in said


def test_a_shard_that_a_server_cannot_cut_must_fit(web, tmp_path):
    web.files['/a.tar'], web.ranges = noise(2 * CHUNK), False
    s = RemoteStore(str(tmp_path), cache_gb=0.01, minutes=0.5)
    with pytest.raises(OSError, match='does not fit into half of the cache'): s.read(web.url + '/a.tar', 0, 10)
    s.close()


def test_what_cannot_be_mended_is_said_at_once(web, store):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError, match='/no.tar: there is no such object'): store.size(web.url + '/no.tar')
    with pytest.raises(FileNotFoundError): store.read(web.url + '/no.tar', 0, 10)
    assert store.sizes([web.url + '/no.tar'])[0][1].endswith('there is no such object')
    web.files['/a.tar'], web.status = b'x' * 10, 403
    with pytest.raises(PermissionError, match='no permission'): store.read(web.url + '/a.tar', 0, 10)
    assert time.monotonic() - began < 10 and web.asked < 10


def test_a_dead_network_is_given_up_and_then_at_once(web, tmp_path):
    web.files['/a.tar'] = noise(CHUNK)
    s = RemoteStore(str(tmp_path), cache_gb=0.1, minutes=0.02)
    s.size(web.url + '/a.tar')
    web.status = 500
    began = time.monotonic()
    with pytest.raises(OSError, match='given up after 0.02 minutes of trying .status 500'): s.read(web.url + '/a.tar', 0, 10)
    first = time.monotonic() - began
    for k in range(5):
        with pytest.raises(OSError): s.read(web.url + '/a.tar', 0, 10)
    assert first < 10 and time.monotonic() - began < first + 3, 'nobody waits again for a server that is known to be down'
    web.status = None
    assert s.read(web.url + '/a.tar', 0, 10) == web.files['/a.tar'][:10]
    assert '6 were given up' in s.news()
    s.close()


def test_forked_children_read_too(web, store):
    data = web.files['/a.tar'] = noise(2 * CHUNK)
    name = web.url + '/a.tar'
    assert store.read(name, 0, 10) == data[:10]
    children = []
    for k in range(4):
        pid = os.fork()
        if not pid:
            try: os._exit(0 if all(store.read(name, low + k, 99) == data[low + k:low + k + 99] for low in (0, CHUNK)) else 1)
            finally: os._exit(2)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert store.read(name, CHUNK, 10) == data[CHUNK:CHUNK + 10]


def test_only_the_fetcher_knows_the_library(web, tmp_path):
    web.files['/a.tar'] = noise(1000)
    code = f"""import sys; from clipa_nb.engine.remote import RemoteStore
s = RemoteStore({str(tmp_path)!r}, minutes=0.1)
assert len(s.read({web.url + '/a.tar'!r}, 5, 100)) == 100 and 'obstore' not in sys.modules"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)


def test_threads_read_beside_each_other(web, store):
    data, name = web.files.setdefault('/a.tar', noise(8 * CHUNK)), web.url + '/a.tar'
    with ThreadPoolExecutor(8) as pool: got = [*pool.map(lambda k: [store.read(name, k * CHUNK + j, 99) for j in range(20)], range(8))]
    assert got == [[data[k * CHUNK + j:k * CHUNK + j + 99] for j in range(20)] for k in range(8)] and len(web.gets) == 8


def fetcher_of(store):
    "The process that listens on the store's socket."
    for p in Path('/proc').glob('[0-9]*/cmdline'):
        try: words = p.read_bytes().split(b'\0')
        except OSError: continue
        if os.path.join(store.place, 'fetcher').encode() in words: return int(p.parent.name)


@pytest.mark.skipif(not Path('/proc/self/cmdline').exists(), reason='looks for a process in /proc')
def test_a_fetcher_that_is_killed_is_started_again_and_ends_with_its_run(web, store):
    data = web.files['/a.tar'] = noise(3 * CHUNK)
    assert store.read(web.url + '/a.tar', 0, 10) == data[:10]
    old = fetcher_of(store)
    os.kill(old, signal.SIGKILL)
    assert store.read(web.url + '/a.tar', 2 * CHUNK, 10) == data[2 * CHUNK:2 * CHUNK + 10]
    new = fetcher_of(store)
    assert new and new != old
    place = store.place
    store.close()
    for _ in range(100):
        if not os.path.exists(os.path.join(place, 'fetcher')): break
        time.sleep(0.1)
    time.sleep(0.2)
    assert fetcher_of(store) is None and not os.path.exists(os.path.join(place, 'fetcher'))


def test_the_cache_is_bounded_and_the_next_run_finds_it(web, tmp_path):
    data = web.files['/a.tar'] = noise(10 * CHUNK)
    name = web.url + '/a.tar'
    s = RemoteStore(str(tmp_path), cache_gb=3.5 * CHUNK / 1e9, minutes=0.5)
    for k in (0, 1, 2, 3, 4, 0, 9, 1):
        assert s.read(name, k * CHUNK + 3, 50) == data[k * CHUNK + 3:k * CHUNK + 53]
        assert held(s) <= 3.5 * CHUNK
    s.prepare([(name, k * CHUNK, CHUNK) for k in range(10)]) # more than there is room for: a hint is no promise
    for k in (*range(8), 9, 8): assert s.read(name, k * CHUNK, 5) == data[k * CHUNK:k * CHUNK + 5]
    s.close(); time.sleep(1.5)
    n = len(web.gets)
    s = RemoteStore(str(tmp_path), cache_gb=3.5 * CHUNK / 1e9, minutes=0.5)
    assert RemoteStore(str(tmp_path), cache_gb=3.5 * CHUNK / 1e9, minutes=0.5).place == s.place, 'two stores of one kind share a fetcher'
    other = RemoteStore(str(tmp_path), cache_gb=3.5 * CHUNK / 1e9, minutes=0.6)
    assert s.read(name, 8 * CHUNK, 5) == data[8 * CHUNK:8 * CHUNK + 5] and len(web.gets) == n
    assert other.read(name, 8 * CHUNK, 5) == data[8 * CHUNK:8 * CHUNK + 5] and len(web.gets) == n + 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ['slot_0', 'slot_1']
    web.files['/a.tar'] = data = noise(10 * CHUNK, seed=1)
    s.close(); other.close()


def test_a_full_disk_shrinks_the_cache(tmp_path, monkeypatch):
    room, free, real = Room(tmp_path, 10_000), 3_000, os.replace
    def replace(a, b):
        if sum(p.stat().st_size for p in tmp_path.rglob('*_*') if p.is_file()) > free: raise OSError(errno.ENOSPC, 'No space left on device')
        real(a, b)
    monkeypatch.setattr(remote.os, 'replace', replace)
    said = [room.keep(room.path('a', 't', k * 500, 500), bytes(500)) for k in range(12)]
    assert [bool(x) for x in said].index(True) == 6 and 'is full: the cache shrinks to' in said[6]
    assert room.size < 3_000 and not list(tmp_path.rglob('*.tmp')) and room.has(room.path('a', 't', 5500, 500), 500)


def test_where_nothing_can_be_written_memory_serves(web, tmp_path, monkeypatch):
    data = web.files['/a.tar'] = noise(3 * CHUNK)
    def keep(self, path, data): raise OSError(errno.EROFS, 'Read-only file system')
    monkeypatch.setattr(Room, 'keep', keep)
    f = Fetcher(Servers(0.1), Room(tmp_path, 10**9), threads=2)
    for low in (0, CHUNK, 2 * CHUNK, 0):
        extent = f.read(web.url + '/a.tar', low, 10)
        assert extent.path is None and extent.data[low - extent.start:][:10] == data[low:low + 10]
    assert len(web.gets) == 3 and [n for n in f.notes if 'cannot be written (Read-only file system)' in n]


def test_an_object_that_changed_is_not_mixed_with_what_it_was(web, tmp_path):
    web.files['/a.tar'] = noise(CHUNK)
    f = Fetcher(Servers(0.1), Room(tmp_path, 10**9), threads=1)
    f.size(web.url + '/a.tar')
    web.files['/a.tar'] = noise(CHUNK + 1)
    with pytest.raises(OSError, match='changed since it was indexed'): f.read(web.url + '/a.tar', 0, 10)


def test_a_cache_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(OSError, match='cannot start in .*file'): RemoteStore(str(tmp_path / 'file' / 'cache'), minutes=0.1)


def test_names_and_what_they_cost(web, store):
    for k in range(4): web.files[f'/{k:06d}.tar'] = noise(100_000 + k)
    names = expand_remote(web.url + '/{000000..000003}.tar', store)
    assert names == [f'{web.url}/{k:06d}.tar' for k in range(4)]
    bill = remote_bill(names, store)
    assert (bill.shards, bill.bytes, bill.measured) == (4, 400_006, True) and str(bill).startswith('4 shards, 400.0 kB: 0.0 minutes')
    assert remote_bill(names, store, look_at=2).measured is False
    with pytest.raises(UserError, match='1 of 5 shards that were asked cannot be had, first: .*/000009.tar: there is no such object'):
        remote_bill([*names, web.url + '/000009.tar'], store)
    with pytest.raises(UserError, match='a web server cannot be asked which shards it has'): expand_remote(web.url + '/folder/', store)
    with pytest.raises(UserError, match='a web server cannot be asked'): expand_remote(web.url + '/*.tar', store)
    dear = Bill(41_456, 88_000_000_000_000, False, 90_000, 8.4, 7920)
    assert str(dear) == '41,456 shards, about 88.0 TB: 25.0 hours at the speed of now; in a bucket $8.40 of requests, and $7,920.00 where the data leaves its region'


# -- S3 -----------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def bucket():
    server = pytest.importorskip('moto.server'); boto3 = pytest.importorskip('boto3')
    s = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
    s.start()
    host, port = s.get_host_and_port()
    env = dict(AWS_ENDPOINT_URL=f'http://{host}:{port}', AWS_ACCESS_KEY_ID='a', AWS_SECRET_ACCESS_KEY='b', AWS_REGION='us-east-1', AWS_DEFAULT_REGION='us-east-1')
    old = {k: os.environ.get(k) for k in env}
    os.environ.update(env)
    client = boto3.client('s3', endpoint_url=env['AWS_ENDPOINT_URL'])
    client.create_bucket(Bucket='pairs')
    yield client
    s.stop()
    for k, v in old.items(): os.environ.pop(k) if v is None else os.environ.update({k: v})


def test_a_bucket_is_listed_and_read(bucket, tmp_path):
    data = noise(CHUNK + 77)
    for k in ('toy/000000.tar', 'toy/000001.tar', 'toy/readme.txt', 'other/000000.tar'): bucket.put_object(Bucket='pairs', Key=k, Body=data)
    s = RemoteStore(str(tmp_path), cache_gb=0.1, minutes=0.2)
    two = ['s3://pairs/toy/000000.tar', 's3://pairs/toy/000001.tar']
    for where in ('s3://pairs/toy', 's3://pairs/toy/', 's3://pairs/toy/*.tar', 's3://pairs/toy/{000000..000001}.tar'): assert expand_remote(where, s) == two
    assert len(expand_remote('s3://pairs', s)) == 3
    assert s.size(two[0])[0] == len(data) and s.read(two[1], CHUNK - 5, 20) == data[CHUNK - 5:CHUNK + 15]
    with pytest.raises(UserError, match='matches no tar file'): expand_remote('s3://pairs/empty', s)
    with pytest.raises(UserError, match="s3://none/toy cannot be listed .*AWS_SKIP_SIGNATURE"): expand_remote('s3://none/toy', s)
    with pytest.raises(FileNotFoundError): s.size('s3://pairs/toy/000009.tar')
    s.close()


# -- end to end ---------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    "Forty small shards of toy pairs."
    from clipa_nb.engine.shards import write_shards
    from clipa_nb.recipes import ToyData
    out = tmp_path_factory.mktemp('pairs') / 'set'
    write_shards(ToyData(n=240).samples(), out, per_shard=6)
    return out


def train(where, out, *flags):
    command = [sys.executable, '-m', 'clipa_nb.cli', 'train', 'toy', '--smoke', '--device', 'cpu', '--precision', 'fp32', '--max-steps', '3']
    return subprocess.run([*command, '--train-data', str(where), '--out', str(out), *flags], capture_output=True, text=True, timeout=300)


def losses(out):
    rows = [json.loads(line) for line in (out / 'metrics.jsonl').read_text().splitlines()]
    return [(r['step'], r['train/loss']) for r in rows if 'train/loss' in r]


def test_a_run_over_a_network_that_fails_is_the_run_from_a_disk(web, pairs, tmp_path):
    for p in pairs.glob('*.tar'): web.files[f'/{p.name}'] = p.read_bytes()
    web.rate = 0.3
    done = train(web.url + '/{000000..000039}.tar', tmp_path / 'far', '--workers', '2', '--cache-dir', str(tmp_path / 'cache'), '--cache-gb', '0.1')
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'requests failed and were repeated' in done.stderr, done.stderr[-3000:]
    near = train(pairs, tmp_path / 'near', '--workers', '0')
    assert near.returncode == 0, near.stderr[-3000:]
    assert losses(tmp_path / 'far') == losses(tmp_path / 'near') and losses(tmp_path / 'far')
    assert list((tmp_path / 'cache').glob('slot_0/*/*'))


@pytest.mark.parametrize('where, says', [
    ('/{000000..000040}.tar', '/000040.tar'), ('/', 'a web server cannot be asked which shards it has'), ('/{000000..000003}.csv', 'a web server cannot be asked')])
def test_what_cannot_be_had_is_one_line(web, pairs, tmp_path, where, says):
    for p in pairs.glob('*.tar'): web.files[f'/{p.name}'] = p.read_bytes()
    done = train(web.url + where, tmp_path / 'run', '--cache-dir', str(tmp_path / 'cache'))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith('clipa: ') and says in last and not (tmp_path / 'run').exists(), done.stderr[-2000:]
