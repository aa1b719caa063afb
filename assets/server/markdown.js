// Answers as HTML. What a model writes is shown and never run: HTML in it stays text, of what Markdown makes DOMPurify leaves the
// tags below, and the policy that the server sends lets no script run but the page's own files.

const TAGS = ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "em", "strong", "del", "code", "pre", "blockquote", "ul", "ol", "li",
  "a", "table", "thead", "tbody", "tr", "th", "td"];
const ATTRIBUTES = ["href", "title", "class", "align", "start"];

const escape = text => text.replace(/[&<>"']/g, c => `&#${c.charCodeAt(0)};`);

// CommonMark ends no emphasis between a mark and a letter, as in **"말"**은, which Korean writes often.
const strong = {
  name: "koreanStrong",
  level: "inline",
  start: source => source.indexOf("**"),
  tokenizer(source) {
    const found = /^\*\*(?=[^\s*])([^*\n]*\p{P})\*\*(?=\p{L})/u.exec(source);
    return found && { type: "strong", raw: found[0], text: found[1], tokens: this.lexer.inlineTokens(found[1]) };
  },
};

const markdown = new marked.Marked({
  gfm: true,
  breaks: true,
  extensions: [strong],
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escape(text.trim()).replaceAll("\n", "<br>")}</p>` : escape(text)),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    // Nothing is loaded because an answer says so.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
  },
});

// The nodes of an answer.
function nodes(text) {
  const options = { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true };
  const fragment = DOMPurify.sanitize(markdown.parse(text), options);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer";
  }
  for (const pre of fragment.querySelectorAll("pre")) {
    const figure = document.createElement("figure"), bar = document.createElement("figcaption");
    const language = document.createElement("span"), copy = document.createElement("button");
    language.textContent = /language-(\S+)/.exec(pre.firstElementChild?.className)?.[1] ?? "";
    copy.type = "button";
    copy.className = "copy-code";
    copy.textContent = "복사 · Copy";
    bar.append(language, copy);
    pre.tabIndex = 0; // wide code is scrolled by keys too
    pre.replaceWith(figure);
    figure.append(bar, pre);
  }
  return [...fragment.childNodes];
}

// Shows an answer in `target`. Blocks that have not changed stay, with what is selected in them.
export function show(target, text) {
  let now;
  try {
    now = nodes(text);
  } catch (error) { // as nesting that is too deep
    console.warn(error);
    now = [document.createTextNode(text)];
  }
  const old = [...target.childNodes];
  let same = 0;
  while (same < old.length && same < now.length && old[same].isEqualNode(now[same])) same += 1;
  for (const node of old.slice(same)) node.remove();
  target.append(...now.slice(same));
}

// Puts a text into the clipboard, which browsers lend only to pages of this machine or of HTTPS: others get the old way.
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"), focused = document.activeElement;
  area.value = text;
  area.className = "unseen";
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  if (!done) throw new Error("the browser does not allow it");
}
