// One side of a comparison: a model and the names that it looks for.

import { el } from "./pane.js";

let count = 0;

export class Side {
  /** `onChange()` is called when the model or the names change. */
  constructor(title, onChange) {
    this.onChange = onChange;
    this.names = [];
    const id = `side-${++count}`;
    this.heading = el("h2", { textContent: title });
    this.select = el("select", { id: `${id}-model`, onchange: () => { this._describe(); onChange(); } });
    this.select.setAttribute("aria-label", "Model");
    this.input = el("input", { id, type: "text", autocomplete: "off", placeholder: "red umbrella, anchor …" });
    this.input.setAttribute("aria-label", `${title}: add a name`);
    this.input.addEventListener("keydown", (event) => this._keys(event));
    this.input.addEventListener("change", () => this._take());
    this.input.addEventListener("paste", () => setTimeout(() => this.input.value.includes(",") && this._take()));
    this.chips = el("div", { className: "chips" }, this.input);
    this.chips.onclick = (event) => event.target === this.chips && this.input.focus();
    this.hint = el("p", { className: "hint" });
    const all = el("button", { type: "button", textContent: "All names of the model", onclick: () => this.set([]) });
    const few = el("button", { type: "button", textContent: "A few of them", onclick: () => this.set(this._few()) });
    this.element = el("div", { className: "side" }, this.heading, this.select, this.chips, el("div", { className: "links" }, all, few), this.hint);
  }

  get model() {
    return this.models?.find((model) => model.name === this.select.value);
  }

  offer(models) {
    const kept = this.select.value;
    this.models = models;
    this.select.replaceChildren(...models.map((model) => new Option(`${model.name} · ${model.method}`, model.name)));
    if (models.some((model) => model.name === kept)) this.select.value = kept;
    this.select.hidden = models.length < 2;
    this._describe();
  }

  /** Take the model at a place of the offer. */
  choose(index) {
    this.select.selectedIndex = index;
    this._describe();
  }

  set(names) {
    this.names = [...new Set(names)];
    this._chips();
    this.onChange();
  }

  /** Names that are sent; none means the model's own. */
  vocabulary() {
    return this.names;
  }

  /** All names in the order in which colours are given. */
  allNames() {
    return this.names.length ? this.names : this.model?.vocabulary ?? [];
  }

  _few() {
    const all = this.model?.vocabulary ?? [];
    const step = Math.max(1, Math.floor(all.length / 8));
    return all.filter((_, index) => index % step === 0).slice(0, 8);
  }

  _describe() {
    const own = this.model?.vocabulary.length ?? 0;
    this.hint.textContent = this.names.length
      ? ""
      : own ? `Without names of yours, the model's own ${own} are looked for.` : "This model needs names of yours.";
  }

  _keys(event) {
    if (event.isComposing) return; // Enter ends a word of an input method, not a name
    if (event.key === "Enter" || event.key === ",") {
      event.preventDefault();
      this._take();
    } else if (event.key === "Backspace" && !this.input.value && this.names.length) {
      this.set(this.names.slice(0, -1));
    }
  }

  _take() {
    const fresh = this.input.value.split(/[,;\n]/).map((name) => name.trim()).filter(Boolean);
    this.input.value = "";
    if (!fresh.length) return;
    this.names = [...new Set([...this.names, ...fresh])];
    this._chips();
    this.onChange();
  }

  _chips() {
    this.chips.querySelectorAll(".chip").forEach((chip) => chip.remove());
    for (const name of this.names) {
      const remove = el("button", { type: "button", textContent: "×" });
      remove.setAttribute("aria-label", `Remove ${name}`);
      remove.onclick = () => {
        this.set(this.names.filter((other) => other !== name));
        this.input.focus();
      };
      this.input.before(el("span", { className: "chip" }, name, remove));
    }
    this._describe();
  }
}
