// The API's description, drawn from /openapi.json, with commands to paste.

import { copyText, token } from "./api.js";
import { el } from "./pane.js";

const theme = localStorage.getItem("ovd-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = theme;

const EXAMPLES = {
  "/v1/detect": [["image", null], ["vocabulary", '["umbrella", "anchor"]'], ["score_threshold", "0.3"]],
  "/v1/segment": [["image", null], ["prompts", '{"points": [[64, 64]]}']],
  "/v1/everything": [["image", null]],
  "/v1/text-to-mask": [["image", null], ["vocabulary", '["umbrella"]']],
  "/v1/classify": [["image", null], ["vocabulary", '["umbrella", "anchor", "cat"]']],
};

function command(verb, path) {
  const auth = token.get() && path.startsWith("/v1/") ? ' -H "Authorization: Bearer $OVD_TOKEN"' : "";
  const url = location.origin + path + auth;
  if (verb === "get") return `curl ${url}`;
  if (path === "/v1/vocabularies") return `curl -X PUT ${url} \\\n  -H 'Content-Type: application/json' -d '["umbrella", "anchor"]'`;
  const sample = `curl -sO ${location.origin}/web/samples/scene-1.jpg`;
  const fields = (EXAMPLES[path] ?? [["image", null]]).map(([name, value]) => (value === null ? "-F image=@scene-1.jpg" : `-F '${name}=${value}'`));
  return `${sample}\n${[`curl ${url}`, ...fields].join(" \\\n  ")}`;
}

function block(text) {
  const button = el("button", { type: "button", textContent: "Copy" });
  button.onclick = async () => {
    button.textContent = await copyText(text).then(() => "Copied", () => "Not allowed");
    setTimeout(() => (button.textContent = "Copy"), 1500);
  };
  const pre = el("pre", { tabIndex: 0 }, el("code", { textContent: text }));
  return el("div", { className: "command" }, pre, button);
}

function kindOf(schema) {
  const kinds = (schema.anyOf ?? [schema]).map((entry) => entry.enum?.join(" | ") ?? entry.format ?? entry.type).filter((kind) => kind !== "null");
  const limits = [schema.minimum, schema.maximum].every((value) => value !== undefined) ? `, ${schema.minimum} to ${schema.maximum}` : "";
  const standard = schema.default !== undefined && schema.default !== null && schema.default !== "" ? `, default ${schema.default}` : "";
  return kinds.join(" or ") + limits + standard;
}

function rows(schema, required) {
  const body = el("tbody");
  for (const [name, field] of Object.entries(schema)) {
    const must = required.includes(name) ? " (required)" : "";
    body.append(el("tr", {}, el("th", { scope: "row" }, el("code", { textContent: name })), el("td", { textContent: kindOf(field) + must }), el("td", { textContent: field.description ?? "" })));
  }
  return el("div", { className: "scroll" }, el("table", {}, body));
}

function resolve(spec, schema) {
  return schema?.$ref ? spec.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

function shape(spec, schema, depth = 0) {
  schema = resolve(spec, schema);
  if (!schema || depth > 4) return "…";
  if (schema.anyOf) return `${shape(spec, schema.anyOf[0], depth)} or null`;
  if (schema.prefixItems) return `[${schema.prefixItems.map((entry) => entry.type).join(", ")}]`;
  if (schema.type === "array") return `[${shape(spec, schema.items, depth + 1)}, …]`;
  if (!schema.properties) return schema.const ? JSON.stringify(schema.const) : schema.type ?? "any";
  const pad = "  ".repeat(depth + 1);
  const lines = Object.entries(schema.properties).map(([name, entry]) => `${pad}"${name}": ${shape(spec, entry, depth + 1)}`);
  return `{\n${lines.join(",\n")}\n${"  ".repeat(depth)}}`;
}

function article(spec, path, verb, route) {
  const form = route.requestBody?.content?.["multipart/form-data"]?.schema;
  const answer = route.responses["200"]?.content?.["application/json"]?.schema;
  const parts = [
    el("h2", {}, el("span", { className: "verb", textContent: verb.toUpperCase() }), el("code", { textContent: path })),
    el("p", { textContent: route.description ?? route.summary }),
    block(command(verb, path)),
  ];
  if (form) parts.push(el("h3", { textContent: "Fields of the form, or of the query beside a raw image as body" }), rows(form.properties, form.required));
  if (answer) parts.push(el("h3", { textContent: "Answer" }), el("pre", { tabIndex: 0 }, el("code", { textContent: shape(spec, answer) })));
  const errors = Object.entries(route.responses).filter(([status]) => Number(status) >= 400);
  if (form) parts.push(el("h3", { textContent: "Errors, as application/problem+json" }), el("p", { textContent: errors.map(([status, { description }]) => `${status} ${description}`).join(" · ") }));
  return el("article", {}, ...parts);
}

const spec = await (await fetch("/openapi.json")).json();
const order = ["post", "put", "get"];
const routes = Object.entries(spec.paths).flatMap(([path, verbs]) => Object.entries(verbs).map(([verb, route]) => [path, verb, route]));
routes.sort((one, other) => order.indexOf(one[1]) - order.indexOf(other[1]));
document.getElementById("docs").replaceChildren(...routes.map(([path, verb, route]) => article(spec, path, verb, route)));
