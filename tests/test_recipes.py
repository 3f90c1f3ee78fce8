"Recipes: the published stages to the digit, the smoke twins, and what chapter 03 says of the demo."
import json
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent

# batch, steps, peak lr, warm-up, pixels, tokens, text strategy, share masked, jitter, from the configurations and scripts of the official repository
LAION, SYNTAX = 407_332_084, ('syntax', 0., 0.8)
UP224, UP336 = (32_768, 16_000, 5.12e-5, 800, 224, 32, 'truncate', 0.3, 0.8), (16_384, 8_000, 6.4e-6, 1600, 336, 32, 'truncate', 0.4, 0.8)
PUBLISHED = {
    'clipa-v2-h14': [(65_536, 195_490, 2.048e-3, 3200, 84, 8, *SYNTAX), UP224, UP336],
    'clipa-v2-h14-70px': [(65_536, 195_490, 2.048e-3, 3200, 70, 8, *SYNTAX), UP224],
    'clipa-v2-h14-unmasked': [(65_536, 195_490, 2.048e-3, 3200, 84, 8, *SYNTAX), (16_384, 8_000, 5.12e-5, 1600, 224, 32, 'truncate', 0., 0.)],
    'clipa-v2-bigg14': [(65_536, 195_490, 1.024e-3, 3200, 84, 8, *SYNTAX), (16_384, 32_000, 2.56e-5, 0, 224, 32, 'truncate', 0.4, 0.8), UP336],
    'clipa-v1-b16-i50-t16': [(65_536, 6 * LAION // 65_536, 2.048e-3, 782, 112, 16, 'truncate', 0., 0.), (8_192, 16_000, 2.56e-5, 3072, 224, 16, 'truncate', 0., 0.)],
    'clipa-v1-l16-i17-t16': [(32_768, 6 * LAION // 32_768, 1.024e-3, 1563, 64, 16, *SYNTAX), (7_168, 131_072_000 // 7_168, 2.24e-5, 3571, 224, 16, 'truncate', 0., 0.8)],
    'clipa-v1-l16-i37-t8': [(32_768, 6 * LAION // 32_768, 1.024e-3, 1563, 96, 8, *SYNTAX), (7_168, 131_072_000 // 7_168, 2.24e-5, 3571, 224, 32, 'truncate', 0., 0.8)],
    **{f'clipa-jax-{size}-i{(px // 16)**2 + 1}-t32': [(32_768, 7 * LAION // 32_768, 1.024e-3, 1600, px, 32, 'truncate', 0., 0.), (32_768, 4_000, 1.024e-4, 800, 224, 32, 'truncate', 0., 0.)]
       for size, px in (('s16', 64), ('s16', 112), ('b16', 64), ('b16', 112), ('b16', 160))},
}

def test_every_published_stage_is_a_recipe():
    from clipa_nb.recipes import RECIPES
    assert set(RECIPES) - set(PUBLISHED) == {'toy', 'clipa-v2-l14'} # the laptop's own, and the one whose rows are assumed
    for name, want in PUBLISHED.items():
        got = [(s.batch_size, s.steps, s.lr, s.schedule.warmup, s.image_size, s.context_length, s.text_strategy, s.image_ratio, s.jitter) for s in RECIPES[name].stages]
        assert [tuple(map(str, g[:2] + g[3:])) for g in got] == [tuple(map(str, w[:2] + w[3:])) for w in want], name
        assert [g[2] for g in got] == pytest.approx([w[2] for w in want], rel=1e-9), name
        torch_code, t5x = 'v1' in name, 'bigg' in name # the three code bases decay different tables, and one counts its warm-up from 1
        for s in RECIPES[name].stages: assert (s.optimizer.decay, s.schedule.shift, s.optimizer.decayed) == (('matrices', 1, ()) if torch_code else ('kernels', 0, ('text.embed.weight', 'visual.prefix.*') if t5x else ())), name
        for s in RECIPES[name].stages: assert (type(s.schedule).__name__, type(s.optimizer).__name__, s.schedule.floor, s.max_scale, s.grad_clip, s.ema, s.optimizer.beta1) == ('Cosine', 'AdamW', 0., 100. * torch_code, 0., 0., 0.9), name
        for s in RECIPES[name].stages: assert (s.gray, s.crop, s.optimizer.weight_decay, s.optimizer.beta2, s.optimizer.eps) == (s.jitter / 4, (0.4, 1.), 0.2, 0.95, 1e-6 if 'v1' in name else 1e-8), name
    model = RECIPES['clipa-jax-s16-i17-t32'].model
    assert (model.image.width, model.text.width, model.embed_dim, model.pool, model.text_mask, model.vocab_size, model.resize_mode) == (384, 384, 384, 'cls', 'none', 32_000, 'shortest')

def test_every_smoke_twin_takes_a_step_of_each_stage():
    import torch
    from clipa_nb.app.run import build_task, random_batch, stage_optimizer
    from clipa_nb.recipes import RECIPES, smoke, train_config
    from clipa_nb.trainer import train_step
    for twin in map(smoke, RECIPES.values()):
        for i, s in enumerate(twin.stages):
            task = build_task(twin, i).train()
            out = train_step(task, task, random_batch(twin, i, 4, 'cpu'), stage_optimizer(s, task), 1, train_config(s))
            assert torch.isfinite(out['loss']), (twin.name, s.name)

def test_every_recipe_comes_back_from_json():
    from clipa_nb.recipes import RECIPES, Recipe, smoke
    for r in RECIPES.values():
        for each in (r, smoke(r)): assert Recipe.from_json(each.to_json()) == each

def test_a_stage_may_bring_its_own_objective_and_data():
    from clipa_nb.data import PairData
    from clipa_nb.infonce import ContrastiveConfig, SigmoidConfig
    from clipa_nb.recipes import TOY, Recipe, changes, stage_data, stage_objective
    r = TOY.with_stages({}, dict(objective=SigmoidConfig(), data=PairData(path='x')))
    assert [type(stage_objective(r, i)) for i in (0, 1)] == [ContrastiveConfig, SigmoidConfig]
    assert [stage_data(r, i) for i in (0, 1)] == [TOY.data, PairData(path='x')]
    assert Recipe.from_json(r.to_json()) == r
    assert set(changes(TOY, TOY.with_stages({}, dict(image_size=32)))) == {'stages.1.image_size'}

def test_what_the_trainer_takes():
    from clipa_nb.core import UserError
    from clipa_nb.optimization import RSqrt
    from clipa_nb.recipes import TOY, train_config
    s = TOY.stages[0].replace(batch_size=96, samples=960, micro_batch=10, grad_clip=1., ema=0.9, schedule=RSqrt(warmup=100, cooldown=100))
    cfg = train_config(s, ranks=3)
    assert (cfg.steps, cfg.chunks, cfg.grad_clip, cfg.ema, cfg.lr) == (10, 4, 1., 0.9, s.lr)
    assert (cfg.schedule.warmup, cfg.schedule.cooldown) == (5, 5) and cfg.schedule.rate(9, cfg.steps, 1.) < cfg.schedule.rate(5, cfg.steps, 1.) # cut to fit
    with pytest.raises(UserError, match='96 cannot be shared by 5 ranks'): train_config(s, ranks=5)

def test_the_smoke_twin_keeps_a_papers_own_kinds():
    "Only sizes shrink; ordinary pairs and vocabularies become the toy's."
    from dataclasses import dataclass
    from clipa_nb.clip import ModelConfig
    from clipa_nb.core import Config
    from clipa_nb.data import PairData
    from clipa_nb.infonce import ContrastiveConfig
    from clipa_nb.optimization import RSqrt
    from clipa_nb.recipes import TOY, Recipe, ToyData, recipe, smoke
    from clipa_nb.tokenizer import LearntVocabulary, Vocabulary
    @dataclass(frozen=True)
    class MyModel(ModelConfig): extra: int = 3
    @dataclass(frozen=True)
    class MyLoss(ContrastiveConfig): weight: float = 2.
    @dataclass(frozen=True)
    class MyPairs(PairData): colour: str = 'red'
    @dataclass(frozen=True)
    class MyWords(Config): size: int = 64
    own = TOY.replace(model=MyModel(extra=5), objective=MyLoss(weight=3.), data=MyPairs(n=10_000), tokenizer=MyWords(), init_from=('x',), evaluations=('user.a:B',))
    own = own.with_stages({}, dict(objective=MyLoss(), data=ToyData('rich', n=9_000), schedule=RSqrt(warmup=50), ema=0.9))
    twin = smoke(own)
    assert (type(twin.model), twin.model.extra, twin.model.vocab_size, twin.objective, twin.data, twin.tokenizer) == (MyModel, 5, 32_000, MyLoss(weight=3.), MyPairs(n=512), MyWords())
    assert twin.model.image.width == 64 and twin.init_from == () and twin.evaluations == ('user.a:B',)
    assert (twin.stages[1].objective, twin.stages[1].data, twin.stages[1].schedule, twin.stages[1].ema) == (MyLoss(), ToyData('rich', n=512), RSqrt(warmup=2), 0.9)
    h14 = smoke(recipe('clipa-v2-h14'))
    assert (h14.data, h14.tokenizer, h14.model.vocab_size, h14.evaluations) == (TOY.data.replace(n=512), LearntVocabulary(), 256, TOY.evaluations)
    assert type(recipe('clipa-v2-h14').tokenizer) is Vocabulary

def test_toy_samples_say_what_is_in_them(tmp_path):
    "Label, boxes and a phrase for each box; the boxes are those of the toy world, and the shards carry them."
    import numpy as np
    from clipa_nb.core import UserError
    from clipa_nb.recipes import TOY, ToyData, toy_world
    from clipa_nb.toyworld import COLOURS, boxes, captions, labels, scenes
    data = ToyData('rich', n=40, dials=(('glyphs', 0.3),))
    rows = list(data.samples(seed=3)); part = scenes(toy_world(data), 3, range(40))
    right, spoken = boxes(part), captions(part)
    for i, (_, _, text, meta) in enumerate(rows):
        n = part.count[i]
        assert meta['label'] == labels(part)[i] and len(meta['boxes']) == len(meta['box_text']) == n
        np.testing.assert_allclose(meta['boxes'], right[i, :n], atol=1e-4)
        for k, phrase in enumerate(meta['box_text']): # a phrase has a colour and a noun, and captions that name them agree
            colour, noun = phrase.split(' ', 1)
            said = [w for w, tag, o in spoken[i].words if o == k]
            named = [w for w in said if w in COLOURS]
            assert not named or named == [colour], (phrase, text)
    source = data.open('', tmp_path, seed=3)
    assert set(source.fields) == {'image', 'text', 'label', 'boxes', 'box_text'} and source.read(7)['json'] == rows[7][3]
    assert len(data.replace(n=99).open('', tmp_path, seed=3)) == 40 # what is drawn is not drawn again
    assert len(ToyData(n=5).open(str(tmp_path / 'data'), tmp_path / 'nowhere')) == 40 # what a user gives comes first
    for wrong, says in ((ToyData('dmo'), 'did you mean demo'), (ToyData(n=0), '0 pairs'), (ToyData(size=7), '7'), (ToyData(dials=(('nois', 1.),)), 'did you mean noise')):
        with pytest.raises(UserError, match=says): wrong.check()
    TOY.data.check()

def test_where_recipes_are_found(tmp_path):
    from clipa_nb.core import UserError
    from clipa_nb.recipes import TOY, recipe
    (tmp_path / 'found.py').write_text("from clipa_nb.recipes import recipe\nA = recipe('toy').replace(name='a')\nB = A.replace(name='b')\nC = 3\n")
    (tmp_path / 'empty.py').write_text('')
    assert recipe(f'{tmp_path}/found.py:B').name == 'b'
    for name, text in (('r', TOY.to_json()), ('plan', json.dumps(dict(recipe=TOY.to_dict(), seed=0)))): (tmp_path / f'{name}.json').write_text(text)
    assert recipe(f'{tmp_path}/r.json') == recipe(f'{tmp_path}/plan.json') == TOY
    (tmp_path / 'odd.json').write_text('{"nme": "x"}'); (tmp_path / 'no.json').write_text('{'); (tmp_path / 'list.json').write_text('[]')
    for name, says in (('found.py:D', 'unknown recipe in .*found.py'), ('found.py', 'say which recipe: .*found.py:A or .*found.py:B'), ('found.py:C', 'unknown recipe'), ('none.py:A', 'expected an existing Python file'), ('empty.py', 'it defines none'),
                       ('none.json', 'No such file'), ('odd.json', 'odd.json: .*did you mean name'), ('no.json', 'is not JSON'), ('list.json', 'found list')):
        with pytest.raises(UserError, match=says): recipe(f'{tmp_path}/{name}')
    with pytest.raises(UserError, match='did you mean toy.*file.json, or path.py:NAME'): recipe('tooy')

def test_the_published_vocabulary_is_known_by_its_pieces():
    "Version 2 judges word pieces; a path to the same file must not change which words are kept."
    import types
    from clipa_nb.recipes import recipe, stage_text
    from clipa_nb.text_truncation import text_strategy, rule_tagger
    r = recipe('clipa-v2-h14'); pieces = ['[PAD]', '[UNK]', 'red', 'star', 'a', 'of']
    by_pieces = types.SimpleNamespace(published='bert-base-uncased', pieces=pieces)
    other = types.SimpleNamespace(published='', pieces=pieces)
    official = text_strategy('syntax', rule_tagger, vocabulary=pieces, official=True)
    assert repr(stage_text(r, 0, by_pieces)) == repr(official) != repr(stage_text(r, 0, other)) == repr(stage_text(r, 0))

def test_chapter_03_plans_the_demo():
    "The toy that chapter 03 plans before recipes exist is stage 1 of the toy recipe."
    from clipa_nb.cost import si
    from clipa_nb.recipes import TOY, stage_plan
    cells = json.loads((ROOT / 'nbs/03_cost.ipynb').read_text())['cells']
    said = next(''.join(t for o in c['outputs'] for t in o.get('text', [])) for c in cells if 'small = plan(toy' in ''.join(c['source']))
    told, plan = {row.split()[0]: ' '.join(row.split()[1:]) for row in said.splitlines()}, stage_plan(TOY, 0)
    for key in ('image_tokens', 'text_tokens', 'batch', 'steps', 'samples', 'flops_per_sample', 'flops'): assert told[key].startswith(si(plan[key], 'FLOP' if 'flops' in key else '')), key
