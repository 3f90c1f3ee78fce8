"OWL-ViT in miniature: every patch proposes a box and a name; names are texts (Minderer et al. 2022)."
import itertools
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.infonce import Objective, ObjectiveConfig, row_mean
from clipa_nb.recipes import recipe, smoke

class Owl(CLIP):
    "A CLIP whose patches answer: `detect` gives boxes [B,N,4] (cxcywh in 0..1) and name embeddings [B,N,E]."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        D, E = self.cfg.image.width, self.cfg.embed_dim
        self.box = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.Linear(D, 4))
        self.name = nn.Linear(D, E)
        self.shift_scale = nn.Linear(D, 2)
        nn.init.zeros_(self.box[-1].weight)
        nn.init.zeros_(self.box[-1].bias)

    def box_prior(self, grid, device):
        "Each patch starts with a box of its own size at its own place."
        h, w = grid
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing='ij')
        prior = torch.stack([(x + 0.5) / w, (y + 0.5) / h, 0 * x + 1 / w, 0 * y + 1 / h], -1)
        return torch.logit(prior.flatten(0, 1), eps=1e-4)

    def detect(self, image, draw=None):
        _, out = self.visual(self.pixels(image), draw=draw)
        boxes = torch.sigmoid(self.box(out['tokens']) + self.box_prior(out['grid'], image.device))
        shift, scale = self.shift_scale(out['tokens']).unbind(-1)
        return boxes, self.unit(self.name(out['tokens'])), shift, F.elu(scale) + 1

@dataclass(frozen=True)
class OwlConfig(ModelConfig):
    def build(self, output_dict=False): return Owl.from_config(self, output_dict)

def match(cost_NK):
    "The cheapest patch for each object, no patch twice; objects are few, so every choice of good patches is tried."
    K = cost_NK.shape[1]
    good = cost_NK.topk(K, 0, largest=False).indices.flatten().unique().tolist()
    return min(itertools.permutations(good, K), key=lambda rows: sum(float(cost_NK[n, k]) for k, n in enumerate(rows)))

class Detection(Objective):
    "Boxes by L1 distance, names by a sigmoid over the names of this picture; nothing needs another sample."
    needs = ('image', 'boxes', 'n_boxes', 'box_text')
    def features(self, model, batch):
        boxes, names, shift, scale = model.detect(batch['image'], draw=batch['draw'])
        b, K, T = batch['box_text'].shape
        texts = model.encode_text(batch['box_text'].view(b * K, T), normalize=True).view(b, K, -1)
        logits = (torch.einsum('bne,bke->bnk', names, texts) + shift[..., None]) * scale[..., None]
        rows = [self.one(*row) for row in zip(boxes, logits, batch['boxes'], batch['n_boxes'].tolist())]
        return dict(row=torch.stack(rows))

    def one(self, boxes_N4, logits_NK, right_K4, n):
        logits, right = logits_NK[:, :n], right_K4[:n]
        target = torch.zeros_like(logits)
        if n == 0: return boxes_N4.sum() * 0 + logits_NK.sum() * 0
        with torch.no_grad(): rows = match(torch.cdist(boxes_N4, right.to(boxes_N4), p=1) - logits.sigmoid())
        target[list(rows), range(n)] = 1
        return (boxes_N4[list(rows)] - right).abs().sum(1).mean() + F.binary_cross_entropy_with_logits(logits, target)

    def loss(self, features, model, batch, comm): return dict(loss=row_mean(features['row'], batch['valid'], comm))

@dataclass(frozen=True)
class DetectionConfig(ObjectiveConfig):
    def build(self, model): return Detection()

TOY = smoke(recipe('toy'))
UNUSED = ('visual.head.*', 'logit_scale') # nobody asks for one embedding a picture
OWLVIT = TOY.replace(name='owlvit', model=OwlConfig(**vars(TOY.model)), objective=DetectionConfig()).with_stages(
    image_strategy='none', image_ratio=0., frozen=UNUSED)
