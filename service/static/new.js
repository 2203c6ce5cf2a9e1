// The form of a new search. It says nothing by itself: the service checks as the command line does.
import { ask, duration, element } from "./base.js";

const form = document.getElementById("new"), problem = document.getElementById("problem"), planned = document.getElementById("planned");
const TEXTS = ["teacher", "data", "field", "profile", "budget", "sampler", "qat_threshold"];
let key = crypto.randomUUID?.() ?? String(Math.random()).slice(2);
const presets = JSON.parse(form.dataset.presets);

function settings() {
  const spec = { ...presets[form.preset.value] };
  for (const name of TEXTS) if (form[name].value !== "") spec[name] = form[name].value;
  const targets = [...form.targets.selectedOptions].map((option) => option.value);
  if (targets.length) spec.targets = targets;
  if (form.seed.value !== "") spec.seed = Number(form.seed.value);
  spec.mixed_precision = form.mixed_precision.checked;
  spec.second_order = form.second_order.checked;
  if (form.more.value.trim()) {
    let more;
    try { more = JSON.parse(form.more.value); } catch (error) { throw Object.assign(new Error(`more: no JSON: ${error.message}`), { remedy: "write {\"name\": value}" }); }
    Object.assign(spec, more);
  }
  return spec;
}

function clear() {
  problem.textContent = planned.textContent = "";
  for (const span of form.querySelectorAll(".field-problem")) span.textContent = "";
  for (const field of form.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

function show(error) {
  const text = [error.message, error.remedy].filter(Boolean).join("; ");
  const name = /^(?:body\.)?(?:spec\.)?([a-z_]+)/.exec(error.message)?.[1];
  const field = name ? form.elements.namedItem(name) : null, where = document.getElementById(`${name}-problem`);
  if (!field || !where) { problem.textContent = text; return; }
  where.textContent = text;
  field.setAttribute("aria-invalid", "true");
  field.focus();
}

// One plan is made at a time; while another client's is made, this one waits and asks again.
async function planOf(spec, tries = 30) {
  try { return await ask("/v1/plan", { data: { spec } }); } catch (error) {
    if (error.status !== 429 || tries <= 0) throw error;
    planned.textContent = "Another plan is being made; this one waits.";
    await new Promise((done) => setTimeout(done, 1000 * (error.retryAfter || 2)));
    return planOf(spec, tries - 1);
  }
}

form.preset.addEventListener("change", () => { form.budget.value = presets[form.preset.value].budget; });
form.addEventListener("input", () => { key = crypto.randomUUID?.() ?? String(Math.random()).slice(2); });

document.getElementById("plan").addEventListener("click", async () => {
  clear();
  planned.textContent = "…";
  try {
    const plan = await planOf(settings());
    planned.replaceChildren(element("h2", { textContent: "What it would cost" }), element("ul", {},
      element("li", { textContent: `${plan.teacher}: ${(plan.parameters / 1e6).toFixed(1)} million parameters, ${plan.space_size.toLocaleString("en")} candidates for ${plan.profile}` }),
      element("li", { textContent: `${duration(plan.budget_s)}: ${Object.entries(plan.seconds).map(([stage, s]) => `${stage} ${duration(s)}`).join(", ")}` }),
      element("li", { textContent: `about ${plan.expected_candidates} candidates explored, time for ${plan.expected_finalists} finalists` }),
      element("li", { textContent: `disk about ${(plan.disk_bytes / 1e9).toFixed(1)} GB, memory about ${(plan.memory_bytes / 1e9).toFixed(1)} GB` }),
      ...plan.notes.map((note) => element("li", { textContent: note }))));
  } catch (error) { planned.textContent = ""; show(error); }
});

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  clear();
  const start = form.querySelector("button[type=submit]");
  start.disabled = true;
  try {
    const name = form.elements.namedItem("name").value;
    const job = await ask("/v1/studies", { headers: { "Idempotency-Key": key }, data: { spec: settings(), ...(name ? { name } : {}) } });
    location.assign(`/studies/${encodeURIComponent(job.study)}`);
  } catch (error) { show(error); } finally { start.disabled = false; }
});
