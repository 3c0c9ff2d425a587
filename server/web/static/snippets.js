// The request of the playground as code that does the same. The key is never in it.

const OPENAI_FIELDS = new Set([
  "model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options",
]);

export function asCurl(origin, path, body, needsKey) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const lines = [`curl -N ${origin}${path}`, "-H 'Content-Type: application/json'"];
  if (needsKey) lines.push('-H "Authorization: Bearer $SLIMSERVE_API_KEY"');
  lines.push(`-d '${quoted}'`);
  return lines.join(" \\\n  ");
}

export function asPython(origin, path, body, needsKey) {
  const chat = path.endsWith("/chat/completions");
  const known = Object.entries(body).filter(([name]) => OPENAI_FIELDS.has(name) && name !== "stream_options");
  const more = Object.fromEntries(Object.entries(body).filter(([name]) => !OPENAI_FIELDS.has(name)));
  const fields = known.map(([name, value]) => `    ${name}=${literal(value, "    ")},`);
  if (Object.keys(more).length) fields.push(`    extra_body=${literal(more, "    ")},`);
  const text = chat ? "chunk.choices[0].delta.content" : "chunk.choices[0].text";
  return [
    ...(needsKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${origin}/v1", api_key=${needsKey ? 'os.environ["SLIMSERVE_API_KEY"]' : '"none"'})`,
    `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...fields,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(${text} or "", end="", flush=True)`,
  ].join("\n");
}

function literal(value, indent) {
  const inner = `${indent}    `;
  if (value === true) return "True";
  if (value === false) return "False";
  if (value === null) return "None";
  if (Array.isArray(value)) {
    return `[\n${value.map((each) => `${inner}${literal(each, inner)},\n`).join("")}${indent}]`;
  }
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, inner)}`).join(", ")}}`;
  }
  return JSON.stringify(value);
}
