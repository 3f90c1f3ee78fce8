"Every chapter runs from top to bottom, shows its figures and its widget, and says how long it took."
import sys, time
from pathlib import Path
import nbformat, pytest
pytest.importorskip('nbclient')

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / '.ci'))
from refresh import execute
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))

def pictures(nb): return sum(any(k.startswith('image/') for k in o.get('data', {})) for c in nb.cells for o in c.get('outputs', []))
def widgets(nb): return sum('application/vnd.jupyter.widget-view+json' in o.get('data', {}) for c in nb.cells for o in c.get('outputs', []))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter(path, record_property):
    "A cell that hangs for 300 s fails its chapter; how long a chapter took is printed at the end and asserted nowhere."
    saved, nb, start = nbformat.read(path, 4), nbformat.read(path, 4), time.perf_counter()
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and any(f'#| {w}' in c.source for w in ('eval: false', 'cuda', 'slow', 'hub')))]
    execute(nb, path.parent, timeout=300)
    record_property('chapter', f'{path.stem} {time.perf_counter() - start:.0f} s')
    assert pictures(nb) >= 1
    assert pictures(nb) == pictures(saved), 'the committed figures are not those of a fresh run: .ci/refresh.py'
    calls = sum('widget(' in c.source and '#| export' not in c.source and 'import' not in c.source for c in nb.cells if c.cell_type == 'code')
    assert widgets(nb) >= (calls > 0), 'a promised widget is not there'
