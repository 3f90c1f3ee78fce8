"Checkpoints are whole or absent, damaged ones are passed over, and a log never repeats a step."
import hashlib, json, os
import pytest, torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from clipa_nb.core import UserError
from clipa_nb.engine.checkpoints import Checkpoints, Log, file_hash, flush_folder, model_weights, pack, read_log, unpack, write_json

def started():
    "A small task (model and objective), its optimiser, and a moving average of its model."
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    task = nn.ModuleDict(dict(model=model, objective=nn.Linear(3, 1)))
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return task, torch.optim.AdamW(task.parameters(), lr=1e-2), ema

def train(task, optimizer, ema, steps, first=0):
    "The last loss of a few steps."
    for s in range(first, first + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(s))
        loss = (task['objective'](task['model'](x)) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        ema.update_parameters(task['model'])
    return loss

def test_small_files(tmp_path):
    write_json(tmp_path / 'a.json', {'step': 2}); write_json(tmp_path / 'a.json', {'step': 3})
    assert [p.name for p in tmp_path.iterdir()] == ['a.json'] and json.loads((tmp_path / 'a.json').read_text()) == {'step': 3}
    assert file_hash(tmp_path / 'a.json') == hashlib.sha256(b'{\n "step": 3\n}').hexdigest()
    flush_folder(tmp_path)
    with pytest.raises(OSError, match='absent'): flush_folder(tmp_path / 'absent')

def test_a_restored_twin_takes_the_same_steps():
    run, twin = started(), started()
    train(*run, 3)
    packed = pack(*run)
    assert torch.equal(packed['model.0.weight'], run[0]['model'][0].weight) and torch.equal(packed['objective.bias'], run[0]['objective'].bias)
    assert packed['model.0.weight'].data_ptr() != run[0]['model'][0].weight.data_ptr() # a copy
    assert {'optimizer.exp_avg.0.weight', 'optimizer.exp_avg_sq.objective.weight', 'ema.n_averaged', 'ema.module.1.running_mean'} <= set(packed)
    unpack(packed, *twin)
    assert torch.equal(train(*run, 2, 3), train(*twin, 2, 3))
    a, b = pack(*run), pack(*twin)
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)

def test_each_part_of_a_pack_is_optional():
    task, optimizer, ema = started()
    train(task, optimizer, ema, 2)
    assert {k.partition('.')[0] for k in pack(task)} == {'model', 'objective'}
    weights, _, fresh = started()
    unpack(pack(task, optimizer, ema), weights) # the weights alone
    assert torch.equal(weights['objective'].weight, task['objective'].weight)
    unpack(pack(task, optimizer), weights, ema=fresh) # a run that kept no average: it begins here
    assert int(fresh.n_averaged) == 0

def test_the_weights_to_evaluate_are_the_average_where_there_is_one():
    task, optimizer, ema = started()
    train(task, optimizer, ema, 2)
    plain, averaged = model_weights(pack(task, optimizer)), model_weights(pack(task, optimizer, ema))
    assert set(plain) == set(averaged) == set(task['model'].state_dict())
    assert torch.equal(plain['0.weight'], task['model'][0].weight) and torch.equal(averaged['0.weight'], ema.module[0].weight)
    assert not torch.equal(plain['0.weight'], averaged['0.weight'])

def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert Checkpoints(tmp_path / 'nothing').latest() is None
    saved, tensors = Checkpoints(tmp_path / 'run', keep=2), pack(started()[0])
    for step in (10, 20, 30): assert saved.save(step, tensors, {'stage': 0}).name == f'step_{step:08d}'
    assert [p.name for p in saved.steps()] == ['step_00000020', 'step_00000030'] and saved.latest()[1]['step'] == 30
    weights = saved.steps()[-1] / 'tensors.safetensors'
    raw = bytearray(weights.read_bytes()); raw[-1] ^= 1; weights.write_bytes(raw)
    with pytest.warns(UserWarning, match='the hash of the tensors does not match; taking an older checkpoint'): assert saved.latest()[1]['step'] == 20
    (saved.steps()[0] / 'state.json').write_text('{')
    with pytest.warns(UserWarning, match='taking an older checkpoint'): assert saved.latest() is None
    saved.save(20, tensors, {'stage': 1}) # over a damaged one
    with pytest.warns(UserWarning, match='hash'): assert saved.latest()[1] == dict(stage=1, step=20, sha256=file_hash(saved.steps()[0] / 'tensors.safetensors'))
    (saved.folder / '.tmp_00000040').mkdir(); saved.save(50, tensors, {}) # a killed save leaves nothing that counts
    assert sorted(p.name for p in saved.folder.iterdir()) == ['step_00000030', 'step_00000050']

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
