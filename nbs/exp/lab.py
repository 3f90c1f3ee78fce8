"""Training runs for experiments: the package's own code on toy pictures that are drawn once and kept in memory.

What a recipe says is what happens: model, objective, optimiser, schedule, text strategy and token dropping are the
package's. Two things are left out, because they are the same in every cell: JPEG files and the loader. So a CPU-second
here is one of training alone, and a picture has no JPEG noise. Pictures are drawn at the data's size and made smaller
by an antialiased bilinear filter, in training and in the exam alike.
"""
import hashlib, json, os, platform, subprocess, sys, tempfile, time
from pathlib import Path
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import cpu_name
from clipa_nb.app.exam import digit_set, toy_sets, toy_suite
from clipa_nb.app.run import build_task, captions_with_words, next_weights, stage_optimizer
from clipa_nb.core import USER_FILES, UserError, draws_of, hash_bits, pick_device, pick_precision, seed_of
from clipa_nb.recipes import Recipe, ToyData, stage_data, stage_objective, stage_plan, stage_text, toy_world, train_config
from clipa_nb.token_dropping import resize
from clipa_nb.toyworld import TEMPLATES, caption_text, class_names, class_scenes, render, scenes
from clipa_nb.trainer import fit
from clipa_nb.engine.asking import batched
from clipa_nb.zero_shot import make_head, zero_shot

RESULTS = ROOT / 'nbs' / 'results'
SCORES = {
    'seen': 'val/seen-zeroshot-val-top1', 'heldout': 'val/heldout-zeroshot-val-top1',
    'shape': 'val/shape-zeroshot-val-top1', 'colour': 'val/colour-zeroshot-val-top1',
    'glyphs': 'val/glyphs-zeroshot-val-top1', 'digits': 'val/digits-zeroshot-val-top1',
    'r1': 'val/image_to_text_R@1', 'r1_text': 'val/text_to_image_R@1',
}

class Words:
    "A tokenizer that cuts captions as a stage does; names of classes are prompts and hardly ever too long."
    def __init__(self,
        tokenizer, # of the run
        strategy, # of the stage, from `stage_text`
        context_length: int, # of the stage
    ):
        self.tokenizer, self.strategy, self.context_length = tokenizer, strategy, context_length

    def __getattr__(self, name): return getattr(self.tokenizer, name)

    def __call__(self, texts, context_length=None, strategy=None, draw=None):
        texts = [texts] if isinstance(texts, str) else list(texts)
        draw = draws_of(0, np.arange(len(texts))) if draw is None else draw # the same at every evaluation
        return self.tokenizer(texts, context_length=context_length or self.context_length,
                              strategy=strategy or self.strategy, draw=draw)

def smaller(
    images: torch.Tensor, # uint8 [n,3,S,S]
    size: int, # pixels
) -> torch.Tensor: # uint8 [n,3,size,size]
    "Pictures of another size, a few thousand at a time."
    if images.shape[-1] == size: return images
    return torch.cat([resize(part, size) for part in images.split(2000)])

class Memory:
    "The pairs of a toy world, drawn once; `images(size)` and `texts` are in the order of the shards."
    def __init__(self,
        data: ToyData, # the world and how many pairs
        seed: int, # of the run
        device='cpu', # where pictures are drawn and kept
    ):
        self.data, self.seed, self.device = data, seed, torch.device(device)
        self.scenes = scenes(toy_world(data), seed, range(data.n), 'train')
        self.texts, self.kept = caption_text(self.scenes), {}

    def images(self, size: int) -> torch.Tensor: # uint8 [n,3,size,size] on the device
        if size not in self.kept:
            parts = []
            for start in range(0, self.data.n, 2000):
                part = self.scenes[np.arange(start, min(start + 2000, self.data.n))]
                parts.append(smaller(render(part, self.data.size, self.device), size))
            self.kept[size] = torch.cat(parts)
        return self.kept[size]

    def tokenizer(self, recipe: Recipe):
        "The tokenizer of a run on these pairs."
        class Source:
            "What `captions_of` reads."
            def __init__(self, texts): self.texts = texts
        extra = [w for w in self.data.words() if w not in {w for t in self.texts for w in t.split()}]
        with tempfile.TemporaryDirectory() as folder:
            return recipe.tokenizer.open(lambda: [*self.texts, *extra], folder, recipe.model.vocab_size,
                                         recipe.model.context_length)

