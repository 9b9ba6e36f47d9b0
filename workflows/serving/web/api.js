// Requests to this server, and the same requests as commands to copy.

export const token = { get: () => sessionStorage.getItem("ovd-token") || "", set: (value) => sessionStorage.setItem("ovd-token", value) };

export class ServerError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

const TRIES = 4;

async function reach(path, options = {}) {
  try {
    return await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "The server cannot be reached. Is it still running?");
  }
}

/** A file of this server. */
export async function fetchFile(path) {
  const response = await reach(path);
  if (!response.ok) throw new ServerError(response.status, await sentence(response));
  return response.blob();
}

/** The answer of a route as an object; waits and tries again while the server is busy. */
export async function call(path, options = {}, signal = undefined) {
  for (let attempt = 1; ; attempt++) {
    const headers = token.get() ? { Authorization: `Bearer ${token.get()}` } : {};
    const response = await reach(path, { ...options, headers, signal });
    if (response.ok) return response.json();
    if (response.status === 503 && attempt < TRIES) {
      const seconds = Number(response.headers.get("Retry-After") || 1);
      await new Promise((wake) => setTimeout(wake, 1000 * seconds));
      continue;
    }
    throw new ServerError(response.status, await sentence(response));
  }
}

async function sentence(response) {
  let detail = "";
  try {
    detail = (await response.json()).detail;
  } catch {
    detail = response.statusText;
  }
  const texts = {
    401: "This server wants a token.",
    413: `The picture is too large: ${detail}.`,
    415: "This file is not a picture that the server reads (JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF).",
    503: "The server is busy. Try again in a moment.",
  };
  return texts[response.status] || `The server refused: ${detail}.`;
}

/** A picture with fields as a form. */
export function form(picture, fields) {
  const data = new FormData();
  data.append("image", picture.blob, picture.name);
  for (const [name, value] of Object.entries(fields)) data.append(name, value);
  return { method: "POST", body: data };
}

/** Copies a text. Over plain HTTP from another machine a page has no clipboard, but may copy what is selected. */
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"), focused = document.activeElement;
  area.value = text;
  area.style.position = "fixed"; // else the page scrolls to it
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!copied) throw new Error("refused");
}

const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as a command; the picture is the file `name`. */
export function asCurl(route, name, fields) {
  const lines = [`curl ${location.origin}${route}`, `-F ${shell(`image=@"${name.replace(/["\\]/g, "\\$&")}"`)}`];
  if (token.get()) lines.splice(1, 0, '-H "Authorization: Bearer $OVD_TOKEN"');
  for (const [field, value] of Object.entries(fields)) lines.push(`--form-string ${shell(`${field}=${value}`)}`);
  return lines.join(" \\\n  ");
}

/** The request as a program; the picture is the file `name`. */
export function asPython(route, name, fields) {
  const data = Object.entries(fields).map(([field, value]) => `    ${JSON.stringify(field)}: ${JSON.stringify(String(value))},`);
  const headers = token.get() ? ["import os", ""] : [];
  const auth = token.get() ? ', headers={"Authorization": f"Bearer {os.environ[\'OVD_TOKEN\']}"}' : "";
  return [
    ...headers,
    "import requests",
    "",
    `fields = {`,
    ...data,
    `}`,
    `with open(${JSON.stringify(name)}, "rb") as image:`,
    `    answer = requests.post(${JSON.stringify(location.origin + route)}, data=fields, files={"image": image}${auth}, timeout=60)`,
    "answer.raise_for_status()",
    "print(answer.json())",
  ].join("\n");
}
