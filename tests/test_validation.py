"Test sets beside the training curve (`--val-data`), suites of captions, and what a stage's evaluations read: app/00_exam, engine/18_suites."
import json, subprocess, sys
import numpy as np, pytest, torch
from pathlib import Path
from PIL import Image
from clipa_nb.app.exam import Context, Reader, ToyExam, Validation, named_sets
from clipa_nb.clip import build_clip
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.engine.suites import compared, filled, open_suite, peers_in, rows_in, suite_kind
from clipa_nb.recipes import TOY, smoke
from clipa_nb.tokenizer import train_wordpiece
from clipa_nb.toyworld import caption_text, render, scenes, class_scenes, class_names
from clipa_nb.recipes import toy_world

RECIPE = smoke(TOY)
WORLD = toy_world(TOY.data)
TOK = train_wordpiece(caption_text(scenes(WORLD, 0, range(3000))), vocab_size=256, context_length=17)


def picture(x, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    "23 pictures with captions, 17 in three class folders; 7 of SugarCrepe's form, 5 pairs of Winoground's, 6 long captions."
    root = tmp_path_factory.mktemp('sets')
    part = scenes(WORLD, 5, range(23), 'val')
    x, text = render(part, 64), caption_text(part)
    for i in range(23):
        picture(x[i], root / f'pairs/{i:03d}.png')
        (root / f'pairs/{i:03d}.txt').write_text(text[i] + ('\n' + text[i] + ' again' if i % 3 == 0 else ''))
    for i in range(17): picture(x[i], root / 'classes' / ('red star', 'blue ring', 'green cross')[i % 3] / f'{i}.png')
    for i in range(12): picture(x[i], root / f'images/{i}.png')
    crepe = {str(3 * i): dict(filename=f'{i}.png', caption=text[i], negative_caption=text[i + 1]) for i in range(7)}
    (root / 'swap_att.json').write_text(json.dumps(crepe))
    wino = [dict(id=i, image_0=str(2 * i), image_1=str(2 * i + 1), caption_0=text[2 * i], caption_1=text[2 * i + 1]) for i in range(5)]
    (root / 'examples.jsonl').write_text('\n'.join(map(json.dumps, wino)))
    long = [dict(image=f'{i}.png', conversations=[dict(**{'from': 'human'}, value='Describe.'), dict(**{'from': 'gpt'}, value=f'{text[i]}.\nBehind it {text[i + 1]}, and {text[i + 2]}.')]) for i in range(6)]
    (root / 'long.json').write_text(json.dumps(long))
    return root


def model(stage=1):
    torch.manual_seed(0)
    net = build_clip(RECIPE.model.at(RECIPE.stages[stage]))
    with torch.no_grad():
        for p in net.text.parameters(): p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))) # fresh prompts all tie
    return net.eval()


def context(stage=1, **kw): return Context(RECIPE, RECIPE.stages[stage], TOK, **kw)


# ---- the files of the suites ----

def test_the_layouts_are_recognised(sets):
    kinds = {name: suite_kind(sets / name) for name in ('swap_att.json', 'examples.jsonl', 'long.json', 'pairs', 'classes')}
    assert kinds == {'swap_att.json': 'choice', 'examples.jsonl': 'winoground', 'long.json': 'long', 'pairs': '', 'classes': ''}
    choice, wino, long = (open_suite(sets / n) for n in ('swap_att.json', 'examples.jsonl', 'long.json'))
    assert (len(choice), len(wino), len(long)) == (7, 10, 6) and choice.name == 'swap_att' and len(choice.source.read(0)['text']) == 2
    assert wino.source.read(3)['image'] == (sets / 'images/3.png').read_bytes() and '\n' not in long.source.read(0)['text'][0] and ' Behind it ' in long.source.read(0)['text'][0]


def test_urban_and_docci(sets, tmp_path):
    for i in range(3):
        (tmp_path / 'u/image').mkdir(parents=True, exist_ok=True); (tmp_path / 'u/caption').mkdir(exist_ok=True)
        (tmp_path / f'u/image/{i}.jpg').write_bytes((sets / f'images/{i}.png').read_bytes()); (tmp_path / f'u/caption/{i}.txt').write_text(f'picture\nnumber {i}')
    urban = open_suite(tmp_path / 'u')
    assert (urban.task, len(urban), urban.source.read(1)['text'], urban.source.read(1)['key']) == ('long', 3, ['picture number 1'], '1')
    (tmp_path / 'docci.jsonlines.jsonl').write_text('\n'.join(json.dumps(dict(image_file=f'{i}.png', description=f'd {i}')) for i in range(2)))
    assert open_suite(tmp_path / 'docci.jsonlines.jsonl', images=str(sets / 'images')).source.read(1)['text'] == ['d 1']
    (tmp_path / 'plain.json').write_text(json.dumps([dict(image='0.png', caption='a\nb')]))
    assert suite_kind(tmp_path / 'plain.json') == '' and open_suite(tmp_path / 'plain.json', str(sets / 'images'), kind='long').source.read(0)['text'] == ['a b']


