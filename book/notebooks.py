"Notebooks as the book shows them: changed while Sphinx reads them, never on the disk"

import ast
import json
import re
from pathlib import Path

from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(^```.*?^```|`+[^`]+`+)", re.MULTILINE | re.DOTALL)
TEMPLATE = re.compile(r"\{[:}]")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
PICTURE = re.compile(r"^!\[(.+)\]\((\S+)\)$|^(<img [^>]+>)$", re.MULTILINE)
PARAGRAPH = re.compile(r"^<p[^>]*>\n((?:<img [^>]+>\n)+)</p>$", re.MULTILINE)
ATTRIBUTE = re.compile(r"(\w+)=\"([^\"]*)\"")
COMMENT = re.compile(r"<!--.*?-->\n?", re.DOTALL)
LINK = re.compile(r"\[([^\]]+)\]\([^)]*\)")
SENTENCE = re.compile(r"(?<=[.!?])\s+")
OF_PICTURE = re.compile(r"(The|This|One)( \w+)? picture\b")
SAVED = re.compile(r"save_figure\(\w+, \"([\w-]+)\"\)")
PAPER = re.compile(r"\[[^\]]*\]\(https://arxiv\.org/abs/([\d.]+)\)|\barXiv (\d{4}\.\d{5})\b")
FRAGMENT = re.compile(r"(?<=\]\()([^)\s]*\.ipynb)?(#[^)\s]+)(?=\))")
TAGS = {"hide": "remove-cell", "echo: false": "remove-input", "code-fold: true": "hide-input"}


def slug(heading):
    "The anchor of a heading: small letters, digits and hyphens"
    return re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-")


def buttons(settings):
    "Links to the repository and to Colab, where `settings.ini` names a user and a repository"
    user, repo = settings.get("user", ""), settings.get("repo", "")
    if not (user and repo):
        return {"use_download_button": False}
    return {
        "repository_url": f"https://github.com/{user}/{repo}",
        "repository_branch": settings["branch"],
        "use_repository_button": True,
        "launch_buttons": {"colab_url": "https://colab.research.google.com"},
    }


def cite_keys():
    "Of each arXiv number the key in `references.bib`"
    text = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    entries = re.findall(r"^@\w+\{(\S+),.*?eprint = \{(\S+)\}", text, re.MULTILINE | re.DOTALL)
    return {number: key for key, number in entries}


def known_captions():
    "Of each picture of `figures/` what the index says below it"
    notebook, _ = read_notebook((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))
    text = "\n".join(cell["source"] for cell in notebook["cells"])
    pictures = map(picture, PICTURE.finditer(text))
    return {Path(about["src"]).stem: about["alt"] for about in pictures}


def picture(match):
    "File, alternative text and width of a picture in Markdown or HTML"
    if match[3]:
        return dict(ATTRIBUTE.findall(match[3]))
    return {"src": match[2], "alt": match[1]}


def numbered(match):
    "A picture in Markdown or HTML as a figure"
    about = picture(match)
    lines = [f"```{{figure}} {about['src']}", f":alt: {about['alt']}"]
    if "width" in about:
        lines += [f":figwidth: {about['width']}", ":figclass: beside"]
    return "\n".join([*lines, "", about["alt"], "```"])


def unknown_papers(text, keys):
    "arXiv numbers that a notebook names, and `references.bib` does not"
    numbers = [first or second for first, second in PAPER.findall(text)]
    return sorted(set(numbers) - set(keys))


def markdown(text, keys):
    "Markdown with citations and numbered pictures"

    def cite(match):
        key = keys.get(match[1] or match[2])
        return f"{match[0]} {{cite:p}}`{key}`" if key else match[0]

    parts = CODE.split(text)
    for i in range(0, len(parts), 2):  # what lies between stretches of code
        parts[i] = COMMENT.sub("", parts[i])
        parts[i] = PAPER.sub(cite, parts[i])
        parts[i] = FRAGMENT.sub(lambda m: f"{m[1] or ''}{m[2].lower()}", parts[i])
        parts[i] = PICTURE.sub(numbered, PARAGRAPH.sub(r"\1", parts[i]))
    return "".join(parts)


