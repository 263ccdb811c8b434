// What tests/test_site.py asks of a page that a browser has laid out. `look()` returns faults by kind, and counts.

const HIDDEN = ".katex-mathml, .visually-hidden, script, style, noscript, title, [hidden]";
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const colors = new Map();

// Any CSS color as [red, green, blue, alpha], alpha from 0 to 1.
function rgba(color) {
  if (!colors.has(color)) {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    colors.set(color, [r, g, b, a / 255]);
  }
  return colors.get(color);
}

// `top` laid over the opaque color `under`.
function over([r, g, b, a], under) {
  return [r, g, b].map((value, k) => value * a + under[k] * (1 - a));
}

function ancestors(element) {
  const found = [];
  for (let node = element; node instanceof Element; node = node.parentElement) found.unshift(node);
  return found;
}

function luminance(color) {
  const [r, g, b] = color.map((value) => {
    const share = value / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

// WCAG's contrast of an element's text against what lies behind it.
function contrast(element) {
  let behind = [255, 255, 255];
  let opacity = 1;
  for (const node of ancestors(element)) {
    const style = getComputedStyle(node);
    opacity *= Number(style.opacity);
    behind = over(rgba(style.backgroundColor), behind);
  }
  const [r, g, b, a] = rgba(getComputedStyle(element).color);
  const [light, dark] = [luminance(over([r, g, b, a * opacity], behind)), luminance(behind)].sort((x, y) => y - x);
  return (light + 0.05) / (dark + 0.05);
}

// Elements with text of their own that can be seen.
function* texts() {
  for (const element of document.body.querySelectorAll("*")) {
    if (element.closest(HIDDEN) || element.closest("svg")) continue;
    const own = [...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
    if (own && element.checkVisibility({ visibilityProperty: true })) yield element;
  }
}

function name(element) {
  const place = element.closest("[id]");
  const words = (element.innerText || element.alt || "").trim().replace(/\s+/g, " ").slice(0, 50);
  return `${element.tagName.toLowerCase()}.${element.className} in #${place ? place.id : ""}: ${words}`;
}

function faint(limit) {
  const worst = new Map();
  for (const element of texts()) {
    const ratio = contrast(element);
    const kind = `${element.tagName}.${element.className}`;
    if (ratio < limit && !worst.has(kind)) worst.set(kind, `${ratio.toFixed(2)}: ${name(element)}`);
  }
  return [...worst.values()];
}

// Does a box between the element and the page cut or scroll what is too wide?
function inBox(element) {
  const boxes = ancestors(element.parentElement).filter((node) => !node.matches("html, body, #quarto-content"));
  return boxes.some((node) => getComputedStyle(node).overflowX !== "visible");
}

// Where each text that stands in the element itself ends. What has a scroll bar may hold longer ones.
function ownText(element) {
  if (getComputedStyle(element).overflowX !== "visible") return [];
  const texts = [...element.childNodes].filter((node) => node.nodeType === Node.TEXT_NODE && node.data.trim());
  return texts.map((node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getBoundingClientRect().right;
  });
}

// What makes a reader slide the page sideways, or is cut off at its edge.
function tooWide() {
  const edge = document.documentElement.clientWidth + 1;
  const found = [];
  if (document.documentElement.scrollWidth > edge) found.push(`the page, ${document.documentElement.scrollWidth} px`);
  for (const element of document.querySelectorAll("main *")) {
    const right = Math.max(element.getBoundingClientRect().right, ...ownText(element));
    if (right > edge && !inBox(element) && !element.closest(HIDDEN)) {
      found.push(`${Math.round(right)} px: ${name(element)}`);
    }
  }
  return found.slice(0, 3);
}

const overflows = (block) => block.scrollWidth > block.clientWidth + 1;

function look(limit) {
  for (const details of document.querySelectorAll("details")) details.open = true;
  const all = (selector) => [...document.querySelectorAll(selector)];
  const outputs = all("main .cell-output pre");
  const blocks = all("main pre").filter((block) => !block.closest(".cell-output"));
  const equations = all("main .math");
  const images = all("img");
  return {
    faint: faint(limit),
    wide: tooWide(),
    code: blocks.filter(overflows).map(name),
    outputs: outputs.filter(overflows).map(name),
    unset: equations.filter((math) => !math.querySelector(".katex")).concat(all(".katex-error")).map(name),
    undescribed: images.filter((image) => !(image.alt || "").trim()).map(name),
    broken: images.filter((image) => !image.complete || !image.naturalWidth).map(name),
    counts: {
      texts: [...texts()].length, code: blocks.length, outputs: outputs.length,
      equations: equations.length, images: images.length,
    },
  };
}
