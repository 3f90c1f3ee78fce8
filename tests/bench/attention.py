#!/usr/bin/env python
"""Which attention is faster, matrix products or the fused one? Appends one row a setting to nbs/results/attention.jsonl.

    python tests/bench/attention.py                  this CPU on one thread, bf16 and fp32: about two minutes
    python tests/bench/attention.py --device cuda    a GPU, with larger batches

The two are run in turns on the same tensors, several rounds; a row holds the median time of each, in milliseconds.
"""
import argparse, json, statistics, subprocess, sys, time
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import cpu_name
from clipa_nb.transformer import attention

LENGTHS = (8, 17, 37, 50, 65, 101, 197, 257, 577)

def once(impl, qkv, backward, wait):
    "Milliseconds of one pass; a CPU's own seconds, so that neighbours disturb little."
    clock = time.perf_counter if qkv.is_cuda else time.process_time
    wait(); t = clock(); y = attention(*qkv.unbind(0), impl=impl)
    if backward: y.backward(torch.ones_like(y))
    wait(); return 1e3 * (clock() - t)

def measure(device, dtype, n, heads, head_dim, tokens, rounds):
    "A row for training (forward and backward) and one for inference."
    batch = max(1, tokens // n)
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for backward in (True, False):
        qkv = torch.randn(3, batch, heads, n, head_dim, device=device).to(dtype).requires_grad_(backward)
        times = {'matmul': [], 'sdpa': []}
        for _ in range(rounds + 1):
            for impl in times: times[impl].append(once(impl, qkv, backward, wait))
        yield dict(pass_='training' if backward else 'inference', n=n, batch=batch, **{k: round(statistics.median(v[1:]), 4) for k, v in times.items()})

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--device', default='cpu', choices=('cpu', 'cuda')); ap.add_argument('--heads', type=int, default=12); ap.add_argument('--head-dim', type=int, default=64)
    ap.add_argument('--tokens', type=int, default=0, help='tokens in a batch; 0: 1,600 on a CPU, 300,000 on a GPU'); ap.add_argument('--rounds', type=int, default=9)
    ap.add_argument('--out', default=str(ROOT / 'nbs' / 'results' / 'attention.jsonl'))
    a = ap.parse_args(); torch.set_num_threads(1); torch.manual_seed(0)
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    if subprocess.run(['git', 'diff', '--quiet', 'HEAD', '--', 'clipa_nb/transformer.py', __file__], cwd=ROOT).returncode: sha += '-dirty' # what was measured is not in that commit
    hardware = torch.cuda.get_device_name() if a.device == 'cuda' else cpu_name()
    amx = 'amx_bf16' in Path('/proc/cpuinfo').read_text() if a.device == 'cpu' and Path('/proc/cpuinfo').exists() else None
    with open(a.out, 'a') as f:
        for dtype in (torch.bfloat16, torch.float32):
            for n in LENGTHS:
                for r in measure(a.device, dtype, n, a.heads, a.head_dim, a.tokens or (300_000 if a.device == 'cuda' else 1_600), a.rounds):
                    row = dict(git_sha=sha, date=time.strftime('%Y-%m-%d'), hardware=hardware, amx=amx, torch=torch.__version__, threads=1, device=a.device, dtype=str(dtype).split('.')[1],
                               heads=a.heads, head_dim=a.head_dim, **{'pass' if k == 'pass_' else k: v for k, v in r.items()})
                    f.write(json.dumps(row) + '\n'); f.flush(); print(row['dtype'], row['pass'], n, f"sdpa / matmul = {row['sdpa'] / row['matmul']:.2f}")

if __name__ == '__main__': main()
