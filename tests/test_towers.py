"The transformer and the two towers against plain formulas, published counts, and what may go wrong."
import copy, math, re
from functools import partial
import numpy as np
import pytest, torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from clipa_nb.clip import CLIP, CLIP_INITS, IMAGE_POOLS, MODELS, TEXT_MASKS, TEXT_POOLS, AttentionPool, First, HFTower, Mean, MeanMax, ModelConfig, NormedMean, Out, Probe, TimmTower, Unit, _fit_grid, _fit_positions, _load_by_name, _timm_grid, _timm_tokens, build_clip, eos, eot, first, image_tower, init_clip, init_pool, last, load_weights, model_config, text_tower
from clipa_nb.core import UserError, autocast
from clipa_nb.cost import SIZES, Tower, parameters
from clipa_nb.optimization import make_optimizer, param_groups
from clipa_nb.transformer import CHECKPOINTING, ACTS, INITS, MLP, Attention, Block, DropPath, Encoder, ScaledBlock, _expensive, attention, causal_mask, function_name, gelu_tanh, init_encoder, pad_mask, pick_attention, reading_weights

SMALL = ModelConfig(image=Tower(32, 3, 4, 96), text=Tower(24, 2, 3, 72), embed_dim=16, image_size=32, patch=8, context_length=7, vocab_size=60)

def shaken(cfg, seed=0, by=0.1):
    "A model whose every parameter is away from its start: fresh biases are zeros and would hide mistakes."
    torch.manual_seed(seed)
    model = build_clip(cfg).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(by * torch.randn_like(p))
    return model

def batch(cfg, b=3, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, cfg.vocab_size, (b, cfg.context_length), generator=g)
    for i in range(b): ids[i, cfg.context_length - i:] = 0
    return torch.randn(b, 3, cfg.image_size, cfg.image_size, generator=g), ids

# attention

def by_loop(q, k, v, may):
    out = torch.zeros_like(v)
    for b, h, i in np.ndindex(*q.shape[:3]):
        e = [math.exp(float((q[b, h, i] * k[b, h, j]).sum()) / math.sqrt(q.shape[3])) if may[b, h, i, j] else 0. for j in range(k.shape[2])]
        for j, x in enumerate(e): out[b, h, i] += x / sum(e) * v[b, h, j]
    return out

IDS = torch.tensor([[9, 0, 3, 0, 0], [1, 2, 3, 4, 5]])
MASKS = dict(none=None, pad=pad_mask(IDS)[:, None, None], causal='causal', triangle=causal_mask(5), both=causal_mask(5) & pad_mask(IDS)[:, None, None])

@pytest.mark.parametrize('name', MASKS)
def test_attention_equals_a_loop(name):
    torch.manual_seed(0)
    mask = MASKS[name]
    qkv = torch.randn(3, 2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    may = torch.ones(2, 2, 5, 5, dtype=torch.bool) if mask is None else (causal_mask(5) if isinstance(mask, str) else mask).expand(2, 2, 5, 5)
    slow, grads = by_loop(*qkv.detach().unbind(0), may), []
    for impl in ('matmul', 'sdpa', 'auto'):
        y = attention(*qkv.unbind(0), mask, impl)
        assert (y - slow).abs().max() < 1e-12
        grads.append(torch.autograd.grad((y * slow.sin()).sum(), qkv)[0])
    assert max((g - grads[0]).abs().max() for g in grads) < 1e-12

def test_nothing_leaks_through_a_mask():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 6).unbind(0)
    other = v.clone(); other[:, :, 3:] = 1e6
    for impl in ('matmul', 'sdpa'):
        assert torch.equal(attention(q, k, v, 'causal', impl)[:, :, :3], attention(q, k, other, 'causal', impl)[:, :, :3])
        assert torch.equal(attention(q, k, v, pad_mask(IDS[:1])[:, None, None], impl), attention(q, k, other, pad_mask(IDS[:1])[:, None, None], impl))

@pytest.mark.parametrize('mask', [torch.zeros(5, 5), torch.ones(5, 5, dtype=torch.int64), 'casual', [[True]]])
def test_masks_that_are_not_boolean(mask):
    q = torch.randn(1, 1, 5, 4)
    for impl in ('matmul', 'sdpa'):
        with pytest.raises(UserError, match='expected a boolean tensor') as e: attention(q, q, q, mask, impl)
        found = repr(mask) if isinstance(mask, str) else f"a mask of {getattr(mask, 'dtype', 'list')}"
        assert f'found {found}, expected' in str(e.value)

def test_masks_by_hand():
    assert causal_mask(6).sum() == 21 and causal_mask(6)[0].tolist() == [True] + [False] * 5
    assert pad_mask(torch.tensor([[5, 0, 7, 9, 0, 0]])).tolist() == [[True] * 4 + [False] * 2]
    q, k = torch.randn(2, 3, 4)
    weights = reading_weights(q, k, torch.tensor([True, True, False]))
    assert (weights[:, 2] == 0).all() and torch.allclose(weights.sum(1), torch.ones(3))
    assert reading_weights(q.bfloat16(), k.bfloat16()).dtype == torch.float32
    ids = torch.tensor([[49406, 320, 1125, 49407, 0, 0], [49406, 320, 49407, 0, 0, 0]])
    masks = {name: mask(ids) for name, mask in TEXT_MASKS.items()}
    assert {n: list(m.shape) if isinstance(m, torch.Tensor) else m for n, m in masks.items()} == dict(none=None, pad=[2, 1, 1, 6], causal='causal', causal_pad=[2, 1, 6, 6])
    assert masks['pad'][:, 0, 0].sum(1).tolist() == [4, 3] and masks['causal_pad'][1, 0].sum(1).tolist() == [1, 2, 3, 3, 3, 3]

def test_auto_is_matmul_in_half_precision_on_a_cpu():
    torch.manual_seed(0)
    half = torch.randn(3, 1, 2, 17, 16).bfloat16().unbind(0)
    assert torch.equal(attention(*half), attention(*half, impl='matmul')) and not torch.equal(attention(*half, impl='matmul'), attention(*half, impl='sdpa'))
    assert [pick_attention('cpu', torch.bfloat16, n) for n in (17, 1023, 1024)] == ['matmul', 'matmul', 'sdpa']

def test_attention_and_probe_are_torchs():
    torch.manual_seed(0)
    ours, theirs, x = Attention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True), torch.randn(2, 6, 32)
    theirs.load_state_dict(ours.state_dict())
    assert torch.allclose(ours(x), theirs(x, x, x)[0], atol=1e-6)
    probe = Probe(32, 4); nn.init.normal_(probe.probe)
    theirs.load_state_dict({k: v for k, v in probe.state_dict().items() if k != 'probe'})
    assert torch.allclose(probe(x), theirs(probe.probe.expand(2, 1, 32), x, x)[0][:, 0], atol=1e-6)

def test_functions_are_named():
    assert [function_name(f) for f in (gelu_tanh, partial(pow, 3, mod=7), nn.GELU())] == ['gelu_tanh', 'pow(3, mod=7)', 'GELU']
    assert {n: function_name(f) for n, f in ACTS.items()} == {n: n for n in ACTS}
    mlp, x = MLP(32, 64, 'gelu_tanh'), torch.randn(2, 6, 32)
    assert mlp.extra_repr() == 'act=gelu_tanh' and torch.allclose(mlp(x)[:, :3], mlp(x[:, :3]), atol=1e-6) # each token alone

def test_registries_hold_named_functions():
    "A repr, a pickle and a traceback can name what stands in a registry."
    from clipa_nb import clip, patch_embedding, token_dropping, transformer
    for registry in (clip.IMAGE_POOLS, clip.TEXT_POOLS, clip.TEXT_MASKS, clip.UNITS, clip.HF_POOLS, transformer.INITS, transformer.ACTS, transformer.CHECKPOINTING, patch_embedding.FORMS, token_dropping.IMAGE_STRATEGIES, token_dropping._KEEPS):
        assert all(f.__name__ != '<lambda>' for f in registry.values())
    assert all(f.__name__ != '<lambda>' for row in clip.CLIP_INITS.values() for f in row if callable(f)) and list(CLIP_INITS) == ['jax', 't5x', 'open_clip', 'small']

