// The token comes behind the #, which no server sees; it is exchanged for a cookie and forgotten.
import { ask } from "./base.js";

const form = document.getElementById("login"), problem = document.getElementById("problem");

async function enter(token) {
  try {
    await ask("/login", { data: { token } });
    location.replace("/");
  } catch (error) {
    problem.textContent = [error.message, error.remedy].filter(Boolean).join(": ");
  }
}

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) { history.replaceState(null, "", "/login"); enter(given); }
form.addEventListener("submit", (event) => { event.preventDefault(); enter(form.token.value.trim()); });
