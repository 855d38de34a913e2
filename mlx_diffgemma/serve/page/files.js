// Files of the user's machine: by the browser's pickers where it has them, else by upload and
// download.

import {h} from "./dom.js";

// Asks for a file; returns a File with its handle, or null.
export async function chosenFile(accept) {
  if ("showOpenFilePicker" in window) {
    try {
      const [handle] = await window.showOpenFilePicker();
      return {file: await handle.getFile(), handle};
    } catch (error) {
      if (error.name === "AbortError") return null;
      if (error.name !== "SecurityError") throw error;
    }
  }
  return new Promise((resolve) => {
    const field = h("input", {type: "file", accept, className: "unseen", tabIndex: -1, ariaLabel: "File"});
    field.addEventListener("change", () => {
      field.remove();
      resolve(field.files[0] ? {file: field.files[0], handle: null} : null);
    });
    field.addEventListener("cancel", () => {
      field.remove();
      resolve(null);
    });
    document.body.append(field);
    field.click();
  });
}

// Writes to a file that was opened; returns its handle, or null where it was downloaded or given up.
export async function saved(content, name, type, handle = null) {
  if (handle === null && "showSaveFilePicker" in window) {
    try {
      handle = await window.showSaveFilePicker({suggestedName: name});
    } catch (error) {
      if (error.name === "AbortError") return {handle: null, isSaved: false};
      if (error.name !== "SecurityError") throw error;
    }
  }
  if (handle !== null) {
    const stream = await handle.createWritable();
    await stream.write(content);
    await stream.close();
    return {handle, isSaved: true};
  }
  download(content, name, type);
  return {handle: null, isSaved: true};
}

export function download(content, name, type) {
  const url = URL.createObjectURL(new Blob([content], {type}));
  const link = h("a", {href: url, download: name});
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