def stream(
    memory: Memory, # pairs
    recipe: Recipe, # the run
    i: int, # which stage
    tokenizer, # of the run
    seed: int, # of the run
): # yields batches on the device, from step 0 on
    "The batches of a stage: every epoch has an order of its own, a function of the seed."
    stage, n = recipe.stages[i], len(memory.texts)
    if tuple(stage.crop) != (1., 1.) or stage.jitter or stage.gray:
        raise UserError(f'stage {stage.name}: pictures in memory are not cropped or jittered; set crop to (1, 1)')
    images, strategy, own, orders = memory.images(stage.image_size), stage_text(recipe, i, tokenizer), seed_of(seed, 'stage', i), {}
    for step in range(stage.steps):
        at = step * stage.batch_size + np.arange(stage.batch_size)
        for epoch in np.unique(at // n):
            if epoch not in orders:
                orders = {epoch: np.argsort(hash_bits(seed_of(own, 'order', int(epoch)), np.arange(n)), kind='stable'), **orders}
        ids = np.array([orders[p // n][p % n] for p in at])
        draw = draws_of(own, at)
        text = tokenizer([memory.texts[k] for k in ids], context_length=stage.context_length, strategy=strategy, draw=draw)
        rows = torch.from_numpy(ids).to(memory.device)
        valid = torch.ones(len(ids), dtype=torch.bool)
        yield dict(image=images[rows], **{k: v.to(memory.device) for k, v in dict(text=text, draw=draw, valid=valid).items()})

class Exam:
    "The exam of one world, drawn once; asked at any stage's size, with captions cut as that stage cuts them."
    def __init__(self,
        data: ToyData, # the world
        seed: int, # of the run; the pictures are never those of training
        device='cpu', # where it is asked
        small: bool = False, # fewer pictures
    ):
        self.data, self.seed, self.device, self.kept = data, seed, torch.device(device), {}
        self.small = small
        n_class, n_pairs = (1, 100) if small else (8, 1000)
        self.sets = toy_sets(data, data.size, seed, n_class, n_pairs, shifts=())

    def at(self, size: int):
        "(sets, digits) at one size."
        if size not in self.kept:
            to = lambda images: smaller(images, size).to(self.device)
            sets = {k: dict(v, image=to(v['image'])) if 'image' in v else v for k, v in self.sets.items()}
            try: digits = digit_set(self.data.size)
            except UserError: digits = None # scikit-learn is not installed
            if digits:
                some = slice(0, None, 8 if self.small else 1)
                digits = dict(image=to(digits['image'][some]), label=digits['label'][some])
            self.kept[size] = sets, digits
        return self.kept[size]

    def __call__(self, model, recipe: Recipe, i: int, tokenizer) -> dict: # scores in 0–1
        "What a model can do at the lengths of stage `i`."
        stage = recipe.stages[i]
        sets, digits = self.at(stage.image_size)
        words = Words(tokenizer, stage_text(recipe, i, tokenizer), stage.context_length)
        training = model.training
        got = toy_suite(model.eval(), words, sets, digits)
        model.train(training)
        return {name: round(got[key], 4) for name, key in SCORES.items() if key in got}

    def by_size(self, model, recipe: Recipe, i: int, tokenizer, halves=(6, 8, 10, 13, 17, 21, 25)) -> dict:
        "Top-1 among all pairs, for seen pairs whose object has one half-size, in 64ths of the picture's side."
        stage, world = recipe.stages[i], toy_world(self.data)
        words = Words(tokenizer, stage_text(recipe, i, tokenizer), stage.context_length)
        training, out = model.training, {}
        head = make_head(model.eval(), class_names('pairs'), TEMPLATES, words, classes_per_batch=None)
        for half in halves:
            part, label = class_scenes(world.replace(size_1=(half, half)), self.seed + 2, 'seen', 2)
            images = smaller(render(part, self.data.size), stage.image_size).to(self.device)
            out[str(half)] = round(zero_shot(model, batched(images, torch.as_tensor(label), 216), head, ks=(1,))['top1'], 4)
        model.train(training)
        return out

class Clock:
    "CPU seconds of this process and its children; seconds of the wall on an accelerator."
    def __init__(self, device): self.device, self.begun = torch.device(device), self.now(torch.device(device))

    @staticmethod
    def now(device) -> float:
        if device.type == 'cpu':
            spent = os.times()
            return spent.user + spent.system + spent.children_user + spent.children_system
        torch.cuda.synchronize(device)
        return time.perf_counter()

    def read(self) -> float: return self.now(self.device) - self.begun

def code_hash() -> str:
    "A hash of everything a result depends on: the package, this file, and files of recipes."
    h = hashlib.sha256()
    given = [Path(p) for p in os.environ.get(USER_FILES, '').split(os.pathsep) if p]
    for path in [*sorted((ROOT / 'clipa_nb').rglob('*.py')), Path(__file__), *given]: h.update(path.read_bytes())
    return h.hexdigest()[:12]

def cache_path(recipe: Recipe, i: int, seed: int) -> Path:
    "Where the weights after stage `i` are kept for cells that begin in the same way."
    part = recipe.replace(name='', stages=recipe.stages[:i + 1], evaluations=()).to_json()
    key = hashlib.sha256(f'{code_hash()} {seed} {part}'.encode()).hexdigest()[:20]
    folder = Path(os.environ.get('CLIPA_EXP_CACHE', Path(tempfile.gettempdir()) / 'clipa_exp'))
    folder.mkdir(exist_ok=True, parents=True)
    return folder / f'{key}.pt'

def train(
    recipe: Recipe, # what to run
    seed: int = 0, # of the world, of the weights and of everything else
    device='cpu', # where
    small: bool = False, # a short exam, for tests
    sizes: bool = False, # also the score by the size of the object
    say=print, # told after every stage
) -> list: # a dict for each stage: what it was, what it took, and scores on entering and at the end
    "Run a recipe from memory. Stages that another cell has already run in the same way are taken from the cache."
    device = torch.device(device)
    precision = pick_precision('auto', device)
    data = recipe.data
    if any(stage_data(recipe, i) != data for i in range(len(recipe.stages))):
        raise UserError('stages with data of their own are not kept in memory')
    memory, exam, out, weights = Memory(data, seed, device), Exam(data, seed, device, small), [], None
    tokenizer = memory.tokenizer(recipe)
    for i, stage in enumerate(recipe.stages):
        kept = cache_path(recipe, i, seed)
        if kept.exists():
            found = torch.load(kept, map_location=device, weights_only=True)
            weights = found['weights']
            out.append(json.loads(found['row']))
            continue
        task = build_task(recipe, i, seed).to(device)
        if weights: next_weights(task, weights, stage_objective(recipe, i) == stage_objective(recipe, i - 1))
        plan = stage_plan(recipe, i)
        row = dict(name=stage.name, image_size=stage.image_size, image_tokens=plan['image_tokens'], text_tokens=plan['text_tokens'],
                   samples=plan['samples'], steps=plan['steps'], batch=plan['batch'], flops=plan['flops'])
        if i: row['enter'] = exam(task.model, recipe, i, tokenizer)
        optimizer = stage_optimizer(stage, task.train())
        memory.images(stage.image_size) # drawn before the clock starts
        losses, clock = [], Clock(device)
        cfg = train_config(stage, precision, log_every=max(1, stage.steps // 10))
        def log(step, **r): losses.append(round(r['train/loss'], 3))
        fit(task, task, stream(memory, recipe, i, tokenizer, seed), optimizer, cfg, seed=seed_of(seed, 'stage', i), log=log)
        row['cpu_seconds' if device.type == 'cpu' else 'seconds'] = round(clock.read(), 1)
        row.update(losses=losses, end=exam(task.model, recipe, i, tokenizer))
        if sizes: row['by_size'] = exam.by_size(task.model, recipe, i, tokenizer)
        weights = task.state_dict()
        torch.save(dict(weights=weights, row=json.dumps(row)), kept)
        out.append(row)
        say(json.dumps(row))
    return out

def clean_sha() -> str:
    "The commit that is checked out; raises `UserError` where files that a result depends on are not committed."
    def git(*args): return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    changed = [line for line in git('status', '--porcelain', '--', 'clipa_nb', 'nbs/exp', '.ci/record.py').splitlines()
               if line.endswith('.py')]
    if changed: raise UserError(f'{changed[0].split()[-1]} is not committed: a row names the commit it was made by; commit first')
    return git('rev-parse', '--short', 'HEAD')

def about(device='cpu') -> dict:
    "What every row says of its surroundings; raises as `clean_sha`."
    device = torch.device(device)
    hardware = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{cpu_name()}, {platform.machine()}'
    return dict(git_sha=clean_sha(), hardware=hardware, torch=torch.__version__, threads=torch.get_num_threads(),
                precision=pick_precision('auto', device))

def recorded(path: Path) -> list: # of dicts; empty where nothing was run
    "The rows of a file."
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []

def record(path: Path, row: dict):
    "Append one row, whole."
    path.parent.mkdir(exist_ok=True, parents=True)
    with open(path, 'a') as f: f.write(json.dumps(row) + '\n')
