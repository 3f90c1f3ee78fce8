"""Damage on purpose: every kind, at 0.1 %, 5 % and 100 %, and what the loader says.

    python tests/test_damage.py           prints the table and appends its rows to nbs/results/damage.jsonl
"""
import io, json, multiprocessing.pool, multiprocessing.popen_fork, multiprocessing.queues, multiprocessing.synchronize, os, signal, struct, sys, tarfile, time, warnings, zlib
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.data import Batches, Damaged, loader
from clipa_nb.engine.index import Shards
from clipa_nb.engine.pictures import Transform, jpeg

RATES = 0.001, 0.05, 1.
torch.set_num_threads(1)


def tokens(texts, context_length=8, strategy=None, draw=None): return torch.tensor([[len(t)] * context_length for t in texts])


def bomb():
    "A PNG of a few bytes that says it has 900 million pixels."
    def chunk(name, data): return struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>2I5B', 30_000, 30_000, 8, 2, 0, 0, 0)) + chunk(b'IDAT', zlib.compress(bytes(99)))


GOOD = jpeg(torch.full((3, 24, 24), 90, dtype=torch.uint8))
SAMPLES = { # cause: what becomes of the members {ending: bytes} of one sample
    'undecodable image': lambda m: m.update(jpg=b'<html>404 not found</html>'),
    'cut image': lambda m: m.update(jpg=GOOD[:len(GOOD) // 2]),
    'zero bytes': lambda m: m.update(jpg=b''),
    'decompression bomb': lambda m: m.update(jpg=bomb()),
    'empty caption': lambda m: m.update(txt=b' \n'),
    'very long caption': lambda m: m.update(txt=b'word ' * 10_000),
    'caption that is not UTF-8': lambda m: m.update(txt='größe'.encode('latin-1')),
    'bad json': lambda m: m.update(json=b'{"label": '),
    'image is missing': lambda m: m.pop('jpg'),
    'caption is missing': lambda m: m.pop('txt'),
    'class files instead of captions': lambda m: m.update(cls=m.pop('txt')),
}
SHARDS = 'truncated tar', 'not a tar', 'missing shard', 'duplicate keys', 'unreadable permissions'
NEVER_READ = {'image is missing', 'caption is missing', 'class files instead of captions', *SHARDS} # found when the shards are indexed
ALL_SAID_BEFORE = 'missing shard', 'unreadable permissions', 'not a tar' # one shard of them and the run is refused


def write(path, keys, hurt=None):
    with tarfile.open(path, 'w') as tar:
        for n, key in enumerate(keys):
            members = dict(jpg=GOOD, txt=f'picture {key}'.encode(), json=b'{}')
            if hurt and hurt[0](n): hurt[1](members)
            for ending, data in members.items():
                info = tarfile.TarInfo(f'{key}.{ending}'); info.size = len(data); tar.addfile(info, io.BytesIO(data))


def spread(rate, n): return set(np.linspace(0, n - 1, max(1, round(rate * n)), dtype=int).tolist())


def injured(folder, cause, rate, n=1000, shards=20):
    "A set of shards with this damage; a rate of shards where a shard is what is damaged, as many shards as that needs."
    folder.mkdir(parents=True)
    if cause in SHARDS and rate < 1 / shards: n, shards = 2000, 1000
    each, hit = n // shards, spread(rate, n)
    for s in range(shards):
        damage = SAMPLES.get(cause)
        write(folder / f'{s:06d}.tar', [f'{s * each + k:09d}' for k in range(each)], damage and ((lambda k, s=s: s * each + k in hit), damage))
    where = str(folder)
    for s in spread(rate, shards) if cause in SHARDS else ():
        path = folder / f'{s:06d}.tar'
        if cause == 'truncated tar': path.write_bytes(path.read_bytes()[:each * 3584 - 700]) # inside the last sample
        if cause == 'not a tar': path.write_bytes(b'<html>503</html>' * 400)
        if cause == 'missing shard': path.unlink(); where = f'{folder}/{{000000..{shards - 1:06d}}}.tar'
        if cause == 'duplicate keys': write(path, [f'{s * each:09d}'] * each)
        if cause == 'unreadable permissions': path.chmod(0)
    return where, n


def suffer(where, n, B=50):
    "One epoch: (valid rows, Batches or None, what was said, exit code of the command line)."
    b, valid, said, code = None, 0, [], 0
    root = os.geteuid() == 0 and any(p.stat().st_mode & 0o777 == 0 for p in Path(where).glob('*.tar'))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        if root: os.seteuid(65534) # permissions mean nothing to root
        try:
            b = Batches(Shards(where), tokens, Transform(16), B, context_length=8)
            for batch in loader(b, 0, len(b.source) // B): valid += int(batch['valid'].sum())
        except UserError as e: said, code = [str(e)], 2
        except Damaged as e: said, code = [str(e)], 1
        finally:
            if root: os.seteuid(0)
    return valid, b, [str(w.message) for w in seen] + said, code


@pytest.fixture(autouse=True)
def open_folders(tmp_path):
    for p in (tmp_path, *tmp_path.parents):
        if os.access(p, os.W_OK) and str(p).startswith('/tmp/'): p.chmod(0o777)
    old = os.umask(0); yield; os.umask(old)


@pytest.mark.parametrize('rate', RATES)
@pytest.mark.parametrize('cause', [*SAMPLES, *SHARDS])
def test_damage_is_masked_counted_and_said(cause, rate, tmp_path):
    where, n = injured(tmp_path / 'set', cause, rate)
    valid, b, said, code = suffer(where, n)
    assert said and all('\n' not in line and len(line) < 700 for line in said), 'never silence, always one line'
    assert any('.tar' in line or str(tmp_path) in line for line in said), 'a shard is named, or the folder where all are damaged'
    if rate == 1:
        assert code or cause in ('truncated tar', 'duplicate keys'), 'all of it is damaged, and it trained'
        return
    if cause in ALL_SAID_BEFORE: assert code == 2 and valid == 0; return
    assert code == 0
    lost = sum(b.skipped.counts.values())
    assert valid + lost == len(b.source) // 50 * 50 and len(b.source) <= n
    if cause not in NEVER_READ: assert lost == round(rate * n) and len(b.source) == n and sum(sum(c.values()) for c in b.skipped.by_shard().values()) == lost


class Fragile(Shards):
    "Kills or stops the worker at one sample, the first `times` times (counted in a file)."
    def read(self, i):
        if i == self.at:
            tries = len(self.log.read_text()) if self.log.exists() else 0
            if tries < self.times:
                self.log.write_text('x' * (tries + 1))
                if self.how == 'killed': os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3600)
        return super().read(i)


def fragile(tmp_path, how, times):
    where, _ = injured(tmp_path / 'set', None, 0., n=200, shards=4)
    source = Fragile(where); source.at, source.times, source.how, source.log = 77, times, how, tmp_path / 'log'
    return Batches(source, tokens, Transform(16), 10, context_length=8)


@pytest.mark.parametrize('how, says', [('killed', 'died at batch'), ('hung', 'gave no batch for 2 seconds at batch')])
@pytest.mark.parametrize('times', [1, 2])
def test_a_worker_that_dies_or_hangs_is_restarted_once(how, says, times, tmp_path):
    b = fragile(tmp_path, how, times)
    keys, want = [], [int(i) for step in range(20) for i in b.sequence[b.positions(step)]]
    b.tokenizer = lambda texts, context_length=8, strategy=None, draw=None: torch.tensor([[int(t.split()[1])] * context_length for t in texts])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        try:
            for batch in loader(b, 0, 20, workers=2, timeout=2): keys += batch['text'][:, 0].tolist()
        except Damaged as e: assert times == 2 and says in str(e) and '000001.tar (sample 77)' in str(e) and 'in vain' in str(e)
        else: assert times == 1
    assert any(says in str(w.message) and '000001.tar (sample 77)' in str(w.message) for w in seen), 'the shard and the key are named'
    assert keys == want[:len(keys)] and (times == 2 or len(keys) == 200), 'no sample twice, none lost'
    deadline = time.time() + 10
    while multiprocessing.active_children() and time.time() < deadline: time.sleep(0.05)
    assert not multiprocessing.active_children(), 'no worker is left behind'


def table():
    "Every cause and rate: rows of (cause, rate, valid of read, exit code, what was printed)."
    import tempfile
    os.umask(0)
    for cause in (*SAMPLES, *SHARDS):
        for rate in RATES:
            with tempfile.TemporaryDirectory() as tmp:
                Path(tmp).chmod(0o777)
                where, n = injured(Path(tmp) / 'set', cause, rate)
                valid, b, said, code = suffer(where, n)
                yield dict(cause=cause, rate=rate, samples=n, valid=valid, counted=sum(b.skipped.counts.values()) if b else 0, exit=code, printed=[s.replace(f'{tmp}/', '') for s in said])
    for how in ('killed', 'hung'):
        for times in (1, 2):
            with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter('always'); Path(tmp).chmod(0o777)
                b, valid, said, code = fragile(Path(tmp), how, times), 0, [], 0
                try:
                    for batch in loader(b, 0, 20, workers=2, timeout=2): valid += int(batch['valid'].sum())
                except Damaged as e: said, code = [str(e)], 1
                yield dict(cause=f'worker {how}', rate=f'{times} ×', samples=200, valid=valid, counted=0, exit=code, printed=[str(w.message) for w in seen] + said)


if __name__ == '__main__':
    ROOT = Path(__file__).resolve().parents[1]
    git = lambda *c: os.popen(f'git -C {ROOT} ' + ' '.join(c)).read().strip()
    sha = git('rev-parse', '--short', 'HEAD') + ('-dirty' if git('status', '--porcelain', '--', 'nbs', 'tests') else '')
    out = ROOT / 'nbs' / 'results' / 'damage.jsonl'
    rows = []
    for row in table():
        rows.append(dict(git_sha=sha, torch=torch.__version__, **row))
        print(f"{row['cause']:32s} {row['rate']!s:6} valid {row['valid']:5d} of {row['samples']:5d}  exit {row['exit']}")
        for line in row['printed']: print('     ', line[:300])
    out.write_text(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows))
