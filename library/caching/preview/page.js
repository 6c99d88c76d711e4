"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const items = data.items.map((item, order) => ({...item, order}));
const $ = (id) => document.getElementById(id);
const PER_TURN = 48;
const SHOWN_CAPTIONS = 3;
const percent = (share) => (100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0) + "%";
const manySubsets = new Set(items.map((item) => item.subset)).size > 1;
const size = (item) => item.sizes[0].join("x");

// What the page shows is this state, and the address says it, so that a view can be linked to.
const DEFAULTS = {warning: "", search: "", bucket: "", subset: "", sort: "order", cut: "50", apart: "", overlay: "",
  width: "320"};
let state = {...DEFAULTS, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1)))};

const SORTS = {
  order: (a, b) => a.order - b.order,
  name: (a, b) => a.name.localeCompare(b.name, undefined, {numeric: true}),
  warnings: (a, b) => b.warnings.length - a.warnings.length,
  changed: (a, b) => (b.changed ?? -1) - (a.changed ?? -1),
  unchanged: (a, b) => (a.changed ?? 2) - (b.changed ?? 2),
  cropped: (a, b) => b.cropped - a.cropped,
  enlarged: (a, b) => b.enlarged - a.enlarged,
  bucket: (a, b) => a.sizes[0][0] - b.sizes[0][0] || a.sizes[0][1] - b.sizes[0][1],
};

const has = (item, kind) => item.warnings.some(([name]) => name === kind);
const KINDS = {
  "": () => true,
  any: (item) => item.warnings.length > 0,
  clean: (item) => item.warnings.length === 0,
};
for (const [kind] of data.kinds) KINDS[kind] = (item) => has(item, kind);

function fits(item) {
  const words = state.search.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (item.name + " " + item.captions.map(([caption]) => caption).join(" ")).toLowerCase();
  return (KINDS[state.warning] ?? KINDS[""])(item) && (!state.bucket || size(item) === state.bucket)
    && (!state.subset || item.subset === state.subset) && words.every((word) => text.includes(word));
}

// Pictures: a chunk of them is parsed when the first of its items comes into sight.
const chunks = new Map();
function picturesOf(item) {
  if (!item.place) return null;
  const [chunk, place] = item.place;
  if (!chunks.has(chunk)) chunks.set(chunk, read(`pictures-${chunk}`));
  return chunks.get(chunk)[place];
}

const sight = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    sight.unobserve(entry.target);
    fill(entry.target);
  }
}, {rootMargin: "600px"});

function fill(card) {
  const pictures = picturesOf(card.item);
  if (!pictures) return;
  card.querySelector(".target").src = pictures.target;
  if (pictures.changed) card.querySelector(".changed").src = pictures.changed;
  const views = card.querySelector(".views");
  const show = (number) => {
    const view = pictures.views[number];
    card.querySelector(".condition").src = view.condition;
    for (const name of [".mask", ".tint"]) card.querySelector(name).src = view.mask;
    [...views.children].forEach((button, index) => button.setAttribute("aria-pressed", index === number));
  };
  if (pictures.views.length > 1) {
    pictures.views.forEach((_, number) => {
      const button = document.createElement("button");
      button.textContent = number + 1;
      button.title = `condition variant ${number + 1} of ${card.item.masks}`;
      button.onclick = () => show(number);
      views.append(button);
    });
  }
  show(0);
  card.dataset.filled = "yes";
}

function facts(item) {
  const told = [item.sizes.map((each) => each.join("x")).join(", "), item.mode];
  if (manySubsets) told.push(item.subset);
  if (item.changed !== null) told.push(`${percent(item.changed)} changed`);
  if (item.cropped >= 0.005) told.push(`${percent(item.cropped)} cropped away`);
  if (item.enlarged > 1.005) told.push(`enlarged ${item.enlarged.toFixed(2)}x`);
  if (item.variants > 1) told.push(`${item.variants} crops or mirror images`);
  if (item.masks > 1) told.push(`${item.masks} conditions`);
  if (item.heldOut) told.push("held out");
  return told.join(" · ");
}

function caption([text, lost]) {
  const line = document.createElement("span");
  if (!lost) {
    line.textContent = text || "(empty caption)";
    return line;
  }
  const unread = document.createElement("s");
  unread.title = "T5 does not see this";
  unread.textContent = lost.trim();
  const atItsEnd = text.endsWith(unread.textContent);
  line.append(atItsEnd ? text.slice(0, -unread.textContent.length) : text + " ", unread);
  return line;
}

