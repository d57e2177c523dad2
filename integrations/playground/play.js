"use strict";

/* Everything from outside (answers, questions, names, errors) becomes a text node, never markup. */

const at = id => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "g", "image", "mask", "text", "polyline", "circle", "title", "linearGradient", "stop"]
    .includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function digits(value, count = 3) {
  if (value === null || value === undefined) return "\u2013";
  return String(Number(value.toPrecision(count))).replace("-", "\u2212");
}

/* Rounded down, so that a confidence never seems to reach what it does not. */
function share(value) {
  return (Math.floor(value * 1000 + 1e-9) / 1000).toFixed(3).replace(/0$/, "");
}

/* The text without characters that control or reorder what is around them. */
function visible(text, most = 3000) {
  const shown = text.replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, "")
    .replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f]/g, "\ufffd");
  return shown.length > most ? shown.slice(0, most) + " […]" : shown;
}

let setup = null;
let picture = null; // {uri, url, name, width, height, drawn: {kind, seed} or null, questions}
let running = null; // the AbortController of the question under way
let rows = []; // the trace so far
let injected = []; // cells taken in so far
let views = []; // windows looked at again so far
let planned = 0; // rounds that the budget allows
let result = null;
let asked = null; // the request that the result is about, with the picture's name
let ordered = 0; // pictures asked for: the last one wins

/* ------------------------------------------------------------------ the picture */

async function usePicture(blob, name, drawn = null, questions = []) {
  const turn = ++ordered;
  if (setup && blob.size > setup.max_bytes) {
    showProblem("The picture has more than " + Math.floor(setup.max_bytes / 1e6) + " MB.", "Scale it down or compress it.");
    return;
  }
  const uri = await new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  }).catch(() => null);
  if (turn !== ordered) return;
  if (uri === null) {
    showProblem("The picture cannot be read.", "Choose another file.");
    return;
  }
  const url = URL.createObjectURL(blob);
  const shown = new Image();
  const size = await new Promise(done => {
    shown.onload = () => done([shown.naturalWidth, shown.naturalHeight]);
    shown.onerror = () => done(null); // the service may know its format nevertheless
    shown.src = url;
  });
  if (turn !== ordered) {
    URL.revokeObjectURL(url);
    return;
  }
  stop();
  if (picture) URL.revokeObjectURL(picture.url);
  picture = { uri, url, name, drawn, questions, seen: size !== null, width: size ? size[0] : 0, height: size ? size[1] : 0 };
  forget();
  at("about").textContent = visible(name, 120) + (size ? `, ${size[0]} × ${size[1]} pixels` : ": this browser cannot show it");
  suggest(questions);
  say("Ask something about it.");
  write();
}

function suggest(questions) {
  const place = at("suggestions");
  place.replaceChildren(...questions.map(each => {
    const chip = make("button", { type: "button", class: "chip" }, each.text);
    chip.addEventListener("click", () => {
      at("question").value = each.text;
      write();
      at("question").focus();
    });
    return chip;
  }));
  place.hidden = questions.length === 0;
  if (questions.length) at("question").value = questions[0].text;
}

async function draw(kind) {
  const turn = ordered;
  const seed = Math.floor(Math.random() * 100000);
  const reply = await call(`/play/scene?kind=${kind}&seed=${seed}`);
  if (!reply || turn !== ordered) return;
  const scene = await reply.json();
  const bytes = Uint8Array.from(atob(scene.image.split(",")[1]), char => char.charCodeAt(0));
  const blob = new Blob([bytes], { type: "image/png" });
  await usePicture(blob, `drawn-${scene.kind}-${scene.seed}.png`, { kind: scene.kind, seed: scene.seed }, scene.questions);
}

