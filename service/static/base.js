// What all pages share: asking the service, the theme, leaving, choosing what to compare.

const HEALTH_MS = 10_000, banner = document.getElementById("banner");
let since = null;

// The service does not answer: what is shown stays, and is said to be old.
export function lost() {
  if (banner.dataset.kind) return;
  since ??= new Date();
  banner.dataset.kind = "lost";
  banner.textContent = `The connection to the service is lost: this page shows how things stood at ${since.toLocaleTimeString()}. It tries again by itself.`;
  banner.hidden = false;
}

export function found() {
  since = null;
  if (banner.dataset.kind !== "lost") return;
  delete banner.dataset.kind;
  banner.hidden = true;
}

export class LoggedOut extends Error {
  constructor() { super("the session has ended"); this.remedy = "log in again"; }
}

// The page stays, so that nothing that was typed is gone.
export function loggedOut() {
  if (banner.dataset.kind === "session") return;
  banner.dataset.kind = "session";
  const next = encodeURIComponent(location.pathname + location.search);
  banner.replaceChildren("The session has ended. ", element("a", { href: `/login?next=${next}`, textContent: "Log in again" }), " to go on here.");
  banner.hidden = false;
}

export async function ask(path, body) {
  const answer = await send(path, body);
  const told = answer.status === 204 ? {} : await answer.json();
  if (answer.ok) return told;
  const problem = new Error(told.error ?? `status ${answer.status}`);
  problem.remedy = told.remedy ?? "";
  problem.status = answer.status;
  problem.retryAfter = Number(answer.headers.get("Retry-After")) || 0;
  throw problem;
}

// The answer as it is; what says that the session or the connection is gone is shown by the banner.
export async function send(path, body, headers = {}) {
  const options = body === undefined ? { headers } : {
    method: "POST", headers: { "Content-Type": "application/json", ...(body.headers ?? {}) }, body: JSON.stringify(body.data ?? {}),
  };
  let answer;
  try { answer = await fetch(path, { ...options, credentials: "same-origin" }); } catch {
    lost();
    throw Object.assign(new Error("the service does not answer"), { remedy: "look whether it runs, then try again" });
  }
  found();
  if (answer.status === 401) { loggedOut(); throw new LoggedOut(); }
  return answer;
}

export function duration(seconds) {
  const whole = Math.round(seconds ?? 0);
  if (whole < 60) return `${whole} s`;
  const hours = Math.floor(whole / 3600), minutes = Math.floor(whole / 60) % 60;
  return hours ? `${hours} h ${String(minutes).padStart(2, "0")} min` : `${minutes} min ${String(whole % 60).padStart(2, "0")} s`;
}

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function colours() {
  const style = getComputedStyle(document.documentElement);
  return { ink: style.getPropertyValue("--ink").trim(), quiet: style.getPropertyValue("--quiet").trim(), grid: style.getPropertyValue("--grid").trim() };
}

// Whether the service is still there, on a page that has nothing else to ask.
setInterval(() => { if (!document.hidden && banner.dataset.kind !== "session") fetch("/v1/health").then(found, lost); }, HEALTH_MS);

const theme = document.getElementById("theme");
if (theme) {
  const show = () => theme.setAttribute("aria-pressed", String(document.documentElement.dataset.theme === "dark"));
  show();
  theme.addEventListener("click", () => { window.chooseTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"); show(); });
}
document.getElementById("logout")?.addEventListener("click", async () => { await ask("/logout", {}); location.assign("/login"); });

const choose = document.getElementById("choose");
if (choose) {
  const button = choose.querySelector("#compare");
  const boxes = () => [...choose.querySelectorAll("input[type=checkbox]:checked")];
  const show = () => { button.disabled = boxes().length < 1 || boxes().length > 12; };
  choose.addEventListener("change", show);
  choose.addEventListener("submit", (event) => {
    event.preventDefault();
    const of = (name) => boxes().filter((box) => box.name === name).map((box) => box.value).join(",");
    const query = new URLSearchParams(Object.entries({ studies: of("study"), candidates: of("candidate") }).filter(([, value]) => value));
    location.assign(`/compare?${query}`);
  });
  show();
}
