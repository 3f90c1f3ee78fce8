"The command line as a user meets it: exit codes, one-line errors, killing, resuming, ranks."
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
SMOKE = ['train', 'toy', '--smoke', '--device', 'cpu', '--precision', 'fp32', '--workers', '0']

def rows(out, key='train/loss'): return [r for r in map(json.loads, (Path(out) / 'metrics.jsonl').read_text().splitlines()) if key in r]
def report(out): return json.loads((Path(out) / 'report.json').read_text())

@pytest.fixture(scope='session')
def finished(clipa, tmp_path_factory):
    "One finished smoke run that several tests look at."
    out = tmp_path_factory.mktemp('runs') / 'finished'
    clipa(*SMOKE, '--out', out)
    return out

def test_a_run_leaves_what_it_promises(finished):
    there = {p.name for p in finished.iterdir()}
    assert {'plan.json', 'metrics.jsonl', 'checkpoints', 'model', 'report.json', 'report.png'} <= there
    assert not [p for p in finished.rglob('*') if 'tmp' in p.name]
    assert [r['step'] for r in rows(finished)] == list(range(1, 17))
    plan = json.loads((finished / 'plan.json').read_text())
    assert [s['steps'] for s in plan['stages']] == [8, 8] and plan['stages'][0]['flops'] > 0

def test_a_finished_run_prints_its_report_again(clipa, finished):
    before = (finished / 'report.json').stat().st_mtime_ns
    done = clipa(*SMOKE, '--out', finished)
    assert 'is finished' in done.stdout and 'held-out pairs' in done.stdout
    assert (finished / 'report.json').stat().st_mtime_ns == before

def test_eval_prints_the_same_numbers(clipa, finished, tmp_path):
    clipa('eval', finished / 'model', '--device', 'cpu', '--out', tmp_path / 'eval.json')
    assert json.loads((tmp_path / 'eval.json').read_text())['metrics'] == report(finished)['metrics']

def numbers(path): return json.loads(Path(path).read_text())['metrics']

def test_each_suite_asks_the_toy_world(clipa, finished, tmp_path):
    "Zero-shot, retrieval and robustness say what the run's report says; the probes learn from other pictures than they are asked about."
    from clipa_nb.cli import main
    for suite in ('zero-shot', 'retrieval', 'robustness', 'probes'):
        shots = ['--shots', '1'] if suite == 'probes' else []
        assert main(['eval', str(finished / 'model'), '--suite', suite, '--device', 'cpu', '--out', str(tmp_path / f'{suite}.json'), *shots]) == 0
    told = report(finished)['metrics']
    for suite in ('zero-shot', 'retrieval'):
        common = set(numbers(tmp_path / f'{suite}.json')) & set(told)
        assert common and {k: numbers(tmp_path / f'{suite}.json')[k] for k in common} == {k: told[k] for k in common}
    moved = numbers(tmp_path / 'robustness.json')
    assert moved['val/invert_top1'] == told['val/shift-invert-zeroshot-val-top1']
    assert set(moved) == {f'val/{k}_top1' for k in ('clean', 'sketch', 'palette', 'invert', 'blur', 'rotate', 'small')} # no line of peers, so nothing is averaged
    assert set(numbers(tmp_path / 'probes.json')) == {f'val/{k}-{m}' for k in ('shape', 'digits') for m in ('linear-probe-top1', 'linear-probe-top5', 'linear-probe-mean_per_class', '1-shot_top1')}

@pytest.fixture(scope='session')
def own(finished, tmp_path_factory):
    "Own test data: a folder of class folders with red and blue squares, and its captioned twin."
    from PIL import Image
    root = tmp_path_factory.mktemp('own')
    for label, (name, colour) in enumerate((('a blue thing', (20, 20, 220)), ('a red thing', (220, 20, 20)))):
        for i in range(4):
            picture = Image.new('RGB', (40, 40), tuple(c + 9 * i for c in colour))
            for where, stem in ((root / 'classes' / name, str(i)), (root / 'pairs', f'{label}{i}')):
                where.mkdir(parents=True, exist_ok=True); picture.save(where / f'{stem}.png')
            (root / 'pairs' / f'{label}{i}.txt').write_text(name); (root / 'pairs' / f'{label}{i}.json').write_text(json.dumps(dict(label=label)))
    (root / 'names.txt').write_text('a blue thing\na red thing\n'); (root / 'prompts.txt').write_text('{}\na photo of {}\n')
    return root

def test_eval_on_own_data(finished, own, tmp_path):
    from clipa_nb.app.questions import Questions
    from clipa_nb.app.questions import eval_model
    ask = lambda **kw: eval_model(str(finished / 'model'), Questions(device='cpu', **kw))['metrics']
    where = lambda name: str(own / name)
    folders = ask(suite='zero-shot', val_data=(where('classes'),))
    assert folders == {k.replace('pairs', 'classes'): v for k, v in ask(suite='zero-shot', val_data=(where('pairs'),), classes=where('names.txt'), batch_size=3).items()}
    assert set(folders) == {f'val/classes-zeroshot-val-{k}' for k in ('top1', 'mean_per_class', 'roc_auc')} # two classes have no top-5, but a curve
    probes = ask(suite='probes', val_data=(where('classes'),), train_data=where('pairs'), classes=where('names.txt'), shots=(1, 4))
    assert probes['val/classes-linear-probe-top1'] == 1 # red and blue: any features will do
    both = ask(suite='robustness', val_data=(f'first={where("classes")}', f'second={where("pairs")}'), classes=where('names.txt'), templates=where('prompts.txt'))
    assert both['val/second_top1'] == both['val/clean_top1'] == 1
    assert set(ask(suite='retrieval', val_data=(where('pairs'),))) == {f'val/{a}_to_{b}_R@{k}' for a, b in (('image', 'text'), ('text', 'image')) for k in (1, 5)} | {'val/mean_recall'}

def test_eval_refuses(clipa, finished, own, tmp_path):
    for out in (tmp_path / 'nodir' / 'x.json', tmp_path): bad(clipa, 'eval', finished / 'model', '--out', out, says='give a file in a directory that exists')
    bad(clipa, 'eval', finished / 'model', '--suite', 'retreival', says='did you mean retrieval')
    bad(clipa, 'eval', finished / 'model', '--suite', 'retrieval', '--classes', own / 'names.txt', '--val-data', own / 'pairs', says='--classes has no meaning for --suite retrieval')
    from clipa_nb.app.questions import Questions
    from clipa_nb.app.questions import eval_model
    from clipa_nb.core import UserError
    (tmp_path / 'one.txt').write_text('a blue thing\n'); (tmp_path / 'bad.txt').write_text('no place for a name\n')
    for more, says in ((dict(val_data=(str(own / 'pairs'),)), 'give --classes'), (dict(val_data=(str(tmp_path / 'none'),)), 'none'), (dict(val_data=(str(own / 'pairs'),), classes=str(tmp_path / 'one.txt')), 'head has 1 classes'),
                       (dict(val_data=(str(own / 'classes'),), templates=str(tmp_path / 'bad.txt')), 'no place for the class name')):
        with pytest.raises(UserError, match=says): eval_model(str(finished / 'model'), Questions(suite='zero-shot', device='cpu', **more))

