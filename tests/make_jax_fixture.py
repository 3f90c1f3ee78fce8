#!/usr/bin/env python
"""Make tests/fixtures/jax: a tiny CLIPA-v2 model written with flax's own layers, its weights in the layout of the published npz files, and what it computes.

    python -m venv /tmp/flax && /tmp/flax/bin/pip install jax flax ml_dtypes && /tmp/flax/bin/python tests/make_jax_fixture.py

Nothing of this project is imported, so that a mistake in our table of names cannot hide here. Made once, with jax 0.10.2 and flax 0.12.8.
Written: weights_fp32.npz and weights_bf16.npz ('params/…' → array; numpy stores bf16 as raw bytes of two), and io.npz (inputs, and the outputs of both files in fp32).
"""
from pathlib import Path
import flax.linen as nn
import jax, jax.numpy as jnp
import ml_dtypes, numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

WIDTH, DEPTH, HEADS, MLP, PATCH, EMBED = 24, 2, 3, 40, 4, 10 # of the image tower; three heads and an odd MLP, so that no two axes can be confused
TWIDTH, TDEPTH, THEADS, TMLP, VOCAB, CONTEXT = 20, 2, 2, 36, 30, 6

class MlpBlock(nn.Module):
    mlp: int
    @nn.compact
    def __call__(self, x):
        y = nn.gelu(nn.Dense(self.mlp)(x), approximate=True) # Dense_0: flax counts in the order of construction, so not nested in the next
        return nn.Dense(x.shape[-1])(y)

class Block(nn.Module):
    heads: int
    mlp: int
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
        return x + MlpBlock(self.mlp)(nn.LayerNorm()(x))

class Encoder(nn.Module):
    depth: int
    heads: int
    mlp: int
    @nn.compact
    def __call__(self, x):
        for i in range(self.depth): x = Block(self.heads, self.mlp, name=f'encoderblock_{i}')(x)
        return x

def sincos(h, w, width):
    "The fixed positions: column first, the last speed is 1/10000; zero for the class token in front."
    speed = 10_000. ** -(jnp.arange(width // 4) / (width // 4 - 1))
    rows, cols = jnp.repeat(jnp.arange(h), w), jnp.tile(jnp.arange(w), h)
    x, y = cols[:, None] * speed, rows[:, None] * speed
    return jnp.concatenate([jnp.zeros((1, width)), jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], 1)])

class Image(nn.Module):
    pool: str = 'gap'
    @nn.compact
    def __call__(self, image): # [B,H,W,3]
        x = nn.Conv(WIDTH, (PATCH, PATCH), strides=(PATCH, PATCH), padding='VALID', use_bias=False, name='embedding')(image)
        b, h, w, c = x.shape
        cls = self.param('cls', nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, (b, 1, 1)), x.reshape(b, h * w, c)], 1) + sincos(h, w, c)
        x = Encoder(DEPTH, HEADS, MLP, name='Transformer')(x)
        norm = nn.LayerNorm(name='encoder_norm')
        x = norm(x[:, 1:].mean(1)) if self.pool == 'gap' else norm(x)[:, 0]
        return nn.Dense(EMBED, use_bias=False, name='head')(x)

class Text(nn.Module):
    @nn.compact
    def __call__(self, ids): # [B,T]
        x = nn.Embed(VOCAB, TWIDTH)(ids)
        x = x + self.param('pos_embedding', nn.initializers.normal(0.01), (1, CONTEXT, TWIDTH))
        x = nn.LayerNorm(name='encoder_norm')(Encoder(TDEPTH, THEADS, TMLP, name='Transformer')(x))
        return nn.Dense(EMBED, use_bias=False, name='head')(x[:, -1])

class Two(nn.Module):
    pool: str = 'gap'
    def setup(self):
        self.img, self.txt = Image(self.pool), Text()
        self.t = self.param('t', nn.initializers.constant(np.log(1 / 0.07)), (1,))
    def __call__(self, image, ids):
        zi, zt = self.img(image), self.txt(ids)
        unit = lambda z: z / (jnp.linalg.norm(z, axis=1, keepdims=True) + 1e-8)
        return unit(zi), unit(zt), jnp.exp(self.t)

def main():
    rng, out = np.random.default_rng(0), Path(__file__).parent / 'fixtures' / 'jax'
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update('jax_default_matmul_precision', 'highest')
    io = dict(image=rng.normal(size=(3, 12, 12, 3)), wide=rng.normal(size=(2, 20, 20, 3)), ids=rng.integers(0, VOCAB, (3, CONTEXT)))
    io = {k: v.astype(np.float32 if v.dtype.kind == 'f' else np.int64) for k, v in io.items()}
    params = flatten_dict(Two().init(jax.random.key(0), io['image'], io['ids'])['params'])
    params = {k: np.asarray(v + 0.1 * rng.normal(size=v.shape), np.float32) for k, v in params.items()} # every bias and norm too
    for name, dtype in (('fp32', np.float32), ('bf16', ml_dtypes.bfloat16)):
        stored = {k: v.astype(dtype) for k, v in params.items()}
        np.savez_compressed(out / f'weights_{name}.npz', **{'params/' + '/'.join(k): v for k, v in stored.items()})
        p = {'params': unflatten_dict({k: jnp.asarray(v.astype(np.float32)) for k, v in stored.items()})}
        for pool in ('gap', 'tok'):
            io[f'{name}_{pool}'], io[f'{name}_text'], io[f'{name}_scale'] = map(np.asarray, Two(pool).apply(p, io['image'], io['ids']))
            io[f'{name}_{pool}_wide'] = np.asarray(Two(pool).apply(p, io['wide'], io['ids'][:2])[0])
    np.savez_compressed(out / 'io.npz', **io)
    for f in sorted(out.glob('*.npz')): print(f.name, f.stat().st_size, 'bytes')

if __name__ == '__main__': main()
