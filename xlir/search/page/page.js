"use strict";

// The address holds the query, so that it can be saved, sent and revisited. An uploaded photo is
// not part of it: `uploads` keeps this visit's photos, for the back button.

const FIELDS = ["q", "not", "folder", "from", "to"];
const FEW = 60;
const MANY = 200;
// As in the command line: one in twenty queries that fit a photo finds none.
const CUTOFF = 0.05;
const LARGEST_UPLOAD = 30e6;
const SECONDS = 40;

const at = (id) => document.getElementById(id);
const uploads = [];
let running = null;
let shown = { fields: {}, like: "", photo: null };

/** The query that the address and the history name. */
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
  const text = parameters.toString();
  return text ? `?${text}` : location.pathname;
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
  const file = uploads[query.photo];
  if (!query.fields.q && !query.like && !file) {
    const lost = query.photo !== null ? "Choose the photo again: it was not kept." : "";
    return finish(null, lost || "Describe a photo, or choose one that others should be like.");
  }
  const control = (running = new AbortController());
  const timer = setTimeout(() => control.abort("slow"), SECONDS * 1000);
  at("status").textContent = "Searching…";
  at("results").setAttribute("aria-busy", "true");
  try {
    const answer = await ask(query, file, count, control.signal);
    finish(answer.hits, foundText(answer.hits.length), count);
  } catch (error) {
    if (control !== running) return; // another search has begun
    const reason = error instanceof Problem ? error.message : "The service does not answer.";
    finish(null, reason);
  } finally {
    clearTimeout(timer);
  }
}

class Problem extends Error {}

/** The answer of the service; throws a Problem that says in words what is wrong. */
async function ask(query, file, count, signal) {
  const { q, not } = query.fields;
  const parts = { q, not, count, where: filterOf(query.fields) };
  const options = { signal };
  let address = "/api/search";
  if (file) {
    options.method = "POST";
    options.body = new FormData();
    options.body.set("photo", file, "photo");
    for (const [name, value] of Object.entries(parts)) if (value) options.body.set(name, value);
  } else {
    const parameters = new URLSearchParams();
    const cutoff = count < MANY ? CUTOFF : 0;
    for (const [name, value] of Object.entries({ ...parts, like: query.like, cutoff })) {
      if (value) parameters.set(name, value);
    }
    address += `?${parameters}`;
  }
  const response = await fetch(address, options);
  if (response.ok) return response.json();
  const body = await response.json().catch(() => ({}));
  throw new Problem(`That did not work: ${body.detail ?? response.statusText}.`);
}

function foundText(number) {
  if (!number) return "No photo fits. Try other words, or fewer filters.";
  return number === 1 ? "1 photo, the best" : `${number} photos, the best first`;
}

function finish(hits, text, count = FEW) {
  const items = (hits ?? []).map(item);
  at("results").replaceChildren(...items);
  at("results").removeAttribute("aria-busy");
  at("status").textContent = text;
  // A search for more also shows photos that hardly fit.
  const complete = !hits || count >= MANY || (items.length < count && !shown.fields.q);
  at("show-more").hidden = complete;
  at("show-more").textContent = items.length < count ? "Show photos that hardly fit" : "Show more";
}

function item(hit) {
  const element = at("result").content.cloneNode(true).firstElementChild;
  const [link, image, button] = ["a", "img", "button"].map((name) => element.querySelector(name));
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
  button.setAttribute("aria-label", `More like ${hit.name}`);
  button.addEventListener("click", () => {
    go({ fields: { ...queryOfForm(), q: "" }, like: hit.id, photo: null });
    at("q").focus();
    scrollTo({ top: 0 });
  });
  return element;
}

function choose(file) {
  if (!file) return;
  if (file.size > LARGEST_UPLOAD) {
    return finish(null, `The photo is larger than ${LARGEST_UPLOAD / 1e6} MB.`);
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
addEventListener("popstate", () => show(queryOfAddress()));

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

show(queryOfAddress());
