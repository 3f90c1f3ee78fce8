"Weights in and out: the same numbers as open_clip, flax and the formulas; every mistake in one line; no code is ever run."
from dataclasses import dataclass
import copy, io, json, logging, math, os, types, warnings, zipfile
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from safetensors.torch import load_file, save_file
from clipa_nb import pretrained as P
from clipa_nb.engine import formats as F
from clipa_nb.clip import CLIP, MODELS, TEXT_MASKS, First, ModelConfig, TrunkConfig, build_clip, image_tower, load_weights, model_config, text_tower
from clipa_nb.core import Config, UserError, kind_name, load_user_code
from clipa_nb.cost import Tower
from clipa_nb.engine.pictures import Transform
from clipa_nb.tokenizer import ClipBPE, load_tokenizer, train_wordpiece

try: import open_clip
except ImportError: open_clip = None
needs_open_clip = pytest.mark.skipif(open_clip is None, reason='open_clip is not installed: pip install open_clip_torch')
pytestmark = pytest.mark.filterwarnings('ignore')
HERE = Path(__file__).parent

SMALL = model_config('ViT-L-14-CLIPA').replace(image=Tower(64, 2, 4, 256), text=Tower(48, 2, 4, 192), embed_dim=32, image_size=56, context_length=8, vocab_size=300)

@torch.no_grad()
def perturb(model, seed=0):
    "Every parameter, biases and norms too: zeros and ones would hide mistakes."
    g = torch.Generator().manual_seed(seed)
    for k, p in model.named_parameters():
        if p.ndim == 0: p.copy_(torch.tensor(2.3456789))
        else: p.copy_(torch.empty(p.shape).uniform_(-1.7, 1.7, generator=g) * p.shape[-1]**-0.5 + (1. if k.endswith('weight') and ('ln_' in k or 'norm' in k) else 0.))
    return model.eval()

def to_theirs(model): return F.to_open_clip(P.stored_state(model))
def from_words(m, p=None): return ModelConfig.from_dict(F.from_words(m, p))
def small(seed=0, **changes): return perturb(build_clip(SMALL.replace(**changes)), seed)

@pytest.fixture
def saved(tmp_path): return P.save_pretrained(small(), tmp_path / 'model')

def older(folder):
    "The directory as earlier versions wrote it: open_clip's pair alone, with our configuration inside theirs. Still read."
    if (ours := folder / F.OURS).exists():
        d = json.loads((folder / F.CONFIG).read_text())
        d['clipa_nb'] = ModelConfig.from_dict({k: v for k, v in json.loads(ours.read_text()).items() if k != 'tokenizer'}).to_dict()
        (folder / F.CONFIG).write_text(json.dumps(d)); without_ours(folder)
    return folder

def without_ours(folder):
    for name in (F.OURS, F.OUR_WEIGHTS): (folder / name).unlink(missing_ok=True)
    return folder

def edit(folder, f):
    older(folder)
    d = json.loads((folder / 'open_clip_config.json').read_text()); f(d); (folder / 'open_clip_config.json').write_text(json.dumps(d)); return folder

def theirs_only(folder): return edit(folder, lambda d: d.pop('clipa_nb'))

# ---- the same numbers as open_clip

FAMILIES = { # open_clip's own configuration, at reduced depth: (image blocks, text blocks)
    'ViT-B-32': (2, 2), 'ViT-B-32-quickgelu': (2, 2), 'ViT-B-16': (2, 2), 'ViT-L-14': (1, 1),
    'ViT-L-14-CLIPA': (1, 1), 'ViT-L-14-CLIPA-336': (1, 1), 'ViT-H-14-CLIPA': (1, 1), 'ViT-bigG-14-CLIPA': (1, 1)}

def reduced(name):
    d = open_clip.get_model_config(name)
    d['vision_cfg']['layers'], d['text_cfg']['layers'] = FAMILIES[name]
    d['text_cfg']['vocab_size'] = 600 # the table of words is only looked up
    if 'H-14' in name or 'bigG' in name: d['vision_cfg']['image_size'] = 112 # fewer tokens, the same blocks
    return d

def their_model(cfg, seed=1):
    with torch.device('meta'), P._SkipInit(): model = open_clip.CLIP(**cfg)
    mask = model.attn_mask
    model.to_empty(device='cpu')
    if mask is not None: model.attn_mask = torch.full(mask.shape, float('-inf')).triu(1)
    return perturb(model, seed)

def their_folder(model, cfg, out, how):
    out.mkdir()
    save_file({k: v.detach().contiguous() for k, v in model.state_dict().items()}, out / P.FILES[0])
    (out / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=cfg, preprocess_cfg=P.PREPROCESS[how])))
    return out

def batch(model_cfg, n=2, size=None, length=None):
    g = torch.Generator().manual_seed(5)
    s, t = size or model_cfg['vision_cfg']['image_size'], length or model_cfg['text_cfg']['context_length']
    ids = torch.randint(1, 590, (n, t), generator=g); ids[:, t // 2] = 599 # the largest: CLIP's end of text, in the middle
    return torch.randn(n, 3, s, s, generator=g), ids

def features(model, x, ids): return model.encode_image(x, normalize=True), model.encode_text(ids, normalize=True)
def gap(a, b): return max(float((x - y).abs().max()) for x, y in zip(a, b))

def gradients(model, zi, zt, name=lambda k: k):
    "The gradients of a loss that every parameter has a part in (squares, so that the temperature's does not cancel), by open_clip's names."
    logits = model.logit_scale.exp() * zi @ zt.T
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(zi))) + 10 * logits.square().mean() + (zi * torch.linspace(-1, 1, zi.shape[1])).sum() + (zt * torch.linspace(1, -1, zt.shape[1])).sum()
    loss.backward()
    return {name(k): p.grad.T if k in F.TRANSPOSED else p.grad for k, p in model.named_parameters() if p.grad is not None}

def worst(a, b): return max(float((a[k].reshape(b[k].shape) - b[k]).norm() / b[k].norm().clamp(min=1e-8)) for k in b if k != 'visual.positional_embedding' or k in a)

@needs_open_clip
@pytest.mark.parametrize('name', FAMILIES)
def test_their_directory_in_ours(name, tmp_path, record_property):
    cfg = reduced(name)
    theirs = their_model(cfg)
    folder = their_folder(theirs, cfg, tmp_path / 'theirs', 'clipa' if 'CLIPA' in name else 'openai')
    ours = P.create_model(f'local-dir:{folder}').eval()
    x, ids = batch(cfg)
    a, b = features(ours, x, ids), features(theirs, x, ids)
    record_property('embedding', gap(a, b))
    assert gap(a, b) < 1e-5
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    assert torch.equal(ours(x, ids)[2], theirs(x, ids)[2])
    ga, gb = gradients(ours, *a, F.rename), gradients(theirs, *b)
    assert set(ga) == set(gb) == set(theirs.state_dict())
    record_property('gradient', worst(ga, gb))
    assert worst(ga, gb) < 1e-4

@needs_open_clip
@pytest.mark.parametrize('name', FAMILIES)
def test_our_directory_in_theirs(name, tmp_path, record_property):
    depth = FAMILIES[name]
    cfg = model_config(name).replace(image__depth=depth[0], text__depth=depth[1], vocab_size=600, image_size=reduced(name)['vision_cfg']['image_size'])
    ours = perturb(P.on_meta(cfg).to_empty(device='cpu'), 2)
    theirs = open_clip.create_model(f'local-dir:{P.save_pretrained(ours, tmp_path / "ours")}').eval()
    x, ids = batch(F.open_clip_config(cfg.to_dict())['model_cfg'])
    a, b = features(ours, x, ids), features(theirs, x, ids)
    record_property('embedding', gap(a, b))
    assert gap(a, b) < 1e-5
    assert ours.logit_scale.item() == theirs.logit_scale.item()
    ga, gb = gradients(ours, *a, F.rename), gradients(theirs, *b)
    assert set(gb) - set(ga) <= {'visual.positional_embedding'} # computed here, stored there
    gb = {k: v for k, v in gb.items() if k in ga}
    record_property('gradient', worst(ga, gb))
    assert worst(ga, gb) < 1e-4
    if 'CLIPA' in name: assert theirs.visual.transformer.resblocks[0].ln_1.eps == 1e-6 and theirs.transformer.resblocks[0].mlp.gelu.approximate == 'tanh'

@needs_open_clip
def test_a_whole_l14(record_property):
    cfg = open_clip.get_model_config('ViT-L-14-CLIPA')
    theirs = their_model(cfg)
    ours = P.from_open_clip_config(dict(model_cfg=cfg, preprocess_cfg=P.PREPROCESS['clipa']))
    state = P.our_weights(dict(theirs.state_dict()), ours)
    ours = load_weights(P.on_meta(ours), state, assign=True).eval() # the very same memory
    x, ids = batch(cfg, 1)
    with torch.no_grad(): a, b = features(ours, x, ids), features(theirs, x, ids)
    record_property('embedding', gap(a, b))
    numbers = sum(p.numel() for p in ours.parameters())
    assert numbers == sum(p.numel() for p in theirs.parameters()) and round(numbers / 1e6, 1) == 414.2
    assert gap(a, b) < 1e-5

@needs_open_clip
@pytest.mark.parametrize('name', ['ViT-B-16', 'ViT-L-14-CLIPA'])
@pytest.mark.parametrize('size, length', [(112, 16), (280, 40)])
def test_another_size_on_load(name, size, length, tmp_path):
    size = size * 8 // 7 if '16' in name else size
    cfg = reduced(name)
    cfg['vision_cfg'] |= dict(layers=1, width=128); cfg['text_cfg'] |= dict(layers=1, width=64, heads=2); cfg['embed_dim'] = 48
    folder = their_folder(their_model(cfg), cfg, tmp_path / 'theirs', 'openai')
    forced = dict(force_image_size=size, force_context_length=length)
    ours, theirs = (make(f'local-dir:{folder}', **forced).eval() for make in (P.create_model, open_clip.create_model))
    x, ids = batch(cfg, 3, size, length)
    assert gap(features(ours, x, ids), features(theirs, x, ids)) < 1e-5
    back = open_clip.create_model(f'local-dir:{P.save_pretrained(ours, tmp_path / "back")}').eval()
    assert gap(features(back, x, ids), features(theirs, x, ids)) < 1e-5

@needs_open_clip
def test_our_directory_at_another_size_is_theirs(saved):
    "Sin-cos positions are stored as a table; at another size both libraries stretch it, unless we are told to recompute."
    forced, name = dict(force_image_size=112), f'local-dir:{saved}'
    x, ids = torch.randn(3, 3, 112, 112), torch.randint(1, 300, (3, 8))
    theirs = open_clip.create_model(name, **forced).eval()
    for how in ({}, dict(positions='interpolate')): assert gap(features(P.create_model(name, **forced, **how).eval(), x, ids), features(theirs, x, ids)) < 1e-5
    assert gap(features(P.create_model(name, **forced, positions='recompute').eval(), x, ids), features(theirs, x, ids)) > 1e-2

@needs_open_clip
def test_every_plain_architecture_of_open_clip(tmp_path):
    "Each is either built with the same names and shapes, or refused by name."
    built, refused = [], []
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        if any(k in str(cfg) for k in ('timm_model_name', 'hf_model_name', 'multimodal_cfg', 'audio')) or isinstance(cfg['vision_cfg'].get('layers'), list):
            with pytest.raises(UserError): from_words(cfg)
            continue
        try: ours, _ = from_words(cfg, 'openai'), [cfg[c].update(layers=2) for c in ('vision_cfg', 'text_cfg')]
        except UserError as e: refused.append(name); assert 'ls_init_value' in str(e); continue
        with torch.device('meta'), P._SkipInit(): a, b = build_clip(ours.replace(image__depth=2, text__depth=2)).state_dict(), open_clip.CLIP(**{k: v for k, v in cfg.items() if k != 'custom_text'}).state_dict()
        assert {F.rename(k): tuple(v.T.shape if k in F.TRANSPOSED else v.shape) for k, v in a.items()} == {k: tuple(v.shape) for k, v in b.items()}, name
        built.append(name)
    assert {*FAMILIES, 'ViT-H-14-CLIPA-336', 'ViT-bigG-14-CLIPA-336', 'ViT-g-14', 'ViT-H-14-worldwide'} <= set(built) and all(n.endswith('-alt') for n in refused)