def test_the_same_seed_gives_the_same_report(clipa, finished, tmp_path):
    clipa(*SMOKE, '--out', tmp_path / 'again')
    assert report(tmp_path / 'again')['metrics'] == report(finished)['metrics']
    assert [r['train/loss'] for r in rows(tmp_path / 'again')] == [r['train/loss'] for r in rows(finished)]

def test_workers_do_not_change_the_run(clipa, finished, tmp_path):
    clipa(*[a if a != '0' else '2' for a in SMOKE], '--out', tmp_path / 'two')
    assert [r['train/loss'] for r in rows(tmp_path / 'two')] == [r['train/loss'] for r in rows(finished)]

def test_accumulation_does_not_change_the_run(clipa, finished, tmp_path):
    "The losses are those of one graph; draws belong to samples, so that dropping does not change with the pieces."
    clipa(*SMOKE, '--out', tmp_path / 'chunks', '--batch-size', '8')
    a, b = rows(tmp_path / 'chunks'), rows(finished)
    assert [r['train/loss'] for r in a] == pytest.approx([r['train/loss'] for r in b], rel=1e-4)
    assert [r['train/logit_scale'] for r in a] == pytest.approx([r['train/logit_scale'] for r in b], rel=1e-5)

def start(*args): return subprocess.Popen([sys.executable, '-m', 'clipa_nb.cli', *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
def wait_for_checkpoint(out, process, limit=120):
    until = time.time() + limit
    while time.time() < until and process.poll() is None:
        if list((Path(out) / 'checkpoints').glob('step_*')): return
        time.sleep(0.01)
    raise AssertionError(f'no checkpoint\n{process.communicate()}')

LONG = [*SMOKE, '--checkpoint-steps', '1']

@pytest.mark.parametrize('sig, code', [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_stopping_and_going_on(clipa, finished, tmp_path, sig, code):
    "Killed, interrupted or preempted: the same command finishes the run, and it is the same run."
    out = tmp_path / 'run'
    victim = start(*LONG, '--out', out); wait_for_checkpoint(out, victim)
    victim.send_signal(sig); _, err = victim.communicate(timeout=60)
    assert victim.returncode == code, err
    assert not (out / 'report.json').exists()
    if code != -9: assert 'To go on: clipa train toy' in err and 'Traceback' not in err
    clipa(*LONG, '--out', out)
    assert [r['step'] for r in rows(out)] == list(range(1, 17))
    assert [r['train/loss'] for r in rows(out)] == [r['train/loss'] for r in rows(finished)]
    assert report(out)['metrics'] == report(finished)['metrics']

@pytest.mark.parametrize('where', ['trial_seconds', 'open_tokenizer', 'final_scores'])
def test_interrupted_outside_training(clipa, tmp_path, monkeypatch, where):
    "While planning, drawing or evaluating there are no steps to stop between; the same command goes on all the same."
    def ctrl_c(*args, **kw): raise KeyboardInterrupt
    command = [*SMOKE, '--max-steps', '1', '--out', tmp_path / 'run']
    with monkeypatch.context() as m:
        m.setattr(f'clipa_nb.app.run.{where}', ctrl_c)
        assert clipa(*command, check=130).stderr.splitlines()[-1].startswith('clipa: interrupted. To go on: clipa train toy --smoke')
    clipa(*command)
    assert report(tmp_path / 'run')['metrics']

def bad(clipa, *args, says):
    done = clipa(*args, check=2)
    assert says in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr
    assert len([l for l in done.stderr.splitlines() if l.startswith('clipa: ')]) == 1
    return done

def test_a_mistake_as_a_process():
    "What the other tests see of `main`, seen from outside: code 2, one line, nothing else."
    done = start('train', 'tooy'); out, err = done.communicate(timeout=120)
    assert done.returncode == 2 and out == '' and err.count('\n') == 1 and 'did you mean toy' in err

def test_debug_shows_where_and_keeps_the_code(clipa, monkeypatch):
    line = clipa('train', 'tooy', check=2).stderr
    shown = clipa('train', 'tooy', '--debug', check=2).stderr
    assert shown.startswith('Traceback') and 'UserError' in shown and shown.endswith(line) and 'Traceback' not in line
    def breaks(*args): raise KeyError('nothing of yours')
    monkeypatch.setattr('clipa_nb.cli.run', breaks)
    line = clipa('train', 'toy', check=1).stderr
    shown = clipa('train', 'toy', '--debug', check=1).stderr
    assert 'in breaks' in shown and shown.startswith('Traceback') and "clipa: failed: KeyError: 'nothing of yours'" in shown and 'in breaks' not in line

def test_every_parameter_of_a_command_has_its_help(clipa):
    import inspect
    from clipa_nb.cli import COMMANDS
    def words(text): return ' '.join(text.replace('│', ' ').split())
    for name, f in COMMANDS.items():
        beside = {k: line.split('# ', 1)[1].strip() for k in inspect.signature(f).parameters for line in inspect.getsource(f).splitlines() if line.startswith(f'    {k}: ') and '# ' in line}
        assert set(beside) == set(inspect.signature(f).parameters), name
        said = words(clipa(name, '--help').stdout)
        for k, comment in beside.items(): assert k in ('options', 'questions') or comment in said, (name, k)

def test_the_time_of_a_plan_has_a_fitting_unit():
    from clipa_nb.app.run import Options, make_plan
    from clipa_nb.app.report import plan_table
    from clipa_nb.recipes import TOY
    plan = make_plan(TOY, Options(device='cpu', precision='fp32'), trial=0)
    def about(seconds): return ' '.join(plan_table(dict(plan, stages=[dict(plan['stages'][0], seconds=seconds)])).splitlines()[2].split()[-2:])
    assert [about(t) for t in (0.2, 89, 91, 5300, 5500, 7200, 172_000, 180_000, 5.03e6)] == ['0 s', '89 s', '1.5 min', '88.3 min', '1.5 h', '2.0 h', '47.8 h', '2.1 days', '58.2 days']

def test_unknown_names(clipa):
    bad(clipa, 'train', 'tooy', says='did you mean toy')
    bad(clipa, 'eval', '/nowhere/model', says='/nowhere/model: there is no such directory')
    bad(clipa, 'export', 'runs/nowhere', 'out', says='no such directory')
    bad(clipa, 'eval', 'ViT-B-166', says='ViT-B-16')
    bad(clipa, 'train', 'toy', '--device', 'tpu', says='unknown device')
    bad(clipa, 'train', 'toy', '--precision', 'fp8', says='unknown precision')

@pytest.mark.parametrize('flag, value', [('--workers', -2), ('--batch-size', -3), ('--max-steps', -1), ('--checkpoint-steps', -3)])
def test_counts_that_mean_nothing(clipa, tmp_path, flag, value):
    bad(clipa, *SMOKE[:3], '--device', 'cpu', flag, value, '--out', tmp_path / 'x', says=f'{flag} {value}: use')
    assert not (tmp_path / 'x').exists()

def test_nothing_is_left_of_a_run_that_was_refused(clipa, tmp_path):
    bad(clipa, 'train', 'clipa-v2-l14', '--device', 'cpu', '--out', tmp_path / 'x', says='needs --train-data')
    assert not list(tmp_path.iterdir())

def test_what_the_parser_refuses(clipa):
    for line, says in (('tran toy', 'did you mean train'), ('train toy --seed x', "--seed: invalid literal"), ('train toy --smok', 'did you mean --smoke'), ('train', 'see clipa train --help'), ('data mak x', "'make'")):
        assert bad(clipa, *line.split(), says=says).stderr.count('\n') == 1
    assert clipa('train', 'toy', '--smok', check=2).stderr == 'clipa: Unrecognized options: --smok; did you mean --smoke? (see clipa train --help)\n'
    assert 'loader processes' in clipa('train', '--help').stdout

def test_flags_that_doctor_has_no_use_for(clipa, tmp_path):
    for flag in (['--dry-run'], ['--compare'], ['--checkpoint-steps', '5'], ['--max-steps', '5'], ['--batch-size', '8']):
        bad(clipa, 'doctor', 'toy', '--smoke', '--device', 'cpu', '--out', tmp_path / 'x', *flag, says=f'{flag[0]} has no meaning for clipa doctor')
    clipa('doctor', 'toy', '--smoke', '--device', 'cpu', '--workers', '0', '--out', tmp_path / 'x')
    assert [p.name for p in (tmp_path / 'x').iterdir()] == ['doctor'] # a run that lives here later draws its own data

class Slow:
    "A source that sleeps where a sample is read: every time, or (a page cache) the first time."
    def __init__(self, source, seconds, always=True):
        self.source, self.seconds, self.always, self.known = source, seconds, always, set()
        self.fields, self.first = source.fields, source.first # a source may say what it has without being slow
    def __len__(self): return len(self.source)
    def where(self, i): return self.source.where(i)
    def read(self, i):
        if self.always or i not in self.known: self.known.add(i); time.sleep(self.seconds)
        return self.source.read(i)

class SlowWords:
    "A tokenizer that sleeps for each caption: something slow that is not reading."
    def __init__(self, tokenizer, seconds): self.tokenizer, self.seconds = tokenizer, seconds
    def __call__(self, texts, **kw): time.sleep(self.seconds * len(texts)); return self.tokenizer(texts, **kw)

@pytest.fixture
def patient(finished, tmp_path, monkeypatch):
    "A function: a run as the doctor opens it, with so many workers and samples in a batch, and steps that take no time."
    monkeypatch.setattr('clipa_nb.app.doctor.trial_seconds', lambda *args, **kw: 1e-6)
    from clipa_nb.app.run import Options, Run
    from clipa_nb.engine.index import Shards
    from clipa_nb.recipes import TOY, smoke
    def make(workers=0, batch=32): return Run(smoke(TOY).with_stages(*[dict(batch_size=batch, samples=batch * 8)] * 2), Options(device='cpu', precision='fp32', workers=workers), tmp_path, source=Shards(str(finished / 'data')))
    return make

def examined(run, workers=0):
    from clipa_nb.app.doctor import bottleneck, measure
    rates = measure(run, run.recipe.stages[0])
    return rates, bottleneck(rates, workers)

def test_doctor_reads_what_nobody_has_read(patient):
    "10 ms for the first read of a sample: 100 a second, and not what comes out of the memory."
    run = patient(); run.source = Slow(run.source, 0.01, always=False)
    rates, name = examined(run)
    assert rates['read'] <= 100 and rates['decode'] > rates['read'] and name == 'reading'
    assert rates['loader'] <= 100 and rates['loader'] == pytest.approx(1 / (1 / rates['read'] + 1 / rates['decode']), rel=0.3) # what the third exercise builds on

@pytest.mark.filterwarnings('ignore:This DataLoader will create')
@pytest.mark.parametrize('workers, batch', [(1, 8), (4, 8), (12, 32)])
def test_doctor_waits_for_the_loaders_own_speed(patient, workers, batch):
    "However many batches are under way when the clock starts, the loader is no faster than its workers can read."
    run = patient(workers, batch); run.source = Slow(run.source, 0.01)
    rates, name = examined(run, workers)
    assert rates['loader'] <= 2 * 100 * workers
    assert rates['read'] <= 100 and name == 'reading'

def test_doctor_says_decoding_and_step(patient, monkeypatch):
    run = patient(); words = run.tokenizer
    run.tokenizer = SlowWords(words, 0.005)
    rates, name = examined(run)
    assert rates['decode'] <= 200 < rates['read'] and name == 'decoding'
    run.tokenizer = words
    monkeypatch.setattr('clipa_nb.app.doctor.trial_seconds', lambda *args, **kw: 100.)
    assert examined(run)[1] == 'step'

def examine(comm, run):
    run.comm = comm; real = comm.gather
    comm.gather = lambda x: (time.sleep(2), real(x))[1]
    return examined(run)

def test_doctor_says_gather(patient):
    from clipa_nb.distributed_trainer import spawn
    run = patient()
    for rates, name in spawn(examine, 2, run): assert list(rates) == ['read', 'decode', 'loader', 'hand-over', 'step', 'gather'] and rates['gather'] <= 16 / 2 and name == 'gather'

def test_doctor_names_one_part(clipa):
    last = clipa('doctor', 'toy', '--smoke', '--device', 'cpu', '--workers', '0').stdout.splitlines()[-1]
    assert last.startswith('the bottleneck is: ') and last.split()[3] in ('reading', 'decoding', 'loader', 'hand-over', 'step')

def test_costs_at_an_impossible_share(clipa):
    for mfu in ('0', '40', '-1', 'nan'): assert not bad(clipa, 'cost', 'toy', '--mfu', mfu, says='0 < mfu ≤ 1').stdout

def test_no_cuda(clipa, tmp_path):
    import torch
    if torch.cuda.is_available(): pytest.skip('this machine has CUDA')
    bad(clipa, 'train', 'toy', '--smoke', '--device', 'cuda', '--out', tmp_path / 'x', says='no cuda')
    assert not (tmp_path / 'x').exists()

def test_directories_in_the_way(clipa, finished, tmp_path):
    bad(clipa, 'train', 'toy', '--out', finished, says='holds another run')
    bad(clipa, *SMOKE, '--out', finished, '--seed', '7', says='seed is 0, asked for 7')
    (tmp_path / 'file').write_text('')
    bad(clipa, *SMOKE, '--out', tmp_path / 'file' / 'run', says='cannot make this directory')

@pytest.mark.parametrize('text', ['{}', 'x{', '[]', '{"recipe": 3, "seed": 0}', '{"recipe": {"nme": "toy"}, "seed": 0}', '{"recipe": {"name": "toy"}}'])
def test_a_plan_that_is_no_plan(clipa, tmp_path, text):
    (tmp_path / 'plan.json').write_text(text)
    bad(clipa, *SMOKE, '--out', tmp_path, says="holds a plan.json that is not a run's")
    assert [p.read_text() for p in tmp_path.iterdir()] == [text]

def test_the_data_is_part_of_the_run(clipa, finished):
    bad(clipa, *SMOKE, '--out', finished, '--train-data', 'web/data', says='started with no --train-data, asked for --train-data web/data')

def test_data_that_is_not_there(clipa, tmp_path):
    bad(clipa, *SMOKE, '--train-data', tmp_path / 'none-{000..003}.tar', '--out', tmp_path / 'a', says='none-')
    bad(clipa, 'train', 'clipa-v2-h14', '--smoke', '--train-data', tmp_path, '--out', tmp_path / 'b', says=str(tmp_path))
    assert not list(tmp_path.iterdir())

def tar(path, members):
    import io, tarfile
    with tarfile.open(path, 'w') as t:
        for name, data in members.items():
            info = tarfile.TarInfo(name); info.size = len(data); t.addfile(info, io.BytesIO(data))

def test_shards_with_other_things_in_them(clipa, tmp_path):
    tar(tmp_path / 'text.tar', {'a.txt': b'a red star', 'a.json': b'{}'})
    bad(clipa, *SMOKE, '--train-data', tmp_path / 'text.tar', '--out', tmp_path / 'a', says='txt')
    tar(tmp_path / 'image.tar', {'a.jpg': b'\xff\xd8', 'a.cls': b'3'})
    bad(clipa, *SMOKE, '--train-data', tmp_path / 'image.tar', '--out', tmp_path / 'b', says='cls')
    assert {p.name for p in tmp_path.iterdir()} == {'text.tar', 'image.tar'}

def test_impossible_sizes(clipa, tmp_path):
    from clipa_nb.app.run import Options, run
    from clipa_nb.core import LOCAL, UserError
    from clipa_nb.recipes import TOY, smoke
    for change, says in (({'image_size': 33}, 'divisible'), ({'image_strategy': 'random', 'image_ratio': 0.99}, 'leaves none'), ({'context_length': 1}, 'context'), ({'image_ratio': 1.5, 'image_strategy': 'random'}, 'ratio')):
        out = tmp_path / says
        with pytest.raises(UserError, match=says): run(smoke(TOY).with_stages(change), Options(out=str(out), device='cpu'), LOCAL)
        assert not out.exists()

def test_settings_that_would_fail_later(tmp_path):
    "A recipe that cannot be run to its end is refused before its directory is made."
    from clipa_nb.app.run import Options, run
    from clipa_nb.core import LOCAL, UserError
    from clipa_nb.recipes import TOY, smoke
    from clipa_nb.tokenizer import Vocabulary
    toy = smoke(TOY)
    for wrong, says in ((toy.with_stages({'text_strategy': 'sintax'}), 'did you mean syntax'), (toy.with_stages({'crop': (0.5, 2.)}), 'crop scale'), (toy.with_stages({}, {'frozen': ('visuall.*',)}), 'parameter pattern'),
                        (toy.replace(data__name='dmo'), 'did you mean demo'), (toy.replace(data__n=0), '0 pairs'), (toy.with_stages({}, {'image_size': 240}), '240'), (toy.replace(tokenizer=Vocabulary('nowhere/words')), 'nowhere/words')):
        with pytest.raises(UserError, match=says): run(wrong, Options(out=str(tmp_path / 'x'), device='cpu'), LOCAL)
        assert not (tmp_path / 'x').exists()

@pytest.mark.parametrize('change', [dict(batch_size=0), dict(samples=0), dict(base_lr=-1.), dict(base_lr=float('nan')), dict(grad_clip=-1.), dict(ema=1.), dict(ema=-0.1), dict(micro_batch=-1)], ids=str)
def test_stages_that_mean_nothing(change):
    from clipa_nb.core import UserError
    from clipa_nb.recipes import Stage
    with pytest.raises(UserError, match=f'stage reduced: {next(iter(change))} is .*expected'): Stage(**change)

def test_the_sizes_that_would_do():
    from clipa_nb.core import UserError
    from clipa_nb.recipes import TOY, stage_plan
    for size, says in ((4, 'use 8$'), (33, 'use 32 or 40$'), (-3, 'use 8$')):
        with pytest.raises(UserError, match=says): stage_plan(TOY.with_stages({'image_size': size}), 0)

def test_batch_that_cannot_be_shared(clipa, tmp_path):
    done = torchrun(3, *SMOKE, '--out', tmp_path / 'x')
    assert done.returncode == 1 and done.stderr.count('cannot be shared by 3 ranks') == 1 # the first rank says it, and only that one

def torchrun(n, *args):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), '-m', 'clipa_nb.cli', *map(str, args)], capture_output=True, text=True, timeout=300)

def test_torchrun_gives_the_single_process_trace(finished, tmp_path):
    "What is dropped and which words are kept is drawn for each sample, so two ranks see what one sees."
    done = torchrun(2, *SMOKE, '--out', tmp_path / 'two')
    assert done.returncode == 0, done.stderr[-2000:]
    a, b = rows(tmp_path / 'two'), rows(finished)
    for key in ('train/loss', 'train/grad_norm', 'train/logit_scale'):
        assert [r[key] for r in a] == pytest.approx([r[key] for r in b], rel=2e-4), key
    assert [r['step'] for r in rows(tmp_path / 'two')] == list(range(1, 17))
    assert report(tmp_path / 'two')['metrics']['val/colour-zeroshot-val-top1'] >= 0
    done = torchrun(2, 'eval', tmp_path / 'two' / 'model', '--device', 'cpu', '--out', tmp_path / 'eval.json') # ranks share the pictures
    assert done.returncode == 0 and numbers(tmp_path / 'eval.json') == report(tmp_path / 'two')['metrics'], done.stderr[-2000:]

def one_step(comm, bypass=False):
    "Gradients of one step of the smoke recipe, on this rank's share of the batch."
    import torch
    from clipa_nb.clip import build_clip
    from clipa_nb.infonce import Contrastive
    from clipa_nb.recipes import TOY, smoke, stage_model
    from clipa_nb.trainer import Task, forward_backward
    torch.manual_seed(0)
    model = build_clip(stage_model(smoke(TOY), 0)).train()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.02 * torch.randn(p.shape))
    g = torch.Generator().manual_seed(1)
    batch = dict(image=torch.randint(0, 256, (16, 3, 32, 32), generator=g, dtype=torch.uint8), text=torch.randint(1, 100, (16, 9), generator=g))
    b = 16 // comm.size
    mine = {k: v[comm.rank * b:(comm.rank + 1) * b] for k, v in batch.items()}
    task = Task(model, Contrastive()); wrapped = comm.wrap(task)
    forward_backward(task if bypass else wrapped, task, mine, comm)
    return {n: p.grad.numpy() for n, p in model.named_parameters()}

