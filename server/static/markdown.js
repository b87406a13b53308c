// Markdown -> DOM nodes that are safe to show, whatever the text is. The only place where HTML text becomes nodes:
// marked writes it (a model's own HTML stays text), DOMPurify keeps what is on a short list, links are checked, images become links.

import DOMPurify from "./vendor/dompurify/purify.es.mjs";
import highlighter from "./vendor/highlight.js/highlight.min.js";
import { Marked } from "./vendor/marked/marked.esm.js";
import { element, iconButton } from "./dom.js";

const MAX_COLOURED = 100_000; // characters of a code block; more would hold up the page
const HEADING_SHIFT = 2; // the page's own headings are h1 and h2

const ALLOWED_TAGS = [
  ..."p br hr h3 h4 h5 h6 strong em del code pre ul ol li blockquote table thead tbody tr th td a span".split(" "),
  "#text",
];
const ALLOWED_ATTR = ["href", "title", "class", "start", "align"];
const CLASSES = /^(?:hljs[\w-]*|language-[\w+#.-]+|[a-z]+_|raw|task)$/u;
const PROTOCOLS = ["http:", "https:", "mailto:"];

const escaped = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };
const escape = (text) => text.replace(/[&<>"']/gu, (character) => escaped[character]);

const marked = new Marked({
  gfm: true,
  renderer: {
    html({ text, block }) {
      return block ? `<p class="raw">${escape(text.trimEnd())}</p>` : escape(text);
    },
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + HEADING_SHIFT);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
    },
    image({ href, text }) {
      return `<a href="${escape(href)}">${escape(text || "image")}</a>`;
    },
    checkbox({ checked }) {
      return `<span class="task">${checked ? "☑" : "☐"}</span> `;
    },
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.hasAttribute("class")) {
    const kept = [...node.classList].filter((name) => CLASSES.test(name));
    node.setAttribute("class", kept.join(" "));
  }
  if (node.localName === "a") {
    const address = safeAddress(node.getAttribute("href"));
    if (address === null) {
      node.removeAttribute("href");
    } else {
      node.setAttribute("href", address);
      node.setAttribute("rel", "noopener noreferrer");
      node.setAttribute("target", "_blank");
    }
  }
});

function safeAddress(text) {
  if (!text || !URL.canParse(text)) return null; // addresses without a protocol would be this server's own
  const address = new URL(text);
  return PROTOCOLS.includes(address.protocol) ? address.href : null;
}

function sanitize(html) {
  return DOMPurify.sanitize(html, {
    ALLOWED_TAGS,
    ALLOWED_ATTR,
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    RETURN_DOM_FRAGMENT: true,
  });
}

/** The text's blocks, as marked's tokens: each has `type` and `raw`, the piece of the text that it is. */
export function blocks(text) {
  return marked.lexer(text);
}

/** A fragment that shows these blocks. */
export function render(tokens) {
  const fragment = sanitize(marked.parser(tokens));
  for (const pre of fragment.querySelectorAll("pre")) {
    const code = pre.querySelector("code");
    const language = [...code.classList].find((name) => name.startsWith("language-"))?.slice("language-".length) ?? "";
    colour(code, language);
    pre.replaceWith(frameCode(code, language));
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = element("div", { class: "table", role: "region", tabindex: "0", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

/** A code element in its frame: what language it is, and a button that copies it. */
export function frameCode(code, language) {
  return element(
    "div",
    { class: "code" },
    element(
      "div",
      { class: "code-head" },
      element("span", { text: language }),
      iconButton("copy", "Copy this code", { class: "copy-code" }),
    ),
    element("pre", { tabindex: "0", role: "region", "aria-label": language ? `Code, ${language}` : "Code" }, code),
  );
}

/** Colours the text of a code element, if its language is known. */
export function colour(code, language) {
  const text = code.textContent;
  if (!language || !highlighter.getLanguage(language) || text.length > MAX_COLOURED) return;
  code.replaceChildren(sanitize(highlighter.highlight(text, { language, ignoreIllegals: true }).value));
}
