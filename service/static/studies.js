// The list keeps itself fresh: every few seconds while something runs, seldom otherwise. Only its own part is asked for, and an
// unchanged one is not sent again.
import { duration, send } from "./base.js";
import { redraw } from "./redraw.js";

const LIVE = ["running", "queued", "pausing", "stopping", "cancelling"];
const changed = document.getElementById("changed"), table = document.querySelector("[data-live=rows]");
let tag = "", busy = [...document.querySelectorAll("[data-field=state]")].some((state) => LIVE.includes(state.textContent)), arrived = performance.now();

async function refresh() {
  try {
    const answer = await send(`/v1/studies?${table?.dataset.query ?? "limit=1"}`, undefined, tag ? { "If-None-Match": tag } : {});
    if (answer.ok) {
      const told = await answer.json(), first = tag === "";
      tag = answer.headers.get("ETag");
      busy = told.some((study) => LIVE.includes(study.state));
      say(told);
      if (!table && told.length) location.reload();
      else if (table && !(first && same(told))) { await redraw(); arrived = performance.now(); }
    }
  } catch { /* the banner says it; the next turn tries again */ }
  setTimeout(refresh, document.hidden ? 30000 : busy ? 3000 : 15000);
}

const row = (study) => table?.querySelector(`tr[data-study="${CSS.escape(study)}"]`);
const stateOf = (study) => row(study)?.querySelector("[data-field=state]").textContent;

// Whether the page shows what has come: the first answer only gives the tag.
function same(told) {
  return told.length === table.rows.length && told.every((s, i) => table.rows[i].dataset.study === s.study && stateOf(s.study) === s.state &&
    ["explored", "confirmed", "front"].every((name) => s[name] === undefined || row(s.study).querySelector(`[data-field=${name}]`).textContent === String(s[name])));
}

function say(told) {
  const news = told.filter((study) => stateOf(study.study) !== undefined && stateOf(study.study) !== study.state);
  if (news.length) changed.textContent = news.map((study) => `${study.study} is ${study.state}`).join(", ");
}

// Searches write their time only now and then: the page goes on by its own clock.
setInterval(() => {
  for (const spent of document.querySelectorAll("[data-field=spent][data-elapsed]")) {
    const elapsed = Number(spent.dataset.elapsed) + (performance.now() - arrived) / 1000;
    spent.textContent = `${duration(elapsed)} of ${duration(Number(spent.dataset.budget))}`;
    spent.closest("tr").querySelector("[data-field=progress]").value = elapsed;
  }
}, 1000);
setTimeout(refresh, 2000);
