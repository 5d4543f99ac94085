// What LaTeX's names stand for.

/** @param {string} pairs names and characters in turn */
const table = (pairs) => {
  const words = pairs.trim().split(/\s+/);
  return new Map(words.flatMap((word, i) => (i % 2 ? [] : [[word, words[i + 1]]])));
};

/** Shown as letters. */
export const LETTERS = table(`
  alpha α beta β gamma γ delta δ epsilon ϵ varepsilon ε zeta ζ eta η theta θ vartheta ϑ iota ι kappa κ lambda λ mu μ nu ν
  xi ξ omicron ο pi π varpi ϖ rho ρ varrho ϱ sigma σ varsigma ς tau τ upsilon υ phi ϕ varphi φ chi χ psi ψ omega ω
  Gamma Γ Delta Δ Theta Θ Lambda Λ Xi Ξ Pi Π Sigma Σ Upsilon Υ Phi Φ Psi Ψ Omega Ω
  infty ∞ partial ∂ nabla ∇ ell ℓ hbar ℏ Re ℜ Im ℑ aleph ℵ wp ℘ emptyset ∅ varnothing ∅ imath ı jmath ȷ
  angle ∠ triangle △ square □ Box □ top ⊤ bot ⊥ degree ° dots … ldots … cdots ⋯ vdots ⋮ ddots ⋱ checkmark ✓
  prime ′ complement ∁ bigstar ★ diamond ⋄ clubsuit ♣ spadesuit ♠ heartsuit ♡ diamondsuit ♢ dagger † ddagger ‡
  % % # # & & _ _ $ $
`);

/** Shown as operators and relations, with the space that goes with them. */
export const OPERATORS = table(`
  times × div ÷ cdot ⋅ pm ± mp ∓ ast ∗ star ⋆ circ ∘ bullet ∙ oplus ⊕ ominus ⊖ otimes ⊗ odot ⊙ oslash ⊘
  wedge ∧ land ∧ vee ∨ lor ∨ neg ¬ lnot ¬ cap ∩ cup ∪ setminus ∖ sqcup ⊔ sqcap ⊓ uplus ⊎ amalg ⨿
  le ≤ leq ≤ leqslant ⩽ ge ≥ geq ≥ geqslant ⩾ ne ≠ neq ≠ ll ≪ gg ≫ approx ≈ sim ∼ simeq ≃ cong ≅ equiv ≡ propto ∝
  asymp ≍ doteq ≐ triangleq ≜ coloneqq ≔ prec ≺ succ ≻ preceq ⪯ succeq ⪰ lesssim ≲ gtrsim ≳
  in ∈ notin ∉ ni ∋ subset ⊂ supset ⊃ subseteq ⊆ supseteq ⊇ subsetneq ⊊ supsetneq ⊋ forall ∀ exists ∃ nexists ∄
  to → rightarrow → leftarrow ← gets ← leftrightarrow ↔ Rightarrow ⇒ Leftarrow ⇐ Leftrightarrow ⇔ implies ⟹ impliedby ⟸
  iff ⟺ mapsto ↦ longmapsto ⟼ longrightarrow ⟶ longleftarrow ⟵ Longrightarrow ⟹ Longleftarrow ⟸ Longleftrightarrow ⟺
  uparrow ↑ downarrow ↓ Uparrow ⇑ Downarrow ⇓ nearrow ↗ searrow ↘ swarrow ↙ nwarrow ↖ updownarrow ↕ hookrightarrow ↪
  rightharpoonup ⇀ rightleftharpoons ⇌ leftrightarrows ⇆ rightsquigarrow ⇝ uparrow ↑
  mid ∣ nmid ∤ parallel ∥ nparallel ∦ perp ⊥ vdash ⊢ dashv ⊣ models ⊨ vDash ⊨ colon : therefore ∴ because ∵
  langle ⟨ rangle ⟩ lfloor ⌊ rfloor ⌋ lceil ⌈ rceil ⌉ lvert | rvert | lVert ‖ rVert ‖ vert | Vert ‖ | ‖ { { } }
  lbrace { rbrace } lbrack [ rbrack ] backslash \\ surd √
`);

/** Grow in displayed maths; limits stand above and below. */
export const LARGE = table(`
  sum ∑ prod ∏ coprod ∐ bigcup ⋃ bigcap ⋂ bigvee ⋁ bigwedge ⋀ bigoplus ⨁ bigotimes ⨂ bigodot ⨀ bigsqcup ⨆ biguplus ⨄
`);

/** Grow in displayed maths; limits stand beside. */
export const INTEGRALS = table("int ∫ iint ∬ iiint ∭ oint ∮ oiint ∯");

/** Names set upright; those in LIMITED have what belongs to them underneath. */
export const FUNCTIONS = new Set(
  ("sin cos tan cot sec csc sinh cosh tanh coth arcsin arccos arctan log ln lg exp ker dim deg hom arg det gcd " +
    "Pr lim max min sup inf limsup liminf argmax argmin").split(" "),
);
export const LIMITED = new Set("lim max min sup inf limsup liminf argmax argmin det gcd Pr".split(" "));