def check_alike(comm, bypass):
    from clipa_nb.engine.meeting import same_gradients
    import torch
    grads = one_step(comm, bypass)
    holder = torch.nn.Module()
    for i, g in enumerate(grads.values()):
        p = torch.nn.Parameter(torch.zeros(g.shape)); p.grad = torch.from_numpy(g); holder.register_parameter(f'p{i}', p)
    try: same_gradients(holder, comm)
    except RuntimeError as e: return str(e)
    return ''

def test_two_ranks_have_the_single_process_gradients():
    import numpy as np
    from clipa_nb.core import LOCAL
    from clipa_nb.distributed_trainer import spawn
    alone = one_step(LOCAL)
    for grads in spawn(one_step, 2):
        for name, g in alone.items(): np.testing.assert_allclose(grads[name], g, rtol=1e-3, atol=1e-6 + 1e-4 * np.abs(g).max(), err_msg=name)
        assert abs(grads['logit_scale'] - alone['logit_scale']) < 1e-5

def test_going_around_the_wrapper_is_noticed():
    from clipa_nb.distributed_trainer import spawn
    assert spawn(check_alike, 2, False) == ['', '']
    assert all('gradient' in message for message in spawn(check_alike, 2, True))

def test_dry_run_of_the_real_thing(clipa, tmp_path):
    "The plan is printed, and then what would fail before the first step: nobody gave data."
    done = bad(clipa, 'train', 'clipa-v2-h14', '--dry-run', '--device', 'cpu', '--out', tmp_path / 'x', says='needs --train-data: a folder or pattern of .tar shards of DataComp-1B')
    assert '195,490' in done.stdout and not list(tmp_path.iterdir())

