"temporary stand-in until chapter 06 is exported"
import json, torch
from pathlib import Path
class WordPiece:
    def __init__(s,vocab,context_length=17): s.vocab,s.context_length,s.vocab_size={w:i for i,w in enumerate(vocab)},context_length,len(vocab); s.inv=list(vocab)
    def words(s,t): return [(w,[s.vocab.get(w,1)]) for w in t.lower().split()]
    def __call__(s,texts,context_length=None,strategy=None,generator=None):
        texts=[texts] if isinstance(texts,str) else texts; T=context_length or s.context_length; out=torch.zeros(len(texts),T,dtype=torch.long); out[:,0]=2
        for r,t in enumerate(texts):
            w=s.words(t); ids=strategy(w,T-1,generator) if strategy and sum(len(p) for _,p in w)>T-1 else [i for _,p in w for i in p][:T-1]
            out[r,1:1+len(ids)]=torch.tensor(ids,dtype=torch.long)
        return out
    def decode(s,ids): return ' '.join(s.inv[i] for i in ids if i>4)
    def save(s,d): d=Path(d); d.mkdir(parents=True,exist_ok=True); (d/'vocab.txt').write_text('\n'.join(s.inv)); (d/'tokenizer_config.json').write_text(json.dumps(dict(context_length=s.context_length)))
def train_wordpiece(texts,vocab_size=256,context_length=17): return WordPiece(['[PAD]','[UNK]','[CLS]','[SEP]','[MASK]']+sorted({w for t in texts for w in t.lower().split()}),context_length)
def load_tokenizer(p,context_length=None):
    p=Path(p); c=json.loads((p/'tokenizer_config.json').read_text()); return WordPiece((p/'vocab.txt').read_text().split('\n'),context_length or c['context_length'])
