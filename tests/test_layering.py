"The book's architecture, from the files alone: who may import whom, and what every chapter must hold."
import ast, json, re, statistics
from pathlib import Path
import nbformat, pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('[0-9][0-9]_*.ipynb'))
NUMBER = {p.stem[3:]: int(p.stem[:2]) for p in NOTEBOOKS}
TREES = {name: ast.parse((ROOT / 'clipa_nb' / f'{name}.py').read_text()) for name in NUMBER if (ROOT / 'clipa_nb' / f'{name}.py').exists()}

CHAPTERS = ('core toyworld viz cost patch_embedding token_dropping tokenizer text_truncation transformer clip infonce data optimization trainer '
            'distributed_trainer zero_shot probes recipes pretrained cli').split()
FIGURES = dict.fromkeys(CHAPTERS, 1) | dict(toyworld=4, viz=4, cost=2, patch_embedding=2, token_dropping=2, tokenizer=2, text_truncation=4, transformer=2, clip=2, infonce=2, data=2,
                                            optimization=2, distributed_trainer=2, zero_shot=4, probes=4, recipes=2, pretrained=4)
WIDGETS = 'toyworld viz cost patch_embedding token_dropping tokenizer text_truncation transformer clip infonce data optimization zero_shot pretrained'.split()
DRAWING, LAZY = {'matplotlib', 'ipywidgets', 'IPython'}, {'recipes', 'cli'}

# -- imports ------------------------------------------------------------------------------------------------------------------