def test_other_commands(clipa, finished, tmp_path):
    assert 'clipa-v2-h14' in clipa('recipes').stdout
    assert 'H100-hours' in clipa('cost', 'clipa-v2-h14').stdout
    clipa('data', 'make', tmp_path / 'shards', '--n', '40')
    assert 'all 40 pairs are sound' in clipa('data', 'check', tmp_path / 'shards').stdout
    assert 'note: exported: open_clip cannot load' in clipa('export', finished / 'model', tmp_path / 'exported').stderr
    assert {'config.json', 'model.safetensors', 'recipe.json'} <= {p.name for p in (tmp_path / 'exported').iterdir()}
    bad(clipa, 'data', 'check', tmp_path / 'shards', '--n', '40', says='--n has no meaning for clipa data check')
    for wrong, says in ((['--world', 'dmo'], 'did you mean demo'), (['--n', '0'], 'no samples')): bad(clipa, 'data', 'make', tmp_path / 'none', *wrong, says=says)
    assert not (tmp_path / 'none').exists()
    assert 'bottleneck' in clipa('doctor', 'toy', '--smoke', '--device', 'cpu', '--workers', '0').stdout

@pytest.mark.parametrize('name', ['clipa-v2-h14', 'clipa-v1-b16-i50-t16', 'clipa-v1-l16-i37-t8'])
def test_smoke_twins_run(clipa, tmp_path, name):
    clipa('train', name, '--smoke', '--max-steps', '2', '--device', 'cpu', '--precision', 'fp32', '--workers', '0', '--out', tmp_path / name)
    assert (tmp_path / name / 'model' / 'config.json').exists()

