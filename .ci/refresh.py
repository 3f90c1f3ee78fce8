#!/usr/bin/env python
"""Run notebooks in place and keep the outputs that teach: `.ci/refresh.py nbs/05*.ipynb`; without names, all of them.

Execution counts, timings, widget views and ids are left out, so that running a notebook twice changes only what it measures.
"""
import os, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import nbformat, zmq
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent

class Client(NotebookClient):
    """A notebook client that does not sleep through a reply.

    An output inside a widget makes nbclient write to the kernel's shell socket, past the asyncio wrapper that waits on it for the cell's reply.
    Where the two meet, the reply is in the socket but nobody is woken, and the cell appears to hang until its time is up
    (13 of 450 widget cells on a busy machine, none of 750 with this class). Asking for the socket's events after each message makes the wrapper look again.
    """
    def process_message(self, msg, cell, cell_index):
        try: return super().process_message(msg, cell, cell_index)
        finally: self.kc.shell_channel.socket.get(zmq.EVENTS)

def execute(nb, folder, timeout=300):
    "Run all cells of a notebook in a fresh kernel; a cell that takes longer than `timeout` seconds raises `CellTimeoutError`."
    return Client(nb, timeout=timeout, kernel_name='python3', resources={'metadata': {'path': str(folder)}}, record_timing=False).execute()

def joined(outputs):
    "Neighbouring pieces of one stream as one: where a stream is cut depends on the machine's mood."
    out = []
    for o in outputs:
        if out and o.output_type == out[-1].output_type == 'stream' and o.name == out[-1].name: out[-1].text += o.text
        else: out.append(o)
    return out

def tidy(nb):
    "Drop everything from the outputs that is not for a reader."
    for cell in nb.cells:
        if cell.cell_type != 'code': continue
        cell.outputs = joined(cell.outputs)
        cell.execution_count = None
        for o in cell.outputs:
            if 'application/vnd.jupyter.widget-view+json' in o.get('data', {}): o['data'] = {k: v for k, v in o['data'].items() if k.startswith('image/')}
        cell.outputs = [o for o in cell.outputs if o.get('data', True)] # of a widget the picture stays, where there is one
        for o in cell.outputs:
            if 'execution_count' in o: o['execution_count'] = None
            if any(k.startswith('image/') for k in o.get('data', {})): o['data'].pop('text/plain', None)
    nb.metadata.pop('widgets', None)

def refresh(path: Path):
    nb, start = nbformat.read(path, 4), time.perf_counter()
    execute(nb, path.parent)
    tidy(nb); nbformat.write(nb, path)
    subprocess.run([sys.executable, '-c', f'from nbdev.clean import nbdev_clean; nbdev_clean(fname={str(path)!r})'], check=True, cwd=ROOT)
    print(f'{path.name}: {time.perf_counter() - start:.0f} s')

if __name__ == '__main__':
    for p in [Path(a).resolve() for a in sys.argv[1:]] or sorted((ROOT / 'nbs').glob('*.ipynb')): refresh(p)
