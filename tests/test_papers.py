"Five papers in miniature, each a file outside the package that uses only the public seams: trained, killed, resumed, saved, opened, asked."
import ast, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch

ROOT = Path(__file__).resolve().parent.parent
LINES = dict(slip=40, filip=40, clippo=40, coca=80, owlvit=80)

def code_lines(path):
    "Lines that are neither blank, nor a comment, nor a docstring."
    text = path.read_text()
    docs = set()
    for n in ast.walk(ast.parse(text)):
        body = getattr(n, 'body', None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], 'value', None), ast.Constant):
            docs.update(range(body[0].lineno, body[0].end_lineno + 1))
    lines = text.splitlines()
    return sum(bool(line.strip()) and not line.strip().startswith('#') and i not in docs for i, line in enumerate(lines, 1))

@pytest.mark.parametrize('name', LINES)
def test_a_paper_is_small_and_uses_public_names_only(name):
    path = ROOT / 'tests/papers' / f'{name}.py'
    assert code_lines(path) <= LINES[name]
    assert all(len(l) <= 120 for l in path.read_text().splitlines())
    for n in ast.walk(ast.parse(path.read_text())):
        if isinstance(n, ast.ImportFrom) and (n.module or '').startswith('clipa_nb'):
            assert not [a.name for a in n.names if a.name.startswith('_')]
            assert not n.module.startswith('clipa_nb.app'), 'a paper needs no room above the recipes'

def paper(name):
    from clipa_nb.core import load_user_code
    recipe = getattr(load_user_code(ROOT / 'tests/papers' / f'{name}.py'), name.upper())
    return recipe.replace(data=recipe.data.replace(n=64)).with_stages(samples=24, batch_size=8)

def trace(comm, name, out, data):
    "Three steps in float64: the losses, and the parameters that did not move."
    from clipa_nb.app.run import Options, Run, build_task, needs_of, stage_optimizer
    from clipa_nb.recipes import train_config
    from clipa_nb.engine.loop import average
    from clipa_nb.trainer import train_step
    recipe = paper(name)
    run = Run(recipe, Options(out=str(out), train_data=data, device='cpu', precision='fp32', workers=0), Path(out), comm)
    task = build_task(recipe, 1, 0).double().train() # the second stage drops image tokens, where the paper lets it
    before = {k: p.detach().clone() for k, p in task.named_parameters()}
    optimizer, wrapped, cfg = stage_optimizer(recipe.stages[1], task), None, train_config(recipe.stages[1], 'fp32', comm.size)
    wrapped, batches = comm.wrap(task), run.batches(1, needs_of(task))
    losses = [float(average(train_step(wrapped, task, batches[step], optimizer, step, cfg, comm), comm)['loss']) for step in range(3)]
    return losses, [k for k, p in task.named_parameters() if p.requires_grad and torch.equal(p, before[k])]

@pytest.mark.parametrize('name', LINES)
def test_the_trace_is_the_same_on_two_ranks_and_everything_moves(name, tmp_path):
    from clipa_nb.core import LOCAL
    from clipa_nb.distributed_trainer import spawn
    alone, still = trace(LOCAL, name, tmp_path / 'one', '')
    assert not still, f'{still} did not move'
    assert alone[0] != alone[-1] and all(map(lambda v: v == v, alone))
    for losses, _ in spawn(trace, 2, name, tmp_path / 'two', str(tmp_path / 'one/data')):
        assert losses == pytest.approx(alone, rel=1e-9, abs=1e-9)

def losses_of(out): return [(r['step'], r['train/loss']) for r in map(json.loads, (out / 'metrics.jsonl').read_text().splitlines()) if 'train/loss' in r]

@pytest.mark.parametrize('name', LINES)
def test_trained_killed_resumed_saved_and_asked_from_the_command_line(name, tmp_path, clipa, monkeypatch):
    monkeypatch.setenv('CLIPA_USER_FILES', '')
    path = ROOT / 'tests/papers' / f'{name}.py'
    flags = ['--smoke', '--max-steps', '3', '--checkpoint-steps', '1', '--device', 'cpu', '--precision', 'fp32', '--workers', '0']
    train = [sys.executable, '-m', 'clipa_nb.cli', 'train', f'{path}:{name.upper()}', *flags, '--out', str(tmp_path / 'killed')]
    env = dict(os.environ, CLIPA_USER_FILES='', PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]))
    started = subprocess.Popen(train, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while started.poll() is None and not list((tmp_path / 'killed/checkpoints').glob('step_*/state.json')): time.sleep(0.01)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, started.stderr.read()
    assert not (tmp_path / 'killed/report.json').exists()
    clipa('train', f'{path}:{name.upper()}', *flags, '--out', tmp_path / 'whole')
    clipa('train', f'{path}:{name.upper()}', *flags, '--out', tmp_path / 'killed')
    assert losses_of(tmp_path / 'killed') == losses_of(tmp_path / 'whole') and len(losses_of(tmp_path / 'whole')) >= 2
    model = tmp_path / 'killed/model'
    assert json.loads((model / 'config.json').read_text())['kind'].startswith(('user.', 'clip:')) and (model / 'model.safetensors').exists()
    ask = [sys.executable, '-m', 'clipa_nb.cli', 'eval', str(model), '--suite', 'toy', '--device', 'cpu', '--out', str(tmp_path / 'scores.json')]
    done = subprocess.run([*ask, '--with', str(path)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / 'scores.json').read_text())['metrics']
    report = json.loads((tmp_path / 'killed/report.json').read_text())['metrics']
    assert scores and scores == {k: pytest.approx(v) for k, v in report.items()}
    forgot = subprocess.run(ask, env=env, capture_output=True, text=True)
    assert forgot.returncode == 2 and f'--with {name}.py' in forgot.stderr and 'Traceback' not in forgot.stderr, forgot.stderr
