// A light touch of colour for code: comments, strings, numbers and the commonest languages' keywords.

import { element } from "./element.js";

const C_LIKE =
  "auto bool break case catch char class const constexpr continue default delete do double else enum export extends " +
  "extern false final float for func function fn go if impl implements import in int interface let long match mod mut " +
  "namespace new nil null nullptr override package private protected pub public return self short signed sizeof static " +
  "struct super switch template this throw trait true try type typedef typename undefined union unsigned use using var " +
  "virtual void where while async await yield of instanceof typeof range defer map chan select string";
const PYTHON =
  "and as assert async await break case class continue def del elif else except False finally for from global if import " +
  "in is lambda match None nonlocal not or pass raise return self True try while with yield";
const SHELL = "if then else elif fi for while do done case esac in function return export local set source alias sudo";
const SQL =
  "select from where insert into values update set delete create table index view join left right inner outer on group " +
  "by order having limit as and or not null distinct union all primary key foreign references case when then else end";

const SLASHES = String.raw`\/\/[^\n]*|\/\*[^]*?(?:\*\/|$)`;
const HASH = String.raw`#[^\n]*`;
const STRINGS = String.raw`"(?:\\[^]|[^"\\\n])*"?|'(?:\\[^]|[^'\\\n])*'?`;
const TICKS = "`(?:\\\\[^]|[^`\\\\])*`?";
const TRIPLES = String.raw`"""[^]*?(?:"""|$)|'''[^]*?(?:'''|$)`;

/** @typedef {{pattern: RegExp, keywords: Set<string>, fold: boolean}} Language */

/** @type {Map<string, Language>} */
const LANGUAGES = new Map();
define("python py python3", HASH, `${TRIPLES}|${STRINGS}`, PYTHON);
define("bash sh shell zsh console", String.raw`(?<!\S)#[^\n]*`, STRINGS, SHELL);
define("javascript js typescript ts jsx tsx mjs", SLASHES, `${STRINGS}|${TICKS}`, C_LIKE);
define("c cpp c++ h hpp cuda rust rs go java kotlin swift csharp cs c# php scala dart", SLASHES, STRINGS, C_LIKE);
define("json jsonc", SLASHES, STRINGS, "true false null");
define("yaml yml toml ini dockerfile makefile r ruby rb", HASH, `${TRIPLES}|${STRINGS}`, "true false null def end do");
define("sql", String.raw`--[^\n]*`, STRINGS, SQL, true);

/** @param {string} names @param {string} comments @param {string} strings @param {string} keywords */
function define(names, comments, strings, keywords, fold = false) {
  const source = `(?<comment>${comments})|(?<string>${strings})|(?<number>\\b\\d[\\w.]*)|(?<word>[A-Za-z_]\\w*)`;
  const language = { pattern: new RegExp(source, "g"), keywords: new Set(keywords.split(" ")), fold };
  for (const name of names.split(" ")) LANGUAGES.set(name, language);
}

/**
 * @param {string} text
 * @param {string} name of the language, in small letters; an unknown one gets no colours
 * @returns {Array<Node | string>} whose text is the text
 */
export function highlight(text, name) {
  const language = LANGUAGES.get(name);
  if (!language) return [text];
  const parts = [];
  let end = 0;
  for (const found of text.matchAll(language.pattern)) {
    const kind = kindOf(found, language);
    if (!kind) continue;
    parts.push(text.slice(end, found.index), element("span", { class: kind }, found[0]));
    end = found.index + found[0].length;
  }
  parts.push(text.slice(end));
  return parts.filter((part) => part !== "");
}

/** @param {RegExpMatchArray} found @param {Language} language */
function kindOf(found, language) {
  const { comment, string, number, word } = found.groups ?? {};
  if (comment !== undefined) return "comment";
  if (string !== undefined) return "string";
  if (number !== undefined) return "number";
  return language.keywords.has(language.fold ? word.toLowerCase() : word) ? "keyword" : "";
}
