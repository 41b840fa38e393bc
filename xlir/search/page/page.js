"use strict";

// The address holds the query, so that it can be saved, sent and revisited. An uploaded photo is
// not part of the address: `uploads` keeps this visit's photos, for the back button.

const FIELDS = ["q", "not", "folder", "from", "to"];
const FEW = 60;
const MANY = 200;
// As on the command line. At this cutoff, one in twenty queries that fit a photo finds none.
const CUTOFF = 0.05;
const TAGS = 8;
const LARGEST_UPLOAD = 30e6;
const SECONDS = 40;

const at = (id) => document.getElementById(id);
const uploads = [];
let running = null;
let shown = { fields: {}, like: "", photo: null };
// The hits of the last answer with their elements, and how many hits were asked for.
let found = { hits: [], count: FEW };

/** The query in the address and in the browser's history. */
function queryOfAddress() {
  const parameters = new URLSearchParams(location.search);
  const fields = Object.fromEntries(FIELDS.map((name) => [name, parameters.get(name) ?? ""]));
  return { fields, like: parameters.get("like") ?? "", photo: history.state?.photo ?? null };
}

function queryOfForm() {
  return Object.fromEntries(FIELDS.map((name) => [name, at(name).value.trim()]));
}

function addressOf(query) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...query.fields, like: query.like })) {
    if (value) parameters.set(name, value);
  }
  if (cutoff() !== CUTOFF) parameters.set("cutoff", cutoff());
  const text = parameters.toString();
  return text ? `?${text}` : location.pathname;
}

function cutoff() {
  return Number(at("cutoff").value);
}

/** Shows the query of the address, and its cutoff. */
function showAddress() {
  const value = Number(new URLSearchParams(location.search).get("cutoff") ?? CUTOFF);
  at("cutoff").value = value >= 0 && value <= 1 ? value : CUTOFF;
  show(queryOfAddress());
}

/** The filter as the service reads it. */
function filterOf(fields) {
  const terms = [];
  // A double quote is put in single quotes.
  if (fields.folder) terms.push(`folder "${fields.folder.replaceAll('"', `"'"'"`)}"`);
  if (fields.from || fields.to) terms.push(`taken ${fields.from}..${fields.to}`);
  return terms.join(" and ");
}

function go(query) {
  history.pushState({ photo: query.photo }, "", addressOf(query));
  show(query);
}

function show(query, count = FEW) {
  shown = query;
  for (const name of FIELDS) at(name).value = query.fields[name];
  const { q, ...filters } = query.fields;
  if (Object.values(filters).some(Boolean)) at("filters").open = true;
  document.title = q ? `${q} – Search photos` : "Search photos";
  showExample(query);
  search(query, count);
}

function showExample(query) {
  const file = uploads[query.photo];
  at("example").hidden = !file && !query.like;
  URL.revokeObjectURL(at("example-image").src);
  if (file) {
    at("example-image").src = URL.createObjectURL(file);
    at("example-text").textContent = `Like ${file.name}`;
  } else if (query.like) {
    at("example-image").src = `/api/photos/${encodeURIComponent(query.like)}/thumbnail`;
    at("example-text").textContent = "Like this photo";
  }
}

async function search(query, count) {
  running?.abort();
  running = null;
  const file = uploads[query.photo];
  if (!query.fields.q && !query.like && !file) {
    const lost = query.photo !== null ? "Choose the photo again: it was not kept." : "";
    return fail(lost || "Describe a photo, or choose one to find similar photos.");
  }
  const control = (running = new AbortController());
  const timer = setTimeout(() => control.abort("slow"), SECONDS * 1000);
  at("status").textContent = "Searching…";
  at("results").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(query, file, count, control.signal);
    found = { hits: answer.hits.map((hit) => ({ ...hit, element: item(hit) })), count };
    showFound();
  } catch (error) {
    if (control !== running) return; // another search has begun
    const reason = error instanceof Problem ? error.message : "The service does not answer.";
    fail(reason);
  } finally {
    clearTimeout(timer);
  }
}

