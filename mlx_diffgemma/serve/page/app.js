// The page: its parts, one at a time, each loaded when it is first shown.

import {$, button, notice} from "./dom.js";
import {server} from "./server.js";
import {Side} from "./side.js";

const PARTS = {
  chat: () => import("./chat_part.js"),
  document: () => import("./document_part.js"),
  form: () => import("./form_part.js"),
  decide: () => import("./decide_part.js"),
  inside: () => import("./inside_part.js"),
  settings: () => import("./settings_part.js"),
};

const HEADER = /^[\x20-\x7e\xa0-\xff]+$/; // what a header can carry; others are no key of a server's

const app = {
  facts: null, // {model, models, canvas, context, images, thinking, settings}, once the server tells them
  inside: null, // the run that Look inside shows; null for the last one
  side: null,
  opened: new Map(),
  // The list of conversations, where the screen is narrow.
  openSide(isOpen) {
    document.body.classList.toggle("with-side", isOpen);
    for (const button of document.querySelectorAll(".narrow-only")) button.setAttribute("aria-expanded", String(isOpen));
  },
  async part(name) {
    if (!this.opened.has(name)) this.opened.set(name, PARTS[name]().then((module) => module.part(this)));
    return this.opened.get(name);
  },
};

function nameNow() {
  const name = location.hash.slice(1);
  return name in PARTS ? name : "chat";
}

async function show() {
  const name = nameNow();
  for (const link of $("nav").querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  document.body.dataset.part = name;
  $("side-part").replaceChildren(...(name === "chat" ? [app.side.element] : []));
  const part = await app.part(name);
  if (nameNow() !== name) return;
  const before = $("main").firstElementChild;
  if (before !== part.element) {
    app.showing?.hidden?.();
    app.showing = part;
    $("main").replaceChildren(part.element);
    scrollTo(0, 0);
  }
  document.title = `${$("nav").querySelector(`[href="#${name}"]`).textContent} · mlx_diffgemma`;
  part.shown?.();
  document.documentElement.dataset.shown = name;
}

async function learn() {
  try {
    const [{data}, told] = await Promise.all([server.json("/v1/models"), server.json("/x/settings")]);
    app.facts = {
      models: data.map((each) => each.id), model: data[0].id, canvas: data[0].canvas_length, context: data[0].context_length,
      ...told,
    };
    $("model").textContent = `${data[0].id} · canvas of ${data[0].canvas_length}`;
    $("model").title = data[0].id;
    for (const part of app.opened.values()) part.then((each) => each.learned?.());
    if (app.opened.has("chat")) {
      const chat = await app.part("chat");
      if (document.body.dataset.part === "chat") chat.images.offer(app.facts.images);
      if (!chat.turns.querySelector(".turn")) chat.show();
    }
    document.documentElement.dataset.ready = "yes";
  } catch (error) {
    if (error.status === 401) notice(error.message, "problem", button("Give the key", () => { notice(""); learn(); }));
    else if (error.status !== 0 && error.status !== 503) notice(error.message, "problem");
  }
}

// Asks for the key; null where the dialog is closed without one.
function askForKey(problem) {
  const dialog = $("key-dialog"), field = $("key-field");
  const tell = (words) => {
    $("key-problem").textContent = words;
    $("key-problem").hidden = !words;
  };
  tell(problem);
  field.value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", function closed() {
      const key = field.value.trim();
      if (dialog.returnValue === "use" && !HEADER.test(key)) {
        tell("No key has such characters.");
        dialog.returnValue = "";
        dialog.showModal();
        return;
      }
      dialog.removeEventListener("close", closed);
      resolve(dialog.returnValue === "use" ? key : null);
    });
  });
}

function showState() {
  if (server.state === "gone") notice("The server does not answer. This page waits for it; what you wrote stays.", "problem");
  else if (server.state === "loading") notice("The server loads its model.", "info");
  else {
    notice("");
    learn();
  }
}

server.askForKey = askForKey;
server.addEventListener("change", showState);
app.side = new Side(() => app.part("chat"));
addEventListener("hashchange", show);
addEventListener("click", (event) => {
  if (document.body.classList.contains("with-side") && !event.target.closest("#side, .narrow-only")) app.openSide(false);
});
document.querySelector(".skip").addEventListener("click", (event) => { // the hash names the part
  event.preventDefault();
  $("main").focus();
});
// A file that nothing takes is not opened in place of the page.
for (const kind of ["dragover", "drop"]) {
  addEventListener(kind, (event) => {
    if (event.defaultPrevented || ![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "none";
  });
}
await show();
performance.mark("shown");
app.side.refresh();
learn();
// What the first answer needs, once nothing else waits for it.
setTimeout(() => import("./markdown.js").catch(() => {}), 300);
