"Names, layouts, words and files of other people's weights, on plain dictionaries."
import copy, json, os, stat, warnings
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from safetensors.torch import save_file
from clipa_nb import pretrained as P
from clipa_nb.clip import IMAGENET, MODELS, OPENAI, First, ModelConfig, build_clip, model_config
from clipa_nb.core import UserError
from clipa_nb.cost import Tower
from clipa_nb.engine.pictures import FILTERS, Transform
from clipa_nb.engine import formats as F
from clipa_nb.patch_embedding import sincos
from clipa_nb.tokenizer import ClipBPE, WordPiece, train_wordpiece

try: import open_clip
except ImportError: open_clip = None
needs_open_clip = pytest.mark.skipif(open_clip is None, reason='open_clip is not installed: pip install open_clip_torch')
pytestmark = pytest.mark.filterwarnings('ignore')

SMALL = model_config('ViT-L-14-CLIPA').replace(image=Tower(64, 2, 4, 256), text=Tower(48, 2, 4, 192), embed_dim=32, image_size=56, context_length=8, vocab_size=300)
C = SMALL.to_dict()

@torch.no_grad()
def small(seed=0, **changes):
    "Biases and norms too: zeros and ones would hide mistakes."
    torch.manual_seed(seed)
    model = build_clip(SMALL.replace(**changes)).eval()
    for p in model.parameters(): p.add_(0.02 * torch.randn_like(p))
    return model

def refused(match, f, *args, **kw):
    with pytest.raises(UserError, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value), str(e.value)

def shapes(cfg): return {k: v.shape for k, v in P.on_meta(cfg).state_dict().items()}
def halves(c): return F.open_clip_config(c) | dict(clipa_nb=c) # as earlier versions wrote them, in one file

def older(folder):
    "A directory as earlier versions wrote it: open_clip's pair alone, with our configuration inside theirs."
    c = {k: v for k, v in F.own_config(folder).items() if k != 'tokenizer'}
    (folder / F.CONFIG).write_text(json.dumps(F.config_in(folder) | dict(clipa_nb=ModelConfig.from_dict(c).to_dict())))
    for name in (F.OURS, F.OUR_WEIGHTS): (folder / name).unlink()
    return folder

def theirs(model): return F.to_open_clip(P.stored_state(model))

def as_jax(model, heads=4):
    "The way back, for these tests: the proof against flax's own layers is in test_pretrained."
    state = {}
    for k, v in model.state_dict().items():
        names = F.jax_names(k)
        for n, part in zip(names, v.chunk(len(names) or 1) if v.ndim else [v]):
            state[n] = part.permute(2, 3, 1, 0) if part.ndim == 4 else part.T if n.endswith('kernel') else part
            if 'query/kernel' in n: state[n] = part.T.unflatten(1, (heads, -1))
    return state

# ---- names and layouts

@pytest.mark.parametrize('name', MODELS)
def test_every_name_goes_over_and_comes_back(name):
    keys = list(shapes(MODELS[name].replace(image__depth=2, text__depth=2)))
    assert [F.rename(F.rename(k), 'ours') for k in keys] == keys
    assert len({F.rename(k) for k in keys}) == len(keys)
    assert F.rename('nobody.knows') == 'nobody.knows'

def test_names_in_jax():
    assert F.jax_names('text.norm.weight') == ['txt/encoder_norm/scale'] and F.jax_names('visual.positions.table') == []
    keys = list(shapes(model_config('ViT-L-14-CLIPA')))
    assert len({n for k in keys for n in F.jax_names(k)}) == len(keys) + 2 * 2 * (24 + 12) # weight and bias of 24 + 12 blocks have two names more

@pytest.mark.parametrize('name, tensors', [('ViT-L-14-CLIPA', 444), ('ViT-H-14-CLIPA', 684), ('ViT-bigG-14-CLIPA', 972)])
def test_the_published_files_hold_that_many_tensors(name, tensors): assert len(shapes(model_config(name))) + 1 == tensors

def test_models_on_meta_have_the_same_shapes():
    cfg = model_config('ViT-B-32').replace(image=Tower(64, 1, 4, 256), text=Tower(64, 1, 4, 256))
    assert {p.device.type for p in P.on_meta(cfg).parameters()} == {'meta'}
    assert shapes(cfg) == {k: v.shape for k, v in build_clip(cfg).state_dict().items()}

def test_over_and_back_under_old_prefixes():
    model = small(); there = theirs(model)
    assert there['visual.positional_embedding'].shape == (17, 64) and torch.equal(there['visual.proj'], model.visual.head.weight.T)
    old = {f'module.{"" if k.startswith(("visual", "logit")) else "text."}{k}': v for k, v in there.items()} | {'module.attn_mask': torch.zeros(8, 8), 'context_length': torch.tensor(8)}
    back = F.from_open_clip(old)
    assert set(back) - set(model.state_dict()) == {F.TABLE}
    for k, v in model.state_dict().items(): assert torch.equal(back[k], v)
    assert torch.equal(F.from_open_clip(model.state_dict())['visual.head.weight'], model.visual.head.weight)

def test_jax_over_and_back_and_its_heads():
    model = small(); jax = as_jax(model)
    back = F.from_jax(jax, model.state_dict(), dict(img=4, txt=4))
    for k, v in model.state_dict().items(): assert torch.equal(back[k], v)
    refused('4 heads of 16, the model 2', F.from_jax, jax, model.state_dict(), dict(img=2, txt=4))
    assert F.arranged('img/embedding/kernel', torch.zeros(14, 14, 3, 64)).shape == (64, 3, 14, 14)

