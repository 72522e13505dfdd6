// The page: asks the API, shows the answers. The token lives in one variable and ends with the tab.
// Everything that came from an agent reaches the document as text only; the content policy forbids anything else.

let token = "";
let running = null; // what the present view has going on, to be stopped when another begins
const main = document.getElementById("main");
const WORST_FIRST = ["critical", "warning", "notice", "info"];
const VERDICT_WORDS = { fail: "FAIL", unknown: "UNKNOWN", pass: "PASS", waived: "FAIL, WAIVED", not_applicable: "N/A" };
const MAX_LINES = 500;
const MAX_BRIEF = 8;
const REFRESH = 5000;

// ---- building blocks

/** An element with attributes and children; strings become text. */
function el(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(key, value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  return node;
}

function svg(name, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

const tag = (word, text = word) => el("span", { class: `tag ${word}` }, text);
const short = (workload) => workload.replace(/^spiffe:\/\/[^/]+\//, "");
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const link = (workload) => `#/workload/${encodeURIComponent(workload)}`;

/** "3 min ago", with the exact time on hover; kept up to date by tick(). */
function when(micros) {
  if (!micros) return el("span", { class: "soft" }, "never");
  const date = new Date(micros / 1000);
  return el("time", { class: "soft nowrap", datetime: date.toISOString(), title: date.toISOString() }, ago(date));
}

function ago(date) {
  const seconds = Math.round((Date.now() - date.getTime()) / 1000);
  if (seconds < -5) return `in ${span(-seconds)}`;
  return seconds < 5 ? "just now" : `${span(seconds)} ago`;
}

function span(seconds) {
  if (seconds < 90) return `${seconds} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} d`;
}

function tick() {
  for (const node of document.querySelectorAll("time[datetime]")) {
    if (!node.dataset.exact) node.textContent = ago(new Date(node.dateTime));
  }
}

/** The bar of a posture. Unknown is hatched: it must never look like pass. */
function posture(counts) {
  const parts = ["fail", "unknown", "pass"].map((word) => [word, counts[word] || 0]);
  const idle = (counts.waived || 0) + (counts.not_applicable || 0);
  const total = parts.reduce((sum, [, count]) => sum + count, idle);
  if (total === 0) return el("span", { class: "soft" }, "no report yet");
  const bar = svg("svg", { class: "meter", viewBox: "0 0 150 10", role: "img", "aria-label": `${counts.fail} fail, ${counts.unknown} unknown, ${counts.pass} pass` });
  let x = 0;
  for (const [word, count] of [...parts, ["idle", idle]]) {
    const width = (150 * count) / total;
    bar.append(svg("rect", { class: word, x, y: 0, width, height: 10 }));
    if (word === "unknown") {
      for (let at = x + 2; at < x + width + 8 && width > 0; at += 6) {
        const top = Math.min(at, x + width), cut = at - top;
        if (cut < 8) bar.append(svg("line", { class: "hatch", x1: Math.max(at - 8, x), y1: at - 8 < x ? 10 - (x - at + 8) * 1.25 : 10, x2: top, y2: cut * 1.25 }));
      }
    }
    x += width;
  }
  const shown = counts.waived ? [...parts, ["waived", counts.waived]] : parts;
  const told = shown.map(([word, count], i) => [i ? " · " : "", el("b", { class: count ? word : "" }, String(count)), ` ${word}`]);
  return el("div", { class: "posture" }, bar, el("span", { class: "counts" }, told.flat()));
}

function table(heads, rows) {
  const head = el("tr", {}, heads.map((text) => el("th", { scope: "col" }, text)));
  return el("div", { class: "scroll", tabindex: "0" }, el("table", {}, el("thead", {}, head), el("tbody", {}, rows)));
}

// ---- asking

class Refused extends Error {
  constructor(status, error, hint) {
    super(hint ? `${error}: ${hint}` : error);
    this.status = status;
    this.short = sentence(error);
  }
}

async function ask(path, signal) {
  let answer;
  try {
    answer = await fetch(path, { headers: { authorization: `Bearer ${token}` }, signal, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw new Refused(0, "the collector cannot be reached", "is it running, and is this its address?");
  }
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => ({ error: `the collector answers ${answer.status}`, hint: "" }));
  throw new Refused(answer.status, told.error, told.hint);
}

const json = async (path, signal) => (await ask(path, signal)).json();

function trouble(error) {
  const place = document.getElementById("trouble");
  place.hidden = !error;
  place.textContent = error ? error.message : "";
}

/** Runs `show` now and again every few seconds until another view begins. */
function repeat(show) {
  const stop = new AbortController();
  running = stop;
  const round = async () => {
    try {
      await show(stop.signal);
      trouble(null);
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.status === 401) return enter(error.short);
      trouble(error);
    }
    if (!stop.signal.aborted) setTimeout(round, REFRESH);
  };
  round();
}

/** Puts a view in place without losing the reader's place: open details, focus and scroll stay. */
function show(...nodes) {
  const open = new Set([...main.querySelectorAll("details[open][data-key]")].map((node) => node.dataset.key));
  const focus = document.activeElement?.dataset?.key;
  const scrolled = [...main.querySelectorAll(".scroll")].map((node) => node.scrollLeft);
  main.replaceChildren(...nodes.flat());
  for (const node of main.querySelectorAll("details[data-key]")) node.open = node.open || open.has(node.dataset.key);
  main.querySelectorAll(".scroll").forEach((node, i) => { node.scrollLeft = scrolled[i] || 0; });
  if (focus) main.querySelector(`[data-key="${CSS.escape(focus)}"]`)?.focus();
}

// ---- views

function enter(complaint) {
  running?.abort();
  token = "";
  document.getElementById("leave").hidden = true;
  trouble(complaint ? new Error(complaint) : null);
  const field = el("input", { type: "password", name: "token", autocomplete: "off", spellcheck: "false", "aria-label": "Token", required: true });
  const submit = (event) => {
    event.preventDefault();
    token = field.value.trim();
    route();
  };
  show(el("section", { class: "empty enter" },
    el("h2", {}, "Show your token"),
    el("p", {}, "The collector made one on its first start. Its data_dir is /var/lib/sidewarden-collector, or /var/lib/sidewarden in the image:"),
    el("pre", {}, "<data_dir>/admin.token"),
    el("form", { onsubmit: submit }, field, el("button", { class: "main" }, "Open")),
    el("p", { class: "soft" }, "It is kept in this tab's memory only and is gone when you close or reload it. A link that ends in #token=… works, too.")));
  field.focus();
}

async function overview(signal) {
  const [state, list, told] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/workloads", signal), json("/api/v1/alerts", signal)]);
  frame(state);
  const firing = told.alerts.filter((alert) => alert.status === "firing");
  const sum = (word) => list.workloads.reduce((total, workload) => total + (workload.posture[word] || 0), 0);
  const tile = (value, text, kind = "") => el("div", { class: `tile ${value ? kind : ""}` }, el("b", {}, String(value)), el("span", {}, text));
  const silent = state.agents.silent;
  const tiles = el("div", { class: "tiles" },
    tile(firing.length, firing.length === 1 ? "alert fires" : "alerts fire", "bad"),
    tile(silent, silent === 1 ? "agent silent" : "agents silent", "bad"),
    tile(sum("fail"), "checks fail", "bad"),
    tile(sum("unknown"), "checks unknown", "doubt"),
    tile(state.agents.live, state.agents.live === 1 ? "agent live" : "agents live"),
    tile(state.events.toLocaleString("en"), "events taken"));
  show(tiles, inForce(state.policy), firing.length ? firingBlock(firing) : "", el("h2", { role: "heading", "aria-level": "1" }, "Workloads"),
    list.workloads.length ? table(["Workload", "State", "Posture", "Alerts", "Instances", "Mode", "Sees", "Last heard"], list.workloads.map(workloadRow)) : noAgents(state));
}

/** Which policy is in force, and who does not run it yet, or cannot do all of it. */
function inForce(policy) {
  const reach = policy.reach;
  const names = (list) => list.slice(0, 5).map(short).join(", ") + (list.length > 5 ? ` and ${list.length - 5} more` : "");
  const what = policy.version ? `Policy ${policy.version}` : "No policy";
  return el("p", { class: "soft" }, `${what}, directive ${reach.version}: run by ${reach.running} of ${plural(reach.connected, "connected agent")}.`,
    reach.behind.length ? [" ", tag("unknown", "lags"), ` ${names(reach.behind)}`] : "",
    reach.too_old.length ? [" ", tag("fail", "too old"), ` ${names(reach.too_old)}`] : "");
}

/** Alerts of one rule, severity and workload are one line here; the view of alerts has each. */
function firingBlock(firing) {
  const groups = new Map();
  for (const alert of firing) {
    const key = [alert.severity, alert.alert, alert.labels.workload].join(" ");
    groups.set(key, [...(groups.get(key) || []), alert]);
  }
  const all = [...groups.values()];
  const rest = all.slice(MAX_BRIEF).reduce((sum, group) => sum + group.length, 0);
  return [el("h2", {}, "Firing now"), el("ul", { class: "alerts brief" }, all.slice(0, MAX_BRIEF).map(briefItem)),
    rest > 0 ? el("p", { class: "more" }, el("a", { href: "#/alerts" }, `and ${rest} more`)) : ""].filter(Boolean);
}

function briefItem(group) {
  const [alert] = group;
  const workload = alert.labels.workload;
  const who = workload ? el("a", { href: link(workload) }, short(workload)) : el("span", { class: "soft" }, "collector");
  const names = group.map((one) => one.labels.check || one.labels.reason || one.labels.instance);
  const what = group.length === 1 ? alert.summary.replace(/^[^ ]+ \([^)]*\): /, "") : `${plural(group.length, alert.labels.check ? "check" : "alert")}: ${names.join(", ")}`;
  return el("li", { class: `alert ${alert.severity}` }, tag(alert.severity),
    el("a", { class: "rule-name", href: group.length === 1 ? `#/alerts/${alert.id}` : "#/alerts" }, alert.alert), who,
    el("span", { class: "what", title: what }, what), when(Math.max(...group.map((one) => one.since_us))));
}

function workloadRow(workload) {
  const many = workload.instances;
  const words = (pick) => [...new Set(many.map(pick).filter(Boolean))].join(", ") || "–";
  const alerts = WORST_FIRST.filter((word) => workload.alerts[word]).map((word) => [tag(word, `${workload.alerts[word]} ${word}`), " "]);
  const last = Math.max(0, ...many.map((agent) => agent.last_event_us || 0));
  const here = many.filter((agent) => !["gone", "stopped"].includes(agent.status)).length;
  return el("tr", { class: "row" },
    el("td", { class: "name" }, el("a", { href: link(workload.workload), "data-key": workload.workload }, workload.name)),
    el("td", {}, tag(workload.status)),
    el("td", {}, posture(workload.posture)),
    el("td", {}, alerts.length ? alerts.flat() : el("span", { class: "soft" }, "none")),
    el("td", { class: "number" }, here === many.length ? String(here) : `${here} of ${many.length}`),
    el("td", {}, words((agent) => agent.mode)),
    el("td", { class: "nowrap" }, words((agent) => VANTAGES[agent.vantage])),
    el("td", {}, when(last)));
}

const VANTAGES = { open: "open facts", same_user: "same user", ptrace: "SYS_PTRACE", node: "host" };

function noAgents(state) {
  const name = state.names[0] || "localhost";
  return el("section", { class: "empty" },
    el("h2", {}, "No agents yet"),
    el("p", {}, "Make a token on the collector's host, for the workload that the agent will stand beside:"),
    el("pre", {}, "sidewarden-collector token create --workload shop/orders"),
    el("p", {}, `Then start an agent with that token and this collector (${name}). It shows here as soon as it has enrolled.`));
}

async function workloadView(id, signal) {
  const query = `workload=${encodeURIComponent(id)}`;
  const [state, list, told, found, past] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/agents", signal), json("/api/v1/alerts", signal),
    json(`/api/v1/posture?${query}`, signal), json(`/api/v1/events?${query}&limit=50`, signal)]);
  frame(state);
  const agents = list.agents.filter((agent) => agent.workload === id);
  // What checks say stands in their table; here is the rest.
  const alerts = told.alerts.filter((alert) => alert.labels.workload === id && alert.status !== "resolved" && alert.alert !== "CheckFailed");
  show(el("div", { class: "head" }, el("h1", {}, short(id)), el("code", { class: "soft" }, id)),
    alerts.length ? [el("ul", { class: "alerts" }, alerts.map((alert) => alertItem(alert)))] : [],
    found.instances.flatMap((instance) => instanceBlock(instance, agents.find((agent) => agent.instance === instance.instance), found.guards_against || {})),
    el("h2", {}, "Events"),
    past.events.length ? eventTable(past.events) : el("p", { class: "soft" }, "None yet."),
    el("p", {}, el("a", { href: `#/events?${query}` }, "Follow this workload's events"), " · ",
      el("a", { href: `#/report?of=${encodeURIComponent(short(id))}` }, "The auditor's table of this workload")));
}

