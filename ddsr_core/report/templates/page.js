"use strict";
document.documentElement.classList.add("js");
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        const [m, n] = [parseFloat(x.replace("\u2212", "-")), parseFloat(y.replace("\u2212", "-"))];
        if (isNaN(m) !== isNaN(n)) return isNaN(m) ? 1 : -1;
        const order = isNaN(m) ? x.localeCompare(y) : m - n;
        return up ? order : -order;
      });
      rows.forEach((row) => row.classList.remove("first"));
      table.tBodies[0].append(...rows);
    });
  });
}
const dialog = document.createElement("dialog");
const picture = document.createElement("img");
const caption = document.createElement("p");
dialog.append(picture, caption);
document.body.append(dialog);
dialog.addEventListener("click", () => dialog.close());
const show = (image) => {
  picture.src = image.src;
  picture.alt = image.alt;
  caption.textContent = image.title || image.alt;
  dialog.showModal();
};
for (const image of document.querySelectorAll("img.zoom")) {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.addEventListener("click", () => show(image));
  image.addEventListener("keydown", (event) => {
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      show(image);
    }
  });
}
