// The page: a picture, what to do with it, names, and results. State lives here; parts draw it.

import { asCurl, asPython, call, copyText, fetchFile, form, token } from "./api.js";
import { el, Pane } from "./pane.js";
import { Prompts } from "./prompts.js";
import { Side } from "./side.js";

const $ = (id) => document.getElementById(id);
const MODES = {
  detect: { label: "Find", hint: "Boxes around everything that bears one of the names.", run: "Find" },
  segment: {
    label: "Click",
    hint: "Click on a thing for its mask and name. Shift-click takes a place away, dragging draws a box. With the keyboard: arrows, then Enter.",
    run: "Segment",
  },
  everything: { label: "Everything", hint: "All masks of the picture, each with its most probable name.", run: "Segment all" },
  "text-to-mask": { label: "Text to mask", hint: "One mask for each name, present or not.", run: "Segment" },
  classify: { label: "Classify", hint: "The most probable names of the whole picture.", run: "Classify" },
};
const SAMPLES = ["scene-1.jpg", "scene-2.jpg", "scene-3.jpg"];
const MAX_SIDE = 2048;

const state = { models: [], mode: "", thresholdChosen: false, picture: null, prompts: new Prompts(), pending: null, turn: 0, lastAnswers: [], notes: [] };
const sides = [new Side("Names", () => { suggestThreshold(); later(); }), new Side("Names, second side", () => later())];
const panes = sides.map(() => new Pane("", addPrompt));

// -------------------------------------------------------------------------------------------------- start

async function start() {
  try {
    state.models = (await call("/v1/models")).models;
  } catch (error) {
    return fail(error);
  }
  $("token-form").hidden = true;
  fail(null);
  const offered = Object.keys(MODES).filter((mode) => state.models.some((model) => model.routes.includes(`/v1/${mode}`)));
  $("modes").replaceChildren(...offered.map(modeButton));
  setMode(offered.includes(state.mode) ? state.mode : offered[0]);
  say("Choose a picture, or a sample.");
  if (!state.picture) await useSample(SAMPLES[0]);
}

function modeButton(mode) {
  const radio = el("input", { type: "radio", name: "mode", value: mode, onchange: () => { setMode(mode); later(); } });
  return el("label", {}, radio, el("span", { textContent: MODES[mode].label }));
}

function setMode(mode) {
  state.pending?.abort(); // its answer is of another mode
  state.lastAnswers = [];
  state.mode = mode;
  document.querySelector(`input[name="mode"][value="${mode}"]`).checked = true;
  $("mode-hint").textContent = MODES[mode].hint;
  $("run").textContent = MODES[mode].run;
  $("run").hidden = mode === "segment";
  $("prompt-tools").hidden = mode !== "segment";
  $("threshold-row").hidden = ["classify", "segment", "text-to-mask"].includes(mode);
  $("distinct-row").hidden = mode !== "detect";
  const able = state.models.filter((model) => model.routes.includes(`/v1/${mode}`));
  sides.forEach((side) => side.offer(able));
  suggestThreshold();
  if ($("compare").checked && able.length > 1 && sides[0].model === sides[1].model) sides[1].choose(1);
  panes.forEach((pane) => {
    pane.point(mode === "segment");
    pane.show([], 0);
  });
}

// -------------------------------------------------------------------------------------------------- pictures

async function usePicture(blob, name) {
  const turn = ++state.turn; // the last picture wins, also if an earlier one takes longer to open
  let bitmap;
  try {
    bitmap = await createImageBitmap(blob);
  } catch {
    return fail(new Error(`${name || "This file"} is not a picture that the browser can show.`));
  }
  const file = { name, width: bitmap.width, height: bitmap.height };
  if (Math.max(bitmap.width, bitmap.height) > MAX_SIDE || !/^image\/(jpeg|png|webp)$/.test(blob.type)) {
    [blob, bitmap] = await reduced(bitmap);
    name = name.replace(/\.[^.]*$/, "") + ".jpg";
  }
  if (turn !== state.turn) return;
  state.pending?.abort(); // its answer is of another picture
  state.lastAnswers = [];
  state.picture = { blob, bitmap, name, width: bitmap.width, height: bitmap.height, file };
  state.prompts.clear();
  panes.forEach((pane) => { pane.prompts = []; pane.setPicture(state.picture); });
  document.querySelectorAll("#samples button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.name === name)));
  fail(null);
  if (state.mode === "segment") say("Click on something in the picture.");
  else await run();
}

async function reduced(bitmap) {
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(bitmap.width * scale)), Math.max(1, Math.round(bitmap.height * scale)));
  const pen = canvas.getContext("2d");
  pen.fillStyle = "white"; // below what is transparent, as the server does
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return [blob, await createImageBitmap(blob)];
}