def parsed(source):
    "A cell's code without its magic; nothing of what is no Python"
    lines = [line for line in source.splitlines() if not line.startswith(("%", "!"))]
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def set_to(source, names):
    "Strings that a cell sets as one of these: `ax.set(title=...)`, `ax.set_title(...)`"
    found = []
    for node in ast.walk(parsed(source)):
        method = getattr(getattr(node, "func", None), "attr", "")
        if method == "set":
            found += [word.value for word in node.keywords if word.arg in names]
        elif method.removeprefix("set_") in names:
            found += node.args[:1]
    return words(found)


def words(values):
    "Of pieces of code those that are plain strings, each once, on one line"
    texts = [value.value for value in values if isinstance(value, ast.Constant)]
    texts = [text for text in texts if isinstance(text, str) and not TEMPLATE.search(text)]
    return [text.replace("\n", " ") for text in dict.fromkeys(texts) if text]


def own_titles(source):
    "What a cell sets as the title of a whole picture, or calls `title`"
    called = [
        node.value
        for node in ast.walk(parsed(source))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "title"
    ]
    return set_to(source, ["suptitle"]) + words(called)


def joined(*sentences):
    "Sentences as one text, each with an end of its own"
    return " ".join(s if s[-1] in ".?!" else f"{s}." for s in sentences if s)


def told_of_picture(prose):
    "The first sentence of a cell of Markdown that says what the picture below it shows"
    for sentence in SENTENCE.split(LINK.sub(r"\1", BLOCK.sub("", prose))):
        if OF_PICTURE.match(sentence):
            return sentence.replace("**", "")
    return ""


def told_by_axes(source):
    "What a picture draws against what, as its axes say"
    upright, across = (", ".join(set_to(source, [name])) for name in ("ylabel", "xlabel"))
    if not upright:
        return across if " " in across else ""  # "step" alone says nothing
    return f"{upright}, against {across}" if across else upright


def figure(source, title, heading, captions, prose=""):
    "What stands below a picture that a cell draws, and what stands for it where nobody sees it"
    own = own_titles(source)
    saved = SAVED.search(source)
    axes = set_to(source, ["xlabel", "ylabel"])
    if own:
        caption = own[0]
    elif saved and saved[1] in captions:
        caption = captions[saved[1]]
    else:  # "The picture" says nothing, and neither does the title of a chapter below its own
        names = [title, heading] if saved and heading != title else [heading]
        names = [name for name in names if name != "The picture"] or [title]
        axes_say = told_by_axes(source)
        more = told_of_picture(prose) or (axes_say and f"Drawn: {axes_say}")
        caption = joined(*names, more) if more or len(names) > 1 else names[0]
    unsaid = axes and "Drawn: " not in caption
    alt = caption + (f" (axes: {', '.join(axes)})" if unsaid else "")
    return {"figure": {"caption": caption}, "image": {"alt": re.sub("[`$]", "", alt)}}


def is_picture(output):
    "Whether an output has an image"
    return any(mime.startswith("image/") for mime in output.get("data", {}))


def shown(cell):
    "A code cell without nbdev's lines; hidden, if they say so or nothing is left"
    lines = cell["source"].splitlines()
    directives = [line[2:].strip() for line in lines if line.startswith("#|")]
    source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
    tags = [TAGS[directive] for directive in directives if directive in TAGS]
    if not source:
        tags.append("remove-cell")
    metadata = cell["metadata"] | {"tags": cell["metadata"].get("tags", []) + tags}
    return cell | {"source": source, "metadata": metadata}


def folded(docname):
    "Tags of a page's code: the index shows none, a page of figures only after a click"
    if docname == "nbs/index":
        return ["remove-input"]
    return ["hide-input"] if docname.startswith("nbs/figures/") else []


def with_figures(cell, about):
    "A code cell; if it draws, with its outputs as cells of their own: a table is no figure"
    if not any(map(is_picture, cell["outputs"])):
        return [cell]
    cells = [cell | {"outputs": []}]
    for n, output in enumerate(cell["outputs"]):
        tags = [tag for tag in cell["metadata"]["tags"] if tag != "hide-input"] + ["remove-input"]
        metadata = {"tags": tags} | ({"mystnb": about} if is_picture(output) else {})
        id = f"{cell['id']}-{n}"
        cells.append(cell | {"id": id, "metadata": metadata, "outputs": [output]})
    return cells