@needs_open_clip
@pytest.mark.parametrize('change', [dict(pool='norm_avg'), dict(text_pool='first'), dict(text_pool='eos', eos_id=7), dict(text_act='gelu'), dict(text_ln_eps=1e-5), dict(act='gelu', text_act='gelu_tanh'),
                                    dict(pre_norm=True, text_mask='causal', text_pool='eot', act='quick_gelu', pool='cls', positions='learned', ln_eps=1e-5), dict(init_bias=-10.)], ids=str)
def test_what_open_clip_can_say_it_computes(change, tmp_path):
    ours = small(**change)
    theirs = open_clip.create_model(f'local-dir:{P.save_pretrained(ours, tmp_path / "out")}').eval()
    x, ids = torch.randn(3, 3, 56, 56), torch.randint(1, 300, (3, 8))
    ids[:, 4] = 7
    with torch.no_grad():
        assert gap(features(ours, x, ids), features(theirs, x, ids)) < 1e-5
        again = P.create_model(f'local-dir:{theirs_only(tmp_path / "out")}').eval()
        assert gap(features(again, x, ids), features(theirs, x, ids)) < 1e-5
    if 'init_bias' in change: assert again.logit_bias.item() == theirs.logit_bias.item()

@pytest.mark.parametrize('change', [dict(cls=False), dict(pool='avg_all'), dict(text_mask='pad'), dict(text_mask='causal_pad'), dict(act='quick_gelu', text_act='gelu'), dict(text_act='quick_gelu')], ids=str)
def test_what_open_clip_cannot_say_it_refuses_or_is_warned_of(change, tmp_path):
    with pytest.warns(UserWarning, match='open_clip cannot load this model'): out = P.save_pretrained(small(**change), tmp_path / 'out')
    assert 'open_clip cannot load this model' in (out / 'README.md').read_text()
    if open_clip:
        with pytest.raises(Exception): open_clip.create_model(f'local-dir:{out}').encode_text(torch.ones(1, 8, dtype=torch.int64))
    model = P.create_model(f'local-dir:{out}')
    assert model.cfg == SMALL.replace(**change)

def test_tanh_and_eps_are_said(tmp_path):
    with pytest.warns(UserWarning, match='no tanh GELU and no LayerNorm eps 1e-06'): out = P.save_pretrained(small(), tmp_path / 'out')
    words = json.loads((out / 'open_clip_config.json').read_text())['model_cfg']
    assert all(words[c]['act_kwargs'] == {'approximate': 'tanh'} and words[c]['norm_kwargs'] == {'eps': 1e-6} for c in ('vision_cfg', 'text_cfg'))
    assert 'no tanh GELU' in (out / 'README.md').read_text()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        P.save_pretrained(small(act='gelu', ln_eps=1e-5), tmp_path / 'plain')

@needs_open_clip
def test_tokenizer_files_are_read_by_open_clip(tmp_path):
    pytest.importorskip('transformers')
    vocab = HERE.parent / '..' / 'shared' / 'data' / 'bert-base-uncased-vocab.txt'
    tok = load_tokenizer(vocab, 32) if vocab.exists() else train_wordpiece(['a red star', 'a photo of a blue ring'] * 3, 120, 32)
    out = P.save_pretrained(small(vocab_size=32000, context_length=32), tmp_path / 'out', tokenizer=tok)
    texts = ['a red star', 'a photo of a blue ring']
    theirs = open_clip.get_tokenizer(f'local-dir:{out}')(texts)
    assert torch.equal(P.get_tokenizer(f'local-dir:{out}')(texts), theirs) and theirs.shape == (2, 32)

def tokenizers(kind, length):
    return train_wordpiece(['a red star', 'a photo of a blue ring'] * 3, 120, length) if kind == 'pieces' else load_tokenizer('clip', length)

@needs_open_clip
@pytest.mark.parametrize('kind, mask', [('pieces', 'none'), ('pieces', 'causal'), ('pairs', 'none'), ('pairs', 'causal')])
@pytest.mark.parametrize('again', [False, True])
def test_the_tokenizer_handed_over_decides(kind, mask, again, tmp_path):
    "open_clip makes the ids of the tokenizer that was saved, whatever the mask; also after loading and saving again."
    pytest.importorskip('transformers')
    tok, texts = tokenizers(kind, 12), ['a red star', 'a photo of a blue ring']
    out = P.save_pretrained(small(vocab_size=49408, context_length=12, text_mask=mask), tmp_path / 'out', tokenizer=tok)
    if again: out = P.save_pretrained(P.create_model(f'local-dir:{out}'), tmp_path / 'again', tokenizer=P.get_tokenizer(f'local-dir:{out}'))
    ours, theirs = P.get_tokenizer(f'local-dir:{out}')(texts), open_clip.get_tokenizer(f'local-dir:{out}')(texts)
    assert torch.equal(ours, tok(texts)) and torch.equal(ours, theirs)

WORLDWIDE = dict(hf_tokenizer_name='facebook/xlm-v-base', tokenizer_kwargs=dict(clean='canonicalize'))

def test_a_named_tokenizer_travels(saved, tmp_path):
    "What the configuration says of a tokenizer that is not built here is kept; nobody gets CLIP's ids instead."
    def f(d): d.pop('clipa_nb'); d['model_cfg']['text_cfg'].update(WORLDWIDE, no_causal_mask=False, pool_type='eos')
    name = f'local-dir:{edit(saved, f)}'
    out = P.save_pretrained(P.create_model(name), tmp_path / 'out')
    for folder in (saved, out):
        words = P.config_in(folder)['model_cfg']['text_cfg']
        assert {k: words[k] for k in WORLDWIDE} == WORLDWIDE
        refused("no vocabulary for 'facebook/xlm-v-base'", P.get_tokenizer, f'local-dir:{folder}')
    if open_clip:
        with pytest.raises(Exception): open_clip.get_tokenizer(f'local-dir:{out}')(['a red star'])
    again = P.save_pretrained(P.create_model(f'local-dir:{out}'), tmp_path / 'again')
    assert P.tokenizer_words(P.config_in(again)['model_cfg']['text_cfg']) == WORLDWIDE
    assert P.from_open_clip_config(P.config_in(again)) == P.create_model(f'local-dir:{out}').cfg

def test_the_tokenizer_of_a_registered_architecture(tmp_path, monkeypatch):
    monkeypatch.setattr(P, 'ADDED', {}); monkeypatch.setattr(P, 'ADDED_WORDS', {}, raising=False)
    m = F.open_clip_config(SMALL.to_dict())['model_cfg']; m['text_cfg'] |= dict(WORLDWIDE, no_causal_mask=False)
    (tmp_path / 'far.json').write_text(json.dumps(m)); P.add_model_config(tmp_path)
    assert P.tokenizer_words(P.get_model_config('far')['text_cfg']) == WORLDWIDE
    assert P.tokenizer_words(P.config_in(P.save_pretrained(P.create_model('far'), tmp_path / 'out'))['model_cfg']['text_cfg']) == WORLDWIDE
    refused("no vocabulary for 'facebook/xlm-v-base'", P.get_tokenizer, 'far')

@pytest.mark.filterwarnings('default')
def test_a_tokenizer_that_open_clip_cannot_read_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="CLIP's own byte pairs in place of these"): P.save_pretrained(small(), tmp_path / 'a', tokenizer=ClipBPE([('a', 'b</w>')]))
    class Own:
        def save(self, d): pass
    with pytest.warns(UserWarning, match='other ids than this Own makes'): P.save_pretrained(small(), tmp_path / 'b', tokenizer=Own())
    refused('expected one with .save', P.save_pretrained, small(), tmp_path / 'c', tokenizer=3)

# ---- the same numbers as flax and as the formulas

JAX = HERE / 'fixtures' / 'jax'
TINY = model_config('ViT-B-16-CLIPA').replace(image=Tower(24, 2, 3, 40), text=Tower(20, 2, 2, 36), embed_dim=10, patch=4, image_size=12, context_length=6, vocab_size=30)

def tiny(dtype, monkeypatch, **kw):
    monkeypatch.setitem(P.ADDED, 'tiny', TINY)
    return P.create_model('tiny', JAX / f'weights_{dtype}.npz', force_preprocess_cfg='clipa', **kw).eval()

@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
@torch.no_grad()
def test_flax_weights_compute_the_same(dtype, monkeypatch):
    z = np.load(JAX / 'io.npz')
    images = {k: torch.from_numpy(z[k]).permute(0, 3, 1, 2) for k in ('image', 'wide')}
    model = tiny(dtype, monkeypatch)
    close = lambda a, name: np.testing.assert_allclose(a.numpy(), z[f'{dtype}_{name}'], atol=2e-6)
    close(model.encode_image(images['image'], normalize=True), 'gap')
    close(model.encode_text(torch.from_numpy(z['ids']), normalize=True), 'text')
    close(model(images['image'], torch.from_numpy(z['ids']))[2], 'scale')
    close(tiny(dtype, monkeypatch, force_image_size=20).encode_image(images['wide'], normalize=True), 'gap_wide') # positions are computed anew
    tok = load_weights(build_clip(TINY.replace(pool='cls')), model.state_dict()).eval()
    close(tok.encode_image(images['image'], normalize=True), 'tok')
    assert all(p.dtype == torch.float32 for p in model.parameters())

def test_flax_positions_may_be_interpolated(monkeypatch):
    model = tiny('fp32', monkeypatch, positions='interpolate', force_image_size=20, force_context_length=9)
    assert model.cfg.positions == 'learned' and model.visual.positions.table.shape == (26, 24) and model.text.positions.shape == (9, 20)
    whole = tiny('fp32', monkeypatch, positions='interpolate')
    x = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(whole.encode_image(x), tiny('fp32', monkeypatch).encode_image(x), atol=1e-6, rtol=1e-5)