/* The picture with the patches: those of the result if there is one, those taken in so far otherwise. */
function drawPicture() {
  const svg = at("picture");
  if (!picture) return;
  const [width, height] = result ? result.image_sizes[0] : picture.seen ? [picture.width, picture.height] : [320, 200];
  const line = Math.max(width, height) / 160;
  const pad = 3 * line;
  svg.setAttribute("viewBox", [-pad, -pad, width + 2 * pad, height + 2 * pad].join(" "));
  svg.setAttribute("aria-label", `The picture ${visible(picture.name, 120)}`);
  const parts = [];
  if (picture.seen) {
    const attributes = { x: 0, y: 0, width, height, href: picture.url, preserveAspectRatio: "none", role: "img",
      "aria-label": "The picture that is asked about" };
    if (Math.max(width, height) < 400) attributes.class = "pixelated";
    parts.push(make("image", attributes));
  }
  const heat = heatLayer(width, height);
  if (heat) parts.push(heat);
  const cells = (result ? result.patches : injected).filter(each => each.box && each.image === 0);
  if (cells.length) {
    const most = Math.max(...cells.map(each => each.attention || 0));
    const place = (box, by = 0) => ({ x: box[0] - by, y: box[1] - by, width: box[2] - box[0] + 2 * by,
      height: box[3] - box[1] + 2 * by });
    const crisp = { "shape-rendering": "crispEdges" }; // no seams between neighbours
    const all = { x: -pad, y: -pad, width: width + 2 * pad, height: height + 2 * pad };
    const veil = make("mask", { id: "veil", maskUnits: "userSpaceOnUse", ...crisp, ...all }, make("rect", { ...all, fill: "#fff" }));
    for (const each of [...cells].sort((one, other) => (one.attention || 0) - (other.attention || 0))) {
      const share = most > 0 && each.attention !== undefined ? each.attention / most : 1;
      const level = Math.round(127 * (1 - share)).toString(16).padStart(2, "0");
      veil.append(make("rect", { ...place(each.box), fill: "#" + level + level + level }));
    }
    const outside = make("mask", { id: "outside", maskUnits: "userSpaceOnUse", ...crisp, ...all }, make("rect", { ...all, fill: "#fff" }),
      ...cells.map(each => make("rect", place(each.box))));
    parts.push(outside);
    if (!heat) parts.push(veil, make("rect", { class: "veil", x: 0, y: 0, width, height, mask: "url(#veil)", ...crisp }));
    const rims = make("g", { mask: "url(#outside)", ...crisp });
    for (const [reach, kind] of [[2 * line, "rim"], [line, "outline"]]) {
      for (const each of cells) rims.append(make("rect", { class: each.fresh ? kind + " fresh" : kind, ...place(each.box, reach) }));
    }
    parts.push(rims);
    cells.forEach((each, index) => {
      const number = result ? each.rank + 1 : index + 1;
      const about = describe(each, number);
      const mark = make("g", { class: "patch", tabindex: "0", role: "img", "aria-label": about, "data-patch": number },
        make("rect", { class: "hit", ...place(each.box) }));
      follow(mark, number);
      parts.push(mark);
    });
  }
  for (const each of views.filter(view => view.accepted && view.image === 0)) {
    const [left, top, right, bottom] = each.box;
    for (const [kind, wide] of [["window rim", 2 * line], ["window", line]]) {
      parts.push(make("rect", { class: kind, x: left, y: top, width: right - left, height: bottom - top, "stroke-width": wide }));
    }
  }
  svg.replaceChildren(...parts);
  at("detail").hidden = cells.length === 0;
  at("detail").textContent = cells.length ? "Point at a patch, or reach it with the Tab key, to read about it." : "";
}