function instanceBlock(instance, agent, guards) {
  const facts = agent && el("div", { class: "facts" },
    fact("Agent", `${agent.version || "?"}, ${agent.mode || "mode not known"}, sees: ${VANTAGES[agent.vantage] || "not known"}`),
    fact("Session", session(agent)),
    agent.certificate && el("span", {}, el("b", {}, "Certificate ends "), when(agent.certificate.not_after), agent.certificate.elsewhere ? ", issued by a CA that is not this collector's" : ""),
    agent.renewal_failed && fact("Renewal fails", agent.renewal_failed),
    some("Talks to", agent.peers.filter((peer) => peer.direction !== "egress")),
    some("Goes to", agent.peers.filter((peer) => peer.direction === "egress")),
    Object.keys(agent.refused).length > 0 && fact("Refused", Object.entries(agent.refused).map(([reason, counted]) => `${counted.count} ${reason}`).join(", ")),
    Object.keys(agent.lost).length > 0 && fact("Events lost", Object.entries(agent.lost).map(([reason, counted]) => `${counted.count} (${reason})`).join(", ")));
  const stale = !["live", "away"].includes(instance.status);
  const rows = instance.findings.map((finding) => findingRow(instance.instance, finding, guards));
  return [el("h2", {}, `CIS Docker checks of ${instance.instance} `, tag(instance.status)), facts || "",
    stale ? el("p", { class: "soft" }, "Not watched now: this is how it was ", when(instance.last_event_us), ".") : "",
    el("div", { class: "facts" }, posture(instance.counts)),
    rows.length ? table(["CIS", "Check", "Status", "Evidence and remedy", "Since"], rows) : el("p", { class: "empty" }, "The agent has not reported its posture yet. It does so within seconds of its start."),
    ...(instance.containers || []).flatMap((container) => hostedBlock(instance.instance, container, guards))].filter(Boolean);
}

