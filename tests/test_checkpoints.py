"Checkpoints are whole or absent, cut over ranks, read back on any number of them; damaged ones are passed over."
import errno, hashlib, json, os, shutil, threading
import pytest, torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from clipa_nb.core import UserError
import clipa_nb.engine.checkpoints as module
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.checkpoints import CheckpointError, Checkpoints, Piece, file_hash, flush_folder, live_tensors, model_weights, own_pieces
from clipa_nb.engine.checkpoints import pack, table_of, uncovered, unpack, verify, write_json

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

# ---- the folder ----

def folder_of(tmp_path, steps=(10, 20, 30), keep=2):
    saved, tensors = Checkpoints(tmp_path / 'run', keep=keep), pack(*started())
    for step in steps: saved.save(step, tensors, {'stage': 0})
    saved.join()
    return saved, tensors

def flipped(path):
    raw = bytearray(path.read_bytes()); raw[-1] ^= 1; path.write_bytes(raw)

def names(folder): return sorted(p.name for p in folder.iterdir())

def test_the_newest_checkpoints_are_kept(tmp_path):
    assert Checkpoints(tmp_path / 'nothing').latest() is None
    saved, tensors = folder_of(tmp_path)
    assert names(saved.folder) == ['step_00000020', 'step_00000030']
    assert names(saved.folder / 'step_00000030') == ['manifest.json', 'shard-00001-model-00001-of-00001.safetensors', 'state.json']
    found = saved.latest()
    assert found.state == dict(stage=0, step=30) and saved.durable == 30
    read = found.tensors()
    assert set(read) == set(tensors) and all(torch.equal(read[k], tensors[k]) and read[k].dtype == tensors[k].dtype for k in tensors)
    assert set(found.tensors('objective.')) == {'objective.weight', 'objective.bias'}
    folder_of(tmp_path / 'more', keep=3); assert len(names(tmp_path / 'more' / 'run')) == 3

def test_a_checkpoint_restores_a_twin(tmp_path):
    run, twin = started(), started()
    train(*run, 3)
    saved = Checkpoints(tmp_path); saved.save(3, live_tensors(*run), {}); saved.join()
    saved.latest().load(*twin)
    assert torch.equal(train(*run, 2, 3), train(*twin, 2, 3))
    a, b = pack(*run), pack(*twin)
    assert set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)
    with pytest.raises(UserError, match=r'is \[8\] in the checkpoint and \[9\] here'): saved.latest().load(nn.ModuleDict(dict(model=nn.Sequential(nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3)), objective=nn.Linear(3, 1))))
    with pytest.raises(UserError, match='they belong to different recipes'): saved.latest().load(nn.ModuleDict(dict(model=nn.Linear(4, 8), objective=nn.Linear(3, 1))))

def test_what_is_saved_is_what_was_there_at_the_call(tmp_path, monkeypatch):
    "Training goes on while the thread writes."
    task, go, real = nn.Linear(3, 3), threading.Event(), module.write_shards
    monkeypatch.setattr(module, 'write_shards', lambda *a: (go.wait(20), real(*a))[1])
    before, saved = task.weight.detach().clone(), Checkpoints(tmp_path)
    saved.save(1, live_tensors(task), {})
    with torch.no_grad(): task.weight.zero_()
    assert not saved.join(0.05) and saved.steps() == []
    go.set(); assert saved.join() and torch.equal(saved.latest().tensors()['weight'], before)

def damages():
    def cut(p): p.write_bytes(p.read_bytes()[:-7])
    def gone(p): p.unlink()
    def empty(p): p.write_bytes(b'')
    def more(p): shutil.copy(p, p.with_name('shard-00009-model-00001-of-00001.safetensors'))
    for pattern in ('*.safetensors', 'state.json', 'manifest.json'):
        for f in (cut, gone, empty, flipped): yield pattern, f
    yield '*.safetensors', more

@pytest.mark.parametrize('pattern, damage', [*damages()], ids=lambda x: getattr(x, '__name__', x))
def test_every_damage_is_noticed(tmp_path, pattern, damage):
    saved, _ = folder_of(tmp_path)
    [file] = saved.steps()[-1].glob(pattern)
    damage(file)
    if pattern == 'manifest.json' and damage.__name__ == 'flipped': file.write_text(file.read_text().replace('a', 'b'))
    with pytest.warns(UserWarning, match=r'step_00000030 is damaged: .*; taking an older checkpoint'): assert saved.latest().state['step'] == 20

