"One torch thread: the test machines are small and shared."
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest, torch
torch.set_num_threads(1)

@pytest.fixture(scope='session')
def clipa():
    "Run the command line in this process, through the function that the console script calls."
    import contextlib, io, types
    def call(*args, check=0, cwd=None):
        from clipa_nb.cli import main
        out, err, here = io.StringIO(), io.StringIO(), os.getcwd()
        try:
            os.chdir(cwd or here)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = main([*map(str, args)])
        except SystemExit as e: code = e.code # the parser's own refusals
        finally: os.chdir(here)
        done = types.SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())
        assert code == check, f'exit {code}, not {check}\n{done.stdout}\n{done.stderr}'
        return done
    return call

def pytest_make_parametrize_id(val):
    "Bytes never name a test: what they hold (a gzip header has the time of day) may differ between the workers that collect it."
    if isinstance(val, bytes): return f'{len(val)}-bytes'

def pytest_terminal_summary(terminalreporter):
    "Say how long each chapter ran, also where workers ran them."
    said = sorted(v for rs in terminalreporter.stats.values() for r in rs if getattr(r, 'when', '') == 'call' for k, v in r.user_properties if k == 'chapter')
    if said: terminalreporter.write_line('chapters: ' + ', '.join(said))