/* The attention to every cell, to lay over the picture; where cells overlap, the largest is seen. */
function heatLayer(width, height) {
  const measured = result && result.attention ? result.attention : null;
  at("heat-row").hidden = !result;
  at("heat").parentElement.hidden = !measured;
  if (!measured) {
    at("heat-about").textContent = "The attention to all cells was not measured"
      + (setup.arguments.attention ? "." : ": latent-tool play --attention does.");
    return null;
  }
  const cells = measured.filter(each => each.box && each.image === 0);
  const most = Math.max(0, ...measured.map(each => each.weight));
  const missing = measured.length - cells.length;
  const about = `${cells.length} cells, mean over latents, heads and layers`
    + (missing ? `; the places of ${missing} more are not known` : "");
  at("heat-about").replaceChildren("0 ", heatScale(), ` ${digits(most)}: ${about}`);
  if (!at("heat").checked || !cells.length) return null;
  const scale = 1024 / Math.max(width, height);
  const canvas = make("canvas", { width: Math.max(1, Math.round(width * scale)), height: Math.max(1, Math.round(height * scale)) });
  const paper = canvas.getContext("2d");
  for (const { box, weight } of [...cells].sort((one, other) => one.weight - other.weight)) {
    const [left, top] = box.slice(0, 2).map(edge => Math.floor(edge * scale + 1e-6));
    const [right, bottom] = box.slice(2).map(edge => Math.ceil(edge * scale - 1e-6));
    paper.clearRect(left, top, right - left, bottom - top);
    paper.fillStyle = heatColour(most > 0 ? weight / most : 0);
    paper.fillRect(left, top, right - left, bottom - top);
  }
  return make("image", { class: "heat", x: 0, y: 0, width, height, href: canvas.toDataURL(), preserveAspectRatio: "none",
    role: "img", "aria-label": `Heat map of the attention: ${about}, from 0 to ${digits(most)}` });
}

function heatScale() {
  const stops = setup.heat.stops.map((colour, i, all) =>
    make("stop", { offset: i / (all.length - 1), "stop-color": `rgb(${colour.join(", ")})` }));
  return make("svg", { class: "bar", viewBox: "0 0 160 10", preserveAspectRatio: "none", "aria-hidden": "true" },
    make("linearGradient", { id: "heat-colours" }, ...stops),
    make("rect", { width: 160, height: 10, fill: "url(#heat-colours)" }));
}

function heatColour(share) {
  const { stops, opacity } = setup.heat;
  const place = share * (stops.length - 1);
  const below = Math.min(Math.floor(place), stops.length - 2);
  const mixed = stops[below].map((from, i) => Math.round(from + (place - below) * (stops[below + 1][i] - from)));
  return `rgba(${mixed.join(", ")}, ${opacity[0] + share * (opacity[1] - opacity[0])})`;
}

/* A window as text: left, top and right, bottom. */
function span(box) {
  const [left, top, right, bottom] = box.map(Math.round);
  return `${left},${top}-${right},${bottom}`;
}

/* The windows that were looked at again, each with what it changed. */
function drawViews() {
  at("views").parentElement.parentElement.hidden = result.views.length === 0;
  const [width, height] = result.image_sizes[0];
  const sure = (answer, reward) => `${visible(answer.trim(), 60) || "(empty)"} ${share(reward)}`;
  at("views").replaceChildren(...result.views.slice(0, 64).map(view => {
    const [left, top, right, bottom] = view.box;
    const scale = 96 / Math.max(right - left, bottom - top);
    const part = make("svg", { class: "thumbnail", viewBox: `${left} ${top} ${right - left} ${bottom - top}`, role: "img",
      width: Math.max(1, Math.round((right - left) * scale)), height: Math.max(1, Math.round((bottom - top) * scale)),
      "aria-label": `Window ${span(view.box)}` },
    make("image", { x: 0, y: 0, width, height, href: picture.url, preserveAspectRatio: "none" }));
    return make("tr", {}, make("td", {}, part), ...[span(view.box), String(view.depth), sure(view.answer_before, view.reward_before),
      sure(view.answer_after, view.reward_after), view.accepted ? "yes" : ""].map(text => make("td", {}, text)));
  }));
}

function describe(patch, number) {
  const box = patch.box ? patch.box.map(edge => digits(edge, 4)).join(", ") : "not known";
  if (patch.attention === undefined) return `Patch ${number}: taken in, box ${box}`;
  return `Patch ${number}: attention ${digits(patch.attention)}, gain ${digits(patch.gain)}, proposed by latent `
    + `${patch.latent + 1}, box ${box}`;
}