function hostedBlock(node, container, guards) {
  const rows = container.findings.map((finding) => findingRow(`${node}/${container.name}`, finding, guards));
  return [el("h2", {}, `Container ${container.name} `, tag(container.state)),
    el("div", { class: "facts" }, fact("Image", container.image), fact("Id", container.id.slice(0, 12)), posture(container.counts)),
    el("details", { "data-key": `${node}/${container.id}` }, el("summary", {}, "Its checks"), table(["CIS", "Check", "Status", "Evidence and remedy", "Since"], rows))];
}

function sourcesOf(finding) {
  if (!finding.sources || finding.sources.length < 2) return "";
  const line = (source) => el("li", {}, `${source.agent} (${VANTAGES[source.vantage] || source.vantage}): ${VERDICT_WORDS[source.verdict] || source.verdict}${source.disputed ? ", disputed" : ""}; ${source.evidence}`);
  return el("div", {}, finding.disagree ? tag("fail", "vantages disagree") : "", el("ul", { class: "evidence" }, finding.sources.map(line)));
}

const some = (name, peers) => peers.length > 0 && fact(name, [...new Set(peers.map((peer) => short(peer.peer)))].slice(0, 8).join(", "));
const fact = (name, text) => el("span", {}, el("b", {}, `${name} `), text);

