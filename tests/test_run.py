"A run reaches every seam: what the recipe names is built, trained, kept, restored; what cannot work is refused early."
import contextlib, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ['train', 'toy', '--smoke', '--device', 'cpu', '--precision', 'fp32', '--workers', '0']

def rows(out, key='train/loss'): return [r for r in map(json.loads, (Path(out) / 'metrics.jsonl').read_text().splitlines()) if key in r]
def report(out): return json.loads((Path(out) / 'report.json').read_text())

def bad(clipa, *args, says):
    done = clipa(*args, check=2)
    assert says in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr and len([l for l in done.stderr.splitlines() if l.startswith('clipa: ')]) == 1
    return done

def started(*args, **kw):
    return subprocess.Popen([sys.executable, '-m', 'clipa_nb.cli', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kw)

PAPER = '''
"A paper of a test: every configuration of a recipe is one of its own."
from dataclasses import dataclass
import torch
from torch import nn
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.core import Config
from clipa_nb.infonce import Contrastive, ContrastiveConfig, row_mean
from clipa_nb.optimization import AdamW, Schedule, public_name
from clipa_nb.recipes import ToyData, recipe, smoke

class Scaled(Contrastive):
    "A loss with a number of its own, and a field of its own."
    needs = ('image', 'text', 'length')
    def __init__(self, start):
        super().__init__()
        self.offset, self.start = nn.Parameter(torch.tensor(start)), start
    def loss(self, features, model, batch, comm):
        out = super().loss(features, model, batch, comm)
        far_b = (self.offset - batch['length'].float() / 10) ** 2
        return dict(out, loss=out['loss'] + row_mean(far_b, batch['valid'], comm), offset=self.offset)

@dataclass(frozen=True)
class ScaledConfig(ContrastiveConfig):
    start: float = 1.
    def build(self, model): return Scaled(self.start)

def length(samples, batches, draw_b): return torch.tensor([len(s.text) if s else 0 for s in samples])
length.looks_at = ('text',)

@dataclass(frozen=True)
class Counted(ToyData):
    def makers(self): return dict(length=length)

class Wider(CLIP): pass

@dataclass(frozen=True)
class WiderConfig(ModelConfig):
    more: int = 2
    def build(self, output_dict=False): return Wider.from_config(self, output_dict)

@dataclass(frozen=True)
class Sgd(Config):
    momentum: float = 0.9
    def build(self, module, lr, rules=()):
        frozen = {p for p, what in rules if what == 'frozen'}
        for n, p in module.named_parameters(): p.requires_grad_(public_name(n) not in frozen)
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=lr, momentum=self.momentum)

@dataclass(frozen=True)
class Steps(Schedule):
    def rate(self, step, total, peak): return peak * 0.5 ** step

@dataclass(frozen=True)
class Asked(Config):
    def build(self, context):
        def ask(model, comm=None): return {'val/width': float(model.cfg.image.width), 'val/px': float(context.stage.image_size), 'val/quick': float(context.quick)}
        return ask

TOY = smoke(recipe('toy'))
DATA = Counted(**vars(TOY.data)).replace(n=64)
OWN = TOY.replace(name='own', model=WiderConfig(**vars(TOY.model)), objective=ScaledConfig(), data=DATA, evaluations=('user.own:Asked',))
OWN = OWN.with_stages(samples=3 * 16, batch_size=16, base_lr=1e-3, schedule=Steps(), optimizer=Sgd())
CHANGES = OWN.with_stages({}, dict(objective=ContrastiveConfig(), schedule=Steps(), frozen=('logit_scale',)))
'''

@pytest.fixture(scope='module')
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp('paper') / 'own.py'
    path.write_text(PAPER)
    return path

def quick(own, name='OWN', *more): return ['train', f'{own}:{name}', '--device', 'cpu', '--precision', 'fp32', '--workers', '0', '--checkpoint-steps', '1', *more]

@pytest.fixture(scope='module')
def papers_run(clipa, own, tmp_path_factory):
    out = tmp_path_factory.mktemp('papers') / 'own'
    clipa(*quick(own), '--out', out)
    return out

# ---- the recipe builds everything ----

def test_everything_is_built_by_kind(papers_run, own):
    plan = json.loads((papers_run / 'plan.json').read_text())['recipe']
    assert [plan[k]['kind'] for k in ('model', 'objective', 'data')] == ['user.own:WiderConfig', 'user.own:ScaledConfig', 'user.own:Counted']
    assert plan['stages'][0]['optimizer']['kind'] == 'user.own:Sgd' and plan['stages'][0]['schedule']['kind'] == 'user.own:Steps'
    r = rows(papers_run)
    assert [x['train/lr'] for x in r[:3]] == pytest.approx([1e-3 / 16, 1e-3 / 32, 1e-3 / 64]) # the paper's own schedule, at a batch of 16
    assert r[2]['train/offset'] != r[0]['train/offset'] # the objective's parameter learns
    assert r[3]['train/offset'] == pytest.approx(json_offset(papers_run, 3)) and r[3]['train/offset'] != 1. # stage 2 goes on with it
    assert report(papers_run)['metrics'] == {'val/width': 64., 'val/px': 64., 'val/quick': 0.}
    assert {r['val/quick'] for r in rows(papers_run, 'val/quick')} == {1.} and {r['val/px'] for r in rows(papers_run, 'val/px')} == {32., 64.}

def json_offset(out, step):
    "What the objective's number was after `step` steps: the first loss of the next step says it."
    return [r['train/offset'] for r in rows(out) if r['step'] == step + 1][0]

def test_what_a_checkpoint_holds(papers_run):
    from clipa_nb.engine.checkpoints import Saved, verify
    last = sorted((papers_run / 'checkpoints').iterdir())[-1]
    found = Saved(last); tensors = found.tensors()
    assert verify(last) == '' and (found.state['stage'], found.state['samples'], found.state['seed']) == (1, 48, 0)
    assert 'objective.offset' in tensors and 'optimizer.momentum_buffer.objective.offset' in tensors
    assert json.loads((papers_run / 'model' / 'config.json').read_text())['kind'] == 'user.own:WiderConfig'

def test_a_killed_paper_goes_on(own, papers_run, tmp_path):
    out = tmp_path / 'run'
    victim = started(*quick(own), '--out', out)
    until = time.time() + 120
    while time.time() < until and victim.poll() is None and not list((out / 'checkpoints').glob('step_*')): time.sleep(0.01)
    victim.kill(); victim.communicate()
    done = started(*quick(own), '--out', out); said, err = done.communicate(timeout=200)
    assert done.returncode == 0, err
    for key in ('train/loss', 'train/offset'): assert [r[key] for r in rows(out)] == [r[key] for r in rows(papers_run)]

def test_two_ranks_train_the_same_paper(own, papers_run, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'clipa_nb.cli', *quick(own), '--out', tmp_path / 'two']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for key in ('train/loss', 'train/offset'): assert [r[key] for r in rows(tmp_path / 'two')] == pytest.approx([r[key] for r in rows(papers_run)], rel=1e-3), key

def test_a_stage_with_another_objective(clipa, own, tmp_path):
    "Stage 2 has the plain loss: no offset, and no field for it; its temperature is frozen by name."
    clipa(*quick(own, 'CHANGES'), '--out', tmp_path / 'x')
    r = rows(tmp_path / 'x')
    assert ['train/offset' in x for x in r] == [True] * 3 + [False] * 3
    assert len({x['train/logit_scale'] for x in r[3:]}) == 1

def test_a_stage_with_its_own_data(clipa, tmp_path):
    from clipa_nb.data import PairData
    from clipa_nb.recipes import TOY, ToyData, smoke
    clipa('data', 'make', tmp_path / 'shards', '--n', '64')
    r = smoke(TOY).with_stages(dict(data=ToyData('rich', n=70)), dict(data=PairData(path=str(tmp_path / 'shards'))), samples=32)
    (tmp_path / 'r.json').write_text(r.to_json())
    clipa('train', tmp_path / 'r.json', '--device', 'cpu', '--precision', 'fp32', '--workers', '0', '--out', tmp_path / 'x')
    plan = json.loads((tmp_path / 'x' / 'plan.json').read_text())
    assert [d['samples'] for d in plan['data']] == [70, 64]
    assert (tmp_path / 'x' / 'stage 0' / 'data' / '000000.tar').exists() and not (tmp_path / 'x' / 'data').exists()

def test_the_average_is_what_is_saved(clipa, tmp_path):
    import torch
    from clipa_nb.engine.checkpoints import Saved
    from clipa_nb.pretrained import create_model
    out = tmp_path / 'x'
    clipa(*SMOKE, '--max-steps', '3', '--ema', '0.5', '--out', out)
    tensors = Saved(sorted((out / 'checkpoints').iterdir())[-1]).tensors()
    saved = create_model(f'local-dir:{out / "model"}').state_dict()
    assert all(torch.equal(v, tensors[f'ema.module.{k}']) for k, v in saved.items())
    assert not torch.equal(saved['logit_scale'], tensors['model.logit_scale'])

def test_clipping_and_the_micro_batch_reach_the_trainer(clipa, tmp_path, monkeypatch):
    import clipa_nb.app.run as module
    seen, real = [], module.fit
    def watched(wrapped, task, data, optimizer, cfg, **kw):
        seen.append((cfg.grad_clip, cfg.chunks, task.model.cfg.checkpointing))
        return real(wrapped, task, data, optimizer, cfg, **kw)
    monkeypatch.setattr(module, 'fit', watched)
    clipa(*SMOKE, '--max-steps', '1', '--grad-clip', '0.5', '--batch-size', '10', '--set', 'stages.*.checkpointing=full', '--out', tmp_path / 'x')
    assert seen == [(0.5, 4, 'full')] * 2

# ---- beginning from other weights ----

@pytest.fixture(scope='module')
def trained(clipa, tmp_path_factory):
    out = tmp_path_factory.mktemp('trained') / 'toy'
    clipa(*SMOKE, '--out', out)
    return out

@pytest.mark.parametrize('spec, same, other', [('{}', 'visual.', ''), ('visual={}', 'visual.', 'text.'), ('text={}/model', 'text.', 'visual.')])
def test_a_run_begins_with_other_weights(trained, tmp_path, capsys, spec, same, other):
    import torch
    from clipa_nb.app.run import Options, Run, begin_stage, effective
    from clipa_nb.engine.index import Shards
    from clipa_nb.pretrained import create_model
    from clipa_nb.recipes import TOY
    options = Options(smoke=True, device='cpu', precision='fp32', init_from=(spec.format(trained),), seed=3)
    run = Run(effective(TOY, options), options, tmp_path, source=Shards(str(trained / 'data')))
    task, *_ = begin_stage(run, 0)
    theirs, fresh = create_model(f'local-dir:{trained / "model"}').state_dict(), run.task(0).model.state_dict()
    for k, v in task.model.state_dict().items():
        if k == 'text.positions': continue # of another length
        if k.startswith(same): assert torch.equal(v, theirs[k]), k
        if other and k.startswith(other): assert torch.equal(v, fresh[k]), k
    assert str(trained) in capsys.readouterr().err # what was loaded is said
    fresh = run.task(0).state_dict()
    again, *_ = begin_stage(run, 1, weights=fresh) # a later stage goes on: it does not begin with them anew
    assert all(torch.equal(v, fresh[k]) for k, v in again.state_dict().items() if 'positions' not in k)

def test_initial_weights_are_part_of_the_run(clipa, trained, tmp_path):
    clipa(*SMOKE, '--max-steps', '1', '--init-from', trained, '--out', tmp_path / 'x')
    assert json.loads((tmp_path / 'x' / 'plan.json').read_text())['recipe']['init_from'] == [str(trained)]
    bad(clipa, *SMOKE, '--max-steps', '1', '--out', tmp_path / 'x', says='holds another run (toy; init_from')

# ---- what the options change ----

def test_short_flags_are_changes_of_the_recipe():
    from clipa_nb.app.run import Options, effective, what_changed
    from clipa_nb.infonce import SigmoidConfig
    from clipa_nb.recipes import TOY, recipe
    from clipa_nb.tokenizer import LearntVocabulary, Vocabulary
    def e(**kw): return effective(TOY, Options(**kw))
    assert [s.lr for s in e(lr=2e-3, global_batch=64).stages] == pytest.approx([2e-3, 2e-3])
    for flags, field, value in ((dict(samples=1000), 'samples', 1000), (dict(global_batch=64), 'batch_size', 64), (dict(batch_size=8), 'micro_batch', 8), (dict(image_size=48), 'image_size', 48), (dict(grad_clip=1.), 'grad_clip', 1.), (dict(ema=0.9), 'ema', 0.9)):
        assert {getattr(s, field) for s in e(**flags).stages} == {value}
        assert set(what_changed(TOY, Options(**flags))) <= {f'stages.{i}.{field}' for i in (0, 1)} and what_changed(TOY, Options(**flags))
    assert e(model='ViT-B/16').model.image.width == 768 and e(tokenizer='clip').tokenizer == Vocabulary('clip')
    assert effective(recipe('clipa-v2-h14'), Options(tokenizer='learnt')).tokenizer == LearntVocabulary()
    assert e(loss='sigmoid').objective == SigmoidConfig() and e(loss='sigmoid').model.init_bias == -10.
    assert e(init_from=('a', 'visual=b')).init_from == ('a', 'visual=b')
    assert what_changed(TOY, Options(smoke=True, max_steps=3)) == {}

def test_set_reaches_every_field():
    from clipa_nb.app.run import Options, effective
    from clipa_nb.core import UserError
    from clipa_nb.infonce import SigmoidConfig
    from clipa_nb.recipes import TOY
    def e(*changes): return effective(TOY, Options(changes=changes))
    r = e('stages.0.base_lr=2e-3', 'model.image.depth=6', 'stages.*.optimizer.weight_decay=0.3', 'stages.1.schedule=optimization:Constant', 'objective=infonce:SigmoidConfig', 'data.n=100', 'stages.1.frozen=text.*,logit_scale')
    assert (r.stages[0].base_lr, r.model.image.depth, r.data.n, r.objective, r.stages[1].frozen) == (2e-3, 6, 100, SigmoidConfig(), ('text.*', 'logit_scale'))
    assert [s.optimizer.weight_decay for s in r.stages] == [0.3, 0.3] and type(r.stages[1].schedule).__name__ == 'Constant'
    assert effective(TOY, Options(changes=('stages.0.samples=256000',), max_steps=2)).stages[0].samples == 256 # --max-steps comes last
    for wrong, says in (('stages.0.base_lt=1', '--set stages.0.base_lt=1: .*did you mean base_lr'), ('stages.0.base_lr=fast', "found 'fast', expected a number"), ('stages.7.ema=0.1', 'it has 2 entries'), ('name', 'expected FIELD=VALUE'), ('stages.0.batch_size=0', 'batch_size is 0')):
        with pytest.raises(UserError, match=says): e(wrong)
    for wrong, says in ((dict(loss='triplet'), 'unknown loss'), (dict(model='ViT-B-166'), 'ViT-B-16'), (dict(lr=-1.), '--lr -1.0: use 0 or more')):
        with pytest.raises(UserError, match=says): effective(TOY, Options(**wrong))

def test_the_plan_shows_what_was_changed(clipa, tmp_path):
    said = clipa(*SMOKE, '--dry-run', '--lr', '0.001', '--set', 'model.image.depth=3', '--out', tmp_path / 'x').stdout
    assert 'model.image.depth: 2 → 3' in said and 'stages.0.base_lr: 0.001 → 0.008' in said and not (tmp_path / 'x').exists()

# ---- the command line ----

def test_recipes_as_json_can_be_trained(clipa, tmp_path):
    text = clipa('recipes', '--json', 'toy').stdout
    (tmp_path / 'r.json').write_text(text.replace('"name": "toy"', '"name": "mine"', 1))
    for how in (['train', tmp_path / 'r.json', '--dry-run', '--device', 'cpu', '--precision', 'fp32', '--smoke'], ['cost', tmp_path / 'r.json']): assert clipa(*how).stdout.startswith('mine, ')
    bad(clipa, 'recipes', '--json', 'tooy', says='did you mean toy')

def test_cost_and_doctor_take_a_users_recipe(clipa, own):
    assert 'own, seed 0' in clipa('cost', f'{own}:OWN', '--set', 'stages.0.samples=1600').stdout
    assert 'bottleneck' in clipa('doctor', f'{own}:OWN', '--device', 'cpu', '--workers', '0').stdout

def test_flags_given_twice(clipa, tmp_path):
    from clipa_nb.cli import tidy
    assert tidy(['train', 'toy', '--train-data', 'a', '--seed', '1', '--train_data=b']) == ['train', 'toy', '--train-data', 'a::b', '--seed', '1']
    assert tidy(['train', 'toy', '--set', 'a=1', '--set=b=2', '--smoke', '--smoke'])[2:] == ['--set', 'a=1', '--set', 'b=2', '--smoke', '--smoke']
    assert tidy(['x', '--out=~/runs', '--classes', '~/a']) == ['x', '--out', os.path.expanduser('~/runs'), '--classes', '~/a']
    bad(clipa, 'train', 'toy', '--seed', '1', '--seed', '2', says='--seed is given twice: 1 and 2')
    for n in ('a', 'b'): clipa('data', 'make', tmp_path / n, '--n', '40')
    clipa(*SMOKE, '--max-steps', '1', '--train-data', tmp_path / 'a', '--train-data', tmp_path / 'b', '--out', tmp_path / 'x')
    assert json.loads((tmp_path / 'x' / 'plan.json').read_text())['data'][0]['samples'] == 80

def test_home_is_home(clipa, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home')); (tmp_path / 'home').mkdir(); (tmp_path / 'here').mkdir()
    clipa(*SMOKE, '--max-steps', '1', '--out=~/x', cwd=tmp_path / 'here')
    assert (tmp_path / 'home' / 'x' / 'report.json').exists() and not list((tmp_path / 'here').iterdir())

def test_the_version(clipa):
    import torch
    assert clipa('--version').stdout.split()[0] == 'clipa_nb' and torch.__version__ in clipa('--version').stdout

def test_help_reads_well(clipa):
    said = {name: clipa(name, '--help').stdout for name in ('train', 'eval', 'export', 'import', 'doctor', 'data', 'cost', 'recipes', 'demo')}
    for name, text in said.items():
        assert 'STR STR' not in text and 'options options' not in text and 'None' not in text, name
        if name not in ('eval',): assert "(default: '')" not in text and '(default: )' not in text, name
    for name, words in (('train', ' RECIPE'), ('export', ' MODEL OUT'), ('eval', ' MODEL'), ('data', ' PATH')): assert words in said[name].partition('\n\n')[0], name
    assert '--no-smoke' not in said['train'] and '--set FIELD=VALUE' in said['train'] and '--with PATH.py' in said['export']

def test_random_weights_must_be_asked_for(clipa, tmp_path):
    for command in (['export', 'ViT-S-16-CLIPA', tmp_path / 'x'], ['eval', 'ViT-S-16-CLIPA']): bad(clipa, *command, says='names an architecture without weights')
    assert not (tmp_path / 'x').exists()
    bad(clipa, 'export', 'modle', tmp_path / 'x', says='local-dir:PATH')
    bad(clipa, 'eval', 'modle', says='local-dir:PATH')

def test_exporting_a_model_over_itself(clipa, trained, tmp_path):
    before = sorted(p.name for p in (trained / 'model').iterdir())
    for out in (trained / 'model', trained / 'model' / '..' / 'model'): bad(clipa, 'export', trained / 'model', out, says='both are the same directory')
    bad(clipa, 'export', trained, trained / 'model', says='both are the same directory')
    assert sorted(p.name for p in (trained / 'model').iterdir()) == before
    clipa('export', trained / 'model', tmp_path / 'x')
    assert (tmp_path / 'x' / 'recipe.json').read_text() == (trained / 'model' / 'recipe.json').read_text() # the same questions afterwards

def test_a_second_ctrl_c(tmp_path):
    "The whole group is interrupted twice, loader processes included, as a terminal does it: one line, 130, no traceback."
    done = started(*SMOKE[:-1], '2', '--set', 'stages.*.samples=100000', '--out', tmp_path / 'x', start_new_session=True)
    until = time.time() + 120
    while time.time() < until and not (tmp_path / 'x' / 'checkpoints').exists() and done.poll() is None: time.sleep(0.05)
    for _ in range(4):
        with contextlib.suppress(ProcessLookupError): os.killpg(done.pid, signal.SIGINT)
        time.sleep(0.02)
    _, err = done.communicate(timeout=60)
    assert done.returncode == 130 and 'Traceback' not in err and 'To go on: clipa train toy' in err, (done.returncode, err[-3000:])

# ---- the run directory ----

def test_the_same_place_in_other_words(clipa, tmp_path):
    "`./d`, `d/` and `d` are one place, and pieces of another size are the same run."
    clipa('data', 'make', tmp_path / 'd', '--n', '64')
    run = [*SMOKE, '--max-steps', '1', '--out', 'x', '--train-data']
    clipa(*run, 'd', cwd=tmp_path)
    for where in ('./d', 'd/', tmp_path / 'd'): assert 'is finished' in clipa(*run, where, '--batch-size', '4', cwd=tmp_path).stdout

def test_shards_that_were_added_are_noticed(clipa, tmp_path):
    import shutil
    clipa('data', 'make', tmp_path / 'd', '--n', '64')
    run = [*SMOKE, '--max-steps', '2', '--out', tmp_path / 'x', '--train-data', tmp_path / 'd']
    clipa(*run); (tmp_path / 'x' / 'report.json').unlink() # as if it had been stopped
    shutil.copy(tmp_path / 'd' / '000000.tar', tmp_path / 'd' / '000001.tar')
    bad(clipa, *run, says='had 64 samples in 1 files when the run began and has 128 samples in 2 files now')
    (tmp_path / 'd' / '000000.tar').unlink()
    bad(clipa, *run, says='has 64 samples in 1 files as before, but not the same ones')
    told = clipa(*run, '--other-data')
    assert told.returncode == 0 and 'going on with it' in told.stderr and json.loads((tmp_path / 'x' / 'plan.json').read_text())['data'][0]['deal']['lanes'] > 1
    (tmp_path / 'x' / 'report.json').unlink()
    bad(clipa, *run[:-1], tmp_path / 'd', '--set', 'stages.0.base_lr=1', says='holds another run')
    clipa(*run) # what it went on with is what it has
    (tmp_path / 'x' / 'report.json').unlink()
    (tmp_path / 'd' / '000001.tar').rename(tmp_path / 'd' / '000000.tar')
    clipa(*run, '--other-data')

def test_two_runs_cannot_share_a_directory(clipa, tmp_path):
    hold = f"import time\nfrom pathlib import Path\nfrom clipa_nb.app.run import sole_user\nwith sole_user(Path({str(tmp_path / 'x')!r})):\n    print('held', flush=True)\n    time.sleep(60)\n"
    (tmp_path / 'x').mkdir()
    other = subprocess.Popen([sys.executable, '-c', hold], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == 'held\n'
    refused = bad(clipa, *SMOKE, '--max-steps', '1', '--out', tmp_path / 'x', says=f'is in use by process {other.pid} on ')
    assert not (tmp_path / 'x' / 'metrics.jsonl').exists() and 'choose another --out' in refused.stderr
    other.kill(); other.wait() # whatever ends a process gives its lock back
    clipa(*SMOKE, '--max-steps', '1', '--out', tmp_path / 'x')

def test_damaged_checkpoints_are_no_beginning(clipa, tmp_path):
    out = tmp_path / 'x'; run = [*SMOKE, '--max-steps', '2', '--out', out]
    clipa(*run); (out / 'report.json').unlink()
    log, there = (out / 'metrics.jsonl').read_text(), sorted((out / 'checkpoints').iterdir())
    for p in there: next(p.glob('*.safetensors')).write_bytes(b'damaged')
    bad(clipa, *run, says=f'all {len(there)} checkpoints are damaged')
    assert (out / 'metrics.jsonl').read_text() == log

@pytest.fixture(scope='module')
def damaged(tmp_path_factory):
    "100 pairs; every eleventh picture is none, one json is broken, one caption is missing."
    import io, tarfile
    from clipa_nb.recipes import ToyData
    where = tmp_path_factory.mktemp('damaged') / 'd'; where.mkdir()
    with tarfile.open(where / '000000.tar', 'w') as t:
        for i, (key, picture, text, meta) in enumerate(ToyData(n=100).samples()):
            parts = {'jpg': b'no picture' if i % 11 == 5 else picture, 'txt': text.encode(), 'json': b'{' if i == 7 else json.dumps(meta).encode()}
            for ending, data in parts.items():
                info = tarfile.TarInfo(f'{key}.{ending}'); info.size = len(data); t.addfile(info, io.BytesIO(data))
    return where

def test_what_cannot_be_read_is_said(clipa, damaged, tmp_path):
    "Once on the error stream, in the log, and in the report; the vocabulary is learnt all the same."
    out = tmp_path / 'x'
    done = clipa(*SMOKE, '--global-batch', '50', '--samples', '100', '--train-data', damaged, '--out', out)
    assert done.stderr.count('not an image') == done.stderr.count('bad json') == done.stderr.count('were left out') == 4, done.stderr # first and in all, in each stage
    assert rows(out)[1]['train/skipped'] == 10 and rows(out)[1]['skipped'] == {'not an image': 9, 'bad json': 1}
    assert rows(out)[1]['skipped_in'] == {'000000.tar: not an image': 9, '000000.tar: bad json': 1}
    assert report(out)['skipped'] == {'not an image': 18, 'bad json': 2} # two stages see each pair once
    assert 'could not be read: 20 samples (not an image 18×, bad json 2×)' in done.stdout
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '-m', 'clipa_nb.cli', *SMOKE, '--global-batch', '50', '--samples', '100', '--train-data', damaged, '--out', tmp_path / 'two']
    two = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert two.returncode == 0, two.stderr[-2000:]
    assert report(tmp_path / 'two')['skipped'] == report(out)['skipped']
    assert [r['train/loss'] for r in rows(tmp_path / 'two')] == pytest.approx([r['train/loss'] for r in rows(out)], rel=1e-3)

# ---- what a dry run finds, before anything is timed ----

@pytest.mark.parametrize('more, says', [
    (['--tokenizer', 'nowhere/words'], 'nowhere/words'), (['--train-data', '{tmp}/none'], 'none'), (['--set', 'objective.key=True'], "the samples of"), (['--set', 'stages.1.frozen=visuall.*'], 'parameter pattern'),
    (['--init-from', '{tmp}/none'], 'none'), (['--set', 'evaluations=app.exam:ToyExma'], 'did you mean ToyExam'), (['--set', 'stages.0.text_strategy=sintax'], 'did you mean syntax'), (['--set', 'stages.0.image_size=33'], 'use 32 or 40'),
    (['--set', 'model.pool=avgg'], 'avg'), (['--set', 'stages.1.optimizer.decay=kernel'], 'did you mean kernels'), (['--set', 'objective=infonce:SigmoidConfig'], 'bias'), (['--init-from', 'ViT-B-16'], 'has no weights')], ids=lambda x: x[-1] if isinstance(x, list) else '')
def test_a_dry_run_finds(clipa, tmp_path, monkeypatch, more, says):
    def timed(*args, **kw): raise AssertionError('something was timed')
    monkeypatch.setattr('clipa_nb.app.run.trial_seconds', timed)
    base = [a for a in SMOKE if a != '--smoke'] if '--tokenizer' in more else SMOKE
    for how in (['--dry-run'], []):
        bad(clipa, *base, *how, *[a.format(tmp=tmp_path) for a in more], '--out', tmp_path / 'x', says=says)
        assert not list(tmp_path.iterdir())

def test_a_dry_run_asks_for_what_the_objective_needs(clipa, own, tmp_path):
    clipa('data', 'make', tmp_path / 'd', '--n', '40')
    said = bad(clipa, 'train', f'{own}:OWN', '--dry-run', '--device', 'cpu', '--set', 'data=data:PairData', '--train-data', tmp_path / 'd', says="nothing makes the field 'length'")
    assert 'own, seed 0' in said.stdout # the plan is printed all the same
    bad(clipa, *SMOKE, '--dry-run', '--set', 'objective.key=True', '--train-data', tmp_path / 'd', says="lack 'key'")

def test_a_dry_run_of_the_largest_takes_seconds(clipa, tmp_path):
    "A vocabulary of the right size is all that it has to read; the model is never filled."
    clipa('data', 'make', tmp_path / 'd', '--n', '40')
    start = time.process_time()
    said = clipa('train', 'clipa-v2-h14', '--tokenizer', 'learnt', '--dry-run', '--device', 'cpu', '--batch-size', '64', '--train-data', tmp_path / 'd').stdout
    assert '195,490' in said and time.process_time() - start < 20