def test_all_damaged_stops_and_removes_nothing(tmp_path):
    saved, tensors = folder_of(tmp_path)
    for p in saved.steps(): flipped(next(p.glob('*.safetensors')))
    before = {p: p.stat().st_mtime_ns for p in saved.folder.rglob('*')}
    with pytest.warns(UserWarning, match='damaged'), pytest.raises(UserError, match='all 2 checkpoints are damaged: restore one of them'): saved.latest()
    assert {p: p.stat().st_mtime_ns for p in saved.folder.rglob('*')} == before

def test_a_damaged_newer_one_does_not_push_out_a_whole_older_one(tmp_path):
    saved, tensors = folder_of(tmp_path)
    flipped(next(saved.steps()[-1].glob('*.safetensors')))
    with pytest.warns(UserWarning, match='damaged'): saved.latest()
    saved.save(25, tensors, {}); saved.join()
    assert names(saved.folder) == ['step_00000020', 'step_00000025', 'step_00000030']
    saved.save(30, tensors, {'again': 1}); saved.join() # over the damaged one
    assert saved.latest().state == dict(step=30, again=1) and names(saved.folder) == ['step_00000025', 'step_00000030']

def test_remains_of_a_killed_save_count_for_nothing(tmp_path):
    saved, tensors = folder_of(tmp_path, steps=(10,))
    partial = saved.folder / '.tmp_00000040_abc'; shutil.copytree(saved.steps()[0], partial)
    assert saved.latest().state['step'] == 10
    saved.save(50, tensors, {}); saved.join()
    assert names(saved.folder) == ['step_00000010', 'step_00000050']
    (saved.steps()[-1] / 'manifest.json').unlink()
    with pytest.warns(UserWarning, match='no manifest.json, so it was never finished'): assert saved.latest().state['step'] == 10

def test_a_full_disk_ends_in_one_line_and_the_last_one_stands(tmp_path, monkeypatch):
    saved, tensors = folder_of(tmp_path)
    def full(*args): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(module, 'write_shards', full)
    saved.save(40, tensors, {}); saved.thread.join()
    with pytest.raises(CheckpointError, match='of step 40 was not written: No space left on device .*; the checkpoint of step 30 stands'): saved.poll()
    saved.poll(); assert names(saved.folder) == ['step_00000020', 'step_00000030'] and saved.latest().state['step'] == 30
    saved.save(50, tensors, {})
    with pytest.raises(CheckpointError, match='step 50'): saved.save(60, tensors, {}) # said by the next save too

@pytest.mark.skipif(not hasattr(os, 'geteuid') or os.geteuid() == 0, reason='root writes everywhere')
def test_a_read_only_folder(tmp_path):
    (tmp_path / 'run').mkdir(mode=0o500)
    saved = Checkpoints(tmp_path / 'run'); saved.save(1, pack(started()[0]), {})
    with pytest.raises(CheckpointError, match='Permission denied'): saved.join()

# ---- who writes what ----

def test_ranks_share_the_bytes():
    task, optimizer, ema = started(); train(task, optimizer, ema, 1)
    tensors = live_tensors(task, optimizer, ema)
    for size in (1, 2, 3, 7, 40):
        chunks, parts = {}, []
        for rank in range(size):
            mine = own_pieces(tensors, rank, size)
            assert len({p.name for p in mine}) == len(mine)
            parts.append(sum(p.tensor.nbytes for p in mine))
            for p in mine:
                whole = tensors[p.name]
                a = p.offset[0] if p.offset else 0
                assert torch.equal(p.tensor, whole[a:a + len(p.tensor)] if whole.ndim else whole)
                chunks.setdefault(p.name, []).append([list(p.offset), list(p.tensor.shape)])
        assert uncovered(table_of(tensors), chunks) == ''
        row = max(t[:1].nbytes if t.ndim else t.nbytes for t in tensors.values())
        assert max(parts) <= sum(parts) / size + row

