// The token comes behind the #, which no server sees; it is exchanged for a cookie and forgotten.
import { ask } from "./base.js";

const form = document.getElementById("login"), problem = document.getElementById("problem");

// Where somebody came from whose session had ended: an address of this service only.
function next() {
  const wanted = new URL(new URLSearchParams(location.search).get("next") ?? "/", location.origin);
  return wanted.origin === location.origin && wanted.pathname !== "/login" ? wanted.href : "/";
}

async function enter(token) {
  try {
    await ask("/login", { data: { token } });
    location.replace(next());
  } catch (error) {
    problem.textContent = [error.message, error.remedy].filter(Boolean).join(": ");
  }
}

// On a page that is open already only the part behind the # changes.
function takeGiven() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) { history.replaceState(null, "", `/login${location.search}`); enter(given); }
}
takeGiven();
addEventListener("hashchange", takeGiven);
form.addEventListener("submit", (event) => { event.preventDefault(); enter(form.token.value.trim()); });
