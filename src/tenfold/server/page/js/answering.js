// Lets the server write answers into messages. Answers go on while another conversation is looked at.

import { ApiError, streamAnswer } from "./api.js";
import { countsOf } from "./stats.js";

/** @typedef {import("./conversation.js").Message} Message */
/** @typedef {import("./api.js").Piece} Piece */

const SAVE_EVERY = 500; // milliseconds, while an answer grows

export class Answering {
  /**
   * @param {(message: Message) => void} changed called for every piece, and when the answer has ended
   * @param {(message: Message) => Promise<unknown>} save
   */
  constructor(changed, save) {
    this.changed = changed;
    this.save = save;
    /** @type {Map<string, {controller: AbortController, ended: Promise<void>}>} by conversation */
    this.running = new Map();
  }

  /** @param {string} conversation */
  runs(conversation) {
    return this.running.has(conversation);
  }

  /** Resolves once what had come is saved. @param {string} conversation */
  async stop(conversation) {
    const answer = this.running.get(conversation);
    answer?.controller.abort();
    await answer?.ended;
  }

  /**
   * Resolves when the answer has ended, however it did.
   * @param {Message} answer empty yet
   * @param {Record<string, unknown>} request
   * @param {string} apiKey
   */
  write(answer, request, apiKey) {
    const controller = new AbortController();
    const ended = this.fill(answer, streamAnswer(request, apiKey, controller.signal));
    this.running.set(answer.conversation, { controller, ended });
    return ended;
  }

  /** @param {Message} answer @param {AsyncGenerator<Piece>} pieces */
  async fill(answer, pieces) {
    const clock = new Clock();
    const saving = setInterval(() => this.save({ ...answer, state: "stopped" }), SAVE_EVERY); // should the page be closed
    try {
      let finish;
      for await (const piece of pieces) {
        this.take(answer, piece, clock);
        finish = piece.finish ?? finish;
      }
      answer.state = finish === "length" ? "length" : "done";
    } catch (error) {
      settle(answer, error);
    } finally {
      clearInterval(saving);
      this.running.delete(answer.conversation);
      answer.stats = { ...answer.stats, ...clock.times() };
      this.changed(answer);
      await this.save(answer);
    }
  }

  /** @param {Message} answer @param {Piece} piece @param {Clock} clock */
  take(answer, piece, clock) {
    if (piece.usage) answer.stats = { ...answer.stats, ...countsOf(piece.usage) };
    if (!piece.content && !piece.reasoning) return;
    clock.mark(Boolean(piece.content));
    answer.content += piece.content ?? "";
    if (piece.reasoning) answer.reasoning = (answer.reasoning ?? "") + piece.reasoning;
    answer.stats = { ...answer.stats, ...clock.times() };
    this.changed(answer);
  }
}

/** @param {Message} answer @param {unknown} error */
function settle(answer, error) {
  if (error instanceof DOMException && error.name === "AbortError") {
    answer.state = "stopped";
    return;
  }
  if (!(error instanceof ApiError)) console.error(error);
  answer.state = "failed";
  answer.error = error instanceof Error ? error.message : String(error);
}

/** When an answer was asked for, begun and continued. */
class Clock {
  constructor() {
    this.asked = performance.now();
    this.first = this.content = this.last = 0;
  }

  /** @param {boolean} isContent not reasoning */
  mark(isContent) {
    this.last = performance.now();
    this.first ||= this.last;
    if (isContent) this.content ||= this.last;
  }

  times() {
    if (!this.first) return {};
    const { asked, first, content, last } = this;
    return { firstMs: first - asked, writingMs: last - first, reasoningMs: (content || last) - first };
  }
}
