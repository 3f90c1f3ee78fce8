#!/usr/bin/env python
"""What does a checkpoint cost? Appends rows to nbs/results/checkpoints.jsonl.

    python tests/bench/checkpoints.py                       one process, and 2 and 4 ranks that hold the same tensors (some minutes, 6 GB of memory, 2 GB of disk)
    python tests/bench/checkpoints.py --ranks 1 --gb 1      one of them, with another size

The state is that of a few layers of ViT-H/14's image tower with their two moments, in fp32. Measured on each rank, in wall seconds: how long training waits (`blocked`), how long the
thread writes, and the largest resident memory above what stood before the save. Medians of `--rounds` saves; `--plain` also times `torch.save` of everything on rank 0, to compare with.
From the seconds a GB of one rank's slice follows what H/14 (968 M parameters, 12 bytes each) would wait on 8 and 64 ranks with a checkpoint every ten minutes.
These are copies from one part of a CPU's memory to another; beside a GPU the copy goes over PCIe into pinned memory, and that was not measured here.
"""
import argparse, datetime, json, os, shutil, statistics, subprocess, sys, tempfile, threading, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / '.ci')]
from record import cpu_name
from clipa_nb.core import LOCAL
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.checkpoints import Checkpoints, own_pieces

H14 = 968e6 * 12 # bytes of weights and two moments

def state_of(gb):
    "Layers of width 1280 until the state has so many gigabytes."
    shapes = dict(in_proj=(3840, 1280), in_bias=(3840,), out=(1280, 1280), out_bias=(1280,), up=(5120, 1280), up_bias=(5120,), down=(1280, 5120), down_bias=(1280,), ln=(1280,))
    tensors, size, layer = {}, 0, 0
    while size < gb * 1e9:
        for name, shape in shapes.items():
            for part in ('model', 'optimizer.exp_avg', 'optimizer.exp_avg_sq'):
                t = tensors[f'{part}.blocks.{layer}.{name}'] = torch.randn(shape)
                size += t.nbytes
        layer += 1
    return tensors, size

def resident(): return int(Path('/proc/self/statm').read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE')

class Peak:
    "The largest resident memory while it watches."
    def __enter__(self):
        self.before = self.most = resident(); self.on = True
        self.thread = threading.Thread(target=self.watch); self.thread.start()
        return self
    def watch(self):
        while self.on: self.most = max(self.most, resident()); time.sleep(0.005)
    def __exit__(self, *error): self.on = False; self.thread.join(); self.extra = self.most - self.before

def measured(comm, folder, gb, rounds):
    torch.manual_seed(0)
    tensors, size = state_of(gb)
    slice_bytes = sum(p.tensor.nbytes for p in own_pieces(tensors, comm.rank, comm.size))
    kept, seen = Checkpoints(folder, keep=1, comm=comm), []
    for i in range(rounds + 1):
        comm.barrier()
        with Peak() as peak:
            kept.save(i, tensors, {})
            kept.join()
        seen.append((kept.blocked, kept.seconds, peak.extra))
        comm.barrier()
    blocked, wrote, extra = (statistics.median(column) for column in zip(*seen[1:]))
    begun = time.perf_counter(); found = Checkpoints(folder, comm=comm).latest(); verified = time.perf_counter() - begun
    begun = time.perf_counter(); found.read_into(tensors); read = time.perf_counter() - begun
    return dict(state=size, slice=slice_bytes, blocked=blocked, wrote=wrote, extra=extra, verified=verified, read=read)

def plain(folder, gb, rounds):
    tensors, size = state_of(gb); seen = []
    for _ in range(rounds):
        with Peak() as peak:
            begun = time.perf_counter()
            with open(folder / 'plain.pt', 'wb') as f:
                torch.save(tensors, f); f.flush(); os.fsync(f.fileno())
            seen.append((time.perf_counter() - begun, peak.most - peak.before))
    return statistics.median(s for s, _ in seen) / size * 1e9

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--ranks', type=int, nargs='*', default=[1, 2, 4])
    parser.add_argument('--gb', type=float, default=0.6)
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--folder', default='')
    parser.add_argument('--out', default=str(ROOT / 'nbs/results/checkpoints.jsonl'))
    given = parser.parse_args()
    if subprocess.run(['git', 'status', '--porcelain', '--', 'nbs', 'tests'], cwd=ROOT, capture_output=True, text=True).stdout.strip(): sys.exit('commit first: a row names the commit that it was measured on')
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found = []
    for n in given.ranks:
        folder = Path(tempfile.mkdtemp(dir=given.folder or None))
        try: answers = [measured(LOCAL, folder, given.gb, given.rounds)] if n == 1 else spawn(measured, n, folder, given.gb, given.rounds, timeout=1200)
        finally: shutil.rmtree(folder)
        slowest = max(answers, key=lambda a: a['blocked'])
        per_gb = slowest['blocked'] / slowest['slice'] * 1e9
        row = dict(
            git_sha=sha, date=str(datetime.date.today()), hardware=cpu_name(), torch=torch.__version__, threads=1, ranks=n, state_gb=round(slowest['state'] / 1e9, 3),
            slice_gb=round(slowest['slice'] / 1e9, 3), blocked=round(slowest['blocked'], 4), blocked_per_gb_of_slice=round(per_gb, 3),
            written_in=round(max(a['wrote'] for a in answers), 2), host_memory_per_gb_of_slice=round(max(a['extra'] / a['slice'] for a in answers), 2),
            verified_in=round(max(a['verified'] for a in answers), 2), read_in=round(max(a['read'] for a in answers), 2),
            h14={f'{k} ranks': dict(slice_gb=round(H14 / k / 1e9, 2), blocked=round(per_gb * H14 / k / 1e9, 3), share_of_ten_minutes=round(per_gb * H14 / k / 1e9 / 600, 6)) for k in (1, 8, 64)})
        if n == 1:
            folder = Path(tempfile.mkdtemp(dir=given.folder or None))
            try: row['torch_save_blocked_per_gb'] = round(plain(folder, given.gb, given.rounds), 2)
            finally: shutil.rmtree(folder)
        print(json.dumps(row), flush=True); found.append(row)
    with open(given.out, 'a') as f: f.writelines(json.dumps(r) + '\n' for r in found)

if __name__ == '__main__': main()
