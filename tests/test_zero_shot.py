"Chapter 15's guards, and an evaluation that several ranks share."
import contextlib, io, warnings
import pytest, torch, torch.nn.functional as F
from torch import nn
from clipa_nb.core import LOCAL, UserError
from clipa_nb.distributed_trainer import spawn
from clipa_nb.zero_shot import PromptHead, accuracy, build_zero_shot_classifier, class_vectors, confusion, linear, make_head, not_below, predict, tally, text_head, zero_shot
from clipa_nb.engine.asking import answers, batched, check_names, context_of, embed, evaluating, fill, labelled, product, scores, share, similarities, similarity_of, tile_side, together

NAMES, TEMPLATES = ['ab', 'cd', 'ef', 'gh', 'ij'], ['{}', 'a {}', lambda name: name[::-1]]


class Small(nn.Module):
    "Pictures of 12 numbers and texts of six letters."
    context_length = 6
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text, self.logit_scale = nn.Linear(12, 8), nn.Embedding(50, 8), nn.Parameter(torch.tensor(2.))
    def encode_image(self, x, normalize=False): return F.normalize(self.image(x.flatten(1).float()), dim=1) if normalize else self.image(x.flatten(1).float())
    def encode_text(self, x, normalize=False): return F.normalize(self.text(x).mean(1), dim=1) if normalize else self.text(x).mean(1)


def tok(texts, context_length=6, strategy=None): return torch.tensor([[ord(c) * 7 % 50 for c in (t + ' ' * context_length)[:context_length]] for t in texts])


MODEL, G = Small(), torch.Generator().manual_seed(1)
X, Y = torch.rand(130, 3, 2, 2, generator=G), torch.randint(0, 5, (130,), generator=G)
DATA, HEAD = batched(X, Y, 30), text_head(MODEL, tok, NAMES, TEMPLATES)


# ---- names and heads ----

@pytest.mark.parametrize('template', ['a photo of a star', 'a photo of a {name}.', '{} and {}', '{', 'a {{}}'])
def test_a_template_without_a_place_for_the_name(template):
    with pytest.raises(UserError, match='no place for the class name'): fill(template, 'red')


def test_a_template_with_a_place():
    assert fill('{}', 'red star') == 'red star' and fill('a {}', '{}') == 'a {}' and fill(lambda n: f'two {n}s', 'red star') == 'two red stars'


def test_a_model_that_does_not_say_how_long_its_texts_are(): assert context_of(nn.Identity()) is None and context_of(MODEL) == 6


def test_the_same_name_twice_is_counted_once_and_different_names_are_quiet():
    ids = tok(['red star', 'red ring', 'blue star'], 10).view(3, 1, 10)
    with pytest.warns(UserWarning, match="1 of 3 class names have the same 10 tokens as another in every prompt, first 'red star' and 'red star': use different names"): check_names(ids[[0, 0, 2]], ['red star', 'red star', 'blue star'])
    with pytest.warns(UserWarning, match='2 of 3 class names have the same 1 tokens'): check_names(torch.zeros(3, 1, 1, dtype=torch.int64), ['red star', 'red ring', 'blue star'])
    with warnings.catch_warnings():
        warnings.simplefilter('error'); check_names(ids, ['red star', 'red ring', 'blue star'])


def test_class_vectors_are_mean_directions_however_many_are_encoded_together():
    w = class_vectors(MODEL, tok, NAMES, TEMPLATES)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(5))
    for k, name in enumerate(NAMES): torch.testing.assert_close(w[k], F.normalize(MODEL.encode_text(tok([fill(t, name) for t in TEMPLATES]), normalize=True).mean(0), dim=0).detach())
    for n in (1, 2, None): torch.testing.assert_close(class_vectors(MODEL, tok, NAMES, TEMPLATES, classes_per_batch=n), w)
    assert torch.equal(class_vectors(MODEL, tok, NAMES, 'a {}'), class_vectors(MODEL, tok, NAMES, ['a {}']))
    assert torch.equal(build_zero_shot_classifier(MODEL, tok, NAMES, TEMPLATES, num_classes_per_batch=50), class_vectors(MODEL, tok, NAMES, TEMPLATES, classes_per_batch=50).T)
    assert HEAD.bias is None and torch.equal(HEAD.weight.detach(), w)


