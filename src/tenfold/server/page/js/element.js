// Elements made from names and strings. Strings become text nodes, so text that a model wrote can never become markup.

/** @typedef {Node | string | null | undefined | false} Child */

/**
 * @param {string} name of the element
 * @param {Record<string, unknown>} [attributes] a function under `onclick` and the like listens; true is an attribute
 *     without a value; null, undefined and false leave it out
 * @param {...Child} children
 * @returns {HTMLElement}
 */
export function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

const MATHML = "http://www.w3.org/1998/Math/MathML";

/**
 * @param {string} name of a MathML element
 * @param {Record<string, unknown>} [attributes]
 * @param {...Child} children
 * @returns {MathMLElement}
 */
export function mathElement(name, attributes = {}, ...children) {
  return fill(/** @type {MathMLElement} */ (document.createElementNS(MATHML, name)), attributes, children);
}

/**
 * @template {Element} E
 * @param {E} target
 * @param {Record<string, unknown>} attributes
 * @param {Child[]} children
 * @returns {E}
 */
function fill(target, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") target.addEventListener(name.slice(2), /** @type {EventListener} */ (value));
    else if (value === true) target.setAttribute(name, "");
    else if (value !== null && value !== undefined && value !== false) target.setAttribute(name, String(value));
  }
  target.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return target;
}

/**
 * The element of the page with this id, which is there.
 * @template {HTMLElement} E
 * @param {string} id
 * @returns {E}
 */
export function byId(id) {
  return /** @type {E} */ (document.getElementById(id));
}
