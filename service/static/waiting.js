// A search that has not begun: as soon as it has a study, its page is shown.
import { duration } from "./base.js";
import { clock, follow, showState, steer } from "./live.js";

const study = document.getElementById("study").dataset.study, told = document.getElementById("told");
const time = clock(told, null, (elapsed) => `The search is starting (${duration(elapsed)}).`);
steer(study);
follow(study, (status) => {
  if (status.explored !== undefined) { location.reload(); return; }
  showState(status);
  time(status.state === "running" ? status.elapsed_s : null);
  if (status.state === "running" && status.elapsed_s !== undefined) return;
  told.textContent = [status.job?.position ? `Place ${status.job.position} in the queue.` : status.job?.state === "running" ? "The search is starting." : "", status.job?.reason ?? ""].join(" ").trim();
});