def test_pad_mask_keeps_a_first_token():
    assert pad_mask(torch.zeros(2, 4, dtype=torch.int64)).sum(1).tolist() == [1, 1]
    assert pad_mask(IDS).sum(1).tolist() == [3, 5]
    assert not reading_weights(torch.randn(2, 1, 5, 4), torch.randn(2, 1, 5, 4), pad_mask(torch.zeros(2, 5, dtype=torch.int64))[:, None, None]).isnan().any()

def test_the_choice_of_an_attention(monkeypatch):
    assert pick_attention('cpu', torch.bfloat16, 50) == 'matmul' and pick_attention('cpu', torch.bfloat16, 5000) == 'sdpa'
    assert {pick_attention('cuda', t, 50) for t in (torch.bfloat16, torch.float32)} | {pick_attention('cpu', torch.float32, 50)} == {'sdpa'}
    called = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, 'scaled_dot_product_attention', lambda *a, **k: called.append(a[0].dtype) or fused(*a, **k))
    image, ids = batch(SMALL)
    for how, times in (('matmul', 0), ('sdpa', 5), ('auto', 5)):
        called.clear(); model = build_clip(SMALL.replace(attention=how)); model(image, ids)
        assert len(called) == times
    called.clear()
    with autocast('amp_bf16', torch.device('cpu')): model(image, ids)
    assert called == [] # under autocast the queries are bf16, whatever the weights are

def test_attention_refuses():
    with pytest.raises(UserError, match='not divisible by 5 heads'): Attention(32, 5)
    with pytest.raises(UserError, match='did you mean sdpa'): build_clip(SMALL.replace(attention='spda'))
    with pytest.raises(UserError, match="unknown attention 'flsh'"): attention(*torch.randn(3, 1, 1, 3, 4), impl='flsh')

# the towers against their formulas, written out once more in numpy, in float64

def np_norm(x, w, b, eps): return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w + b

NP_ACTS = dict(
    gelu=lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    gelu_tanh=lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    quick_gelu=lambda x: x / (1 + np.exp(-1.702 * x)))

def np_attend(q, k, v, heads, may=None):
    (n, w), d = q.shape, q.shape[1] // heads
    out = np.zeros((n, w))
    for h in range(heads):
        s = q[:, h * d:(h + 1) * d] @ k[:, h * d:(h + 1) * d].T / math.sqrt(d)
        e = np.exp(s - s.max(1, keepdims=True)) * (1 if may is None else may)
        out[:, h * d:(h + 1) * d] = e / e.sum(1, keepdims=True) @ v[:, h * d:(h + 1) * d]
    return out

def np_mlp(x, p, at, act): return NP_ACTS[act](x @ p[at + 'c_fc.weight'].T + p[at + 'c_fc.bias']) @ p[at + 'c_proj.weight'].T + p[at + 'c_proj.bias']

def np_blocks(x, p, tower, side, act, eps, may=None):
    for i in range(tower.depth):
        at = f'{side}.encoder.blocks.{i}.'
        y = np_norm(x, p[at + 'ln_1.weight'], p[at + 'ln_1.bias'], eps)
        q, k, v = np.split(y @ p[at + 'attn.in_proj_weight'].T + p[at + 'attn.in_proj_bias'], 3, axis=1)
        x = x + np_attend(q, k, v, tower.heads, may) @ p[at + 'attn.out_proj.weight'].T + p[at + 'attn.out_proj.bias']
        x = x + np_mlp(np_norm(x, p[at + 'ln_2.weight'], p[at + 'ln_2.bias'], eps), p, at + 'mlp.', act)
    return x

def np_positions(cfg, p):
    g, q = cfg.image_size // cfg.patch, cfg.image.width // 4
    if cfg.positions == 'learned': return p['visual.positions.table']
    speed = [10000 ** -(k / (q - 1 if cfg.positions == 'moco' else q)) for k in range(q)]
    rows = [[f(c * s) for c in (x, y) for f in (math.sin, math.cos) for s in speed] for y in range(g) for x in range(g)]
    return np.array([[0.] * cfg.image.width] * cfg.cls + rows)

def np_image(image, cfg, p):
    s, eps, norm = cfg.patch, cfg.ln_eps, lambda x: np_norm(x, p['visual.norm.weight'], p['visual.norm.bias'], cfg.ln_eps)
    g = image.shape[1] // s
    x = np.array([[(image[:, y * s:y * s + s, z * s:z * s + s] * kernel).sum() for kernel in p['visual.patch.weight']] for y in range(g) for z in range(g)])
    if cfg.cls: x = np.concatenate([p['visual.prefix.token'][None], x])
    x = x + np_positions(cfg, p)
    if cfg.pre_norm: x = np_norm(x, p['visual.pre_norm.weight'], p['visual.pre_norm.bias'], eps)
    x, c = np_blocks(x, p, cfg.image, 'visual', cfg.act, eps), int(cfg.cls)
    if cfg.pool == 'map':
        w, b, d = p['visual.pool.attn.in_proj_weight'], p['visual.pool.attn.in_proj_bias'], cfg.image.width
        q, k, v = p['visual.pool.attn.probe'] @ w[:d].T + b[:d], norm(x) @ w[d:2 * d].T + b[d:2 * d], norm(x) @ w[2 * d:].T + b[2 * d:]
        y = np_attend(q[None], k, v, cfg.image.heads) @ p['visual.pool.attn.out_proj.weight'].T + p['visual.pool.attn.out_proj.bias']
        pooled = (y + np_mlp(np_norm(y, p['visual.pool.ln.weight'], p['visual.pool.ln.bias'], eps), p, 'visual.pool.mlp.', cfg.act))[0]
    else: pooled = dict(cls=lambda: norm(x[0]), avg=lambda: norm(x[c:].mean(0)), avg_all=lambda: norm(x.mean(0)), norm_avg=lambda: norm(x[c:]).mean(0), avgmax=lambda: norm(x[c:].mean(0) + x[c:].max(0)))[cfg.pool]()
    return pooled @ p['visual.head.weight'].T

def np_text(ids, cfg, p):
    act, eps, n = cfg.text_act or cfg.act, cfg.text_ln_eps or cfg.ln_eps, len(ids)
    real = np.arange(n) <= max(np.flatnonzero(ids), default=0)
    may = np.ones((n, n), bool)
    if 'causal' in cfg.text_mask: may &= np.tri(n, dtype=bool)
    if 'pad' in cfg.text_mask: may &= real[None]
    x = np_blocks(p['text.embed.weight'][ids] + p['text.positions'][:n], p, cfg.text, 'text', act, eps, may)
    at = dict(last=n - 1, eot=int(ids.argmax()), first=0, eos=int((ids == cfg.eos_id).argmax()))[cfg.text_pool]
    return np_norm(x, p['text.norm.weight'], p['text.norm.bias'], eps)[at] @ p['text.head.weight'].T

V1 = dict(pre_norm=True, text_mask='causal', text_pool='eot', ln_eps=1e-5, unit='clamp', unit_eps=1e-12)
FAMILIES = dict(
    v2=dict(), v2_as_open_clip=dict(act='gelu', ln_eps=1e-5), v2_quick=dict(act='quick_gelu'), openai=dict(V1, positions='learned', pool='cls', act='quick_gelu'), open_clip=dict(V1, positions='learned', pool='cls', act='gelu'),
    v1_gap=dict(V1, positions='mae', pool='avg_all', act='gelu'), norm_first=dict(pool='norm_avg', text_mask='pad', text_pool='first'), attention_pool=dict(pool='map', text_mask='causal_pad', text_pool='eos', eos_id=7),
    two_numerics=dict(act='gelu', ln_eps=1e-5, text_act='gelu_tanh', text_ln_eps=1e-6), toy=dict(cls=False, pool='avgmax', act='gelu'))

@pytest.mark.parametrize('family', FAMILIES)
def test_towers_are_their_formulas(family):
    cfg = SMALL.replace(**FAMILIES[family])
    model = shaken(cfg).double()
    p = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    image, ids = batch(cfg); ids[1, 3] = 7
    zi, zt = model.encode_image(image.double()).detach().numpy(), model.encode_text(ids).detach().numpy()
    for i in range(len(ids)):
        assert np.abs(zi[i] - np_image(image[i].double().numpy(), cfg, p)).max() < 1e-11
        assert np.abs(zt[i] - np_text(ids[i].numpy(), cfg, p)).max() < 1e-11
    unit = model.encode_image(image.double(), normalize=True).detach().numpy()
    size = np.linalg.norm(zi, axis=1, keepdims=True)
    assert np.abs(unit - zi / (np.maximum(size, cfg.unit_eps) if cfg.unit == 'clamp' else size + cfg.unit_eps)).max() < 1e-14

