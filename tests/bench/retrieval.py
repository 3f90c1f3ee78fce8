#!/usr/bin/env python
"""Retrieval without the matrix: time and extra memory of both rules for ties on random features. Appends one row to nbs/results/retrieval.jsonl.

    python tests/bench/retrieval.py                                   100,000 pictures, 500,000 captions, 64 features: a quarter of an hour, one thread
    python tests/bench/retrieval.py --images 2000 --texts 10000       some of it
    python tests/bench/retrieval.py --report                          what has been recorded, in words

The extra memory is the peak of the process while the ranks are computed, above what it was with the features in place. The whole matrix would
take images × texts × 4 bytes. Features are random directions and a picture's captions lie near it, so that recalls are neither 0 nor 1.
"""
import argparse, ctypes, json, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / '.ci'), str(ROOT)]

def held(name):
    "Kilobytes: 'VmRSS' now, 'VmHWM' the most since `forget` (Linux)."
    return next(int(line.split()[1]) for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(name))

def forget():
    "Give what is free back to the system and begin a new record of the most."
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')

def measure(a):
    import torch, torch.nn.functional as F
    from clipa_nb.probes import retrieval
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(a.images, a.width, generator=g), dim=1)
    owner = torch.arange(a.texts) % a.images
    text = F.normalize(image[owner] + 0.25 * torch.randn(a.texts, a.width, generator=g), dim=1)
    forget()
    before = held('VmRSS')
    start = time.process_time()
    got = retrieval(image, text, owner, (1, 5, 10), a.ties)
    return dict(ties=a.ties, images=a.images, texts=a.texts, width=a.width, cpu_seconds=round(time.process_time() - start, 1),
                extra_mb=round((held('VmHWM') - before) / 1024, 1), matrix_gb=round(a.images * a.texts * 4 / 1e9, 1),
                mean_recall=round(got['mean_recall'], 5))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=100_000); p.add_argument('--texts', type=int, default=500_000); p.add_argument('--width', type=int, default=64)
    p.add_argument('--ties', default='strict', choices=('strict', 'clip_benchmark')); p.add_argument('--report', action='store_true'); p.add_argument('--out', default=str(ROOT / 'nbs/results/retrieval.jsonl'))
    a = p.parse_args()
    if a.report:
        for r in map(json.loads, Path(a.out).read_text().splitlines()): print(f"{r['images']:,} × {r['texts']:,}, {r['ties']}: {r['cpu_seconds']} CPU-seconds, {r['extra_mb']} MB extra (the matrix: {r['matrix_gb']} GB), {r['hardware']}")
        sys.exit()
    from record import cpu_name
    import torch
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    row = dict(git_sha=sha, hardware=f'{cpu_name()}, one thread', torch=torch.__version__, threads=1, **measure(a))
    with open(a.out, 'a') as f: f.write(json.dumps(row) + '\n')
    print(row)
