"use strict";
const detail = document.getElementById("detail");
const marks = document.querySelectorAll("[data-patch]");
for (const mark of marks) {
  const same = [...marks].filter(other => other.dataset.patch === mark.dataset.patch);
  const enter = () => {
    same.forEach(other => other.classList.add("on"));
    const about = same.find(other => other.ariaLabel);
    if (about) detail.textContent = about.ariaLabel;
  };
  const leave = () => same.forEach(other => other.classList.remove("on"));
  mark.addEventListener("mouseenter", enter);
  mark.addEventListener("mouseleave", leave);
  mark.addEventListener("focusin", enter);
  mark.addEventListener("focusout", leave);
}
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(part => { part.open = true; }));