@pytest.mark.parametrize('form', ['ours', 'open_clip', 'jax'])
def test_three_forms_give_the_same_function(form):
    model, x, ids = small(), torch.randn(2, 3, 56, 56), torch.randint(1, 300, (2, 8))
    state = dict(ours=model.state_dict(), open_clip=theirs(model), jax=as_jax(model))[form]
    cfg, fitted = P.place_positions(SMALL, P.our_weights(state, SMALL))
    again = P.load_weights(P.on_meta(cfg), fitted, assign=True).eval()
    with torch.no_grad(): assert torch.equal(again.encode_image(x), model.encode_image(x)) and torch.equal(again.encode_text(ids), model.encode_text(ids))

def test_the_table_of_names_is_shown():
    rows = F.three_ways({k: v.shape for k, v in P.stored_state(small()).items()})
    assert len(rows) == 6 + 12 + 5 + 12 + 1 # the image tower, one of its blocks, the text tower, one of its blocks, the temperature
    assert {row[1] for row in rows if '.i.' not in row[1]} <= set(theirs(small()))
    table = F.NameTable([(1, 2, 3, 4)])
    assert len(repr(table).splitlines()) == 2 and '<td style="text-align:left"><code>4</code></td>' in table._repr_html_()

# ---- positions

TABLE = sincos((4, 4), 64, 'moco', 1).float()
def fixed(side, kind): return sincos((side, side), 64, kind, 1)

def test_the_form_of_a_table():
    assert [F.form_of(t, 1, fixed) for t in (TABLE, sincos((5, 5), 64, 'mae', 1).half())] == ['moco', 'mae']
    refused('learned or fine-tuned', F.form_of, TABLE + 0.1, 1, fixed)
    refused('only square', F.form_of, TABLE[:16], 1, fixed)
    refused('hold no position table', F.form_of, None, 1, fixed)

def test_positions_are_chosen_before_a_model_is_built():
    def choose(kind, state, choice=None, size=4): return F.choose_positions(kind, state, (4, size), fixed, 1, choice)
    held = {F.TABLE: TABLE}
    for kind, state, choice, size, wanted in (('moco', held, None, 4, 'moco'), ('moco', held, None, 8, 'learned'), ('moco', {}, None, 8, 'moco'), ('moco', held, 'recompute', 8, 'moco'),
                                              ('learned', held, None, 8, 'learned'), ('learned', held, 'recompute', 4, 'moco'), ('moco', {}, 'interpolate', 4, 'learned')):
        got, kept = choose(kind, state, choice, size)
        assert got == wanted and (F.TABLE in kept) == (got == 'learned')
    assert torch.equal(choose('moco', {}, 'interpolate')[1][F.TABLE], TABLE)
    refused("not the 'mae' sin-cos one", choose, 'mae', held); refused('unknown choice', choose, 'moco', {}, 'stretch')

# ---- words: writing

def test_ratios_are_rounded_up_where_they_must():
    assert F._ratio(dict(width=1664, mlp=8192)) == 4.9231
    for width, mlp in ((96, 100), (1408, 6144), (1664, 8192)): assert int(width * F._ratio(dict(width=width, mlp=mlp))) == mlp

def test_numerics_are_written_where_open_clip_differs():
    assert F._numerics('gelu', 1e-5, False) == {} and F._numerics('gelu', 1e-6, False) == dict(norm_kwargs=dict(eps=1e-6))
    assert [F._numerics('quick_gelu', 1e-5, quick) for quick in (True, False)] == [{}, {'act_kwargs': {'approximate': 'quick_gelu'}}]

def test_words_of_the_published_models():
    bigg = F.open_clip_config(model_config('ViT-bigG-14-CLIPA').to_dict())
    vision = bigg['model_cfg']['vision_cfg']
    assert (vision['head_width'], vision['mlp_ratio'], vision['pool_type'], vision['final_ln_after_pool']) == (104, 4.9231, 'avg', True)
    assert bigg['preprocess_cfg']['resize_mode'] == 'squash' and (bigg['model_cfg']['text_cfg']['pool_type'], bigg['model_cfg']['text_cfg']['no_causal_mask']) == ('last', True)
    assert F.open_clip_config(model_config('ViT-B-16').to_dict())['model_cfg']['vision_cfg']['pool_type'] == 'tok'
    assert F.unnamed(model_config('ViT-H-14-CLIPA').to_dict()) == ['tanh GELU', 'LayerNorm eps 1e-06'] and F.unnamed(model_config('ViT-B-32-quickgelu').to_dict()) == []
    assert all(F.foreign(c.to_dict()) == [] for n, c in MODELS.items() if not n.endswith('GAP'))
    assert len(F.foreign(SMALL.replace(act='quick_gelu', text_act='gelu').to_dict())) == 1

@pytest.mark.parametrize('words', [None, {}, dict(hf_tokenizer_name='facebook/xlm-v-base')], ids=str)
def test_words_about_a_tokenizer_are_kept(words):
    for name, usual in (('ViT-H-14-CLIPA', F.BERT), ('ViT-B-16', {})):
        text = F.open_clip_config(model_config(name).to_dict(), words)['model_cfg']['text_cfg']
        assert F.tokenizer_words(text) == (usual if words is None else words)