function follow(element, number) {
  const both = on => document.querySelectorAll(`[data-patch="${number}"]`).forEach(each => {
    each.classList.toggle("on", on);
    if (on && each.getAttribute("aria-label")) at("detail").textContent = each.getAttribute("aria-label");
  });
  for (const name of ["mouseenter", "focusin"]) element.addEventListener(name, () => both(true));
  for (const name of ["mouseleave", "focusout"]) element.addEventListener(name, () => both(false));
}

/* ------------------------------------------------------------------ asking */

function budget() {
  const changes = {};
  const level = setup.levels[at("level").value];
  for (const name of ["iterations", "max_patches", "max_views", "deadline_s"]) {
    const field = at(name);
    const value = field.value === "" ? (name === "deadline_s" ? null : level[name]) : Number(field.value);
    if (value !== level[name]) changes[name] = value;
  }
  if (at("always").checked && level.target_confidence !== null) changes.target_confidence = null;
  return changes;
}

async function ask() {
  if (!setup || running) return;
  if (!picture) {
    showProblem("There is no picture yet.", "Choose one, or have one drawn.");
    return;
  }
  forget();
  const level = at("level").value;
  const changes = budget();
  const request = {
    image: picture.uri,
    question: at("question").value,
    ...(options().length ? { options: options() } : {}),
    budget: Object.keys(changes).length ? { ...setup.levels[level], ...changes } : level,
    seed: Number(at("seed").value || 0),
    min_confidence: Number(at("threshold").value),
  };
  asked = { image: picture.uri, name: picture.name, question: request.question };
  const known = picture.questions.find(each => each.text === request.question);
  const mine = running = new AbortController();
  at("ask").disabled = true;
  at("stop").disabled = false;
  say("Looking at the picture …");
  try {
    const reply = await fetch("/v1/ask/stream", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(request), signal: mine.signal });
    if (!reply.ok) {
      const problem = await reply.json().catch(() => ({}));
      throw new Refused(problem.message || `The service answered ${reply.status}.`, problem.hint || "");
    }
    for await (const line of lines(reply.body)) receive(line, known);
    if (!result) throw new Refused("The answer broke off.", "Ask again.");
  } catch (error) {
    if (mine.signal.aborted) return;
    if (error instanceof Refused) showProblem(error.message, error.hint);
    else showProblem("The service cannot be reached.", "Is latent-tool play still running?");
  } finally {
    if (running === mine) rest();
  }
}

function rest() {
  running = null;
  at("ask").disabled = false;
  at("stop").disabled = true;
}

/* The service notices that nobody listens any more, and stops the search at its next step. */
function stop() {
  if (!running) return;
  running.abort();
  rest();
  say("Stopped.");
  at("ask").focus();
}

class Refused extends Error {
  constructor(message, hint) {
    super(message);
    this.hint = hint;
  }
}

async function* lines(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value || new Uint8Array(), { stream: !done });
    const parts = rest.split("\n");
    rest = parts.pop();
    for (const part of parts) if (part) yield JSON.parse(part);
    if (done) return;
  }
}

function receive(line, known) {
  if (line.error) throw new Refused(line.error.message, line.error.hint);
  if (line.step) {
    const step = line.step;
    if (step.phase === "decode") say("Answering …");
    if (step.view) {
      views.push(step.view);
      say(`Looked again at ${span(step.view.box)}` + (step.view.accepted ? ": surer" : ""));
      drawPicture();
    }
    if (step.phase !== "search") return;
    rows.push(step.trace);
    injected.forEach(each => { each.fresh = false; });
    injected.push(...step.injected.map(each => ({ ...each, fresh: true })));
    planned = step.iterations;
    const first = step.trace.first_token_probability;
    say(`Round ${step.trace.round} of ${planned}: reward ${digits(step.trace.best_reward, 4)}`
      + (first === null ? "" : `, first token ${share(first)}`)
      + (injected.length ? `, ${injected.length} ${injected.length === 1 ? "patch" : "patches"}` : ""));
    drawChart();
    drawGate();
    if (step.injected.length) drawPicture();
    return;
  }
  result = line.result;
  rows = result.trace;
  views = result.views;
  const seconds = Object.values(result.usage ? result.usage.seconds : {}).reduce((sum, each) => sum + each, 0);
  say(`Answered in ${digits(seconds, 2)} s.`);
  at("answered").hidden = false;
  at("answer").textContent = visible(result.answer.trim()) || "(empty)";
  drawChoices();
  at("known").hidden = !known;
  if (known) at("known").textContent = `The picture was drawn with this answer in mind: ${known.answer}`;
  at("warnings").replaceChildren(...result.warnings.slice(0, 10).map(each => make("li", {}, visible(each, 300))));
  at("warnings").hidden = result.warnings.length === 0;
  drawPicture();
  planned = result.budget ? result.budget.iterations : rows.length;
  drawChart();
  drawGate();
  drawWhy();
  write();
}

