// Look inside: the last runs step by step, in the view of the trace page, and their numbers.

import {h} from "./dom.js";
import {changed, numbers, runs} from "./run.js";
import {BANDS} from "./settle.js";
import {TraceView} from "./trace_view.js";

const THOUSANDTHS = 1000;
const NAMES = {chat: "Chat", fill: "Template", edit: "Edit", form: "Form"};

// Returns a row of a run as the trace view reads it.
export function traced(run, row) {
  const words = [], places = new Map();
  const place = (id) => {
    if (!places.has(id)) {
      places.set(id, words.length);
      words.push(run.words.get(id) ?? `<${id}>`);
    }
    return places.get(id);
  };
  const canvases = [], k = Math.max(0, ...row.steps.map((step) => step.candidates?.[0]?.length ?? 0));
  const columns = {accepted: [], certainty: [], entropy: [], draft: [], candidates: Array.from({length: k}, () => [[], []])};
  let before = null;
  for (const step of row.steps) {
    const isNew = !before || before.canvas !== step.canvas || JSON.stringify(before.trial) !== JSON.stringify(step.trial);
    if (isNew) canvases.push({canvas: step.canvas, trial: step.trial ?? null, text: null, steps: []});
    const canvas = canvases.at(-1), last = canvas.steps.at(-1);
    const pinned = step.pinned ?? step.draft.map(() => 0);
    const free = pinned.filter((one) => !one).length;
    canvas.steps.push({
      step: step.step,
      attempt: last ? last.attempt + (step.step <= last.step) : 0,
      accepted_tokens: step.accepted.filter((one, i) => one && !pinned[i]).length,
      free_tokens: free,
      mean_entropy: free ? step.entropy.reduce((sum, one, i) => sum + (pinned[i] ? 0 : one), 0) / THOUSANDTHS / free : 0,
      width: step.draft.length,
    });
    columns.accepted.push(...step.accepted.map((one, i) => one + 2 * pinned[i]));
    columns.certainty.push(...step.certainty);
    columns.entropy.push(...step.entropy);
    columns.draft.push(...step.draft.map(place));
    for (let c = 0; c < k; c++) {
      columns.candidates[c][0].push(...step.draft.map((_, i) => place(step.candidates?.[i]?.[c]?.[0] ?? step.draft[i])));
      columns.candidates[c][1].push(...step.draft.map((_, i) => step.candidates?.[i]?.[c]?.[1] ?? 0));
    }
    before = step;
  }
  for (const committed of row.canvases) {
    const canvas = canvases.findLast((each) => each.canvas === committed.canvas);
    if (canvas) canvas.text = committed.tokens.map((id) => run.words.get(id) ?? "").join("");
  }
  const {seed: _, ...given} = run.values; // the row's own is told
  return {
    model: run.model, seed: run.seed + run.rows.indexOf(row), prompt: run.prompt, settings: given, complete: run.state === "done",
    text: {answer: row.result?.text ?? row.answer}, bands: BANDS.map((limit) => limit / THOUSANDTHS), thousandths: THOUSANDTHS,
    candidates: k, canvases, words, columns,
    controls: [...places].filter(([id]) => run.controls.has(id)).map(([, at]) => at),
  };
}

class InsidePart {
  view = null;
  shownRun = null;

  constructor(app) {
    this.app = app;
    this.pick = h("select", {id: "run-choice", on: {change: () => { app.inside = runs[this.pick.value]; this.show(); }}});
    this.row = h("select", {id: "row-choice", on: {change: () => this.show()}});
    this.figures = h("dl", {className: "figures"});
    this.root = h("div", {className: "trace"});
    this.empty = h("div", {}, h("header", {className: "toolbar"}, h("h1", {textContent: "Look inside"})), h("p", {className: "faint", textContent: "Nothing has run in this tab yet. Ask something in Chat, then come back: every step of the answer is here."}));
    this.hint = h("p", {className: "faint small"}, "To see the likeliest tokens of each position, set ", h("a", {href: "#settings", textContent: "top candidates"}), " for the next run.");
    this.head = h("p", {className: "labelled"},
      h("label", {htmlFor: "run-choice", textContent: "Run"}), this.pick,
      this.rowLabel = h("label", {htmlFor: "row-choice", textContent: "Row"}), this.row);
    this.element = h("section", {className: "part inside", ariaLabel: "Look inside"}, this.empty, this.head, this.figures, this.root, this.hint);
    changed.addEventListener("change", () => { if (this.element.isConnected) this.refresh(); });
  }

  shown() {
    this.refresh();
  }

  hidden() {
    this.view?.close();
    this.view = null;
    this.shownRun = null;
  }

  refresh() {
    const found = runs.filter((run) => run.rows.some((row) => row.steps.length));
    const run = found.includes(this.app.inside) ? this.app.inside : found[0];
    this.empty.hidden = Boolean(run);
    this.head.hidden = this.figures.hidden = this.root.hidden = this.hint.hidden = !run;
    if (!run) return;
    this.pick.replaceChildren(...found.map((each) => h("option", {
      value: runs.indexOf(each), selected: each === run,
      textContent: `${NAMES[each.task]}: ${each.prompt.split("\n")[0].slice(0, 50) || "no words"}`,
    })));
    const at = this.shownRun === run ? this.row.value : 0;
    this.row.replaceChildren(...run.rows.map((row, i) => h("option", {value: i, textContent: `${i + 1} of ${run.rows.length}`, selected: i === Number(at)})));
    this.row.hidden = this.rowLabel.hidden = run.rows.length < 2;
    this.app.inside = run;
    if (this.shownRun !== run || run.state === "running") this.show();
  }

  show() {
    const run = this.app.inside, row = run.rows[Number(this.row.value)] ?? run.rows[0];
    this.shownRun = run;
    this.view?.close();
    this.view = new TraceView(this.root);
    this.view.show(traced(run, row));
    this.hint.hidden = row.steps.some((step) => step.candidates);
    const n = numbers(run);
    const figure = (name, value) => h("div", {}, h("dt", {textContent: name}), h("dd", {textContent: value}));
    this.figures.replaceChildren(
      figure("steps per canvas", n.stepsPerCanvas.toFixed(1)),
      figure("rows × steps", n.positions ? `${run.rows.length} × ${Math.round(n.steps / run.rows.length)}` : "–"),
      figure("positions computed", n.positions.toLocaleString("en")),
      figure("tokens per forward", n.tokensPerForward.toFixed(1)),
      figure("ms per step", n.msPerStep.toFixed(0)),
      figure("new tokens", n.tokens.toLocaleString("en")),
      figure("prompt tokens", `${n.promptTokens}${n.cachedTokens ? `, ${n.cachedTokens} known` : ""}`));
  }
}

export async function part(app) {
  if (!document.querySelector("link[data-trace]")) {
    document.head.append(h("link", {rel: "stylesheet", href: "/page/trace.css", data: {trace: ""}}));
  }
  return new InsidePart(app);
}