@pytest.mark.parametrize('name', MODELS)
def test_every_architecture_comes_back(name):
    cfg, d = MODELS[name], F.open_clip_config(MODELS[name].to_dict())
    fixed = 'mae' if cfg.positions == 'mae' else 'learned'
    same = cfg.replace(positions=fixed, init='open_clip', unit='clamp', unit_eps=1e-12)
    assert set(ModelConfig.from_dict(F.from_words(d['model_cfg'], d['preprocess_cfg'])).diff(same)) <= {'init_scale'}
    assert P.from_open_clip_config(json.loads(json.dumps(halves(cfg.to_dict())))) == cfg

@pytest.mark.parametrize('odd', [dict(cls=False), dict(text_mask='pad'), dict(pool='avg_all'), dict(text_act='quick_gelu'), dict(act='quick_gelu', text_act='gelu'), dict(text_act='gelu', text_ln_eps=1e-5)], ids=str)
def test_what_open_clip_cannot_say_comes_back_too(odd):
    cfg = SMALL.replace(**odd)
    assert P.from_open_clip_config(json.loads(json.dumps(halves(cfg.to_dict())))) == cfg

# ---- words: reading

@pytest.mark.parametrize('odd, match', [
    ({'qk_norm': True}, 'qk_norm=True'), ({'pool_typ': 'avg'}, 'did you mean pool_type'), ({'timm_model_name': 'vit_base'}, 'parts of timm'), ({'layers': [3, 4, 6, 3]}, 'expected a number .a ResNet'),
    ({'image_size': [224, 336]}, 'expected a number'), ({'mlp_ratio': None}, 'expected a number'), (F.modern(dict(input_patchnorm=True)), 'input_patchnorm'), (3, 'vision_cfg is int'), ({'hf_tokenizer_nam': 'x'}, 'unknown setting')], ids=str)
def test_settings_that_are_not_understood(odd, match): refused(match, F.settings, 'vision_cfg', odd, F.VISION)

def test_settings_take_their_defaults(): assert F.settings('vision_cfg', {'width': 64, 'qk_norm': False}, F.VISION)['patch_size'] == 16

def test_old_words_are_renewed():
    v2 = F.modern(dict(width=1024, gelu_approximate='tanh', ln_pre=False, pool_style='big_vision_gap', global_average_pool=True))
    assert F.modern(dict(width=1024, global_average_pool=True))['pool_type'] == 'avg_all'
    assert (v2['pool_type'], v2['no_ln_pre'], v2['act_kwargs']) == ('avg', True, {'approximate': 'tanh'})
    assert F.modern(dict(pool_type='tok', width=8)) == dict(pool_type='tok', width=8)
    text = F.modern(dict(bert_tokenizer=True, vocab_path='…', pool_style='big_vision_last', attention_mask=False))
    assert text == dict(F.BERT, pool_type='last', no_causal_mask=True)

def test_gelu_and_eps():
    assert F._numerics_of('vision_cfg', F.VISION, True) == ('quick_gelu', 1e-5)
    assert F._numerics_of('text_cfg', F.TEXT | F._numerics('gelu', 1e-5, True), True) == ('gelu', 1e-5)
    refused('only eps', F._numerics_of, 'vision_cfg', F.VISION | dict(norm_kwargs=dict(elementwise_affine=False)), False)
    refused("only approximate='tanh'", F._numerics_of, 'vision_cfg', F.VISION | dict(act_kwargs=dict(inplace=True)), True)

def words(**vision): return dict(embed_dim=32, vision_cfg=dict(width=64, layers=2, image_size=64) | vision, text_cfg=dict(width=64, heads=2, layers=2))

def test_positions_and_tokenizer_arguments_are_named():
    refused("'rope'", F.from_words, words(pos_embed_type='rope'))
    F.check_tokenizer_words(F.TEXT | F.BERT)
    for kwargs, match in (({'strip_sep': True}, 'did you mean strip_sep_token'), ({'reduction_mask': 'syntax'}, 'unknown argument'), ({'clean': 'canonical'}, 'did you mean canonicalize')):
        refused(match, F.check_tokenizer_words, {'tokenizer_kwargs': kwargs})

def test_what_is_forced_is_a_change_of_the_configuration():
    assert F.forced() == {} and F.forced(112, 16, 0.5, True, 'clipa') == dict(F.PREPROCESS['clipa'], image_size=112, context_length=16, image_ratio=0.5, image_strategy='random', act='quick_gelu', text_act=None)
    refused('no mean and std', F.forced, how={'mean': 0.5}); refused('expected one integer', F.forced, (56, 112))

def test_pixels_are_known_or_nothing():
    assert F.pixels('clipa')['resize_mode'] == 'squash' and F.pixels({'interpolation': 'bicubic'}) == F.pixels(None) == {}
    for odd, match in (({'resize_mode': 'longest'}, "'longest'"), ({'men': [0, 0, 0]}, 'did you mean mean'), ({'mean': 'x', 'std': 1}, 'three numbers'), ([0.5], 'list'), ('imagenet21k', 'unknown preprocessing')): refused(match, F.pixels, odd)

def test_formats_and_the_book_agree():
    "The engine writes down what the book defines, so that it need not import it."
    assert set(F.INTERPOLATIONS) == set(FILTERS)
    for how, numbers in (('openai', OPENAI), ('clipa', IMAGENET)): assert {k: F.PREPROCESS[how][k] for k in ('mean', 'std')} == numbers
    assert set(ModelConfig().to_dict()) >= set(F.from_words(words(), 'openai'))

