"Notebooks are executed by nbdev_test, in every folder; what stands here keeps that true, and keeps `.ci/refresh.py` from hanging."
import asyncio, json, os, subprocess, sys, time, types
from pathlib import Path
import pytest
nbclient = pytest.importorskip('nbclient')
import zmq, zmq.asyncio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / '.ci'))
from refresh import Client

def notebooks_command():
    "The part of the second command that executes notebooks."
    run = (ROOT / '.ci/run').read_text()
    return next(part for line in run.splitlines() if 'nbdev_test' in line and '&&' in line for part in line.split(' && ') if 'nbdev_test' in part)

@pytest.mark.parametrize('folder', ['.', 'engine', 'app', 'zoo', 'exp'])
def test_a_notebook_that_raises_in_any_folder_turns_the_command_red(folder, tmp_path):
    cells = [dict(cell_type='code', id='a', metadata={}, outputs=[], execution_count=None, source=['raise RuntimeError("planted")'])]
    kernel = dict(kernelspec=dict(display_name='python3', language='python', name='python3'))
    place = tmp_path / 'nbs' / folder
    place.mkdir(parents=True)
    (place / '00_planted.ipynb').write_text(json.dumps(dict(cells=cells, metadata=kernel, nbformat=4, nbformat_minor=5)))
    (tmp_path / 'settings.ini').write_text((ROOT / 'settings.ini').read_text())
    (tmp_path / '.venv').symlink_to(sys.prefix)
    done = subprocess.run(notebooks_command(), shell=True, cwd=tmp_path, capture_output=True, text=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode != 0 and 'planted' in done.stdout + done.stderr

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
