// A conversation: a tree of turns, since an edited turn and a retried answer keep those before them.
//
// A turn is {id, role, children, chosen} and, of a user, `text` and perhaps `images`; of the
// assistant `text`, `thought`, `calls`, `stats`, `seed`, `state` and `error`; of tools, `results`.

export const FORMAT = "mlx_diffgemma.conversations/1";
export const IMAGE_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const ROLES = ["user", "assistant", "tool"];

export function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation() {
  return {id: newId(), title: "", created: Date.now(), updated: Date.now(), version: 0, root: {children: [], chosen: 0}};
}

// Returns the turns that are shown, from the first to the last.
export function path(conversation) {
  const turns = [];
  let turn = conversation.root;
  while (turn.children.length) {
    turn = turn.children[Math.min(turn.chosen, turn.children.length - 1)];
    turns.push(turn);
  }
  return turns;
}

export function parentOf(conversation, turn) {
  let parent = conversation.root;
  for (const each of path(conversation)) {
    if (each === turn) return parent;
    parent = each;
  }
  return null;
}

// Adds a turn behind another one, and shows it.
export function added(parent, turn) {
  const made = {id: newId(), children: [], chosen: 0, ...turn};
  parent.children.push(made);
  parent.chosen = parent.children.length - 1;
  return made;
}

export function lastOf(conversation) {
  return path(conversation).at(-1) ?? conversation.root;
}

// Returns messages as the server takes them, up to a turn.
export function messages(conversation, upTo, system) {
  const found = system.trim() ? [{role: "system", content: system}] : [];
  for (const turn of path(conversation)) {
    if (turn.role === "user") found.push({role: "user", content: contentOf(turn)});
    if (turn.role === "tool") {
      for (const result of turn.results) found.push({role: "tool", tool_call_id: result.id, content: result.content});
    }
    if (turn.role === "assistant") {
      const message = {role: "assistant", content: turn.text};
      if (turn.calls?.length) {
        message.tool_calls = turn.calls.map((call) => ({
          id: call.id, type: "function", function: {name: call.name, arguments: JSON.stringify(call.arguments)},
        }));
        if (turn.thought) message.reasoning_content = turn.thought;
      }
      found.push(message);
    }
    if (turn === upTo) break;
  }
  return found;
}

function contentOf(turn) {
  if (!turn.images?.length) return turn.text;
  const images = turn.images.map((url) => ({type: "image_url", image_url: {url}}));
  return turn.text ? [...images, {type: "text", text: turn.text}] : images;
}

export function titleOf({text, images}) {
  const line = (text || (images ? "Image" : "")).trim().split("\n")[0];
  return [...line].length > 48 ? [...line].slice(0, 47).join("") + "…" : line;
}

// Returns conversations of a file. What is in it is checked: it may come from anywhere.
export function imported(text) {
  let given;
  try {
    given = JSON.parse(text);
  } catch {
    throw new Error("this is no JSON file");
  }
  if (given?.format !== FORMAT || !Array.isArray(given.conversations)) {
    throw new Error(`its format is not ${FORMAT}`);
  }
  return given.conversations.map((one) => ({
    ...newConversation(),
    title: words(one?.title),
    created: number(one?.created),
    root: {children: turns(one?.root?.children), chosen: number(one?.root?.chosen)},
  }));
}

function turns(given) {
  return (Array.isArray(given) ? given : []).filter((turn) => ROLES.includes(turn?.role)).map((turn) => ({
    id: newId(),
    role: turn.role,
    text: words(turn.text),
    thought: words(turn.thought),
    calls: list(turn.calls).map((call) => ({id: words(call?.id), name: words(call?.name), arguments: call?.arguments ?? {}})),
    results: list(turn.results).map((result) => ({id: words(result?.id), name: words(result?.name), content: words(result?.content)})),
    images: list(turn.images).filter(isImage),
    stats: words(turn.stats),
    state: turn.state === "stopped" || turn.state === "failed" ? turn.state : "done",
    error: words(turn.error),
    children: turns(turn.children),
    chosen: number(turn.chosen),
  }));
}

const isImage = (url) => typeof url === "string" && IMAGE_TYPES.some((type) => url.startsWith(`data:${type};base64,`));
const list = (value) => Array.isArray(value) ? value : [];
const words = (value) => typeof value === "string" ? value : "";
const number = (value) => Number.isFinite(value) ? value : 0;