def test_two_halves_and_their_parts():
    assert P.validate(SMALL) == SMALL
    for odd, match in ((dict(act='gelu_tahn'), 'did you mean gelu_tanh'), (dict(text_pool='lst'), 'did you mean last')): refused(match, P.validate, SMALL.replace(**odd))
    edited = json.loads(json.dumps(halves(C))); edited['model_cfg']['vision_cfg']['image_size'] = 112
    refused('image_size 112 and 56', P.from_open_clip_config, edited)
    edited.pop('clipa_nb'); assert P.from_open_clip_config(edited).image_size == 112
    refused('did you mean model_cfg', P.from_open_clip_config, {'modelcfg': {}})

@pytest.mark.parametrize('part, k, v', [('vision_cfg', 'head_width', 0), ('vision_cfg', 'layers', 1.5), ('text_cfg', 'act_kwargs', 'tanh'), ('text_cfg', 'norm_kwargs', [1])])
def test_wrong_values_are_named(part, k, v):
    wrong = copy.deepcopy(F.open_clip_config(C)); wrong['model_cfg'][part][k] = v
    refused(rf'{part}\.{k}={str(v)!r}' if isinstance(v, str) else rf'{part}\.{k}=', P.understood, wrong)

# ---- D9: what open_clip loads, we load

@pytest.mark.parametrize('more', [dict(timm_model_name=None), dict(timm_model_name=None, timm_model_pretrained=False, timm_pool='avg', timm_proj='linear'), dict(timm_model_name='')], ids=str)
def test_no_timm_tower_is_no_timm_tower(more):
    assert F.from_words(words(**more)) == F.from_words(words())
    d = words(); d['text_cfg'] |= dict(hf_model_name=None, hf_proj_type='mlp'); d['multimodal_cfg'] = None
    assert F.from_words(d) == F.from_words(words())

@needs_open_clip
def test_a_head_width_that_does_not_divide_the_width(tmp_path):
    "open_clip builds width // head_width heads; 64 and 60 make one head of 64."
    d = words(head_width=60)
    assert F.from_words(d)['image']['heads'] == 1
    theirs_ = open_clip.CLIP(**copy.deepcopy(d)).eval()
    save_file({k: v.contiguous() for k, v in theirs_.state_dict().items()}, tmp_path / F.FILES[0])
    (tmp_path / F.CONFIG).write_text(json.dumps(dict(model_cfg=d, preprocess_cfg=F.PREPROCESS['openai'] )))
    x = torch.randn(2, 3, 64, 64)
    ours = P.create_model(f'local-dir:{tmp_path}').eval()
    with torch.no_grad(): assert (ours.encode_image(x, normalize=True) - theirs_.encode_image(x, normalize=True)).abs().max() < 1e-5
    again = P.create_model(f'local-dir:{P.save_pretrained(ours, tmp_path / "again")}')
    assert again.cfg.image.heads == 1
    refused('not divisible by head_width 20', F.from_words, words(head_width=20)) # three heads: open_clip refuses it, too
    with pytest.raises(AssertionError): open_clip.CLIP(**words(head_width=20))

@pytest.fixture
def saved(tmp_path): return older(P.save_pretrained(small(), tmp_path / 'model'))

@pytest.mark.parametrize('name', ['epoch_6.bin', 'clip.pth', 'weights.safetensors'])
def test_weights_under_other_names_are_found(name, saved):
    state = F.read_state(saved / F.FILES[0]); (saved / F.FILES[0]).unlink()
    save_file(state, saved / name) if name.endswith('.safetensors') else torch.save(state, saved / name)
    got = P.create_model(f'local-dir:{saved}').state_dict()
    assert all(torch.equal(got[k], v) for k, v in small().state_dict().items())
    if open_clip: open_clip.create_model(f'local-dir:{saved}')

