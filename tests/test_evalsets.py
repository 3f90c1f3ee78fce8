"Evaluation sets on disk: every layout, classes by name, prompts, batches from workers, metrics of other people's sets."
import io, json, tarfile
from pathlib import Path
import numpy as np, pytest, torch
from PIL import Image
from clipa_nb.core import UserError
from clipa_nb.data import open_pairs
from clipa_nb.engine.evalsets import EvalTars, Pictures, asked_among, average_precision, class_list, eleven_points, matched, open_set, prompt_list, roc_auc
from clipa_nb.engine.imagenet import IMAGENET_CLASSNAMES, IMAGENET_SYNSETS, OPENAI_IMAGENET_TEMPLATES, PROMPTS, SIMPLE_IMAGENET_TEMPLATES, SUBSETS, canonical
from clipa_nb.engine.pictures import Transform

SQUASH = Transform(size=8, mode='squash')


def picture(path, colour=(200, 30, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', (12, 9), colour).save(path)


def opened(where, **kw): return open_set(str(where), open_pairs, **kw)
def labels(s): return [int(v) for b in Pictures(s.source, SQUASH, 3, numbers=s.numbers, names=s.names) for v in b['label']]


# ---- ImageNet's facts ----

def test_names_and_templates_are_open_clips():
    theirs = pytest.importorskip('open_clip').zero_shot_metadata
    assert IMAGENET_CLASSNAMES == tuple(theirs.IMAGENET_CLASSNAMES)
    for ours, list_ in ((OPENAI_IMAGENET_TEMPLATES, theirs.OPENAI_IMAGENET_TEMPLATES), (SIMPLE_IMAGENET_TEMPLATES, theirs.SIMPLE_IMAGENET_TEMPLATES)):
        assert [t.format('kite (bird of prey)') for t in ours] == [t('kite (bird of prey)') for t in list_]


@pytest.mark.parametrize('text, keep, found', [('St. Bernard', ',', 'st bernard'), ('a  Photo_of {}!', '{}', 'a photo of {}'), ('{}', '{}', '{}'), ("potter's wheel,x", ',', 'potters wheel,x')])
def test_the_canonical_form(text, keep, found): assert canonical(text, keep) == found


def test_lists_have_their_lengths():
    assert (len(IMAGENET_SYNSETS), len(set(IMAGENET_SYNSETS)), len(PROMPTS['jax']), len(PROMPTS['openai']), len(PROMPTS['simple'])) == (1000, 1000, 81, 80, 7)
    assert all(len(set(v)) == 200 and max(v) < 1000 for v in SUBSETS.values())


# ---- ImageNet on disk ----

SYNSETS = {1: 'n01443537', 2: 'n01440764', 3: 'n15075141', 4: 'n01440764'}

def synset_lines(root): (root / 'imagenet_2012_validation_synset_labels.txt').write_text('\n'.join(SYNSETS.values()))
def kaggle(root): (root / 'LOC_val_solution.csv').write_text('ImageId,PredictionString\n' + ''.join(f'ILSVRC2012_val_{k:08d},{s} 1 2 3 4 {s} 5 6 7 8\n' for k, s in reversed(SYNSETS.items())))
def numbers(root): (root / 'val.txt').write_text(''.join(f'ILSVRC2012_val_{k:08d}.JPEG {IMAGENET_SYNSETS.index(s)}\n' for k, s in SYNSETS.items()))

def official(root):
    io_ = pytest.importorskip('scipy.io')
    rows = np.zeros(3, dtype=[('ILSVRC2012_ID', object), ('WNID', object), ('words', object)])
    for k, s in enumerate(('n15075141', 'n01440764', 'n01443537')): rows[k] = (k + 1, s, 'x')
    folder = root / 'ILSVRC2012_devkit_t12' / 'data'
    folder.mkdir(parents=True)
    io_.savemat(folder / 'meta.mat', dict(synsets=rows))
    (folder / 'ILSVRC2012_validation_ground_truth.txt').write_text('3\n2\n1\n2\n')


@pytest.mark.parametrize('write', [synset_lines, kaggle, numbers, official])
@pytest.mark.parametrize('up', [0, 1])
def test_imagenet_without_folders(tmp_path, write, up):
    for k in SYNSETS: picture(tmp_path / 'images' / 'val' / f'ILSVRC2012_val_{k:08d}.JPEG')
    write((tmp_path / 'images' / 'val', tmp_path / 'images')[up])
    s = opened(tmp_path / 'images' / 'val')
    assert (labels(s), s.names, s.templates, s.task) == ([1, 0, 999, 0], IMAGENET_CLASSNAMES, list(OPENAI_IMAGENET_TEMPLATES), 'classification')


def test_imagenet_with_synsets_in_the_names(tmp_path):
    for k, s in SYNSETS.items(): picture(tmp_path / f'ILSVRC2012_val_{k:08d}_{s}.JPEG')
    assert labels(opened(tmp_path)) == [1, 0, 999, 0]


@pytest.mark.parametrize('lines, words', [(None, 'and no labels: put one of LOC_val_solution.csv'), ('n01440764\nn99999999\n', "line 2: 'n99999999' is neither a synset"), ('n01440764\n', 'has no label for ILSVRC2012_val_00000002.JPEG .3 pictures')])
def test_imagenet_without_labels(tmp_path, lines, words):
    for k in SYNSETS: picture(tmp_path / f'ILSVRC2012_val_{k:08d}.JPEG')
    if lines: (tmp_path / 'val_map.txt').write_text(lines)
    with pytest.raises(UserError, match=words): opened(tmp_path)


def test_synset_folders_are_ranked_among_a_thousand_or_their_two_hundred(tmp_path):
    for k in (0, 388, 999): picture(tmp_path / 'val' / IMAGENET_SYNSETS[k] / 'x.JPEG')
    for k in SUBSETS['imagenet-r']: picture(tmp_path / 'r' / IMAGENET_SYNSETS[k] / 'x.jpg')
    some, r, few = opened(tmp_path / 'val'), opened(tmp_path / 'r'), opened(tmp_path / 'val', classes='present')
    assert (labels(some), len(some.names)) == ([0, 388, 999], 1000)
    assert labels(r) == list(range(200)) and r.names == tuple(IMAGENET_CLASSNAMES[k] for k in SUBSETS['imagenet-r'])
    assert (labels(few), few.names) == ([0, 1, 2], tuple(IMAGENET_CLASSNAMES[k] for k in (0, 388, 999)))


def test_numbered_folders_are_numbers(tmp_path):
    for k in (0, 2, 10): picture(tmp_path / 'imagenetv2-matched' / str(k) / 'x.jpeg'); picture(tmp_path / 'mnist' / str(k) / 'x.png')
    assert sorted(labels(opened(tmp_path / 'imagenetv2-matched'))) == [0, 2, 10]
    s = opened(tmp_path / 'mnist')
    assert s.names == ('0', '2', '10') and sorted(labels(s)) == [0, 1, 2]


def test_objectnet_by_its_mapping(tmp_path):
    tables = tmp_path / 'objectnet-1.0' / 'mappings'
    tables.mkdir(parents=True)
    (tables / 'folder_to_objectnet_label.json').write_text(json.dumps(dict(air_freshener='Air freshener', alarm_clock='Alarm clock', backpack='Backpack')))
    (tables / 'objectnet_to_imagenet_1k.json').write_text(json.dumps({'Alarm clock': 'analog clock', 'Backpack': 'backpack, back pack'}))
    for name in ('backpack', 'air_freshener', 'alarm_clock'): picture(tmp_path / 'objectnet-1.0' / 'images' / name / 'x.png')
    s = opened(tmp_path)
    assert (s.names, labels(s)) == (('alarm clock', 'backpack'), [0, 1])


# ---- CLIP_benchmark's layout ----

def tar(path, samples):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w') as t:
        for k, sample in samples.items():
            for ending, data in sample.items():
                info = tarfile.TarInfo(f'{k}.{ending}')
                info.size = len(data)
                t.addfile(info, io.BytesIO(data))


def png(colour=(1, 2, 3)):
    out = io.BytesIO()
    Image.new('RGB', (10, 10), colour).save(out, 'png')
    return out.getvalue()


def npy(v):
    out = io.BytesIO()
    np.save(out, np.array(v))
    return out.getvalue()


def test_tars_with_cls(tmp_path):
    tar(tmp_path / 'test' / '0.tar', {'a': dict(png=png(), cls=b'2'), 'b': dict(PNG=png(), cls=b'0\n')})
    (tmp_path / 'test' / 'nshards.txt').write_text('1')
    (tmp_path / 'classnames.txt').write_text('cat\ndog\ncow\n')
    (tmp_path / 'zeroshot_classification_templates.txt').write_text('a {c}\nthe {c}.\n')
    s = opened(tmp_path)
    assert (s.task, s.names, s.templates, labels(s)) == ('classification', ('cat', 'dog', 'cow'), ['a {}', 'the {}.'], [2, 0])
    (tmp_path / 'other.txt').write_text('cow\nhen\ncat\ndog\n')
    assert labels(asked_among(s, str(tmp_path / 'other.txt'))) == [0, 2] # by name
    with pytest.raises(UserError, match="the class 'cat' is not among the 1 classes"): asked_among(s, str(_write(tmp_path / 'few.txt', 'cow\n')))
    assert labels(opened(tmp_path / 'test' / '0.tar')) == [2, 0] # a tar alone has numbers


def _write(path, text):
    path.write_text(text)
    return path


def test_tars_with_several_labels_and_with_captions(tmp_path):
    tar(tmp_path / 'm' / 'test' / '0.tar', {'a': dict(png=png(), npy=npy([1, 0, 1])), 'b': dict(png=png(), npy=npy([0, 0, 0]))})
    (tmp_path / 'm' / 'dataset_type.txt').write_text('multilabel\n')
    (tmp_path / 'm' / 'classnames.txt').write_text('cat\ndog\ncow')
    s = opened(tmp_path / 'm')
    assert s.task == 'multilabel' and Pictures(s.source, SQUASH, 9, ('labels',), names=s.names)[0]['label'].tolist() == [[1, 0, 1], [0, 0, 0]]
    tar(tmp_path / 'r' / 'test' / '0.tar', {'a': dict(png=png(), txt=b'one\ntwo\n'), 'b': dict(png=png(), txt=b'three')})
    (tmp_path / 'r' / 'dataset_type.txt').write_text('retrieval')
    s = opened(tmp_path / 'r')
    batch = Pictures(s.source, SQUASH, 9, ('text',), words=lambda texts: torch.tensor([len(t) for t in texts]))[0]
    assert (s.task, batch['text'].tolist(), batch['owner'].tolist()) == ('retrieval', [3, 3, 5], [0, 0, 1])


def test_a_tar_that_is_cut_is_no_test_set(tmp_path):
    tar(tmp_path / 'test' / '0.tar', {'a': dict(png=png(), cls=b'2')})
    whole = (tmp_path / 'test' / '0.tar').read_bytes()
    (tmp_path / 'test' / '0.tar').write_bytes(whole[:700])
    (tmp_path / 'classnames.txt').write_text('cat')
    with pytest.raises(UserError, match='cut short or no tar'): opened(tmp_path)


# ---- captions ----

def test_lists_of_captions(tmp_path):
    for name in ('a.png', 'b.png'): picture(tmp_path / 'val2014' / name)
    karpathy = dict(images=[dict(filepath='val2014', filename='a.png', split='test', sentences=[dict(raw='x'), dict(raw='y')]), dict(filename='b.png', split='val', sentences=[dict(raw='z')])])
    coco = dict(images=[dict(id=7, file_name='a.png'), dict(id=8, file_name='none.png')], annotations=[dict(image_id=7, caption='x'), dict(image_id=7, caption='y')])
    plain = [dict(image='val2014/a.png', caption=['x', 'y'])]
    for k, d in enumerate((karpathy, coco, plain)):
        s = opened(_write(tmp_path / f'{k}.json', json.dumps(d)))
        assert (len(s), s.task, s.source.read(0)['text']) == (1, 'retrieval', ['x', 'y']), k
    assert opened(tmp_path / '0.json', split='val').source.read(0)['text'] == ['z']
    s = opened(_write(tmp_path / 'karpathy.txt', 'image,caption\na.png,x, and more\na.png,"quoted, y"\nb.png,z\n'))
    assert [s.source.read(i)['text'] for i in range(2)] == [['x, and more', 'quoted, y'], ['z']]


@pytest.mark.parametrize('data, words', [({'images': []}, 'has no picture'), ({'what': 1}, 'no list of captions'), ([{'image': 'nowhere.png', 'caption': 'x'}], 'first picture nowhere.png is not near it')])
def test_lists_that_are_none(tmp_path, data, words):
    with pytest.raises(UserError, match=words): opened(_write(tmp_path / 'x.json', json.dumps(data)))


def test_other_kinds_go_to_the_readers_of_pairs(tmp_path):
    picture(tmp_path / 'a.png')
    _write(tmp_path / 'a.txt', 'x\ny')
    assert opened(tmp_path).task == 'retrieval'
    _write(tmp_path / 't.csv', 'filepath,title,label\na.png,x,1\n')
    assert opened(tmp_path / 't.csv').task == 'classification' and opened(tmp_path / 't.csv', task='retrieval').task == 'retrieval'


# ---- classes and prompts ----

def test_names_are_matched_without_case_and_underscores():
    assert matched(['Red_Star', 'x'], ['x', 'y'], ['an x', 'red star'], '', '') == (1, 0)
    assert matched(['b', 'b', 'a'], ['a', 'b', 'b'], ['a', 'b', 'b'], '', '') == (1, 2, 0) # names that come twice


def test_lists_in_json(tmp_path):
    file = _write(tmp_path / 'c.json', json.dumps(dict(pets=['cat', 'dog'], babel=[[0, 999], ['Schleie', 'Klopapier']])))
    assert class_list(str(file), 'pets') == (['cat', 'dog'], ['cat', 'dog']) and class_list(f'{file}:pets') == (['cat', 'dog'], ['cat', 'dog'])
    assert class_list(f'{file}:babel') == (['n01440764', 'n15075141'], ['Schleie', 'Klopapier'])
    prompts = _write(tmp_path / 'p.json', json.dumps(dict(pets=['foto di {c}'], imagenet={'cat': ['a cat that purrs'], 'dog': ['a dog', 'it barks']})))
    assert prompt_list(str(prompts), 'pets') == ['foto di {}'] and prompt_list(f'{prompts}:imagenet')['dog'] == ['a dog', 'it barks']
    with pytest.raises(UserError, match='no entry|unknown|flowers'): prompt_list(f'{prompts}:flowers')
    with pytest.raises(UserError, match='write FILE.json:KEY to choose'): class_list(str(file), 'flowers')


@pytest.mark.parametrize('call', [lambda p: class_list(str(p / 'none.txt')), lambda p: prompt_list(str(p / 'none.json')), lambda p: class_list(str(p)), lambda p: prompt_list(str(_write(p / 'bad.json', '{')))])
def test_files_that_are_not_there(tmp_path, call):
    with pytest.raises(UserError, match='--(classes|templates) .*(No such file|Is a directory|no JSON)'): call(tmp_path)


# ---- batches ----

def test_workers_change_nothing_and_their_errors_are_one_line(tmp_path):
    for k in range(7): picture(tmp_path / 'ab'[k % 2] / f'{k}.png', (30 * k, 9, 9))
    s = opened(tmp_path)
    def batches(workers): return list(Pictures(s.source, SQUASH, 2, names=s.names, workers=workers).dealt(1, 2))
    for a, b in zip(batches(0), batches(2), strict=True): assert torch.equal(a['image'], b['image']) and torch.equal(a['label'], b['label'])
    (tmp_path / 'b' / '3.png').write_bytes(b'no picture')
    with pytest.raises(UserError, match=r'^[^\n]*3.png: not an image; leave the sample out[^\n]*$'): list(Pictures(s.source, SQUASH, 2, workers=2))


@pytest.mark.parametrize('label, words', [(None, "no whole number 'label'"), ('x', "no whole number 'label'"), (True, "no whole number"), (5, 'label 5, but the set has names for 2 classes')])
def test_labels_that_are_none(tmp_path, label, words):
    picture(tmp_path / 'a.png')
    class One:
        def __len__(self): return 1
        def where(self, i): return ('here',)
        def read(self, i): return dict(image=(tmp_path / 'a.png').read_bytes(), json=dict(label=label))
    with pytest.raises(UserError, match=words): Pictures(One(), SQUASH, 2, numbers=(0, 1), names=('a', 'b'))[0]


# ---- metrics ----

@pytest.mark.parametrize('levels', [4, 1000])
def test_metrics_are_scikit_learns(levels):
    skl, rng = pytest.importorskip('sklearn.metrics'), np.random.default_rng(levels)
    score, right = rng.integers(0, levels, (200, 5)) / levels, (rng.random((200, 5)) < 0.3).astype(int)
    s, r = torch.tensor(score), torch.tensor(right)
    for k in range(5):
        assert float(average_precision(s, r)[k]) == pytest.approx(skl.average_precision_score(right[:, k], score[:, k]), abs=1e-12)
        assert roc_auc(s[:, k], r[:, k]) == pytest.approx(skl.roc_auc_score(right[:, k], score[:, k]), abs=1e-12)
        precision, recall, _ = skl.precision_recall_curve(right[:, k], score[:, k])
        eleven = np.mean([max(precision[:-1][recall[:-1] >= t - 1e-12], default=0) for t in np.arange(11) / 10])
        assert float(eleven_points(s, r)[k]) == pytest.approx(eleven, abs=1e-12)


def test_metrics_without_a_right_one():
    s = torch.tensor([[0.3], [0.2]])
    assert average_precision(s, torch.zeros(2, 1)).tolist() == eleven_points(s, torch.zeros(2, 1)).tolist() == [0]
    with pytest.raises(UserError, match='both classes'): roc_auc(s[:, 0], torch.ones(2))
