// Form: a JSON object that fills from a text, with its structure given.

import {button, copied, eachFrame, growing, h, say, stopping} from "./dom.js";
import {Run} from "./run.js";
import {Canvas} from "./settle.js";
import {statsOf} from "./turns.js";

const EXAMPLES = {
  "A person": [
    {type: "object", properties: {name: {type: "string", maxLength: 20}, age: {type: "integer", minimum: 0, maximum: 150}}, required: ["name", "age"], additionalProperties: false},
    "Ada Lovelace was 36 when she died.",
  ],
  "A list, sorted": [
    {type: "object", properties: {least: {type: "integer", minimum: 0, maximum: 9}, is_sorted: {type: "boolean"}}, required: ["least", "is_sorted"], additionalProperties: false},
    "Sort: 6 3 1 7",
  ],
  "A meeting": [
    {type: "object", properties: {
      day: {enum: ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]},
      time: {type: "string", pattern: "^([01][0-9]|2[0-3]):[0-5][0-9]$"},
      remote: {type: "boolean"},
    }, required: ["day", "time", "remote"], additionalProperties: false},
    "See you on Thursday at half past nine, in the small room.",
  ],
  "A review": [
    {type: "object", properties: {
      stars: {type: "integer", minimum: 1, maximum: 5},
      about: {type: "array", items: {enum: ["food", "service", "price"]}, maxItems: 3},
    }, required: ["stars", "about"], additionalProperties: false},
    "The soup was wonderful, but we waited for an hour.",
  ],
};

class FormPart {
  run = null;
  update = eachFrame(() => this.draw());

  constructor() {
    this.schema = h("textarea", {id: "schema", className: "mono", rows: 8, spellcheck: false});
    this.text = h("textarea", {id: "form-text", rows: 4, dir: "auto"});
    growing(this.text);
    const pick = h("select", {id: "schema-example", on: {change: () => this.pick(pick.value)}},
      Object.keys(EXAMPLES).map((name) => h("option", {value: name, textContent: name})));
    this.go = h("button", {className: "primary", textContent: "Fill"});
    this.stop = button("Stop", stopping(() => this.run?.stop()), {hidden: true});
    this.problem = h("p", {className: "problem", hidden: true, attributes: {role: "alert"}});
    this.canvas = new Canvas();
    this.out = h("div", {className: "filled mono"}, h("p", {className: "faint", textContent: "The object comes here. Its keys stand from the first step on; its values settle."}));
    this.state = h("span", {className: "stats"});
    this.valid = h("p", {className: "valid", hidden: true});
    this.copy = button("Copy", () => copied(this.result, this.copy), {hidden: true});
    this.element = h("section", {className: "part form", ariaLabel: "Form"},
      h("header", {className: "toolbar"}, h("h1", {textContent: "Form"})),
      h("div", {className: "columns"},
        h("form", {className: "column", on: {submit: (event) => { event.preventDefault(); this.fill(); }}},
          h("p", {className: "labelled"}, h("label", {htmlFor: "schema-example", textContent: "Example"}), pick),
          h("label", {htmlFor: "schema", textContent: "JSON Schema"}), this.schema,
          h("label", {htmlFor: "form-text", textContent: "Text"}), this.text,
          this.problem,
          h("p", {className: "buttons"}, this.go, this.stop)),
        h("div", {className: "column"}, h("h2", {textContent: "Object"}), this.out, this.valid,
          h("p", {className: "buttons"}, this.copy, this.state))));
    this.pick(Object.keys(EXAMPLES)[0]);
  }

  pick(name) {
    const [schema, text] = EXAMPLES[name];
    this.schema.value = JSON.stringify(schema, null, 2);
    this.text.value = text;
  }

  fail(message) {
    this.problem.hidden = !message;
    this.problem.textContent = message;
  }

  async fill() {
    if (this.run?.state === "running") return;
    let schema;
    this.fail("");
    try {
      schema = JSON.parse(this.schema.value);
    } catch (error) {
      return this.fail(`The schema is no JSON: ${error.message}`);
    }
    if (schema === null || typeof schema !== "object" || Array.isArray(schema)) return this.fail("The schema must be a JSON object.");
    this.valid.hidden = this.copy.hidden = true;
    this.swap(this.go, this.stop);
    this.state.textContent = "Reading";
    this.canvas.clear();
    this.out.replaceChildren(this.canvas.element);
    this.out.setAttribute("aria-busy", "true");
    const run = this.run = new Run("form", {form: {schema, text: this.text.value}}, this.text.value);
    await run.go(() => this.update());
    this.swap(this.stop, this.go);
    this.out.removeAttribute("aria-busy");
    this.state.textContent = run.state === "stopped" ? "Stopped." : statsOf(run);
    if (run.state === "failed") return this.fail(run.error.message);
    if (run.state === "done") await this.finish(run.rows[0]);
  }

  // Puts one button in the place of another, with the focus.
  swap(from, to) {
    const isHeld = document.activeElement === from;
    from.hidden = true;
    to.hidden = false;
    if (isHeld) to.focus();
  }

  draw() {
    const row = this.run.rows[0], step = row?.last;
    if (!step || this.run.state !== "running") return;
    this.canvas.draw(this.run.tokens(step, "atc"));
    const looks = step.trial && !step.trial.final;
    this.state.textContent = looks ? "finding the lengths" : `step ${step.step + 1} of at most ${this.run.maxSteps}`;
  }

  async finish(row) {
    this.result = row.result ? row.result.text : row.answer;
    const isValid = row.result ? row.result.valid : row.finished?.constraint === "kept";
    const {colouredJson} = await import("./markdown.js");
    this.out.replaceChildren(await colouredJson(this.result));
    this.valid.hidden = this.copy.hidden = false;
    this.valid.classList.toggle("problem", !isValid);
    this.valid.textContent = isValid ? "✓ It fits the schema: the server checked it." : "It does not fit the schema: where keys depend on each other, their structure cannot be given.";
    say(`${this.result} ${this.valid.textContent}`);
  }
}

export async function part() {
  return new FormPart();
}
