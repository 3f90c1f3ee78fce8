#!/usr/bin/env python
"""What do an index, an order and a cold read cost? Appends rows to nbs/results/data.jsonl.

    python tests/bench/order.py                       everything: about ten minutes, 2 GB of disk
    python tests/bench/order.py --only start order    some kinds of row
    python tests/bench/order.py --folder DIR        where the files are made

start: a set of 41,456 shards with 31,000 samples each, as sparse files, with a made-up index; eight processes open it at once, as the ranks of a machine do.
order: nanoseconds of one core for a position; the sort that came before, at ten million samples.
index: microseconds of one core for a sample of a walk.
cold: reading with the page cache dropped for the files, in turns: the files from front to back, the order with and without reading ahead, samples at random.
memory: resident memory over ten epochs.
"""
import argparse, json, multiprocessing, os, platform, statistics, subprocess, sys, tempfile, time
from functools import partial
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / '.ci')]
from record import cpu_name
import torch
from clipa_nb.core import hash_bits
from clipa_nb.data import Batches, Order, deal_of, lanes_of, order_of, positions
from clipa_nb.engine.index import BLOCK, Shards, build, cut_blocks, index_of, write_index
from clipa_nb.engine.pictures import Transform
from clipa_nb.engine.shards import LocalStore, write_shards

torch.set_num_threads(1)
SHARDS, EACH, SAMPLE = 41_456, 31_000, 68_000


def memory():
    "Megabytes of this process: what it holds alone and its share of what it holds with others."
    rows = dict(line.split(':') for line in Path('/proc/self/smaps_rollup').read_text().splitlines()[1:])
    read = lambda name: int(rows[name].split()[0]) / 1024
    return dict(own=read('Private_Clean') + read('Private_Dirty'), share=read('Pss'), anonymous=read('Anonymous'))


CHILD = '''
import sys, time
sys.path.insert(0, sys.argv[1])
import order as b
from clipa_nb.data import Batches
before = b.memory()
start, cpu = time.perf_counter(), time.process_time()
source = b.Shards(sys.argv[2])
opened = time.perf_counter() - start
deal = b.deal_of(source, 512, 64 * 20e9)
rank = int(sys.argv[3])
batches = b.Batches(source, None, b.Transform(84), 65536, seed=0, rank=8 * rank, size=64, fields=(), deal=deal)
ids = batches.sequence[batches.positions(1000)]
ahead = batches.sequence.ahead(batches.columns(1000), batches.columns(1000) + 65536, fill=True)
ranges = [source.stretch(*piece) for k in ahead.tolist() for piece in source.blocks.pieces(k)]
wall, cpu = time.perf_counter() - start, time.process_time() - cpu
time.sleep(2)
after = b.memory()
print(b.json.dumps(dict(opened=opened, wall=wall, cpu=cpu, samples=len(source), blocks=len(source.blocks), deal=deal, rows=len(ids), ranges=len(ranges),
                        fill_gb=sum(n for _, n in ranges) / 1e9, grown={k: after[k] - before[k] for k in after}, now=after)))
'''

def start(folder):
    "Sparse shards with a made-up index, opened by eight processes at once."
    folder = folder / 'start'
    folder.mkdir()
    rng, begun = np.random.default_rng(0), time.perf_counter()
    entries = {}
    for s in range(SHARDS):
        n = EACH + int(rng.integers(-60, 61))
        at = np.arange(n + 1, dtype=np.int64) * SAMPLE // 512 * 512
        path, size = folder / f'{s:05d}.tar', int(at[-1]) + 1024
        with open(path, 'wb') as f: f.truncate(size)
        entries[path.name] = dict(name=path.name, bytes=size, tag=str(path.stat().st_mtime_ns), n=n, how='plain', note='', rows=np.zeros((0, 6), np.int64), keys=[],
                                  blocks=cut_blocks(at[:-1], at[1:], BLOCK))
    write_index(folder / '.clipa-index', entries, BLOCK)
    made, size = time.perf_counter() - begun, (folder / '.clipa-index').stat().st_size
    del entries
    for ranks in (1, 8):
        ps = [subprocess.Popen([sys.executable, '-W', 'ignore', '-c', CHILD, str(Path(__file__).parent), str(folder), str(r)], stdout=subprocess.PIPE, text=True) for r in range(ranks)]
        rows = [json.loads(p.communicate()[0]) for p in ps]
        yield dict(kind='start', shards=SHARDS, samples=rows[0]['samples'], blocks=rows[0]['blocks'], processes=ranks, cores=os.cpu_count(), index_mb=round(size / 1e6, 1),
                   seconds=round(max(r['wall'] for r in rows), 2), seconds_open=round(max(r['opened'] for r in rows), 2), cpu_seconds=round(statistics.median(r['cpu'] for r in rows), 2),
                   node_mb=round(sum(r['grown']['share'] for r in rows)), own_mb=round(statistics.median(r['grown']['own'] for r in rows)), anonymous_mb=round(statistics.median(r['grown']['anonymous'] for r in rows)),
                   lanes=rows[0]['deal']['lanes'], window=rows[0]['deal']['window'], fill_gb_rank=round(rows[0]['fill_gb'], 2), made_seconds=round(made, 1))


def nanoseconds(f, n, repeat=5):
    times = []
    for _ in range(repeat):
        at = time.process_time()
        f()
        times.append((time.process_time() - at) / n * 1e9)
    return round(statistics.median(times), 1)


