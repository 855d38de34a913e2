// Images beside a message: dropped, pasted or chosen, where the model sees.

import {button, h, notice} from "./dom.js";

const TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];
const MOST_BYTES = 8e6;

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

// Lets a field take images. `strip` shows them; `take` returns and forgets them.
export function pictures(field) {
  let urls = [], isOffered = false;
  const strip = h("div", {className: "images", hidden: true});
  const chooser = h("input", {type: "file", accept: TYPES.join(","), multiple: true, hidden: true});
  const add = button("Image", () => chooser.click(), {hidden: true, className: "quiet", ariaLabel: "Add an image"});

  function show() {
    strip.hidden = !urls.length;
    strip.replaceChildren(...urls.map((src, i) => h("span", {className: "attached"},
      h("img", {src, alt: `Image ${i + 1}`}),
      button("Remove", () => { urls.splice(i, 1); show(); }, {className: "quiet", ariaLabel: `Remove image ${i + 1}`}))));
  }

  async function take(files) {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    for (const file of images) {
      if (!TYPES.includes(file.type)) notice(`${file.name} is ${file.type}; images are PNG, JPEG, WebP or GIF.`, "problem");
      else if (file.size > MOST_BYTES) notice(`${file.name} is larger than ${MOST_BYTES / 1e6} MB.`, "problem");
      else urls.push(await dataUrl(file));
    }
    show();
    return images.length > 0;
  }

  chooser.addEventListener("change", () => { take(chooser.files); chooser.value = ""; });
  field.addEventListener("paste", (event) => {
    if (isOffered && [...event.clipboardData.files].some((file) => file.type.startsWith("image/"))) {
      event.preventDefault();
      take(event.clipboardData.files);
    }
  });
  addEventListener("dragover", (event) => { if (isOffered && field.isConnected) event.preventDefault(); });
  addEventListener("drop", (event) => {
    if (!isOffered || !field.isConnected || !event.dataTransfer.files.length) return;
    event.preventDefault();
    take(event.dataTransfer.files);
  });

  return {
    strip, button: add,
    offer(sees) {
      isOffered = sees;
      add.hidden = !sees;
    },
    take() {
      const taken = urls;
      urls = [];
      show();
      return taken;
    },
  };
}
