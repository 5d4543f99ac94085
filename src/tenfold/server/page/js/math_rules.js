// What LaTeX's commands with arguments make of them, and the elements they are made of.

import { mathElement as m } from "./element.js";
import { MATRICES } from "./math_symbols.js";

/** @typedef {MathMLElement} MathNode */

/** The maths that was not understood. */
export class Unknown extends Error {}

/** One element for several. @param {MathNode[]} nodes */
export const row = (nodes) => (nodes.length === 1 ? nodes[0] : m("mrow", {}, ...nodes));
export const operator = (/** @type {string} */ text, attributes = {}) => m("mo", attributes, text);
export const fence = (/** @type {string} */ text) => (text ? [operator(text, { stretchy: "true", fence: "true" })] : []);
export const space = (/** @type {number} */ em) => m("mspace", { width: `${em}em` });

/** @typedef {(parser: import("./math.js").Parser, name: string) => [MathNode | null, boolean?]} ParseCommand */

/** @type {ParseCommand} */
const fraction = (p, name) => {
  const node = m("mfrac", {}, p.argument(), p.argument());
  if (name === "frac") return [node];
  return [m("mstyle", { displaystyle: String(name !== "tfrac"), scriptlevel: "0" }, node)];
};

/** @type {ParseCommand} */
const binomial = (p) => {
  const node = m("mfrac", { linethickness: "0" }, p.argument(), p.argument());
  return [m("mrow", {}, ...fence("("), node, ...fence(")"))];
};

/** @type {ParseCommand} */
const root = (p) => {
  const index = p.option();
  return [index ? m("mroot", {}, p.argument(), index) : m("msqrt", {}, p.argument())];
};

/** @type {ParseCommand} */
const fenced = (p) => {
  const parts = fence(p.delimiter());
  parts.push(...p.row(["\\middle"]));
  while (p.accept("\\middle")) parts.push(...fence(p.delimiter()), ...p.row(["\\middle"]));
  p.expect("\\right");
  return [m("mrow", {}, ...parts, ...fence(p.delimiter()))];
};

/** @type {ParseCommand} */
const big = (p, name) => {
  const height = { b: "1.2em", B: "1.8em" }[name[0]] ?? "1.2em";
  const size = /igg/.test(name) ? "2.4em" : height;
  return [operator(p.delimiter(), { stretchy: "true", minsize: size, maxsize: size })];
};

/** @type {ParseCommand} */
const text = (p) => [m("mtext", {}, p.text().replace(/^ | $/g, "\u00a0"))];

/** @type {ParseCommand} */
const begin = (p) => {
  const name = p.text(), fences = MATRICES.get(name);
  if (!fences) throw new Unknown(`the environment ${name} is not known`);
  const columns = name === "array" ? p.text().replace(/[^lcr]/g, "") : "";
  if (/^align(ed)?at/.test(name)) p.text();
  const align = (/** @type {number} */ i) => {
    if (/^(align|split)/.test(name)) return i % 2 ? "left" : "right";
    if (/cases$/.test(name) || columns[i] === "l") return "left";
    return columns[i] === "r" ? "right" : "";
  };
  const table = p.table("\\end", align);
  if (p.text() !== name) throw new Unknown(`\\end{${name}} is missing`);
  if (/^(align|split|gather|equation|multline|alignedat)/.test(name)) table.setAttribute("displaystyle", "true");
  if (/^(align|split)/.test(name)) table.setAttribute("class", "aligned");
  return [m("mrow", {}, ...fence(fences[0]), table, ...fence(fences[1]))];
};

/** @type {ParseCommand} */
const over = (p) => {
  const above = p.argument();
  return [m("mover", {}, p.argument(), above)];
};

/** @type {ParseCommand} */
const under = (p) => {
  const below = p.argument();
  return [m("munder", {}, p.argument(), below)];
};

/** @type {ParseCommand} */
const arrow = (p, name) => {
  const below = p.option(), above = p.argument();
  const line = operator(name === "xleftarrow" ? "←" : "→", { stretchy: "true" });
  return [below ? m("munderover", {}, line, below, above) : m("mover", {}, line, above)];
};

/** @type {ParseCommand} */
const negated = (p) => {
  const node = p.argument();
  node.textContent = `${node.textContent}\u0338`.normalize();
  return [node];
};

/** @type {ParseCommand} */
const modulo = (p) => [m("mrow", {}, space(0.5), operator("("), m("mi", {}, "mod"), space(0.33), p.argument(), operator(")"))];

/** @type {ParseCommand} */
const substack = (p) => {
  p.expect("{");
  return [p.table("}", () => "")];
};

/** @type {ParseCommand} */
const ignoredWithText = (p) => {
  p.text();
  return [null];
};

/** @type {ParseCommand} */
const ignored = () => [null];

/** @type {ParseCommand} */
const inStyle = (p, name) => [m("mstyle", { displaystyle: String(name === "displaystyle") }, ...p.row([]))];

/** @type {Record<string, ParseCommand>} */
export const RULES = {
  frac: fraction, dfrac: fraction, tfrac: fraction, cfrac: fraction, binom: binomial, dbinom: binomial, tbinom: binomial,
  sqrt: root, left: fenced, text, textrm: text, mbox: text, textit: text, textbf: text, textsf: text, texttt: text,
  operatorname: (p) => p.named(p.text(), false), "operatorname*": (p) => p.named(p.text(), true),
  begin, overset: over, stackrel: over, underset: under, xrightarrow: arrow, xleftarrow: arrow, not: negated,
  pmod: modulo, bmod: () => [operator("mod", { lspace: "0.28em", rspace: "0.28em" })],
  mod: () => [operator("mod", { lspace: "1em", rspace: "0.33em" })], substack,
  boxed: (p) => [m("mrow", { class: "boxed" }, p.argument())], phantom: (p) => [m("mphantom", {}, p.argument())],
  tag: (p) => [m("mtext", {}, `\u2003(${p.text()})`)],
  big, Big: big, bigg: big, Bigg: big, bigl: big, bigr: big, Bigl: big, Bigr: big, biggl: big, biggr: big, Biggl: big,
  Biggr: big, bigm: big, Bigm: big,
  label: ignoredWithText, color: ignoredWithText, hspace: ignoredWithText, vspace: ignoredWithText,
  textcolor: (p) => {
    p.text();
    return [p.argument()];
  },
  nonumber: ignored, notag: ignored, displaystyle: inStyle, textstyle: inStyle, mathstrut: ignored, allowbreak: ignored,
  mathop: (p) => [p.argument(), true], mathbin: (p) => [p.argument()], mathrel: (p) => [p.argument()],
};
