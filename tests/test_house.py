"The house: the two commands, what is generated, what is promised in workflows, and that the package is light."
import os, configparser, json, re, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / 'nbs').rglob('[0-9][0-9]_*.ipynb') if '.ipynb_checkpoints' not in p.parts and '_proc' not in p.parts)

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
    missing = [p.name for p in NOTEBOOKS if p.name not in text]
    assert not missing, missing

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
    assert [p.name for p in NOTEBOOKS if p.relative_to(ROOT / 'nbs').as_posix() not in bar] == []

def test_every_dependency_is_explained():
    cfg = configparser.ConfigParser(delimiters=['=']); cfg.read(ROOT / 'settings.ini')
    d, text = cfg['DEFAULT'], (ROOT / 'CONTRIBUTING.md').read_text()
    names = {re.split(r'[<>=\[]', w)[0] for k in d if k.endswith('requirements') for w in d[k].split()} - {'clipa_nb'}
    assert [n for n in sorted(names) if n not in text] == []

OPTIONAL = ('matplotlib', 'ipywidgets', 'IPython', 'jupyterlab', 'nbdev', 'fastcore', 'execnb', 'sklearn', 'datasets', 'huggingface_hub', 'timm', 'transformers', 'open_clip', 'torchvision', 'ftfy', 'nltk')

def test_imports_without_any_extra():
    "Every exported module but `viz` imports where only the run-time dependencies are installed."
    package = ROOT / 'clipa_nb'
    modules = ['.'.join(p.relative_to(package).with_suffix('').parts) for p in sorted(package.rglob('*.py')) if p.stem not in ('__init__', '_modidx')]
    code = f'''
import sys, importlib
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r}: raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)
sys.meta_path.insert(0, Absent())
for name in {modules!r}:
    if name != 'engine.viz': importlib.import_module('clipa_nb.' + name)
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

def test_what_is_not_built_is_said():
    "A promise that is not kept is written down where a reader looks for it; whoever keeps it changes these sentences."
    text, chapter, log = ((ROOT / f).read_text() for f in ('CONTRIBUTING.md', 'nbs/14_distributed_trainer.ipynb', 'nbs/13_trainer.ipynb'))
    if 'fully_shard' not in (ROOT / 'clipa_nb/distributed_trainer.py').read_text(): assert 'FSDP2' in text and 'FSDP2' in chapter
    if 'ensorboard' not in (ROOT / 'settings.ini').read_text(): assert 'TensorBoard' in text and 'TensorBoard' in log

def test_contributing_is_a_page():
    text = (ROOT / 'CONTRIBUTING.md').read_text()
    assert len(text.split()) <= 1200
    for word in ('Deviations', '`info_nce(', '`f(model, ', 'metrics.jsonl', '75', '130', '`distributed_trainer`'): assert word in text, word