/* ------------------------------------------------------------------ what is shown */

function say(text) {
  at("status").textContent = text;
}

function showProblem(message, hint) {
  say("");
  at("problem").replaceChildren(make("strong", {}, visible(message, 1000)), " " + visible(hint, 1000));
  at("problem").hidden = false;
}

function forget() {
  rows = [];
  injected = [];
  views = [];
  result = null;
  for (const id of ["problem", "answered", "warnings", "why"]) at(id).hidden = true;
  planned = 0;
  drawPicture();
  drawChart();
  drawGate();
}

/* The answers to choose from, one a line; none: the answer is free. */
function options() {
  return at("options").value.split("\n").map(line => line.trim()).filter(line => line);
}

/* A bar for every option, the likeliest first. */
function drawChoices() {
  const ranked = [...(result.choices || [])].sort((one, other) => other.probability - one.probability);
  at("choices").hidden = ranked.length === 0;
  at("choices").replaceChildren(...ranked.slice(0, 40).map(choice => {
    const about = share(choice.probability);
    return make("tr", {},
      make("th", { scope: "row", class: "free", dir: "auto" }, visible(choice.text, 200)),
      make("td", { class: "num" }, about),
      make("td", {}, make("svg", { class: "gauge", viewBox: "0 0 300 14", role: "img", "aria-label": `${about} of 1` },
        make("rect", { class: "ground", x: 1, y: 1, width: 298, height: 12, rx: 3 }),
        make("rect", { class: "level", x: 1, y: 1, width: 298 * choice.probability, height: 12, rx: 3 }))));
  }));
}

/* The gate decides anew whenever the threshold moves. */
function drawGate() {
  const threshold = Number(at("threshold").value);
  at("threshold-value").textContent = threshold.toFixed(2);
  at("mark").setAttribute("d", `M${1 + 298 * threshold} 0V18`);
  const known = rows.filter(row => Number.isFinite(row.first_token_probability));
  const live = result || !known.length ? null : known.at(-1).first_token_probability;
  const confidence = result ? result.confidence : live;
  at("level-bar").setAttribute("width", confidence === null ? 0 : 298 * confidence);
  at("level-bar").setAttribute("class", result ? "level" : "level live");
  const verdict = at("verdict");
  verdict.className = "verdict";
  let about = "No confidence yet";
  verdict.textContent = "\u00a0";
  if (live !== null) {
    about = `First token ${share(live)} of 1 so far`;
    verdict.textContent = `First token ${share(live)} so far, not yet a confidence`;
  }
  if (result) {
    const source = result.confidence_source.replaceAll("_", " ");
    about = confidence === null ? "Not scored" : `Confidence ${share(confidence)} of 1 (${source}), threshold ${threshold}`;
    const why = barred(result);
    const accepted = confidence !== null && confidence >= threshold && why === null;
    verdict.classList.add(accepted ? "good" : "bad");
    verdict.textContent = (confidence === null ? "Not scored" : `Confidence ${share(confidence)} (${source})`)
      + (accepted ? ": ✓ accepted" : `: ✗ abstained${why === null ? "" : `, ${why}`}. `
        + "Spend more, ask a larger model, or ask someone.");
  }
  at("gauge").setAttribute("aria-label", about);
  drawSure(known, threshold);
}