@pytest.mark.parametrize('change', [dict(act='gelu'), dict(act='quick_gelu'), dict(ln_eps=1e-5), dict(pool='avg_all'), dict(pool='norm_avg'), dict(positions='mae'), dict(text_mask='pad'), dict(text_pool='first'), dict(text_ln_eps=1e-5), dict(text_act='gelu')])
def test_each_setting_changes_the_function(change):
    "The formulas above would not tell if a setting were read by nobody on either side."
    model, image_ids = shaken(SMALL).double(), batch(SMALL)
    other = load_weights(build_clip(SMALL.replace(**change)).double(), model.state_dict()).eval()
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(model(image_ids[0].double(), image_ids[1])[:2], other(image_ids[0].double(), image_ids[1])[:2]))
    assert gap > 1e-7

def test_unit_forms():
    z = torch.tensor([[3., 4.], [0., 0.], [6e-9, 8e-9]])
    assert Unit('add', 1e-8)(z).norm(dim=1).tolist() == pytest.approx([1, 0, 0.5])
    assert torch.equal(Unit('clamp', 1e-12)(z), F.normalize(z, dim=-1))
    assert Unit()(z.bfloat16()).dtype == torch.float32
    with pytest.raises(UserError, match='did you mean clamp'): Unit('clam')

def test_pools_by_hand():
    x, same = torch.tensor([[[9., 9.], [1., 0.], [2., 0.], [3., 6.]]]), nn.Identity()
    want = {First(): [9., 9.], Mean(0): [3.75, 3.75], Mean(1): [2., 2.], NormedMean(1): [2., 2.], MeanMax(1): [5., 8.]}
    for pool, z in want.items(): assert pool(x, same).tolist() == [z]
    torch.manual_seed(0)
    x, norm = torch.randn(2, 5, 16), nn.LayerNorm(16)
    assert torch.allclose(First()(x, norm), norm(x)[:, 0], atol=1e-6) and (Mean(1)(x, norm) - NormedMean(1)(x, norm)).abs().max() > 0.1
    pool = AttentionPool(16, 4, 64); nn.init.normal_(pool.attn.probe)
    y = pool.attn(norm(x))
    assert torch.allclose(pool(x, norm), y + pool.mlp(pool.ln(y)), atol=1e-6) and torch.allclose(pool(x[:, [3, 0, 4, 1, 2]], norm), pool(x, norm), atol=1e-5)
    pool = init_pool(AttentionPool(256, 4, 1024))
    assert float(pool.attn.probe.detach().std()) * (257 / 2)**0.5 == pytest.approx(1, abs=0.15) and float(pool.attn.in_proj_bias.detach().abs().max()) == 0

def test_text_pools_by_hand():
    ids = torch.tensor([[49406, 320, 1125, 49407, 0, 0], [49406, 320, 49407, 0, 0, 0]])
    x = torch.arange(12.).view(2, 6, 1)
    taken = lambda pool: pool(x, ids).flatten().tolist()
    assert [taken(p) for p in (last, eot, first)] == [[5, 11], [3, 8], [0, 6]] and list(TEXT_POOLS) == ['last', 'eot', 'eos', 'first']
    assert taken(partial(eos, eos_id=49407)) == [3, 8] and taken(partial(eos, eos_id=5)) == [0, 6] # an id that is not there: the first position, as in open_clip

def test_two_unit_forms_agree_for_long_embeddings():
    torch.manual_seed(0)
    z = torch.randn(200, 64); z = z / z.norm(dim=1, keepdim=True) * torch.logspace(-9, 1, 200)[:, None]
    differ = (Unit('clamp', 1e-12)(z) != Unit('add', 1e-8)(z)).any(1)
    assert differ.any() and not differ[z.norm(dim=1) > 0.26].any() and Unit()(torch.zeros(1, 4)).abs().max() == 0
    with pytest.raises(UserError, match='unknown normalisation'): Unit('l2')

# what a tower says

def test_tokens_are_computed_when_they_are_read():
    calls = []
    out = Out(grid=(4, 4), tokens=lambda: calls.append('computed') or torch.zeros(1, 16, 8))
    assert repr(out) == 'Out(grid, tokens)' and list(out) == ['grid', 'tokens'] and 'tokens' in out and len(out) == 2 and calls == []
    assert out['tokens'].shape == (1, 16, 8) and out['tokens'] is out['tokens'] and calls == ['computed']
    with pytest.raises(KeyError): out['patches']

@pytest.mark.parametrize('strategy,ratio', [('random', 0.5), ('grid', 0.75), ('block', 0.75)])
def test_a_tower_places_patches_before_it_drops_them(strategy, ratio):
    "Blocks that start as the identity hand the tokens through: each must be its patch plus the position of its id."
    tower = build_clip(SMALL.replace(init='small', image_strategy=strategy, image_ratio=ratio)).visual.train()
    image = batch(SMALL)[0]
    _, out = tower(image)
    x, grid = tower.patch(image)
    placed = x + tower.positions(grid)[1:]
    want = placed.gather(1, out['ids'][..., None].expand(-1, -1, placed.shape[-1]))
    assert torch.allclose(out['tokens'], tower.norm(want), atol=1e-6)
    late = x.gather(1, out['ids'][..., None].expand(-1, -1, x.shape[-1])) + tower.positions(grid)[1:1 + want.shape[1]]
    assert not torch.allclose(tower.norm(late), tower.norm(want), atol=1e-2)

@pytest.mark.parametrize('pool', IMAGE_POOLS)
@pytest.mark.parametrize('ratio', [0., 0.5])
def test_the_image_seam(pool, ratio):
    cfg = SMALL.replace(pool=pool, image_strategy='random' if ratio else 'none', image_ratio=ratio)
    tower = shaken(cfg).visual.train()
    z, out = tower(batch(cfg)[0])
    k = 8 if ratio else 16
    assert (z.shape, out['tokens'].shape, out['ids'].shape, out['grid']) == ((3, 16), (3, k, 32), (3, k), (4, 4))
    assert torch.allclose((out['tokens'] - tower.norm.bias).div(tower.norm.weight).mean(-1), torch.zeros(3, k), atol=1e-5) # the final norm, on every token
    assert all(len(set(row)) == k for row in out['ids'].tolist())

@pytest.mark.parametrize('mask', TEXT_MASKS)
@pytest.mark.parametrize('pool', TEXT_POOLS)
def test_the_text_seam(mask, pool):
    tower = shaken(SMALL.replace(text_mask=mask, text_pool=pool)).text
    ids = batch(SMALL)[1]
    z, out = tower(ids)
    assert (z.shape, out['tokens'].shape) == ((3, 16), (3, 7, 24)) and out['mask'].sum(1).tolist() == [7, 6, 5]

def test_masks_hide():
    ids = torch.tensor([[5, 9, 30, 0, 0]])
    later = torch.tensor([[5, 9, 30, 8, 8]])
    token = lambda cfg, ids: shaken(cfg).text(ids)[1]['tokens'][:, :3]
    for mask, same in dict(none=False, causal=True, causal_pad=True).items():
        assert torch.equal(token(SMALL.replace(text_mask=mask), ids), token(SMALL.replace(text_mask=mask), later)) == same
    assert torch.allclose(token(SMALL.replace(text_mask='pad'), ids), token(SMALL.replace(text_mask='pad'), ids[:, :3]), atol=1e-6)
    assert not torch.allclose(token(SMALL, ids), token(SMALL, ids[:, :3]), atol=1e-4)

def test_what_the_model_returns():
    model, (image, ids) = shaken(SMALL), batch(SMALL)
    zi, zt, scale = model(image, ids)
    assert torch.equal(zi, model.encode_image(image, normalize=True)) and torch.equal(zt, model.encode_text(ids, normalize=True)) and torch.equal(scale, model.logit_scale.exp())
    assert model(text=ids)[0] is None and model(image)[1] is None
    model.output_dict = True
    assert list(model(image, ids)) == ['image_features', 'text_features', 'logit_scale']
    biased = build_clip(SMALL.replace(init_bias=-10.))
    assert biased(image, ids)[3].item() == -10 and 'logit_bias' in biased.state_dict() and 'logit_bias' not in model.state_dict()
    bytes_ = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    floats = (bytes_ / 255 - torch.tensor(SMALL.mean).view(3, 1, 1)) / torch.tensor(SMALL.std).view(3, 1, 1)
    assert torch.allclose(model.encode_image(bytes_), model.encode_image(floats), atol=1e-5)

