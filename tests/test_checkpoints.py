"Checkpoints are whole or absent, damaged ones are passed over, and a log never repeats a step."
import hashlib, json, os
import pytest, torch
from torch import nn
from clipa_nb.core import UserError
from clipa_nb.engine.checkpoints import Checkpoints, Log, file_hash, flush_folder, pack, read_log, unpack, write_json
from clipa_nb.optimization import make_optimizer

def trained(steps, model=None, optimizer=None, first=0):
    "A small model, its optimiser, and the last loss."
    if model is None:
        torch.manual_seed(0); model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    optimizer = optimizer or make_optimizer(model, lr=1e-2, weight_decay=0.1)
    loss = None
    for s in range(first, first + steps):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(s))
        optimizer.zero_grad(); loss = (model(x) - x.sum(1, keepdim=True)).square().mean(); loss.backward(); optimizer.step()
    return model, optimizer, loss

def test_small_files(tmp_path):
    write_json(tmp_path / 'a.json', {'step': 2}); write_json(tmp_path / 'a.json', {'step': 3})
    assert [p.name for p in tmp_path.iterdir()] == ['a.json'] and json.loads((tmp_path / 'a.json').read_text()) == {'step': 3}
    assert file_hash(tmp_path / 'a.json') == hashlib.sha256(b'{\n "step": 3\n}').hexdigest()
    flush_folder(tmp_path)
    with pytest.raises(OSError, match='absent'): flush_folder(tmp_path / 'absent')

def test_a_restored_twin_takes_the_same_step():
    model, optimizer, _ = trained(3)
    packed = pack(model, optimizer)
    assert 'optimizer.exp_avg.0.weight' in packed and torch.equal(packed['model.0.weight'], model[0].weight)
    assert packed['model.0.weight'].data_ptr() != model[0].weight.data_ptr() # a copy
    assert all(k.startswith('model.') for k in pack(model))
    twin, twin_optimizer, _ = trained(0)
    unpack(packed, twin, twin_optimizer)
    a, b = trained(1, model, optimizer, 3)[2], trained(1, twin, twin_optimizer, 3)[2]
    assert torch.equal(a, b)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values()): assert torch.equal(p, q)
    weights, _, _ = trained(0); unpack(packed, weights) # without an optimiser

def test_the_newest_whole_checkpoint_is_taken(tmp_path):
    assert Checkpoints(tmp_path / 'nothing').latest() is None
    saved, tensors = Checkpoints(tmp_path / 'run', keep=2), pack(trained(0)[0])
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
