"CLIPPO in miniature: one tower reads pictures and pictures of text; there is no tokenizer (Tschannen et al. 2022)."
from dataclasses import dataclass
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from clipa_nb.clip import CLIP, ModelConfig
from clipa_nb.core import Config
from clipa_nb.recipes import recipe, smoke

class Renderer:
    "Captions as pictures, uint8 [N,3,S,S]."
    context_length = 32
    def __init__(self, size): self.size, self.font = size, ImageFont.load_default()

    def draw_one(self, text):
        image = Image.new('RGB', (self.size, self.size), (127, 127, 127))
        lines = [text[i:i + self.size // 6] for i in range(0, len(text), self.size // 6)]
        ImageDraw.Draw(image).multiline_text((0, 0), '\n'.join(lines), fill=(0, 0, 0), font=self.font, spacing=0)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def __call__(self, texts, context_length=None, strategy=None, draw=None):
        return torch.stack([self.draw_one(t) for t in ([texts] if isinstance(texts, str) else texts)])

    def save(self, folder): pass

@dataclass(frozen=True)
class Rendered(Config):
    size: int = 64
    def check(self, rows): pass
    def open(self, captions, folder, rows, context_length, comm=None): return Renderer(self.size)

class OneTower(CLIP):
    def encode_text(self, text, normalize=False, draw=None): return self.encode_image(text, normalize, draw)

@dataclass(frozen=True)
class OneTowerConfig(ModelConfig):
    def build(self, output_dict=False): return OneTower.from_config(self, output_dict, text=None)

TOY = smoke(recipe('toy'))
CLIPPO = TOY.replace(name='clippo', model=OneTowerConfig(**vars(TOY.model)), tokenizer=Rendered())
