"Every chapter runs from top to bottom, shows its figures and its widget, and says how long it took."
import time
from pathlib import Path
import nbformat, pytest
nbclient = pytest.importorskip('nbclient')

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))

def pictures(nb): return sum(any(k.startswith('image/') for k in o.get('data', {})) for c in nb.cells for o in c.get('outputs', []))
def widgets(nb): return sum('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for c in nb.cells for o in c.get('outputs', []))

def run(nb, folder, tries=2):
    "Run all cells. A cell that hangs for 300 s fails the chapter, unless a second kernel shows that only the first one had lost a message."
    for left in reversed(range(tries)):
        try: return nbclient.NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(folder)}}).execute()
        except nbclient.exceptions.CellTimeoutError:
            if not left: raise

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter(path, capsys):
    saved, nb, start = nbformat.read(path, 4), nbformat.read(path, 4), time.perf_counter()
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and any(f'#| {w}' in c.source for w in ('eval: false', 'cuda', 'slow', 'hub')))]
    run(nb, path.parent)
    with capsys.disabled(): print(f' {path.stem}: {time.perf_counter() - start:.0f} s', end='')
    assert pictures(nb) >= 1 or path.stem == 'index'
    assert pictures(nb) == pictures(saved), 'the committed figures are not those of a fresh run: .ci/refresh.py'
    calls = sum('widget(' in c.source and '#| export' not in c.source and 'import' not in c.source for c in nb.cells if c.cell_type == 'code')
    assert widgets(nb) >= (calls > 0), 'a promised widget is not there'
