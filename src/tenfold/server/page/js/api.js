// What the page asks the server: which models there are, and an answer, as it is written.

/**
 * @typedef {object} Usage
 * @property {number} prompt_tokens
 * @property {number} completion_tokens
 * @property {{cached_tokens?: number}} [prompt_tokens_details]
 * @property {{accepted_prediction_tokens?: number, rejected_prediction_tokens?: number}} [completion_tokens_details]
 */

/** @typedef {{content?: string, reasoning?: string, finish?: string, usage?: Usage}} Piece of an answer */

/** A request that failed, told in one line. */
export class ApiError extends Error {
  /** @param {string} message @param {number} [status] of HTTP */
  constructor(message, status) {
    super(message.replace(/\s+/g, " ").trim());
    this.status = status;
  }
}

/** @param {string} apiKey @returns {Promise<string[]>} names of models */
export async function listModels(apiKey) {
  const response = await ask("v1/models", apiKey, {});
  const listed = await response.json().catch(() => ({}));
  return (listed.data ?? []).map((/** @type {{id: string}} */ model) => model.id);
}

/**
 * Asks for an answer. Raises ApiError, or an AbortError once the signal came.
 * @param {Record<string, unknown>} request as the API has it; that it streams is added here
 * @param {string} apiKey
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<Piece>}
 */
export async function* streamAnswer(request, apiKey, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await ask("v1/chat/completions", apiKey, { method: "POST", body, signal });
  if (!response.body) throw new ApiError("The server's answer is empty");
  let finished = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const piece = pieceOf(data);
    finished ||= piece.finish !== undefined;
    yield piece;
  }
  if (!finished) throw new ApiError("The connection ended before the answer did");
}

/** @param {string} path @param {string} apiKey @param {RequestInit} options @returns {Promise<Response>} */
async function ask(path, apiKey, options) {
  /** @type {Record<string, string>} */
  const headers = { "Content-Type": "application/json" };
  if (apiKey) headers.Authorization = `Bearer ${apiKey}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The server cannot be reached");
    throw error;
  }
  if (!response.ok) throw new ApiError(await complaint(response), response.status);
  return response;
}

/** @param {Response} response @returns {Promise<string>} */
async function complaint(response) {
  const text = await response.text().catch(() => "");
  const wait = response.headers.get("Retry-After");
  const told = errorIn(text) ?? (response.statusText || "The server refused");
  return `${told} (${response.status}${wait ? `, try again in ${wait} s` : ""})`;
}

/** @param {string} text @returns {string | undefined} the message of an error, if the text holds one */
function errorIn(text) {
  try {
    const { error, detail } = JSON.parse(text);
    const told = error?.message ?? error ?? detail;
    return typeof told === "string" ? told : undefined;
  } catch {
    return undefined;
  }
}

/** @param {string} data of an event @returns {Piece} */
function pieceOf(data) {
  let chunk;
  try {
    chunk = JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that is no JSON");
  }
  if (chunk.error) throw new ApiError(errorIn(data) ?? "The server failed");
  const choice = chunk.choices?.[0];
  const { content, reasoning_content: reasoning } = choice?.delta ?? {};
  return {
    content: content ?? undefined,
    reasoning: reasoning ?? undefined,
    finish: choice?.finish_reason ?? undefined,
    usage: chunk.usage ?? undefined,
  };
}

/**
 * The data of server-sent events. Comments, such as heartbeats, are left out.
 * @param {ReadableStream<Uint8Array>} body
 * @returns {AsyncGenerator<string>}
 */
export async function* events(body) {
  const reader = body.pipeThrough(/** @type {any} */ (new TextDecoderStream())).getReader();
  let rest = "";
  try {
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      const blocks = (rest + part.value.replaceAll("\r", "")).split("\n\n");
      rest = blocks.pop() ?? "";
      yield* blocks.map(dataOf).filter((data) => data !== "");
    }
  } catch (error) {
    if (error instanceof TypeError) throw new ApiError("The connection was lost");
    throw error;
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {string} block @returns {string} */
function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).trimStart()).join("\n");
}