/* Why no confidence makes an answer acceptable, in words, or null where the threshold decides. */
function barred(result) {
  const reason = result.abstain_reason || null;
  if (result.domain && result.domain.refused) {
    return visible(reason || `the picture is unlike what this model knows (p = ${result.domain.p_value.toFixed(3)})`, 300);
  }
  const compared = reason === null || /^the (confidence|answer has no confidence)/.test(reason);
  return compared ? null : visible(reason, 300);
}

/* Where a round is on both charts. */
function across(round) {
  return 92 + round / Math.max(planned, rows.length ? rows.at(-1).round : 0, 1) * 532;
}

/* How sure the best state is of its first token, round by round, and the confidence at the end. */
function drawSure(known, threshold) {
  const y = value => 150 - 134 * value;
  const parts = [0, 0.5, 1].flatMap(value => [make("path", { class: "axis", d: `M92 ${y(value)}H624` }),
    make("text", { x: 84, y: y(value) + 5, "text-anchor": "end" }, String(value))]);
  parts.push(make("path", { class: "threshold", d: `M92 ${y(threshold)}H624` }));
  const points = known.map(row => [across(row.round), y(row.first_token_probability)]);
  parts.push(make("polyline", { class: "best", points: points.map(point => point.join(",")).join(" ") }));
  if (points.length === 1) parts.push(make("circle", { class: "point", cx: points[0][0], cy: points[0][1], r: 4 }));
  let about = known.length ? `First token ${share(known[0].first_token_probability)} in round ${known[0].round}, `
    + `${share(known.at(-1).first_token_probability)} in round ${known.at(-1).round}` : "No search yet";
  if (result && result.confidence !== null) {
    const x = across(rows.length ? rows.at(-1).round : 0);
    parts.push(make("path", { class: "final", d: `M${x} ${y(result.confidence) - 9}l9 9l-9 9l-9 -9z` }));
    about += `; confidence of the answer ${share(result.confidence)}`;
  }
  at("sure").replaceChildren(...parts);
  at("sure").setAttribute("aria-label", about);
}

function drawChart() {
  const chart = at("chart");
  const seen = rows.filter(row => Number.isFinite(row.reward) && Number.isFinite(row.best_reward));
  if (!seen.length) {
    chart.replaceChildren(make("path", { class: "axis", d: "M92 200H624" }));
    chart.setAttribute("aria-label", "No search yet");
    return;
  }
  const values = seen.flatMap(row => [row.reward, row.best_reward]);
  let low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low) * 0.08 || Math.max(Math.abs(high) * 0.05, 0.001);
  low -= margin;
  high += margin;
  const last = Math.max(planned, seen.at(-1).round, 1);
  const x = across;
  const y = value => 200 - (value - low) / (high - low) * 176;
  const parts = [];
  const levels = high - low > 2 * margin ? [low + margin, (low + high) / 2, high - margin] : [(low + high) / 2];
  const names = [3, 4, 5, 6, 7, 8].map(count => levels.map(value => digits(value, count)));
  const shown = names.find(each => new Set(each).size === levels.length) || names[0];
  levels.forEach((value, index) => parts.push(make("path", { class: "axis", d: `M92 ${y(value)}H624` }),
    make("text", { x: 84, y: y(value) + 5, "text-anchor": "end" }, shown[index])));
  const ticks = new Set([0, 1, 2, 3, 4, 5].map(i => Math.round(last * i / 5)));
  for (const round of ticks) parts.push(make("text", { x: x(round), y: 226, "text-anchor": "middle" }, String(round)));
  for (const [name, key] of [["current", "reward"], ["best", "best_reward"]]) {
    parts.push(make("polyline", { class: name, points: seen.map(row => `${x(row.round)},${y(row[key])}`).join(" ") }));
  }
  for (const row of seen.filter(each => each.accepted.length)) {
    const top = y(row.best_reward);
    parts.push(make("g", {}, make("title", {}, `Round ${row.round}: ${row.accepted.length} taken in`),
      make("circle", { cx: x(row.round), cy: top, r: 6 }),
      make("text", { class: "count", x: x(row.round), y: top + (top < 44 ? 26 : -12), "text-anchor": "middle" },
        "+" + row.accepted.length)));
  }
  chart.replaceChildren(...parts);
  chart.setAttribute("aria-label", `The best reward goes from ${digits(seen[0].best_reward, 4)} to `
    + `${digits(seen.at(-1).best_reward, 4)} in round ${seen.at(-1).round}`);
}

