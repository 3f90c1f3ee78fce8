#!/usr/bin/env python
"""What chapter 16 concludes from: three seeds of chapter 15's small model, probed. Appends one row a seed to nbs/results/probes.jsonl.

    python tests/bench/probes.py [SEED …]      seeds 1, 2, 3 where none is given; about two minutes a seed, one thread

A seed decides the initialisation and the training pictures of two models, of 120 and of 360 steps. A row holds, of the longer one and of the same
model before training: the probes of four questions with the extremes of their three splits, the prompts' answers, few-shot curves from names, from
nothing and from names in the wrong order, calibration, choices between captions, and accuracies under six shifts (those of the shorter one too).
"""
import json, subprocess, sys, time
from pathlib import Path
import numpy as np, torch
from torch import nn
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / '.ci'), str(ROOT)]
from record import cpu_name
from clipa_nb.clip import ModelConfig, build_clip
from clipa_nb.cost import Tower
from clipa_nb.engine.asking import batched
from clipa_nb.engine.features import features
from clipa_nb.engine.fits import fit_ridge, fit_temperature
from clipa_nb.engine.suites import caption_choice
from clipa_nb.infonce import info_nce
from clipa_nb.optimization import make_optimizer, set_lr, warmup_cosine
from clipa_nb.probes import calibration, few_shot, linear_probe
from clipa_nb.tokenizer import train_wordpiece
from clipa_nb.toyworld import COLOURS, TEMPLATES, WORLDS, caption_text, class_names, class_scenes, pairs, render, scenes
from clipa_nb.zero_shot import linear, text_head, zero_shot

WORLD = WORLDS['demo'].replace(n_objects=(1.,), size_1=(18., 25.), jitter_1=2., rotation=15.)
TOK = train_wordpiece(caption_text(scenes(WORLD, 0, range(2000))), vocab_size=256, context_length=10)
CFG = ModelConfig(image=Tower(64, 2, 4, 256), text=Tower(64, 1, 4, 256), embed_dim=64, image_size=32, patch=8, context_length=10,
                  vocab_size=TOK.vocab_size, cls=False, pool='avgmax', init='small')
SHIFTS, SHOTS = ('sketch', 'palette', 'invert', 'blur', 'rotate', 'small'), (0, 1, 2, 4, 8)

def trained(seed, steps, b=96):
    torch.manual_seed(seed)
    model = build_clip(CFG)
    optimizer = make_optimizer(model, 2e-3, weight_decay=0.1)
    for step in range(steps):
        set_lr(optimizer, warmup_cosine(step, steps, 20, 2e-3))
        part = scenes(WORLD, 100 + seed, range(step * b, (step + 1) * b))
        image, text = model.encode_image(render(part, 32), normalize=True), model.encode_text(TOK(caption_text(part)), normalize=True)
        optimizer.zero_grad()
        info_nce(image, text, model.logit_scale.exp())['loss'].backward()
        optimizer.step()
    return model.eval()

def encoded(model, x): return features(model, [dict(image=part) for part in x.split(250)])['image']

def questions():
    spec, _ = class_scenes(WORLD, 2, 'seen', 8)
    asked = {'shape': spec.kind[:, 0], 'colour': spec.colour[:, 0], 'background': spec.dark * 1, 'side': (spec.x[:, 0] > 0) * 1}
    return render(spec, 32), {q: torch.as_tensor(np.asarray(y).astype(np.int64)) for q, y in asked.items()}

PROMPTS = {'shape': (class_names('shapes'), [f'a {c} {{}}' for c in COLOURS]), 'colour': (class_names('colours'), TEMPLATES),
           'background': (['light', 'dark'], ['a shape on a {} background'])}

def probed(model):
    x, asked = questions()
    z, even = encoded(model, x), torch.arange(len(x)) % 2 == 0
    got = {q: linear_probe((z[even], y[even]), (z[~even], y[~even])) for q, y in asked.items()}
    prompts = {q: zero_shot(model, batched(x[~even], asked[q][~even], 500), text_head(model, TOK, *p), (1,))['top1'] for q, p in PROMPTS.items()}
    return {q: {k: round(v, 4) for k, v in r.items() if k in ('top1', 'top1_min', 'top1_max', 'train_top1', 'l2')} for q, r in got.items()}, prompts

