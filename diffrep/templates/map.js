"use strict";
const d = JSON.parse(document.getElementById("data").textContent), n = d.x.length;
const canvas = document.getElementById("map"), g = canvas.getContext("2d");
const tip = document.getElementById("tip");
const min = a => a.reduce((p, q) => Math.min(p, q), Infinity);
const max = a => a.reduce((p, q) => Math.max(p, q), -Infinity);
const box = { x: (min(d.x) + max(d.x)) / 2, y: (min(d.y) + max(d.y)) / 2,
  w: max(d.x) - min(d.x) || 1, h: max(d.y) - min(d.y) || 1 };
const radius = Math.max(1.2, Math.min(5, 160 / Math.sqrt(n)));
const byShade = d.palette.map(() => []);
for (let i = 0; i < n; i++) byShade[d.shade[i]].push(i);
const SIDE = 56, switched = document.getElementById("pictures"), images = new Map();
for (const [i, source] of Object.entries(d.pictures)) {
  const image = new Image();
  image.onload = () => { images.set(+i, image); if (images.size % 20 === 0 || images.size === total) draw(); };
  image.src = source;
}
const total = Object.keys(d.pictures).length;
let view, width, height, drag = null, marked = -1;
function reset() {
  const scale = 0.92 * Math.min(width / box.w, height / box.h);
  view = { scale, x: width / 2 - box.x * scale, y: height / 2 + box.y * scale };
}
const sx = i => view.x + d.x[i] * view.scale, sy = i => view.y - d.y[i] * view.scale;
function draw() {
  g.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
  g.clearRect(0, 0, width, height);
  byShade.forEach((points, k) => {
    g.fillStyle = d.palette[k]; g.globalAlpha = 0.8; g.beginPath();
    for (const i of points) {
      const x = sx(i), y = sy(i); g.moveTo(x + radius, y); g.arc(x, y, radius, 0, 6.2832);
    }
    g.fill();
  });
  g.globalAlpha = 1;
  if (switched && switched.checked) thumbnails();
  if (marked >= 0) { g.lineWidth = 2; g.strokeStyle = "#000"; g.beginPath();
    g.arc(sx(marked), sy(marked), radius + 3, 0, 6.2832); g.stroke(); }
}
function thumbnails() { // of as many points as have room; more of them when one comes closer
  const taken = [];
  g.lineWidth = 3;
  for (const [i, image] of [...images].sort((p, q) => p[0] - q[0])) {
    const x = sx(i), y = sy(i), reach = Math.max(image.width, image.height);
    if (x < 0 || y < 0 || x > width || y > height) continue;
    if (taken.some(([u, v]) => Math.abs(u - x) < SIDE && Math.abs(v - y) < SIDE)) continue;
    taken.push([x, y]);
    const w = SIDE * image.width / reach, h = SIDE * image.height / reach;
    g.drawImage(image, x - w / 2, y - h / 2, w, h);
    g.strokeStyle = d.palette[d.shade[i]]; g.strokeRect(x - w / 2, y - h / 2, w, h);
  }
}
if (switched) switched.onchange = draw;
function resize() {
  width = innerWidth; height = innerHeight - document.querySelector("header").offsetHeight - 1;
  canvas.style.width = width + "px"; canvas.style.height = height + "px";
  canvas.width = width * devicePixelRatio; canvas.height = height * devicePixelRatio;
  reset(); draw();
}
canvas.onmousemove = e => {
  if (drag) {
    view.x += e.offsetX - drag.x; view.y += e.offsetY - drag.y;
    drag = { x: e.offsetX, y: e.offsetY }; tip.style.display = "none"; return draw();
  }
  let best = 144, found = -1;
  for (let i = 0; i < n; i++) { const a = sx(i) - e.offsetX, b = sy(i) - e.offsetY, r = a * a + b * b;
    if (r < best) { best = r; found = i; } }
  if (found !== marked) { marked = found; draw(); }
  if (found < 0) { tip.style.display = "none"; return; }
  const known = Object.keys(d.columns).map(k => k + ": " + d.columns[k][found]);
  tip.textContent = ["row: " + d.row[found], ...known].join("\n");
  if (d.pictures[found]) {
    const picture = document.createElement("img"); picture.src = d.pictures[found]; tip.prepend(picture);
  }
  tip.style.display = "block";
  tip.style.left = Math.min(e.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
  tip.style.top = Math.min(e.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
};
canvas.onmousedown = e => { drag = { x: e.offsetX, y: e.offsetY }; };
onmouseup = () => { drag = null; };
canvas.onmouseleave = () => { marked = -1; tip.style.display = "none"; draw(); };
canvas.ondblclick = () => { reset(); draw(); };
canvas.addEventListener("wheel", e => {
  e.preventDefault();
  const f = Math.exp(-e.deltaY * 0.0015);
  view.x = e.offsetX - (e.offsetX - view.x) * f; view.y = e.offsetY - (e.offsetY - view.y) * f;
  view.scale *= f; draw();
}, { passive: false });
onresize = resize; resize();