def test_which_file_is_picked():
    for names, wanted in ((['a.pth', 'b.bin'], 'b.bin'), (['a.bin', 'z.safetensors'], 'z.safetensors'), (['a.safetensors', 'pytorch_model.bin'], 'pytorch_model.bin'), (['model.safetensors', F.FILES[0]], F.FILES[0]),
                          (['model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'a.bin'], 'model.safetensors.index.json'), (['sub/a.safetensors', 'epoch.pt'], None)): assert F.pick_weights(names) == wanted
    assert F._wanted(['x.bin', F.CONFIG])[-1] == 'x.bin'
    assert F._wanted(['model.safetensors.index.json', 'model-1-of-2.safetensors', 'model-2-of-2.safetensors', 'model-1-of-2.bin'])[-3:] == ['model.safetensors.index.json', 'model-1-of-2.safetensors', 'model-2-of-2.safetensors']

# ---- D8: weights in several files

def shard(folder, n=3):
    "The weights of a saved model in n files and an index."
    state = F.read_state(folder / F.FILES[0]); (folder / F.FILES[0]).unlink()
    keys, where = list(state), {}
    for i in range(n):
        name = f'model-{i + 1:05d}-of-{n:05d}.safetensors'
        save_file({k: state[k].clone() for k in keys[i::n]}, folder / name)
        where |= dict.fromkeys(keys[i::n], name)
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(metadata={}, weight_map=where)))
    return folder

def test_all_shards_are_loaded(saved):
    got = P.create_model(f'local-dir:{shard(saved)}').state_dict()
    assert all(torch.equal(got[k], v) for k, v in small().state_dict().items())

def test_shards_that_are_missing_or_lead_away(saved):
    name = f'local-dir:{shard(saved)}'
    (saved / 'model-00002-of-00003.safetensors').rename(saved / 'elsewhere')
    refused('names 3 files, but model-00002-of-00003.safetensors is not there: fetch it again', P.create_model, name)
    index = saved / 'model.safetensors.index.json'
    for wrong in ({'a': '../b.safetensors'}, {'a': 3}, [], {}): index.write_text(json.dumps(dict(weight_map=wrong))); refused('holds no weight_map', P.create_model, name)
    index.unlink(); refused('holds a part of the weights .model-00001-of-00003.safetensors. but no index', P.create_model, name)

# ---- D7: the shapes of the file

def test_misfits_tell_the_shapes_of_the_file():
    model = small(); state = theirs(model)
    refused(r'of another shape: visual.proj \(64, 32\) for \(64, 16\), text_projection \(48, 32\) for \(48, 16\)\);', P.our_weights, state, SMALL.replace(embed_dim=16))
    refused(r'visual.head.weight \(32, 64\) for \(16, 64\)', P.our_weights, model.state_dict(), SMALL.replace(embed_dim=16))
    refused(r'img/head/kernel \(64, 32\) for \(64, 16\)', P.our_weights, as_jax(model), SMALL.replace(embed_dim=16))
    for key, v in model.state_dict().items():
        if len(F.jax_names(key)) != 3: assert F.shape_there(key, v.shape, 'jax') == tuple(as_jax(model).get((F.jax_names(key) or [''])[0], v).shape)
        assert F.shape_there(key, v.shape, 'open_clip') == tuple(state[F.rename(key)].shape)

def test_misfits_are_few_and_near():
    wanted = {'visual.proj': (64, 32), 'positional_embedding': (8, 48), 'logit_scale': ()}
    assert F.misfits(wanted | {'positional_embedding': (77, 48)}, wanted, free=('positional_embedding',)) == ''
    assert F.misfits({}, wanted).startswith('missing: visual.proj')

def test_what_fits_and_what_the_shapes_say():
    model = small(); there, jax, learned = theirs(model), as_jax(model), SMALL.replace(positions='learned')
    assert set(P.our_weights(there, SMALL)) - {F.TABLE} == set(P.our_weights(jax, SMALL)) == set(model.state_dict())
    refused('their shapes say width 64, 2 blocks, patch 14', P.our_weights, there, model_config('ViT-B-32'))
    refused('only square', P.our_weights, there | {'visual.positional_embedding': torch.zeros(16, 64)}, learned)
    known = {n: c.to_dict() for n, c in MODELS.items()}
    assert F.looks_like(P.on_meta(model_config('ViT-B-32')).state_dict(), known).endswith(': ViT-B-32') and F.looks_like({}, known) == ''

# ---- files

def test_broken_files_end_in_one_line(tmp_path):
    save_file({'a': torch.zeros(1000)}, tmp_path / 'whole.safetensors')
    (tmp_path / 'half.safetensors').write_bytes((tmp_path / 'whole.safetensors').read_bytes()[:2000])
    (tmp_path / 'lfs.safetensors').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1710540580\n')
    (tmp_path / 'empty.bin').write_bytes(b''); (tmp_path / 'noise.safetensors').write_bytes(b'\x10\x00\x00\x00\x00\x00\x00\x00{"a')
    assert F.look(tmp_path / 'whole.safetensors').name == 'whole.safetensors'
    for file, match in (('half.safetensors', 'cut short'), ('lfs.safetensors', 'Git LFS'), ('empty.bin', 'not wholly downloaded'), ('nowhere.bin', 'no such file')): refused(match, F.look, tmp_path / file)
    refused('cannot be read as weights|cut short', F.read_state, tmp_path / 'noise.safetensors')

def test_bf16_of_numpy_and_what_training_left(tmp_path):
    bf16 = torch.tensor([1.0, -0.5, 3.140625], dtype=torch.bfloat16)
    np.savez(tmp_path / 'jax.npz', **{'params/t': bf16.view(torch.int16).numpy().view('V2'), 'params/img/cls': np.ones((1, 1, 4), np.float32), 'opt/0/mu': np.zeros(3)})
    got = F.read_npz(tmp_path / 'jax.npz')
    assert torch.equal(got['t'], bf16) and set(got) == {'t', 'img/cls'}
    torch.save({'state_dict': {'a': torch.ones(2)}, 'epoch': 3}, tmp_path / 'good.bin')
    assert torch.equal(F.read_state(tmp_path / 'good.bin')['a'], torch.ones(2))

def test_directories_hold_a_configuration_and_weights(tmp_path):
    (tmp_path / F.CONFIG).write_text('{"model_cfg": {'); refused('cannot be read as JSON', F.config_in, tmp_path)
    (tmp_path / F.CONFIG).write_text(json.dumps(halves(C))); assert P.from_open_clip_config(F.config_in(tmp_path)) == SMALL
    assert P.get_model_config(f'local-dir:{tmp_path}') == F.open_clip_config(C)['model_cfg']
    refused('holds a configuration but no weights', F.weights_in, tmp_path)
    (tmp_path / 'open_clip_model.safetensors.incomplete').write_bytes(b'...'); refused('was not wholly downloaded', F.weights_in, tmp_path)
    for f in ('pytorch_model.bin', 'model.safetensors'): (tmp_path / f).write_bytes(b'')
    assert F.weights_in(tmp_path).name == 'model.safetensors'

def test_where_a_name_leads(tmp_path):
    assert [F.leads(n) for n in ('ViT-B-16', 'local-dir:here')] == [False, True]
    refused("write 'local-dir:here'", F.leads, Path('here')); refused('local-dir:PATH', F.fetch, 's3:bucket'); refused('holds no open_clip_config.json', F.fetch, f'local-dir:{tmp_path}')
    class RepositoryNotFoundError(OSError): pass
    class NoHub:
        def scan_cache_dir(self, cache_dir): raise OSError('no cache')
    assert F._cached(NoHub(), None) == 'nothing' and F._why(TimeoutError()).startswith('cannot be reached') and 'does not exist' in F._why(RepositoryNotFoundError())
    refused('cached: nothing', F._from_hub, NoHub(), 'hf-hub:a/b', 'a/b', None)

# ---- out

@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_files_have_ordinary_permissions(mask, tmp_path):
    before = os.umask(mask)
    try: out = P.save_pretrained(small(), tmp_path / 'out')
    finally: os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in out.iterdir()} == {0o666 & ~mask} and stat.S_IMODE(out.stat().st_mode) == 0o777 & ~mask