def shot_curves(model):
    spec, label = class_scenes(WORLD, 5, 'seen', 24)
    label, x = torch.as_tensor(np.unique(label, return_inverse=True)[1]), render(spec, 32)
    z, third = encoded(model, x), torch.arange(len(label)) % 3 == 0
    head = text_head(model, TOK, [' '.join(p) for p in pairs('seen')], TEMPLATES)
    wrong = linear(head.weight.detach().roll(5, 0))
    scale, out = model.logit_scale.exp().item(), {}
    for name, h in (('names', head), ('nothing', None), ('wrong names', wrong)):
        got = few_shot((z[~third], label[~third]), (z[third], label[third]), h, SHOTS, l2=(1e-3, 1e-2, 1e-1, 1.), scale=scale)
        out[name] = {k: [round(got[f'{n}-shot_{k}'], 4) for n in SHOTS] for k in ('top1', 'top1_min', 'top1_max', 'l2')}
        if name != 'wrong names': # what a fixed value, tuned for neither, would have said
            got = few_shot((z[~third], label[~third]), (z[third], label[third]), h, SHOTS, l2=1., scale=scale)
            out[name]['top1 at l2 = 1'] = [round(got[f'{n}-shot_top1'], 4) for n in SHOTS]
    got = few_shot((z[~third], label[~third]), (z[third], label[third]), None, SHOTS[1:], fit='lsr')
    out['least squares'] = {k: [None, *(round(got[f'{n}-shot_{k}'], 4) for n in SHOTS[1:])] for k in ('top1', 'top1_min', 'top1_max')}
    score, part = scale * z @ head.weight.detach().T, torch.arange(len(label)) % 3
    t = fit_temperature(score[part == 1], label[part == 1])
    sure = {k: calibration(score[part == 0], label[part == 0], temperature=v) for k, v in (('before', 1.), ('after', t))}
    return out, dict(temperature=round(t, 3), scale=round(scale, 1), **{k: {n: round(v, 4) for n, v in r.items()} for k, r in sure.items()})

def choices(model):
    spec = class_scenes(WORLD, 7, 'seen', 4)[0]
    x, colours, shapes = render(spec, 32), list(COLOURS), class_names('shapes')
    rows = list(zip(spec.colour[:, 0].tolist(), spec.kind[:, 0].tolist()))
    true = [f'a photo of a {colours[c]} {shapes[k]}' for c, k in rows]
    false = {'another colour': [f'a photo of a {colours[(c + 1) % len(colours)]} {shapes[k]}' for c, k in rows],
             'another shape': [f'a photo of a {colours[c]} {shapes[(k + 1) % 12]}' for c, k in rows],
             'the words reversed': [' '.join(t.split()[::-1]) for t in true]}
    text = {k: features(model, [dict(text=TOK(t))])['text'] for k, t in dict(false, true=true).items()}
    return {k: round(caption_choice(encoded(model, x), text['true'], text[k])['acc'], 4) for k in false}

def shifted(model, head):
    spec, y = class_scenes(WORLD, 3, 'seen', 4)
    y = torch.as_tensor(np.asarray(y))
    return {k or 'clean': round(zero_shot(model, batched(render(spec, 32, shift=k), y, 216), head, (1,))['top1'], 4) for k in (None, *SHIFTS)}, len(y)

def measured(seed):
    start = time.process_time()
    few, model = trained(seed, 120), trained(seed, 360)
    torch.manual_seed(seed)
    fresh = build_clip(CFG).eval()
    row = dict(seed=seed)
    row['probes'], row['prompts'] = probed(model)
    row['untrained'] = probed(fresh)[0]
    row['shots'] = list(SHOTS)
    row['few_shot'], row['calibration'] = shot_curves(model)
    row['choices'] = choices(model)
    def names(m): return text_head(m, TOK, class_names('pairs'), TEMPLATES)
    row['shifts'] = {steps: shifted(m, names(m))[0] for steps, m in (('120', few), ('360', model))}
    spec, y = class_scenes(WORLD, 4, 'seen', 8)
    row['shifts']['probe'], row['shifted_pictures'] = shifted(model, linear(*fit_ridge(encoded(model, render(spec, 32)), torch.as_tensor(np.asarray(y)), 144, 0.1)))
    return dict(row, cpu_seconds=round(time.process_time() - start, 1))

if __name__ == '__main__':
    torch.set_num_threads(1)
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for seed in map(int, sys.argv[1:] or (1, 2, 3)):
        row = dict(git_sha=sha, hardware=f'{cpu_name()}, one thread', torch=torch.__version__, threads=1, **measured(seed))
        with open(ROOT / 'nbs/results/probes.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')
        print(row, flush=True)
