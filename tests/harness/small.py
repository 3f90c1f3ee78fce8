#!/usr/bin/env python
"""A small trained model and small test sets in the layouts of other people's harnesses: `python tests/harness/small.py FOLDER`.

FOLDER/model        our directory, which open_clip loads (CLIP's own vocabulary, which open_clip's package brings)
FOLDER/digits       CLIP_benchmark's webdataset layout: 600 handwritten digits of scikit-learn
FOLDER/photographs  the same layout: 180 crops of nine photographs that ship with scikit-image
FOLDER/toys         the same layout, retrieval: 150 toy scenes with one to three captions, some of which are the same
FOLDER/sugar_crepe  SugarCrepe's layout: 120 of these scenes and captions of another colour (add_att.json) or in another order (swap_att.json)
FOLDER/suite.json   all of them, for `clipa eval --suite`

The model has seen toy scenes only: its numbers are far from good, and far from all equal. What counts is that everybody finds the same ones.
"""
import io, json, os, sys, tarfile
from pathlib import Path
import numpy as np, torch
from PIL import Image
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

def vocabulary() -> Path:
    "CLIP's merges, from open_clip's package."
    import importlib.util
    folder = Path(importlib.util.find_spec('open_clip').origin).parent
    os.environ['CLIPA_VOCABULARIES'] = str(folder)
    return folder

def model(folder: Path, steps: int = 120):
    from clipa_nb.clip import ModelConfig, build_clip
    from clipa_nb.cost import Tower
    from clipa_nb.infonce import info_nce
    from clipa_nb.optimization import make_optimizer, set_lr, warmup_cosine
    from clipa_nb.pretrained import save_pretrained
    from clipa_nb.tokenizer import load_tokenizer
    from clipa_nb.toyworld import WORLDS, caption_text, render, scenes
    tok = load_tokenizer('clip', mode='open_clip') if 'mode' in load_tokenizer.__code__.co_varnames else load_tokenizer('clip')
    torch.manual_seed(0)
    cfg = ModelConfig(image=Tower(64, 2, 4, 256), text=Tower(64, 1, 4, 256), embed_dim=64, image_size=32, patch=8, context_length=24, vocab_size=49408,
                      resize_mode='shortest')
    net = build_clip(cfg)
    world, optimizer = WORLDS['demo'], make_optimizer(net, 2e-3, weight_decay=0.1)
    for step in range(steps):
        set_lr(optimizer, warmup_cosine(step, steps, 10, 2e-3))
        part = scenes(world, 0, range(step * 64, step * 64 + 64))
        image, text = net.encode_image(render(part, 32), normalize=True), net.encode_text(tok(caption_text(part), 24), normalize=True)
        optimizer.zero_grad(); info_nce(image, text, net.logit_scale.exp())['loss'].backward(); optimizer.step()
    save_pretrained(net.eval(), folder, tokenizer=tok)

def png(x) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(x)).save(buffer, 'PNG')
    return buffer.getvalue()

def shards(folder: Path, rows, kind: str = '', names=(), templates=()):
    "CLIP_benchmark's layout; `rows` are dicts of members."
    (folder / 'test').mkdir(parents=True)
    with tarfile.open(folder / 'test/0.tar', 'w') as tar:
        for i, members in enumerate(rows):
            for ending, data in members.items():
                info = tarfile.TarInfo(f's{i:04d}.{ending}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    (folder / 'test/nshards.txt').write_text('1')
    for name, lines in (('classnames.txt', names), ('zeroshot_classification_templates.txt', templates), ('dataset_type.txt', [kind] if kind else [])):
        if lines: (folder / name).write_text('\n'.join(lines))

def make(root: Path):
    from skimage import data
    from sklearn.datasets import load_digits
    from clipa_nb.toyworld import COLOURS, WORLDS, caption_text, render, scenes
    root.mkdir(parents=True, exist_ok=True)
    vocabulary()
    model(root / 'model')
    digits = load_digits()
    rows = [dict(png=png(np.kron(x * (255 / 16), np.ones((6, 6))).astype(np.uint8)), cls=str(y).encode()) for x, y in zip(digits.images[:600], digits.target)]
    words = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
    shards(root / 'digits', rows, names=words, templates=['a photo of the number {c}.', 'a {c}'])
    photos = dict(astronaut='an astronaut', camera='a photographer', coffee='a cup of coffee', chelsea='a cat', coins='old coins', rocket='a rocket', page='a printed page', moon='the moon', hubble_deep_field='many galaxies')
    g, rows = np.random.default_rng(0), []
    for label, name in enumerate(photos):
        try: x = getattr(data, name)()
        except Exception: continue # not in the wheel
        for _ in range(20):
            h, w = (int(g.uniform(0.4, 0.95) * s) for s in x.shape[:2])
            i, j = (int(g.uniform(0, s - t)) for s, t in zip(x.shape, (h, w)))
            rows.append(dict(png=png(x[i:i + h, j:j + w]), cls=str(label).encode()))
    shards(root / 'photographs', rows, names=list(photos.values()), templates=['a photo of {c}.'])
    part = scenes(WORLDS['demo'], 1, range(150), 'val')
    x, text = render(part, 48).permute(0, 2, 3, 1).numpy(), caption_text(part)
    rows = [dict(png=png(x[i]), txt='\n'.join([text[i], text[i - 1], text[i]][:i % 3 + 1]).encode()) for i in range(150)]
    shards(root / 'toys', rows, kind='retrieval')
    crepe = root / 'sugar_crepe'
    (crepe / 'val2017').mkdir(parents=True)
    hues, two = list(COLOURS), {}
    for i in range(120):
        (crepe / f'val2017/{i:06d}.png').write_bytes(png(x[i]))
        found = next((h for h in hues if f' {h} ' in f' {text[i]} '), None)
        other = text[i].replace(found, hues[(hues.index(found) + 1) % len(hues)]) if found else f'a {text[i]}'
        for task, wrong in (('add_att', other), ('swap_att', ' '.join(text[i].split()[::-1]))):
            two.setdefault(task, {})[str(i)] = dict(filename=f'{i:06d}.png', caption=text[i], negative_caption=wrong)
    for task, found in two.items(): (crepe / f'{task}.json').write_text(json.dumps(found))
    sets = [dict(path=p) for p in ('digits', 'photographs', 'toys', 'sugar_crepe/add_att.json', 'sugar_crepe/swap_att.json')]
    (root / 'suite.json').write_text(json.dumps(sets))

if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
