// Runs: what the server tells of one, row by row, kept for Look inside.

import {server} from "./server.js";
import {settings} from "./settings.js";

const KEPT = 6;
const BYTE = /^<0x([0-9A-F]{2})>$/;

// The last runs of this tab, the newest first.
export const runs = [];
export const changed = new EventTarget();

// A page that is left may live on unseen, with its streams: what nobody waits for is stopped.
const live = new Set();
addEventListener("pagehide", () => { for (const run of live) run.stop(); });

// One answer of a run: its steps and its settled text.
export class Row {
  steps = []; // as the server tells them
  canvases = []; // committed
  answer = "";
  thought = "";
  calls = [];
  broken = [];
  result = null; // of a fill, an edit or a form
  finished = null;
  prompt = null; // numbers of its reading

  get last() {
    return this.steps.at(-1) ?? null;
  }

  // The step whose canvas is not committed yet.
  get draft() {
    const last = this.last;
    return last && !(this.canvases.at(-1)?.step >= this.steps.length) && !this.finished ? last : null;
  }
}

export class Run {
  words = new Map();
  controls = new Set();
  rows = [];
  seed = null;
  model = "";
  maxSteps = 0;
  usage = null;
  state = "waiting"; // running, done, stopped, failed
  error = null;
  started = performance.now();
  #abort = new AbortController();

  constructor(task, body, prompt) {
    this.task = task;
    this.prompt = prompt;
    this.values = settings.values;
    this.body = {settings: this.values, ...body};
    const model = settings.get("model");
    if (model) this.body.model = model;
  }

  // Runs to the end; tells each event. Errors are kept in `error`.
  async go(onEvent) {
    runs.unshift(this);
    runs.length = Math.min(runs.length, KEPT);
    this.state = "running";
    live.add(this);
    changed.dispatchEvent(new Event("change"));
    try {
      for await (const event of server.events(this.body, this.#abort.signal)) {
        this.#take(event);
        onEvent(event);
      }
      this.state = "done";
    } catch (error) {
      this.state = error.name === "AbortError" ? "stopped" : "failed";
      if (this.state === "failed") this.error = error;
    }
    live.delete(this);
    changed.dispatchEvent(new Event("change"));
  }

  // Ends it: the server stops within a step.
  stop() {
    this.#abort.abort();
  }

  #take(event) {
    for (const [id, word] of Object.entries(event.words ?? {})) this.words.set(Number(id), word);
    for (const id of event.controls ?? []) this.controls.add(id);
    const row = this.rows[event.row];
    switch (event.event) {
      case "begin":
        Object.assign(this, {seed: event.seed, model: event.model, maxSteps: event.max_steps});
        this.rows = Array.from({length: event.rows}, () => new Row());
        break;
      case "prefill": row.prompt ??= event; break;
      case "step": row.steps.push(event); break;
      case "canvas": row.canvases.push({...event, step: row.steps.length}); break;
      case "text": row[event.channel] += event.text; break;
      case "tool_call": row.calls.push(event); break;
      case "broken_tool_call": row.broken.push(event); break;
      case "result": row.result = event; break;
      case "finished": row.finished = event; break;
      case "end": this.usage = event.usage; break;
    }
  }

  // The text of a draft's tokens of some kinds.
  text(step, kinds) {
    return this.tokens(step, kinds).map((token) => token.text).join("");
  }

  // The tokens of a step that are of some kinds ("at": see the server's Kinds). Bytes that are one
  // character together become one token.
  tokens(step, kinds = "at") {
    const found = [];
    let bytes = [];
    const flush = () => {
      found.push(...joined(bytes));
      bytes = [];
    };
    for (let i = 0; i < step.draft.length; i++) {
      const kind = step.kinds[i];
      if (!kinds.includes(kind)) {
        if (bytes.length) flush();
        if (kind === "e") break;
        continue;
      }
      const text = this.words.get(step.draft[i]) ?? "";
      const token = {
        at: i, text, kind,
        certainty: step.certainty[i],
        accepted: step.accepted[i] === 1,
        pinned: step.pinned?.[i] === 1,
      };
      const byte = text.length === 6 ? BYTE.exec(text) : null;
      if (byte) {
        bytes.push({...token, byte: parseInt(byte[1], 16)});
        continue;
      }
      if (bytes.length) flush();
      found.push(token);
    }
    if (bytes.length) flush();
    return found;
  }
}

const utf8 = new TextDecoder("utf-8", {fatal: true});

// Joins tokens of single bytes to characters; what is no character stays apart, as a mark.
function joined(tokens) {
  const found = [];
  for (let i = 0; i < tokens.length;) {
    const first = tokens[i].byte;
    const size = first < 0x80 ? 1 : first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : first >= 0xc2 ? 2 : 1;
    const part = tokens.slice(i, i + size);
    let text = null;
    try {
      text = utf8.decode(Uint8Array.from(part, (token) => token.byte));
    } catch { /* half a character */ }
    const taken = text === null ? [tokens[i]] : part;
    found.push({
      ...taken[0],
      text: text ?? "\ufffd",
      certainty: Math.min(...taken.map((token) => token.certainty)),
      accepted: taken.every((token) => token.accepted),
    });
    i += taken.length;
  }
  return found;
}

// The numbers of a run, for a line.
export function numbers(run) {
  const finished = run.rows.map((row) => row.finished).filter(Boolean);
  const sum = (name) => finished.reduce((total, each) => total + each[name], 0);
  const steps = run.rows.flatMap((row) => row.steps);
  const canvases = sum("canvases") || 1;
  const times = run.rows.flatMap((row) => row.steps.slice(1).map((step, i) => step.ms - row.steps[i].ms));
  times.sort((a, b) => a - b);
  return {
    tokens: sum("new_tokens"),
    steps: sum("steps") || steps.length,
    canvases,
    positions: sum("positions"),
    stepsPerCanvas: (sum("steps") || steps.length) / canvases,
    tokensPerForward: sum("steps") ? sum("new_tokens") / sum("steps") : 0,
    msPerStep: times.length ? times[times.length >> 1] : 0,
    promptTokens: run.rows[0]?.prompt?.prompt_tokens ?? 0,
    cachedTokens: run.rows[0]?.prompt?.cached_tokens ?? 0,
  };
}
