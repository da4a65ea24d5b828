// The page's data, and small helpers: elements are made of text, never of HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);

/** An element; `attributes` are set as such, `children` are elements or text. */
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** An SVG element. */
function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

const className = (label) => data.names[label] ?? String(label);
const percent = (value, digits = 1) => `${(100 * value).toFixed(digits)} %`;
const signed = (value) => (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2);
const several = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

/** Base64 as an array of numbers of a type, such as Uint16Array. */
function decoded(text, type) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return new type(bytes.buffer);
}

const PRUNED = 65535, CHANCES = 200, NO_AGENT = 255;
const top = (guesses) => guesses[0][0];

/** The last step of method `m` on an image, and whether its class differs from the dense one. */
const lastOf = (list) => list[list.length - 1];
const predicted = (image, m) => top(lastOf(image.runs[m].guesses));
const changed = (image, m) => predicted(image, m) !== top(image.dense);
