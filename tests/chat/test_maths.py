"""LaTeX's maths as MathML: what stands where, that the browser draws it so, and that the rest is shown as written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

Run = Callable[[str, Sequence[str]], Any]
MODULE = "const {renderMath} = await import('/js/math.js');"
INNER = MODULE + "return texts.map((text) => renderMath(text, false).innerHTML);"
NAMES = MODULE + "return texts.map((text) => renderMath(text, true).localName);"


@pytest.fixture(scope="module")
def run(browser: Any, running_server: Any) -> Run:
    browser.get(f"{running_server.url}/")

    def call(code: str, texts: Sequence[str]) -> Any:
        script = f"const [texts, done] = arguments; (async () => {{{code}}})().then(done, (e) => done(String(e.stack)))"
        return browser.execute_async_script(script, list(texts))

    return call


A, B, N, TWO = "<mi>a</mi>", "<mi>b</mi>", "<mi>n</mi>", "<mn>2</mn>"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a^2_n", f"<msubsup>{A}{N}{TWO}</msubsup>"),
        ("a^{2n}", f"<msup>{A}<mrow>{TWO}{N}</mrow></msup>"),
        ("a^23", f"<mrow><msup>{A}{TWO}</msup><mn>3</mn></mrow>"),
        ("f'", '<msup><mi>f</mi><mo lspace="0" rspace="0">\N{PRIME}</mo></msup>'),
        (r"\frac a{b+2}", f"<mfrac>{A}<mrow>{B}<mo>+</mo>{TWO}</mrow></mfrac>"),
        (r"\frac12", f"<mfrac><mn>1</mn>{TWO}</mfrac>"),
        (r"\sqrt[n]{a}\sqrt b", f"<mrow><mroot>{A}{N}</mroot><msqrt>{B}</msqrt></mrow>"),
        (r"\alpha\Omega", "<mrow><mi>\N{GREEK SMALL LETTER ALPHA}</mi><mi>Ω</mi></mrow>"),
        (r"\sum_a^b", f'<munderover><mo movablelimits="true">∑</mo>{A}{B}</munderover>'),
        (r"\int_a^b", f"<msubsup><mo>∫</mo>{A}{B}</msubsup>"),
        (r"\int\limits_a^b", f"<munderover><mo>∫</mo>{A}{B}</munderover>"),
        (r"\text{if } a", f"<mrow><mtext>if\u00a0</mtext>{A}</mrow>".replace("\u00a0", "&nbsp;")),
        (r"\mathbb R\mathcal{L}\mathbf{v}", "<mrow><mi>\u211d</mi><mi>\u2112</mi><mi>\U0001d42f</mi></mrow>"),
        (r"\mathrm{d}a", f'<mrow><mi mathvariant="normal">d</mi>{A}</mrow>'),
        (r"\hat a", f'<mover accent="true">{A}<mo stretchy="false">^</mo></mover>'),
        (r"3.14, a-b", f"<mrow><mn>3.14</mn><mo>,</mo>{A}<mo>\N{MINUS SIGN}</mo>{B}</mrow>"),
        (r"\left(a\right.", f'<mrow><mo stretchy="true" fence="true">(</mo>{A}</mrow>'),
        (r"\begin{pmatrix} a & b \\ 2 & n \end{pmatrix}",
         f'<mrow><mo stretchy="true" fence="true">(</mo><mtable><mtr><mtd>{A}</mtd><mtd>{B}</mtd></mtr>'
         f'<mtr><mtd>{TWO}</mtd><mtd>{N}</mtd></mtr></mtable><mo stretchy="true" fence="true">)</mo></mrow>'),
        (r"\not= \neq", "<mrow><mo>≠</mo><mo>≠</mo></mrow>"),
    ],
)  # fmt: skip
def test_maths(source: str, expected: str, run: Run) -> None:
    assert run(INNER, [source]) == [expected]


# Formulas as answers have them.
FORMULAS = [
    r"x = \frac{-b \pm \sqrt{b^2 - 4ac}}{2a}",
    r"e^{i\pi} + 1 = 0",
    r"\int_{-\infty}^{\infty} e^{-x^2}\, dx = \sqrt{\pi}",
    r"\lim_{n \to \infty} \left(1 + \frac{1}{n}\right)^n = e",
    r"\nabla \times \mathbf{E} = -\frac{\partial \mathbf{B}}{\partial t}",
    r"f(x) = \begin{cases} x^2 & \text{if } x \ge 0 \\ -x & \text{otherwise} \end{cases}",
    r"\begin{aligned} a &= b + c \\ &= d \end{aligned}",
    r"\begin{align*} \mathcal{L}(\theta) &= -\sum_{i=1}^{N} \log p_\theta(y_i \mid x_i) \\ &\le 0 \tag{1} \end{align*}",
    r"\operatorname{softmax}\left(\frac{QK^\top}{\sqrt{d_k}}\right)V",
    r"\operatorname*{arg\,max}_{x \in \mathbb{R}^n} \; \lVert Ax - b \rVert_2^2",
    r"P(A \mid B) = \dfrac{P(B \mid A)\,P(A)}{P(B)}",
    r"\binom{n}{k} = \frac{n!}{k!\,(n-k)!}",
    r"\underbrace{a + \cdots + a}_{n\text{ times}} \xrightarrow{n \to \infty} \infty",
    r"\hat{\beta} = (X^\top X)^{-1} X^\top y, \quad \bar{x} = \tfrac{1}{n}\sum_i x_i",
    r"\oint_C \vec{F} \cdot d\vec{r} \ne 0, \forall \epsilon > 0 \;\exists \delta > 0",
    r"\left\{ x \in \mathbb{Z} \;\middle|\; x^2 \leq 4 \right\} \implies \boxed{x = 2}",
    r"\overline{z} \equiv a \pmod{p}, \lfloor x \rfloor \oplus \lceil y \rceil",
    r"\begin{bmatrix} 1 & \cdots & 0 \\ \vdots & \ddots & \vdots \\ 0 & \cdots & 1 \end{bmatrix}^{-1}",
    r"\left.\frac{df}{dx}\right|_{x=0} \propto 10^{-3}\,\mathrm{m\,s^{-1}}, 50\%",
    r"\big( \bigl\| x \bigr\| \big) \sim \mathcal{N}(\mu, \sigma^2) % a comment",
    r"\prod_{\substack{p \le n \\ p \text{ prime}}} p, \; f''(x)^2, {}_2F_1, x_1', y^{\prime}",
    r"\begin{array}{c|c} a & b \\ \hline c & d \end{array} \stackrel{\text{def}}{=} \overset{!}{=} Z",
    r"H_2O \rightleftharpoons \textbf{ions}, \displaystyle\sum_{k} \bm{\alpha}_k \limits",
]


def test_formulas_of_every_day_are_understood(run: Run) -> None:
    found = run(NAMES, FORMULAS)
    assert [formula for formula, name in zip(FORMULAS, found, strict=True) if name != "math"] == []


BROKEN = [
    *(
        r"\frac{a}",
        r"\unknown{x}",
        r"\left( x",
        r"{x",
        r"x}",
        r"x^",
        r"\sqrt",
        r"\text{",
        r"\end{x}",
        "a & b",
        "{" * 200,
    ),
    *(r"\begin{pmatrix} a", r"\begin{tikzpicture}\end{tikzpicture}", r"\href{javascript:alert(1)}{x}"),
    *(r"\constructor", r"\toString"),
]


@pytest.mark.parametrize("source", BROKEN, ids=lambda source: source[:20])
def test_what_is_not_understood_is_shown_as_written(source: str, run: Run) -> None:
    script = MODULE + "const e = renderMath(texts[0], true); return [e.localName, e.textContent];"
    assert run(script, [source]) == ["code", source]


DRAWN = """const box = (e) => e.getBoundingClientRect();
const formulas = texts.map((source) => document.body.appendChild(renderMath(source, true)));
const [fraction, power, sum, fenced] = formulas.map((formula) => [...formula.firstChild.children].map(box));
formulas.forEach((formula) => formula.remove());
return [
  fraction[0].bottom <= fraction[1].top, power[1].bottom < power[0].bottom, sum[1].top >= sum[0].bottom - 1,
  sum[2].bottom <= sum[0].top + 1, fenced[0].height > 2 * fraction[0].height,
];"""


def test_the_browser_draws_it_as_maths(run: Run) -> None:
    """Numerator over denominator, exponent above its base, limits at a sum, fences as high as what they hold."""
    formulas = [r"\frac{a}{b}", "a^b", r"\sum_{i}^{n}", r"\left(\frac{\frac ab}{b}\right)"]
    assert run(MODULE + DRAWN, formulas) == [True] * 5
