"""The list of faults, run as shell commands: what was done, what the run printed, and whether it ended as it should.

    python tests/faults.py [--kills 10] [--only NAME …] [--folder DIR] > faults.txt

Every fault is a function; it raises where something is not as promised. Takes some minutes on two cores.
"""
import argparse, json, os, random, shutil, signal, subprocess, sys, tempfile, time, traceback
from pathlib import Path

CLIPA = [sys.executable, '-m', 'clipa_nb.cli']
SMOKE = ['train', 'toy', '--smoke', '--device', 'cpu', '--precision', 'fp32', '--workers', '0']
SHORT = [*SMOKE, '--checkpoint-steps', '1']
ENDLESS = [*SMOKE, '--set', 'stages.*.samples=320000']

def torchrun(n, *more): return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), *more, '-m', 'clipa_nb.cli']

def rows(out):
    path = Path(out) / 'metrics.jsonl'
    texts = path.read_text().splitlines() if path.exists() else []
    return [json.loads(t) for t in texts if t.endswith('}')]

def trace(out): return [(r['step'], r['train/loss'], r['train/grad_norm']) for r in rows(out) if 'train/loss' in r]

def status(out): return json.loads((Path(out) / 'status.json').read_text())

def steps(out): return sorted(int(p.name[5:]) for p in (Path(out) / 'checkpoints').glob('step_*') if (p / 'manifest.json').exists())

def say(*words, sep=' '): print(*words, sep=sep, flush=True)

def start(command, *more, env=None):
    command = [*command, *map(str, more)]
    shown = ' '.join(str(c).replace(sys.executable, 'python') for c in command)
    say(f'$ {shown}')
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}, start_new_session=True)

def told(job, limit=300, code=None, quiet=False):
    "Wait, print the last lines of the error stream, and check the exit code."
    try: _, err = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        raise AssertionError(f'still there after {limit} s: {job.communicate()[1][-2000:]}')
    lines = [l for l in err.splitlines() if l.startswith(('clipa: ', 'note: '))]
    if not quiet: say(*[f'  {l}' for l in lines[-6:]], f'  exit code {job.returncode}', sep='\n')
    if code is not None and job.returncode != code: raise AssertionError(f'exit code {job.returncode}, expected {code}\n{err[-3000:]}')
    return err

def until(what, job, limit=200):
    end = time.time() + limit
    while not what():
        if job.poll() is not None: raise AssertionError(f'it ended: {job.communicate()[1][-3000:]}')
        if time.time() > end: raise AssertionError('it never came so far')
        time.sleep(0.02)

def ranks_of(job):
    "Process ids of the ranks under a torchrun, by rank."
    found = {}
    for p in Path('/proc').iterdir():
        if not p.name.isdigit(): continue
        try:
            if int((p / 'stat').read_text().rsplit(')', 1)[1].split()[1]) != job.pid: continue
            env = dict(e.split('=', 1) for e in (p / 'environ').read_text().split('\0') if '=' in e)
        except (OSError, ValueError, IndexError): continue
        if 'RANK' in env: found[int(env['RANK'])] = int(p.name)
    return found

def tar_of(folder): return next((Path(folder) / 'checkpoints').glob('step_*'))

# ---- the list ----

