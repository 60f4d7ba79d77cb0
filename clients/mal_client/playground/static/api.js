// Calls to the playground's own server. Every failure is an ApiError with a message for the user.

export class ApiError extends Error {
  constructor(message, { code = "", reason = "", status = 0 } = {}) {
    super(message);
    this.code = code;
    this.reason = reason;
    this.status = status;
  }
}

const NO_RESPONSE = "the playground does not respond; check that `mal-client playground` is running";

async function request(path, init = {}) {
  let response;
  try {
    response = await fetch(path, init);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(NO_RESPONSE, { code: "UNAVAILABLE" });
  }
  if (response.ok) return response;
  let error = { message: `${response.status} ${response.statusText}` };
  try {
    error = (await response.json()).error ?? error;
  } catch {
    // The response is not from the playground, for example from a proxy; the status line is the message.
  }
  throw new ApiError(error.message, { ...error, status: response.status });
}

const asJson = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

export const server = async (model) =>
  (await request(`/api/server${model === null ? "" : `?model=${encodeURIComponent(model)}`}`)).json();

export const sendImage = async (blob) => (await request("/api/images", { method: "POST", body: blob })).json();

export const pixels = async (sha256) => (await request(`/api/images/${sha256}/pixels`)).blob();

export const coco = async (body) => (await request("/api/coco", asJson(body))).blob();

/** Requests masks; calls `onLine` with the line of each box as it arrives. Resolves after the last one. */
export async function label(sha256, boxes, options, signal, onLine) {
  const response = await request(`/api/images/${sha256}/labels`, { ...asJson({ boxes, options }), signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isComplete = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const text of lines) {
        const line = JSON.parse(text);
        if (line.done) isComplete = true;
        else onLine(line);
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof SyntaxError) throw error;
    throw new ApiError(NO_RESPONSE, { code: "UNAVAILABLE" });
  }
  if (!isComplete) throw new ApiError("the connection was lost before every box had its mask", { code: "UNAVAILABLE" });
}
