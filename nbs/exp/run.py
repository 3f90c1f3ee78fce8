#!/usr/bin/env python
"""Experiments of nbs/exp: one command that runs what is not recorded yet, cheapest cells first, and can be stopped at any time.

    python nbs/exp/run.py law_image                 the inverse scaling law (about 6 CPU-hours in all)
    python nbs/exp/run.py law_image --seconds 3000  stop after the cell in which 3000 CPU-seconds are reached
    python nbs/exp/run.py law_image --list          what is recorded, and what is not run
    python nbs/exp/run.py law_image --device cuda   the same cells on a GPU, into rows of their own
    python nbs/exp/run.py demo --name B --set model.positions=learned --set stages.0.samples=128000 --arms stage1 two on

Every cell is one row of nbs/results/GRID.jsonl and names the commit that made it; the code must be committed.
"""
import argparse, json, os, sys, time
from dataclasses import dataclass, field
os.environ.setdefault('OMP_NUM_THREADS', '1')
import torch
import lab
from clipa_nb.app.run import full_length, set_field
from clipa_nb.core import UserError
from clipa_nb.optimization import Cosine
from clipa_nb.recipes import TOY, Recipe, recipe as recipe_named, stage_plan

@dataclass(frozen=True)
class Cell:
    "One training: a name that is unique in its grid, what it stands for, and what is run."
    name: str
    recipe: Recipe
    facts: dict = field(default_factory=dict) # what a figure groups by

    @property
    def flops(self) -> float: return float(sum(stage_plan(self.recipe, i)['flops'] for i in range(len(self.recipe.stages))))

def flops(recipe: Recipe, i: int = 0) -> float:
    "FLOPs of a sample in one stage."
    return stage_plan(recipe, i)['flops_per_sample']

def for_flops(recipe: Recipe, total: float) -> int:
    "Samples, in whole batches, of a recipe of one stage that take so many FLOPs."
    stage = recipe.stages[0]
    return max(1, round(total / flops(recipe) / stage.batch_size)) * stage.batch_size

# The arms of a two-stage run: what its claims are held against.

def stage1(recipe: Recipe) -> Recipe:
    "Its first stage alone."
    return recipe.replace(name=f'{recipe.name}: stage 1', stages=recipe.stages[:1])

def total_flops(recipe: Recipe) -> float: return sum(stage_plan(recipe, i)['flops'] for i in range(len(recipe.stages)))

def control(recipe: Recipe) -> Recipe:
    "All the compute spent on stage 1, with one schedule over all of it."
    first = stage1(recipe).replace(name=f'{recipe.name}: stage 1 for all of the compute')
    return first.with_stages(dict(samples=for_flops(first, total_flops(recipe))))

def carry_on(recipe: Recipe) -> Recipe:
    "The compute of stage 2 spent on stage 1's lengths instead, from the same weights and with stage 2's rates."
    first, second = recipe.stages[0], recipe.stages[1]
    again = first.replace(name='reduced again', base_lr=second.base_lr, schedule=second.schedule, optimizer=second.optimizer)
    alone = recipe.replace(stages=(again,))
    again = again.replace(samples=for_flops(alone, stage_plan(recipe, 1)['flops']))
    return recipe.replace(name=f'{recipe.name}: more of stage 1', stages=(first, again))

def twin(recipe: Recipe) -> Recipe:
    "Full length all along, for the same FLOPs."
    whole = full_length(recipe, recipe.stages[-1].batch_size)
    return whole.with_stages(dict(samples=for_flops(whole, total_flops(recipe))))

def twin_short(recipe: Recipe) -> Recipe:
    "Full length for the FLOPs of stage 1: few tokens against all tokens."
    whole = full_length(recipe, recipe.stages[-1].batch_size)
    return whole.with_stages(dict(samples=for_flops(whole, stage_plan(recipe, 0)['flops'])))

def two(recipe: Recipe) -> Recipe: return recipe

ARMS = dict(stage1=stage1, two=two, on=carry_on, control=control, twin=twin, twin_short=twin_short)

# The grids.

SIZES = dict(S=dict(width=96, depth=3, heads=3, mlp=384), M=dict(width=128, depth=4, heads=4, mlp=512),
             L=dict(width=192, depth=6, heads=6, mlp=768))
TOKENS = {4: 16, 16: 32, 36: 48, 64: 64} # image tokens → pixels at a patch of 8
TEXTS = (17, 9, 7, 5)
SAMPLES = 64_000 # of a cell at equal samples: vision is far from saturated

