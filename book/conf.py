"Settings of the book: `make book` builds it from the notebooks as they lie there, outputs and all"

import sys
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import notebooks

settings = ConfigParser(delimiters=["="])
settings.read(HERE.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project = settings["title"]
author = settings["author"]
copyright = settings["copyright"]
release = settings["version"]

extensions = [
    "myst_nb",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
    "notebooks",
]

# The folder of sources is the repository, so that every link leads where it leads there
root_doc = "book/contents"
include_patterns = [
    "nbs/**.ipynb",
    "book/*.md",
    "recipes/README.md",
    "results/README.md",
    "CONTRIBUTING.md",
]
exclude_patterns = ["**/.*", "**/_*"]

nb_execution_mode = "off"
nb_render_markdown_format = "myst"
myst_enable_extensions = ["dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 4
myst_heading_slug_func = "notebooks.slug"

numfig = True
numfig_format = {"figure": "Figure %s."}
bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
copybutton_selector = "div:not(.output) > div.highlight pre"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["custom.css"]
html_css_files = ["custom.css"]
html_extra_path = ["index.html"]
html_theme_options = {
    "logo": {"text": project, "link": "nbs/index"},
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    **notebooks.buttons(settings),
}
html_context = {"default_mode": "auto"}  # light or dark, as the system is
html_copy_source = "repository_url" in html_theme_options  # what the download button gives
html_use_index = False  # book/names is the index
html_show_search_summary = False  # a page of the disk may not be read by another one

# MathJax in one file, which draws formulas as pictures and needs no font
package = Path(find_spec("sphinx-mathjax-offline").origin).parent
html_static_path.append(str(package / "static" / "mathjax" / "tex-svg-full.js"))
mathjax_path = "tex-svg-full.js"
