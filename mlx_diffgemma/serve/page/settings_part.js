// Settings: those of runs, with the help of the command's options, and those of chats.

import {button, growing, h, notice} from "./dom.js";
import {server} from "./server.js";
import {asTool, settings} from "./settings.js";

function words(name) {
  const text = name.replaceAll("_", " ");
  return text[0].toUpperCase() + text.slice(1);
}

class SettingsPart {
  constructor(app) {
    this.app = app;
    this.runs = h("div", {className: "fields"});
    this.chats = h("div", {className: "fields"});
    this.element = h("section", {className: "part settings", ariaLabel: "Settings"},
      h("header", {className: "toolbar"}, h("h1", {textContent: "Settings"}), h("span", {className: "tools"},
        button("Back to the defaults", () => { settings.set("values", {}); this.show(); }))),
      h("p", {className: "faint", textContent: "This browser keeps them. A field that is empty leaves its setting to the server."}),
      h("h2", {textContent: "Runs"}), this.runs, h("h2", {textContent: "Chats"}), this.chats);
    settings.addEventListener("change", () => { if (!this.element.contains(document.activeElement)) this.show(); });
  }

  learned() {
    this.show();
  }

  shown() {
    this.show();
  }

  show() {
    const {facts} = this.app;
    if (!facts) {
      this.runs.replaceChildren(h("p", {className: "faint", textContent: "The server has not told its settings yet."}));
      return;
    }
    const models = facts.models.length > 1 ? [this.model(facts.models)] : [];
    this.runs.replaceChildren(...models, ...facts.settings.map((each) => this.setting(each)));
    this.chats.replaceChildren(this.system(), this.thinking(facts.thinking), this.tools(), this.key());
  }

  field(name, help, control, problem = null) {
    control.id = `setting-${name}`;
    const about = h("p", {className: "faint small", id: `help-${name}`, textContent: help});
    control.setAttribute("aria-describedby", about.id);
    return h("div", {className: "setting"}, h("label", {htmlFor: control.id, textContent: words(name)}), control, about, problem);
  }

  setting(each) {
    const value = settings.values[each.name] ?? null;
    const byDefault = each.default === null ? "fresh" : String(each.default);
    const problem = h("p", {className: "problem small", hidden: true, attributes: {role: "alert"}});
    if (each.kind === "choice") {
      const control = h("select", {on: {change: () => settings.setValue(each.name, control.value || null)}},
        h("option", {value: "", textContent: `the server's (${byDefault})`}),
        each.choices.map((choice) => h("option", {value: choice, textContent: choice, selected: choice === value})));
      return this.field(each.name, each.help, control);
    }
    const control = h("input", {
      type: "number", value: value ?? "", placeholder: byDefault,
      step: each.kind === "int" ? 1 : "any", min: each.at_least ?? "", max: each.at_most ?? "",
      on: {change: () => {
        problem.hidden = control.validity.valid;
        problem.textContent = control.validationMessage;
        if (control.validity.valid) settings.setValue(each.name, control.value === "" ? null : Number(control.value));
      }},
    });
    return this.field(each.name, each.help, control, problem);
  }

  model(names) {
    const control = h("select", {on: {change: () => settings.set("model", control.value)}},
      names.map((name, i) => h("option", {value: i ? name : "", textContent: name, selected: name === settings.get("model")})));
    return this.field("model", "Which of the server's models writes.", control);
  }

  system() {
    const control = h("textarea", {rows: 2, value: settings.get("system"), dir: "auto", on: {change: () => settings.set("system", control.value)}});
    growing(control);
    return this.field("system prompt", "What the model is told before every conversation.", control);
  }

  thinking(byDefault) {
    const now = settings.get("thinking");
    const control = h("select", {on: {change: () => settings.set("thinking", {"": null, yes: true, no: false}[control.value])}},
      [["", `the server's (${byDefault ? "yes" : "no"})`], ["yes", "yes"], ["no", "no"]].map(([value, text]) =>
        h("option", {value, textContent: text, selected: value === {true: "yes", false: "no", null: ""}[now]})));
    return this.field("thinking", "Whether the model thinks before it answers; thoughts are folded away.", control);
  }

  tools() {
    const problem = h("p", {className: "problem small", hidden: true, attributes: {role: "alert"}});
    const control = h("textarea", {rows: 3, className: "mono", spellcheck: false, value: settings.get("tools"), placeholder: '[{"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}]', on: {change: () => {
      let wrong = "";
      try {
        const tools = JSON.parse(control.value || "[]");
        if (!Array.isArray(tools) || !tools.every((tool) => typeof asTool(tool).function?.name === "string")) wrong = "Tools are a list of functions, each with a name.";
      } catch (error) {
        wrong = `This is no JSON: ${error.message}`;
      }
      problem.hidden = !wrong;
      problem.textContent = wrong;
      if (!wrong) settings.set("tools", control.value);
    }}});
    growing(control);
    return this.field("tools", "Functions that the model may call, in OpenAI's form. The page shows a call and asks you for its result.", control, problem);
  }

  key() {
    const control = button(server.hasKey ? "Forget the key" : "No key is kept", () => {
      server.forgetKey();
      notice("The key is forgotten; the next request asks for it.");
      this.show();
    }, {disabled: !server.hasKey});
    return this.field("key", "This tab keeps the server's key until it is closed.", control);
  }
}

export async function part(app) {
  return new SettingsPart(app);
}