@pytest.mark.parametrize('text, says', [
    ('', 'expected a list of JSON objects'), ('[1, 2]', 'expected a list of JSON objects'), ('{"a": 1}\nnothing', 'line 2: no JSON'),
    ('[{"filename": "0.png", "caption": "x", "negative_caption": "y"}, {"filename": "1.png", "caption": "x"}]', 'row 2: no negative_caption'),
    ('[{"filename": "nowhere.png", "caption": "x", "negative_caption": "y"}]', 'its first picture nowhere.png is in none of'), ('[{"a": "b"}]', 'is no suite of captions')])
def test_what_is_no_suite(tmp_path, sets, text, says):
    (tmp_path / 'images').mkdir(); (tmp_path / 'images/0.png').write_bytes((sets / 'images/0.png').read_bytes())
    (tmp_path / 's.json').write_text(text)
    with pytest.raises(UserError, match=says): open_suite(tmp_path / 's.json', kind='' if suite_kind(tmp_path / 's.json') or '"a"' in text and 'b' in text else 'choice')


def test_peers_are_rows_or_reports(tmp_path):
    (tmp_path / 'rows.jsonl').write_text('{"model": "a", "clean": 0.5, "sketch": 0.3}\n{"model": "b", "clean": 0.7, "sketch": 0.5}')
    assert peers_in(tmp_path / 'rows.jsonl') == [dict(clean=.5, sketch=.3), dict(clean=.7, sketch=.5)]
    (tmp_path / 'a.json').write_text(json.dumps(dict(model='a', metrics={'val/clean-zeroshot-val-top1': .5, 'val/sketch-zeroshot-val-top1': .3})))
    assert peers_in(tmp_path / 'a.json') == [dict(clean=.5, sketch=.3)]


def test_captions_longer_than_the_context(sets):
    long = open_suite(sets / 'long.json').source
    assert filled(long, lambda t: TOK(t, 200)) == 0 and filled(long, lambda t: TOK(t, 5)) == 1


# ---- what a stage reads ----

def test_evaluations_read_captions_as_the_stage_trains_them():
    "Stage 1 keeps the nouns and adjectives of a long caption; stage 2 reads whole captions. A strategy of chance hangs on the text alone."
    text = ['a photo of a large red star on a dark background beside a small blue ring']
    short, full = Reader(context(0)), Reader(context(1))
    assert RECIPE.stages[0].text_strategy == 'syntax' and short(text).shape[1] == RECIPE.stages[0].context_length and 'star' in TOK.decode(short(text)[0].tolist()) and 'ring' in TOK.decode(short(text)[0].tolist())
    assert 'ring' not in TOK.decode(TOK(text, RECIPE.stages[0].context_length)[0].tolist()) and torch.equal(full(text), TOK(text, RECIPE.stages[1].context_length))
    chance = Reader(Context(RECIPE, RECIPE.stages[0].replace(text_strategy='random'), TOK))
    many = [f'{text[0]} number {i}' for i in range(9)]
    assert torch.equal(chance(many)[4:5], chance(many[4:5])) and torch.equal(chance(many, 99), chance(many)) and len({tuple(r) for r in chance(many).tolist()}) > 1
    quick = ToyExam().build(context(0, small=True, quick=True))
    assert quick.tokenizer.context_length == RECIPE.stages[0].context_length and quick(model(0))


# ---- test sets ----

ALL = ('pairs', 'classes', 'swap_att.json', 'examples.jsonl')


def asked(comm, root, names=ALL, size=4): return Validation(tuple(str(root / n) for n in names), context(), size=size)(model(), comm)


def test_open_clips_names(sets):
    got = asked(LOCAL, sets)
    assert {'val/classes-zeroshot-val-top1', 'val/classes-zeroshot-val-mean_per_class', 'val/image_to_text_R@1', 'val/image_to_text_R@5', 'val/text_to_image_R@10', 'val/mean_recall', 'val/clip_val_loss', 'val/swap_att-acc',
            'val/examples-acc', 'val/examples-text_acc', 'val/examples-image_acc'} <= set(got) and all(np.isfinite(v) for v in got.values())
    two = asked(LOCAL, sets, ('pairs', 'long.json'))
    assert 'val/pairs-image_to_text_R@1' in two and 'val/long-text_to_image_R@5' in two and 0 < two['val/long-filled'] <= 1 and 'val/image_to_text_R@1' not in two


