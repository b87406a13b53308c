// What the server runs, in view: the model and its customization in a line, in full, and how much of the memory's bandwidth the
// last answer reached. Knows no conversations.

import { byId, bytes, element, number } from "./dom.js";
import { speed } from "./message.js";

export class ModelView {
  #facts = null;
  #rate = null;

  constructor() {
    const button = byId("model");
    button.addEventListener("click", () => this.toggle());
    byId("model-panel").addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      this.toggle(false);
      button.focus();
    });
  }

  /** The server's answer to /v1/customization; null while there is none. */
  get facts() {
    return this.#facts;
  }

  show(answer) {
    this.#facts = facts(answer);
    this.#draw();
  }

  /** The rate of the last answer, in tokens a second; null: there is none. */
  reached(rate) {
    this.#rate = rate;
    this.#draw();
  }

  toggle(open = byId("model-panel").hidden) {
    byId("model-panel").hidden = !open;
    byId("model").setAttribute("aria-expanded", String(open));
  }

  #draw() {
    if (!this.#facts) return;
    const { model, device, dtype, quantization, compiled, bytesPerToken } = this.#facts;
    const share = this.#share();
    const line = [
      device,
      dtype,
      quantization.replace(/ \([^)]*\)/gu, ""), // how many layers is for the panel
      compiled,
      bytesPerToken && `${bytes(bytesPerToken)} a token`,
      share !== null && `${Math.round(share * 100)}% of bandwidth`,
    ].filter(Boolean);
    byId("model-line").replaceChildren(
      element("strong", { text: model }),
      ...line.map((text) => element("span", { text })),
    );
    byId("model").setAttribute("aria-label", `The model and how it runs: ${[model, ...line].join(", ")}`);
    byId("model-panel").replaceChildren(this.#list());
    byId("welcome").replaceChildren(
      element("p", { class: "welcome-name", text: model }),
      element("p", { class: "hint", text: "runs on this server, like this:" }),
      this.#list(),
    );
  }

  #share() {
    const { bytesPerToken, bandwidth } = this.#facts;
    return this.#rate && bytesPerToken && bandwidth ? (this.#rate * bytesPerToken) / bandwidth : null;
  }

  #list() {
    const { device, deviceName, deviceWhy, dtype, dtypeWhy, quantization, compiled, prefill } = this.#facts;
    const { bytesPerToken, bandwidth, contextLength, format, answers } = this.#facts;
    const share = this.#share();
    const limit = bytesPerToken && bandwidth ? bandwidth / bytesPerToken : null;
    const rows = [
      ["Device", device, [deviceName, deviceWhy].filter(Boolean).join(" · ")],
      ["Precision", dtype, dtypeWhy],
      ["Quantization", quantization, null],
      ["Compilation", compiled, prefill],
      ["Reads for each token", bytesPerToken && bytes(bytesPerToken), "weights, as they are stored"],
      ["Memory bandwidth", bandwidth && `${bytes(bandwidth)}/s`, limit && `allows ${speed(limit)} for one answer`],
      [
        "The last answer",
        this.#rate ? speed(this.#rate) : "none yet",
        share !== null && `${Math.round(share * 100)}% of that bandwidth`,
      ],
      [
        "Context",
        contextLength && `${number.format(contextLength)} tokens`,
        answers && `for each of ${answers} answers at a time`,
      ],
      ["Chat format", format, null],
    ];
    const list = element(
      "dl",
      { class: "facts" },
      ...rows
        .filter(([, value]) => value)
        .map(([name, value, more]) =>
          element(
            "div",
            {},
            element("dt", { text: name }),
            element("dd", {}, value, more ? element("small", { text: more }) : null),
          ),
        ),
    );
    if (share === null) return list;
    const meter = element("meter", {
      min: "0",
      max: "1",
      "aria-label": "Share of the memory's bandwidth that the last answer reached",
    });
    meter.value = Math.min(1, share);
    return element("div", {}, list, meter);
  }
}

function facts(answer) {
  return {
    model: answer.model,
    device: answer.device,
    deviceName: answer.device_name,
    deviceWhy: reason(answer.device_why),
    dtype: answer.dtype,
    dtypeWhy: reason(answer.dtype_why),
    quantization: answer.quantization ?? "not quantized",
    compiled: answer.compiled ? "compiled" : "not compiled",
    prefill: answer.compiled_prefill ? "reading the prompt too" : null,
    bytesPerToken: answer.bytes_per_token,
    bandwidth: answer.bandwidth,
    contextLength: answer.context_length,
    answers: answer.max_num_seqs,
    format: answer.chat_format,
    defaults: answer.sampling,
  };
}

/** A flag, or a variable, is where a setting comes from. */
const reason = (why) => (/^(--|TORCHCHAT_)/u.test(why) ? `set by ${why}` : why);