def kill_9_ten_times(tmp, kills):
    "kill −9 at random moments, the same command each time: the trace is the one of a run that nobody disturbed, bit for bit."
    long = [*SHORT, '--set', 'stages.*.samples=1920'] # 60 steps a stage
    told(start(CLIPA, *long, '--out', tmp / 'clean'), code=0, quiet=True)
    rng, seen, out = random.Random(1), [], tmp / 'killed'
    for _ in range(kills):
        job, before = start(CLIPA, *long, '--out', out), max(steps(out), default=0)
        until(lambda: max(steps(out), default=0) > before, job) # it has gone on, and written a checkpoint
        time.sleep(rng.uniform(0, 2))
        assert job.poll() is None, 'finished before it could be killed'
        os.kill(job.pid, signal.SIGKILL); job.communicate()
        seen.append((max(steps(out)), len([*(out / 'checkpoints').glob('.tmp_*')])))
    say(f'  killed {kills} times; newest checkpoint each time: {", ".join(str(n) for n, _ in seen)}; half-written ones left behind: {sum(n for _, n in seen)}')
    told(start(CLIPA, *long, '--out', out), code=0, quiet=True)
    assert trace(out) == trace(tmp / 'clean') and len(trace(out)) == 20
    newest = [sorted((p / 'checkpoints').glob('step_*'))[-1] for p in (out, tmp / 'clean')]
    assert [p.name for p in newest] == ['step_00000120'] * 2
    shards = [[f.read_bytes() for f in sorted(p.glob('*.safetensors'))] for p in newest]
    assert shards[0] == shards[1] # weights and moments
    a, b = (json.loads((p / 'report.json').read_text())['metrics'] for p in (out, tmp / 'clean'))
    assert a == b
    say(f'  120 steps: losses and gradient norms of all {len(trace(out))} rows, and weights and moments at the end, bit-identical; scores equal')

def signals_of_one_process(tmp, kills):
    "SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint, 75 or 130, the reason in status.json; the same command goes on."
    for name, code in (('SIGTERM', 75), ('SIGUSR1', 75), ('SIGINT', 130)):
        out = tmp / name
        job = start(CLIPA, *ENDLESS, '--out', out)
        until(lambda: len(trace(out)) > 1, job)
        os.kill(job.pid, getattr(signal, name))
        err = told(job, 60, code)
        state = status(out)
        say(f"  status.json: {state['state']}, {state['reason']}, code {state['code']}")
        assert state['state'] == 'stopped' and name in state['reason'] and state['code'] == code
        assert f'the checkpoint of step {steps(out)[-1]} is kept' in err and 'Traceback' not in err

def signals_under_torchrun(tmp, kills):
    "torchrun forwards the signal and itself returns 1: the ranks agree within 20 steps, and status.json has the reason."
    for name in ('SIGTERM', 'SIGINT'):
        out = tmp / name
        job = start(torchrun(2), *ENDLESS, '--out', out)
        until(lambda: len(trace(out)) > 1, job)
        before, begun = trace(out)[-1][0], time.time()
        os.kill(job.pid, getattr(signal, name))
        err = told(job, 60)
        state = status(out)
        say(f"  stopped after {time.time() - begun:.1f} s; status.json: {state['state']}, {state['reason']}, code {state['code']}")
        assert state['state'] == 'stopped' and steps(out), err[-2000:]
        assert steps(out)[-1] - before <= 60 and 'Traceback' not in err.split('torch.distributed')[0]

def a_signal_while_the_disk_is_slow(tmp, kills):
    "A checkpoint that is not on the disk in time: the last one stands, and that is said."
    (tmp / 'slow.py').write_text('''
import sys, time
import clipa_nb.engine.checkpoints as c, clipa_nb.app.run as r
real, r.GRACE = c.write_shards, 3.
def slow(folder, *rest):
    if not folder.name.startswith('.tmp_00000020'): time.sleep(600)
    return real(folder, *rest)
c.write_shards = slow
from clipa_nb.cli import main
sys.exit(main())
''')
    out = tmp / 'x'
    job = start([sys.executable, str(tmp / 'slow.py')], *ENDLESS, '--checkpoint-steps', '20', '--out', out)
    until(lambda: (out / 'checkpoints' / 'step_00000020').exists(), job)
    os.kill(job.pid, signal.SIGTERM)
    err = told(job, 60, 75)
    assert 'that of step 20 stands' in err, err[-2000:]

def a_rank_is_killed(tmp, kills):
    "kill −9 of one rank of two: the other ends, names it, and status.json says so."
    out = tmp / 'x'
    job = start(torchrun(2), *ENDLESS, '--rank-timeout', '20', '--out', out)
    until(lambda: len(trace(out)) > 1, job)
    begun = time.time(); os.kill(ranks_of(job)[1], signal.SIGKILL)
    err = told(job, 90)
    state = status(out)
    say(f"  ended after {time.time() - begun:.1f} s; status.json: {state['state']}, {state['reason']}")
    assert state['state'] == 'failed' and 'rank 1' in state['reason'] and job.returncode == 1

