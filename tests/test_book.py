"The book: it is built from the notebooks as they are, and read from the disk without a network"

import os
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from playwright.sync_api import sync_playwright

from test_report import BROWSER
from test_runs import ROOT

sys.path.insert(0, str(ROOT / "book"))
import notebooks

NOTEBOOKS = [
    path.relative_to(ROOT).with_suffix(".html")
    for path in ROOT.glob("nbs/**/*.ipynb")
    if not path.name.startswith((".", "_"))
]
KEYS = {"2108.02982": "zhu2021"}


class Page(HTMLParser):
    "Links, anchors, pictures and code of a page"

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.anchors, self.pictures = [], [], {""}, []
        self.figures = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        about = dict(attrs)
        self.anchors |= {about.get("id", ""), about.get("name", "")}
        self.figures += tag == "figure"
        if tag == "a" and "href" in about:
            self.links.append(about["href"])
        if tag in ("script", "img", "iframe") and "src" in about:
            self.loaded.append(about["src"])
        if tag == "link" and about.get("rel") in ("stylesheet", "preload", "icon"):
            self.loaded.append(about["href"])
        if tag == "img" and "/_static/" not in about["src"]:  # a logo is no figure
            self.pictures.append(about)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    "The folder that `make book` leaves"
    out = tmp_path_factory.mktemp("book") / "_book"
    (out / "nbs" / "figures").mkdir(parents=True)
    for name in ("nbs/gone.html", "nbs/figures/gone.html", "own.txt", "nbs/own.txt"):
        (out / name).write_text("of an earlier build, or somebody's own")
    tools = os.path.dirname(sys.executable)
    command = ["make", "-s", "-o", ".venv/ready", "book", f"BOOK={out}", f"BIN={tools}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return out


@pytest.fixture(scope="module")
def pages(book):
    "Every page by its path"
    return {path: Page(path) for path in book.rglob("*.html") if "_static" not in path.parts}


@pytest.fixture(scope="module")
def browser():
    "Headless Chromium"
    if not BROWSER:
        pytest.skip("no Chromium here: install the package chromium")
    with sync_playwright() as p:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=BROWSER, args=options)
        yield browser
        browser.close()


@pytest.fixture
def page(browser):
    "A page without a network; fails if an error was logged, or anything but files asked for"
    errors, asked = [], []
    page = browser.new_context(offline=True, color_scheme="light").new_page()
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: asked.append(r.url))
    yield page
    page.context.close()
    assert not errors, errors
    assert asked and all(url.startswith(("file:", "data:")) for url in asked)


def opened(page, path, width):
    "A page of the book, with its formulas drawn"
    page.set_viewport_size({"width": width, "height": 900})
    page.goto(f"file://{path}")
    page.evaluate("window.MathJax && MathJax.startup.promise.then(() => true)")


def test_every_notebook_is_a_page_without_directives_and_hidden_cells(book):
    for name in NOTEBOOKS:
        text = (book / name).read_text(encoding="utf-8")
        assert "#|" not in text and "nbdev_export" not in text.replace("nbdev_export</code>", "")
        assert "skip_exec" not in text and ">default_exp" not in text


def test_pages_whose_notebook_is_gone_go_and_nothing_else(book):
    assert not list(book.rglob("gone.html"))
    assert (book / "own.txt").is_file() and (book / "nbs" / "own.txt").is_file()


def test_every_link_leads_to_a_file_and_an_anchor(pages):
    count = 0
    for path, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            if parts.scheme in ("http", "https", "mailto", "data"):
                assert link in page.links, f"{path.name} loads {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name}: {link}"
            if target in pages and "=" not in parts.query:
                assert unquote(parts.fragment) in pages[target].anchors, f"{path.name}: {link}"
            count += 1
    assert count > 5000


def test_the_first_page_leads_to_the_index(page, book):
    page.goto(f"file://{book / 'index.html'}")
    page.wait_for_url("**/nbs/index.html")
    assert page.locator("article h1").inner_text().startswith("ftcl")


def test_every_picture_is_a_figure_with_words_in_place_of_it(pages, book):
    for path, page in pages.items():
        assert all(picture.get("alt", "").strip() for picture in page.pictures), path
        assert len(page.pictures) == page.figures, path
    text = (book / "nbs" / "figures" / "momentum.html").read_text(encoding="utf-8")
    assert text.count('class="caption-number">Figure ') == text.count("save_figure</span>") - 1 > 1


def test_the_caption_is_the_title_or_what_the_index_says_or_the_heading():
    def caption(source, known, heading="Seeds", prose=""):
        return notebooks.figure(source, "How much?", heading, known, prose)["figure"]["caption"]

    saved = 'save_figure(fig, "a-b")'
    assert caption("plt.plot()", {}) == "Seeds"
    assert caption(saved, {}) == "How much? Seeds."
    assert caption(saved, {}, "The picture") == "How much?"
    axes = 'ax.set(xlabel="step", ylabel="$S$")'
    assert caption(axes, {}) == "Seeds. Drawn: $S$, against step."
    assert caption(axes, {}, "The picture") == "How much? Drawn: $S$, against step."
    told = "## Two pictures\n\nThree runs. The picture has [all](a.ipynb) of them. **Left**: one."
    assert caption(axes, {}, "Why?", told) == "Why? The picture has all of them."
    assert caption('ax.set(ylabel="loss (nats)")', {}) == "Seeds. Drawn: loss (nats)."
    assert caption('ax.set(xlabel="step")', {}) == "Seeds"
    assert caption(saved, {"a-b": "Known"}) == "Known"
    assert caption(f'fig.suptitle("Own")\n{saved}', {"a-b": "Known"}) == "Own"
    assert caption('title = "One\\nline"\n%matplotlib inline', {}) == "One line"
    assert caption('title = "Of {} runs"\nax.set_title("a part")', {}) == "Seeds"
    about = notebooks.figure('ax.set(xlabel="step")\nax.set_ylabel("$S$")', "", "`k`", {})
    assert about["image"]["alt"] == "k. Drawn: S, against step."
    own = notebooks.figure('title = "Own"\nax.set(xlabel="step")', "", "`k`", {})
    assert own["image"]["alt"] == "Own (axes: step)"