function drawWhy() {
  at("why").hidden = false;
  drawViews();
  at("no-patches").hidden = result.patches.length > 0;
  at("patches").parentElement.parentElement.hidden = result.patches.length === 0;
  at("patches").replaceChildren(...result.patches.slice(0, 256).map(patch => {
    const number = patch.rank + 1;
    const row = make("tr", { "data-patch": number }, make("th", { scope: "row" }, String(number)),
      ...[digits(patch.attention), digits(patch.gain), patch.box ? patch.box.map(edge => digits(edge, 4)).join(", ") : "not known"]
        .map(text => make("td", {}, text)));
    follow(row, number);
    return row;
  }));
  const grounding = result.grounding;
  at("tokens").hidden = at("tokens-key").hidden = !grounding;
  if (grounding) {
    at("tokens").replaceChildren(...grounding.tokens.slice(0, 512).map(token => {
      const s = token.dependency;
      const level = Math.max(-3, Math.min(5, Math.ceil(Math.abs(s) - 0.25) * Math.sign(s)));
      const names = (level < 0 ? "m" + -level : "p" + level) + (token.in_answer ? " answers" : "");
      return make("span", { class: names, title: `S = ${digits(s)} nats, probability ${digits(token.probability)}` },
        visible(token.token, 40));
    }));
  }
  at("controls").hidden = !result.controls;
  if (result.controls) {
    const pairs = [["as asked", result], ["latents off", result.controls.latents_off], ["image noised", result.controls.image_noised]];
    at("controls").replaceChildren(make("tbody", {}, ...pairs.map(([name, control]) => make("tr", {},
      make("th", { scope: "row" }, name), make("td", { class: "free" }, visible(control.answer, 300)),
      make("td", {}, control.confidence === null ? "\u2013" : share(control.confidence))))));
  }
  const usage = result.usage;
  at("cost").textContent = usage ? `${usage.candidates} states scored, ${usage.decoder_calls} decoder calls; why no more: `
    + `${String(result.stop_reason).replaceAll("_", " ")}.` : "";
}

/* ------------------------------------------------------------------ the same in Python */

/* A Python literal: JSON texts are Python texts, and what cannot be seen in the line is written as an escape. */
function literal(value) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  return JSON.stringify(value).replace(/[\p{C}\p{Zl}\p{Zp}\u00a0]/gu, char => {
    const code = char.codePointAt(0).toString(16);
    return code.length > 4 ? "\\U" + code.padStart(8, "0") : "\\u" + code.padStart(4, "0");
  });
}

function write() {
  if (!setup) return;
  const changes = budget();
  const level = at("level").value;
  const names = ["LatentReasoner"];
  let limits = literal(level);
  if (Object.keys(changes).length) {
    names.unshift("Budget");
    limits = `Budget.level(${literal(level)}).but(`
      + Object.entries(changes).map(([name, value]) => `${name}=${literal(value)}`).join(", ") + ")";
  }
  const drawn = picture && picture.drawn;
  const code = [
    `from latent_tool import ${names.join(", ")}`,
    ...(drawn ? ["from latent_tool.scenes import generate"] : []),
    "",
    "reasoner = LatentReasoner(",
    ...Object.entries(setup.arguments).map(([name, value]) => `    ${name}=${literal(value)},`),
    `    budget=${limits},`,
    `    seed=${literal(Number(at("seed").value || 0))},`,
    `    min_confidence=${literal(Number(at("threshold").value))},`,
    ")",
    "result = reasoner.invoke({",
    drawn ? `    "image": generate(${drawn.seed}, kind=${literal(drawn.kind)}).image,`
      : `    "image": ${literal(picture ? picture.name : "picture.png")},`,
    `    "question": ${literal(at("question").value)},`,
    ...(options().length ? [`    "options": ${literal(options())},`] : []),
    "})",
    "print(result.answer, result.confidence)",
    "if not result.accepted:",
    "    ...  # spend more, ask another model, or a person",
  ];
  at("python").textContent = code.join("\n");
}

