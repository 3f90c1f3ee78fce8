#!/usr/bin/env python
"""Run notebooks in place and keep the outputs that teach: `.ci/refresh.py nbs/05*.ipynb`; without names, all of them.

Execution counts, timings, widget views and ids are left out, so that running a notebook twice changes only what it measures.
"""
import os, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent

def tidy(nb):
    "Drop everything from the outputs that is not for a reader."
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        cell.outputs = [o for o in cell.outputs if 'application/vnd.jupyter.widget-view+json' not in o.get('data', {})]
        for o in cell.outputs:
            if 'execution_count' in o: o['execution_count'] = None
            if any(k.startswith('image/') for k in o.get('data', {})): o['data'].pop('text/plain', None)
    nb.metadata.pop('widgets', None)

def refresh(path: Path):
    nb, start = nbformat.read(path, 4), time.perf_counter()
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}, record_timing=False).execute()
    tidy(nb); nbformat.write(nb, path)
    subprocess.run([sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean(fname={str(path)!r})'], check=True, cwd=ROOT)
    print(f'{path.name}: {time.perf_counter() - start:.0f} s')

if __name__ == '__main__':
    for p in [Path(a).resolve() for a in sys.argv[1:]] or sorted((ROOT / 'nbs').glob('*.ipynb')): refresh(p)
