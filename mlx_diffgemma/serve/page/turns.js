// How turns of a conversation look, at rest and while they are written.

import {button, copied, counted, eachFrame, growing, h, say} from "./dom.js";
import {thumbnails} from "./images.js";
import {numbers} from "./run.js";
import {Canvas} from "./settle.js";

const markdown = () => import("./markdown.js");

// Returns the line of a run's numbers.
export function statsOf(run) {
  const n = numbers(run);
  if (!n.steps) return "";
  const words = [counted(n.tokens, "token"), counted(n.steps, "step")];
  if (n.canvases > 1) words.push(`${n.canvases} canvases`);
  if (n.tokens) words.push(`${n.tokensPerForward.toFixed(1)} tokens/forward`);
  if (n.msPerStep) words.push(`${n.msPerStep.toFixed(0)} ms/step`);
  words.push(`seed ${run.seed}`);
  return words.join(" · ");
}

// Puts Markdown into an element; plain text until the renderer is there.
export async function fillMarkdown(into, text) {
  into.dataset.text = text;
  if (!into.childNodes.length) into.textContent = text;
  try {
    const {rendered} = await markdown();
    const made = await rendered(text);
    if (into.dataset.text === text) into.replaceChildren(made);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    into.textContent = text; // the renderer did not come: the server is gone
  }
}

function versions(turn, siblings, choose) {
  if (siblings.length < 2) return null;
  const at = siblings.indexOf(turn);
  const step = (by, text, said) => button(text, () => choose(at + by), {
    className: "quiet", ariaLabel: said, disabled: at + by < 0 || at + by >= siblings.length,
  });
  return h("span", {className: "versions"},
    step(-1, "‹", "the version before"), h("span", {textContent: `${at + 1}/${siblings.length}`}), step(1, "›", "the next version"));
}

export function userTurn(turn, siblings, act) {
  const text = h("div", {className: "said", textContent: turn.text, dir: "auto", hidden: !turn.text});
  const images = h("div", {className: "images"}, (turn.images ?? []).map((src, i) => h("img", {src, alt: `Image ${i + 1}`})));
  const box = h("article", {className: "turn user", ariaLabel: "You"},
    turn.images?.length ? images : null, text,
    h("footer", {}, versions(turn, siblings, (i) => act.choose(turn, i)), button("Edit", () => edit(), {className: "quiet"})));
  function edit() {
    const field = h("textarea", {value: turn.text, rows: 1, ariaLabel: "Your message", dir: "auto"});
    const kept = [...(turn.images ?? [])], strip = h("div", {className: "images"});
    const send = () => act.edit(turn, field.value, kept);
    const cancel = () => { act.edited = null; act.show(); };
    act.edited = {turn, element: box};
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") { event.stopPropagation(); cancel(); }
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
    });
    growing(field);
    thumbnails(strip, kept, field);
    images.remove();
    text.replaceWith(h("div", {className: "editing"}, strip, field,
      h("p", {className: "buttons"}, button("Send", send, {className: "primary"}), button("Cancel", cancel))));
    box.querySelector("footer").hidden = true;
    field.focus();
  }
  return box;
}

export function toolTurn(turn) {
  return h("article", {className: "turn tool", ariaLabel: "Results of tools"}, turn.results.map((result) =>
    h("details", {className: "call", open: true}, h("summary", {}, "Result of ", h("code", {textContent: result.name})),
      h("pre", {textContent: result.content, tabIndex: 0}))));
}

function callCard(call) {
  return h("details", {className: "call", open: true},
    h("summary", {}, "Calls ", h("code", {textContent: call.name})),
    h("pre", {textContent: JSON.stringify(call.arguments, null, 2), tabIndex: 0}));
}

// Asks for the results of calls: a tool runs wherever its user runs it.
function resultForm(turn, act) {
  const fields = turn.calls.map((call) => h("textarea", {rows: 2, ariaLabel: `Result of ${call.name}`, placeholder: `Result of ${call.name}`}));
  fields.forEach(growing);
  return h("form", {className: "results", on: {submit: (event) => {
    event.preventDefault();
    act.results(turn, fields.map((field) => field.value));
  }}}, fields, h("p", {className: "buttons"}, h("button", {className: "primary", textContent: turn.calls.length > 1 ? "Send the results" : "Send the result"})));
}

export function thoughtBox(text, isOpen = false) {
  return h("details", {className: "thought", open: isOpen}, h("summary", {textContent: "Thought"}), h("div", {className: "thinking", textContent: text, dir: "auto"}));
}