def no_change(m): pass
def another_act(m): m.visual.encoder.blocks[1].mlp.act = F.gelu
def another_norm(m): m.text.norm.eps = 1e-5
def another_first(m): m.visual.pool = Mean(0)
def normed_mean(m): m.visual.pool = NormedMean(1)
def class_token(m): m.visual.pool = First()
def prefix(m): m.visual.n_prefix = 0
def causal(m): m.text.mask = TEXT_MASKS['causal']
def another_pool(m): m.text.pool = TEXT_POOLS['first'](SMALL)
def another_id(m): m.text.pool = TEXT_POOLS['eos'](SMALL.replace(eos_id=3))

@pytest.mark.parametrize('change', [no_change, another_act, another_norm, another_first, normed_mean, class_token, prefix, causal, another_pool, another_id])
def test_an_exchanged_part_shows_in_the_repr(change):
    "The same shapes, another function: only the repr tells two such models apart."
    with torch.device('meta'): a, b = (build_clip(SMALL.replace(text_pool='eos')) for _ in range(2))
    change(b)
    shapes = lambda m: {k: v.shape for k, v in m.state_dict().items()}
    assert shapes(a) == shapes(b)
    assert (repr((a.visual, a.text)) == repr((b.visual, b.text))) == (change is no_change)

def test_reprs_name_functions():
    model = build_clip(SMALL.replace(text_mask='causal_pad', text_pool='eos', eos_id=7, act='quick_gelu', pool='avgmax'))
    assert 'mask=mask_causal_pad, pool=eos(eos_id=7)' in repr(model.text) and '(pool): MeanMax(first=1)' in repr(model.visual)
    for name in ACTS: assert f'act={name}\n' in repr(build_clip(SMALL.replace(act=name)).text)
    model.text.mask = lambda ids: None
    model.visual.encoder.blocks[0].mlp.act = nn.ReLU()
    assert 'mask=<lambda>' in repr(model.text) and 'act=ReLU' in repr(model.visual)

def test_no_forward_looks_at_a_configuration():
    import inspect
    from clipa_nb.clip import ImageTower, TextTower
    for f in (ImageTower.forward, TextTower.forward, CLIP.encode_image, CLIP.encode_text, Block.forward, Encoder.forward):
        assert not re.search(r'\bcfg\b', inspect.getsource(f)), f
    assert not any(re.search(r'^\s*if ', inspect.getsource(f), re.M) for f in (ImageTower.forward, TextTower.forward)), 'a statement that branches'

# checkpointing

def gradients(stack, x, how, mask=None, precision='fp32'):
    stack.checkpointing = how; stack.zero_grad(); torch.manual_seed(3)
    with autocast(precision, torch.device('cpu')): y = stack(x, mask)
    y.float().sin().sum().backward()
    return [p.grad.clone() for p in stack.parameters()]

class Dropping(Block):
    "A block that draws random numbers in the middle, as fine-tuning code may."
    def forward(self, x_BND, mask=None): return F.dropout(super().forward(x_BND, mask), 0.2, self.training)

@pytest.mark.parametrize('block', [Block, partial(ScaledBlock, scale=0.5, drop=0.4), Dropping])
@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
@pytest.mark.parametrize('how', ['full', 'selective'])
def test_recomputed_gradients_are_the_same_bits(block, precision, how):
    torch.manual_seed(0)
    stack, x = init_encoder(Encoder(32, 3, 4, 64, block=block)), torch.randn(4, 9, 32, requires_grad=True)
    for mask in (None, 'causal', pad_mask(torch.arange(36).view(4, 9).flip(1).clamp(max=30))[:, None, None]):
        kept = gradients(stack, x, 'none', mask, precision)
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients(stack, x, how, mask, precision)))
        assert sum(float(g.abs().sum()) for g in kept) > 0

class Count(TorchDispatchMode):
    def __init__(self): super().__init__(); self.products = self.norms = 0
    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.products += op is torch.ops.aten.addmm.default; self.norms += op is torch.ops.aten.native_layer_norm.default
        return op(*args, **(kwargs or {}))

@pytest.mark.parametrize('how,products,norms', [('none', 0, 0), ('full', 3, 2), ('selective', 0, 2)])
def test_what_is_made_again(how, products, norms):
    "In the backward pass: nothing; all but the last of the four products; only what lies between them."
    stack = Encoder(32, 1, 4, 64, checkpointing=how)
    y = stack(torch.randn(4, 9, 32)).sum()
    with Count() as again: y.backward()
    assert (again.products, again.norms) == (products, norms)

def test_what_is_expensive():
    aten, wide, narrow = torch.ops.aten, torch.zeros(5, 8), torch.zeros(8, 3)
    keeps = lambda op, *args: _expensive(None, op, *args).name == 'MUST_SAVE'
    assert keeps(aten.mm.default, narrow, torch.zeros(3, 8)) and not keeps(aten.mm.default, wide, narrow) and not keeps(aten.gelu.default, wide)
    assert keeps(aten.addmm.default, torch.zeros(8), narrow, torch.zeros(3, 8)) and not keeps(aten.addmm.default, torch.zeros(3), wide, narrow)
    from clipa_nb.transformer import _FUSED
    assert _FUSED and all(keeps(op) for op in _FUSED)
    with pytest.raises(UserError, match='unknown checkpointing'): Encoder(64, 4, 4, 256, checkpointing='some')
    assert sum(p.numel() for p in Encoder(64, 4, 4, 256).parameters()) == 4 * (12 * 64 * 64 + 13 * 64)

def test_checkpointing_is_the_callers_choice():
    model = build_clip(SMALL)
    for enable, how in ((True, 'full'), ('selective', 'selective'), (False, 'none')):
        model.set_grad_checkpointing(enable)
        assert {model.visual.encoder.checkpointing, model.text.encoder.checkpointing} == {how}
    with pytest.raises(UserError, match='unknown checkpointing'): model.set_grad_checkpointing('some')
    with pytest.raises(UserError, match='unknown checkpointing'): build_clip(SMALL.replace(checkpointing='some'))
    assert set(CHECKPOINTING) == {'none', 'full', 'selective'}

def test_other_blocks():
    torch.manual_seed(0)
    plain, x = Block(32, 4, 64), torch.randn(5, 6, 32)
    scaled = ScaledBlock(32, 4, 64, scale=0., drop=0.5)
    assert torch.equal(scaled(x), x)
    full = ScaledBlock(32, 4, 64, scale=1.); full.load_state_dict(plain.state_dict(), strict=False)
    assert torch.allclose(full(x), plain(x), atol=1e-6)
    kept = (DropPath(0.5)(torch.ones(2000, 1, 1)).flatten() > 0).float().mean()
    assert 0.44 < kept < 0.56
    dropped = DropPath(0.25)(torch.ones(4000, 1, 1))
    assert sorted({round(v, 3) for v in dropped.flatten().tolist()}) == [0., 1.333] and abs(dropped.mean() - 1) < 0.05
    assert torch.equal(DropPath(0.25).eval()(torch.ones(4, 1, 1)), torch.ones(4, 1, 1))
    assert torch.allclose(ScaledBlock(32, 4, 64, scale=1e-5)(x), x, atol=1e-3) and set(full.state_dict()) - set(plain.state_dict()) == {'ls_1', 'ls_2'}
    for p in (-0.1, 1.):
        with pytest.raises(UserError, match='expected 0 ≤ p < 1'): DropPath(p)

# how towers start

W = 192
EXPECTED = { # of one matrix, in units of 1/√W for a tower of width W and an MLP of 4 W: qkv, out, fc1, fc2; method: xavier counts one of the stacked matrices in flax, all three in torch
    'jax': lambda depth: (1, 1, math.sqrt(2 / 5), math.sqrt(2 / 5)),
    'jax_text': lambda depth: (1, 24**-0.5, 2**-0.5, 24**-0.5),
    'open_clip': lambda depth: (2**-0.5, 3**-0.5, 3**-0.5, 12**-0.5),
    'open_clip_text': lambda depth: (1, (2 * depth)**-0.5, 2**-0.5, (2 * depth)**-0.5),
    'small': lambda depth: (1, 0, math.sqrt(2 / 5), 0),
}

