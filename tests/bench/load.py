#!/usr/bin/env python
"""What does a whole L/14 cost to load, how fast is it beside open_clip, and how far apart are the two? Appends rows to nbs/results/pretrained.jsonl.

    python tests/bench/load.py                      ViT-L-14-CLIPA and ViT-L-14: parity in both directions, loading, forward time (about 5 minutes, 8 GB of memory, 4 GB of disk)
    python tests/bench/load.py --models ViT-L-14    one of them
    python tests/bench/load.py --only load forward  only these kinds of row

Weights are random, with every bias and norm perturbed. Loading is measured in a process of its own: the peak of its resident memory over what it was after the imports, divided by the file.
Forward times are processor seconds, medians of interleaved runs in one process, on one thread; the ratio is the median of the pairs' ratios.
"""
import argparse, gc, json, os, platform, statistics, subprocess, sys, tempfile, time, warnings
os.environ.setdefault('OMP_NUM_THREADS', '1')
from pathlib import Path
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / '.ci')]
from record import cpu_name
from clipa_nb.engine.vocabularies import FILES
from clipa_nb.pretrained import create_model, save_pretrained
from clipa_nb.engine.formats import open_clip_config

def random_open_clip(name, seed=0):
    "open_clip's model with random weights of a usual size, made without drawing open_clip's own."
    import open_clip
    with torch.device('meta'): model = open_clip.CLIP(**open_clip.get_model_config(name))
    g = torch.Generator().manual_seed(seed)
    state = {}
    for k, v in model.state_dict().items():
        x = torch.empty(v.shape).uniform_(-1, 1, generator=g)
        state[k] = x.mul_(1.7 * v.shape[-1]**-0.5).add_(float('ln_' in k and 'weight' in k)) if v.ndim else torch.tensor(2.6592)
    model.load_state_dict(state, assign=True)
    if model.attn_mask is not None: model.attn_mask = torch.full((77, 77), float('-inf')).triu(1)
    return model.eval()

def write_theirs(model, name, out):
    import open_clip
    out.mkdir()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / FILES[0])
    cfg = 'clipa' if 'CLIPA' in name else 'openai'
    from clipa_nb.engine.formats import PREPROCESS
    (out / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=open_clip.get_model_config(name), preprocess_cfg=PREPROCESS[cfg])))

def inputs(name, n=1):
    g = torch.Generator().manual_seed(1)
    words = (32000, 32) if 'CLIPA' in name else (49408, 77)
    return torch.randn(n, 3, 224, 224, generator=g), torch.randint(1, words[0], (n, words[1]), generator=g)

@torch.no_grad()
def gap(a, b, x, ids): return max(float((f(x, normalize=True) - g(x, normalize=True)).abs().max()) for f, g, x in ((a.encode_image, b.encode_image, x), (a.encode_text, b.encode_text, ids)))

def parity(name, theirs_dir, tmp, theirs):
    import open_clip
    x, ids = inputs(name)
    ours = create_model(f'local-dir:{theirs_dir}').eval()
    yield dict(kind='parity', model=name, direction='open_clip → ours', embedding=gap(theirs, ours, x, ids), logit_scale_equal=ours.logit_scale.item() == theirs.logit_scale.item())
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        out = save_pretrained(ours, tmp / 'ours')
    again = open_clip.create_model(f'local-dir:{out}').eval()
    yield dict(kind='parity', model=name, direction='ours → open_clip', embedding=gap(ours, again, x, ids), logit_scale_equal=again.logit_scale.item() == ours.logit_scale.item())

