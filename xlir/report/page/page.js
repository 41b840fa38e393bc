"use strict";

// Filters the examples of each test set by kind, language and text, and shows the first few of those
// that fit. Without this script, all examples are shown.

const FEW = 12;

const words = (text) => text.toLocaleLowerCase().normalize("NFKD");

for (const form of document.querySelectorAll("form.filter")) {
  const section = form.parentElement;
  const [count, nothing, more] = [".count", ".nothing", ".more"].map((one) =>
    section.querySelector(one),
  );
  const items = [...section.querySelectorAll(".examples > li")].map((element) => ({
    element,
    kind: element.dataset.kind,
    languages: element.dataset.languages.split(" "),
    text: words([...element.querySelectorAll(".query")].map((one) => one.textContent).join("\n")),
  }));
  let most = FEW;

  const show = () => {
    const { kind, language, text } = Object.fromEntries(new FormData(form));
    const wanted = words(text.trim());
    const fit = items.filter(
      (item) =>
        (!kind || item.kind === kind) &&
        (!language || item.languages.includes(language)) &&
        item.text.includes(wanted),
    );
    const shown = new Set(fit.slice(0, most));
    for (const item of items) item.element.hidden = !shown.has(item);
    count.textContent = `${shown.size} of ${fit.length} examples`;
    nothing.hidden = fit.length > 0;
    more.hidden = shown.size === fit.length;
  };

  form.addEventListener("input", () => {
    most = FEW;
    show();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  more.addEventListener("click", () => {
    const next = items.filter((item) => !item.element.hidden).at(-1).element;
    most = Infinity;
    show();
    // The button is gone: the keyboard goes on from the last example that was shown before.
    next.tabIndex = -1;
    next.focus();
  });
  form.hidden = false;
  show();
}