def straight(state, cfg, image, ids, gelu, eps):
    "Both towers, written down from the formulas in float64 numpy."
    p = {k: v.double().numpy() for k, v in state.items()}
    def ln(x, k):
        m = x.mean(-1, keepdims=True)
        return (x - m) / np.sqrt(((x - m) ** 2).mean(-1, keepdims=True) + eps) * p[k + '.weight'] + p[k + '.bias']
    def blocks(x, k, tower):
        d = tower.width // tower.heads
        for i in range(tower.depth):
            b = f'{k}.{i}.'
            y = ln(x, b + 'ln_1') @ p[b + 'attn.in_proj_weight'].T + p[b + 'attn.in_proj_bias']
            q, key, v = (y[..., j * tower.width:(j + 1) * tower.width] for j in range(3))
            heads = []
            for h in range(tower.heads):
                s = slice(h * d, (h + 1) * d)
                a = q[..., s] @ key[..., s].swapaxes(-1, -2) / np.sqrt(d)
                a = np.exp(a - a.max(-1, keepdims=True)); heads.append(a / a.sum(-1, keepdims=True) @ v[..., s])
            x = x + np.concatenate(heads, -1) @ p[b + 'attn.out_proj.weight'].T + p[b + 'attn.out_proj.bias']
            y = gelu(ln(x, b + 'ln_2') @ p[b + 'mlp.c_fc.weight'].T + p[b + 'mlp.c_fc.bias'])
            x = x + y @ p[b + 'mlp.c_proj.weight'].T + p[b + 'mlp.c_proj.bias']
        return x
    P_, g, W = cfg.patch, cfg.image_size // cfg.patch, cfg.image.width
    x = np.stack([[np.einsum('chw,dchw->d', im[:, r * P_:(r + 1) * P_, c * P_:(c + 1) * P_], p['visual.patch.weight']) for r in range(g) for c in range(g)] for im in image.double().numpy()])
    speed = [10_000 ** -(k / (W // 4 - 1)) for k in range(W // 4)]
    place = np.array([[f(v * s) for v in (c, r) for f in (np.sin, np.cos) for s in speed] for r in range(g) for c in range(g)])
    x = np.concatenate([np.broadcast_to(p['visual.prefix.token'], (len(x), 1, W)), x + place], 1)
    zi = ln(blocks(x, 'visual.encoder.blocks', cfg.image)[:, 1:].mean(1), 'visual.norm') @ p['visual.head.weight'].T
    t = blocks(p['text.embed.weight'][ids.numpy()] + p['text.positions'], 'text.encoder.blocks', cfg.text)
    return zi, ln(t, 'text.norm')[:, -1] @ p['text.head.weight'].T

erf = np.vectorize(math.erf)
GELUS = {'gelu': lambda x: x * (1 + erf(x / np.sqrt(2))) / 2, 'gelu_tanh': lambda x: x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2, 'quick_gelu': lambda x: x / (1 + np.exp(-1.702 * x))}

@pytest.mark.parametrize('act, eps', [('gelu_tanh', 1e-6), ('gelu', 1e-5), ('gelu_tanh', 1e-5), ('gelu', 1e-6), ('quick_gelu', 1e-5)])
@torch.no_grad()
def test_formulas_in_float64(act, eps):
    cfg = TINY.replace(act=act, ln_eps=eps)
    model = perturb(build_clip(cfg)).double()
    image, ids = torch.randn(2, 3, 12, 12, dtype=torch.float64), torch.randint(0, 30, (2, 6))
    for ours, wanted in zip((model.encode_image(image), model.encode_text(ids)), straight(model.state_dict(), cfg, image, ids, GELUS[act], eps)):
        np.testing.assert_allclose(ours.numpy(), wanted, atol=1e-12, rtol=1e-10)
    other = {'gelu': 'gelu_tanh'}.get(act, 'gelu')
    assert abs(straight(model.state_dict(), cfg, image, ids, GELUS[other], eps)[0] - model.encode_image(image).numpy()).max() > 1e-6 # the test can tell them apart

# ---- every form weights come in

def forms(tmp_path, model):
    "One model, written in every way we read."
    theirs = to_theirs(model)
    keys = lambda f: {f(k): v for k, v in theirs.items()}
    text = lambda k: k if k.startswith(('visual.', 'logit')) else f'text.{k}'
    yield 'safetensors', (save_file(theirs, tmp_path / 'a.safetensors'), tmp_path / 'a.safetensors')[1]
    for name, state in (('bin', theirs), ('module', {'epoch': 3, 'name': 'x', 'state_dict': keys(lambda k: f'module.{k}') | {'module.attn_mask': torch.zeros(8, 8)}, 'optimizer': {'state': {}, 'param_groups': [dict(lr=0.1)]}}),
                        ('custom text', keys(text) | {'text.attn_mask': torch.zeros(8, 8)}), ('compiled', keys(lambda k: f'module._orig_mod.{text(k)}')), ('openai', theirs | {k: torch.tensor(8) for k in ('input_resolution', 'context_length', 'vocab_size')}),
                        ('one scale', theirs | {'logit_scale': theirs['logit_scale'].reshape(1)}), ('ours', {k: v.detach() for k, v in model.state_dict().items()}), ('ours, module', {f'module.{k}': v.detach() for k, v in model.state_dict().items()})):
        torch.save(state, tmp_path / f'{name}.pt'); yield name, tmp_path / f'{name}.pt'
    torch.save(theirs, tmp_path / 'legacy.bin', _use_new_zipfile_serialization=False); yield 'legacy', tmp_path / 'legacy.bin'

def test_every_form_gives_the_same_weights(tmp_path, monkeypatch):
    model = small(); monkeypatch.setitem(P.ADDED, 'small', SMALL)
    for name, path in forms(tmp_path, model):
        got = P.create_model('small', path, force_preprocess_cfg='clipa').state_dict()
        assert all(torch.equal(got[k], v) for k, v in model.state_dict().items()), name

def test_clipa_v1_checkpoint(tmp_path):
    "Old words, `module.` prefixes, mean over all tokens with the class token: compared with the mean taken by hand."
    words = dict(embed_dim=32, vision_cfg=dict(image_size=64, layers=2, width=64, head_width=16, patch_size=16, global_average_pool=True, pos_embed='sin_cos_2d'), text_cfg=dict(context_length=8, vocab_size=300, width=48, heads=4, layers=2, text_mask='syntax'))
    cfg = from_words(words, 'openai')
    assert (cfg.pool, cfg.pre_norm, cfg.act, cfg.ln_eps, cfg.text_mask, cfg.text_pool, cfg.positions) == ('avg_all', True, 'gelu', 1e-5, 'causal', 'eot', 'learned')
    model = perturb(build_clip(cfg))
    torch.save({'state_dict': {f'module.{k}': v for k, v in to_theirs(model).items()}}, tmp_path / 'epoch_6.pt')
    (tmp_path / 'open_clip_config.json').write_text(json.dumps(dict(model_cfg=words, preprocess_cfg=P.PREPROCESS['openai'])))
    (tmp_path / 'epoch_6.pt').rename(tmp_path / 'open_clip_pytorch_model.pth')
    loaded, _, val = P.create_model_and_transforms(f'local-dir:{tmp_path}')
    x, v = torch.randn(2, 3, 64, 64), loaded.eval().visual
    with torch.no_grad():
        y, grid = v.patch(x)
        y = v.encoder(v.pre_norm(v.prefix(y) + v.positions.table))
        torch.testing.assert_close(loaded.encode_image(x), v.head(v.norm(y.mean(1))))
        torch.testing.assert_close(loaded.encode_image(x), model.encode_image(x))
    assert val.transform.mode == 'shortest' and all(f'ViT-L-16-CL{t}-GAP' in P.list_models() for t in (8, 16, 32))

def test_openai_architecture_in_half_precision(tmp_path):
    cfg = model_config('ViT-B-32-quickgelu').replace(image=Tower(64, 2, 1, 256), text=Tower(48, 2, 4, 192), embed_dim=32, image_size=64, context_length=8, vocab_size=300)
    assert (cfg.act, cfg.pre_norm, cfg.text_pool) == ('quick_gelu', True, 'eot')
    model = perturb(build_clip(cfg))
    out = P.save_pretrained(model, tmp_path / 'out')
    save_file({k: v.half() for k, v in load_file(out / P.FILES[0]).items()}, out / P.FILES[0])
    loaded = P.create_model(f'local-dir:{theirs_only(out)}')
    assert all(p.dtype == torch.float32 for p in loaded.parameters()) and loaded.cfg.act == 'quick_gelu'
    for k, v in model.state_dict().items(): assert torch.equal(loaded.state_dict()[k], v.half().float()), k

def test_layout_of_the_published_repositories(tmp_path, monkeypatch):
    "open_clip_config.json with their words alone, safetensors and .bin side by side; tags lead there."
    out = theirs_only(P.save_pretrained(small(act='gelu', ln_eps=1e-5), tmp_path / 'out'))
    torch.save({k: v + 1 for k, v in load_file(out / P.FILES[0]).items()}, out / 'open_clip_pytorch_model.bin')
    seen = []
    monkeypatch.setattr(F, '_from_hub', lambda hub, name, where, cache_dir: seen.append(where) or out)
    for (name, tag) in P.TAGS: model = P.create_model(name, tag)
    assert len(seen) == 7 and 'UCSC-VLAA/ViT-H-14-CLIPA-336-laion2B' in seen and 'UCSC-VLAA/ViT-bigG-14-CLIPA-datacomp1B' in seen
    assert torch.equal(model.state_dict()['text.embed.weight'], small().state_dict()['text.embed.weight'])
    assert (model.cfg.positions, model.cfg.act, model.cfg.ln_eps, model.cfg.resize_mode) == ('learned', 'gelu', 1e-5, 'squash')

# ---- positions

def test_positions_are_a_choice(saved):
    name, x = f'local-dir:{theirs_only(saved)}', torch.randn(2, 3, 112, 112)
    default, stretched, anew = (P.create_model(name, force_image_size=112, positions=p).eval() for p in (None, 'interpolate', 'recompute'))
    assert (default.cfg.positions, anew.cfg.positions) == ('learned', 'moco')
    z = [m.encode_image(x) for m in (default, stretched, anew)]
    assert torch.equal(z[0], z[1]) and not torch.allclose(z[0], z[2], atol=1e-3)
    direct = load_weights(build_clip(SMALL.replace(image_size=112)), small().state_dict()).eval()
    torch.testing.assert_close(z[2], direct.encode_image(x))
    torch.testing.assert_close(P.create_model(name, positions='recompute').eval().encode_image(x[..., :56, :56]), small().encode_image(x[..., :56, :56]), atol=1e-5, rtol=1e-5)

@pytest.mark.parametrize('form', ['moco', 'mae'])
def test_the_form_of_a_table_is_found_at_every_published_size(form):
    from clipa_nb.patch_embedding import sincos
    for width, grid in ((384, 14), (768, 7), (1024, 6), (1024, 24), (1280, 16), (1664, 16)):
        assert F.form_of(sincos((grid, grid), width, form, 1).half(), 1, lambda side, kind: sincos((side, side), width, kind, 1)) == form

def test_learned_tables_cannot_be_recomputed(tmp_path):
    out = P.save_pretrained(small(positions='learned'), tmp_path / 'out')
    with pytest.raises(UserError, match="learned or fine-tuned: use positions='interpolate'"): P.create_model(f'local-dir:{out}', positions='recompute')

def test_the_default_at_another_size(saved, monkeypatch):
    "A table is stretched where the size changes, whether a directory or a name and a file lead to it; else the configuration decides."
    monkeypatch.setitem(P.ADDED, 'small', SMALL); monkeypatch.setitem(P.ADDED, 'larger', SMALL.replace(image_size=112))
    file, clipa = saved / P.FILES[0], dict(force_preprocess_cfg='clipa')
    for name, more, wanted in ((f'local-dir:{saved}', {}, 'moco'), (f'local-dir:{saved}', dict(force_image_size=112), 'learned'), (f'local-dir:{saved}', dict(force_image_size=56), 'moco'), (f'local-dir:{saved}', dict(force_image_size=112, positions='recompute'), 'moco'),
                               ('small', dict(pretrained=file), 'moco'), ('small', dict(pretrained=file, force_image_size=112), 'learned'), ('larger', dict(pretrained=file), 'learned'), ('larger', dict(pretrained=file, positions='recompute'), 'moco')):
        model = P.create_model(name, **more, **clipa)
        assert model.cfg.positions == wanted, (name, more)
        assert len(model.visual.positions(*[(model.cfg.image_size // 14,) * 2])) == 1 + (model.cfg.image_size // 14)**2
    assert "positions='recompute'" in (saved / 'README.md').read_text()

# ---- preprocessing

def pictures():
    rng = np.random.default_rng(0)
    base = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    for size in ((97, 61), (61, 97), (224, 224), (333, 500), (500, 375), (57, 400), (225, 226)):
        for mode in ('RGB', 'L', 'P', 'RGBA', 'CMYK', 'LA', '1'): yield base.convert(mode).resize(size)

@needs_open_clip
@pytest.mark.parametrize('how', ['openai', 'clipa'])
@pytest.mark.parametrize('size', [84, 224, 61])
def test_evaluation_pixels_equal_open_clip(how, size):
    cfg = SMALL.replace(image_size=size, **P.PREPROCESS[how])
    ours, theirs = P.preprocess(cfg), open_clip.transform.image_transform(size, False, **{k: v for k, v in P.PREPROCESS[how].items()})
    for picture in pictures(): assert torch.equal(ours(picture), theirs(picture)), (picture.mode, picture.size)

def test_the_keywords_are_there_to_be_seen(monkeypatch):
    "`create_model_and_transforms` shows every keyword of `create_model`, with the same default, and hands each on."
    import inspect
    shown = inspect.signature(P.create_model_and_transforms).parameters
    assert {k: p.default for k, p in shown.items()} == {k: p.default for k, p in inspect.signature(P.create_model).parameters.items()}
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in shown.values())
    model, got = small(), {}
    def note(*args, **kw): got.update(real.bind(*args, **kw).arguments); return model
    real = inspect.signature(P.create_model)
    monkeypatch.setattr(P, 'create_model', note)
    given = {k: f'the {k}' for k in shown}
    P.create_model_and_transforms(**given)
    assert got == given
    monkeypatch.undo()
    with pytest.raises(UserError, match='unknown device'): P.create_model_and_transforms('ViT-S-16-CLIPA', None, 'fp32') # open_clip's third word is the precision

def test_preprocessing_travels(tmp_path):
    own = P.preprocess(SMALL.replace(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation='bicubic', resize_mode='shortest'))
    out = P.save_pretrained(small(), tmp_path / 'out', preprocess=own)
    model, train, val = P.create_model_and_transforms(f'local-dir:{out}')
    assert val == own and train.transform.mode == 'crop' and torch.allclose(model.mean.flatten() / 255, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(UserError, match='random crops'): P.save_pretrained(small(), out, preprocess=train)

def test_bytes_and_floats_agree():
    model, picture = small(), Image.fromarray(np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8))
    x = P.preprocess(model.cfg)(picture)[None]
    torch.testing.assert_close(model.encode_image(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]), model.encode_image(x), atol=1e-5, rtol=1e-4)

@pytest.mark.parametrize('written', [None, {}, {'interpolation': 'bicubic'}, {'mean': [0.5] * 3}])
def test_unknown_preprocessing_is_asked_for(saved, written):
    def f(d): d.pop('clipa_nb'); d.pop('preprocess_cfg'); d.update({} if written is None else {'preprocess_cfg': written})
    name = f'local-dir:{edit(saved, f)}'
    with pytest.raises(UserError, match='force_preprocess_cfg'): P.create_model(name)
    assert P.create_model_and_transforms(name, force_preprocess_cfg='clipa')[2].transform.mode == 'squash'
    own = P.create_model_and_transforms(name, force_preprocess_cfg=dict(mean=[0.5] * 3, std=0.25))[2]
    assert (own.mean, own.std, own.transform.interpolation, own.transform.mode) == ((0.5,) * 3, (0.25,) * 3, 'bicubic', 'shortest')

def test_a_bare_file_asks_and_one_with_its_configuration_does_not(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(P.ADDED, 'small', SMALL)
    alone = tmp_path / 'alone.safetensors'; alone.write_bytes((saved / P.FILES[0]).read_bytes())
    with pytest.raises(UserError, match='nothing says how its images were prepared'): P.create_model('small', alone)
    edit(saved, lambda d: d['preprocess_cfg'].update(mean=[0.9] * 3))
    assert P.create_model('small', saved / P.FILES[0]).cfg.mean == (0.9,) * 3

def test_the_format_fills_interpolation_and_mode(saved):
    "A published directory that names mean and std alone means bicubic and the shortest edge."
    edit(saved, lambda d: (d.pop('clipa_nb'), d.update(preprocess_cfg=dict(mean=[0.1] * 3, std=[0.2] * 3))))
    cfg = P.create_model(f'local-dir:{saved}').cfg
    assert (cfg.interpolation, cfg.resize_mode, cfg.mean) == ('bicubic', 'shortest', (0.1,) * 3)

# ---- nothing that is read runs code

class Malicious:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return os.system, (f'touch {self.mark}',)

@pytest.mark.parametrize('kind', ['bin', 'legacy', 'npz', 'torchscript', 'nested'])
def test_a_malicious_file_ends_in_one_line(kind, tmp_path, saved):
    mark, file = tmp_path / 'it-ran', saved / 'open_clip_pytorch_model.bin'
    (older(saved) / P.FILES[0]).unlink()
    if kind == 'bin': torch.save(Malicious(mark), file)
    if kind == 'nested': torch.save({'state_dict': {'visual.proj': torch.ones(2)}, 'optimizer': Malicious(mark)}, file)
    if kind == 'legacy': torch.save(Malicious(mark), file, _use_new_zipfile_serialization=False)
    if kind == 'npz': file = saved / 'x.npz'; np.savez(file, **{'params/t': np.array([Malicious(mark)], dtype=object)})
    if kind == 'torchscript':
        with zipfile.ZipFile(file, 'w') as z: z.writestr('model/constants.pkl', b''); z.writestr('model/data.pkl', b'')
    with pytest.raises(UserError) as e: P.read_state(file)
    assert not mark.exists() and '\n' not in str(e.value) and str(file) in str(e.value)
    if kind != 'npz':
        with pytest.raises(UserError): P.create_model(f'local-dir:{saved}')
        assert not mark.exists()

def test_no_pickle_module_is_needed(saved):
    "A directory of safetensors loads in a process where unpickling is poisoned."
    import subprocess, sys
    code = ("import torch, pickle\nfrom clipa_nb.pretrained import create_model\ndef never(*a, **k): raise SystemExit('a pickle was read')\n"
            f"pickle.load = pickle.loads = pickle.Unpickler = torch.load = never\nprint(create_model('local-dir:{saved}').cfg.embed_dim)")
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=HERE.parent)
    assert done.stdout.strip() == '32', done.stderr

# ---- bad input, each in one line

def refused(match, f, *args, **kw):
    with pytest.raises(UserError, match=match) as e: f(*args, **kw)
    assert '\n' not in str(e.value) and len(str(e.value)) < 900, str(e.value)

def rewrite(folder, f):
    state = load_file(older(folder) / P.FILES[0]); f(state); save_file({k: v.contiguous() for k, v in state.items()}, folder / P.FILES[0]); return f'local-dir:{folder}'

def test_missing_extra_and_misshaped_keys(saved):
    name = rewrite(saved, lambda s: s.update({'visual.porj': s.pop('visual.proj'), 'ln_final.weight': torch.ones(7), 'zebra': torch.ones(1)}))
    refused(r'missing: visual.proj; unknown: visual.porj \(did you mean visual.proj\?\), zebra; of another shape: ln_final.weight \(7,\) for \(48,\)', P.create_model, name)
    name = rewrite(saved, lambda s: [s.pop(k) for k in list(s) if 'resblocks.1' in k])
    refused(r'missing: .* and \d+ more', P.create_model, name)

def test_wrong_architecture_for_the_weights(saved, tmp_path):
    state = P.on_meta(model_config('ViT-B-32')).state_dict()
    refused('their shapes say width 768, 12 blocks, patch 32; .*: ViT-B-32;', P.our_weights, {F.rename(k): v.T if k in F.TRANSPOSED else v for k, v in state.items()}, model_config('ViT-L-14'), 'x.bin')
    refused('do not fit the model', P.create_model, 'ViT-S-16-CLIPA', saved / P.FILES[0])

def test_wrong_heads_of_jax(monkeypatch):
    monkeypatch.setitem(P.ADDED, 'tiny', TINY.replace(image__heads=2))
    refused('3 heads of 8, the model 2', P.create_model, 'tiny', JAX / 'weights_fp32.npz', force_preprocess_cfg='clipa')
    monkeypatch.setitem(P.ADDED, 'tiny', TINY.replace(text__depth=3))
    refused('missing: txt/Transformer/encoderblock_2/LayerNorm_0/scale', P.create_model, 'tiny', JAX / 'weights_fp32.npz', force_preprocess_cfg='clipa')

@pytest.mark.parametrize('keep', [0, 5, 100, 3000, -1])
def test_truncated_safetensors(saved, keep):
    for file in (F.OUR_WEIGHTS, P.FILES[0]):
        raw = (saved / file).read_bytes(); (saved / file).write_bytes(raw[:keep])
        refused(f'{file}.*(cut short|not wholly downloaded|cannot be read)', P.create_model, f'local-dir:{saved}')
        older(saved)

@pytest.mark.parametrize('change, match', [
    (lambda d: d['model_cfg']['vision_cfg'].update(qk_norm=True), 'vision_cfg sets qk_norm=True'),
    (lambda d: d['model_cfg']['vision_cfg'].update(widht=64), "unknown setting 'widht': did you mean width"),
    (lambda d: d['model_cfg']['text_cfg'].update(embed_cls=True), 'text_cfg sets embed_cls=True'),
    (lambda d: d['model_cfg'].update(multimodal_cfg={'width': 3}), 'multimodal_cfg.*CoCa'),
    (lambda d: d['model_cfg']['vision_cfg'].update(timm_model_name='vit_base_patch16_224'), 'timm_model_name.*timm'),
    (lambda d: d['model_cfg']['text_cfg'].update(hf_model_name='roberta'), 'hf_model_name.*Hugging Face'),
    (lambda d: d['model_cfg']['vision_cfg'].update(layers=[3, 4, 6, 3]), 'layers=.*expected a number'),
    (lambda d: d['model_cfg']['vision_cfg'].update(image_size=[56, 112]), 'image_size=.*expected a number'),
    (lambda d: d['model_cfg']['vision_cfg'].update(width='64'), "width='64'"),
    (lambda d: d['model_cfg']['vision_cfg'].update(width=None), 'width=None'),
    (lambda d: d['model_cfg']['vision_cfg'].update(head_width=20), 'not divisible by head_width 20'),
    (lambda d: d['model_cfg']['vision_cfg'].update(norm_kwargs={'bias': False}), 'only eps'),
    (lambda d: d['model_cfg']['text_cfg'].update(pool_type='max'), "unknown pool_type 'max'"),
    (lambda d: d['model_cfg']['vision_cfg'].update(pool_type='none'), "unknown image pool 'none'"),
    (lambda d: d['preprocess_cfg'].update(resize_mode='longest'), "'longest'"),
    (lambda d: d['preprocess_cfg'].update(men=[0.5]), "did you mean mean"),
    (lambda d: d['preprocess_cfg'].update(mean=[0.5]), 'three numbers'),
    (lambda d: d['preprocess_cfg'].update(std=[0.5, 0, 0.5]), 'three numbers'),
    (lambda d: d.pop('model_cfg'), 'no model_cfg'),
    (lambda d: d['model_cfg'].pop('text_cfg'), 'no model_cfg with vision_cfg and text_cfg'),
    (lambda d: d.update(modle_cfg={}), 'did you mean model_cfg'),
])
def test_configuration_mistakes(saved, change, match):
    refused(match, P.create_model, f'local-dir:{edit(saved, lambda d: (d.pop("clipa_nb"), change(d)))}')

def test_two_halves_that_disagree(saved):
    refused('disagree.*image.width 128 and 64', P.create_model, f'local-dir:{edit(saved, lambda d: d["model_cfg"]["vision_cfg"].update(width=128))}')
    refused('unknown field of ModelConfig', P.create_model, f'local-dir:{edit(saved, lambda d: d["clipa_nb"].update(widht=3))}')

def test_json_that_is_none(saved):
    for text, match in (('{"model_cfg": {', 'cannot be read as JSON'), ('[1, 2]', 'list, expected a JSON object'), ('', 'cannot be read as JSON')):
        (saved / 'open_clip_config.json').write_text(text); refused(match, P.create_model, f'local-dir:{saved}')
    (saved / 'open_clip_config.json').write_bytes(b'\xff\xfe\x00'); refused('cannot be read as JSON', P.create_model, f'local-dir:{saved}')

@pytest.mark.parametrize('rows', [16, 18, 1, 0])
def test_position_tables_that_are_not_square(saved, rows):
    name = rewrite(saved, lambda s: s.update({'visual.positional_embedding': torch.zeros(rows, 64)}))
    refused(f'{rows} rows, expected 1 . a square', P.create_model, name)
    refused(f'{rows} rows, expected 1 . a square', P.create_model, f'local-dir:{theirs_only(saved)}')

def test_a_wrong_table_is_not_passed_over(saved):
    refused("not the 'moco' sin-cos one", P.create_model, rewrite(saved, lambda s: s.update({'visual.positional_embedding': s['visual.positional_embedding'] + 0.1})))
    assert P.create_model(f'local-dir:{saved}', positions='interpolate').cfg.positions == 'learned'

def test_directories(tmp_path, saved):
    refused('is not a directory', P.create_model, f'local-dir:{tmp_path}/nowhere')
    (tmp_path / 'empty').mkdir(); refused('holds no open_clip_config.json', P.create_model, f'local-dir:{tmp_path}/empty')
    (tmp_path / 'empty' / 'config.json').write_text('{}'); refused('transformers library', P.create_model, f'local-dir:{tmp_path}/empty')
    refused('local-dir:PATH', P.create_model, 'local-dir:'); refused('local-dir:PATH', P.create_model, 's3://bucket')
    (older(saved) / P.FILES[0]).rename(saved / f'{P.FILES[0]}.incomplete'); refused('incomplete… was not wholly downloaded|was not wholly downloaded', P.create_model, f'local-dir:{saved}')
    (saved / f'{P.FILES[0]}.incomplete').unlink(); refused('holds a configuration but no weights', P.create_model, f'local-dir:{saved}')
    (saved / P.FILES[0]).write_text('version https://git-lfs.github.com/spec/v1\n'); refused('Git LFS pointer', P.create_model, f'local-dir:{saved}')

def test_names_and_arguments(tmp_path):
    refused('did you mean ViT-H-14-CLIPA', P.create_model, 'ViT-H-14-CILPA'); refused('did you mean', P.get_model_config, 'ViT-B-61')
    refused('the path of a file', P.create_model, 'ViT-B-16', 'openia'); refused('did you mean datacomp1b', P.create_model, 'ViT-H-14-CLIPA', 'datacomp')
    refused('unknown precision', P.create_model, 'ViT-B-16', precision='fp8')
    refused('unknown preprocessing', P.create_model, 'ViT-B-16', force_preprocess_cfg='imagenet21k')
    refused('not divisible', P.create_model, 'ViT-B-16', force_image_size=100)
    assert P.named_config('ViT-B/32-quickgelu') == model_config('ViT-B-32-quickgelu')

@pytest.mark.filterwarnings('default')
def test_a_tag_beside_a_directory_is_said_to_be_ignored(saved):
    with pytest.warns(UserWarning, match="pretrained='laion2b' is ignored"): P.create_model(f'local-dir:{saved}', 'laion2b')

def test_state_that_is_no_state(tmp_path):
    for i, (what, match) in enumerate((([torch.ones(1)], "holds 'list'"), ({'a': torch.ones(1), 'b': 3}, "holds 'b'"), (torch.ones(2), "holds 'Tensor'"))):
        torch.save(what, tmp_path / f'{i}.bin'); refused(match, P.read_state, tmp_path / f'{i}.bin')

class Hub:
    "A stand-in for huggingface_hub: an error to raise, and what is in the cache."
    def __init__(self, error=None, files=(), copy=None): self.error, self.files, self.copy = error, files, copy
    def list_repo_files(self, where):
        if self.error: raise self.error
        return list(self.files)
    def snapshot_download(self, where, cache_dir=None, allow_patterns=None, local_files_only=False):
        if local_files_only and not self.copy: raise FileNotFoundError('nothing cached')
        return str(self.copy)
    def scan_cache_dir(self, cache_dir=None): return types.SimpleNamespace(repos=[types.SimpleNamespace(repo_id='org/old'), types.SimpleNamespace(repo_id='a/b')])

def test_hub_says_what_went_wrong_and_what_is_cached(monkeypatch, saved):
    class RepositoryNotFoundError(Exception): pass
    gone = OSError('x'); gone.response = types.SimpleNamespace(status_code=404)
    for error, match in ((RepositoryNotFoundError('404'), 'does not exist on the Hub'), (gone, 'does not exist on the Hub'), (ConnectionError('no route'), r'cannot be reached \(ConnectionError\)')):
        monkeypatch.setattr(F, 'need', lambda *a, error=error: Hub(error))
        refused(match + r'.*cached: a/b, org/old', P.create_model, 'hf-hub:org/new')
    monkeypatch.setattr(F, 'need', lambda *a: Hub(ConnectionError(), copy=saved))
    assert P.create_model('hf-hub:org/old').cfg == SMALL
    (saved / F.OUR_WEIGHTS).unlink(); refused('holds a configuration but no weights: expected model.safetensors', P.create_model, 'hf-hub:org/old')
    (without_ours(saved) / P.FILES[0]).unlink(); refused('holds a configuration but no weights', P.create_model, 'hf-hub:org/old')
    monkeypatch.setattr(F, 'need', lambda *a: Hub(files=['config.json', 'model.safetensors']))
    refused('not a model in open_clip layout', P.create_model, 'hf-hub:org/transformers')

def test_real_hub_library_without_network(monkeypatch, tmp_path):
    constants = pytest.importorskip('huggingface_hub.constants', reason='the extra [hub] is not installed')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    refused('is not cached', P.create_model, 'hf-hub:nobody/nothing', cache_dir=tmp_path)

# ---- out

def test_saving_is_exact_whole_and_replaces_only_models(tmp_path):
    model = small(image_strategy='random', image_ratio=0.5, checkpointing='full')
    out = P.save_pretrained(model, tmp_path / 'out', recipe={'name': 'r', 'steps': 5}, metrics={'top1': 0.123456})
    card = (out / 'README.md').read_text()
    assert '| top1 | 0.1235 |' in card and '"steps": 5' in card and card.startswith('---\nlibrary_name: open_clip')
    loaded = P.create_model(f'local-dir:{out}')
    assert loaded.cfg == SMALL and all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    P.save_pretrained(loaded, out) # over the very file it is mapped from
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), P.create_model(f'local-dir:{out}').state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine' / 'thesis.tex').write_text('x')
    refused('holds no model', P.save_pretrained, model, tmp_path / 'mine')
    class Broken:
        def save(self, d): raise OSError('disk full')
    before = (out / P.FILES[0]).read_bytes()
    with pytest.raises(OSError): P.save_pretrained(small(1), out, tokenizer=Broken())
    assert (out / P.FILES[0]).read_bytes() == before and sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'out']

def test_wrapped_models_are_unwrapped(tmp_path):
    class Wrapped(torch.nn.Module):
        def __init__(self, m): super().__init__(); self.module = m
    P.save_pretrained(Wrapped(small()), tmp_path / 'out'); assert P.create_model(f'local-dir:{tmp_path}/out').cfg == SMALL
    other = small(); other.visual.head = torch.nn.Linear(64, 5, bias=False)
    refused(r'not what its configuration describes \(of another shape: visual.head.weight \(5, 64\) for \(32, 64\)\)', P.save_pretrained, other, tmp_path / 'y')
    refused('expected a CLIP model', P.save_pretrained, torch.nn.Linear(1, 1), tmp_path / 'x')

@pytest.mark.parametrize('change, match', [
    (lambda m: setattr(m.visual, 'pool', First()), r'visual.pool is First\(\), not Mean\(first=1\)'),
    (lambda m: setattr(m.text, 'mask', TEXT_MASKS['causal']), 'text is TextTower.*mask_causal.*not TextTower'),
    (lambda m: setattr(m.visual.encoder.blocks[0], 'ln_1', torch.nn.LayerNorm(64, 1e-3)), 'visual.encoder.blocks.0.ln_1 is LayerNorm.*eps=0.001'),
    (lambda m: setattr(m.text.encoder.blocks[1], 'mlp', type(m.text.encoder.blocks[1].mlp)(48, 192, 'gelu')), 'text.encoder.blocks.1.mlp is MLP'),
    (lambda m: setattr(m.unit, 'eps', 0.5), 'unit is Unit'),
], ids=['pool', 'mask', 'eps', 'act', 'unit'])
def test_exchanged_parts_are_not_saved_as_if_they_were_not(change, match, tmp_path):
    model = small(); change(model)
    refused(match, P.save_pretrained, model, tmp_path / 'out'); assert not (tmp_path / 'out').exists()

def test_what_concerns_a_run_alone_does_not_keep_a_model_from_being_saved(tmp_path):
    for i, more in enumerate((dict(image_strategy='grid', image_ratio=0.75), dict(attention='sdpa', checkpointing='selective'), dict(text_pool='eos', eos_id=7))): P.save_pretrained(small(**more), tmp_path / str(i))
    model = small(); model.set_grad_checkpointing(); model.lock_image_tower(1); model.double()
    P.save_pretrained(model, tmp_path / 'x')

def test_loaded_models_train(saved):
    "Mapped weights are private: training changes neither the file nor another model."
    before = (saved / P.FILES[0]).read_bytes()
    a, b = P.create_model(f'local-dir:{saved}'), P.create_model(f'local-dir:{saved}')
    zi, zt, scale = a(torch.randn(2, 3, 56, 56), torch.randint(1, 300, (2, 8)))
    (scale * (zi * zt).sum()).backward()
    assert all(p.grad is not None for p in a.parameters())
    torch.optim.SGD(a.parameters(), 0.1).step()
    assert (saved / P.FILES[0]).read_bytes() == before and not torch.equal(a.text.embed.weight, b.text.embed.weight)
    assert torch.equal(b.text.embed.weight, small().text.embed.weight)

def test_loaded_parameters_are_contiguous_and_the_file_is_not_copied(saved, monkeypatch):
    read, files = P.read_state, {}
    monkeypatch.setattr(P, 'read_state', lambda path: files.update(read(path)) or dict(files))
    for name in (f'local-dir:{saved}', f'local-dir:{theirs_only(saved)}'):
        files.clear(); model = P.create_model(name)
        assert all(p.is_contiguous() for p in model.parameters())
        assert torch.nn.utils.parameters_to_vector(model.parameters()).numel() == sum(p.numel() for p in model.parameters())
        own = {k for k, p in model.named_parameters() if p.data_ptr() != files[F.rename(k)].data_ptr()}
        assert own == set(F.TRANSPOSED) # all others are the mapped pages of the file
    save_file(model.state_dict(), saved / 'flat.safetensors')

@pytest.mark.parametrize('dtype', ['fp32', 'bf16'])
def test_parameters_from_jax_are_contiguous(dtype, monkeypatch):
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in tiny(dtype, monkeypatch).parameters())

def test_push_to_hub(monkeypatch, saved):
    sent = {}
    def upload(repo_id, folder_path, **kw): sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()}, kw=kw); return f'https://hub/{repo_id}'
    hub = types.SimpleNamespace(create_repo=lambda *a, **kw: sent.update(made=kw), upload_folder=upload)
    monkeypatch.setattr(P, 'need', lambda *a: hub)
    train_wordpiece(['a red star'], 60, 8).save(saved)
    assert P.push_to_hub(saved, 'me/it', private=True, metrics={'top1': 0.5}, license='mit').endswith('me/it')
    words = json.loads(sent['open_clip_config.json'])
    assert words['model_cfg']['text_cfg']['hf_tokenizer_name'] == 'me/it' and sent['made']['private'] and ModelConfig.from_dict({k: v for k, v in json.loads(sent['config.json']).items() if k != 'tokenizer'}) == SMALL
    assert b'license: mit' in sent['README.md'] and b"'hf-hub:me/it'" in sent['README.md'] and b'| top1 | 0.5 |' in sent['README.md']
    assert json.loads((saved / 'open_clip_config.json').read_text())['model_cfg']['text_cfg']['hf_tokenizer_name'] == 'bert-base-uncased' # the directory stays as it was
    P.push_to_hub(small(), 'me/two'); assert sent[P.FILES[0]]
    hub.create_repo = lambda *a, **kw: (_ for _ in ()).throw(PermissionError('401 Unauthorized\nmore'))
    refused('me/it was not uploaded: PermissionError: 401 Unauthorized; log in', P.push_to_hub, saved, 'me/it')