async function useSample(name) {
  let blob;
  try {
    blob = await fetchFile(`/web/samples/${name}`);
  } catch (error) {
    return fail(error);
  }
  await usePicture(blob, name);
}

function useFile(file) {
  if (file) usePicture(file, file.name || "pasted.png");
}

// -------------------------------------------------------------------------------------------------- requests

function active() {
  return $("compare").checked ? [0, 1] : [0];
}

function fieldsOf(side) {
  const fields = {}, names = side.vocabulary();
  if (state.models.length > 1) fields.model = side.model.name;
  if (names.length) fields.vocabulary = JSON.stringify(names);
  if (state.mode === "detect") fields.score_threshold = "0.05";
  if (state.mode === "detect" && $("distinct").checked) fields.distinct = "true";
  if (state.mode === "detect" && side.model.masks) fields.masks = "true";
  if (state.mode === "classify") fields.top = "10";
  return fields;
}

/** The requests of one side: [fields, rows of the prompts] each; places times `scale`, [x, y]. */
function requestsOf(side, scale = [1, 1]) {
  const fields = fieldsOf(side);
  if (state.mode !== "segment") return [[fields, null]];
  return state.prompts.requests(scale).map(({ rows, prompts }) => [{ ...fields, prompts: JSON.stringify(prompts) }, rows]);
}

async function run() {
  if (!state.picture || !state.mode) return;
  state.pending?.abort();
  const pending = (state.pending = new AbortController());
  const started = performance.now();
  fail(null);
  panes.forEach((pane) => pane.view.classList.add("busy"));
  say("Looking …");
  try {
    await Promise.all(active().map((index) => runSide(index, pending.signal)));
    const shown = active().map((index) => panes[index].objects.length).join(" and ");
    const notes = [...new Set(active().map((index) => state.notes[index]).filter(Boolean))].join("; ");
    say(`${shown} result${shown === "1" ? "" : "s"} in ${Math.round(performance.now() - started)} ms${notes && `: ${notes}`}.`);
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  } finally {
    if (state.pending === pending) panes.forEach((pane) => pane.view.classList.remove("busy"));
  }
}

async function runSide(index, signal) {
  const side = sides[index], objects = [];
  state.notes[index] = "";
  for (const [fields, rows] of requestsOf(side)) {
    const answer = await call(`/v1/${state.mode}`, form(state.picture, fields), signal);
    state.notes[index] ||= answer.note ?? "";
    const found = answer.detections ?? answer.segments ?? answer.labels.map((entry) => ({ ...entry, bar: true }));
    found.forEach((entry, row) => (objects[rows ? rows[row] : row] = { ...entry, always: Boolean(rows) || entry.bar }));
  }
  state.lastAnswers[index] = objects.filter(Boolean);
  showSide(index);
}

function showSide(index) {
  const pane = panes[index], side = sides[index];
  const names = side.vocabulary().length ? `${side.names.slice(0, 4).join(", ")}${side.names.length > 4 ? " …" : ""}` : "the model's own names";
  pane.heading.textContent = `${side.model?.name ?? ""}: ${names}`;
  pane.heading.hidden = !$("compare").checked;
  pane.show(state.lastAnswers[index] ?? [], threshold(), side.allNames());
}

function threshold() {
  return ["classify", "segment", "text-to-mask"].includes(state.mode) ? -1 : Number($("threshold").value);
}

/** The model's own threshold, until the user chooses another. */
function suggestThreshold() {
  if (!state.thresholdChosen) setThreshold((state.mode === "detect" && sides[0].model?.score_threshold) || 0.3);
}

function setThreshold(value) {
  $("threshold").value = value;
  $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
}

let timer;
function later() {
  state.pending?.abort(); // its answer is of other names
  clearTimeout(timer);
  timer = setTimeout(() => (state.mode === "segment" && !state.prompts.objects.length ? null : run()), 150);
}

function addPrompt(prompt) {
  state.prompts.add(prompt);
  prompted();
}

function prompted() {
  panes.forEach((pane) => { pane.prompts = state.prompts.objects; pane.draw(); });
  if (state.prompts.requests().length) return run();
  state.pending?.abort();
  state.lastAnswers = [];
  active().forEach(showSide);
  say(state.prompts.objects.length ? "Only places outside so far: click on the thing itself." : "Click on something in the picture.");
}

// -------------------------------------------------------------------------------------------------- messages, export

function say(text) {
  $("status").textContent = text;
}

function fail(error) {
  $("error").hidden = !error;
  $("error").textContent = error?.message ?? "";
  if (error) say("");
  if (error?.status === 401) {
    $("token-form").hidden = false;
    $("token").focus();
  }
}