@pytest.mark.parametrize('names, templates, options, words', [([], ['{}'], {}, '0 class names and 1 templates'), (NAMES, [], {}, '5 class names and 0 templates'), (NAMES, '{}', dict(classes_per_batch=0), '0 classes per batch')])
def test_a_head_needs_names_and_templates(names, templates, options, words):
    with pytest.raises(UserError, match=words): class_vectors(MODEL, tok, names, templates, **options)


def test_progress_is_shown_where_it_is_asked_for():
    with contextlib.redirect_stderr(io.StringIO()) as said: build_zero_shot_classifier(MODEL, tok, NAMES, 'a {}', num_classes_per_batch=2, use_tqdm=True)
    assert 'class vectors' in said.getvalue()
    with contextlib.redirect_stderr(io.StringIO()) as said: class_vectors(MODEL, tok, NAMES, 'a {}')
    assert said.getvalue() == ''


def test_a_linear_holds_what_it_is_given():
    assert linear(torch.eye(2), torch.tensor([1., 2.]))(torch.ones(2)).tolist() == [2., 3.] and linear(torch.eye(2)).bias is None


# ---- what is evaluated ----

@pytest.mark.parametrize('call, words', [
    (lambda: batched(X, Y[1:], 100), '130 images and 129 labels: give one label for each image'),
    (lambda: labelled(dict(image=X), 5, 'cpu'), 'has no label'), (lambda: labelled(DATA[0], 3, 'cpu'), 'but the head has 3 classes'),
    (lambda: tally(MODEL, [], HEAD, lambda s, l: l, (1,)), 'there is no image to evaluate'), (lambda: zero_shot(MODEL, DATA, HEAD, ks=(200,)), 'top-200 of 5 classes'),
    (lambda: zero_shot(MODEL, batched(X, Y + 100, 50), HEAD), 'the head has 5 classes'), (lambda: accuracy(torch.zeros(3, 3, dtype=torch.int64), [0]), 'no image of these classes')])
def test_what_cannot_be_evaluated(call, words):
    with pytest.raises(UserError, match=words): call()


def test_every_module_is_left_in_its_mode_also_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout()); model[0].eval()
    with pytest.raises(RuntimeError):
        with evaluating(model):
            assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
            raise RuntimeError
    assert (model.training, model[0].training, model[1].training, torch.is_grad_enabled()) == (True, False, True, True)


def test_what_fails_alone_fails():
    with pytest.raises(UserError, match='labels from 3 to 9'):
        with together(LOCAL): raise UserError('labels from 3 to 9')


def test_ties_and_nan_count_against_the_model():
    right = torch.tensor([0, 2])
    assert not_below(torch.tensor([[.9, .1, .2], [.9, .1, .2]]), right).tolist() == [0, 1]
    for s in (torch.full((2, 3), 0.5), torch.full((2, 3), torch.nan)): assert not_below(s, right).tolist() == [2, 2]
    assert zero_shot(MODEL, DATA, linear(torch.zeros(5, 8)), (1,))['top1'] == 0


def test_tables_agree_with_the_scores():
    c, guess = confusion(MODEL, DATA, HEAD), scores(MODEL, X, HEAD).argmax(1)
    assert int(c.sum()) == 130 and torch.equal(c.sum(1), Y.bincount(minlength=5)) and torch.equal(c.sum(0), guess.bincount(minlength=5))
    assert accuracy(c) == pytest.approx(zero_shot(MODEL, DATA, HEAD, (1,))['top1']) and accuracy(c, groups=[0] * 5) == 1
    assert torch.equal(predict(MODEL, X, HEAD, size=7), guess) and predict(MODEL, X[:0], HEAD).numel() == 0
    assert list(share(iter('abc'))) == ['a', 'b', 'c'] and int(tally(MODEL, DATA, HEAD, lambda s, l: torch.bincount(l, minlength=5), (5,)).sum()) == 130


def evaluation(comm): return zero_shot(MODEL, DATA[:3], HEAD, comm=comm), confusion(MODEL, DATA[:3], HEAD, comm).tolist()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_share_an_evaluation_and_get_the_same_floats(ranks): assert spawn(evaluation, ranks) == [evaluation(LOCAL)] * ranks


