"The house's architecture, from the files alone: who may import whom, and what every notebook must hold."
import ast, functools, json, re
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part.startswith(('.', '_')) for part in p.relative_to(NBS).parts))
FLOORS = dict(core=0, engine=1, book=2, app=3, zoo=3, cli=4, top=5, exp=5)
DRAWING = {'matplotlib', 'ipywidgets', 'IPython'}
SPEAKS_TO_RANKS = {'distributed_trainer', 'engine.checkpoints', 'engine.launch'}
LAZY = {'toyworld': {'recipes', 'app', 'zoo'}} # who may import the toy world, and then only inside functions

def name_of(path):
    "'nbs/engine/02_shards.ipynb' → 'engine/02_shards'."
    return path.relative_to(NBS).with_suffix('').as_posix()

def source(path): return ''.join(''.join(c['source']) + '\n' for c in json.loads(path.read_text())['cells'])

def exports_to(path):
    "The module a notebook exports to, or None."
    found = re.search(r'^#\|\s*default_exp\s+(\S+)', source(path), re.M)
    return found and found[1]

MODULES = {m: p for p in NOTEBOOKS if (m := exports_to(p))}
FILES = {m: ROOT / 'clipa_nb' / f"{m.replace('.', '/')}.py" for m in MODULES}
TREES = {m: ast.parse(p.read_text()) for m, p in FILES.items() if p.exists()}

def floor(module):
    if module == '__init__': return 'top'
    if module in ('core', 'cli'): return module
    return module.split('.')[0] if '.' in module else 'book'

def number(module): return int(MODULES[module].name[:2]) if MODULES[module].name[:2].isdigit() else 0

def imports(tree, here='', top=False):
    "(module, names) of every import statement, ours as '.engine.viz'; `top` leaves out those inside functions."
    functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, functions) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if top and id(n) in inside: continue
        if isinstance(n, ast.Import): yield from ((re.sub(r'^clipa_nb\.', '.', a.name), ()) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            package = here.split('.')[:-1]
            parts = package[:len(package) - n.level + 1] if n.level else []
            module = '.' + '.'.join([*parts, *([n.module] if n.module else [])]) if n.level else n.module
            names = tuple(a.name for a in n.names)
            module = re.sub(r'^clipa_nb\b\.?', '.', module)
            whole = [x for x in names if f'{module}.{x}'.strip('.') in MODULES] # `from .engine import viz` names a module
            for x in whole: yield f'{module}.{x}'.replace('..', '.'), ()
            if len(whole) < len(names): yield module, names

def own(module, top=False): return {m[1:] for m, _ in imports(TREES[module], module, top) if m.startswith('.') and m[1:] in MODULES}

def dynamic(tree):
    "Modules named in calls of `need`, `import_module` and `__import__`."
    for n in ast.walk(tree):
        if not (isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant) and isinstance(n.args[0].value, str)): continue
        called = n.func.id if isinstance(n.func, ast.Name) else getattr(n.func, 'attr', '')
        if called in ('need', 'import_module', '__import__'): yield n.args[0].value

@functools.cache
def depth(module): return 1 + max((depth(m) for m in own(module, top=True)), default=0)

def may_import(a, b):
    "May module `a` import module `b`?"
    up, down = floor(a), floor(b)
    if up == down: return number(b) < number(a)
    return FLOORS[down] < FLOORS[up]

def test_every_module_has_its_notebook_and_the_other_way_round():
    files = {p.relative_to(ROOT / 'clipa_nb').with_suffix('').as_posix().replace('/', '.') for p in (ROOT / 'clipa_nb').rglob('*.py')}
    packages = {f'{f}.__init__' for f in ('engine', 'app', 'zoo')}
    assert files - {'_modidx', '__init__'} - packages == set(MODULES) - {'__init__'}
    for module, path in MODULES.items():
        assert f'{path.relative_to(ROOT).as_posix()}' in FILES[module].read_text(), module
        assert module == '__init__' or ast.get_docstring(TREES[module]), f'{module} has no docstring: a notebook starts with a title and a blockquote'
        folder = '' if module in ('cli', '__init__') else '/'.join(module.split('.')[:-1])
        assert module in ('cli', '__init__') or path.parent.relative_to(NBS).as_posix() == (folder or '.'), f'{module} is built on another floor'

