"`clipa eval`: one preprocessing, captions by line, classes by name, refusals with reasons, and the miniatures of tests/papers."
import io, json, warnings
from pathlib import Path
import pytest, torch, torch.nn.functional as F
from PIL import Image
from clipa_nb.app.questions import Questions, ask_model, checked, score_table
from clipa_nb.core import UserError, load_user_code
from clipa_nb.data import open_pairs
from clipa_nb.engine.evalsets import Pictures, captions_in, class_list, matched, open_set
from clipa_nb.pretrained import create_model, get_tokenizer, preprocess, save_pretrained
from clipa_nb.recipes import TOY, recipe, smoke, toy_world
from clipa_nb.tokenizer import train_wordpiece

PAPERS = Path(__file__).parent / 'papers'


@pytest.fixture(scope='session')
def words():
    from clipa_nb.toyworld import caption_text, scenes
    return train_wordpiece(caption_text(scenes(toy_world(TOY.data), 0, range(1000))), vocab_size=256, context_length=17)


def saved(out, r, tokenizer, seed=0):
    "A fresh model of a recipe as a run leaves it."
    torch.manual_seed(seed)
    model = r.model.at(r.stages[-1]).build()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore') # what open_clip has no words for
        for p in model.parameters(): p.add_(0.02 * torch.randn_like(p)) # so that prompts differ
        save_pretrained(model, out, tokenizer=tokenizer, tokenizer_config=r.tokenizer if hasattr(r.tokenizer, 'size') else None)
    (out / 'recipe.json').write_text(json.dumps(dict(recipe=r.to_dict(), seed=0, smoke=True)))
    return out


@pytest.fixture(scope='session')
def clip(tmp_path_factory, words): return saved(tmp_path_factory.mktemp('clip') / 'model', smoke(TOY), words)


def ask(model, **kw): return ask_model(str(model), checked(Questions(device='cpu', **kw)))


# ---- one preprocessing ----

