"One torch thread: the test machines are small and shared."
import os
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest, torch
torch.set_num_threads(1)

@pytest.fixture(scope='session')
def clipa():
    "Run the command line in a process of its own."
    import subprocess, sys
    def call(*args, check=0, **kw):
        done = subprocess.run([sys.executable, '-m', 'clipa_nb.cli', *map(str, args)], capture_output=True, text=True, timeout=300, **kw)
        if check is not None: assert done.returncode == check, f'exit {done.returncode}, not {check}\n{done.stdout}\n{done.stderr}'
        return done
    return call
