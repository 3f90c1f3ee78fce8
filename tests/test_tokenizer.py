"Ids: equal to the original operations, to open_clip, to the library; bad input; vocabularies that are damaged or elsewhere."
import gzip, hashlib, importlib.util, json, multiprocessing, os, pickle, random, shutil, socket, threading, time, unicodedata
from pathlib import Path
import pytest, torch
from clipa_nb.core import Config, UserError, draws_of, keyed_uniform
from clipa_nb.text_truncation import TEXT_STRATEGIES, rule_tagger, text_strategy
from clipa_nb.engine.vocabularies import (CLIP_SPLIT, SPECIAL, Memory, caption_file, check_ids, check_settings, check_texts, clean_text, clip_vocabulary, digest, find_vocabulary, first_difference,
                                          is_plain, joined_surrogates, not_found, numbered, our_settings, published, published_name, read_json, read_text, read_vocabulary, settings, shelf_files)
from clipa_nb.tokenizer import MODES, ClipBPE, LearntVocabulary, Tokenizer, Vocabulary, WordPiece, _CLIP_ASCII, _SPELLED, load_tokenizer, official_words, open_clip_words, plain_words, train_wordpiece

ROOT = Path(__file__).resolve().parents[1]
FIXTURE = json.loads((ROOT / 'tests' / 'fixtures' / 'tokenizer' / 'official.json').read_text('utf-8'))
SMALL = ROOT / 'tests' / 'fixtures' / 'tokenizer' / 'small_vocab.txt'
BERT = ROOT.parent / 'shared' / 'data' / 'bert-base-uncased-vocab.txt'
OLD = unicodedata.ucd_3_2_0

def merges_file():
    spec = importlib.util.find_spec('open_clip')
    found = [Path(f) / 'bpe_simple_vocab_16e6.txt.gz' for f in (spec.submodule_search_locations if spec else ())]
    return next((f for f in found if f.exists()), None)

def lines(path): return path.read_text('utf-8').split('\n')[:-1]
def ids(t, text): return [i for _, p in t.words(text) for i in p]

@pytest.fixture(scope='module')
def small(): return WordPiece(lines(SMALL))
@pytest.fixture(scope='module')
def bert():
    if not BERT.exists(): pytest.skip(f'the published vocabulary is not at {BERT.relative_to(ROOT.parent)}')
    return WordPiece(lines(BERT))
@pytest.fixture(scope='module')
def clip():
    if merges_file() is None: pytest.skip('open_clip, which carries the merges of CLIP, is not installed')
    return load_tokenizer(merges_file())
@pytest.fixture(scope='module')
def tiny(): return ClipBPE([('d', 'o'), ('do', 't'), ('dot', 's</w>'), ('h', 'o'), ('ho', 't</w>'), ('dot', '</w>')][:5])

@pytest.fixture(scope='module')
def bpe(tiny): return load_tokenizer(merges_file()) if merges_file() else tiny

def fuzzed(n, seed):
    "Captions with every trouble of the web: markup, broken encodings, spelled special tokens, any character of Unicode 3.2."
    rng = random.Random(seed)
    known = [c for c in map(chr, range(1, 0x30000)) if OLD.category(c) not in ('Cn', 'Co', 'Cs')]
    words = "a photo of the Striped cat's dog isn't THEY'LL 3D $5.99 naïve café straße ﬁne ½ 你好 Привет 한국어 ΟΔΟΣ [CLS] [SEP] [MASK] [PAD] [unk] <start_of_text> <END_OF_TEXT> <|endoftext|> &amp; &lt;b&gt; &amp;#39; &nbsp; &copy â€™ Ã© â€œhiâ€\x9d ï»¿ 😀👨‍👩‍👧 'ſ http://x.y/z?q=1".split()
    signs = [*map(chr, range(32, 127)), *'\t\n\r\x00\x07\x1b\x7f\x85\xa0\xad\u200b\u2028\u3000\ufeff\ufffdſKİıßςﬁ１Ａ'] + ['\ud83d', '\ud83d\ude00']
    def piece():
        u = rng.random()
        return ' ' + rng.choice(words) if u < .6 else rng.choice(signs) if u < .9 else rng.choice(known)
    return [''.join(piece() for _ in range(rng.randint(0, 18))) for _ in range(n)]

# ---- CLIPA's own ids

@pytest.mark.parametrize('vocabulary', ['small', 'bert-base-uncased'])
def test_official_ids_are_those_of_the_original_operations(vocabulary, request):
    t, made = request.getfixturevalue('small' if vocabulary == 'small' else 'bert'), FIXTURE[vocabulary]
    assert digest(t.pieces) == made['sha256']
    wrong = [(ascii(s), ids(t, s), e) for s, e in zip(FIXTURE['strings'], made['ids'], strict=True) if ids(t, s) != e]
    assert not wrong, (len(wrong), wrong[:3])
    assert t(FIXTURE['strings'], 8).tolist() == made['rows_8']
    for T in (2, 16, 32): assert t(FIXTURE['strings'], T).tolist() == [([t.vocab['[CLS]'], *e] + [0] * T)[:T] for e in made['ids']]

def test_the_fixture_can_fail(small):
    "At least 200 strings by hand, and in every known kind of difference the stock tokenizer of the library is wrong."
    from tokenizers import Tokenizer as Rust, models, normalizers, pre_tokenizers
    r = Rust(models.WordPiece(small.vocab, unk_token='[UNK]', max_input_chars_per_word=100)); r.normalizer, r.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer(); r.add_special_tokens(list(SPECIAL))
    assert sum(map(len, FIXTURE['groups'].values())) >= 200 and len(FIXTURE['strings']) >= 600
    differ = {g: sum(r.encode(FIXTURE['strings'][i]).ids != FIXTURE['small']['ids'][i] for i in at) for g, at in FIXTURE['groups'].items()}
    for g in ('sharp s and case folding', 'ligatures and compatibility', 'full and half width', 'replacement character', 'control characters', 'special tokens spelled out', 'hundred bytes', 'invisible characters'): assert differ[g] >= 3, (g, differ)

def test_every_character_is_normalised_as_by_the_original_operations():
    assert len(FIXTURE['blocks']) > 350
    wrong = []
    for block, expected in FIXTURE['blocks'].items():
        cs = [c for c in map(chr, range(256 * int(block, 16), 256 * int(block, 16) + 256)) if OLD.category(c) not in ('Cn', 'Cs', 'Co')]
        if hashlib.sha256('\n'.join('\t'.join(official_words(f'a{c}b')) for c in cs).encode()).hexdigest()[:12] != expected: wrong.append(block)
    if unicodedata.unidata_version < '14': wrong.remove('17') # U+1734, a sign of Hanunoo, became a spacing mark in Unicode 14
    assert wrong == []

# ---- open_clip's ids

@pytest.fixture(scope='module')
def captions(): return fuzzed(2500, 3)