def test_demo_in_a_tiny_setting(clipa, tmp_path):
    done = clipa('demo', '--smoke', '--compare', '--max-steps', '4', '--device', 'cpu', '--seed', '5', '--workers', '1', cwd=tmp_path)
    out = tmp_path / 'runs' / 'demo-smoke'
    for words in ('tokens/image', 'chance', 'held-out pairs', 'shape alone', 'colour alone', 'R@5', 'handwritten digits', 'full length', 'blur'): assert words in done.stdout, words
    r = report(out)
    assert r['metrics']['val/digits-zeroshot-val-top1'] >= 0 and r['seed'] == 5
    assert r['compare']['stages'][0]['name'] == 'full length' and len(r['examples']) == 12
    assert all(s['tokens'] > 0 and s['samples_per_second'] > 0 for s in r['stages'])

def test_comparison_can_be_asked_for_later(clipa, finished):
    clipa(*SMOKE, '--out', finished, '--compare')
    assert 'compare' in report(finished)

def test_model_loads_as_a_package(finished):
    import torch
    from clipa_nb.pretrained import create_model_and_transforms, get_tokenizer
    name = f'local-dir:{finished / "model"}'
    model, train, val = create_model_and_transforms(name)
    from PIL import Image
    image = val(Image.new('RGB', (90, 70), 'red'))[None]
    ids = get_tokenizer(name)(['a red star'])
    with torch.no_grad(): z = model.eval().encode_image(image, normalize=True) @ model.encode_text(ids, normalize=True).T
    assert z.shape == (1, 1) and abs(float(z)) <= 1

