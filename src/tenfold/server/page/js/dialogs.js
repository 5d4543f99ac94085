// The settings, and the question before something is deleted.

import { byId } from "./element.js";
import { saveSettings } from "./settings.js";

/** @typedef {import("./settings.js").Settings} Settings */

const FIELDS = /** @type {const} */ (["system", "temperature", "maxTokens", "thinking", "apiKey", "theme"]);

/**
 * Opens the settings when their button is pressed; what is typed holds at once.
 * @param {Settings} settings which is changed
 * @param {(name: keyof Settings) => void} changed
 */
export function bindSettings(settings, changed) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("settings"));
  for (const name of FIELDS) {
    const field = /** @type {HTMLInputElement} */ (byId(`setting-${name}`));
    field.value = settings[name];
    field.addEventListener("change", () => {
      if (!field.checkValidity()) return;
      /** @type {Record<string, unknown>} */ (settings)[name] = field.value.trim();
      saveSettings(settings);
      changed(name);
    });
  }
  closeOutside(dialog);
  byId("open-settings").addEventListener("click", () => showSettings());
}

/** @param {string} [field] that gets the focus */
export function showSettings(field) {
  /** @type {HTMLDialogElement} */ (byId("settings")).showModal();
  if (field) byId(`setting-${field}`).focus();
}

/** Asks whether to delete. @param {string} title @returns {Promise<boolean>} */
export function confirmDelete(title) {
  const dialog = /** @type {HTMLDialogElement} */ (byId("confirm"));
  byId("confirm-title").textContent = title;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    // An earlier question's event may come when this one is already open.
    dialog.onclose = () => dialog.open || resolve(dialog.returnValue === "delete");
  });
}

/** A press outside a dialog closes it. @param {HTMLDialogElement} dialog */
function closeOutside(dialog) {
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
}
