#!/usr/bin/env python
"""Plain, streamed and open_clip's loss: time and extra memory of one forward and backward. Appends one row a form and batch to nbs/results/loss.jsonl.

    python tests/bench/loss.py                                    this CPU, one thread, fp32, b = 1,024 to 12,288: about fifteen minutes, 4 GB
    python tests/bench/loss.py --device cuda                      a GPU, bf16 features, b = 4,096 to 65,536, width 1,024
    python tests/bench/loss.py --loss sigmoid                     the sigmoid loss instead
    python tests/bench/loss.py --batches 4096 --forms plain auto  some of it
    python tests/bench/loss.py --report                           what has been recorded, in words

Every measurement is a process of its own, so that one form's memory is not another's, and the forms take turns, so that
neighbours disturb all alike. A row holds the best time of all rounds (a CPU's own seconds, so that waiting does not count)
and the median extra memory: the peak while the loss runs, above what was there before, gradients of the features included.
A form that does not fit is recorded as such. `plain` is `info_nce`'s own; `streamed N` has tiles of side N; `auto` follows
`auto_chunk`; `open_clip` is its `ClipLoss` (`SigLipLoss`), under autocast where the features are bf16, as its trainer runs it.
"""
import argparse, datetime, importlib.util, json, re, statistics, subprocess, sys, time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
FORMS = ('plain', 'streamed 256', 'streamed 512', 'streamed 1024', 'streamed 2048', 'auto', 'open_clip')
GPU_FORMS = ('plain', 'streamed 2048', 'streamed 4096', 'streamed 8192', 'auto', 'open_clip')

def loss_function(a):
    "features, scale, bias -> loss, for one form."
    if a.form == 'open_clip':
        import torch
        from open_clip.loss import ClipLoss, SigLipLoss
        theirs = ClipLoss() if a.loss == 'info_nce' else SigLipLoss()
        def call(image, text, scale, bias):
            with torch.autocast(a.device, torch.bfloat16, enabled=a.dtype == 'bfloat16'): return theirs(image, text, scale) if a.loss == 'info_nce' else theirs(image, text, scale, bias)
        return call
    from clipa_nb.infonce import info_nce, sigmoid_loss
    chunk = {'plain': None, 'auto': 'auto'}[a.form] if a.form in ('plain', 'auto') else int(a.form.split()[1])
    if a.loss == 'info_nce': return lambda image, text, scale, bias: info_nce(image, text, scale, chunk=chunk)['loss']
    return lambda image, text, scale, bias: sigmoid_loss(image, text, scale, bias, chunk=chunk)['loss']

def held(device, most=False):
    "Bytes that this process holds now, or the most since `forget`."
    import resource, torch
    if device == 'cuda': return torch.cuda.max_memory_allocated() if most else torch.cuda.memory_allocated()
    status = Path('/proc/self/status')
    if status.exists(): return 1024 * int(next(l.split()[1] for l in status.read_text().splitlines() if l.startswith('VmHWM' if most else 'VmRSS')))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def forget(device):
    "Give what is free back to the system and begin a new record of the most."
    import ctypes, torch
    if device == 'cuda': return torch.cuda.reset_peak_memory_stats()
    try: ctypes.CDLL(None).malloc_trim(0); Path('/proc/self/clear_refs').write_text('5')
    except (OSError, AttributeError): pass # another system: the record goes back to the start

def worker(a):
    "One measurement: prints seconds, extra megabytes, and numbers that all forms must share."
    import torch, torch.nn.functional as F
    torch.set_num_threads(a.threads)
    f = loss_function(a)
    def leaves(b):
        g = torch.Generator().manual_seed(0)
        image = F.normalize(torch.randn(b, a.width, generator=g), dim=1); text = F.normalize(image + 0.3 * torch.randn(b, a.width, generator=g), dim=1)
        return [x.to(a.device, getattr(torch, a.dtype)).requires_grad_() for x in (image, text)] + [torch.tensor(v, device=a.device, requires_grad=True) for v in (50., -10.)]
    wait = torch.cuda.synchronize if a.device == 'cuda' else lambda: None
    clock = time.perf_counter if a.device == 'cuda' else time.process_time
    f(*leaves(512)).backward()
    if a.device == 'cuda': f(*leaves(a.b)).backward(); wait() # kernels are chosen on the first call of a shape
    x = leaves(a.b)
    forget(a.device); before = held(a.device)
    wait(); start = clock(); out = f(*x); out.backward(); wait(); seconds = clock() - start
    print(json.dumps(dict(seconds=seconds, extra_mb=max(0., held(a.device, True) - before) / 1e6, loss=out.item(), d_scale=x[2].grad.item(), d_image=x[0].grad.float().norm().item())))

def measure(a, b, form):
    "`worker` in a fresh process; a dict with 'fits' False where memory ran out."
    done = subprocess.run([sys.executable, __file__, '--one', '--b', str(b), '--form', form, '--loss', a.loss, '--device', a.device, '--dtype', a.dtype, '--width', str(a.width), '--threads', str(a.threads)],
                          capture_output=True, text=True)
    if not done.returncode: return json.loads(done.stdout.splitlines()[-1])
    if 'OutOfMemoryError' in done.stderr or "can't allocate memory" in done.stderr or done.returncode == -9: return dict(fits=False)
    sys.exit(done.stderr)