def sized(size: str) -> Recipe:
    "The toy recipe at one encoder size, with one full-length stage."
    image = TOY.model.image.replace(**SIZES[size])
    text = TOY.model.text.replace(width=image.width, heads=image.heads, mlp=image.mlp)
    recipe = TOY.replace(model=TOY.model.replace(image=image, text=text, embed_dim=image.width))
    first = TOY.stages[0].replace(name='short', image_size=64, context_length=17, text_strategy='truncate', samples=SAMPLES)
    return recipe.replace(stages=(first,))

def tuned(recipe: Recipe) -> Recipe:
    "As published: a brief stage of full length at the end, a tenth of the samples of the longest cell."
    last = TOY.stages[1].replace(name='full', image_strategy='none', image_ratio=0., samples=6_400, base_lr=1.2e-3,
                                 schedule=Cosine(warmup=10))
    return recipe.replace(stages=(*recipe.stages, last))

def law_cell(size, short, budget, **facts):
    "A cell at equal samples, or at the FLOPs that all tokens take for those samples."
    if budget == 'flops':
        short = short.with_stages(dict(samples=for_flops(short, flops(sized(size)) * SAMPLES)))
    facts = dict(size=size, budget=budget, **facts)
    return Cell('/'.join(map(str, facts.values())), tuned(short), facts)

def law_image(sizes=('S', 'M')) -> list:
    "Encoder sizes × image lengths × {resize, random} at equal samples and at equal FLOPs."
    cells = []
    for size in sizes:
        for budget in ('samples', 'flops'):
            for tokens, px in TOKENS.items():
                for strategy in ('resize', 'random'):
                    if tokens == 64 and (strategy == 'random' or budget == 'flops'): continue # one cell stands for all
                    change = dict(image_size=px) if strategy == 'resize' else dict(
                        image_strategy='random', image_ratio=1 - tokens / 64)
                    cells.append(law_cell(size, sized(size).with_stages(change), budget, strategy=strategy, tokens=tokens))
    return cells

def law_third() -> list: return law_image(('L',))

def law_text() -> list:
    "Encoder sizes × text lengths × {syntax, truncate} at equal samples, at 16 image tokens."
    cells = []
    for size in ('S', 'M'):
        for length in TEXTS:
            for strategy in ('syntax', 'truncate'):
                if length == TEXTS[0] and strategy == 'syntax': continue
                change = dict(image_size=32, context_length=length, text_strategy=strategy)
                cells.append(law_cell(size, sized(size).with_stages(change), 'samples', strategy=strategy, tokens=length))
    return cells

def strategies() -> list:
    "Image strategies × text strategies at 16 tokens and 7 words, at two budgets; the full-length stage is the recipe's own."
    cells = []
    for image in ('resize', 'random', 'grid', 'block'):
        for text in ('truncate', 'random', 'block', 'syntax'):
            for samples in (32_000, 128_000):
                drop = dict(image_size=32) if image == 'resize' else dict(image_size=64, image_strategy=image, image_ratio=0.75)
                short = sized('M').with_stages(dict(drop, samples=samples, context_length=7, text_strategy=text))
                facts = dict(image=image, text=text, samples=samples)
                cells.append(Cell('/'.join(map(str, facts.values())), tuned(short), facts))
    return cells