function session(agent) {
  const it = agent.session;
  if (it.is === "live") return `${it.transport} from ${it.source}`;
  return it.is === "ended" ? `ended: ${it.reason}` : "enrolled, never connected";
}

function findingRow(instance, finding, guards) {
  const told = finding.evidence.length ? el("ul", { class: "evidence" }, finding.evidence.map((line) => el("li", {}, `${line.source}: ${line.line}`))) : "";
  const why = { unknown: ["To see it: ", el("code", {}, finding.grant || "")], not_applicable: [finding.why || ""], waived: [`${finding.why}; by ${finding.by}, until `, when(finding.until)] }[finding.verdict];
  const ways = [["docker run", "docker_run"], ["Compose", "compose"], ["Kubernetes", "kubernetes"]].filter(([, key]) => finding.remedy[key]);
  const wanted = ["fail", "waived", "unknown"].includes(finding.verdict) && ways.length > 0;
  const bad = finding.verdict === "fail" ? tag(finding.severity) : "";
  const guarded = Object.hasOwn(guards, finding.check) ? guards[finding.check] : "";
  const mend = finding.verdict === "unknown" ? "how to keep this rule" : "how to mend it";
  const more = [guarded && "what it guards against", wanted && mend].filter(Boolean).join(", and ");
  return el("tr", { class: "row" },
    el("td", { class: "nowrap" }, finding.ids.v1_3_1 || finding.ids.v1_6 || "–"),
    el("td", { class: "wide" }, finding.title, el("div", { class: "soft mono" }, finding.check)),
    el("td", { class: "nowrap" }, tag(finding.verdict, VERDICT_WORDS[finding.verdict] || finding.verdict), " ", bad),
    el("td", { class: "wide" }, why ? el("div", {}, why) : "", told, sourcesOf(finding),
      more ? el("details", { "data-key": `${instance}/${finding.check}` }, el("summary", {}, capital(more)), guarded && el("p", { class: "guards" }, guarded),
        wanted && el("div", { class: "remedy" }, ways.map(([name, key]) => way(name, finding.remedy[key])))) : ""),
    el("td", {}, when(finding.since_us)));
}