def test_a_directory_is_whole_or_not_there(tmp_path):
    out = tmp_path / 'place'; out.mkdir(); (out / 'old').write_text('')
    with pytest.raises(RuntimeError), F.whole_directory(out) as tmp: (tmp / 'new').write_text(''); raise RuntimeError
    assert [p.name for p in out.iterdir()] == ['old'] and [p.name for p in tmp_path.iterdir()] == ['place']
    (out / 'README.md').write_text('of the model before'); (out / 'notes').mkdir(); (out / 'notes' / 'a').write_text('mine')
    with F.whole_directory(out) as tmp: (tmp / 'new').write_text('')
    assert sorted(p.name for p in out.iterdir()) == ['new', 'notes', 'old'] and (out / 'notes' / 'a').read_text() == 'mine' # what saving writes itself is replaced
    assert [p.name for p in tmp_path.iterdir()] == ['place']

def test_only_models_and_empty_directories_are_replaced(saved, tmp_path):
    F.check_place(tmp_path / 'not there yet'); F.check_place(saved)
    (tmp_path / 'thesis').mkdir(); F.check_place(tmp_path / 'thesis'); (tmp_path / 'thesis' / 'chapter1.tex').write_text('…')
    refused('holds no model', F.check_place, tmp_path / 'thesis'); refused('is a file', F.check_place, saved / 'README.md' / 'model')

def test_refusals_come_before_anything_is_written(tmp_path, saved):
    for match, more in (('expected one with .save', dict(tokenizer=3)), ('expected a Preprocess', dict(preprocess=3)), ('random crops', dict(preprocess=P.preprocess(SMALL, train=True)))):
        refused(match, P.save_pretrained, small(), tmp_path / 'new', **more)
    refused('found Linear', P.save_pretrained, torch.nn.Linear(1, 1), tmp_path / 'new')
    assert [p.name for p in tmp_path.iterdir()] == ['model']
    P.save_pretrained(small(), saved, card='# mine'); assert (saved / 'README.md').read_text() == '# mine'
    assert '| top1 | 0.5 |' in P.write_card(saved, dict(name='toy'), {'top1': 0.5}).read_text() and not [p for p in saved.iterdir() if p.name.startswith('.')]

def test_what_is_written_of_a_configuration(tmp_path):
    dropping = SMALL.replace(image_strategy='random', image_ratio=0.5)
    assert P.writable_config(build_clip(dropping), tmp_path / 'x')[1] == SMALL
    own = P.preprocess(SMALL.replace(resize_mode='shortest')); assert P.writable_config(build_clip(dropping), tmp_path / 'x', preprocess=own)[1] == SMALL.replace(resize_mode='shortest')

def test_the_card():
    card = F.model_card(C, metrics={'val/seen-zeroshot-val-top1': 0.5023})
    assert '| val/seen-zeroshot-val-top1 | 0.5023 |' in card and 'tanh GELU and no LayerNorm eps 1e-06' in card
    assert 'Nothing was measured' in F.model_card(C) and "'hf-hub:me/it'" in F.model_card(C, name='me/it')
    foreign = SMALL.replace(cls=False).to_dict()
    assert 'cannot load' in F.model_card(foreign) and 'no words for an image tower without class token' in F.remarks(foreign)[0] and F.remarks(model_config('ViT-B-32').to_dict()) == []
    refused("top1 is '50%'", F.model_card, C, metrics={'top1': '50%'})

# ---- D6: fixed positions stay fixed

@needs_open_clip
def test_sin_cos_2d_stays_fixed_and_keeps_its_word(tmp_path):
    d = words(pos_embed_type='sin_cos_2d')
    theirs_ = open_clip.CLIP(**copy.deepcopy(d)).eval()
    assert not theirs_.visual.positional_embedding.requires_grad
    save_file({k: v.contiguous() for k, v in theirs_.state_dict().items()}, tmp_path / F.FILES[0])
    (tmp_path / F.CONFIG).write_text(json.dumps(dict(model_cfg=d, preprocess_cfg=F.PREPROCESS['openai'])))
    ours = P.create_model(f'local-dir:{tmp_path}').eval()
    assert ours.cfg.positions == 'mae' and F.TABLE not in dict(ours.named_parameters())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad(): assert (ours.encode_image(x, normalize=True) - theirs_.encode_image(x, normalize=True)).abs().max() < 1e-5
    out = P.save_pretrained(ours, tmp_path / 'out')
    assert F.config_in(out)['model_cfg']['vision_cfg']['pos_embed_type'] == 'sin_cos_2d' and P.create_model(f'local-dir:{out}').cfg == ours.cfg
    again = open_clip.create_model(f'local-dir:{out}').eval()
    assert not again.visual.positional_embedding.requires_grad
    with torch.no_grad(): assert (ours.encode_image(x, normalize=True) - again.encode_image(x, normalize=True)).abs().max() < 1e-5

