// What the user has set, kept in this browser only.

const KEY = "tenfold-settings";

/**
 * @typedef {object} Settings
 * @property {string} system prompt
 * @property {string} temperature as it was typed; empty for the server's own
 * @property {string} maxTokens likewise
 * @property {"" | "on" | "off"} thinking
 * @property {string} apiKey
 * @property {string} model
 * @property {"" | "light" | "dark"} theme empty for the system's
 * @property {boolean} sidebar shown on a wide screen
 */

/** @type {Settings} */
const DEFAULTS = {
  system: "", temperature: "", maxTokens: "", thinking: "", apiKey: "", model: "", theme: "", sidebar: true,
};

/** @returns {Settings} */
export function loadSettings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(KEY) ?? "{}") };
  } catch {
    return { ...DEFAULTS };
  }
}

/** @param {Settings} settings */
export function saveSettings(settings) {
  localStorage.setItem(KEY, JSON.stringify(settings));
}

/**
 * The part of a request that settings decide; what was left empty is left to the server.
 * @param {Settings} settings
 * @returns {Record<string, unknown>}
 */
export function requestOptions({ model, temperature, maxTokens, thinking }) {
  return {
    model,
    ...(temperature === "" ? {} : { temperature: Number(temperature) }),
    ...(maxTokens === "" ? {} : { max_tokens: Number(maxTokens) }),
    ...(thinking === "" ? {} : { chat_template_kwargs: { enable_thinking: thinking === "on" } }),
  };
}
