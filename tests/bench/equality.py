"""The same numbers as CLIP_benchmark: `python tests/bench/equality.py PYTHON`, where PYTHON belongs to an environment with CLIP_benchmark.

Test sets in CLIP_benchmark's layout are made here: handwritten digits, crops of two photographs in every kind of file (palette, alpha, 16 bits,
CMYK, grey, one bit), pictures with several labels, pictures with one to five captions. A small model, taught a little of them so that its scores
are spread out, is written once for each way of resizing. CLIP_benchmark, unmodified, and `clipa eval` ask it, in single precision, and one row for each question goes to
nbs/results/equality.jsonl: both numbers, and the largest difference. (Accuracy in CLIP_benchmark 1.6 needs numpy below 2.4.)
"""
import io, json, subprocess, sys, tarfile, tempfile, time
from pathlib import Path
import numpy as np, torch, torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from clipa_nb.app.questions import Questions, ask_model, checked
from clipa_nb.engine.evalsets import Pictures, open_set
from clipa_nb.pretrained import from_open_clip_config, preprocess, save_pretrained
from clipa_nb.tokenizer import train_wordpiece

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ['zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine']
THINGS = ['temple', 'roof', 'sky', 'flower', 'leaf', 'stone']
KINDS = [('RGB', 'png'), ('RGB', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('LA', 'png'), ('I;16', 'png'), ('CMYK', 'jpg'), ('L', 'jpg'), ('1', 'png')]
PROMPTS = ['a photo of a {c}.', 'a blurry photo of the {c}.', 'art of the {c}']
MODEL = dict(embed_dim=64, vision_cfg=dict(image_size=48, layers=2, width=64, head_width=32, patch_size=8),
             text_cfg=dict(context_length=16, vocab_size=400, width=64, heads=2, layers=2, hf_tokenizer_name='bert-base-uncased', tokenizer_kwargs=dict(strip_sep_token=True), pool_type='last', no_causal_mask=True))

def file_of(image, ending):
    out = io.BytesIO()
    image.save(out, 'jpeg' if ending == 'jpg' else ending)
    return out.getvalue()

def crops(n, seed, kinds=KINDS):
    "(file, ending) of n crops of two photographs, in turn in every kind of file. (Crops of one bit are often all white, and tie.)"
    rng, photos = np.random.default_rng(seed), load_sample_images().images
    for i in range(n):
        mode, ending = kinds[i % len(kinds)]
        h, w = rng.integers(40, 200, 2)
        photo = photos[i % 2]
        y, x = rng.integers(0, photo.shape[0] - h), rng.integers(0, photo.shape[1] - w)
        image = Image.fromarray(photo[y:y + h, x:x + w])
        if mode == 'I;16': image = Image.fromarray(np.asarray(image.convert('L')).astype('uint16') * 2)
        elif mode in ('RGBA', 'LA'):
            image.putalpha(Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)))
            image = image.convert(mode)
        else: image = image.convert(mode)
        yield file_of(image, ending), ending

def layout(root, samples, kind='classification', names=(), shards=2):
    "Write samples (dicts of members) as CLIP_benchmark has them."
    (root / 'test').mkdir(parents=True)
    for s in range(shards):
        with tarfile.open(root / 'test' / f'{s}.tar', 'w') as tar:
            for i, sample in list(enumerate(samples))[s::shards]:
                for ending, data in sample.items():
                    info = tarfile.TarInfo(f's{i:07d}.{ending}')
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (root / 'test' / 'nshards.txt').write_text(str(shards))
    (root / 'dataset_type.txt').write_text(kind)
    if names: (root / 'classnames.txt').write_text('\n'.join(names) + '\n')
    if names: (root / 'zeroshot_classification_templates.txt').write_text('\n'.join(PROMPTS) + '\n')

def make_sets(root):
    digits, rng = load_digits(), np.random.default_rng(3)
    def png(pixels): return file_of(Image.fromarray((pixels * 15.9).astype(np.uint8)).resize((40, 56)), 'png')
    layout(root / 'digits', [dict(png=png(x), cls=str(y).encode()) for x, y in zip(digits.images[:600], digits.target)], names=DIGITS)
    layout(root / 'photos', [{e: f, 'cls': str(i % 6).encode()} for i, (f, e) in enumerate(crops(450, 1))], names=THINGS)
    layout(root / 'two', [{e: f, 'cls': str(i % 2).encode()} for i, (f, e) in enumerate(crops(180, 4))], names=THINGS[:2])
    def vector():
        out = io.BytesIO()
        np.save(out, (rng.random(6) < 0.4).astype(np.int64))
        return out.getvalue()
    layout(root / 'several', [{e: f, 'npy': vector()} for f, e in crops(270, 2, KINDS[:-1])], 'multilabel', names=THINGS)
    def captions(i): return '\n'.join(f'{w} {THINGS[(i + k) % 6]} number {i}' for k, w in enumerate(('a', 'the', 'one', 'some', 'no')[:i % 5 + 1]))
    layout(root / 'captions', [{e: f, 'txt': captions(i).encode()} for i, (f, e) in enumerate(crops(200, 5))], 'retrieval')
    return {'digits': 'zeroshot_classification', 'photos': 'zeroshot_classification', 'two': 'zeroshot_classification',
            'several': 'zeroshot_classification', 'captions': 'zeroshot_retrieval'}