def bad_label(comm):
    try: return zero_shot(MODEL, [DATA[0], dict(DATA[1], label=DATA[1]['label'] + 999)], HEAD, comm=comm)
    except UserError as e: return str(e)


def test_a_bad_label_on_one_rank_ends_the_evaluation_on_all():
    first, second = spawn(bad_label, 2)
    assert first == 'the evaluation failed on another rank: its message says why' and 'but the head has 5 classes' in second


# ---- models of another make ----

class Tokens(nn.Module):
    "Each picture is four vectors and each text six with a mask; a pair is as similar as its best tokens (as FILIP does it). No temperature."
    context_length = 6
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(3, 8), nn.Embedding(50, 8)
    def embed(self, batch):
        out = {}
        if 'image' in batch: out['image'] = F.normalize(self.image(batch['image'].flatten(2).transpose(1, 2).float()), dim=-1)
        if 'text' in batch: out['text'] = dict(tokens=F.normalize(self.text(batch['text']), dim=-1), mask=batch['text'] != ord(' ') * 7 % 50)
        return out
    def similarity(self, image, text):
        s = torch.einsum('nie,mte->nmit', image, text['tokens'])
        return s.masked_fill(~text['mask'][None, :, None], -torch.inf).amax(3).mean(2)


def test_a_similarity_of_its_own_makes_the_head():
    model = Tokens()
    head, image = make_head(model, NAMES, TEMPLATES, tok), embed(model, dict(image=X[:7]))['image']
    assert isinstance(head, PromptHead) and head.out_features == 5 and similarity_of(model) == model.similarity
    for k, name in enumerate(NAMES):
        prompts = embed(model, dict(text=tok([fill(t, name) for t in TEMPLATES])))['text']
        torch.testing.assert_close(scores(model, X[:7], head)[:, k], model.similarity(image, prompts).mean(1).detach())
    for n in (1, 2, None): torch.testing.assert_close(make_head(model, NAMES, TEMPLATES, tok, classes_per_batch=n)(image), head(image))
    got = zero_shot(model, DATA, head, (1, 2))
    assert got['n'] == 130 and got['top1'] == pytest.approx(float((scores(model, X, head).argmax(1) == Y).float().mean()))
    with pytest.raises(UserError, match='Tokens has no single vector for a text: use make_head'): text_head(model, tok, NAMES, TEMPLATES)


def test_tiles_of_a_similarity_are_the_whole(monkeypatch):
    model = Tokens()
    z = embed(model, dict(image=X[:70], text=torch.randint(0, 50, (45, 6), generator=G)))
    monkeypatch.setattr("clipa_nb.engine.asking.tile_side", lambda image, text: 32)
    torch.testing.assert_close(similarities(model.similarity, z['image'], z['text']), model.similarity(z['image'], z['text']))


def test_tiles_become_smaller_where_samples_have_more_vectors():
    vector, patches, words = torch.ones(2, 8), torch.ones(2, 64, 8), dict(tokens=torch.ones(2, 17, 8), mask=torch.ones(2, 17, 3, dtype=torch.bool))
    assert (tile_side(vector, vector), tile_side(patches, words), tile_side(torch.ones(1, 5000, 1), words)) == (1024, 224, 32)


class Named(Small):
    "Its head scores a picture by the lengths of the names."
    def head(self, names, templates, tokenizer): return linear(torch.tensor([[float(len(n))] * 8 for n in names]))


def test_a_head_of_its_own_is_taken():
    assert make_head(Named(), ['a', 'abc'], TEMPLATES, tok).weight.tolist() == [[1.] * 8, [3.] * 8]


def test_a_submodule_that_is_called_head_is_no_head():
    class Headed(Small):
        def __init__(self): super().__init__(); self.head, self.similarity = nn.Linear(8, 2), nn.Bilinear(8, 8, 1)
    assert torch.equal(make_head(Headed(), NAMES, TEMPLATES, tok).weight, HEAD.weight) and similarity_of(Headed()) is product


class Pixels(nn.Module):
    "Texts are pictures, and one tower reads both; no temperature."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0); self.tower = nn.Linear(12, 8)
    def encode_image(self, x, normalize=False): return F.normalize(self.tower(x.flatten(1).float()), dim=1)
    encode_text = encode_image


def draw(texts, context_length=None, strategy=None): return torch.tensor([[ord(c) % 256 for c in (t + ' ' * 12)[:12]] for t in texts], dtype=torch.uint8).view(-1, 3, 2, 2)


