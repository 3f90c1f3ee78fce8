#!/usr/bin/env python
"""Make tests/fixtures/tokenizer/official.json: the ids that CLIPA's own text operations give to hard strings.

    python -m venv tf && tf/bin/pip install tensorflow-cpu==2.21.0 tensorflow-text==2.21.1
    tf/bin/python tests/make_bert_fixture.py [--vocab ../shared/data/bert-base-uncased-vocab.txt] [--every-character]

The operations are those of CLIPA's JAX pipeline: `tensorflow_text.BertTokenizer(vocab, lower_case=True)`, then
`pad_model_inputs(ids, T - 1)`, then [CLS] in front. Expected ids are made with two vocabularies: the published one (its
pieces are not stored, only ids) and small_vocab.txt, which this script writes too. `blocks` are digests of the words that
TensorFlow finds in a<c>b, for every character c of Unicode 3.2, 256 code points at a time: they tell a wrong
normalisation anywhere. Nothing here is imported by the tests; they read the JSON.

--every-character compares, instead of writing, `clipa_nb.tokenizer.official_words` with TensorFlow on all 1,112,064 code
points in two surroundings, and prints how many differ.
"""
import argparse, hashlib, json, os, random, sys, unicodedata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / 'tests' / 'fixtures' / 'tokenizer'
OLD = unicodedata.ucd_3_2_0 # the same table in every Python

