// Images beside a message: dropped, pasted or chosen, where the model sees.

import {IMAGE_TYPES} from "./conversation.js";
import {button, counted, h, notice, say} from "./dom.js";

const ROOM = 1e5; // bytes of a request beside its images
const SEES_NOT = "This model reads no images.";

// Returns the type of an image by its first bytes, since names and types lie; null for no image.
export function typeOf(head) {
  const text = String.fromCharCode(...head);
  if (text.startsWith("\x89PNG")) return "image/png";
  if (text.startsWith("\xff\xd8\xff")) return "image/jpeg";
  if (text.startsWith("GIF8")) return "image/gif";
  return text.startsWith("RIFF") && text.slice(8, 12) === "WEBP" ? "image/webp" : null;
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

const hasFiles = (transfer) => [...transfer.types].includes("Files");
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

// Returns an image as a `data:` URL. Errors say what to do.
async function read(file, {max_image_pixels: most}) {
  const type = typeOf(new Uint8Array(await file.slice(0, 12).arrayBuffer()));
  if (!type) throw new Error(`${file.name} is no image that is read: PNG, JPEG, WebP or GIF.`);
  const blob = file.slice(0, file.size, type);
  const bitmap = await createImageBitmap(blob).catch(() => null);
  if (!bitmap) throw new Error(`${file.name} is damaged, or too large for this browser.`);
  const {width, height} = bitmap;
  bitmap.close();
  if (width * height > most) {
    throw new Error(`${file.name} has ${width} × ${height} pixels, and the server reads at most ${most.toLocaleString("en")}. Make it smaller first.`);
  }
  return dataUrl(blob);
}

// Shows images with buttons that take them out of their list; the focus goes to a field then.
export function thumbnails(strip, urls, field) {
  strip.hidden = !urls.length;
  strip.replaceChildren(...urls.map((src, i) => h("span", {className: "attached"}, h("img", {src, alt: `Image ${i + 1}`}),
    button("Remove", () => {
      urls.splice(i, 1);
      thumbnails(strip, urls, field);
      field.focus();
    }, {className: "quiet", ariaLabel: `Remove image ${i + 1}`}))));
}

// Lets a field take images. `strip` shows them; `take` returns and forgets them. `before` returns
// those that the next request has already.
export function pictures(field, before) {
  let urls = [], limits = null; // null: the model reads no images
  let reading = null; // while files are read, a promise of whether all could be
  let hasComplained = false;
  const strip = h("div", {className: "images", hidden: true});
  const chooser = h("input", {type: "file", accept: IMAGE_TYPES.join(","), multiple: true, hidden: true, ariaLabel: "Images"});
  const add = button("Image", () => chooser.click(), {hidden: true, className: "quiet", ariaLabel: "Add an image"});

  const show = () => thumbnails(strip, urls, field);

  // Adds an image that the next request has room for.
  function put(name, url) {
    const all = [...before(), ...urls, url];
    const bytes = all.reduce((sum, each) => sum + each.length, ROOM);
    const others = all.length > 1 ? " with the images before it" : "";
    if (all.length > limits.max_images) throw new Error(`${name} is one image too many: the server reads at most ${limits.max_images}.`);
    if (bytes > limits.max_body_bytes) {
      throw new Error(`${name} is too large: the request would have ${megabytes(bytes)}${others}, and the server reads at most ${megabytes(limits.max_body_bytes)}.`);
    }
    urls.push(url);
  }

  async function take(files) {
    const problems = [];
    for (const file of files) {
      try {
        put(file.name, await read(file, limits));
      } catch (error) {
        problems.push(error.message);
      }
    }
    if (problems.length || hasComplained) notice(problems.join(" "), "problem");
    hasComplained = problems.length > 0;
    show();
    say(counted(urls.length, "image"));
    field.focus();
    return !problems.length;
  }

  // Takes files one lot after another.
  function give(files) {
    if (!limits) return notice(SEES_NOT, "problem");
    const lot = [...files]; // a list of files is emptied with its event
    const mine = (reading ?? Promise.resolve()).then(() => take(lot));
    reading = mine;
    mine.finally(() => { if (reading === mine) reading = null; });
  }

  chooser.addEventListener("change", () => { give(chooser.files); chooser.value = ""; });
  field.addEventListener("paste", (event) => {
    const {files} = event.clipboardData, text = event.clipboardData.getData("text/plain");
    // Cells of a table come as text with a picture of them, and a copied file with its name.
    if (!files.length || (text && ![...files].some((file) => file.name === text))) return;
    event.preventDefault();
    give(files);
  });
  const isHere = (event) => field.isConnected && hasFiles(event.dataTransfer);
  addEventListener("dragover", (event) => { if (isHere(event)) event.preventDefault(); }, true);
  addEventListener("drop", (event) => {
    if (!isHere(event)) return;
    event.preventDefault();
    give(event.dataTransfer.files);
  }, true);

  return {
    strip, button: h("span", {}, add, chooser),
    get reading() { return reading; },
    // `told` is what the server says of images; null where the model reads none.
    offer(told) {
      limits = told;
      add.hidden = !told;
    },
    take() {
      const taken = urls;
      urls = [];
      show();
      return taken;
    },
  };
}
