#!/usr/bin/env python
"""CLIP_benchmark, unmodified, on our directory: do its numbers equal those of `clipa eval`?

    python tests/harness/clip_benchmark.py PYTHON [FOLDER]

PYTHON is the interpreter of an environment of its own that has clip_benchmark 1.6.2, open_clip, and numpy < 2.4 (with 2.4 its accuracy raises:
it makes a number of an array of one). FOLDER holds what tests/harness/small.py makes; without it, that is made in a temporary directory. Every set
is asked by both programs in fp32, the table is printed, and the exit status is 1 where a number differs by more than 1e-6 (theirs are float32).
"""
import json, os, subprocess, sys, tempfile
from pathlib import Path
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
import small

CLASSES = dict(acc1='top1', acc5='top5', mean_per_class_recall='mean_per_class')
SETS = dict(digits=('wds/digits', 'zeroshot_classification', {a: f'digits-zeroshot-val-{b}' for a, b in CLASSES.items()}),
            photographs=('wds/photographs', 'zeroshot_classification', {a: f'photographs-zeroshot-val-{b}' for a, b in CLASSES.items()}),
            toys=('wds/toys', 'zeroshot_retrieval', {f'{a}_retrieval_recall@{k}': f'toys-{b}_R@{k}' for a, b in (('text', 'image_to_text'), ('image', 'text_to_image')) for k in (1, 5, 10)}),
            add_att=('sugar_crepe/add_att', 'image_caption_selection', dict(text_acc='add_att-acc')), swap_att=('sugar_crepe/swap_att', 'image_caption_selection', dict(text_acc='swap_att-acc')))

def theirs(python: str, root: Path, name: str) -> dict:
    dataset, task, _ = SETS[name]
    place = root / ('sugar_crepe' if dataset.startswith('sugar') else name)
    out = root / f'clip_benchmark-{name}.json'
    command = [python, '-W', 'ignore', '-m', 'clip_benchmark.cli', 'eval', '--model', f'local-dir:{root / "model"}', '--pretrained', '', '--dataset', dataset, '--dataset_root', str(place), '--task', task,
               '--output', str(out), '--no_amp', '--num_workers', '0', '--batch_size', '50', '--recall_k', '1', '5', '10', '--quiet']
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    if done.returncode: sys.exit(f'clip_benchmark on {name}: exit {done.returncode}\n{done.stderr[-2000:]}')
    return json.loads(out.read_text())['metrics']

def compare(python: str, root: Path) -> bool:
    report = root / 'clipa.json'
    report.unlink(missing_ok=True)
    command = [sys.executable, '-W', 'ignore', '-m', 'clipa_nb.cli', 'eval', str(root / 'model'), '--suite', str(root / 'suite.json'), '--ties', 'clip_benchmark', '--recalls', '1', '5', '10', '--device', 'cpu', '--out', str(report)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': str(ROOT), 'CLIPA_VOCABULARIES': str(small.vocabulary())})
    if done.returncode: sys.exit(f'clipa eval: exit {done.returncode}\n{done.stderr[-2000:]}')
    ours, same = json.loads(report.read_text())['metrics'], True
    print(f"{'set':12s} {'clip_benchmark':28s} {'theirs':>10s} {'ours':>10s}")
    for name, (_, _, names) in SETS.items():
        found = theirs(python, root, name)
        for a, b in names.items():
            x, y = found[a], ours[f'val/{b}']
            equal = abs(x - y) < 1e-6 # theirs are means in float32
            same &= equal
            print(f"{name:12s} {a:28s} {x:10.6f} {y:10.6f} {'' if equal else 'DIFFERS'}")
    return same

if __name__ == '__main__':
    if len(sys.argv) not in (2, 3): sys.exit(__doc__)
    root = Path(sys.argv[2] if len(sys.argv) == 3 else tempfile.mkdtemp())
    if not (root / 'suite.json').exists(): small.make(root)
    sys.exit(0 if compare(sys.argv[1], root) else 1)