GROUPS = {
    'ordinary': ['a photo of a cat', 'A photo of the large dog.', 'two striped circles and a turquoise rhombus', "it's 5 o'clock, isn't it?", 'Red-and-blue e-mail: me@site.org',
        'http://www.example.com/a_b?c=d&e=f#g', 'PRICE: $5.99 (was $10)', '3D printed 10km @home #1', 'U.S.A. vs. u.s.a', 'hello-world/under_score', 'a bad photo of the tench.', 'itap of a hammerhead shark.',
        'a\\b|c~d^e`f', '<b>bold</b> &amp; &lt;i&gt;', 'x=y+z*2-1', 'one "two" \'three\'', '100% {curly} [square]', 'semi;colon:comma,stop.', '', ' ', '   a   b   '],
    'sharp s and case folding': ['straße', 'STRASSE STRAẞE', 'Fußball im Schloß', 'großer weißer Hai', 'ß', 'ẞ', 'ΟΔΥΣΣΕΥΣ', 'Ὀδυσσεύς', 'σς', 'ΰ ΐ', 'ᾳ ᾼ ῳ', 'ǰ ŉ ẖ ẗ', 'ſtill long ſ', 'İstanbul ıssız', 'KELVIN \u212a and \u212b', 'Ω \u2126',
        'Ა ა Ꭰ ꭰ ᏸ', '𐐀𐐨', 'ǅ ǆ Ǆ', 'Ǌ ǋ', 'ÆØÅ æøå', 'Œuvre œ', 'ĳ Ĳ', 'ϐ ϑ ϕ ϖ ϰ ϱ ϵ', 'և', 'ΆΈΉ', 'Ж ж Й й Ё ё', 'µ μ', 'ẛ', 'ᲀ ᲈ'],
    'ligatures and compatibility': ['ﬁre', 'ﬂower', 'oﬀer oﬃce baﬄe', 'ﬅ ﬆ', 'ﬓ ﬔ', '½ cup', '1½ ¼ ¾ ⅓ ⅞', '①②③ ⑩ ⑳', 'Ⓐ ⓐ', '㈠ ㈱', 'brand™ ℠ ©2020 ®', '20℃ 70℉', '№ 5 ℡', '5㎏ 10㎡ 3㎝', 'x² H₂O 10⁻³', 'Ⅻ ⅳ ⅿ',
        '𝐁𝐨𝐥𝐝 𝔉𝔯𝔞𝔨 𝕊', '㍿ ㋀ ㏂', 'ª º', '… ‥ ․', '‼ ⁇ ⁈', 'Å', 'ﷺ', 'ﬀﬁﬂ', 'ŀ ŉ', '′ ″ ‴ ⁗', '☎ ℻', 'ℌ ℍ ℓ ℕ', '∬ ∭', '㌀ ㍍', 'Ǉ', '¹ ² ³', '⒜ ⒈', '🄰 🅰 🈁'],
    'full and half width': ['ＡＢＣ ａｂｃ', '１２３', 'ＲＥＤ　ｃｉｒｃｌｅ', '！？＂＃', '（ａ）［ｂ］', '￥100 ￡5 ￠', 'ｶﾀｶﾅ', 'ｶﾞｷﾞ ﾊﾟ', 'ﾡﾢ ￦', '～＿｀', '｡｢｣', 'ＣＬＳ', '［ＣＬＳ］'],
    'replacement character': ['\ufffd', 'a\ufffdb', 'caf\ufffd au lait', '\ufffd\ufffd red', 'red \ufffd circle', 'end\ufffd.'],
    'control characters': [*(f'red{chr(c)}circle' for c in (0, 1, 7, 8, 9, 10, 11, 12, 13, 14, 27, 28, 29, 30, 31, 127, 128, 133, 145, 159)), 'a\r\nb', '\x00', 'tab\tnew\nline', '\x1b[31mred\x1b[0m',
        *(f'a{chr(c)}b' for c in (0x600, 0x605, 0x6dd, 0x70f, 0x8e2, 0xfff9, 0xfffa, 0xfffb, 0x110bd))],
    'invisible characters': [*(f'blue{chr(c)}bird' for c in (0xad, 0x34f, 0x61c, 0x115f, 0x1160, 0x17b4, 0x180b, 0x180e, 0x200b, 0x200c, 0x200d, 0x200e, 0x200f, 0x202a, 0x202e, 0x2060, 0x2064, 0x206f, 0x3164, 0xfe00, 0xfe0f, 0xfeff, 0xffa0, 0xe0001, 0xe0041, 0xe0100)),
        '\ufeffstart of a file', 'zero\u200bwidth joi\u200dner', 'so\u00adft hy\u00adphen', '\u200b', '\u00ad\u00ad'],
    'special tokens spelled out': ['[CLS]', '[SEP]', '[MASK]', '[PAD]', '[UNK]', '[cls] [Sep]', 'a [MASK] of a dog', '[CLS] a photo [SEP]', '[[CLS]]', '[ CLS ]', 'x[SEP]y', '[unused0] [unused99]', '##ing', 'play ##ing', 'c# c## ###', '[CLS', 'SEP]', '<|endoftext|>', '</s>'],
    'accents': ['naïve café', 'nai\u0308ve cafe\u0301', 'Ångström', 'Übergröße', 'crème brûlée', 'piñata', 'Tiếng Việt có dấu', 'Łódź żółw', 'český řeřicha', 'Ğ ğ Ş ş', 'z\u0301\u0302\u0303a\u0320\u0321lgo', '\u0301', '\u0301a', 'e\u0301\u0301\u0301', 'Đ đ ħ', 'Ķ ķ Ņ', 'ǻ ǽ', 'o\u0338 \u20dd', '´ ¨ ¯ ¸ ˘ ˙', '΄ ΅ ᾽'],
    'Chinese, Japanese, Korean': ['你好世界', 'red 红色 circle', '一只猫', '日本語のテキスト', 'ひらがな カタカナ', 'が ぱ ヴ', '한국어', '안녕 세상', '々〇〆', '。「」、・', '中a国b', '\uf900\uf9ff', '\U0002f800', '\U00020000\U0002a6d6', '\U0002a700\U0002b740\U0002b820', '\U00030000', '㐀䶵', '鿿', '⼀⼁', '㊀ ㊗', '漢字かな交じり文。', '１０００円', '㆒', '豈'],
    'other scripts': ['Привет мир', 'Съешь ещё', 'Ελληνικά', 'नमस्ते दुनिया', 'हिन्दी में', 'สวัสดีชาวโลก', 'ที่นี่', 'مرحبا بالعالم', 'السَّلامُ عَلَيْكُمْ', 'שלום עולם', 'שָׁלוֹם', 'தமிழ்', 'ქართული', 'հայերեն', 'አማርኛ', 'ខ្មែរ', 'བོད་', 'မြန်မာ', '٣٤ ४५', '،؛؟', '।॥', '\u1680ogham', 'ᚠᚢᚦ', 'ꙮ', 'ߐ', '𐤀𐤁'],
    'emoji': ['😀', 'a 😀 face', 'cat🐱dog', '👨‍👩‍👧', '👍🏽', '🇩🇪 🇯🇵', '1️⃣ #️⃣', '❤️ ❤', '☺︎ ☺️', '✅✔', '→ ← ⇒', '★☆', '♥♦♣♠', '🏴\U000e0067\U000e0062\U000e007f'],
    'punctuation': ['“curly” ‘quotes’', 'em—dash en–dash', 'wait…', '«guillemets» ‹single›', '¿qué? ¡sí!', 'a·b•c', '† ‡ § ¶', '5°C', '€5 £5 ¥5 ¢5 ₹5', '± × ÷ ¬ ∞ ≠', '‽ ⁂', '﹏ ﹕ ﹖', '‿ ⁀', '〈x〉《y》', '٪ ٫ ٬', '‐‑‒―', '⸮ ⸺', '〜 〰', '᠃', '＊ ∗', '¦ | ‖', '⁄ ∕', '𐄀', '՚՛', '؍', '⟨a⟩', '⦃b⦄'],
    'white space': ['a\u00a0b', 'a\u2003b\u2009c', 'a\u202fb', 'a\u3000b', 'a\u1680b', 'a\u2028b', 'a\u2029b', 'a\u0085b', 'a\u205fb', 'a\x0bb\x0cc', '\n\n', ' \t ', 'a\u2007b'],
    'hundred bytes': ['a' * 99, 'a' * 100, 'a' * 101, 'b' * 99 + ' c', 'я' * 49, 'я' * 50, 'я' * 51, 'я' * 100, 'é' * 50, 'é' * 100, 'é' * 101, 'ß' * 50, 'ß' * 51, '😀' * 25, '😀' * 26, '世' * 40, '한' * 11, '한' * 12, 'a' * 60 + '.' + 'a' * 60, '\u0301' * 120 + 'a', 'ﬃ' * 33, 'ﬃ' * 34, 'の' * 33, 'の' * 34, 'x\u00ad' * 100],
    'long': ['a photo of ' * 12, 'striped ' * 40, 'unbelievably antidisestablishmentarianism ' * 4, '. ' * 40, '世' * 40 + 'cat'],
}
POOL = [c for strings in GROUPS.values() for s in strings if len(s) < 60 for c in s]
WORDS = 'a photo of the striped cat naïve Straße café [CLS] [SEP] ﬁre ① 你好 Привет 한국어 don\'t $5 😀 ΟΔΟΣ x\u200by'.split()