def imports(tree, top=False):
    "(module, names) of every import statement, our own as '.name'; `top` leaves out those inside functions."
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if top and id(n) in inside: continue
        if isinstance(n, ast.Import): yield from ((re.sub(r'^clipa_nb\.', '.', a.name), ()) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            module = '.' * n.level + (n.module or '')
            yield re.sub(r'^clipa_nb\b\.?', '.', module), tuple(a.name for a in n.names)

def own(name, top=False): return {m[1:] for m, _ in imports(TREES[name], top) if m.startswith('.')}

def dynamic(tree):
    "Modules named in calls of `need`, `import_module` and `__import__`."
    for n in ast.walk(tree):
        if not (isinstance(n, ast.Call) and n.args and isinstance(n.args[0], ast.Constant) and isinstance(n.args[0].value, str)): continue
        if (n.func.id if isinstance(n.func, ast.Name) else getattr(n.func, 'attr', '')) in ('need', 'import_module', '__import__'): yield n.args[0].value

def depth(name): return 1 + max((depth(m) for m in own(name, top=True) if m in TREES), default=0)

def test_every_chapter_and_its_module_exist():
    assert [p.stem for p in NOTEBOOKS] == [f'{i:02d}_{name}' for i, name in enumerate(CHAPTERS)]
    assert (ROOT / 'nbs/index.ipynb').exists()
    modules = {p.stem for p in (ROOT / 'clipa_nb').glob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(CHAPTERS), 'a module without a chapter, or a chapter that exports nothing'

def test_modules_come_from_their_notebooks():
    for name, tree in TREES.items():
        assert f'File to edit: ../nbs/{NUMBER[name]:02d}_{name}.ipynb' in (ROOT / 'clipa_nb' / f'{name}.py').read_text(), name
        assert ast.get_docstring(tree), f'{name} has no docstring: a chapter starts with a title and a blockquote'

@pytest.mark.parametrize('name', NUMBER)
def test_imports_only_lower_numbers_by_name(name):
    for module, names in imports(TREES[name]):
        assert '*' not in names, f'from {module} import *'
        if not module.startswith('.'): continue
        assert names and module[1:] in NUMBER, f'{module}: write from clipa_nb.<module> import <names>'
        assert NUMBER[module[1:]] < NUMBER[name], f'{name} ({NUMBER[name]}) imports {module[1:]} ({NUMBER[module[1:]]})'

def test_import_depth():
    deepest = max(TREES, key=depth)
    assert depth(deepest) <= 6, f'{deepest} has {depth(deepest)} layers below and including it'

def test_one_module_knows_of_processes():
    for name, tree in TREES.items():
        found = [m for m, names in imports(tree) if m.startswith('torch.distributed') or (m == 'torch' and 'distributed' in names)]
        found += [m for m in dynamic(tree) if m.startswith('torch.distributed')]
        found += [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == 'torch.distributed']
        assert not found or name == 'distributed_trainer', (name, found)
    assert any(m.startswith('torch.distributed') for m, _ in imports(TREES['distributed_trainer']))

def test_one_module_draws():
    for name, tree in TREES.items():
        found = [m for m, _ in imports(tree) if m.split('.')[0] in DRAWING]
        assert not found or name == 'viz', (name, found)
    assert any(m.split('.')[0] == 'matplotlib' for m in [*dynamic(TREES['viz']), *(m for m, _ in imports(TREES['viz']))])

def test_the_toy_world_is_one_data_source_among_others():
    users = {name for name in TREES if 'toyworld' in own(name)}
    assert users <= LAZY, users - LAZY
    for name in TREES: assert 'toyworld' not in own(name, top=True), f'{name} imports the toy world before it is asked for'

def test_viz_is_never_imported_at_the_top():
    for name in TREES: assert 'viz' not in own(name, top=True), name

BORROWED = dict.fromkeys(CHAPTERS, {'viz'}) | dict(infonce={'viz', 'distributed_trainer'}, trainer={'viz', 'distributed_trainer'}) # CONTRIBUTING.md, "The rooms"

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_cells_that_are_not_exported_borrow_from_a_short_list(path):
    "A chapter needs the chapters before it, and of later ones only what the list names; nobody else talks to process groups."
    for i, c in enumerate(read(path).cells):
        if c.cell_type != 'code' or 'export' in directives(c): continue
        for module, names in imports(ast.parse(re.sub(r'^[ ]*[%!].*', '', c.source, flags=re.M))):
            for m in names if module == '.' else [module[1:]] if module.startswith('.') else (): # `from clipa_nb.engine import viz` names whole modules
                assert NUMBER.get(m, 99) <= NUMBER[path.stem[3:]] or m in BORROWED[path.stem[3:]], f'cell {i} borrows {m}'
            assert not module.startswith('torch.distributed') or path.stem[3:] == 'distributed_trainer', f'cell {i} imports {module}'

SUFFIX = re.compile(r'[A-Za-z]+_(?P<letters>(?=[a-zA-Z]*[A-Z])[A-Za-z]{1,6}|[bnhwc]|hw|cd)\d*')

def suffixes(tree):
    "(name, letters) of every variable and parameter that carries its shape: one capital at least, or one of the small letters of the legend."
    for n in ast.walk(tree):
        name = n.id if isinstance(n, ast.Name) else n.arg if isinstance(n, ast.arg) else ''
        if (m := SUFFIX.fullmatch(name)) and not name.isupper() and not re.search('[a-z]{2}', re.sub("hw|cd", "", m["letters"])): yield name, m['letters']

def test_every_letter_of_a_suffix_is_in_the_legend():
    from clipa_nb.core import SHAPES
    found = [s for tree in TREES.values() for s in suffixes(tree)]
    unknown = sorted({name for name, letters in found if set(letters) - set(SHAPES)})
    assert not unknown, f'not in the legend of chapter 00: {unknown}'
    unused = set(SHAPES) - {letter for _, letters in found for letter in letters}
    assert not unused, f'in the legend, and in no name: {sorted(unused)}'

# -- notebooks ----------------------------------------------------------------------------------------------------------------

def read(path): return nbformat.read(path, 4)

def pictures(nb): return sum(any(k.startswith('image/') for k in o.get('data', {})) for c in nb.cells for o in c.get('outputs', []))

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_figures_and_widgets_are_there(path):
    nb, name = read(path), path.stem[3:]
    assert pictures(nb) >= FIGURES[name]
    calls = [c for c in nb.cells if c.cell_type == 'code' and re.search(r'\bwidget\(', c.source) and 'export' not in directives(c)]
    assert calls or name not in WIDGETS, 'no cell shows a widget'

@pytest.mark.parametrize('path', [*NOTEBOOKS, ROOT / 'nbs/index.ipynb'], ids=lambda p: p.stem)
def test_notebook_is_clean(path):
    nb = read(path)
    assert 'widgets' not in nb.metadata
    for i, c in enumerate(nb.cells):
        if c.cell_type != 'code': continue
        assert c.execution_count is None, f'cell {i} has an execution count'
        for o in c.outputs:
            assert o.get('execution_count') is None, f'an output of cell {i} has an execution count'
            assert 'application/vnd.jupyter.widget-view+json' not in o.get('data', {}), f'cell {i} holds a view of a widget, which no reader can open'
            assert o.output_type != 'error', f'cell {i} ended with an error'

# -- a chapter's form: prose, export, demo, assertion -------------------------------------------------------------------------

ASSERTS = re.compile(r'\b(test_(eq|ne|close|is|shuffled|stdout|warns|fail)|assert|torch\.testing\.assert_close|np\.testing\.)')

def directives(cell):
    "The words after `#|` in the first lines of a code cell."
    return [m[1] for line in cell.source.splitlines()[:5] if (m := re.match(r'\s*#\s*\|\s*(\S+)', line))]

def is_prose(cell):
    text = ' '.join(l for l in cell.source.splitlines() if not re.match(r'\s*#', l))
    return cell.cell_type == 'markdown' and len(text.split()) >= 6

def defined(cell): return [n.name for n in ast.parse(cell.source).body if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]

def quartets(nb):
    "(names, lines, prose before, demo after, assertion after) of every exported cell that defines something."
    cells = [c for c in nb.cells if c.source.strip()]
    exported = [c.cell_type == 'code' and bool({'export', 'exporti', 'exports'} & set(directives(c))) for c in cells]
    for i, c in enumerate(cells):
        if not exported[i] or not defined(c): continue
        stop = next((j for j in range(i + 1, len(cells)) if exported[j]), len(cells))
        after = [d for d in cells[i + 1:stop] if d.cell_type == 'code']
        lines = [l for l in c.source.splitlines() if l.strip() and not l.strip().startswith('#')]
        yield defined(c), len(lines), i > 0 and is_prose(cells[i - 1]), any('hide' not in directives(d) for d in after), any(ASSERTS.search(d.source) for d in after)

def longest_run(nb):
    "Most visible code cells in a row without prose between them."
    run = most = 0
    for c in nb.cells:
        if is_prose(c): run = 0
        elif c.cell_type == 'code' and c.source.strip() and 'hide' not in directives(c): run += 1
        most = max(most, run)
    return most

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_chapter_has_its_form(path):
    nb = read(path)
    first = nb.cells[0].source
    assert nb.cells[0].cell_type == 'markdown' and first.startswith('# ') and re.search(r'^> ', first, re.M), 'a chapter starts with a title and a blockquote'
    for names, lines, prose, demo, _ in quartets(nb):
        assert prose, f'{names}: no prose directly before'
        assert demo, f'{names}: no demo after'
        assert lines <= 35, f'{names}: {lines} lines, which is two ideas'
    assert longest_run(nb) <= 4
    for c in nb.cells:
        if c.cell_type != 'code' or re.search(r'^[%!]', c.source, re.M): continue
        loose = [n.lineno for n in ast.parse(c.source).body[:-1] if isinstance(n, ast.Expr) and isinstance(n.value, ast.Compare)]
        assert not loose, f'a comparison that nothing checks: {c.source.splitlines()[loose[0] - 1]}'

def test_exports_are_small_and_tested():
    rows = [q for p in NOTEBOOKS for q in quartets(read(p))]
    untested = [names for names, *_, tested in rows if not tested]
    assert len(untested) <= 0.1 * len(rows), untested
    assert statistics.median(lines for _, lines, *_ in rows) <= 10

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_solutions_are_folded(path):
    text = '\n'.join(c.source for c in read(path).cells if c.cell_type == 'markdown')
    exercises, _, rest = text[text.index('\n## Exercises'):].partition('<details>')
    solutions, end, _ = rest.partition('</details>')
    assert end and re.findall(r'^(\d)\. ', exercises, re.M) == re.findall(r'^(\d)\. ', solutions, re.M) == ['1', '2', '3'], 'three exercises, and a folded solution of each'

# -- the project speaks of itself alone ---------------------------------------------------------------------------------------

PLACES = re.compile(r'(?<![\w./-])/(?:work|home|root|Users|mnt)/\w|/tmp/tmp\w|/var/fold[e]rs/|/ipykernel_\d+|\bpypi\.org|\bpythonhosted\b')

def test_no_place_of_a_machine_is_written_down():
    files = [*(ROOT / 'nbs').glob('*.ipynb'), *(ROOT / 'clipa_nb').glob('*.py'), *(ROOT / 'tests').glob('*.py'), *ROOT.glob('*.md'), *(ROOT / 'nbs/results').glob('*.jsonl')]
    found = {}
    for p in files:
        text = p.read_text()
        if p.suffix == '.ipynb':
            cells = json.loads(text)['cells']
            text = '\n'.join(''.join(c['source']) + ''.join(t for o in c.get('outputs', []) for t in [*o.get('text', []), *o.get('data', {}).get('text/plain', [])]) for c in cells)
        if m := PLACES.search(text): found[p.name] = text[max(0, m.start() - 30):m.end() + 30]
    assert not found, found

if __name__ == '__main__': # what `.ci/run` prints
    print('chapter                  exports  demo  assertion  longest  median  run  figures')
    for p in NOTEBOOKS:
        nb = read(p); rows = list(quartets(nb)) or [((), 0, True, True, True)]
        share = lambda i: f'{100 * sum(r[i] for r in rows) / len(rows):.0f} %'
        print(f'{p.stem:24s} {len(rows):7d} {share(3):>5s} {share(4):>10s} {max(r[1] for r in rows):8d} {statistics.median(r[1] for r in rows):7g} {longest_run(nb):4d} {pictures(nb):8d}')
