"use strict";
// The list of queries. Text from data is set as text, never as HTML.
const content = JSON.parse(document.getElementById("content").textContent);
const count = content.text.length;
const PAGE = 20;
const field = (name) => document.getElementById(name);
const value = (name) => (field(name) ? field(name).value : "");
let page = 0;
let found = [];

// What the words of the filter are looked for in, made when it is first needed.
let searched = null;
function searchTexts() {
  if (searched) return searched;
  const name = (n) => content.items[n] + " " + (content.names[n] || "");
  searched = content.text.map((text, n) => {
    const parts = [text || "", content.need[n] || ""];
    if (content.reference[n] !== null) parts.push(name(content.reference[n]));
    for (const target of content.targets[n]) parts.push(name(target));
    for (const tag of content.tags[n]) parts.push(content.tagNames[tag]);
    return parts.join("\n").toLowerCase();
  });
  return searched;
}

function select() {
  const words = value("words").trim().toLowerCase();
  const tag = value("tag"), label = value("label"), order = value("order");
  const ranks = content.ranks[Number(value("column"))];
  const low = value("from") === "" ? -Infinity : Number(value("from"));
  const high = value("to") === "" ? Infinity : Number(value("to"));
  const texts = words ? searchTexts() : null;
  const listed = content.lists[value("list")] || Array.from({ length: count }, (_, n) => n);
  found = listed.filter((n) =>
    (!words || texts[n].includes(words)) &&
    (tag === "" || content.tags[n].includes(Number(tag))) &&
    (label === "" || content.labels[n] === Number(label)) &&
    ranks[n] >= low && ranks[n] <= high);
  if (order !== "list") found.sort((a, b) => (order === "worst" ? ranks[b] - ranks[a] : ranks[a] - ranks[b]));
  page = 0;
  show();
}

function make(kind, className, text) {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function makeItem(number, role, state) {
  const id = content.items[number], name = content.names[number] || id;
  const item = make("div", "item " + (state || "")), frame = make("div", "picture");
  item.title = id === name ? id : name + " (" + id + ")";
  if (content.pictures[number]) {
    const picture = make("img");
    picture.src = content.pictures[number];
    picture.alt = name;
    frame.append(picture);
  } else {
    frame.textContent = content.texts[number] || "no picture";
  }
  const title = make("bdi", "name", name);
  item.append(frame, make("div", "role", role), title);
  return item;
}

function makeRow(title, className) {
  const row = make("div", "row " + className);
  row.append(make("div", "title", title));
  return row;
}

// Ranks of a query: a line for each model, a column for each mode.
function makeRanks(n) {
  const frame = make("div", "wide"), table = make("table", "ranks");
  const head = table.createTHead().insertRow(), body = table.createTBody();
  const title = (scope, text) => { const cell = make("th"); cell.scope = scope; cell.append(make("bdi", "", text)); return cell; };
  head.append(title("col", "rank"), ...content.modes.map((mode) => title("col", mode)));
  const rows = content.models.map((model) => {
    const row = body.insertRow();
    row.append(title("row", model));
    for (const _ of content.modes) row.insertCell().textContent = "–";
    return row;
  });
  content.columns.forEach(([model, mode], at) => { rows[model].cells[mode + 1].textContent = String(content.ranks[at][n]); });
  frame.append(table);
  return frame;
}

function makeQuery(n) {
  const card = make("article"), text = make("p"), about = make("div", "about");
  text.append(make("bdi", "", content.text[n] === null ? "(no text)" : content.text[n]));
  const fact = (label, said) => {
    const part = make("span", "", label + " ");
    part.append(make("b", "", said));
    about.append(part);
  };
  fact("query", String(n));
  if (content.models.length === 1) content.columns.forEach(([, mode], at) => fact(content.modes[mode], String(content.ranks[at][n])));
  if (content.labels.length) fact("solved by", content.labelNames[content.labels[n]]);
  for (const tag of content.tags[n]) fact("tag", content.tagNames[tag]);
  if (content.need[n]) fact("need", content.need[n]);
  card.append(text, about);
  if (content.models.length > 1) card.append(makeRanks(n));
  const tops = content.tops[n];
  if (!tops) {
    const ids = make("div", "about"), name = (item) => content.names[item] || content.items[item];
    const part = (label, said) => { const one = make("span", "", label + " "); one.append(make("bdi", "", said)); ids.append(one); };
    if (content.reference[n] !== null) part("reference", name(content.reference[n]));
    const more = content.targetCounts[n] - content.targets[n].length;
    part("target", content.targets[n].map(name).join(", ") + (more ? " and " + more + " more" : ""));
    card.append(ids);
    return card;
  }
  const asked = makeRow("query", "asked");
  if (content.reference[n] !== null) asked.append(makeItem(content.reference[n], "reference"));
  const rank = (content.targetCounts[n] > 1 ? "target, best rank " : "target, rank ") + content.ranks[0][n];
  for (const target of content.targets[n]) asked.append(makeItem(target, rank, "target"));
  const more = content.targetCounts[n] - content.targets[n].length;
  if (more) asked.append(make("div", "item", "and " + more + " more"));
  card.append(asked);
  tops.forEach((top, model) => {
    const row = makeRow("found by " + content.models[model], "found");
    top.forEach(([item, state], place) => {
      row.append(makeItem(item, String(place + 1) + (state === "wrong" ? ", wrong answer" : state && ", " + state), state));
    });
    card.append(row);
  });
  return card;
}

function show() {
  const pages = Math.max(1, Math.ceil(found.length / PAGE));
  const part = found.slice(page * PAGE, (page + 1) * PAGE);
  field("queries").replaceChildren(...part.map(makeQuery));
  field("count").textContent = found.length.toLocaleString("en") + (found.length === 1 ? " query" : " queries") + " of " + count.toLocaleString("en");
  field("page").textContent = "page " + (page + 1) + " of " + pages;
  field("before").disabled = page === 0;
  field("after").disabled = page + 1 >= pages;
}

function turn(by) {
  page += by;
  show();
  field("count").scrollIntoView();
}

let waiting = 0;
field("filter").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(select, 120);
});
field("filter").addEventListener("submit", (event) => event.preventDefault());
field("before").addEventListener("click", () => turn(-1));
field("after").addEventListener("click", () => turn(1));
select();