def test_own_shards_are_read(clipa, tmp_path):
    clipa('data', 'make', tmp_path / 'shards', '--n', '200')
    clipa(*SMOKE, '--max-steps', '2', '--train-data', tmp_path / 'shards', '--out', tmp_path / 'run')
    assert not (tmp_path / 'run' / 'data').exists()
    (tmp_path / 'shards').rename(tmp_path / 'moved')
    moved = [*SMOKE, '--max-steps', '2', '--train-data', tmp_path / 'moved', '--out', tmp_path / 'run']
    refused = bad(clipa, *moved, says=f"started with --train-data {tmp_path / 'shards'}, asked for --train-data {tmp_path / 'moved'}")
    assert f"write its new place as train_data into {tmp_path / 'run' / 'plan.json'}" in refused.stderr
    plan = tmp_path / 'run' / 'plan.json'
    plan.write_text(json.dumps(dict(json.loads(plan.read_text()), train_data=str(tmp_path / 'moved')))) # as the message says
    assert 'is finished' in clipa(*moved).stdout
    bad(clipa, *moved[:-4], '--out', tmp_path / 'run', says='asked for no --train-data')

# ---- the parts of a run, one by one ----

def test_numbers_that_were_not_given():
    from clipa_nb.app.run import Options, n_workers
    from clipa_nb.core import UserError
    for field in ('workers', 'batch_size', 'max_steps', 'checkpoint_steps'): assert getattr(Options(), field) is None
    assert Options(workers=0).workers == 0 and Options(batch_size=1, max_steps=1, checkpoint_steps=1)
    for wrong, says in (({'workers': -2}, '--workers -2: use 0 or more, or leave it out'), ({'batch_size': -3}, '--batch-size -3: use 1 or more, or leave it out'), ({'batch_size': 0}, '--batch-size 0: use 1'),
                        ({'max_steps': -1}, '--max-steps -1'), ({'checkpoint_steps': -3}, '--checkpoint-steps -3')):
        with pytest.raises(UserError, match=says): Options(**wrong)
        with pytest.raises(UserError, match=says): Options().replace(**wrong)
    assert n_workers(3) == 3 and n_workers(None, 10_000) == 0

def test_looking_at_a_directory_makes_none(tmp_path):
    from clipa_nb.app.run import claim, recognise
    from clipa_nb.core import UserError
    from clipa_nb.recipes import TOY
    assert recognise(tmp_path / 'new', TOY) == tmp_path / 'new' and not (tmp_path / 'new').exists()
    for seed in (1, 2): claim(tmp_path / 'b' / 'c', dict(seed=seed, recipe=TOY.to_dict()))
    assert json.loads((tmp_path / 'b' / 'c' / 'plan.json').read_text())['seed'] == 1
    with pytest.raises(UserError, match='cannot make this directory'): claim(tmp_path / ('long' * 99), {})

def test_a_device_that_is_not_there_leaves_nothing(tmp_path):
    from clipa_nb.app.run import Options, run_effective
    from clipa_nb.core import LOCAL, UserError
    from clipa_nb.recipes import TOY, smoke
    for wrong, says in (({'train_data': 'nowhere'}, 'nowhere'), ({'device': 'cuda:99'}, 'cuda')):
        with pytest.raises(UserError, match=says): run_effective(smoke(TOY), Options(device='cpu', out=str(tmp_path / 'refused')).replace(**wrong), LOCAL)
    assert not list(tmp_path.iterdir())

def meet(comm, path):
    "Rank 1 comes late. Both note in one file when they come and when they go."
    def note(what):
        with open(path, 'a') as f: f.write(f'rank {comm.rank} {what}\n')
    time.sleep(0.3 * comm.rank); note('comes'); comm.barrier(); note('goes')

def test_nobody_leaves_the_barrier_before_all_have_come(tmp_path):
    from clipa_nb.distributed_trainer import spawn
    spawn(meet, 2, str(tmp_path / 'book'))
    book = (tmp_path / 'book').read_text().splitlines()
    assert sorted(book[:2]) == ['rank 0 comes', 'rank 1 comes'] and sorted(book[2:]) == ['rank 0 goes', 'rank 1 goes']

def test_words_that_no_caption_holds():
    "A vocabulary that is learnt from toy captions hears every word of the world once; other data has captions alone."
    from clipa_nb.app.run import captions_with_words
    from clipa_nb.recipes import TOY, recipe
    class One:
        def __len__(self): return 1
        def read(self, i): return dict(text='a red star', image=b'', json={})
    texts = captions_with_words(TOY.data, One())()
    assert texts[0] == 'a red star' and 'star' not in texts and 'ring' in texts
    assert captions_with_words(recipe('clipa-v2-h14').data, One())() == ['a red star']

def test_data_and_words_are_opened_again(finished, monkeypatch):
    from clipa_nb.app.run import Options, open_data, open_tokenizer
    from clipa_nb.recipes import TOY, smoke
    r = smoke(TOY); source, same = open_data(r, finished, Options())
    assert len(source) == 512 and source is same and open_data(r, None, Options()) == [None, None] # toys have yet to be drawn
    assert open_data(r, None, Options(train_data=str(finished / 'data')))[0].read(3) == source.read(3)
    tok = open_tokenizer(r, source, finished)
    assert tok('a red star', 9).shape == (1, 9) and (open_tokenizer(r, source, finished)('a red star', 9) == tok('a red star', 9)).all()

def test_the_optimiser_of_a_stage():
    "Moments come from the stage; frozen parameters are left out; version 2 spares every table, bigG/14 decays two, version 1 whatever has two axes."
    from clipa_nb.app.run import build_task, stage_optimizer
    from clipa_nb.recipes import RECIPES, TOY, smoke
    def built(r, **change): return stage_optimizer(r.stages[0].replace(**change), build_task(r, 0))
    def count(o): return sum(p.numel() for g in o.param_groups for p in g['params'])
    assert 0 < count(built(smoke(TOY), frozen=('text.*',))) < count(built(smoke(TOY)))
    assert {g['betas'] for g in built(smoke(TOY)).param_groups} == {(0.9, 0.95)}
    assert {g['lr_multiple'] for g in built(smoke(TOY), rates=(('visual.*', 0.1),)).param_groups} == {0.1, 1.}
    fade = {name: {n for g in built(smoke(RECIPES[name])).param_groups if g['weight_decay'] for n in g['names']} for name in ('clipa-v2-h14', 'clipa-v2-bigg14', 'clipa-v1-l16-i37-t8')}
    assert fade['clipa-v2-bigg14'] - fade['clipa-v2-h14'] == {'text.embed.weight', 'visual.prefix.token'}
    assert fade['clipa-v1-l16-i37-t8'] - fade['clipa-v2-h14'] == {'text.embed.weight', 'text.positions'}

def test_a_trial_is_the_median_of_its_steps():
    "One step of 90 that warms up, then steps of 3, 5 and 4."
    import torch
    from clipa_nb.app.run import trial_seconds
    from clipa_nb.recipes import TOY, smoke
    ticks = iter([0, 90, 100, 103, 110, 115, 120, 124])
    assert trial_seconds(smoke(TOY), 0, torch.device('cpu'), 'fp32', clock=ticks.__next__) == 4 and list(ticks) == []
    assert trial_seconds(smoke(TOY), 0, torch.device('cpu'), 'fp32') > 0