@pytest.mark.parametrize('style', INITS)
@pytest.mark.parametrize('depth', [12, 24, 48])
def test_deviations_at_the_start(style, depth):
    torch.manual_seed(0)
    stack = Encoder(W, 1, 4, 4 * W); stack.depth = depth # the matrices of one block tell; the depth is only read by the formula
    block = init_encoder(stack, style).blocks[0]
    mats = [block.attn.in_proj_weight, block.attn.out_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight]
    for w, want in zip(mats, EXPECTED[style](depth)):
        assert float(w.detach().std()) * W**0.5 == pytest.approx(want, rel=0.02)
        if want: # uniform or normal? the largest of many draws tells
            reach = float(w.detach().abs().max() / w.detach().std())
            assert (reach < 1.75) == (style in ('jax', 'small', 'open_clip')), reach
    biases = [block.attn.in_proj_bias, block.attn.out_proj.bias, block.mlp.c_fc.bias, block.mlp.c_proj.bias]
    zero = [float(b.detach().abs().max()) == 0 for b in biases]
    assert zero == [True, True, 'open_clip' not in style, 'open_clip' not in style] # PyTorch's own linear layers start with biases
    assert float(block.ln_1.weight.detach().min()) == 1 and float(block.ln_2.bias.detach().abs().max()) == 0

def test_the_depth_quirk():
    "CLIPA's JAX code takes 12 for every depth; torch the true one. At 48 blocks the ratio is 2."
    out = {}
    for style in ('jax_text', 'open_clip_text'):
        torch.manual_seed(0); stack = Encoder(W, 1, 4, 4 * W); stack.depth = 48
        out[style] = float(init_encoder(stack, style).blocks[0].attn.out_proj.weight.detach().std())
    assert out['jax_text'] / out['open_clip_text'] == pytest.approx(2, rel=0.01)

@pytest.mark.parametrize('style,image,cls', [('jax', 1, 0), ('t5x', 24**-0.5, 0), ('open_clip', 3**-0.5, 1)])
def test_a_whole_model_starts_as_published(style, image, cls):
    torch.manual_seed(0)
    cfg = SMALL.replace(image=Tower(W, 2, 4, 4 * W), text=Tower(W, 2, 4, 4 * W), embed_dim=W, vocab_size=2000, context_length=400, init=style, positions='learned')
    m, unit = build_clip(cfg), W**0.5
    std = lambda t: float(t.detach().std())
    assert std(m.visual.encoder.blocks[1].attn.out_proj.weight) * unit == pytest.approx(image, rel=0.02)
    assert std(m.text.encoder.blocks[1].attn.out_proj.weight) * unit == pytest.approx(0.5 if style == 'open_clip' else 24**-0.5, rel=0.02)
    assert std(m.visual.head.weight) * unit == pytest.approx(1, rel=0.02) and std(m.text.head.weight) * unit == pytest.approx(1, rel=0.02)
    assert std(m.text.embed.weight) == pytest.approx(0.02, rel=0.02) and std(m.text.positions) == pytest.approx(0.01, rel=0.02)
    assert std(m.visual.prefix.token) * unit == pytest.approx(cls, rel=0.15, abs=1e-9)
    assert std(m.visual.patch.weight) * (3 * 8 * 8)**0.5 == pytest.approx(3**-0.5 if style == 'open_clip' else 1, rel=0.02)
    assert m.logit_scale.item() == pytest.approx(math.log(1 / 0.07))

def test_small_starts_as_the_identity():
    x = torch.randn(2, 5, 32)
    assert torch.equal(init_encoder(Encoder(32, 3, 4, 64), 'small')(x), x)
    with pytest.raises(UserError, match='unknown initialisation'): init_encoder(Encoder(32, 1, 4, 64), 'he')
    with pytest.raises(UserError, match='did you mean t5x'): build_clip(SMALL.replace(init='t5'))
    with pytest.raises(UserError, match='did you mean jax'): build_clip(SMALL.replace(init='jx'))

@pytest.mark.parametrize('style', CLIP_INITS)
def test_a_used_model_begins_anew(style):
    cfg = SMALL.replace(init=style, pre_norm=True, pool='map', positions='learned', init_scale=10., init_bias=-3.)
    used, fresh = shaken(cfg), build_clip(cfg)
    for model in (used, fresh): torch.manual_seed(4); init_clip(model, style)
    assert [k for k, v in used.state_dict().items() if not torch.equal(v, fresh.state_dict()[k])] == []

def test_same_seed_same_model_and_every_parameter_learns():
    states = []
    for seed in (0, 0, 1): torch.manual_seed(seed); states.append(build_clip(SMALL).state_dict())
    assert all(torch.equal(a, b) for a, b in zip(states[0].values(), states[1].values()))
    assert not torch.equal(states[0]['text.head.weight'], states[2]['text.head.weight'])
    for change in (dict(), dict(V1, positions='learned', pool='cls'), dict(pool='map')):
        model, (image, ids) = shaken(SMALL.replace(**change)), batch(SMALL)
        zi, zt, scale = model(image, ids)
        F.cross_entropy(scale * zi @ zt.T, torch.arange(3)).backward()
        assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []

# sizes

PUBLISHED = { # millions, as printed: image tower with its table of positions, text tower, both
    'ViT-L-14-CLIPA': ('303.96', '110.25', '414.2'), 'ViT-H-14-CLIPA': ('632.07', '336.16', None), 'ViT-bigG-14-CLIPA': ('1844.9', '672.32', None),
    'ViT-H-14-CLIPA-336': ('632.5', None, '968.6'), 'ViT-bigG-14-CLIPA-336': ('1845.4', None, '2517.8')}