def taught(model, tok, root, steps=120):
    "A few steps on half of the digits and of the photographs' labels."
    sets, optimizer = {}, torch.optim.AdamW(model.parameters(), lr=2e-3)
    for name, names in (('digits', DIGITS), ('photos', THINGS)):
        s = open_set(str(root / name), None)
        batch = Pictures(s.source, preprocess(model.cfg).transform, 300)[0]
        sets[name] = batch['image'], batch['label'], tok([f'a photo of a {n}.' for n in names])
    for step in range(steps):
        image, label, ids = sets[('digits', 'photos')[step % 2]]
        rows = torch.randint(0, len(image), (48,))
        z = model.encode_image(image[rows], normalize=True) @ model.encode_text(ids, normalize=True).T
        loss = F.cross_entropy(15 * z, label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()

def make_model(out, how, root):
    torch.manual_seed(5)
    texts = [t.replace('{c}', n) for t in PROMPTS for n in DIGITS + THINGS] + [f'{w} {n} number {i}' for w in ('a', 'the', 'one', 'some', 'no') for n in THINGS for i in range(200)]
    tok = train_wordpiece(texts, vocab_size=400, context_length=16)
    pixels = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), interpolation=how[1], resize_mode=how[0])
    model = from_open_clip_config(dict(model_cfg=MODEL, preprocess_cfg=pixels)).replace(vocab_size=tok.vocab_size).build()
    save_pretrained(taught(model, tok, root), out, tokenizer=tok)

THEIRS = {'acc1': '{}-zeroshot-val-top1', 'acc5': '{}-zeroshot-val-top5', 'mean_per_class_recall': '{}-zeroshot-val-mean_per_class',
          'mean_average_precision': '{}-zeroshot-val-mean_average_precision', 'image_retrieval_recall@{k}': 'text_to_image_R@{k}', 'text_retrieval_recall@{k}': 'image_to_text_R@{k}'}

def compared(python, root, out, name, task):
    "{metric: (theirs, ours)}."
    told = root / 'theirs.json'
    ks = ['1', '5', '10']
    subprocess.run([python, '-m', 'clip_benchmark.cli', 'eval', '--dataset', f'wds/{name}', '--dataset_root', str(root / 'sets' / name), '--task', task, '--model', f'local-dir:{out}',
                    '--pretrained', '', '--no_amp', '--output', str(told), '--num_workers', '0', '--batch_size', '64', '--recall_k', *ks, '--split', 'test'], check=True, stdout=subprocess.DEVNULL)
    theirs = json.loads(told.read_text())['metrics']
    told.unlink()
    options = dict(ties='clip_benchmark') if 'retrieval' in task else {}
    ours = ask_model(str(out), checked(Questions(suite='auto', val_data=(str(root / 'sets' / name),), device='cpu', batch_size=64, workers=2, **options)))['metrics']
    pairs = {}
    for key, value in theirs.items():
        k = key.rpartition('@')[2]
        mine = THEIRS.get(key.replace(f'@{k}', '@{k}') if '@' in key else key, '').replace('{k}', k).format(name)
        if f'val/{mine}' in ours: pairs[mine] = (value, ours[f'val/{mine}'])
    return pairs

if __name__ == '__main__':
    torch.set_num_threads(1)
    python = sys.argv[1] if len(sys.argv) > 1 else sys.exit(__doc__)
    sys.path.insert(0, str(ROOT / '.ci'))
    from record import cpu_name
    sha = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    versions = subprocess.run([python, '-c', 'import importlib.metadata as m; print({k: m.version(k) for k in ("clip_benchmark", "open_clip_torch", "numpy")})'], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        tasks = make_sets(root / 'sets')
        for how in (('squash', 'bilinear'), ('shortest', 'bicubic')):
            out = root / how[0]
            make_model(out, how, root / 'sets')
            for name, task in tasks.items():
                pairs = compared(python, root, out, name, task)
                row = dict(git_sha=sha, date=time.strftime('%Y-%m-%d'), hardware=cpu_name(), torch=torch.__version__, threads=1, peers=eval(versions), resize=how[0], interpolation=how[1],
                           set=name, largest=max(abs(a - b) for a, b in pairs.values()), scores={k: dict(clip_benchmark=a, ours=b) for k, (a, b) in pairs.items()})
                print(json.dumps(row), flush=True)
                if '--dry' not in sys.argv:
                    with open(ROOT / 'nbs' / 'results' / 'equality.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')