def test_a_table_that_is_not_the_sines_is_told(saved):
    "A directory that says sin_cos_2d but holds another table is not trained as if it held the sines."
    d = F.config_in(saved); d.pop('clipa_nb'); d['model_cfg']['vision_cfg']['pos_embed_type'] = 'sin_cos_2d'; (saved / F.CONFIG).write_text(json.dumps(d))
    refused("not the 'mae' sin-cos one: use positions='interpolate'", P.create_model, f'local-dir:{saved}')
    assert P.create_model(f'local-dir:{saved}', positions='interpolate').cfg.positions == 'learned'

# ---- D4: an official tokenizer that open_clip reads otherwise

PIECES = ['[PAD]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *'adgolers', '##og', '##s', "'", '’', '"', '“', '”']

@pytest.mark.filterwarnings('default')
def test_an_official_tokenizer_warns_where_ftfy_acts(tmp_path):
    plain = small(act='gelu', ln_eps=1e-5)
    with pytest.warns(UserWarning, match="reads 'a dog’s life' as other ids than this tokenizer"): out = P.save_pretrained(plain, tmp_path / 'a', tokenizer=WordPiece(PIECES, 8))
    if open_clip:
        pytest.importorskip('transformers')
        theirs_ = open_clip.get_tokenizer(f'local-dir:{out}')(['a dog’s life'])
        assert not torch.equal(theirs_, P.get_tokenizer(f'local-dir:{out}')(['a dog’s life'])) # the warning is true
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        P.save_pretrained(plain, tmp_path / 'b', tokenizer=WordPiece(PIECES, 8, mode='open_clip'))
        P.save_pretrained(plain, tmp_path / 'c', tokenizer=WordPiece(PIECES[:5] + ['a', 'red', 'star'], 8)) # both kinds of quotes are unknown to it: nothing differs

def test_words_follow_the_tokenizer():
    tok, other = train_wordpiece(['a red star'] * 5, 60, 8), dict(hf_tokenizer_name='facebook/xlm-v-base')
    assert [P.words_for(tok, w, 'it') for w in (None, {}, other, F.BERT | other)] == [F.BERT, F.BERT, F.BERT, F.BERT | other] and P.words_for(None, other, 'it') == other
    with pytest.warns(UserWarning, match='other ids'): assert P.words_for(ClipBPE([('a', 'b</w>')]), F.BERT, 'it') == {}
    P._same_ids(tok, F.BERT, 'it'); P._same_ids(tok, {}, 'it')
    refused("cleaned by 'canonicalize'", P._same_ids, tok, dict(tokenizer_kwargs={'clean': 'canonicalize'}), 'it')

def test_a_tokenizer_of_a_directory(saved):
    tok = train_wordpiece(['a red star'] * 5, 60, 8); tok.save(saved)
    assert torch.equal(P.get_tokenizer(f'local-dir:{saved}', context_length=6)(['a red star']), tok(['a red star'], 6))

# ---- preprocessing and models by name (from the chapter)

def test_a_square_by_hand():
    wide = Image.fromarray(np.arange(45 * 30 * 3, dtype=np.uint8).reshape(30, 45, 3))
    shortest = P.evaluation_pixels(wide, Transform(20, mode='shortest', interpolation='bicubic'))
    assert np.array_equal(shortest, np.asarray(wide.resize((30, 20), Image.Resampling.BICUBIC).crop((5, 0, 25, 20))))
    assert np.array_equal(P.evaluation_pixels(wide, Transform(20, mode='squash')), np.asarray(wide.resize((20, 20), Image.Resampling.BILINEAR)))

def test_normalised_by_hand():
    how = P.Preprocess(Transform(16, mode='squash', draft=0.), (0.5,) * 3, (0.25,) * 3)
    torch.testing.assert_close(how(Image.new('RGB', (40, 20), (128, 128, 128))), torch.full((3, 16, 16), (128 / 255 - 0.5) / 0.25))
    refused('expected a PIL image', how, torch.zeros(3, 4, 4)); refused('cannot be decoded', how, b'no image')

def test_fresh_models_and_bare_files(tmp_path):
    fresh, train, val = P.create_model_and_transforms('ViT-S-16-CLIPA', force_image_size=64, force_context_length=8, force_patch_dropout=0.5)
    assert (fresh.cfg.image_ratio, fresh.cfg.image_strategy, train.transform.mode, val.transform.mode) == (0.5, 'random', 'crop', 'squash')
    assert fresh.visual(torch.zeros(1, 3, 64, 64))[1]['ids'].shape == (1, 8) and fresh.encode_text(torch.ones(1, 8, dtype=torch.int64)).shape == (1, 384)
    F.write_state(theirs(fresh), tmp_path / 'weights.safetensors')
    file = str(tmp_path / 'weights.safetensors')
    refused('nothing says how its images were prepared', P.create_model, 'ViT-S-16-CLIPA', file)
    loaded = P.create_model('ViT-S-16-CLIPA', file, force_preprocess_cfg='openai', force_image_size=64, force_context_length=8)
    assert (loaded.cfg.resize_mode, loaded.cfg.mean) == ('shortest', OPENAI['mean']) and all(p.is_contiguous() for p in loaded.parameters())
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in loaded.state_dict().items())