def a_rank_hangs(tmp, kills):
    "A rank that is there and does nothing (SIGSTOP): the others end within --rank-timeout, and name it."
    out = tmp / 'x'
    job = start(torchrun(3), *ENDLESS, '--set', 'stages.*.batch_size=30', '--rank-timeout', '15', '--out', out)
    until(lambda: len(trace(out)) > 1, job)
    hung = ranks_of(job)[1]
    begun = time.time(); os.kill(hung, signal.SIGSTOP)
    try: err = told(job, 120)
    finally:
        try: os.kill(hung, signal.SIGKILL)
        except ProcessLookupError: pass
    state = status(out)
    say(f"  ended after {time.time() - begun:.1f} s; status.json: {state['state']}, {state['reason']}")
    assert state['state'] == 'failed' and 'rank 1' in state['reason'] and job.returncode == 1

def two_runs_in_one_directory(tmp, kills):
    "The second is refused in one line, and changes nothing (item 9 of the engineer's trial)."
    out = tmp / 'x'
    first = start(CLIPA, *ENDLESS, '--out', out)
    until(lambda: len(trace(out)) > 0, first)
    err = told(start(CLIPA, *ENDLESS, '--out', out), 120, 2)
    assert 'is in use by process' in err
    os.kill(first.pid, signal.SIGTERM); told(first, 60, 75)
    found = [r['step'] for r in rows(out) if 'train/loss' in r]
    assert found == sorted(set(found))

def all_checkpoints_damaged(tmp, kills):
    "Stops, and wipes nothing (item 10)."
    out = tmp / 'x'
    told(start(CLIPA, *SHORT, '--max-steps', '3', '--out', out), code=0, quiet=True)
    (out / 'report.json').unlink()
    files = {p: p.read_bytes() for p in out.rglob('*.safetensors')}
    for p in files:
        if 'checkpoints' in str(p): p.write_bytes(p.read_bytes()[:-1])
    log = (out / 'metrics.jsonl').read_text()
    err = told(start(CLIPA, *SHORT, '--max-steps', '3', '--out', out), code=2)
    assert 'checkpoints are damaged' in err and (out / 'metrics.jsonl').read_text() == log
    for p, data in files.items(): p.write_bytes(data)
    newest = sorted((out / 'checkpoints').glob('step_*'))[-1]
    next(newest.glob('*.safetensors')).unlink()
    err = told(start(CLIPA, *SHORT, '--max-steps', '3', '--out', out), code=0)
    assert 'is damaged' in err and 'taking an older checkpoint' in err

def the_disk_is_full(tmp, kills):
    "One line, code 1, the last checkpoint stands; with room the same command goes on."
    small = tmp / 'small'; small.mkdir()
    mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', str(small)], capture_output=True, text=True)
    if mounted.returncode: return say(f'  not run: a small file system cannot be mounted here ({mounted.stderr.strip()})')
    try:
        out = small / 'x'
        job = start(CLIPA, *SHORT, '--set', 'stages.*.samples=3200', '--keep', '50', '--out', out)
        err = told(job, 200, 1)
        assert 'No space left on device' in err and 'stands' in err and 'Traceback' not in err, err[-2000:]
        left = steps(out)
        subprocess.run(['mount', '-o', 'remount,size=200m', str(small)], check=True)
        job = start(CLIPA, *SHORT, '--set', 'stages.*.samples=3200', '--keep', '2', '--out', out)
        until(lambda: len(trace(out)) and steps(out)[-1] > left[-1] + 2, job)
        os.kill(job.pid, signal.SIGTERM); told(job, 60, 75)
    finally: subprocess.run(['umount', '-l', str(small)])

