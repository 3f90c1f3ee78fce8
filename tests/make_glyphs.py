"Draw digits and capital letters from the fonts that come with matplotlib into clipa_nb/assets/glyphs.npz, as small signed-distance masks. Needs the extra [demo]."
import argparse
from pathlib import Path
import numpy as np
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from scipy.ndimage import distance_transform_edt

CHARACTERS = '0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ'
TRAIN = ('DejaVuSans', 'DejaVuSans-Bold', 'DejaVuSerif', 'DejaVuSansMono-Oblique', 'STIXGeneral', 'cmss10')
HELD_OUT = ('cmtt10', 'STIXGeneralBolIta')
SIDE, REACH, RANGE = 32, 1.25, 0.5  # pixels of a mask, half-sizes it covers on each side, half-sizes between its edge value and its extremes
FINE = 16  # fine pixels in one of the mask's

def ink(font, character):
    "The character's ink as a tight boolean array, about 300 pixels high."
    face = FT2Font(str(Path(get_data_path()) / 'fonts' / 'ttf' / f'{font}.ttf'))
    face.set_size(300, 72); face.set_text(character); face.draw_glyphs_to_bitmap(antialiased=True)
    on = np.asarray(face.get_image()) > 127
    rows, cols = np.flatnonzero(on.any(1)), np.flatnonzero(on.any(0))
    return on[rows[0]:rows[-1] + 1, cols[0]:cols[-1] + 1]

def mask(font, character):
    "A [SIDE, SIDE] uint8 mask: 128 on the edge, more inside, less outside; the longer side reaches from -0.92 to 0.92 half-sizes."
    on = ink(font, character); n = SIDE * FINE; scale = 2 * 0.92 / max(on.shape)
    local = ((np.arange(n) + 0.5) / n * 2 - 1) * REACH  # half-sizes from the centre
    at = [np.floor(local / scale + s / 2).astype(int) for s in on.shape]
    keep = [(a >= 0) & (a < s) for a, s in zip(at, on.shape)]
    big = on[np.ix_(*(a.clip(0, s - 1) for a, s in zip(at, on.shape)))] & keep[0][:, None] & keep[1][None]
    inside = (distance_transform_edt(big) - distance_transform_edt(~big)) * (2 * REACH / n)
    small = inside.reshape(SIDE, FINE, SIDE, FINE)[:, FINE // 2 - 1:FINE // 2 + 1, :, FINE // 2 - 1:FINE // 2 + 1].mean((1, 3))
    return np.clip(np.round(128 + small * 127 / RANGE), 1, 255).astype(np.uint8)

def main():
    out = argparse.ArgumentParser(description=__doc__)
    out.add_argument('--out', type=Path, default=Path(__file__).parents[1] / 'clipa_nb' / 'assets' / 'glyphs.npz')
    path = out.parse_args().out; fonts = TRAIN + HELD_OUT
    masks = np.stack([[mask(f, c) for c in CHARACTERS] for f in fonts])
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, masks=masks, characters=np.array(CHARACTERS), fonts=np.array(fonts), n_train=np.int64(len(TRAIN)))
    print(f'{path}: {masks.shape} {masks.dtype}, {path.stat().st_size // 1024} KB')

if __name__ == '__main__': main()
