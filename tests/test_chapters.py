"Every chapter runs from top to bottom, shows its figures and its widget, and says how long it took."
import asyncio, sys, time, types
from pathlib import Path
import nbformat, pytest
nbclient = pytest.importorskip('nbclient')
import zmq, zmq.asyncio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / '.ci'))
from refresh import Client, execute
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

def test_the_client_is_woken_for_a_reply_that_a_widget_wrote_past(monkeypatch):
    "While it waits for a cell's reply, an output inside a widget writes to the same socket: the reply must not stay there unread."
    async def program():
        context = zmq.asyncio.Context()
        shell, kernel = context.socket(zmq.DEALER), zmq.Context(context).socket(zmq.DEALER)
        shell.bind('inproc://shell'); kernel.connect('inproc://shell')
        def an_output_inside_a_widget(self, msg, cell, cell_index):
            kernel.send(b'the reply'); time.sleep(0.1)
            zmq.Socket.shadow(shell.underlying).send(b'the state of a widget')
        monkeypatch.setattr(nbclient.NotebookClient, 'process_message', an_output_inside_a_widget)
        client = Client.__new__(Client); client.kc = types.SimpleNamespace(shell_channel=types.SimpleNamespace(socket=shell))
        reply = asyncio.ensure_future(shell.recv()); await asyncio.sleep(0.1)
        client.process_message({}, {}, 0)
        try: return await asyncio.wait_for(reply, 10)
        finally: shell.close(0); kernel.close(0); context.term()
    assert asyncio.run(program()) == b'the reply'