def pareto() -> list:
    "Two stages against full length at five budgets: the recipe's, from a sixteenth to all of it."
    cells = []
    for k in (16, 8, 4, 2, 1):
        brief = [dict(samples=max(1, s.samples // k // s.batch_size) * s.batch_size) for s in TOY.stages]
        recipe = TOY.with_stages(*brief)
        for arm in ('two', 'twin'): cells.append(Cell(f'{arm}/{k}', ARMS[arm](recipe), dict(arm=arm, part=1 / k)))
    return cells

def second_stage() -> list:
    "How short may stage 2 be, and how much may it drop? One stage 1 for all of them."
    cells = []
    for samples in (6_400, 19_200, 57_600):
        for ratio in (0., 0.3, 0.5, 0.75):
            last = dict(samples=samples, image_ratio=ratio, image_strategy='random' if ratio else 'none')
            recipe = TOY.with_stages(dict(samples=128_000), last)
            cells.append(Cell(f'{samples}/{ratio}', recipe, dict(samples=samples, ratio=ratio)))
    return cells

GRIDS = dict(law_image=law_image, law_text=law_text, law_third=law_third, strategies=strategies, pareto=pareto,
             second_stage=second_stage)
FILES = dict(law_image='law', law_text='law', law_third='law', demo='demo_trials')

def waiting(cells, seeds, rows, grid, device) -> list: # [(cell, seed)], the cheapest first, one seed after another
    "What has no row yet."
    done = {(r['grid'], r['cell'], r['seed'], r['device']) for r in rows}
    return [(c, s) for s in seeds for c in sorted(cells, key=lambda c: c.flops) if (grid, c.name, s, device) not in done]

def run_cells(grid, cells, args):
    "Run what is not recorded; returns how many cells were run."
    path = lab.RESULTS / f'{FILES.get(grid, grid)}.jsonl'
    todo = waiting(cells, args.seeds, lab.recorded(path), grid, args.device)
    if args.list:
        have = len(cells) * len(args.seeds) - len(todo)
        print(f'{grid}: {have} recorded, {len(todo)} not run')
        for c, s in todo: print(f'  seed {s}  {c.flops / 1e12:6.1f} TFLOP  {c.name}')
        return 0
    spent = lab.Clock('cpu')
    for n, (cell, seed) in enumerate(todo):
        if args.seconds and spent.read() > args.seconds: return n
        about, clock = lab.about(args.device), lab.Clock('cpu')
        print(f'{grid} seed {seed} {cell.name}: {cell.flops / 1e12:.1f} TFLOP', flush=True)
        stages = lab.train(cell.recipe, seed, args.device, sizes=grid == 'demo', say=lambda text: print(text, flush=True))
        changes = {k: b for k, (a, b) in TOY.diff(cell.recipe).items() if k != 'name'}
        lab.record(path, dict(
            grid=grid, cell=cell.name, seed=seed, device=args.device, **about, facts=cell.facts, flops=cell.flops,
            cpu_seconds_with_exams=round(clock.read(), 1), changes=changes, stages=stages))
    return len(todo)

def dialled(text: str):
    "('size_1', (6.0, 22.0)) from 'size_1=6,22'."
    name, _, values = text.partition('=')
    numbers = tuple(float(v) for v in values.split(','))
    return name, numbers if len(numbers) > 1 else numbers[0]

def demo(args) -> list:
    "A trial of the demo's search: a recipe with changes, and the arms it is held against."
    recipe = recipe_named(args.recipe)
    dials = dict(recipe.data.dials) | dict(map(dialled, args.dial))
    recipe = recipe.replace(name=args.name, data=recipe.data.replace(dials=tuple(dials.items())))
    for change in args.set: recipe = set_field(recipe, change)
    cells = []
    for arm in args.arms:
        kind, _, how = arm.partition(':')
        cell = ARMS[kind](recipe)
        for change in how.split(';') if how else (): cell = set_field(cell, change)
        cells.append(Cell(f'{args.name}/{arm}', cell, dict(trial=args.name, arm=arm)))
    return cells

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('grid', choices=[*GRIDS, 'demo'])
    parser.add_argument('--seeds', type=int, nargs='+', default=None)
    parser.add_argument('--cells', default='', help='only cells whose name holds this text')
    parser.add_argument('--seconds', type=float, default=0, help='CPU-seconds after which no further cell is begun')
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--list', action='store_true')
    parser.add_argument('--name', default='toy', help='demo: the name of the trial')
    parser.add_argument('--recipe', default='toy', help='demo: where the trial begins: a name, or path.py:NAME')
    parser.add_argument('--set', action='append', default=[], metavar='FIELD=VALUE', help='demo: a change of the toy recipe')
    parser.add_argument('--dial', action='append', default=[], metavar='DIAL=VALUE', help='demo: a change of its world')
    parser.add_argument('--arms', nargs='+', default=['stage1', 'two', 'on', 'control', 'twin'],
                        help=f"demo: what is run, of {', '.join(ARMS)}; 'twin:FIELD=VALUE;…' changes an arm")
    args = parser.parse_args()
    args.seeds = args.seeds or ([0] if args.grid == 'demo' else [0, 1, 2])
    torch.set_num_threads(1)
    cells = demo(args) if args.grid == 'demo' else GRIDS[args.grid]()
    try: run_cells(args.grid, [c for c in cells if args.cells in c.name], args)
    except UserError as e: sys.exit(str(e))

if __name__ == '__main__': main()
