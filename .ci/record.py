#!/usr/bin/env python
"""Turn a finished run directory into one row of nbs/results: `.ci/record.py runs/demo nbs/results/demo.jsonl [git_sha=of the run]`."""
import json, subprocess, sys
from pathlib import Path

def cpu_name() -> str:
    "The processor's own name, where the system tells it."
    try: return next(l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return 'CPU'

def curve(folder: Path) -> list:
    "Step, stage, samples and the top-1 scores of each evaluation during training."
    rows = [json.loads(l) for l in (folder / 'metrics.jsonl').read_text().splitlines()]
    names = {'val/seen-zeroshot-val-top1': 'top1', 'val/heldout-zeroshot-val-top1': 'heldout', 'val/shape-zeroshot-val-top1': 'shape'}
    return [{names.get(k, k): round(v, 4) if isinstance(v, float) else v for k, v in r.items() if k in ('step', 'stage', 'samples', 'seconds', 'cpu_seconds', *names)} for r in rows if 'val/seen-zeroshot-val-top1' in r]

def row(folder: Path, **extra) -> dict:
    report = json.loads((folder / 'report.json').read_text())
    sha = extra.pop('git_sha', None) or subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], capture_output=True, text=True, check=True).stdout.strip()
    out = dict(git_sha=sha, recipe=report['recipe'], seed=report['seed'], hardware=f"{cpu_name()}, {report['hardware']}" if report['device'] == 'cpu' else report['hardware'],
               torch=report['versions']['torch'], precision=report['precision'], seconds=round(sum(s['seconds'] for s in report['stages']), 1),
               cpu_seconds=round(sum(s['cpu_seconds'] for s in report['stages']), 1), **extra, metrics={k: round(v, 4) for k, v in report['metrics'].items()}, stages=report['stages'], curve=curve(folder))
    if 'compare' in report: out['compare'] = row(folder / 'compare' / 'run')
    return out

if __name__ == '__main__':
    if len(sys.argv) < 3: sys.exit(__doc__)
    extra = dict(a.split('=', 1) for a in sys.argv[3:])
    path = Path(sys.argv[2]); path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, 'a') as f: f.write(json.dumps(row(Path(sys.argv[1]), **extra)) + '\n')
    print(f'one row more in {path}')
