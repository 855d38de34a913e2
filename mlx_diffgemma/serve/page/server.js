// The server: requests with the key of this tab, streams of events, and whether it answers.

const KEY = "mlx_diffgemma.key";
const AGAIN_MS = 1500;

export class ServerError extends Error {
  constructor(status, message, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// "ready", "loading" (its model), or "gone": tells `change`.
class Server extends EventTarget {
  state = "ready";
  askForKey = null; // (problem) => a promise of a key, or of null where there is none; set by the app
  #asking = null;
  #watching = false;

  get hasKey() {
    return sessionStorage.getItem(KEY) !== null;
  }

  forgetKey() {
    sessionStorage.removeItem(KEY);
  }

  headers() {
    const key = sessionStorage.getItem(KEY);
    return key === null ? {} : {Authorization: `Bearer ${key}`};
  }

  // Returns the response of a request that succeeds; the key is asked for where one is missing.
  async request(path, {method = "GET", body, signal} = {}) {
    for (;;) {
      const used = sessionStorage.getItem(KEY);
      let response;
      try {
        response = await fetch(path, {
          method,
          signal,
          headers: {...this.headers(), ...(body !== undefined && {"Content-Type": "application/json"})},
          body: body === undefined ? undefined : JSON.stringify(body),
          cache: "no-store",
        });
      } catch (error) {
        if (error.name === "AbortError") throw error;
        this.watch("gone");
        throw new ServerError(0, "The server does not answer.");
      }
      if (response.status === 401) {
        await this.newKey(used);
        continue;
      }
      if (response.ok) {
        if (this.state === "gone") this.set("ready");
        return response;
      }
      const told = await response.json().catch(() => ({}));
      const message = told.error?.message ?? `The server answers with status ${response.status}.`;
      if (response.status === 503) this.watch("loading");
      throw new ServerError(response.status, message, told.error?.code);
    }
  }

  async json(path, options) {
    return (await this.request(path, options)).json();
  }

  // Waits until there is another key than the one that was refused.
  async newKey(refused) {
    if (sessionStorage.getItem(KEY) !== refused) return;
    const problem = refused === null ? "" : "The server refused this key.";
    this.forgetKey();
    this.#asking ??= this.askForKey(problem).then((key) => {
      if (key === null) throw new ServerError(401, "The server needs its key.");
      sessionStorage.setItem(KEY, key);
    }).finally(() => { this.#asking = null; });
    await this.#asking;
  }

  // Yields the events of a run.
  async *events(body, signal) {
    const response = await this.request("/x/events", {method: "POST", body, signal});
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "", ended = false;
    try {
      for (;;) {
        const {done, value} = await reader.read();
        if (done) break;
        const blocks = (rest + value).split("\n\n");
        rest = blocks.pop();
        for (const block of blocks) {
          if (!block.startsWith("data: ")) continue;
          const event = JSON.parse(block.slice(6));
          if (event.event === "error") throw this.#told(event.error);
          ended ||= event.event === "end";
          yield event;
        }
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof ServerError) throw error;
      this.watch("gone");
      throw new ServerError(0, "The server went away.");
    } finally {
      reader.cancel().catch(() => {});
    }
    if (!ended) {
      this.watch("gone");
      throw new ServerError(0, "The server went away.");
    }
  }

  // Returns the error that ends a stream. A server that ends is waited for.
  #told(error) {
    if (error.code !== "unavailable") return new ServerError(400, error.message, error.code);
    this.watch("gone");
    return new ServerError(503, "The server went away.", error.code);
  }

  set(state) {
    if (this.state === state) return;
    this.state = state;
    this.dispatchEvent(new Event("change"));
  }

  // Asks for the server's health until it is well.
  async watch(state) {
    this.set(state);
    if (this.#watching) return;
    this.#watching = true;
    for (;;) {
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      const health = await fetch("/health", {cache: "no-store"}).catch(() => null);
      if (health?.ok) break;
      this.set(health === null ? "gone" : "loading");
    }
    this.#watching = false;
    this.set("ready");
  }
}

export const server = new Server();