def fuzz(n, seed):
    "Strings of words, of the characters above and of any character of Unicode 3.2."
    rng, out = random.Random(seed), []
    known = [c for c in map(chr, range(1, 0x30000)) if OLD.category(c) not in ('Cn', 'Cs', 'Co')]
    while len(out) < n:
        out.append(''.join(rng.choice([' ' + rng.choice(WORDS), rng.choice(POOL), rng.choice(POOL), rng.choice(known), ' ', rng.choice('abcdefghijklmnopqrstuvwxyz')]) for _ in range(rng.randint(1, 16))))
    return out

def small_vocab():
    "A small vocabulary of our own: letters of a few scripts, some words, some endings."
    letters = [*'abcdefghijklmnopqrstuvwxyz0123456789', *map(chr, range(0x3b1, 0x3ca)), *map(chr, range(0x430, 0x450)), *'øæœłđħı', *map(chr, range(0x1100, 0x1113)), *map(chr, range(0x1161, 0x1176)), *map(chr, range(0x11a8, 0x11c3)), *'のかがなほんゴテキスト', '\ufffd', '\u2028', '😀', '™', '⁄', '°', '€', '£']
    signs = [*map(chr, range(33, 48)), *map(chr, range(58, 65)), *map(chr, range(91, 97)), *map(chr, range(123, 127)), *'“”‘’—–…«»¿¡·•§。「」、你好世界红色一只猫日本語中国']
    words = 'a photo of the cat dog red blue circle striped stripe strip bird fire flower strasse gross cafe naive cls sep mask pad unk unused play hello world mit привет κοσμος'.split()
    ends = '##s ##ed ##d ##ing ##ss ##e ##ly ##ff ##ffi ##bird ##circle'.split()
    order = ['[PAD]', '[unused0]', '[UNK]', '[CLS]', '[SEP]', '[MASK]', *signs, *letters, *('##' + c for c in letters), *words, *ends]
    return list(dict.fromkeys(order))

