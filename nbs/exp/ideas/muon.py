"""An idea for the speedrun: the layers' matrices learn by orthogonalised momentum (Muon), everything else by AdamW.

    clipa train nbs/exp/ideas/muon.py:RECIPE --speedrun

Muon: Keller Jordan and others, https://kellerjordan.github.io/posts/muon/ (2024). A matrix's step is its momentum with
all singular values set to about 1 by five Newton–Schulz iterations, scaled so that its entries are as large as AdamW's
(Moonlight, https://arxiv.org/abs/2502.16982); so the learning rate and the decay of the recipe stay what they are.
"""
from dataclasses import dataclass
import torch
from clipa_nb.core import Config
from clipa_nb.optimization import make_optimizer
from clipa_nb.recipes import TOY

def orthogonal(
    x_NRC: torch.Tensor, # matrices
    steps: int = 5, # of the iteration
) -> torch.Tensor: # the same shape, all singular values between about 0.7 and 1.2
    "The nearest matrices with orthonormal rows, roughly: a quintic Newton–Schulz iteration."
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x

class MuonAdamW(torch.optim.Optimizer):
    "Groups with `muon` True take orthogonal steps; the others are AdamW's."
    def __init__(self,
        adamw: torch.optim.AdamW, # over what is no matrix of a layer; its groups are shared
        matrices: list, # parameters [R,C]; a fused query–key–value matrix counts as three
        thirds: set, # which of them are fused
        lr: float, # peak rate
        weight_decay: float, # of the matrices
        momentum: float, # memory of the gradient
    ):
        self.adamw, self.thirds = adamw, thirds
        own = dict(params=matrices, lr=lr, lr_multiple=1., weight_decay=weight_decay, momentum=momentum)
        super().__init__([own], {})
        self.param_groups += adamw.param_groups

    @torch.no_grad()
    def step(self, closure=None):
        self.adamw.step()
        group, by_shape = self.param_groups[0], {}
        for p in group['params']:
            if p.grad is None: continue
            moment = self.state[p].setdefault('moment', torch.zeros_like(p))
            moment.lerp_(p.grad, 1 - group['momentum'])
            ahead = p.grad.lerp(moment, group['momentum'])
            rows = ahead.chunk(3) if p in self.thirds else (ahead,)
            by_shape.setdefault(tuple(rows[0].shape), []).append((p, rows))
        for (R, C), found in by_shape.items():
            steps = orthogonal(torch.stack([r for _, rows in found for r in rows])) * (0.2 * max(R, C) ** 0.5)
            steps = iter(steps)
            for p, rows in found:
                p.mul_(1 - group['lr'] * group['weight_decay'])
                p.sub_(torch.cat([next(steps) for _ in rows]), alpha=group['lr'])

@dataclass(frozen=True)
class Muon(Config):
    "What a stage says about its optimiser."
    weight_decay: float = 0.1 # of what decays
    momentum: float = 0.95 # of the matrices
    beta1: float = 0.9 # of everything else
    beta2: float = 0.95 # of everything else

    def build(self, module, lr, rules=()):
        adamw = make_optimizer(module, lr, self.weight_decay, (self.beta1, self.beta2), rules=rules)
        named = {p: n for n, p in module.named_parameters() if p.requires_grad}
        matrices = [p for p, n in named.items() if p.ndim == 2 and '.blocks.' in n]
        thirds = {p for p in matrices if p.shape[0] == 3 * p.shape[1]}
        taken = set(matrices)
        for group in adamw.param_groups: group['params'] = [p for p in group['params'] if p not in taken]
        return MuonAdamW(adamw, matrices, thirds, lr, self.weight_decay, self.momentum)

RECIPE = TOY.replace(name='muon').with_stages(optimizer=Muon())
