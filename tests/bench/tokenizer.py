#!/usr/bin/env python
"""How many captions does a CPU-second tokenize? Appends one row a contender to nbs/results/tokenizer.jsonl.

    python tests/bench/tokenizer.py [--rounds 9] [--n 4096]        about two minutes

Captions of ten words, context 8. All contenders take turns on the same captions in one process with one thread; a row holds
the median over the rounds, and the ratio to open_clip's SimpleTokenizer, called for each caption as its loader does and
without any choice of words. Ours are called for batches of 256. Two kinds of caption: `toy` (the rich toy world, a few
hundred words) and `zipf` (ten words drawn with Zipf's law from 20,000, as ordinary language has them). `cold` is the first
round, with an empty memory. BERT's vocabulary is read from --bert, and its rows are left out where it is not there.
"""
import argparse, json, os, statistics, subprocess, sys, time
from pathlib import Path
os.environ['TOKENIZERS_PARALLELISM'] = 'false'
import numpy as np, torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import cpu_name
from open_clip.tokenizer import SimpleTokenizer
from clipa_nb.core import draws_of
from clipa_nb.text_truncation import rule_tagger, text_strategy
from clipa_nb.tokenizer import WordPiece, load_tokenizer
from clipa_nb.toyworld import WORLDS, caption_text, scenes

CONTEXT, WORDS, BATCH = 8, 10, 256

def toy_captions(n):
    found = (t for i in range(0, 400_000, 20_000) for t in caption_text(scenes(WORLDS['rich'], 0, np.arange(i, i + 20_000))) if len(t.split()) == WORDS)
    return [t for t, _ in zip(found, range(n))]

def zipf_captions(n, clip):
    "Whole words of CLIP's vocabulary; the earlier they were learnt, the commoner they are."
    words = [p[:-4] for p in clip.pieces[512:-2] if p.endswith('</w>') and p[:-4].isascii() and p[:-4].isalpha()][:20_000]
    p = 1 / np.arange(1, len(words) + 1); draws = np.random.default_rng(0).choice(len(words), (n, WORDS), p=p / p.sum())
    return [' '.join(words[i] for i in row) for row in draws]

def contenders(clip, bert):
    "(tokenizer, strategy, captions → rows)."
    simple, rust = SimpleTokenizer(), clip.rust()
    encode = getattr(rust, 'encode_batch_fast', rust.encode_batch)
    yield 'open_clip SimpleTokenizer', 'none', lambda cs: [simple(c, CONTEXT) for c in cs]
    yield 'Rust pipeline of CLIP', 'none', lambda cs: [encode(cs[i:i + BATCH]) for i in range(0, len(cs), BATCH)]
    for name, t in (('ClipBPE', clip), ('WordPiece official', bert), ('WordPiece open_clip', bert and WordPiece(bert.pieces, mode='open_clip'))):
        if t is None: continue
        strategies = {'none': None} | {s: text_strategy(s, rule_tagger) for s in ('truncate', 'random', 'block')}
        strategies |= {'syntax, a tag for each word': text_strategy('syntax', rule_tagger), 'syntax, a tag for each entry': text_strategy('syntax', rule_tagger, vocabulary=t.pieces, official=True)}
        for s, f in strategies.items(): yield name, s, lambda cs, t=t, f=f: [t(cs[i:i + BATCH], CONTEXT, f, draws_of(0, np.arange(i, min(i + BATCH, len(cs))))) for i in range(0, len(cs), BATCH)]

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--rounds', type=int, default=9); ap.add_argument('--n', type=int, default=4096)
    ap.add_argument('--bert', default=str(ROOT.parent / 'shared' / 'data' / 'bert-base-uncased-vocab.txt')); ap.add_argument('--out', default=str(ROOT / 'nbs' / 'results' / 'tokenizer.jsonl'))
    a = ap.parse_args(); torch.set_num_threads(1)
    sha = subprocess.run(['git', 'describe', '--always', '--dirty'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    for kind in ('toy', 'zipf'):
        clip = load_tokenizer('clip'); bert = load_tokenizer(a.bert) if Path(a.bert).exists() else None
        captions = toy_captions(a.n) if kind == 'toy' else zipf_captions(a.n, clip)
        runs = list(contenders(clip, bert)); spent = [[] for _ in runs]
        for _ in range(a.rounds + 1):
            for s, (_, _, f) in zip(spent, runs): t = time.process_time(); f(captions); s.append(time.process_time() - t)
        base = statistics.median(spent[0][1:])
        with open(a.out, 'a') as out:
            for s, (name, strategy, _) in zip(spent, runs):
                median = statistics.median(s[1:])
                row = dict(git_sha=sha, date=time.strftime('%Y-%m-%d'), hardware=cpu_name(), torch=torch.__version__, threads=1, captions=kind, n=len(captions), words=WORDS, context=CONTEXT, batch=1 if 'Simple' in name else BATCH,
                           tokenizer=name, strategy=strategy, captions_per_cpu_second=round(len(captions) / median), ratio=round(base / median, 2), cold=round(len(captions) / s[0]))
                out.write(json.dumps(row) + '\n'); print(f"{kind:5s} {name:26s} {strategy:30s} {row['captions_per_cpu_second']:8d} /s  {row['ratio']:5.2f}×")

if __name__ == '__main__': main()