def built(name):
    cfg = model_config(name)
    with torch.device('meta'): m = build_clip(cfg)
    table = 0 if cfg.positions == 'learned' else ((cfg.image_size // cfg.patch)**2 + cfg.cls) * cfg.image.width
    image, text = (sum(p.numel() for p in t.parameters()) for t in (m.visual, m.text))
    return m, (image + table, text, image + table + text + 1)

@pytest.mark.parametrize('name', PUBLISHED)
def test_published_counts(name):
    for n, said in zip(built(name)[1], PUBLISHED[name]):
        if said: assert f"{n / 1e6:.{len(said.split('.')[1])}f}" == said

@pytest.mark.parametrize('name', MODELS)
def test_counts_in_closed_form(name):
    c, (m, (image, text, total)) = model_config(name), built(name)
    form = parameters(c, c.vocab_size, c.context_length, (c.image_size // c.patch)**2 + c.cls, cls=c.cls, pre_norm=c.pre_norm)
    assert (image, text, total) == (form['image'], form['text'], form['total'])

def test_every_published_size_is_there():
    assert {(c.patch, c.image.width, c.image.depth) for n, c in MODELS.items()} == {(s.patch, s.image.width, s.image.depth) for s in SIZES.values()}
    assert set(SIZES) == {'S/16', 'B/16', 'B/32', 'L/16', 'L/14', 'H/14', 'g/14', 'bigG/14'}

def test_names_of_published_models():
    assert model_config('ViT-bigG-14-CLIPA').image.heads * 104 == 1664
    assert (MODELS['ViT-g-14'].embed_dim, MODELS['ViT-g-14-CLIPA'].embed_dim) == (1024, 1280) # open_clip's g/14 is not CLIPA's
    assert {c.init for n, c in MODELS.items() if 'bigG-14-CLIPA' in n} == {'t5x'}
    assert model_config('ViT-H-14-CLIPA-336').diff(model_config('ViT-H-14-CLIPA')) == {'image_size': (336, 224)}
    with pytest.raises(UserError, match='did you mean ViT-H-14-CLIPA'): model_config('ViT-H14-CLIPA')
    with pytest.raises(UserError, match='did you mean width'): SMALL.replace(image__widht=3)
    assert ModelConfig.from_json(SMALL.to_json()) == SMALL

OPEN_CLIP = ['ViT-S-16', 'ViT-B-16', 'ViT-B-32', 'ViT-L-16', 'ViT-L-14', 'ViT-H-14', 'ViT-g-14', 'ViT-bigG-14', 'ViT-L-14-CLIPA', 'ViT-L-14-CLIPA-336', 'ViT-H-14-CLIPA', 'ViT-H-14-CLIPA-336', 'ViT-bigG-14-CLIPA', 'ViT-bigG-14-CLIPA-336', 'ViT-B-32-quickgelu']

def theirs(name, **changes):
    "open_clip's model, on meta."
    open_clip = pytest.importorskip('open_clip', reason='open_clip is not installed: counts and groups are not compared with it')
    cfg = open_clip.get_model_config(name)
    for side in ('vision_cfg', 'text_cfg'): cfg[side].update(changes)
    with torch.device('meta'): return open_clip.model.CLIP(**cfg)

@pytest.mark.parametrize('name', OPEN_CLIP)
def test_counts_are_open_clips(name):
    other, (_, (image, text, total)) = theirs(name), built(name)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert (count(other.visual), count(other)) == (image, total)

# locking

@pytest.mark.parametrize('groups', [0, 1, 2, 3, 5, 99])
def test_locking_is_open_clips(groups):
    from clipa_nb.engine.formats import rename
    other, cfg = theirs('ViT-B-32', layers=3), model_config('ViT-B-32').replace(image__depth=3, text__depth=3)
    with torch.device('meta'): ours = build_clip(cfg)
    ours.lock_image_tower(groups), other.lock_image_tower(groups)
    ours.lock_text_tower(groups), other.lock_text_tower(groups)
    learns = lambda m, name: {name(n) for n, p in m.named_parameters() if p.requires_grad}
    assert learns(ours, rename) == learns(other, str)

def test_groups_are_counted_from_the_output():
    model, (image, ids) = shaken(SMALL), batch(SMALL)
    learns = lambda tower: [n for n, p in tower.named_parameters() if p.requires_grad]
    model.lock_image_tower(1), model.lock_text_tower(2)
    assert learns(model.visual) == ['head.weight'] and {n.split('.')[0] for n in learns(model.text)} == {'encoder', 'norm', 'head'}
    for n in (0, 1, 2, 5):
        model.lock_image_tower(n); assert model.encode_image(image).requires_grad == (n > 0)
    assert all(p.requires_grad for p in model.visual.parameters())
    model.lock_text_tower(); assert not model.encode_text(ids).requires_grad
    model.lock_text_tower(4); assert all(p.requires_grad for p in model.text.parameters())
    with pytest.raises(UserError, match='found -1 unlocked groups'): model.visual.lock(-1)

def test_locked_means_no_graph_no_state_no_rule():
    model, (image, ids) = shaken(SMALL), batch(SMALL)
    model.lock_image_tower()
    assert not model.encode_image(image).requires_grad and model.encode_text(ids).requires_grad
    opt = make_optimizer(model, 1e-2, rules=[('visual.*', 0.5)]) # a rule about rates does not unlock
    before = copy.deepcopy(model.visual.state_dict())
    for _ in range(2):
        zi, zt, scale = model(image, ids)
        opt.zero_grad(); F.cross_entropy(scale * zi @ zt.T, torch.arange(3)).backward(); opt.step()
    names = [n for g in opt.param_groups for n in g['names']]
    assert names and not any(n.startswith('visual') for n in names)
    assert len(opt.state) == len(names) and all(p.grad is None for p in model.visual.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.visual.state_dict().items())
    model.lock_image_tower(1)
    assert [n for g in param_groups(model, 1e-2, 0.) for n in g['names'] if n.startswith('visual')] == ['visual.head.weight']
    model.set_grad_checkpointing('selective'); model.lock_image_tower()
    assert not model.encode_image(image).requires_grad
    with pytest.raises(UserError, match='expected 0 or more'): model.lock_image_tower(-1)
    fresh = load_weights(model, {k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    assert not any(p.requires_grad for p in fresh.visual.parameters())

# towers from elsewhere

@pytest.mark.parametrize('name,kwargs,n', [('vit_tiny_patch16_224', dict(img_size=32, patch_size=8, depth=2), 16), ('vit_tiny_patch16_224', dict(img_size=32, patch_size=8, depth=1, global_pool='avg'), 16), ('resnet10t', {}, 1), ('convnext_atto', {}, 1)])
def test_timm_towers(name, kwargs, n):
    timm = pytest.importorskip('timm', reason='timm is not installed')
    torch.manual_seed(0)
    model = CLIP(TimmTower(name, 16, **kwargs), text_tower(SMALL), SMALL)
    image, ids = batch(SMALL)
    z, out = model.visual(image)
    side = round(n**0.5)
    assert (z.shape, out['ids'].shape, out['grid']) == ((3, 16), (3, n), (side, side)) and out['tokens'].shape[:2] == (3, n)
    if 'global_pool' in kwargs: assert torch.allclose(model.visual.head(model.visual.trunk.fc_norm(model.visual.trunk.forward_features(image)[:, 1:].mean(1))), z, atol=1e-5)
    zi, zt, scale = model(image, ids)
    F.cross_entropy(scale * zi @ zt.T, torch.arange(3)).backward()
    assert all(p.grad is not None for p in model.visual.head.parameters())
    model.set_grad_checkpointing(), model.set_grad_checkpointing(False)
    with pytest.raises(UserError, match="expected 'full' or 'none'"): model.set_grad_checkpointing('selective')

def test_features_become_tokens_on_a_grid():
    class Net: output_fmt = 'NHWC'
    f = torch.arange(12.).view(1, 2, 2, 3)
    for net, f in ((nn.Identity(), f), (Net(), f.permute(0, 2, 3, 1))):
        assert _timm_tokens(net, f)[0, :, 0].tolist() == [0, 1, 2, 3, 4, 5] and _timm_grid(net, f, None) == (2, 3)
    for f in (torch.zeros(1, 6, 1), [torch.zeros(1, 6, 1)]):
        with pytest.raises(UserError, match='the timm trunk Identity does not tell'): _timm_grid(nn.Identity(), f, torch.zeros(1, 3, 32, 48))

def test_names_of_another_library():
    library = ['resnet10t', 'vit_tiny']
    assert _load_by_name('this list', library.index, 'vit_tiny', lambda: library) == 1
    with pytest.raises(UserError, match=r'did you mean vit_tiny\?'): _load_by_name('this list', library.index, 'vit_tinny', lambda: library)
    with pytest.raises(UserError) as e: _load_by_name('float', float, 'vit')
    assert "float does not load 'vit' (could not convert string to float: 'vit'): check the name" in str(e.value)

@pytest.mark.parametrize('name', ['mixer_s32_224', 'xcit_nano_12_p16_224', 'levit_128s', 'coat_tiny'])
def test_timm_trunks_without_a_grid(name):
    pytest.importorskip('timm', reason='timm is not installed')
    tower = TimmTower(name, 16)
    with torch.no_grad(), pytest.raises(UserError, match=f'the timm trunk {type(tower.trunk).__name__} does not tell the grid'): tower(torch.zeros(1, 3, 224, 224))

def test_timm_trunks_without_groups():
    pytest.importorskip('timm', reason='timm is not installed')
    with pytest.raises(UserError, match='the timm trunk MetaFormer names no groups'): TimmTower('poolformer_s12', 16).lock()

def test_names_of_trunks_that_nobody_knows(tmp_path):
    pytest.importorskip('timm', reason='timm is not installed'); pytest.importorskip('transformers', reason='transformers is not installed')
    for load, words in ((lambda: TimmTower('vit_tinny_patch16_224', 16), r"timm does not load 'vit_tinny_patch16_224' \(Unknown model .*\): did you mean vit_tiny_patch16_224"),
                        (lambda: TimmTower('0', 16), "timm does not load '0' .*: check the name"),
                        (lambda: HFTower(str(tmp_path), 16), 'transformers does not load .*: check the name')):
        with pytest.raises(UserError, match=words) as seen: load()
        assert '\n' not in str(seen.value)

def test_timm_batch_norms_stand_still():
    pytest.importorskip('timm', reason='timm is not installed')
    model, image = CLIP(TimmTower('resnet10t', 16), text_tower(SMALL), SMALL), batch(SMALL)[0]
    stats = lambda: [v.clone() for k, v in model.visual.state_dict().items() if 'running_mean' in k]
    for freeze in (False, True):
        model.lock_image_tower(freeze_bn_stats=freeze); model.eval(); model.train()
        before = stats(); model.encode_image(image)
        assert all(torch.equal(a, b) for a, b in zip(before, stats())) == freeze
        assert [n for n, p in model.visual.named_parameters() if p.requires_grad] == ['head.weight']
    model.lock_image_tower(1, freeze_bn_stats=True)
    moving = [m for m in model.visual.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    assert moving and all(p.requires_grad for m in moving for p in m.parameters())

def test_hugging_face_towers():
    transformers = pytest.importorskip('transformers', reason='transformers is not installed')
    torch.manual_seed(0)
    cfg = transformers.BertConfig(vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16)
    for pool in ('mean', 'first'):
        model = CLIP(image_tower(SMALL), HFTower(transformers.BertModel(cfg, add_pooling_layer=False), 16, pool), SMALL).eval()
        image, ids = batch(SMALL)
        z, out = model.text(ids)
        assert (z.shape, out['tokens'].shape) == ((3, 16), (3, 7, 24)) and out['mask'].sum(1).tolist() == [7, 6, 5]
        x = out['tokens'][2, :5]
        assert torch.allclose(z[2], model.text.head(x.mean(0) if pool == 'mean' else x[0]), atol=1e-6)
        assert torch.allclose(model.text(ids[2:, :5])[0], z[2:], atol=1e-5) # padding changes nothing
        assert not model.text(torch.zeros(1, 4, dtype=torch.int64))[0].isnan().any()
    model.lock_text_tower(); assert [n for n, p in model.text.named_parameters() if p.requires_grad] == ['head.weight']
    model.lock_text_tower(1); assert {n.split('.')[3] for n, p in model.text.named_parameters() if p.requires_grad and n.startswith('trunk')} == {'1'}
    with pytest.raises(UserError, match='unknown text pool'): HFTower(model.text.trunk, 16, 'max')

def test_missing_extras_are_named(monkeypatch):
    import importlib
    real = importlib.import_module
    def missing(name, *a):
        if name.split('.')[0] in ('timm', 'transformers'): raise ImportError(name)
        return real(name, *a)
    monkeypatch.setattr(importlib, 'import_module', missing)
    with pytest.raises(UserError, match=r"clipa_nb\[timm\]"): TimmTower('resnet10t', 16)
    with pytest.raises(UserError, match=r"clipa_nb\[transformers\]"): HFTower('bert', 16)

# mistakes

@pytest.mark.parametrize('change,words', [
    (dict(pool='clss'), 'did you mean cls'), (dict(pool='agv'), 'did you mean avg'), (dict(text_pool='middle'), 'unknown text pool'), (dict(pool='cls', cls=False), 'needs a class token'), (dict(text_pool='eott'), 'did you mean eot'), (dict(text_mask='casual'), 'did you mean causal'),
    (dict(act='gelu_tahn'), 'did you mean gelu_tanh'), (dict(text_act='swish'), 'unknown activation'), (dict(image_size=100), 'use 96 or 104'), (dict(context_length=1), 'too short'),
    (dict(image=Tower(30, 1, 4, 60)), 'heads|multiple of 4'), (dict(positions='rope'), 'unknown positions'), (dict(unit='max'), 'unknown normalisation')])
def test_configurations_that_cannot_be(change, words):
    with pytest.raises(UserError, match=words): build_clip(SMALL.replace(**change))

def test_choices_arrive_in_the_parts():
    assert image_tower(SMALL.replace(positions='learned')).positions.table.shape == (17, 32)
    assert text_tower(SMALL.replace(text_act='quick_gelu', text_ln_eps=1e-5)).encoder.blocks[0].mlp.extra_repr() == 'act=quick_gelu'
    assert len({repr(text_tower(SMALL.replace(text_mask=m, text_pool=p))) for m in TEXT_MASKS for p in TEXT_POOLS}) == len(TEXT_MASKS) * len(TEXT_POOLS)
    tower = build_clip(SMALL).visual
    assert tower.extra_repr() == 'n_prefix=1' and [n for n, _ in tower.named_children()] == ['patch', 'prefix', 'positions', 'dropper', 'pre_norm', 'encoder', 'pool', 'norm', 'head']

def test_positions_are_stretched_when_weights_are_loaded():
    torch.manual_seed(0)
    table = torch.randn(17, 48)
    assert _fit_grid(table, 65, 1).shape == (65, 48) and torch.equal(_fit_grid(table, 65, 1)[0], table[0])
    assert _fit_grid(table[:16], 65, 1) is not None and torch.equal(_fit_grid(table[:16], 65, 1), table[:16]) # no square grid: as it is
    short, long = build_clip(SMALL.replace(positions='learned')), build_clip(SMALL.replace(positions='learned', image_size=64, context_length=13))
    fitted = _fit_positions(long, short.state_dict())
    assert fitted['text.positions'].shape == (13, 24) and torch.allclose(fitted['text.positions'].mean(0), short.text.positions.mean(0), atol=2e-3)
    load_weights(long, short.state_dict())
    assert torch.equal(long.visual.patch.weight, short.visual.patch.weight) and torch.equal(long.visual.positions.table[0], short.visual.positions.table[0])

def test_one_temperature():
    model, state = build_clip(SMALL), build_clip(SMALL).state_dict()
    assert load_weights(model, state | {'logit_scale': torch.tensor([2.])}).logit_scale.item() == 2
    with pytest.raises(UserError, match=r'logit_scale \(2,\) for \(\)'): load_weights(model, state | {'logit_scale': torch.zeros(2)})

def test_texts_longer_than_the_context():
    model = build_clip(SMALL)
    with pytest.raises(UserError, match='has 7 positions'): model.encode_text(torch.ones(1, 8, dtype=torch.int64))
    assert model.encode_text(torch.ones(1, 4, dtype=torch.int64)).shape == (1, 16)

@pytest.mark.parametrize('ids,words', [(torch.tensor([[60]]), 'knows 0 to 59'), (torch.tensor([[-1, 3]]), 'from -1 to 3'), (torch.tensor([3, 4]), 'expected token ids'), (torch.zeros(1, 3), 'expected token ids')])
def test_ids_of_another_vocabulary(ids, words):
    with pytest.raises(UserError, match=words): build_clip(SMALL).encode_text(ids)

@pytest.mark.parametrize('image,words', [(torch.zeros(1, 3, 30, 32), 'not divisible by patch 8'), (torch.zeros(3, 32, 32), r'expected \[B,3,H,W\]'), (torch.zeros(1, 4, 32, 32), r'expected \[B,3,H,W\]')])
def test_pictures_that_do_not_fit(image, words):
    with pytest.raises(UserError, match=words): build_clip(SMALL).encode_image(image)

@pytest.mark.parametrize('shape', [(2, 32, 32, 3), (2, 4, 32, 32), (2, 1, 32, 32), (3, 32, 32)])
def test_bytes_that_are_no_pictures(shape):
    with pytest.raises(UserError, match=r'found bytes of shape .* expected images \[B,3,H,W\]'): build_clip(SMALL).encode_image(torch.zeros(shape, dtype=torch.uint8))

def test_asking_for_the_shape_of_bytes_leaves_nothing_in_the_graph():
    model, graphs = build_clip(SMALL), []
    def keep(graph, example): graphs.append([n.target for n in graph.graph.nodes if n.op.startswith('call')]); return graph.forward
    bytes_ = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    torch._dynamo.reset()
    with torch.no_grad(): got = torch.compile(model.pixels, fullgraph=True, backend=keep)(bytes_)
    assert torch.equal(got, model.pixels(bytes_)) and len(graphs) == 1
    assert [getattr(t, '__name__', t) for t in graphs[0]] in (['sub', 'truediv', 'to'], ['sub', 'truediv'])
    torch._dynamo.reset()
    with pytest.raises(Exception, match='expected images'): torch.compile(model.pixels, fullgraph=True, backend=keep)(bytes_.permute(0, 2, 3, 1))
    torch._dynamo.reset()

def test_a_temperature_in_single_precision_beside_towers_in_half():
    model, image, ids = build_clip(SMALL), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), batch(SMALL, 2)[1]
    want = model.logit_scale.detach().clone()
    model.bfloat16(); model.logit_scale.data = want.clone()
    assert model.encode_image(image).dtype == torch.bfloat16
    assert torch.equal(model(image, ids)[2].detach(), want.exp())

def test_one_graph_for_the_compiler():
    "torch.compile sees the whole model as one graph: lazily computed tokens, dropped patches and recomputed blocks included."
    model = build_clip(SMALL.replace(text_mask='causal', text_pool='eot', image_strategy='random', image_ratio=0.5, pool='map', checkpointing='selective')).train()
    torch._dynamo.reset()
    seen = torch._dynamo.explain(model)(*batch(SMALL))
    assert (seen.graph_count, seen.graph_break_count) == (1, 0), seen.break_reasons

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU: attention, checkpointing and towers ran on the CPU alone')
def test_on_a_gpu():
    torch.manual_seed(0)
    cfg = SMALL.replace(text_mask='causal_pad')
    model, (image, ids) = shaken(cfg), batch(cfg)
    want = [z.detach() for z in model(image, ids)[:2]]
    model.cuda()
    for how in ('none', 'full', 'selective'):
        model.set_grad_checkpointing(how)
        got = model(image.cuda(), ids.cuda())
        assert all(torch.allclose(a.detach().cpu(), b, atol=1e-5) for a, b in zip(got, want))
        got[0].sum().backward()
    q = torch.randn(3, 2, 4, 9, 16, device='cuda')
    for mask in (None, 'causal', pad_mask(torch.ones(2, 9, dtype=torch.int64, device='cuda'))[:, None, None]):
        assert torch.allclose(attention(*q, mask, 'matmul'), attention(*q, mask, 'sdpa'), atol=1e-5)


# --- the seams: draws, hidden layers, contexts, several queries, a model that builds itself ---

def small(**changes):
    tower = SIZES['S/16'].image.replace(width=32, depth=2, heads=2, mlp=64)
    return ModelConfig(image=tower, text=tower, embed_dim=16, patch=8, image_size=32, context_length=8, vocab_size=50).replace(**changes)

def test_a_sample_is_encoded_alike_in_any_batch_while_tokens_are_dropped():
    from clipa_nb.core import draws_of
    model = small(image_strategy='random', image_ratio=0.5).build().double().train()
    image, draw = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), draws_of(0, range(6))
    whole = model.encode_image(image, draw=draw)
    parts = torch.cat([model.encode_image(image[i:i + 2], draw=draw[i:i + 2]) for i in (0, 2, 4)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model.encode_image(image, draw=draws_of(1, range(6))), whole)

def test_hidden_layers_come_on_request():
    model = small(cls=True).build().eval()
    image, text = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), torch.randint(1, 50, (2, 8))
    _, out = model.visual(model.pixels(image), hidden=True)
    assert [tuple(x.shape) for x in out['hidden']] == [(2, 17, 32)] * 2 and out['prefix'].shape == (2, 1, 32) and out['tokens'].shape == (2, 16, 32)
    torch.testing.assert_close(model.visual.norm(out['hidden'][-1])[:, 1:], out['tokens'])
    _, out = model.text(text, hidden=True)
    torch.testing.assert_close(model.text.norm(out['hidden'][-1]), out['tokens'])
    assert 'hidden' not in model.text(text)[1] and 'hidden' not in model.visual(model.pixels(image))[1]

@pytest.mark.parametrize('how', ['none', 'full', 'selective'])
def test_a_block_looks_at_a_context(how):
    torch.manual_seed(0)
    encoder = init_encoder(Encoder(32, 2, 2, 64, checkpointing=how, context=48)).double()
    x, context = torch.randn(3, 5, 32).double(), torch.randn(3, 7, 48).double().requires_grad_()
    out = encoder(x, 'causal', context=context)
    out.square().sum().backward()
    assert context.grad.abs().sum() > 0 and all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in encoder.named_parameters() if 'kv_proj' in n and 'weight' in n)
    other = context.detach().clone()
    other[1] += 1
    moved = (encoder(x, 'causal', context=other) - out).abs().amax((1, 2))
    assert moved[1] > 1e-6 and moved[0] == moved[2] == 0

def test_a_masked_context_token_is_never_read():
    encoder = init_encoder(Encoder(32, 1, 2, 64, context=48)).double()
    x, context, real = torch.randn(2, 5, 32).double(), torch.randn(2, 7, 48).double(), torch.ones(2, 7, dtype=torch.bool)
    real[:, 5:] = False
    other = context.clone()
    other[:, 5:] = 99.
    torch.testing.assert_close(encoder(x, context=other, context_mask=real), encoder(x, context=context, context_mask=real))

def test_a_context_that_nobody_expects_or_brings_is_refused():
    with pytest.raises(UserError, match='found a context'): Encoder(32, 1, 2, 64)(torch.zeros(1, 2, 32), context=torch.zeros(1, 2, 32))
    with pytest.raises(UserError, match='found no context'): Encoder(32, 1, 2, 64, context=32)(torch.zeros(1, 2, 32))

def test_cross_attention_is_torchs():
    from clipa_nb.transformer import CrossAttention
    ours, theirs = CrossAttention(32, 4, 24).double(), nn.MultiheadAttention(32, 4, batch_first=True, kdim=24, vdim=24).double()
    with torch.no_grad():
        k, v = ours.kv_proj.weight.chunk(2)
        for name, w in (('q_proj_weight', ours.q_proj.weight), ('k_proj_weight', k), ('v_proj_weight', v)): getattr(theirs, name).copy_(w)
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.kv_proj.bias]))
        theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, c = torch.randn(3, 5, 32).double(), torch.randn(3, 7, 24).double()
    torch.testing.assert_close(ours(x, c), theirs(x, c, c, need_weights=False)[0])

def test_a_pool_may_return_several_queries():
    from clipa_nb.clip import AttentionPool, init_pool
    torch.manual_seed(0)
    many, norm, x = init_pool(AttentionPool(32, 4, 64, queries=3)).double(), nn.LayerNorm(32).double(), torch.randn(2, 9, 32).double()
    out = many(x, norm)
    assert out.shape == (2, 3, 32)
    one = AttentionPool(32, 4, 64).double()
    for i in range(3): # each query alone gives its row
        state = many.state_dict()
        one.load_state_dict(dict(state, **{'attn.probe': state['attn.probe'][i]}))
        torch.testing.assert_close(one(x, norm), out[:, i])

def test_a_config_builds_its_model_at_a_stage():
    import types
    stage = types.SimpleNamespace(image_size=16, context_length=4, image_strategy='random', image_ratio=0.5, checkpointing='full', samples=3)
    cfg = small().at(stage)
    assert (cfg.image_size, cfg.context_length, cfg.image_strategy, cfg.image_ratio, cfg.checkpointing) == (16, 4, 'random', 0.5, 'full')
    torch.manual_seed(0); a = cfg.build()
    torch.manual_seed(0); b = build_clip(cfg)
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items()) and a.cfg is cfg
    with pytest.raises(UserError, match='not divisible'): small(image_size=33).check()