/** Above a letter; the wide ones above all of it. */
export const ACCENTS = table(`
  hat ^ widehat ^ tilde ~ widetilde ~ bar ¯ overline ¯ vec → overrightarrow → overleftarrow ← dot ˙ ddot ¨ dddot ⃛
  acute ´ grave ` + "`" + ` breve ˘ check ˇ mathring ˚ overbrace ⏞
`);
export const BELOW = table("underline _ underbrace ⏟ underrightarrow →");
export const STRETCHED = new Set(
  "widehat widetilde overline overrightarrow overleftarrow overbrace underline underbrace underrightarrow".split(" "),
);

/** Widths in em. */
export const SPACES = new Map([
  [",", 0.167], [":", 0.222], [">", 0.222], [";", 0.278], ["!", -0.167], [" ", 0.25], ["quad", 1], ["qquad", 2],
  ["thinspace", 0.167], ["enspace", 0.5],
]);

/** Fences of the environments that are matrices. */
export const MATRICES = new Map([
  ["matrix", ["", ""]], ["pmatrix", ["(", ")"]], ["bmatrix", ["[", "]"]], ["Bmatrix", ["{", "}"]],
  ["vmatrix", ["|", "|"]], ["Vmatrix", ["‖", "‖"]], ["smallmatrix", ["", ""]], ["cases", ["{", ""]],
  ["rcases", ["", "}"]], ["array", ["", ""]], ["aligned", ["", ""]], ["align", ["", ""]], ["align*", ["", ""]],
  ["alignat", ["", ""]], ["alignat*", ["", ""]], ["alignedat", ["", ""]], ["split", ["", ""]], ["gather", ["", ""]],
  ["gather*", ["", ""]], ["gathered", ["", ""]], ["equation", ["", ""]], ["equation*", ["", ""]],
  ["multline", ["", ""]], ["multline*", ["", ""]],
]);

/** First code points of Unicode's mathematical alphabets: capitals, small letters, digits. */
const ALPHABETS = {
  bold: [0x1d400, 0x1d41a, 0x1d7ce],
  "bold-italic": [0x1d468, 0x1d482, 0x1d7ce],
  "double-struck": [0x1d538, 0x1d552, 0x1d7d8],
  script: [0x1d49c, 0x1d4b6, 0],
  fraktur: [0x1d504, 0x1d51e, 0],
  "sans-serif": [0x1d5a0, 0x1d5ba, 0x1d7e2],
  monospace: [0x1d670, 0x1d68a, 0x1d7f6],
};

/** Letters that had a place before the alphabets came. */
const EARLIER = new Map([
  ...earlier("double-struck", "CHNPQRZ", "ℂℍℕℙℚℝℤ"),
  ...earlier("script", "BEFHILMRego", "ℬℰℱℋℐℒℳℛℯℊℴ"),
  ...earlier("fraktur", "CHIRZ", "ℭℌℑℜℨ"),
]);

/**
 * @param {string} variant @param {string} letters @param {string} places
 * @returns {Array<[string, string]>}
 */
function earlier(variant, letters, places) {
  return [...letters].map((letter, i) => [`${variant} ${letter}`, [...places][i]]);
}

/** The commands that change the alphabet of their argument; "normal" is upright. */
export const VARIANTS = new Map([
  ["mathrm", "normal"], ["mathup", "normal"], ["rm", "normal"], ["mathbf", "bold"], ["bf", "bold"],
  ["boldsymbol", "bold-italic"], ["bm", "bold-italic"], ["mathbb", "double-struck"], ["mathcal", "script"],
  ["mathscr", "script"], ["mathfrak", "fraktur"], ["mathsf", "sans-serif"], ["mathtt", "monospace"],
  ["mathit", "italic"],
]);

const BOLD_GREEK = { bold: [0x1d6a8, 0x1d6c2], "bold-italic": [0x1d71c, 0x1d736] };

/**
 * A letter or digit in another alphabet; itself where that alphabet lacks it.
 * @param {string} character
 * @param {string} variant
 */
export function inAlphabet(character, variant) {
  const place = EARLIER.get(`${variant} ${character}`);
  if (place) return place;
  const [capital, small, digit] = ALPHABETS[/** @type {"bold"} */ (variant)] ?? [0, 0, 0];
  const greek = BOLD_GREEK[/** @type {"bold"} */ (variant)];
  const shifted = (/** @type {number} */ first, /** @type {string} */ from) =>
    String.fromCodePoint(first + character.charCodeAt(0) - from.charCodeAt(0));
  if (/^[A-Z]$/.test(character) && capital) return shifted(capital, "A");
  if (/^[a-z]$/.test(character) && small) return shifted(small, "a");
  if (/^[0-9]$/.test(character) && digit) return shifted(digit, "0");
  if (/^[Α-Ω]$/.test(character) && greek) return shifted(greek[0], "Α");
  if (/^[α-ω]$/.test(character) && greek) return shifted(greek[1], "α");
  return character;
}
