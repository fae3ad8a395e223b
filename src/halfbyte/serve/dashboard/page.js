"use strict";
// Polls the server every second and draws its data. Values from the server are inserted as text
// only, never as HTML, and nothing is loaded from other hosts.

const PERIOD = 1000;
const WIDTH = 480;
const HEIGHT = 150;
const LEFT = 46;
const BOTTOM = 18;
const TOP = 8;
const COLOURS = ["one", "two", "three"];

const byId = (id) => document.getElementById(id);
let key = sessionStorage.getItem("halfbyte-key") || "";

function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function svg(tag, attributes, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (value >= 1e6) return (value / 1e6).toFixed(1) + "M";
  if (value >= 1e4) return (value / 1e3).toFixed(1) + "k";
  if (value >= 100 || Number.isInteger(value)) return String(Math.round(value));
  return value.toPrecision(value >= 10 ? 3 : 2);
}

function seconds(value) {
  if (value === null || value === undefined) return "–";
  return value < 1 ? number(value * 1000) + " ms" : number(value) + " s";
}

function bytes(value) {
  if (value >= 1e9) return (value / 1e9).toFixed(2) + " GB";
  return value >= 1e6 ? (value / 1e6).toFixed(0) + " MB" : (value / 1e3).toFixed(0) + " kB";
}

const percent = (share) => (100 * share).toFixed(share < 0.1 ? 1 : 0) + "%";
const last = (values) => values.filter((value) => value !== null).pop();

function niceTop(value) {
  if (!(value > 0)) return 1;
  const unit = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 2.5, 5, 10].map((step) => step * unit).find((step) => step >= value);
}

// Lines over the last 15 minutes; gaps where there were no requests.
function chart(place, lines, form, sliceSeconds) {
  const count = lines[0].values.length;
  const top = niceTop(Math.max(...lines.flatMap((line) => line.values.map((v) => v ?? 0))));
  const x = (index) => LEFT + ((WIDTH - LEFT - 8) * index) / (count - 1);
  const y = (value) => TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / top);
  const words = lines.map((line) => `${line.name} ${form(last(line.values))}`).join(", ");
  const picture = svg("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": words });
  for (const part of [0, 0.5, 1]) {
    const level = y(part * top);
    picture.append(svg("line", { class: "grid", x1: LEFT, x2: WIDTH - 8, y1: level, y2: level }));
    picture.append(svg("text", { x: LEFT - 5, y: level + 4, "text-anchor": "end" },
      form(part * top)));
  }
  const minutes = Math.round((count * sliceSeconds) / 60);
  for (const [share, text, anchor] of [
    [0, `${minutes} min ago`, "start"], [0.5, `${minutes / 2} min`, "middle"], [1, "now", "end"]]) {
    picture.append(svg("text",
      { x: x(share * (count - 1)), y: HEIGHT - 4, "text-anchor": anchor }, text));
  }
  lines.forEach((line, number) => {
    let path = "";
    line.values.forEach((value, index) => {
      if (value === null) return;
      const before = index > 0 && line.values[index - 1] !== null;
      const after = index + 1 < count && line.values[index + 1] !== null;
      if (!before && !after) {
        picture.append(svg("circle",
          { class: COLOURS[number], cx: x(index), cy: y(value), r: 2 }));
      }
      path += `${before ? "L" : "M"}${x(index).toFixed(1)} ${y(value).toFixed(1)}`;
    });
    if (path) picture.append(svg("path", { class: COLOURS[number], d: path, fill: "none" }));
  });
  const legend = element("div", undefined, "legend");
  lines.forEach((line, number) => {
    const entry = element("span");
    entry.append(element("span", undefined, `swatch ${COLOURS[number]}`), `${line.name} `,
      element("b", form(last(line.values))));
    legend.append(entry);
  });
  byId(place).replaceChildren(picture, legend);
}

function bar(name, share, value, { bad = false, good = false, mark } = {}) {
  const made = element("div", undefined, `bar${bad ? " bad" : ""}${good ? " good" : ""}`);
  const track = element("div", undefined, "track");
  const fill = element("div", undefined, "fill");
  fill.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  track.append(fill);
  if (mark !== undefined && mark <= 1) {
    const line = element("div", undefined, "mark");
    line.style.left = `${100 * mark}%`;
    track.append(line);
  }
  made.append(element("span", name), track, element("span", value, "value"));
  return made;
}