class Problem extends Error {}

/** The answer of the service; throws a Problem that says in words what is wrong. */
async function ask(query, file, count, signal) {
  const { q, not } = query.fields;
  const parts = { q, not, count, where: filterOf(query.fields) };
  const body = file ? new FormData() : new URLSearchParams();
  for (const [name, value] of Object.entries({ ...parts, like: query.like })) {
    if (value) body.set(name, value);
  }
  if (!file) return answerOf(`/api/search?${body}`, { signal });
  body.set("photo", file, "photo");
  return answerOf("/api/search", { signal, method: "POST", body });
}

async function answerOf(address, options) {
  const response = await fetch(address, options);
  if (response.ok) return response.json();
  const body = await response.json().catch(() => ({}));
  throw new Problem(`That did not work: ${body.detail ?? response.statusText}.`);
}

/** Shows the hits of the last answer that pass the cutoff; hits without a percentile pass. */
function showFound() {
  const { hits, count } = found;
  const passing = hits.filter(({ percentile }) => percentile === null || percentile >= cutoff());
  at("results").replaceChildren(...passing.map(({ element }) => element));
  at("results").removeAttribute("aria-busy");
  at("status").textContent = foundText(passing.length, hits.length);
  // The best hits come first: if one does not pass the cutoff, no later one does.
  const whole = hits.length < count;
  at("show-more").hidden = whole || count >= MANY || passing.length < hits.length;
  at("fit").hidden = !hits.length || hits[0].percentile === null;
  const all = whole ? `${hits.length} photos` : `the ${hits.length} nearest photos`;
  at("passing").textContent = `${passing.length} of ${all} pass`;
  at("cutoff").setAttribute("aria-valuetext", `${cutoff()}: ${at("passing").textContent}`);
  at("tags-in").hidden = !hits.length;
}

function foundText(passing, number) {
  if (passing > 1) return `${passing} photos, the best first`;
  if (passing) return "1 photo";
  return number
    ? "No photo fits. Try other words, or a lower cutoff to see the nearest photos."
    : "No photo fits. Try other words, or fewer filters.";
}

/** Shows no photos, and says why. */
function fail(reason) {
  found = { hits: [], count: FEW };
  showFound();
  at("status").textContent = reason;
}

function item(hit) {
  const element = at("result").content.cloneNode(true).firstElementChild;
  const [link, image, like] = ["a", "img", ".like"].map((name) => element.querySelector(name));
  if (hit.file) link.href = hit.file;
  image.src = hit.thumbnail;
  image.alt = hit.name;
  element.querySelector(".name").textContent = hit.name;
  element.querySelector(".name").title = hit.path ?? hit.name;
  const day = hit.taken?.slice(0, 10);
  if (day) {
    element.querySelector("time").dateTime = day;
    element.querySelector("time").textContent = new Date(`${day}T12:00`).toLocaleDateString();
  }
  offerTags(element, hit);
  like.setAttribute("aria-label", `More like ${hit.name}`);
  like.addEventListener("click", () => {
    go({ fields: { ...queryOfForm(), q: "" }, like: hit.id, photo: null });
    at("q").focus();
    scrollTo({ top: 0 });
  });
  return element;
}

/** The button that shows and hides the tags of a photo. */
function offerTags(element, hit) {
  const [button, list] = [".tags-of", ".tags"].map((name) => element.querySelector(name));
  button.setAttribute("aria-label", `Tags of ${hit.name}`);
  list.setAttribute("aria-label", `Tags of ${hit.name}`);
  button.addEventListener("click", () => {
    list.hidden = !list.hidden;
    button.setAttribute("aria-expanded", !list.hidden);
    if (!list.hidden) showTags(list, hit.id);
  });
  // Shows the tags in another language.
  list.addEventListener("language", () => list.hidden || showTags(list, hit.id));
}

