#!/usr/bin/env python
"""Make README.md from nbs/index.ipynb with nbconvert (no Quarto needed); --check fails where the two differ."""
import re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
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
        if any(d.replace(' ', '') == 'echo:false' for d in directives): cell.metadata['transient'] = {'remove_source': True}
        cells.append(cell)
    nb.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(nb, {'output_files_dir': str(FIGURES), 'unique_key': 'index'})
    text = re.sub(r'\]\(((?:\w+/)*\w+\.ipynb)\)', r'](nbs/\1)', text).replace('![png]', '![what a pair costs, and the method in miniature]')
    text = re.sub(r'\n\s*\n\s*\n', '\n\n', text).strip() + '\n'
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
