#!/usr/bin/env python
"""Which image strategy learns most from 16 of 64 tokens? Appends one row a run to nbs/results/tokens.jsonl; chapter 05 draws them.

    python tests/bench/tokens.py              all runs that are not recorded yet, seed by seed (about 1 CPU-minute each)
    python tests/bench/tokens.py --seeds 1    one seed only
    python tests/bench/tokens.py --cost       how much faster are the published token counts? (about 1 CPU-minute)

Every runner is the toy recipe's model on the same pictures in the same order, each seen once; the image strategy is all that differs.
'none' sees all 64 tokens, for as many floating-point operations of the image tower as the others. There is no second stage.
Rows call this recipe 'toy-race'; `seconds` is wall time of the training.
"""
import argparse, json, os, platform, statistics, subprocess, sys, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import cpu_name
from clipa_nb.clip import build_clip
from clipa_nb.core import autocast, pick_precision, seed_everything
from clipa_nb.cost import SIZES, tower_flops
from clipa_nb.infonce import Contrastive
from clipa_nb.optimization import make_optimizer, set_lr, warmup_cosine
from clipa_nb.recipes import TOY, toy_world
from clipa_nb.app.exam import toy_sets
from clipa_nb.token_dropping import TokenDrop, n_keep, resize, resize_for
from clipa_nb.tokenizer import train_wordpiece
from clipa_nb.toyworld import TEMPLATES, caption_text, class_names, render, scenes
from clipa_nb.transformer import Encoder
from clipa_nb.engine.asking import batched
from clipa_nb.zero_shot import text_head, zero_shot

OUT = ROOT / 'nbs' / 'results' / 'tokens.jsonl'
RUNNERS, STEPS, BATCH, SIZE = ('resize', 'random', 'block', 'grid', 'none'), 400, 128, 64
DEVICE = torch.device('cpu'); PRECISION = pick_precision('auto', DEVICE)

def about(): # what every row says of its surroundings
    sha = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude', '*'], capture_output=True, text=True, check=True).stdout.strip()
    return dict(git_sha=sha, hardware=f'{cpu_name()}, {platform.machine()}', torch=torch.__version__, threads=1)

def done(): return [json.loads(l) for l in OUT.read_text().splitlines()] if OUT.exists() else []
def append(**r):
    OUT.parent.mkdir(exist_ok=True)
    with open(OUT, 'a') as f: f.write(json.dumps(r) + '\n')

def model_for(strategy):
    "The toy model whose image tower sees 16 tokens in one of four ways, or all of them."
    cfg = TOY.model.replace(image_size=resize_for(16, TOY.model.patch) if strategy == 'resize' else SIZE)
    return build_clip(cfg if strategy in ('resize', 'none') else cfg.replace(image_strategy=strategy, image_ratio=0.75))

def train(model, pairs, steps):
    "One cosine over the first `steps` batches."
    objective, optimizer, size = Contrastive(), make_optimizer(model, 1.5e-3, 0.1), model.cfg.image_size
    model.train()
    for step in range(steps):
        image, text = pairs(step * BATCH)
        set_lr(optimizer, warmup_cosine(step, steps, 50, 1.5e-3))
        batch = dict(image=image if size == SIZE else resize(image, size), text=text)
        with autocast(PRECISION, DEVICE): loss = objective.loss(objective.features(model, batch), model, batch)['loss']
        optimizer.zero_grad(); loss.backward(); optimizer.step()

@torch.no_grad()
def exam(model, tokenizer, sets):
    "Zero-shot top-1 among all 144 pairs, for seen and held-out ones, at the size the model is trained for."
    model.eval(); head = text_head(model, tokenizer, class_names('pairs'), TEMPLATES, classes_per_batch=None); out = {}
    for split in ('seen', 'heldout'):
        image = sets[split]['image']; image = image if model.cfg.image_size == SIZE else resize(image, model.cfg.image_size)
        out[split] = round(zero_shot(model, batched(image, sets[split]['label'], 250), head, ks=(1,))['top1'], 4)
    return out

def race(seeds, only):
    "Seed by seed, so that whatever is recorded when we stop is a fair comparison."
    world = toy_world(TOY.data)
    for seed in range(seeds):
        tokenizer = train_wordpiece(caption_text(scenes(world, seed, range(5_000))), TOY.model.vocab_size, TOY.model.context_length)
        sets = toy_sets(TOY.data, SIZE, seed, n_pairs=1, shifts=())
        def pairs(first): part = scenes(world, seed, range(first, first + BATCH)); return render(part, SIZE), tokenizer(caption_text(part), TOY.model.context_length)
        for strategy in only or RUNNERS:
            if any(r['what'] == 'race' and (r['strategy'], r['seed']) == (strategy, seed) for r in done()): continue
            seed_everything(seed); start, began = time.process_time(), time.perf_counter(); model = model_for(strategy); t = TOY.model.image
            steps = STEPS if strategy != 'none' else round(STEPS * tower_flops(t, 16) / tower_flops(t, 64))
            train(model, pairs, steps)
            spent = dict(seconds=round(time.perf_counter() - began, 1), cpu_seconds=round(time.process_time() - start, 1))
            append(what='race', recipe='toy-race', strategy=strategy, seed=seed, **about(), precision=PRECISION, batch=BATCH, steps=steps, **spent, metrics=exam(model, tokenizer, sets))

def cost():
    "A training step of four layers of L/16, random dropping included, at the token counts of the papers."
    t, grid, batch = SIZES['L/16'].image.replace(depth=4), (14, 14), 8
    encoder, x = Encoder(t.width, t.depth, t.heads, t.mlp), torch.randn(batch, 197, t.width)
    ratios = {r: n_keep('random', grid, r) + 1 for r in (0., 0.4875, 0.75, 0.816, 0.917)}
    def seconds(r):
        drop, start = TokenDrop('random' if r else 'none', r, n_prefix=1), time.process_time()
        encoder(drop(x, grid)[0]).sum().backward()
        return time.process_time() - start
    times = [[seconds(r) for r in ratios] for _ in range(6)][1:]
    median = [statistics.median(c) for c in zip(*times)]
    append(what='cost', **about(), precision='fp32', size='L/16', layers=t.depth, batch=batch, tokens=list(ratios.values()), cpu_seconds=[round(m, 4) for m in median],
           predicted=[round(tower_flops(t, 197) / tower_flops(t, n), 3) for n in ratios.values()], measured=[round(median[0] / m, 3) for m in median])

if __name__ == '__main__':
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, default=3); ap.add_argument('--only', nargs='*', choices=RUNNERS, help='some of the runners'); ap.add_argument('--cost', action='store_true')
    a = ap.parse_args(); torch.set_num_threads(1)
    cost() if a.cost else race(a.seeds, a.only)