async function showTags(list, id) {
  const [text, tags] = ["p", "ul"].map((name) => list.querySelector(name));
  const language = at("language").value;
  const parameters = new URLSearchParams({ language, count: TAGS, cutoff: CUTOFF });
  text.textContent = "Looking for tags…";
  text.hidden = false;
  let items = [];
  let told = "";
  try {
    const answer = await answerOf(`/api/photos/${id}/tags?${parameters}`);
    items = answer.tags.map(({ tag }) => tagItem(tag, language));
    if (!items.length) told = "No tag fits this photo.";
  } catch (error) {
    told = error instanceof Problem ? error.message : "The service does not answer.";
  }
  if (language !== at("language").value) return; // another language was chosen
  text.textContent = told;
  text.hidden = !told;
  tags.replaceChildren(...items);
}

/** A link that searches for a tag. */
function tagItem(tag, language) {
  const element = document.createElement("li");
  const link = element.appendChild(document.createElement("a"));
  const query = { fields: { ...shown.fields, q: tag }, like: "", photo: null };
  link.href = addressOf(query);
  link.textContent = tag;
  link.lang = language;
  link.dir = "auto";
  link.addEventListener("click", (event) => {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // opens a tab or window
    event.preventDefault();
    go(query);
    at("q").focus();
    scrollTo({ top: 0 });
  });
  return element;
}

/** The language of tags that was chosen on an earlier visit. Browsers may refuse to keep it. */
function keptLanguage() {
  try {
    return localStorage.getItem("language");
  } catch {
    return null;
  }
}

function keepLanguage(code) {
  try {
    localStorage.setItem("language", code);
  } catch {
    // The next visit starts without a chosen language.
  }
}

/** Offers the languages that have tags. If there are none, the page hides all about tags. */
async function offerLanguages() {
  const { languages } = await answerOf("/api/languages").catch(() => ({ languages: [] }));
  const wanted = [keptLanguage(), ...navigator.languages];
  const codes = wanted.map((code) => code?.split("-")[0]);
  const chosen = codes.find((code) => languages.includes(code));
  for (const code of languages) {
    const name = new Intl.DisplayNames([code], { type: "language" }).of(code);
    at("language").add(new Option(name, code, false, code === chosen));
  }
  for (const option of at("language").options) option.lang = option.value;
  document.body.classList.toggle("with-tags", languages.length > 0);
}

function choose(file) {
  if (!file) return;
  if (file.size > LARGEST_UPLOAD) {
    return fail(`The photo is larger than ${LARGEST_UPLOAD / 1e6} MB.`);
  }
  uploads.push(file);
  go({ fields: { ...queryOfForm(), q: "" }, like: "", photo: uploads.length - 1 });
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  go({ ...shown, fields: queryOfForm() });
});
for (const name of ["folder", "from", "to", "not"]) {
  at(name).addEventListener("change", () => go({ ...shown, fields: queryOfForm() }));
}
at("photo").addEventListener("change", (event) => {
  choose(event.target.files[0]);
  event.target.value = "";
});
at("example-remove").addEventListener("click", () => {
  go({ fields: queryOfForm(), like: "", photo: null });
  at("q").focus();
});
at("show-more").addEventListener("click", () => search(shown, MANY));
at("cutoff").addEventListener("input", showFound);
at("cutoff").addEventListener("change", () => {
  history.replaceState(history.state, "", addressOf(shown));
});
at("language").addEventListener("change", () => {
  keepLanguage(at("language").value);
  for (const { element } of found.hits) {
    element.querySelector(".tags").dispatchEvent(new Event("language"));
  }
});
addEventListener("popstate", showAddress);

// A photo can be dropped anywhere on the page.
addEventListener("dragover", (event) => {
  event.preventDefault();
  at("drop").hidden = !event.dataTransfer.types.includes("Files");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) at("drop").hidden = true;
});
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").hidden = true;
  choose(event.dataTransfer.files[0]);
});

showAddress();
offerLanguages();
