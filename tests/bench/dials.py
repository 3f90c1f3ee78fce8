#!/usr/bin/env python
"""What does each dial of the toy world do to what is learned? Appends one row a run to nbs/results/toyworld.jsonl.

    python tests/bench/dials.py                 all runs that are not recorded yet, one after another (about 2 CPU-minutes each)
    python tests/bench/dials.py --part 0 --of 2 every second one, to share them between two cores

Every run is the toy recipe, shortened, with one thing changed; nothing else differs from `clipa train toy`.
"""
import argparse, json, subprocess, sys, tempfile
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import row
from clipa_nb.app.run import Options, run
from clipa_nb.core import LOCAL
from clipa_nb.recipes import TOY

base = dict(TOY.data.dials)
RICH = dict(say_size=0.5, say_place=0.5, say_relation=0.7, say_shade=0.4, say_ground=0.4, filler=0.3, synonyms=0.4, orders=0.4)
RUNS = [  # dial, value, world, changes to its dials, how many times longer
    ('half-size of a lone object', '11–25', 'demo', {}), ('half-size of a lone object', '8–16', 'demo', dict(size_1=(8., 16.))), ('half-size of a lone object', '5–9', 'demo', dict(size_1=(5., 9.))),
    ('jitter of a lone object', '4', 'demo', {}), ('jitter of a lone object', '12', 'demo', dict(jitter_1=12.)), ('jitter of a lone object', '22', 'demo', dict(jitter_1=22.)),
    ('captions', 'demo', 'demo', {}), ('captions', 'rich', 'demo', RICH),
    ('world', 'demo', 'demo', {}), ('world', 'rich', 'rich', None), ('world', 'scattered', 'scattered', None),
    ('share of glyph scenes', '0', 'demo', dict(glyphs=0.)), ('share of glyph scenes', '0.1', 'demo', {}), ('share of glyph scenes', '0.4', 'demo', dict(glyphs=0.4)),
    ('colour is named', '1', 'demo', dict(say_colour=1.)), ('colour is named', '0.9', 'demo', {}), ('colour is named', '0.6', 'demo', dict(say_colour=0.6)),
    ('fills', 'plain', 'demo', {}), ('fills', 'half', 'demo', dict(fills=(0.5, 0.25, 0.25))),
    ('view', 'demo', 'demo', {}), ('view', 'turned ±90°', 'demo', dict(rotation=90.)), ('view', 'grain 30', 'demo', dict(noise=30.)), ('view', 'pale', 'demo', dict(contrast=(0.2, 0.6))), ('view', 'specks', 'demo', dict(clutter=6)),
    ('length of a run', 'rich', 'rich', None), ('length of a run', 'rich, 3 ×', 'rich', None, 3),
]
SHORT = {'class_top1': 'val/seen-zeroshot-val-top1', 'heldout': 'val/heldout-zeroshot-val-top1', 'shape': 'val/shape-zeroshot-val-top1', 'colour': 'val/colour-zeroshot-val-top1', 'r1': 'val/image_to_text_R@1'}

def recipe(world, changes, times=1):
    dials = () if changes is None else tuple({**base, **changes}.items())
    return TOY.replace(name='toy-short', data=TOY.data.replace(name=world, dials=dials)).with_stages({'samples': 76_800 * times}, {'samples': 19_200 * times})

def key(world, changes, times=1): return json.dumps([world, recipe(world, changes).data.to_dict()['dials'], *([times] if times > 1 else [])])

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--part', type=int, default=0); ap.add_argument('--of', type=int, default=1); ap.add_argument('--seed', type=int, default=0); ap.add_argument('--reverse', action='store_true', help='begin with the last')
    a = ap.parse_args(); torch.set_num_threads(1)
    out = ROOT / 'nbs' / 'results' / 'toyworld.jsonl'; out.parent.mkdir(exist_ok=True)
    unique = list({key(*setting): setting for _, _, *setting in RUNS}.items())
    for k, setting in unique[a.part::a.of][::-1 if a.reverse else 1]:
        done = [json.loads(l) for l in out.read_text().splitlines()] if out.exists() else []
        missing = [(dial, value) for dial, value, *other in RUNS if key(*other) == k and not any((r['dial'], r['value'], r['seed']) == (dial, value, a.seed) for r in done)]
        if not missing: continue
        found = next((r for r in done if r['data'] == k and r['seed'] == a.seed), None)
        if found is None:
            with tempfile.TemporaryDirectory() as folder:
                run(recipe(*setting), Options(out=f'{folder}/run', seed=a.seed, device='cpu', workers=0), LOCAL)
                found = row(Path(folder) / 'run')
            found['metrics'] = {n: found['metrics'][m] for n, m in SHORT.items()}; found.pop('curve'); found.pop('stages')
        with open(out, 'a') as f: f.writelines(json.dumps({**found, 'dial': dial, 'value': value, 'data': k}) + '\n' for dial, value in missing)

if __name__ == '__main__': main()