SETTING = dict(cpu=dict(dtype='float32', width=512, threads=1), cuda=dict(dtype='bfloat16', width=1024))
TOLD = 'plain', 'streamed 512', 'auto', 'open_clip'

def recorded_rows(rows, device, loss):
    "{form: {b: newest row}} in the setting above, on the machine of the newest row; rows that do not fit have no seconds."
    told, out = dict(SETTING[device], device=device, loss=loss), {}
    mine = [r for r in rows if all(r[k] == v for k, v in told.items())]
    for r in mine:
        if r['hardware'] == mine[-1]['hardware']: out.setdefault(r['form'], {})[r['b']] = r
    return out

def compared(found, b):
    "One batch, in words: shares of plain, or seconds where there is no plain row; what does not fit is said."
    at = {f: found[f][b] for f in TOLD if b in found.get(f, {})}
    base = at['plain'] if at.get('plain', {}).get('fits') else None
    said = []
    for f, r in at.items():
        if not r['fits']: said.append(f'{f} does not fit')
        elif base is None or f == 'plain': said.append(f'{f} {r["seconds"]:.2f} s, {r["extra_mb"]:.0f} MB')
        else: said.append(f'{f} {r["seconds"] / base["seconds"]:.2f} × time, {r["extra_mb"] / base["extra_mb"]:.3f} × memory')
    return f'b = {b:6d}: ' + '; '.join(said)

def report(out, loss):
    "Only rows of one setting and one machine are compared; a form that did not fit, or that was not run, is said."
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    for device, name in dict(cpu='CPU', cuda='GPU').items():
        found = recorded_rows(rows, device, loss)
        every = [r for form in found.values() for r in form.values()]
        print(f'on a {name}:' + ('' if found else ' not run'))
        for b in sorted({r['b'] for r in every}): print('   ', compared(found, b))
        about = {f"{r['hardware']} · torch {r['torch']} · {r['threads']} thread · {r['dtype']} · width {r['width']} · {r['git_sha']} · {r['date']}" for r in every}
        for words in sorted(about): print('    on', words)

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--loss', default='info_nce', choices=('info_nce', 'sigmoid')); ap.add_argument('--device', default='cpu', choices=('cpu', 'cuda')); ap.add_argument('--dtype', choices=('float32', 'bfloat16'))
    ap.add_argument('--batches', type=int, nargs='+'); ap.add_argument('--forms', nargs='+'); ap.add_argument('--width', type=int); ap.add_argument('--rounds', type=int, default=3); ap.add_argument('--threads', type=int, default=1); ap.add_argument('--out', default=ROOT / 'nbs' / 'results' / 'loss.jsonl', type=Path)
    ap.add_argument('--report', action='store_true', help='print what has been recorded and measure nothing')
    ap.add_argument('--one', action='store_true', help=argparse.SUPPRESS); ap.add_argument('--b', type=int, help=argparse.SUPPRESS); ap.add_argument('--form', help=argparse.SUPPRESS)
    a = ap.parse_args(); gpu = a.device == 'cuda'
    a.dtype = a.dtype or ('bfloat16' if gpu else 'float32'); a.width = a.width or (1024 if gpu else 512)
    if a.one: return worker(a)
    if a.report: return report(a.out, a.loss)
    for f in a.forms or ():
        if not re.fullmatch(r'plain|auto|open_clip|streamed [1-9]\d*', f): ap.error(f"unknown form {f!r}: expected plain, auto, open_clip or 'streamed N', N the side of a tile")
    import torch
    from record import cpu_name
    forms = a.forms or [f for f in (GPU_FORMS if gpu else FORMS) if f != 'open_clip' or importlib.util.find_spec('open_clip')]
    git = lambda *c: subprocess.run(['git', *c], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    about = dict(git_sha=git('rev-parse', '--short', 'HEAD') + ('-dirty' if git('status', '--porcelain', '--', 'clipa_nb/infonce.py') else ''), date=datetime.date.today().isoformat(),
                 hardware=torch.cuda.get_device_name() if gpu else cpu_name(), torch=torch.__version__, threads=a.threads, device=a.device, dtype=a.dtype, loss=a.loss, width=a.width, rounds=a.rounds)
    out = a.out; out.parent.mkdir(exist_ok=True)
    for b in a.batches or ((4096, 16384, 32768, 65536) if gpu else (1024, 2048, 4096, 8192, 12288)):
        found = {f: [] for f in forms}
        for r in range(a.rounds):
            for f in forms[::-1] if r % 2 else forms:
                if not found[f] or found[f][-1].get('fits', True): found[f].append(measure(a, b, f))
        for f, runs in found.items():
            if not runs[-1].get('fits', True): row = dict(about, b=b, form=f, fits=False)
            else: row = dict(about, b=b, form=f, fits=True, seconds=round(min(x['seconds'] for x in runs), 5), extra_mb=round(statistics.median(x['extra_mb'] for x in runs), 1),
                             **{k + '_value' if k == 'loss' else k: runs[0][k] for k in ('loss', 'd_scale', 'd_image')})
            with open(out, 'a') as file: file.write(json.dumps(row) + '\n')
            print(f"b {b:6d}  {f:14s}", f"{row['seconds']:9.4f} s  {row['extra_mb']:9.1f} MB  loss {row['loss_value']:.6f}" if row['fits'] else 'does not fit', flush=True)

if __name__ == '__main__': main()