def test_models_without_text_or_temperature():
    model = CLIP.from_config(small(init_scale=None), text=None)
    batch = dict(image=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), text=torch.zeros(2, 8, dtype=torch.int64))
    assert model.logit_scale is None and list(model.embed(batch)) == ['image'] and not [k for k in model.state_dict() if k.startswith(('text', 'logit'))]
    with pytest.raises(UserError, match='no text tower'): model.encode_text(batch['text'])
    model.set_grad_checkpointing()

def test_similarity_is_the_cosine_of_what_embed_gives():
    model = small().build().eval()
    batch = dict(image=torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8), text=torch.randint(1, 50, (3, 8)))
    z = model.embed(batch)
    torch.testing.assert_close(model.similarity(z['image'], z['text']), F.cosine_similarity(z['image'][:, None], z['text'][None], dim=-1))

def test_towers_of_another_make_are_built_from_their_configuration():
    pytest.importorskip('timm'), pytest.importorskip('transformers')
    from clipa_nb.clip import TrunkConfig
    from clipa_nb.core import Config
    bert = dict(model_type='bert', hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=50)
    cfg = TrunkConfig(**dict(vars(small()), image_trunk='timm:resnet18', text_trunk=bert))
    model, again = cfg.build().eval(), Config.from_json(cfg.to_json()).build().eval()
    again.load_state_dict(model.state_dict())
    batch = dict(image=torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), text=torch.randint(1, 50, (2, 8)))
    for side, z in model.embed(batch).items(): assert torch.equal(again.embed(batch)[side], z)
    with pytest.raises(UserError, match="expected 'timm:NAME'"): cfg.replace(image_trunk='keras:x').build()
    with pytest.raises(UserError, match='did you mean resnet18'): cfg.replace(image_trunk='timm:resnet81').build()

def test_weights_that_do_not_fit_are_named():
    model = build_clip(SMALL)
    broken = model.state_dict() | {'extra': torch.zeros(1), 'visual.head.weight': torch.zeros(7, 32)}
    broken.pop('text.norm.bias')
    says = 'missing: text.norm.bias; unknown: extra; of another shape: visual.head.weight (7, 32) for (16, 32)'
    with pytest.raises(UserError, match=re.escape(says)): load_weights(model, broken)
