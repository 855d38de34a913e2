// What this browser keeps of settings: values of a run, and of chats.

const NAME = "mlx_diffgemma.settings";
const FRESH = {values: {}, system: "", thinking: null, tools: ""};

function kept() {
  try {
    return {...FRESH, ...JSON.parse(localStorage.getItem(NAME) ?? "{}")};
  } catch {
    return {...FRESH};
  }
}

class Settings extends EventTarget {
  #now = kept();

  constructor() {
    super();
    addEventListener("storage", (event) => { // another tab has changed them
      if (event.key !== NAME) return;
      this.#now = kept();
      this.dispatchEvent(new Event("change"));
    });
  }

  get(name) {
    return this.#now[name];
  }

  set(name, value) {
    this.#now[name] = value;
    try {
      localStorage.setItem(NAME, JSON.stringify(this.#now));
    } catch { /* a browser that keeps nothing has them for this tab */ }
    this.dispatchEvent(new Event("change"));
  }

  // Values of a run, without those that are left to the server.
  get values() {
    return {...this.#now.values};
  }

  setValue(name, value) {
    const values = this.values;
    if (value === null) delete values[name];
    else values[name] = value;
    this.set("values", values);
  }

  // Tools of chats as the server takes them; undefined where there are none.
  get tools() {
    try {
      const tools = JSON.parse(this.#now.tools || "[]");
      return Array.isArray(tools) && tools.length ? tools.map(asTool) : undefined;
    } catch {
      return undefined;
    }
  }

  // The values in one line, for display.
  line() {
    return Object.entries(this.#now.values).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`).join(" · ");
  }
}

// A tool may be given as its function alone.
export function asTool(tool) {
  return tool.type === "function" ? tool : {type: "function", function: tool};
}

export const settings = new Settings();
