"A log never repeats a step, a status says how a run ended, dashboards never end one, progress needs no terminal."
import io, json, os
import pytest, torch
from clipa_nb.core import UserError
from clipa_nb.engine.logs import Log, Progress, read_log, write_status, writers

def test_reading_a_log(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    assert read_log(path) == []
    path.write_text('{"step": 10}\n{"step": 2'); assert read_log(path) == [{'step': 10}]
    path.write_text('{"step": 10}\n{"step": 2\n{"step": 30}\n')
    with pytest.raises(UserError, match='line 2 of 3, is not JSON'): read_log(path)

def test_a_log_never_repeats_a_step(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    log = Log(path)
    for step in (10, 20, 30): log(step=step, stage='one', loss=torch.tensor(1 / step))
    with open(path, 'a') as f: f.write('{"step": 4')
    log = Log(path, resume_at=20); log(step=30, stage='one', loss=0.5)
    assert [(r['step'], r['loss']) for r in read_log(path)] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05)), (30, 0.5)]
    assert read_log(Log(path, resume_at=30, begins='two').path) != []
    assert read_log(Log(path, resume_at=30, begins='one').path) == []
    log(step=10); assert read_log(Log(path).path) == [] # step 0 starts anew

def test_a_log_is_on_the_disk_before_it_replaces_the_old_one(tmp_path, monkeypatch):
    "At a resume the log is written anew: a power cut must leave the old one or the new one."
    done, fsync, replace = [], os.fsync, os.replace
    Log(tmp_path / 'metrics.jsonl')(step=1)
    before = (tmp_path / 'metrics.jsonl').read_text()
    monkeypatch.setattr(os, 'fsync', lambda fd: (done.append(('on disk', os.fstat(fd).st_size)), fsync(fd)))
    monkeypatch.setattr(os, 'replace', lambda a, b: (done.append(('replaced', os.stat(a).st_size)), replace(a, b)))
    Log(tmp_path / 'metrics.jsonl', resume_at=1)
    assert done == [('on disk', len(before)), ('replaced', len(before))]
    assert (tmp_path / 'metrics.jsonl').read_text() == before # rows without a stage too

# ---- status ----

def status(tmp_path): return json.loads((tmp_path / 'status.json').read_text())

def test_the_first_story_of_an_end_stands(tmp_path):
    write_status(tmp_path, 'running'); write_status(tmp_path, 'failed', 'rank 2 is gone', unless_ended=True)
    assert status(tmp_path)['state'] == 'failed' and status(tmp_path)['pid'] == os.getpid()
    write_status(tmp_path, 'failed', 'another story', unless_ended=True); assert status(tmp_path)['reason'] == 'rank 2 is gone'
    write_status(tmp_path, 'running', step=3); assert status(tmp_path)['step'] == 3
    write_status(tmp_path / 'absent', 'running') # nothing to write to: nothing happens

# ---- dashboards ----

def test_tensorboard_is_handed_the_rows(tmp_path):
    pytest.importorskip('tensorboard')
    log = Log(tmp_path / 'metrics.jsonl', also=writers('tensorboard', tmp_path, {'seed': 1}))
    for step in (10, 20): log(step=step, stage='one', **{'train/loss': 1 / step})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(tmp_path / 'tensorboard')); events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars('train/loss')] == [(10, 0.1), (20, 0.05)]

def test_wandb_offline_is_handed_the_rows(tmp_path, monkeypatch):
    pytest.importorskip('wandb')
    for k, v in dict(WANDB_MODE='offline', WANDB_SILENT='true').items(): monkeypatch.setenv(k, v)
    ids = []
    for step in (10, 20):
        log = Log(tmp_path / 'metrics.jsonl', resume_at=step - 10, also=writers('wandb', tmp_path, {'seed': 1}))
        log(step=step, stage='one', **{'train/loss': 1 / step})
        import wandb
        ids.append(wandb.run.id); wandb.finish()
    files = [*(tmp_path / 'wandb').glob('offline-run-*/*.wandb')]
    assert ids[0] == ids[1] and files and all(b'train/loss' in f.read_bytes() for f in files)

def test_unknown_writers_are_refused(tmp_path):
    with pytest.raises(UserError, match='unknown writer .*did you mean tensorboard'): writers('tensorbord', tmp_path, {})

def test_a_writer_that_fails_is_left_out(tmp_path, capsys, monkeypatch):
    def broken(out, config):
        def write(row): raise OSError('the dashboard is away')
        return write
    monkeypatch.setitem(__import__('clipa_nb.engine.logs').engine.logs.WRITERS, 'tensorboard', broken)
    log = Log(tmp_path / 'metrics.jsonl', also=writers('tensorboard', tmp_path, {}))
    log(step=1); log(step=2)
    assert capsys.readouterr().err.count('the dashboard is away') == 1 and len(read_log(log.path)) == 2

# ---- progress ----

def test_without_a_terminal_a_line_now_and_then():
    file = io.StringIO()
    with Progress(4, start=1, name='short', every=1000., file=file) as tell:
        tell(1); tell(1, 'loss 2'); tell(1, 'loss 1')
    lines = file.getvalue().splitlines()
    assert len(lines) == 2 and lines[0].startswith('short: step 3 of 4, ') and lines[1].endswith('0:00:00 left, loss 1')
    with Progress(4, quiet=True, file=file) as tell: tell(4, 'loss 1')
    assert len(file.getvalue().splitlines()) == 2