def orders(folder):
    "Nanoseconds of one core for a position."
    for n, lanes, k, window in ((10**6, 512, 1, 0), (10**7, 512, 1, 0), (SHARDS * EACH, 512, 128, 16), (SHARDS * EACH, 1, 1, 0)):
        order = Order(n, 0, lanes, k, window)
        p = positions(65536 * 77, 65536, lanes)
        yield dict(kind='order', samples=n, lanes=lanes, block=k, window=window, ns_a_position=nanoseconds(lambda: order[p], len(p)))
    n = 10**7
    yield dict(kind='order', samples=n, how='argsort of hashes', ns_a_position=nanoseconds(lambda: np.argsort(hash_bits(1, np.arange(n)), kind='stable'), n, 3), bytes_held=8 * n)


def make(folder, shards, each, size):
    rng = np.random.default_rng(0)
    sizes = rng.integers(size // 2, size * 3 // 2, shards * each)
    def samples():
        for i, n in enumerate(sizes): yield f'{i:09d}', rng.bytes(int(n)), f'caption of number {i}', {'label': i}
    return write_shards(samples(), folder, per_shard=each)


def dropped(paths):
    "Forget the files' pages."
    for p in paths:
        fd = os.open(p, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def cold(folder, shards=10, each=1500, size=SAMPLE):
    "Megabytes a second of what was asked for, with the pages dropped before each turn."
    paths = make(folder / 'cold', shards, each, size)
    build([str(p) for p in paths], LocalStore(), now=True)
    total, n, B = sum(p.stat().st_size for p in paths), shards * each, 256
    lanes = 16
    def front_to_back():
        for p in paths:
            with open(p, 'rb', buffering=0) as f:
                while f.read(1 << 22): pass
    def ordered(deal, ahead, processes=1):
        "Read an epoch; several processes take turns with the steps, as workers do."
        source = Shards(folder / 'cold')
        b = Batches(source, None, Transform(84), B, seed=0, fields=(), deal=deal)
        def part(first):
            for step in range(first, n // B, processes):
                if ahead: b.prepare(step)
                for i in b.sequence[b.positions(step)].tolist(): source.read(i)
        if processes == 1: return part(0)
        workers = [multiprocessing.get_context('fork').Process(target=part, args=(k,)) for k in range(processes)]
        for w in workers: w.start()
        for w in workers: w.join()
    blocks, single = dict(lanes=lanes, block=BLOCK, window=2), dict(lanes=lanes, block=1, window=0)
    turns = {'front to back': front_to_back, 'order, read ahead': partial(ordered, blocks, True), 'order, not ahead': partial(ordered, blocks, False),
             'sample by sample': partial(ordered, single, False), 'order, read ahead, 2 workers': partial(ordered, blocks, True, 2),
             'sample by sample, 2 workers': partial(ordered, single, False, 2)}
    spent = {name: [] for name in turns}
    for _ in range(5):
        for name, run in turns.items():
            dropped(paths)
            at = time.perf_counter()
            run()
            spent[name].append(time.perf_counter() - at)
    at = time.process_time()
    ordered(blocks, False)
    cpu = (time.process_time() - at) / n * 1e6 # with the pages at hand
    best = statistics.median(spent['front to back'])
    for name, times in spent.items():
        wall = statistics.median(times)
        yield dict(kind='cold', how=name, gb=round(total / 1e9, 2), samples=n, mb_a_second=round(total / wall / 1e6), samples_a_second=round(n / wall), share_of_front_to_back=round(best / wall, 2), us_cpu_a_sample_warm=round(cpu, 1), seconds=[round(t, 2) for t in times])


def indexing(folder):
    "A walk, in microseconds of one core for a sample, the pages at hand."
    paths = make(folder / 'walk', 4, 5000, 4000)
    times = []
    for _ in range(5):
        at = time.process_time()
        for p in paths: index_of(LocalStore(), p, offsets=False)
        times.append((time.process_time() - at) / 20_000 * 1e6)
    yield dict(kind='index', samples=20_000, us_a_sample=round(statistics.median(times), 2))


def flat(folder):
    "Resident memory, without the pages of files, after each of ten epochs."
    paths = make(folder / 'flat', 20, 2000, 3000)
    build([str(p) for p in paths], LocalStore(), now=True)
    source, seen = Shards(folder / 'flat'), []
    b = Batches(source, None, Transform(84), 512, seed=0, fields=(), deal=dict(lanes=512, block=BLOCK, window=1))
    steps = len(source) // 512
    for epoch in range(10):
        for step in range(epoch * steps, (epoch + 1) * steps):
            b.prepare(step)
            for i in b.sequence[b.positions(step)].tolist(): source.read(i)
        seen.append(round(memory()['anonymous'], 1))
    yield dict(kind='memory', samples=len(source), epochs=10, anonymous_mb=seen, open_files=len(source.stores[False]._open))


KINDS = dict(start=start, order=orders, index=indexing, cold=cold, memory=flat)

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--only', nargs='*', default=list(KINDS), choices=list(KINDS))
    parser.add_argument('--folder', default=None)
    parser.add_argument('--out', default=str(ROOT / 'nbs' / 'results' / 'data.jsonl'))
    args = parser.parse_args()
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
    for kind in args.only:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            for row in KINDS[kind](Path(folder)):
                row = dict(git_sha=sha, hardware=f'{cpu_name()}, {os.cpu_count()} cores', torch=torch.__version__, threads=1, numpy=np.__version__, python=platform.python_version(), **row)
                print(json.dumps(row), flush=True)
                with open(args.out, 'a') as f: f.write(json.dumps(row) + '\n')

if __name__ == '__main__': main()
