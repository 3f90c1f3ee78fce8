"temporary stand-in until chapter 07 is exported"
class lexicon_tagger:
    def __init__(s,lex): s.lex=lex
    def __call__(s,ws): return [s.lex.get(w,'NN') for w in ws]
def rule_tagger(ws): return ['NN' for w in ws]
def truncate(words,k,g): return [i for _,p in words for i in p][:k]
class Syntax:
    def __init__(s,t): s.t=t
    def __call__(s,words,k,g):
        tags=s.t([w for w,_ in words]); pr=lambda i:{'N':1,'J':2,'V':3}.get(tags[i][0],4)
        keep=sorted(sorted(range(len(words)),key=lambda i:(pr(i),i))[:k]); return [x for i in keep for x in words[i][1]][:k]
def text_strategy(name,tagger=None): return Syntax(tagger) if name=='syntax' else truncate