@pytest.mark.parametrize('module', MODULES)
def test_imports_only_what_lies_below(module):
    for m, names in imports(TREES[module], module):
        assert '*' not in names, f'from {m} import *'
        if not m.startswith('.') or m == '.': continue
        assert m[1:] in MODULES, f'{module} imports {m}, which is no module of ours'
        assert may_import(module, m[1:]), f'{module} ({floor(module)} {number(module)}) imports {m[1:]} ({floor(m[1:])} {number(m[1:])})'

def test_import_depth():
    deepest = max(TREES, key=depth)
    assert depth(deepest) <= 9, f'{deepest} has {depth(deepest)} layers below and including it'

def test_few_modules_know_of_processes():
    for module, tree in TREES.items():
        found = [m for m, names in imports(tree, module) if m.startswith('torch.distributed') or (m == 'torch' and 'distributed' in names)]
        found += [m for m in dynamic(tree) if m.startswith('torch.distributed')]
        found += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == 'torch.distributed']
        assert not found or module in SPEAKS_TO_RANKS, (module, found)

def test_one_module_draws():
    for module, tree in TREES.items():
        found = [m for m, _ in imports(tree, module) if m.split('.')[0] in DRAWING]
        assert not found or module == 'engine.viz', (module, found)
        assert 'engine.viz' not in own(module, top=True), f'{module} imports viz before a picture is asked for'

@pytest.mark.parametrize('lazy', LAZY)
def test_the_toy_world_is_one_data_source_among_others(lazy):
    users = {m for m in TREES if lazy in own(m)}
    assert all(floor(m) in LAZY[lazy] or m in LAZY[lazy] for m in users), users
    for m in TREES: assert lazy not in own(m, top=True), f'{m} imports {lazy} before it is asked for'

def test_formats_know_plain_dictionaries_only():
    for module in TREES:
        if floor(module) != 'engine': continue
        assert not any(isinstance(n, ast.Name) and n.id == 'ModelConfig' for n in ast.walk(TREES[module])), f'{module} knows a configuration of the book'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_cells_that_are_not_exported_borrow_only_what_a_reader_has_seen(path):
    "A chapter needs what lies below it; for a picture viz, for a few ranks distributed_trainer, and nobody else talks to process groups."
    module = exports_to(path)
    for i, c in enumerate(read(path).cells):
        if c.cell_type != 'code' or 'export' in directives(c): continue
        for m, _ in imports(ast.parse(re.sub(r'^[ ]*[%!].*', '', c.source, flags=re.M))):
            assert not m.startswith('torch.distributed') or module in SPEAKS_TO_RANKS, f'cell {i} imports {m}'
            if module is None or not m.startswith('.') or m[1:] not in MODULES or m[1:] == module: continue
            borrowed = m[1:] in ('engine.viz', 'distributed_trainer', 'toyworld', 'cli')
            assert borrowed or may_import(module, m[1:]), f'cell {i} borrows {m}'

SUFFIX = re.compile(r'[A-Za-z]+_(?P<letters>(?=[a-zA-Z]*[A-Z])[A-Za-z]{1,6}|[bnhwc]|hw|cd)\d*')

def suffixes(tree):
    "(name, letters) of every variable and parameter that carries its shape: one capital at least, or a small letter of the legend."
    for n in ast.walk(tree):
        name = n.id if isinstance(n, ast.Name) else n.arg if isinstance(n, ast.arg) else ''
        m = SUFFIX.fullmatch(name)
        if m and not name.isupper() and not re.search('[a-z]{2}', re.sub('hw|cd|bn', '', m['letters'])): yield name, m['letters']

def test_every_letter_of_a_suffix_is_in_the_legend():
    from clipa_nb.core import SHAPES
    found = [s for tree in TREES.values() for s in suffixes(tree)]
    unknown = sorted({name for name, letters in found if set(letters) - set(SHAPES)})
    assert not unknown, f'not in the legend of chapter 00: {unknown}'

# -- notebooks ----------------------------------------------------------------------------------------------------------------

def read(path): return nbformat.read(path, 4)