/* ------------------------------------------------------------------ the page */

async function call(url, options = {}) {
  try {
    const reply = await fetch(url, options);
    if (reply.ok) return reply;
    const problem = await reply.json().catch(() => ({}));
    showProblem(problem.message || `The service answered ${reply.status}.`, problem.hint || "");
  } catch {
    showProblem("The service cannot be reached.", "Is latent-tool play still running?");
  }
  return null;
}

async function save() {
  if (!result || !asked) return;
  const reply = await call("/play/report", {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ ...asked, result }) });
  if (!reply) return;
  const url = URL.createObjectURL(await reply.blob());
  make("a", { href: url, download: "report.html" }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

function chooseLevel() {
  const level = setup.levels[at("level").value];
  for (const name of ["iterations", "max_patches", "max_views", "deadline_s"]) at(name).value = level[name] === null ? "" : level[name];
  at("always").checked = level.target_confidence === null;
  at("always").disabled = level.target_confidence === null;  // the level always searches
}

async function begin() {
  const reply = await call("/play/setup");
  if (!reply) return;
  setup = await reply.json();
  at("model").textContent = visible(setup.model, 200);
  at("about-model").textContent = setup.about ?? "";
  at("level").replaceChildren(...Object.keys(setup.levels).map(name => make("option", { value: name }, name)));
  at("level").value = setup.level;
  at("seed").value = setup.seed;
  at("threshold").value = setup.min_confidence;
  for (const name of ["iterations", "max_patches", "max_views", "deadline_s"]) {
    if (setup.ceilings[name] !== null) at(name).max = setup.ceilings[name];
  }
  for (const [kind, name] of Object.entries(setup.kinds)) {
    const button = make("button", { type: "button", class: "chip", "data-kind": kind }, name);
    button.addEventListener("click", () => draw(kind));
    at("examples").append(button);
  }
  chooseLevel();
  drawChart();
  drawGate();
  write();
  document.body.dataset.ready = "yes";
}

at("file").addEventListener("change", event => {
  const file = event.target.files[0];
  if (file) usePicture(file, file.name);
  event.target.value = ""; // so that the same file can be chosen again
});
for (const name of ["dragover", "dragenter"]) document.addEventListener(name, event => {
  event.preventDefault();
  at("drop").classList.add("over");
});
document.addEventListener("dragleave", event => {
  if (!event.relatedTarget) at("drop").classList.remove("over");
});
document.addEventListener("drop", event => {
  event.preventDefault();
  at("drop").classList.remove("over");
  const file = event.dataTransfer.files[0];
  if (file) usePicture(file, file.name);
  else showProblem("What was dropped is no file.", "Save the picture first, then drop the file.");
});
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(each => each.type.startsWith("image/"));
  if (file) usePicture(file, file.name || "pasted.png");
});
at("form").addEventListener("submit", event => {
  event.preventDefault();
  ask();
});
at("form").addEventListener("input", write);
at("level").addEventListener("change", () => {
  chooseLevel();
  write();
});
at("threshold").addEventListener("input", () => {
  drawGate();
  write();
});
at("heat").addEventListener("change", drawPicture);
at("stop").addEventListener("click", stop);
document.addEventListener("keydown", event => {
  if (event.key === "Escape") stop();
});
at("save").addEventListener("click", save);
at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(at("python").textContent);
    at("copied").textContent = "Copied.";
  } catch {
    getSelection().selectAllChildren(at("python"));
    at("copied").textContent = "Selected: copy it with the keyboard.";
  }
});
begin();
