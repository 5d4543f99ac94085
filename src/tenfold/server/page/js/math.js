// LaTeX's maths, in the subset that answers use, as MathML. What isn't understood is shown as it was written.

import { element, mathElement as m } from "./element.js";
import { RULES, Unknown, fence, operator, row, space } from "./math_rules.js";
import {
  ACCENTS, BELOW, FUNCTIONS, INTEGRALS, LARGE, LETTERS, LIMITED, OPERATORS, SPACES, STRETCHED, VARIANTS,
  inAlphabet,
} from "./math_symbols.js";

const TOKEN = /\\(?:operatorname\*|[a-zA-Z]+|[^])|\s+|[^]/gu;
const FENCES = new Set("()[]|/‖⟨⟩⌊⌋⌈⌉{}↑↓⇑⇓\\");
const ASCII_OPERATORS = new Map([["-", "−"], ["*", "∗"], ["'", "′"], [":", ":"]]);
const DEEPEST = 60; // groups within one another
const LONGEST = 20000; // characters

/**
 * @param {string} source what stands between the dollars
 * @param {boolean} display as a paragraph of its own
 * @returns {Element} <math>, or <code> with the source
 */
export function renderMath(source, display) {
  try {
    const body = new Parser(source).all();
    return m("math", { display: display ? "block" : null }, row(body));
  } catch (error) {
    if (!(error instanceof Unknown)) throw error;
    return element("code", { class: "math-source", title: error.message }, source.trim());
  }
}

/** @typedef {import("./math_rules.js").MathNode} MathNode */

/** Reads tokens from left to right; a method per part of the grammar. */
export class Parser {
  /** @param {string} source */
  constructor(source) {
    if (source.length > LONGEST) throw new Unknown("too long");
    this.tokens = source.replace(/(?<!\\)%.*$/gm, "").match(TOKEN) ?? [];
    this.at = 0;
    this.depth = 0;
    this.variant = "";
  }

  all() {
    const nodes = this.row([]);
    if (this.peek() !== undefined) throw new Unknown(`unexpected ${this.peek()}`);
    return nodes;
  }

  /** The next token, blanks left out. */
  peek() {
    while (this.tokens[this.at]?.trim() === "") this.at++;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new Unknown("the end came too early");
    this.at++;
    return token;
  }

  /** @param {string} expected */
  expect(expected) {
    const token = this.next();
    if (token !== expected) throw new Unknown(`expected ${expected}, got ${token}`);
  }

  /** @param {string} token */
  accept(token) {
    if (this.peek() !== token) return false;
    this.at++;
    return true;
  }

  /**
   * Everything up to one of the tokens, which is left there, or to the end.
   * @param {string[]} ends
   * @returns {MathNode[]}
   */
  row(ends) {
    if (++this.depth > DEEPEST) throw new Unknown("too deep");
    const nodes = [], variant = this.variant;
    for (let token = this.peek(); token !== undefined && !ends.includes(token); token = this.peek()) {
      if (token === "}" || token === "&" || token === "\\\\" || token === "\\right" || token === "\\end") break;
      nodes.push(...this.scripted());
    }
    this.variant = variant;
    this.depth--;
    return nodes;
  }

  /** A base with what stands above and below it. @returns {MathNode[]} */
  scripted() {
    const token = this.peek();
    const [base, limits] = token === "^" || token === "_" ? [m("mrow"), false] : this.base();
    if (!base) return [];
    let above, below;
    let stacked = limits;
    for (let mark = this.peek(); ; mark = this.peek()) {
      if (mark === "\\limits" || mark === "\\nolimits") stacked = this.next() === "\\limits";
      else if (mark === "^" && !above) above = this.script();
      else if (mark === "_" && !below) below = this.script();
      else if (mark === "'" && !above) above = this.primes();
      else break;
    }
    return [attached(base, below, above, stacked)];
  }

  script() {
    this.next();
    return this.argument();
  }

  primes() {
    let marks = "";
    while (this.accept("'")) marks += "′";
    const prime = operator(marks, { lspace: "0", rspace: "0" });
    return this.peek() === "^" ? m("mrow", {}, prime, this.script()) : prime;
  }