function way(name, text) {
  const button = el("button", { type: "button", "aria-label": `Copy the lines for ${name}` }, "Copy");
  button.addEventListener("click", async () => {
    const copied = await navigator.clipboard?.writeText(text).then(() => true, () => false);
    button.textContent = copied ? "Copied" : "Select and copy";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  return el("div", { class: "way" }, el("span", { class: "soft" }, name), el("pre", {}, text), button);
}

async function alertsView(id, signal) {
  const [state, told] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/alerts", signal)]);
  frame(state);
  const parts = [["firing", "Firing"], ["pending", "Pending"], ["resolved", "Ended a few minutes ago"]];
  const blocks = parts.map(([word, title]) => [title, told.alerts.filter((alert) => alert.status === word)]).filter(([, list]) => list.length);
  show(el("div", { class: "head" }, el("h1", {}, "Alerts")),
    blocks.length ? blocks.flatMap(([title, list]) => [el("h2", {}, `${title} (${list.length})`), el("ul", { class: "alerts" }, list.map((alert) => alertItem(alert, alert.id === id)))])
      : el("section", { class: "empty" }, el("h2", {}, "Nothing fires"), el("p", {}, "What would make an alert, and what each means, stands under ", el("a", { href: "#/rules" }, "Rules"), ". To be told elsewhere, set ", el("code", {}, "alerts.alertmanagers"), " in the collector's configuration.")));
}

function alertItem(alert, open = false) {
  const remedy = alert.what_to_do.includes("\n");
  const more = alert.evidence.length > 0 || remedy;
  const workload = alert.labels.workload;
  return el("li", { class: `alert ${alert.status === "resolved" ? "resolved" : alert.severity}` },
    el("div", { class: "line" }, tag(alert.severity), el("a", { href: `#/rules/${alert.alert}`, "data-key": `alert/${alert.id}` }, el("b", {}, alert.alert)),
      workload ? el("a", { href: link(workload) }, short(workload)) : "", alert.inhibited ? tag("pending", "held back: the agent is silent") : "", when(alert.ended_us || alert.since_us)),
    el("p", { class: "summary" }, alert.summary),
    remedy ? "" : el("p", { class: "todo" }, `What to do: ${alert.what_to_do}`),
    more ? el("details", { "data-key": `more/${alert.id}`, open }, el("summary", {}, remedy ? "Evidence and what to do" : "Evidence"),
      el("ul", { class: "evidence" }, alert.evidence.map((line) => el("li", {}, line))), remedy ? el("pre", { class: "body" }, alert.what_to_do) : "") : "");
}

const CERTIFICATES = { root: "Root CA", issuing: "Issuing CA", collector: "Collector, by its own CA", identity: "Collector, by another CA", identity_root: "Root of another CA", page: "This page", agent: "Agent" };

async function certificatesView(signal) {
  const [state, told] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/certificates", signal)]);
  frame(state);
  const page = told.page;
  const which = page.file
    ? ["This page shows a certificate of ", el("b", {}, page.names), " from ", el("code", {}, page.file), ", which somebody else renews. It ends ", when(page.not_after_us), "."]
    : ["This page shows a certificate of the collector's own CA. It ends ", when(page.not_after_us), ". ", el("code", {}, "api.cert"), " and ", el("code", {}, "api.key"), " put one of your CA in its place."];
  show(el("div", { class: "head" }, el("h1", {}, "Certificates"), el("p", { class: "soft" }, ...which)),
    table(["Certificate", "Of", "Ends", "Left of its life", "Renewed by"], told.certificates.map(certificateRow)));
}

/** Alerts come at a third and at a tenth of the life. */
function certificateRow(one) {
  const life = one.not_before_us ? one.not_after_us - one.not_before_us : 0;
  const left = life ? Math.max(0, Math.min(1, (one.not_after_us - Date.now() * 1000) / life)) : null;
  const word = left === null ? "info" : left < 0.1 ? "critical" : left < 1 / 3 ? "warning" : "pass";
  const who = one.what === "agent" ? el("a", { href: link(one.name.split("#")[0]) }, short(one.name)) : one.name;
  return el("tr", { class: "row" },
    el("td", { class: "nowrap" }, CERTIFICATES[one.what] || one.what), el("td", {}, who), el("td", {}, when(one.not_after_us)),
    el("td", {}, left === null ? el("span", { class: "soft" }, "not known") : tag(word, `${Math.round(left * 100)} %`)),
    el("td", {}, one.elsewhere ? "somebody else" : "Sidewarden"));
}

async function rulesView(name, signal) {
  const [state, told] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/rules", signal)]);
  frame(state);
  show(el("div", { class: "head" }, el("h1", {}, "Rules"), el("p", { class: "soft" }, "What makes an alert, what it means, and what to do.")),
    told.rules.map((rule) => el("section", { class: "rule", id: `rule-${rule.alert}` },
      el("h3", {}, rule.alert, " ", tag(rule.severity)),
      el("p", {}, sentence(rule.meaning)), el("p", { class: "soft" }, `What to do: ${rule.what_to_do}.`),
      el("p", { class: "soft" }, `${rule.wait_seconds ? `Fires after ${span(rule.wait_seconds)}` : "Fires at once"}; ends ${rule.ends}.`))));
  const wanted = name && document.getElementById(`rule-${name}`);
  if (wanted) {
    wanted.classList.add("wanted");
    wanted.scrollIntoView({ block: "center" });
  }
}

const capital = (text) => `${text[0].toUpperCase()}${text.slice(1)}`;
const sentence = (text) => `${capital(text)}.`;

// ---- the auditor's table

/** For the fleet, some workloads, one of them or one instance; now, or at a moment of the past. */
async function reportView(query, signal) {
  const asked = { of: query.get("of") || "", at: (query.get("at") || "").slice(0, 16), numbering: query.get("numbering") || "1.3.1" };
  const head = el("div", { class: "head" }, el("h1", {}, "Report"), el("p", { class: "soft" }, "Reference, description and status of every check, as auditors read it."));
  const [state, list] = await Promise.all([json("/api/v1/status", signal), json("/api/v1/workloads", signal)]);
  frame(state);
  const form = reportForm(asked, list.workloads);
  // It stays when what was asked for cannot be answered.
  show(head, form, el("p", { class: "soft", role: "status" }, "reading…"));
  const [workload, instance] = asked.of.split("#");
  const wanted = new URLSearchParams({ numbering: asked.numbering });
  if (workload) wanted.set("workload", workload);
  if (instance) wanted.set("instance", instance);
  if (asked.at) wanted.set("at", `${asked.at}:00Z`);
  const report = await json(`/api/v1/report?${wanted}&detail=table`, signal).catch((error) => {
    if (!signal.aborted) show(head, form);
    throw error;
  });
  const files = ["csv", "json", "html"].map((format) => [reportFile(format, wanted), " "]);
  const rows = report.table.map((row) => reportRow(row, report.judged));
  show(head, form,
    el("div", { class: "facts" }, fact("Of", report.scope), el("span", {}, el("b", {}, "As it stood at "), utc(report.at_us)), fact("Judged", String(report.judged)),
      report.score === null ? "" : fact("Pass", `${report.score.toFixed(1)} %`), report.judged ? posture(report.counts) : "", el("span", {}, el("b", {}, "Take it along "), files.flat())),
    report.unclear.map((name) => el("p", { class: "soft" }, tag("unknown", "not known"), ` ${name}: what it told by then is not kept any more`)),
    rows.length ? table(["CIS", "Description", "Status", report.judged === 1 ? "Evidence" : "Whose", "Since"], rows) : el("p", { class: "empty" }, "Nobody was judged then, or nobody of that name."));
}

function reportForm(asked, workloads) {
  const names = workloads.flatMap((workload) => [workload.name, ...workload.instances.map((agent) => `${workload.name}#${agent.instance}`)]);
  const groups = new Set(names.filter((name) => name.includes("/")).map((name) => `${name.split("/")[0]}/*`));
  const of = el("input", { value: asked.of, list: "names", placeholder: "the whole fleet", size: 30, spellcheck: "false", "data-key": "report/of" });
  const at = el("input", { type: "datetime-local", value: asked.at, "data-key": "report/at" });
  const numbering = el("select", {}, ["1.3.1", "1.6"].map((word) => el("option", { value: word, selected: word === asked.numbering }, word)));
  const submit = (event) => {
    event.preventDefault();
    const next = new URLSearchParams();
    if (of.value.trim()) next.set("of", of.value.trim());
    if (at.value) next.set("at", at.value.slice(0, 16));
    if (numbering.value !== "1.3.1") next.set("numbering", numbering.value);
    const place = `#/report${next.size ? `?${next}` : ""}`;
    location.hash === place ? route() : location.hash = place;
  };
  return el("form", { class: "filters", onsubmit: submit },
    el("label", {}, "Of", of), el("datalist", { id: "names" }, [...groups, ...names].slice(0, MAX_LINES).map((name) => el("option", { value: name }))),
    el("label", {}, "As it stood at (UTC; empty for now)", at), el("label", {}, "Numbering", numbering), el("button", { class: "main" }, "Show"));
}

function reportRow(row, judged) {
  const [word, ...rest] = row.status.split(" (");
  const more = row.count - row.whose.length;
  const whose = row.whose.join(", ") + (row.whose.length && more > 0 ? ` and ${more} more` : "");
  const told = row.evidence.length ? el("ul", { class: "evidence" }, row.evidence.map((line) => el("li", {}, `${line.source}: ${line.line}`))) : "";
  return el("tr", { class: "row" },
    el("td", { class: "nowrap" }, row.reference || "–"),
    el("td", { class: "wide" }, row.description, el("div", { class: "soft mono" }, row.check)),
    el("td", {}, tag(row.verdict, word), " ", row.verdict === "fail" ? tag(row.severity) : "", rest.length ? el("div", { class: "soft" }, rest.join(" (").slice(0, -1)) : ""),
    el("td", { class: "wide" }, judged === 1 ? told : whose),
    el("td", { class: "soft" }, utc(row.since_us)));
}

/** A link to the report as a file. The browser itself has no token to show, so it is fetched here. */
function reportFile(format, wanted) {
  const path = `/api/v1/report?${wanted}&format=${format}`;
  const save = async (event) => {
    event.preventDefault();
    try {
      const address = URL.createObjectURL(await (await ask(path)).blob());
      el("a", { href: address, download: `sidewarden-report.${format}` }).click();
      setTimeout(() => URL.revokeObjectURL(address), 60000);
      trouble(null);
    } catch (error) {
      error.status === 401 ? enter(error.short) : trouble(error);
    }
  };
  return el("a", { href: path, onclick: save }, format.toUpperCase());
}

/** A moment to the second, in words of its own: a report is read long after it was made. */
function utc(micros) {
  const text = new Date(micros / 1000).toISOString();
  return el("time", { class: "nowrap", datetime: text, "data-exact": "1" }, `${text.slice(0, 10)} ${text.slice(11, 19)} UTC`);
}

// ---- events

function eventTable(events) {
  return table(["Time", "Severity", "Kind", "Workload", "What happened"], events.map((event) => eventRow(event)));
}

function eventRow(event, fresh = false) {
  const date = new Date(event.at_us / 1000);
  const exact = el("time", { class: "mono nowrap", datetime: date.toISOString(), title: date.toISOString(), "data-exact": "1" }, date.toISOString().slice(11, 23));
  let body = "";
  try { body = JSON.stringify(event.body, null, 2); } catch { body = String(event.body); }
  return el("tr", { class: fresh ? "row fresh" : "row" },
    el("td", {}, exact), el("td", {}, tag(event.severity)), el("td", { class: "mono nowrap" }, event.kind),
    el("td", { class: "nowrap" }, event.agent.workload.endsWith("/sidewarden/collector") ? el("span", { class: "soft" }, "collector") : el("a", { href: link(event.agent.workload) }, short(event.agent.workload)), " ", el("span", { class: "soft mono" }, event.agent.instance)),
    el("td", { class: "wide" }, body && body !== "{}" ? el("details", { "data-key": `event/${event.cursor}` }, el("summary", { class: "plain", title: "Show the details" }, event.summary), el("pre", { class: "body" }, body)) : event.summary));
}

/** Past events first, then live ones on top; subscribed before the past is asked for, so that nothing falls between. */
async function eventsView(query) {
  const stop = new AbortController();
  running = stop;
  const wanted = { severity: query.get("min_severity") || "notice", kind: query.get("kind") || "", workload: query.get("workload") || "" };
  const rows = el("tbody");
  const note = el("span", { class: "grow", role: "status" }, "connecting…");
  const seen = new Set();
  const held = [];
  let paused = false;
  const pause = el("button", { type: "button", "aria-pressed": "false", onclick: () => {
    paused = !paused;
    pause.setAttribute("aria-pressed", String(paused));
    pause.textContent = paused ? "Go on" : "Pause";
    if (!paused) held.splice(0).forEach(add);
    tell();
  } }, "Pause");
  let state = "live";
  const tell = () => { note.textContent = paused ? `paused, ${plural(held.length, "event")} waiting` : state; };
  const add = (event, fresh = true) => {
    // The collector's clock is history, too, but nothing to read unless it is asked for.
    if (seen.has(event.cursor) || (event.kind === "clock.tick" && !wanted.kind)) return;
    seen.add(event.cursor);
    empty.hidden = true;
    fresh ? rows.prepend(eventRow(event, true)) : rows.append(eventRow(event));
    while (rows.children.length > MAX_LINES) rows.lastChild.remove();
  };
  const go = () => {
    const next = new URLSearchParams();
    if (severity.value !== "notice") next.set("min_severity", severity.value);
    if (kind.value.trim()) next.set("kind", kind.value.trim());
    if (wanted.workload) next.set("workload", wanted.workload);
    location.hash = `#/events${next.size ? `?${next}` : ""}`;
  };
  const severity = el("select", { onchange: go }, [...WORST_FIRST].reverse().map((word) => el("option", { value: word, selected: word === wanted.severity }, word)));
  const kind = el("input", { value: wanted.kind, placeholder: "all, or connection.refused", spellcheck: "false", size: 26, onchange: go });
  const empty = el("p", { class: "empty" }, "No such events yet. They appear here by themselves, a moment after they happen.");
  const head = el("tr", {}, ["Time (UTC)", "Severity", "Kind", "Workload", "What happened"].map((text) => el("th", { scope: "col" }, text)));
  show(el("div", { class: "head" }, el("h1", {}, "Events"), wanted.workload ? el("span", { class: "soft" }, `of ${short(wanted.workload)} · `, el("a", { href: "#/events" }, "all workloads")) : ""),
    el("div", { class: "filters" }, el("label", {}, "Severity, and above", severity), el("label", {}, "Kind", kind), pause, note),
    empty, el("div", { class: "scroll" }, el("table", {}, el("thead", {}, head), rows)));
  const filter = new URLSearchParams({ min_severity: wanted.severity });
  if (wanted.kind) filter.set("kind", wanted.kind);
  if (wanted.workload) filter.set("workload", wanted.workload);
  const live = (name, data) => {
    if (name === "skipped") { state = `live; ${plural(data.batches, "batch")} came too fast and can be found in the history`; return tell(); }
    if (paused && data.kind !== "clock.tick") { if (held.push(data) > MAX_LINES) held.shift(); return tell(); }
    add(data);
  };
  for (let pauseFor = 500; !stop.signal.aborted; pauseFor = Math.min(pauseFor * 2, 15000)) {
    try {
      const answer = await ask(`/api/v1/events/stream?${filter}`, stop.signal);
      const past = await json(`/api/v1/events?${filter}&limit=200`, stop.signal);
      if (rows.children.length === 0) past.events.forEach((event) => add(event, false));
      else past.events.reverse().forEach((event) => add(event));
      frame(await json("/api/v1/status", stop.signal));
      trouble(null);
      [state, pauseFor] = ["live", 500];
      tell();
      await read(answer, live);
    } catch (error) {
      if (stop.signal.aborted) return;
      if (error.status === 401) return enter(error.short);
      if (error.status === 400) { trouble(error); note.textContent = "not connected"; return; }
      trouble(error);
    }
    note.textContent = "not connected, trying again";
    await new Promise((done) => setTimeout(done, pauseFor * (0.5 + Math.random() / 2)));
  }
}

/** Reads server-sent events until the stream ends. */
async function read(answer, live) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const pieces = text.split("\n\n");
    text = pieces.pop();
    for (const piece of pieces) {
      const field = (name) => piece.split("\n").find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data) live(field("event"), JSON.parse(data));
    }
  }
}