def test_papers_are_cited_and_listed(pages, book):
    listed = pages[book / "book" / "references.html"].links
    keys = notebooks.cite_keys()
    assert keys.items() >= KEYS.items()
    assert {f"https://arxiv.org/abs/{number}" for number in keys} <= set(listed)
    text = (book / "nbs" / "03_transform.html").read_text(encoding="utf-8")
    assert "book/references.html#id" in text and "Zhu <em>et al.</em>, 2021" in text


def test_a_paper_that_is_not_in_the_list_is_named():
    text = "(arXiv 2108.02982) [a](https://arxiv.org/abs/1234.56789)"
    assert notebooks.unknown_papers(text, KEYS) == ["1234.56789"]
    assert notebooks.markdown(text, KEYS).startswith("(arXiv 2108.02982 {cite:p}`zhu2021`) [a](h")
    assert notebooks.markdown("`arXiv 2108.02982`", KEYS) == "`arXiv 2108.02982`"


def test_a_comment_is_for_tools_and_not_for_readers():
    text = "> one line\n\n<!-- nbdev:\n- skip_exec: true\n-->\n\n`<!-- kept -->` Words."
    assert notebooks.markdown(text, {}) == "> one line\n\n\n`<!-- kept -->` Words."


def test_links_to_a_repository_need_one():
    settings = {"user": "", "repo": "ftcl", "branch": "main"}
    assert "repository_url" not in notebooks.buttons(settings)
    links = notebooks.buttons(settings | {"user": "somebody"})
    assert links["repository_url"].endswith("/somebody/ftcl") and links["launch_buttons"]


def test_search_from_the_disk(page, book):
    opened(page, book / "nbs" / "index.html", 1400)
    page.locator(".bd-sidebar-primary .search-button-field").click()
    page.locator("dialog input[type=search]").fill("extrapolation")
    page.keyboard.press("Enter")
    for title in ("03 Feature transformation", "Positive extrapolation"):
        page.locator("ul.search li a", has_text=title).first.wait_for()


def test_formulas_are_drawn(page, book):
    opened(page, book / "nbs" / "03_transform.html", 1400)
    formulas = page.locator("mjx-container")
    assert formulas.count() == page.locator(".math").count() > 100
    sizes = formulas.evaluate_all("all => all.map(o => o.getBoundingClientRect().height)")
    assert min(sizes) > 4
    assert page.locator("[data-mjx-error], mjx-merror").count() == 0


def test_dark_and_light(page, book):
    opened(page, book / "nbs" / "03_transform.html", 1400)
    for mode, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)")):
        page.locator(".theme-switch-button").click()
        page.locator(f".theme-change-button[data-mode={mode}]").click()
        assert page.get_attribute("html", "data-theme") == mode
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour


def test_a_line_of_100_characters_fits(page, book):
    opened(page, book / "nbs" / "03_transform.html", 1400)
    code = page.locator(".cell_input pre")
    assert code.count() > 20
    over = "all => all.map(pre => pre.scrollWidth - pre.clientWidth)"
    assert max(code.evaluate_all(over)) <= 0
    code.first.evaluate("pre => { pre.textContent = '0'.repeat(100); }")
    assert code.first.evaluate("pre => pre.scrollWidth - pre.clientWidth") <= 0
    code.first.evaluate("pre => { pre.textContent = '0'.repeat(140); }")
    assert code.first.evaluate("pre => pre.scrollWidth - pre.clientWidth") > 0


@pytest.mark.parametrize(
    "name",
    ["nbs/index", "nbs/03_transform", "nbs/ablation", "nbs/figures/claims", "book/names"],
)
def test_a_telephone_scrolls_down_only(page, book, name):
    opened(page, book / f"{name}.html", 390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    title = page.locator("article h1").bounding_box()
    assert title["x"] >= 0 and title["x"] + title["width"] <= 390


def test_the_code_of_a_figure_opens_by_a_click(page, book):
    opened(page, book / "nbs" / "figures" / "claims.html", 1400)
    code = page.locator(".cell_input pre")
    assert code.count() > 10 and not code.first.is_visible()
    assert page.locator(".cell_output table").first.is_visible()
    assert page.locator("article figure img").first.is_visible()
    page.locator("details.hide summary").first.click()
    assert code.first.is_visible()


def test_code_can_be_copied(page, book):
    opened(page, book / "nbs" / "03_transform.html", 1400)
    page.wait_for_selector("button.copybtn", state="attached")
    inputs = page.locator(".cell_input button.copybtn").count()
    assert inputs == page.locator(".cell_input pre").count()
    assert page.locator(".cell_output button.copybtn").count() == 0