function make(item) {
  const card = $("card").content.firstElementChild.cloneNode(true);
  card.item = item;
  card.dataset.name = item.name;
  card.classList.toggle("warned", item.warnings.length > 0);
  card.style.setProperty("--aspect", item.sizes[0][0] / item.sizes[0][1]);
  card.querySelector(".name").textContent = item.name;
  card.querySelector(".facts").textContent = facts(item);
  for (const [kind, message] of item.warnings) {
    const line = document.createElement("li");
    line.dataset.kind = kind;
    line.textContent = message;
    card.querySelector(".warnings").append(line);
  }
  const captions = card.querySelector(".captions");
  captions.append(...item.captions.slice(0, SHOWN_CAPTIONS).map(caption));
  if (item.captions.length > SHOWN_CAPTIONS) captions.append(`and ${item.captions.length - SHOWN_CAPTIONS} more`);
  const slider = card.querySelector(".slider");
  slider.value = state.cut;
  slider.oninput = () => card.style.setProperty("--cut", slider.value);
  for (const name of [".compare", ".strip"]) card.querySelector(name).hidden = !item.place;
  card.querySelector(".unseen").hidden = !!item.place;
  card.querySelector(".differs").hidden = item.changed === null;
  if (item.place) sight.observe(card);
  return card;
}

let chosen = [];
let made = 0;
function makeMore() {
  $("cards").append(...chosen.slice(made, made + PER_TURN).map(make));
  made = Math.min(chosen.length, made + PER_TURN);
}
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting) && made < chosen.length) makeMore();
}, {rootMargin: "1200px"}).observe($("more"));

function show() {
  chosen = items.filter(fits).sort((a, b) => (SORTS[state.sort] ?? SORTS.order)(a, b) || a.order - b.order);
  made = 0;
  sight.disconnect();
  $("cards").replaceChildren();
  makeMore();
  $("count").textContent = `${chosen.length} of ${items.length} items`;
  $("none").hidden = chosen.length > 0;
  for (const button of $("kinds").children) {
    button.setAttribute("aria-pressed", button.dataset.kind === state.warning);
  }
}

function appear() {
  const style = document.documentElement.style;
  style.setProperty("--cut", state.cut);
  style.setProperty("--width", state.width + "px");
  document.body.classList.toggle("apart", !!state.apart);
  document.body.classList.toggle("mask-on-top", !!state.overlay);
}

function set(name, value) {
  state = {...state, [name]: value};
  const said = Object.entries(state).filter(([key, each]) => key in DEFAULTS && each !== DEFAULTS[key]);
  history.replaceState(null, "", "#" + new URLSearchParams(said));
  if (["cut", "width", "apart", "overlay"].includes(name)) {
    appear();
    if (name === "cut") {
      for (const card of $("cards").children) {
        card.style.removeProperty("--cut");
        card.querySelector(".slider").value = value;
      }
    }
  } else {
    show();
    scrollTo(0, 0);
  }
}

function options(select, label, values) {
  select.append(new Option(label, ""), ...[...new Set(values)].map((value) => new Option(value, value)));
  select.parentElement.hidden = select.options.length < 3;
}

function chip(kind, title, advice) {
  const count = items.filter(KINDS[kind]).length;
  const button = document.createElement("button");
  button.dataset.kind = kind;
  button.title = advice;
  button.disabled = !count && kind !== state.warning;
  button.classList.toggle("found", count > 0 && kind !== "" && kind !== "clean");
  const number = document.createElement("b");
  number.textContent = count;
  button.append(title, number);
  button.onclick = () => set("warning", state.warning === kind ? "" : kind);
  $("kinds").append(button);
}

chip("", "all", "every item");
chip("any", "with warnings", "items with at least one warning");
for (const [kind, title, advice] of data.kinds) chip(kind, title, advice);
chip("clean", "without warnings", "items that nothing was found about");
const byArea = [...items].sort(SORTS.bucket);
options($("bucket"), "all", byArea.map(size));
options($("subset"), "all", items.map((item) => item.subset));
for (const name of ["search", "bucket", "subset", "sort", "cut", "width"]) {
  $(name).value = state[name];
  $(name).oninput = () => set(name, $(name).value);
}
for (const name of ["apart", "overlay"]) {
  $(name).checked = !!state[name];
  $(name).oninput = () => set(name, $(name).checked ? "1" : "");
}
const pictured = data.pictures < items.length ? `, pictures of ${data.pictures}` : "";
$("about").textContent = [`${items.length} items${pictured}`, data.config, `decoded from ${data.cache}`,
  `with the VAE of ${data.base}`, data.written].filter(Boolean).join(" · ");
appear();
show();
document.documentElement.dataset.ready = "yes";