def test_the_numbers_are_those_of_the_whole_sets(sets):
    "By hand, from one batch of everything."
    from clipa_nb.engine.pictures import eval_image
    from clipa_nb.infonce import info_nce
    from clipa_nb.pretrained import preprocess
    net, got = model(), asked(LOCAL, sets, ('pairs',), size=100)
    files = sorted((sets / 'pairs').glob('*.png'))
    x = torch.stack([eval_image(p.read_bytes(), preprocess(net.cfg).transform) for p in files])
    texts = [p.with_suffix('.txt').read_text().splitlines() for p in files]
    owner = torch.tensor([i for i, t in enumerate(texts) for _ in t])
    with torch.no_grad():
        z, w = net.encode_image(x, normalize=True), net.encode_text(TOK([c for t in texts for c in t], 17), normalize=True)
        loss = info_nce(z, torch.stack([w[owner == i][0] for i in range(23)]), net.logit_scale.exp())['loss']
    s, right = z @ w.T, torch.arange(23)[:, None] == owner
    rank = ((s >= s.masked_fill(~right, -9).amax(1, keepdim=True)) & ~right).sum(1)
    assert got['val/image_to_text_R@1'] == pytest.approx((rank < 1).float().mean().item()) and got['val/clip_val_loss'] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize('ranks', [2, 3])
def test_uneven_sets_give_the_same_floats_on_any_number_of_ranks(sets, ranks):
    "23, 17, 7 and 10 pictures in batches of 4; and in one batch, so that all but one rank have nothing to encode."
    for size in (4, 50): assert spawn(asked, ranks, sets, ALL, size) == [asked(LOCAL, sets, ALL, size)] * ranks


def with_a_bad_picture(comm, root):
    got = Validation((str(root / 'bad'), str(root / 'classes')), context(), size=4)(model(), comm)
    return sorted(got), comm.size


def test_a_bad_picture_costs_its_set_and_nothing_waits(sets, capfd):
    for i in range(9):
        picture(torch.zeros(3, 20, 20, dtype=torch.uint8) + 20 * i, sets / f'bad/{"ab"[i % 2]}/{i}.png')
    (sets / 'bad/b/5.png').write_bytes(b'no picture') # in the batch of another rank than the first
    for ranks in (1, 2, 3):
        for names, _ in spawn(with_a_bad_picture, ranks, sets) if ranks > 1 else [with_a_bad_picture(LOCAL, sets)]:
            assert names == ['val/classes-zeroshot-val-mean_per_class', 'val/classes-zeroshot-val-top1']
    assert 'note: --val-data bad:' in capfd.readouterr().err


@pytest.mark.parametrize('paths, says', [(('nowhere',), 'nowhere'), (('pairs', 'x/pairs'), 'two sets have the same name, pairs'), (('empty.json',), 'no JSON')])
def test_sets_that_cannot_be_asked_are_refused_before_training(sets, paths, says):
    (sets / 'empty.json').write_text('')
    with pytest.raises(UserError, match=says): Validation(tuple(str(sets / p) for p in paths), context())


def test_a_suite_file_names_several(sets):
    (sets / 'all.json').write_text(json.dumps([dict(path='pairs', name='p'), dict(path='classes', templates='simple'), dict(path='swap_att.json')]))
    assert [a.called() for a in named_sets((str(sets / 'all.json'),))] == ['p', 'classes', 'swap_att'] and [a.called() for a in named_sets((f"q={sets / 'swap_att.json'}",))] == ['q']


# ---- a whole run ----

def test_a_run_writes_them_beside_the_curve(sets, tmp_path):
    flags = f'train toy --smoke --device cpu --precision fp32 --workers 1 --max-steps 2 --eval-steps 1 --val-data {sets / "classes"} mine={sets / "pairs"} --out {tmp_path / "run"}'
    done = subprocess.run([sys.executable, '-m', 'clipa_nb.cli', *flags.split()], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    found = [r for r in rows if 'val/classes-zeroshot-val-top1' in r]
    assert [r['step'] for r in found] == [1, 2, 2, 3, 4] and all('val/mine-image_to_text_R@5' in r and 'val/mine-clip_val_loss' in r for r in found)
    assert 'val/mine-image_to_text_R@5' in json.loads((tmp_path / 'run/report.json').read_text())['metrics']
    bad = subprocess.run([sys.executable, '-m', 'clipa_nb.cli', *flags.replace(str(sets / 'classes'), 'nowhere').replace('/run', '/other').split()], capture_output=True, text=True)
    assert bad.returncode == 2 and 'nowhere' in bad.stderr and not (tmp_path / 'other').exists()