def test_texts_may_be_pictures():
    model = Pixels()
    head = make_head(model, NAMES, TEMPLATES, draw)
    assert head.weight.shape == (5, 8) and zero_shot(model, DATA, head)['n'] == 130
    with pytest.warns(UserWarning, match="the same 12 pixel values as another in every prompt, first 'ab' and 'ab'"): make_head(model, ['ab', 'ab'], ['{}'], draw)


class Blind(nn.Module):
    def encode_text(self, x, normalize=False): return x


class Reading(Blind):
    reads_text = False
    def embed(self, batch): return {}
    def answers(self): return dict(probes='its pictures have no features')


def test_what_a_model_can_answer():
    mute, none = 'it does not encode texts', 'it does not encode pictures'
    assert answers(MODEL) == answers(Tokens()) == answers(Pixels()) == {'zero-shot': '', 'retrieval': '', 'probes': ''}
    assert answers(Blind()) == {'zero-shot': none, 'retrieval': none, 'probes': none}
    assert answers(Reading()) == {'zero-shot': mute, 'retrieval': mute, 'probes': 'its pictures have no features'}
    with pytest.raises(UserError, match='Reading encodes no texts: it cannot be asked by names'): make_head(Reading(), NAMES, TEMPLATES, tok)


def test_a_clip_model_gets_the_same_numbers_bit_for_bit():
    "As they were when evaluations called `encode_image`, `encode_text` and `logit_scale` themselves."
    from clipa_nb.clip import ModelConfig, build_clip
    from clipa_nb.cost import Tower
    torch.manual_seed(3)
    model = build_clip(ModelConfig(image=Tower(64, 1, 4, 128), text=Tower(64, 1, 4, 128), embed_dim=32, image_size=16, patch=8, context_length=6, vocab_size=50)).eval()
    x, ids = torch.randint(0, 256, (9, 3, 16, 16), dtype=torch.uint8), tok([fill(t, n) for n in NAMES for t in TEMPLATES])
    with torch.no_grad():
        w = torch.cat([F.normalize(model.encode_text(part, normalize=True).float().view(-1, 3, 32).mean(1), dim=1) for part in ids.split(6)])
        said = linear(w)(model.encode_image(x, normalize=True).to(w.dtype))
    head = make_head(model, NAMES, TEMPLATES, tok, classes_per_batch=2)
    assert type(head) is nn.Linear and torch.equal(head.weight, w) and torch.equal(scores(model, x, head), said) and similarity_of(model) is product


# ---- open_clip's numbers ----

