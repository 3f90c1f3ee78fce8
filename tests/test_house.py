"The house: the two commands, what is generated, what is promised in workflows, and that the package is light."
import os, configparser, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb'))

def code_lines(text):
    "Lines inside fenced blocks."
    return [l for block in re.findall(r'```\w*\n(.*?)```', text, re.S) for l in block.splitlines() if l.strip()]

def test_the_two_commands_come_first():
    first, second = code_lines((ROOT / 'README.md').read_text())[:2]
    assert first.endswith('.venv/bin/clipa demo') and 'venv .venv' in first
    assert 'nbdev_test' in second and 'pytest' in second and 'venv .venv' in second

def test_ci_runs_the_second_command():
    second = code_lines((ROOT / 'README.md').read_text())[1]
    assert second in (ROOT / '.ci/run').read_text().splitlines()

def test_ci_fails_with_the_second_command(tmp_path):
    (tmp_path / '.ci').mkdir(); (tmp_path / 'bin').mkdir()
    (tmp_path / '.ci/run').write_text((ROOT / '.ci/run').read_text())
    fake = tmp_path / 'bin/python3'; fake.write_text('#!/bin/sh\nexit 3\n'); fake.chmod(0o755)
    done = subprocess.run(['bash', tmp_path / '.ci/run'], capture_output=True, text=True, env=dict(os.environ, PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}"))
    assert done.returncode == 1 and 'the second command failed' in done.stdout

def test_readme_is_fresh():
    done = subprocess.run([sys.executable, ROOT / '.ci/readme.py', '--check'], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

def test_readme_map_names_every_chapter():
    text = (ROOT / 'README.md').read_text()
    missing = [p.stem for p in CHAPTERS if p.stem not in text]
    assert not missing, missing
    assert len(CHAPTERS) == 20

def test_readme_links_and_pictures_exist():
    targets = re.findall(r'\]\(([^)#]+)\)', (ROOT / 'README.md').read_text())
    missing = [t for t in targets if '://' not in t and not (ROOT / t).exists()]
    assert targets and not missing, missing

@pytest.mark.parametrize('path', sorted((ROOT / '.github/workflows').glob('*.yaml')), ids=lambda p: p.stem)
def test_workflows_call_what_exists(path):
    yaml = pytest.importorskip('yaml')
    flow = yaml.safe_load(path.read_text())
    assert flow['jobs'] and (True in flow or 'on' in flow)  # YAML reads the bare word "on" as true
    import importlib.metadata
    scripts = {e.name for e in importlib.metadata.entry_points(group='console_scripts')}
    for job in flow['jobs'].values():
        for step in job['steps']:
            assert ('uses' in step) != ('run' in step)
            for line in step.get('run', '').splitlines():
                words = line.split()
                if words[0] == 'bash': assert (ROOT / words[1]).exists(), line
                elif words[0] not in ('echo', 'python'): assert words[0] in scripts, line

def test_workflow_covers_the_pythons():
    yaml = pytest.importorskip('yaml')
    rows = yaml.safe_load((ROOT / '.github/workflows/test.yaml').read_text())['jobs']['test']['strategy']['matrix']['include']
    assert [r['python'] for r in rows] == ['3.10', '3.11', '3.12', '3.13']
    assert sum('torch==2.6' in r['constraint'] for r in rows) == 1

def test_quarto_sidebar_names_every_chapter():
    yaml = pytest.importorskip('yaml')
    site = yaml.safe_load((ROOT / 'nbs/_quarto.yml').read_text()); bar = (ROOT / 'nbs/sidebar.yml').read_text()
    assert site['project']['type'] == 'website'
    assert [p.name for p in CHAPTERS if p.name not in bar] == []

def test_every_dependency_is_explained():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(ROOT / 'settings.ini')
    d, text = cfg['DEFAULT'], (ROOT / 'CONTRIBUTING.md').read_text()
    names = {re.split(r'[<>=\[]', w)[0] for k in d if k.endswith('requirements') for w in d[k].split()} - {'clipa_nb'}
    assert [n for n in sorted(names) if n not in text] == []

OPTIONAL = ('matplotlib', 'ipywidgets', 'IPython', 'jupyterlab', 'nbdev', 'fastcore', 'execnb', 'sklearn', 'datasets', 'huggingface_hub', 'timm', 'transformers', 'open_clip', 'torchvision', 'ftfy', 'nltk')

def test_imports_without_any_extra():
    "Every exported module but `viz` imports where only the run-time dependencies are installed."
    code = f'''
import sys, importlib
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
for name in {[p.stem[3:] for p in CHAPTERS]!r}:
    if name != 'viz': importlib.import_module('clipa_nb.' + name)
from clipa_nb.core import UserError
try: import clipa_nb.engine.viz
except UserError as e: assert "clipa_nb[demo]" in str(e), e
else: raise SystemExit('viz imported without matplotlib')
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

def test_demo_without_its_extra_says_so():
    code = '''
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'matplotlib': raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent())
from clipa_nb.cli import main
sys.exit(main(['demo', '--smoke']))
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'clipa_nb[demo]'" in done.stderr, done.stderr

RESULTS = sorted((ROOT / 'nbs/results').glob('*.jsonl'))
WITHOUT_WALL_TIME = {('tokens.jsonl', 'race', '1911b78')} # 15 runs from before tests/bench/tokens.py wrote `recipe` and `seconds`; nobody can know them now

def rows_of(path):
    "Every row, and the runs inside a row that were made to be compared with it."
    for line in path.read_text().splitlines():
        row = json.loads(line); yield row
        if 'compare' in row: yield row['compare']

def lacking(row, name=''):
    "What a recorded row fails to say: a run (it has a seed and scores) its recipe and its time, a measurement its threads."
    run = 'recipe' in row or {'seed', 'metrics'} <= set(row)
    more = {'recipe', 'seed', 'seconds', 'metrics'} if run else {'threads'}
    if (name, row.get('what'), row.get('git_sha')) in WITHOUT_WALL_TIME: more = {'strategy', 'seed', 'batch', 'steps', 'cpu_seconds', 'metrics', 'threads'}
    return {'git_sha', 'hardware', 'torch', *more} - set(row)

@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_results_are_rows(path):
    for row in rows_of(path): assert not lacking(row, path.name), (lacking(row, path.name), row)

def test_a_run_cannot_pass_as_a_measurement():
    about = dict(git_sha='abc1234', hardware='CPU', torch='2.6', threads=1)
    assert lacking(about) == set()
    assert lacking(dict(about, seed=0, metrics={})) == {'recipe', 'seconds'}
    assert lacking(dict(about, what='race', seed=0, metrics={}), 'tokens.jsonl') == {'recipe', 'seconds'}
    assert lacking(dict(about, recipe='toy')) == {'seed', 'seconds', 'metrics'}

@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_results_name_a_commit(path):
    "A row says which code it ran: changes that were not committed cannot be looked up."
    wrong = sorted({row['git_sha'] for row in rows_of(path) if not re.fullmatch('[0-9a-f]{7,40}', row['git_sha'])})
    assert not wrong, f'{path.name}: rows of {wrong}: commit, then record again'

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

def test_what_is_not_built_is_said():
    "A promise that is not kept is written down where a reader looks for it; whoever keeps it changes these sentences."
    text, chapter, log = ((ROOT / f).read_text() for f in ('CONTRIBUTING.md', 'nbs/14_distributed_trainer.ipynb', 'nbs/13_trainer.ipynb'))
    if 'fully_shard' not in (ROOT / 'clipa_nb/distributed_trainer.py').read_text(): assert 'FSDP2' in text and 'FSDP2' in chapter
    if 'ensorboard' not in (ROOT / 'settings.ini').read_text(): assert 'TensorBoard' in text and 'TensorBoard' in log

def test_contributing_is_a_page():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    assert len(text.split()) <= 900
    for word in ('Deviations', '`info_nce(', '`f(model, ', 'metrics.jsonl', '75', '130', '`distributed_trainer`'): assert word in text, word

def test_chapter_03_plans_the_demo():
    "The toy that chapter 03 plans before recipes exist is stage 1 of the toy recipe."
    from clipa_nb.cost import si
    from clipa_nb.recipes import TOY, stage_plan
    cells = json.loads((ROOT / 'nbs/03_cost.ipynb').read_text())['cells']
    said = next(''.join(t for o in c['outputs'] for t in o.get('text', [])) for c in cells if 'small = plan(toy' in ''.join(c['source']))
    told, plan = {row.split()[0]: ' '.join(row.split()[1:]) for row in said.splitlines()}, stage_plan(TOY, 0)
    for key in ('image_tokens', 'text_tokens', 'batch', 'steps', 'samples', 'flops_per_sample', 'flops'): assert told[key].startswith(si(plan[key], 'FLOP' if 'flops' in key else '')), key