async function copy(make, what) {
  if (!state.picture) return fail(new Error("Choose a picture first."));
  const { file, width, height } = state.picture; // the command sends the file as it is, not what the page has made of it
  const requests = requestsOf(sides[0], [file.width / width, file.height / height]);
  const texts = requests.map(([fields]) => make(`/v1/${state.mode}`, file.name, fields));
  if (!texts.length) return fail(new Error("Click on something in the picture first."));
  try {
    await copyText(texts.join("\n\n"));
    say(`${what} copied; it reads the picture from ${file.name} in the current folder.`);
  } catch {
    fail(new Error("The browser does not let this page use the clipboard."));
  }
}

function save(blob, name) {
  const link = el("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  const { file, width, height } = state.picture;
  say(`${name} saved${file.width === width ? "" : `, of the picture reduced to ${width} x ${height} pixels`}.`);
}

/** What is shown, as a COCO file. */
function coco() {
  const { name, width, height } = state.picture;
  const shown = panes[0].objects.filter((entry) => entry.box);
  const names = [...new Set(shown.map((entry) => entry.label ?? "mask"))];
  return {
    images: [{ id: 1, file_name: name, width, height }],
    categories: names.map((label, index) => ({ id: index + 1, name: label })),
    annotations: shown.map(({ box: [x0, y0, x1, y1], label, score, mask, tint }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: names.indexOf(label ?? "mask") + 1,
      bbox: [x0, y0, x1 - x0, y1 - y0],
      area: tint ? tint.bits.reduce((sum, bit) => sum + bit, 0) : (x1 - x0) * (y1 - y0),
      iscrowd: 0,
      ...(score == null ? {} : { score }),
      ...(mask ? { segmentation: mask } : {}),
    })),
  };
}

const stem = () => state.picture.name.replace(/\.[^.]*$/, "");

// -------------------------------------------------------------------------------------------------- events

$("sides").append(sides[0].element, sides[1].element);
$("panes").append(panes[0].element, panes[1].element);
sides[1].element.hidden = panes[1].element.hidden = true;
$("samples").append(
  ...SAMPLES.map((name, index) => {
    const button = el("button", { type: "button", onclick: () => useSample(name) }, el("img", { src: `/web/samples/${name}`, alt: "" }));
    button.dataset.name = name;
    button.setAttribute("aria-label", `Sample picture ${index + 1}`);
    button.setAttribute("aria-pressed", "false");
    return button;
  }),
);
$("file").onchange = () => {
  useFile($("file").files[0]);
  $("file").value = ""; // else choosing the same file again would be no change
};
addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find((entry) => entry.type.startsWith("image/"));
  if (file) useFile(file);
});
addEventListener("dragover", (event) => { event.preventDefault(); $("drop").classList.add("over"); });
addEventListener("dragleave", () => $("drop").classList.remove("over"));
addEventListener("drop", (event) => { event.preventDefault(); $("drop").classList.remove("over"); useFile(event.dataTransfer.files[0]); });
$("run").onclick = run;
$("distinct").onchange = later;
$("threshold").oninput = () => {
  state.thresholdChosen = true;
  setThreshold($("threshold").value);
  active().forEach(showSide);
};
$("compare").onchange = () => {
  const two = $("compare").checked;
  sides[1].element.hidden = panes[1].element.hidden = !two;
  $("panes").classList.toggle("two", two);
  if (two && sides[1].select.options.length > 1) sides[1].choose(1);
  if (two) sides[1].heading.textContent = "Names, second side";
  later();
};
$("new-object").onclick = () => { state.prompts.startObject(); say("The next click starts another object."); };
$("undo").onclick = () => { state.prompts.undo(); prompted(); };
$("clear").onclick = () => { state.prompts.clear(); prompted(); };
addEventListener("keydown", (event) => {
  if (state.mode !== "segment" || event.target.matches("input, select") || event.ctrlKey || event.metaKey) return;
  const action = { n: "new-object", z: "undo", Escape: "clear" }[event.key];
  if (action) $(action).click();
});
$("copy-curl").onclick = () => copy(asCurl, "The command");
$("copy-python").onclick = () => copy(asPython, "The program");
$("save-coco").onclick = () => state.picture && save(new Blob([JSON.stringify(coco(), null, 1)], { type: "application/json" }), `${stem()}.coco.json`);
$("save-png").onclick = () => {
  if (!state.picture) return;
  panes[0].draw(Math.max(1, 1024 / Math.max(state.picture.width, state.picture.height)));
  panes[0].canvas.toBlob((blob) => { save(blob, `${stem()}.found.png`); panes[0].draw(); });
};
$("token-form").onsubmit = (event) => { event.preventDefault(); token.set($("token").value.trim()); start(); };
$("theme").onclick = () => {
  const dark = document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("ovd-theme", document.documentElement.dataset.theme);
};
const chosen = localStorage.getItem("ovd-theme") ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = chosen;
start();