export function assistantTurn(turn, siblings, act, isLast) {
  const answer = h("div", {className: "answer markdown", dir: "auto"});
  if (turn.text) fillMarkdown(answer, turn.text);
  const copy = button("Copy", () => copied(turn.text, copy), {className: "quiet"});
  const isEmpty = turn.state === "done" && !turn.text && !turn.calls?.length;
  const problem = isEmpty ? "The answer is empty." : turn.state === "failed" ? `Not finished: ${turn.error}` : turn.state === "running" ? "Not finished: its tab was closed, or is still at it." : turn.state === "stopped" ? "Stopped." : turn.state === "length" ? "Cut: the limit of tokens was reached." : "";
  return h("article", {className: "turn assistant", ariaLabel: "Answer"},
    turn.thought ? thoughtBox(turn.thought) : null,
    answer,
    (turn.calls ?? []).map(callCard),
    turn.calls?.length && isLast ? resultForm(turn, act) : null,
    problem ? h("p", {className: turn.state === "failed" ? "problem" : "faint small", textContent: problem}) : null,
    h("footer", {},
      versions(turn, siblings, (i) => act.choose(turn, i)),
      turn.text ? copy : null,
      button("Retry", () => act.retry(turn), {className: "quiet"}),
      act.hasRun(turn) ? h("a", {className: "quiet", href: "#inside", textContent: "Look inside", on: {click: () => act.inside(turn)}}) : null,
      turn.stats ? h("span", {className: "stats", textContent: turn.stats}) : null));
}

// An answer that is being written: firm Markdown, its last lines, and the canvas that settles.
export class SettlingTurn {
  #canvas = new Canvas();
  #thoughts = new Canvas();
  #firm = h("div", {className: "markdown firm", dir: "auto"});
  #tail = h("span", {className: "tail"});
  #open = h("div", {className: "open", dir: "auto"}, this.#tail, this.#canvas.element);
  #thought = h("span");
  #thoughtBox = h("details", {className: "thought", hidden: true},
    h("summary", {textContent: "Thinking"}), h("div", {className: "thinking", dir: "auto"}, this.#thought, this.#thoughts.element));
  #state = h("span", {className: "stats", textContent: "Reading"});
  #calls = h("div");
  #settled = 0; // characters of the answer that are said and placed
  #placing = Promise.resolve();
  update = eachFrame(() => this.#draw());

  constructor(run, stop, drawn) {
    this.run = run;
    this.drawn = drawn;
    this.element = h("article", {className: "turn assistant running", ariaLabel: "Answer", attributes: {"aria-busy": "true"}},
      this.#thoughtBox, this.#firm, this.#open, this.#calls,
      h("footer", {}, button("Stop", stop, {className: "quiet stop"}), this.#state));
    this.update();
  }

  #draw() {
    const row = this.run.rows[0];
    if (!row) return;
    const draft = row.draft;
    const tokens = draft ? this.run.tokens(draft, "act") : [];
    this.#canvas.draw(tokens.filter((token) => token.kind !== "t"));
    this.#thoughts.draw(tokens.filter((token) => token.kind === "t"));
    this.#thought.textContent = row.thought;
    this.#thoughtBox.hidden = !row.thought && !tokens.some((token) => token.kind === "t");
    if (row.answer.length !== this.#settled) this.#place(row.answer);
    if (row.calls.length !== this.#calls.childElementCount) this.#calls.replaceChildren(...row.calls.map(callCard));
    this.#state.textContent = this.#words(row, draft);
    this.drawn();
  }

  #words(row, draft) {
    if (!draft) return row.steps.length ? `canvas ${row.canvases.length + 1}` : row.prompt ? `read ${counted(row.prompt.prompt_tokens, "token")}` : "Reading";
    const accepted = draft.accepted.reduce((sum, one) => sum + one, 0);
    return `canvas ${draft.canvas + 1} · step ${draft.step + 1} of at most ${this.run.maxSteps} · ${Math.round(100 * accepted / draft.accepted.length)}% accepted`;
  }

  // Takes settled text: whole blocks become Markdown, the rest stands before the canvas.
  #place(answer) {
    say(answer.slice(this.#settled));
    this.#settled = answer.length;
    this.#placing = this.#placing.then(async () => {
      const {settledPart} = await markdown().catch(() => ({settledPart: (text) => ["", text]}));
      const [firm, rest] = settledPart(answer);
      if (firm !== (this.#firm.dataset.text ?? "")) await fillMarkdown(this.#firm, firm);
      this.#tail.textContent = rest.replace(/^\n+/, "");
      this.drawn();
    });
  }
}
