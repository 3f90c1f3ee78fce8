"""What remote data and tables do when they are damaged: one run of the smoke twin for each cause and rate, as rows.

python tests/bench/damage_remote.py ROWS.jsonl [FOLDER OF A SMALL DISK]

The small disk is for the cache that is full, for instance a tmpfs of 1 MB."""
import http.server, json, os, random, re, subprocess, sys, tempfile, threading, time
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_remote import Handler, Quiet
from clipa_nb.engine.shards import write_shards
from clipa_nb.recipes import ToyData

ROOT = Path(__file__).resolve().parents[2]
SHARDS, PAIRS = 40, 240


def cpu_name():
    try: return next(l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return 'CPU'


def serve(files):
    s = Quiet(('127.0.0.1', 0), Handler)
    s.files, s.ranges, s.rate, s.status, s.asked, s.gets = dict(files), True, 0., None, 0, []
    s.lock, s.chance, s.url = threading.Lock(), random.Random(0), f'http://127.0.0.1:{s.server_port}'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    return s


def train(where, folder, cache, **env):
    "One run: its exit code, its last words, the samples it left out."
    flags = ['--smoke', '--device', 'cpu', '--precision', 'fp32', '--workers', '0', '--max-steps', '3', '--train-data', str(where), '--out', str(folder / 'run')]
    command = [sys.executable, '-m', 'clipa_nb.cli', 'train', 'toy', *flags, '--cache-dir', str(cache), '--cache-gb', '0.1']
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT), 'CLIPA_INDEX_DIR': str(folder / 'index'), **env}, timeout=600)
    said = [re.sub(r'\S*/tmp\S*/', '…/', re.sub(r'127\.0\.0\.1:\d+', 'HOST', line)) for line in done.stderr.splitlines() if line.startswith(('note:', 'clipa:'))]
    log = folder / 'run' / 'metrics.jsonl'
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    lost = {k: v for r in rows for k, v in r.items() if 'skip' in k or 'unread' in k}
    return dict(exit=done.returncode, said=said[-4:], log=lost, seconds=round(time.monotonic() - start, 1))


def cases(small):
    "(cause, rate, what is done to the server and to the environment)."
    for rate in (0.001, 0.05, 0.3, 1.): yield 'requests fail or are cut', rate, dict(rate=rate), {}
    yield 'a shard is missing', 1 / SHARDS, dict(without='/000007.tar'), {}
    yield 'no permission', 1., dict(status=403), {}
    yield 'the server sends no ranges', 1., dict(ranges=False), {}
    if small: yield 'the disk of the cache is full', 1., {}, dict(cache=small)


def main(out, small=''):
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    common = dict(git_sha=sha, hardware=cpu_name(), torch=torch.__version__, recipe='toy --smoke', pairs=PAIRS)
    with tempfile.TemporaryDirectory() as made, open(out, 'a') as f:
        made = Path(made)
        write_shards(ToyData(n=PAIRS).samples(), made / 'set', per_shard=PAIRS // SHARDS)
        files = {f'/{p.name}': p.read_bytes() for p in (made / 'set').glob('*.tar')}

        def note(cause, rate, found):
            f.write(json.dumps(dict(common, cause=cause, rate=rate, **found), ensure_ascii=False) + '\n')
            f.flush()
            print(cause, rate, found, flush=True)

        for k, (cause, rate, how, env) in enumerate(cases(small)):
            server, folder = serve(files), made / f'case {k}'
            server.files.pop(how.pop('without', ''), None)
            for name, value in how.items(): setattr(server, name, value)
            cache = env.pop('cache', folder / 'cache')
            note(cause, rate, train(server.url + f'/{{000000..{SHARDS - 1:06d}}}.tar', folder, cache, CLIPA_NETWORK_MINUTES='0.1', **env))
            server.shutdown()
            server.server_close()
        samples = [*ToyData(n=PAIRS).samples()]
        pictures = made / 'pictures'
        pictures.mkdir()
        for key, jpg, _, _ in samples: (pictures / f'{key}.jpg').write_bytes(jpg)
        rows = [(f'pictures/{key}.jpg', text) for key, _, text, _ in samples]
        tables = dict(mark=('a table with a byte order mark', 1., '\ufefffilepath,title\n' + ''.join(f'{p},"{t}"\n' for p, t in rows)),
                      column=('a column is missing', 1., 'url,title\n' + ''.join(f'{p},"{t}"\n' for p, t in rows)))
        for rate in (0.001, 0.05, 1.):
            bad = [random.Random(k).random() < rate for k in range(PAIRS)]
            bad[0] |= not any(bad)
            tables[f'missing{rate}'] = 'pictures of a table are missing', rate, 'filepath,title\n' + ''.join(f'{"no" if b else ""}{p},"{t}"\n' for b, (p, t) in zip(bad, rows))
            tables[f'lines{rate}'] = 'lines are no JSON', rate, ''.join(json.dumps(dict(filepath=p, title=t))[:20 if b else None] + '\n' for b, (p, t) in zip(bad, rows))
        for name, (cause, rate, text) in tables.items():
            path = made / f'{name}{".jsonl" if name.startswith("lines") else ".csv"}'
            path.write_text(text)
            folder = made / name
            note(cause, rate, train(path, folder, folder / 'cache'))


if __name__ == '__main__':
    if len(sys.argv) < 2: sys.exit(__doc__)
    main(*sys.argv[1:])