@pytest.mark.parametrize('how', [('squash', 'bilinear'), ('shortest', 'bicubic')])
def test_zero_shot_is_open_clips_to_the_last_digit(how, tmp_path):
    "The same model, the same files of every kind: class weights, top-1, top-5."
    open_clip = pytest.importorskip('open_clip')
    import numpy as np
    from PIL import Image
    from clipa_nb.data import open_pairs
    from clipa_nb.engine.evalsets import Pictures, open_set
    from clipa_nb.pretrained import create_model_and_transforms, from_open_clip_config, get_tokenizer, save_pretrained
    from clipa_nb.tokenizer import train_wordpiece
    names, templates = [f'{c} {s}' for c in ('red', 'blue', 'green') for s in ('star', 'ring', 'cross')], ['a photo of a {}.', 'the {}', 'art of {}']
    words = train_wordpiece([t.format(n) for n in names for t in templates], vocab_size=120, context_length=12)
    cfg = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8),
               text_cfg=dict(context_length=12, vocab_size=words.vocab_size, width=32, heads=2, layers=1, hf_tokenizer_name='bert-base-uncased', tokenizer_kwargs=dict(strip_sep_token=True), no_causal_mask=True, pool_type='last'))
    torch.manual_seed(3)
    model = from_open_clip_config(dict(model_cfg=cfg, preprocess_cfg=dict(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.2), interpolation=how[1], resize_mode=how[0]))).build()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.3 * torch.randn_like(p))
    out = save_pretrained(model, tmp_path / 'model', tokenizer=words)
    rng = np.random.default_rng(0)
    for i in range(54):
        image = Image.fromarray(rng.integers(0, 256, (int(rng.integers(20, 70)), int(rng.integers(20, 70)), 4), dtype=np.uint8), 'RGBA')
        mode, suffix = (('RGB', 'jpg'), ('P', 'png'), ('RGBA', 'png'), ('CMYK', 'jpg'), ('L', 'png'), ('I;16', 'png'))[i % 6]
        if mode == 'I;16': image = Image.fromarray(np.asarray(image.convert('L')).astype('uint16') * 200)
        elif mode != 'RGBA': image = image.convert('RGB').convert(mode)
        path = tmp_path / 'sets' / names[i // 6] / f'{i}.{suffix}'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    theirs, _, prepare = open_clip.create_model_and_transforms(f'local-dir:{out}')
    order = sorted(names)
    weights = open_clip.build_zero_shot_classifier(theirs.eval(), open_clip.get_tokenizer(f'local-dir:{out}'), order, templates)
    files = sorted((tmp_path / 'sets').glob('*/*'))
    with torch.no_grad(): logits = 100 * theirs.encode_image(torch.stack([prepare(Image.open(f).convert('RGB')) for f in files]), normalize=True) @ weights
    right = torch.tensor([order.index(f.parent.name) for f in files])
    top = logits.topk(5).indices == right[:, None]
    net, _, val = create_model_and_transforms(f'local-dir:{out}')
    head, s = text_head(net.eval(), get_tokenizer(f'local-dir:{out}'), order, templates), open_set(str(tmp_path / 'sets'), open_pairs)
    got = zero_shot(net, Pictures(s.source, val.transform, 20, numbers=s.numbers, names=s.names, workers=2), head)
    assert s.names == tuple(order) and float((head.weight.detach().T - weights).abs().max()) < 1e-6
    assert (got['top1'], got['top5']) == (int(top[:, 0].sum()) / 54, int(top.sum()) / 54)
    assert got['mean_per_class'] == pytest.approx(float(torch.stack([top[right == k, 0].double().mean() for k in range(9)]).mean()), abs=1e-12)
    assert logits.argmax(1).unique().numel() > 2


def several(comm):
    "Scores of an uneven set, shared."
    from clipa_nb.engine.asking import scored
    data = [dict(image=X[a:b], label=torch.stack([Y[a:b] == k for k in range(5)], 1).long()) for a, b in ((0, 30), (30, 31), (31, 90))]
    score, label = scored(MODEL, data, HEAD, comm)
    return score.tolist(), label.tolist()


@pytest.mark.parametrize('ranks', [2, 4])
def test_ranks_bring_all_scores_together(ranks):
    alone = several(LOCAL)
    assert spawn(several, ranks) == [alone] * ranks and alone[1] == [[int(y == k) for k in range(5)] for y in Y[:90].tolist()]
    torch.testing.assert_close(torch.tensor(alone[0]), scores(MODEL, X[:90], HEAD))


def test_a_class_may_have_prompts_of_its_own():
    own = dict(ab=['x', 'y z'], cd=['q'])
    w = class_vectors(MODEL, tok, ['cd', 'ab'], own)
    torch.testing.assert_close(w[1], F.normalize(MODEL.encode_text(tok(['x', 'y z']), normalize=True).mean(0), dim=0).detach())
    torch.testing.assert_close(make_head(Tokens(), ['cd', 'ab'], own, tok)(embed(Tokens(), dict(image=X[:4]))['image'])[:, 0],
                               Tokens().similarity(embed(Tokens(), dict(image=X[:4]))['image'], embed(Tokens(), dict(text=tok(['q'])))['text'])[:, 0])
    with pytest.raises(UserError, match="1 of 2 classes have no prompts, first 'zz'"): class_vectors(MODEL, tok, ['ab', 'zz'], own)


def test_probabilities_use_the_models_own_scale():
    from clipa_nb.zero_shot import classify
    p, s = classify(MODEL, X[:5], NAMES, tok), scores(MODEL, X[:5], text_head(MODEL, tok, NAMES, '{}'))
    torch.testing.assert_close(p, (float(MODEL.logit_scale.detach().exp()) * s).softmax(1))
    torch.testing.assert_close(classify(Tokens(), X[:5], NAMES, tok), (100 * scores(Tokens(), X[:5], make_head(Tokens(), NAMES, '{}', tok))).softmax(1))
