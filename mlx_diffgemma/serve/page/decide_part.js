// Decide: questions about a text, each answered within one step, as bars of probabilities.

import {button, counted, growing, h, say} from "./dom.js";
import {server} from "./server.js";
import {settings} from "./settings.js";

const KINDS = {predicate: "Yes or no", choice: "One of", score: "On a scale"};
const FIRST = [
  {type: "predicate", instructions: "Is this urgent?", options: ""},
  {type: "choice", instructions: "Who should read it?", options: "sales, support, nobody"},
  {type: "score", instructions: "How friendly is it?", options: "not at all, somewhat, very"},
];

// Returns a question's bars from an answer in OpenAI's form: pairs of an option and a probability.
export function bars(answer, options) {
  if (answer.type === "predicate") return [["yes", answer.probability], ["no", 1 - answer.probability]];
  return answer.probabilities.map((each, i) => [options[i], each.probability]);
}

class DecidePart {
  abort = null;

  constructor() {
    this.text = h("textarea", {id: "decide-text", rows: 5, dir: "auto", value: "The printer on the second floor smokes. Please send somebody before noon."});
    growing(this.text);
    this.questions = h("ol", {className: "questions"});
    this.problem = h("p", {className: "problem", hidden: true, attributes: {role: "alert"}});
    this.state = h("span", {className: "stats"});
    this.go = h("button", {className: "primary", textContent: "Decide"});
    this.adds = button("Add a question", () => this.add({type: "predicate", instructions: "", options: ""}).focus());
    this.element = h("section", {className: "part decide", ariaLabel: "Decide"},
      h("header", {className: "toolbar"}, h("h1", {textContent: "Decide"})),
      h("form", {on: {submit: (event) => { event.preventDefault(); this.decide(); }}},
        h("label", {htmlFor: "decide-text", textContent: "Text"}), this.text,
        h("h2", {textContent: "Questions"}), this.questions, this.problem,
        h("p", {className: "buttons"}, this.go, this.adds, this.state)));
    this.note = h("p", {className: "faint small", hidden: true, textContent: "The small model that comes with mlx_diffgemma was never trained on questions: its answers mean nothing, and its confidence shows that."});
    this.element.querySelector("form").before(this.note);
    FIRST.forEach((each) => this.add(each));
  }

  learned() {
    this.note.hidden = this.app.facts?.model !== "bundled";
  }

  shown() {
    this.learned();
  }

  add(question) {
    const kind = h("select", {ariaLabel: "Kind of question"}, Object.entries(KINDS).map(([value, text]) => h("option", {value, textContent: text, selected: value === question.type})));
    const asked = h("input", {type: "text", value: question.instructions, ariaLabel: "Question", placeholder: "Question", dir: "auto", required: true});
    const options = h("input", {type: "text", value: question.options, ariaLabel: "Choices, with commas between", placeholder: "choices, with commas between", dir: "auto"});
    const show = () => { options.hidden = kind.value === "predicate"; };
    kind.addEventListener("change", show);
    show();
    const out = h("div", {className: "bars"});
    const item = h("li", {className: "question"},
      h("div", {className: "asked"}, asked, kind, options, button("×", () => {
        const next = item.nextElementSibling ?? item.previousElementSibling;
        item.remove();
        (next ? next.querySelector("button") : this.adds).focus();
      }, {className: "quiet", ariaLabel: "Remove this question"})), out);
    item.read = () => ({kind: kind.value, text: asked.value, options: options.value.split(",").map((each) => each.trim()).filter(Boolean)});
    item.out = out;
    this.questions.append(item);
    return asked;
  }

  async decide() {
    const items = [...this.questions.children];
    this.problem.hidden = true;
    if (!items.length) return;
    const questions = items.map((item) => {
      const {kind, text, options} = item.read();
      if (kind === "choice") return {type: kind, instructions: text, choices: options.map((value) => ({value}))};
      if (kind === "score") return {type: kind, instructions: text, levels: options.map((label) => ({label}))};
      return {type: kind, instructions: text};
    });
    const isHeld = document.activeElement === this.go;
    this.go.disabled = true;
    this.state.textContent = "Deciding";
    const started = performance.now();
    try {
      const body = {input: this.text.value, questions, ...(settings.get("model") && {model: settings.get("model")})};
      const told = await server.json("/v1/decisions", {method: "POST", body});
      const found = told.answers.map((answer, i) => bars(answer, items[i].read().options));
      told.answers.forEach((answer, i) => this.show(items[i].out, found[i], answer, told.usage.diffusion.answers[i]));
      const {steps, total_ms: ms} = told.usage.diffusion;
      this.state.textContent = `${counted(steps, "step")}, one for each question · ${Math.round(ms)} ms`;
      say(`${counted(items.length, "answer")} after ${Math.round(performance.now() - started)} milliseconds: ${found.map((each) => each.toSorted((a, b) => b[1] - a[1])[0][0]).join(", ")}`);
    } catch (error) {
      this.state.textContent = "";
      this.problem.textContent = error.message;
      this.problem.hidden = false;
    }
    this.go.disabled = false;
    if (isHeld) this.go.focus(); // a disabled button loses it
  }

  show(out, found, answer, about) {
    const best = Math.max(...found.map(([, p]) => p));
    const rows = found.map(([name, p]) => {
      const bar = h("span", {className: "bar"});
      bar.style.width = `${Math.max(0.5, 100 * p)}%`;
      return h("tr", {className: p === best ? "best" : ""},
        h("th", {textContent: name, attributes: {scope: "row"}, dir: "auto"}),
        h("td", {className: "track", attributes: {"aria-hidden": "true"}}, bar),
        h("td", {className: "number", textContent: `${(100 * p).toFixed(1)}%`}));
    });
    const value = answer.type === "score" ? `expected value ${Number(answer.score).toFixed(2)} · ` : "";
    out.replaceChildren(
      h("table", {}, h("caption", {className: "unseen", textContent: "Probabilities"}), h("tbody", {}, rows)),
      h("p", {className: "faint small", textContent: `${value}confidence ${(100 * about.confidence).toFixed(1)}%`}));
  }
}

export async function part(app) {
  const made = new DecidePart();
  made.app = app;
  return made;
}
