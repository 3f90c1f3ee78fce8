#!/usr/bin/env python
"""Make README.md from nbs/index.ipynb with nbconvert (no Quarto needed); --check fails where the two differ."""
import re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import TagRemovePreprocessor
import nbformat

ROOT = Path(__file__).resolve().parent.parent
FIGURES = Path('nbs/images')

def make() -> tuple:
    "The README's text, and its figures by name."
    nb = nbformat.read(ROOT / 'nbs' / 'index.ipynb', 4)
    cells = []
    for cell in nb.cells:
        directives = re.findall(r'^#\|\s*(.*)$', cell.source, re.M) if cell.cell_type == 'code' else []
        if 'hide' in directives: continue
        if any(d.replace(' ', '') == 'echo:false' for d in directives): cell.source = ''
        cells.append(cell)
    nb.cells = [c for c in cells if c.source or c.get('outputs')]
    text, resources = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': str(FIGURES), 'unique_key': 'index'})
    text = re.sub(r'```python\s*```\n', '', text)
    text = re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'
    return '<!-- generated from nbs/index.ipynb by .ci/readme.py; edit the notebook -->\n\n' + text, resources.get('outputs', {})

if __name__ == '__main__':
    text, figures = make()
    files = {ROOT / 'README.md': text.encode(), **{ROOT / name: data for name, data in figures.items()}}
    stale = [p for p, data in files.items() if not p.exists() or p.read_bytes() != data]
    if '--check' in sys.argv:
        if stale: sys.exit(f"stale: {', '.join(str(p.relative_to(ROOT)) for p in stale)}; run .ci/readme.py")
    else:
        for p, data in files.items(): p.parent.mkdir(parents=True, exist_ok=True); p.write_bytes(data)
        print(f"wrote {', '.join(str(p.relative_to(ROOT)) for p in files)}")