// ---- the frame around the views

function frame(state) {
  document.getElementById("domain").textContent = state.trust_domain;
  const health = document.getElementById("health");
  health.className = state.store_up ? "tag pass" : "tag fail";
  health.textContent = state.store_up ? "taking events" : "the store refuses events";
  const count = document.getElementById("alert-count");
  count.hidden = state.alerts.firing === 0;
  count.textContent = String(state.alerts.firing);
  document.title = state.alerts.firing ? `(${state.alerts.firing}) Sidewarden` : "Sidewarden";
  document.getElementById("leave").hidden = false;
}

function route() {
  running?.abort();
  takeToken();
  if (!token) return enter("");
  const [path, query] = location.hash.replace(/^#\/?/, "").split("?");
  const [view = "", ...rest] = path.split("/");
  const name = rest.map(decodeURIComponent).join("/");
  const views = { "": "overview", workload: "overview", alerts: "alerts", events: "events", report: "report", certificates: "certificates", rules: "rules" };
  for (const node of document.querySelectorAll("nav a")) {
    node.dataset.view === views[view] ? node.setAttribute("aria-current", "page") : node.removeAttribute("aria-current");
  }
  if (view === "workload") return repeat((signal) => workloadView(name, signal));
  if (view === "alerts") return repeat((signal) => alertsView(name, signal));
  if (view === "events") return eventsView(new URLSearchParams(query || ""));
  if (view === "report") return once((signal) => reportView(new URLSearchParams(query || ""), signal));
  if (view === "certificates") return repeat(certificatesView);
  if (view === "rules") return once((signal) => rulesView(name, signal));
  return repeat(overview);
}

function once(show) {
  const stop = new AbortController();
  running = stop;
  const round = () => show(stop.signal).then(() => trouble(null), (error) => {
    if (stop.signal.aborted) return;
    if (error.status === 401) return enter(error.short);
    trouble(error);
    // Who cannot be reached now may be in a moment; another answer stays what it is.
    if (error.status === 0) setTimeout(() => stop.signal.aborted || round(), REFRESH);
  });
  round();
}

/** A token in the address is taken out of it at once, before anything can copy it. */
function takeToken() {
  const found = location.hash.match(/^#token=([^&]+)(?:&(.*))?$/);
  if (!found) return;
  token = decodeURIComponent(found[1]);
  history.replaceState(null, "", `${location.pathname}#${found[2] || "/"}`);
}

document.getElementById("leave").addEventListener("click", () => enter(""));
window.addEventListener("hashchange", route);
setInterval(tick, 5000);
route();