LOAD = '''
import sys, time, json, torch
torch.set_num_threads(1)
library, where, vocab, length = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
if library == 'ours': from clipa_nb.pretrained import create_model
else: from open_clip import create_model
torch.nn.Linear(8, 8)(torch.ones(2, 8)).sum().backward()
def peak(): return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 1e6
open('/proc/self/clear_refs', 'w').write('5'); base = peak(); t, c = time.perf_counter(), time.process_time()
model = create_model('local-dir:' + where).eval()
seconds, cpu, loaded = time.perf_counter() - t, time.process_time() - c, peak() - base
with torch.no_grad(): model.encode_image(torch.zeros(1, 3, 224, 224)), model.encode_text(torch.arange(length)[None] % vocab)
model.state_dict()['text.embed.weight' if library == 'ours' else 'token_embedding.weight'].sum() # the last pages
print(json.dumps(dict(seconds=round(seconds, 2), cpu_seconds=round(cpu, 2), loaded_gb=round(loaded, 3), used_gb=round(peak() - base, 3))))
'''

def load(name, folder):
    size = (folder / FILES[0]).stat().st_size / 1e9
    _, ids = inputs(name)
    for library in ('open_clip', 'ours'):
        for _ in range(2): # the first brings the file into the page cache
            done = subprocess.run([sys.executable, '-c', LOAD, library, str(folder), '32000' if 'CLIPA' in name else '49408', str(ids.shape[1])], capture_output=True, text=True, cwd=ROOT)
            if done.returncode: sys.exit(done.stderr)
        r = json.loads(done.stdout.splitlines()[-1])
        yield dict(kind='load', model=name, library=library, file_gb=round(size, 3), **r, loaded_ratio=round(r['loaded_gb'] / size, 3), used_ratio=round(r['used_gb'] / size, 3))

@torch.no_grad()
def forward(name, folder, rounds):
    import open_clip
    for precision, their in (('fp32', 'fp32'), ('bf16', 'pure_bf16')):
        models = dict(ours=create_model(f'local-dir:{folder}', precision=precision).eval(), open_clip=open_clip.create_model(f'local-dir:{folder}', precision=their).eval())
        x, ids = inputs(name)
        x, times = x.bfloat16() if precision == 'bf16' else x, dict(ours=[], open_clip=[])
        for i in range(rounds + 1):
            for k in list(models)[::1 if i % 2 else -1]:
                t = time.process_time(); models[k](x, ids); times[k].append(time.process_time() - t)
        ours, them = (v[1:] for v in times.values())
        yield dict(kind='forward', model=name, precision=precision, batch=1, rounds=rounds, ours_ms=round(1e3 * statistics.median(ours), 1), open_clip_ms=round(1e3 * statistics.median(them), 1),
                   ratio=round(statistics.median(a / b for a, b in zip(ours, them)), 3))
        del models; gc.collect()

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--models', nargs='+', default=['ViT-L-14', 'ViT-L-14-CLIPA']); ap.add_argument('--only', nargs='+', default=['parity', 'load', 'forward']); ap.add_argument('--rounds', type=int, default=5)
    a = ap.parse_args(); torch.set_num_threads(1)
    out = ROOT / 'nbs' / 'results' / 'pretrained.jsonl'; out.parent.mkdir(exist_ok=True)
    import open_clip
    git = lambda *what: subprocess.run(['git', *what], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    sha = git('rev-parse', '--short', 'HEAD') + ('-dirty' if git('status', '--porcelain', 'clipa_nb', 'tests/bench/load.py') else '')
    where = dict(git_sha=sha, hardware=f'{cpu_name()}, {platform.machine()}, {os.cpu_count()} cores', torch=torch.__version__, open_clip=open_clip.__version__, threads=1)
    for name in a.models:
        with tempfile.TemporaryDirectory() as tmp:
            theirs = random_open_clip(name)
            write_theirs(theirs, name, Path(tmp) / 'theirs')
            def rows():
                nonlocal theirs
                if 'parity' in a.only: yield from parity(name, Path(tmp) / 'theirs', Path(tmp), theirs)
                theirs = None; gc.collect()
                if 'load' in a.only: yield from load(name, Path(tmp) / 'theirs')
                if 'forward' in a.only: yield from forward(name, Path(tmp) / 'theirs', a.rounds)
            for r in rows():
                print(r, flush=True)
                with open(out, 'a') as f: f.write(json.dumps(where | r) + '\n')

if __name__ == '__main__': main()
