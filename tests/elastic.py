"""A run that is killed and goes on with other ranks and workers, beside one that nobody disturbs.

    python tests/elastic.py FOLDER

Ranks are processes that meet as under torchrun. Each writes down what it consumed at each step; rank 0 keeps a checkpoint every three steps.
"""
import json, os, signal, socket, sys, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import torch
import torch._dynamo # forked ranks inherit it
from clipa_nb.clip import ModelConfig, build_clip
from clipa_nb.core import keyed_uniform
from clipa_nb.cost import Tower
from clipa_nb.data import Batches, loader, positions
from clipa_nb.distributed_trainer import connect
from clipa_nb.engine.checkpoints import pack, unpack
from clipa_nb.engine.index import Shards
from clipa_nb.engine.pictures import Transform, jpeg
from clipa_nb.engine.shards import write_shards
from clipa_nb.infonce import Contrastive
from clipa_nb.optimization import AdamW
from clipa_nb.trainer import Task, TrainConfig, fit

N, B, STEPS, DEAL = 300, 24, 40, dict(lanes=8, block=8, window=2) # three epochs; 3 ranks do not divide the lanes

def words(texts, context_length=None, strategy=None, draw=None):
    "One id per letter, shuffled by each row's own draw."
    ids = torch.tensor([[1 + ord(c) % 48 for c in t[:6].ljust(6)] for t in texts])
    return ids.gather(1, keyed_uniform(draw, 'text', 6).argsort(dim=1, stable=True))

def draw_data(folder):
    g = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (N, 3, 20, 20), dtype=torch.uint8, generator=g)
    write_shards(((f'{i:05d}', jpeg(pictures[i]), f'{i * 7919 % 1000:03d}', {'label': i}) for i in range(N)), folder, per_shard=37)

def train(rank, size, workers, port, folder, out, phase):
    "One rank: from the newest checkpoint to the end."
    os.setpgid(0, 0)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    comm, tower, kept = connect('cpu'), Tower(16, 1, 2, 32), out / 'kept.pt'
    cfg = ModelConfig(image=tower, text=tower, embed_dim=8, image_size=16, patch=4, context_length=6, vocab_size=50, image_strategy='random', image_ratio=0.5)
    torch.manual_seed(0)
    task = Task(build_clip(cfg), Contrastive()).double().train()
    optimizer, consumed = AdamW().build(task, 1e-2), 0
    if kept.exists():
        state = torch.load(kept)
        unpack(state['tensors'], task, optimizer)
        consumed = state['consumed']
    data = Batches(Shards(folder, k=DEAL['block']), words, Transform(16, scale=(0.5, 1.)), B, seed=1, rank=rank, size=size, fields=('image', 'text', 'label'), deal=DEAL)
    start = consumed // B
    data.begin(start, consumed)
    lines = open(out / f'{phase}.{rank}.jsonl', 'w')
    def note(**row): print(json.dumps(row), file=lines, flush=True)
    def noted():
        for step, batch in enumerate(loader(data, start, STEPS, workers), start + 1):
            note(step=step, ids=batch['label'].tolist())
            yield batch
    def log(**row): note(step=row['step'], loss=row['train/loss'])
    def save(step):
        if rank: return
        torch.save(dict(tensors=pack(task, optimizer), consumed=step * B), out / 'kept.tmp')
        os.replace(out / 'kept.tmp', kept)
    fit(comm.wrap(task), task, noted(), optimizer, TrainConfig(steps=STEPS, lr=1e-2, log_every=1, save_every=3), start=start, comm=comm, log=log, save=save)

def until(ranks, log, steps):
    "Wait for a number of logged steps, then kill every process of every rank; with 0 wait for the end."
    deadline = time.monotonic() + 300
    while any(r.is_alive() for r in ranks) and time.monotonic() < deadline:
        if steps and log.exists() and log.read_bytes().count(b'loss') >= steps: break
        time.sleep(0.005)
    for r in ranks:
        if steps or r.is_alive():
            try: os.killpg(r.pid, signal.SIGKILL)
            except ProcessLookupError: pass
        r.join()
    if steps: return [r.exitcode for r in ranks]
    assert all(r.exitcode == 0 for r in ranks), [r.exitcode for r in ranks]

def run(phases, folder, out):
    out.mkdir()
    for phase, (size, workers, steps) in enumerate(phases):
        with socket.socket() as s:
            s.bind(('localhost', 0))
            port = s.getsockname()[1]
        ranks = [get_context('fork').Process(target=train, args=(r, size, workers, port, folder, out, phase)) for r in range(size)]
        for r in ranks: r.start()
        print(f'{size} ranks, {workers} workers:', 'exit codes', until(ranks, out / f'{phase}.0.jsonl', steps), flush=True)

def history(out):
    "{step: (loss, ids of the global batch)}: of the steps that were done twice after a kill, the last one."
    rows = {}
    for path in out.glob('*.jsonl'):
        phase, rank = map(int, path.stem.split('.'))
        for line in path.read_text().splitlines():
            try: row = json.loads(line)
            except ValueError: continue # torn by the kill
            rows.setdefault(row['step'], {}).setdefault(phase, {}).setdefault(rank, {}).update(row)
    found = {}
    for step, phases in rows.items():
        done = max(phase for phase, ranks in phases.items() if 'loss' in ranks.get(0, {}))
        ranks = phases[done]
        found[step] = (ranks[0]['loss'], [i for r in sorted(ranks) for i in ranks[r]['ids']])
    return found

def main(folder):
    folder.mkdir(exist_ok=True)
    draw_data(folder / 'data')
    run([(1, 0, 0)], folder / 'data', folder / 'undisturbed')
    run([(4, 0, 8), (2, 3, 9), (3, 1, 0)], folder / 'data', folder / 'killed') # steps after which all is killed; 0: to the end
    a, b = history(folder / 'undisturbed'), history(folder / 'killed')
    apart = max(abs(a[s][0] - b[s][0]) for s in a)
    ids = np.empty(STEPS * B, np.int64) # in the order of positions
    for s in sorted(b): ids[positions((s - 1) * B, B, DEAL['lanes'])] = b[s][1]
    print(json.dumps(dict(
        steps=[len(a), len(b)],
        same_batches=all(a[s][1] == b[s][1] for s in a),
        epochs=[len(set(ids[e * N:(e + 1) * N].tolist())) for e in range(len(ids) // N)],
        apart=apart,
        losses=[a[1][0], a[STEPS][0]],
    )))

if __name__ == '__main__': main(Path(sys.argv[1]))