def a_read_only_directory(tmp, kills):
    "The folder of checkpoints becomes read-only while it runs: one line, code 1, the last one stands. From the start: refused."
    out = tmp / 'x'
    job = start(CLIPA, *ENDLESS, '--checkpoint-steps', '5', '--out', out)
    until(lambda: steps(out), job)
    folder = str(out / 'checkpoints')
    done = [subprocess.run(['mount', *how, folder], capture_output=True) for how in (['--bind', folder], ['-o', 'remount,ro,bind'])]
    if any(d.returncode for d in done):
        os.killpg(job.pid, signal.SIGKILL); return say('  not run: nothing can be mounted here')
    try:
        err = told(job, 100, 1)
        assert 'Read-only file system' in err and 'stands' in err and 'Traceback' not in err, err[-2000:]
        err = told(start(CLIPA, *SMOKE, '--out', f'{folder}/y'), 100, 2)
        assert err.count('clipa: ') == 1
    finally: subprocess.run(['umount', '-l', folder])

def it_diverges(tmp, kills):
    "Gradients without a number on one rank: skipped, rolled back once, stopped with the story; goes on with --set."
    (tmp / 'own.py').write_text('''
"Toy data whose pictures are poisoned from some step on, until the rate is lowered."
from dataclasses import dataclass
import torch
from torch import nn
from clipa_nb.infonce import Contrastive, ContrastiveConfig
from clipa_nb.recipes import recipe, smoke
class Fragile(Contrastive):
    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))
    def loss(self, features, model, batch, comm):
        out = super().loss(features, model, batch, comm)
        # the parameter counts down at the rate of the optimiser: below a threshold the loss is not a number
        poison = torch.where(self.steps < -0.002, torch.nan, 0.) if comm.rank == comm.size - 1 else 0.
        return dict(out, loss=out['loss'] + self.steps + poison)
@dataclass(frozen=True)
class FragileConfig(ContrastiveConfig):
    def build(self, model): return Fragile()
TOY = smoke(recipe('toy')).replace(name='own', objective=FragileConfig()).with_stages(samples=80 * 32)
''')
    base = ['train', f'{tmp}/own.py:TOY', '--device', 'cpu', '--precision', 'fp32', '--workers', '0', '--checkpoint-steps', '4']
    for n, command in ((1, CLIPA), (2, torchrun(2))):
        out = tmp / str(n)
        err = told(start(command, *base, '--out', out), 200, 1)
        assert err.count('note: diverged') == 1 and 'it came back after going back' in err, err[-2000:]
        state, story = status(out), json.loads((out / 'diverged.json').read_text())
        say(f"  status.json: {state['state']}; diverged.json: step {story['run_step']}, loss {story['loss']}, {len(story['norms'])} norms, {len(story['samples'])} samples, the first {story['samples'][0]}")
        assert state['state'] == 'diverged' and len(story['samples']) == 32 and story['in_a_row'] == 4
        log = trace(out)
        err = told(start(command, *base, '--out', out, '--set', 'stages.*.base_lr=1e-7', '--max-steps', '80'), 300, 0)
        notes = json.loads((out / 'plan.json').read_text())['went on with']
        say(f"  plan.json: went on with {notes[0]['changed']}")
        assert trace(out)[:5] == log[:5]
        told(start(command, *base, '--out', out), 100, 2) # without the change it is another run

FAULTS = [kill_9_ten_times, signals_of_one_process, signals_under_torchrun, a_signal_while_the_disk_is_slow, a_rank_is_killed, a_rank_hangs,
          two_runs_in_one_directory, all_checkpoints_damaged, the_disk_is_full, a_read_only_directory, it_diverges]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--only', nargs='*', default=[f.__name__ for f in FAULTS])
    parser.add_argument('--folder', default='')
    given = parser.parse_args()
    failed = []
    for f in FAULTS:
        if f.__name__ not in given.only: continue
        tmp = Path(tempfile.mkdtemp(prefix=f'{f.__name__}_', dir=given.folder or None))
        say(f'\n## {f.__name__}\n{f.__doc__}')
        begun = time.time()
        try:
            f(tmp, given.kills)
            say(f'as promised, {time.time() - begun:.0f} s')
        except Exception:
            failed.append(f.__name__)
            say(f'NOT AS PROMISED\n{traceback.format_exc()}')
        finally: shutil.rmtree(tmp, ignore_errors=True)
    say(f'\n{len(failed)} of {len(given.only)} not as promised: {failed}' if failed else f'\nall {len(given.only)} as promised')
    sys.exit(bool(failed))
