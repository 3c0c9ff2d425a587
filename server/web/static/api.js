// Calls of the server. The key lives in this module's memory and nowhere else.

let key = "";

export class ApiError extends Error {
  constructor(status, message, retryAfter) {
    super(message);
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

export function useKey(value) {
  key = value;
}

export function hasKey() {
  return key !== "";
}

async function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  return response;
}

async function failure(response) {
  let message = `The server answered ${response.status}.`;
  try {
    message = (await response.json()).error.message;
  } catch { /* not ours: a proxy's page */ }
  return new ApiError(response.status, message, response.headers.get("retry-after"));
}

export async function getJson(path) {
  const response = await call(path);
  if (!response.ok) throw await failure(response);
  return response.json();
}

// Readiness answers with the same body as 200 and as 503.
export async function readiness() {
  return (await call("/health/ready")).json();
}

// Yields the objects of a stream's events. Throws ApiError, also for an error event, and AbortError.
export async function* stream(path, body, signal) {
  const response = await call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!response.ok) throw await failure(response);
  let complete = false;
  for await (const data of eventData(response.body)) {
    if (data === "[DONE]") {
      complete = true;
      continue;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(200, chunk.error.message);
    yield chunk;
  }
  if (!complete) throw new ApiError(200, "The stream ended before the answer was complete.");
}

async function* eventData(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ")) yield event.slice(6);
    }
  }
}
