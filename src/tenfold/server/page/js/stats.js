// What an answer cost, in a few words.

/** @typedef {import("./conversation.js").Stats} Stats */
/** @typedef {import("./api.js").Usage} Usage */

const SHORTEST = 100; // milliseconds of writing that a speed can be told from: pieces may have come in one packet
const number = new Intl.NumberFormat("en");

/**
 * @param {Usage} usage
 * @returns {Stats}
 */
export function countsOf(usage) {
  const { accepted_prediction_tokens: accepted, rejected_prediction_tokens: rejected } =
    usage.completion_tokens_details ?? {};
  return {
    promptTokens: usage.prompt_tokens,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens,
    tokens: usage.completion_tokens,
    acceptedTokens: accepted,
    draftedTokens: accepted === undefined || rejected === undefined ? undefined : accepted + rejected,
  };
}

/**
 * @param {Stats} stats
 * @returns {Array<[text: string, meaning: string]>}
 */
export function told(stats) {
  const { firstMs, writingMs, promptTokens, cachedTokens, tokens, acceptedTokens, draftedTokens } = stats;
  /** @type {Array<[string, string]>} */
  const facts = [];
  if (tokens && tokens > 1 && writingMs && writingMs >= SHORTEST) {
    const speed = ((tokens - 1) / writingMs) * 1000;
    facts.push([`${speed.toFixed(speed < 10 ? 1 : 0)} tokens/s`, `${number.format(tokens)} tokens in the answer`]);
  }
  if (firstMs !== undefined) facts.push([`first after ${seconds(firstMs)}`, "Time from asking to the first token"]);
  if (promptTokens && cachedTokens !== undefined) {
    const text = `${number.format(cachedTokens)} of ${number.format(promptTokens)} cached`;
    facts.push([text, "Tokens of the prompt that the server had read before, and did not compute again"]);
  }
  if (acceptedTokens) {
    const drafted = draftedTokens ? ` of ${number.format(draftedTokens)}` : "";
    facts.push([`${number.format(acceptedTokens)}${drafted} drafts accepted`, "Tokens guessed ahead that held"]);
  }
  return facts;
}

/** @param {number} ms */
export function seconds(ms) {
  if (ms < 9950) return `${(ms / 1000).toFixed(ms < 995 ? 2 : 1)} s`;
  const whole = Math.round(ms / 1000);
  return whole < 60 ? `${whole} s` : `${Math.floor(whole / 60)} min ${whole % 60} s`;
}
