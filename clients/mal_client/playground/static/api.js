// The playground's own server, behind functions. Every failure is a Fault with words for people.

export class Fault extends Error {
  constructor(message, { code = "", reason = "", status = 0 } = {}) {
    super(message);
    this.code = code;
    this.reason = reason;
    this.status = status;
  }
}

const GONE = "the playground does not answer; look whether `mal-client playground` still runs";

async function ask(path, init = {}) {
  let answer;
  try {
    answer = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(GONE, { code: "UNAVAILABLE" });
  }
  if (answer.ok) return answer;
  let error = { message: `${answer.status} ${answer.statusText}` };
  try {
    error = (await answer.json()).error ?? error;
  } catch {
    // Not ours: a proxy's page, say. The status line says what there is to say.
  }
  throw new Fault(error.message, { ...error, status: answer.status });
}

const asJson = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const server = async (model) =>
  (await ask(`/api/server${model === null ? "" : `?model=${encodeURIComponent(model)}`}`)).json();

export const sendImage = async (blob) => (await ask("/api/images", { method: "POST", body: blob })).json();

export const pixels = async (sha256) => (await ask(`/api/images/${sha256}/pixels`)).blob();

export const coco = async (body) => (await ask("/api/coco", asJson(body))).blob();

/** Asks for masks; `onLine` gets each box's answer as it comes. Resolves when every box was answered. */
export async function label(sha256, boxes, options, signal, onLine) {
  const answer = await ask(`/api/images/${sha256}/labels`, { ...asJson({ boxes, options }), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isWhole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const text of lines) {
        const line = JSON.parse(text);
        if (line.done) isWhole = true;
        else onLine(line);
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof SyntaxError) throw error;
    throw new Fault(GONE, { code: "UNAVAILABLE" });
  }
  if (!isWhole) throw new Fault("the answer broke off before every box had its mask", { code: "UNAVAILABLE" });
}
