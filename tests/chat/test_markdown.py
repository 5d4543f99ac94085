"""What models write becomes elements, and never anything else: the page's renderer, in the browser it is for."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

Run = Callable[[str, Sequence[str]], Any]

PLAIN = "p br h1 h2 h3 h4 h5 h6 ul ol li input blockquote hr em strong del a code pre figure figcaption span button"
OTHERS = "svg path div table thead tbody tr th td"
MATHS = (
    "math mrow mi mn mo mtext mspace mstyle mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd "
    "mphantom"
)
ELEMENTS = {*PLAIN.split(), *OTHERS.split(), *MATHS.split()}
LINK_ATTRIBUTES = {"href", "target", "rel"}
SAFE = re.compile(r"^(https?:|mailto:)")
MODULE = "const {MarkdownView, parse, render} = await import('/js/markdown.js');"
HTML = MODULE + "return texts.map((text) => parse(text).map((block) => render(block).outerHTML).join(''));"
SURVEY = (
    MODULE
    + """return texts.map((text) => {
    const root = document.createElement('div');
    new MarkdownView(root).update(text);
    const attributes = (e) => Object.fromEntries([...e.attributes].map((a) => [a.name, a.value]));
    return [...root.querySelectorAll('*')].map((e) => [e.localName, attributes(e)]);
});"""
)
GROWTH = (
    MODULE
    + """return texts.map((text) => {
    const whole = document.createElement('div'), grown = document.createElement('div');
    new MarkdownView(whole).update(text);
    const view = new MarkdownView(grown);
    for (let end = 0; end <= text.length; end++) view.update(text.slice(0, end));
    return whole.innerHTML === grown.innerHTML;
});"""
)


@pytest.fixture(scope="module")
def run(browser: Any, running_server: Any) -> Run:
    """Runs a module's code on texts, in the page."""
    browser.get(f"{running_server.url}/icon.svg")
    browser.get(f"{running_server.url}/")

    def call(code: str, texts: Sequence[str]) -> Any:
        script = f"const [texts, done] = arguments; (async () => {{{code}}})().then(done, (e) => done(String(e.stack)))"
        return browser.execute_async_script(script, list(texts))

    return call


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# One ##\n## Two", "<h1>One</h1><h2>Two</h2>"),
        ("a\nb  \nc", "<p>a<br>b<br>c</p>"),
        ("**b** *i* _i_ ~~s~~", "<p><strong>b</strong> <em>i</em> <em>i</em> <del>s</del></p>"),
        ("***b** i*", "<p><em><strong>b</strong> i</em></p>"),
        ("2 * 3 * 4, snake_case_name, a ~ b", "<p>2 * 3 * 4, snake_case_name, a ~ b</p>"),
        ("`a*b*` ``c`d`` `e", "<p><code>a*b*</code> <code>c`d</code> `e</p>"),
        (r"\*a\* &lt; &amp;", "<p>*a* &lt; &amp;</p>"),
        ("- a\n- b\n  - c\n\n* d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ul><li>d</li></ul>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
        ("text\n- a\n- b", "<p>text</p><ul><li>a</li><li>b</li></ul>"),
        ("in the year\n1984. It was", "<p>in the year<br>1984. It was</p>"),
        ("- [x] a\n- [ ] b", '<ul><li class="task"><input type="checkbox" disabled="" checked="">a</li>'
                             '<li class="task"><input type="checkbox" disabled="">b</li></ul>'),
        ("> a\n> > b\n\nc", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><p>c</p>"),
        ("a\n---\nb", "<p>a</p><hr><p>b</p>"),
        ("<b>no</b><br>x", "<p>&lt;b&gt;no&lt;/b&gt;<br>x</p>"),
        ("It costs $5, and $10 with it", "<p>It costs $5, and $10 with it</p>"),
    ],
)  # fmt: skip
def test_markdown(text: str, expected: str, run: Run) -> None:
    assert run(HTML, [text]) == [expected]


LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[a *b*](https://x.org/c_(d) 'title')", LINK.format("https://x.org/c_(d)", "a <em>b</em>")),
        ("(see https://x.org/a_b_c).", f"(see {LINK.format('https://x.org/a_b_c', 'https://x.org/a_b_c')})."),
        ("<mailto:a@b.org>", LINK.format("mailto:a@b.org", "mailto:a@b.org")),
        ("![a picture](https://x.org/a.png)", LINK.format("https://x.org/a.png", "a picture")),
        ("[x](javascript:alert(1))", "<span>x (javascript:alert(1))</span>"),
        ("[x](JaVaScRiPt:alert`1`)", "<span>x (JaVaScRiPt:alert`1`)</span>"),
        ("[x](data:text/html,y)", "<span>x (data:text/html,y)</span>"),
        ("[x](/v1/models)", "<span>x (/v1/models)</span>"),
        ("[x] (y) [z]", "[x] (y) [z]"),
    ],
)
def test_links_lead_to_other_pages_only(text: str, expected: str, run: Run) -> None:
    assert run(HTML, [text]) == [f"<p>{expected}</p>"]