def test_registry(tmp_path):
    (tmp_path / 'ViT-Mine.json').write_text(json.dumps(dict(embed_dim=32, vision_cfg=dict(width=64, layers=2, image_size=64), text_cfg=dict(width=64, heads=2, layers=2))))
    try:
        P.add_model_config(tmp_path)
        assert 'ViT-Mine' in P.list_models() and P.get_model_config('ViT-Mine')['vision_cfg']['layers'] == 2
        assert P.create_model('ViT-Mine').text.positions.shape == (77, 64)
        (tmp_path / 'A-bad.json').write_text('{}'); refused('A-bad.json: .*no model_cfg', P.add_model_config, tmp_path)
    finally: P.ADDED.pop('ViT-Mine', None)
    (tmp_path / 'none').mkdir(); refused('holds no .json', P.add_model_config, tmp_path / 'none')

def test_options_of_the_model(saved):
    name = f'local-dir:{saved}'
    x, ids = torch.randn(2, 3, 56, 56), torch.randint(1, 300, (2, 8))
    assert set(P.create_model(name, output_dict=True)(x, ids)) == {'image_features', 'text_features', 'logit_scale'}
    assert P.create_model(name, force_quick_gelu=True).cfg.act == 'quick_gelu'
    dropping = P.create_model(name, force_patch_dropout=0.5)
    assert dropping.training and dropping.visual(x)[1]['ids'].shape == (2, 8) and dropping.eval().visual(x)[1]['ids'].shape == (2, 16)
    assert P.create_model(f'local-dir:{edit(saved, lambda d: (d.pop("clipa_nb"), d["model_cfg"]["vision_cfg"].update(patch_dropout=0.25)))}').cfg.image_ratio == 0.25
    half = P.create_model(name, precision='bf16').eval()
    assert {k for k, p in half.named_parameters() if p.dtype != torch.bfloat16} == {'logit_scale'}
    assert half.encode_image(x).dtype == torch.bfloat16 and (half.encode_image(x, normalize=True) - small().encode_image(x, normalize=True)).abs().max() < 0.05

