"Killed with SIGKILL and resumed on other ranks and workers: the same samples in the same batches, and the same losses."
import json, subprocess, sys
from pathlib import Path
import pytest

@pytest.mark.skipif(sys.platform != 'linux', reason='ranks are forked')
def test_a_run_that_is_killed_twice_and_goes_on_with_other_ranks_and_workers(tmp_path):
    "4 ranks without workers, then 2 ranks with three each, then 3 ranks with one, which do not divide the lanes; token dropping is on."
    done = subprocess.run([sys.executable, '-W', 'ignore', Path(__file__).with_name('elastic.py'), tmp_path / 'x'], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '4 ranks, 0 workers: exit codes [-9' in done.stdout and '2 ranks, 3 workers: exit codes [-9' in done.stdout
    found = json.loads(done.stdout.splitlines()[-1])
    assert found['steps'] == [40, 40] and found['same_batches'] and found['epochs'] == [300, 300, 300]
    assert found['apart'] < 1e-10 and found['losses'][1] < found['losses'][0]