function counts(values, empty) {
  const entries = Object.entries(values).sort((a, b) => b[1] - a[1]);
  if (!entries.length) return [element("p", empty, "soft")];
  const most = entries[0][1] || 1;
  return entries.map(([name, count]) => bar(name, count / most, number(count)));
}

function table(place, heads, rows) {
  const head = element("tr");
  head.append(...heads.map((text) => element("th", text)));
  byId(place).replaceChildren(head, ...rows.map((cells) => {
    const row = element("tr");
    row.append(...cells.map((cell, column) => {
      const made = element("td");
      made.dataset.name = heads[column];
      made.append(cell);
      return made;
    }));
    return row;
  }));
}

function tile(name, value) {
  const made = element("div", undefined, "tile");
  made.append(element("span", name), element("b", value));
  return made;
}

function drawTiles(data) {
  const { totals, series } = data;
  const answered = totals.request_success;
  const requests = answered + totals.request_failure;
  const running = data.backends.reduce((sum, one) => sum + one.running, 0);
  const waiting = data.backends.reduce((sum, one) => sum + one.waiting, 0);
  const fallbacks = Object.values(data.fallbacks).reduce((sum, count) => sum + count, 0);
  const lookups = totals.prefix_cache_queries;
  const tiles = [
    tile("running", number(running)), tile("waiting", number(waiting)),
    tile("tokens/s", number(series.tokens_per_second.at(-1))),
    tile("first token, p95", seconds(last(series.first_token.p95))),
    tile("answered", number(answered)),
    tile("failed", requests ? percent(totals.request_failure / requests) : "–"),
    tile("fallbacks", requests ? percent(fallbacks / requests) : "–"),
    tile("prompt from cache", lookups ? percent(totals.prefix_cache_hits / lookups) : "–"),
  ];
  byId("tiles").replaceChildren(...tiles);
}

function drawCharts({ series }) {
  const each = series.slice_seconds;
  chart("tokens", [{ name: "tokens/s", values: series.tokens_per_second }], number, each);
  chart("requests", [
    { name: "all", values: series.requests_per_second },
    { name: "failed", values: series.failures_per_second }], number, each);
  for (const [place, values] of [["first-token", series.first_token], ["whole", series.whole]]) {
    chart(place, ["p50", "p95", "p99"].map((p) => ({ name: p, values: values[p] })), seconds, each);
  }
}

function drawModels(data) {
  const word = { closed: "ok", open: "paused", "half-open": "testing" };
  table("backends", ["role", "model", "version", "state", "now"], data.backends.map((one) => [
    one.role, one.models[0] || one.name, one.version.slice(0, 12) || "–",
    element("span", word[one.breaker], one.breaker === "closed" ? "good-word" : "bad-word"),
    `${one.running} + ${one.waiting} waiting`]));
}

function drawMemory({ memory, planned }) {
  const top = Math.max(planned.total || 0, memory.process_peak, 1);
  const rows = [
    ["weights", memory.weights, planned.weights],
    ["cache", memory.cache, planned.cache],
    ["cache in use", memory.cache_used, undefined],
    ["process", memory.process, planned.total],
    ["process, peak", memory.process_peak, planned.total],
  ].map(([name, size, plan]) => bar(name, size / top,
    plan ? `${bytes(size)} of ${bytes(plan)}` : bytes(size),
    { mark: plan ? plan / top : undefined, bad: Boolean(plan) && size > 1.1 * plan }));
  if (planned.total) rows.push(element("p", "The marks show the plan.", "soft"));
  byId("memory").replaceChildren(...rows);
}

function drawMonitors({ monitors }) {
  const rows = Object.entries(monitors.last_rates).map(([check, rate]) => bar(
    check, rate, percent(rate), { bad: rate >= monitors.alert_share, mark: monitors.alert_share }));
  rows.push(element("p", `Share of recent answers that fail, of ${number(monitors.answers)} checked in total. ` +
    "The mark shows the alert threshold.", "soft"));
  for (const [name, score] of Object.entries(monitors.drift)) {
    rows.push(element("p", `${name}: ${score >= 0 ? "+" : "−"}${Math.abs(score).toFixed(2)} ` +
      "standard deviations from the reference", "soft"));
  }
  byId("monitors").replaceChildren(...rows);
}