@pytest.mark.parametrize('precision', ['bf16', 'pure_bf16'])
def test_the_temperature_in_half_precision(precision, saved):
    "bf16 keeps temperature and bias in fp32, as open_clip does under that name; pure_bf16 rounds them, as open_clip does."
    model = small(init_bias=-10.003); model.logit_scale.data.fill_(math.log(100)); model.logit_bias.data.fill_(-10.003); P.save_pretrained(model, saved)
    ours, x, ids = P.create_model(f'local-dir:{saved}', precision=precision).eval(), torch.randn(2, 3, 56, 56), torch.randint(1, 300, (2, 8))
    zi, zt, scale, bias = ours(x, ids)
    assert (abs(float(scale) - 100) < 1e-2) == (abs(float(bias) + 10.003) < 1e-5) == (precision == 'bf16')
    assert torch.equal(ours.encode_image((x * 0 + 3).byte()), ours.encode_image((x * 0 + 3).byte())) and (zi - model(x, ids)[0]).abs().max() < 0.05
    fresh = P.create_model('ViT-S-16-CLIPA', precision=precision, force_image_size=32)
    assert fresh.logit_scale.dtype == ours.logit_scale.dtype and copy.deepcopy(fresh)(torch.zeros(1, 3, 32, 32), ids[:1])[0].isfinite().all()
    if open_clip:
        theirs = open_clip.create_model(f'local-dir:{saved}', precision=precision).eval()
        assert torch.equal(scale, theirs.logit_scale.exp()) and theirs.logit_scale.dtype == ours.logit_scale.dtype