def picture(mode, size=(37, 61)):
    noise = torch.randint(0, 256, (size[1], size[0], 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy()
    if mode == 'I;16': return Image.fromarray(noise[..., 0].astype('uint16') * 257)
    image = Image.fromarray(noise, 'RGBA')
    return image if mode == 'RGBA' else image.convert('RGB').convert(mode)


KINDS = [('RGB', 'png'), ('RGB', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('I;16', 'png'), ('CMYK', 'jpg'), ('L', 'jpg'), ('1', 'png')]


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize('size', [(37, 61), (64, 64), (90, 41)])
@pytest.mark.parametrize('resize_mode', ['squash', 'shortest'])
def test_eval_prepares_pictures_as_the_model_says(tmp_path, resize_mode, size):
    val = preprocess(smoke(TOY).model.replace(image_size=32, resize_mode=resize_mode, interpolation='bicubic'))
    for k, (mode, suffix) in enumerate(KINDS):
        picture(mode, size).save(tmp_path / f'{k}.{suffix}'); (tmp_path / f'{k}.txt').write_text('x')
    source = open_pairs(str(tmp_path))
    seen, raw = (Pictures(source, val.transform, fields=(), opened=how)[0]['image'] for how in ('RGB', 'as it is'))
    mean, std = (torch.tensor(v)[:, None, None] for v in (val.mean, val.std))
    for k, (mode, suffix) in enumerate(KINDS):
        assert torch.equal((raw[k].float() / 255 - mean) / std, val(Image.open(tmp_path / f'{k}.{suffix}'))), (mode, suffix)
        assert torch.equal((seen[k].float() / 255 - mean) / std, val(Image.open(tmp_path / f'{k}.{suffix}').convert('RGB'))), (mode, suffix)


# ---- captions ----

@pytest.mark.parametrize('text, found', [('a cat', ['a cat']), (' a cat \n\n two cats\r\n', ['a cat', 'two cats']), (['a', ' b '], ['a', 'b']), (None, []), ('\n', []), ([], [])])
def test_captions_are_lines_or_lists(text, found): assert captions_in(text) == found


@pytest.fixture(scope='session')
def captioned(tmp_path_factory):
    "Nine pictures with one to five captions each, a caption a line."
    folder = tmp_path_factory.mktemp('captioned')
    for i in range(9):
        Image.new('RGB', (40, 40), (25 * i, 255 - 25 * i, 60)).save(folder / f'{i}.png')
        (folder / f'{i}.txt').write_text('\n'.join(f'{colour} {shape}' for colour, shape in zip(['red', 'blue', 'green', 'a dark', 'a light'][:i % 5 + 1], ['star', 'ring', 'square', 'heart', 'cross'][i % 5:] * 5)))
    return folder


def test_several_captions_are_several(clip, captioned):
    model, tokenizer = create_model(f'local-dir:{clip}').eval(), get_tokenizer(f'local-dir:{clip}')
    val, lines = preprocess(model.cfg), [(captioned / f'{i}.txt').read_text().splitlines() for i in range(9)]
    owner = torch.tensor([i for i, found in enumerate(lines) for _ in found])
    with torch.no_grad():
        image = model.encode_image(torch.stack([val(Image.open(captioned / f'{i}.png')) for i in range(9)]), normalize=True)
        s = image @ model.encode_text(tokenizer([t for found in lines for t in found], model.cfg.context_length), normalize=True).T
    right = torch.arange(9)[:, None] == owner
    beaten = ((s >= s.masked_fill(~right, -2).amax(1, keepdim=True)) & ~right).sum(1), ((s >= s.masked_fill(~right, -2).amax(0, keepdim=True)) & ~right).sum(0)
    for size in (2, 250):
        got = ask(clip, suite='retrieval', val_data=(str(captioned),), batch_size=size)['metrics']
        for k in (1, 5):
            assert got[f'val/image_to_text_R@{k}'] == pytest.approx(float((beaten[0] < k).double().mean()))
            assert got[f'val/text_to_image_R@{k}'] == pytest.approx(float((beaten[1] < k).double().mean()))
    assert len(owner) == 25


def test_a_picture_without_a_caption_ends_retrieval(clip, captioned, tmp_path):
    for p in captioned.iterdir(): (tmp_path / p.name).write_bytes(p.read_bytes())
    (tmp_path / '3.txt').write_text('\n')
    with pytest.raises(UserError, match='3: no caption'): ask(clip, suite='retrieval', val_data=(str(tmp_path),))


# ---- classes by name ----

@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    "Class folders: all three colours, and the last two of them."
    root = tmp_path_factory.mktemp('folders')
    for part, names in (('all', ('blue', 'green', 'red')), ('some', ('green', 'red'))):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for i in range(5): Image.new('RGB', (40, 40), tuple(200 * (name == c) + 9 * i for c in ('red', 'green', 'blue'))).save(root / part / name / f'{i}.png')
    (root / 'names.txt').write_text('blue\ngreen\nred\n')
    (root / 'told.txt').write_text('green\ta green thing\nblue\ta blue thing\nred\ta red thing\n')
    return root


def labels(parts, name): return [int(v) for batch in parts[name][-2] for v in batch['label']]


def test_some_of_the_classes_are_numbered_by_name(clip, folders):
    from clipa_nb.app.questions import own_parts
    val = preprocess(smoke(TOY).model)
    def parts(suite, *sets, **kw): return own_parts(Questions(suite=suite, val_data=tuple(str(folders / s) for s in sets), **kw), val.transform)
    assert labels(parts('robustness', 'some', classes=str(folders / 'names.txt')), 'some') == [1] * 5 + [2] * 5
    found = parts('robustness', 'some', classes=str(folders / 'told.txt'))
    assert labels(found, 'some') == [0] * 5 + [2] * 5 and found['some'][1] == ['a green thing', 'a blue thing', 'a red thing']
    assert labels(parts('robustness', 'all', 'some'), 'some') == [1] * 5 + [2] * 5 and open_set(str(folders / 'some'), open_pairs, classes=str(folders / 'names.txt')).numbers == (1, 2)
    found = parts('probes', 'some', train_data=str(folders / 'all'))
    assert labels(found, 'some') == [1] * 5 + [2] * 5 and found['some'][2] == ['blue', 'green', 'red']
    got = ask(clip, suite='probes', val_data=(str(folders / 'some'),), train_data=str(folders / 'all'), shots=(4,))['metrics']
    assert got['val/some-linear-probe-top1'] == 1 # by position, green would be called blue


@pytest.mark.parametrize('suite, sets, more', [('zero-shot', ('all',), dict(classes='few.txt')), ('auto', ('all',), dict(classes='few.txt')), ('robustness', ('some', 'all'), {}), ('probes', ('all',), dict(train_data='some'))])
def test_a_class_that_is_nowhere_is_an_error(clip, folders, suite, sets, more):
    (folders / 'few.txt').write_text('green\nred\n')
    with pytest.raises(UserError, match="the class 'blue' is not among the 2 classes of .*rename it, or give --classes"):
        ask(clip, suite=suite, val_data=tuple(str(folders / s) for s in sets), **{k: str(folders / v) for k, v in more.items()})


def test_a_list_of_classes_has_folders_and_names(folders):
    assert class_list(str(folders / 'told.txt')) == (['green', 'blue', 'red'], ['a green thing', 'a blue thing', 'a red thing'])


# ---- what is refused ----

def test_random_weights_are_not_asked(clip):
    with pytest.raises(UserError, match='S-16 names an architecture without weights.*NAME:TAG; or --random-weights'): ask('ViT-S-16', suite='retrieval')
    with pytest.raises(UserError, match='ViT-S-166'): ask('ViT-S-166', suite='retrieval')
    assert ask(clip, suite='retrieval')['metrics']


def test_random_weights_are_asked_where_somebody_insists(monkeypatch, words):
    monkeypatch.setattr('clipa_nb.app.questions.get_tokenizer', lambda name: words)
    monkeypatch.setattr('clipa_nb.app.questions.create_model_and_transforms', lambda name, device: (smoke(TOY).model.build(), None, preprocess(smoke(TOY).model)))
    monkeypatch.setattr('clipa_nb.app.questions.world_of', lambda folder: (TOY, 0, True))
    assert set(ask('ViT-S-16', suite='retrieval', random_weights=True)['metrics']) == {f'val/{a}_R@{k}' for a in ('image_to_text', 'text_to_image') for k in (1, 5)}


MUTE = '''
from dataclasses import dataclass
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.recipes import recipe, smoke
@dataclass(frozen=True)
class Mute(ModelConfig):
    def build(self, output_dict=False): return CLIP.from_config(self, output_dict, text=None)
TOY = smoke(recipe('toy'))
MUTE = TOY.replace(name='mute', model=Mute(**vars(TOY.model)))
'''


def test_a_suite_that_a_model_cannot_answer_says_why(tmp_path, folders, words):
    (tmp_path / 'mute_paper.py').write_text(MUTE)
    code = str(tmp_path / 'mute_paper.py')
    model = saved(tmp_path / 'model', load_user_code(code).MUTE, words)
    why = 'it does not encode texts'
    for suite in ('zero-shot', 'retrieval', 'robustness'):
        with pytest.raises(UserError, match=f'--suite {suite}: .*model cannot be asked this, {why}; it can be asked: probes'): ask(model, suite=suite, with_code=(code,))
    with pytest.raises(UserError, match=f"can answer none of the exam's questions: {why}"): ask(model, with_code=(code,))
    got = ask(model, suite='probes', val_data=(str(folders / 'some'),), train_data=str(folders / 'all'), shots=(4,), with_code=(code,))
    assert got['metrics']['val/some-linear-probe-top1'] == 1


def test_a_model_that_is_not_there():
    with pytest.raises(UserError, match='/nowhere/model: there is no such directory'): ask('/nowhere/model')


# ---- user files ----

def test_a_recipe_with_kinds_of_a_user_needs_the_users_file(clip, captioned, tmp_path):
    notes = json.loads((clip / 'recipe.json').read_text())
    notes['recipe']['objective'] = dict(kind='user.unseen_paper:Loss')
    out = tmp_path / 'model'
    out.mkdir()
    for p in clip.iterdir(): (out / p.name).write_bytes(p.read_bytes())
    (out / 'recipe.json').write_text(json.dumps(notes))
    with pytest.raises(UserError, match='unseen_paper.py: give it with --with unseen_paper.py'): ask(out)
    assert ask(out, suite='retrieval', val_data=(str(captioned),))['recipe'] == 'toy' # its training does not matter there
    (tmp_path / 'unseen_paper.py').write_text('from dataclasses import dataclass\nfrom clipa_nb.infonce import ContrastiveConfig\n@dataclass(frozen=True)\nclass Loss(ContrastiveConfig): pass\n')
    assert ask(out, with_code=(str(tmp_path / 'unseen_paper.py'),))['metrics'] == ask(clip)['metrics']


# ---- the miniatures ----

@pytest.mark.parametrize('name', ['clippo', 'coca', 'filip', 'owlvit', 'slip'])
def test_the_miniatures_answer(name, tmp_path, words, captioned, monkeypatch):
    monkeypatch.setattr('clipa_nb.toyworld.TEMPLATES', ['a photo of a {}'])
    def no_digits(size): raise UserError('not today')
    monkeypatch.setattr('clipa_nb.app.exam.digit_set', no_digits)
    code = str(PAPERS / f'{name}.py')
    r = getattr(load_user_code(code), name.upper())
    tokenizer = words if name != 'clippo' else r.tokenizer.open(None, None, 0, 17)
    model = saved(tmp_path / 'model', r, tokenizer)
    got = ask(model, with_code=(code,))
    assert got['not asked'] == {} and got['metrics']['val/pairs'] == 100 and all(0 <= v <= 1 for k, v in got['metrics'].items() if k != 'val/pairs')
    assert 0 < got['metrics']['val/colour-zeroshot-val-top5'] < 1 and r.name in got['recipe']
    own = ask(model, suite='retrieval', val_data=(str(captioned),), with_code=(code,))['metrics']
    assert len(own) == 5 and 0 < own['val/image_to_text_R@5'] <= 1
    assert '%' in score_table(dict(got, data=['toy world']))


# ---- suites of sets ----

def suite(tmp_path, folders, captioned, *more):
    file = tmp_path / 'suite.json'
    sets = [dict(path=str(folders / 'all'), name='colours', templates='simple'), dict(path=str(captioned), name='captions'), *more]
    file.write_text(json.dumps(dict(sets=sets)))
    return str(file)


def test_a_suite_asks_each_set_what_it_is_for(clip, folders, captioned, tmp_path):
    got = ask(clip, suite=suite(tmp_path, folders, captioned), out=str(tmp_path / 'a.json'), recalls=(1, 3))
    alone = ask(clip, suite='zero-shot', val_data=(f"colours={folders / 'all'}",), templates='simple')['metrics']
    assert {k: v for k, v in got['metrics'].items() if 'colours' in k} == alone and set(alone) == {f'val/colours-zeroshot-val-{k}' for k in ('top1', 'mean_per_class')}
    assert {'val/captions-image_to_text_R@3', 'val/captions-mean_recall'} <= set(got['metrics'])
    assert {k: v['task'] for k, v in got['sets'].items()} == dict(colours='classification', captions='retrieval') and got['sets']['colours']['pictures'] == 15
    assert json.loads((tmp_path / 'a.json').read_text()) == got


def test_a_suite_goes_on_where_it_was(clip, folders, captioned, tmp_path, monkeypatch):
    import clipa_nb.app.questions as Q
    file, out, asked, whole = suite(tmp_path, folders, captioned), tmp_path / 'a.json', [], Q.answered_set
    def counted(m, s, alone=False):
        asked.append(s.name)
        if s.name == 'captions' and len(asked) == 2: raise KeyboardInterrupt
        return whole(m, s, alone)
    monkeypatch.setattr(Q, 'answered_set', counted)
    with pytest.raises(KeyboardInterrupt): ask(clip, suite=file, out=str(out))
    assert list(json.loads(out.read_text())['sets']) == ['colours']
    first = ask(clip, suite=file, out=str(out))
    assert asked == ['colours', 'captions', 'captions']
    assert ask(clip, suite=file, out=str(out)) == first and len(asked) == 3
    ask(clip, suite=file, out=str(out), ties='clip_benchmark') # another rule: retrieval is asked again
    assert asked[3:] == ['captions']
    json.dump([dict(path=str(folders / 'all'), name='colours', templates='openai')], open(file, 'w'))
    ask(clip, suite=file, out=str(out)) # other prompts
    assert asked[4:] == ['colours']


def test_answers_of_other_weights_are_never_overwritten(clip, folders, captioned, tmp_path, words):
    out, other = tmp_path / 'a.json', saved(tmp_path / 'other', smoke(TOY), words, seed=9)
    ask(clip, suite='auto', val_data=(str(captioned),), out=str(out))
    before = out.read_bytes()
    with pytest.raises(UserError, match='the file holds answers of other weights .*choose another name'): ask(other, suite='auto', val_data=(str(captioned),), out=str(out))
    (tmp_path / 'notes.json').write_text('my notes')
    with pytest.raises(UserError, match='no JSON of ours'): ask(clip, suite='auto', val_data=(str(captioned),), out=str(tmp_path / 'notes.json'))
    assert out.read_bytes() == before and (tmp_path / 'notes.json').read_text() == 'my notes'


def test_bad_sets_are_named_and_the_others_answered(clip, folders, captioned, tmp_path, capsys):
    from clipa_nb.cli import main
    bad = tmp_path / 'bad' / 'x'
    bad.mkdir(parents=True)
    (bad / '1.png').write_bytes(b'no picture')
    file = suite(tmp_path, folders, captioned, dict(path=str(tmp_path / 'bad')), dict(path='/nowhere/at/all'))
    assert main(['eval', str(clip), '--suite', file, '--out', str(tmp_path / 'a.json'), '--device', 'cpu']) == 2
    said = capsys.readouterr()
    assert said.err.strip().endswith('2 of 4 sets could not be asked: bad, all; the table says why')
    assert 'failed: bad: ' in said.out and '1.png: not an image' in said.out and 'captions-mean_recall' in said.out
    kept = json.loads((tmp_path / 'a.json').read_text())
    assert list(kept['sets']) == ['colours', 'captions'] and list(kept['failed']) == ['bad', 'all'] and (tmp_path / 'a.png').read_bytes()[:4] == b'\x89PNG'


def test_a_row_to_compare_with(clip, folders, captioned, tmp_path, capsys):
    from clipa_nb.cli import main
    out = tmp_path / 'a.json'
    args = ['--suite', 'zero-shot', '--val-data', f"c={folders / 'all'}", '--device', 'cpu']
    assert main(['eval', str(clip), *args, '--out', str(out)]) == 0
    told = json.loads(out.read_text())
    told['metrics']['val/c-zeroshot-val-top1'] -= 0.25
    (tmp_path / 'b.json').write_text(json.dumps(told))
    capsys.readouterr()
    assert main(['eval', str(clip), *args, '--against', str(tmp_path / 'b.json')]) == 0
    line = next(l for l in capsys.readouterr().out.splitlines() if 'top1' in l)
    assert line.split()[-1] == '+25.0'
    assert main(['eval', str(clip), *args, '--against', str(tmp_path / 'suite.none')]) == 2


@pytest.mark.parametrize('text, refusal', [('{', 'no JSON'), ('[]', 'expected a list of sets'), ('[{"name": "x"}]', 'has no "path"'), ('[{"path": "x", "clases": "y"}]', 'clases'), ('[{"path": "a/x"}, {"path": "b/x"}]', 'two sets have the same name, x')])
def test_suite_files_that_are_none(clip, tmp_path, text, refusal):
    (tmp_path / 's.json').write_text(text)
    with pytest.raises(UserError, match=refusal): ask(clip, suite=str(tmp_path / 's.json'))


def test_paths_of_a_suite_file_are_seen_from_it(clip, folders, captioned, tmp_path):
    (folders / 's.json').write_text(json.dumps([dict(path='all', classes='told.txt')]))
    got = ask(clip, suite=str(folders / 's.json'))
    assert got['sets']['all']['asked']['path'] == str(folders / 'all') and got['sets']['all']['classes'] == 3


def test_two_classes_and_several_labels(clip, folders, tmp_path):
    skl = pytest.importorskip('sklearn.metrics')
    from clipa_nb.engine.asking import scores
    got = ask(clip, suite='auto', val_data=(str(folders / 'some'),))['metrics']
    model, tokenizer = create_model(f'local-dir:{clip}').eval(), get_tokenizer(f'local-dir:{clip}')
    from clipa_nb.zero_shot import make_head
    batch = Pictures(open_pairs(str(folders / 'some')), preprocess(model.cfg).transform)[0]
    s = scores(model, batch['image'], make_head(model, ['green', 'red'], 'a photo of a {}.', tokenizer))
    assert got['val/some-zeroshot-val-roc_auc'] == pytest.approx(skl.roc_auc_score(batch['label'], s[:, 1] - s[:, 0]))
    assert got['val/some-zeroshot-val-top1'] == pytest.approx(float((s.argmax(1) == batch['label']).float().mean()))


# ---- class vectors that are kept ----

def test_class_vectors_are_kept_by_everything_they_depend_on(clip, tmp_path, monkeypatch, words):
    import clipa_nb.app.questions as Q
    monkeypatch.setattr(Q, 'KEPT_FROM', 2)
    model, tokenizer, made = create_model(f'local-dir:{clip}').eval(), get_tokenizer(f'local-dir:{clip}'), []
    monkeypatch.setattr(Q, 'make_head', lambda *a, **k: made.append(1) or make_head(*a, **k))
    from clipa_nb.zero_shot import make_head
    def head(model=model, names=('red', 'blue'), templates=('a {}', 'the {}')): return Q.head_of(model, tokenizer, names, list(templates), Q.weights_digest(model), tmp_path / 'kept')
    first = head()
    assert torch.equal(head().weight, first.weight) and len(made) == 1
    head(names=('red', 'green')), head(templates=('a {}', '{}'))
    with torch.no_grad(): next(model.text.parameters()).add_(0.1)
    assert not torch.equal(head().weight, first.weight) and len(made) == 4 and len(list((tmp_path / 'kept').iterdir())) == 4
    for file in (tmp_path / 'kept').iterdir(): file.write_bytes(b'damaged')
    with pytest.warns(UserWarning, match='damaged'): head()
    assert len(made) == 5


# ---- clipa classify ----

def test_classify_says_what_open_clip_says(tmp_path, words, capsys):
    open_clip = pytest.importorskip('open_clip')
    from clipa_nb.cli import main
    from clipa_nb.pretrained import from_open_clip_config
    cfg = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
               text_cfg=dict(context_length=12, vocab_size=words.vocab_size, width=32, heads=2, layers=1, hf_tokenizer_name='bert-base-uncased', tokenizer_kwargs=dict(strip_sep_token=True), no_causal_mask=True, pool_type='last'))
    pixels = dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation='bicubic', resize_mode='shortest')
    torch.manual_seed(4)
    model = from_open_clip_config(dict(model_cfg=cfg, preprocess_cfg=pixels)).build()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
    out = save_pretrained(model, tmp_path / 'model', tokenizer=words)
    names, files = ['a red star', 'a blue ring', 'a square'], []
    for k, (mode, suffix) in enumerate(KINDS):
        picture(mode).save(tmp_path / f'{k}.{suffix}')
        files.append(str(tmp_path / f'{k}.{suffix}'))
    theirs, _, val = open_clip.create_model_and_transforms(f'local-dir:{out}')
    with torch.no_grad():
        image = theirs.eval().encode_image(torch.stack([val(Image.open(f)) for f in files]), normalize=True)
        text = theirs.encode_text(open_clip.get_tokenizer(f'local-dir:{out}')(names), normalize=True)
        p = (theirs.logit_scale.exp() * image @ text.T).softmax(1)
    assert main(['classify', str(out), *files, '--names', ','.join(names), '--out', str(tmp_path / 'p.json'), '--png', str(tmp_path / 'p.png'), '--device', 'cpu']) == 0
    ours = json.loads((tmp_path / 'p.json').read_text())
    assert float((torch.tensor([[ours[f][n] for n in names] for f in files]) - p).abs().max()) < 1e-5 and float(p.std(0).max()) > 1e-3
    assert Image.open(tmp_path / 'p.png').size[1] > 500 and capsys.readouterr().out.count('%') == 3 * len(files)
    # the same from an architecture by name and a file of weights
    from clipa_nb.pretrained import add_model_config
    (tmp_path / 'small-test.json').write_text(json.dumps(dict(cfg)))
    add_model_config(tmp_path / 'small-test.json')
    file = next(p for p in Path(out).iterdir() if p.name == 'open_clip_model.safetensors' or p.name == 'model.safetensors')
    from clipa_nb.app.questions import model_given
    assert model_given('small-test', False, str(file)) == 'small-test'
    with pytest.raises(UserError, match='without weights'): model_given('small-test', False)


@pytest.mark.parametrize('args, refusal', [
    (['x.png'], 'there is no such file'), ([], 'no picture is given'), (['.', '--names', 'a,b'], 'holds no picture'), (['bad.png', '--names', 'a,b'], 'bad.png: not an image'),
    (['bad.png', '--names', 'one'], '1 name: give two or more'), (['bad.png', '--classes', 'none.txt'], 'No such file'), (['bad.png', '--names', 'a,b', '--top', '0'], '--top 0')])
def test_what_cannot_be_classified(clip, args, refusal, tmp_path, monkeypatch, capsys):
    from clipa_nb.cli import main
    monkeypatch.chdir(tmp_path)
    args = args if any(a.startswith('--') for a in args) else [*args, '--names', 'a,b']
    if 'bad.png' in args: (tmp_path / 'bad.png').write_bytes(b'no picture')
    assert main(['classify', str(clip), *args]) == 2
    err = capsys.readouterr().err
    assert refusal in err and err.count('\n') == 1


def test_robustness_is_measured_from_a_line_of_peers(clip, folders, tmp_path):
    sets = tuple(f'{name}={folders / where}' for name, where in (('plain', 'all'), ('moved', 'some')))
    peers = []
    for k, (a, b) in enumerate(((0.3, 0.2), (0.5, 0.4), (0.7, 0.55), (0.6, 0.5))):
        peers.append(str(tmp_path / f'{k}.json'))
        Path(peers[-1]).write_text(json.dumps(dict(model=f'peer {k}', metrics={'val/clean_top1': a, 'val/moved_top1': b})))
    alone = ask(clip, suite='robustness', val_data=sets)['metrics']
    assert set(alone) == {'val/clean_top1', 'val/moved_top1'} # two peers are no line
    got = ask(clip, suite='robustness', val_data=sets, against=tuple(peers))['metrics']
    assert got['val/moved_effective'] == pytest.approx(got['val/moved_top1'] - got['val/moved_expected'])