  /** A group, or a single token. @returns {MathNode} */
  argument() {
    if (this.accept("{")) {
      const nodes = this.row(["}"]);
      this.expect("}");
      return row(nodes);
    }
    if (/^[}&^_]$/.test(this.peek() ?? "}")) throw new Unknown("an argument is missing");
    return this.base(true)[0] ?? m("mrow");
  }

  /** The text of a group, as it is. */
  text() {
    this.expect("{");
    let depth = 1, text = "";
    while (depth > 0) {
      const token = this.tokens[this.at++];
      if (token === undefined) throw new Unknown("a closing brace is missing");
      depth += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (!"{}$".includes(token)) text += /^\\[^a-zA-Z]/.test(token) ? token.slice(1) : token;
    }
    return text;
  }

  /**
   * @param {boolean} [single] one digit of a number only
   * @returns {[node: MathNode | null, limits?: boolean]} limits: what belongs to it stands above and below
   */
  base(single = false) {
    const token = this.peek() ?? "";
    if (token === "{") return [this.argument()];
    if (/^[0-9]$/.test(token)) return [this.number(single)];
    this.next();
    if (token.startsWith("\\") && token.length > 1) return this.command(token.slice(1));
    if (/^\p{L}$/u.test(token)) return [this.letter(token)];
    if (token === "~") return [space(0.25)];
    return [this.symbol(ASCII_OPERATORS.get(token) ?? token)];
  }

  /** @param {boolean} single */
  number(single) {
    let digits = this.next();
    while (!single && /^[0-9]$/.test(this.tokens[this.at] ?? "")) digits += this.tokens[this.at++];
    if (!single && /^[.]$/.test(this.tokens[this.at] ?? "") && /^[0-9]$/.test(this.tokens[this.at + 1] ?? "")) {
      digits += `.${this.tokens[++this.at]}`;
      this.at++;
      while (/^[0-9]$/.test(this.tokens[this.at] ?? "")) digits += this.tokens[this.at++];
    }
    return m("mn", {}, [...digits].map((digit) => inAlphabet(digit, this.variant)).join(""));
  }

  /** @param {string} letter */
  letter(letter) {
    if (this.variant === "normal") return m("mi", { mathvariant: "normal" }, letter);
    const shown = inAlphabet(letter, this.variant);
    return m("mi", this.variant && shown === letter && this.variant !== "italic" ? { mathvariant: "normal" } : {}, shown);
  }

  /** @param {string} character */
  symbol(character) {
    return operator(character, FENCES.has(character) ? { stretchy: "false" } : {});
  }

  /** @param {string} name @returns {[MathNode | null, boolean?]} */
  command(name) {
    const letter = LETTERS.get(name), sign = OPERATORS.get(name), large = LARGE.get(name), integral = INTEGRALS.get(name);
    if (letter) return [/\p{L}/u.test(letter) ? this.letter(letter) : m("mi", {}, letter)];
    if (sign) return [this.symbol(sign)];
    if (large) return [operator(large, { movablelimits: "true" }), true];
    if (integral) return [operator(integral)];
    if (FUNCTIONS.has(name)) return this.named(spaced(name), LIMITED.has(name));
    if (SPACES.has(name)) return [space(SPACES.get(name) ?? 0)];
    if (VARIANTS.has(name)) return [this.inVariant(name)];
    if (ACCENTS.has(name) || BELOW.has(name)) return this.accent(name);
    const rule = Object.hasOwn(RULES, name) ? RULES[name] : null;
    if (!rule) throw new Unknown(`\\${name} is not known`);
    return rule(this, name);
  }

  /** A function's name, a little space behind it where its argument follows. @returns {[MathNode, boolean]} */
  named(/** @type {string} */ name, /** @type {boolean} */ limits) {
    const attributes = { lspace: "0.1em", rspace: /^[\p{L}0-9\\]/u.test(this.peek() ?? "") ? "0.167em" : "0" };
    return [operator(name, limits ? { ...attributes, movablelimits: "true" } : attributes), limits];
  }

  /** @param {string} name */
  inVariant(name) {
    const before = this.variant;
    this.variant = VARIANTS.get(name) ?? "";
    if (name.length === 2 && name !== "bm") return row(this.row([])); // \bf and \rm hold to the end of their group
    const node = this.variant === "normal" ? this.upright() : this.argument();
    this.variant = before;
    return node;
  }

  /** Letters of \mathrm, which are a word. */
  upright() {
    const at = this.at;
    const word = this.peek() === "{" ? this.text() : "";
    if (/^[\p{L}\p{N}]{2,}$/u.test(word)) return m("mi", {}, word);
    this.at = at;
    return this.argument();
  }

  /** @param {string} name @returns {[MathNode, boolean]} */
  accent(name) {
    const base = this.argument();
    const mark = operator(ACCENTS.get(name) ?? BELOW.get(name) ?? "", { stretchy: String(STRETCHED.has(name)) });
    const above = ACCENTS.has(name);
    const node = m(above ? "mover" : "munder", { [above ? "accent" : "accentunder"]: "true" }, base, mark);
    return [node, name.endsWith("brace")];
  }

  /** A fence behind \left, \right, \big: its character, "" for the full stop. */
  delimiter() {
    const token = this.next();
    if (token === ".") return "";
    if (token === "<" || token === ">") return token === "<" ? "⟨" : "⟩";
    const found = token.startsWith("\\") ? OPERATORS.get(token.slice(1)) : token;
    if (!found || !FENCES.has(found)) throw new Unknown(`${token} is no delimiter`);
    return found;
  }

  /** What stands in square brackets, if they follow. @returns {MathNode | null} */
  option() {
    if (!this.accept("[")) return null;
    const nodes = this.row(["]"]);
    this.expect("]");
    return row(nodes);
  }

  /** Rows of cells up to \end. @param {string} close @param {(column: number) => string} align */
  table(close, align) {
    const rows = [[this.cell(align(0))]];
    for (;;) {
      if (this.accept("&")) rows.at(-1)?.push(this.cell(align(rows.at(-1)?.length ?? 0)));
      else if (this.accept("\\\\")) {
        this.option();
        rows.push([this.cell(align(0))]);
      } else break;
    }
    this.expect(close);
    const last = rows.at(-1);
    if (rows.length > 1 && last?.length === 1 && !last[0].hasChildNodes()) rows.pop();
    return m("mtable", {}, ...rows.map((cells) => m("mtr", {}, ...cells)));
  }

  /** @param {string} align */
  cell(align) {
    while (this.accept("\\hline"));
    return m("mtd", { class: align || null }, ...this.row([]));
  }
}

/** @param {MathNode} base @param {MathNode | undefined} below @param {MathNode | undefined} above @param {boolean | undefined} stacked */
function attached(base, below, above, stacked) {
  if (below && above) return m(stacked ? "munderover" : "msubsup", {}, base, below, above);
  if (below) return m(stacked ? "munder" : "msub", {}, base, below);
  if (above) return m(stacked ? "mover" : "msup", {}, base, above);
  return base;
}

const spaced = (/** @type {string} */ name) => name.replace(/^(lim|arg)(sup|inf|max|min)$/, "$1\u2009$2");
