// What all pages share: asking the service, the theme, leaving, choosing what to compare.

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json", ...(body.headers ?? {}) }, body: JSON.stringify(body.data ?? {}),
  };
  const answer = await fetch(path, { ...options, credentials: "same-origin" });
  if (answer.status === 401) { location.assign("/login"); throw new Error("logged out"); }
  const told = answer.status === 204 ? {} : await answer.json();
  if (!answer.ok) {
    const problem = new Error(told.error ?? `status ${answer.status}`);
    problem.remedy = told.remedy ?? "";
    throw problem;
  }
  return told;
}

export function duration(seconds) {
  const whole = Math.round(seconds);
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