def test_what_is_not_covered_is_said():
    table = {'a': ['float32', [4, 2]], 'b': ['int64', []]}
    whole = {'a': [[[0, 0], [3, 2]], [[3, 0], [1, 2]]], 'b': [[[], []]]}
    assert uncovered(table, whole) == ''
    assert '3 of 4 rows' in uncovered(table, dict(whole, a=whole['a'][:1]))
    assert 'rows 0 on' in uncovered(table, dict(whole, a=whole['a'][1:]))
    assert 'exactly once' in uncovered(table, dict(whole, a=[*whole['a'], [[2, 0], [2, 2]]]))
    assert 'exactly once' in uncovered(table, dict(whole, a=[[[0, 0], [4, 1]]]))
    assert '0 of 1 rows' in uncovered(table, {'a': whole['a']}) and 'c is not in' in uncovered(table, dict(whole, c=[]))

def test_large_states_are_cut_into_files(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'FILE_BYTES', 1000)
    tensors = {f't{i}': torch.randn(100 + i) for i in range(8)}
    saved = Checkpoints(tmp_path); saved.save(1, tensors, {}); saved.join()
    assert len([*saved.steps()[0].glob('*.safetensors')]) == 4
    read = saved.latest().tensors()
    assert all(torch.equal(read[k], v) for k, v in tensors.items())

def saved_by(comm, where, step, seed=0):
    task, optimizer, ema = started(); train(task, optimizer, ema, 2)
    saved = Checkpoints(where, comm=comm); saved.save(step, live_tensors(task, optimizer, ema), {'samples': 7})
    staged = sum(p.tensor.nbytes for p in own_pieces(live_tensors(task, optimizer, ema), comm.rank, comm.size))
    saved.join(); comm.barrier()
    return staged

def loaded_by(comm, where):
    twin = started()
    found = Checkpoints(where, comm=comm).latest(); found.load(*twin)
    return found.state, pack(*twin)

def test_any_number_of_ranks_reads_what_another_wrote(tmp_path):
    run = started(); train(*run, 2); want = pack(*run)
    for wrote in (1, 2, 3):
        where = tmp_path / str(wrote)
        staged = spawn(saved_by, wrote, where, 5)
        assert sum(staged) == sum(t.nbytes for t in want.values()) and len([*(where / 'step_00000005').glob('*.safetensors')]) == wrote
        for reads in (1, 2, 3):
            for state, got in spawn(loaded_by, reads, where):
                assert state == dict(step=5, samples=7) and set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)

def damaged_for_all(comm, where):
    import warnings
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        found = Checkpoints(where, comm=comm).latest()
    return found.state['step'], [str(w.message) for w in seen]

def test_every_shard_of_several_ranks_counts(tmp_path):
    "Deleting, cutting or altering any one shard is noticed, by all ranks, whichever of them looks at it."
    for step in (1, 2): spawn(saved_by, 3, tmp_path / 'a', step)
    for i in range(3):
        for damage in ('delete', 'cut', 'alter'):
            where = tmp_path / f'{i}{damage}'; shutil.copytree(tmp_path / 'a', where)
            file = sorted((where / 'step_00000002').glob('*.safetensors'))[i]
            if damage == 'delete': file.unlink()
            elif damage == 'cut': file.write_bytes(file.read_bytes()[:-1])
            else: flipped(file)
            for reads in ((1, 2) if damage == 'alter' else (1,)):
                answers = spawn(damaged_for_all, reads, where)
                assert {step for step, _ in answers} == {1} and any('step_00000002 is damaged' in t for _, told in answers for t in told)

def one_without_a_part(comm, where):
    saved = Checkpoints(where, comm=comm, patience=0.5)
    if comm.rank == 1: module.write_json = lambda *a: None # its note never comes
    saved.save(1, {'a': torch.ones(8)}, {})
    try: saved.join(); return ''
    except CheckpointError as e: return str(e)

def test_a_part_that_never_comes_is_no_checkpoint(tmp_path):
    said = spawn(one_without_a_part, 2, tmp_path / 'x')
    assert 'rank 1 left no part' in said[0] and Checkpoints(tmp_path / 'x').steps() == []

def elsewhere(comm, where):
    try: Checkpoints(where / str(comm.rank) if comm.rank else where, comm=comm).latest()
    except UserError as e: return str(e)

def test_ranks_that_see_different_folders_are_refused(tmp_path):
    spawn(saved_by, 1, tmp_path, 5)
    assert all('use a directory that all of them share' in said for said in spawn(elsewhere, 2, tmp_path))