@pytest.mark.filterwarnings('default')
def test_sources_of_a_name(saved, tmp_path):
    assert P.source_of('ViT-B-16', None, None) == P.Found(model_config('ViT-B-16'))
    assert P.source_of(f'local-dir:{saved}', None, None).words == F.BERT
    (tmp_path / 'alone.bin').write_bytes(b'x'); assert P.source_of('ViT-B-16', str(tmp_path / 'alone.bin'), None).known == {}
    assert P._beside('small', SMALL, tmp_path / 'nowhere' / 'model.safetensors') == {}
    with pytest.warns(UserWarning, match='act gelu_tanh for gelu, ln_eps 1e-06 for 1e-05'): assert P._beside('small', SMALL.replace(act='gelu', ln_eps=1e-5), saved / F.FILES[0])['resize_mode'] == 'squash'
    refused('the path of a file', P.source_of, 'ViT-B-16', 'openia', None)

def test_registered_architectures_are_all_or_none(tmp_path):
    (tmp_path / 'mine.json').write_text(json.dumps(F.open_clip_config(model_config('ViT-B-16').replace(image__depth=3).to_dict())['model_cfg']))
    try:
        P.add_model_config(tmp_path / 'mine.json')
        assert 'mine' in P.list_models() and P.ADDED_WORDS['mine'] == {} and P.get_model_config('mine')['vision_cfg']['layers'] == 3 and {name for name, _ in P.TAGS} <= set(P.list_models())
    finally: P.ADDED.pop('mine', None); P.ADDED_WORDS.pop('mine', None)
    (tmp_path / 'bad.json').write_text('{"embed_dim": 64, "vision_cfg": {"qk_norm": true}, "text_cfg": {}}')
    refused('qk_norm', P.add_model_config, tmp_path); assert 'mine' not in P.list_models()

def test_a_model_that_is_not_its_configuration():
    changed = small(); P._check_described(changed, SMALL); P._check_described(small(attention='matmul', image_strategy='random', image_ratio=0.5), SMALL)
    changed.visual.pool = First(); refused(r'visual.pool is First\(\), not Mean\(first=1\)', P._check_described, changed, SMALL)
    refused(r'\(5, 64\) for \(32, 64\)', P._check_described, small(embed_dim=5), SMALL)

def test_a_vocabulary_too_large_is_refused(tmp_path):
    out = P.save_pretrained(small(vocab_size=20), tmp_path / 'tiny'); train_wordpiece(['a red star', 'one green circle'] * 5, 60, 8).save(out)
    refused('20', P.get_tokenizer, f'local-dir:{out}')

# ---- kinds that open_clip does not know

def test_open_clip_is_told_of_its_own_kind_alone():
    assert F.foreign(C) == [] and F.foreign({**C, 'kind': 'zoo.coca:CoCa'}) == ['the kind `zoo.coca:CoCa`']
    assert F.foreign(dict(kind='user.x:Y')) == ['the kind `user.x:Y`'] and F.remarks(dict(kind='user.x:Y')) == ['open_clip cannot load this model: it has no words for the kind `user.x:Y`.']

def test_a_card_of_any_kind_and_any_data():
    card = F.model_card(dict(kind='user.slip:Slip', width=7, image=dict(depth=2), checkpointing='full'), metrics={'top1': 0.5}, data='12 M pairs of my own')
    assert card.startswith('---\nlibrary_name: clipa_nb\n') and "load_user_code('slip.py')" in card and '## Data\n\n12 M pairs of my own' in card
    assert '- width: `7`' in card and '- image.depth: `2`' in card and 'checkpointing' not in card and 'from open_clip' not in card and '| top1 | 0.5 |' in card
    plain = F.model_card(C)
    assert '## Data' not in plain and 'toy' not in plain and 'from open_clip' in plain and 'Nothing was measured' in plain

def test_misfits_take_tensors_or_shapes():
    state = {'a': torch.ones(2), 'b': torch.ones(3)}
    assert F.misfits(state, {'a': (2,), 'b': torch.ones(3)}) == '' and F.misfits(state, {'a': torch.ones(4)}) == 'unknown: b; of another shape: a (2,) for (4,)'

def test_a_configuration_is_ours_if_it_names_a_kind(tmp_path):
    for text, wanted in (('{"model_type": "clip"}', None), ('{"kind": 3}', None), ('{"kind": "clip:ModelConfig"}', {'kind': 'clip:ModelConfig'})):
        (tmp_path / F.OURS).write_text(text); assert F.own_config(tmp_path) == wanted and F.holds_model(tmp_path) == bool(wanted)
    (tmp_path / F.OURS).write_text('{'); refused('cannot be read as JSON', F.own_config, tmp_path)

def test_what_is_fetched_of_a_repository(monkeypatch, tmp_path):
    "Ours where config.json names a kind; a transformers config.json beside open_clip's pair changes nothing."
    files, asked = ['config.json', F.CONFIG, F.OUR_WEIGHTS, F.FILES[0], 'vocab.txt', 'big.bin'], []
    class Hub:
        def list_repo_files(self, where): return files
        def snapshot_download(self, where, cache_dir=None, allow_patterns=None): asked.append(allow_patterns); return str(tmp_path)
    for kind, wanted in (('"kind": "clip:ModelConfig"', F.OUR_WEIGHTS), ('"model_type": "clip"', F.FILES[0])):
        (tmp_path / F.OURS).write_text('{' + kind + '}'); asked.clear()
        F._from_hub(Hub(), 'hf-hub:a/b', 'a/b', None)
        assert not any('safetensors' in n for n in asked[0]) and [n for n in asked[-1] if 'safetensors' in n or n.endswith('.bin')] == [wanted]
