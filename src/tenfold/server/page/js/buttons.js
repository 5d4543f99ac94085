// Buttons that show a sign and tell a name.

import { element } from "./element.js";
import { icon } from "./icons.js";

/**
 * @param {Parameters<typeof icon>[0]} sign
 * @param {string} label
 * @param {() => void} onclick
 * @returns {HTMLButtonElement}
 */
export function iconButton(sign, label, onclick) {
  const attributes = { class: "quiet", type: "button", "aria-label": label, title: label, onclick };
  return /** @type {HTMLButtonElement} */ (element("button", attributes, icon(sign)));
}

/**
 * @param {string} label
 * @param {() => string} text
 */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copy(text());
    button.replaceChildren(icon(copied ? "check" : "close"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** @param {string} text @returns {Promise<boolean>} whether it is in the clipboard now */
async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(() => true, () => false);
  const field = /** @type {HTMLTextAreaElement} */ (element("textarea", { class: "aside" })); // over plain HTTP
  field.value = text;
  document.body.append(field);
  field.select();
  const copied = document.execCommand("copy");
  field.remove();
  return copied;
}