def test_tokenizers_belong(saved, tmp_path):
    train_wordpiece(['a red star'] * 3, 60, 8).save(saved)
    assert P.get_tokenizer(f'local-dir:{saved}', 5)(['a red star']).shape == (1, 5)
    edit(saved, lambda d: (d.pop('clipa_nb'), d['model_cfg']['text_cfg'].update(vocab_size=10)))
    refused('10', P.get_tokenizer, f'local-dir:{saved}')
    edit(saved, lambda d: d['model_cfg']['text_cfg'].update(tokenizer_mode='clips'))
    refused("tokenizer_mode='clips'", P.get_tokenizer, f'local-dir:{saved}')

def test_a_length_of_zero_is_refused(saved):
    train_wordpiece(['a red star'] * 3, 60, 8).save(saved)
    refused('context length 0 is too short', P.get_tokenizer, f'local-dir:{saved}', context_length=0)
    if open_clip: refused('context length 0 is too short', P.get_tokenizer, 'ViT-B-32', 0) # it brings the vocabulary

@pytest.mark.parametrize('kwargs, match', [
    ({'clean': 'canonicalize', 'strip_sep_token': True}, "captions cleaned by 'canonicalize'"), ({'strip_sep_token': False}, r'asks for \[SEP\]'), ({}, r'asks for \[SEP\]'),
    ({'reduction_mask': 'syntax', 'strip_sep_token': True}, "unknown argument in tokenizer_kwargs 'reduction_mask'"), ({'clean': 'canon'}, "unknown way to clean captions 'canon'"), (3, 'expected a JSON object')])
def test_words_about_a_tokenizer_are_honoured_or_refused(kwargs, match, saved):
    train_wordpiece(['a red star'] * 3, 60, 8).save(saved)
    edit(saved, lambda d: d['model_cfg']['text_cfg'].update(tokenizer_kwargs=kwargs))
    refused(match, P.get_tokenizer, f'local-dir:{saved}')
    if 'cleaned' not in match and 'SEP' not in match: refused(match, P.create_model, f'local-dir:{saved}')
    else: assert P.create_model(f'local-dir:{saved}').cfg == SMALL # the weights can be used; the ids must come from elsewhere
    edit(saved, lambda d: d['model_cfg']['text_cfg'].update(tokenizer_kwargs={'clean': 'whitespace', 'strip_sep_token': True}))
    assert P.get_tokenizer(f'local-dir:{saved}')(['a red star']).shape == (1, 8)

def test_kinds_of_positions_are_named(saved):
    for kind, right in (('rope', False), ('none', False), ('learnable', True)):
        edit(theirs_only(saved) if 'clipa_nb' in P.config_in(saved) else saved, lambda d: d['model_cfg']['vision_cfg'].update(pos_embed_type=kind))
        if right: assert P.create_model(f'local-dir:{saved}').cfg.positions == 'learned'
        else: refused(f"unknown pos_embed_type '{kind}'", P.create_model, f'local-dir:{saved}')

# ---- wrong values, wherever they stand

@pytest.mark.parametrize('path, value, match', [
    ('clipa_nb.act', 'gelu_tahn', 'did you mean gelu_tanh'), ('clipa_nb.text_pool', 'lst', 'did you mean last'), ('clipa_nb.image.heads', 0, r'clipa_nb\.image\.heads=0'), ('clipa_nb.text.heads', 0, r'clipa_nb\.text\.heads=0'), ('clipa_nb.ln_eps', 'x', "ln_eps: found 'x', expected a number"),
    ('vision_cfg.head_width', 0, r'vision_cfg\.head_width=0: expected a whole number of at least 1'), ('text_cfg.heads', 0, r'text_cfg\.heads=0'), ('vision_cfg.patch_size', 0, r'vision_cfg\.patch_size=0'),
    ('vision_cfg.mlp_ratio', None, 'mlp_ratio=None: expected a number'), ('vision_cfg.layers', 1.5, r'vision_cfg\.layers=1\.5'), ('text_cfg.act_kwargs', 'tanh', r"text_cfg\.act_kwargs='tanh'"),
    ('text_cfg.width', -8, r'text_cfg\.width=-8'), ('preprocess_cfg', [0.5], 'preprocessing is list'), ('preprocess_cfg.mean', 'x', 'three numbers'), ('preprocess_cfg.std', [None] * 3, 'three numbers')])
def test_wrong_values_are_told_with_their_key(path, value, match, saved):
    def f(d):
        if not path.startswith('clipa_nb'): d.pop('clipa_nb')
        *way, last = ['model_cfg', *path.split('.')] if '_cfg.' in path and 'preprocess' not in path else path.split('.')
        for k in way: d = d[k]
        d[last] = value
    refused(match, P.create_model, f'local-dir:{edit(saved, f)}')

@pytest.mark.parametrize('half', ['model_cfg', 'clipa_nb', 'config.json'])
def test_no_wrong_value_ends_in_a_traceback(half, saved, monkeypatch):
    "Every setting at every odd value: understood, or one line."
    whole, read = F.own_config(saved), lambda d: P.understood_ours(d, saved.parent)
    if half != 'config.json': whole, read = P.config_in(older(saved)), P.understood
    if half == 'model_cfg': whole.pop('clipa_nb'); whole['model_cfg'] = F.MODEL | dict(vision_cfg=F.VISION | whole['model_cfg']['vision_cfg'], text_cfg=F.TEXT | whole['model_cfg']['text_cfg'])
    def ways(d, path=()):
        for k, v in d.items():
            yield (*path, k)
            if isinstance(v, dict): yield from ways(v, (*path, k))
    n = 0
    for path in ways(whole):
        for value in (None, -1, 0, 1.5, 'x', [], {}, True, float('nan'), [1, 2, 3]):
            d = json.loads(json.dumps(whole)); inner = d
            for k in path[:-1]: inner = inner[k]
            inner[path[-1]] = value
            try: read(d)
            except UserError as e: assert '\n' not in str(e); n += 1
    assert n > 200

def test_arguments_of_the_wrong_kind(saved, tmp_path):
    name = f'local-dir:{saved}'
    for odd in ((56, 112), '56', 0, -14, True, 56.): refused('force_image_size=.*expected one integer', P.create_model, name, force_image_size=odd)
    for odd in ('a', 0, 2.5): refused('force_context_length=.*expected one integer', P.create_model, name, force_context_length=odd)
    for odd in (1.5, 1., -0.1, '0.5'): refused('force_patch_dropout=.*expected a share', P.create_model, name, force_patch_dropout=odd)
    for odd in (3, dict(mean='a', std=1)): refused('preprocess', P.create_model, name, force_preprocess_cfg=odd)
    for f in (P.create_model, P.get_tokenizer, P.get_model_config): refused("expected a name; for a directory write 'local-dir:", f, saved)
    refused('expected a Preprocess', P.save_pretrained, small(), tmp_path / 'k', preprocess=lambda image: image)
    for odd in ('50%', None): refused('metrics: top1 is .*, expected a number', P.save_pretrained, small(), tmp_path / 'k', metrics={'top1': odd})
    assert '| top1 | 0.5 |' in F.model_card(SMALL.to_dict(), metrics={'top1': torch.tensor(0.5)})
    refused('README.md is a file, so', P.save_pretrained, small(), saved / 'README.md' / 'x' / 'y')
    for train in (False, True): refused('cannot be decoded', P.preprocess(SMALL, train), b'garbage')
    whole = io.BytesIO(); Image.new('RGB', (90, 70)).save(whole, 'PNG'); refused('cannot be decoded', P.preprocess(SMALL), whole.getvalue()[:60])
    assert not (tmp_path / 'k').exists()
    (older(saved) / 'open_clip_config.json').write_text('{"model_cfg": {}}'); refused('holds no text_cfg', P.get_tokenizer, name)

def test_a_registered_architecture_takes_the_name(tmp_path, monkeypatch):
    monkeypatch.setattr(P, 'ADDED', {}); monkeypatch.setattr(P, 'ADDED_WORDS', {}, raising=False)
    (tmp_path / 'ViT-B-32.json').write_text(json.dumps(dict(embed_dim=32, vision_cfg=dict(width=64, layers=2, image_size=64), text_cfg=dict(width=64, heads=2, layers=2))))
    assert P.get_model_config('ViT-B-32')['vision_cfg']['width'] == 768
    P.add_model_config(tmp_path)
    assert P.get_model_config('ViT-B-32')['vision_cfg']['width'] == P.get_model_config('ViT-B/32')['vision_cfg']['width'] == 64
    assert P.create_model('ViT-B-32').visual.head.weight.shape == (32, 64)

@pytest.mark.filterwarnings('default')
def test_a_file_follows_the_name_and_says_where_its_directory_differs(tmp_path, monkeypatch):
    monkeypatch.setitem(P.ADDED, 'small', SMALL)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); out = theirs_only(P.save_pretrained(small(act='gelu', ln_eps=1e-5), tmp_path / 'out')); same = P.save_pretrained(small(), tmp_path / 'same')
    with pytest.warns(UserWarning, match='small is followed, though .* says act gelu for gelu_tanh, ln_eps 1e-05 for 1e-06: load local-dir:'): model = P.create_model('small', out / P.FILES[0])
    assert (model.cfg.act, P.create_model(f'local-dir:{out}').cfg.act) == ('gelu_tanh', 'gelu')
    edit(out, lambda d: d['model_cfg']['vision_cfg'].update(timm_model_name='vit')) # cannot be compared: only the preprocessing is read
    with warnings.catch_warnings(): warnings.simplefilter('error'); P.create_model('small', out / P.FILES[0]); P.create_model('small', same / P.FILES[0])

