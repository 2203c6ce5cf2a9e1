// The parts of a page that the service has drawn (data-live), drawn again in place: what was ticked, opened, focused or scrolled stays.
import { LoggedOut, found, lost, loggedOut } from "./base.js";

const name = (element) => element?.id ? `#${CSS.escape(element.id)}` : element?.value && element.name ? `[name="${element.name}"][value="${CSS.escape(element.value)}"]` : null;

export async function redraw() {
  let answer;
  try { answer = await fetch(location.href, { credentials: "same-origin", headers: { Accept: "text/html" } }); } catch (error) { lost(); throw error; }
  found();
  if (answer.redirected && new URL(answer.url).pathname === "/login") { loggedOut(); throw new LoggedOut(); }
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of document.querySelectorAll("[data-live]")) {
    const other = fresh.querySelector(`[data-live="${part.dataset.live}"]`);
    if (other && other.innerHTML !== part.innerHTML) replace(part, other);
  }
  return fresh;
}

function replace(part, other) {
  const ticked = [...part.querySelectorAll("input:checked")].map(name), focused = part.contains(document.activeElement) ? name(document.activeElement) : null;
  const opened = [...part.querySelectorAll("details")].map((details) => details.open);
  if (other.dataset.query !== undefined) part.dataset.query = other.dataset.query;
  part.replaceChildren(...[...other.childNodes].map((node) => document.importNode(node, true)));
  for (const selector of ticked) { const box = selector && part.querySelector(selector); if (box) box.checked = true; }
  part.querySelectorAll("details").forEach((details, i) => { details.open = Boolean(opened[i]); });
  if (focused) part.querySelector(focused)?.focus();
}