def public_names(cell):
    "Functions and classes that a cell exports, each with the first line of its docstring"
    if not cell["source"].startswith("#| export"):
        return {}
    kinds = (ast.FunctionDef, ast.ClassDef)
    defined = [node for node in parsed(cell["source"]).body if isinstance(node, kinds)]
    return {
        node.name: (ast.get_docstring(node) or "").partition("\n")[0]
        for node in defined
        if not node.name.startswith("_")
    }


def anchor(module, name):
    "Of a name; Sphinx knows no capitals, so a class says that it is one"
    return f"{module}.class.{name}" if name[0].isupper() else f"{module}.{name}"


def read_notebook(text):
    "Its cells, each source as one string, and the module that it exports"
    notebook = json.loads(text)
    for n, cell in enumerate(notebook["cells"]):
        cell["id"] = f"cell-{n}"
        cell["source"] = "".join(cell["source"])
    sources = "\n".join(cell["source"] for cell in notebook["cells"])
    module = re.search(r"^#\| default_exp (\S+)$", sources, re.MULTILINE)
    return notebook, module and f"ftcl.{module[1]}"


def as_page(docname, text):
    "A notebook as the book shows it"
    notebook, module = read_notebook(text)
    keys, captions = cite_keys(), known_captions()
    title = heading = ""
    prose = ""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            prose = cell["source"]
            for heading in HEADING.findall(BLOCK.sub("", cell["source"])):
                title = title or heading
            cells.append(cell | {"source": markdown(cell["source"], keys)})
        elif cell["cell_type"] == "code":
            about = figure(cell["source"], title, heading, captions, prose)
            anchors = [f"({anchor(module, name)})=" for name in public_names(cell)]
            if anchors:
                cells.append(markdown_cell(f"{cell['id']}-names", anchors))
            tags = cell["metadata"].get("tags", []) + folded(docname)
            cell["metadata"] = cell["metadata"] | {"tags": tags}
            cells += with_figures(shown(cell), about)
    chapter = re.match(r"nbs/(\d+[a-z]?)_", docname)
    if chapter:
        cells[0]["source"] = cells[0]["source"].replace("# ", f"# {chapter[1]} ", 1)
    return json.dumps(notebook | {"cells": cells})


def markdown_cell(id, lines):
    "A cell of Markdown"
    return {"id": id, "cell_type": "markdown", "metadata": {}, "source": "\n".join(lines)}


def name_tables():
    "Every public name by module, each a link to the cell that defines it"
    text = []
    for path in sorted(ROOT.glob("nbs/[0-9]*.ipynb")) + sorted(ROOT.glob("nbs/methods/*.ipynb")):
        notebook, module = read_notebook(path.read_text(encoding="utf-8"))
        found = {}
        for cell in notebook["cells"]:
            found |= public_names(cell)
        if found:
            text += ["", f"## {module}", "", "| name | |", "| --- | --- |"]
        for name, told in found.items():
            told = told.replace("|", r"\|")
            text.append(f"| [`{name}`](#{anchor(module, name)}) | {told} |")
    return "\n".join(text)


def on_source_read(app, docname, content):
    "Change a source before it is parsed"
    if docname.startswith("nbs/"):
        for number in unknown_papers(content[0], cite_keys()):
            told = "arXiv %s is not in book/references.bib: enter it there"
            LOGGER.warning(told, number, location=docname)
        content[0] = as_page(docname, content[0])
    if docname == "book/names":
        content[0] += name_tables()


def keep_pictures_apart(app):
    "Pictures of outputs go to the folder of doctrees, instead of one beside the book"
    folder = str(Path(app.doctreedir) / "outputs")
    app.env.mystnb_config = app.env.mystnb_config.copy(output_folder=folder)


def remove_pages_without_source(app, error):
    "Remove what an earlier build wrote of sources that are gone, and nothing else"
    if error or app.builder.format != "html":
        return
    known = {Path(app.builder.get_outfilename(name)) for name in app.env.found_docs}
    for folder in {Path(name).parts[0] for name in app.env.found_docs if "/" in name}:
        for page in (Path(app.outdir) / folder).rglob("*.html"):
            if page not in known:
                page.unlink()


def setup(app):
    "Enter all of this into Sphinx"
    app.connect("source-read", on_source_read)
    app.connect("builder-inited", keep_pictures_apart, priority=900)
    app.connect("build-finished", remove_pages_without_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
