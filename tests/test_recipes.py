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
        got = [(s.batch_size, s.steps, s.lr, s.warmup, s.image_size, s.context_length, s.text_strategy, s.image_ratio, s.jitter) for s in RECIPES[name].stages]
        assert [tuple(map(str, g[:2] + g[3:])) for g in got] == [tuple(map(str, w[:2] + w[3:])) for w in want], name
        assert [g[2] for g in got] == pytest.approx([w[2] for w in want], rel=1e-9), name
        torch_code, t5x = 'v1' in name, 'bigg' in name # the three code bases decay different tables, and one counts its warm-up from 1
        for s in RECIPES[name].stages: assert (s.decay, s.shift, s.decayed) == (('matrices', 1, ()) if torch_code else ('kernels', 0, ('text.embed.weight', 'visual.prefix.*') if t5x else ())), name
        for s in RECIPES[name].stages: assert (s.gray, s.crop, s.weight_decay, s.beta2, s.eps) == (s.jitter / 4, (0.4, 1.), 0.2, 0.95, 1e-6 if 'v1' in name else 1e-8), name
    model = RECIPES['clipa-jax-s16-i17-t32'].model
    assert (model.image.width, model.text.width, model.embed_dim, model.pool, model.text_mask, model.vocab_size, model.resize_mode) == (384, 384, 384, 'cls', 'none', 32_000, 'shortest')

def test_every_smoke_twin_takes_a_step_of_each_stage():
    import torch
    from clipa_nb.clip import build_clip
    from clipa_nb.infonce import Contrastive
    from clipa_nb.optimization import make_optimizer
    from clipa_nb.recipes import RECIPES, smoke, stage_model, train_config
    from clipa_nb.trainer import Task, train_step
    for twin in map(smoke, RECIPES.values()):
        for i, s in enumerate(twin.stages):
            torch.manual_seed(0); cfg = stage_model(twin, i); task = Task(build_clip(cfg).train(), Contrastive())
            batch = dict(image=torch.randint(0, 256, (4, 3, s.image_size, s.image_size), dtype=torch.uint8), text=torch.randint(1, cfg.vocab_size, (4, s.context_length)))
            out = train_step(task, task, batch, make_optimizer(task.model, lr=1e-3, weight_decay=0.), 1, train_config(s))
            assert torch.isfinite(out['loss']), (twin.name, s.name)

def test_chapter_03_plans_the_demo():
    "The toy that chapter 03 plans before recipes exist is stage 1 of the toy recipe."
    from clipa_nb.cost import si
    from clipa_nb.recipes import TOY, stage_plan
    cells = json.loads((ROOT / 'nbs/03_cost.ipynb').read_text())['cells']
    said = next(''.join(t for o in c['outputs'] for t in o.get('text', [])) for c in cells if 'small = plan(toy' in ''.join(c['source']))
    told, plan = {row.split()[0]: ' '.join(row.split()[1:]) for row in said.splitlines()}, stage_plan(TOY, 0)
    for key in ('image_tokens', 'text_tokens', 'batch', 'steps', 'samples', 'flops_per_sample', 'flops'): assert told[key].startswith(si(plan[key], 'FLOP' if 'flops' in key else '')), key
