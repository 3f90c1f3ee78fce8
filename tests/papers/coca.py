"CoCa in miniature: a decoder writes the caption while it looks at the picture (Yu et al. 2022)."
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.infonce import Contrastive, ContrastiveConfig, row_mean
from clipa_nb.recipes import recipe, smoke
from clipa_nb.transformer import CAUSAL, Encoder, init_encoder

class CoCa(CLIP):
    "The text tower's tokens go on through blocks that look at the picture; inference needs them: they are the model's."
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        t, i = self.cfg.text, self.cfg.image
        self.decoder = init_encoder(Encoder(t.width, self.cfg.decoder_depth, t.heads, t.mlp, context=i.width))
        self.norm, self.words = nn.LayerNorm(t.width), nn.Linear(t.width, self.cfg.vocab_size, bias=False)
        nn.init.normal_(self.words.weight, std=t.width**-0.5)

    def caption_logits(self, image_tokens, text):
        tokens = self.text(text)[1]['tokens']
        return self.words(self.norm(self.decoder(tokens, CAUSAL, context=image_tokens)))

    @torch.no_grad()
    def generate(self, image, length=8, first=1):
        "Greedy captions, int64 [B, length]."
        tokens = self.visual(self.pixels(image))[1]['tokens']
        ids = torch.full((len(image), 1), first, device=image.device)
        for _ in range(length - 1): ids = torch.cat([ids, self.caption_logits(tokens, ids)[:, -1:].argmax(-1)], 1)
        return ids

@dataclass(frozen=True)
class CoCaConfig(ModelConfig):
    decoder_depth: int = 1
    def build(self, output_dict=False): return CoCa.from_config(self, output_dict)

class Captioning(Contrastive):
    "Contrast of the two towers, and the next word of the caption."
    needs = ('image', 'text', 'caption')
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def features(self, model, batch):
        z_image, out = model.visual(model.pixels(batch['image']), draw=batch['draw'])
        logits_bTV = model.caption_logits(out['tokens'], batch['caption'][:, :-1])
        right_bT = batch['caption'][:, 1:]
        each_bT = F.cross_entropy(logits_bTV.transpose(1, 2), right_bT, ignore_index=0, reduction='none')
        caption_b = each_bT.sum(1) / right_bT.ne(0).sum(1).clamp_min(1)
        return dict(image=model.unit(z_image), text=model.encode_text(batch['text'], normalize=True), caption=caption_b)

    def loss(self, features, model, batch, comm):
        out = super().loss(features, model, batch, comm)
        caption = row_mean(features['caption'], batch['valid'], comm)
        return dict(out, loss=out['loss'] + self.weight * caption, caption=caption)

@dataclass(frozen=True)
class CaptioningConfig(ContrastiveConfig):
    weight: float = 2.
    def build(self, model): return Captioning(self.weight)

TOY = smoke(recipe('toy'))
MODEL = CoCaConfig(**dict(vars(TOY.model), text_mask='causal'))
COCA = TOY.replace(name='coca', model=MODEL, objective=CaptioningConfig())