@pytest.mark.filterwarnings('default')
def test_without_a_network_the_cached_copy_is_said_and_the_log_is_quiet(monkeypatch, saved):
    class Loud(Hub):
        def list_repo_files(self, where): logging.getLogger('huggingface_hub.utils._http').warning('Retrying in 1s'); raise self.error
    lines, handler = [], logging.Handler(); handler.emit = lambda r: lines.append(r.getMessage())
    log = logging.getLogger('huggingface_hub'); log.addHandler(handler); level = log.level
    try:
        monkeypatch.setattr(F, 'need', lambda *a: Loud(ConnectionError(), copy=saved))
        with pytest.warns(UserWarning, match=r'cannot be reached \(ConnectionError\): the copy in the cache is used; HF_HUB_OFFLINE=1'): P.create_model('hf-hub:org/old')
        monkeypatch.setattr(F, 'need', lambda *a: Loud(ConnectionError()))
        refused('HF_HUB_OFFLINE=1 saves the waiting', P.create_model, 'hf-hub:org/new')
        class OfflineModeIsEnabled(ConnectionError): pass
        monkeypatch.setattr(F, 'need', lambda *a: Loud(OfflineModeIsEnabled(), copy=saved))
        with warnings.catch_warnings(): warnings.simplefilter('error'); assert P.create_model('hf-hub:org/old').cfg == SMALL
        assert lines == [] and log.level == level
        log.warning('after'); assert lines == ['after']
    finally: log.removeHandler(handler)

# ---- every model with a configuration: config.json, and our weights

class Decoding(CLIP):
    "A module more, and what is hard to build on the meta device: a buffer that is not stored, and weights with two names."
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        t = self.cfg.text.width
        self.decoder = torch.nn.Linear(t, self.cfg.more)
        self.words = torch.nn.Linear(t, self.cfg.vocab_size, bias=False)
        if self.cfg.tied: self.words.weight = self.text.embed.weight
        self.register_buffer('steps', torch.arange(3), persistent=self.cfg.stored)
        if self.cfg.asks: self.asked = float(torch.ones(1) * 2) # impossible on the meta device

    def decode(self, ids): return self.words(self.text(ids)[1]['tokens']) + self.steps.sum()

@dataclass(frozen=True)
class DecodingConfig(ModelConfig):
    more: int = 5
    tied: bool = False
    stored: bool = True
    asks: bool = False
    def build(self, output_dict=False): return Decoding.from_config(self, output_dict)

class OneTower(CLIP):
    def encode_text(self, text, normalize=False, draw=None): return self.encode_image(text, normalize, draw)

@dataclass(frozen=True)
class OneTowerConfig(ModelConfig):
    def build(self, output_dict=False): return OneTower.from_config(self, output_dict, text=None)

class Cold(CLIP):
    def __init__(self, *args, **kw): super().__init__(*args, **kw); self.logit_scale = None

@dataclass(frozen=True)
class ColdConfig(ModelConfig):
    def build(self, output_dict=False): return Cold(image_tower(self), text_tower(self), self, output_dict)

@dataclass(frozen=True)
class EitherConfig(Config):
    "Not even a CLIP."
    width: int = 3
    names: tuple[str, ...] = ('a', 'b')
    def build(self, output_dict=False):
        model = torch.nn.Sequential(torch.nn.Linear(self.width, 2), torch.nn.BatchNorm1d(2)); model.cfg = self
        return model

def of_kind(kind, **more): return perturb(kind(**{**vars(SMALL), **more}).build())

def same(a, b):
    assert type(a) is type(b) and a.cfg == b.cfg and a.state_dict().keys() == b.state_dict().keys()
    for k, v in a.state_dict().items(): assert torch.equal(v, b.state_dict()[k]), k

KINDS = {'plain': (ModelConfig, {}), 'learned': (ModelConfig, dict(positions='learned')), 'without a class token': (ModelConfig, dict(cls=False)), 'module': (DecodingConfig, dict(more=7)), 'tied': (DecodingConfig, dict(tied=True)), 'not stored': (DecodingConfig, dict(stored=False)),
         'not on meta': (DecodingConfig, dict(asks=True)), 'one tower': (OneTowerConfig, {}), 'cold': (ColdConfig, {})}

@pytest.mark.parametrize('name', KINDS)
def test_every_kind_comes_back(name, tmp_path):
    kind, more = KINDS[name]
    model = of_kind(kind, **more)
    out = P.save_pretrained(model, tmp_path / 'out', recipe={'name': 'r'})
    theirs = kind is ModelConfig and model.cfg.cls
    assert {p.name for p in out.iterdir()} == {'config.json', 'model.safetensors', 'README.md'} | ({F.CONFIG, P.FILES[0]} if theirs else set())
    assert json.loads((out / 'config.json').read_text())['kind'] == kind_name(kind) and load_file(out / 'model.safetensors').keys() == model.state_dict().keys()
    before = torch.get_rng_state()
    loaded, train, val = P.create_model_and_transforms(f'local-dir:{out}')
    assert torch.equal(before, torch.get_rng_state()) and loaded.training and not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    same(model, loaded); assert val == P.preprocess(SMALL) and train.transform.mode == 'crop'
    x, ids = torch.randn(2, 3, 56, 56), torch.randint(1, 300, (2, 8))
    assert torch.equal(loaded.eval().encode_image(x), model.encode_image(x))
    if kind is OneTowerConfig: assert torch.equal(loaded.encode_text(x), model.encode_image(x)) and loaded.text is None
    else: assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))
    if kind is DecodingConfig: assert torch.equal(loaded.decode(ids), model.decode(ids)) and (loaded.words.weight is loaded.text.embed.weight) == model.cfg.tied
    half = P.create_model(f'local-dir:{out}', precision='bf16')
    assert {k for k, p in half.named_parameters() if p.dtype != torch.bfloat16} <= {'logit_scale'}
    same(P.create_model(f'local-dir:{P.save_pretrained(loaded, out)}'), model) # over itself
    if not theirs:
        with pytest.raises(Exception): open_clip.create_model(f'local-dir:{out}')

def test_a_model_that_is_no_clip_comes_back(tmp_path):
    model = EitherConfig(4).build(); model(torch.randn(9, 4)); model.eval()
    with pytest.warns(UserWarning, match='open_clip cannot load this model: it has no words for the kind `test_pretrained:EitherConfig`'): out = P.save_pretrained(model, tmp_path / 'out', metrics={'top1': 0.5}, data='my own')
    loaded, x = P.create_model(f'local-dir:{out}').eval(), torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x)) and loaded[1].num_batches_tracked == 1 and loaded.cfg == EitherConfig(4)
    P.write_card(out, metrics={'top1': 0.75}, data='somebody\'s'); card = (out / 'README.md').read_text()
    assert 'somebody\'s' in card and 'my own' not in card and '| top1 | 0.75 |' in card and 'open_clip cannot load this model' in card and '- width: `4`' in card
    refused('EitherConfig does not say how images are prepared .image_size, mean', P.create_model_and_transforms, f'local-dir:{out}')
    refused('open_clip has no words for this model', P.get_model_config, f'local-dir:{out}'); refused('unknown field of EitherConfig .image_size.', P.create_model, f'local-dir:{out}', force_image_size=8)

def test_towers_of_other_libraries_come_back(tmp_path):
    pytest.importorskip('timm')
    cfg = TrunkConfig(**dict(vars(SMALL), image_size=64), image_trunk='timm:resnet18')
    model = cfg.build(); model(torch.randn(2, 3, 64, 64), torch.randint(1, 300, (2, 8))); model.eval() # batch norms have seen something
    loaded = P.create_model(f'local-dir:{P.save_pretrained(model, tmp_path / "out")}').eval()
    same(model, loaded); x = torch.randn(2, 3, 64, 64); assert torch.equal(model.encode_image(x), loaded.encode_image(x))
    swin = TrunkConfig(**dict(vars(SMALL), image_size=64), image_trunk='timm:swin_tiny_patch4_window7_224', image_trunk_args=dict(img_size=64, depths=[1, 1])).build().eval() # tables that are not stored
    again = P.create_model(f'local-dir:{P.save_pretrained(swin, tmp_path / "swin")}').eval()
    assert torch.equal(swin.encode_image(x), again.encode_image(x))

def test_a_text_tower_of_another_library_comes_back_without_a_download(tmp_path):
    pytest.importorskip('transformers')
    bert = dict(model_type='bert', hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=300, max_position_embeddings=16)
    model = TrunkConfig(**vars(SMALL), text_trunk=bert).build().eval()
    loaded, ids = P.create_model(f'local-dir:{P.save_pretrained(model, tmp_path / "out")}').eval(), torch.randint(1, 300, (2, 8))
    assert torch.equal(model.encode_text(ids), loaded.encode_text(ids))

def test_a_model_must_be_what_its_configuration_builds(tmp_path):
    other = small(); other.extra = torch.nn.Linear(2, 2)
    refused('unknown: extra.weight, extra.bias.*give it a configuration whose `build` makes it', P.save_pretrained, other, tmp_path / 'x')
    other = of_kind(OneTowerConfig); other.cfg = SMALL
    refused('missing: text.positions', P.save_pretrained, other, tmp_path / 'x')
    class Same(CLIP): pass
    refused('the model is Same, not CLIP', P.save_pretrained, Same.from_config(SMALL), tmp_path / 'x')
    @dataclass(frozen=True)
    class DecodingConfig(ModelConfig): pass # a name that leads to another class
    other = small(); other.cfg = DecodingConfig(**vars(SMALL)); DecodingConfig.__qualname__ = 'DecodingConfig'
    refused('names another class than DecodingConfig', P.save_pretrained, other, tmp_path / 'x')
    assert not (tmp_path / 'x').exists()

def test_what_concerns_a_run_is_not_in_the_file(tmp_path):
    model = of_kind(DecodingConfig, image_strategy='random', image_ratio=0.5, checkpointing='full', attention='sdpa')
    out = P.save_pretrained(model, tmp_path / 'out')
    assert not set(F.RUN_ONLY) & set(json.loads((out / 'config.json').read_text())) and P.create_model(f'local-dir:{out}').cfg == DecodingConfig(**vars(SMALL))

def test_options_reach_every_model_of_ours(tmp_path):
    name = f'local-dir:{P.save_pretrained(of_kind(DecodingConfig, positions="learned"), tmp_path / "out")}'
    model, _, val = P.create_model_and_transforms(name, force_image_size=112, force_context_length=12, force_patch_dropout=0.5, force_preprocess_cfg='openai', output_dict=True)
    assert model.visual.positions.table.shape == (65, 64) and model.text.positions.shape == (12, 48) and val.transform.size == 112 and val.transform.mode == 'shortest'
    assert model.visual(torch.randn(1, 3, 112, 112))[1]['ids'].shape == (1, 32) and isinstance(model(torch.randn(1, 3, 112, 112)), dict)
    moco = f'local-dir:{P.save_pretrained(of_kind(DecodingConfig), tmp_path / "moco")}'
    assert P.create_model(moco, force_image_size=112).cfg.positions == 'moco' # open_clip does not read this directory: computed anew
    assert P.create_model(moco, force_image_size=112, positions='interpolate').cfg.positions == 'learned'

PAPER = '''
from dataclasses import dataclass
from pathlib import Path
from clipa_nb.clip import ModelConfig
Path(__file__).with_name('it-ran').touch()
@dataclass(frozen=True)
class Mine(ModelConfig):
    pass
'''

def test_a_kind_must_be_known_and_code_beside_weights_never_runs(saved, tmp_path, monkeypatch):
    c = json.loads((saved / 'config.json').read_text())
    monkeypatch.chdir(saved); monkeypatch.delenv('CLIPA_USER_FILES', raising=False)
    for file in ('paper_x.py', 'user.py', 'clip.py', 'sitecustomize.py'): (saved / file).write_text(PAPER)
    for kind, match in (('user.paper_x:Mine', r'give it with --with paper_x\.py'), ('paper_x:Mine', 'no module paper_x'), ('clip:Mine', 'unknown Config in clip'), ('user:Mine', 'no module user'), ('os:system', 'unknown Config'), ('../paper_x:Mine', "expected 'module:Class'"), ('core:UserError', 'unknown Config'),
                        ('recipes:Stage', 'cannot be built|unknown|unexpected')):
        (saved / 'config.json').write_text(json.dumps(c | dict(kind=kind)))
        for f in (P.create_model, P.get_tokenizer): refused(match, f, f'local-dir:{saved}')
        assert not (saved / 'it-ran').exists(), kind
    (saved / 'config.json').write_text(json.dumps(c | dict(tokenizer=dict(kind='user.paper_x:Mine')))); refused('--with paper_x', P.get_tokenizer, f'local-dir:{saved}')
    assert not (saved / 'it-ran').exists()
    (tmp_path / 'paper_y.py').write_text(PAPER); load_user_code(tmp_path / 'paper_y.py') # given by the user, it is run and its kinds are known
    (saved / 'config.json').write_text(json.dumps(c | dict(kind='user.paper_y:Mine')))
    assert kind_name(type(P.create_model(f'local-dir:{saved}').cfg)) == 'user.paper_y:Mine' and (tmp_path / 'it-ran').exists()

