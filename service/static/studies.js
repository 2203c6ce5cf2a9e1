// The list keeps itself fresh: every few seconds while something runs, seldom otherwise.
import { ask, duration } from "./base.js";

const changed = document.getElementById("changed");

async function refresh() {
  let busy = false;
  try {
    const known = new Set();
    for (const told of await ask("/v1/studies")) {
      const row = document.querySelector(`tr[data-study="${CSS.escape(told.study)}"]`);
      known.add(told.study);
      if (!row) { location.reload(); return; }
      const live = told.state;
      busy ||= ["running", "queued", "pausing", "stopping", "cancelling"].includes(live);
      const field = (name) => row.querySelector(`[data-field=${name}]`);
      const state = field("state");
      if (state.textContent !== live) {
        changed.textContent = `${told.study} is ${live}`;
        state.textContent = live;
        state.className = `state ${live}`;
      }
      field("stage").textContent = told.job?.position ? `place ${told.job.position} in the queue` : told.stage ?? "";
      for (const name of ["explored", "confirmed", "front"]) if (told[name] !== undefined) field(name).textContent = told[name];
      if (told.budget_s) {
        field("progress").max = told.budget_s;
        field("progress").value = told.spent_s;
        field("spent").textContent = `${duration(told.spent_s)} of ${duration(told.budget_s)}`;
      }
    }
  } catch { /* the next turn tries again */ }
  setTimeout(refresh, document.hidden ? 30000 : busy ? 3000 : 15000);
}
setTimeout(refresh, 2000);