function drawCanary({ canary }) {
  byId("canary-box").hidden = !canary;
  if (!canary) return;
  const needed = canary.evidence_needed;
  const state = element("p");
  state.append(element("span", canary.status,
    { promoted: "good-word", "rolled back": "bad-word" }[canary.status] || ""),
  canary.reason ? `: ${canary.reason}` : "");
  const arms = Object.entries(canary.arms).map(([name, arm]) => bar(
    name, arm.rate, `${arm.failures} of ${arm.requests}`, { bad: arm.failures > 0 }));
  byId("canary").replaceChildren(
    element("p", canary.candidate, "soft"), state,
    bar("worse", canary.evidence_worse / needed,
      `${canary.evidence_worse.toFixed(2)} of ${needed.toFixed(2)}`, { bad: true }),
    bar("as good", canary.evidence_as_good / needed,
      `${canary.evidence_as_good.toFixed(2)} of ${needed.toFixed(2)}`, { good: true }),
    element("p", "Evidence in nats; a full bar is a decision. Failed requests:", "soft"),
    ...arms);
}

function drawShadow({ shadow }) {
  byId("shadow-box").hidden = !shadow;
  if (!shadow) return;
  const all = shadow.counts.compared || 0;
  const rows = [element("p", `${shadow.candidate}, ${number(all)} answers compared`, "soft")];
  if (all) {
    rows.push(
      bar("identical", shadow.identical, percent(shadow.identical)),
      bar("agreement", shadow.agreement, percent(shadow.agreement)),
      bar("candidate failed", (shadow.counts.candidate_failed || 0) / all,
        number(shadow.counts.candidate_failed || 0), { bad: true }),
      bar("present failed", (shadow.counts.base_failed || 0) / all,
        number(shadow.counts.base_failed || 0), { bad: true }));
  }
  byId("shadow").replaceChildren(...rows);
}

function drawProbes({ probes }) {
  byId("probes-box").hidden = !probes;
  if (!probes) return;
  const right = Object.values(probes).filter(Boolean).length;
  const wrong = Object.keys(probes).filter((name) => !probes[name]);
  const all = right + wrong.length;
  byId("probes").replaceChildren(
    bar("right", all ? right / all : 0, `${right} of ${all}`, { good: true }),
    element("p", wrong.length ? `Wrong: ${wrong.slice(0, 8).join(", ")}` : "", "soft"));
}

function drawAlerts({ alerts }) {
  byId("alerts").replaceChildren(...alerts.map((alert) => {
    const made = element("p");
    made.append(element("b", alert.name), alert.message);
    return made;
  }));
}

function draw(data) {
  const model = data.backends[0];
  byId("title").textContent = `halfbyte · ${model.models[0] || model.name}`;
  document.title = `${data.alerts.length ? "(!) " : ""}halfbyte`;
  const hours = data.uptime_seconds / 3600;
  byId("state").textContent = `version ${data.version}, up for ` +
    (hours < 1 ? `${Math.floor(60 * hours)} min` : `${hours.toFixed(1)} h`);
  drawAlerts(data);
  drawTiles(data);
  drawCharts(data);
  drawModels(data);
  drawMemory(data);
  byId("fallbacks").replaceChildren(...counts(data.fallbacks, "None so far."));
  drawMonitors(data);
  drawCanary(data);
  drawShadow(data);
  drawProbes(data);
  byId("rejections").replaceChildren(
    ...counts({ ...data.rejections, ...data.dropped }, "Nothing so far."));
  byId("main").hidden = false;
}

function showStatus(text) {
  byId("state").textContent = text;
  byId("state").classList.toggle("lost", Boolean(text));
}

async function poll() {
  try {
    const headers = key ? { Authorization: `Bearer ${key}` } : {};
    const reply = await fetch("/dashboard/data", { headers, cache: "no-store" });
    if (reply.status === 401 || reply.status === 403) {
      byId("key-form").hidden = false;
      byId("main").hidden = true;
      showStatus(key ? "The server rejected this API key." : "An API key is required.");
      return;
    }
    if (!reply.ok) throw new Error(`status ${reply.status}`);
    const data = await reply.json();
    byId("key-form").hidden = true;
    byId("state").classList.remove("lost");
    draw(data);
  } catch (error) {
    showStatus(`No response (${error.message}); the data shown is out of date. Retrying.`);
  }
  setTimeout(poll, PERIOD);
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = byId("key").value;
  sessionStorage.setItem("halfbyte-key", key);
  poll();
});
poll();