def test_tables(run: Run) -> None:
    [found] = run(HTML, ["| a | b |\n|:-|-:|\n| `x|y` | **1** |\n| only one |\n\nc"])
    assert found == (
        '<div class="table" tabindex="0"><table><thead><tr><th>a</th><th class="right">b</th></tr></thead><tbody>'
        '<tr><td><code>x|y</code></td><td class="right"><strong>1</strong></td></tr>'
        '<tr><td>only one</td><td class="right"></td></tr></tbody></table></div><p>c</p>'
    )


def test_code_keeps_every_character(run: Run) -> None:
    code = 'def f(x):\n    # "no" <b>\n\n    return f"{x}" + \'y\' * 0x1F'
    texts = [f"```python\n{code}\n```\nafter", f"1. a\n   ~~~js\n   {code}\n   ~~~", f"```\n{code}"]
    shown = "parse(t).map((b) => render(b)).map((e) => e.querySelector('pre')?.textContent)"
    top, nested, unfinished = run(f"{MODULE} return texts.map((t) => {shown});", texts)
    assert top == [code, None] and unfinished == [code]
    assert nested != [code]  # its lines lie left of the item, which they end
    [marked] = run(HTML, [texts[0]])
    assert '<span class="keyword">def</span>' in marked and '<span class="comment"># "no" &lt;b&gt;</span>' in marked


# ---- properties --------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        *(
            "a",
            "word ",
            "\n",
            "\n\n",
            "  ",
            "    ",
            "*",
            "**",
            "_",
            "~~",
            "`",
            "```\n",
            "# ",
            "- ",
            "1. ",
            "> ",
            "| ",
            "|-|\n",
        ),
        *(
            "[",
            "](",
            ")",
            "!",
            "<",
            ">",
            "https://x.org ",
            "javascript:",
            "<script>alert(1)</script>",
            "<img src=x onerror=a>",
        ),
        *(
            "$",
            "$$",
            "\\(",
            "\\)",
            "\\[",
            "\\]",
            "\\frac",
            "{",
            "}",
            "^",
            "x",
            "\\begin{align}",
            "\\end{align}",
            "&",
            "\\\\",
        ),
        *("\\left(", "\\right)", "\\text{", "\\sqrt", "\\sum", "&lt;", "---\n", "\\", "\t", "🙂", "é"),
    ]
)
TEXTS = st.lists(PIECES, max_size=30).map("".join)
BATCH = st.lists(TEXTS, min_size=20, max_size=20)
in_browser = settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@in_browser
@given(texts=BATCH)
def test_nothing_but_known_elements_and_safe_links(run: Run, texts: list[str]) -> None:
    for found in run(SURVEY, texts):
        for name, attributes in found:
            assert name in ELEMENTS
            assert not any(
                attribute.startswith("on") or attribute in {"src", "style", "id"} for attribute in attributes
            )
            if "href" in attributes:
                assert name == "a" and set(attributes) == LINK_ATTRIBUTES and SAFE.match(attributes["href"])


@in_browser
@given(texts=BATCH)
def test_a_growing_text_ends_as_if_it_had_come_at_once(run: Run, texts: list[str]) -> None:
    assert run(GROWTH, texts) == [True] * len(texts)


WORDS = st.text("abc", min_size=1, max_size=4)
MARKED = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        inner.map(lambda text: f"**{text}**"),
        inner.map(lambda text: f"*{text}*"),
        st.tuples(inner, inner).map(" ".join),
        WORDS.map(lambda text: f"`{text}`"),
    ),
    max_leaves=6,
)


@in_browser
@given(texts=st.lists(st.one_of(MARKED, st.text("*_a .", max_size=14)), min_size=40, max_size=40))
def test_emphasis_is_commonmark(run: Run, texts: list[str]) -> None:
    """As markdown-it, another implementation, has it, within a paragraph."""
    reference = MarkdownIt("commonmark")
    texts = [f"x {text} x" for text in texts]
    found = run(HTML, texts)
    for text, ours in zip(texts, found, strict=True):
        assert html.unescape(ours) == html.unescape(reference.render(text).strip()), text


LONG = [
    *("*a " * 20000, "_a*b" * 9000, "[" * 50000, "![](" * 9000, "<" * 50000, "`" * 9999 + "a`" * 20000),
    *("> " * 5000, "- " * 5000, "a\n" * 20000, "-" * 50000 + "x\n|" * 3, "|" * 30000 + "\n" + "-|" * 15000),
    *("$a" * 20000, "\\[" * 20000, "$" + "{" * 5000 + "$"),
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: text[:4])
def test_no_text_stops_the_page(text: str, run: Run) -> None:
    timed = "const start = performance.now(); parse(texts[0]).map((b) => render(b)); return performance.now() - start;"
    assert run(MODULE + timed, [text]) < 2000  # milliseconds; quadratic work on these would take minutes