def test_a_plan_that_was_not_tried():
    from clipa_nb.app.report import duration, plan_table
    from clipa_nb.app.run import Options, make_plan
    from clipa_nb.recipes import TOY
    plan = make_plan(TOY, Options(device='cpu', precision='fp32'), trial=0)
    assert [p['image_tokens'] for p in plan['stages']] == [16, 44] and [p['seconds'] for p in plan['stages']] == [None, None]
    assert plan_table(plan).count('–') == 2
    assert [duration(t) for t in (90, 130, 5400, 12_600, 48 * 3600, 5.03e6)] == ['90 s', '2.2 min', '90.0 min', '3.5 h', '48.0 h', '58.2 days']

def test_every_stage_begins_with_the_same_weights(patient):
    run = patient()
    assert run.task(0).model.logit_scale.item() == run.task(1).model.logit_scale.item()
    assert run.batches(0)[0]['image'].shape[2:] == (32, 32) and run.batches(0)[0]['text'].shape[1] == 9
    from clipa_nb.app.run import begin_stage
    task, _, optimizer, ema, start = begin_stage(run, 1, weights=run.task(0).state_dict())
    assert start == 0 and len(task.model.text.positions) == 17 # resized from 9

def test_a_stopwatch_stands_still():
    from clipa_nb.app.run import Stopwatch
    class Told(Stopwatch):
        "Reads a clock that we move."
        clock = 0.
        def now(self): return [self.clock, self.clock / 2]
    watch = Told(seconds=10.)
    def nap(): watch.clock += 100.
    watch.clock += 3.; watch.without(nap)(); watch.clock += 2.
    assert watch.read() == dict(seconds=15., cpu_seconds=2.5) # 10 from before, 3 and 2 now, and a nap that does not count
    assert Stopwatch(seconds=10.).read()['seconds'] >= 10

def test_the_twin_at_full_length():
    import torch
    from clipa_nb.app.run import equal_steps, full_length
    from clipa_nb.recipes import TOY, smoke
    assert [(s.image_size, s.image_ratio, s.text_strategy, s.steps) for s in full_length(TOY, 12_800).stages] == [(64, 0., 'truncate', 100)]
    threads = torch.get_num_threads()
    assert 1 <= equal_steps(smoke(TOY).with_stages(samples=100 * 32), torch.device('cpu'), 'fp32', rounds=3) < 200 and torch.get_num_threads() == threads

def test_the_rows_of_a_report(finished):
    from clipa_nb.app.report import report_table, stage_rows
    from clipa_nb.recipes import TOY, smoke
    rows = stage_rows(smoke(TOY).with_stages(samples=3 * 32), [dict(seconds=2., cpu_seconds=1.5), dict(seconds=3., cpu_seconds=2.5)])
    assert rows[0]['tokens'] == 3 * 32 * (16 + 9) and [s['samples_per_second'] for s in rows] == [48., 32.]
    r = report(finished); r.pop('compare', None)
    assert 'held-out pairs' in report_table(r) and 'full length' not in report_table(r)
    assert 'full length' in report_table(dict(r, compare=dict(metrics=r['metrics'], stages=[])))

# ---- questions ----

@pytest.mark.parametrize('wrong, says', [
    (dict(suite='prober'), 'did you mean probes'), (dict(val_data=('x',)), '--val-data has no meaning for --suite toy'), (dict(suite='retrieval', classes='names.txt', val_data=('x',)), 'it takes --val-data'),
    (dict(suite='probes', val_data=('x',)), 'needs --train-data'), (dict(suite='robustness', val_data=('x',)), 'two test sets'), (dict(suite='zero-shot', classes='names.txt'), 'give --val-data too'),
    (dict(batch_size=0), '--batch-size 0: use 1 or more'), (dict(out='nowhere/x.json'), 'a file in a directory that exists'), (dict(out='.'), 'a file in a directory that exists')], ids=str)
def test_questions_that_mean_nothing(wrong, says):
    from clipa_nb.app.questions import Questions, checked
    from clipa_nb.core import UserError
    with pytest.raises(UserError, match=says): checked(Questions(**wrong))

def test_own_parts_refuse(own, tmp_path):
    from clipa_nb.app.questions import Questions, own_parts
    from clipa_nb.core import UserError
    from clipa_nb.engine.pictures import Transform
    pairs, names = str(own / 'pairs'), str(own / 'names.txt')
    (tmp_path / 'empty.txt').write_text('\n')
    for wrong, says in ((dict(val_data=(pairs,)), 'needs --classes'), (dict(val_data=(pairs, pairs), classes=names), 'two sets have the same name'), (dict(val_data=(pairs,), classes=str(tmp_path / 'none.txt')), 'No such file'),
                        (dict(val_data=(pairs,), classes=str(tmp_path / 'empty.txt')), 'the file is empty')):
        with pytest.raises(UserError, match=says): own_parts(Questions(suite='robustness', **wrong), Transform(size=64))

def test_pictures_in_batches(finished, tmp_path):
    from clipa_nb.engine.evalsets import Pictures
    from clipa_nb.core import UserError
    from clipa_nb.engine.index import Shards
    from clipa_nb.engine.pictures import Transform
    from clipa_nb.engine.shards import write_shards
    source = Shards(str(finished / 'data'))
    mine = Pictures(source, Transform(size=64, mode='squash'), 200)
    assert [len(b['label']) for b in mine] == [200, 200, 112] and mine[1]['label'][3].item() == source.read(203)['json']['label']
    write_shards([('a', b'no picture', 'a red star', {'label': 1})], tmp_path / 'broken')
    with pytest.raises(UserError, match='000000.tar, a: not an image'): Pictures(Shards(str(tmp_path / 'broken')), Transform(size=64, mode='squash'))[0]

def test_parts_of_the_toy_world():
    from clipa_nb.app.questions import Questions, toy_parts
    from clipa_nb.recipes import TOY, smoke
    parts = {suite: toy_parts(Questions(suite=suite), smoke(TOY), 64, None, small=True) for suite in ('probes', 'robustness')}
    assert list(parts['probes']) == ['shape', 'digits'] and {int(y) for b in parts['probes']['shape'][0] for y in b['label']} == set(range(12))
    assert list(parts['robustness'])[:2] == ['clean', 'sketch']

