"""Sphinx's settings for the web page of the book: README.md in front, then every notebook in the order of nbs/index.ipynb.

Sphinx with myst-nb shows the stored outputs (nothing is run), and checks every link between pages.
"""
import json
import re

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

project = 'exp2nb'
author = 'exp2nb authors'
extensions = ['myst_nb']
root_doc = 'README'
include_patterns = ['README.md', 'CONTRIBUTING.md', 'CHANGELOG.md', 'records/**/*.md', 'nbs/*.ipynb', 'nbs/*/*.ipynb']
exclude_patterns = ['**/.ipynb_checkpoints']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath']
# A page that begins with a smaller heading, a JSON or shell example that is not quite one, and a picture's second format are no faults.
suppress_warnings = ['myst.header', 'misc.highlighting_failure', 'mystnb.unknown_mime_type']

html_math_renderer = 'mathml'   # every current browser draws it without a script, offline too
html_theme = 'sphinx_book_theme'
html_title = 'exp2nb'
html_copy_source = False
html_static_path = ['style']
html_css_files = ['book.css']
html_sidebars = {'**': ['navbar-logo.html', 'sbt-sidebar-nav.html']}   # one search field, the page's, is enough
html_show_sphinx = False
html_theme_options = dict(show_navbar_depth=1, show_toc_level=2, use_download_button=False)
ROOMS = dict(fast='Speed', bases='Other models', sandbox='Sandbox', tools='Tools', appendix='Appendix')


def toctree(caption, paths):
    "A section of the sidebar."
    rows = [f'{p.removesuffix("/README").rpartition("/")[2].replace("_", " ")} <{p}>' for p in paths]
    return '\n'.join(['```{toctree}', f':caption: {caption}', ':hidden:', '', *rows, '```', ''])


def sections():
    "The sidebar: what nbs/index.ipynb links to, in its order."
    index = json.load(open('nbs/index.ipynb', encoding='utf-8'))
    text = ''.join(line for cell in index['cells'] if cell['cell_type'] == 'markdown' for line in cell['source'])
    linked = list(dict.fromkeys(re.findall(r'\]\(([\w/]+)\.ipynb\)', text)))
    book = sorted(p for p in linked if p[0].isdigit()) + [p for p in linked if '/' not in p and not p[0].isdigit()]
    yield toctree('The book', ['/nbs/index', *(f'/nbs/{p}' for p in book)])
    for room, caption in ROOMS.items():
        yield toctree(caption, [f'/nbs/{p}' for p in linked if p.startswith(f'{room}/')])
    records = ('embedded/README', 'embedded/PLAN', 'embedded/study/README', 'embedded/first/README', 'smollm2-gsm8k/PLAN', 'bench/README')
    yield toctree('Records', [f'/records/{name}' for name in records])
    yield toctree('Project', ['/CONTRIBUTING', '/CHANGELOG'])


def page(nb):
    "A notebook as a reader of the page wants it: nbdev's directives gone, and with them the cells that hold only imports for the tests."
    kept = []
    for cell in nb['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'code':
            marks = {m.split(':')[0].strip() for m in re.findall(r'^#\s*\|\s*(.+)$', source, re.M)}
            source = re.sub(r'^#\s*\|.*\n?', '', source, flags=re.M)
            if any(m.startswith('default_exp') for m in marks) or not source.strip() or 'nbdev_export()' in source:
                continue
            if 'hide' in marks and not cell['outputs']:
                continue
            if marks & {'echo', 'hide'}:
                cell['metadata'].setdefault('tags', []).append('remove-input')
        kept.append(dict(cell, source=source))
    return dict(nb, cells=kept)


def read(app, name, source):
    "What Sphinx is given in place of a file's own text."
    if name == root_doc:
        source[0] += '\n\n' + '\n'.join(sections())
    elif name.startswith('nbs/'):
        source[0] = json.dumps(page(json.loads(source[0])))


def inline(self, node):
    "A formula in a line of text."
    self.body.append(convert(node.astext()))
    raise SkipNode


def display(self, node):
    "A formula on a line of its own."
    self.body.append(f'<div class="formula">{convert(node.astext(), display="block")}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', (inline, None), (display, None))
    app.connect('source-read', read)
