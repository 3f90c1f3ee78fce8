"FILIP in miniature: the similarity of a picture and a caption is that of their best-matching tokens (Yao et al. 2021)."
from dataclasses import dataclass
import torch
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.infonce import Objective, ObjectiveConfig, partner_loss, row_mean
from clipa_nb.recipes import recipe, smoke

class Filip(CLIP):
    def embed(self, batch):
        out = {}
        if 'image' in batch:
            tokens = self.visual(self.pixels(batch['image']), draw=batch.get('draw'))[1]['tokens']
            out['image'] = self.unit(self.visual.head(tokens))
        if 'text' in batch:
            tokens, mask = (self.text(batch['text'])[1][k] for k in ('tokens', 'mask'))
            out['text'] = dict(tokens=self.unit(self.text.head(tokens)), mask=mask)
        return out

    def token_similarities(self, image_nNE, text):
        "Both directions, [n,m]: over patches the mean of the best word, over words that of the best patch; no padding."
        s_nmNT = torch.einsum('nie,mte->nmit', image_nNE, text['tokens'])
        words = text['mask'][None].to(s_nmNT.dtype)
        to_text = s_nmNT.masked_fill(~text['mask'][None, :, None], -torch.inf).amax(3).mean(2)
        return to_text, (s_nmNT.amax(2) * words).sum(2) / words.sum(2)

    def similarity(self, image, text): return sum(self.token_similarities(image, text)) / 2

@dataclass(frozen=True)
class FilipConfig(ModelConfig):
    def build(self, output_dict=False): return Filip.from_config(self, output_dict)

class TokenWise(Objective):
    needs = ('image', 'text')
    def features(self, model, batch):
        z = model.embed(batch)
        return dict(image=z['image'], **z['text'])

    def loss(self, features, model, batch, comm):
        everybody, scale = {k: comm.gather(v) for k, v in features.items()}, model.logit_scale.exp()
        to_text = scale * model.token_similarities(features['image'], everybody)[0]
        to_image = scale * model.token_similarities(everybody['image'], features)[1].T
        rows_b = sum(partner_loss(s, batch['valid'], comm) for s in (to_text, to_image)) / 2
        return dict(loss=row_mean(rows_b, batch['valid'], comm))

@dataclass(frozen=True)
class TokenWiseConfig(ObjectiveConfig):
    def build(self, model): return TokenWise()

TOY = smoke(recipe('toy'))
FILIP = TOY.replace(name='filip', model=FilipConfig(**vars(TOY.model)), objective=TokenWiseConfig())