def test_config_json_is_read_first_and_must_agree(saved):
    name = f'local-dir:{saved}'
    save_file({k: v + 1 for k, v in load_file(saved / P.FILES[0]).items()}, saved / P.FILES[0])
    assert torch.equal(P.create_model(name).text.embed.weight, small().text.embed.weight) # ours
    d = json.loads((saved / F.CONFIG).read_text()); d['preprocess_cfg']['mean'] = [0.9] * 3; (saved / F.CONFIG).write_text(json.dumps(d))
    refused('disagree .model_cfg and config.json: mean .0.9, 0.9, 0.9. and .*change both, or remove open_clip_config.json', P.create_model, name)
    (saved / F.CONFIG).unlink(); assert P.create_model(name).cfg == SMALL
    for change, match in ((dict(widht=3), 'unknown field of ModelConfig .widht.'), (dict(act='gelu_tahn'), 'did you mean gelu_tanh'), (dict(embed_dim=0), r'config\.json\.embed_dim=0'), (dict(image=dict(width=64, depth=2, heads=0, mlp=256)), r'config\.json\.image\.heads=0'), (dict(embed_dim=7), r'model\.safetensors: these weights do not fit')):
        ours = F.own_config(saved); (saved / 'config.json').write_text(json.dumps(ours | change)); refused(match, P.create_model, name); (saved / 'config.json').write_text(json.dumps(ours))
    (saved / 'model.safetensors').unlink(); refused('expected model.safetensors', P.create_model, name)

def test_files_that_saving_does_not_write_are_kept(tmp_path):
    pieces = train_wordpiece(['a red star'] * 3, 60, 8)
    out = P.save_pretrained(small(), tmp_path / 'out', tokenizer=pieces)
    (out / 'recipe.json').write_text('{}'); (out / 'figures').mkdir(); (out / 'figures' / 'a.txt').write_text('x')
    P.save_pretrained(small(1, cls=False), out)
    assert {p.name for p in out.iterdir()} == {'config.json', 'model.safetensors', 'README.md', 'recipe.json', 'figures'} # the pair and the tokenizer of the model before are gone
    assert (out / 'figures' / 'a.txt').read_text() == 'x' and [p.name for p in tmp_path.iterdir()] == ['out']

# ---- a tokenizer of a paper's own

class Letters:
    context_length = 8
    def __init__(self, size, length): self.size, self.context_length = size, length
    def __call__(self, texts, context_length=None, strategy=None, draw=None):
        return torch.tensor([[ord(c) % self.size for c in t[:self.context_length].ljust(self.context_length)] for t in texts])
    def save(self, folder): (Path(folder) / 'letters.txt').write_text(str(self.size))

@dataclass(frozen=True)
class LettersConfig(Config):
    size: int = 50
    def check(self, rows): pass
    def open(self, captions, folder, rows, context_length, comm=None):
        assert not Path(folder, 'letters.txt').exists() or int(Path(folder, 'letters.txt').read_text()) == self.size
        return Letters(self.size, context_length)

def test_a_tokenizer_of_a_papers_own_comes_back(tmp_path):
    tok = LettersConfig(40).open(None, tmp_path, 300, 8)
    out = P.save_pretrained(of_kind(DecodingConfig), tmp_path / 'out', tokenizer=tok, tokenizer_config=LettersConfig(40))
    name = f'local-dir:{out}'
    assert torch.equal(P.get_tokenizer(name)(['a red star']), tok(['a red star'])) and P.get_tokenizer(name, 5)(['a red star']).shape == (1, 5)
    again = P.save_pretrained(P.create_model(name), tmp_path / 'again', tokenizer=P.get_tokenizer(name)) # as `clipa export` does
    assert torch.equal(P.get_tokenizer(f'local-dir:{again}')(['a red star']), tok(['a red star'])) and (again / 'letters.txt').exists()
    with pytest.warns(UserWarning, match='get_tokenizer cannot open a Letters again'): P.save_pretrained(of_kind(DecodingConfig), tmp_path / 'third', tokenizer=tok)

def test_word_pieces_need_no_configuration_and_keep_their_own(tmp_path):
    pieces = train_wordpiece(['a red star', 'a photo of a blue ring'] * 3, 120, 8)
    for kind in (ModelConfig, DecodingConfig):
        out = P.save_pretrained(of_kind(kind), tmp_path / kind.__name__, tokenizer=pieces, tokenizer_config=LettersConfig())
        assert 'kind' not in json.loads((out / 'config.json').read_text())['tokenizer'] and torch.equal(P.get_tokenizer(f'local-dir:{out}')(['a red star']), pieces(['a red star']))
    ids = P.get_tokenizer(f'local-dir:{out}', 4)(['a red star']); assert ids.shape == (1, 4)

# ---- names

def test_names_with_a_tag(monkeypatch, saved):
    assert ('ViT-H-14-CLIPA-336', 'laion2b') in P.list_pretrained() and len(P.list_pretrained()) == len(P.TAGS) and 'ViT-H-14-CLIPA-336:laion2b' in P.list_pretrained(as_str=True)
    seen = []
    monkeypatch.setattr(F, '_from_hub', lambda hub, name, where, cache_dir: seen.append(where) or saved)
    for name in ('ViT-H-14-CLIPA:datacomp1b', 'ViT-H/14-CLIPA:datacomp1b'): P.create_model(name)
    assert seen == ['UCSC-VLAA/ViT-H-14-CLIPA-datacomp1B'] * 2
    refused('did you mean datacomp1b', P.create_model, 'ViT-H-14-CLIPA:datacomp')

def test_random_weights_are_told(saved):
    for name, pretrained, wanted in (('ViT-B-16', None, False), ('ViT-B/16', '', False), ('ViT-H-14-CLIPA', 'laion2b', True), ('ViT-H-14-CLIPA:datacomp1b', None, True), (f'local-dir:{saved}', None, True), ('hf-hub:a/b', None, True), ('ViT-B-16', 'x.bin', True)):
        assert P.has_weights(name, pretrained) is wanted, name
    refused('whose weights would be random: give one of its tags .datacomp1b', P.create_model_from_pretrained, 'ViT-L-14-CLIPA')
    model, val = P.create_model_from_pretrained(f'local-dir:{saved}', force_image_size=112)
    assert not model.training and val.transform.size == 112 and isinstance(P.create_model_from_pretrained(f'local-dir:{saved}', return_transform=False), CLIP)

def test_what_a_person_writes_is_a_name(saved, tmp_path):
    (tmp_path / 'plan.json').write_text('{}')
    assert P.model_name(str(tmp_path)) == P.model_name(str(saved)) == f'local-dir:{saved}' and P.model_name('ViT-B/16') == 'ViT-B/16' and P.model_name('hf-hub:a/b') == 'hf-hub:a/b'
    (saved / 'config.json').unlink(); (saved / F.CONFIG).unlink(); refused('has not finished', P.model_name, str(tmp_path)); refused('no such directory', P.model_name, 'runs/nowhere')

def test_a_model_is_not_exported_onto_itself(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for out in (saved, 'model', saved / '..' / 'model'): refused('the directory of the model itself', P.check_apart, f'local-dir:{saved}', out)
    P.check_apart(f'local-dir:{saved}', tmp_path / 'other'); P.check_apart('ViT-B-16', saved)

# ---- the weights of another model to begin with

def test_beginning_with_another_model(saved, tmp_path):
    start = build_clip(SMALL.replace(init_scale=5.))
    assert 'all from' in (said := P.initial_weights(start, str(saved))) and f'{len(start.state_dict())} tensors' in said and str(saved) in said
    assert all(torch.equal(v, small().state_dict()[k]) for k, v in start.state_dict().items())
    older(saved); again = build_clip(SMALL); P.initial_weights(again, f'local-dir:{saved}') # open_clip's layout
    assert all(torch.equal(v, small().state_dict()[k]) for k, v in again.state_dict().items())
    run = build_clip(SMALL); P.initial_weights(run, str(saved.parent)) # a run's directory holds model/
    assert torch.equal(run.text.embed.weight, small().text.embed.weight)

@pytest.mark.parametrize('part, other', [('visual', 'text'), ('text', 'visual')])
def test_beginning_with_a_part(part, other, saved):
    start = of_kind(DecodingConfig); before = {k: v.clone() for k, v in start.state_dict().items()}
    said = P.initial_weights(start, f'{part}={saved}')
    for k, v in start.state_dict().items(): assert torch.equal(v, small().state_dict()[k] if k.startswith(f'{part}.') else before[k]), k
    assert said.startswith(f'{part} from {saved}: ') and ';' not in said

def test_positions_are_resized_and_differences_said(tmp_path):
    learned = P.save_pretrained(small(positions='learned'), tmp_path / 'learned')
    start = build_clip(SMALL.replace(positions='learned', image_size=112, context_length=12, act='gelu', mean=(0.5,) * 3))
    said = P.initial_weights(start, str(learned))
    assert 'visual.positions.table from 17 to 65 rows' in said and 'text.positions from 8 to 12 rows' in said and 'act gelu_tanh there, gelu here' in said and 'mean (0.485' in said
    direct = P.create_model(f'local-dir:{learned}', force_image_size=112, force_context_length=12)
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in direct.state_dict().items())
    computed = P.save_pretrained(small(), tmp_path / 'computed')
    P.initial_weights(start, f'visual={computed}') # its sines, for the new grid, are where learning begins
    from clipa_nb.patch_embedding import sincos
    assert torch.equal(start.visual.positions.table, sincos((8, 8), 64, 'moco', 1).float())
    sines = build_clip(SMALL.replace(image_size=112)); P.initial_weights(sines, str(older(computed))) # open_clip's layout holds the table of the sines: it is recomputed
    assert F.TABLE not in sines.state_dict() and torch.equal(sines.text.embed.weight, small().text.embed.weight)
    refused('has learned positions, and this model computes them .*set model.positions=learned', P.initial_weights, build_clip(SMALL), f'visual={learned}')

def test_what_does_not_fit_is_refused_with_its_shapes(saved, tmp_path):
    start = build_clip(SMALL.replace(embed_dim=16)); before = {k: v.clone() for k, v in start.state_dict().items()}
    refused(r'visual=.*of another shape: visual.head.weight \(32, 64\) for \(16, 64\)', P.initial_weights, start, f'visual={saved}')
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    refused(r'missing: .*decoder.weight.*a tower alone is loaded by visual=SOURCE', P.initial_weights, of_kind(DecodingConfig), str(saved))
    refused('this model has no text tower', P.initial_weights, of_kind(OneTowerConfig), f'text={saved}')
    one = P.save_pretrained(of_kind(OneTowerConfig), tmp_path / 'one'); refused('has no text tower', P.initial_weights, build_clip(SMALL), f'text={one}')
    refused('ViT-B-16 has no weights; expected a run', P.initial_weights, start, 'ViT-B-16'); refused('no such directory', P.initial_weights, start, 'visual=runs/nowhere')

def test_beginning_with_a_published_tag(monkeypatch, saved):
    monkeypatch.setattr(F, '_from_hub', lambda hub, name, where, cache_dir: saved)
    start = build_clip(SMALL)
    assert 'ViT-H-14-CLIPA:datacomp1b' in P.initial_weights(start, 'text=ViT-H-14-CLIPA:datacomp1b') and torch.equal(start.text.embed.weight, small().text.embed.weight)
    start = build_clip(SMALL); P.initial_weights(start, 'hf-hub:a/b'); assert torch.equal(start.visual.head.weight, small().visual.head.weight)
