"SLIP in miniature: two more views of each picture, and a projector that is trained with the loss (Mu et al. 2021)."
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from clipa_nb.infonce import Contrastive, ContrastiveConfig, row_mean
from clipa_nb.recipes import recipe, smoke

def nt_xent(a_bE, b_bE, valid_b, comm, scale=10.):
    "Find the other view of the same picture among all other views of all ranks."
    a_BE, b_BE, valid_B = comm.gather(a_bE), comm.gather(b_bE), comm.gather(valid_b)
    own_b = comm.rank * len(a_bE) + torch.arange(len(a_bE), device=a_bE.device)
    itself = F.one_hot(own_b, len(a_BE)).bool()
    same = (scale * a_bE @ a_BE.T).masked_fill(itself | ~valid_B, -torch.inf)
    other = (scale * a_bE @ b_BE.T).masked_fill(~valid_B & ~itself, -torch.inf)
    return F.cross_entropy(torch.cat([other, same], 1), own_b, reduction='none')

class Slip(Contrastive):
    needs = ('image', 'text', 'views')
    def __init__(self, width, weight):
        super().__init__()
        self.weight = weight
        self.projector = nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.GELU(), nn.Linear(width, width))

    def features(self, model, batch):
        views = [self.projector(model.encode_image(batch['views'][:, i], draw=batch['draw'])) for i in (0, 1)]
        a, b = (F.normalize(z, dim=-1) for z in views)
        return dict(super().features(model, batch), view_0=a, view_1=b)

    def loss(self, features, model, batch, comm):
        out = super().loss(features, model, batch, comm)
        a, b, valid = features['view_0'], features['view_1'], batch['valid']
        simclr = row_mean((nt_xent(a, b, valid, comm) + nt_xent(b, a, valid, comm)) / 2, valid, comm)
        return dict(out, loss=out['loss'] + self.weight * simclr, simclr=simclr)

@dataclass(frozen=True)
class SlipConfig(ContrastiveConfig):
    weight: float = 1.
    def build(self, model): return Slip(model.cfg.embed_dim, self.weight)

SLIP = smoke(recipe('toy')).replace(name='slip', objective=SlipConfig())