def test_a_folder_or_a_name(finished):
    from clipa_nb.app.exam import world_of
    from clipa_nb.pretrained import model_name
    from clipa_nb.core import UserError
    from clipa_nb.recipes import TOY, smoke
    folder = finished / 'model'
    assert [model_name(x) for x in (str(folder), str(finished), 'ViT-B/16', 'hf-hub:some/model')] == [f'local-dir:{folder}', f'local-dir:{folder}', 'ViT-B/16', 'hf-hub:some/model']
    with pytest.raises(UserError, match='no such directory'): model_name('a/modle')
    kept, *rest = world_of(folder)
    assert rest == [0, True] and {k.rpartition('.')[2] for k in kept.diff(smoke(TOY))} <= {'wrap', 'checkpointing', 'micro_batch'} # as the run resolved them
    assert world_of(Path('ViT-B-16')) == (TOY, 0, False)

def test_the_table_of_a_suite(clipa, finished, tmp_path):
    from clipa_nb.app.questions import score_table
    done = clipa('eval', finished / 'model', '--suite', 'robustness', '--device', 'cpu', '--out', tmp_path / 'r.json')
    assert score_table(json.loads((tmp_path / 'r.json').read_text())) in done.stdout

# ---- the doctor and the parser ----

def test_a_rate_counts_the_second_call():
    from clipa_nb.app.doctor import rate
    calls = []
    assert rate(lambda: (calls.append(0), time.sleep(0.01)), 100) <= 10_000 and len(calls) == 2

@pytest.mark.parametrize('rates, name', [
    (dict(read=100, decode=900, loader=350, step=2000), 'reading'), (dict(read=9000, decode=300, loader=1000, step=2000), 'decoding'), (dict(read=9000, decode=5000, loader=1000, step=2000), 'loader'),
    (dict(read=100, decode=300, loader=300, step=200), 'step'), (dict(read=900, decode=900, loader=900, step=800, gather=90), 'gather')], ids=str)
def test_the_slowest_part_has_a_name(rates, name):
    from clipa_nb.app.doctor import bottleneck
    assert bottleneck(rates, 4) == name

def test_the_doctor_sees_the_same_batches(patient):
    import torch
    from clipa_nb.app.doctor import Observed
    from clipa_nb.data import loader
    run = patient(workers=2); seen = Observed(run.batches(0), workers=2)
    for a, b in zip(run.batches(0)[3].values(), seen.make(3)[0].values()): assert torch.equal(a, b) if torch.is_tensor(a) else list(a) == list(b)
    for batch in loader(seen, 0, 6, workers=2): pass
    n, reading, making = seen.notes.sum(0).tolist()
    assert n == 7 * len(batch['image']) and 0 < reading < making

def test_how_to_go_on(capsys):
    from clipa_nb.cli import stopped
    from clipa_nb.engine.loop import Stopped
    def told(e, *argv): return stopped(e, [*argv]), capsys.readouterr().err.strip()
    assert told(Stopped(signal.SIGTERM), 'demo')[0] == 75 and told(Stopped(signal.SIGINT), 'demo')[0] == 130
    assert told(KeyboardInterrupt(), 'train', 'toy') == (130, 'clipa: interrupted. To go on: clipa train toy')
    assert told(KeyboardInterrupt(), 'data', 'check', 'x') == (130, 'clipa: interrupted')

def test_a_box_becomes_a_line():
    from clipa_nb.cli import one_line
    box = """╭─ Unrecognized options ───────────────╮
│ Unrecognized options: --smok         │
│ ──────────────────────────────────── │
│ Perhaps you meant:                   │
│     --smoke, --no-smoke              │
╰──────────────────────────────────────╯"""
    assert one_line(box, ['train', 'toy', '--smok']) == 'Unrecognized options: --smok; did you mean --smoke? (see clipa train --help)'
    assert one_line(' Missing argument \n ---------------- \n  Missing value for --seed  \n', []) == 'Missing value for --seed (see clipa --help)'
    assert one_line('no frame at all', []) == 'no frame at all (see clipa --help)'

def test_the_docstring_that_the_parser_reads():
    from clipa_nb.cli import asked, demo, with_help
    from clipa_nb.app.data_tools import data
    assert with_help(data).count('\n        ') == 12 and 'short: shrink: the short side' in with_help(data) and with_help(demo).startswith(demo.__doc__)
    assert 'smoke=True' in str(asked(['demo', '--smoke']))

def test_a_configuration_speaks_for_itself(clipa):
    "What `Options` refuses is said in its own words, without the parser's; a number is a number, and None is no word to type."
    assert clipa('train', 'toy', '--workers', '-2', check=2).stderr == 'clipa: --workers -2: use 0 or more, or leave it out\n'
    assert 'invalid literal' in clipa('train', 'toy', '--workers', 'None', check=2).stderr
    assert '{None}' not in clipa('train', '--help').stdout

def test_warnings_become_notes_and_the_hook_is_put_back(capsys):
    import warnings
    from clipa_nb.cli import warnings_as_notes
    before = warnings.showwarning
    with warnings_as_notes():
        warnings.simplefilter('always'); warnings.warn('something odd')
    assert capsys.readouterr().err == 'note: something odd\n' and warnings.showwarning is before

def test_a_dry_demo_and_the_list(clipa, tmp_path):
    from clipa_nb.recipes import RECIPES
    said = clipa('demo', '--dry-run', '--smoke', '--device', 'cpu', '--precision', 'fp32', cwd=tmp_path).stdout.splitlines()
    assert [row.split()[0] for row in said] == ['toy,', 'stage', 'reduced', 'full', 'reduced:', 'full:'] and not list(tmp_path.iterdir())
    said = clipa('recipes').stdout.splitlines()
    assert [line.split()[0] for line in said] == list(RECIPES) and said[0].split(maxsplit=1)[1] == '32 px, 9 tokens, 0.3 M pairs → 64 px, 17 tokens, 0.1 M pairs'

def test_costs_of_no_gpu(clipa):
    bad(clipa, 'cost', 'clipa-v2-h14', '--gpu', 'A1000', says='unknown GPU')
    assert '$' in clipa('cost', 'clipa-v2-h14', '--gpu', 'A100', '--mfu', '0.26').stdout

def test_shards_are_counted(clipa, tmp_path):
    clipa('data', 'make', tmp_path / 'shards', '--n', '50'); clipa('data', 'index', tmp_path / 'shards')
    assert sum(json.loads((tmp_path / 'shards' / 'sizes.json').read_text()).values()) == 50

def test_out_and_in_again(clipa, finished, tmp_path):
    import torch
    from clipa_nb.pretrained import create_model_and_transforms
    clipa('export', finished / 'model', tmp_path / 'out'); clipa('import', tmp_path / 'out', tmp_path / 'in')
    a, b = (create_model_and_transforms(f'local-dir:{p}')[0].state_dict() for p in (finished / 'model', tmp_path / 'in'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
