// Elements, and what all parts share of the page around them.

// Returns an element with properties, attributes where the value is under `attributes`, and
// children: nodes, texts, or nothing for null and false.
export function h(name, properties = {}, ...children) {
  const {attributes = {}, data = {}, on = {}, ...own} = properties;
  const made = Object.assign(document.createElement(name), own);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  Object.assign(made.dataset, data);
  for (const [kind, act] of Object.entries(on)) made.addEventListener(kind, act);
  made.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

export function button(text, act, properties = {}) {
  return h("button", {type: "button", textContent: text, on: {click: act}, ...properties});
}

// Returns an act for a button that takes the place of the one that starts: the second click of a
// double click does not stop what the first has started.
export function stopping(act) {
  return (event) => { if (event.detail < 2) act(); };
}

export const $ = (id) => document.getElementById(id);

// Says something to a screen reader: settled text and results, never drafts.
export function say(text) {
  if (!text.trim()) return;
  const said = h("p", {textContent: text});
  $("live").append(said);
  while ($("live").childElementCount > 20) $("live").firstElementChild.remove();
}

// Shows a line above the part, with an action where there is one; "" hides it.
export function notice(text, kind = "info", action = null) {
  const line = $("notice");
  line.hidden = !text;
  line.dataset.kind = kind;
  line.replaceChildren(text, ...(action ? [" ", action] : []));
}

// Copies a text and says so on the button.
export async function copied(text, from) {
  const before = from.dataset.says ??= from.textContent; // it may be pressed twice
  try {
    await navigator.clipboard.writeText(text);
    from.textContent = "Copied";
  } catch {
    const field = h("textarea", {value: text, className: "unseen"});
    document.body.append(field);
    field.select();
    from.textContent = document.execCommand("copy") ? "Copied" : "Not copied";
    field.remove();
  }
  setTimeout(() => { from.textContent = before; }, 1500);
}

// Lets a text field grow with its text, up to what the style allows.
export function growing(field) {
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  field.addEventListener("input", grow);
  let width = 0; // that the height was found for: lines break anew in another
  new ResizeObserver(() => {
    if (field.clientWidth === width) return;
    width = field.clientWidth;
    grow();
  }).observe(field);
  return grow;
}

export function counted(count, one) {
  return `${count.toLocaleString("en")} ${one}${count === 1 ? "" : "s"}`;
}

// Lets an act run once before the next frame, however often it is asked for.
export function eachFrame(act) {
  let waits = false;
  return () => {
    if (waits) return;
    waits = true;
    const run = () => { waits = false; act(); };
    if (document.hidden) setTimeout(run, 100);
    else requestAnimationFrame(run);
  };
}