def test_open_clip_mode_equals_hf_tokenizer(bert, captions, tmp_path):
    "The other side is made by transformers from vocab.txt alone; nothing of ours is in it."
    for m in ('transformers', 'ftfy'): pytest.importorskip(m)
    HFTokenizer = pytest.importorskip('open_clip.tokenizer').HFTokenizer
    (tmp_path / 'vocab.txt').write_bytes(BERT.read_bytes()); (tmp_path / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    theirs, ours = HFTokenizer(str(tmp_path), strip_sep_token=True), WordPiece(bert.pieces, mode='open_clip')
    for T in (8, 32, 77):
        a, b = theirs(captions, T), ours(captions, T)
        assert a.dtype == b.dtype and (a == b).all(), [(ascii(captions[i]), a[i].tolist(), b[i].tolist()) for i in (a != b).any(1).nonzero()[:3, 0]]
    assert (bert(captions, 32) != ours(captions, 32)).any(1).sum() > 300 # the captions can tell the modes apart

def test_clip_ids_equal_simple_tokenizer(clip, captions):
    pytest.importorskip('ftfy')
    theirs = pytest.importorskip('open_clip.tokenizer').SimpleTokenizer()
    assert clip.vocab_size == 49408 == theirs.vocab_size
    for T in (3, 8, 77):
        a, b = theirs(captions, T), clip(captions, T)
        assert (a == b).all(), [(ascii(captions[i]), a[i].tolist(), b[i].tolist()) for i in (a != b).any(1).nonzero()[:3, 0]]

def test_without_ftfy_a_warning_says_so(monkeypatch, tiny):
    import clipa_nb.engine.vocabularies as m
    monkeypatch.setattr(m, 'ftfy_repair', lambda: None)
    with pytest.warns(UserWarning, match='ftfy is not installed'): assert tiny.split('it’s') == ['it', '’', 's']

# ---- the library, and the fast path

def test_cuts_are_those_found_by_hand(small, tiny):
    rng = random.Random(0)
    def longest_match(word):
        out, start = [], 0
        while start < len(word):
            fit = next((e for e in range(len(word), start, -1) if '##' * (start > 0) + word[start:e] in small.vocab), None)
            if fit is None: return [small.vocab['[UNK]']]
            out.append(small.vocab['##' * (start > 0) + word[start:fit]]); start = fit
        return out
    def merged(word):
        c = [*word[:-1], word[-1] + '</w>']
        for a, b in tiny.merges:
            i = 0
            while i < len(c) - 1:
                if (c[i], c[i + 1]) == (a, b): c[i:i + 2] = [a + b]
                else: i += 1
        return [tiny.vocab[x] for x in c]
    for _ in range(2000):
        w = ''.join(rng.choice(['strip', 'stripe', 'ed', 'd', 's', 'ing', 'ß', 'e', 'x', 'привет', '你']) for _ in range(rng.randint(1, 5)))
        assert small.cut(w) == longest_match(w)
        w = ''.join(rng.choice('dotsh') for _ in range(rng.randint(1, 9)))
        assert tiny.cut(w) == merged(w)

def test_the_fast_path_for_plain_ascii_changes_nothing():
    rng = random.Random(1)
    for _ in range(4000):
        t = ''.join(map(chr, (rng.choice((32, rng.randint(32, 126), rng.randint(97, 122))) for _ in range(rng.randint(0, 40)))))
        assert is_plain(t) and official_words(t) == plain_words(t, True) and official_words(t, lower=False) == plain_words(t, False)
        clean = clean_text(t).lower()
        assert _CLIP_ASCII.findall(clean) == [w for w, _ in CLIP_SPLIT.pre_tokenize_str(clean)]

@pytest.mark.parametrize('mode', MODES)
def test_the_saved_pipeline_gives_the_same_ids(small, mode):
    "All that a pipeline of the library cannot express: spelled special tokens, 100 bytes, two old alphabets; mending in mode open_clip."
    t = WordPiece(small.pieces, mode=mode); r, n = t.rust(), 0
    for s in FIXTURE['strings']:
        if _SPELLED.search(s) or max((len(unicodedata.normalize('NFKD', w).encode()) for w in s.split()), default=0) > 90 or any(0x13a0 <= ord(c) < 0x1400 or 0xab70 <= ord(c) < 0xabc0 or 0x1c80 <= ord(c) < 0x1c89 for c in s): continue
        if mode == 'open_clip' and s != clean_text(s): continue
        n += 1; assert r.encode(s, add_special_tokens=False).ids == ids(t, s), ascii(s)
    assert n > (600 if mode == 'official' else 300)

def test_the_memory_is_verified_and_bounded(small, bpe, captions):
    for t in (WordPiece(small.pieces), WordPiece(small.pieces, mode='open_clip'), pickle.loads(pickle.dumps(bpe))):
        first = t(captions, 32); t._cache.clear(); t._cache.limit = 200
        for c in captions[:400]: t(c, 32); assert len(t._cache) <= 200
        for name in TEXT_STRATEGIES: t(captions[:400], 6, text_strategy(name, rule_tagger)) # none of them writes into what it is handed
        assert t(captions, 32).equal(first) and all(w == word and p == t.cut(w) and len(w) <= 64 for w, (word, p) in t._cache.items())
        assert len(pickle.loads(pickle.dumps(t))._cache) == 0

# ---- bad input

@pytest.fixture(params=['official', 'open_clip', 'bpe'])
def any_tokenizer(request, small, tiny): return tiny if request.param == 'bpe' else WordPiece(small.pieces, mode=request.param)

@pytest.mark.parametrize('texts,says', [(None, 'NoneType'), (b'bytes', 'bytes'), (7, 'int'), (['a', None], 'text 1 is of type NoneType'), (['a', 'b', b'c'], 'text 2 is of type bytes'), ([['a']], 'text 0 is of type list'),
    (['a', float('nan')], 'text 1 is of type float'), ({'a': 1}, 'dict'), ({'a', 'b'}, 'set'), (torch.tensor(3), 'Tensor'), (torch.tensor([3]), 'text 0 is of type Tensor'), (3.5, 'float')])
def test_what_is_no_caption_is_named(any_tokenizer, texts, says):
    with pytest.raises(UserError, match=says): any_tokenizer(texts)

@pytest.mark.parametrize('length', [1, 0, -3, True, 8.0, '8'])
def test_context_lengths_that_cannot_be(any_tokenizer, length):
    with pytest.raises(UserError, match='context length'): any_tokenizer('a', length)
    with pytest.raises(UserError, match='context length'): type(any_tokenizer)(any_tokenizer.merges if isinstance(any_tokenizer, ClipBPE) else any_tokenizer.pieces, length)

def test_hard_captions_give_whole_rows(any_tokenizer):
    t = any_tokenizer; n = len(t.prefix) + len(t.suffix)
    hard = ['', ' ', '\n', 'a' * 100_000, 'a ' * 50_000, '😀' * 100_000, '.' * 100_000, '你' * 100_000, '\u0301' * 100_000, '&amp;' * 20_000, '\ud83d', '\ude00\ud83d', 'a\ud83d b', ''.join(map(chr, range(32))), ''.join(map(chr, range(127, 160))), '\x00', '[CLS][SEP][MASK]', '<end_of_text>' * 9]
    rows = t(hard, 16)
    assert rows.shape == (len(hard), 16) and rows.dtype == torch.int64 and 0 <= rows.min() and rows.max() < t.vocab_size and (rows[:, 0] == t.prefix[0]).all()
    assert rows[0].tolist() == [*t.prefix, *t.suffix] + [0] * (16 - n)
    assert t('\ud83d\ude00', 16).equal(t('😀', 16)) and t('a\ud83d b', 16).equal(t('a\ufffd b', 16))
    for r in rows: assert isinstance(t.decode(r), str)
    assert t('x', n + 1).shape == (1, n + 1) and t([], 5).shape == (0, 5) and t(('a', 'b'), 5).shape == (2, 5)
    assert len(t._cache) == len([w for w in t._cache if len(w) <= 64])

def test_a_strategy_that_breaks_its_contract_is_named(any_tokenizer):
    t = any_tokenizer
    class Batch:
        def __init__(self, n): self.n = n
        def __call__(self, words, k, u): raise AssertionError('batch comes first')
        def batch(self, captions, k, u): return [[1] * k] * self.n
    assert t(['a', 'b'], 6, Batch(2)).shape == (2, 6)
    for wrong, says in ((Batch(1), '1 lists for 2 captions'), (lambda w, k, g: [1] * (k + 1), 'may return at most'), (lambda w, k, g: [t.vocab_size], 'not integers from 0'), (lambda w, k, g: [-1], 'not integers'), (lambda w, k, g: None, 'returned NoneType'), (lambda w, k, g: [1.5], 'not integers'), ('syntax', 'expected a function')):
        with pytest.raises(UserError, match=says): t(['a', 'b'], 6, wrong)

@pytest.mark.parametrize('wrong,says', [([101.7], 'no integers'), (torch.tensor([1., 2.]), 'no integers'), ('abc', 'no integers'), (None, 'no integers'), (5, 'no integers'), ([-1], 'found id -1'), ([10**6], 'another vocabulary'), (torch.ones(2, 3, dtype=torch.int64), '2 rows')])
def test_ids_that_cannot_be_read(any_tokenizer, wrong, says):
    with pytest.raises(UserError, match=says): any_tokenizer.decode(wrong)

# ---- vocabularies

def damaged(pieces, how):
    n = len(pieces)
    return {'cut short': pieces[:2 * n // 3], 'one line lost': pieces[:n // 2] + pieces[n // 2 + 1:], 'last line lost': pieces[:-1], 'two exchanged': [*pieces[:n // 2], pieces[n // 2 + 1], pieces[n // 2], *pieces[n // 2 + 2:]],
            'sorted': [*pieces[:n // 30], *sorted(pieces[n // 30:])], 'reversed': [*pieces[:200], *pieces[:199:-1]], 'twice': [*pieces[:n // 2], pieces[n // 3], *pieces[n // 2:]], 'an empty line': [*pieces[:n // 2], '', *pieces[n // 2:]]}[how]
DAMAGES = ('cut short', 'one line lost', 'last line lost', 'two exchanged', 'sorted', 'reversed', 'twice', 'an empty line')

@pytest.mark.parametrize('how', DAMAGES)
def test_a_damaged_published_vocabulary_is_refused(bert, how, tmp_path):
    (tmp_path / 'vocab.txt').write_text('\n'.join(damaged(bert.pieces, how)) + '\n', 'utf-8')
    for where in (tmp_path / 'vocab.txt', tmp_path):
        with pytest.raises(UserError, match='fetch (it|the file) again'): load_tokenizer(where)

@pytest.mark.parametrize('how', DAMAGES)
def test_damaged_merges_are_refused(clip, how, tmp_path):
    (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *damaged([' '.join(m) for m in clip.merges], how)]) + '\n', 'utf-8')
    with pytest.raises(UserError, match='fetch (it|the file) again'): load_tokenizer(tmp_path)

def one_line(lines, how, at, other): return {'lost': lines[:at] + lines[at + 1:], 'changed': [*lines[:at], other, *lines[at + 1:]], 'inserted': [*lines[:at], other, *lines[at:]]}[how]

@pytest.mark.parametrize('how', ['lost', 'changed', 'inserted'])
@pytest.mark.parametrize('at', [1, 50, 103, 998, 1100, 1500, 1995, 1996, 2005, 8000, 15261, 24000, 29990, 30005, 30500, 30521])
def test_one_line_of_bert_anywhere(bert, how, at, tmp_path):
    "Near the top, in the middle, near the end: refused. Only a place that BERT left unused may hold something else."
    (tmp_path / 'v.txt').write_text('\n'.join(one_line(bert.pieces, how, at, 'zzzqq')) + '\n', 'utf-8')
    if how == 'changed' and at in (1, 50, 998):
        vocab = load_tokenizer(tmp_path / 'v.txt').vocab; assert {p: i for p, i in vocab.items() if i != at} == {p: i for p, i in bert.vocab.items() if i != at}
    else:
        with pytest.raises(UserError, match='damaged copy of bert-base-uncased|MASK. not among'): load_tokenizer(tmp_path / 'v.txt')

@pytest.mark.parametrize('how', ['lost', 'changed', 'inserted'])
@pytest.mark.parametrize('part', ['top', 'middle', 'end'])
def test_one_merge_of_clip_anywhere(clip, how, part, tmp_path):
    "Merges on which no later one builds: those that the order of the list cannot miss."
    needed = {p for m in clip.merges for p in m}; free = [i for i, m in enumerate(clip.merges) if ''.join(m) not in needed]
    assert free[0] < 128
    for at in {'top': free[:3], 'middle': free[len(free) // 2:][:2], 'end': free[-2:]}[part]:
        (tmp_path / 'merges.txt').write_text('\n'.join(['#version: 0.2', *one_line([' '.join(m) for m in clip.merges], how, at, 'Q Q')]) + '\n', 'utf-8')
        with pytest.raises(UserError, match='damaged copy of clip'): load_tokenizer(tmp_path / 'merges.txt')

def test_a_published_vocabulary_cut_anywhere(bert, clip):
    for n in (104, 105, 150, 999, 1000, 1500, 1996, 2005, 2011, 2012, 2500, 4011, 4012, 9000, 20000, 30521):
        with pytest.raises(UserError, match='cut short|damaged copy'): published(WordPiece([*bert.pieces[:n], *[s for s in SPECIAL if s not in bert.pieces[:n]]]).pieces)
    for n in (16, 100, 128, 2000, 3216, 20000, 48893):
        with pytest.raises(UserError, match='damaged copy'): published(ClipBPE(clip.merges[:n]).pieces)

def test_other_vocabularies_are_somebody_s_own(bert, clip, small, tmp_path):
    "A list that merely begins like a published one, or fills its unused places, or was saved as it is."
    own = [f'own{i}' for i in range(20000)]; letters = 'ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789abcdefghijklmnopqrstuvwxyz#$%&*+'; made = {''.join(m) for m in clip.merges[:20]}
    pairs = [(a, b) for a in letters for b in [*letters, *(c + '</w>' for c in letters)] if a + b not in made]
    filled = [w.replace('[unused', '[mark') for w in bert.pieces]
    for pieces in (bert.pieces[:2000] + own[:2000], bert.pieces[:2000] + own, ['[PAD]', *(f'[unused{i}]' for i in range(99)), *SPECIAL[1:], *own[:500]], filled, [*filled, 'zzzqq'], [*bert.pieces, 'zzzqq'], small.pieces):
        (tmp_path / 'v.txt').write_text('\n'.join(pieces) + '\n', 'utf-8'); assert load_tokenizer(tmp_path / 'v.txt').pieces == pieces
    assert published(ClipBPE(clip.merges[:20] + pairs).pieces) is None and published(ClipBPE(pairs).pieces) is None
    for t, file in ((WordPiece(bert.pieces[:5000], 9), 'vocab.txt'), (WordPiece(bert.pieces[:1500] + bert.pieces[1501:], 9), 'vocab.txt'), (ClipBPE(clip.merges[:100], 9), 'merges.txt')):
        shutil.rmtree(tmp_path / 'part', ignore_errors=True); t.save(tmp_path / 'part')
        for where in (tmp_path / 'part', tmp_path / 'part' / file): assert load_tokenizer(where).pieces == t.pieces and load_tokenizer(where).context_length == 9
        (tmp_path / 'part' / 'tokenizer_config.json').unlink()
        with pytest.raises(UserError, match='damaged copy'): load_tokenizer(tmp_path / 'part' / file)

@pytest.mark.parametrize('how', DAMAGES)
@pytest.mark.parametrize('file', ['vocab.txt', 'tokenizer.json'])
def test_a_damaged_saved_vocabulary_is_refused(small, how, file, tmp_path):
    small.save(tmp_path); pieces = damaged(small.pieces, how)
    if file == 'vocab.txt': (tmp_path / 'tokenizer.json').unlink(); (tmp_path / file).write_text('\n'.join(pieces) + '\n', 'utf-8')
    else:
        spec = json.loads((tmp_path / file).read_text('utf-8')); spec['model']['vocab'] = {p: i for i, p in enumerate(pieces)}; (tmp_path / file).write_text(json.dumps(spec))
    with pytest.raises(UserError): load_tokenizer(tmp_path)

@pytest.mark.parametrize('file,raw,says', [('vocab.txt', '[PAD]\nnaïve\n'.encode('latin-1'), 'UTF-8'), ('vocab.txt', '[PAD]\na\n'.encode('utf-16'), 'UTF-8'), ('vocab.txt', b'', 'not among its 0'), ('vocab.txt', b'\x1f\x8b\x08\x00broken', 'fetch it again'),
    ('vocab.txt', gzip.compress(b'[PAD]\n' * 999, mtime=0)[:-12], 'fetch it again'), ('vocab.txt', '\n'.join(SPECIAL[1:]).encode(), r'\[PAD\] not among'), ('vocab.txt', ('a\n' + '\n'.join(SPECIAL)).encode(), r'\[PAD\] has id 1'),
    ('tokenizer.json', b'{"model": {', 'whole JSON'), ('tokenizer.json', b'[]', 'expected a JSON object'), ('tokenizer.json', b'{"model": {"type": "Unigram", "vocab": []}}', 'Unigram'),
    ('tokenizer.json', b'{"model": "x"}', 'expected BERT word pieces'), ('tokenizer.json', b'{"a": 1}', 'expected BERT word pieces'), ('tokenizer.json', b'{"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}}}', 'no list of merges'),
    ('tokenizer.json', b'{"model": {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": {}, "merges": [1]}}', 'no list of merges'), ('tokenizer.json', b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}', 'found a BPE tokenizer'),
    ('tokenizer.json', b'{"model": {"type": "WordPiece", "vocab": {"a": "b", "c": 3}}}', 'not 0 to 1'), ('tokenizer.json', b'{"model": {"type": "WordPiece", "vocab": [1]}}', 'expected BERT word pieces'), ('tokenizer.json', b'{"model": {"type": "WordPiece", "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}}, "normalizer": "x"}', 'library can read'), ('merges.txt', b'#version: 0.2\na b c\n', 'expected two pieces'),
    ('merges.txt', b'#version: 0.2\nab c\n', 'no earlier merge makes')])
def test_files_that_are_no_vocabulary(file, raw, says, tmp_path):
    (tmp_path / file).write_bytes(raw)
    with pytest.raises(UserError, match=says) as e: load_tokenizer(tmp_path)
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

# What the Hub's files of bert-base-uncased and openai/clip-vit-base-patch32 say, in the spellings of several years.
BERT_JSON = dict(normalizer=dict(type='BertNormalizer', clean_text=True, handle_chinese_chars=True, strip_accents=None, lowercase=True), pre_tokenizer=dict(type='BertPreTokenizer'), model=dict(unk_token='[UNK]', continuing_subword_prefix='##', max_input_chars_per_word=100))
CLIP_JSON = dict(normalizer=dict(type='Sequence', normalizers=[dict(type='NFC'), dict(type='Replace', pattern=dict(Regex=r'\s+'), content=' '), dict(type='Lowercase')]),
    pre_tokenizer=dict(type='Sequence', pretokenizers=[dict(type='Split', pattern=dict(Regex=r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior='Removed', invert=True), dict(type='ByteLevel', add_prefix_space=False, trim_offsets=True)]),
    model=dict(dropout=None, unk_token='<|endoftext|>', continuing_subword_prefix='', end_of_word_suffix='</w>', fuse_unk=False))

def foreign(t, path, **changes):
    "A tokenizer.json as others write it; a change is a path of keys joined by __."
    special = SPECIAL if isinstance(t, WordPiece) else tuple(t.pieces[-2:]); spec = json.loads(json.dumps(BERT_JSON if isinstance(t, WordPiece) else CLIP_JSON))
    spec |= dict(version='1.0', truncation=None, padding=None, post_processor=None, added_tokens=[dict(id=t.vocab[s], special=True, content=s, single_word=False, lstrip=False, rstrip=False, normalized=s == '<|startoftext|>') for s in special])
    spec['model'] |= dict(vocab=dict(t.vocab)) | (dict(merges=[' '.join(m) for m in t.merges]) if isinstance(t, ClipBPE) else {})
    for name, value in changes.items():
        *at, last = [int(k) if k.isdigit() else k for k in name.split('__')]; d = spec
        for k in at: d = d[k]
        if last == 'new': d.append(value)
        else: d[last] = value
    path.write_text(json.dumps(spec)); return path

def test_published_and_own_tokenizer_json_are_read(small, tiny, tmp_path):
    for t in (small, tiny, WordPiece(small.pieces, mode='open_clip'), WordPiece(small.pieces, lower=False), WordPiece(small.pieces, lower=False, mode='open_clip')):
        (tmp_path / 'r.json').write_text(t.rust().to_str()); back = load_tokenizer(tmp_path / 'r.json', mode=getattr(t, 'mode', None))
        assert back.pieces == t.pieces and getattr(back, 'lower', None) == getattr(t, 'lower', None)
    for lower, accents in ((True, None), (True, True), (False, None), (False, False)):
        t = load_tokenizer(foreign(small, tmp_path / 'f.json', normalizer__lowercase=lower, normalizer__strip_accents=accents), mode='open_clip'); assert (t.pieces, t.lower) == (small.pieces, lower)
    from tokenizers import Tokenizer as Rust
    assert Rust.from_file(str(tmp_path / 'f.json')).encode('A Naïve 你好 cat').ids == ids(t, 'A Naïve 你好 cat')
    front = r"<\|startoftext\|>|<\|endoftext\|>|" + CLIP_JSON['pre_tokenizer']['pretokenizers'][0]['pattern']['Regex']
    for changes in ({}, dict(model__type='BPE', model__byte_fallback=False, model__ignore_merges=False, pre_tokenizer__pretokenizers__0__pattern__Regex=front), dict(model__merges=[list(m) for m in tiny.merges], model__continuing_subword_prefix=None)):
        assert load_tokenizer(foreign(tiny, tmp_path / 'c.json', **changes)).merges == tiny.merges

@pytest.mark.parametrize('name,value,says', [('normalizer__strip_accents', False, 'normalizer.strip_accents is False'), ('normalizer__handle_chinese_chars', False, 'normalizer.handle_chinese_chars is False'), ('normalizer__clean_text', False, 'normalizer.clean_text is False'),
    ('normalizer', None, 'normalizer is None'), ('normalizer', dict(type='NFC'), "normalizer.type is 'NFC'"), ('pre_tokenizer', dict(type='Whitespace'), "pre_tokenizer.type is 'Whitespace'"), ('pre_tokenizer', None, 'pre_tokenizer is None'), ('model__max_input_chars_per_word', 5, 'max_input_chars_per_word is 5'),
    ('model__continuing_subword_prefix', '@@', "continuing_subword_prefix is '@@'"), ('model__unk_token', '[PAD]', r"unk_token is '\[PAD\]'"), ('added_tokens', [], r'added_tokens.\[PAD\] is None'), ('added_tokens__4__lstrip', True, r'added_tokens.\[MASK\].lstrip is True'), ('added_tokens__4__id', 3, r'added_tokens.\[MASK\].id is 3'),
    ('added_tokens__new', dict(id=30522, content='[NEW]', single_word=False, lstrip=False, rstrip=False, normalized=False, special=True), r'added_tokens.\[NEW\] is'), ('added_tokens', [5], 'library can read'), ('pre_tokenizer', 'x', 'library can read')])
def test_other_settings_of_word_pieces_are_refused_by_name(small, name, value, says, tmp_path):
    with pytest.raises(UserError, match=says) as e: load_tokenizer(foreign(small, tmp_path / 'f.json', **{name: value}), mode='open_clip')
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('name,value,says', [('model__dropout', .1, 'model.dropout is 0.1'), ('model__ignore_merges', True, 'model.ignore_merges is True'), ('model__continuing_subword_prefix', '##', "continuing_subword_prefix is '##'"), ('normalizer__normalizers__2__type', 'NFC', r"normalizer.normalizers.2.type is 'NFC'"),
    ('pre_tokenizer__pretokenizers__0__pattern__Regex', r'\s+', 'pattern.Regex is'), ('pre_tokenizer__pretokenizers__1__add_prefix_space', True, 'add_prefix_space is True'), ('model__vocab__a', 65, 'not 0 to'), ('added_tokens__new', dict(id=0, content='!', single_word=False, lstrip=False, rstrip=False, normalized=False), 'added_tokens.! is')])
def test_other_settings_of_byte_pairs_are_refused_by_name(tiny, name, value, says, tmp_path):
    with pytest.raises(UserError, match=says) as e: load_tokenizer(foreign(tiny, tmp_path / 'f.json', **{name: value}))
    assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

@pytest.mark.parametrize('a,b', [('a', 'b'), ('<|startoftext|>', '<|endoftext|>')])
def test_exchanged_ids_of_byte_pairs_are_refused(tiny, a, b, tmp_path):
    with pytest.raises(UserError, match='not in the order of its merges'): load_tokenizer(foreign(tiny, tmp_path / 'f.json', model__vocab=tiny.vocab | {a: tiny.vocab[b], b: tiny.vocab[a]}))

def test_what_transformers_saves_is_read(small, tiny, tmp_path):
    read = pytest.importorskip('transformers').AutoTokenizer.from_pretrained
    small.save(tmp_path / 'a'); tiny.save(tmp_path / 'b'); (tmp_path / 'c').mkdir(); (tmp_path / 'c' / 'vocab.txt').write_text('\n'.join([*SPECIAL, 'a', '##b']) + '\n', 'utf-8'); (tmp_path / 'c' / 'tokenizer_config.json').write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    for name, pieces in (('a', small.pieces), ('b', tiny.pieces), ('c', [*SPECIAL, 'a', '##b'])): read(str(tmp_path / name)).save_pretrained(tmp_path / f'{name}2'); assert load_tokenizer(tmp_path / f'{name}2').pieces == pieces

def test_harmless_changes_of_a_file_are_read(small, tmp_path):
    for raw in ('\r\n'.join(small.pieces) + '\r\n', '\n'.join(small.pieces)):
        (tmp_path / 'v.txt').write_bytes(raw.encode()); assert load_tokenizer(tmp_path / 'v.txt').pieces == small.pieces
    (tmp_path / 'v.txt.gz').write_bytes(gzip.compress(('\n'.join(small.pieces) + '\n').encode())); assert load_tokenizer(tmp_path / 'v.txt.gz').pieces == small.pieces

def test_published_vocabularies_are_recognised(bert, clip, tmp_path):
    assert published(bert.pieces) == 'bert-base-uncased' and published(clip.pieces) == 'clip' and published(WordPiece([*bert.pieces, 'clipa']).pieces) is None
    assert hashlib.sha256(BERT.read_bytes()).hexdigest() == digest(bert.pieces) == '07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3'
    for t in (bert, clip): assert load_tokenizer(t.save(tmp_path / type(t).__name__)).pieces == t.pieces
    with pytest.raises(UserError, match='rows for 30000'): load_tokenizer(BERT, rows=30000)
    assert load_tokenizer(BERT, rows=32000).vocab_size == 30522

@pytest.fixture
def places(tmp_path, monkeypatch):
    "A Hub cache and a local directory of one's own, and no way out to the network."
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'hub')); monkeypatch.setenv('CLIPA_VOCABULARIES', str(tmp_path / 'shelf'))
    def refuse(*a, **k): raise AssertionError('a connection was tried')
    monkeypatch.setattr(socket.socket, 'connect', refuse); monkeypatch.setattr(socket, 'getaddrinfo', refuse); monkeypatch.chdir(tmp_path)
    return tmp_path

def test_the_order_of_the_places(small, places):
    kinds = {n: train_wordpiece(['a b c'], 40, context_length=n) for n in (11, 12, 13)}
    kinds[13].save(places / 'shelf' / 'me' / 'mine'); assert load_tokenizer('me/mine').context_length == 13
    hub = places / 'hub' / 'models--me--mine'; kinds[12].save(hub / 'snapshots' / 'bbb'); assert load_tokenizer('me/mine').context_length == 12
    small.save(hub / 'snapshots' / 'aaa'); (hub / 'refs').mkdir(); (hub / 'refs' / 'main').write_text('bbb'); assert load_tokenizer('me/mine').context_length == 12
    kinds[11].save(places / 'me' / 'mine'); assert load_tokenizer('me/mine').context_length == 11
    (places / 'shelf' / 'own.txt').write_text('\n'.join(small.pieces) + '\n'); assert load_tokenizer('own').pieces == small.pieces

def test_a_name_must_be_the_published_vocabulary(small, bert, places):
    shelf = small.save(places / 'shelf' / 'bert-base-uncased')
    with pytest.raises(UserError, match='not the published vocabulary of bert-base-uncased'): load_tokenizer('bert-base-uncased')
    for f in shelf.iterdir(): f.unlink()
    (shelf / 'vocab.txt').write_bytes(BERT.read_bytes()); assert load_tokenizer('bert-base-uncased').vocab_size == 30522
    (places / 'bert-base-uncased').mkdir(); assert load_tokenizer('bert-base-uncased').vocab_size == 30522 # an unrelated folder of that name is no vocabulary

def test_a_package_that_carries_the_vocabulary_comes_last(clip, places):
    assert load_tokenizer('clip').pieces == clip.pieces
    (places / 'shelf').mkdir(); (places / 'shelf' / 'bpe_simple_vocab_16e6.txt.gz').write_bytes(gzip.compress(b'#version: 0.2\na b\n'))
    with pytest.raises(UserError, match='shelf.*not the published vocabulary of clip'): load_tokenizer('clip')

def test_what_is_nowhere_is_said_with_the_places(places):
    for name, says in (('bert-base-uncased', ('hub', 'shelf', 'hf download google-bert/bert-base-uncased')), ('org/model', ('hub', 'shelf', 'hf download org/model')), ('no/such/vocab.txt', ('no such path',)), ('berd-base-uncased', ('did you mean bert-base-uncased',))):
        with pytest.raises(UserError) as e: load_tokenizer(name)
        assert all(s in str(e.value) for s in says) and '\n' not in str(e.value)

# ---- of one's own

@pytest.mark.parametrize('file,raw,says', [('a.csv', 'file,caption\n0.jpg,a dog\n1.jpg\n', 'row 1 has no string'), ('a.tsv', 'caption\tfile\na dog\t0.jpg\n', "row 0 has no 'text'"), ('a.jsonl', '{"caption": "a"}\n5\n', 'row 1 is of type int'), ('a.jsonl', 'null\n', 'row 0 is of type NoneType'),
    ('a.jsonl', '{"caption": "a"}\n{"caption": "b"}\n"a caption"\n', 'row 2 is of type str'), ('a.jsonl', '{"caption": "a"}\n{"caption": null}\n', 'row 1 has no string'), ('a.jsonl', '{"caption": ["a"]}\n', 'row 0 has no string'), ('a.jsonl', '{"caption": "a"}\n\n', 'row 1: '), ('a.jsonl', '{"text": "a"}\n', "row 0 has no 'caption'")])
def test_a_row_without_a_caption_is_numbered(file, raw, says, tmp_path):
    (tmp_path / file).write_text(raw)
    for read in (lambda f: list(caption_file(f, 'text' if file == 'a.tsv' else 'caption')), lambda f: train_wordpiece(caption_file(f, 'text' if file == 'a.tsv' else 'caption'))):
        with pytest.raises(UserError, match=says) as e: read(tmp_path / file)
        assert str(tmp_path) in str(e.value) and '\n' not in str(e.value)

def test_training_names_the_text_that_is_no_string():
    for texts, says in ((['a', 'b', None], 'text 2 is of type NoneType'), ((t for t in ('a', 'b', 'c', 4.)), 'text 3 is of type float'), ([b'a'], 'text 0 is of type bytes')):
        with pytest.raises(UserError, match=says): train_wordpiece(texts)
    assert train_wordpiece({'a b', 'b c'}).pieces == train_wordpiece(['b c', 'a b']).pieces

def test_endings_do_not_lower_the_curve():
    "The third exercise of the chapter: frequent endings before the words cost pieces where the vocabulary is small, and nothing where all words fit."
    import numpy as np
    from clipa_nb.toyworld import WORLDS, caption_text, scenes
    texts = caption_text(scenes(WORLDS['rich'], 0, np.arange(1000))); whole = train_wordpiece(texts, 10**6).pieces; counts, ends = {}, {}
    for t in texts:
        for w in official_words(t): counts[w] = counts.get(w, 0) + 1
    for w, n in counts.items():
        for i in range(1, len(w) - 1): ends['##' + w[i:]] = ends.get('##' + w[i:], 0) + n
    first = next(i for i, p in enumerate(whole) if len(p.removeprefix('##')) > 1 and p not in SPECIAL)
    def curve(n_ends):
        pieces = [*whole[:first], *sorted(ends, key=lambda e: (-ends[e], e))[:n_ends], *whole[first:]]
        return [sum(len(ids(t, c)) for c in texts[:200]) / 200 for t in (WordPiece(pieces[:v]) for v in (64, 72, 80, 96, 112, 128, 160, 192))]
    plain = curve(0)
    for n in (1, 3, 8, 20): with_ends = curve(n); assert with_ends[0] > plain[0] and with_ends[-1] == plain[-1] and all(a > .995 * b for a, b in zip(with_ends, plain))

def test_training_reads_any_caption_file(tmp_path):
    texts = ['a red circle', 'two blue, "quoted" stars', 'naïve café'] * 5
    (tmp_path / 'a.txt').write_text('\n'.join(texts) + '\n', 'utf-8'); (tmp_path / 'a.jsonl').write_text(''.join(json.dumps(dict(caption=t, n=1)) + '\n' for t in texts), 'utf-8')
    import csv
    with open(tmp_path / 'a.csv', 'w', newline='', encoding='utf-8') as f: w = csv.writer(f); w.writerow(['file', 'caption']); w.writerows([[i, t] for i, t in enumerate(texts)])
    (tmp_path / 'a.csv.gz').write_bytes(gzip.compress((tmp_path / 'a.csv').read_bytes()))
    for f in ('a.txt', 'a.jsonl', 'a.csv', 'a.csv.gz'):
        assert list(caption_file(tmp_path / f)) == texts
        assert train_wordpiece(caption_file(tmp_path / f), 80).pieces == train_wordpiece(texts, 80).pieces
    (tmp_path / 'latin.txt').write_bytes('naïve'.encode('latin-1'))
    for f, says in (('latin.txt', 'UTF-8'), ('none.txt', 'no such file'), ('a.parquet', 'expected a .txt')):
        with pytest.raises(UserError, match=says): list(caption_file(tmp_path / f))
    with pytest.raises(UserError, match="no 'text'"): list(caption_file(tmp_path / 'a.csv', 'text'))
    with pytest.raises(UserError, match='too small'): train_wordpiece(texts, 10)

@pytest.mark.parametrize('mode', MODES)
def test_saved_beside_a_model_and_read_by_transformers(mode, small, tmp_path):
    t = WordPiece(small.pieces, 13, mode=mode); back = load_tokenizer(t.save(tmp_path / 'model'))
    assert (back.mode, back.context_length, back.pieces) == (mode, 13, t.pieces) and back(FIXTURE['strings']).equal(t(FIXTURE['strings']))
    assert load_tokenizer(tmp_path / 'model', 5, mode='open_clip').mode == 'open_clip' and not list((tmp_path / 'model').glob('.*'))
    read = pytest.importorskip('transformers').AutoTokenizer.from_pretrained(str(tmp_path / 'model'))
    for s in ('a photo of the cat', 'Naïve café, striped!', 'привет'): assert read(s).input_ids[:-1 if mode == 'open_clip' else None] == [t.vocab['[CLS]'], *ids(t, s)]

def test_a_file_is_loaded_with_what_was_saved_beside_it(small, tiny, tmp_path):
    t = WordPiece([*small.pieces, 'Cat'], 13, lower=False, mode='open_clip'); t.save(tmp_path / 'm')
    for file in ('vocab.txt', 'tokenizer.json'):
        back = load_tokenizer(tmp_path / 'm' / file); assert (back.mode, back.context_length, back.lower, back.pieces) == ('open_clip', 13, False, t.pieces) and back('A Cat [MASK]').equal(t('A Cat [MASK]'))
        assert (said := load_tokenizer(tmp_path / 'm' / file, 9, mode='official')).mode == 'official' and said.context_length == 9
    ClipBPE(tiny.merges, 11).save(tmp_path / 'c'); assert load_tokenizer(tmp_path / 'c' / 'merges.txt').context_length == 11
    (tmp_path / 'm' / 'vocab.txt').write_text('\n'.join(t.pieces[:50] + t.pieces[51:]) + '\n', 'utf-8')
    with pytest.raises(UserError, match='not the .* that were saved'): load_tokenizer(tmp_path / 'm' / 'vocab.txt')
    (tmp_path / 'm' / 'other.txt').write_text('\n'.join(small.pieces) + '\n', 'utf-8'); assert load_tokenizer(tmp_path / 'm' / 'other.txt').context_length == 32 # another file has nothing to do with what was saved

def test_a_tokenizer_is_not_saved_onto_a_file(small, tmp_path):
    (tmp_path / 'f').write_text('mine')
    for where in (tmp_path / 'f', tmp_path / 'f' / 'below'):
        with pytest.raises(UserError, match='a file is in the way'): small.save(where)
    assert (tmp_path / 'f').read_text() == 'mine'

def in_worker(t): return t(['a photo of the cat', 'naïve 你好']).tolist()

def test_no_threads_are_started_and_forks_agree(small, bpe):
    if not hasattr(os, 'fork') or not Path('/proc/self/task').exists(): pytest.skip('this system has no fork, or does not show threads')
    for t in (WordPiece(small.pieces), bpe):
        before = len(os.listdir('/proc/self/task')); t(fuzzed(200, 9)); assert len(os.listdir('/proc/self/task')) == before
        with multiprocessing.get_context('fork').Pool(2) as pool: assert pool.map(in_worker, [t] * 4) == [in_worker(t)] * 4

# ---- the pieces of the chapter and of the workshop, one by one

class Letters(Tokenizer):
    "The simplest kind: words are between spaces, and each letter is a piece."
    prefix = (1,)
    def split(self, text): return text.split()
    def cut(self, word): return [self.vocab.get(c, 1) for c in word]

@pytest.fixture
def letters(): return Letters({c: i for i, c in enumerate('_?abcdefghijklmnopqrstuvwxyz')}, 12)

class LastWord:
    uses_chance = False
    def __call__(self, words, k, u): return words[-1][1][:k] if words else []
    def batch(self, captions, k, us): assert us == [None] * len(captions); return [self(words, k, u) for words, u in zip(captions, us)]

class Forgetful(LastWord):
    def batch(self, captions, k, us): return []

def refused(says, f, *args, **more):
    with pytest.raises(UserError) as e: f(*args, **more)
    assert says in str(e.value), (says, str(e.value))

def test_a_kind_of_tokenizer_needs_split_and_cut(letters):
    assert letters.words('a red') == [('a', [2]), ('red', [19, 6, 5])] and letters.vocab_size == 28 and repr(letters) == 'Letters(vocab_size=28, context_length=12)'
    letters.words('a red')[1][1].append(99); assert letters.words('red') == [('red', [19, 6, 5])] # what is handed out is a copy
    refused('one caption', letters.words, ['a']); refused('too short', Letters, {}, 1)
    assert letters('a red hat', 6).tolist() == [[1, 2, 19, 6, 5, 9]] and letters('hi').tolist() == [[1, 9, 10] + [0] * 9]
    assert letters([], 6).shape == (0, 6) and letters([''], 6).tolist() == [[1, 0, 0, 0, 0, 0]] and letters('a').dtype == torch.int64
    assert letters.published == ''

def test_strategies_of_the_call(letters):
    backwards = lambda words, k, u: [i for _, ids in words[::-1] for i in ids][:k]
    assert letters('a red hat', 6, backwards).tolist() == [[1, 9, 2, 21, 19, 6]]
    assert letters(['a red hat', 'hi', ''], 5, LastWord()).equal(letters(['a red hat', 'hi', ''], 5, LastWord().__call__))
    refused('0 lists for 1 captions', letters, 'a', 5, Forgetful()); refused('context length 0 is too short', letters, 'a', 0); refused("text_strategy('syntax')", letters, 'a', 6, 'syntax')
    refused('returned 9 ids for 3 slots', letters, 'a red hat', 4, lambda w, k, g: [2] * 9); refused('from 0 to 27', letters, 'a', 4, lambda w, k, g: [28]); refused('not integers', letters, 'a', 4, lambda w, k, g: [.5])

def test_a_strategy_gets_the_numbers_of_its_caption(letters):
    "At least one a word, keyed by the caption's own draw under the purpose 'text'; a strategy that says nothing of chance is given them."
    texts, draw, seen = ['a red hat', 'hi', '', 'one two three four five'], draws_of(3, range(4)), []
    def spy(words, k, u): seen.append((len(words), u)); return []
    letters(texts, 6, spy, draw); expected = keyed_uniform(draw, 'text', 5).numpy()
    assert [n for n, _ in seen] == [3, 1, 0, 5] and all(len(u) >= max(1, n) and (u == e).all() for (n, u), e in zip(seen, expected, strict=True))
    class AtOnce:
        def __call__(self, words, k, u): raise AssertionError('batch comes first')
        def batch(self, captions, k, u_bn): self.u = u_bn; return [[]] * len(captions)
    s = AtOnce(); letters(texts, 6, s, draw)
    assert all((u == e).all() for u, e in zip(s.u, expected, strict=True))
    letters([], 6, spy); letters([], 6, spy, draw[:0])

@pytest.mark.parametrize('draw, says', ((torch.zeros(3, dtype=torch.int64), r'draw \[3\] of torch.int64 for 2 captions'), (torch.zeros(2), r'draw \[2\] of torch.float32'), (7, r'draw \[\]'), (torch.zeros(2, 1, dtype=torch.int64), r'draw \[2, 1\]')))
def test_a_draw_is_one_integer_a_caption(letters, draw, says):
    with pytest.raises(UserError, match=says): letters(['a', 'b'], 6, lambda words, k, u: [], draw)

def test_texts_and_ids_are_checked_at_the_entrance():
    import numpy as np
    assert check_texts(('a', 'b')) == check_texts(np.array(['a', 'b'])) == ['a', 'b'] and check_texts([]) == [] and check_texts('one caption') == ['one caption']
    refused('text 2 is of type float', check_texts, ['a', 'b', 3.0]); refused('text 0 is of type bytes', check_texts, [b'a']); refused('found int', check_texts, 7); refused('found set', check_texts, {'a'}); refused('found ndarray', check_texts, np.array('a'))
    assert check_ids(torch.tensor([[1, 2, 3]]), 5) == [1, 2, 3] and check_ids(np.array([3]), 5) == [3]
    refused('found 2 rows', check_ids, torch.ones(2, 3), 5); refused('found id -1', check_ids, [0, -1], 5); refused('0 to 30521', check_ids, [30522], 30522)
    for wrong in ([1.7], torch.tensor([1.7]), 'ab', 7, None): refused('no integers', check_ids, wrong, 5)
    from clipa_nb.tokenizer import _slots
    assert (_slots(32, 1), _slots(8, 2)) == (31, 6)
    refused('at least 2', _slots, 1, 1); refused('at least 3', _slots, 2, 2); refused('expected an integer', _slots, 8.0, 1)

def test_the_memory_asks_once_and_is_emptied():
    asked = []
    memory = Memory(lambda w: asked.append(w) or len(w), limit=3)
    assert [memory[w] for w in 'a cat and a dog'.split()] == [1, 3, 3, 1, 3] and asked == ['a', 'cat', 'and', 'dog'] and len(memory) == 1
    assert memory['x' * 1000] == 1000 and 'x' * 1000 not in memory and len(pickle.loads(pickle.dumps(Memory(len)))) == 0

def test_a_crowded_memory_changes_no_id():
    texts = toy_texts(200); toy = train_wordpiece(texts, 256, 17); crowded = pickle.loads(pickle.dumps(toy)); crowded._cache.limit = 100
    for start in range(0, 1000, 50): crowded([f'nonsense{i}' for i in range(start, start + 50)]); assert len(crowded._cache) <= 100
    assert crowded(texts).equal(toy(texts))

def test_repairs_of_text():
    assert [is_plain(t) for t in ('a red circle', 'naïve', 'a\x00b', 'a\nb')] == [True, False, False, False]
    assert joined_surrogates('\ud83d\ude00') == '😀' and joined_surrogates('a\ud83d!') == 'a\ufffd!' and joined_surrogates('你好') == '你好'
    assert clean_text('  The CAT&amp;#39;s\n hat ') == "The CAT's hat" and clean_text('Fish &amp; chips') == 'Fish & chips' and clean_text('\ud83d') == '\ufffd'
    if importlib.util.find_spec('ftfy'): assert clean_text('itâ€™s') == "it's"

def test_a_vocabulary_is_numbered_or_refused(tiny):
    assert numbered(['[PAD]', 'a', 'b'], ('[PAD]',)) == {'[PAD]': 0, 'a': 1, 'b': 2}
    refused('entry 1 is empty', numbered, ['a', '', 'b']); refused('twice', numbered, ['a', 'a']); refused('[CLS] not among its 1', numbered, ['a'], ('[CLS]',))
    learnt = tiny.merges[:2]; assert list(clip_vocabulary(learnt))[512:514] == ['do', 'dot']
    refused('which no earlier merge makes', clip_vocabulary, learnt[::-1]); refused('expected two pieces', clip_vocabulary, [('a',)]); refused('twice', clip_vocabulary, [('a', 'b')] * 2)

def test_letters_stand_for_bytes():
    from clipa_nb.engine.vocabularies import BYTE_LETTERS
    assert len(set(BYTE_LETTERS.values())) == 256 and list(BYTE_LETTERS)[:3] == [33, 34, 35] and BYTE_LETTERS[32] == 'Ġ'
    back = {c: b for b, c in BYTE_LETTERS.items()}; assert bytes(back[BYTE_LETTERS[b]] for b in 'naïve 你'.encode()).decode() == 'naïve 你'

def test_how_captions_are_split():
    from clipa_nb.tokenizer import _ALONE, _HIDDEN
    assert [bool(_ALONE.match(c)) for c in '世か$€_'] == [True, False, True, False, True] and _HIDDEN.sub('', 'so\u00adft hy\u200bphen') == 'soft hyphen'
    for c, words in (('Straße, ﬁne ½', ['strasse', ',', 'fine', '1⁄2']), ('a\x07b so\u00adft', ['a', 'b', 'soft']), ('红色 red', ['红', '色', 'red']), ('[CLS] “quoted”', ['[', 'cls', ']', '“', 'quoted', '”']), ('\u0301 \u200b', [])): assert official_words(c) == words
    assert official_words('Ünïque A', lower=False) == ['Ünïque', 'A'] and open_clip_words('Naïve', lower=False) == ['Naïve']
    for c, words in (('Straße ½', ['straße', '½']), ('a\x07b [CLS] x', ['ab', '[CLS]', 'x']), ('红色 red', ['红', '色', 'red'])): assert open_clip_words(c) == words
    assert open_clip_words('A plain caption.') == official_words('A plain caption.')

SEVEN = ['strip', 'stripe', '##d', '##s', '##e', 'st', '##ed']

def test_rows_of_a_handful_of_pieces():
    t = WordPiece([*SPECIAL, *SEVEN, 'a', '.', 'cafe', *'я', '##я'], 8); other = WordPiece(t.pieces, 8, mode='open_clip')
    assert t('A striped café.').tolist() == [[2, 12, 6, 7, 14, 13, 0, 0]] and t('striped ' * 9).tolist() == [[2, 6, 7, 6, 7, 6, 7, 6]]
    assert t('a' * 101, 4).tolist() == [[2, 1, 0, 0]] and t('', 4).tolist() == [[2, 0, 0, 0]] and t('[CLS]', 4).tolist() == [[2, 1, 1, 1]]
    assert other('striped ' * 9).tolist() == [[2, 6, 7, 6, 7, 6, 7, 0]] and other('[MASK] a [SEP].', 6).tolist() == [[2, 4, 12, 0, 13, 0]] and t('a striped cafe').tolist() == other('a striped cafe').tolist()
    assert t('я' * 51, 3).tolist() == [[2, 1, 0]] and other('я' * 51, 5).tolist() == [[2, 15, 16, 16, 0]] and t('я' * 50, 3).tolist() == [[2, 15, 16]]
    for x, c in ((t, 'a stripe'), (other, '[MASK]')): assert pickle.loads(pickle.dumps(x))(c).equal(x(c))
    assert t.decode(t('A striped café.')) == 'a striped cafe .' and t.decode([0, 0]) == ''
    refused('found 2 rows', t.decode, t(['a', 'a'])); refused('[PAD] has id 1', WordPiece, ['a', *SPECIAL]); refused('needs at least 2', t, 'a', 1); refused('needs at least 3', other, 'a', 2); refused('did you mean official', WordPiece, SPECIAL, mode='offical')

def test_byte_pairs_of_a_handful_of_merges(tiny):
    assert tiny.split("It's 2 dots!! 42") == ['it', "'s", '2', 'dots', '!!', '4', '2'] and tiny('dots dots dots', 5)[0, [0, -1]].tolist() == [tiny.sot, tiny.eot] and tiny('a<END_of_text>', 5)[0, 2].item() == tiny.eot
    refused('needs at least 3', tiny, 'dot', 2); assert pickle.loads(pickle.dumps(tiny))('dot').equal(tiny('dot'))
    assert ''.join(tiny.pieces[i] for i in tiny('dots dot', 8)[0].tolist()).endswith('<|endoftext|>!!!') and tiny.decode(tiny('dots dot', 8)) == 'dots dot'
    assert tiny.decode(tiny('Dots, naïve!', 20)) == 'dots , naïve !' and tiny.decode(tiny('', 8)) == ''
    plain = [c for c in fuzzed(900, 1) if is_plain(c) and '&' not in c and '_of_text' not in c.lower() and '<|' not in c]; pipeline = tiny.rust()
    for c in plain: found = pipeline.encode(c).ids; assert found == tiny(c, 500)[0].tolist()[:len(found)], c
    assert len(plain) > 20

def test_clip_decodes_as_open_clip_does(clip):
    simple = pytest.importorskip('open_clip.tokenizer').SimpleTokenizer()
    assert clip.decode(clip('a photo of a cat')) == simple.decode(simple('a photo of a cat')[0, 1:6].tolist()).strip()

def toy_texts(n):
    import numpy as np
    from clipa_nb.toyworld import WORLDS, caption_text, scenes
    return caption_text(scenes(WORLDS['rich'], 0, np.arange(n)))

def test_a_vocabulary_of_the_toy_world():
    texts = toy_texts(4000); toy = train_wordpiece(texts, 256, 17)
    assert max(len(p) for t in texts for _, p in toy.words(t)) == 1 and toy.pieces[:5] == list(SPECIAL) and toy.decode(toy(texts[0], 40)) == texts[0]
    assert train_wordpiece(random.Random(0).sample(texts, len(texts)), 256, 17).pieces == toy.pieces and [toy.pieces[i] for i in toy.cut('cars')] == ['c', '##a', '##r', '##s']
    refused('vocab_size 20 is too small', train_wordpiece, texts, 20)
    sizes = (64, 72, 80, 96, 112, 128, 160, 192); pieces = [sum(len(ids(t, c)) for c in texts[:500]) / 500 for t in (train_wordpiece(texts, v) for v in sizes)]
    assert pieces == sorted(pieces, reverse=True) and pieces[0] > 2 * pieces[sizes.index(128)] and pieces[-1] == sum(len(toy.words(c)) for c in texts[:500]) / 500

def test_files_of_captions_that_are_packed_or_broken(tmp_path):
    some = toy_texts(300); (tmp_path / 'b.tsv').write_text('image\tcaption\n' + ''.join(f'{i}.jpg\t{t}\n' for i, t in enumerate(some)))
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress('\n'.join(json.dumps(dict(caption=t)) for t in some).encode()))
    for f in ('b.tsv', 'c.jsonl.gz'): assert train_wordpiece(caption_file(tmp_path / f), 200).pieces == train_wordpiece(some, 200).pieces
    refused("no 'text'; it has: image, caption", lambda: list(caption_file(tmp_path / 'b.tsv', 'text')))
    (tmp_path / 'half.txt.gz').write_bytes(gzip.compress(b'caption\n' * 99)[:-9]); refused('cannot be read', lambda: list(caption_file(tmp_path / 'half.txt.gz')))

def test_a_fingerprint_notices_a_line(small):
    p = small.pieces; assert len(digest(p)) == 64 and len({digest(p), digest(p[:-1]), digest(p[::-1])}) == 3

def test_open_clip_reads_what_is_saved(tmp_path, captions):
    for m in ('transformers', 'ftfy'): pytest.importorskip(m)
    from tokenizers import Tokenizer as Rust
    HFTokenizer = pytest.importorskip('open_clip.tokenizer').HFTokenizer; texts = toy_texts(4000); toy = train_wordpiece(texts, 256, 17); toy.save(tmp_path / 'toy')
    assert Rust.from_file(str(tmp_path / 'toy' / 'tokenizer.json')).encode(texts[0]).ids == [i for i in toy(texts[0], 40)[0].tolist() if i]
    assert HFTokenizer(str(tmp_path / 'toy'), context_length=9)(texts[:500]).equal(toy(texts[:500], 9))
    saved = WordPiece(toy.pieces, 9, mode='open_clip'); assert HFTokenizer(str(saved.save(tmp_path / 'toy2')), context_length=9, strip_sep_token=True)(captions).equal(saved(captions))

def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / 'latin.txt').write_bytes('naïve'.encode('latin-1')); (tmp_path / 'half.json').write_text('{"model": '); (tmp_path / 'packed.gz').write_bytes(gzip.compress(b'whole'))
    assert read_text(tmp_path / 'packed.gz') == 'whole'; refused('not a whole UTF-8', read_text, tmp_path / 'latin.txt'); refused('not a whole JSON', read_json, tmp_path / 'half.json')

def test_settings_are_levelled_and_compared(small, tiny, tmp_path):
    from tokenizers import Tokenizer as Rust
    saved, stock = read_json(small.save(tmp_path / 'a') / 'tokenizer.json'), json.loads(WordPiece(small.pieces, mode='open_clip').rust().to_str())
    said, unsaid = ({**stock, 'normalizer': stock['normalizer'] | dict(strip_accents=accents)} for accents in (True, None)); assert settings(said) == settings(unsaid) != settings(saved)
    assert settings(saved) == settings(json.loads(Rust.from_file(str(tmp_path / 'a' / 'tokenizer.json')).to_str())) == our_settings('WordPiece') and settings(said) == our_settings('WordPiece', True, 'open_clip') != our_settings('WordPiece', False, 'open_clip')
    assert settings(read_json(tiny.save(tmp_path / 'b') / 'tokenizer.json')) == our_settings('ClipBPE')
    stock['normalizer']['strip_accents'] = False; assert settings(stock) != our_settings('WordPiece', True, 'open_clip')
    assert first_difference(dict(a=[1, 2]), dict(a=[1, 3]), 'its') == 'its.a.1 is 2, expected 3' and first_difference(dict(a=1), dict(a=1), 'its') is None and first_difference({}, dict(a=1), 'its') == 'its.a is None, expected 1'
    assert check_settings('here', saved, our_settings('WordPiece'), SPECIAL) is None
    for change in (dict(added_tokens=saved['added_tokens'] + [dict(saved['added_tokens'][0], id=len(small.pieces), content='[NEW]')]), dict(normalizer=None), dict(pre_tokenizer='x'), dict(model=dict(saved['model'], max_input_chars_per_word=5))): refused('here: ', check_settings, 'here', saved | change, our_settings('WordPiece'), SPECIAL)

def test_ids_of_a_dictionary_are_the_numbers_from_0():
    from clipa_nb.engine.vocabularies import ordered_pieces
    assert ordered_pieces('here', dict(b=1, a=0)) == ['a', 'b']; refused('not 0 to 1', ordered_pieces, 'here', dict(a=0, b=2)); refused('not 0 to 1', ordered_pieces, 'here', dict(a=0, b='1'))

def test_what_is_read_is_plain_data(small, tiny, tmp_path):
    "Lists, pairs and dictionaries: the workshop knows no tokenizer class."
    small.save(tmp_path / 'a'); tiny.save(tmp_path / 'b')
    for file in ('', 'tokenizer.json', 'vocab.txt'): found = read_vocabulary(tmp_path / 'a' / file); assert (found['kind'], found['parts'], found['lower'], found['config']['mode']) == ('WordPiece', small.pieces, True, 'official')
    for file in ('', 'tokenizer.json', 'merges.txt'): found = read_vocabulary(tmp_path / 'b' / file); assert (found['kind'], found['parts']) == ('ClipBPE', tiny.merges)
    (tmp_path / 'short.txt').write_text('[PAD]\n[UNK]\n'); refused('[CLS] [SEP] [MASK] not among its 2 entries', read_vocabulary, tmp_path / 'short.txt'); refused('expected tokenizer.json', read_vocabulary, tmp_path)
    saved = read_json(tmp_path / 'a' / 'tokenizer.json')
    for change, says in ((dict(model=dict(type='Unigram', vocab=[])), 'found a Unigram tokenizer'), (dict(model='x'), 'expected BERT word pieces or CLIP byte pairs'), (dict(model=saved['model'] | dict(vocab={p: i for p, i in small.vocab.items() if i != 30})), 'not 0 to'), (dict(model=dict(type='BPE', vocab={}, end_of_word_suffix='</w>')), 'no list of merges'), (dict(normalizer=dict(type='Lowercase')), 'its normalizer')):
        (tmp_path / 'x.json').write_text(json.dumps(saved | change)); refused(says, read_vocabulary, tmp_path / 'x.json')

def test_landmarks_of_damaged_lists(bert, tiny, small):
    from clipa_nb.engine.vocabularies import PUBLISHED, landmark_share
    marks = {name: v[3:] for name, v in PUBLISHED.items()}; assert landmark_share(small.pieces, *marks['bert-base-uncased']) == 0 == landmark_share(tiny.pieces, *marks['clip'])
    assert [landmark_share(bert.pieces[:i] + bert.pieces[i + 1:], *marks['bert-base-uncased']) for i in (1, 1500, 2000, 30500)] == [1, 1, 14 / 15, 1]
    w = bert.pieces
    for p in (w[:20000], [x for x in w if '[unused' not in x], [*w[:9000], w[9001], w[9000], *w[9002:]], [*w[:999], *sorted(w[999:])]): refused('a damaged copy of bert-base-uncased', published, p)
    assert published([w[0], 'clipa', *w[2:]]) is None

def test_published_by_fingerprint_and_not_by_name(bert, clip, small, tmp_path):
    "The same list is recognised whatever it was loaded as, also with another mode; a changed one is not, and nothing is refused by asking."
    for name in ('bert-base-uncased.txt', 'anything.txt'): (tmp_path / name).write_bytes(BERT.read_bytes()); assert load_tokenizer(tmp_path / name).published == 'bert-base-uncased'
    assert WordPiece(bert.pieces, 8, mode='open_clip').published == 'bert-base-uncased' == pickle.loads(pickle.dumps(bert)).published and load_tokenizer(bert.save(tmp_path / 'm')).published == 'bert-base-uncased'
    assert clip.published == 'clip' and small.published == '' == WordPiece([*bert.pieces, 'clipa']).published == WordPiece(bert.pieces[:-1]).published and published_name([]) == ''

def test_the_public_ids_of_bert(bert):
    assert len(ids(bert, 'a photo of a turquoise rhombus')) == 8 and bert('a photo of a cat', 8).tolist() == [[101, 1037, 6302, 1997, 1037, 4937, 0, 0]]

def test_a_missing_vocabulary_names_the_variable_and_the_file(places):
    for name, files in (('bert-base-uncased', ('bert-base-uncased.txt', 'bert-base-uncased.json')), ('clip', ('clip.txt', 'bpe_simple_vocab_16e6.txt.gz')), ('org/model', ('org/model.json',))):
        says = not_found(name); assert '\n' not in says and str(places / 'shelf') in says and 'CLIPA_VOCABULARIES' in says and all(f in says for f in files) and set(files) <= set(shelf_files(name))
    refused('CLIPA_VOCABULARIES', load_tokenizer, 'bert-base-uncased'); refused('bert-base-uncased.txt', find_vocabulary, 'bert-base-uncased')
    assert 'hf download openai/clip' in not_found('clip') and 'hf download' not in not_found('no/such/vocab.txt') and 'CLIPA_VOCABULARIES' not in not_found('no/such/vocab.txt')

def test_a_file_put_where_the_message_says_is_found(small, places):
    (places / 'shelf' / 'me').mkdir(parents=True); small.save(places / 'x')
    for name in ('mine', 'me/mine'):
        for file in shelf_files(name): text = (places / 'x' / ('tokenizer.json' if file.endswith('.json') else 'vocab.txt')).read_text(); (places / 'shelf' / file).write_text(text); assert load_tokenizer(name).pieces == small.pieces; (places / 'shelf' / file).unlink()

def test_loading_says_what_is_wrong_with_the_arguments(small, tmp_path):
    small.save(tmp_path / 'm')
    refused('too short', load_tokenizer, tmp_path / 'm', 0); refused('unknown mode', load_tokenizer, tmp_path / 'm', mode='tf'); refused('rows for 100', load_tokenizer, tmp_path / 'm', rows=100); refused('did you mean bert-base-uncased', load_tokenizer, 'bert-base-uncase')

# ---- the tokenizer of a recipe

CAPTIONS = ('a red circle', 'two blue stars', 'a circle and a star')

def together(n, act):
    "What `act(comm)` returned or raised on n ranks, each a thread whose `gather` meets the others."
    meeting, shelf, out = threading.Barrier(n, timeout=20), [None] * n, [None] * n
    class Rank:
        def __init__(self, rank): self.rank, self.size = rank, n
        def gather(self, x):
            shelf[self.rank] = x; meeting.wait(); whole = torch.cat(shelf); meeting.wait(); return whole
    def run(rank):
        try: out[rank] = act(Rank(rank))
        except Exception as e: out[rank] = e
    threads = [threading.Thread(target=run, args=(r,)) for r in range(n)]
    for t in threads: t.start()
    for t in threads: t.join()
    return out

def never(): raise AssertionError('the captions were asked for')

def test_configurations_of_tokenizers_survive_json():
    for c in (Vocabulary(), Vocabulary('clip'), LearntVocabulary()): assert Config.from_json(c.to_json()) == c and hash(c) == hash(Config.from_json(c.to_json()))
    assert Vocabulary().name == 'bert-base-uncased' and Vocabulary().to_dict()['kind'] == 'tokenizer:Vocabulary' and LearntVocabulary().to_dict() == dict(kind='tokenizer:LearntVocabulary')

def test_a_vocabulary_is_opened_by_path_or_name(small, places):
    small.save(places / 'shelf' / 'mine')
    for name in ('mine', str(places / 'shelf' / 'mine'), str(places / 'shelf' / 'mine' / 'vocab.txt')):
        v = Vocabulary(name); assert v.check(small.vocab_size) is None and v.check() is None
        t = v.open(never, places / 'out', small.vocab_size, 11); assert t.pieces == small.pieces and t.context_length == 11 and not (places / 'out').exists()
    assert Vocabulary('mine').open(never, None, None, None).context_length == small.context_length
    for f in (Vocabulary('mine').check, lambda rows: Vocabulary('mine').open(never, None, rows, 8)): refused(f'{small.vocab_size} pieces, but the text tower has rows for 9', f, 9)
    (places / 'shelf' / 'mine' / 'vocab.txt').write_text('\n'.join(small.pieces[:-1]) + '\n'); refused('SHA-256 differs', Vocabulary(str(places / 'shelf' / 'mine' / 'vocab.txt')).check, 10**5)

def test_a_missing_vocabulary_is_found_in_milliseconds(places):
    "Before anything is read or timed; the message names the variable and the files."
    start = time.perf_counter(); refused('CLIPA_VOCABULARIES', Vocabulary().check, 30522); seconds = time.perf_counter() - start
    assert seconds < 0.1; refused('bert-base-uncased.txt or bert-base-uncased.json', Vocabulary().check, 30522); refused('did you mean', Vocabulary('clipp').check, 1)

def test_the_published_vocabulary_is_checked_whole(bert, places):
    (places / 'shelf').mkdir(); (places / 'shelf' / 'bert-base-uncased.txt').write_bytes(BERT.read_bytes())
    assert Vocabulary().check(30522) is None and Vocabulary().open(never, None, 30522, 8).published == 'bert-base-uncased' == Vocabulary(str(BERT)).open(never, None, 32000, 8).published
    refused('rows for 30000', Vocabulary().check, 30000)
    (places / 'shelf' / 'bert-base-uncased.txt').write_text('\n'.join(bert.pieces[:-1]) + '\n'); refused('damaged copy', Vocabulary().check, 30522)

@pytest.mark.parametrize('ranks', (1, 2, 3))
def test_word_pieces_are_learnt_once_on_rank_0_and_read_by_all(ranks, tmp_path):
    asked, v, folder = [], LearntVocabulary(), tmp_path / 'run' / 'tokenizer'
    def act(comm):
        def captions(): asked.append(comm.rank); time.sleep(.05); return iter(CAPTIONS)
        return v.open(captions, folder, 64, 9, comm)
    made = together(ranks, act); expected = train_wordpiece(CAPTIONS, 64)
    assert asked == [0] and all(t.pieces == expected.pieces and t.context_length == 9 for t in made)
    again = together(ranks, lambda comm: v.open(never, folder, 64, 17, comm)) # a resumed run
    assert all(t.pieces == expected.pieces and t.context_length == 17 for t in again)
    refused('rows for 9', v.open, never, folder, 9, 17)

def test_learning_is_local_without_a_comm(tmp_path):
    t = LearntVocabulary().open(lambda: CAPTIONS, tmp_path, 64, 9); assert t('a red circle').shape == (1, 9) and (tmp_path / 'tokenizer.json').exists()
    assert LearntVocabulary().open(never, str(tmp_path), 64, 9).pieces == t.pieces

def test_half_a_saved_vocabulary_is_learnt_again(tmp_path):
    "The configuration is written last, so without it the files are not whole."
    LearntVocabulary().open(lambda: CAPTIONS, tmp_path, 64, 9); (tmp_path / 'tokenizer_config.json').unlink(); (tmp_path / 'tokenizer.json').write_text('{')
    assert LearntVocabulary().open(lambda: CAPTIONS[:2], tmp_path, 64, 9).pieces == train_wordpiece(CAPTIONS[:2], 64).pieces

def broken(): yield 'a'; raise UserError('shard 3 cannot be read')

@pytest.mark.parametrize('captions, rows, says', ((lambda: (), 64, 'no caption to learn word pieces from'), (lambda: ['', ' '], 64, 'no caption'), (lambda: CAPTIONS, 12, 'too small'), (lambda: ['a', None], 64, 'text 1 is of type NoneType'), (broken, 64, 'shard 3')))
def test_all_ranks_raise_where_learning_fails(captions, rows, says, tmp_path):
    "Nobody waits for a rank that is gone, and nothing is left behind that a resumed run would take for a vocabulary."
    found = together(2, lambda comm: LearntVocabulary().open(captions, tmp_path / 'tokenizer', rows, 9, comm))
    assert all(isinstance(e, UserError) for e in found) and says in str(found[0]) and 'rank 0' in str(found[1])
    assert not (tmp_path / 'tokenizer').exists(); refused(says, LearntVocabulary().open, captions, tmp_path / 'tokenizer', rows, 9)

def test_where_nothing_can_be_written_all_ranks_say_so(tmp_path):
    (tmp_path / 'tokenizer').write_text('')
    found = together(2, lambda comm: LearntVocabulary().open(lambda: CAPTIONS, tmp_path / 'tokenizer', 64, 9, comm))
    assert all(isinstance(e, UserError) for e in found) and 'a file is in the way' in str(found[0])

def test_a_learnt_vocabulary_needs_room(): assert LearntVocabulary().check(64) is None is LearntVocabulary().check(); refused('5 of them are special tokens', LearntVocabulary().check, 5)