def blocks(words_of):
    "256 code points at a time: a digest of the words in a<c>b for every character c of Unicode 3.2."
    out = {}
    for b in range(0x1100):
        cs = [c for c in map(chr, range(256 * b, 256 * b + 256)) if OLD.category(c) not in ('Cn', 'Cs', 'Co')]
        if cs: out[f'{b:x}'] = hashlib.sha256('\n'.join('\t'.join(w) for w in words_of([f'a{c}b' for c in cs])).encode()).hexdigest()[:12]
    return out

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--vocab', default=str(ROOT.parent / 'shared' / 'data' / 'bert-base-uncased-vocab.txt')); ap.add_argument('--every-character', action='store_true')
    a = ap.parse_args()
    os.environ.update(TF_CPP_MIN_LOG_LEVEL='3', CUDA_VISIBLE_DEVICES='')
    import tensorflow as tf, tensorflow_text as tt
    basic = lambda strings: [[w.decode() for w in ws] for ws in tt.BertTokenizer(a.vocab, lower_case=True)._basic_tokenizer.tokenize(strings).to_list()]
    if a.every_character: return every_character(basic)
    OUT.mkdir(parents=True, exist_ok=True)
    (OUT / 'small_vocab.txt').write_bytes(('\n'.join(small_vocab()) + '\n').encode())
    strings = list(dict.fromkeys([s for g in GROUPS.values() for s in g] + fuzz(400, 0)))
    found = dict(versions=dict(tensorflow=tf.__version__, tensorflow_text=tt.__version__), groups={name: [strings.index(s) for s in g] for name, g in GROUPS.items()}, strings=strings)
    for name, path in (('bert-base-uncased', Path(a.vocab)), ('small', OUT / 'small_vocab.txt')):
        vocab = path.read_text('utf-8').split('\n'); cls = vocab.index('[CLS]'); t = tt.BertTokenizer(str(path), token_out_type=tf.int32, lower_case=True)
        def row(ids, T):
            "What CLIPA's pipeline hands to the text tower."
            padded, _ = tt.pad_model_inputs(ids, T - 1)
            return tf.concat([tf.fill([tf.shape(padded)[0], 1], cls), padded], 1)[0].numpy().tolist()
        cut = [t.tokenize([s]) for s in strings]
        found[name] = dict(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), ids=[c.merge_dims(1, -1)[0].numpy().tolist() for c in cut], rows_8=[row(c, 8) for c in cut])
    found['blocks'] = blocks(basic)
    lines = [f'{json.dumps(k)}: {json.dumps(v)}' for k, v in found.items()]
    (OUT / 'official.json').write_text('{' + ',\n'.join(lines) + '}\n'); print(len(strings), 'strings,', sum(len(g) for g in GROUPS.values()), 'by hand;', len(found['blocks']), 'blocks;', (OUT / 'official.json').stat().st_size // 1024, 'KB')

def every_character(basic):
    from unittest import mock
    sys.path.insert(0, str(ROOT)); sys.modules.update({m: mock.MagicMock() for m in ('torch', 'tokenizers')}) # splitting needs neither
    from clipa_nb.tokenizer import official_words
    codes, wrong = [c for c in range(0x110000) if not 0xd800 <= c < 0xe000], {}
    for i in range(0, len(codes), 20_000):
        for put in ('a{0}b', '{0}\u0301{0}'):
            strings = [put.format(chr(c)) for c in codes[i:i + 20_000]]
            for c, s, theirs in zip(codes[i:], strings, basic(strings)):
                if official_words(s) != theirs: wrong.setdefault(unicodedata.category(chr(c)), set()).add(c)
    print(f'Unicode {unicodedata.unidata_version}: {len(codes)} code points in two surroundings; different, by category:', {k: len(v) for k, v in wrong.items()})

if __name__ == '__main__': main()
