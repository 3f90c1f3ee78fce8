#!/usr/bin/env python
"""What is the context-free tagger worth through the table of a vocabulary? Appends one row a half to nbs/results/tagger.jsonl; chapter 07 prints them.

    python tests/bench/tagger.py --bert bert-base-uncased-vocab.txt      both halves, a few seconds
    python tests/bench/tagger.py --bert … --halves dev                   leaves the held-out half alone

CLIPA-v2 ranks a word by the tag of its first piece. The captions tagged by hand are cut by the tokenizer of that vocabulary, each word
is ranked so, and the ranks are compared with those of the tags by hand: precision and recall of each class. Totals only; no mistake is listed.
"""
import argparse, json, subprocess, sys, time
from collections import Counter
from pathlib import Path
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / '.ci'))
from record import cpu_name
from clipa_nb.text_truncation import priority, rule_tagger, text_strategy
from clipa_nb.tokenizer import load_tokenizer

CLASSES = ('noun', 'adjective', 'verb', 'rest')

def tagged(half): return [[tuple(w.rsplit('/', 1)) for w in l.split()] for l in (ROOT / f'tests/fixtures/captions/{half}.txt').read_text('utf-8').splitlines()]

def score(tokenizer, captions):
    "({class: (precision, recall)}, words, words of several pieces)."
    strategy, pairs, several = text_strategy('syntax', rule_tagger, vocabulary=tokenizer.pieces, official=True), Counter(), 0
    for caption in captions:
        words = tokenizer.words(' '.join(w for w, _ in caption))
        if [w for w, _ in words] != [w.lower() for w, _ in caption]: raise SystemExit('the tokenizer cuts the captions into other words than those tagged by hand')
        pairs.update(zip((priority(t) for _, t in caption), strategy.ranks(words))); several += sum(len(ids) > 1 for _, ids in words)
    share = lambda i, side: pairs[i, i] / max(1, sum(n for pair, n in pairs.items() if pair[side] == i))
    return {c: (round(share(i, 1), 4), round(share(i, 0), 4)) for i, c in enumerate(CLASSES)}, sum(pairs.values()), several

def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--bert', default=str(ROOT.parent / 'shared' / 'data' / 'bert-base-uncased-vocab.txt')); ap.add_argument('--halves', nargs='+', choices=('dev', 'heldout'), default=('dev', 'heldout'))
    ap.add_argument('--out', default=str(ROOT / 'nbs' / 'results' / 'tagger.jsonl'))
    a = ap.parse_args()
    sha = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude', '*'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    bert = load_tokenizer(a.bert)
    with open(a.out, 'a') as out:
        for half in a.halves:
            captions = tagged(half); scores, words, several = score(bert, captions)
            row = dict(git_sha=sha, date=time.strftime('%Y-%m-%d'), hardware=cpu_name(), torch=torch.__version__, threads=1, vocabulary=Path(a.bert).stem, entries=len(bert.pieces), tagger='rule_tagger, first pieces',
                       half=half, captions=len(captions), words=words, several_pieces=several, scores=scores)
            out.write(json.dumps(row) + '\n'); print(f'{half:8s}', *(f'{c} {p:.2%}|{r:.2%}' for c, (p, r) in scores.items()), f'{several} of {words} words have several pieces')

if __name__ == '__main__': main()
