"""What wording, averaging and seeds do to a small model's zero-shot scores: `python tests/bench/zero_shot.py [SEED …]`.

Each seed trains the small model of chapter 15 and adds one row to nbs/results/zero_shot.jsonl: top-1 of seen and held-out pairs, of their
colours and shapes, of 18 wordings one by one, and of ensembles of 1 … 12 of them (100 draws each, of which the mean, the worst and the best are kept).
"""
import json, subprocess, sys, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clipa_nb.clip import ModelConfig, build_clip
from clipa_nb.cost import Tower
from clipa_nb.engine.asking import batched
from clipa_nb.infonce import info_nce
from clipa_nb.optimization import make_optimizer, set_lr, warmup_cosine
from clipa_nb.tokenizer import train_wordpiece
from clipa_nb.toyworld import TEMPLATES, WORLDS, caption_text, class_names, class_scenes, pairs, render, scenes
from clipa_nb.zero_shot import accuracy, class_vectors, confusion, text_head

ROOT = Path(__file__).resolve().parents[2]
WORDINGS = [f'{a}{size}{{}}{where}' for a in ('', 'a ') for size in ('', 'large ', 'medium ')
            for where in ('', ' on a dark background', ' on a light background')]
SIZES, DRAWS, STEPS, BATCH = (1, 2, 3, 4, 6, 8, 12), 100, 360, 96

def trained(seed, world, tok):
    torch.manual_seed(seed)
    model = build_clip(ModelConfig(image=Tower(64, 2, 4, 256), text=Tower(64, 1, 4, 256), embed_dim=64, image_size=32, patch=8, context_length=10,
                                   vocab_size=tok.vocab_size, cls=False, pool='avgmax', init='small'))
    optimizer = make_optimizer(model, 2e-3, weight_decay=0.1)
    for step in range(STEPS):
        set_lr(optimizer, warmup_cosine(step, STEPS, 20, 2e-3))
        seen = scenes(world, seed, range(step * BATCH, (step + 1) * BATCH))
        images, ids = render(seen, 32), tok(caption_text(seen))
        loss = info_nce(model.encode_image(images, normalize=True), model.encode_text(ids, normalize=True), model.logit_scale.exp())['loss']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), float(loss)

def measured(seed):
    start = time.process_time()
    world = WORLDS['demo'].replace(n_objects=(1.,), size_1=(18., 25.), jitter_1=2., rotation=15.)
    tok = train_wordpiece(caption_text(scenes(world, 0, range(2000))), vocab_size=256, context_length=10)
    model, loss = trained(seed, world, tok)
    names, every, sets = class_names('pairs'), pairs('all'), {}
    for split, n in (('seen', 4), ('heldout', 8)):
        part, label = class_scenes(world, 1, split, n)
        sets[split] = render(part, 32), torch.as_tensor(np.asarray(label))
    head = text_head(model, tok, names, TEMPLATES)
    c_MM = confusion(model, [b for x, y in sets.values() for b in batched(x, y, 250)], head)
    colour_M, shape_M = ([sorted({p[i] for p in every}).index(p[i]) for p in every] for i in (0, 1))
    top = {}
    for split in sets:
        ids = [every.index(p) for p in pairs(split)]
        top[split] = dict(both=accuracy(c_MM, ids), colour=accuracy(c_MM, ids, colour_M), shape=accuracy(c_MM, ids, shape_M))
    x, y = sets['seen']
    with torch.no_grad():
        image_BE = F.normalize(model.encode_image(x), dim=-1)
        z_MLE = torch.stack([class_vectors(model, tok, names, t) for t in WORDINGS], 1)
    def ensemble(chosen): return float(((image_BE @ F.normalize(z_MLE[:, list(chosen)].mean(1), dim=1).T).argmax(1) == y).float().mean())
    alone = {w: ensemble([k]) for k, w in enumerate(WORDINGS)}
    rng, spread = np.random.default_rng(seed), {}
    for n in SIZES:
        draws = [ensemble(rng.permutation(len(WORDINGS))[:n]) for _ in range(DRAWS)]
        spread[n] = dict(mean=float(np.mean(draws)), worst=min(draws), best=max(draws))
    return dict(kind='wordings', seed=seed, loss=round(loss, 4), n=len(y), top1=top, alone=alone, ensembles=spread, all=ensemble(range(len(WORDINGS))),
                cpu_seconds=round(time.process_time() - start, 1))

if __name__ == '__main__':
    torch.set_num_threads(1)
    sys.path.insert(0, str(ROOT / '.ci'))
    from record import cpu_name
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for seed in map(int, sys.argv[1:] or (0, 1, 2)):
        row = dict(git_sha=sha, date=time.strftime('%Y-%m-%d'), hardware=cpu_name(), torch=torch.__version__, threads=1, **measured(seed))
        with open(ROOT / 'nbs' / 'results' / 'zero_shot.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')
        print(json.dumps(row), flush=True)