def directives(cell):
    "The words after `#|` in the first lines of a code cell."
    return [m[1] for line in cell.source.splitlines()[:5] if (m := re.match(r'\s*#\s*\|\s*(\S+)', line))]

def has_picture(cell): return any(k.startswith('image/') for o in cell.get('outputs', []) for k in o.get('data', {}))

def late_methods(text):
    "Assignments of a function to a class that stands elsewhere."
    return re.findall(r'^[A-Z]\w*\.\w+(?:\s*,\s*[A-Z]\w*\.\w+)*\s*=\s*\w', text, re.M)

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_a_notebook_opens_with_its_subject(path):
    first = read(path).cells[0]
    assert first.cell_type == 'markdown' and first.source.startswith('# ') and re.search(r'^> ', first.source, re.M), 'a title and a blockquote'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_stored_outputs_are_clean(path):
    nb = read(path)
    assert 'widgets' not in nb.metadata
    for i, c in enumerate(nb.cells):
        if c.cell_type != 'code': continue
        assert c.execution_count is None, f'cell {i} has an execution count'
        for o in c.outputs:
            assert o.get('execution_count') is None, f'an output of cell {i} has an execution count'
            assert 'application/vnd.jupyter.widget-view+json' not in o.get('data', {}), f'cell {i} holds a view of a widget, which no reader can open'
            assert o.output_type != 'error', f'cell {i} ended with an error'

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent == NBS], ids=name_of)
def test_a_chapter_shows_figures_and_every_widget_a_picture(path):
    nb = read(path)
    assert any(has_picture(c) for c in nb.cells), 'no stored figure: .ci/refresh.py'
    for i, c in enumerate(nb.cells):
        if c.cell_type != 'code' or 'export' in directives(c) or not re.search(r'^\s*widget\(', c.source, re.M): continue
        assert has_picture(c), f'the widget of cell {i} has no picture beside it: on GitHub the page would be blank'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_a_class_stands_whole(path):
    for i, c in enumerate(read(path).cells):
        if c.cell_type == 'code' and {'export', 'exporti'} & set(directives(c)): assert not late_methods(c.source), f'cell {i} attaches methods to a class'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=name_of)
def test_no_comparison_stands_alone(path):
    for i, c in enumerate(read(path).cells):
        if c.cell_type != 'code' or re.search(r'^[%!]', c.source, re.M): continue
        loose = [n.lineno for n in ast.parse(c.source).body[:-1] if isinstance(n, ast.Expr) and isinstance(n.value, ast.Compare)]
        assert not loose, f'cell {i}: a comparison that nothing checks: {c.source.splitlines()[loose[0] - 1]}'

@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if p.parent == NBS and p.stem != 'index'], ids=name_of)
def test_solutions_are_folded(path):
    text = '\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')
    exercises, _, rest = text[text.index('\n## Exercises'):].partition('<details>')
    solutions, end, _ = rest.partition('</details>')
    assert end and re.findall(r'^(\d)\. ', exercises, re.M) == re.findall(r'^(\d)\. ', solutions, re.M) == ['1', '2', '3'], 'three exercises, and a folded solution of each'

# -- the project speaks of itself alone ---------------------------------------------------------------------------------------

PLACES = re.compile(r'(?<![\w./-])/(?:work|home|root|Users|mnt)/\w|/tmp/tmp\w|/var/fold[e]rs/|/ipykernel_\d+|\bpypi\.org|\bpythonhosted\b')

def test_no_place_of_a_machine_is_written_down():
    files = [*NOTEBOOKS, *(ROOT / 'clipa_nb').rglob('*.py'), *(ROOT / 'tests').rglob('*.py'), *ROOT.glob('*.md'), *(NBS / 'results').glob('*.jsonl')]
    found = {}
    for p in files:
        text = p.read_text()
        if p.suffix == '.ipynb':
            cells = json.loads(text)['cells']
            shown = lambda c: ''.join(t for o in c.get('outputs', []) for t in [*o.get('text', []), *o.get('data', {}).get('text/plain', [])])
            text = '\n'.join(''.join(c['source']) + shown(c) for c in cells)
        if m := PLACES.search(text): found[p.name] = text[max(0, m.start() - 30):m.end() + 30]
    assert not found, found
