#!/usr/bin/env python
"""What does a small picture still hold? Kernel classifiers on pixels, for each image size and each size of the object.

    python nbs/exp/oracle.py      three seeds, appended to nbs/results/oracle.jsonl (about one CPU-minute)

A network that fails where such a classifier succeeds has not learnt what the pixels hold; where both fail, the picture
may not hold it. Objects are alone, nearly centred and, for the question of shape, yellow on a dark ground. Pictures are
drawn at 64 pixels and made smaller as in training. The classifiers are ridge regressions with a Gaussian kernel: for
shape on the cut-out object, brought to 16 × 16 pixels; for the fill on the logarithm of its Fourier spectrum.
"""
import math
import numpy as np
import torch
import lab
from clipa_nb.token_dropping import resize
from clipa_nb.toyworld import COLOURS, N_PAIRED, WORLDS, render, scenes

PIXELS, HALVES = (16, 24, 32, 48, 64), (3, 4, 6, 8, 10, 13, 17, 21, 25)
TRAIN, TEST = 900, 300 # pictures

def drawn(half, n, seed, about):
    "Scenes of one object of one half-size, and what is asked of them."
    world = WORLDS['demo'].replace(n_objects=(1.,), size_1=(half, half), jitter_1=1., fills=(1., 1., 1.) if about == 'fill' else (1., 0., 0.))
    sc = scenes(world, seed, range(n), 'val')
    if about == 'fill': return sc, torch.from_numpy(sc.fill[:, 0])
    kind = np.arange(n)[:, None] % N_PAIRED
    yellow = np.full_like(kind, list(COLOURS).index('yellow'))
    dark = np.full((n, 3), 40, np.float32)
    return sc.replace(kind=kind, colour=yellow, dark=np.ones(n, bool), level=dark), torch.from_numpy(kind[:, 0])

def cut_out(images, half):
    "The square around the object."
    px = images.shape[-1]
    r = min(px // 2, math.ceil((half + 3) * px / 64) + 1)
    return images[:, :, px // 2 - r:px // 2 + r, px // 2 - r:px // 2 + r].float()

def shape_features(x): # [n,3,s,s] → [n,256]
    "How yellow each pixel is, brought to one size and one norm."
    x = torch.nn.functional.interpolate((x[:, 1] - x[:, 2])[:, None], size=(16, 16), mode='bilinear', antialias=True).flatten(1)
    x = x - x.mean(1, keepdim=True)
    return 4 * x / x.norm(dim=1, keepdim=True)

def fill_features(x): # [n,3,s,s] → [n,144]
    "The spectrum of the distance from the mean colour."
    g = (x - x.mean((2, 3), keepdim=True)).norm(dim=1)
    f = torch.log1p(torch.fft.rfft2(g).abs())
    return torch.nn.functional.interpolate(f[:, None], size=(16, 9), mode='bilinear').flatten(1)

FEATURES = dict(shape=shape_features, fill=fill_features)

def accuracy(about, half, px, seed) -> float:
    "Share of test pictures that the classifier names."
    parts = []
    for n, s in ((TRAIN, 2 * seed), (TEST, 2 * seed + 1)):
        sc, label = drawn(half, n, s, about)
        parts.append((FEATURES[about](cut_out(resize(render(sc, 64), px), half)), label))
    (a, ya), (b, yb) = parts
    if about == 'fill': a, b = ((x - parts[0][0].mean(0)) / (parts[0][0].std(0) + 1e-3) / a.shape[1] ** 0.5 for x in (a, b))
    targets = torch.eye(int(ya.max()) + 1)[ya]
    targets = targets - targets.mean(0)
    weights = torch.linalg.solve(torch.exp(-torch.cdist(a, a) ** 2 / 2) + 1e-2 * torch.eye(len(a)), targets)
    return float(((torch.exp(-torch.cdist(b, a) ** 2 / 2) @ weights).argmax(1) == yb).float().mean())

def main(seeds=(0, 1, 2)):
    torch.set_num_threads(1)
    path = lab.RESULTS / 'oracle.jsonl'
    done = {(r['about'], r['pixels'], r['seed']) for r in lab.recorded(path)}
    for seed in seeds:
        for about in FEATURES:
            for px in PIXELS:
                if (about, px, seed) in done: continue
                got = {str(h): round(accuracy(about, h, px, seed), 4) for h in HALVES}
                lab.record(path, dict(about=about, pixels=px, seed=seed, **lab.about(), top1=got))
                print(about, px, seed, got, flush=True)

if __name__ == '__main__': main()
